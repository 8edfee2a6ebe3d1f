"""SKINCON and CBIS-DDSM: one table row becomes attributes, a caption and questions."""

import json

import pytest

from medray.config import DataConfig
from medray.data.attribute_vocabularies import SKINCON, VALUES
from medray.ingest.source_index import _pieces, detect, index_rows
from medray.testbed.cells import write_cells
from tests.images.test_decoding import noise, saved
from tests.ingest.readers.test_vqa import csv_rows
from tests.support.sources import index as wild_index

MASS = {
    "patient_id": "P_00001",
    "breast_density": "3",
    "left or right breast": "LEFT",
    "image view": "CC",
    "abnormality id": "1",
    "abnormality type": "mass",
    "mass shape": "IRREGULAR-ARCHITECTURAL_DISTORTION",
    "mass margins": "SPICULATED",
    "assessment": "4",
    "pathology": "MALIGNANT",
    "subtlety": "4",
    "image file path": "Mass-Training_P_00001_LEFT_CC/1.2/3.4/000000.dcm",
    "cropped image file path": "Mass-Training_P_00001_LEFT_CC_1/5.6/7.8/000000.dcm\n",
    "ROI mask file path": "Mass-Training_P_00001_LEFT_CC_1/5.6/7.8/000001.dcm\n",
}
CALC = {
    "patient_id": "P_00005",
    "breast density": "2",
    "left or right breast": "RIGHT",
    "image view": "MLO",
    "abnormality id": "2",
    "abnormality type": "calcification",
    "calc type": "LUCENT_CENTER",
    "calc distribution": "N/A",
    "assessment": "2",
    "pathology": "BENIGN_WITHOUT_CALLBACK",
    "subtlety": "3",
    "image file path": "Calc-Test_P_00005_RIGHT_MLO/1/2/000000.dcm",
    "cropped image file path": "Calc-Test_P_00005_RIGHT_MLO_2/3/4/000001.dcm",
    "ROI mask file path": "",
}


def skin(image, present, excluded="0", missing=()):
    """A row of annotations_fitzpatrick17k.csv (pandas wrote its index too)."""
    concepts = {name: "1" if name in present else "0" for name in SKINCON if name not in missing}
    return {"": "0", "ImageID": image, **concepts, "Do not consider this image": excluded}


def said(rows, key):
    return [json.loads(row["payload"])[key] for row in rows if key in json.loads(row["payload"])]


def test_skincon_says_what_is_there_and_asks_about_as_much_that_is_not(tmp_path):
    rows = csv_rows(
        tmp_path,
        "annotations_ddi.csv",
        "skincon",
        [skin("000012.png", {"Papule", "Brown(Hyperpigmentation)"})],
    )
    assert {row["image_id"] for row in rows} == {"000012.png"}
    assert len({row["sample_id"] for row in rows}) == len(rows) == 2 + 4 + 2
    (attributes,) = said(rows, "attributes")
    assert (
        len(attributes),
        attributes["papule"],
        attributes["brown (hyperpigmentation)"],
        attributes["cyst"],
    ) == (48, "present", "present", "absent")
    assert said(rows, "caption") == ["papule, brown (hyperpigmentation)"]
    closed = [q for q in said(rows, "qa") if q["answer_type"] == "closed"]
    assert [q["reference"] for q in closed] == ["yes", "yes", "no", "no"]
    assert closed[0]["question"] == "Is papule seen?"
    assert all(
        attributes[q["attribute"]] == ("present" if q["reference"] == "yes" else "absent") for q in closed
    )
    for question in said(rows, "qa")[4:]:
        assert len(question["choices"]) == 4
        right = question["choices"]["ABCD".index(question["reference"])]
        assert right == question["attribute"]
        assert [attributes[c] for c in question["choices"]].count("present") == 1
        assert question["question"].startswith("Which of these is seen?\nA. ")


def test_skincon_draws_depend_on_the_image_alone(tmp_path):
    record = skin("a.jpg", {"Ulcer"})
    first = csv_rows(tmp_path, "one.csv", "skincon", [record])
    again = csv_rows(tmp_path, "two.csv", "skincon", [skin("b.jpg", {"Ulcer"}), record])
    assert [row["payload"] for row in again[-len(first) :]] == [row["payload"] for row in first]
    assert [row["payload"] for row in again[: len(first)]] != [row["payload"] for row in first]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (skin("a.jpg", {"Ulcer"}, excluded="1"), "Do not consider this image"),
        (skin("a.jpg", {"Ulcer"}, missing=("Cyst",)), "'Cyst' is missing"),
        (skin("a.jpg", ()) | {"Scar": "2"}, "'Scar' is '2'"),
        (skin("", {"Ulcer"}), "'ImageID' is empty"),
    ],
)
def test_skincon_rows_that_cannot_be_used(tmp_path, record, reason):
    (row,) = csv_rows(tmp_path, "annotations.csv", "skincon", [record])
    assert reason in row["error"]


def test_an_image_without_any_concept_has_attributes_alone(tmp_path):
    (row,) = csv_rows(tmp_path, "annotations.csv", "skincon", [skin("a.jpg", ())])
    assert set(json.loads(row["payload"])["attributes"].values()) == {"absent"}


def test_cbis_mass(tmp_path):
    """Values joined by a hyphen are named, and not asked for; the path's line feed is no part of it."""
    cropped = placed(tmp_path / "Mass-Training_P_00001_LEFT_CC_1/5.6/7.8/000000.dcm", (12, 10))
    rows = csv_rows(tmp_path, "mass_case_description_train_set.csv", "cbis-ddsm", [MASS])
    assert {row["image_file"] for row in rows} == {f"{cropped}#frame=0"}
    # sha256 of P_00001
    assert {(row["split"], row["modality"], row["group_id"]) for row in rows} == {
        ("train", "mammography", "8376b9883db7d3f0")
    }
    assert not any("P_00001" in row["sample_id"] + row["image_id"] + row["payload"] for row in rows)
    assert said(rows, "attributes") == [
        {
            "mass_shape": "irregular and architectural distortion",
            "mass_margins": "spiculated",
            "abnormality_type": "mass",
            "pathology": "malignant",
            "breast_density": "3",
            "assessment": "4",
            "subtlety": "4",
            "laterality": "left",
            "view": "cc",
        }
    ]
    assert said(rows, "caption") == [
        "irregular and architectural distortion mass shape, spiculated mass margins, mass, malignant"
    ]
    questions = {q["attribute"]: q for q in said(rows, "qa")}
    assert {name: q["reference"] for name, q in questions.items()} == {
        "mass_margins": "E",
        "abnormality_type": "B",
        "pathology": "B",
    }
    assert questions["mass_margins"]["question"] == (
        "What is the mass margins?\nA. circumscribed\nB. ill defined\nC. microlobulated\nD. obscured\nE. "
        "spiculated\nAnswer with the letter."
    )


def test_cbis_calcification(tmp_path):
    """Benign without callback is benign, N/A is nothing, and the full mammogram serves where the cropped
    one is not there.
    """
    full = placed(tmp_path / "Calc-Test_P_00005_RIGHT_MLO/1/2/000000.dcm", (30, 50))
    rows = csv_rows(tmp_path, "calc_case_description_test_set.csv", "cbis-ddsm", [CALC])
    assert {row["image_file"] for row in rows} == {f"{full}#frame=0"}
    assert {row["split"] for row in rows} == {"test"}
    assert said(rows, "caption") == ["lucent centered calc type, calcification, benign"]
    assert {q["attribute"]: q["reference"] for q in said(rows, "qa")} == {
        "calc_type": "G",
        "abnormality_type": "A",
        "pathology": "A",
    }
    assert said(rows, "qa")[0]["choices"] == list(VALUES["calc_type"])


def test_cbis_converted_to_png_and_two_abnormalities_of_one_mammogram(tmp_path):
    full = placed(tmp_path / "Mass-Training_P_00001_LEFT_CC/1.2/3.4/000000.png", (30, 50))
    rows = csv_rows(
        tmp_path, "mass_case_description_train_set.csv", "cbis-ddsm", [MASS, MASS | {"abnormality id": "2"}]
    )
    assert {row["image_file"] for row in rows} == {str(full)}
    assert len({row["image_id"] for row in rows}) == 1
    assert len({row["sample_id"] for row in rows}) == len(rows)


def placed(path, size):
    """An image of (width, height), of DICOM its header alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".dcm":
        width, height = (number.to_bytes(2, "little") for number in size)
        meta = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
        path.write_bytes(
            b"\0" * 128
            + b"DICM"
            + meta
            + b"\x28\x00\x10\x00US\x02\x00"
            + height
            + b"\x28\x00\x11\x00US\x02\x00"
            + width
        )
    else:
        path.write_bytes(saved(noise(size), {".jpg": "JPEG", ".png": "PNG"}[path.suffix]))
    return path


NAME = "Mass-Training_P_00001_LEFT_CC"
LAYOUTS = {  # (mammogram, crop, mask) below the folder of the images
    "first": (f"{NAME}/1.2/3.4/000000.dcm", f"{NAME}_1/5.6/7.8/000000.dcm", f"{NAME}_1/5.6/7.8/000001.dcm"),
    "first, exchanged in the table": (
        f"{NAME}/1.2/3.4/000000.dcm",
        f"{NAME}_1/5.6/7.8/000001.dcm",
        f"{NAME}_1/5.6/7.8/000000.dcm",
    ),
    "classic": (f"{NAME}/1.2/3.4/1-1.dcm", f"{NAME}_1/5.6/7.8/1-2.dcm", f"{NAME}_1/5.6/7.8/1-1.dcm"),
    "descriptive": (
        f"{NAME}/07-20-2016-DDSM-NA-74994/1.000000-full mammogram images-24515/1-1.dcm",
        f"{NAME}_1/07-20-2016-DDSM-NA-11111/1.000000-ROI mask images-22222/1-1.dcm",
        f"{NAME}_1/07-20-2016-DDSM-NA-11111/1.000000-ROI mask images-22222/1-2.dcm",
    ),
    "descriptive, a folder each": (
        f"{NAME}/07-20-2016-DDSM-NA-74994/1.000000-full mammogram images-24515/1-1.dcm",
        f"{NAME}_1/07-21-2016-DDSM-NA-33333/1.000000-cropped images-44444/1-1.dcm",
        f"{NAME}_1/07-20-2016-DDSM-NA-11111/1.000000-ROI mask images-22222/1-1.dcm",
    ),
    "by series": ("3.4/1-1.dcm", "7.8/1-2.dcm", "7.8/1-1.dcm"),
    "Kaggle": ("jpeg/3.4/1-172.jpg", "jpeg/7.8/2-241.jpg", "jpeg/7.8/1-263.jpg"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_cbis_layouts(tmp_path, layout):
    """The crop is the smaller file of the abnormality, whatever its name; the mammogram stands in for it
    where it is gone or damaged.
    """
    full, crop, mask = (
        placed(tmp_path / file, size) for file, size in zip(layout, [(30, 50), (12, 10), (30, 50)])
    )
    frame = "#frame=0" if full.suffix == ".dcm" else ""
    rows = csv_rows(tmp_path, "mass_case_description_train_set.csv", "cbis-ddsm", [MASS])
    assert {(row["error"], row["image_file"]) for row in rows} == {(None, f"{crop}{frame}")}
    # sha256 of the table's path without .dcm: the same in every layout
    assert {row["image_id"] for row in rows} == {"cbis-9d8817d90418bf54"}
    crop.unlink()
    rows = csv_rows(tmp_path, "mass_case_description_train_set.csv", "cbis-ddsm", [MASS])
    assert {row["image_file"] for row in rows} == {f"{full}{frame}"}
    crop.write_bytes(b"damaged")
    rows = csv_rows(tmp_path, "mass_case_description_train_set.csv", "cbis-ddsm", [MASS])
    assert {row["image_file"] for row in rows} == {f"{full}{frame}"}
    placed(crop, (12, 10))
    mask.unlink()
    rows = csv_rows(tmp_path, "mass_case_description_train_set.csv", "cbis-ddsm", [MASS])
    assert {row["image_file"] for row in rows} == {f"{crop}{frame}"}


def test_cbis_crop_and_mask_in_series_of_their_own(tmp_path):
    """Kaggle: the table names two series, and the one it calls the crop's holds the mask."""
    record = MASS | {"ROI mask file path": f"{NAME}_1/5.6/9.9/000000.dcm\n"}
    for file, size in (("3.4/1-1.jpg", (30, 50)), ("7.8/1-2.jpg", (30, 50)), ("9.9/1-3.jpg", (12, 10))):
        placed(tmp_path / "jpeg" / file, size)
    rows = csv_rows(tmp_path, "mass_case_description_train_set.csv", "cbis-ddsm", [record])
    assert {row["image_file"] for row in rows} == {str(tmp_path / "jpeg/9.9/1-3.jpg")}


def test_cbis_sources_as_they_are_unpacked(tmp_path):
    """Kaggle's csv/ beside jpeg/, whose dicom_info.csv is no table of cases; the NBIA Data Retriever's
    CBIS-DDSM/ beside the tables.
    """
    kaggle, nbia = tmp_path / "kaggle", tmp_path / "nbia"
    placed(kaggle / "jpeg/3.4/1-1.jpg", (30, 50))
    placed(nbia / "CBIS-DDSM" / LAYOUTS["descriptive"][0], (30, 50))
    for folder in (kaggle / "csv", nbia):
        folder.mkdir(exist_ok=True)
        csv_rows(folder, "mass_case_description_train_set.csv", "cbis-ddsm", [MASS])
    (kaggle / "csv/dicom_info.csv").write_text(
        "file_path,image_path,SeriesDescription\nCBIS-DDSM/dicom/3.4/1-1.dcm,CBIS-DDSM/jpeg/3.4/1-1.jpg,full "
        "mammogram images\n"
    )
    for folder, file in (
        (kaggle, "jpeg/3.4/1-1.jpg"),
        (nbia, f"CBIS-DDSM/{LAYOUTS['descriptive'][0]}#frame=0"),
    ):
        config = DataConfig(source=str(folder))
        kind, files = detect(config)
        assert (kind, len(files)) == ("cbis-ddsm", 1)
        (piece,) = _pieces(kind, config, files)
        assert {row["image_file"] for row in index_rows(**piece)} == {str(folder / file)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pathology": "UNPROVEN"}, "pathology is 'unproven'"),
        ({"abnormality type": ""}, "'abnormality type' is empty"),
        ({"image file path": "/etc/passwd"}, "leads out of"),
        ({"patient_id": ""}, "'patient_id' is empty"),
        ({"cropped image file path": f"../../{MASS['image file path']}"}, "leads out of"),
        ({}, "neither its crop nor its mammogram is there"),
    ],
)
def test_cbis_rows_that_cannot_be_used(tmp_path, change, reason):
    (row,) = csv_rows(tmp_path, "mass_case_description_train_set.csv", "cbis-ddsm", [MASS | change])
    assert reason in row["error"]
    assert "P_00001" not in row["error"] + row["sample_id"]


def test_rendered_cells_have_no_field_that_is_not_used(tmp_path):
    write_cells(tmp_path, 4, seed=0, val_fraction=0.5)
    kind, rows, notes = wild_index(tmp_path)
    assert (kind, len(rows), notes.counts) == ("wbcatt", 4, {})
