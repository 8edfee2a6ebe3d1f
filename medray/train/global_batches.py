"""Rows of a Ray Data shard to exact global batches: every sample once per epoch, at any number of workers.

Workers hold unequal shares (nothing is dropped to make them equal), so before each step they agree on who
takes how many rows; every global batch but an epoch's last has exactly the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import numpy as np
import ray.train
import torch

Row = dict[str, Any]


class UnequalSplits(ray.train.DataConfig):
    """Splits every dataset among the workers without dropping rows, in an order fixed by the data.

    Ray Train's default (streaming_split with equal=True) drops rows to make splits equal.
    """

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        """See ray.train.DataConfig.configure."""
        shards = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options = self.options_of(name, dataset)
            for shard, split in zip(
                shards,
                dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids),
                strict=True,
            ):
                shard[name] = split
        return shards

    def options_of(self, name: str, dataset: Any) -> Any:
        """How a dataset is executed: Train's options (of Ray 2.60, which leave out its limits and its
        place), in order.
        """
        options, own = self._resolve_execution_options(name), dataset.context.execution_options
        options.preserve_order = True
        options.resource_limits = own.resource_limits
        options.label_selector = own.label_selector
        return options


def rows_of(shard: Any) -> Iterator[Row]:
    """The rows of a Ray Data iterator, block by block."""
    for table in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for start in range(0, table.num_rows, 64):
            yield from table.slice(start, 64).to_pylist()


class EpochRows:
    """One worker's rows of one epoch: those done before a restart left out, bad ones set aside, the rest
    shuffled.

    Args:
        rows: encoded rows with sample_id and error.
        done: ids trained or set aside earlier in this epoch, on any worker.
        buffer: rows held for shuffling.
        seed: of the shuffle, anything numpy takes.

    Attributes:
        quarantined: reason by sample_id of the rows that could not be encoded.
    """

    def __init__(self, rows: Iterable[Row], done: Container[str], buffer: int, seed: int | list[int]):
        self.quarantined: dict[str, str] = {}
        self._rows = self._shuffled(self._usable(rows, done), buffer, np.random.default_rng(seed))
        self._next: Row | None = None

    def _usable(self, rows: Iterable[Row], done: Container[str]) -> Iterator[Row]:
        for row in rows:
            if row["sample_id"] in done:
                continue
            if row["error"] is not None:
                self.quarantined[row["sample_id"]] = row["error"]
                continue
            yield row

    @staticmethod
    def _shuffled(rows: Iterator[Row], size: int, rng: np.random.Generator) -> Iterator[Row]:
        held: list[Row] = []
        for row in rows:
            if len(held) < size:
                held.append(row)
                continue
            place = rng.integers(size)
            row, held[place] = held[place], row
            yield row
        for place in rng.permutation(len(held)):
            yield held[place]

    def more(self) -> bool:
        """Whether a row is left; waits for the data."""
        if self._next is None:
            self._next = next(self._rows, None)
        return self._next is not None

    def take(self, count: int) -> list[Row]:
        """Up to `count` rows; fewer only at the end."""
        taken = []
        while len(taken) < count and self.more():
            taken.append(self._next)
            self._next = None
        return taken


def shares(size: int, active: list[bool]) -> list[int]:
    """`size` rows divided among the active workers, as equally as can be."""
    ranks = [rank for rank, is_active in enumerate(active) if is_active]
    parts = [0] * len(active)
    for place, rank in enumerate(ranks):
        parts[rank] = size // len(ranks) + (place < size % len(ranks))
    return parts


def take_global_batch(
    rows: EpochRows, size: int, rank: int, gather: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[Row], int, bool]:
    """This worker's rows of the next global batch of `size` rows. Collective.

    Args:
        gather: stacks a tensor of every rank, [world, ...].

    Returns (rows, rows of the whole batch: less than `size` only in the epoch's last batch, whether the epoch
    has more).
    """
    taken: list[Row] = []
    active = gather(torch.tensor([int(rows.more())])).flatten().bool().tolist()
    total = 0
    while total < size and any(active):
        taken += rows.take(shares(size - total, active)[rank])
        state = gather(torch.tensor([len(taken), int(rows.more())]))
        total, active = int(state[:, 0].sum()), state[:, 1].bool().tolist()
    return taken, total, any(active)
