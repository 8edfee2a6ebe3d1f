"""Too many rows set aside fail a stage, with the reasons counted; so does nothing left, at any limit."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medray import records
from medray.config import (
    ClinicianPreferenceConfig,
    EvaluateJobConfig,
    InstructionFreeConfig,
    PrepareDataConfig,
    SelfTrainingConfig,
)
from medray.errors import StageError, TooManySetAside
from medray.inference.judges.base import IDENTICAL
from medray.methods.prepare_data.pipeline import take_account
from medray.methods.shared import stages
from medray.running.run import Run, Stage
from medray.running.set_aside import (
    SetAside,
    check_set_aside,
    check_something,
    counted,
    kind_of,
    set_aside_in,
)
from medray.train.worker import TrainResult, check_trained


def long(number, length=None):
    return f"r{number}", f"{length or 9000 + number} tokens are over model.max_length 4096"


def test_reasons_are_counted_whatever_differs_from_row_to_row():
    found = counted(
        [
            *(long(number) for number in range(300)),
            ("p1", "image file a/b/x1.png does not exist"),
            ("p2", "image file c/x2.png does not exist"),
            ("p3", "image file x3.jpg does not exist"),
            ("abc", "row abc has 'no' answer"),
            ("def", "row def has 'another' answer"),
            ("fine", None),
        ]
    )
    assert found.total == 305
    assert list(found.counts.values()) == [300, 3, 2]
    assert kind_of("cannot read s3://bucket/p10000032/a.dcm: 403") == kind_of(
        "cannot read s3://other/b.dcm: 404"
    )


def test_memory_has_a_bound():
    found = SetAside()
    for number in range(5000):
        found.add("".join(chr(97 + int(digit)) for digit in str(number)), f"r{number}")
    assert found.total == sum(found.counts.values()) == 5000 and len(found.reasons) <= 1001


def test_the_message_names_reasons_the_longest_and_the_way_on():
    found = counted(
        [
            *(long(number) for number in range(7)),
            ("big", "12,345 tokens are over model.max_length 4096"),
            ("x", "empty answer"),
        ]
    )
    with pytest.raises(StageError) as error:
        check_set_aside("rows", 100, found, 0.05, "quarantine.jsonl")
    text = str(error.value)
    assert "9 of 100 rows were set aside (9 %), max_quarantined allows 5 %" in text
    assert (
        "8 x 12,345 tokens are over model.max_length 4096 (row big)" in text
        and "1 x empty answer (row x)" in text
    )
    assert "quarantine.jsonl names all of them" in text and "--set max_quarantined=0.09" in text


@pytest.mark.parametrize(
    ("bad", "rows", "limit", "fails"),
    [
        (5, 100, 0.05, False),
        (6, 100, 0.05, True),
        (1, 10, 0.05, True),
        (1, 20, 0.05, False),
        (1, 10, 0.1, False),
        (0, 0, 0.0, False),
        (1, 100, 0.0, True),
        (10, 10, 1.0, False),
    ],
)
def test_strictly_more_than_the_share_fails(bad, rows, limit, fails):
    found = counted(long(number) for number in range(bad))
    if fails:
        with pytest.raises(StageError, match="max_quarantined"):
            check_set_aside("rows", rows, found, limit)
    else:
        check_set_aside("rows", rows, found, limit)


def test_the_share_to_set_lets_it_pass():
    found = counted(long(number) for number in range(51))
    with pytest.raises(StageError, match=r"--set max_quarantined=0\.06"):
        check_set_aside("rows", 1000, found, 0.05)
    check_set_aside("rows", 1000, found, 0.06)


def test_nothing_fails_at_any_limit():
    with pytest.raises(StageError, match=r"no answer.*\n.*2 x 9001 tokens"):
        check_something("answer", 0, counted([long(0), long(1)]))
    with pytest.raises(StageError, match="no answer; ask more"):
        check_something("answer", 0, SetAside(), "ask more")


@pytest.mark.parametrize(
    "kind",
    [
        SelfTrainingConfig,
        InstructionFreeConfig,
        ClinicianPreferenceConfig,
        EvaluateJobConfig,
        PrepareDataConfig,
    ],
)
def test_every_job_has_the_field(kind):
    assert kind().max_quarantined == 0.05


def result(steps, trained, quarantined):
    counts = {"steps": steps, "samples": trained, "trained": trained, "quarantined": quarantined}
    return TrainResult(None, "", counts, dict(long(number) for number in range(quarantined)))


def test_a_training_on_nothing_is_no_training():
    """Eleven of eleven rows too long: 0 steps was once a success, and the base model was exported as the
    tuned one.
    """
    for limit in (0.05, 1.0):
        with pytest.raises(
            StageError, match=r"made no step[\s\S]*11 x 9010 tokens are over model\.max_length 4096"
        ):
            check_trained(result(0, 0, 11), limit)
    with pytest.raises(StageError, match="no row to train on"):
        check_trained(result(0, 0, 0), 1.0)
    with pytest.raises(StageError, match="3 of 20 rows"):
        check_trained(result(4, 17, 3), 0.05)
    check_trained(result(4, 17, 3), 0.2)


def stage_of(tmp_path, rows, schema):
    stage = Stage(Run(tmp_path / "run"), "stages/s")
    stage.run.fs.makedirs(stage.path("rows"))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), stage.path("rows") + "/a.parquet")
    return stage


def judged(number, *errors, error=None):
    verdicts = [
        {"question_id": "q", "first": 0, "second": 1, "error": one, "first_score": None if one else 1.0}
        for one in errors
    ]
    return {"sample_id": f"i{number}", "error": error, "verdicts": verdicts}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([judged(0, None, IDENTICAL), judged(1, None, None)], None),
        ([judged(number, None) for number in range(9)] + [judged(9, "HTTP 500")], None),  # one verdict alone
        (
            [judged(number, None) for number in range(8)] + [judged(8, "HTTP 500"), judged(9, "HTTP 503")],
            "2 of 10 verdicts",
        ),
        ([judged(0, "HTTP 500"), judged(1, "HTTP 501")], "made no verdict"),
        ([judged(0, IDENTICAL)], "no two answers to a question differ"),
        (
            [judged(0, error="image cannot be decoded"), judged(1, error="no image"), judged(2, None)],
            "2 of 3 verdicts",
        ),
    ],
)
def test_a_judge_that_fails(tmp_path, rows, words):
    stage = stage_of(tmp_path, rows, records.JUDGED)
    if words is None:
        stages.check_judged(stage, SelfTrainingConfig(), differ=True)
    else:
        with pytest.raises(StageError, match=words):
            stages.check_judged(stage, SelfTrainingConfig(), differ=True)


def test_answers_equal_to_their_reference_are_no_failure(tmp_path):
    stages.check_judged(stage_of(tmp_path, [judged(0, IDENTICAL)], records.JUDGED), EvaluateJobConfig())


@pytest.mark.parametrize(
    ("bad", "limit", "words"),
    [(0, 0.05, None), (1, 0.05, "1 of 4 questions"), (1, 0.25, None), (4, 1.0, "made no answer")],
)
def test_an_evaluation_of_nothing(tmp_path, bad, limit, words):
    rows = [
        {"sample_id": f"q{number}", "key": f"k{number}", "error": "too long" if number < bad else None}
        for number in range(4)
    ]
    uri = stage_of(tmp_path, rows, records.ANSWERED).path("rows")
    if words is None:
        stages.check_answered(uri, 4, limit, "key")
    else:
        with pytest.raises(StageError, match=words):
            stages.check_answered(uri, 4, limit, "key")


def test_rows_that_were_set_aside_are_made_again_once_what_did_it_is_mended(tmp_path):
    """Those of files that an earlier attempt wrote; a limit that is raised makes nothing again."""
    broken, made = {"1", "5"}, []

    def work(stage):
        os.makedirs(stage.path("rows"), exist_ok=True)
        for number in range(4):
            path = Path(stage.path("rows"), f"part-{number}.parquet")
            if not path.exists():
                ids = [str(2 * number), str(2 * number + 1)]
                made.extend(ids)
                rows = [{"sample_id": one, "error": "no image" if one in broken else None} for one in ids]
                pq.write_table(pa.Table.from_pylist(rows), path)
        check_set_aside("rows", 8, set_aside_in(stage.path("rows")), limit, stage.path("rows"))
        return {"rows": stage.path("rows")}

    limit = 0.05
    for attempt in range(2):
        with pytest.raises(TooManySetAside, match="2 of 8 rows"):
            Run(tmp_path).stage("a", {}, work)
        assert len(made) == (8, 12)[attempt], "the second attempt asks again, once"
    broken.clear()
    made.clear()
    Run(tmp_path).stage("a", {}, work)
    assert made == ["0", "1", "4", "5"]
    broken.add("1")
    with pytest.raises(TooManySetAside):
        Run(tmp_path).stage("b", {}, work)
    made.clear()
    limit = 0.5
    Run(tmp_path).stage("b", {}, work)
    assert made == []


def test_preparing_data_names_few_bad_records_and_fails_for_many(tmp_path):
    """Rows of shards as the job writes them; a record set aside keeps a row that says why."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
    good = {
        "image": picture.getvalue(),
        "split": "train",
        "image_format": "PNG",
        "width": 8,
        "height": 8,
        "error": None,
    }

    def account(bad, limit):
        run = Run(tmp_path / f"{bad}-{limit}")
        run.fs.makedirs(run.path("shards"))
        rows = [{"sample_id": f"g{number}", "image_id": f"g{number}", **good} for number in range(100)]
        rows += [
            {
                "sample_id": f"b{number}",
                "image_id": f"b{number}",
                "error": "gone",
                "set_aside": [
                    {"sample_id": f"b{number}", "file": "f", "reason": f"image {number} is missing"}
                ],
            }
            for number in range(bad)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=records.SAMPLE), run.path("shards", "a.parquet"))
        return take_account(Stage(run, "stages/03-account"), limit)["counts"]["quarantined"]

    assert account(20, 0.05) == 20
    with pytest.raises(
        StageError, match=r"25 of 125 records were set aside \(20 %\)[\s\S]*--set max_quarantined=0\.2"
    ):
        account(25, 0.05)
    assert account(25, 0.2) == 25


@pytest.mark.parametrize(
    ("bad_records", "bad_images", "limit", "words"),
    [
        (5, 5, 0.05, None),
        (6, 0, 0.05, "6 of 100 records of the source"),
        (0, 2, 0.05, "2 of 20 records whose image was read"),
        (6, 0, 0.06, None),
    ],
)
def test_a_data_stage_that_loses_its_source(tmp_path, bad_records, bad_images, limit, words):
    """Images are read of some records only, so these are held against those: 5 of 100 read is not 5 of a
    million.
    """
    stage = Stage(Run(tmp_path / "run"), "stages/00-data")
    numbers = {
        "records": 100,
        "bad records": bad_records,
        "read records": 20 if bad_images < 5 else 100,
        "bad images": bad_images,
    }
    stage.run.write_json({"uses": "  split", "set_aside": numbers}, "stages/00-data/account.json")
    rows = [
        {"sample_id": f"b{number}", "file": "f", "stage": "data", "reason": "no answer"}
        for number in range(bad_records + bad_images)
    ]
    rows += [
        {
            "sample_id": f"d{number}",
            "file": "f",
            "stage": "data",
            "reason": "duplicate sample_id: the first row is kept",
        }
        for number in range(50)
    ]
    stage.run.fs.makedirs(stage.path("quarantine"))
    pq.write_table(
        pa.Table.from_pylist(rows, schema=records.QUARANTINE), stage.path("quarantine") + "/a.parquet"
    )
    config = SelfTrainingConfig(max_quarantined=limit)
    if words is None:
        assert stages.checked_account(stage, config)["set_aside"] == numbers
    else:
        with pytest.raises(StageError, match=words + r"[\s\S]*no answer") as error:
            stages.checked_account(stage, config)
        assert "duplicate" not in str(error.value)
