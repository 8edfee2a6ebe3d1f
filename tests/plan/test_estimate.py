"""The estimate's stages by hand, against what was measured, and at the scales it is for."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from medray.config import DpoConfig, JudgeConfig, LoraConfig, SelfTrainingConfig, load_config
from medray.plan import work
from medray.plan.devices import DEVICES, Device, Gains
from medray.plan.estimate import Plan, generating, judging, preparing, self_training, tuning
from medray.plan.memory import engine_memory
from medray.plan.shapes import KNOWN, Language, Shape, Vision

ROOT = Path(__file__).resolve().parents[2]
LLAVA = KNOWN["llava-hf/llava-1.5-7b-hf"]
DEVICE = DEVICES["a100-80gb"]


def measured(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["result"]


class TestMeasuredRuns:
    """The machine's speed from one recorded benchmark, the other benchmarks' results from that, within 25
    %.
    """

    # The models of benchmarks/instruction_free.py, benchmarks/dpo.py and benchmarks/generate.py --random
    # 768x8.
    TUNED = Shape(Language(384, 6, 12, 12, 1152, 512, tied=True), Vision(64, 2, 256, 8, 576))
    PREFERRED = Shape(Language(512, 8, 8, 8, 1376, 8000), Vision(128, 4, 512, 14, 576))
    ADAPTERS = DpoConfig(
        lora_llm=LoraConfig(rank=16, alpha=32),
        lora_vision=LoraConfig(rank=8, alpha=16),
        gradient_checkpointing=False,
    )

    @pytest.fixture(scope="class")
    def speed(self):
        """Operations per second of one thread, from plain SFT of the tower and the projector."""
        result = measured("cpu-instruction_free")
        config = DpoConfig(lr_llm=None, lora_vision=None, gradient_checkpointing=False)
        row = work.training_row(self.TUNED, config, result["tokens"], result["tokens"] - 576 - 15)
        return result["sft_steps_per_s"] * result["samples"] * row

    def test_dpo(self, speed):
        result = measured("cpu-dpo")
        pair = work.training_pair(
            self.PREFERRED, self.ADAPTERS, result["prompt_tokens"] - 576, result["answer_tokens"]
        )
        assert speed / pair == pytest.approx(result["medray_pairs_per_s"], rel=0.25)

    def test_dpo_with_its_references(self, speed):
        result = measured("cpu-dpo")
        sides = result["prompt_tokens"] - 576, result["answer_tokens"]
        both = work.training_pair(self.PREFERRED, self.ADAPTERS, *sides) + work.reference_pair(
            self.PREFERRED, *sides
        )
        with_references = (
            result["medray_pairs_per_s"] * result["speedup_with_reference_stage"] / result["speedup"]
        )
        assert speed / both == pytest.approx(with_references, rel=0.25)

    def test_a_plain_trainer(self, speed):
        """TRL's: both sequences whole, logits everywhere, the image twice, the reference in the step."""
        result = measured("cpu-dpo")
        tokens = result["prompt_tokens"] + result["answer_tokens"]
        train = work.training_row(self.PREFERRED, self.ADAPTERS, tokens, tokens, tokens)
        language = self.PREFERRED.language
        reference = self.PREFERRED.image_forward + language.forward(tokens, tokens) + language.head(tokens)
        assert speed / (2 * (train + reference)) == pytest.approx(result["trl_pairs_per_s"], rel=0.25)

    def test_generation_with_nine_times_the_image(self):
        """From 64 tokens per image and one phase to 576 and two."""
        speeds = {}  # tokens per second, operations per token
        for name, patches, answers, described in (
            ("cpu-generate-random", 64, 4, 0),
            ("cpu-generate-576", 576, 8, 1),
        ):
            shape = Shape(Language(768, 8, 24, 24, 2304, 512, tied=True), Vision(64, 2, 256, 8, patches))
            result = measured(name)
            each = work.asked_image(shape, answers + described, 20, result["max_tokens"])
            speeds[name] = (
                result["tokens_per_second"]["medray"],
                (each.prefill + work.decoding(shape, each)) / each.sampled,
            )
        (known, cheap), (expected, dear) = speeds["cpu-generate-random"], speeds["cpu-generate-576"]
        assert known * cheap / dear == pytest.approx(expected, rel=0.25)


class TestByHand:
    PLAN = Plan(
        1000,
        100,
        Device(79, 1e14, 1e12, 1e11, 3.6),
        gpus=4,
        cpus=10,
        usd_per_cpu_hour=0.36,
        gains=Gains(start=100, encode=50, prepare=20, bucket=1e6),
    )

    def test_preparing(self):
        stage = preparing(self.PLAN)
        assert stage.resources == {
            "starting": 0,
            "CPUs that prepare images": 1100 / 200,
            "the bucket": 1100 * 1e5 / 1e6,
        }
        assert (stage.seconds, stage.bound, stage.gpus) == (110, "the bucket", 0)
        assert stage.usd == pytest.approx(110 * 10 * 0.36 / 3600)

    def test_tuning(self):
        config = SelfTrainingConfig().sft.model_copy(update={"num_workers": 2, "micro_batch": 5, "epochs": 2})
        plan = dataclasses.replace(self.PLAN, gains=dataclasses.replace(self.PLAN.gains, bucket=1e12))
        stage = tuning("sft", LLAVA, config, plan, 1000, False)
        row = work.training_row(LLAVA, config, 576 + 460, 240)
        computing = 2000 * row / (2 * 1e14 * 0.4)
        trained = 319_815_680 + LLAVA.vision.lora(32) + 20_979_712
        gathering = 200 * (4 * LLAVA.parameters + 2 * trained) / 2 / (1e11 * 0.6)
        assert stage.resources["accelerators that train"] == pytest.approx(computing + gathering)
        assert stage.resources["CPUs that encode"] == 2000 / 500
        assert stage.seconds == pytest.approx(100 + computing + gathering)
        assert stage.usd == pytest.approx(stage.seconds / 3600 * (2 * 3.6 + 3.6))

    def test_slow_links_are_named(self):
        config = SelfTrainingConfig().sft.model_copy(update={"num_workers": 4, "micro_batch": 1})
        slow = dataclasses.replace(
            self.PLAN, device=dataclasses.replace(self.PLAN.device, link=1e9), gains=Gains(start=0)
        )
        assert tuning("sft", LLAVA, config, slow, 1000, False).bound == "links that gather ZeRO-3's weights"

    def test_generating(self):
        config = SelfTrainingConfig()
        config.model.path = "llava-hf/llava-1.5-7b-hf"
        each = work.Generation(prefill=1e12, sampled=200, context=900)
        stage = generating("self_play", LLAVA, config, each, 1000, self.PLAN)
        cache = engine_memory(LLAVA, config.model, config.engine, 79)["cache"]
        batch = cache * 2**30 / (900 * 524_288)
        assert batch < config.engine.max_num_seqs
        step = (2 * LLAVA.language.parameters + batch * 900 * 524_288) / (1e12 * 0.6)
        assert stage.seconds == pytest.approx(100 + 1000 * 1e12 / (1e14 * 0.5) + 1000 * 200 / batch * step)
        assert stage.bound == "memory bandwidth of decoding"
        assert stage.gpus == 1, "the recipe's limit, not the four there are"

    def test_an_engine_that_does_not_fit(self):
        large = KNOWN["Qwen/Qwen2.5-VL-72B-Instruct"]
        stage = generating(
            "self_play", large, SelfTrainingConfig(), work.Generation(1e12, 200, 900), 1000, self.PLAN
        )
        assert stage.seconds == float("inf") and "does not fit" in stage.bound

    def test_judging_at_an_endpoint(self):
        config = SelfTrainingConfig(
            judge=JudgeConfig(concurrency=10, usd_per_million_input=2, usd_per_million_output=10)
        )
        stage = judging("judge", config, 100, self.PLAN)
        assert stage.seconds == 100 * 5 * 2 * 5 / 10, "1000 requests of 5 s, ten at once"
        assert stage.usd == pytest.approx(
            1000 * (800 + 250 + 240) * 2e-6 + 1000 * 120 * 10e-6 + 500 / 3600 * 3.6
        )


def recipe(*overrides):
    return load_config(
        SelfTrainingConfig, ROOT / "medray/recipes/self_train/llava-1.5-7b.yaml", list(overrides)
    )


def test_more_accelerators_shorten_what_they_bound():
    wide = ["sft.num_workers=8", "dpo.num_workers=8", "engine.actors=[1, 8]"]
    few, many = (self_training(recipe(*wide), Plan(60_000, 10_000, DEVICE, gpus)) for gpus in (4, 8))
    for name in ("sq_sft", "self_play 1", "dpo 1"):
        before, after = (next(stage for stage in stages if stage.name == name) for stages in (few, many))
        assert 1.7 < (before.seconds - 300) / (after.seconds - 300) <= 2.01


def test_the_bottleneck_of_each_scale():
    paper = self_training(recipe(), Plan(60_000, 10_000, DEVICE, 4))
    assert [stage.name for stage in paper] == [
        "data",
        "sq_sft",
        "self_play 1",
        "judge 1",
        "pairs 1",
        "reference 1",
        "dpo 1",
    ]
    assert max(paper, key=lambda stage: stage.seconds).bound == "the judge's endpoint"
    assert 10 < sum(stage.gpu_hours for stage in paper) < 60
    wide = [
        "sft.num_workers=512",
        "dpo.num_workers=512",
        "dpo.reference_workers=[1, 512]",
        "engine.actors=[1, 512]",
        "judge.concurrency=100000",
    ]
    internet = self_training(recipe(*wide), Plan(1e8, 1e8, DEVICES["h100-80gb"], 512, cpus=4096))
    slowest = max(internet, key=lambda stage: stage.seconds)
    assert (slowest.name, slowest.bound) == ("dpo 1", "accelerators that train"), (
        "300M pairs; SQ-SFT's three epochs are 300M rows, each a little cheaper"
    )
    few_cpus = self_training(recipe(*wide), Plan(1e8, 1e8, DEVICES["h100-80gb"], 512, cpus=32))
    assert next(stage for stage in few_cpus if stage.name == "sq_sft").bound == "CPUs that encode"


def plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "medray.plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command():
    done = plan(
        "--config",
        "medray/recipes/self_train/llava-1.5-7b.yaml",
        "--gpus",
        "4",
        "--json",
        "--gain",
        "start=0",
        "--usd-per-gpu-hour",
        "1",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == 7_063_427_072
    assert found["fits"] and found["total"]["usd"] == pytest.approx(
        sum(stage["usd"] for stage in found["stages"])
    )
    words = plan(
        "--config",
        "medray/recipes/self_train/llava-1.5-7b.yaml",
        "--device",
        "l4-24gb",
        "--set",
        "sft.zero_stage=0",
        "--set",
        "sft.micro_batch=64",
    )
    assert words.returncode == 1
    assert "DOES NOT FIT" in words.stdout and "bottleneck: " in words.stdout and "assumed: " in words.stdout
    for arguments, said in (
        (("--gpus", "0"), "0 is not greater than 0"),
        (("--labelled", "-5"), "-5 is not greater than 0"),
        (("--gain", "training=0"), "must be greater than 0"),
    ):
        refused = plan("--config", "medray/recipes/self_train/llava-1.5-7b.yaml", *arguments)
        assert refused.returncode == 2 and said in refused.stderr and "Traceback" not in refused.stderr
    other = plan("--config", "medray/recipes/clinician_preference/qwen2.5-vl-7b.yaml")
    assert other.returncode == 2 and "of clinician_preference, --fits says" in other.stderr
    small = plan(
        "--config",
        "medray/recipes/self_train/llava-1.5-7b.yaml",
        "--device",
        "l4-24gb",
        "--set",
        "engine.memory_utilization=0.5",
        "--json",
    )
    assert json.loads(small.stdout, parse_constant=pytest.fail)["fits"] is False
    wrong = plan("--config", "medray/recipes/self_train/llava-1.5-7b.yaml", "--gain", "trainig=1")
    assert wrong.returncode == 2 and "names are training, prefill" in wrong.stderr
