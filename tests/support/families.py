"""Tiny random models of families that the testbed has no model of, complete folders as a hub's checkpoint
would look.

Chat templates are those of the families' checkpoints. Weights are wide enough for images and texts to matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medray.testbed.tiny_vlm import (
    CHAT_TEMPLATE,
    QWEN_TEMPLATE,
    SPECIAL_TOKENS,
    build_tokenizer,
    random_llava,
    random_qwen2_5_vl,
)

STD = 0.15
TEXT = [
    "What is the shape of the nucleus? It is round. Is the cell big? yes no user assistant model system : \n"
]
QWEN_SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )
)
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def text_config(tokenizer: Any, kind: str = "llama", **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": STD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **more,
    }


def write(model: Any, processor: Any, folder: Path, eos: list[int] | None = None) -> None:
    """As transformers itself saves a model, with all matrices of some size (SigLIP draws its own by
    fan-in).
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and float(parameter.std()) < 0.05:
                parameter.normal_(0, STD)
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = eos or tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def named_tokenizer(special: tuple[str, ...], named: dict[str, str], template: str, **kwargs: Any) -> Any:
    """One whose processor's tokens have names, and whose other special tokens only its own file knows, as
    Gemma's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=dict(named),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        **kwargs,
    )
    fast.chat_template = template
    return fast


def qwen_tokenizer() -> Any:
    return build_tokenizer(
        TEXT, QWEN_SPECIAL, 512, bos=None, eos="<|im_end|>", pad="<|endoftext|>", template=QWEN_TEMPLATE
    )


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "vision_end", "image_pad", "video_pad")
    }
    return {
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
    }


ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "mrope_section": [4, 6, 6],
}
LIMITS = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": STD,
}


def llava(folder: Path) -> None:
    random_llava(folder)


def qwen2_5_vl(folder: Path) -> None:
    random_qwen2_5_vl(folder)


def qwen2_vl(folder: Path) -> None:
    import transformers as t
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = qwen_tokenizer()
    text = text_config(tokenizer, "qwen2_vl_text", rope_parameters=ROPE)
    del text["head_dim"]
    config = t.Qwen2VLConfig(
        text_config=text,
        vision_config={**TOWER, "embed_dim": 64, "mlp_ratio": 2},
        tie_word_embeddings=False,
        **qwen_ids(tokenizer),
    )
    processor = t.Qwen2VLProcessor(
        image_processor=t.Qwen2VLImageProcessor(patch_size=14, **LIMITS),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=14, **LIMITS),
        chat_template=QWEN_TEMPLATE,
    )
    write(t.Qwen2VLForConditionalGeneration(config), processor, folder)


def qwen3(folder: Path, name: str, text: dict[str, Any], vision: dict[str, Any]) -> None:
    import transformers as t
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    tokenizer = qwen_tokenizer()
    rope = {**ROPE, "mrope_interleaved": True}
    text = {
        **text_config(tokenizer, rope_parameters=rope, num_hidden_layers=4, num_key_value_heads=1),
        **text,
    }
    del text["model_type"]
    vision = {
        **TOWER,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        **vision,
    }
    config = getattr(t, f"{name}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **qwen_ids(tokenizer)
    )
    images = t.Qwen2VLImageProcessor(patch_size=14, image_mean=[0.5] * 3, image_std=[0.5] * 3, **LIMITS)
    processor = t.Qwen3VLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=14),
        chat_template=QWEN_TEMPLATE,
    )
    write(getattr(t, f"{name}ForConditionalGeneration")(config), processor, folder)


def qwen3_vl(folder: Path) -> None:
    qwen3(folder, "Qwen3VL", {}, {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]})


def qwen3_vl_moe(folder: Path) -> None:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    qwen3(folder, "Qwen3VLMoe", experts, {"depth": 4, "deepstack_visual_indexes": [0, 1, 2]})


def qwen3_5(folder: Path) -> None:
    linear = {
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    qwen3(folder, "Qwen3_5", linear, {})


def llava_processor(tokenizer: Any, images: Any = None) -> Any:
    import transformers as t

    side = {"height": 32, "width": 32}
    return t.LlavaProcessor(
        image_processor=images or t.CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def clip_vision() -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=64, initializer_range=STD)


def llava_on(folder: Path, kind: str, **more: Any) -> None:
    """A LLaVA with a language model of another kind."""
    import transformers as t

    tokenizer = build_tokenizer(TEXT, SPECIAL_TOKENS, 512)
    text = t.AutoConfig.for_model(**{**text_config(tokenizer, kind), **more})
    config = t.LlavaConfig(
        vision_config=clip_vision(),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    write(t.LlavaForConditionalGeneration(config), llava_processor(tokenizer), folder)


def llava_windows(folder: Path) -> None:
    llava_on(folder, "mistral", sliding_window=8)


def llava_gemma2(folder: Path) -> None:
    llava_on(folder, "gemma2", sliding_window=8, query_pre_attn_scalar=32)


def llava_conv(folder: Path) -> None:
    llava_on(folder, "lfm2", full_attn_idxs=[1], block_ff_dim=64)


def vipllava(folder: Path) -> None:
    import transformers as t

    tokenizer = build_tokenizer(TEXT, SPECIAL_TOKENS, 512)
    config = t.VipLlavaConfig(
        vision_config=clip_vision(),
        text_config=text_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-1, -2],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    write(t.VipLlavaForConditionalGeneration(config), llava_processor(tokenizer), folder)


def llava_next(folder: Path) -> None:
    import transformers as t

    tokenizer = build_tokenizer(TEXT, SPECIAL_TOKENS, 512)
    pins = [[32, 64], [64, 32], [64, 64]]
    config = t.LlavaNextConfig(
        vision_config=clip_vision(),
        text_config=text_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pins,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pins
    )
    processor = t.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    write(t.LlavaNextForConditionalGeneration(config), processor, folder)


INTERN_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is "
    "string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == "
    "'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor "
    "%}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def internvl(folder: Path) -> None:
    import transformers as t

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = named_tokenizer(
        special, named, INTERN_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    text = text_config(tokenizer, "qwen2")
    config = t.InternVLConfig(
        vision_config={
            **VISION,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "initializer_range": STD,
            "layer_scale_init_value": 1.0,
        },
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    side = {"height": 56, "width": 56}
    images = t.GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=6)
    processor = t.InternVLProcessor(
        images,
        tokenizer,
        t.InternVLVideoProcessor(size=side),
        image_seq_length=4,
        chat_template=INTERN_TEMPLATE,
    )
    write(t.InternVLForConditionalGeneration(config), processor, folder)


SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}: {% for line in "
    "message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% "
    "endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def idefics3(folder: Path) -> None:
    import transformers as t

    rows = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    special = (
        "<|endoftext|>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
        *rows,
    )
    tokenizer = named_tokenizer(
        special,
        {"image_token": "<image>"},
        SMOL_TEMPLATE,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
    )
    config = t.Idefics3Config(
        vision_config={**VISION, "image_size": 32, "patch_size": 8, "initializer_range": STD},
        text_config=text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    images = t.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    processor = t.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOL_TEMPLATE)
    write(t.Idefics3ForConditionalGeneration(config), processor, folder)


GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) "
    "%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% else "
    "%}{{ item['text'] | trim }}"
    "{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)


def gemma3(folder: Path) -> None:
    import transformers as t

    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = named_tokenizer(
        GEMMA_SPECIAL, named, GEMMA_TEMPLATE, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in named.items()}
    more = {"query_pre_attn_scalar": 32, "sliding_window": 64, "sliding_window_pattern": 2}
    config = t.Gemma3Config(
        text_config=text_config(tokenizer, "gemma3_text", **more),
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token"],
        vision_config={**VISION, "image_size": 56, "patch_size": 14, "vision_use_head": False},
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
        initializer_range=STD,
    )
    side = {"height": 56, "width": 56}
    processor = t.Gemma3Processor(
        t.Gemma3ImageProcessor(size=side), tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4
    )
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    write(t.Gemma3ForConditionalGeneration(config), processor, folder, ends)


PALI_TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ "
    "c['text'] }}{% endif %}"
    "{% endfor %}{% if m['role'] == 'assistant' %}<eos>{% else %}\n{% endif %}{% endfor %}"
)


def paligemma(folder: Path) -> None:
    import transformers as t

    tokenizer = named_tokenizer(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<image>"),
        {"image_token": "<image>"},
        PALI_TEMPLATE,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    images = t.SiglipImageProcessor(size={"height": 56, "width": 56}, image_seq_length=16)
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, tokenizer, chat_template=PALI_TEMPLATE)
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(
            **VISION, image_size=56, patch_size=14, projection_dim=64, vision_use_head=False
        ),
        text_config=text_config(processor.tokenizer, "gemma", num_image_tokens=16),
        projection_dim=64,
        hidden_size=64,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    write(t.PaliGemmaForConditionalGeneration(config), processor, folder)


MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'][0]['text'] }}{{ "
    "eos_token }}{% else %}[INST]"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}[IMG]{% else %}{{ c['text'] }}{% endif %}{% "
    "endfor %}[/INST]{% endif %}"
    "{% endfor %}"
)


def mistral3(folder: Path) -> None:
    import transformers as t

    special = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = build_tokenizer(
        TEXT, special, 512, bos="<s>", eos="</s>", pad="<pad>", template=MISTRAL_TEMPLATE
    )
    config = t.Mistral3Config(
        vision_config={
            "model_type": "pixtral",
            **VISION,
            "image_size": 112,
            "patch_size": 14,
            "head_dim": 16,
            "initializer_range": STD,
        },
        text_config=text_config(tokenizer, "mistral"),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    images = t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 28, "width": 28})
    processor = t.PixtralProcessor(
        images, tokenizer, patch_size=14, spatial_merge_size=2, chat_template=MISTRAL_TEMPLATE
    )
    write(t.Mistral3ForConditionalGeneration(config), processor, folder)


def llama(folder: Path) -> None:
    """No vision at all."""
    import transformers as t

    tokenizer = build_tokenizer(TEXT, SPECIAL_TOKENS, 512)
    text = text_config(tokenizer)
    del text["model_type"]
    t.LlamaForCausalLM(t.LlamaConfig(**text)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


TUNED = (
    llava,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    qwen3_vl_moe,
    qwen3_5,
    llava_windows,
    llava_gemma2,
    llava_conv,
    vipllava,
)
# What the refusal names beside the family.
REFUSED = {
    llava_next: "image_sizes",
    internvl: "<img>",
    idefics3: "pixel_attention_mask",
    gemma3: "token_type_ids",
    paligemma: "labels",
    mistral3: "image_sizes",
    llama: "no images",
}
PACKED = (llava, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, vipllava)
