"""What the images of a source serve for in a job, by split, and what the job's method needs of them.

Counted from the index, before any image is read, so that a missing split, or captions where dialogues are
needed, end the job before it has cost anything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from medray.config import DataConfig
from medray.errors import DataError

# Keys of payloads (medray.ingest.readers), in the words of messages.
FORMS = {
    "turns": "dialogues",
    "qa": "questions with answers",
    "record": "attribute records",
    "attributes": "attributes",
    "caption": "captions",
    "preference": "preference pairs",
}
NOTHING = "nothing but the image"
RECORDS, BAD_RECORDS = "records", "bad records"  # of the whole index: all, and those that no reader could use
USES = pa.schema(
    [
        ("split", pa.string()),
        ("part", pa.string()),
        ("form", pa.string()),
        ("images", pa.int64()),
        ("first", pa.bool_()),
    ]
)
_SPLITS = 40  # named in a message
_HELD_OUT = ("val", "validation", "valid", "dev", "test", "testing", "eval")


@dataclass(frozen=True)
class Needs:
    """What a method needs of a source.

    Args:
        method: its name, for messages.
        labels: keys of payloads (FORMS) that make a training image a labelled one; None: any.
        eval_labels: keys of payloads that make a held-out image useful; None: any.
        otherwise: what to do with a source that has other forms.
        train: whether there must be a training image.
        labelled: whether there must be a labelled one.
        held_out: whether there must be a held-out image.
        train_field, eval_field, source_field: the configuration's fields that name the splits and the source.
    """

    method: str
    labels: tuple[str, ...] | None = None
    eval_labels: tuple[str, ...] | None = None
    otherwise: str = ""
    train: bool = True
    labelled: bool = True
    held_out: bool = True
    train_field: str = "data.train_split"
    eval_field: str = "data.eval_split"
    source_field: str = "data.source"


def is_duplicate(reason: str) -> bool:
    """Whether a quarantined record is there all the same, as another: it is named, but nothing is lost."""
    return reason.startswith("duplicate")


def uses_of(table: pa.Table) -> pa.Table:
    """USES of a block of GROUP rows with their `part`; pure.

    An image with several forms has a row for each, the first of them marked.
    """
    counts: Counter[tuple[str, str, str, bool]] = Counter()
    for row in table.select(["split", "part", "members", "bad"]).to_pylist():
        members = json.loads(row["members"])
        bad = sum(not is_duplicate(json.loads(one)["reason"]) for one in row["bad"])
        counts["", RECORDS, "", False] += len(members) + bad
        counts["", BAD_RECORDS, "", False] += bad
        if not members:
            continue
        forms = dict.fromkeys(
            form for _, payload in members for form in FORMS if payload.get(form) is not None
        )
        for place, form in enumerate(forms or ("",)):
            counts[row["split"] or "unknown", row["part"], form, place == 0] += 1
    rows = [
        {"split": split, "part": part, "form": form, "images": number, "first": first}
        for (split, part, form, first), number in counts.items()
    ]
    return pa.Table.from_pylist(rows, schema=USES)


@dataclass
class Uses:
    """Numbers of images: by split; by split and use (labelled, unlabelled, eval, unused); by split, use
    and form.
    """

    splits: Counter[str] = field(default_factory=Counter)
    parts: Counter[tuple[str, str]] = field(default_factory=Counter)
    forms: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    records: Counter[str] = field(default_factory=Counter)  # RECORDS, and BAD_RECORDS of them

    def add(self, rows: Iterable[Mapping[str, object]]) -> None:
        for row in rows:
            if row["part"] in (RECORDS, BAD_RECORDS):
                self.records[row["part"]] += row["images"]
                continue
            if row["first"]:
                self.splits[row["split"]] += row["images"]
                self.parts[row["split"], row["part"]] += row["images"]
            self.forms[row["split"], row["part"], row["form"]] += row["images"]

    def forms_of(self, split: str) -> Counter[str]:
        """Images of a split by form of what is known of them."""
        found: Counter[str] = Counter()
        for (name, _, form), number in self.forms.items():
            if name == split:
                found[form] += number
        return found

    def said(self, splits: Iterable[str] | None = None) -> str:
        """ "train (313), test (203)", largest first."""
        names = (
            [(name, self.splits[name]) for name in splits]
            if splits is not None
            else self.splits.most_common(_SPLITS)
        )
        return ", ".join(f"{name} ({number:,})" for name, number in names) or "none"

    def check(self, config: DataConfig, needs: Needs) -> None:
        """Raise DataError if the source lacks what the method needs, naming what there is and the field
        to set.
        """
        if not self.splits:
            raise DataError(
                f"{needs.source_field}: no record of {config.source} can be used; the stage's quarantine "
                "says why"
            )
        wanted = [(config.train_split, needs.train, needs.train_field, needs.labels)]
        wanted += [(config.eval_split, needs.held_out, needs.eval_field, needs.eval_labels)]
        for split, needed, name, labels in wanted:
            if not needed:
                continue
            if not self.splits[split]:
                missing = (
                    f"no image of split {split!r} in {config.source}"
                    if name == needs.eval_field
                    else f"{config.source} has no image in its split {split!r}"
                )
                raise DataError(
                    f"{name}: {missing}; there are {self.said()}{self._suggestion(config, name, needs)}"
                )
            forms = self.forms_of(split)
            if labels is not None and not any(forms[form] for form in labels):
                where = f"{self.splits[split]:,} images of split {split!r} in {config.source}"
                words = [(number, FORMS.get(form, NOTHING)) for form, number in forms.most_common()]
                said = (
                    f"all {where} have {words[0][1]}"
                    if len(words) == 1
                    else f"of {where}, " + ", ".join(f"{number:,} have {form}" for number, form in words)
                )
                raise DataError(
                    f"{needs.source_field}: {said}; {needs.method} needs "
                    f"{' or '.join(FORMS[form] for form in labels)}{needs.otherwise}"
                )
        if needs.train and needs.labelled and not self.parts[config.train_split, "labelled"]:
            raise DataError(
                f"data.label_fraction: {config.label_fraction:g} leaves none of the "
                f"{self.splits[config.train_split]:,} "
                f"images of split {config.train_split!r} labelled; "
                "take a larger share: --set data.label_fraction=1"
            )

    def _suggestion(self, config: DataConfig, name: str, needs: Needs) -> str:
        held_out = name == needs.eval_field
        taken = config.train_split if held_out and needs.train else config.eval_split
        others = [split for split in self.splits if split not in (taken, "unknown")]
        others.sort(
            key=lambda split: (
                (_HELD_OUT.index(split) if split in _HELD_OUT else len(_HELD_OUT))
                if held_out
                else (split in _HELD_OUT, -self.splits[split])
            )
        )
        if not others:
            return (
                "; give a source with another split, or one without splits, of which "
                "data.testbed_val_fraction are held out"
            )
        return f": --set {name}={others[0]}"

    def table(
        self, config: DataConfig, limits: Mapping[str, int | None], labels: tuple[str, ...] | None = None
    ) -> str:
        """What the images serve for, a line for each split and use; "" for no image.

        Args:
            limits: the largest number of images by use, None for all; other uses are not read.
            labels: see Needs.
        """
        words = {
            "labelled": "data.max_labelled",
            "unlabelled": "data.max_unlabelled",
            "eval": "evaluate.max_images",
        }
        lines = [("split", "use", "images", "")]
        for (split, part), number in sorted(
            self.parts.items(), key=lambda item: (-self.splits[item[0][0]], item[0])
        ):
            notes = []
            most = limits.get(part) if part in limits else 0
            if part == "unused" or most == 0:
                notes.append("not read")
            elif most is not None and number > most:
                notes.append(f"{most:,} taken ({words[part]}), {number - most:,} not read")
            if part == "unlabelled":
                known = sum(
                    count
                    for (name, use, form), count in self.forms.items()
                    if (name, use) == (split, part) and form and (labels is None or form in labels)
                )
                if known:
                    notes.append(
                        f"{known:,} have labels that "
                        f"data.label_fraction={config.label_fraction:g} leaves unused"
                    )
            if part == "labelled":
                forms = {
                    FORMS[form]: count
                    for (name, use, form), count in self.forms.items()
                    if (name, use) == (split, part) and form
                }
                notes += [
                    f"with {name}" if count == number else f"{count:,} with {name}"
                    for name, count in forms.items()
                ]
            lines.append((split, part, f"{number:,}", "; ".join(notes)))
        if len(lines) == 1:
            return ""
        widths = [max(len(line[place]) for line in lines) for place in range(3)]
        return "\n".join(
            f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines
        )
