"""Descriptions and multiple-choice questions of attribute tables, as instruction-free tuning uses them (arXiv
2603.19482).

The texts are those of the authors' code (myeongkyunkang/InstFree, tools/): a model is tuned on the
descriptions alone and asked the questions. Pure functions of attribute values, such as records.SAMPLE keeps
them; scores are made by `medray.evaluation.metrics.mcq`, which reads the answers strictly. No images, no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from medray.data.attribute_questions import ATTRIBUTES
from medray.data.attribute_vocabularies import SKINCON, VALUES, word
from medray.data.description_shuffling import separated
from medray.errors import DataError
from medray.stable_draws import digest, drawn

ABSENT = ("no", "nil", "absent")
PRESENT = ("yes", "present")
LEAD = "The correct answer is"
_ASKED_AS = {"mass_margins": "mass margin"}


@dataclass(frozen=True)
class Form:
    """How the attributes of a data set are described and asked about.

    Attributes:
        order: the attributes in the order of the description; others are left out.
        values: the closed set of each attribute that is asked about, in the order of the options' letters.
        bare: attributes of which the value alone is said ("Neutrophil", not "Neutrophil label").
        drawn_options: attributes that offer at most `most_options` of their values, in random order; the
            others offer all.
    """

    order: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    bare: tuple[str, ...] = ()
    drawn_options: tuple[str, ...] = ()
    most_options: int = 5


def _offered(values: Sequence[str]) -> tuple[str, ...]:
    """An attribute's values as the authors list them: sorted, yes before no, without nil (a nil attribute
    is not asked about).
    """
    return (
        ("yes", "no")
        if set(values) == {"yes", "no"}
        else tuple(sorted(value for value in values if value != "nil"))
    )


WBCATT = Form(
    order=(
        "cell_size",
        "cell_shape",
        "nucleus_shape",
        "nuclear_cytoplasmic_ratio",
        "chromatin_density",
        "cytoplasm_vacuole",
        "cytoplasm_texture",
        "cytoplasm_colour",
        "granularity",
        "granule_type",
        "granule_colour",
        "label",
    ),
    values={name: _offered(attribute.values) for name, attribute in ATTRIBUTES.items()},
    bare=("label",),
)
CBIS_DDSM = Form(
    order=("mass_shape", "mass_margins", "calc_type", "calc_distribution", "abnormality_type", "pathology"),
    values=VALUES,
    bare=("abnormality_type", "pathology"),
    drawn_options=("mass_shape", "mass_margins", "calc_type", "calc_distribution"),
)
SKINCON_CONCEPTS = Form(order=tuple(word(concept) for concept in SKINCON), values={})

FORMS = {"wbcatt": WBCATT, "cbis-ddsm": CBIS_DDSM, "skincon": SKINCON_CONCEPTS}
"""By data.format. The synthetic cells have WBCAtt's attributes."""


def describe_attributes(values: Mapping[str, str], form: Form) -> str:
    """The description of one image: "big cell size, round cell shape, ..., granularity, ..., Neutrophil".

    Of an attribute that is there (yes, present) its name is said, of one that is absent (no, nil) nothing, of
    the others the value and the name, or the value alone (form.bare). Attributes missing in `values` are left
    out.

    Raises DataError where nothing is there to be said.
    """
    said = [
        _segment(name, values[name], form)
        for name in form.order
        if name in values and values[name] not in ABSENT
    ]
    if not said:
        raise DataError(
            f"no attribute of {', '.join(form.order[:3])}, ... is given, or all are absent: there is nothing "
            "to describe"
        )
    return ", ".join(said)


def _segment(name: str, value: str, form: Form) -> str:
    plain = name.replace("_", " ")
    if value in PRESENT:
        return plain
    return value if name in form.bare else f"{value} {plain}"


def choice_questions(values: Mapping[str, str], form: Form, sample_id: str) -> list[dict[str, Any]]:
    """The evaluation's questions about one image: one for each attribute of form.values whose value is among
    the options (a nil attribute is not), in the order of the description. Rows as of
    medray.data.attribute_questions.question.

    Args:
        sample_id: fixes the options of form.drawn_options and their order.

    The authors ask one attribute per image of WBCAtt, drawn once; all are asked here, which gives less noise.
    """
    rows = []
    for name in form.order:
        right, options = values.get(name), form.values.get(name, ())
        if right not in options:
            continue
        if name in form.drawn_options:
            options = draw_options(right, options, form.most_options, sample_id, name)
        rows.append(
            choice_question(_ASKED_AS.get(name, name.replace("_", " ")), options, options.index(right), name)
        )
    return rows


def draw_options(right: str, pool: Sequence[str], most: int, *keys: str) -> list[str]:
    """The right option and up to most - 1 others of the pool, in an order that the keys fix. SKINCON's
    pool is the descriptions of the data set's other images.
    """
    others = drawn((value for value in dict.fromkeys(pool) if value != right), "options", *keys)
    return sorted([right, *others[: most - 1]], key=lambda value: digest("order", *keys, value))


def choice_question(
    asked: str, options: Sequence[str], right: int, attribute: str | None = None
) -> dict[str, Any]:
    """One multiple-choice question in the words of the authors' code ("Response with" is theirs); `right`
    is an index.
    """
    letters = ascii_uppercase[: len(options)]
    lines = [
        f"What is the {asked}?",
        *(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)),
    ]
    lines.append(
        f'Response with only the letter of the correct choice, starting with "{LEAD} '
        f'[{" or ".join(letters)}].".'
    )
    return {
        "attribute": attribute,
        "answer_type": "mcq",
        "question": "\n".join(lines),
        "reference": letters[right],
        "choices": list(options),
    }


def stated_choices(count: int) -> list[str]:
    """The answers such a question asks for, one per option: what to take the log-likelihood of."""
    return [f"{LEAD} {letter}." for letter in ascii_uppercase[:count]]


def leaks_description(answer: str, form: Form) -> bool:
    """Whether an answer to a question is an attribute list, as the training's descriptions are: at least
    two of its parts between commas are, word for word (capitals aside), what a description of this form
    can say.
    """
    sayable = {
        _segment(name, value, form).lower()
        for name in form.order
        for value in form.values.get(name, PRESENT)
        if value not in ABSENT
    }
    parts, _ = separated(answer)
    return sum(part.lower() in sayable for part in parts) >= 2
