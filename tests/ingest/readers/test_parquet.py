"""Parquet as people have it: dialogues, multiple choice, labels in unknown columns, shards that differ,
other files beside."""

import datetime
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config import DataConfig
from medray.errors import BadRecord, DataError
from medray.ingest.readers.options import options_of, right_option
from medray.ingest.source_index import detect, survey
from tests.images.test_decoding import noise, saved
from tests.ingest.readers.test_dialogues import FORMS
from tests.support.sources import dialogue, index, payloads, unused, write

IMAGES = [saved(noise((8, 6), number)) for number in range(6)]


def image(number):
    return {"bytes": IMAGES[number], "path": None}


def shard(folder, rows, name="train-00000-of-00001.parquet", schema=None):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name, row_group_size=2)
    return folder / name


@pytest.mark.parametrize("form", [form for form in FORMS if "conversatons" not in form])
@pytest.mark.parametrize("column", ["image", "images", "Image"])
def test_dialogues_beside_images(tmp_path, form, column):
    shard(tmp_path, [{column: [image(n)] if column == "images" else image(n), **form} for n in range(3)])
    kind, rows, notes = index(tmp_path)
    assert kind == "hf-parquet"
    assert [one["turns"] for one in payloads(rows)] == [
        [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A."}]
    ] * 3
    assert len({row["sample_id"] for row in rows}) == 3
    assert unused(notes) == {}


def test_questions_with_other_capitals_and_rows_of_several_kinds(tmp_path):
    shard(
        tmp_path,
        [
            {"image": image(0), "Question": "Is it?", "Answer": "yes", "caption": None},
            {"image": image(1), "Question": None, "Answer": None, "caption": "A lung."},
            {"image": image(2), "Question": None, "Answer": None, "caption": None},
        ],
    )
    rows = index(tmp_path)[1]
    assert payloads(rows[:1])[0]["qa"]["answer_type"] == "closed"
    assert payloads(rows[1:2])[0]["caption"] == "A lung."
    assert rows[2]["error"] == "field 'question' is empty"  # it is no image alone
    assert rows[2]["where"] == "train-00000-of-00001.parquet row 2"


@pytest.mark.parametrize(
    "columns",
    [
        {"label": 1},
        {"finding": "mass", "id": 3},
        {"Impression": "mass"},
        {"response": "x", "instruction": "y"},
        {"mask": image(1)},
        {"bbox": [1.0, 2.0], "category": "c"},
    ],
)
def test_labels_in_unknown_columns_are_no_bare_images(tmp_path, columns):
    shard(tmp_path, [{"image": image(0), **columns}])
    with pytest.raises(DataError) as refused:
        detect(DataConfig(source=str(tmp_path)))
    assert all(name in str(refused.value) for name in columns if name != "id")
    kind, rows, notes = index(tmp_path, format="hf-parquet")
    assert (kind, payloads(rows)) == ("hf-parquet", [{}])
    assert unused(notes) == {"train-00000-of-00001.parquet": set(columns)}


def test_images_with_nothing_but_names_are_images_alone(tmp_path):
    shard(tmp_path, [{"image": image(0), "id": 3, "file_name": "a.png", "width": 8}])
    assert payloads(index(tmp_path)[1]) == [{}]


def test_columns_beside_those_that_are_read_are_named_once(tmp_path):
    shard(
        tmp_path,
        [
            {"image": image(n), "question": "Is it?", "answer": "yes", "organ": "lung", "empty": None}
            for n in range(5)
        ],
    )
    assert index(tmp_path)[2].by_file("unused") == {"train-00000-of-00001.parquet": {"organ": 5}}


OPTIONS = ["liver", "lung", "heart", "brain"]


@pytest.mark.parametrize(
    "columns",
    [
        {"options": OPTIONS, "answer": "B"},
        {"choices": OPTIONS, "answer": "lung"},
        {"options": OPTIONS, "choices": OPTIONS, "answer": "B"},
        {"options": dict(zip("ABCD", OPTIONS)), "answer": "b"},
        {"options": str(OPTIONS), "answer": "(B)"},
        {"choices": {"text": OPTIONS, "label": list("ABCD")}, "answer": "B."},
        {"options": [{"key": k, "value": v} for k, v in zip("ABCD", OPTIONS)], "answer": "B: lung"},
        {**dict(zip("ABCD", OPTIONS)), "answer": "B"},
        {**{f"option_{k}": v for k, v in zip("abcd", OPTIONS)}, "answer": "Lung."},
        {**{f"Choice {k}": v for k, v in zip("ABCD", OPTIONS)}, "answer": "B"},
        {"options": [f"{k}. {v}" for k, v in zip("ABCD", OPTIONS)], "answer": "B"},
        {"options": [f"({k}) {v}" for k, v in zip("ABCD", OPTIONS)], "answer": "lung"},
        {"options": OPTIONS, "answer": ["B"]},
    ],
)
def test_multiple_choice_in_every_form(tmp_path, columns):
    shard(
        tmp_path,
        [{"image": image(0), "question": "<image>\nWhich organ?", **columns}],
        "test-00000-of-00001.parquet",
    )
    (asked,) = payloads(index(tmp_path)[1])
    assert (asked["qa"]["reference"], asked["qa"]["answer_type"], asked["qa"]["choices"]) == (
        "B",
        "mcq",
        OPTIONS,
    )
    assert asked["qa"]["question"].startswith("Which organ?\nA. liver\nB. lung\nC. heart\nD. brain\n")


def test_an_empty_option_moves_no_letter():
    record = {"A": "liver", "B": None, "C": "heart", "D": "brain"}
    options = options_of(record)
    assert options[right_option(record, "D", options)] == ("D", "brain")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (1, "counted from 0 or from 1"),
        ("2", "counted from 0 or from 1"),
        (0, "counted from 0"),
        ("E", "none of the 4 options"),
        ("spleen", "none of the 4"),
        (None, "is empty"),
        (float("nan"), "is empty"),
        (True, "not text"),
    ],
)
def test_answers_that_name_no_option(answer, reason):
    with pytest.raises(BadRecord, match=reason):
        right_option({}, answer, list(zip("ABCD", OPTIONS)))


def test_numbers_that_are_options_are_answers():
    assert right_option({}, 2, list(zip("ABC", ["1", "2", "3"]))) == 1


def test_nothing_as_an_answer_and_numbers_as_answers(tmp_path):
    shard(
        tmp_path,
        [
            {"image": image(n), "question": "How many?", "answer": value}
            for n, value in enumerate((2.0, float("nan"), 2.5))
        ],
    )
    rows = index(tmp_path)[1]
    assert [row["error"] for row in rows] == [None, "field 'answer' is empty", None]
    assert [one["qa"]["reference"] for one in payloads([rows[0], rows[2]])] == ["2", "2.5"]
    shard(tmp_path / "b", [{"image": image(0), "question": "How many?", "answer": True}])
    assert "is true" in index(tmp_path / "b")[1][0]["error"]


UNEQUAL = [
    {"id": pa.int64(), "question": pa.string(), "answer": pa.string(), "split": pa.null()},
    {"id": pa.string(), "question": pa.large_string(), "answer": pa.string(), "split": pa.string()},
    {"id": pa.float64(), "question": pa.dictionary(pa.int32(), pa.string()), "answer": pa.int32()},
    {"question": pa.string_view(), "answer": pa.decimal128(5, 1), "more": pa.date32()},
]
VALUES = {"id": {pa.string(): "b1"}, "split": {pa.string(): "Train"}}


def test_shards_whose_columns_differ(tmp_path):
    for number, types in enumerate(UNEQUAL):
        columns = {"image": pa.array([image(number)])}
        for name, kind in types.items():
            value = {"question": "How many?", "more": datetime.date(2024, 1, 1)}.get(
                name, VALUES.get(name, {}).get(kind, 3)
            )
            value = (
                None
                if kind == pa.null()
                else decimal.Decimal("3.0")
                if pa.types.is_decimal(kind)
                else "3"
                if name == "answer" and kind == pa.string()
                else value
            )
            columns[name] = (
                pa.array([value], kind)
                if not pa.types.is_dictionary(kind)
                else pa.array([value]).dictionary_encode()
            )
        pq.write_table(pa.table(columns), tmp_path / f"train-{number:05d}-of-00004.parquet")
    pq.write_table(
        pq.read_table(tmp_path / "train-00000-of-00004.parquet").slice(0, 0), tmp_path / "train-empty.parquet"
    )
    rows = index(tmp_path)[1]
    assert [one["qa"]["reference"] for one in payloads(rows)] == ["3"] * 4
    assert {row["split"] for row in rows} == {"train"}


def test_own_shards_whose_types_differ(tmp_path):
    base = {"image": IMAGES[0], "question": "Is it?", "reference": "yes"}
    shard(tmp_path, [{"sample_id": 1, **base, "split": None}], "a.parquet")
    shard(tmp_path, [{"sample_id": "x", **base, "split": "Validation"}], "b.parquet")
    kind, rows, _ = index(tmp_path)
    assert (kind, [(row["sample_id"], row["split"]) for row in rows]) == (
        "shards",
        [("1", None), ("x", "val")],
    )


def test_other_parquet_files_beside_are_named(tmp_path):
    shard(tmp_path, [{"image": image(0), "question": "Is it?", "answer": "yes"}])
    shard(tmp_path, [{"id": 1, "embedding": [0.1]}], "train-embeddings.parquet")
    found = survey(DataConfig(source=str(tmp_path)))
    assert (found.kind, [path.rsplit("/", 1)[1] for path in found.files]) == (
        "hf-parquet",
        ["train-00000-of-00001.parquet"],
    )
    assert "id, embedding" in found.passed["train-embeddings.parquet"]


def test_a_broken_shard_is_one_bad_row(tmp_path):
    shard(tmp_path, [{"image": image(n), "question": "Is it?", "answer": "yes"} for n in range(3)])
    write(tmp_path / "train-00001-of-00002.parquet", b"PAR1 cut")
    write(tmp_path / "train-00002-of-00002.parquet", b"")
    rows = index(tmp_path)[1]
    assert len(payloads([row for row in rows if row["error"] is None])) == 3
    assert sorted(row["where"].split()[0] for row in rows if row["error"]) == [
        "train-00001-of-00002.parquet",
        "train-00002-of-00002.parquet",
    ]


def test_row_groups_are_read_apart_and_together(tmp_path, monkeypatch):
    from medray.ingest.readers import parquet

    rows = [{"image": image(n), "question": f"Is it {n}?", "answer": "yes"} for n in range(5)]
    shard(tmp_path / "train", rows, "0000.parquet")
    shard(tmp_path / "Test", rows[:1], "0000.parquet")
    together = index(tmp_path)[1]
    monkeypatch.setattr(parquet, "PIECE_BYTES", 1)
    assert index(tmp_path)[1] == together
    assert [row["split"] for row in together] == ["test"] + ["train"] * 5
    assert [row["where"] for row in together[1:]] == [f"0000.parquet row {n}" for n in range(5)]


@pytest.mark.parametrize("suffix", [".PARQUET", ".Parquet", ".pq"])
def test_suffixes_in_any_case(tmp_path, suffix):
    shard(tmp_path, [{"image": image(0), "text": "A lung."}], f"train{suffix}")
    assert payloads(index(tmp_path)[1]) == [{"caption": "A lung.", "context": None}]


def test_a_broken_parquet_file_beside_a_json_set_is_named(tmp_path):
    write(tmp_path / "x.parquet", b"PAR1 cut")
    write(tmp_path / "train.json", [dialogue("0.png")])
    found = survey(DataConfig(source=str(tmp_path)))
    assert (found.kind, len(found.files), list(found.passed)) == ("llava", 1, ["x.parquet"])


@pytest.mark.parametrize("field", ["correct_answer", "answer_idx", "label", "answer_label"])
def test_the_right_option_in_other_fields(tmp_path, field):
    shard(tmp_path, [{"image": image(0), "question": "Which?", "options": OPTIONS, field: "C"}])
    assert payloads(index(tmp_path)[1])[0]["qa"]["reference"] == "C"
