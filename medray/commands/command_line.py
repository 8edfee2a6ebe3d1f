"""What every script in jobs/ does around its work: arguments, signals, log lines, exit status, the JSON
line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from medray.commands import beginning
from medray.config import ConfigT, LoopConfig, Section, load_config
from medray.config.recipes import names as recipe_names
from medray.errors import ConfigError, MedrayError, RunHeld, RunLost, Waiting
from medray.plan.preflight import check_run
from medray.running import run_hold
from medray.running.failures import describe
from medray.running.interrupts import JobSignals, descendants, kill
from medray.running.run import stage_in_progress
from medray.running.run_lock import release_all
from medray.running.run_log import kept_aside, location
from medray.running.watcher import Watcher

DONE, FAILED, BAD_CONFIGURATION, WAITING, HELD, INTERRUPTED = 0, 1, 2, 3, 4, 130
RELEASE_SECONDS = 2.0
DEFAULT_RECIPE = "tiny-cpu"  # the demo's


program_name: str | None = None  # what the user called, if it is not a script of jobs/


def job_parser(name: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """A parser that calls itself, in usage and examples, what the user called.

    Args:
        name: of the script in jobs/.
    """
    script = f"jobs/{name}.py"
    examples = epilog.replace(f"python {script}", program_name) if program_name else epilog
    return argparse.ArgumentParser(
        prog=program_name or script,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def method_parser(name: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """The arguments that the scripts of all methods take.

    Args:
        name: of the script in jobs/, and of the folder of its recipes.
    """
    parser = job_parser(name, description, epilog)
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="recipe that comes with medray "
        f"({', '.join(part.partition('/')[2] for part in recipe_names(name))}), or a YAML file "
        f"(default: {DEFAULT_RECIPE}, the demo's)",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="folder, file, s3:// or gs:// prefix; short for --set data.source=SOURCE",
    )
    parser.add_argument(
        "--run",
        metavar="DIR",
        help=f"run directory: local path, s3:// or gs:// (default: runs/{name}-<time>)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=c",
        help="change one field; may be repeated",
    )
    parser.add_argument("--check", action="store_true", help="check the configuration and stop")
    parser.set_defaults(job=name)
    return parser


def run_method(
    arguments: argparse.Namespace,
    config_type: type[ConfigT],
    check: Callable[[ConfigT], None],
    work: Callable[[ConfigT, str], dict[str, Any]],
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
    recipe = arguments.config or DEFAULT_RECIPE
    try:
        config = load_config(config_type, recipe, [*source, *arguments.overrides])
        check(config)
        check_run(run_uri)
    except ConfigError as error:
        print(f"configuration error\n{error}", file=sys.stderr)
        return BAD_CONFIGURATION
    print("\n".join(_notes(config, arguments.job, arguments.config is None)), file=sys.stderr)
    if arguments.check:
        print("configuration OK", file=sys.stderr)
        return DONE
    return run_job(lambda: work(config, run_uri), f"--run {run_uri}", _tuned)


def _notes(config: Section, job: str, is_default: bool) -> list[str]:
    """What a job says of its configuration before it starts: the recipe that nobody named, the batches,
    defaults that surprise.
    """
    lines = []
    if is_default:
        others = ", ".join(
            name.partition("/")[2] for name in recipe_names(job) if not name.endswith(f"/{DEFAULT_RECIPE}")
        )
        lines.append(f"recipe: {DEFAULT_RECIPE} (--config names none; there are also {others})")
        own = [
            name
            for name, value in (("data.source", config.data.source), ("model.path", config.model.path))
            if not value.startswith("testbed:")
        ]
        if own:
            lines.append(
                f"warning: {' and '.join(own)} {'is' if len(own) == 1 else 'are'} yours, and this recipe is "
                "the demo's: its rates, lengths and batches are "
                "for the bundled model of 3 million parameters, and its judges and writers know synthetic "
                "blood cells only; name a recipe for your model with --config"
            )
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, LoopConfig):
            lines.append(f"{name}: {section.batch_line}")
    return lines


def _tuned(summary: dict[str, Any]) -> str:
    from medray.methods.shared.data_report import seen_lines

    seen = seen_lines(summary)  # of the source, beside what was read
    said = f"{summary.pop('table')}\n\n{seen + chr(10) if seen else ''}report  {summary['report']}"
    if summary["model"] is None:
        return said
    return (
        f"{said}\nmodel   {summary['model']}\nserve   serve run serve.app:build run={summary['run']} "
        "keys=keys.txt   (docs/serving.md)"
    )


def run_job(
    work: Callable[[], dict[str, Any]], again: str, show: Callable[[dict[str, Any]], str] | None = None
) -> int:
    """Do the work, print what `show` says of its summary to stderr and the summary as one JSON line to
    stdout.

    Whatever leaves the work ends in a line that says what failed, where the log is and how to resume; its
    traceback is in the log.

    Args:
        again: the argument with which the same command resumes the run, for example "--run runs/a".
        show: may take entries out of the summary that are for reading only.

    Returns the exit status: 0 done, 1 failed, 2 bad configuration that was found before any stage began (a
    run that cannot be written), 3 the run waits for people, 4 another job holds the run. Interrupted, or
    taken over by another job, the process ends here with 130 or 4.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    ending = _Ending(again)
    with JobSignals(ending.interrupted, ending.notice, ending.lost) as signals:
        ending.signals = signals
        try:
            return _done(work(), show)
        except (KeyboardInterrupt, SystemExit) as error:
            # handlers that Ray installs end the process by SystemExit
            if isinstance(error, KeyboardInterrupt) or signals.received:
                ending.interrupted()
            return ending.failed(error)
        except Exception as error:
            # the job's boundary: everything ends in words for the user, its traceback is in the log
            if signals.received:  # what the work made of the interrupt, or of processes that it ended
                ending.interrupted()
            return ending.failed(error)
        finally:
            signals.over()
            ending.close()


def ended(main: Callable[[], int]) -> int:
    """What a script in jobs/ exits with: what its main returns, or the status of what ended it before a
    job was started.
    """
    try:
        status = main()
        beginning.over()
        return status
    except KeyboardInterrupt:
        _say("\ninterrupted; nothing was started")
        return INTERRUPTED
    except Exception as error:  # the process's boundary, as in run_job
        _say(
            f"failed: {str(error) if isinstance(error, MedrayError) else describe(error)}; nothing was "
            f"started\nlog: {kept_aside(error)}"
        )
        return FAILED


def _done(summary: dict[str, Any], show: Callable[[dict[str, Any]], str] | None) -> int:
    if show is not None:
        print(f"\n{show(summary)}", file=sys.stderr)
    print(json.dumps(summary), flush=True)
    return DONE


def _say(text: str) -> None:
    """To stderr, if there still is somebody: a terminal that was closed must not keep a job from its end."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class _Ending:
    """How a job ends other than well.

    Args:
        again: the argument with which the same command resumes.
    """

    def __init__(self, again: str):
        self.again = again
        self.signals: JobSignals | None = None
        self._once = threading.Lock()
        self._watcher = Watcher(again)
        run_hold.announce = lambda uri: self._watcher.tell(f"log {uri}")

    def close(self) -> None:
        run_hold.announce = None
        self._watcher.end()

    def failed(self, error: BaseException) -> int:
        """Say what failed. Returns the exit status."""
        try:
            return self._failed(error)
        except KeyboardInterrupt:  # nobody reads what it says
            self.interrupted()

    def _failed(self, error: BaseException) -> int:
        if isinstance(error, Waiting):
            _say(f"\nwaiting: {error}\nthen rerun the same command with {self.again} to resume")
            return WAITING
        if isinstance(error, RunHeld | RunLost):
            _say(f"failed: {error}")
            return HELD
        stage = stage_in_progress()
        if isinstance(error, ConfigError) and stage is None:
            _say(f"configuration error\n{error}")
            return BAD_CONFIGURATION
        where = f"stage {stage}: " if stage else ""
        said = str(error) if isinstance(error, MedrayError) else describe(error)
        log = location()
        if log is None and not isinstance(error, MedrayError):
            log = kept_aside(error)
        at = f"log: {log}\n" if log else ""
        _say(
            f"failed: {where}{said}\n{at}fix the cause, then rerun the same command with {self.again} to "
            "resume"
        )
        return FAILED

    def notice(self) -> None:
        """The first signal was heard."""
        _say("\nstopping; press Ctrl-C again to stop at once")

    def interrupted(self) -> NoReturn:
        """End the process: whatever of Ray and vLLM is left may be waiting for something."""
        self._end(f"interrupted; rerun the same command with {self.again} to resume", INTERRUPTED)

    def lost(self, reason: str) -> NoReturn:
        """End the process before it writes anything into a run that another job has taken over."""
        self._end(f"failed: {reason}", HELD)

    def _end(self, line: str, status: int) -> NoReturn:
        # Whatever blocks below, such as a pipe that nobody reads, the process ends.
        by_force = threading.Timer(RELEASE_SECONDS + 1, os._exit, [status])
        by_force.daemon = True
        by_force.start()
        # for good: the main thread and that of the signals may both come here
        if not self._once.acquire(timeout=2 * RELEASE_SECONDS):
            os._exit(status)
        processes = descendants() | (self.signals.family if self.signals is not None else set())
        kill({process for process in processes if process.pid != self._watcher.pid})
        release_all(RELEASE_SECONDS)
        _say(f"\n{line}")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        self._watcher.tell("end")
        os._exit(status)
