"""Conversations and evaluation questions made from attribute records (pure functions, no images, no Ray).

A record is a dict of attribute values, such as one row of WBCAtt (Tsutsui et al., NeurIPS 2023): the cell
type and 11 morphological attributes. `ATTRIBUTES` lists them with WBCAtt's exact value sets; `testbed.corpus`
uses the same functions with another schema. Answers are short and scorable by exact match after lower-casing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

KINDS = ("open", "closed", "mcq")
LETTERS = "ABCD"

DESCRIBE_PHRASINGS = (
    "Describe the image in detail.",
    "Describe the image.",
    "What do you see in the image?",
    "Please describe the image in detail.",
    "Describe this medical image in detail.",
)


@dataclass(frozen=True)
class Attribute:
    """One attribute: the values a record may hold and how people ask about it.

    `open` and `closed` are phrasings; the first of each is the canonical one used for evaluation. `closed`
    phrasings contain `{word}`. `words` maps a raw value to the word used in text where the raw value reads
    badly.
    """

    values: tuple[str, ...]
    open: tuple[str, ...]
    closed: tuple[str, ...]
    words: Mapping[str, str] = field(default_factory=dict)

    def word(self, value: str) -> str:
        """The answer text of a raw value."""
        return self.words.get(value, value.lower())

    def value_in(self, stem: str) -> str | None:
        """The raw value that a closed question names; None for a question in no closed phrasing of this
        attribute.
        """
        return next(
            (
                value
                for value in self.values
                if any(phrasing.format(word=self.word(value)) == stem for phrasing in self.closed)
            ),
            None,
        )


def noun_attribute(values: Sequence[str], noun: str, of: str, more: Sequence[str] = (), **kw) -> Attribute:
    """An attribute that is asked for by a noun phrase: "What is the <noun> of <of>?"."""
    return Attribute(
        tuple(values),
        (f"What is the {noun}?", f"What is the {noun} in the image?", f"State the {noun} of {of}.", *more),
        (
            f"Is the {noun} {{word}}?",
            f"Would you call the {noun} {{word}}?",
            f"Does {of} have {{word}} as its {noun}?",
        ),
        **kw,
    )


ATTRIBUTES: dict[str, Attribute] = {
    "label": noun_attribute(
        ("Basophil", "Eosinophil", "Lymphocyte", "Monocyte", "Neutrophil"),
        "cell type",
        "this cell",
        ("Which type of white blood cell is this?",),
    ),
    "cell_size": noun_attribute(("big", "small"), "cell size", "this cell", ("How large is the cell?",)),
    "cell_shape": noun_attribute(
        ("round", "irregular"), "cell shape", "this cell", ("Which shape does the outline of the cell have?",)
    ),
    "nucleus_shape": noun_attribute(
        (
            "unsegmented-band",
            "unsegmented-round",
            "unsegmented-indented",
            "segmented-bilobed",
            "segmented-multilobed",
            "irregular",
        ),
        "nucleus shape",
        "this cell",
        ("Which shape does the nucleus have?",),
    ),
    "nuclear_cytoplasmic_ratio": noun_attribute(
        ("high", "low"),
        "nuclear-cytoplasmic ratio",
        "this cell",
        ("How large is the nucleus relative to the cytoplasm?",),
    ),
    "chromatin_density": noun_attribute(
        ("densely", "loosely"), "chromatin density", "this cell", ("How is the chromatin packed?",)
    ),
    "cytoplasm_vacuole": Attribute(
        ("yes", "no"),
        (
            "Are vacuoles present or absent?",
            "Are cytoplasmic vacuoles present or absent in the image?",
            "State whether vacuoles are present or absent.",
        ),
        (
            "Are vacuoles {word}?",
            "Are vacuoles {word} in the cytoplasm?",
            "Would you call the vacuoles {word}?",
        ),
        {"yes": "present", "no": "absent"},
    ),
    "cytoplasm_texture": noun_attribute(
        ("clear", "frosted"), "cytoplasm texture", "this cell", ("How does the cytoplasm look?",)
    ),
    "cytoplasm_colour": noun_attribute(
        ("light blue", "blue", "purple blue"),
        "cytoplasm colour",
        "this cell",
        ("Which colour does the cytoplasm have?",),
    ),
    "granule_type": noun_attribute(
        ("small", "round", "coarse", "nil"),
        "granule type",
        "this cell",
        ("Which type of granules are there?",),
    ),
    "granule_colour": noun_attribute(
        ("pink", "red", "purple", "nil"),
        "granule colour",
        "this cell",
        ("Which colour do the granules have?",),
    ),
    "granularity": Attribute(
        ("yes", "no"),
        (
            "Is the cell granular or agranular?",
            "Is the cytoplasm in the image granular or agranular?",
            "State whether the cell is granular or agranular.",
        ),
        ("Is the cell {word}?", "Is the cytoplasm {word}?", "Would you call the cell {word}?"),
        {"yes": "granular", "no": "agranular"},
    ),
}
"""WBCAtt's cell type (`label`) and its 11 morphological attributes, in the order of its CSV."""

MORPHOLOGY = tuple(name for name in ATTRIBUTES if name != "label")
"""The 11 attributes over which "mean attribute accuracy" is taken."""

DESCRIPTIONS = (
    "This is a {cell_size} {cell_shape} {label}. The nucleus shape is {nucleus_shape}, the chromatin is "
    "{chromatin_density} "
    "packed and the nuclear-cytoplasmic ratio is {nuclear_cytoplasmic_ratio}. The cytoplasm is "
    "{cytoplasm_colour} and "
    "{cytoplasm_texture}, vacuoles are {cytoplasm_vacuole}. The cell is {granularity}, with granule type "
    "{granule_type} "
    "and granule colour {granule_colour}.",
    "The image shows a {label}. The cell is {granularity}: granule type {granule_type}, granule colour "
    "{granule_colour}. "
    "Its cell size is {cell_size} and its cell shape {cell_shape}. The cytoplasm colour is "
    "{cytoplasm_colour}, the "
    "cytoplasm texture {cytoplasm_texture} and vacuoles are {cytoplasm_vacuole}. The nucleus shape is "
    "{nucleus_shape} "
    "with {chromatin_density} packed chromatin and a {nuclear_cytoplasmic_ratio} nuclear-cytoplasmic ratio.",
)


def check_record(record: Mapping, schema: Mapping[str, Attribute] = ATTRIBUTES) -> None:
    """Raises ValueError naming the first field that is missing or holds a value outside its allowed set."""
    for name, attribute in schema.items():
        if record.get(name) not in attribute.values:
            allowed = ", ".join(attribute.values)
            raise ValueError(f"{name} is {record.get(name)!r}; allowed values: {allowed}")


def words_of(record: Mapping, schema: Mapping[str, Attribute] = ATTRIBUTES) -> dict[str, str]:
    """The answer word of every attribute of `record`; raises ValueError as `check_record` does."""
    check_record(record, schema)
    return {name: attribute.word(record[name]) for name, attribute in schema.items()}


def describe(
    record: Mapping,
    rng: random.Random,
    schema: Mapping[str, Attribute] = ATTRIBUTES,
    templates: Sequence[str] = DESCRIPTIONS,
) -> str:
    """A description that states every attribute of `record`."""
    return rng.choice(templates).format(**words_of(record, schema))


def _closed(attribute: Attribute, word: str, phrasing: str, rng: random.Random) -> tuple[str, str]:
    others = [attribute.word(v) for v in attribute.values if attribute.word(v) != word]
    true = rng.random() < 0.5
    return phrasing.format(word=word if true else rng.choice(others)), "yes" if true else "no"


def _choices(attribute: Attribute, word: str, rng: random.Random) -> list[str]:
    """Up to four options in random order, the right one among them."""
    others = [attribute.word(v) for v in attribute.values if attribute.word(v) != word]
    options = [word, *rng.sample(others, min(len(others), len(LETTERS) - 1))]
    rng.shuffle(options)
    return options


def _mcq(stem: str, choices: Sequence[str], instruction: str) -> str:
    return "\n".join([stem, *(f"{a}. {c}" for a, c in zip(LETTERS, choices)), instruction])


MCQ_LETTER = ("Answer with the letter.", "Reply with the letter only.", "Which letter is right?")
MCQ_WORDS = ("Answer in words.", "Reply with the words of the right option.")


def question(
    record: Mapping,
    name: str,
    kind: str,
    rng: random.Random,
    schema: Mapping[str, Attribute] = ATTRIBUTES,
    canonical: bool = True,
) -> dict:
    """One question about attribute `name` of `record`.

    Args:
        kind: "open" (answer: the value's word), "closed" (yes/no, true half the time) or "mcq" (up to four
            lettered options; the canonical form is answered by the letter, a training form sometimes in
            words).
        canonical: the fixed evaluation phrasing; otherwise one of the phrasings, drawn from `rng`.

    Returns:
        question, reference, answer_type ("open"/"closed"/"mcq"), attribute, choices (the options' texts in
        the order shown for "mcq", else None).

    Raises:
        ValueError: an unknown kind, or a record `check_record` refuses.
    """
    attribute = schema[name]
    if record.get(name) not in attribute.values:
        check_record(record, {name: attribute})
    word = attribute.word(record[name])
    stem = attribute.open[0] if canonical else rng.choice(attribute.open)
    row = {"attribute": name, "answer_type": kind}
    if kind == "open":
        return {**row, "question": stem, "reference": word, "choices": None}
    if kind == "closed":
        phrasing = attribute.closed[0] if canonical else rng.choice(attribute.closed)
        text, answer = _closed(attribute, word, phrasing, rng)
        return {**row, "question": text, "reference": answer, "choices": None}
    if kind == "mcq":
        choices = _choices(attribute, word, rng)
        if canonical or rng.random() < 0.6:
            instruction = MCQ_LETTER[0] if canonical else rng.choice(MCQ_LETTER)
            answer = LETTERS[choices.index(word)]
        else:
            instruction, answer = rng.choice(MCQ_WORDS), word
        return {**row, "question": _mcq(stem, choices, instruction), "reference": answer, "choices": choices}
    raise ValueError(f"kind is {kind!r}; allowed values: {', '.join(KINDS)}")


def attribute_questions(
    record: Mapping,
    kinds: Sequence[str] = KINDS,
    rng: random.Random | None = None,
    schema: Mapping[str, Attribute] = ATTRIBUTES,
) -> list[dict]:
    """Evaluation questions: one per attribute and kind, canonical phrasing, in the order of `schema`.

    `rng` draws the asked-for value of closed questions and the order of options; without one it is seeded by
    the record's values, so the same record always gives the same questions. Row fields: see `question`.
    """
    check_record(record, schema)
    rng = rng or random.Random("|".join(str(record.get(k)) for k in ("img_name", *schema)))
    return [question(record, name, kind, rng, schema) for name in schema for kind in kinds]


def attribute_dialogue(
    record: Mapping,
    rng: random.Random,
    turns: int,
    schema: Mapping[str, Attribute] = ATTRIBUTES,
    templates: Sequence[str] = DESCRIPTIONS,
) -> list[dict]:
    """A training conversation of `turns` question-answer pairs about one image.

    With probability 0.3 the first pair asks for a description; the others mix open (half), yes/no and
    multiple-choice questions in all phrasings about attributes drawn without replacement (again from all once
    every attribute has been asked about).

    Returns:
        2 * turns dicts {"role": "user" | "assistant", "text": str}, alternating, user first.

    Raises:
        ValueError: `turns` < 1, or a record `check_record` refuses.
    """
    if turns < 1:
        raise ValueError(f"turns is {turns}; it must be at least 1")
    check_record(record, schema)
    rows: list[dict] = []
    if rng.random() < 0.3:
        rows.append(
            {
                "question": rng.choice(DESCRIBE_PHRASINGS),
                "reference": describe(record, rng, schema, templates),
            }
        )
    names: list[str] = []
    while len(rows) < turns:
        names = names or rng.sample(list(schema), len(schema))
        kind = rng.choices(KINDS, (2, 1, 1))[0]
        rows.append(question(record, names.pop(), kind, rng, schema, canonical=rng.random() < 0.4))
    return turns_of(rows)


def turns_of(rows: Iterable[Mapping]) -> list[dict]:
    """Rows with a question and its reference as turns {"role": "user" | "assistant", "text": str}, user
    first.
    """
    return [
        turn
        for row in rows
        for turn in (
            {"role": "user", "text": row["question"]},
            {"role": "assistant", "text": row["reference"]},
        )
    ]


def right_answer(text: str, record: Mapping, schema: Mapping[str, Attribute] = ATTRIBUTES) -> str | None:
    """What `record` says to a question in any of the forms of `question`; None for a question of another
    form.

    The inverse of question making: it tells whether answers to questions a model asked by itself are right.
    """
    stem, *rest = text.strip().split("\n")
    for name, attribute in schema.items():
        word = attribute.word(record[name])
        if stem in attribute.open:
            if not rest:
                return word
            choices = [line.partition(". ")[2] for line in rest[:-1]]
            if rest[-1] in MCQ_WORDS or word not in choices:
                return word if word in choices else None
            return (
                LETTERS[choices.index(word)]
                if rest[-1] in MCQ_LETTER and choices.index(word) < len(LETTERS)
                else None
            )
        value = attribute.value_in(stem)
        if value is not None:
            return "yes" if attribute.word(value) == word else "no"
    return None


def asked_attribute(text: str, schema: Mapping[str, Attribute] = ATTRIBUTES) -> str | None:
    """The attribute that a question in any of the forms of `question` asks for; None for a question of
    another form.
    """
    stem = text.strip().split("\n")[0]
    for name, attribute in schema.items():
        if stem in attribute.open or attribute.value_in(stem) is not None:
            return name
    return None
