"""What every script in jobs/ does around its work: arguments, signals, log lines, exit status, the JSON line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medray.config import ConfigT, load_config
from medray.errors import ConfigError, MedrayError, Waiting

RECIPES = Path(__file__).resolve().parent.parent / "configs"


def method_parser(name: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """The arguments that the scripts of all methods take.

    Args:
        name: of the script in jobs/, and of the folder of its recipes in configs/.
    """
    parser = argparse.ArgumentParser(prog=f"jobs/{name}.py", description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(RECIPES / name / "tiny-cpu.yaml"), metavar="YAML", help=f"recipe (default: configs/{name}/tiny-cpu.yaml)")
    parser.add_argument("--data", metavar="SOURCE", help="folder, file, s3:// or gs:// prefix; short for --set data.source=SOURCE")
    parser.add_argument("--run", metavar="DIR", help=f"run directory: local path, s3:// or gs:// (default: runs/{name}-<time>)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="change one field; may be repeated")
    parser.add_argument("--check", action="store_true", help="check the configuration and stop")
    parser.set_defaults(job=name)
    return parser


def run_method(
    arguments: argparse.Namespace, config_type: type[ConfigT], check: Callable[[ConfigT], None], work: Callable[[ConfigT, str], dict[str, Any]],
) -> int:
    """Read and check the configuration, then do the work as `run_job` does.

    Args:
        arguments: of a method_parser.
        check: raises ConfigError with all problems, before anything starts.
        work: takes the configuration and the run directory; its summary has table, report and model.

    Returns the exit status: that of run_job, or 2 for a bad configuration.
    """
    run_uri = arguments.run or f"runs/{arguments.job}-{time.strftime('%Y%m%d-%H%M%S')}"
    source = [f"data.source={json.dumps(arguments.data)}"] if arguments.data else []
    try:
        config = load_config(config_type, arguments.config, [*source, *arguments.overrides])
        check(config)
    except ConfigError as error:
        print(f"configuration error\n{error}", file=sys.stderr)
        return 2
    if arguments.check:
        print("configuration is well", file=sys.stderr)
        return 0
    return run_job(lambda: work(config, run_uri), f"--run {run_uri}", _tuned)


def _tuned(summary: dict[str, Any]) -> str:
    from medray.methods.data_report import seen_lines

    seen = seen_lines(summary)  # of the source, beside what was read
    said = f"{summary.pop('table')}\n\n{seen + chr(10) if seen else ''}report  {summary['report']}"
    if summary["model"] is None:
        return said
    return f"{said}\nmodel   {summary['model']}\nserve   serve run serve.app:build run={summary['run']} keys=keys.txt   (docs/serving.md)"


def run_job(work: Callable[[], dict[str, Any]], again: str, show: Callable[[dict[str, Any]], str] | None = None) -> int:
    """Do the work, print what `show` says of its summary to stderr and the summary as one JSON line to stdout.

    Args:
        again: the argument with which the same command continues, for example "--run runs/a".
        show: may take entries out of the summary that are for reading only.

    Returns the exit status: 0 done, 1 a stage failed, 3 the run waits for people. Interrupted, the process ends with status 130.
    """
    # A stopped job gets SIGTERM: leave through the same door as Ctrl-C, so that Ray is shut down in order.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        summary = work()
    except KeyboardInterrupt:
        print(f"\nstopped; the same command with {again} continues", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # threads of Ray and vLLM may still wait for something
    except Waiting as waiting:
        print(f"\nwaiting: {waiting}\nthen the same command with {again} continues", file=sys.stderr)
        return 3
    except MedrayError as error:
        print(f"failed: {error}\nafter mending it, the same command with {again} continues", file=sys.stderr)
        return 1
    if show is not None:
        print(f"\n{show(summary)}", file=sys.stderr)
    print(json.dumps(summary), flush=True)
    return 0
