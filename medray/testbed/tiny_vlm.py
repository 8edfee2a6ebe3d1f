"""Tiny vision-language models in the field's standard formats: for the testbed, the demo and the tests.

The testbed's own LLaVA: CLIP tower (64 px, patch 8, 64 image tokens) -> two-layer MLP -> Llama, about 3M
parameters, with its own byte-level BPE tokenizer. Everything that works on it works on any LLaVA class model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

IMAGE_SIDE = 64
PATCH = 8
VOCABULARY = 1536

SPECIAL_TOKENS = (
    "<s>",
    "<pad>",
    "<image>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|vuser|>",
    "<|end|>",
)

# The questioner of SQ-LLaVA writes as `vuser`; every turn ends with <|end|>, so questions can be supervised
# to stop.
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% "
    "endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' "
    "%}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Enough text for a working vocabulary where no corpus is given (random models).
_SAMPLE_TEXT = (
    "What is the shape of the nucleus? The nucleus is segmented. Describe this medical image in detail. "
    "Is the cell big? yes no A. round B. irregular The cytoplasm is light blue with small pink granules. "
)


def build_tokenizer(
    texts: Iterable[str],
    special: tuple[str, ...] = SPECIAL_TOKENS,
    vocabulary: int = VOCABULARY,
    bos: str | None = "<s>",
    eos: str = "<|end|>",
    pad: str = "<pad>",
    template: str | None = CHAT_TEMPLATE,
) -> Any:
    """Byte-level BPE trained on `texts`; the same texts give the same tokenizer.

    A plain call adds no bos: the chat template writes it, so that every component sees the same ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    extra = [token for token in special if token not in (bos, eos, pad)]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=extra,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = template
    return fast


def llava_processor(tokenizer: Any, side: int = IMAGE_SIDE) -> Any:
    """LlavaProcessor: images of any shape become side x side pixels (square them first to keep the
    aspect).
    """
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"height": side, "width": side},
        do_center_crop=False,
        crop_size={"height": side, "width": side},
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def llava_model(
    tokenizer: Any,
    hidden: int = 192,
    layers: int = 4,
    vision_hidden: int = 128,
    vision_layers: int = 4,
    seed: int = 0,
    std: float = 0.02,
    side: int = IMAGE_SIDE,
) -> Any:
    """A LlavaForConditionalGeneration with fresh weights (fp32, about 3M parameters); `std` is that of
    the initial weights, `side` that of the images (pixels).
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=4 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        projection_dim=vision_hidden,
        initializer_range=std,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=std,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(side // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    _greedy_by_default(model, tokenizer)
    return model


def _greedy_by_default(model: Any, tokenizer: Any) -> None:
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


# Wide enough that a random model's greedy tokens depend on its input; at the usual 0.02 they repeat one
# token, and a wrong prompt or image would go unnoticed.
_RANDOM_STD = 0.15


def random_llava(
    directory: str | os.PathLike,
    seed: int = 0,
    texts: Iterable[str] | None = None,
    hidden: int = 128,
    layers: int = 2,
    side: int = IMAGE_SIDE,
) -> None:
    """Write the testbed's LLaVA with random weights (smaller: about 1M parameters) as a complete folder;
    `hidden` and `layers` are the language model's, `side` the images' (pixels; (side / 8)^2 image
    tokens).
    """
    from medray.models.export import save_vlm

    tokenizer = build_tokenizer(texts or [_SAMPLE_TEXT], vocabulary=512)
    model = llava_model(
        tokenizer,
        hidden=hidden,
        layers=layers,
        vision_hidden=64,
        vision_layers=2,
        seed=seed,
        std=_RANDOM_STD,
        side=side,
    )
    save_vlm(model, llava_processor(tokenizer, side), directory)


def random_qwen2_5_vl(directory: str | os.PathLike, seed: int = 0) -> None:
    """Write a Qwen2.5-VL of some 100k parameters with random weights as a complete folder."""
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    from medray.models.export import save_vlm

    special = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    tokenizer = build_tokenizer(
        [_SAMPLE_TEXT], special, 512, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=QWEN_TEMPLATE
    )
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "vision_end", "image_pad", "video_pad")
    }
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]},
            "initializer_range": _RANDOM_STD,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "initializer_range": _RANDOM_STD,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    _greedy_by_default(model, tokenizer)
    limits = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=14, **limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=14, **limits),
        chat_template=QWEN_TEMPLATE,
    )
    save_vlm(model, processor, directory)
