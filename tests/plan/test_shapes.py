"""Parameters against the real models' (on the meta device: no memory, no weights), operations against
sums by hand.
"""

import json
import math
from pathlib import Path

import pytest

from medray.config import EngineConfig, LoraConfig, ModelConfig, SelfPlayConfig, SftConfig
from medray.errors import ConfigError
from medray.plan import memory, work
from medray.plan.shapes import KNOWN, Language, Shape, Vision, shape_from, shape_of

SMALL = Shape(
    Language(width=8, layers=2, heads=2, kv_heads=1, inner=16, vocabulary=10),
    Vision(width=4, layers=1, inner=8, patch=2, patches=9),
)
# One layer of the language model: 2 x 64 query and output, 2 x 8 x 4 key and value, 3 x 128 of the MLP.
LAYER = 128 + 64 + 384


def parameters_of(config):
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())


@pytest.fixture(scope="module")
def llava_7b():
    from transformers import LlavaConfig

    # transformers' defaults are LLaVA-1.5's
    config = LlavaConfig(image_token_id=32000, tie_word_embeddings=False)
    config.text_config.vocab_size = 32064
    return config


@pytest.fixture(scope="module")
def qwen_7b():
    from transformers import Qwen2_5_VLConfig

    rope = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_scaling": rope,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    ("fixture", "name"),
    [("llava_7b", "llava-hf/llava-1.5-7b-hf"), ("qwen_7b", "Qwen/Qwen2.5-VL-7B-Instruct")],
)
def test_parameters_are_the_real_models(request, fixture, name):
    config = request.getfixturevalue(fixture)
    assert shape_from(config).parameters == KNOWN[name].parameters == parameters_of(config)


def test_sizes_of_the_published_weights():
    """As the hub's safetensors indices count them."""
    assert KNOWN["llava-hf/llava-1.5-7b-hf"].parameters == 7_063_427_072
    assert KNOWN["Qwen/Qwen2.5-VL-3B-Instruct"].parameters == 3_754_622_976
    assert KNOWN["Qwen/Qwen2.5-VL-7B-Instruct"].parameters == 8_292_166_656
    assert KNOWN["Qwen/Qwen2.5-VL-72B-Instruct"].parameters == 73_410_777_344


def test_a_folders_shape(tiny_llava):
    from safetensors import safe_open

    with safe_open(Path(tiny_llava, "model.safetensors"), framework="np") as weights:
        stored = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    assert shape_of(tiny_llava).parameters == stored
    assert (
        shape_of(tiny_llava).vision.image_tokens
        == json.loads(Path(tiny_llava, "config.json").read_text())["image_seq_length"]
    )


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="org/unheard-of is not known; give a local folder"):
        shape_of("org/unheard-of")


def test_forward_by_hand():
    language = SMALL.language
    assert language.layer_weights == LAYER
    assert language.parameters == 2 * (LAYER + 2 * 8) + 8 + 2 * 80
    assert language.forward(6) == 6 * 2 * (2 * LAYER + 4 * 8 * 3), "each of six attends to three on average"
    assert language.forward(1, 100) == 2 * (2 * LAYER + 4 * 8 * 100)
    assert language.head(5) == 5 * 2 * 80
    assert language.cache_bytes() == 2 * 2 * 4 * 2, "key and value, two layers, one head of 4, two bytes"
    assert language.lora(3) == 2 * 3 * (16 + 16 + 12 + 12 + 24 * 3)
    tower = 10 * 1 * (2 * (64 + 64) + 4 * 4 * 10) + 2 * 10 * 12 * 4
    assert SMALL.vision.forward(8) == tower + 2 * 9 * (4 * 8 + 8 * 8)


@pytest.mark.parametrize(
    ("trained", "below", "full", "recompute", "forwards"),
    [
        (False, False, False, True, 1),
        (False, True, False, False, 2),
        (True, False, False, False, 2),
        (True, False, True, False, 3),
        (True, False, True, True, 4),
        (False, True, True, True, 3),
    ],
)
def test_what_a_pass_costs_in_forwards(trained, below, full, recompute, forwards):
    assert work.passes(trained, below, full, recompute) == forwards


def test_a_training_row_by_hand():
    config = SftConfig(lora_llm=LoraConfig(rank=1, alpha=1), lora_vision=None, gradient_checkpointing=False)
    language = SMALL.language
    expected = (
        3 * SMALL.image_forward + 2 * language.forward(20) + 2 * language.head(7) + 6 * 20 * language.lora(1)
    )
    assert work.training_row(SMALL, config, 20, 7) == expected
    frozen_tower = config.model_copy(update={"lr_vision": None, "gradient_checkpointing": True})
    assert work.training_row(SMALL, frozen_tower, 20, 7) == SMALL.image_forward + 3 * language.forward(
        20
    ) + 2 * language.head(7) + 6 * 20 * language.lora(1)


def test_a_questioned_image_by_hand():
    lengths = work.Lengths(prompt=10, description=20, question=5, answer=8)
    found = work.questioned_image(SMALL, SelfPlayConfig(questions=3, answers=2), lengths)
    language = SMALL.language
    assert found.sampled == 20 + 3 * 5 + 6 * 8
    assert found.prefill == SMALL.image_forward + language.forward(9) + language.forward(
        10, 9
    ) + language.forward(30, 9) + 3 * language.forward(15, 9)
    assert found.context == pytest.approx(9 + (20 * (10 + 10) + 15 * (30 + 2.5) + 48 * (15 + 4)) / 83)


def test_training_memory_by_hand():
    """LLaVA-1.5-7B with LoRA 128 on the language model alone, ZeRO-3 over four workers."""
    config = SftConfig(lr_vision=None, lr_projector=None, num_workers=4, micro_batch=2)
    shape, model = KNOWN["llava-hf/llava-1.5-7b-hf"], ModelConfig()
    adapters = 32 * 128 * (4 * 8192 + 3 * 15104)
    assert memory.trained_parameters(shape, config) == adapters == 319_815_680
    parts = {
        name: value * 2**30
        for name, value in memory.training_memory(shape, model, config, 4, 1000, 100).items()
    }
    assert parts["weights"] == pytest.approx(2 * 7_063_427_072 / 4 + 2 * 10**9)
    assert parts["gradients"] == pytest.approx(2 * adapters / 4)
    assert parts["optimiser"] == pytest.approx(12 * adapters / 4)
    assert parts["activations"] == pytest.approx(
        2 * (1000 * 4096 * (2 * 32 + 34) + 576 * 1024 * (2 * 24 + 34))
    )
    assert parts["logits"] == pytest.approx((4 * 200 + 8 * 200) * 32064)
    one = memory.training_memory(shape, model, config.model_copy(update={"zero_stage": 1}), 4, 1000, 100)
    assert (one["weights"] * 2**30, one["gradients"] * 2**30) == pytest.approx(
        (2 * 7_063_427_072, 2 * adapters)
    )


def test_engine_memory_by_hand():
    shape, model = KNOWN["Qwen/Qwen2.5-VL-72B-Instruct"], ModelConfig()
    four = memory.engine_memory(shape, model, EngineConfig(tensor_parallel_size=4), 79)
    assert four["weights"] == pytest.approx(2 * 73_410_777_344 / 2**30 / 4)
    assert four["cache"] == pytest.approx(0.9 * 79 - four["weights"] - 3)
    assert memory.engine_memory(shape, model, EngineConfig(), 79)["cache"] < 0, "one device does not hold it"
    assert memory.concurrent_sequences(
        shape, EngineConfig(tensor_parallel_size=4, max_num_seqs=1000), four["cache"], 1000
    ) == pytest.approx(four["cache"] * 4 * 2**30 / (327_680 * 1000))
    assert memory.concurrent_sequences(shape, EngineConfig(max_num_seqs=7), 50, 1000) == 7


def test_how_many_devices_hold_a_training():
    lora, full = SftConfig(num_workers=4), SftConfig(lora_llm=None, lora_vision=None)
    small = KNOWN["Qwen/Qwen2.5-VL-7B-Instruct"]
    assert memory.least_workers(small, ModelConfig(), lora, 79, 1036, 240) == 1
    assert memory.least_workers(small, ModelConfig(), full, 79, 1036, 240) == 2, (
        "16 bytes per parameter are 124 GiB"
    )
    assert (
        memory.least_workers(small, ModelConfig(), full.model_copy(update={"zero_stage": 2}), 39, 1036, 240)
        == 8
    ), "the weights stay whole"


def test_a_model_that_one_device_cannot_load_is_not_trained():
    """Each worker loads all of it before it is divided; divided among four it would fit."""
    large = KNOWN["Qwen/Qwen2.5-VL-72B-Instruct"]
    config = SftConfig(num_workers=4)
    assert (
        sum(memory.training_memory(large, ModelConfig(), config, 4, 1036, 240).values())
        < 79
        < sum(memory.loading_memory(large, ModelConfig()).values())
    )
    assert memory.loading_memory(large, ModelConfig())["weights"] == pytest.approx(136.7, abs=0.1)
    assert memory.least_workers(large, ModelConfig(), config, 79, 1036, 240) is None
