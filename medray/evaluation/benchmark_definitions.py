"""Benchmarks by name: which files, which questions, which words after the question.

A benchmark's prompt suffix and split are part of its definition; change one and the number is another
benchmark's.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Benchmark:
    """What makes a benchmark.

    Attributes:
        format: data.format of its files, as people have them.
        splits: splits that are asked; empty for sources that know none (all images are asked).
        files: part of the file names to read, where a folder holds several versions; empty for all.
        languages: question languages kept; empty for all.
        kinds: answer types kept, and for attribute tables the kinds of question made.
        suffixes: put after the question, by answer type.
        note: what a reader of its numbers must know.
    """

    format: str
    splits: tuple[str, ...] = ()
    files: str = ""
    languages: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("open", "closed", "mcq")
    suffixes: dict[str, str] = field(default_factory=dict)
    note: str = ""


BENCHMARKS = {
    "vqa-rad": Benchmark(
        "vqa-rad", ("test",), note="official split: 202 of its 203 test images also occur in train"
    ),
    "vqa-rad-mevf": Benchmark(
        "vqa-rad",
        ("test",),
        files="testset",
        note="MEVF / LLaVA-Med split of VQA-RAD: all 203 test images also occur in train",
    ),
    "slake": Benchmark("slake", ("test",), languages=("en",), note="English questions"),
    "slake-zh": Benchmark("slake", ("test",), languages=("zh",), note="Chinese questions"),
    "path-vqa": Benchmark("hf-parquet", ("test",)),
    "pmc-vqa": Benchmark("pmc-vqa", ("test",), kinds=("mcq",)),
    "omnimedvqa": Benchmark("omnimedvqa", kinds=("mcq",)),
    "wbcatt-mcq": Benchmark(
        "wbcatt", ("test",), kinds=("mcq",), note="one question per attribute with up to four options"
    ),
    "skincon-mcq": Benchmark("skincon", kinds=("mcq",)),
    "llava-med-qa50": Benchmark(
        "llava-med-qa",
        ("test",),
        kinds=("open",),
        note="GPT-4's answers are the references; the chat score needs a judge that writes scores",
    ),
    "cbis-mcq": Benchmark("cbis-ddsm", ("test",), kinds=("mcq",)),
}
