import json
import math
import random

import pyarrow as pa
import pyarrow.parquet
import pytest

from medray.config import EvaluateConfig
from medray.errors import DataError, StageError
from medray.evaluation.prediction_files import answers
from medray.evaluation.scores import compare, compare_models, not_scored, rescore, score, score_models
from medray.records import PREDICTION


def row(number, image, kind, reference, answer, attribute="size", choices=None, **more):
    return {
        "sample_id": f"q{number}",
        "image_id": image,
        "question": "?",
        "reference": reference,
        "answer": answer,
        "answer_type": kind,
        "attribute": attribute,
        "choices": choices or [],
        "model": "m",
        "finish_reason": "stop",
        "tokens": 3,
        "error": None,
        **more,
    }


def write(folder, rows):
    folder.mkdir()
    half = len(rows) // 2
    for name, part in (("a", rows[:half]), ("b", rows[half:])):
        pa.parquet.write_table(pa.Table.from_pylist(part, schema=PREDICTION), folder / f"{name}.parquet")
    return str(folder)


ROWS = [
    row(0, "i0", "open", "big", "Big."),
    row(1, "i0", "open", "lung mass", "lung lung lung lung heart", "place"),
    row(2, "i0", "closed", "no", "I do not know"),
    row(3, "i1", "closed", "yes", "yes"),
    row(4, "i1", "mcq", "B", "The correct answer is B", choices=["x", "y"]),
    row(5, "i1", "mcq", "A", "x", choices=["x", "y"], finish_reason="length"),
    row(6, "i2", "open", "big", None, error="no image"),
]
CONFIG = EvaluateConfig(bootstrap=200)


def test_results_by_type_and_attribute(tmp_path):
    result = score(write(tmp_path / "p", ROWS), CONFIG)
    assert (result["schema"], result["model"], result["errors"]) == (1, "m", 1)
    whole = result["overall"]
    assert (whole["n"], whole["images"], whole["errors"]) == (6, 2, 1)
    assert whole["accuracy"]["value"] == pytest.approx(3 / 6)
    assert whole["accuracy"]["low"] <= 0.5 <= whole["accuracy"]["high"]
    assert whole["truncated"] == pytest.approx(1 / 6) and whole["answer_words"] == pytest.approx(
        (1 + 5 + 4 + 1 + 5 + 1) / 6
    )
    assert whole["answer_tokens"] == 3 and whole["chance"] == pytest.approx((0 + 0 + 1 / 2 * 4) / 6)

    types = result["by_type"]
    assert types["open"]["legacy"]["recall"]["value"] == pytest.approx((1 + 0.8) / 2)
    assert types["open"]["strict"]["recall"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert types["open"]["set_recall"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert types["open"]["legacy"]["exact_match"]["value"] == pytest.approx((1 + 1 / 5) / 2)
    assert (
        types["open"]["strict"]["exact_match"] == types["open"]["accuracy"]
        and types["open"]["accuracy"]["value"] == 0.5
    )
    assert len(types["open"]["bleu"]) == 4 and types["open"]["errors"] == 1
    assert (
        types["closed"]["legacy"]["value"] == 1.0
        and types["closed"]["accuracy"]["value"] == 0.5
        and types["closed"]["unparsable"] == 0.5
    )
    assert (
        types["closed"]["strict"] == types["closed"]["accuracy"] and types["closed"]["legacy_left_out"] == 0.0
    )
    assert (
        types["mcq"]["accuracy"]["value"] == 0.5
        and types["mcq"]["unparsable"] == 0.5
        and types["mcq"]["chance"] == 0.5
    )
    assert "likelihood" not in types["mcq"]
    assert set(result["by_attribute"]) == {"place", "size"}
    assert result["by_attribute"]["size"]["by_type"] == {"open": 1.0, "closed": 0.5, "mcq": 0.5}
    assert result["by_attribute"]["place"]["types"]["open"]["legacy"]["recall"]["value"] == pytest.approx(0.8)
    assert result["by_modality"] == result["by_language"] == result["by_benchmark"] == {}


def test_published_mean_of_closed_questions(tmp_path):
    rows = [
        row(number, f"i{number}", "closed", "no", answer)
        for number, answer in enumerate(["no", "yes", "left", "yes", "no"])
    ]
    closed = score(write(tmp_path / "p", rows), CONFIG)["by_type"]["closed"]
    assert closed["legacy"]["value"] == pytest.approx(2 / 5)
    assert closed["legacy_published"]["value"] == pytest.approx(2 / 3) and closed[
        "legacy_left_out"
    ] == pytest.approx(2 / 5)
    wrong = score(write(tmp_path / "w", [rows[1]]), CONFIG)["by_type"]["closed"]
    assert wrong["legacy_published"] is None and wrong["legacy_left_out"] == 1.0


def test_groups_by_modality_and_language(tmp_path):
    rows = [
        row(0, "i0", "open", "lung", "lung", modality="ct", language="en"),
        row(1, "i1", "open", "lung", "heart", modality="mri", language="en"),
        row(2, "i2", "open", "左肺", "右肺", modality="ct", language="zh"),
        row(3, "i3", "open", "lung", None, modality="mri", language="en", error="no image"),
        row(4, "i4", "open", "lung", "lung", language="en"),
    ]
    result = score(write(tmp_path / "p", rows), CONFIG)
    assert {
        name: (group["n"], group["errors"], group["accuracy"]["value"])
        for name, group in result["by_modality"].items()
    } == {
        "ct": (2, 0, 0.5),
        "mri": (1, 1, 0.0),
        "unknown": (1, 0, 1.0),
    }
    chinese = result["by_language"]["zh"]
    assert (
        chinese["types"]["open"]["strict"]["recall"]["value"] == pytest.approx(1 / 2)
        and chinese["answer_words"] == 2
    )


def test_floors(tmp_path):
    rows = [
        # always "big": 2 of 3 sizes; always "yes": 1 of 2
        row(0, "i0", "open", "big", "x"),
        row(1, "i1", "open", "Big.", "x"),
        row(2, "i2", "open", "small", "x"),
        row(3, "i0", "closed", "yes", "yes"),
        row(4, "i1", "closed", "no", "yes"),
        # always the option "round" is right twice of three times, always "A" once
        row(5, "i0", "mcq", "A", "A", "shape", ["round", "oval"]),
        row(6, "i1", "mcq", "B", "A", "shape", ["oval", "Round"]),
        row(7, "i2", "mcq", "C", "A", "shape", ["a", "b", "oval"]),
    ]
    result = score(write(tmp_path / "p", rows), CONFIG)
    assert result["by_type"]["open"]["majority"] == pytest.approx(2 / 3)
    assert result["by_attribute"]["size"]["majority"] == pytest.approx((2 + 1) / 5)
    assert result["by_attribute"]["shape"]["majority"] == pytest.approx(2 / 3)
    assert result["by_type"]["mcq"]["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert result["by_type"]["open"]["chance"] == 0.0
    unknown = score(write(tmp_path / "u", [row(0, "i0", "closed", "left", "left"), *rows[3:5]]), CONFIG)
    assert unknown["by_type"]["closed"]["chance"] is None


def test_text_only_floor(tmp_path):
    rows = [
        row(0, "i0", "open", "lung mass", "lung mass"),
        row(1, "i1", "closed", "yes", "yes"),
        row(2, "i2", "closed", "no", "no"),
        row(3, "i3", "closed", "no", "no"),
    ]
    blank = [
        {**rows[0], "answer": "lung"},
        {**rows[1], "answer": "yes"},
        {**rows[2], "answer": "yes"},
        {**rows[3], "answer": None, "error": "lost"},
    ]
    result = score(write(tmp_path / "p", rows), CONFIG, write(tmp_path / "blank", blank))
    whole = result["overall"]["text_only"]
    assert (
        whole["n"] == 3
        and whole["accuracy"]["value"] == pytest.approx(1 / 3)
        and whole["gain"]["value"] == pytest.approx(2 / 3)
    )
    closed = result["by_type"]["closed"]["text_only"]
    assert closed["n"] == 2 and closed["gain"]["value"] == 0.5 and "recall" not in closed
    recall = result["by_type"]["open"]["text_only"]
    assert recall["recall"]["value"] == 0.5 and recall["recall_gain"]["value"] == 0.5
    assert "text_only" not in score(str(tmp_path / "p"), CONFIG)["overall"]


def test_text_only_answers_in_a_column_count_like_a_run_of_their_own(tmp_path):
    blank = {"q0": "small", "q1": "lung", "q2": "no", "q3": "no", "q4": "The correct answer is B", "q5": "B"}
    own = score(
        write(tmp_path / "own", [one | {"text_only_answer": blank.get(one["sample_id"])} for one in ROWS]),
        CONFIG,
    )
    other = write(tmp_path / "blank", [one | {"answer": blank.get(one["sample_id"])} for one in ROWS])
    assert own == score(write(tmp_path / "plain", ROWS), CONFIG, text_only=other)
    assert own["overall"]["text_only"]["accuracy"]["value"] == pytest.approx(2 / 6)


def test_option_likelihood(tmp_path):
    options = {"choices": ["x", "y"], "option_tokens": [1, 4]}
    rows = [
        # right; per token -2 and -1: wrong
        row(0, "i0", "mcq", "A", "A", **options, option_logps=[-2.0, -4.0]),
        row(1, "i1", "mcq", "B", "why", **options, option_logps=[-3.0, -2.0]),  # right in both
        row(2, "i2", "mcq", "B", "B", choices=["x", "y"]),
        row(
            3,
            "i3",
            "closed",
            "No.",
            "no",
            choices=["yes", "no"],
            option_logps=[-1.0, -2.0],
            option_tokens=[1, 1],
        ),
    ]
    types = score(write(tmp_path / "p", rows), CONFIG)["by_type"]
    likely = types["mcq"]["likelihood"]
    assert (likely["n"], likely["accuracy"]["value"], likely["normalised"]["value"]) == (2, 1.0, 0.5)
    assert types["mcq"]["unparsable"] == pytest.approx(1 / 3)
    assert types["closed"]["likelihood"]["accuracy"]["value"] == 0.0
    bad = [row(7, "i0", "mcq", "C", "A", **options, option_logps=[-2.0, -4.0])]
    with pytest.raises(
        DataError, match="q7: reference 'C' is not the letter or the text of one of the 2 choices"
    ):
        score(write(tmp_path / "bad", bad), CONFIG)


def test_thinking_is_not_scored_and_is_counted(tmp_path):
    rows = [
        row(0, "i0", "closed", "yes", "<think>no, no</think>Yes"),
        row(1, "i1", "mcq", "B", "<think>A</think>\nB", choices=["x", "y"]),
        row(2, "i2", "open", "lung", "liver?</think>lung"),
        row(3, "i3", "open", "lung", "<think>lung"),
        row(4, "i4", "open", "lung", "", thinking="unfinished"),
        row(5, "i5", "open", "lung", "lung"),
        row(6, "i6", "open", "lung", None, error="no image"),
    ]
    result = score(write(tmp_path / "p", rows), CONFIG)
    assert result["thinking"] == {"answers": 5, "unfinished": 2} and result["error_reasons"] == {
        "no image": 1
    }
    assert not_scored([result]) == {"without answer": 1, "unfinished thinking": 2}
    assert not_scored([result | {"thinking": {"answers": 1, "unfinished": 0}}]) == {"without answer": 1}
    assert (
        result["by_type"]["closed"]["accuracy"]["value"]
        == result["by_type"]["mcq"]["accuracy"]["value"]
        == 1.0
    )
    opened = result["by_type"]["open"]
    assert (
        opened["accuracy"]["value"] == 1 / 2
        and opened["unfinished_thinking"] == 1 / 2
        and opened["answer_words"] == 1 / 2
    )
    assert opened["legacy"]["precision"]["value"] == 1 / 2
    assert answers(str(tmp_path / "p"), "open") == {"q2": "lung", "q3": "", "q4": "", "q5": "lung"}


def test_a_multiple_choice_reference_may_be_the_options_text(tmp_path):
    rows = [
        row(0, "i0", "mcq", "Oval.", "B", choices=["round", "oval"]),
        row(1, "i1", "mcq", "(ａ)", "A", choices=["round", "oval"]),
        row(2, "i2", "mcq", "E", "E"),
    ]
    assert score(write(tmp_path / "p", rows), CONFIG)["overall"]["accuracy"]["value"] == 1.0
    with pytest.raises(
        DataError, match="q0: reference 'square' is not the letter or the text of one of the 2 choices"
    ):
        score(
            write(tmp_path / "bad", [row(0, "i0", "mcq", "square", "B", choices=["round", "oval"])]), CONFIG
        )


def test_order_and_form_of_the_files_do_not_matter(tmp_path):
    rng = random.Random(0)
    rows = [
        row(
            n, f"i{n % 13}", "open", "left lung", rng.choice(["lung", "left lung", "heart"]), rng.choice("ab")
        )
        for n in range(90)
    ]
    first = score(write(tmp_path / "a", rows), CONFIG)
    lines = rng.sample(rows, len(rows))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = rescore(str(tmp_path / "p.jsonl"), CONFIG, str(tmp_path / "result.json"))
    assert again == first == json.loads((tmp_path / "result.json").read_text())
    older = [{name: value for name, value in line.items() if name in PREDICTION.names[:12]} for line in lines]
    (tmp_path / "old").mkdir()
    # written before columns were added
    pa.parquet.write_table(pa.Table.from_pylist(older), tmp_path / "old" / "x.parquet")
    assert score(str(tmp_path / "old"), CONFIG) == first


def test_paired_comparison_on_shared_questions(tmp_path):
    better = [*ROWS[:5], {**ROWS[5], "answer": "A"}]
    result = compare(write(tmp_path / "a", ROWS), write(tmp_path / "b", better), CONFIG)
    assert (result["n"], result["images"], result["unmatched"]) == (6, 2, 0)
    assert result["accuracy"]["value"] == pytest.approx(1 / 6)
    assert result["by_type"]["mcq"]["value"] == pytest.approx(0.5)
    assert result["accuracy"]["p_permutation"] == 1.0  # one image differs: its sign alone decides nothing
    assert (
        set(result["metrics"]) == {"open", "closed", "mcq"}
        and result["metrics"]["open"]["legacy_recall"]["value"] == 0.0
    )
    assert "likelihood" not in result["metrics"]["mcq"]


def test_comparison_of_several_models_is_corrected(tmp_path):
    rows = [row(n, f"i{n}", "closed", "yes", "no") for n in range(12)]
    folders = {"base": write(tmp_path / "base", rows)}
    for name, right in (("good", 12), ("little", 6)):
        folders[name] = write(
            tmp_path / name,
            [{**line, "model": name, "answer": "yes" if n < right else "no"} for n, line in enumerate(rows)],
        )
    found = compare_models(folders, "base", CONFIG)
    good, little = (found["models"][name]["accuracy"] for name in ("good", "little"))
    assert found["against"] == "base" and found["models"]["good"]["second"] == "good"
    assert good["p_permutation"] == pytest.approx(2 / 2**12) and good["p_holm"] == pytest.approx(
        2 * 2 / 2**12
    )
    assert little["p_permutation"] == pytest.approx(2 / 2**6) and little["p_holm"] == pytest.approx(2 / 2**6)
    assert found["models"]["good"]["by_type"]["closed"]["p_holm"] == good["p_holm"]
    together = score_models(folders, CONFIG)
    assert together == {
        "models": {name: score(uri, CONFIG) for name, uri in folders.items()},
        "comparison": found,
    }
    assert score_models({"base": folders["base"]}, CONFIG)["comparison"] is None


def test_what_cannot_be_scored_is_said(tmp_path):
    with pytest.raises(StageError, match="1 with errors"):
        score(write(tmp_path / "p", [ROWS[6]]), CONFIG)
    with pytest.raises(StageError, match="'q0' occurs twice"):
        score(write(tmp_path / "twice", [ROWS[0], ROWS[0]]), CONFIG)
    with pytest.raises(StageError, match="a, m; score one folder per model"):
        score(write(tmp_path / "two", [ROWS[0], {**ROWS[1], "model": "a"}]), CONFIG)
    with pytest.raises(StageError, match="q0: answer_type 'essay'"):
        score(write(tmp_path / "kind", [{**ROWS[0], "answer_type": "essay"}]), CONFIG)
    with pytest.raises(DataError, match="q0: reference is missing"):
        score(write(tmp_path / "reference", [{**ROWS[0], "reference": None}]), CONFIG)
    with pytest.raises(StageError, match="'q0' is not the same question"):
        compare(
            write(tmp_path / "a", ROWS), write(tmp_path / "b", [{**ROWS[0], "reference": "small"}]), CONFIG
        )
    with pytest.raises(StageError, match="share no answered question"):
        compare(str(tmp_path / "a"), write(tmp_path / "c", [row(99, "i", "open", "x", "x")]), CONFIG)


def test_results_are_plain_json(tmp_path):
    result = score(write(tmp_path / "p", ROWS), CONFIG)

    def numbers(value):
        if isinstance(value, dict):
            return [number for item in value.values() for number in numbers(item)]
        return [number for item in value for number in numbers(item)] if isinstance(value, list) else [value]

    assert all(not math.isnan(number) for number in numbers(result) if isinstance(number, float))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
