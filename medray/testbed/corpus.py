"""What the bundled models `base` and `generalist` learn from: coloured shapes, and blood cells described in
words only.

`base` stands for a general vision-language model: it sees pictures (shapes, colours, sizes, positions,
textures, counts), speaks the language of medical questions from text-only dialogues, answers open, yes/no and
multiple-choice questions, describes, and asks questions in the questioner's role. It never sees a picture of
a cell. The attribute values in its texts are drawn independently and uniformly, so they carry no knowledge
about cell types either.

`generalist` has learnt two more ways of speaking, which instruction-free tuning takes for granted in its base
model: lists of attributes, and multiple choice as its evaluation asks it
(medray.data.attribute_descriptions). It has seen no cell either.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFilter

from medray.config import SELF_QUESTIONING_SYSTEM_PROMPT
from medray.data.attribute_descriptions import (
    ABSENT,
    WBCATT,
    Form,
    choice_questions,
    describe_attributes,
    stated_choices,
)
from medray.data.attribute_questions import (
    ATTRIBUTES,
    DESCRIPTIONS,
    KINDS,
    Attribute,
    attribute_dialogue,
    attribute_questions,
    describe,
    noun_attribute,
    question,
    turns_of,
    words_of,
)

SIDE = 128
"""Width and height of a rendered scene in pixels."""

QUESTIONER = "vuser"

COLOURS = {
    "red": (205, 50, 50),
    "green": (60, 150, 70),
    "blue": (60, 90, 200),
    "yellow": (235, 210, 70),
    "purple": (120, 55, 150),
    "pink": (230, 140, 180),
    "orange": (235, 140, 50),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "grey": (150, 150, 155),
    "beige": (236, 218, 186),
    "light blue": (196, 212, 238),
}
DOTS = {"few": (1, 3), "many": (7, 10)}
POSITIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}

SHAPES: dict[str, Attribute] = {
    "shape": noun_attribute(
        ("circle", "square", "triangle", "star", "ring", "cross"),
        "shape",
        "this object",
        ("Which shape is this?",),
    ),
    "colour": noun_attribute(
        tuple(COLOURS), "colour", "this object", ("Which colour does the object have?",)
    ),
    "size": noun_attribute(("big", "small"), "size", "this object", ("How large is the object?",)),
    "position": noun_attribute(tuple(POSITIONS), "position", "this object", ("Where is the object?",)),
    "texture": noun_attribute(
        ("plain", "striped", "speckled"), "texture", "this object", ("How does the surface look?",)
    ),
    "background": noun_attribute(
        tuple(BACKGROUNDS), "background colour", "the image", ("Which colour does the background have?",)
    ),
    "dots": Attribute(
        tuple(DOTS),
        (
            "Are there few or many dots?",
            "Are there few or many dots in the image?",
            "State whether the dots are few or many.",
        ),
        (
            "Are there {word} dots?",
            "Are there {word} dots in the image?",
            "Would you say there are {word} dots?",
        ),
    ),
    "frame": Attribute(
        ("yes", "no"),
        (
            "Is the image framed or unframed?",
            "State whether the image is framed or unframed.",
            "Is this picture framed or unframed?",
        ),
        ("Is the image {word}?", "Is this picture {word}?", "Would you call the image {word}?"),
        {"yes": "framed", "no": "unframed"},
    ),
    "focus": noun_attribute(("sharp", "blurred"), "focus", "the image", ("How sharp is the image?",)),
}
"""The attributes of a scene: one object, dots beside it, perhaps a frame. Some have two values, as most
of a cell's.
"""

SHAPE_DESCRIPTIONS = (
    "This is a {size} {colour} {shape}. The texture is {texture} and the position is {position}. The "
    "background is "
    "{background} and there are {dots} dots. The image is {frame} and the focus is {focus}.",
    "The image shows a {shape}. Its colour is {colour}, its size is {size} and its texture {texture}. There "
    "are {dots} "
    "dots on a {background} background. The position of the object is {position}. The image is {focus} and "
    "{frame}.",
)

SCENE = Form(
    order=tuple(SHAPES),
    values={name: attribute.values for name, attribute in SHAPES.items()},
    bare=("shape",),
)
"""How the attributes of a scene are listed and asked about."""

LIST_REQUESTS = (
    "List the attributes.",
    "List the attributes of the image.",
    "List what you see.",
    "Which attributes does the image show?",
    "Name all attributes, separated by commas.",
)

_INTRODUCTIONS = {
    True: (
        "A blood cell was described like this.",
        "Read this report of a blood cell.",
        "Findings under the microscope:",
        "Report:",
    ),
    False: ("A picture was described like this.", "Read this.", "Description:"),
}
"""How a report begins: of a cell, or of a scene."""


def sample_uniform(schema: Mapping[str, Attribute], rng: random.Random) -> dict:
    """A record with every attribute of `schema` drawn independently and uniformly."""
    return {name: rng.choice(attribute.values) for name, attribute in schema.items()}


def _vary(colour, rng: random.Random, spread: float = 14) -> tuple[int, ...]:
    return tuple(int(min(255, max(0, channel + rng.gauss(0, spread)))) for channel in colour)


def _polygon(centre, radii, turn: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [
        (centre[0] + r * math.cos(turn + i * step), centre[1] + r * math.sin(turn + i * step))
        for i, r in enumerate(radii)
    ]


def _mask(shape: str, centre, radius: float, rng: random.Random) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(mask)
    x, y = centre
    turn = rng.uniform(0, 2 * math.pi)
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = radius * rng.uniform(0.45, 0.6)
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    elif shape in ("square", "triangle"):
        draw.polygon(_polygon(centre, [radius * 1.1] * (4 if shape == "square" else 3), turn), fill=255)
    elif shape == "star":
        draw.polygon(_polygon(centre, [radius * 1.2, radius * 0.5] * 5, turn), fill=255)
    else:
        for angle in (turn, turn + math.pi / 2):
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=max(3, int(radius * 0.55)))
    return mask


def render_scene(record: Mapping, rng: random.Random) -> Image.Image:
    """One picture of a `SHAPES` record (RGB, 128 x 128).

    Raises:
        ValueError: a missing attribute or one outside `SHAPES`.
    """
    words_of(record, SHAPES)
    image = Image.new("RGB", (SIDE, SIDE), _vary(BACKGROUNDS[record["background"]], rng, 5))
    radius = rng.uniform(23, 29) if record["size"] == "big" else rng.uniform(12, 17)
    across, down = POSITIONS[record["position"]]
    centre = tuple(SIDE / 2 + 30 * direction + rng.uniform(-4, 4) for direction in (across, down))
    colour = _vary(COLOURS[record["colour"]], rng)
    surface = Image.new("RGB", (SIDE, SIDE), colour)
    draw = ImageDraw.Draw(surface)
    second = tuple(channel // 2 if sum(colour) > 330 else (channel + 255) // 2 for channel in colour)
    if record["texture"] == "striped":
        for start in range(-SIDE, SIDE, 10):
            draw.line((start, 0, start + SIDE, SIDE), fill=second, width=3)
    elif record["texture"] == "speckled":
        for _ in range(420):
            x, y, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(1.0, 2.0)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=second)
    image.paste(surface, mask=_mask(record["shape"], centre, radius, rng))
    draw = ImageDraw.Draw(image)
    places: list[tuple[float, float]] = []
    wanted = rng.randint(*DOTS[record["dots"]])
    while len(places) < wanted:
        spot = (rng.uniform(10, SIDE - 10), rng.uniform(10, SIDE - 10))
        if math.dist(spot, centre) > radius * 1.25 + 8 and all(
            math.dist(spot, other) > 12 for other in places
        ):
            places.append(spot)
    for x, y in places:
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_vary((40, 40, 50), rng, 8))
    if record["frame"] == "yes":
        draw.rectangle(
            (0, 0, SIDE - 1, SIDE - 1), outline=_vary((70, 70, 75), rng, 8), width=rng.randint(4, 6)
        )
    return image.filter(
        ImageFilter.GaussianBlur(rng.uniform(0, 0.6) if record["focus"] == "sharp" else rng.uniform(2.2, 3.0))
    )


def scene_questions(scenes: int, kinds: Sequence[str] = KINDS, seed: int = 0) -> Iterator[dict]:
    """General questions that `base` can answer better than by chance: rows of records.QUESTION about
    scenes it has never seen, one per attribute and kind. Scene i depends on (seed, i) only.
    """
    for number in range(scenes):
        rng = random.Random(f"general scenes/{seed}/{number}")
        record = sample_uniform(SHAPES, rng)
        picture = io.BytesIO()
        render_scene(record, rng).save(picture, "JPEG", quality=95)
        image_id = f"scene-{seed}-{number:05d}"
        for row in attribute_questions(record, kinds, rng, SHAPES):
            yield {
                **row,
                "sample_id": f"{image_id}/{row['attribute']}/{row['answer_type']}",
                "image_id": image_id,
                "image": picture.getvalue(),
            }


def with_questioner(dialogue: list[dict], rng: random.Random, share: float) -> list[dict]:
    """The same dialogue with some user turns (each with probability `share`) asked by the questioner instead.

    The first turn stays the user's in half of the dialogues that would lose it, as it then does in every use
    but asking the very first question.
    """
    turns = []
    for index, turn in enumerate(dialogue):
        asked = turn["role"] == "user" and rng.random() < (share / 2 if index == 0 else share)
        turns.append({**turn, "role": QUESTIONER} if asked else turn)
    return turns


def with_system(dialogue: list[dict], rng: random.Random, share: float = 0.1) -> list[dict]:
    """Puts the self-questioning system prompt before some dialogues, so that the model knows both forms."""
    return (
        [{"role": "system", "text": SELF_QUESTIONING_SYSTEM_PROMPT}, *dialogue]
        if rng.random() < share
        else dialogue
    )


def survey(record: Mapping, rng: random.Random, schema: Mapping[str, Attribute] = ATTRIBUTES) -> list[dict]:
    """Every attribute asked about once, in random order, by an open question.

    The densest lesson in seeing: short questions whose answers only the picture holds. Yes/no questions and
    letters say little about the picture and are learned only once it is read.
    """
    return turns_of(
        question(record, name, "open", rng, schema, canonical=rng.random() < 0.6)
        for name in rng.sample(list(schema), len(schema))
    )


def claims(
    record: Mapping, rng: random.Random, schema: Mapping[str, Attribute] = ATTRIBUTES, share: float = 0.5
) -> list[dict]:
    """Every attribute asked about by yes/no or as multiple choice, in `share` of the cases after the open
    question.

    With the open answer in sight the claim is compared with words, which is easy; without it, with the
    picture.
    """
    rows: list[dict] = []
    for name in rng.sample(list(schema), len(schema)):
        kinds = ["open"] * (rng.random() < share) + rng.choices(("closed", "mcq"), (2, 1))
        rows += [question(record, name, kind, rng, schema, canonical=rng.random() < 0.6) for kind in kinds]
    return turns_of(rows)


def picture_dialogue(
    record: Mapping,
    rng: random.Random,
    turns: int = 6,
    schema: Mapping[str, Attribute] = ATTRIBUTES,
    templates: Sequence[str] = DESCRIPTIONS,
) -> list[dict]:
    """A dialogue about a picture, partly asked by the questioner; roles "user", "vuser", "assistant",
    "system".

    Two fifths are surveys, three tenths claims, the others `turns` turns in all forms, as users ask.
    """
    lesson = rng.random()
    if lesson < 0.4:
        return with_questioner(survey(record, rng, schema), rng, 0.1)
    if lesson < 0.7:
        return with_questioner(claims(record, rng, schema), rng, 0.1)
    dialogue = attribute_dialogue(record, rng, turns, schema, templates)
    return with_system(with_questioner(dialogue, rng, 0.35), rng)


def scene_dialogue(record: Mapping, rng: random.Random, turns: int = 5) -> list[dict]:
    """`picture_dialogue` about a scene."""
    return picture_dialogue(record, rng, turns, SHAPES, SHAPE_DESCRIPTIONS)


def _report(rng: random.Random) -> tuple[bool, dict, list[str], str]:
    """(whether it is of a cell, its record, the attributes it states, its text)."""
    of_cell = rng.random() < 0.67
    schema, templates = (ATTRIBUTES, DESCRIPTIONS) if of_cell else (SHAPES, SHAPE_DESCRIPTIONS)
    record = sample_uniform(schema, rng)
    if rng.random() < 0.08:
        return of_cell, record, list(schema), describe(record, rng, schema, templates)
    names = rng.sample(
        list(schema), rng.randint(1, 3) if rng.random() < 0.75 else rng.randint(4, len(schema))
    )
    words = words_of(record, schema)
    return (
        of_cell,
        record,
        names,
        "; ".join(f"{name.replace('_', ' ')}: {words[name]}" for name in names) + ".",
    )


def _introduced(dialogue: list[dict], of_cell: bool, text: str, rng: random.Random) -> list[dict]:
    return [
        {"role": "user", "text": f"{rng.choice(_INTRODUCTIONS[of_cell])} {text}\n{dialogue[0]['text']}"},
        *dialogue[1:],
    ]


def report_dialogue(rng: random.Random, turns: int = 6) -> list[dict]:
    """A text-only dialogue: a cell (or a scene) described in words, then `turns` questions in all forms about
    what was said.

    Most reports state one to three facts: to find a fact among few, then to compare it with a claim, is
    learned from short reports; from full ones alone it is not.
    """
    of_cell, record, names, text = _report(rng)
    schema = ATTRIBUTES if of_cell else SHAPES
    dialogue = turns_of(
        question(
            record,
            rng.choice(names),
            rng.choices(KINDS, (2, 3, 3))[0],
            rng,
            schema,
            canonical=rng.random() < 0.5,
        )
        for _ in range(turns)
    )
    first, *rest = _introduced(dialogue, of_cell, text, rng)
    return [first, *with_questioner(rest, rng, 0.2)]


def listing(record: Mapping, form: Form, rng: random.Random) -> list[dict]:
    """A request for the attributes and their list, in random order. Raises DataError where all are absent."""
    parts = describe_attributes(record, form).split(", ")
    return turns_of(
        [{"question": rng.choice(LIST_REQUESTS), "reference": ", ".join(rng.sample(parts, len(parts)))}]
    )


def stated(record: Mapping, form: Form, rng: random.Random, turns: int = 4) -> list[dict]:
    """Multiple choice in the words of instruction-free tuning's evaluation, each answered by "The correct
    answer is B.".
    """
    asked = choice_questions(record, form, "")
    rows = rng.sample(asked, min(turns, len(asked)))
    return turns_of(
        {**row, "reference": stated_choices(len(row["choices"]))["ABCDEFGH".index(row["reference"])]}
        for row in rows
    )


def general_dialogue(record: Mapping, rng: random.Random) -> list[dict]:
    """A dialogue about a scene: as `base` learns them, or a list, or stated choices."""
    lesson = rng.random()
    if lesson < 0.4:
        return scene_dialogue(record, rng)
    return listing(record, SCENE, rng) if lesson < 0.7 else stated(record, SCENE, rng)


def general_report(rng: random.Random) -> list[dict]:
    """A text-only dialogue: as `base` learns them, or a list of what a report states, or stated choices
    about it.
    """
    lesson = rng.random()
    if lesson < 0.3:
        return report_dialogue(rng, turns=2)
    while True:
        of_cell, record, names, text = _report(rng)
        said = {name: record[name] for name in names}
        if any(value not in ABSENT for value in said.values()):
            break
    form = WBCATT if of_cell else SCENE
    return _introduced(
        listing(said, form, rng)
        if lesson < 0.65 or not choice_questions(said, form, "")
        else stated(said, form, rng, turns=1),
        of_cell,
        text,
        rng,
    )


def tokenizer_texts(count: int = 6000, seed: int = 0) -> Iterator[str]:
    """The texts the tokenizer is trained on: turns of scene dialogues and of reports."""
    rng = random.Random(f"tokenizer/{seed}")
    for _ in range(count):
        for turn in scene_dialogue(sample_uniform(SHAPES, rng), rng) + report_dialogue(rng):
            yield turn["text"]
