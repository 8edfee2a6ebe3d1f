"""The arms of docs/results/clinician_preference.md: runs the jobs, prints the tables.

Every arm is what one `jobs/clinician_preference.py` command per seed does, printed before it runs, in a run
directory of its own under --runs. What arms have in common (data, dialogues, judgements, ratings, the rating
models, the base model's answers) is made once per seed, in --runs/shared. The same command of this script
continues where it was stopped, and does nothing where all is done; what is done stands in a record, with
which it continues on another machine too (--record).

    nohup python -m studies.clinician_preference --runs runs/arms-cells > runs/arms.log 2>&1 &
    python -m studies.clinician_preference --data WBCATT --runs runs/arms-wbcatt --arms 'random, 40 %'
    'mixture, 40 %' --seeds 0 python -m studies.clinician_preference --runs runs/arms-cells --finished     #
    the tables of what is finished

Arms: dialogues at random, or selected by a rating model that learned from the rating VLM alone, the
clinicians alone, or both (the mixture), at 10, 40 and 80 %; all dialogues; the mixture with other weights w
of the clinicians' pairs (rating models only, nothing is tuned); both ways without demonstrations; answers
that are right by the true attributes, the most that a selection by correctness can gain; and the mixture's
scores relative to those of the same question and answer (select.relative_to, an extension). Without --data
the arms are run on the synthetic cells. The clinicians are simulated from true attributes:
`clinicians.error_rate` is the share of their ticks that are wrong.

Columns: strict accuracy on held-out questions, whole and by kind; `win rate`, against the base model (with
--set judge=...); `right`, the share of right answers in the dialogues tuned on, and their `variety`:
effectively different exchanges per exchange; of the rating model `alignment` with held-out pairs of the
clinicians, `pairs`, those of the rating VLM, `truth`, its AUC of right against wrong answers about images it
was not trained on, and `untold`, the same of answers to what the caption does not state. Writes table.md and
report.html (plots) into --runs, prints the Markdown tables (mean over seeds, 95 % t-interval over seeds) and
one JSON line last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from medray.config import ClinicianPreferenceConfig
from medray.methods.clinician_preference.pipeline import clinician_preference
from studies.study import Measures, Study, main, per_cent

SHARES = (10, 40, 80)
W_GRID = (1, 10, 100, 200, 300, 400)
BARE = "without demonstrations"
RELATIVE = "relative"


def _arms() -> Iterator[tuple[str, list[str]]]:
    for share in SHARES:
        kept = [f"select.fraction={share / 100}"]
        yield f"random, {share} %", ["evaluate.arms=[random]", *kept]
        for learned_from in ("model", "clinician", "mixture"):
            yield (
                f"{learned_from}, {share} %",
                ["evaluate.arms=[selected]", f"rater.train_on={learned_from}", *kept],
            )
    yield "all", ["evaluate.arms=[all]"]
    for weight in W_GRID:
        yield f"w {weight}", ["evaluate.arms=[]", f"rater.clinician_weight={weight}"]
    yield (
        f"random, 40 %, {BARE}",
        ["evaluate.arms=[random]", "select.fraction=0.4", "with_demonstrations=false"],
    )
    yield (
        f"mixture, 40 %, {BARE}",
        ["evaluate.arms=[selected]", "select.fraction=0.4", "with_demonstrations=false"],
    )
    for share in SHARES[:2]:
        yield f"right, {share} %", ["evaluate.arms=[right]", f"select.fraction={share / 100}"]
    for share in SHARES[:2]:
        yield (
            f"mixture, {share} %, {RELATIVE}",
            ["evaluate.arms=[selected]", "select.relative_to=exchange", f"select.fraction={share / 100}"],
        )


ARMS = dict(_arms())
"""Overrides of the configuration by arm."""


def _at(shares: Iterable[int], name: str, end: str = "") -> list[str]:
    return [f"{name}, {share} %{end}" for share in shares]


_TWO = {"all shares": SHARES, "10 and 40 %": SHARES[:2]}
CONTRASTS = (
    {
        f"{one} minus {other}, {named}": (_at(shares, one), _at(shares, other))
        for one, other in (
            ("mixture", "random"),
            ("model", "random"),
            ("clinician", "random"),
            ("mixture", "model"),
            ("mixture", "clinician"),
        )
        for named, shares in _TWO.items()
    }
    | {
        "with demonstrations minus without": (
            ["random, 40 %", "mixture, 40 %"],
            [f"random, 40 %, {BARE}", f"mixture, 40 %, {BARE}"],
        )
    }
    | {
        f"{one} minus {other}, 10 and 40 %": (_at(SHARES[:2], one), _at(SHARES[:2], other))
        for one, other in (("right", "random"), ("mixture", "right"))
    }
    | {
        f"mixture, relative, minus {other}, 10 and 40 %": (
            _at(SHARES[:2], "mixture", f", {RELATIVE}"),
            _at(SHARES[:2], other),
        )
        for other in ("random", "mixture")
    }
)
"""The claims of the paper, as means of arms minus means of others."""

COLUMNS = (
    "all",
    "open",
    "closed",
    "mcq",
    "win rate",
    "right",
    "variety",
    "alignment",
    "pairs",
    "truth",
    "untold",
)


def against(arm: str) -> str | None:
    """Random dialogues of the same size; an arm without demonstrations, the same with them."""
    if arm.endswith(BARE):
        return arm.removesuffix(f", {BARE}")
    share = arm.removesuffix(f", {RELATIVE}").partition(", ")[2]
    return f"random, {share}" if share and not arm.startswith("random") else None


def measures(results: dict[str, Any], model: str | None, rater: dict[str, Any] | None) -> Measures:
    """The numbers of one model and one rating model of a run; of either there may be none."""
    scores = results["scores"].get(model or "", {"overall": {}, "by_type": {}})
    truth = results["truth"] or {"right": {}, "auc": {}, "auc, not in the caption": {}}
    auc = {"truth": truth["auc"], "untold": truth["auc, not in the caption"]}
    found = {
        "all": scores["overall"].get("accuracy"),
        **{kind: scores["by_type"].get(kind, {}).get("accuracy") for kind in ("open", "closed", "mcq")},
        "win rate": results["win_rates"].get(f"{model} against base", {}).get("win_rate"),
        "right": truth["right"].get("written" if model == "all" else model or ""),
        "alignment": None,
        "pairs": None,
        **{name: found.get("rating model") if rater else None for name, found in auc.items()},
    }
    variety = results["variety"].get(model or "")
    found["variety"] = variety and variety["kept"] / results["counts"][f"10-select-{model}"]["exchanges kept"]
    for name, origin in (("alignment", "clinician"), ("pairs", "model")):
        if rater and rater.get(origin):
            found[name] = rater[origin]["pair_accuracy"]
    return per_cent(found, COLUMNS)


def tuned(results: dict[str, Any]) -> Measures:
    """Of the arm's model; or, where nothing is tuned, of its rating model."""
    model = next((name for name in results["scores"] if name != "base"), None)
    return measures(results, model, results["rater"] if model in ("selected", None) else None)


def base(results: dict[str, Any]) -> Measures | None:
    return measures(results, "base", None) if "base" in results["scores"] else None


def floors(results: dict[str, Any]) -> dict[str, float | None]:
    overall = results["scores"].get("base", {}).get("overall", {})
    return {name: overall.get(name) for name in ("chance", "majority")}


STUDY = Study(
    job="clinician_preference",
    method=clinician_preference,
    config_type=ClinicianPreferenceConfig,
    title="Clinician preference alignment",
    arms=ARMS,
    against=against,
    columns=COLUMNS,
    base=base,
    tuned=tuned,
    floors=floors,
    contrasts=CONTRASTS,
)

if __name__ == "__main__":
    main(STUDY, "clinician_preference_arms", __doc__)
