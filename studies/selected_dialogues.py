"""What the arms of clinician_preference_arms.py keep, by the true attributes: why right answers alone make no
good selection.

Of the dialogues that each finished run was tuned on, as they lie in --runs:

    right       % of the answers that can be checked and are right
    attributes  effective number of attributes asked about (e to the entropy); `values`, of attributes with
    the image's true value hard        % wrong among all written answers to questions of the same attribute
    and true value, on average over what is kept unsure      points, of ten, that the rating VLM's mean score
    of the right answers that are kept lacks; `like`, the same of all right answers that say
                the same of the same attribute and true value: where unsure is below like, the plainer images
                were kept
    images      how many images the kept exchanges are about

Prints a Markdown table (means over seeds) and one JSON line last. A selection like the random one but for
`right` has thrown away wrong answers only; one that is less hard and less unsure has thrown away what there
was to learn.

    python -m studies.selected_dialogues --runs runs/arms-cells
    python -m studies.selected_dialogues --runs runs/arms-cells --arms 'random, 10 %' 'mixture, 10 %' 'right,
    10 %' --seeds 1 2
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np

from medray.clinicians.simulated import is_right
from medray.data.attribute_questions import asked_attribute
from medray.data.exchanges import rounds_of
from medray.methods.clinician_preference.ground_truth import true_attributes
from medray.methods.clinician_preference.rate_prompt import HIGHEST
from medray.methods.clinician_preference.select_dialogues import effective_number
from medray.storage.shards import stored_rows
from studies.clinician_preference import ARMS
from studies.study import folder_of

Exchange = tuple[str, str, str]  # image id, question, answer
Attributes = dict[str, dict[str, str]]
Seen = dict[Exchange, float | None]  # every exchange that was written, with its score by the rating VLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", required=True, help="the study's folder")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[arm for arm in ARMS if " %" in arm],
        choices=list(ARMS),
        metavar="ARM",
        help="default: all that select",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    stages = Path(options.runs, "shared", "stages")
    attributes: Attributes = {}
    for data in stages.glob("00-data-*"):
        attributes |= true_attributes(str(data / "captioned"))
    written = [rated_in(folder) for folder in sorted(stages.glob("06-rate-*"))]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for arm in options.arms:
        for seed in options.seeds:
            for kept in folder_of(arm, seed, options).glob("stages/10-select-*/rows"):
                exchanges = list(exchanges_of(kept))
                # those it was selected from
                seen = max(written, key=lambda one: sum(exchange in one for exchange in exchanges))
                found.setdefault(arm, {})[seed] = measures(exchanges, seen, attributes)
    columns = list(next(iter(next(iter(found.values())).values()))) if found else []
    print("\n".join(["| arm | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]))
    for arm, by_seed in found.items():
        print(
            f"| {arm} | {' '.join(map(str, sorted(by_seed)))} | "
            + " | ".join(f"{mean(one[column] for one in by_seed.values()):.3g}" for column in columns)
            + " |"
        )
    print(json.dumps(found))


def rated_in(folder: Path) -> Seen:
    rows = stored_rows(str(folder / "rows"), ["image_id", "question", "answer", "score"])
    return {(row["image_id"], row["question"], row["answer"]): row["score"] for row in rows}


def exchanges_of(kept: Path) -> Iterator[Exchange]:
    for row in stored_rows(str(kept), ["image_id", "turns"]):
        for question, answer in rounds_of(row["turns"]):
            yield row["image_id"], question, answer


def measures(kept: list[Exchange], written: Seen, attributes: Attributes) -> dict[str, float]:
    right = {exchange: is_right(*exchange[1:], attributes[exchange[0]]) for exchange in written}
    wrong: dict[tuple[str, str] | None, list[bool]] = {}
    for exchange in written:
        if right[exchange] is not None:
            wrong.setdefault(subject(exchange, attributes), []).append(not right[exchange])
    subjects = Counter(subject(exchange, attributes) for exchange in kept if right[exchange] is not None)
    names = Counter(asked_attribute(exchange[1]) for exchange in kept if right[exchange] is not None)
    scores: dict[tuple[object, str], list[float]] = {}
    for exchange, score in written.items():
        if right[exchange] and score is not None:
            scores.setdefault((subject(exchange, attributes), exchange[2]), []).append(score)
    rated = [exchange for exchange in kept if right[exchange] and written[exchange] is not None]
    return {
        "right": 100 * mean(right[exchange] for exchange in kept if right[exchange] is not None),
        "attributes": effective(names),
        "values": effective(subjects),
        "hard": 100
        * sum(number * mean(wrong[asked]) for asked, number in subjects.items())
        / subjects.total(),
        "unsure": HIGHEST - mean(written[exchange] for exchange in rated),
        "like": HIGHEST
        - mean(mean(scores[subject(exchange, attributes), exchange[2]]) for exchange in rated),
        "images": len({image for image, *_ in kept}),
    }


def subject(exchange: Exchange, attributes: Attributes) -> tuple[str, str] | None:
    """The attribute that is asked about, and its true value."""
    image, question, _ = exchange
    name = asked_attribute(question)
    return None if name is None else (name, attributes[image][name])


def effective(counts: Counter) -> float:
    return effective_number(np.array(list(counts.values())))


if __name__ == "__main__":
    main()
