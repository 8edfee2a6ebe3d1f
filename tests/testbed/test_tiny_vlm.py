"""Tokenizer and chat template: one string, the same ids everywhere, and questions that know where they
end.
"""

import random

import pytest
import torch

from medray.testbed.build import Lessons
from medray.testbed.corpus import SHAPES, report_dialogue, sample_uniform, scene_dialogue
from medray.testbed.tiny_vlm import build_tokenizer, llava_processor
from medray.testbed.training import Encoder


@pytest.fixture(scope="module")
def processor():
    rng = random.Random(0)
    return llava_processor(
        build_tokenizer([turn["text"] for _ in range(200) for turn in report_dialogue(rng)])
    )


def test_plain_tokenization_adds_nothing_and_is_lossless(processor):
    tokenizer = processor.tokenizer
    for text in (
        "What is the cell type?",
        "A. purple blue\nB. nil",
        "Grüße: 5 µm, naïve — 細胞",
        "  two  spaces ",
    ):
        ids = tokenizer(text).input_ids
        assert tokenizer.bos_token_id not in ids and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_same_texts_give_the_same_tokenizer():
    a, b = (build_tokenizer(["a cell, a cell", "the nucleus"]).backend_tokenizer.to_str() for _ in range(2))
    assert a == b


def test_template_writes_the_documented_text(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cell"}]},
        {"role": "vuser", "content": "Which colour?"},
    ]
    expected = (
        "<s><|system|>Be brief.<|end|><|user|><image>What is it?<|end|><|assistant|>a "
        "cell<|end|><|vuser|>Which colour?<|end|>"
    )
    assert processor.apply_chat_template(messages) == expected
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected + "<|assistant|>"
    assert processor.tokenizer.apply_chat_template(messages, tokenize=False) == expected


def test_special_tokens_are_single_ids(processor):
    tokenizer = processor.tokenizer
    for token in (
        "<s>",
        "<pad>",
        "<image>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|vuser|>",
        "<|end|>",
    ):
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<|end|>", "<pad>")


def test_training_ids_equal_the_templates(processor):
    """The training loop encodes turn by turn; what users do is template, then tokenizer."""
    encoder, rng = Encoder(processor.tokenizer, image_tokens=64), random.Random(1)
    for _ in range(30):
        dialogue = scene_dialogue(sample_uniform(SHAPES, rng), rng)
        messages = [{"role": turn["role"], "content": turn["text"]} for turn in dialogue]
        first = next(m for m in messages if m["role"] != "system")
        first["content"] = [{"type": "image"}, {"type": "text", "text": first["content"]}]
        text = processor.apply_chat_template(messages).replace("<image>", "<image>" * 64)
        ids, weights = encoder.encode(dialogue, image=True)
        assert ids == processor.tokenizer(text).input_ids
        supervised = [t for t, w in zip(ids, weights) if w > 0]
        wanted = "".join(t["text"] + "<|end|>" for t in dialogue if t["role"] in ("assistant", "vuser"))
        assert processor.tokenizer.decode(supervised) == wanted


def test_stopped_build_goes_on_after_the_last_whole_lesson(tmp_path):
    def lesson(value):
        torch.nn.init.constant_(model.weight, value)

    def stopped():
        lesson(5.0)
        raise RuntimeError("stopped")

    model = torch.nn.Linear(2, 2)
    lessons = Lessons(model, tmp_path / "lessons")
    lessons.take("reading", lambda: lesson(1.0))
    with pytest.raises(RuntimeError, match="stopped"):
        lessons.take("pictures", stopped)

    model = torch.nn.Linear(2, 2)
    again = Lessons(model, tmp_path / "lessons")
    again.take("reading", lambda: pytest.fail("taken twice"))
    assert (model.weight == 1).all()
    again.take("pictures", lambda: lesson(2.0))
    assert (model.weight == 2).all()
    again.forget()
    assert not (tmp_path / "lessons").exists()
