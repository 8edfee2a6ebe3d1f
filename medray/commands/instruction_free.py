"""Instruction-free tuning of a medical vision-language model (arXiv 2603.19482), as one resumable Ray job.

From images with descriptions alone (attribute tables, captions, reports); no question, answer or instruction
is needed.
"""

from __future__ import annotations

from medray.commands.command_line import method_parser, run_method
from medray.config import InstructionFreeConfig
from medray.plan.preflight import check_instruction_free

EPILOG = """\
what it does
  data -> warm-up (a proxy instruction of k vectors learns alone) -> tuning (vision tower, projector and
  proxy)
  -> export without the proxy -> verify -> multiple choice, leaked descriptions, general questions kept,
  descriptions -> report.html

examples
  python jobs/instruction_free.py                 the demo: synthetic cells, bundled tiny model, two cores
  python jobs/instruction_free.py --data path/to/wbcatt --run runs/cells --set tune.proxy.count=32
  python jobs/instruction_free.py --set 'tune.instruction=Describe this medical scan.' \\
    --set tune.shuffling=none
                                                  the plain way, to compare
  python jobs/instruction_free.py --config qwen2.5-vl-7b --data s3://bucket/reports \\
    --run s3://bucket/runs/a \\
    --set tune.shuffling=sentences --set evaluate.general=s3://bucket/vqa-rad
  ray job submit --working-dir . -- python jobs/instruction_free.py --config qwen2.5-vl-7b --data ... \\
    --run ...

The same command resumes a run that was stopped or killed.
Every field: `medray config`, docs/reference/config.md.
The method, and what to set: docs/instruction_free.md.
The last line on stdout is JSON: {"run", "base": {"strict", ...}, "tuned", "floors", ...}.
"""


def work(config: InstructionFreeConfig, run_uri: str, shared_uri: str | None) -> dict:
    from medray.methods.instruction_free.pipeline import instruction_free

    return instruction_free(config, run_uri, shared_uri)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a stage failed, 2 bad configuration, 4 held by another job, 130 interrupted."""
    parser = method_parser("instruction_free", __doc__, EPILOG)
    parser.add_argument(
        "--shared",
        metavar="DIR",
        help="run directory for what other runs can use too (data, warm-up, base model's evaluation); "
        "default: --run",
    )
    arguments = parser.parse_args(argv)
    return run_method(
        arguments,
        InstructionFreeConfig,
        check_instruction_free,
        lambda config, run_uri: work(config, run_uri, arguments.shared),
    )
