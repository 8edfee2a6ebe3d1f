"""Paths in messages: they name the image and not the patient."""

import pytest

from medray.pseudonyms import patients_of, pseudonym, shortened, shown_path

KEY = b"0123456789abcdef"


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("files/p10/p10000032/s50414267/02aa.jpg", ("10000032", "50414267", "p10/")),
        ("sub-01/anat/T1.png", ("sub-01",)),
        ("patient00001/study1/view1_frontal.jpg", ("00001",)),
        ("Mass-Training_P_00001_LEFT_CC/1-1.png", ("00001",)),
        ("00000013_005.png", ("00000013",)),
        ("DOE^JANE/1.png", ("DOE", "JANE")),
        ("2019-03-07/1.png", ("2019-03-07",)),
        ("20190307_1.png", ("20190307",)),
        ("Patient 7/x.png", ("Patient 7",)),
        ("mrn_4711/x.png", ("4711",)),
        ("case12/slice3.png", ("case12",)),
    ],
)
def test_what_may_be_a_patient_is_hashed(path, hidden):
    shown = shown_path(path, key=KEY)
    assert not any(part in shown for part in hidden)
    assert "id-" in shown and shown.rpartition("/")[2].endswith(path[-4:])
    assert shown == shown_path(path, key=KEY) != shown_path(path, key=KEY[::-1])


@pytest.mark.parametrize(
    "path",
    [
        "xmlab12/source.jpg",
        "images/BNE_1.jpg",
        "figures/film0.png/film1.png",
        "train/photo.HEIC",
        "imgs/slides2/a.png",
        "a b/c#d.png",
    ],
)
def test_what_names_no_patient_stays(path):
    assert shown_path(path) == path


def test_the_records_own_patient_is_hashed_wherever_it_stands():
    record = {
        "Patient_ID": "LIDC-0078",
        "PatientName": "Jane Doe",
        "caption": "x",
        "subject-id": 417,
        "id": "12",
    }
    patients = patients_of(record)
    assert sorted(patients) == ["417", "Jane Doe", "LIDC-0078"]
    shown = shown_path("data/lidc-0078_v417/jane doe.png", patients)
    assert shown.count("id-") == 3 and "0078" not in shown and "417" not in shown and "doe" not in shown
    assert shown.startswith("data/id-" + pseudonym("lidc-0078", None)[:8])


def test_messages_are_short_and_hold_no_blob():
    text = shortened("reason: " + "iVBORw0KGgoAAAANSUhEUg" * 100 + " end\n\0\udc80" + "word " * 200)
    assert len(text) <= 200 and "iVBORw0KGgoAAAAN..." in text and "end???" in text
