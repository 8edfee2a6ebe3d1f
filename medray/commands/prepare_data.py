"""Turn what people have into shards that every medray job reads: streaming, resumable, every dropped row
named.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from medray.commands.command_line import job_parser, run_job
from medray.config import PrepareDataConfig, load_config
from medray.errors import ConfigError, MedrayError
from medray.plan.preflight import check_output, check_source

EPILOG = """\
formats (found by content; --format names one)
  llava              conversations or messages as JSON or JSONL, with images (LLaVA-Med's `conversatons` too)
  llava-med-captions figure captions with in-text mentions (pair_id, fig_caption)
  llava-med-qa       LLaVA-Med's chat benchmark (question_id, gpt4_answer)
  vqa-rad  slake  pmc-vqa  omnimedvqa       the files as published
  hf-parquet         Hugging Face Parquet with image{bytes,path}: questions, dialogues, texts
  wbcatt  skincon  cbis-ddsm           attribute tables; CBIS-DDSM with its DICOM files or their JPEG copies
  preference         preference rows of TRL (prompt, chosen, rejected) and LLaMA-Factory
  questions          a table of image files, question and answer, with options or without
  webdataset         tars of key.jpg + key.json or key.txt
  captions  images  dicom                   a folder with a captions CSV, of images alone, of DICOM files
  shards             what this job wrote

examples
  python jobs/prepare_data.py path/to/vqa_rad --to data/vqa-rad
  python jobs/prepare_data.py s3://bucket/dicom --to s3://bucket/prepared --set data.testbed_val_fraction=0.2
  python jobs/prepare_data.py --inspect data/vqa-rad
  python jobs/prepare_data.py --export webdataset data/vqa-rad --to tars/
  ray job submit --working-dir . -- python jobs/prepare_data.py s3://bucket/raw --to s3://bucket/prepared

The same command continues a run that was stopped. data.source of any job takes the directory.
The last line on stdout is JSON:
{"run", "format", "images", "splits", "questions", "quarantined", "duplicates", "leaks", ...}.
"""


def parser() -> argparse.ArgumentParser:
    parser = job_parser("prepare_data", __doc__, EPILOG)
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="folder, file, s3:// or gs:// prefix; short for --set data.source=SOURCE",
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        help="directory to write: local path, s3:// or gs:// (default: runs/data-<time>)",
    )
    parser.add_argument(
        "--format", metavar="NAME", help="the source's format; short for --set data.format=NAME"
    )
    parser.add_argument("--config", metavar="YAML", help="a recipe; its sections: data, leaks, cluster")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=c",
        help="change one field; may be repeated",
    )
    parser.add_argument(
        "--inspect", metavar="DIR", help="show what a prepared directory holds and write its sample sheet"
    )
    parser.add_argument(
        "--export",
        nargs=2,
        metavar=("FORMAT", "DIR"),
        help="write a prepared directory as webdataset, llava or trl, to --to",
    )
    parser.add_argument("--rows", type=int, default=24, help="images on the sample sheet (default 24)")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return parser().parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad configuration, 4 held by another job, 130 interrupted."""
    arguments = parse(argv)
    if arguments.inspect:
        return _inspect(arguments)
    target = arguments.to or f"runs/data-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        overrides = list(arguments.overrides)
        for name, value in (("source", arguments.source), ("format", arguments.format)):
            if value:
                overrides.insert(0, f"data.{name}={json.dumps(value)}")
        config = load_config(PrepareDataConfig, arguments.config, overrides)
        if not arguments.export and "source" not in config.data.model_fields_set:
            parser().print_usage(sys.stderr)
            raise ConfigError(
                "SOURCE: name what to prepare (a folder, file, s3:// or gs:// prefix), or a recipe that has "
                "data.source"
            )
        check_output("--to", target)
        if arguments.export:
            from medray.methods.prepare_data.export import check_export

            check_export(*arguments.export)
        else:
            check_source(config.data)
    except ConfigError as error:
        print(f"configuration error\n{error}", file=sys.stderr)
        return 2

    def work() -> dict:
        if arguments.export:
            from medray.methods.prepare_data.export import export_dataset

            return export_dataset(*arguments.export, target)
        from medray.methods.prepare_data.pipeline import prepare_dataset

        return prepare_dataset(config, target)

    from medray.methods.shared.data_report import prepared_lines

    return run_job(work, f"--to {target}", None if arguments.export else prepared_lines)


def _inspect(arguments: argparse.Namespace) -> int:
    from medray.methods.shared.data_report import inspect

    try:
        found = inspect(arguments.inspect, arguments.rows, arguments.to)
    except MedrayError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1))
    return 0
