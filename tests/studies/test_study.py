"""The studies' scripts: their arms are valid configurations in folders of their own, and the tables are
those of the runs.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

from medray.config import load_config
from tests.clinicians.test_simulated import RECORD

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def studies(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from studies import clinician_preference as clinician_preference_arms
    from studies import instruction_free as instruction_free_arms

    yield {"clinician": clinician_preference_arms.STUDY, "instruction_free": instruction_free_arms.STUDY}
    for name in (
        "arms",
        "clinician_preference_arms",
        "instruction_free_arms",
        "selected_dialogues",
        "self_training",
    ):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["clinician", "instruction_free"])
def test_arms_load_and_do_not_share_a_folder(studies, name):
    from studies import study as arms

    study = studies[name]
    for arm, overrides in study.arms.items():
        load_config(study.config_type, study.config, overrides)
        assert study.against(arm) is None or study.against(arm) in study.arms
    folders = {
        arms.folder_of(arm, seed, argparse.Namespace(runs="r")) for arm in study.arms for seed in (0, 1)
    }
    assert len(folders) == 2 * len(study.arms)
    assert not any(" " in str(folder) or "," in str(folder) for folder in folders)
    for ones, others in study.contrasts.values():
        assert ones and others and {*ones, *others} <= set(study.arms) and not set(ones) & set(others)


def test_contrasts_are_of_seeds_for_which_all_arms_are_there(studies):
    from studies import study as arms

    study = studies["instruction_free"]
    rest = dict.fromkeys(study.columns)
    ends = {
        mode: (10 * number, 10 * number + 4)
        for number, mode in enumerate(("textbook", "released", "frozen", "free"))
    }
    found = {
        f"proxy-{mode}{suffix}": {seed: rest | {"strict": value + seed} for seed in (0, 1)}
        for mode, values in ends.items()
        for suffix, value in zip(("", "+shuffled"), values, strict=True)
    }
    del found["proxy-free"][1]
    made = arms.contrasted(study, found)
    assert {
        name: {seed: values["strict"] for seed, values in seeds.items()} for name, seeds in made.items()
    } == {
        "shuffling, proxies": {0: 4},
        "momentum (textbook) minus none": {0: -30},
        "momentum (released) minus none": {0: -20},
        "momentum (textbook) minus frozen": {0: -20, 1: -20},
        "momentum (released) minus frozen": {0: -10, 1: -10},
    }
    assert made["shuffling, proxies"][0]["leakage"] is None


def score(value):
    return {"value": value, "low": value, "high": value}


def clinician_results(base, **arms):
    """results.json of a run with these accuracies."""

    def scores(value):
        return {
            "overall": {"accuracy": score(value), "chance": 0.3, "majority": 0.6},
            "by_type": {"open": {"accuracy": score(value / 2)}},
        }

    rater = {"weight": 100.0, "clinician": {"pair_accuracy": score(0.8)}, "model": None}
    return {
        "scores": {"base": scores(base), **{name: scores(value) for name, value in arms.items()}}
        if arms
        else {},
        "win_rates": {},
        "rater": rater,
        "truth": {
            "right": {"written": 0.7, "selected": 0.9},
            "auc": {"rating model": 0.75},
            "auc, not in the caption": {"rating model": None},
        },
        "variety": {arm: {"before": 90.0, "kept": 30.0} for arm in arms},
        "counts": {f"10-select-{arm}": {"exchanges kept": 60} for arm in arms},
    }


def test_tables_of_recorded_runs(studies, tmp_path):
    from studies import study as arms

    made = {
        ("random, 10 %", 0): clinician_results(0.2, random=0.5),
        ("mixture, 10 %", 0): clinician_results(0.2, selected=0.6),
        ("random, 10 %", 1): clinician_results(0.2, random=0.4),
        ("mixture, 10 %", 1): clinician_results(0.2, selected=0.6),
        ("w 100", 0): clinician_results(0.2),
    }

    def method(config, run, shared):  # the method itself has tests of its own
        folder = Path(run)
        folder.mkdir(exist_ok=True)
        jobs.append(config)
        (folder / "results.json").write_text(
            json.dumps(
                next(
                    results
                    for (arm, seed), results in made.items()
                    if arms.folder_of(arm, seed, options) == folder
                )
            )
        )

    study = dataclasses.replace(studies["clinician"], method=method)
    options = argparse.Namespace(
        runs=str(tmp_path),
        record=None,
        data=None,
        arms=list(study.arms),
        seeds=[0, 1, 2],
        overrides=["tune.epochs=1"],
        config=str(study.config),
    )
    jobs = []
    for _ in range(2):  # the second time all is in the record
        for arm, seed in made:
            arms.run(study, arm, seed, options)
    assert [(config.seed, config.tune.epochs) for config in jobs] == [(seed, 1) for _, seed in made]
    # where it runs makes no other run of it
    options.overrides = ["tune.epochs=1", "tune.place.labels={medray-group: train}"]
    arms.run(study, "w 100", 0, options)
    assert len(jobs) == len(made)
    options.overrides = ["tune.epochs=2"]  # of another configuration it is another run
    arms.run(study, "w 100", 0, options)
    assert len(jobs) == len(made) + 1
    found = arms.by_arm(options)
    assert list(found) == ["zero-shot", "random, 10 %", "mixture, 10 %", "w 100"]
    assert (
        found["mixture, 10 %"][1]["all"],
        found["mixture, 10 %"][1]["open"],
        found["mixture, 10 %"][1]["right"],
    ) == (60, 30, 90)
    assert (
        found["mixture, 10 %"][0]["alignment"],
        found["mixture, 10 %"][0]["truth"],
        found["random, 10 %"][0]["alignment"],
    ) == (80, 75, None)
    assert (found["mixture, 10 %"][0]["variety"], found["zero-shot"][0]["variety"]) == (50, None)
    assert (found["w 100"][0]["alignment"], found["w 100"][0]["truth"], found["w 100"][0]["all"]) == (
        80,
        75,
        None,
    )
    differences = arms.differences(study, found)
    assert {
        seed: round(values["all"], 6)
        for seed, values in differences["mixture, 10 % minus random, 10 %"].items()
    } == {0: 10, 1: 20}
    text = arms.write(study, options)
    assert "| mixture, 10 % | 2 | 60.0 ± 0.0 |" in text
    assert "| zero-shot |  | 20.0 | 10.0 |" in text
    assert "Floors: chance 30.0, majority 60.0." in text
    assert (tmp_path / "report.html").read_text().count("<svg") >= 4


def test_what_is_kept_is_described_by_the_truth(studies):
    """Of four images three are small and one big; the big one, where the writer is wrong half the time
    and unsure, is left out by the score.
    """
    from studies import selected_dialogues

    attributes = {
        f"image-{number}": RECORD | {"cell_size": "big" if number == 3 else "small"} for number in range(4)
    }
    asked = "What is the cell size?"
    written = {(f"image-{number}", asked, "small"): 9.0 + number / 4 for number in range(3)} | {
        ("image-3", asked, "big"): 6.0,
        ("image-3", asked, "small"): 8.0,
        ("image-0", "What is the mood?", "good"): None,
    }
    every = selected_dialogues.measures(list(written), written, attributes)
    assert every == pytest.approx(
        {
            "right": 80.0,
            "attributes": 1.0,
            "values": math.exp(-0.6 * math.log(0.6) - 0.4 * math.log(0.4)),
            "hard": 20.0,
            "unsure": 1.5625,
            "like": 1.5625,
            "images": 4,
        }
    )
    best = selected_dialogues.measures(
        [("image-1", asked, "small"), ("image-2", asked, "small")], written, attributes
    )
    assert best == pytest.approx(
        {
            "right": 100.0,
            "attributes": 1.0,
            "values": 1.0,
            "hard": 0.0,
            "unsure": 0.625,
            "like": 0.75,
            "images": 2,
        }
    )
