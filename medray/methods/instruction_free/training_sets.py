"""Source -> descriptions to tune on, held-out descriptions and questions, quarantine: what instruction-free
tuning reads.

Of an attribute table (medray.data.attribute_descriptions.FORMS) the descriptions and the multiple-choice
questions are made as the paper's authors make them; of other sources the captions or reports are the
descriptions. Beside them stand the questions that a source has or that medray makes of attributes
(medray.methods.shared.training_sets.questions).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray import records
from medray.config import TESTBED_SCENES, DataConfig
from medray.data.attribute_descriptions import FORMS, choice_questions, describe_attributes
from medray.errors import DataError
from medray.ingest.source_index import detect, manifest_of
from medray.ingest.uses import Needs
from medray.methods.shared.training_sets import questions, set_aside, write_parts
from medray.records import ANSWER_TYPES

PARTS = {
    "descriptions": records.DESCRIPTION,  # to tune on
    "eval_descriptions": records.DESCRIPTION,
    "choices": records.BENCHMARK_QUESTION,  # multiple choice in the authors' words
    "plain": records.BENCHMARK_QUESTION,  # the source's own questions, or short ones about attributes
    "described": records.BENCHMARK_QUESTION,  # held-out images to describe
    "quarantine": records.QUARANTINE,
}
QUESTION_SETS = ("choices", "plain", "described", "general")


def form_of(config: DataConfig) -> str | None:
    """The name in FORMS of the source's attribute table, also where jobs/prepare_data.py has read it;
    None where it is none.
    """
    if config.source == "testbed:cells":
        return "wbcatt"
    manifest = manifest_of(config.source)
    kind = manifest.get("format") if manifest is not None else detect(config)[0]
    return kind if kind in FORMS else None


def write_descriptions(
    config: DataConfig,
    out_dir: str,
    prompt: str,
    kinds: tuple[str, ...] = ANSWER_TYPES,
    seed: int = 0,
    eval_seed: int = 0,
    max_eval_images: int | None = None,
    eval_rows: int = 0,
) -> dict[str, int]:
    """Write PARTS under `out_dir` and return the number of rows of each.

    Args:
        prompt: what asks a model for a description (part "described").
        kinds: of plain questions.
        seed: draws the images that are tuned on, where data.label_fraction is below 1.
        eval_rows: rows of eval_descriptions that are enough.

    Raises DataError where there is nothing to tune on or nothing held out.
    """
    limits = {"labelled": config.max_labelled, "eval": max_eval_images, "unused": None}
    form = form_of(config)
    make = DescriptionRows(form, prompt, tuple(kinds), eval_seed)
    known = ("record", "attributes", "caption") if form else ("caption",)
    needs = Needs(
        "instruction_free",
        known,
        known,
        f" (attributes of the tables {', '.join(FORMS)} only): jobs/self_train.py learns from dialogues and "
        "questions (docs/data.md)",
    )
    counts = write_parts(config, out_dir, PARTS, make, limits, seed, {"eval_descriptions": eval_rows}, needs)
    for part, split in (("descriptions", "train_split"), ("described", "eval_split")):
        if not counts[part]:
            raise DataError(
                f"data.source: {config.source} has no description in its split {getattr(config, split)!r} "
                f"({counts}); give images with captions, reports or "
                f"a known attribute table ({', '.join(FORMS)}), look at data.{split}, and at "
                f"{out_dir}/quarantine"
            )
    return counts


@dataclass(frozen=True)
class DescriptionRows:
    """What is taken of an image (medray.methods.shared.training_sets.Make). An attribute record with nothing
    to describe is set aside.

    Args:
        form: name in FORMS; None: captions are the descriptions.
        prompt, kinds: see write_descriptions.
        seed: of questions that are drawn.
    """

    form: str | None
    prompt: str
    kinds: tuple[str, ...] = ANSWER_TYPES
    seed: int = 0

    def __call__(
        self, part: str, group: dict[str, Any], members: list[list[Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for identity, payload in members:
            try:
                description = self.description(payload)
            except DataError as error:
                yield "quarantine", set_aside(identity, group, str(error))
                continue
            if description is None:
                continue
            row = {"sample_id": identity, "description": description}
            if part == "labelled":
                yield "descriptions", row
            else:
                yield "eval_descriptions", row
                yield (
                    "described",
                    of_set(
                        "described",
                        {
                            "sample_id": identity,
                            "question": self.prompt,
                            "reference": description,
                            "answer_type": "open",
                        },
                    ),
                )
        if part == "eval":
            yield from (("choices", of_set("choices", row)) for row in self.choices(members))
            yield from (
                ("plain", of_set("plain", row)) for row in own_questions(members, self.kinds, self.seed)
            )

    def description(self, payload: Mapping[str, Any]) -> str | None:
        """The description a payload gives, if any. Raises DataError where all its attributes are absent."""
        if self.form is None:
            return payload.get("caption")
        values = _values(payload)
        return describe_attributes(values, FORMS[self.form]) if values else None

    def choices(self, members: list[list[Any]]) -> Iterator[dict[str, Any]]:
        if self.form is not None:
            for identity, payload in members:
                for row in choice_questions(_values(payload), FORMS[self.form], identity):
                    yield {**row, "sample_id": f"{identity}/{row['attribute']}"}


def own_questions(members: list[list[Any]], kinds: tuple[str, ...], seed: int) -> Iterator[dict[str, Any]]:
    """The questions of an image, those of these kinds."""
    return (row for row in questions(members, kinds, seed) if row["answer_type"] in kinds)


def _values(payload: Mapping[str, Any]) -> Mapping[str, str]:
    return payload.get("record") or payload.get("attributes") or {}


def of_set(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A question as one of a set (QUESTION_SETS): models are asked all sets together."""
    return {**row, "benchmark": name, "key": f"{name}/{row['sample_id']}"}


def write_general(
    config: DataConfig,
    out_dir: str,
    source: str,
    split: str,
    kinds: tuple[str, ...] = ANSWER_TYPES,
    seed: int = 0,
    max_images: int | None = None,
) -> int:
    """Write general questions, to see what a tuned model has kept, to `out_dir`/questions; returns their
    number.

    Args:
        config: limits and CPUs of reading.
        source: testbed:scenes, or a source with questions, such as a directory of jobs/prepare_data.py.
        split: its split that is asked.
        kinds: of questions.

    Raises DataError where it has none.
    """
    if source == TESTBED_SCENES:
        return _write_scenes(out_dir, max_images or 100, kinds, seed)
    config = config.model_copy(
        update={"source": source, "format": "auto", "images": None, "eval_split": split}
    )
    schemas = {"questions": records.BENCHMARK_QUESTION, "quarantine": records.QUARANTINE}
    needs = Needs(
        "evaluate.general",
        eval_labels=("qa", "turns", "record"),
        otherwise="; give another source of questions, or evaluate.general=null",
        train=False,
        eval_field="evaluate.general_split",
        source_field="evaluate.general",
    )
    counts = write_parts(
        config, out_dir, schemas, GeneralRows(tuple(kinds), seed), {"eval": max_images}, needs=needs
    )
    if not counts["questions"]:
        raise DataError(
            f"evaluate.general: {source} has no question in its split {split!r}; name another with "
            f"evaluate.general_split, and look at {out_dir}/quarantine"
        )
    return counts["questions"]


@dataclass(frozen=True)
class GeneralRows:
    """The questions of an image (medray.methods.shared.training_sets.Make)."""

    kinds: tuple[str, ...]
    seed: int = 0

    def __call__(
        self, part: str, group: dict[str, Any], members: list[list[Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from (
            ("questions", of_set("general", row)) for row in own_questions(members, self.kinds, self.seed)
        )


def _write_scenes(out_dir: str, scenes: int, kinds: tuple[str, ...], seed: int) -> int:
    from medray.testbed.corpus import scene_questions

    fs, root = url_to_fs(f"{out_dir}/questions")
    fs.makedirs(root, exist_ok=True)
    table = pa.Table.from_pylist(
        [of_set("general", row) for row in scene_questions(scenes, kinds, seed)],
        schema=records.BENCHMARK_QUESTION,
    )
    with fs.open(f"{root}/scenes.parquet", "wb") as handle:
        pq.write_table(table, handle, row_group_size=64)
    return table.num_rows
