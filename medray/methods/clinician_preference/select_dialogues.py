"""Which dialogues the model is tuned on (BioMed-VITAL, selection): scored exchanges to the conversations that
are kept.

Every turn counts: a dialogue's score is the mean or the least of its turns' scores, or turns are ranked one
by one and a dialogue keeps those that are left. What is kept depends on ids, scores and the seed, not on how
the shards are cut.

Rows are grouped, ranked and looked up again through temporary files (medray.storage.external_sort), so that
memory does not grow with their number:

    0. only with relative_to: how well exchanges that are alike are rated on average
    1. exchanges without their images, in order of a hash of their image: dialogues get a score, repeated ones
      are left out
    2. for each modality its quota, and the key of the last one that is in it
    3. the kept exchanges, in their places among the shards; these are read once more, with the images
    4. conversations, in order of a hash of their ids
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from medray.config.clinician_preference_sections import SelectConfig
from medray.data.exchanges import conversation_row, normal
from medray.errors import DataError
from medray.records import CONVERSATION
from medray.stable_draws import hash64
from medray.storage.external_sort import Ordered, evenly, groups_of, hashed
from medray.storage.quotas import UNKNOWN, shares
from medray.storage.shards import count_rows, empty_folder, tables, tables_of, write_shard
from medray.storage.top_n import at_most, descending, thresholds

_LIGHT = ("sample_id", "dialogue_id", "turn", "image_id", "modality", "question", "answer", "score")
_HEAVY = ("dialogue_id", "turn", "image_id", "image", "question", "answer")
# What is ranked: a dialogue, or a turn by itself.
_UNIT = pa.schema(
    [
        ("unit", pa.string()),
        ("modality", pa.string()),
        ("score", pa.float64()),
        ("key", pa.uint64()),
        ("tie", pa.uint64()),
        ("places", pa.list_(pa.int64())),  # of its exchanges among the rows of the shards
    ]
)
_GLOBAL = "all"
# Of exchanges that are alike: bins by a hash of their words; in a mean over them how many of the average each
# has beside its own, and parts of a score that count.
_BINS, _PRIOR, _UNITS = 2**20, 3, 2**20


def select(
    scored: str, out_uri: str, config: SelectConfig, scores: Callable[[pa.Table], pa.Array] | None = None
) -> dict[str, Any]:
    """Write records.CONVERSATION of what is kept into `out_uri`, which is emptied first.

    Args:
        scored: shards of records.SCORED. A dialogue with a turn that has no score is left out and counted
            (with aggregate turns, that turn alone); so is every exchange whose sample_id is there for a
            second time.
        scores: for a table of exchanges (N,), what to rank by in place of their column score; not together
            with relative_to.

    Returns {"counts": {...}, "mix": {modality: {"before", "kept", "share before", "share kept", "mean score
    before", "mean score kept"}}, "variety": {"before", "kept"}}, where before and kept of the mix count
    dialogues, or turns where they are ranked by themselves, and those of the variety are effective numbers of
    different exchanges: e to the entropy (nats) of how often each question and answer is there.

    Raises DataError where nothing has a score.
    """
    counts: Counter[str] = Counter()
    mix: dict[str, Counter[str]] = {}
    before, after = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    with ExitStack() as files:
        total = count_rows(scored)
        by_image = files.enter_context(
            Ordered(
                _tallied(_placed(scored, _levels(scored, config), scores), before),
                hashed("image_id"),
                total,
                then=["image_id", "dialogue_id", "turn", "sample_id"],
            )
        )
        units = files.enter_context(
            Ordered(
                _units(by_image, config, counts, mix),
                lambda table: table["tie"].to_numpy(),
                total,
                then=["unit"],
            )
        )
        if not counts["ranked"]:
            raise DataError(
                f"{scored}: no dialogue to choose from ({dict(counts)}); the column score of its rows is "
                "null throughout"
            )
        kept = _kept(units, config, mix)
        places = files.enter_context(Ordered(kept, evenly("place", total), total))
        exchanges = files.enter_context(
            Ordered(_looked_up(scored, places), hashed("dialogue_id"), total, then=["dialogue_id", "turn"])
        )
        empty_folder(out_uri)
        write_shard(_conversations(_tallied(exchanges, after), counts), out_uri, "part")
    return {
        "counts": {"exchanges": total, **counts},
        "mix": _shares_of(mix),
        "variety": {"before": effective_number(before), "kept": effective_number(after)},
    }


def _bins(table: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """A bin (N,) of each exchange by the words of these columns."""
    texts = zip(*(table[name].to_pylist() for name in columns), strict=True)
    return np.array(
        [hash64("\0".join(normal(word or "") for word in words)) % _BINS for words in texts], np.int64
    )


def _tallied(exchanges: Iterable[pa.Table], counts: np.ndarray) -> Iterator[pa.Table]:
    """The same tables; how often each question and answer is there is added to `counts`, by bin."""
    for table in exchanges:
        np.add.at(counts, _bins(table, ("question", "answer")), 1)
        yield table


def effective_number(counts: np.ndarray) -> float:
    """How many different things counts (N,) are of, effectively: e to the entropy (nats) of their shares."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _levels(scored: str, config: SelectConfig) -> Callable[[pa.Table], np.ndarray]:
    """For the exchanges of a table (N,): how much better than the average those are rated that are alike
    (config.relative_to).

    Few that are alike say little of their kind: their mean is drawn towards the average of all.
    """
    if config.relative_to is None:
        return lambda table: np.zeros(table.num_rows)
    columns = ("question",) if config.relative_to == "question" else ("question", "answer")
    # of whole numbers: in any order the same
    sums, counts = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    for table in tables(scored, [*columns, "score"], 2**12):
        score_N = table["score"].cast(pa.float64()).to_numpy()  # null is NaN
        known = ~np.isnan(score_N)
        mine = _bins(table, columns)[known]
        np.add.at(sums, mine, np.rint(score_N[known] * _UNITS).astype(np.int64))
        np.add.at(counts, mine, 1)
    level = (sums - counts * (sums.sum() / max(counts.sum(), 1))) / (counts + _PRIOR) / _UNITS
    return lambda table: level[_bins(table, columns)]


def _placed(
    scored: str, levels: Callable[[pa.Table], np.ndarray], scores: Callable[[pa.Table], pa.Array] | None
) -> Iterator[pa.Table]:
    """Exchanges without their image, with their place among the rows of the shards, and what is
    subtracted from their score.
    """
    start = 0
    for table in tables(scored, list(_LIGHT), 2**12):
        if scores is not None:
            table = table.set_column(table.schema.get_field_index("score"), "score", scores(table))
        yield table.append_column("place", pa.array(np.arange(start, start + table.num_rows))).append_column(
            "level", pa.array(levels(table))
        )
        start += table.num_rows


def _units(
    by_image: Iterable[pa.Table], config: SelectConfig, counts: Counter[str], mix: dict[str, Counter[str]]
) -> Iterator[pa.Table]:
    """Tables of _UNIT: what is ranked."""
    made = (unit for rows in groups_of(by_image, "image_id") for unit in units_of_image(rows, config, counts))
    while part := list(itertools.islice(made, 4096)):
        for unit in part:
            tally = mix.setdefault(unit["modality"], Counter())
            tally.update({"before": 1, "score before": unit["score"]})
        counts["ranked"] += len(part)
        scores = np.array([unit["rank"] for unit in part]) if config.order == "score" else np.zeros(len(part))
        ties = [hash64(unit["unit"], config.seed) for unit in part]
        columns = {name: [unit[name] for unit in part] for name in ("unit", "modality", "score", "places")}
        yield pa.table({**columns, "key": descending(scores), "tie": ties}, schema=_UNIT)


def units_of_image(
    exchanges: Sequence[dict[str, Any]], config: SelectConfig, counts: Counter[str]
) -> list[dict[str, Any]]:
    """What of one image is ranked: {"unit", "modality", "score", "rank" (the score less what its like have),
    "places"} (pure).

    Args:
        exchanges: of the image, those of a dialogue together and in order.
        counts: what is left out is added to it, by reason.
    """
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    for _, dialogue in itertools.groupby(exchanges, lambda row: row["dialogue_id"]):
        given = list(dialogue)
        rows = list({row["sample_id"]: row for row in given}.values())
        counts["left out: sample_id seen before"] += len(given) - len(rows)
        for unit in [[row] for row in rows] if config.aggregate == "turns" else [rows]:
            scores = [row["score"] for row in unit]
            if any(score is None or math.isnan(score) for score in scores):
                counts["left out: no score"] += 1
                continue
            name = unit[0]["sample_id"] if config.aggregate == "turns" else unit[0]["dialogue_id"]
            score, rank = (
                min(values) if config.aggregate == "min" else sum(values) / len(values)
                for values in (scores, [row["score"] - row["level"] for row in unit])
            )
            made = {
                "unit": name,
                "modality": unit[0]["modality"] or UNKNOWN,
                "score": score,
                "rank": rank,
                "places": [row["place"] for row in unit],
            }
            said = (
                tuple(normal(f"{row['question']} {row['answer']}") for row in unit)
                if config.deduplicate
                else (name,)
            )
            if said in best:
                counts["left out: says what another says"] += 1
            if said not in best or (config.order == "score" and rank > best[said]["rank"]):
                best[said] = made
    return list(best.values())


def _kept(units: Ordered, config: SelectConfig, mix: dict[str, Counter[str]]) -> Iterator[pa.Table]:
    """{"place"} of every exchange that is kept."""
    names = sorted(mix) if config.per_modality != "global" else [_GLOBAL]
    sizes = (
        {name: mix[name]["before"] for name in names}
        if config.per_modality != "global"
        else {_GLOBAL: sum(one["before"] for one in mix.values())}
    )
    ranked = sum(sizes.values())
    wanted = min(config.top, ranked) if config.top is not None else max(1, round(config.fraction * ranked))
    quotas = shares(wanted, sizes, "equal" if config.per_modality == "equal" else "proportional", config.seed)

    def groups_of_units(table: pa.Table) -> np.ndarray:
        found = pc.index_in(table["modality"], value_set=pa.array(names))
        return found.to_numpy() if config.per_modality != "global" else np.zeros(table.num_rows, np.int64)

    def keys(table: pa.Table) -> np.ndarray:
        return np.column_stack([table["key"].to_numpy(), table["tie"].to_numpy()])

    limits = thresholds(
        lambda: ((groups_of_units(table), keys(table)) for table in units),
        {names.index(name): quota for name, quota in quotas.items() if quota},
        words=2,
    )
    for table in units:
        groups, key_N = groups_of_units(table), keys(table)
        inside = np.zeros(table.num_rows, bool)
        for group, limit in limits.items():
            inside |= (groups == group) & at_most(key_N, limit)
        chosen = table.filter(pa.array(inside))
        for modality, score in zip(chosen["modality"].to_pylist(), chosen["score"].to_pylist(), strict=True):
            mix[modality].update({"kept": 1, "score kept": score})
        if chosen.num_rows:
            yield pa.table({"place": chosen["places"].combine_chunks().flatten()})


def _looked_up(scored: str, places: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The exchanges at these places, which come in order; of the first turn of a dialogue in a row of
    them alone the image is kept.
    """
    wanted = itertools.chain.from_iterable(table["place"].to_pylist() for table in places)
    place = next(wanted, None)
    start = 0
    seen = None
    for table in tables(scored, list(_HEAVY), 64):
        chosen = []
        while place is not None and place < start + table.num_rows:
            chosen.append(place - start)
            place = next(wanted, None)
        start += table.num_rows
        if chosen:
            rows = table.take(pa.array(chosen)).to_pylist()
            for row in rows:
                if row["dialogue_id"] == seen:
                    row["image"] = None
                seen = row["dialogue_id"]
            yield pa.Table.from_pylist(rows, schema=table.schema)


def _conversations(exchanges: Iterable[pa.Table], counts: Counter[str]) -> Iterator[pa.Table]:
    for table in tables_of(
        (conversation_row(rows) for rows in groups_of(exchanges, "dialogue_id")), CONVERSATION, 64
    ):
        counts.update(
            {
                "dialogues kept": table.num_rows,
                "exchanges kept": pc.sum(pc.list_value_length(table["turns"])).as_py() // 2,
            }
        )
        yield table


def _shares_of(mix: dict[str, Counter[str]]) -> dict[str, dict[str, Any]]:
    before, kept = (sum(tally[name] for tally in mix.values()) for name in ("before", "kept"))
    return {
        modality: {
            "before": tally["before"],
            "kept": tally["kept"],
            "share before": tally["before"] / before,
            "share kept": tally["kept"] / max(kept, 1),
            "mean score before": tally["score before"] / tally["before"],
            "mean score kept": tally["score kept"] / tally["kept"] if tally["kept"] else None,
        }
        for modality, tally in sorted(mix.items())
    }
