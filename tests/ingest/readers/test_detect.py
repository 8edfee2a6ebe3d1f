"""Sources are known by what is in them, and read from the folders their makers publish."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config import DataConfig
from medray.errors import DataError
from medray.ingest.source_index import INDEX, detect, read_image_bytes, read_index
from tests.images.test_decoding import noise, saved
from tests.ingest.readers.test_concepts import CALC, MASS, skin
from tests.ingest.readers.test_files import tar
from tests.ingest.readers.test_text import CHAT, FIGURE, PAIR
from tests.ingest.readers.test_vqa import OMNI, PMC_1, PMC_2, SLAKE, csv_rows
from tests.ingest.test_source_index import CELL, LLAVA, QA

CAPTION = {"Image": "a.png", "Report": "A lung."}
TABLES = [
    ("skincon", "annotations_ddi.csv", skin("a.png", {"Scar"})),
    ("cbis-ddsm", "mass_case_description_train_set.csv", MASS),
    ("cbis-ddsm", "calc_case_description_test_set.csv", CALC),
    ("pmc-vqa", "train.csv", PMC_1),
    ("pmc-vqa", "train_2.csv", PMC_2),
    ("captions", "x.csv", CAPTION),
    ("wbcatt", "pbc_attr_v1_train.csv", CELL),
    ("slake", "validate.json", [SLAKE]),
    ("omnimedvqa", "ACRIMA.json", [OMNI]),
    ("vqa-rad", "VQA.json", [QA]),
    ("llava", "x.json", [LLAVA]),
    ("llava-med-captions", "fig.json", {"ct_scan": [FIGURE]}),
    ("llava-med-qa", "llava_med_eval_qa50_qa.jsonl", CHAT),
    ("preference", "x.jsonl", PAIR),
    ("captions", "metadata.jsonl", CAPTION),
]


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".csv":
        csv_rows(path.parent, path.name, "captions", [content])
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "name", "content"), TABLES, ids=[f"{kind} {name}" for kind, name, _ in TABLES]
)
def test_tables_are_known_by_their_names(tmp_path, kind, name, content):
    path = put(tmp_path / name, content)
    assert detect(DataConfig(source=str(tmp_path))) == (kind, [path])
    assert detect(DataConfig(source=path)) == (kind, [path])
    assert detect(DataConfig(source=str(tmp_path), format=kind)) == (kind, [path])


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("shards", {"sample_id": "1", "image": b"x", "chosen": "c", "rejected": "r"}),
        ("preference", {"images": [{"bytes": b"x"}], "chosen": "c", "rejected": "r"}),
        ("hf-parquet", {"image": {"bytes": b"x", "path": None}, "question": "q", "answer": "a"}),
        ("hf-parquet", {"image": {"bytes": b"x"}, "text": "t"}),
    ],
)
def test_parquet_is_known_by_its_columns(tmp_path, kind, row):
    files = [put(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [row]) for split in ("test", "train")]
    put(tmp_path / "dataset_infos.json", {"default": {}})
    assert detect(DataConfig(source=str(tmp_path))) == (kind, files)


def test_tars_and_folders(tmp_path):
    put(tmp_path / "w/x/1.jpg", b"x")
    files = [put(tmp_path / "w" / name, b"") for name in ("a.tar", "b.tar")]
    assert detect(DataConfig(source=str(tmp_path / "w"))) == ("webdataset", files)
    put(tmp_path / "i/p/1.jpg", b"x")
    assert detect(DataConfig(source=str(tmp_path / "i"))) == ("images", [str(tmp_path / "i")])
    put(tmp_path / "d/p/1.2.3", b"\0" * 128 + b"DICM")
    put(tmp_path / "d/a.jpg", b"x")
    assert detect(DataConfig(source=str(tmp_path / "d"))) == ("dicom", [str(tmp_path / "d")])


def test_the_nearest_level_then_parquet_then_tables_then_tars(tmp_path):
    tars = [put(tmp_path / "deep/er/x.tar", b"")]
    assert detect(DataConfig(source=str(tmp_path))) == ("webdataset", tars)
    lines = [put(tmp_path / "deep/er" / name, [SLAKE]) for name in ("test.json", "train.json")]
    put(tmp_path / "deep/er/zz.json", [LLAVA])
    assert detect(DataConfig(source=str(tmp_path))) == ("slake", lines)
    parquet = [put(tmp_path / "deep/er/a.parquet", [{"sample_id": "1", "image": b"x"}])]
    assert detect(DataConfig(source=str(tmp_path))) == ("shards", parquet)
    nearer = put(tmp_path / "deep/metadata.jsonl", CAPTION)
    assert detect(DataConfig(source=str(tmp_path))) == ("captions", [nearer])
    assert detect(DataConfig(source=str(tmp_path), format="slake")) == ("slake", lines)
    assert detect(DataConfig(source=str(tmp_path), format="webdataset")) == ("webdataset", tars)


def test_versions_and_resplits_are_read_where_they_are_named(tmp_path):
    names = ("test.csv", "test_2.csv", "test_clean.csv", "train.csv", "train_2.csv")
    files = {name: put(tmp_path / name, PMC_2 if "2" in name else PMC_1) for name in names}
    assert detect(DataConfig(source=str(tmp_path))) == ("pmc-vqa", [files["test.csv"], files["train.csv"]])
    assert detect(DataConfig(source=files["train_2.csv"])) == ("pmc-vqa", [files["train_2.csv"]])
    both = [
        put(tmp_path / "rad" / name, [QA]) for name in ("mevf_testset.json", "records.json", "testset.json")
    ]
    assert detect(DataConfig(source=str(tmp_path / "rad"))) == ("vqa-rad", both[1:2])


def test_a_table_that_nobody_knows_is_not_passed_over(tmp_path):
    """Images beside it alone would be read without their labels."""
    put(tmp_path / "labels.csv", {"name": "a", "label": "1"})
    put(tmp_path / "a.jpg", b"x")
    with pytest.raises(
        DataError,
        match=r"no known format \(labels\.csv: it has name, label\); looked for .*skincon \(Do not consider "
        r"this image\).*name it with data.format",
    ):
        detect(DataConfig(source=str(tmp_path)))
    assert detect(DataConfig(source=str(tmp_path), format="images")) == ("images", [str(tmp_path)])
    with pytest.raises(DataError, match=r"has no \.json or \.jsonl file, which data\.format slake needs"):
        detect(DataConfig(source=str(tmp_path), format="slake"))
    put(
        tmp_path / "coco/x.json",
        {"images": [{"file_name": "a.jpg"}], "annotations": [{"caption": "A lung."}]},
    )
    with pytest.raises(DataError, match="no known format"):
        detect(DataConfig(source=str(tmp_path / "coco")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no known format"):
        detect(DataConfig(source=str(tmp_path / "empty")))
    put(tmp_path / "bad/x.parquet", b"PAR1 not")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        detect(DataConfig(source=str(tmp_path / "bad")))


def index(source, **options):
    dataset = read_index(DataConfig(source=str(source), read_cpus=0.5, **options), 0.5)
    rows = sorted(dataset.take_all(), key=lambda row: row["sample_id"])
    assert all(list(row) == INDEX.names for row in rows)
    return rows


@pytest.mark.ray
def test_whole_sources(ray_cluster, tmp_path):
    """Splits and image folders as the sets are published; every image can be loaded."""
    image = saved(noise())
    put(tmp_path / "slake/test.json", [SLAKE])
    put(tmp_path / "slake/train.json", [SLAKE | {"qid": n} for n in (1, 2)])
    put(tmp_path / "slake/imgs/xmlab1/source.jpg", image)
    put(tmp_path / "omni/QA_information/Open-access/ACRIMA.json", [OMNI])
    put(tmp_path / "omni/Images/ACRIMA/Im553_g_ACRIMA.png", image)
    put(tmp_path / "pmc/train.csv", PMC_1)
    put(tmp_path / "pmc/train_2.csv", PMC_2)
    put(tmp_path / "pmc/images/PMC1064097_F1.jpg", image)
    put(tmp_path / "pmc/figures/PMC8253797_Fig4_41.jpg", image)
    put(tmp_path / "folder/train/metadata.csv", {"file_name": "a.png", "text": "A lung."})
    put(tmp_path / "folder/test/metadata.csv", {"file_name": "a.png", "text": "A bone."})
    put(tmp_path / "folder/train/a.png", image)
    put(tmp_path / "folder/test/a.png", image)
    put(
        tmp_path / "hub/data/train-00000-of-00001.parquet",
        [{"image": {"bytes": image, "path": None}, "question": "is it?", "answer": "no"}],
    )
    put(
        tmp_path / "hub/data/validation-00000-of-00001.parquet",
        [{"image": {"bytes": image, "path": None}, "question": "what?", "answer": "a lung"}],
    )
    (tmp_path / "tars").mkdir()
    for name in ("train", "test"):
        tar(tmp_path / f"tars/{name}-000000.tar", [("0.png", image), ("0.txt", b"A lung.")])
    put(tmp_path / "alone/val/p/1.png", image)
    put(tmp_path / "alone/2.png", image)
    splits = {
        "slake": ["test", "train", "train"],
        "omni": [None],
        "pmc": ["train"],
        "pmc/train_2.csv": ["train"],
        "folder": ["test", "train"],
        "hub": ["train", "val"],
        "tars": ["test", "train"],
        "alone": [None, "val"],
    }
    for name, wanted in splits.items():
        rows = index(tmp_path / name)
        assert [row["error"] for row in rows] == [None] * len(wanted)
        assert sorted(map(str, (row["split"] for row in rows))) == sorted(map(str, wanted))
        for row in rows:
            assert (row["image"] or read_image_bytes(row["image_file"], 10**6)) == image
    (moved,) = index(tmp_path / "pmc/train_2.csv", images=str(tmp_path / "elsewhere"))
    assert moved["image_file"] == str(tmp_path / "elsewhere/PMC8253797_Fig4_41.jpg")
