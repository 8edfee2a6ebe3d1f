"""The proxy instruction in the one training loop: what moves and what does not, at every engine, after a
restart, and against plain torch.
"""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from medray.config import ProxyConfig, SftConfig, TrainConfig
from medray.data.collate import IGNORE, Encoder
from medray.data.pixels import normalise_pixels
from medray.errors import ConfigError, DataError
from medray.models.proxy_instruction import PLACEHOLDER, ProxyInstruction
from medray.models.vlm import load_processor, load_vlm, part_of, trainable_parameters
from medray.train.engine import FrozenEngine, full_state
from medray.train.proxy_step import read_proxy, stored_proxy
from medray.train.step import TrainStep, learning_rate_factor
from medray.train.worker import Batches, export_merged, export_proxy, run_training
from tests.models.test_proxy_instruction import by_hand
from tests.support.encoded_rows import MODEL, TUNE, WARM_UP, descriptions

MODES = ("released", "textbook", "frozen", "free")
PROXY_METRICS = {"lr_proxy", "proxy_grad_norm", "proxy_momentum", "proxy_norm", "proxy_moved", "proxy_gap"}


def step_of(path, config=TUNE, engine="torch", precision="fp32", **kwargs):
    return TrainStep(
        path,
        MODEL.model_copy(update={"precision": precision}),
        config,
        "instruction_free",
        100,
        "cpu",
        engine,
        **kwargs,
    )


def in_mode(mode, config=TUNE):
    return config.model_copy(update={"proxy": config.proxy.model_copy(update={"mode": mode})})


def batches_of(path, config=TUNE, count=4, epoch=0):
    """The rows of one epoch, one micro-batch per `config.micro_batch` of them."""
    batches = Batches(path, MODEL, config, "instruction_free")
    rows = batches.encoder(pa.Table.from_pylist(descriptions(count))).to_pylist()
    return batches.micro_batches(list(batches.in_order(rows, epoch)), epoch)


def whole_batch(path, config=TUNE, count=4, epoch=0):
    return batches_of(path, config.model_copy(update={"micro_batch": count}), count, epoch)[0]


def states(step):
    return dict(full_state(step.engine)) | (step.proxy.state() if step.proxy else {})


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        # its gradient is rounding alone, of which Adam makes whole steps
        if tolerance["rtol"] and "k_proj.bias" in name:
            continue
        torch.testing.assert_close(
            second[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_in_words_and_unshuffled_it_is_plain_sft(tiny):
    """Bit for bit, over two steps."""
    config = TUNE.model_copy(update={"instruction": "Describe this image.", "shuffling": "none"})
    common = {name: getattr(config, name) for name in TrainConfig.model_fields}
    plain = TrainStep(tiny, MODEL, SftConfig(**common, self_questioning=0), "sft", 100, "cpu", "torch")
    ours = step_of(tiny, config)
    turns = [
        [{"role": "user", "text": "Describe this image."}, {"role": "assistant", "text": row["description"]}]
        for row in descriptions(4)
    ]
    rows = Encoder(tiny, MODEL.model_dump(), {}, "sft")(
        pa.Table.from_pylist(
            [
                {"sample_id": row["sample_id"], "image": row["image"], "turns": one}
                for row, one in zip(descriptions(4), turns, strict=True)
            ]
        )
    ).to_pylist()
    plain_batches = Batches(tiny, MODEL, plain.config, "sft").micro_batches(rows, 0)
    for consumed in (0, 4):
        assert ours.update(batches_of(tiny, config), consumed) == plain.update(plain_batches, consumed)
    assert_same(states(ours), states(plain), rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_frozen_stays_and_what_is_open_moves(tiny, checkpointing):
    step = step_of(tiny, TUNE.model_copy(update={"gradient_checkpointing": checkpointing}))
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    opened = trainable_parameters(step.model)
    assert {part_of(name) for name in opened} == {"vision", "projector"}
    batch = whole_batch(tiny)
    for consumed in (0, 4):
        metrics = step.update([batch], consumed)
    for name, value in step.model.state_dict().items():
        if name in opened:
            # The softmax does not know a key's bias, the projector is fed from before the last norm.
            assert (
                not torch.equal(value, before[name]) or "k_proj.bias" in name or "post_layernorm" in name
            ), name
        else:
            assert torch.equal(value, before[name]), f"{name} changed"
    assert metrics.keys() >= PROXY_METRICS
    assert metrics["lr_proxy"] == 1e-2 and metrics["lr_vision"] == 1e-3  # constant
    assert (
        metrics["proxy_moved"] > 0
        and metrics["proxy_gap"] > 0
        and metrics["proxy_grad_norm"] > 0
        and metrics["proxy_momentum"] == 0.9
    )


def test_warm_up_trains_the_proxy_and_nothing_of_the_model(tiny):
    step = step_of(tiny, WARM_UP)
    assert isinstance(step.engine, FrozenEngine)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    batch = whole_batch(tiny)
    lines = [step.update([batch], 4 * done) for done in range(4)]
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["proxy_moved"] > lines[0]["proxy_moved"] > 0
    assert {line["proxy_gap"] for line in lines} == {0.0} and {line["grad_norm"] for line in lines} == {0.0}
    assert step.evaluate([batch], batch) < lines[0]["loss"]


@pytest.mark.parametrize(
    ("family", "stage", "precision"),
    [
        ("llava", 0, "fp32"),
        ("llava", 1, "fp32"),
        ("llava", 2, "fp32"),
        ("llava", 2, "bf16"),
        ("llava", 3, "bf16"),
        ("qwen", 3, "fp32"),
    ],
)
def test_the_gradient_of_the_proxy_arrives_under_deepspeed(
    tiny_llava, tiny_qwen, family, stage, precision, process_group
):
    tiny = {"llava": tiny_llava, "qwen": tiny_qwen}[family]
    micro = batches_of(tiny)
    assert len(micro) == 2
    plain, sharded = (
        step_of(tiny, precision=precision),
        step_of(tiny, TUNE.model_copy(update={"zero_stage": stage}), "deepspeed", precision),
    )
    for consumed in (0, 4):
        expected, found = plain.update(micro, consumed), sharded.update(micro, consumed)
        tolerance = {"rel": 1e-4, "abs": 1e-6} if precision == "fp32" else {"rel": 2e-2}
        for name in ("loss", "proxy_grad_norm", "proxy_moved", "proxy_gap"):
            assert found[name] == pytest.approx(expected[name], **tolerance), name
    if precision == "fp32":
        assert_same(plain.proxy.state(), sharded.proxy.state(), rtol=1e-3, atol=1e-5)


def test_a_warm_up_that_shards_the_model_leaves_it_as_it_is(tiny_llava, process_group):
    """lr_projector 0.0: DeepSpeed has something to train, which does not move."""
    sharded = step_of(
        tiny_llava, WARM_UP.model_copy(update={"lr_projector": 0.0, "zero_stage": 3}), "deepspeed"
    )
    whole = step_of(tiny_llava, WARM_UP)
    before = dict(full_state(sharded.engine))
    batch = whole_batch(tiny_llava)
    for consumed in (0, 4):
        assert sharded.update([batch], consumed)["proxy_moved"] == pytest.approx(
            whole.update([batch], consumed)["proxy_moved"], rel=1e-4
        )
    after = dict(full_state(sharded.engine))
    weights = [name for name in before if name.startswith("weight/")]
    assert weights and all(torch.equal(before[name], after[name]) for name in weights)
    assert_same(whole.proxy.state(), sharded.proxy.state(), rtol=1e-3, atol=1e-5)


def test_accumulation_changes_nothing(tiny_llava):
    one, two = step_of(tiny_llava), step_of(tiny_llava)
    for consumed in (0, 4):
        one.update([whole_batch(tiny_llava)], consumed)
        two.update(batches_of(tiny_llava), consumed)
    assert_same(one.proxy.state(), two.proxy.state(), rtol=1e-3, atol=1e-5)


def replayed(path, mode, batches, lr=1e-2, momentum=0.9, model_lr=1e-3, decay=0.01):
    """P and Pbar after one step per batch, written down without the modules under test: plain torch, the
    rule by hand.
    """
    processor = load_processor(path)
    processor.tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)
    placeholder = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    model = load_vlm(path, "fp32").requires_grad_(False)
    opened = [
        parameter.requires_grad_()
        for name, parameter in model.named_parameters()
        if part_of(name) in ("vision", "projector")
    ]
    drawn = ProxyInstruction(3, model.get_input_embeddings().embedding_dim, seed=0).vectors.detach().clone()
    vectors, average = torch.nn.Parameter(drawn.clone()), drawn.clone()
    of_proxy, of_model = (
        torch.optim.AdamW([vectors], lr, weight_decay=decay),
        torch.optim.AdamW(opened, model_lr, weight_decay=decay),
    )
    for batch in batches:
        used = (average if mode == "textbook" else vectors.detach()).clone().requires_grad_()
        placed = batch | {"pixel_values": normalise_pixels(batch["pixel_values"], processor.image_processor)}
        by_hand(model, placed, placeholder, used).loss.backward()
        torch.nn.utils.clip_grad_norm_(opened, 1.0)
        of_model.step()
        of_model.zero_grad()
        vectors.grad = used.grad
        if mode != "frozen":
            of_proxy.step()
            average = (
                vectors.detach().clone()
                if mode == "free"
                else momentum * average + (1 - momentum) * vectors.detach()
            )
        if mode == "released":
            vectors.data.copy_(average)
    return vectors.detach(), average, drawn


@pytest.mark.parametrize("mode", MODES)
def test_two_steps_of_each_mode_against_plain_torch(tiny, mode):
    step = step_of(tiny, in_mode(mode))
    shuffled = [whole_batch(tiny, epoch=epoch) for epoch in (0, 1)]
    assert (shuffled[0]["labels"] != IGNORE).sum() > 20
    for consumed, batch in enumerate(shuffled):
        metrics = step.update([batch], consumed)
    vectors, average, drawn = replayed(tiny, mode, shuffled)
    torch.testing.assert_close(step.proxy.instruction.vectors.detach(), vectors, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(step.proxy.instruction.average, average, rtol=1e-3, atol=2e-5)
    assert metrics["proxy_moved"] == pytest.approx((average - drawn).norm().item(), rel=1e-3, abs=1e-7)
    assert metrics["proxy_gap"] == pytest.approx((vectors - average).norm().item(), rel=1e-3, abs=1e-7)
    assert (metrics["lr_proxy"], metrics["proxy_grad_norm"] > 0) == (
        (0.0, False) if mode == "frozen" else (1e-2, True)
    )


@pytest.mark.parametrize("mode", ["released", "textbook", "frozen"])
def test_a_restart_changes_nothing(tiny_llava, tmp_path, mode):
    """Saved and restored in the middle of a stage: the same proxy, weights and moments, bit for bit."""
    config = in_mode(mode)
    batches = [whole_batch(tiny_llava, epoch=epoch) for epoch in range(4)]
    through, first = step_of(tiny_llava, config), step_of(tiny_llava, config)
    for done in range(4):
        through.update([batches[done]], done)
    for done in range(2):
        first.update([batches[done]], done)
    first.save(tmp_path / "state.safetensors")
    second = step_of(tiny_llava, config)
    second.load(tmp_path / "state.safetensors")
    assert_same(states(first), states(second), rtol=0, atol=0)
    for done in (2, 3):
        last = second.update([batches[done]], done)
    assert last["proxy_moved"] == through.proxy.instruction.metrics()["proxy_moved"]
    assert_same(states(through), states(second), rtol=0, atol=0)


def test_a_restart_may_change_engines(tiny_llava, tmp_path, process_group):
    batch = whole_batch(tiny_llava)
    source = step_of(tiny_llava, engine="deepspeed")
    source.update([batch], 0)
    source.save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", framework="pt") as handle:
        assert {name for name in handle.keys() if "proxy" in name} == {  # noqa: SIM118 (no mapping)
            "proxy/vectors",
            "proxy/average",
            "proxy/start",
            "proxy_exp_avg",
            "proxy_exp_avg_sq",
        }
    source.update([batch], 4)
    for engine, stage in (("torch", 0), ("deepspeed", 3)):
        target = step_of(tiny_llava, TUNE.model_copy(update={"zero_stage": stage}), engine)
        target.load(tmp_path / "state.safetensors")
        target.update([batch], 4)
        assert_same(states(source), states(target), rtol=1e-3, atol=1e-5)


def test_a_stage_begins_from_the_proxy_of_the_last(tiny_llava, tmp_path):
    warm = step_of(tiny_llava, WARM_UP)
    warm.update([whole_batch(tiny_llava)], 0)
    warm.save(tmp_path / "state.safetensors")
    stored_proxy(tmp_path / "state.safetensors").save(tmp_path / "proxy.safetensors")
    step = step_of(tiny_llava, proxy=str(tmp_path / "proxy.safetensors"))
    proxy = step.proxy.instruction
    assert (proxy.mode, proxy.momentum) == ("textbook", 0.9)
    for value in (proxy.vectors, proxy.average, proxy.start):
        assert torch.equal(value, warm.proxy.instruction.vectors)
    with pytest.raises(ConfigError, match=r"proxy.count is 8, but .* holds 3 vectors"):
        read_proxy(str(tmp_path / "proxy.safetensors"), 8)
    with pytest.raises(DataError, match="no proxy instruction at this address"):
        read_proxy(str(tmp_path / "none.safetensors"), 3)


def test_an_instruction_in_words_has_no_proxy(tiny_llava, tmp_path):
    config = TUNE.model_copy(update={"instruction": "Describe."})
    step = step_of(tiny_llava, config)
    metrics = step.update(batches_of(tiny_llava, config), 0)
    assert not PROXY_METRICS & metrics.keys()
    step.save(tmp_path / "state.safetensors")
    with pytest.raises(DataError, match="holds no proxy instruction"):
        stored_proxy(tmp_path / "state.safetensors")
    with pytest.raises(ConfigError, match="leave it null"):
        run_training(
            str(tmp_path), None, None, 1, tiny_llava, MODEL, config, "instruction_free", proxy="somewhere"
        )


def test_constant_schedule():
    assert [learning_rate_factor(progress, 0.0, "constant") for progress in (0.0, 0.5, 1.0)] == [
        1.0,
        1.0,
        1.0,
    ]
    assert [learning_rate_factor(progress, 0.1, "constant") for progress in (0.05, 0.1, 1.0)] == [
        pytest.approx(0.5),
        1.0,
        1.0,
    ]


@pytest.mark.parametrize("change", [{"instruction": "Describe."}, {"proxy": ProxyConfig(mode="frozen")}])
def test_a_stage_in_which_nothing_trains_is_refused(change):
    with pytest.raises(ValueError, match="nothing would train"):
        type(WARM_UP)(**WARM_UP.model_dump() | change)


def one_of_two(rank, folder, path):
    """A process of two: a warm-up of two steps, then a tuning of two; the first process has two
    micro-batches, the second one.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for name, config in (("warm_up", WARM_UP), ("tune", TUNE)):
        step = step_of(path, config, "auto")
        micro = batches_of(path, config, count=5)
        for consumed in (0, 5):
            step.update(micro[:2] if rank == 0 else micro[2:], consumed, filler=micro[0])
        step.save(Path(folder, f"{name}.safetensors"))
        assert torch.equal(*step.gather(step.proxy.instruction.vectors.detach()))
    torch.distributed.destroy_process_group()


@pytest.mark.whole_job
def test_two_workers_train_the_proxy_that_one_does(tiny_llava, tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), tiny_llava), nprocs=2)
    for name, config in (("warm_up", WARM_UP), ("tune", TUNE)):
        alone = step_of(tiny_llava, config)
        for consumed in (0, 5):
            alone.update(batches_of(tiny_llava, config, count=5), consumed)
        assert_same(states(alone), load_file(tmp_path / f"{name}.safetensors"), rtol=2e-3, atol=5e-5)


@pytest.mark.whole_job
@pytest.mark.ray
def test_a_stage_under_ray_train(ray_cluster, tiny_llava, tmp_path):
    """Two epochs from a given proxy: what TrainStep alone makes of the same rows, in the order of each
    epoch; then the exports.
    """
    import ray

    rows, config = descriptions(5), TUNE.model_copy(update={"epochs": 2, "micro_batch": 5, "accumulation": 1})
    start, proxy = str(tmp_path / "start.safetensors"), ProxyInstruction(3, 128, seed=7)
    proxy.save(start)
    arguments = {
        "model_path": tiny_llava,
        "model_config": MODEL.model_dump(),
        "data_config": {},
        "kind": "description",
        "train_config": config.model_dump(),
    }

    def dataset(rows):
        return ray.data.from_items(rows).map_batches(
            Encoder, fn_constructor_kwargs=arguments, batch_size=8, batch_format="pyarrow", num_cpus=0.5
        )

    long = {**rows[0], "sample_id": "long", "description": "round, " * 600}
    result = run_training(
        str(tmp_path),
        dataset([*rows, long]),
        dataset(rows[:3]),
        6,
        tiny_llava,
        MODEL,
        config,
        "instruction_free",
        start,
    )
    assert result.counts == {"steps": 2, "samples": 10, "trained": 5, "quarantined": 1}
    assert "model.max_length 512" in result.quarantine["long"]
    alone = step_of(tiny_llava, config, proxy=start)
    losses = [
        alone.update([whole_batch(tiny_llava, config, 5, epoch)], 5 * epoch)["loss"] for epoch in range(2)
    ]
    lines = [json.loads(line) for line in result.metrics.splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-4)
    assert all(line.keys() >= PROXY_METRICS for line in lines if "loss" in line)
    unshuffled = Batches(tiny_llava, MODEL, config, "instruction_free")
    held_out = unshuffled.in_order(unshuffled.encoder(pa.Table.from_pylist(rows[:3])).to_pylist(), None)
    assert lines[-1]["eval_loss"] == pytest.approx(
        alone.evaluate(unshuffled.micro_batches(list(held_out), None), unshuffled.filler), rel=1e-4
    )

    export_proxy(result.checkpoint, tmp_path / "end.safetensors")
    end = ProxyInstruction.load(tmp_path / "end.safetensors")
    assert (end.mode, end.momentum) == ("textbook", 0.9)
    assert torch.equal(end.start, proxy.vectors)
    assert_same(alone.proxy.instruction.state_dict(), end.state_dict(), rtol=2e-3, atol=5e-5)
    export_merged(result.checkpoint, tiny_llava, tmp_path / "model", MODEL, config)
    tuned, base = (load_vlm(str(path), "fp32").state_dict() for path in (tmp_path / "model", tiny_llava))
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert {part_of(name) for name in changed} == {"vision", "projector"}
    assert len(load_processor(str(tmp_path / "model")).tokenizer) == len(load_processor(tiny_llava).tokenizer)
    assert PLACEHOLDER not in Path(tmp_path, "model", "tokenizer.json").read_text()
