"""Labelled attributes and concepts: WBCAtt and SKINCON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medray.data.attribute_questions import check_record
from medray.data.attribute_vocabularies import SKINCON, word
from medray.errors import BadRecord
from medray.ingest.readers.common import Place, Row, given, inside, mcq, need, need_text, qa, row
from medray.stable_draws import drawn

"""SKINCON's 48 concepts (Daneshjou et al., NeurIPS 2022), in the order and spelling of its CSV columns."""

EXCLUDED = "Do not consider this image"


def wbcatt(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """WBCAtt: the cell type and 11 attributes, as JSON Lines or CSV."""
    identity = need_text(record, "img_name")
    try:
        check_record(record)
    except ValueError as error:
        raise BadRecord(str(error)) from None
    # one picture, by its place here and in its own set
    image, original = given(record, "image"), given(record, "path")
    file = inside(place.images, image or original or need(record, "path"))
    yield row(identity, identity, file, {"record": record})


def skincon(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """SKINCON, annotations_fitzpatrick17k.csv and annotations_ddi.csv: ImageID (the image's file), a 0/1
    column for each concept and the column that sets an image aside.

    Gives the attributes, the present concepts as a caption, yes/no questions about each present and as many
    absent concepts, and for each present concept the choice between it and three absent ones. The id fixes
    what is drawn.
    """
    image = need_text(record, "ImageID")
    values = {concept: _binary(record, concept) for concept in (*SKINCON, EXCLUDED)}
    if values.pop(EXCLUDED):
        raise BadRecord(f"the source marks it {EXCLUDED!r}")
    present = [word(concept) for concept, value in values.items() if value]
    absent = [word(concept) for concept, value in values.items() if not value]
    file = inside(place.images, image)
    yield row(
        f"{image}/attributes",
        image,
        file,
        {"attributes": {word(c): "present" if value else "absent" for c, value in values.items()}},
    )
    if present:
        yield row(f"{image}/caption", image, file, {"caption": ", ".join(present), "context": None})
    asked = present + drawn(absent, image, "closed")[: len(present)]
    for concept in asked:
        payload = qa(f"Is {concept} seen?", "yes" if concept in present else "no", "closed", concept)
        yield row(f"{image}/closed/{concept}", image, file, payload)
    for concept in present:
        options = drawn([concept, *drawn(absent, image, "mcq", concept)[:3]], image, "order", concept)
        payload = mcq("Which of these is seen?", options, options.index(concept), concept)
        yield row(f"{image}/mcq/{concept}", image, file, payload)


def _binary(record: dict[str, Any], concept: str) -> bool:
    value = need_text(record, concept)
    if value not in ("0", "1", "0.0", "1.0"):
        raise BadRecord(f"field {concept!r} is {value!r}; it must be 0 or 1")
    return value.startswith("1")
