"""`medray`: every job, the served applications and the helpers, as one command."""

from __future__ import annotations

import importlib
import sys

from medray.commands import beginning

JOBS = {  # each in a module of this package, named alike
    "self-train": "self-training (STLLaVA-Med): self-questions, a judge, DPO",
    "instruction-free": "tune on images and descriptions alone",
    "clinician-preference": "data written after, and selected by, what clinicians prefer (BioMed-VITAL)",
    "prepare-data": "turn a dataset in any known format into shards",
    "evaluate": "ask models the questions of benchmarks and compare them",
}
APPS = {  # served by Ray Serve: import path, what it is
    "serve": (
        "medray.serving.chat.app:build",
        "serve a run's tuned model behind an OpenAI-compatible endpoint: medray serve run=RUN keys=FILE",
    ),
    "annotate": (
        "medray.serving.clinician_page.app:build",
        "serve the page on which clinicians judge answers: medray annotate items=DIR tokens=FILE",
    ),
}
HELPERS = {  # module with a `main`, what it does
    "keys": ("medray.serving.tokens", "make a key of the endpoint, or a clinician's token"),
    "plan": (
        "medray.plan.__main__",
        "memory, time and cost of a run before it starts, and whether a cluster can hold it",
    ),
    "doctor": (
        "medray.commands.doctor",
        "check versions, devices, vLLM, Ray and shared memory, each with a fix",
    ),
    "recipes": ("medray.commands.recipes", "list the recipes that come with medray, or print one"),
    "config": (
        "medray.config.reference_page",
        "print every configuration field with its default and meaning (Markdown)",
    ),
}


def usage() -> str:
    """What `medray --help` prints."""
    commands = {**JOBS, **{name: about for name, (_, about) in {**APPS, **HELPERS}.items()}}
    lines = [f"  {name:<22}{about}" for name, about in commands.items()]
    return "\n".join(
        [
            "usage: medray COMMAND [ARGUMENTS]",
            "",
            "Tune medical vision-language models on a Ray cluster, evaluate and serve them.",
            "",
            "commands:",
            *lines,
            "",
            "medray COMMAND --help says more of each. On a cluster: ray job submit -- medray self-train ...",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script. Returns the command's exit status; 2 without a command that
    there is.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        from medray import __version__

        print(f"medray {__version__}")
        return 0
    if name in JOBS:
        return _job(name, arguments)
    if name in APPS:
        return _app(name, arguments)
    if name in HELPERS:
        return _helper(name, arguments)
    print(f"{usage()}\n\nmedray: {f'no command {name!r}' if name else 'name a command'}", file=sys.stderr)
    return 2


def _job(name: str, arguments: list[str]) -> int:
    beginning.end_at_signals()  # before the imports that take seconds
    from medray.commands import command_line

    command_line.program_name = f"medray {name}"
    work = importlib.import_module(f"medray.commands.{name.replace('-', '_')}").main
    return command_line.ended(lambda: work(arguments))


def _app(name: str, arguments: list[str]) -> int:
    path, about = APPS[name]
    if not arguments or arguments[0] in ("-h", "--help"):
        where = "docs/serving.md" if name == "serve" else "docs/clinician_page.md"
        print(
            f"usage: medray {name} FIELD=VALUE ...\n\n{about}\n\nThe same as: serve run {path} FIELD=VALUE "
            f"...\nFields: medray config, and {where}",
            file=sys.stdout if arguments else sys.stderr,
        )
        return 0 if arguments else 2
    from ray.serve.scripts import cli as serve

    return serve(["run", path, *arguments], standalone_mode=False) or 0


def _helper(name: str, arguments: list[str]) -> int:
    work = importlib.import_module(HELPERS[name][0]).main
    sys.argv = [f"medray {name}", *arguments]  # their parsers name themselves by it
    return work() or 0


if __name__ == "__main__":
    sys.exit(main())
