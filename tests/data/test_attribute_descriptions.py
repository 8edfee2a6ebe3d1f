"""Descriptions of attribute tables and the questions about them: the authors' words, worked by hand."""

import json
from collections import Counter

import pytest

from medray.data.attribute_descriptions import (
    CBIS_DDSM,
    FORMS,
    SKINCON_CONCEPTS,
    WBCATT,
    choice_question,
    choice_questions,
    describe_attributes,
    draw_options,
    leaks_description,
    stated_choices,
)
from medray.data.attribute_questions import ATTRIBUTES
from medray.data.description_shuffling import separated
from medray.errors import DataError
from medray.evaluation.metrics import mcq
from tests.ingest.readers.test_concepts import CALC, MASS, placed, said, skin
from tests.ingest.readers.test_vqa import csv_rows

CELL = {
    "label": "Neutrophil",
    "cell_size": "big",
    "cell_shape": "round",
    "nucleus_shape": "unsegmented-band",
    "nuclear_cytoplasmic_ratio": "low",
    "chromatin_density": "densely",
    "cytoplasm_vacuole": "yes",
    "cytoplasm_texture": "clear",
    "cytoplasm_colour": "light blue",
    "granule_type": "small",
    "granule_colour": "pink",
    "granularity": "yes",
    "img_name": "BNE_1.jpg",
}
BARE_CELL = CELL | {
    "label": "Lymphocyte",
    "cytoplasm_vacuole": "no",
    "granule_type": "nil",
    "granule_colour": "nil",
    "granularity": "no",
}


def test_wbcatt_description():
    assert describe_attributes(CELL, WBCATT) == (
        "big cell size, round cell shape, unsegmented-band nucleus shape, low nuclear cytoplasmic ratio, "
        "densely chromatin density, cytoplasm vacuole, "
        "clear cytoplasm texture, light blue cytoplasm colour, granularity, small granule type, pink granule "
        "colour, Neutrophil"
    )
    assert describe_attributes(BARE_CELL, WBCATT) == (
        "big cell size, round cell shape, unsegmented-band nucleus shape, low nuclear cytoplasmic ratio, "
        "densely chromatin density, "
        "clear cytoplasm texture, light blue cytoplasm colour, Lymphocyte"
    )
    assert sorted(WBCATT.order) == sorted(ATTRIBUTES) and WBCATT.order[-1] == "label"


def test_skincon_and_cbis_descriptions_are_the_readers_captions(tmp_path):
    placed(tmp_path / "Mass-Training_P_00001_LEFT_CC_1/5.6/7.8/000000.dcm", (12, 10))
    placed(tmp_path / "Calc-Test_P_00005_RIGHT_MLO/1/2/000000.dcm", (30, 50))
    cases = (
        (
            "skincon",
            "annotations_ddi.csv",
            skin("000012.png", {"Papule", "Brown(Hyperpigmentation)", "Cyst"}),
            "papule, brown (hyperpigmentation), cyst",
        ),
        (
            "cbis-ddsm",
            "mass_case_description_train_set.csv",
            MASS | {"mass shape": "IRREGULAR"},
            "irregular mass shape, spiculated mass margins, mass, malignant",
        ),
        (
            "cbis-ddsm",
            "calc_case_description_test_set.csv",
            CALC,
            "lucent centered calc type, calcification, benign",
        ),
    )
    for kind, file, record, expected in cases:
        rows = csv_rows(tmp_path, file, kind, [record])
        assert (
            [describe_attributes(values, FORMS[kind]) for values in said(rows, "attributes")]
            == said(rows, "caption")
            == [expected]
        )


def test_nothing_to_describe_is_an_error():
    with pytest.raises(DataError, match="nothing to describe"):
        describe_attributes({"papule": "absent"}, SKINCON_CONCEPTS)


def test_wbcatt_questions_offer_all_values_in_the_authors_order():
    rows = {row["attribute"]: row for row in choice_questions(CELL, WBCATT, "BNE_1")}
    assert list(rows) == list(WBCATT.order)
    assert rows["nucleus_shape"] == {
        "attribute": "nucleus_shape",
        "answer_type": "mcq",
        "reference": "D",
        "choices": [
            "irregular",
            "segmented-bilobed",
            "segmented-multilobed",
            "unsegmented-band",
            "unsegmented-indented",
            "unsegmented-round",
        ],
        "question": "What is the nucleus shape?\nA. irregular\nB. segmented-bilobed\nC. "
        "segmented-multilobed\nD. unsegmented-band\nE. unsegmented-indented\n"
        "F. unsegmented-round\nResponse with only the letter of the correct choice, starting with "
        '"The correct answer is [A or B or C or D or E or F].".',
    }
    assert rows["granularity"]["choices"] == ["yes", "no"] and rows["granularity"]["reference"] == "A"
    assert rows["granule_colour"]["choices"] == ["pink", "purple", "red"]
    assert rows["label"]["question"].startswith("What is the label?\nA. Basophil\n")
    assert Counter(len(row["choices"]) for row in rows.values()) == {2: 7, 3: 3, 5: 1, 6: 1}
    assert set(WBCATT.order) - {row["attribute"] for row in choice_questions(BARE_CELL, WBCATT, "x")} == {
        "granule_type",
        "granule_colour",
    }


def test_cbis_questions_offer_five_shapes_and_both_diagnoses():
    values = {
        "mass_shape": "irregular and oval",
        "mass_margins": "spiculated",
        "calc_type": "punctate",
        "abnormality_type": "mass",
        "pathology": "benign",
        "view": "cc",
    }
    rows = {row["attribute"]: row for row in choice_questions(values, CBIS_DDSM, "a")}
    # no single value of mass_shape
    assert list(rows) == ["mass_margins", "calc_type", "abnormality_type", "pathology"]
    assert rows["mass_margins"]["question"].startswith("What is the mass margin?\nA. ")
    assert rows["pathology"]["choices"] == ["benign", "malignant"] and rows["pathology"]["reference"] == "A"
    assert len(rows["calc_type"]["choices"]) == 5 == len(set(rows["calc_type"]["choices"])) and set(
        rows["calc_type"]["choices"]
    ) <= set(CBIS_DDSM.values["calc_type"])
    assert rows["calc_type"]["choices"]["ABCDE".index(rows["calc_type"]["reference"])] == "punctate"
    assert choice_questions(values, CBIS_DDSM, "a") == list(rows.values())
    places = Counter(choice_questions(values, CBIS_DDSM, f"s{n}")[1]["reference"] for n in range(500))
    assert set(places) == set("ABCDE") and all(70 < count < 130 for count in places.values())


def test_skincon_options_are_other_images_descriptions():
    pool = ["papule", "papule, scale", "cyst", "cyst", "ulcer, crust", "wheal, erythema"]
    options = draw_options("cyst", pool, 3, "image-1")
    assert len(options) == 3 == len(set(options)) and "cyst" in options and set(options) <= set(pool)
    assert sorted(draw_options("cyst", pool[:3], 5, "image-1")) == ["cyst", "papule", "papule, scale"]
    assert len({tuple(draw_options("cyst", pool[:3], 5, f"image-{n}")) for n in range(100)}) == 6
    question = choice_question("dermatologic feature", ["cyst", "papule, scale"], 1)
    assert question["question"] == (
        "What is the dermatologic feature?\nA. cyst\nB. papule, scale\nResponse with only the letter of the "
        'correct choice, starting with "The correct answer is [A or B].".'
    )


def test_answers_are_read_strictly():
    """The project's strict letter metric on the answers these questions get: (hit, format kept)."""
    question = choice_questions(CELL, WBCATT, "x")[2]
    count = len(question["choices"])
    assert stated_choices(count)[3] == "The correct answer is D."
    assert [mcq(answer, question["reference"], count) for answer in stated_choices(count)] == [
        (float(n == 3), True) for n in range(6)
    ]
    for answer, result in (
        ("The correct answer is [D].", (1.0, True)),
        ("The correct answer is A. No: The correct answer is **D**", (1.0, True)),
        ("D", (1.0, True)),
        ("The correct answer is D. unsegmented-band", (0.0, False)),
        ("The correct answer is unsegmented-band.", (0.0, False)),
        ("The correct answer is G.", (0.0, False)),
        (describe_attributes(CELL, WBCATT), (0.0, False)),
        ("The correct answer is [A or B].", (0.0, False)),
        ("", (0.0, False)),
    ):
        assert mcq(answer, question["reference"], count) == result, answer


@pytest.mark.parametrize(
    ("answer", "form", "leaked"),
    [
        (describe_attributes(CELL, WBCATT), WBCATT, True),
        ("Neutrophil, Granularity, pink granule colour.", WBCATT, True),
        # the first part is no attribute, two are
        ("The cell has a big cell size, round cell shape, granularity", WBCATT, True),
        ("The correct answer is D.", WBCATT, False),
        ("neutrophil", WBCATT, False),
        ("big cell size", WBCATT, False),
        ("It is big, round, and blue", WBCATT, False),  # values, but not as the descriptions say them
        ("The correct answer is A, big cell size", WBCATT, False),
        ("papule, brown (hyperpigmentation)", SKINCON_CONCEPTS, True),
        ("big cell size, round cell shape", SKINCON_CONCEPTS, False),
        ("mass, malignant", CBIS_DDSM, True),
        ("oval mass shape", CBIS_DDSM, False),
        ("", WBCATT, False),
    ],
)
def test_leaks(answer, form, leaked):
    assert leaks_description(answer, form) is leaked


@pytest.mark.real_data
def test_real_wbcatt(real_data):
    """8 to 12 parts as the paper's code gives, and the chance floor that is known for its test split
    (40.9 %).
    """
    records = [json.loads(line) for line in (real_data / "wbcatt" / "records.jsonl").open(encoding="utf-8")]
    for split, rows, parts in (
        ("train", 6151, {8: 1176, 9: 386, 10: 2, 11: 4510, 12: 77}),
        ("val", 1028, {8: 195, 9: 62, 11: 753, 12: 18}),
    ):
        some = [record for record in records if record["split"] == split]
        descriptions = [describe_attributes(record, WBCATT) for record in some]
        assert len(some) == rows and Counter(len(separated(text)[0]) for text in descriptions) == parts
        assert all(leaks_description(text, WBCATT) for text in descriptions)
        chances = [
            1 / len(question["choices"])
            for record in some
            for question in choice_questions(record, WBCATT, record["img_name"])
        ]
        assert sum(chances) / len(chances) == pytest.approx(0.409, abs=0.001)
