"""Pairs of rated exchanges, the model's preference for the rating model (BioMed-VITAL): records.RATED to
records.RATING_PAIR.

Two exchanges make a pair where their scores lie in two distinct levels; the better one is chosen. Exchanges
without a score make none. What is drawn depends on ids, scores and the seed, not on how the shards are cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from medray.config.clinician_preference_sections import PairsConfig
from medray.records import RATING_PAIR
from medray.stable_draws import hash64
from medray.storage.external_sort import Ordered, evenly, groups_of, hashed
from medray.storage.shards import count_rows, empty_folder, tables, tables_of, write_shard

SIDE = ("image_id", "image", "context", "question", "answer", "score")
_PLACED = pa.schema(
    [("place", pa.int64()), *[(name, RATING_PAIR.field(f"chosen_{name}").type) for name in SIDE]]
)


@dataclass(frozen=True)
class Candidate:
    """A rated exchange, as far as the draw needs it."""

    sample_id: str
    image_id: str
    score: float


Pair = tuple[Candidate, Candidate]  # chosen, rejected


def model_pairs(
    rated: str, out_uri: str, config: PairsConfig, name: str, side: Callable[[str], Hashable] | None = None
) -> dict[str, int]:
    """Write at most config.max_pairs pairs into `out_uri`, which is emptied first.

    Args:
        name: who rated, for the column `judge`.
        side: of an image id; only images of the same side are paired, such as those of one split. Each side
            gets pairs in proportion to its exchanges.

    Memory: a few hundred bytes for each pair and for twice config.max_pairs candidates; images pass through
    temporary files.

    Returns {"rated", "without score", "candidates", "pairs", "pairs across images"}.
    """
    total = count_rows(rated)
    without = sum(table["score"].null_count for table in tables(rated, ["score"]))
    candidates = list(itertools.islice(_candidates(rated, config), 2 * config.max_pairs))
    groups: dict[Hashable, list[Candidate]] = {}
    for one in candidates:
        groups.setdefault(side(one.image_id) if side else None, []).append(one)
    pairs = [
        pair
        for group in groups.values()
        for pair in draw_pairs(group, round(config.max_pairs * len(group) / len(candidates)), config)
    ]
    empty_folder(out_uri)
    write_shard(_written(rated, pairs, name), out_uri, "part")
    across = sum(chosen.image_id != rejected.image_id for chosen, rejected in pairs)
    return {
        "rated": total,
        "without score": without,
        "candidates": len(candidates),
        "pairs": len(pairs),
        "pairs across images": across,
    }


def draw_pairs(candidates: list[Candidate], most: int, config: PairsConfig) -> list[Pair]:
    """At most `most` pairs of distinct levels, none twice, each candidate in config.uses of them at most.

    Candidates are put into a new random order config.uses times, and neighbours are paired: 1 with 2, 3 with
    4, ...; with same_image, candidates of one image are neighbours, and only they are paired.
    """
    pairs: dict[frozenset[str], Pair] = {}
    for use in range(config.uses):
        for first, second in _neighbours(candidates, config, use):
            if len(pairs) == most:
                return list(pairs.values())
            levels = [one.score // config.level_width for one in (first, second)]
            both = frozenset((first.sample_id, second.sample_id))
            if levels[0] == levels[1] or both in pairs:
                continue
            pairs[both] = (first, second) if first.score > second.score else (second, first)
    return list(pairs.values())


def _neighbours(
    candidates: list[Candidate], config: PairsConfig, use: int
) -> Iterator[tuple[Candidate, Candidate]]:
    shuffled = sorted(
        candidates, key=lambda one: (hash64(f"{use}|{one.sample_id}", config.seed), one.sample_id)
    )
    groups: dict[str, list[Candidate]] = {}
    for one in shuffled:
        groups.setdefault(one.image_id if config.same_image else "", []).append(one)
    for group in groups.values():
        yield from zip(group[::2], group[1::2])


def _candidates(rated: str, config: PairsConfig) -> Iterator[Candidate]:
    """Those with a score, in an order drawn by id; with same_image all of an image together."""
    columns = ["sample_id", "image_id", "score"]
    known = (table.filter(pc.is_valid(table["score"])) for table in tables(rated, columns, 2**14))
    key = hashed("image_id" if config.same_image else "sample_id", config.seed)
    with Ordered(known, key, count_rows(rated), then=["image_id", "sample_id"]) as rows:
        for table in rows:
            yield from (Candidate(**row) for row in table.to_pylist())


def _written(rated: str, pairs: list[Pair], name: str) -> Iterator[pa.Table]:
    """Tables of RATING_PAIR in the order of `pairs`: each side is looked up once, and the two sides of a
    pair meet again by its number.
    """
    places: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        for half, one in enumerate(pair):
            places.setdefault(one.sample_id, []).append(2 * number + half)
    wanted = pa.array(sorted(places), pa.string())

    def sides() -> Iterator[pa.Table]:
        for table in tables(rated, ["sample_id", *SIDE], 64):
            chosen = table.filter(pc.is_in(table["sample_id"], value_set=wanted)).to_pylist()
            yield pa.Table.from_pylist(
                [{**row, "place": place} for row in chosen for place in places[row["sample_id"]]],
                schema=_PLACED,
            )

    with Ordered(sides(), evenly("place", 2 * len(pairs)), 2 * len(pairs)) as rows:
        numbered = (table.append_column("pair", pc.divide(table["place"], 2)) for table in rows)
        made = (
            {"sample_id": f"model/{chosen_id}|{rejected_id}", "origin": "model", "judge": name} | found
            for (chosen_id, rejected_id), found in _joined(numbered, pairs)
        )
        yield from tables_of(made, RATING_PAIR, 64)


def _joined(
    numbered: Iterator[pa.Table], pairs: list[Pair]
) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for (chosen, rejected), (first, second) in zip(groups_of(numbered, "pair"), pairs, strict=True):
        sides = {
            f"{half}_{name}": row[name]
            for half, row in (("chosen", chosen), ("rejected", rejected))
            for name in SIDE
        }
        yield (first.sample_id, second.sample_id), sides
