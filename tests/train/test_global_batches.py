"""Global batches are exact however the rows are spread over workers (threads stand in for them)."""

import threading
from collections import Counter

import pytest
import torch

from medray.config import SftConfig
from medray.train.global_batches import EpochRows, UnequalSplits, shares, take_global_batch


def rows(ids, bad=()):
    return [{"sample_id": str(i), "error": "broken" if i in bad else None} for i in ids]


def epoch(parts, size, done=frozenset(), bad=()):
    """Each part is one worker's rows; returns per worker its batches, and the sizes of the global batches."""
    world = len(parts)
    barrier, slots = threading.Barrier(world), [None] * world
    taken, sizes = [[] for _ in range(world)], []

    def worker(rank):
        def gather(value):
            slots[rank] = value
            barrier.wait(120)
            stacked = torch.stack(slots)
            barrier.wait(120)
            return stacked

        source, more = EpochRows(rows(parts[rank], bad), set(done), 4, rank), True
        while more:
            batch, total, more = take_global_batch(source, size, rank, gather)
            taken[rank].append([row["sample_id"] for row in batch])
            if rank == 0:
                sizes.append(total)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(world)]
    [thread.start() for thread in threads]
    [thread.join(300) for thread in threads]
    return taken, sizes


@pytest.mark.parametrize(
    "parts",
    [
        [range(10)],
        [range(5), range(5, 10)],
        [range(9), range(9, 10)],
        [range(10), []],
        [[], range(3), range(3, 10)],
    ],
)
def test_every_row_once_in_full_batches(parts):
    taken, sizes = epoch(parts, size=4)
    assert Counter(i for worker in taken for batch in worker for i in batch) == Counter(
        str(i) for i in range(10)
    )
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 32])
def test_the_global_batch_is_the_same_at_any_number_of_workers(world):
    """Also where the workers do not divide it; none takes more rows than its passes hold."""
    config = SftConfig(global_batch=40, micro_batch=4, num_workers=(1, 32))
    parts = [range(rank, 100, world) for rank in range(world)]
    taken, sizes = epoch(parts, size=config.samples_per_step)
    assert sizes == [40, 40, 20]
    assert max(len(batches[0]) for batches in taken) <= config.passes_at(world) * config.micro_batch


def test_done_and_bad_rows_are_left_out():
    taken, sizes = epoch([range(6), range(6, 10)], size=4, done={"0", "7"}, bad=(1,))
    assert sorted(i for worker in taken for batch in worker for i in batch) == [
        "2",
        "3",
        "4",
        "5",
        "6",
        "8",
        "9",
    ]
    assert sizes == [4, 3]


def test_nothing_left_is_an_empty_batch():
    assert epoch([range(2), []], size=4, done={"0", "1"}) == ([[[]], [[]]], [0])


def test_order_follows_the_seed():
    orders = [
        [row["sample_id"] for row in EpochRows(rows(range(50)), set(), 16, seed).take(50)]
        for seed in ([0, 0], [0, 0], [0, 1])
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0], key=int) == [str(i) for i in range(50)]


def test_shares():
    assert shares(7, [True, True, False, True]) == [3, 2, 0, 2]
    assert shares(1, [False, True]) == [0, 1]


@pytest.mark.ray
def test_splits_keep_every_row_and_the_limits_of_their_dataset(ray_cluster):
    from ray.data import ExecutionResources

    dataset = ray_cluster.data.range(7, override_num_blocks=3)
    dataset.context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=123 * 2**20
    )
    shards = UnequalSplits().configure({"train": dataset}, 2, None, None)
    contexts = [shard["train"].get_context() for shard in shards]
    assert [context.execution_options.resource_limits.object_store_memory for context in contexts] == [
        123 * 2**20
    ] * 2
    assert all(context.execution_options.preserve_order for context in contexts)

    found = [[], []]
    readers = [
        threading.Thread(
            target=lambda rank=rank: found[rank].extend(
                row["id"] for row in shards[rank]["train"].iter_rows()
            )
        )
        for rank in range(2)
    ]
    [reader.start() for reader in readers]
    [reader.join(120) for reader in readers]
    assert sorted(found[0] + found[1]) == list(range(7))
