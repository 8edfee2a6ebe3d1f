"""Diverse images: k-means over embeddings, and a draw over clusters and modalities (BioMed-VITAL, section on
demonstrations).

Everything streams over shards of records.EMBEDDED. What comes out depends on the ids, the embeddings and the
seed, not on how the shards are cut. Rows without an embedding are counted and belong to no cluster.
"""

from __future__ import annotations

import heapq
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medray.config.clinician_preference_sections import DemonstrationsConfig
from medray.errors import DataError
from medray.stable_draws import hash64
from medray.storage.external_sort import Ordered, batches_of, hashed
from medray.storage.quotas import UNKNOWN, shares
from medray.storage.shards import count_rows, empty_folder, tables, write_shard

CLUSTERED = pa.schema([("sample_id", pa.string()), ("modality", pa.string()), ("cluster", pa.int32())])
_COLUMNS = ["sample_id", "embedding"]
_STARTS = 4  # one start often leaves two groups in one cluster


@dataclass(frozen=True)
class Clusters:
    """Centres (K, D) in 32 bits."""

    centres: np.ndarray

    def of(self, embeddings: np.ndarray) -> np.ndarray:
        """The nearest centre of each embedding: (N, D) -> (N,) int32; of equally near ones the first."""
        # |x - c|^2 without |x|^2, which all centres share.
        distances_NK = (self.centres**2).sum(1) - 2 * embeddings @ self.centres.T
        return distances_NK.argmin(1).astype(np.int32)


def fit_clusters(embedded: str, config: DemonstrationsConfig) -> Clusters:
    """Mini-batch k-means over the embeddings, in an order drawn by id; it starts from the best of some
    k-means of the first batch.

    Memory: one part of the embeddings and one batch; they pass through temporary files, which hold them once.
    With fewer images than config.clusters every image is a centre.

    Raises DataError where no row has an embedding, or embeddings differ in length.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    batch = max(config.kmeans_batch, config.clusters)  # the first has to hold a point for every centre
    with Ordered(
        _embedded(embedded), hashed("sample_id", config.seed), count_rows(embedded), then=["sample_id"]
    ) as rows:
        first = next(batches_of(rows, batch), None)
        if first is None:
            raise DataError(f"{embedded}: no image has an embedding; the column error of its rows says why")
        count, seed = min(config.clusters, first.num_rows), config.seed % 2**32
        with warnings.catch_warnings():
            # equal images; empty centres do no harm
            warnings.filterwarnings("ignore", "Number of distinct clusters")
            start = KMeans(count, n_init=_STARTS, random_state=seed).fit(matrix(first)).cluster_centers_
            means = MiniBatchKMeans(count, init=start, n_init=1, batch_size=batch, random_state=seed)
            for _ in range(config.passes):
                for table in batches_of(rows, batch):
                    means.partial_fit(matrix(table))
    return Clusters(means.cluster_centers_.astype(np.float32))


def assign(embedded: str, clusters: Clusters, out_uri: str) -> dict[str, int]:
    """Write CLUSTERED shards of the rows that have an embedding into `out_uri`, which is emptied first;
    returns {"images", "without embedding", "clusters used"}.
    """
    counts: Counter[str] = Counter()
    used: set[int] = set()

    def assigned() -> Iterator[pa.Table]:
        for table in tables(embedded, ["sample_id", "modality", "embedding"], 4096):
            known = table.filter(pc.is_valid(table["embedding"]))
            counts.update({"images": known.num_rows, "without embedding": table.num_rows - known.num_rows})
            if known.num_rows:
                found = clusters.of(matrix(known))
                used.update(found.tolist())
                yield pa.table([known["sample_id"], known["modality"], pa.array(found)], schema=CLUSTERED)

    empty_folder(out_uri)
    write_shard(assigned(), out_uri, "part")
    return {**counts, "clusters used": len(used)}


def draw(assigned: str, config: DemonstrationsConfig) -> list[dict[str, Any]]:
    """config.draw rows of CLUSTERED shards: equal shares of the modalities, and within each of the clusters;
    all where there are fewer.

    A modality or cluster with too few images gives its share to the others. Which image stands for a cluster
    is drawn by id. Memory: config.draw ids for each cluster of each modality.
    """
    nearest: dict[str, dict[int, list[tuple[int, str]]]] = defaultdict(lambda: defaultdict(list))
    for table in tables(assigned, ["sample_id", "modality", "cluster"]):
        for row in table.to_pylist():
            held = nearest[row["modality"] or UNKNOWN][row["cluster"]]
            entry = (-hash64(row["sample_id"], config.seed), row["sample_id"])
            if len(held) < config.draw:
                heapq.heappush(held, entry)
            else:
                heapq.heappushpop(held, entry)
    of_modality = shares(
        config.draw,
        {modality: sum(map(len, clusters.values())) for modality, clusters in nearest.items()},
        "equal",
        config.seed,
    )
    drawn = []
    for modality, clusters in sorted(nearest.items()):
        of_cluster = shares(
            of_modality[modality],
            {cluster: len(held) for cluster, held in clusters.items()},
            "equal",
            config.seed,
        )
        for cluster, held in sorted(clusters.items()):
            drawn += [
                {"sample_id": name, "modality": modality, "cluster": cluster}
                for _, name in sorted(held, reverse=True)[: of_cluster[cluster]]
            ]
    return drawn


def take_rows(source: str, ids: Iterable[str], out_uri: str) -> int:
    """Write the rows of these ids of a folder of shards, as they are; returns their number."""
    wanted, count = pa.array(sorted(ids), pa.string()), 0

    def taken() -> Iterator[pa.Table]:
        nonlocal count
        for table in tables(source, rows=256):
            chosen = table.filter(pc.is_in(table["sample_id"], value_set=wanted))
            count += chosen.num_rows
            if chosen.num_rows:
                yield chosen

    empty_folder(out_uri)
    write_shard(taken(), out_uri, "part")
    return count


def matrix(table: pa.Table) -> np.ndarray:
    """The column embedding as (rows, D). Raises DataError where lengths differ."""
    lists = table["embedding"].combine_chunks()
    lengths = set(pc.list_value_length(lists).unique().to_pylist())
    if len(lengths) != 1:
        raise DataError(
            f"embeddings of {sorted(lengths)} numbers among each other; embed all images with one encoder"
        )
    return lists.flatten().to_numpy().reshape(len(lists), lengths.pop())


def _embedded(uri: str) -> Iterator[pa.Table]:
    for table in tables(uri, _COLUMNS):
        yield table.filter(pc.is_valid(table["embedding"]))


def spread(drawn: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """{modality: {"images", "clusters"}} of drawn rows: over how many clusters the images of a modality
    are spread.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for row in drawn:
        found[row["modality"]].append(row["cluster"])
    return {
        modality: {"images": len(clusters), "clusters": len(set(clusters))}
        for modality, clusters in sorted(found.items())
    }
