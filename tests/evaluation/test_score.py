import pyarrow as pa
import pyarrow.parquet
import pytest

from medray.config import EvaluateConfig
from medray.errors import StageError
from medray.evaluation.predict import compare, score
from medray.records import PREDICTION


def row(number, image, kind, reference, answer, attribute="size", choices=None, **more):
    return {
        "sample_id": f"q{number}", "image_id": image, "question": "?", "reference": reference, "answer": answer, "answer_type": kind,
        "attribute": attribute, "choices": choices or [], "model": "m", "finish_reason": "stop", "tokens": 3, "error": None, **more,
    }


def write(folder, rows):
    folder.mkdir()
    half = len(rows) // 2
    for name, part in (("a", rows[:half]), ("b", rows[half:])):
        pa.parquet.write_table(pa.Table.from_pylist(part, schema=PREDICTION), folder / f"{name}.parquet")
    return str(folder)


ROWS = [
    row(0, "i0", "open", "big", "Big."), row(1, "i0", "open", "lung mass", "lung lung lung lung heart", "place"),
    row(2, "i0", "closed", "no", "I do not know"), row(3, "i1", "closed", "yes", "yes"),
    row(4, "i1", "mcq", "B", "The correct answer is B", choices=["x", "y"]), row(5, "i1", "mcq", "A", "x", choices=["x", "y"], finish_reason="length"),
    row(6, "i2", "open", "big", None, error="no image"),
]


def test_results_by_type_and_attribute(tmp_path):
    result = score(write(tmp_path / "p", ROWS), EvaluateConfig(bootstrap=200))
    assert (result["model"], result["errors"]) == ("m", 1)
    whole = result["overall"]
    assert (whole["n"], whole["images"]) == (6, 2)
    assert whole["accuracy"]["value"] == pytest.approx(3 / 6)
    assert whole["accuracy"]["low"] <= 0.5 <= whole["accuracy"]["high"]
    assert whole["truncated"] == pytest.approx(1 / 6) and whole["answer_words"] == pytest.approx((1 + 5 + 4 + 1 + 5 + 1) / 6)

    types = result["by_type"]
    assert types["open"]["legacy"]["recall"]["value"] == pytest.approx((1 + 0.8) / 2)
    assert types["open"]["strict"]["recall"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert types["open"]["set_recall"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert len(types["open"]["bleu"]) == 4
    assert types["closed"]["legacy"]["value"] == 1.0 and types["closed"]["accuracy"]["value"] == 0.5 and types["closed"]["unparsable"] == 0.5
    assert types["mcq"]["accuracy"]["value"] == 0.5 and types["mcq"]["unparsable"] == 0.5 and types["mcq"]["chance"] == 0.5
    assert set(result["by_attribute"]) == {"place", "size"}
    assert result["by_attribute"]["size"]["by_type"] == {"open": 1.0, "closed": 0.5, "mcq": 0.5}


def test_paired_comparison_on_shared_questions(tmp_path):
    better = [*ROWS[:5], {**ROWS[5], "answer": "A"}]
    result = compare(write(tmp_path / "a", ROWS), write(tmp_path / "b", better), EvaluateConfig(bootstrap=200))
    assert (result["n"], result["unmatched"]) == (6, 0)
    assert result["accuracy"]["value"] == pytest.approx(1 / 6)
    assert result["by_type"]["mcq"]["value"] == pytest.approx(0.5)


def test_nothing_to_score_is_said(tmp_path):
    with pytest.raises(StageError, match="1 with errors"):
        score(write(tmp_path / "p", [ROWS[6]]), EvaluateConfig())
