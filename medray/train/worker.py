"""The one training loop: a Ray Data shard -> DeepSpeed engine -> checkpoint, under Ray Train V2.

Every row is trained exactly once per epoch, at any number of workers and after any restart: a checkpoint holds the ids
that all ranks consumed in the epoch so far, and a restarted epoch skips them. Splits need not be equal, and no row is
dropped to make them so.
"""

from __future__ import annotations

import json
import posixpath
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.data
import ray.train
from ray.train import DataConfig as RayDataConfig

from medray.config import DpoConfig, ModelConfig, TrainConfig
from medray.errors import StageError

STATE, PROGRESS, CONSUMED, METRICS, QUARANTINE = "state.safetensors", "progress.json", "consumed.json", "metrics.jsonl", "quarantine.jsonl"
ROWS_PER_FETCH = 64


@dataclass
class TrainResult:
    """What a finished training left: the last checkpoint's URI, the metrics of every step, counts of rows."""

    checkpoint: str
    metrics: list[dict[str, Any]]
    quarantine: list[dict[str, str]]
    counts: dict[str, int]


class UnequalSplits(RayDataConfig):
    """Ray Train's data config without its equal splits, which drop rows (`streaming_split(equal=True)` is its default)."""

    def configure(self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **_: Any) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            if dataset.name is None:
                dataset.set_name(name)
            for rank, split in enumerate(dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)):
                shards[rank][name] = split
        return shards


@dataclass
class Progress:
    """Where the training stands; what a checkpoint restores."""

    epoch: int = 0
    step: int = 0
    consumed: int = 0  # samples of the whole training, over all ranks
    restarts: int = 0
    seen: set[str] = field(default_factory=set)  # ids of this epoch, over all ranks
    metrics: list[dict[str, Any]] = field(default_factory=list)
    quarantine: dict[str, str] = field(default_factory=dict)


def train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs. `settings` is plain data (see run_training)."""
    import torch

    config_class = {"sft": _sft_class(), "dpo": DpoConfig}[settings["objective"]]
    config = config_class.model_validate(settings["train"])
    model_config = ModelConfig.model_validate(settings["model"])
    torch.set_num_threads(config.threads or max(1, int(config.cpus_per_worker)))
    from medray.train.step import TrainStep

    device = ray.train.torch.get_device()
    step = TrainStep(settings["model_dir"], model_config, config, settings["objective"], settings["rows"] * config.epochs, device)
    worker = _Worker(step, config, settings)
    worker.restore()
    worker.run()


def _sft_class() -> type[TrainConfig]:
    from medray.config import SftConfig

    return SftConfig


class _Worker:
    """State of one rank between steps."""

    def __init__(self, step: Any, config: TrainConfig, settings: dict[str, Any]):
        from medray.data.spans import Dialogues

        self.step = step
        self.config = config
        self.settings = settings
        self.info = Dialogues(step.processor, ModelConfig.model_validate(settings["model"])).info()
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.progress = Progress()
        # The global batch stays what the config says at any number of workers.
        share, rest = divmod(config.samples_per_step, self.world)
        self.quota = share + (self.rank < rest)
        self.filler: dict[str, Any] | None = None

    def restore(self) -> None:
        """Continue from the checkpoint Ray Train hands over, if there is one; only then is data read."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        from safetensors.torch import load_file

        with checkpoint.as_directory() as folder:
            self.step.load_state(load_file(f"{folder}/{STATE}"))
            saved = json.loads(Path(folder, PROGRESS).read_text())
            self.progress = Progress(
                epoch=saved["epoch"], step=saved["step"], consumed=saved["consumed"], restarts=saved["restarts"] + 1,
                seen=set(json.loads(Path(folder, CONSUMED).read_text())),
                metrics=[json.loads(line) for line in Path(folder, METRICS).read_text().splitlines()],
                quarantine=dict(json.loads(line) for line in Path(folder, QUARANTINE).read_text().splitlines()),
            )
        if saved["epoch_done"]:
            self.progress.epoch += 1
            self.progress.seen = set()

    def run(self) -> None:
        shard = ray.train.get_dataset_shard("train")
        while self.progress.epoch < self.config.epochs:
            self._epoch(shard)
            self.progress.epoch += 1
            self.progress.seen = set()

    def _epoch(self, shard: Any) -> None:
        progress = self.progress
        rows = self._rows(shard, progress.epoch)
        new_ids: list[str] = []
        since_checkpoint = 0
        while True:
            began = time.perf_counter()
            taken = [row for _, row in zip(range(self.quota), rows, strict=False)]
            batches, weight = self._batches(taken)
            # A rank may be out of rows while others are not: all stop together.
            samples = self._sum(len(taken))
            if samples == 0:
                break
            metrics = self.step.update(batches, weight, len(taken), progress.consumed, self.filler)
            progress.step += 1
            progress.consumed += int(samples)
            since_checkpoint += 1
            new_ids += [row["sample_id"] for row in taken]
            metrics |= {"step": progress.step, "epoch": progress.epoch, "seconds": time.perf_counter() - began, "world_size": self.world}
            progress.metrics.append(metrics)
            if since_checkpoint >= self.config.checkpoint_every:
                self._checkpoint(new_ids, metrics, epoch_done=False)
                new_ids, since_checkpoint = [], 0
        last: dict[str, Any] = progress.metrics[-1] if progress.metrics else {"step": 0}
        evaluation = self._evaluate()
        if evaluation is not None:
            last = {"step": progress.step, "epoch": progress.epoch, "eval_loss": evaluation}
            progress.metrics.append(last)
        self._checkpoint(new_ids, last, epoch_done=True)

    def _rows(self, shard: Any, epoch: int) -> Iterator[dict[str, Any]]:
        """Encoded rows of this rank that the epoch has not seen; rows that could not be encoded are set aside."""
        for batch in shard.iter_batches(
            batch_size=ROWS_PER_FETCH, batch_format="pyarrow", prefetch_batches=2,
            local_shuffle_buffer_size=max(self.config.shuffle_buffer, ROWS_PER_FETCH), local_shuffle_seed=self.config.seed * 1000 + epoch,
        ):
            for row in batch.to_pylist():
                if row["error"] is not None:
                    self.progress.quarantine[row["sample_id"]] = row["error"]
                elif row["sample_id"] not in self.progress.seen:
                    yield row

    def _batches(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
        size = self.config.micro_batch
        batches = [self._collate(rows[at: at + size]) for at in range(0, len(rows), size)]
        if batches and self.filler is None:
            self.filler = batches[0]
        if self.filler is None and self.world > 1:
            self.filler = self._borrowed_filler()
        weight = len(rows) if self.settings["objective"] == "dpo" else sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        return batches, weight

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from medray.data.collate import collate_dpo, collate_sft

        if self.settings["objective"] == "dpo":
            return collate_dpo(rows, self.info)
        return collate_sft(rows, self.info, self.config.self_questioning, self.config.seed, self.progress.epoch)

    def _borrowed_filler(self) -> dict[str, Any]:
        """A batch for a rank that never got a row: a minimal dialogue on a grey image."""
        import io

        import pyarrow as pa
        from PIL import Image

        from medray.data.collate import Encoder

        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, format="PNG")
        encoder = Encoder(self.settings["model_dir"], self.settings["model"], {}, self.settings["objective"])
        row = {"sample_id": "filler", "image": buffer.getvalue(), "turns": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}],
               "prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logp": 0.0, "ref_rejected_logp": 0.0}
        return self._collate(encoder(pa.Table.from_pylist([row])).to_pylist())

    def _evaluate(self) -> float | None:
        if not self.settings["has_eval"]:
            return None
        rows = []
        for batch in ray.train.get_dataset_shard("eval").iter_batches(batch_size=ROWS_PER_FETCH, batch_format="pyarrow"):
            rows += [row for row in batch.to_pylist() if row["error"] is None]  # config.eval_rows bounds them
        size = self.config.micro_batch
        from medray.data.collate import collate_sft

        # rho 0: plain answers, so that the curve does not move with the draw.
        batches = [collate_sft(rows[at: at + size], self.info, 0.0, 0, 0) for at in range(0, len(rows), size)]
        passes = int(self._sum(len(batches)))
        if passes == 0:
            return None
        loss, weight = self.step.evaluate(batches or [self.filler], passes) if batches or self.config.zero_stage == 3 else (0.0, 0.0)
        return self._sum(loss) / max(self._sum(weight), 1.0)

    def _checkpoint(self, new_ids: list[str], metrics: dict[str, Any], epoch_done: bool) -> None:
        """Report a checkpoint: state on rank 0, the ids of all ranks. Every rank calls it equally often."""
        progress = self.progress
        for ids, bad in self._gather((new_ids, progress.quarantine)):
            progress.seen.update(ids)
            progress.quarantine |= bad
        state = self.step.state()
        reported = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        if self.rank != 0:
            ray.train.report(reported, checkpoint=None)
            return
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory() as folder:
            save_file(state, f"{folder}/{STATE}")
            Path(folder, CONSUMED).write_text(json.dumps(sorted(progress.seen)))
            Path(folder, METRICS).write_text("".join(json.dumps(row) + "\n" for row in progress.metrics))
            Path(folder, QUARANTINE).write_text("".join(json.dumps(item) + "\n" for item in progress.quarantine.items()))
            Path(folder, PROGRESS).write_text(json.dumps({
                "epoch": progress.epoch, "step": progress.step, "consumed": progress.consumed, "restarts": progress.restarts,
                "epoch_done": epoch_done, "world_size": self.world,
            }))
            ray.train.report(reported, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _sum(self, value: float) -> float:
        import torch

        return float(self.step._reduce(torch.tensor(float(value), dtype=torch.float64)))

    def _gather(self, value: Any) -> list[Any]:
        """Plain data of every rank, as JSON bytes: no pickle between processes."""
        if self.world == 1:
            return [value]
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.step.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=data.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=data.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=data.device)
        padded[: len(data)] = data
        parts = [torch.zeros_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(size)].cpu().numpy())) for part, size in zip(parts, sizes, strict=True)]


def run_training(
    stage_dir: str, train: ray.data.Dataset, evaluation: ray.data.Dataset | None, rows: int, model_dir: str,
    model_config: ModelConfig, config: TrainConfig, objective: str,
) -> TrainResult:
    """Train on encoded rows (medray.data.collate.Encoder); the same call after a killed driver continues.

    Args:
        stage_dir: where Ray Train keeps checkpoints, local or remote; the run continues what lies there.
        rows: rows of `train`, for the learning rate.
        objective: "sft" or "dpo".

    Raises StageError where the workers failed more often than config.max_failures, or no row could be trained.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": config.cpus_per_worker}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "objective": objective, "rows": rows, "model_dir": model_dir, "model": model_config.model_dump(),
            "train": config.model_dump(), "has_eval": evaluation is not None,
        },
        datasets={"train": train} | ({"eval": evaluation} if evaluation is not None else {}),
        dataset_config=UnequalSplits(),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray_train", storage_path=stage_dir, checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise StageError(f"training failed after {config.max_failures} restarts: {error}") from error
    if result.checkpoint is None:
        raise StageError(f"no checkpoint was written in {stage_dir}")
    return _read_result(result.checkpoint)


def _read_result(checkpoint: Any) -> TrainResult:
    with checkpoint.as_directory() as folder:
        progress = json.loads(Path(folder, PROGRESS).read_text())
        metrics = [json.loads(line) for line in Path(folder, METRICS).read_text().splitlines()]
        quarantine = [dict(zip(("sample_id", "reason"), json.loads(line), strict=True)) for line in Path(folder, QUARANTINE).read_text().splitlines()]
    if progress["consumed"] == 0:
        reasons = sorted({entry["reason"] for entry in quarantine})[:3]
        raise StageError(f"no row could be trained; {len(quarantine)} were set aside, for example: {'; '.join(reasons) or 'none was read'}")
    counts = {
        "samples_trained": progress["consumed"], "steps": progress["step"], "quarantined": len(quarantine), "restarts": progress["restarts"],
    }
    uri = checkpoint.path if "://" in checkpoint.path else posixpath.abspath(checkpoint.path)
    return TrainResult(uri, metrics, quarantine, counts)


def export_merged(checkpoint_dir: str, model_dir: str, out_dir: str, model_config: ModelConfig, config: TrainConfig) -> None:
    """Merge a checkpoint's adapters and projector into plain weights and write a model folder (local paths)."""
    from safetensors.torch import load_file

    from medray.models.export import save_vlm
    from medray.models.vlm import load_processor, load_vlm, merge, prepare_trainable, trainable_state

    # fp32 for the addition: in bf16 a small update would vanish beside a large weight.
    model = prepare_trainable(load_vlm(model_dir, "fp32", model_config.trust_remote_code), config.model_copy(update={"gradient_checkpointing": False}))
    state = load_file(f"{checkpoint_dir}/{STATE}")
    for name, parameter in trainable_state(model).items():
        parameter.data.copy_(state[f"weight/{name}"])
    processor = load_processor(model_dir, model_config.trust_remote_code)
    if model_config.chat_template:
        template = Path(model_config.chat_template).read_text(encoding="utf-8")
        processor.chat_template = processor.tokenizer.chat_template = template
    import torch

    save_vlm(merge(model), processor, out_dir, {"bf16": torch.bfloat16, "fp32": torch.float32}[model_config.precision])
