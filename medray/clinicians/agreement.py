"""Agreement between clinicians: Cohen's and Fleiss' kappa, and what each of them did (pure).

Two things are compared: *ticks*, whether each single answer is good, and *choices*, what is said of the pair
(medray.clinicians.judgements.choice). Items that a clinician skipped are not compared; "not answerable" is a
choice, and no tick.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from statistics import median
from typing import Any

from medray.clinicians.judgements import choice, judged

Row = dict[str, Any]


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two raters' labels of the same subjects, (p_o - p_e) / (1 - p_e).

    None without subjects, and where both raters only ever use one and the same label: there is no agreement
    beyond chance to speak of.

    Raises ValueError where the lengths differ.

    Source: Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} labels of the first rater, {len(second)} of the second")
    n = len(first)
    left, right = Counter(first), Counter(second)
    observed = sum(a == b for a, b in zip(first, second))
    by_chance = sum(left[label] * right[label] for label in left)  # times n squared
    return None if by_chance == n * n else (observed * n - by_chance) / (n * n - by_chance)


def fleiss_kappa(subjects: Iterable[Counter]) -> float | None:
    """Fleiss' kappa of subjects rated by two or more raters, who need not be the same ones.

    The number of raters may differ between subjects: the agreement of a subject is the share of its pairs of
    raters that agree, the mean is over subjects, and chance is taken from the labels of all ratings. With
    equal numbers this is Fleiss' formula.

    Args:
        subjects: for each subject how many raters gave each label; subjects with fewer than two ratings are
            left out.

    None without subjects, and where only one label was ever used.

    Source: Fleiss, Measuring nominal scale agreement among many raters, 1971.
    """
    rated = [counts for counts in subjects if counts.total() >= 2]
    total = sum(rated, Counter())
    ratings = total.total()
    if len(total) < 2:
        return None
    agreement = sum(_agreeing_pairs(counts) for counts in rated) / len(rated)
    by_chance = sum((count / ratings) ** 2 for count in total.values())
    return (agreement - by_chance) / (1 - by_chance)


def _agreeing_pairs(counts: Counter) -> float:
    n = counts.total()
    return sum(count * (count - 1) for count in counts.values()) / (n * (n - 1))


def summary(judgements: Iterable[Row]) -> dict[str, Any]:
    """What the report and the page say of the clinicians' judgements (records.JUDGEMENT rows, also
    histories).

    Returns {"items", "items_with_two" (judged by two clinicians or more), "clinicians": {id: see _work_of},
    "fleiss_kappa": {"ticks" | "choices": {"kappa", "subjects"}},
    "cohen_kappa": [{"first", "second", "items", "ticks", "choices"}]}; a kappa that is not defined is None.
    """
    rows = judged(judgements)
    words: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        words[row["clinician"]].append(row)
    labels = {"ticks": _labels(rows, _ticks), "choices": _labels(rows, _choices)}
    judges_of = Counter(item for by_item in labels["choices"].values() for item in by_item)
    return {
        "items": len({row["item_id"] for row in rows}),
        "items_with_two": sum(judges >= 2 for judges in judges_of.values()),
        "clinicians": {clinician: _work_of(own) for clinician, own in sorted(words.items())},
        "fleiss_kappa": {name: _fleiss(given) for name, given in labels.items()},
        "cohen_kappa": [
            _cohen(labels, first, second) for first, second in itertools.combinations(sorted(words), 2)
        ],
    }


def _ticks(row: Row) -> dict[Hashable, Hashable]:
    return (
        {(row["item_id"], side): bool(row[f"good_{side}"]) for side in "ab"}
        if row["status"] == "judged"
        else {}
    )


def _choices(row: Row) -> dict[Hashable, Hashable]:
    return {} if row["status"] == "skipped" else {row["item_id"]: choice(row)}


def _labels(rows: Iterable[Row], subjects_of: Any) -> dict[str, dict[Hashable, Hashable]]:
    """clinician -> subject -> label."""
    given: dict[str, dict[Hashable, Hashable]] = defaultdict(dict)
    for row in rows:
        given[row["clinician"]] |= subjects_of(row)
    return given


def _fleiss(given: dict[str, dict[Hashable, Hashable]]) -> dict[str, Any]:
    subjects: dict[Hashable, Counter] = defaultdict(Counter)
    for by_subject in given.values():
        for subject, label in by_subject.items():
            subjects[subject][label] += 1
    return {
        "kappa": fleiss_kappa(subjects.values()),
        "subjects": sum(counts.total() >= 2 for counts in subjects.values()),
    }


def _cohen(labels: dict[str, dict[str, dict[Hashable, Hashable]]], first: str, second: str) -> dict[str, Any]:
    row: dict[str, Any] = {"first": first, "second": second}
    for name, given in labels.items():
        shared = sorted(given[first].keys() & given[second].keys())
        row[name] = cohen_kappa(
            [given[first][subject] for subject in shared], [given[second][subject] for subject in shared]
        )
    return {**row, "items": len(shared)}  # of the choices, which come last: a subject of theirs is an item


def _work_of(rows: list[Row]) -> dict[str, Any]:
    """Counts of one clinician; `seconds` is the median per item; `first_preferred` is the share of
    one-sided choices that went to the answer shown first: far from a half, the order decides.
    """
    statuses = Counter(row["status"] for row in rows)
    sided = [row for row in rows if choice(row) in ("a", "b")]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "judged": statuses["judged"],
        "skipped": statuses["skipped"],
        "not_answerable": statuses["not_answerable"],
        "edited": sum(
            any(row[name] is not None for name in ("edited_question", "edited_a", "edited_b")) for row in rows
        ),
        "seconds": median(seconds) if seconds else None,
        "first_preferred": sum(choice(row) == row["first_shown"] for row in sided) / len(sided)
        if sided
        else None,
        "simulated": any(row["simulated"] for row in rows),
    }
