"""Response shuffling: where texts are parted, that nothing is lost, and which draws repeat."""

from collections import Counter

import pytest

from medray.data.description_shuffling import order, sentences, separated, shuffled
from medray.errors import ConfigError

CELL = "big cell size, round cell shape, light blue cytoplasm colour, granularity, Neutrophil"
REPORT = "The lungs are clear. A nodule of 2.5 cm was seen by Dr. Smith. No effusion."


def orders(text, **kwargs):
    return {shuffled(text, f"s{n}", 0, 0, **kwargs) for n in range(200)}


def test_every_order_of_an_attribute_list():
    assert orders("a, b, c") == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}


def test_the_final_mark_stays_and_words_between_parts_belong_to_them():
    assert orders("a, b and c.") == {"a, b and c.", "b and c, a."}
    assert "and c, a, b." in orders("a, b, and c.")
    assert orders("Is it a, b?!") == {"Is it a, b?!", "b, Is it a?!"}


@pytest.mark.parametrize(
    ("text", "separator", "parts", "mark"),
    [
        (
            CELL,
            ",",
            ["big cell size", "round cell shape", "light blue cytoplasm colour", "granularity", "Neutrophil"],
            "",
        ),
        (" a ,b,, c , ", ",", ["a", "b", "c"], ""),
        (
            "nodule (2 cm, calcified), 1,200 cells, round",
            ",",
            ["nodule (2 cm, calcified)", "1,200 cells", "round"],
            "",
        ),
        ("size 1, 2, 3 cm.", ",", ["size 1", "2", "3 cm"], "."),
        ("a; b, c; d", ";", ["a", "b, c", "d"], ""),
        ("a\nb, c\nd", "\n", ["a", "b, c", "d"], ""),
        ("alone.", ",", ["alone"], "."),
        ("", ",", [], ""),
    ],
)
def test_parts_of_lists(text, separator, parts, mark):
    assert separated(text, separator) == (parts, mark)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (REPORT, ["The lungs are clear.", "A nodule of 2.5 cm was seen by Dr. Smith.", "No effusion."]),
        (
            "Effusion? No. Fracture of rib No. 3! See Fig. 2",
            ["Effusion?", "No.", "Fracture of rib No. 3!", "See Fig. 2."],
        ),
        (
            "Masses, e.g. Lymphoma. I.e. nothing new vs. March.",
            ["Masses, e.g. Lymphoma.", "I.e. nothing new vs. March."],
        ),
        ("Read by J. Doe. S. aureus grew.", ["Read by J. Doe.", "S. aureus grew."]),
        ("Compared to ___. Heart size is\nnormal.", ["Compared to ___.", "Heart size is\nnormal."]),
        (
            "FINDINGS:\n\nClear lungs.\n\nIMPRESSION: 1. Normal. 2. No mass.",
            ["FINDINGS:\n\nClear lungs.", "IMPRESSION: 1. Normal.", "2. No mass."],
        ),
        ("A nodule\n \nNo effusion", ["A nodule.", "No effusion."]),
        ("Left tube. unchanged since March. New line.", ["Left tube. unchanged since March.", "New line."]),
        (
            "the heart is normal . no effusion . a tube at 2.5 cm .",
            ["the heart is normal .", "no effusion .", "a tube at 2.5 cm ."],
        ),
        ('He said "clear." (It is.) Is it?', ['He said "clear."', "(It is.)", "Is it?"]),
        ("Hmm... A mass", ["Hmm...", "A mass."]),
        ("One sentence without a mark", ["One sentence without a mark"]),
        ("  ", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_shuffled_sentences_are_the_same_sentences():
    found = orders(REPORT, parts="sentences")
    assert len(found) == 6
    assert {tuple(sorted(sentences(text))) for text in found} == {tuple(sorted(sentences(REPORT)))}
    assert orders("It is big. It is round", parts="sentences") == {
        "It is big. It is round.",
        "It is round. It is big.",
    }


def test_parts_are_neither_lost_nor_doubled():
    twice = "a, b, a, c"
    for n in range(50):
        for text in (CELL, twice):
            assert Counter(separated(shuffled(text, f"s{n}", 1, 2))[0]) == Counter(separated(text)[0])


@pytest.mark.parametrize("text", ["", "  one part. ", "Neutrophil", "1,200", "(a, b)"])
def test_a_single_part_is_left_alone(text):
    assert shuffled(text, "s", 0, 0) == text
    assert shuffled(text, "s", 0, 0, parts="sentences") == text


def test_separators_keep_their_form():
    assert orders("a\nb", separator="\n") == {"a\nb", "b\na"}
    assert orders("a | b", separator=" | ") == {"a | b", "b | a"}
    assert orders("a;b.", separator=";") == {"a; b.", "b; a."}


def test_draws_are_fixed_by_seed_sample_and_epoch():
    assert order(5, "image-7", epoch=2, seed=1) == [3, 4, 2, 1, 0]  # as on every machine
    assert order(0, "s", 0, 0) == [] and order(1, "s", 0, 0) == [0]

    def draws(epoch, seed):
        return [order(4, f"s{n}", epoch, seed) for n in range(500)]

    assert draws(0, 0) == draws(0, 0)
    for other in (draws(1, 0), draws(0, 1)):
        same = sum(one == two for one, two in zip(draws(0, 0), other, strict=True))
        assert 5 <= same <= 45  # 500 / 24 = 21 by chance


def test_all_orders_are_equally_likely():
    counts = Counter(tuple(order(3, f"s{n}", 0, 0)) for n in range(6000))
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert len(counts) == 6 and chi_square < 20.5  # 99.9 % of 5 degrees of freedom


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="allowed values: separator, sentences"):
        shuffled("a, b", "s", 0, 0, parts="words")
    with pytest.raises(ConfigError, match="separator is empty"):
        shuffled("a, b", "s", 0, 0, separator="")
