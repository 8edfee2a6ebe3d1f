"""Source -> images with what is known of them, held-out questions, quarantine: what clinician preference
alignment reads.

Dialogues are written about the training images, whose captions and contexts the generating model and the
rating model may see. The attributes of an attribute table stay apart: a caption states few of them, and all
are for simulated clinicians and for measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from medray import records
from medray.config import CaptionsConfig, DataConfig
from medray.data.attribute_descriptions import FORMS, describe_attributes
from medray.data.attribute_questions import ATTRIBUTES
from medray.errors import DataError
from medray.ingest.uses import Needs
from medray.methods.instruction_free.training_sets import form_of, own_questions
from medray.methods.shared.training_sets import conversations, set_aside, write_parts
from medray.records import ANSWER_TYPES
from medray.stable_draws import drawn

PARTS = {
    "captioned": records.IMAGE_TEXT,  # of the training images, one row each; sample_id is the image's id
    "questions": records.QUESTION,  # of the held-out images
    "eval_conversations": records.CONVERSATION,
    "quarantine": records.QUARANTINE,
}


def write_captioned(
    config: DataConfig,
    captions: CaptionsConfig,
    out_dir: str,
    kinds: tuple[str, ...] = ANSWER_TYPES,
    seed: int = 0,
    eval_seed: int = 0,
    max_eval_images: int | None = None,
    eval_rows: int = 0,
    evaluated: bool = True,
) -> dict[str, int]:
    """Write PARTS under `out_dir` and return the number of rows of each.

    Args:
        kinds: of held-out questions.
        seed: draws the images dialogues are written about, where data.label_fraction is below 1.
        eval_rows: rows of eval_conversations that are enough.
        evaluated: whether held-out images are needed.

    Raises DataError where there is no training image.
    """
    limits = {
        "labelled": config.max_labelled,
        "unlabelled": config.max_unlabelled,
        "eval": max_eval_images,
        "unused": None,
    }
    # An image alone will do, so that what is labelled is not asked for here.
    needs = Needs(
        "clinician_preference",
        labelled=False,
        held_out=evaluated,
        eval_labels=("qa", "turns", "record"),
        otherwise=", or evaluate.arms=[] to stop after the rating model",
    )
    make = CaptionedRows(
        form_of(config), captions.attributes, captions.modality, config.turns, tuple(kinds), eval_seed
    )
    counts = write_parts(config, out_dir, PARTS, make, limits, seed, {"eval_conversations": eval_rows}, needs)
    if not counts["captioned"]:
        raise DataError(
            f"data.source: {config.source} has no image in its split {config.train_split!r} ({counts}); look "
            f"at data.train_split, data.label_fraction and {out_dir}/quarantine"
        )
    return counts


@dataclass(frozen=True)
class CaptionedRows:
    """What is taken of an image (medray.methods.shared.training_sets.Make): of a training image one
    IMAGE_TEXT row, of a held-out one its questions.

    Args:
        form: name in medray.data.attribute_descriptions.FORMS of an attribute table; None where the source is
            none.
        stated, modality: see CaptionsConfig.
        turns: of a held-out dialogue made from attributes.
        kinds, seed: of held-out questions.
    """

    form: str | None
    stated: int
    modality: str | None = None
    turns: int = 5
    kinds: tuple[str, ...] = ANSWER_TYPES
    seed: int = 0

    def __call__(
        self, part: str, group: dict[str, Any], members: list[list[Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        payloads = [payload for _, payload in members]
        if part == "eval":
            yield from (("questions", row) for row in own_questions(members, self.kinds, self.seed))
            yield from (
                ("eval_conversations", row)
                for row in conversations(members, group["image_id"], self.turns, self.seed)
            )
        elif part == "labelled" or not any(payloads):
            # an image that label_fraction leaves out is none that has nothing but itself
            values = attributes_of(payloads)
            if self.modality and values and self.modality not in values:
                yield (
                    "quarantine",
                    set_aside(members[0][0], group, f"no attribute {self.modality!r} (captions.modality)"),
                )
                return
            yield (
                "captioned",
                {
                    "sample_id": group["image_id"],
                    "source": self.form,
                    "split": group["split"],
                    **self.texts(payloads, values, group["image_id"]),
                    "attributes": sorted(values.items()),
                    "modality": group["modality"] or values.get(self.modality or ""),
                },
            )

    def texts(
        self, payloads: list[Mapping[str, Any]], values: Mapping[str, str], image_id: str
    ) -> dict[str, str | None]:
        """Caption and context: all that are given, each once, in their order, a line each; where no
        caption is, one that states some attributes.
        """
        given = {
            name: "\n".join(dict.fromkeys(payload[name] for payload in payloads if payload.get(name))) or None
            for name in ("caption", "context")
        }
        return given if given["caption"] else {**given, "caption": self.stated_caption(values, image_id)}

    def stated_caption(self, values: Mapping[str, str], image_id: str) -> str | None:
        """`stated` of the attributes, drawn by the image's id, in the words of instruction-free tuning;
        None where they are none or all absent.
        """
        if self.form is None or not values:
            return None
        chosen = drawn((name for name in FORMS[self.form].order if name in values), "caption", image_id)[
            : self.stated
        ]
        try:
            return describe_attributes({name: values[name] for name in chosen}, FORMS[self.form])
        except DataError:
            return None


def attributes_of(payloads: list[Mapping[str, Any]]) -> dict[str, str]:
    """The attributes that the payloads of one image state."""
    found: dict[str, str] = {}
    for payload in payloads:
        found |= (
            {name: payload["record"][name] for name in ATTRIBUTES}
            if "record" in payload
            else payload.get("attributes") or {}
        )
    return found
