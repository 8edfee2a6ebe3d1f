import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.errors import StageError
from medray.evaluation.predict import question_text
from medray.methods.shared.benchmark_answers import digests_of, take
from medray.records import ANSWERED, PREDICTION
from medray.running.run import Run


def test_the_words_after_a_question_are_those_of_its_benchmark_and_type():
    suffixes = {"slake": {"closed": "Answer with yes or no."}, "vqa-rad": {"open": "Be brief."}}
    closed = {"question": "Is it a liver?", "answer_type": "closed"}
    assert (
        question_text({**closed, "benchmark": "slake"}, suffixes) == "Is it a liver?\nAnswer with yes or no."
    )
    assert question_text({**closed, "benchmark": "vqa-rad"}, suffixes) == "Is it a liver?"
    assert question_text(closed, suffixes) == "Is it a liver?"


def test_a_benchmark_takes_its_own_rows_among_the_answers(tmp_path):
    answers = tmp_path / "answers"
    answers.mkdir()
    keys = [["slake-1/a", "slake-2/a"], ["slake-zh-1/a", "slake-1/b"], ["slake-zh-1/b"]]
    for number, part in enumerate(keys):
        rows = [{"sample_id": key[-1], "answer": key, "choices": ["x"], "key": key} for key in part]
        pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERED), answers / f"{number}.parquet")
    run = Run(tmp_path / "run")

    def taken(name, questions):
        return run.stage(
            name,
            {},
            lambda stage: take(
                stage, str(answers), {"prefix": "slake-1/", "counts": {"questions": questions}}
            ),
        )

    table = pq.read_table(taken("10-slake-m", 2)["outputs"]["rows"])
    assert table.schema.names == PREDICTION.names
    assert table.select(["sample_id", "answer"]).to_pylist() == [
        {"sample_id": "a", "answer": "slake-1/a"},
        {"sample_id": "b", "answer": "slake-1/b"},
    ]
    with pytest.raises(StageError, match="2 answers to 3 questions"):
        taken("10-slake-other", 3)


def test_answers_that_were_asked_again_reach_the_scores_of_their_benchmark_alone(tmp_path):
    """Neither their order nor another benchmark's answers count."""
    questions = {name: {"outputs": {"prefix": f"{name}-1/"}} for name in ("slake", "slake-zh")}

    def digests(*answers, last=False):
        folder = tmp_path / f"{'-'.join(answers)}{last}"
        folder.mkdir()
        for number, (key, answer) in enumerate(
            zip(("slake-1/a", "slake-zh-1/a", "slake-1/b", "vqa-rad-1/a"), answers)
        ):
            rows = [{"sample_id": "a", "answer": answer, "option_logps": [-0.5], "key": key}]
            pq.write_table(
                pa.Table.from_pylist(rows, schema=ANSWERED),
                folder / f"{9 - number if last else number}.parquet",
            )
        return digests_of(str(folder), questions)

    first = digests("no", "no", "no", "no")
    assert first["slake"] != first["slake-zh"]
    assert digests("no", "no", "no", "yes") == first, "a benchmark that is no longer asked for"
    assert digests("no", "no", "no", "no", last=True) == first
    other = digests("no", "no", "yes", "no")
    assert (other["slake"] != first["slake"], other["slake-zh"]) == (True, first["slake-zh"])
