"""TrainStep: what trains, what does not, and that neither accumulation nor the kind of engine changes the
result.
"""

import os
import subprocess
import sys

import pytest
import torch

from medray.config import LoraConfig
from medray.data.collate import collate_dpo, collate_sft
from medray.models.vlm import PARTS, load_vlm, merge, model_hash, part_of, trainable_parameters
from medray.train.engine import full_state
from medray.train.step import TrainStep, learning_rate_factor
from tests.support.encoded_rows import DPO, MODEL, SFT, encoded


def step_of(path, config=DPO, engine="torch", precision="fp32", total=100):
    kind = "dpo" if config.__class__ is DPO.__class__ else "sft"
    return TrainStep(
        path,
        MODEL.model_copy(update={"precision": precision}),
        config,
        kind,
        total,
        device="cpu",
        engine=engine,
    )


def pairs_of(path, count=4):
    rows, info = encoded(path, "dpo", count)
    return [collate_dpo([row], info) for row in rows], collate_dpo(rows, info)


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_open_part_gets_gradient_and_frozen_weights_stay(tiny, checkpointing):
    step = step_of(tiny, DPO.model_copy(update={"gradient_checkpointing": checkpointing}))
    frozen = {name: p.clone() for name, p in step.model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainable_parameters(step.model).items()}
    assert {part_of(name) for name in before} == set(PARTS)
    assert all(".lora_" in name or part_of(name) == "projector" for name in before)
    _, batch = pairs_of(tiny)
    # LoRA's B starts at zero, so A gets its first gradient in the second step.
    for _ in range(2):
        step.update([batch], 0)
    moments = dict(full_state(step.engine))
    for name, parameter in trainable_parameters(step.model).items():
        if "k_proj.bias" not in name:
            assert moments[f"exp_avg/{name}"].abs().max() > 0, f"{name} got no gradient"
            assert not torch.equal(parameter, before[name]), name
    for name, parameter in step.model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name]), f"{name} changed"


def test_held_out_rows_that_are_all_bad_give_no_loss_and_a_worker_without_any_adds_nothing(tiny):
    step = step_of(tiny)
    (one, *_), batch = pairs_of(tiny)
    assert step.evaluate([], batch) is None
    assert step.measure([], batch) == {}
    rows_of_others, reduce = 2, step.reduce
    step.reduce = lambda value, op=None: torch.tensor(rows_of_others) if value.ndim == 0 else reduce(value)
    assert step.totals(
        [one],
        batch,
        lambda given: (
            torch.tensor([2.0, 3.0])
            if len(given["input_ids"]) == len(one["input_ids"])
            else torch.tensor([1.0, float("nan")])
        ),
    ) == [2.0, 3.0]


def test_parts_with_no_learning_rate_are_frozen(tiny):
    step = step_of(tiny, DPO.model_copy(update={"lr_vision": None, "lr_projector": None}))
    assert {part_of(name) for name in trainable_parameters(step.model)} == {"llm"}
    assert [group["name"] for group in step.engine.optimizer.param_groups] == ["llm"]


def test_llm_and_vision_adapters_differ_in_rank_alpha_and_dropout(tiny_llava):
    loras = {
        "lora_llm": LoraConfig(rank=4, alpha=8, dropout=0.1),
        "lora_vision": LoraConfig(rank=2, alpha=8, dropout=0.3),
    }
    model = step_of(tiny_llava, DPO.model_copy(update=loras)).model
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            part = part_of(name)
            assert list(module.lora_A) == [part]
            lora = loras[f"lora_{part}"]
            assert module.r[part] == lora.rank
            assert module.scaling[part] == lora.alpha / lora.rank
            assert module.lora_dropout[part].p == lora.dropout
    assert not any(
        "lora" in name
        for name, _ in model.named_parameters()
        if part_of(name) == "projector" or "lm_head" in name
    )


def test_full_training_opens_whole_parts(tiny_llava):
    step = step_of(tiny_llava, SFT.model_copy(update={"lora_llm": None, "lora_vision": None}))
    rows, info = encoded(tiny_llava, "sft", 2)
    metrics = step.update([collate_sft(rows, info, 0.5, 0, 0)], 0)
    assert {
        group["name"]: len(group["params"]) > 0 for group in step.engine.optimizer.param_groups
    } == dict.fromkeys(PARTS, True)
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_accumulation_changes_nothing(tiny, engine, process_group):
    singles, batch = pairs_of(tiny)
    first, second = step_of(tiny, engine=engine), step_of(tiny, engine=engine)
    one = first.update([batch], 0)
    four = second.update(singles, 0)
    assert four["samples"] == one["samples"] == 4
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert_same(dict(full_state(first.engine)), dict(full_state(second.engine)), rtol=1e-3, atol=2e-5)


def test_sft_loss_is_the_token_mean_over_the_global_batch(tiny_llava):
    rows, info = encoded(tiny_llava, "sft", 4)
    whole = step_of(tiny_llava, SFT).update([collate_sft(rows, info, 0.5, 0, 0)], 0)
    parts = step_of(tiny_llava, SFT).update(
        [collate_sft(rows[:1], info, 0.5, 0, 0), collate_sft(rows[1:], info, 0.5, 0, 0)], 0
    )
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["weight"] == whole["weight"]


def test_state_goes_from_any_engine_to_any_other(tiny_llava, tmp_path, process_group):
    """Saved under ZeRO-2, restored under 0, 1, 3 and plain torch: the same state, and the same next step."""
    _, batch = pairs_of(tiny_llava, 2)
    source = step_of(tiny_llava, engine="deepspeed")
    for done in range(2):
        source.update([batch], done)
    source.save(tmp_path / "state.safetensors")
    saved = dict(full_state(source.engine))
    source.update([batch], 2)
    then = dict(full_state(source.engine))
    for stage in (None, 0, 1, 3):
        config = DPO.model_copy(update={"zero_stage": stage or 0})
        target = step_of(tiny_llava, config, "torch" if stage is None else "deepspeed")
        target.load(tmp_path / "state.safetensors")
        assert target.steps == 2
        assert_same(dict(full_state(target.engine)), saved, rtol=0, atol=0)
        target.update([batch], 2)
        assert_same(dict(full_state(target.engine)), then, rtol=1e-3, atol=1e-5)


def test_zero3_in_bf16_keeps_fp32_masters(tiny, process_group):
    step = step_of(
        tiny,
        DPO.model_copy(update={"zero_stage": 3, "lr_llm": 1e-6, "lr_projector": 1e-6, "lr_vision": 1e-6}),
        "deepspeed",
        "bf16",
    )
    _, batch = pairs_of(tiny, 2)
    before = dict(full_state(step.engine))
    metrics = step.update([batch], 0)
    assert 0 < metrics["loss"] < 100
    after = dict(full_state(step.engine))
    # Steps of 1e-6 would be lost in bf16 weights.
    moved = [
        name
        for name in before
        if name.startswith("weight/") and 0 < (before[name] - after[name]).abs().max() < 1e-5
    ]
    assert any("projector" in name or "merger" in name for name in moved)


def test_bf16_on_torch_keeps_fp32_masters(tiny_llava):
    step = step_of(tiny_llava, DPO.model_copy(update={"lr_projector": 1e-6}), precision="bf16")
    _, batch = pairs_of(tiny_llava, 2)
    before = dict(full_state(step.engine))
    step.update([batch], 0)
    name = next(name for name in before if name.startswith("weight/") and "projector" in name)
    assert 0 < (dict(full_state(step.engine))[name] - before[name]).abs().max() < 1e-5


def test_merging_keeps_what_the_adapters_compute(tiny):
    step = step_of(tiny)
    _, batch = pairs_of(tiny)
    for done in range(3):
        step.update([batch], done)
    step.engine.train(False)
    placed = {
        name: value
        for name, value in step.place(batch).items()
        if not name.startswith("ref_") and name != "labels"
    }
    placed["pixel_values"] = torch.cat([placed["pixel_values"]] * 2)
    with torch.no_grad():
        adapted = step.model(**placed).logits
        merged = merge(step.model)
        assert type(merged) is type(load_vlm(tiny, "fp32"))
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(**placed).logits, adapted, rtol=1e-4, atol=1e-4)


def test_learning_rate_rises_then_falls_to_zero():
    assert learning_rate_factor(0.015, 0.03) == pytest.approx(0.5)
    assert learning_rate_factor(0.03, 0.03) == 1.0
    assert learning_rate_factor(0.515, 0.03) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.03) == pytest.approx(0.0)
    assert learning_rate_factor(0.0, 0.0) == 1.0


def test_model_hash_follows_the_weights(tiny_llava, tmp_path):
    from medray.models.export import save_vlm
    from medray.models.vlm import load_processor

    model = load_vlm(tiny_llava, "fp32")
    save_vlm(model, load_processor(tiny_llava), tmp_path / "a")
    save_vlm(model, load_processor(tiny_llava), tmp_path / "b")
    assert model_hash(tmp_path / "a") == model_hash(tmp_path / "b")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_vlm(model, load_processor(tiny_llava), tmp_path / "b")
    assert model_hash(tmp_path / "a") != model_hash(tmp_path / "b")


def test_reference_and_untrained_policy_agree(tiny):
    """The reference stage's columns are the policy's own log-probabilities before its first step: the
    loss starts at log 2.
    """
    import math

    import pyarrow as pa

    from medray.config import DataConfig
    from medray.data.collate import Encoder
    from medray.records import PREFERENCE, conform
    from medray.train.reference_logps import Reference
    from tests.support.encoded_rows import preferences

    pairs = conform(
        pa.Table.from_pylist(preferences(4)).drop(["ref_chosen_logp", "ref_rejected_logp"]), PREFERENCE
    )
    scored = Reference(tiny, "hash", MODEL.model_dump(), DataConfig().model_dump())(pairs)
    one = Encoder(tiny, MODEL.model_dump(), DataConfig().model_dump(), "dpo")
    metrics = step_of(tiny).update([collate_dpo(one(scored).to_pylist(), one.dialogues.info())], 0)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["rewards/margin"] == pytest.approx(0, abs=1e-4)


def test_step_needs_neither_ray_nor_vllm_nor_deepspeed():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('ray', 'vllm', 'deepspeed', 'trl'))); import "
        "medray.train.step"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_compiled(tmp_path, tiny_llava):
    """A machine needs no compiler, and the first step does not wait for one."""
    code = f"""
import torch
from medray.config import SftConfig
from medray.models.vlm import load_vlm, prepare_trainable
from medray.train.engine import make_engine
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
config = SftConfig(micro_batch=1, zero_stage=2)
make_engine(prepare_trainable(load_vlm({tiny_llava!r}, "fp32"), config), config, "fp32", kind="deepspeed")
"""
    (tmp_path / "bin").mkdir()
    environment = {
        **os.environ,
        "PATH": str(tmp_path / "bin"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "DS_ACCELERATOR": "cpu",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "extensions").exists()
