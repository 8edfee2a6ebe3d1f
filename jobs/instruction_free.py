"""Instruction-free tuning of a medical vision-language model (arXiv 2603.19482), as one resumable Ray job.

From images with descriptions alone (attribute tables, captions, reports); no question, answer or instruction is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `ray job submit --working-dir .` has no installed medray

from medray.config import InstructionFreeConfig, load_config
from medray.errors import ConfigError
from medray.job import run_job

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "instruction_free" / "tiny-cpu.yaml"

EPILOG = """\
what it does
  data -> warm-up (a proxy instruction of k vectors learns alone) -> tuning (vision tower, projector and proxy) -> export without
  the proxy -> verify -> multiple choice, leaked descriptions, general questions kept, descriptions -> report.html

examples
  python jobs/instruction_free.py                                  the demo: synthetic cells, bundled tiny model, two cores
  python jobs/instruction_free.py --data path/to/wbcatt --run runs/cells --set tune.proxy.count=32
  python jobs/instruction_free.py --set 'tune.instruction=Describe this medical scan.' --set tune.shuffling=none     the plain way, to compare
  python jobs/instruction_free.py --config configs/instruction_free/qwen2.5-vl-7b.yaml --data s3://bucket/reports --run s3://bucket/runs/a \\
    --set tune.shuffling=sentences --set evaluate.general=s3://bucket/vqa-rad
  ray job submit --working-dir . -- python jobs/instruction_free.py --config configs/instruction_free/qwen2.5-vl-7b.yaml --data ... --run ...

The same command continues a run that was stopped or killed. Every field: docs/reference/config.md, or `medray config`.
The method, and what to set: docs/instruction_free.md. The last line on stdout is JSON: {"run", "base": {"strict", ...}, "tuned", "floors", ...}.
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jobs/instruction_free.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), metavar="YAML", help="recipe (default: configs/instruction_free/tiny-cpu.yaml)")
    parser.add_argument("--data", metavar="SOURCE", help="folder, file, s3:// or gs:// prefix; short for --set data.source=SOURCE")
    parser.add_argument("--run", metavar="DIR", help="run directory: local path, s3:// or gs:// (default: runs/instruction_free-<time>)")
    parser.add_argument("--shared", metavar="DIR", help="run directory for what other runs can use too (data, warm-up, base model's evaluation); default: --run")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="change one field; may be repeated")
    parser.add_argument("--check", action="store_true", help="check the configuration and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a stage failed, 2 bad configuration, 130 interrupted."""
    arguments = parse(argv)
    run_uri = arguments.run or f"runs/instruction_free-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        overrides = list(arguments.overrides)
        if arguments.data:
            overrides.insert(0, f"data.source={json.dumps(arguments.data)}")
        config = load_config(InstructionFreeConfig, arguments.config, overrides)

        from medray.preflight import check_instruction_free

        check_instruction_free(config)
    except ConfigError as error:
        print(f"configuration error\n{error}", file=sys.stderr)
        return 2
    if arguments.check:
        print("configuration is well", file=sys.stderr)
        return 0

    def work() -> dict:
        from medray.methods.instruction_free import instruction_free

        return instruction_free(config, run_uri, arguments.shared)

    return run_job(work, f"--run {run_uri}", lambda summary: (
        f"{summary.pop('table')}\n\nreport  {summary['report']}\nmodel   {summary['model']}\nserve   vllm serve {summary['model']}"
    ))


if __name__ == "__main__":
    sys.exit(main())
