"""results.json, metrics.jsonl, TensorBoard files and report.html of a clinician preference alignment."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from medray.config import ClinicianPreferenceConfig, RaterConfig
from medray.methods.clinician_preference.ground_truth import against_truth
from medray.methods.shared.data_report import account_of_run, not_used
from medray.methods.shared.results import (
    attributes_table,
    counts_table,
    form_table,
    metrics_of,
    recorded,
    text_table,
    timeline_of,
    write_metrics,
)
from medray.reporting import html_report
from medray.running.run import Run

Manifests = dict[str, dict[str, Any]]

_CURVES = {
    "loss": {"train": "loss", "held-out": "eval_loss"},
    "pairs ordered as judged": {
        "train": "accuracy",
        "held-out, clinicians'": "eval_alignment",
        "held-out, the rating VLM's": "eval_accuracy",
    },
    "learning rates": {part: f"lr_{part}" for part in ("llm", "projector", "vision", "encoder", "head")},
}
_QUALITY = ("pair_accuracy", "auc", "mean_rank", "map", "ties", "pairs")
_READING = (
    "Strict accuracy on held-out questions. selected: tuned on the dialogues that the rating model scores "
    "best; random: on as many dialogues drawn at random; all: on "
    "all of them; right: on as many whose answers are right by the true attributes. Brackets hold 95 % "
    "bootstrap intervals over images."
)
_RATER_READING = (
    "All numbers are of pairs about images that the rating model was not trained on. Alignment: share of the "
    "clinicians' pairs that it orders as they did; of the "
    "other pairs the share ordered as the rating VLM did. A pair of equal scores counts as half. The same "
    "pairs chose the epoch and, of several, the weight: "
    "with few of them the alignment is flattered."
)
_TRUTH_READING = (
    "What the true attributes of the images say of the generated answers. Only simulated clinicians judge by "
    "them; a caption made of attributes states some of them, and "
    "the rating model reads captions. AUC: chance that a right answer scores higher than a wrong one, on "
    "images that the rating model was not trained on; beside it "
    "the same of answers to what the caption does not state."
)


def write_report(
    run: Run,
    shared: Run,
    config: ClinicianPreferenceConfig,
    made: Manifests,
    raters: Manifests,
    chosen: str,
    kept: Manifests,
    scores: Manifests,
    win_rates: dict[str, Any],
) -> dict[str, Any]:
    """Gather what the stages recorded and write the run's reading matter.

    Args:
        made: manifests of the stages up to the scores, by what they made.
        raters: of the rating models by the end of their stages' names; `chosen` went on.
        kept: of the selection of each arm.
        scores: of the evaluations of the base and each arm.
        win_rates: win_rate.win_rate by "arm against other"; {} without a judge.

    Returns the results, as in results.json: `accuracy` and `scores` per model, `differences` {model: {other:
    paired difference}}, `win_rates`, `rater` (its weight and quality; of all in `weights`, with the
    `clinicians_share` of the loss), `clinicians`, `truth`, `mix` and `variety` {arm: ...}, `counts`,
    `ledgers`, `attempts`, `seconds`, `table` (text).
    """
    timeline = timeline_of(run, shared)
    by_model = {name: one["outputs"]["scores"] for name, one in scores.items()}
    results = {
        "accuracy": {name: found["overall"]["accuracy"] for name, found in by_model.items()},
        "scores": by_model,
        "differences": {name: one["outputs"]["differences"] for name, one in scores.items()},
        "win_rates": win_rates,
        "rater": {
            "weight": raters[chosen]["outputs"]["weight"],
            **raters[chosen]["outputs"]["quality"],
            "weights": [
                {
                    "weight": one["outputs"]["weight"],
                    "clinicians_share": clinicians_share(
                        one["outputs"]["counts"], one["outputs"]["weight"], config.rater
                    ),
                    **one["outputs"]["quality"],
                }
                for one in raters.values()
            ],
        },
        "clinicians": clinicians_of(config, made["clinicians"]),
        "truth": against_truth(config, made, kept),
        **{
            part: {arm: one["outputs"][part] for arm, one in kept.items() if part in one["outputs"]}
            for part in ("mix", "variety")
        },
        **recorded(timeline),
        "ledgers": {
            stage["stage"]: stage["outputs"]["ledger"] for stage in timeline if "ledger" in stage["outputs"]
        },
    }
    results["table"] = table(results)
    metrics = write_metrics(run, metrics_of(run, shared))
    run.write_json(results, "results.json")
    run.write_text(render(run, shared, config, results, made, metrics, timeline), "report.html")
    return results


def table(results: dict[str, Any]) -> str:
    """Accuracy of every model, then how the rating model does and whom it learned from."""
    lines = [text_table(results["scores"])] if results["scores"] else []
    said = {"clinicians'": "clinician", "the rating VLM's": "model"}
    shown = [
        f"{name} {html_report.with_interval(results['rater'][origin]['pair_accuracy'])}"
        for name, origin in said.items()
        if results["rater"].get(origin)
    ]
    lines.append(
        f"rating model, held-out pairs ordered as judged: {', '.join(shown) or 'no pair is held out'}"
    )
    lines.append(describe_clinicians(results["clinicians"]))
    if results["truth"]:
        shares = (
            f"{arm} {'none can be checked' if share is None else f'{share:.3f}'}"
            for arm, share in results["truth"]["right"].items()
        )
        lines.append(f"right answers in the dialogues: {', '.join(shares)}")
    return "\n".join(lines)


def clinicians_of(config: ClinicianPreferenceConfig, judged: dict[str, Any]) -> dict[str, Any]:
    """Who judged and what, as in results.json, of the manifest of their stage."""
    asked, found = config.clinicians, judged["outputs"]
    return {
        "kind": asked.kind,
        "error_rate": asked.error_rate if asked.kind == "simulated" else None,
        **found["counts"],
        "agreement": found["agreement"],
    }


def describe_clinicians(clinicians: dict[str, Any]) -> str:
    """Who judged, in one line: how many, simulated or not, and what came of it."""
    people = [one["simulated"] for one in clinicians["agreement"]["clinicians"].values()]
    error_rate = "" if clinicians["error_rate"] is None else f", error rate {clinicians['error_rate']:g}"
    kinds = ((people.count(True), f"simulated clinicians{error_rate}"), (people.count(False), "clinicians"))
    named = " and ".join(f"{number} {kind}" for number, kind in kinds if number) or "no clinicians"
    return f"{named}: {clinicians['judgements']} judgements, {clinicians.get('pairs', 0)} preference pairs"


def render(
    run: Run,
    shared: Run,
    config: ClinicianPreferenceConfig,
    results: dict[str, Any],
    made: Manifests,
    metrics: dict[str, list[dict]],
    timeline: list[dict[str, Any]],
) -> str:
    """The HTML page."""
    sections = [
        ("Before and after", _accuracy(results)),
        ("Clinicians", _clinicians(results["clinicians"])),
        ("Images drawn for the clinicians", _drawn(shared, made)),
        ("What the clinicians were shown", _judged_gallery(made)),
        ("The rating model", _rater(results["rater"])),
        ("Against the true attributes", _truth(results["truth"])),
        (
            "Selection: modalities and variety before and after",
            _mix(results["mix"]) + _variety(results["variety"]),
        ),
        ("Best and worst of some scored answers", _scored_gallery(made)),
        ("By attribute", attributes_table(results["scores"]) if results["scores"] else ""),
        ("Answers: length and form", form_table(results["scores"]) if results["scores"] else ""),
        ("Training", html_report.training_curves(metrics, _CURVES)),
        ("Rows: kept, dropped, quarantined, retried", counts_table(results)),
        *not_used(account_of_run(timeline)),
        ("Time", html_report.timeline(timeline)),
        ("Configuration", html_report.config_section(config.model_dump(mode="json"))),
    ]
    return html_report.page(
        "Clinician preference alignment report",
        sections,
        f"{config.model.path} on {config.data.source}; {describe_clinicians(results['clinicians'])}; run "
        f"{run.uri}",
    )


def _accuracy(results: dict[str, Any]) -> str:
    by_model = results["scores"]
    if not by_model:
        return '<p class="soft">No model was tuned (evaluate.arms is empty).</p>'
    kinds = sorted({kind for found in by_model.values() for kind in found["by_type"]})
    rows = [
        [
            name,
            found["overall"]["accuracy"],
            *(found["by_type"].get(kind, {}).get("accuracy") for kind in kinds),
            found["overall"]["n"],
            found["overall"]["images"],
        ]
        for name, found in by_model.items()
    ]
    plot = html_report.arms_plot(results["accuracy"], "strict accuracy, 95 % interval over images")
    gains = [
        [name, other, difference]
        for name, others in results["differences"].items()
        for other, difference in others.items()
    ]
    return (
        f'<p class="soft">{_READING}</p>'
        + html_report.table(["model", "all", *kinds, "questions", "images"], rows)
        + f'<div class="plots">{plot}</div>'
        + html_report.table(["model", "minus", "paired difference"], gains)
        + _win_rates(results["win_rates"])
    )


def _win_rates(win_rates: dict[str, Any]) -> str:
    rows = [
        [name, *(found[column] for column in ("win_rate", "win", "tie", "loss", "n"))]
        for name, found in win_rates.items()
    ]
    return (
        html_report.table(["open questions", "win rate", "win", "tie", "loss", "questions"], rows)
        if rows
        else ""
    )


def _clinicians(clinicians: dict[str, Any]) -> str:
    note = f'<p class="soft"><b>{html.escape(describe_clinicians(clinicians))}.</b></p>'
    agreement = clinicians["agreement"]
    people = [
        [
            name,
            *(
                found[column]
                for column in ("judged", "skipped", "not_answerable", "edited", "seconds", "first_preferred")
            ),
        ]
        for name, found in agreement["clinicians"].items()
    ]
    kappas = [
        ["Fleiss, all", found["subjects"], what, found["kappa"]]
        for what, found in agreement["fleiss_kappa"].items()
    ]
    kappas += [
        [f"Cohen, {pair['first']} and {pair['second']}", pair["items"], what, pair[what]]
        for pair in agreement["cohen_kappa"]
        for what in ("ticks", "choices")
    ]
    return (
        note
        + html_report.table(
            [
                "clinician",
                "judged",
                "skipped",
                "not answerable",
                "edited",
                "median seconds",
                "chose the first shown",
            ],
            people,
        )
        + html_report.table(["kappa", "judged by both", "of", "value"], kappas)
    )


def _drawn(shared: Run, made: Manifests) -> str:
    outputs = made["drawn"]["outputs"]
    spread = [[modality, found["images"], found["clusters"]] for modality, found in outputs["spread"].items()]
    return html_report.table(["modality", "images", "clusters they are of"], spread) + (
        "<div "
        f'class="plots">{shared.read_text(outputs["picture"].removeprefix(shared.uri).lstrip("/"))}</div>'
    )


def clinicians_share(counts: Mapping[str, int], weight: float, config: RaterConfig) -> float:
    """What the clinicians' training pairs weigh together, of all that is trained on: w means little without
    the numbers of pairs.

    Args:
        counts: of medray.rating_model.pairs.pair_counts.
        config: says which pairs are trained on.
    """
    from medray.rating_model.pairs import trains_on

    clinicians = weight * counts["train, clinician"] * trains_on("clinician", config)
    models = counts["train, model"] * trains_on("model", config)
    return clinicians / (clinicians + models) if clinicians + models else 0.0


def _rater(rater: dict[str, Any]) -> str:
    from medray.rating_model.metrics import calibration_plot

    rows = [
        [
            f"{one['weight']:g}",
            f"{one['clinicians_share']:.0%}",
            "clinicians'" if origin == "clinician" else "the rating VLM's",
            *(one[origin].get(name) for name in _QUALITY),
        ]
        for one in rater["weights"]
        for origin in ("clinician", "model")
        if one.get(origin)
    ]
    calibration = {
        origin: rater[origin]["calibration"] for origin in ("clinician", "model") if rater.get(origin)
    }
    head = [
        "w",
        "clinicians' share of the loss",
        "held-out pairs",
        "ordered as judged (alignment)",
        "AUC",
        "mean rank",
        "MAP",
        "ties",
        "pairs",
    ]
    return (
        f'<p class="soft">{_RATER_READING} The model of w {rater["weight"]:g} went on.</p>'
        + html_report.table(head, rows)
        + f'<div class="plots">{calibration_plot(calibration) if calibration else ""}</div>'
    )


def _truth(truth: dict[str, Any]) -> str:
    if not truth:
        return ""
    shares = html_report.table(["dialogues", "right answers"], truth["right"].items())
    by_scores = [
        [name, found, truth["auc, not in the caption"][name]] for name, found in truth["auc"].items()
    ]
    return (
        f'<p class="soft">{_TRUTH_READING}</p>'
        + shares
        + html_report.table(["scores of", "AUC, right against wrong", "not in the caption"], by_scores)
    )


def _mix(mix: dict[str, Any]) -> str:
    rows = [
        [arm, modality, *found.values()]
        for arm, by_modality in mix.items()
        for modality, found in by_modality.items()
    ]
    heads = next((list(found) for by_modality in mix.values() for found in by_modality.values()), [])
    return html_report.table(["dialogues", "modality", *heads], rows) if rows else ""


def _variety(variety: dict[str, Any]) -> str:
    rows = [[arm, *(f"{found[when]:.0f}" for when in ("before", "kept"))] for arm, found in variety.items()]
    note = (
        "Effective number of different exchanges (e to the entropy of question and answer). A selection "
        "far below the random one of its size prefers easy questions and common answers: select.relative_to."
    )
    return (
        f'<p class="soft">{note}</p>' + html_report.table(["dialogues", "before", "kept"], rows)
        if rows
        else ""
    )


def _card(image: bytes | None, head: str, lines: list[tuple[str, str]], below: str = "") -> str:
    """A picture with a text beside it; lines are (class, text)."""
    texts = "".join(f'<div class="{kind}">{html.escape(text)}</div>' for kind, text in lines)
    picture = html_report.image_tag(image) if image else "<div></div>"
    return (
        f'<div class="card">{picture}<div><b '
        f'style="white-space:pre-line">{html.escape(head)}</b>{texts}<div '
        f'class="tag">{html.escape(below)}</div></div></div>'
    )


def _judged_gallery(made: Manifests, most: int = 8) -> str:
    """The first items and what was said of them."""
    from medray.clinicians.judgements import judged
    from medray.storage.shards import stored_rows

    said: dict[str, list[dict[str, Any]]] = {}
    for row in judged(stored_rows(made["clinicians"]["outputs"]["judgements"])):
        said.setdefault(row["item_id"], []).append(row)
    cards = []
    for item in itertools.islice(
        (item for item in stored_rows(made["items"]["outputs"]["items"]) if item["item_id"] in said), most
    ):
        lines = [_ticks(item, side, said[item["item_id"]]) for side in "ab"]
        statuses = [
            f"{row['clinician']}: {row['status']}"
            for row in said[item["item_id"]]
            if row["status"] != "judged"
        ]
        cards.append(
            _card(
                item["image"],
                item["question"],
                lines,
                "; ".join([*([item["caption"]] if item["caption"] else []), *statuses]),
            )
        )
    return "".join(cards)


def _ticks(item: dict[str, Any], side: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
    judged = [row for row in rows if row["status"] == "judged"]
    if not judged:
        return "soft", item[f"answer_{side}"]
    good = sum(row[f"good_{side}"] for row in judged)
    return "good" if 2 * good > len(
        judged
    ) else "bad", f"{item[f'answer_{side}']}  (good: {good} of {len(judged)})"


def _scored_gallery(made: Manifests, most: int = 5) -> str:
    """The highest and the lowest of some scored answers; of one image one only."""
    rows = {row["image_id"]: row for row in _first_scored(made["scored"]["outputs"]["rows"])}
    ranked = sorted(rows.values(), key=lambda row: -row["score"])
    shown = [(row, "good") for row in ranked[:most]] + [
        (row, "bad") for row in ranked[max(most, len(ranked) - most) :]
    ]
    return "".join(
        _card(
            row["image"],
            row["question"],
            [(kind, f"{row['answer']}  ({row['score']:.2f})")],
            row["context"] or "",
        )
        for row, kind in shown
    )


def _first_scored(uri: str, rows: int = 400) -> Iterator[dict[str, Any]]:
    from medray.storage.shards import stored_rows

    return (row for row in itertools.islice(stored_rows(uri), rows) if row["score"] is not None)
