"""The one training loop: Ray Data shard -> global batches -> TrainStep -> checkpoints, under Ray Train.

A checkpoint holds the training state (any world size, any ZeRO stage), the ids of this epoch that are done,
and the metrics so far, so that a restart on other machines resumes with exactly the samples that are left::

    state.safetensors     trained weights in fp32, Adam moments; the proxy instruction and its moments
    progress.json         epoch, finished (whether the epoch is), steps, samples, world_size
    rows-00000.parquet    one per worker: sample_id, error (null: trained; text: quarantined) of this epoch,
                          since the workers started
    rows-before.parquet   those of earlier starts
    metrics.jsonl         one line per optimiser step
    checksums-00000.json  one per worker: size and hash of each of its files, written last
                          (medray.train.checkpoints)
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.train
import ray.train.torch
import torch

from medray.config import (
    DpoConfig,
    InstructionFreeTrainConfig,
    LoopConfig,
    ModelConfig,
    SftConfig,
    TrainConfig,
)
from medray.config.recipes import read_template
from medray.data.collate import Encoder, collate_dpo, collate_sft
from medray.errors import ConfigError, StageError
from medray.images.decoding import filler_picture
from medray.prometheus import TrainMetrics
from medray.running.failures import describe
from medray.running.set_aside import check_set_aside, check_something, counted
from medray.train.checkpoints import NAME, Scratch, check_local, settle, write_checksums
from medray.train.epoch_progress import BEFORE, Ids, count_done, done_rows, keep_done, write_done
from medray.train.global_batches import EpochRows, Row, UnequalSplits, rows_of, take_global_batch
from medray.train.objectives import BEST_BY
from medray.train.pair_probe import probe_rows
from medray.train.restart_log import Start, redone

logger = logging.getLogger("medray")

KINDS = {"sft": "sft", "dpo": "dpo", "instruction_free": "description"}  # of encoded rows, by objective
SECONDS_BETWEEN_LOGS = 10.0
SECONDS_BETWEEN_PREEMPTION_CHECKS = 5.0


@dataclass(frozen=True)
class Objective:
    """What the loop needs to know of what it trains for.

    Args:
        name: in metrics and in the step's `kind`.
        config: class of its training configuration.
        parts: the classes of its step and of its batches. Called in a worker that has settled DeepSpeed's
            accelerator.
        chooses_best: whether the best epoch's checkpoint is kept beside the last one.
    """

    name: str
    config: type[LoopConfig]
    parts: Callable[[], tuple[type, type]]
    chooses_best: bool = False


@dataclass
class Progress:
    """Where the training stands. `done` holds this worker's ids of this epoch (reason where quarantined)
    since it started; `before`, of rank 0, is the file with those of all workers of earlier starts.
    `scratch`: where its checkpoints are written before they are uploaded.
    """

    epoch: int = 0
    steps: int = 0
    samples: int = 0
    done: dict[str, str | None] = field(default_factory=dict)
    before: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    scratch: Scratch | None = None
    chooses_best: bool = False


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs.

    Args:
        config: stage_dir, model_dir, objective, rows (of the dataset), proxy (address or None), and
            model_config, train_config as plain dicts; max_quarantined, see run_training.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    # Ray writes two lines per checkpoint; the logger of one of them is named by its file (2.60).
    for name in (
        "ray.train",
        getattr(sys.modules.get("ray.train.v2._internal.execution.context"), "__file__", "ray.train"),
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    objective: Objective = config["objective"]
    model_config = ModelConfig.model_validate(config["model_config"])
    train_config = objective.config.model_validate(config["train_config"])
    torch.set_num_threads(train_config.threads or max(1, int(train_config.cpus_per_worker)))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    scratch, context = Scratch(config["stage_dir"]), ray.train.get_context()
    scratch.clear(context.get_world_rank(), context.get_local_rank())
    make_step, make_batches = objective.parts()
    step = make_step(
        config["model_dir"],
        model_config,
        train_config,
        objective.name,
        config["rows"] * train_config.epochs,
        ray.train.torch.get_device(),
        proxy=config["proxy"],
    )
    batches = make_batches(config["model_dir"], model_config, train_config, objective.name)
    if getattr(batches, "probe", None) is not None:
        step.measure_pair_pass(batches.probe)
    progress, done = restore(step, scratch)
    progress.chooses_best = objective.chooses_best
    shards = {name: ray.train.get_dataset_shard(name) for name in config["datasets"]}
    before = progress.before
    goes_on = progress.epoch < train_config.epochs  # else all is done, and this is no start
    start = (
        Start(config["stage_dir"], progress.steps, progress.samples, step.world_size)
        if goes_on and step.rank == 0
        else None
    )
    while progress.epoch < train_config.epochs:
        set_aside = train_epoch(step, batches, progress, done, shards, config["rows"], start)
        done = Ids()
        lost = int(step.gather(torch.tensor([set_aside])).sum())
        if not progress.samples or lost > config["max_quarantined"] * config["rows"]:
            # the stage fails, and so need not pay for the other epochs; with a higher limit it resumes at the
            # next one
            break
    if before is not None:
        shutil.rmtree(before.parent, ignore_errors=True)


def _parts() -> tuple[type, type]:
    from medray.train.step import TrainStep

    return TrainStep, Batches


OBJECTIVES = {
    "sft": Objective("sft", SftConfig, _parts),
    "dpo": Objective("dpo", DpoConfig, _parts),
    "instruction_free": Objective("instruction_free", InstructionFreeTrainConfig, _parts),
}
"""Those of vision-language models."""


class Batches:
    """Collates encoded rows for one model and objective.

    Raises ConfigError where the model's chat template or limits let no row pass.
    """

    def __init__(self, model_dir: str, model_config: ModelConfig, config: TrainConfig, objective: str):
        self.config = config
        self.objective = objective
        self.encoder = Encoder(
            model_dir, model_config.model_dump(), {}, KINDS[objective], config.model_dump()
        )
        self.info = self.encoder.dialogues.info(questioner=objective == "sft")
        (filler,) = self.in_order(self.encoder(_filler_table(objective)).to_pylist(), None)
        if filler["error"] is not None:
            raise ConfigError(f"model: not even an answer of one word can be encoded: {filler['error']}")
        self.filler = self.collate([filler], 0)
        # What a DPO training measures with how pairs may pass the model; None for other objectives, or limits
        # too tight for it.
        probe = (
            self.encoder(pa.Table.from_pylist(probe_rows(filler_picture()))).to_pylist()
            if objective == "dpo"
            else []
        )
        self.probe = self.collate(probe, 0) if probe and not any(row["error"] for row in probe) else None

    def in_order(self, rows: Iterable[Row], epoch: int | None) -> Iterator[Row]:
        """Encoded rows with what this epoch draws before they are batched: the order of a description's
        parts (None: as it is).
        """
        return (
            (self.encoder.in_order(row, epoch) for row in rows)
            if self.objective == "instruction_free"
            else iter(rows)
        )

    def collate(self, rows: list[Row], epoch: int | None) -> dict[str, torch.Tensor]:
        """One micro-batch; epoch None (evaluation) draws no questions."""
        if self.objective == "dpo":
            return collate_dpo(rows, self.info)
        rho = self.config.self_questioning if self.objective == "sft" and epoch is not None else 0.0
        return collate_sft(rows, self.info, rho, self.config.seed, epoch or 0)

    def micro_batches(self, rows: list[Row], epoch: int | None) -> list[dict[str, torch.Tensor]]:
        """Rows in micro-batches of like length (less padding)."""
        size = self.config.micro_batch
        rows = sorted(
            rows, key=lambda row: len(row["chosen_ids" if self.objective == "dpo" else "input_ids"])
        )
        return [self.collate(rows[start : start + size], epoch) for start in range(0, len(rows), size)]


def _filler_table(objective: str) -> pa.Table:
    """A worker without rows of its own still takes part in every pass, with this picture and dialogue at
    weight zero.
    """
    row: dict[str, Any] = {"sample_id": "filler", "image": filler_picture()}
    if objective == "sft":
        row["turns"] = [{"role": "user", "text": "What is this?"}, {"role": "assistant", "text": "Nothing."}]
    elif objective == "instruction_free":
        row["description"] = "Nothing."
    else:
        row |= {
            "prompt": "What is this?",
            "chosen": "Nothing.",
            "rejected": "No.",
            "ref_chosen_logp": 0.0,
            "ref_rejected_logp": 0.0,
        }
    return pa.Table.from_pylist([row])


def train_epoch(
    step: Any,
    batches: Batches,
    progress: Progress,
    done: Ids,
    shards: dict[str, Any],
    rows_per_epoch: int,
    start: Start | None = None,
) -> int:
    """Train on what is left of an epoch, checkpoint on the way and at its end.

    Returns the number of rows that this worker set aside in it since it started.

    Args:
        start: rank 0's note of how far this start of the workers came.
    """
    config = step.config
    in_order = batches.in_order(rows_of(shards["train"]), progress.epoch)
    rows = EpochRows(in_order, done, config.shuffle_buffer, seed=[config.seed, progress.epoch, step.rank])
    clock = Clock(TrainMetrics(step.kind) if step.rank == 0 else None)
    more = True
    while more:
        taken, total, more = take_global_batch(rows, config.samples_per_step, step.rank, step.gather)
        clock.rows_are_here()
        progress.done |= rows.quarantined
        if total:
            metrics = step.update(
                batches.micro_batches(taken, progress.epoch), progress.samples, batches.filler
            )
            progress.steps += 1
            progress.samples += total
            progress.done |= dict.fromkeys((row["sample_id"] for row in taken), None)
            progress.metrics.append(
                clock.stamp({"step": progress.steps, "epoch": progress.epoch, **metrics}, step.world_size)
            )
            if start is not None:
                start.step_done(progress.steps, progress.samples)
            clock.log(progress, rows_per_epoch * config.epochs, step.rank)
        if more and (progress.steps % config.checkpoint_every == 0 or clock.preemption_coming(step)):
            save(step, progress, finished=False)
    if "eval" in shards:
        held_out = list(batches.in_order(rows_of(shards["eval"]), None))
        usable = [row for row in held_out if row["error"] is None]
        found = step.measure(batches.micro_batches(usable, None), batches.filler)
        lost = int(step.gather(torch.tensor([len(held_out) - len(usable)])).sum())
        if lost and step.rank == 0:
            reason = next(
                (row["error"] for row in held_out if row["error"] is not None), "see the other workers' rows"
            )
            logger.warning(
                "%d held-out rows are left out of the evaluation at the epoch's end: %s", lost, reason
            )
        if found:
            progress.metrics.append(
                {
                    "step": progress.steps,
                    "epoch": progress.epoch,
                    **found,
                    **({"eval_set_aside": lost} if lost else {}),
                }
            )
    save(step, progress, finished=True)
    if start is not None:
        start.mark(progress.steps, progress.samples)
    progress.epoch += 1
    set_aside = sum(reason is not None for reason in progress.done.values())
    progress.done, progress.before = {}, None
    return set_aside


class Clock:
    """Speeds, log lines and preemption checks, each at its own pace.

    Args:
        metrics: rank 0's recorder for Prometheus.
    """

    def __init__(self, metrics: TrainMetrics | None = None) -> None:
        self.recorder = metrics
        self.last_step = self.last_log = self.last_check = time.monotonic()
        self.waited = 0.0
        self.warned = False

    def rows_are_here(self) -> None:
        self.waited = time.monotonic() - self.last_step

    def stamp(self, metrics: dict[str, Any], workers: int) -> dict[str, Any]:
        """With `seconds` since the last step, and the part of it, `data_seconds`, spent on waiting for
        rows and checkpoints.
        """
        now = time.monotonic()
        seconds = now - self.last_step
        self.last_step = now
        stamped = metrics | {
            "seconds": seconds,
            "data_seconds": self.waited,
            "samples_per_second": metrics["samples"] / seconds,
        }
        if self.recorder is not None:
            self.recorder.step(stamped, workers)
        return stamped

    def log(self, progress: Progress, all_samples: int, rank: int) -> None:
        """A line of rank 0, every ten seconds."""
        if rank == 0 and time.monotonic() - self.last_log >= SECONDS_BETWEEN_LOGS:
            self.last_log = time.monotonic()
            last = progress.metrics[-1]
            logger.info(
                "step %d, epoch %d, %d of %d samples, loss %.4f, %.1f samples/s",
                progress.steps,
                progress.epoch,
                progress.samples,
                all_samples,
                last["loss"],
                last["samples_per_second"],
            )

    def preemption_coming(self, step: Any) -> bool:
        """Whether a node is about to be taken away; true once. Collective, and a barrier, so asked every
        few seconds only.
        """
        now = time.monotonic()
        due = bool(
            step.gather(torch.tensor([int(now - self.last_check >= SECONDS_BETWEEN_PREEMPTION_CHECKS)]))[0]
        )
        if not due or self.warned:
            return False
        self.last_check = now
        self.warned = ray.train.get_preemption_info() is not None
        return self.warned


def save(step: Any, progress: Progress, finished: bool) -> None:
    """Write and report a checkpoint; it is uploaded in the background. Collective."""
    folder = progress.scratch.new("checkpoint")
    step.save(folder / "state.safetensors")
    write_done(folder, step.rank, progress.done, progress.before)
    if step.rank == 0:
        state = {
            "epoch": progress.epoch,
            "finished": finished,
            "steps": progress.steps,
            "samples": progress.samples,
            "world_size": step.world_size,
        }
        (folder / "progress.json").write_text(json.dumps(state, indent=1) + "\n")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in progress.metrics))
    write_checksums(folder, step.rank, step.world_size)
    last = progress.metrics[-1] if progress.metrics else {}
    ray.train.report(
        {BEST_BY: -1.0, **last} if progress.chooses_best else last,
        checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )


def restore(step: Any, scratch: Scratch) -> tuple[Progress, Ids]:
    """The last checkpoint's progress and the ids that are done in the current epoch, on any worker; fresh
    ones without it.

    Raises StageError for a damaged checkpoint.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Progress(scratch=scratch), Ids()
    with checkpoint.as_directory() as folder:
        check_local(folder)
        state = json.loads(Path(folder, "progress.json").read_text())
        step.load(Path(folder, "state.safetensors"))
        metrics = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        progress = Progress(
            state["epoch"], state["steps"], state["samples"], metrics=metrics, scratch=scratch
        )
        if state["finished"]:
            progress.epoch += 1
            return progress, Ids()
        if step.rank == 0:
            progress.before = keep_done(folder, scratch.new("done") / BEFORE)
        return progress, Ids(done_rows(folder))


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind.

    checkpoint: the last one, see the module's docstring.
    metrics: JSON lines, one per optimiser step (and one per evaluation).
    counts: steps, samples (over all epochs), and of the last epoch trained and quarantined rows; after
        interruptions what they cost (medray.train.restart_log.redone).
    quarantine: reason by sample_id.
    best: the checkpoint after the best epoch, of an objective that chooses one, else the last one.
    best_metrics: what that epoch's end measured.
    """

    checkpoint: Any
    metrics: str
    counts: dict[str, Any]
    quarantine: dict[str, str]
    best: Any = None
    best_metrics: dict[str, Any] | None = None


def scaling_of(config: LoopConfig) -> ray.train.ScalingConfig:
    """The workers a stage asks for: how many, what each reserves, on which nodes."""
    resources = {
        "CPU": config.cpus_per_worker,
        "GPU": config.gpus_per_worker,
        "memory": config.place.options.get("memory", 0),
        **config.place.resources,
    }
    return ray.train.ScalingConfig(
        num_workers=config.num_workers,
        use_gpu=config.gpus_per_worker > 0,
        label_selector=config.place.selector or None,
        resources_per_worker={name: amount for name, amount in resources.items() if amount or name == "CPU"},
    )


def run_training(
    stage_dir: str,
    train_ds: Any,
    eval_ds: Any,
    rows: int,
    model_dir: str,
    model_config: ModelConfig,
    train_config: LoopConfig,
    objective: str | Objective = "sft",
    proxy: str | None = None,
    max_quarantined: float = 1.0,
) -> TrainResult:
    """Train in Ray workers; the same call after a crash, of workers or of this process, resumes from the last
    checkpoint.

    Args:
        stage_dir: where checkpoints go: a path or URL that every node reaches (s3:// too).
        train_ds, eval_ds: Ray datasets of encoded rows (medray.data.collate.Encoder,
            medray.rating_model.pairs.PairEncoder); eval_ds may be None.
        rows: rows of train_ds, bad ones included.
        model_dir: the model in Hugging Face format: a remote address, a hub id, or the same path on every
            node.
        objective: a name of OBJECTIVES, or another one.
        proxy: address, reached from every node, of the proxy instruction that instruction-free tuning begins
            from (export_proxy's file); None: drawn from the seed.
        max_quarantined: share of the rows; if an epoch sets aside more, or trains on none, the training ends
            with it, and `check_trained` says why.

    Raises ConfigError for a train_config of the wrong kind or a proxy that does not fit it, DataError where
    there is no such proxy, StageError where workers failed more than max_failures times.
    """
    from medray.train.trainer import Trainer

    objective = OBJECTIVES[objective] if isinstance(objective, str) else objective
    if not isinstance(train_config, objective.config):
        raise ConfigError(
            f"train_config: objective {objective.name} needs a {objective.config.__name__}, not a "
            f"{type(train_config).__name__}"
        )
    if proxy is not None:
        _check_proxy(proxy, train_config)
    datasets = {"train": train_ds}
    if train_config.max_workers > 1:
        # Blocks are what is shared out: a small data set in one block would keep one worker busy and the
        # others idle.
        datasets["train"] = train_ds.repartition(target_num_rows_per_block=train_config.micro_batch)
    if eval_ds is not None and train_config.eval_rows:
        datasets["eval"] = eval_ds.limit(train_config.eval_rows)
    if train_config.epochs > 1 and rows <= train_config.shuffle_buffer:
        # What one worker's buffer holds, the object store holds too: encoded once instead of in every epoch.
        datasets = {name: dataset.materialize() for name, dataset in datasets.items()}
    trainer = Trainer(
        train_worker,
        train_loop_config={
            "stage_dir": stage_dir,
            "model_dir": model_dir,
            "objective": objective,
            "rows": rows,
            "datasets": list(datasets),
            "proxy": proxy,
            "max_quarantined": max_quarantined,
            "model_config": model_config.model_dump(),
            "train_config": train_config.model_dump(),
        },
        scaling_config=scaling_of(train_config),
        run_config=ray.train.RunConfig(
            name=NAME,
            storage_path=stage_dir,
            failure_config=ray.train.FailureConfig(
                max_failures=train_config.max_failures, max_preemption_failures=-1
            ),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=train_config.keep_checkpoints,
                checkpoint_score_attribute=BEST_BY if objective.chooses_best else None,
            ),
        ),
        datasets=datasets,
        dataset_config=UnequalSplits(),
    )
    settle(stage_dir, BEST_BY if objective.chooses_best else None)
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise StageError(
            f"training in {stage_dir} failed: {describe(error)}; the same command resumes from its last "
            "checkpoint"
        ) from error
    finally:
        # of a remote stage it is on the workers' nodes, where the next start clears it
        Scratch(stage_dir).remove()
    with result.checkpoint.as_directory() as folder:
        state = json.loads(Path(folder, "progress.json").read_text())
        done, quarantine = count_done(folder)
        metrics = Path(folder, "metrics.jsonl").read_text()
    counts = {
        "steps": state["steps"],
        "samples": state["samples"],
        "trained": done - len(quarantine),
        "quarantined": len(quarantine),
        **redone(stage_dir),
    }
    best, best_metrics = result.checkpoint, None
    if objective.chooses_best:
        kept, measured = max(result.best_checkpoints, key=lambda kept: kept[1][BEST_BY])
        if measured[BEST_BY] >= 0:  # else nothing was held out, and the last one it is
            best, best_metrics = kept, measured
    return TrainResult(result.checkpoint, metrics, counts, quarantine, best, best_metrics)


def check_trained(result: TrainResult, max_quarantined: float, where: str | None = None) -> None:
    """Raise StageError if a training set aside more than the share `max_quarantined` of its rows, or trained
    on none.

    Args:
        where: the file that names the rows set aside.
    """
    found = counted(result.quarantine.items())
    check_something(
        "step", result.counts["samples"] and result.counts["steps"], found, "there was no row to train on"
    )
    check_set_aside(
        "rows", result.counts["trained"] + result.counts["quarantined"], found, max_quarantined, where
    )


def _check_proxy(proxy: str, config: TrainConfig) -> None:
    from medray.train.proxy_step import read_proxy

    if not isinstance(config, InstructionFreeTrainConfig) or config.instruction is not None:
        raise ConfigError(
            "instruction: a stage that begins from a proxy instruction has none in words; leave it null"
        )
    read_proxy(proxy, config.proxy.count)


def export_proxy(checkpoint: Any, path: str | os.PathLike) -> None:
    """Write a checkpoint's proxy instruction, P and Pbar, as a file of ProxyInstruction.save: of a warm-up,
    where the tuning begins from. Inference needs none.

    Raises DataError where the stage had an instruction in words.
    """
    from medray.train.proxy_step import stored_proxy

    with checkpoint.as_directory() as folder:
        stored_proxy(Path(folder, "state.safetensors")).save(path)


def export_merged(
    checkpoint: Any,
    model_dir: str,
    out_dir: str | os.PathLike,
    model_config: ModelConfig,
    train_config: TrainConfig,
) -> None:
    """Merge a checkpoint's adapters and projector into plain Hugging Face weights, in the precision of
    model_config.

    Merged in fp32, on the CPU. model_config.chat_template, where set, becomes the exported model's own.
    Nothing of a proxy instruction is in it, its placeholder included.
    """
    from safetensors import safe_open

    from medray.models.export import save_vlm
    from medray.models.vlm import load_processor, load_vlm, merge, prepare_trainable, trainable_parameters

    model = prepare_trainable(load_vlm(model_dir, "fp32", model_config.trust_remote_code), train_config)
    with (
        checkpoint.as_directory() as folder,
        safe_open(Path(folder, "state.safetensors"), framework="pt") as state,
        torch.no_grad(),
    ):
        trained = trainable_parameters(model)
        kept = {name.removeprefix("weight/") for name in state.keys() if name.startswith("weight/")}  # noqa: SIM118 (no mapping)
        if kept != trained.keys():
            raise StageError(
                "export: the checkpoint's trained weights are not those of the model, first "
                f"{min(kept ^ trained.keys())}; "
                "it is of another model or configuration: delete the stage's folder and rerun the same "
                "command"
            )
        for name, parameter in trained.items():
            parameter.copy_(state.get_tensor(f"weight/{name}"))
    processor = load_processor(model_dir, model_config.trust_remote_code)
    if model_config.chat_template:
        processor.chat_template = processor.tokenizer.chat_template = read_template(
            model_config.chat_template
        )
    save_vlm(
        merge(model),
        processor,
        out_dir,
        {"bf16": torch.bfloat16, "fp32": torch.float32}[model_config.precision],
    )
