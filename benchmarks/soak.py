"""Faults on the main job: what each ends in, and that no row is lost, doubled or wrong without a word.

Runs jobs/self_train.py, small, once undisturbed (the reference), and then

    kills    again and again in one run: SIGKILL of the driver, its process group, a training worker, Ray's
    controller of the
             training, the engine, the raylet or the GCS; SIGINT and SIGTERM; each at a random moment, until
             the job is done
    two      the same command twice, two seconds apart and at the same time
    disk     on a disk that is too small, twice, then with space (Linux, root: a tmpfs is mounted)
    damage   on copies of the finished run: a file of each kind is cut in half, emptied, deleted, or some of
    its bits are flipped,
             with and without the manifest of its stage

After each the same command is run to its end, and the run is held against the reference: ids of every stage
exactly once, accuracy of every model, weights. An outcome is

    same        exit status 0, and everything equals the reference
    named       exit status 1, with one sentence that names the file or the cause, and no traceback on the
    terminal WRONG       anything else, such as exit status 0 with other rows

Prints a line for each fault and one JSON line last, and ends with 1 if anything was WRONG.

    python benchmarks/soak.py [--folder DIR] [--only kills,two,disk,damage] [--kills 12] [--damages 24]
    [--seed 0] [--table FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from elasticity import exactly_once

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    "data.testbed_rows=160",
    "data.label_fraction=0.3",
    "data.max_unlabelled=24",
    "data.turns=3",
    "sft.epochs=2",
    "sft.eval_rows=8",
    "sft.checkpoint_every=2",
    "dpo.checkpoint_every=2",
    "self_play.questions=2",
    "judge.min_margin=0",
    "evaluate.max_images=6",
    "evaluate.bootstrap=100",
    "verify.rows=0",
    "engine.rows_per_task=8",
    "dpo.sft_weight=0",
    "cluster.object_store_gib=0.5",
]
PARTS = ("kills", "two", "disk", "damage")
# What a kill is aimed at: a part of the command line of a process below the job's driver; None: the driver
# itself.
TARGETS = {
    "driver": None,
    "process group": None,
    "training worker": "RayTrainWorker",
    "training controller": "ray::TrainController",
    "engine": "VLLM::EngineCore",
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
    "SIGINT": None,
    "SIGTERM": None,
}
DAMAGES = ("cut", "empty", "deleted", "flipped")
RESUME = re.compile(r"--run \S+ .*resume|resume.*--run ")
TRACEBACK = "Traceback (most recent call last)"
MARK = "MEDRAY_SOAK_RUN"  # in the environment of the job and of every process below it
MISSES = 3  # runs in a row that finish before there is anything to kill
LAST_LINE_SECONDS = 15.0  # of a driver that Ray ended: another process says it


@dataclass
class Outcome:
    """What became of one fault: `verdict` is same, named or WRONG; `seconds` of all starts together."""

    part: str
    fault: str
    verdict: str
    seconds: float
    exits: list[int]
    said: str = ""


class SoakJob:
    """The job under test in one run directory.

    Args:
        run: its run directory.
        logs: folder for what its starts print (default: beside the run).
    """

    def __init__(self, run: Path, logs: Path | None = None):
        self.run, self.logs = run, logs or run.parent
        self.starts = 0

    def command(self) -> list[str]:
        sets = [part for setting in SETTINGS for part in ("--set", setting)]
        return [sys.executable, str(ROOT / "jobs/self_train.py"), "--run", str(self.run), *sets]

    def start(self) -> tuple[subprocess.Popen, Path]:
        self.starts += 1
        log = self.logs / f"{self.run.name}-{self.starts}.log"
        environment = {
            **os.environ,
            MARK: str(self.run),
            "RAY_ADDRESS": "",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
        }
        with log.open("w") as handle:
            job = subprocess.Popen(
                self.command(),
                cwd=ROOT,
                env=environment,
                stdout=handle,
                stderr=handle,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return job, log

    def finish(self, seconds: float = 3600) -> tuple[int, str]:
        """Run the command to its end; returns its exit status and what it printed."""
        job, log = self.start()
        try:
            status = job.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            status = 124
        return status, log.read_text(errors="replace")


def last_line(printed: str) -> str:
    """What the job said of its failure: its line that begins with "failed", else its last line."""
    lines = [line for line in printed.strip().splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("failed", "configuration error", "interrupted"))]
    said = (failed or lines or [""])[-1]
    return said if len(said) <= 300 else f"{said[:297]}..."


def ids_of(run: Path) -> dict[str, str]:
    """A digest of the sorted ids of every folder of row files of the stages."""
    found: dict[str, Counter[str]] = {}
    for file in sorted(run.glob("stages/*/*/*.parquet")):
        if file.parent.name.startswith("committed"):
            continue
        names = pq.read_schema(file).names
        if "sample_id" in names:
            ids = pq.read_table(file, columns=["sample_id"])["sample_id"].to_pylist()
            found.setdefault(f"{file.parent.parent.name}/{file.parent.name}", Counter()).update(ids)
    return {
        folder: hashlib.sha256(json.dumps(sorted(ids.items())).encode()).hexdigest()[:16]
        for folder, ids in found.items()
    }


def weights_of(run: Path) -> dict[str, str]:
    """A digest of the exported weights of every stage."""
    return {
        f"{file.parents[1].name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(run.glob("stages/*/model/*.safetensors"))
    }


@dataclass
class Reference:
    """What an undisturbed run came to."""

    ids: dict[str, str]
    weights: dict[str, str]
    accuracy: dict[str, float]

    @classmethod
    def of(cls, run: Path) -> Reference:
        results = json.loads((run / "results.json").read_text())
        return cls(
            ids_of(run),
            weights_of(run),
            {name: score["value"] for name, score in results["accuracy"].items()},
        )

    def difference(self, other: Reference, trained_alike: bool) -> str:
        """What differs from the reference, in words; "" if nothing does.

        Args:
            trained_alike: no training was interrupted, so weights, and with them all that is generated, are
                equal.
        """
        given = (
            {name for name in self.ids if name.startswith("00-data")} if not trained_alike else set(self.ids)
        )
        wrong = sorted(name for name in given if self.ids[name] != other.ids.get(name))
        if wrong:
            return f"ids differ in {', '.join(wrong)}"
        if trained_alike and self.weights != other.weights:
            return "weights differ"
        if trained_alike and self.accuracy != other.accuracy:
            return f"accuracy differs: {other.accuracy}"
        return ""


def verdict(
    run: Path, reference: Reference, status: int, printed: str, trained_alike: bool
) -> tuple[str, str]:
    """(same, named or WRONG; what was said)."""
    if status == 0:
        try:
            exactly_once(run)
        except SystemExit as problem:
            return "WRONG", str(problem)
        difference = reference.difference(Reference.of(run), trained_alike)
        return ("WRONG", difference) if difference else ("same", "")
    if status != 1 or TRACEBACK in printed or not RESUME.search(printed):
        return "WRONG", f"exit {status}: {last_line(printed)}"
    return "named", last_line(printed)


def below(pid: int, title: str) -> list[psutil.Process]:
    """Processes below `pid` whose command line holds `title`."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
    return found


def strike(job: subprocess.Popen, target: str) -> bool:
    """Kill or signal `target`; whether there was one."""
    if target == "process group":
        os.killpg(job.pid, signal.SIGKILL)
    elif target in ("SIGINT", "SIGTERM"):
        job.send_signal(getattr(signal, target))
    elif TARGETS[target] is None:
        job.kill()
    else:
        processes = below(job.pid, TARGETS[target])
        if not processes:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            processes[-1].kill()
    return True


def left_over(run: Path) -> str:
    """Temporary files of the run, and processes that outlived its jobs, in words."""
    files = [
        file
        for file in run.rglob("*")
        if file.suffix in (".part", ".tmp") or file.name.startswith(("tmp", ".part-"))
    ]
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(run) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    said = [f"{len(files)} temporary files, such as {files[0].relative_to(run)}"] if files else []
    said += [f"{len(processes)} processes, such as {processes[0].name()}"] if processes else []
    return ", ".join(said)


def strike_after(process: subprocess.Popen, target: str, seconds: float) -> bool:
    """Strike as soon as `seconds` are over and there is a target; whether that was before the job ended."""
    due = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() >= due and strike(process, target):
            return True
        time.sleep(0.1)
    return False


def end_of_struck(target: str, status: int, log: Path) -> tuple[str, str]:
    """(named or WRONG; what was said) of a job that failed after it was struck."""
    if target in ("driver", "process group"):
        return (
            ("named", "")
            if status == -signal.SIGKILL
            else ("WRONG", f"exit {status} instead of {-signal.SIGKILL}")
        )
    deadline = time.monotonic() + LAST_LINE_SECONDS
    while not RESUME.search(log.read_text(errors="replace")) and time.monotonic() < deadline:
        time.sleep(0.5)
    printed = log.read_text(errors="replace")
    expected = 130 if target in ("SIGINT", "SIGTERM") else 1
    if status != expected:
        return "WRONG", f"exit {status} instead of {expected}: {last_line(printed)}"
    if not RESUME.search(printed):
        return "WRONG", f"exit {status} without a word on how to resume: {last_line(printed)}"
    if TRACEBACK in printed:
        return "WRONG", f"exit {status} with a traceback: {last_line(printed)}"
    return "named", last_line(printed)


def soak_kills(folder: Path, reference: Reference, kills: int, rng: random.Random) -> list[Outcome]:
    """One run, disturbed `kills` times, then to its end. When a job finishes, the kills that are left get
    another run.
    """
    job, outcomes, started, misses = SoakJob(folder / "kills"), [], time.monotonic(), 0
    targets = list(TARGETS)
    while len(outcomes) < kills:
        process, log = job.start()
        target, before = targets[len(outcomes) % len(targets)], time.monotonic()
        struck = strike_after(process, target, rng.choice([2, 5, 10, 15, 20, 30, 40]) + rng.random() * 5)
        try:
            status = process.wait(timeout=3600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            judged, said = "WRONG", "did not end within an hour"
        else:
            if status == 0:
                judged, said = verdict(
                    job.run, reference, status, log.read_text(errors="replace"), trained_alike=False
                )
            elif struck:
                judged, said = end_of_struck(target, status, log)
            else:
                judged, said = (
                    "WRONG",
                    f"failed before it was struck: {last_line(log.read_text(errors='replace'))}",
                )
        if status == 0:
            shutil.rmtree(job.run)
            if not struck and judged == "same":
                misses += 1
                if misses < MISSES:
                    print(f"missed kills   {target}: the job finished first; once more", flush=True)
                    continue
                judged, said = "WRONG", f"no {target} was found in {misses} runs"
        misses = 0
        outcomes.append(Outcome("kills", target, judged, time.monotonic() - before, [status], said))
        show(outcomes[-1])
    status, printed = job.finish()
    judged, said = verdict(job.run, reference, status, printed, trained_alike=False)
    time.sleep(5)
    if judged == "same" and (left := left_over(job.run)):
        judged, said = "WRONG", left
    if judged == "named":
        judged = "WRONG"
    outcomes.append(
        Outcome("kills", "the run in the end", judged, time.monotonic() - started, [status], said)
    )
    show(outcomes[-1])
    return outcomes


def soak_two(folder: Path, reference: Reference) -> list[Outcome]:
    """The same command twice: one does the work, the other is refused."""
    outcomes = []
    for pause in (2.0, 0.0):
        job, started = SoakJob(folder / f"two-{pause:g}"), time.monotonic()
        first, first_log = job.start()
        time.sleep(pause)
        second, second_log = job.start()
        exits = [first.wait(), second.wait()]
        logs = [first_log.read_text(errors="replace"), second_log.read_text(errors="replace")]
        refused = logs[exits.index(4)] if sorted(exits) == [0, 4] else ""
        if not refused:
            outcome = "WRONG", f"exit statuses {exits}"
        elif "held by" not in refused:
            outcome = "WRONG", last_line(refused)
        else:
            status, printed = job.finish()
            judged, said = verdict(job.run, reference, status, printed, trained_alike=True)
            outcome = judged if judged == "same" else "WRONG", said or last_line(refused)
        outcomes.append(
            Outcome(
                "two",
                f"two jobs {pause:g} s apart",
                outcome[0],
                time.monotonic() - started,
                exits,
                outcome[1],
            )
        )
        show(outcomes[-1])
    return outcomes


def soak_disk(folder: Path, reference: Reference, finished: Path) -> list[Outcome]:
    """A disk of parts of the run's size, then one with room."""
    disk, outcomes = folder / "disk", []
    disk.mkdir()
    size = sum(file.stat().st_size for file in finished.rglob("*") if file.is_file())
    for share in (0.15, 0.5, 0.8):
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={int(share * size)}", "tmpfs", str(disk)], check=False
        ).returncode:
            print("disk: no tmpfs can be mounted here; left out", flush=True)
            return outcomes
        try:
            job, started = SoakJob(disk / f"run-{share:g}", logs=folder), time.monotonic()
            results = [job.finish(), job.finish()]
            subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(disk)], check=True)
            results.append(job.finish())
            verdicts = [
                verdict(job.run, reference, status, printed, trained_alike=False)
                for status, printed in results
            ]
            right = verdicts[0][0] == verdicts[1][0] == "named" and verdicts[2][0] == "same"
            said = next((said for judged, said in verdicts if judged == "WRONG"), verdicts[0][1])
            judged = "same" if right else "WRONG"
            exits = [status for status, _ in results]
            outcomes.append(
                Outcome(
                    "disk",
                    f"room for {share:.0%} of the run",
                    judged,
                    time.monotonic() - started,
                    exits,
                    said,
                )
            )
            show(outcomes[-1])
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)
    return outcomes


def kinds_of(run: Path) -> dict[str, Path]:
    """One file of each kind that the run holds: numbers in names do not make another kind. The longest of
    each kind.
    """
    kinds: dict[str, Path] = {}
    for file in sorted(run.rglob("*")):
        if (
            not file.is_file()
            or file.is_symlink()
            or "cells/images" in str(file)
            or file.relative_to(run).parts[0] == "logs"
        ):
            continue
        kind = re.sub(r"[0-9a-f]{6,}|\d+(?=[-_.])|(?<=[-_])\d+", "#", str(file.relative_to(run)))
        stage = file.relative_to(run).parts[1] if file.relative_to(run).parts[0] == "stages" else ""
        kind = f"{stage}:{kind.partition('/')[2].partition('/')[2]}" if stage else kind
        if kind not in kinds or file.stat().st_size > kinds[kind].stat().st_size:
            kinds[kind] = file
    return kinds


def damage(file: Path, how: str, rng: random.Random) -> None:
    data = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        flipped = bytearray(data)
        start = len(flipped) // 2
        for place in range(start, min(start + 64, len(flipped))):
            flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(flipped))


def soak_damage(
    folder: Path, reference: Reference, finished: Path, damages: int, rng: random.Random
) -> list[Outcome]:
    """Copies of the finished run, at its own path, each with one file damaged."""
    original = folder / "finished-copy"
    shutil.copytree(finished, original, symlinks=True)
    kinds = kinds_of(original)
    plan = [(kind, how, whole) for kind in sorted(kinds) for how in DAMAGES for whole in (True, False)]
    rng.shuffle(plan)
    outcomes, job = [], SoakJob(finished)
    for kind, how, whole in plan[:damages]:
        shutil.rmtree(finished)
        shutil.copytree(original, finished, symlinks=True)
        file = finished / kinds[kind].relative_to(original)
        parts = file.relative_to(finished).parts
        manifest = finished / "stages" / parts[1] / "manifest.json" if parts[0] == "stages" else None
        if manifest is not None and not whole and manifest != file:
            manifest.unlink()
        before = time.monotonic()
        damage(file, how, rng)
        status, printed = job.finish(1200)
        # A damaged checkpoint makes an unfinished training resume from the one before, in another order of
        # rows.
        alike = whole or "train" not in parts
        judged, said = verdict(finished, reference, status, printed, trained_alike=alike)
        exits = [status]
        if judged == "named":
            # It said what the same command will do: so do it.
            status, printed = job.finish(1200)
            exits.append(status)
            again, problem = verdict(finished, reference, status, printed, trained_alike=alike)
            judged, said = ("named", said) if again == "same" else ("WRONG", f"the second start: {problem}")
        stage = "stage finished" if whole else "stage unfinished"
        name = "/".join(parts[-3:])
        outcomes.append(
            Outcome("damage", f"{how}: {name} ({stage})", judged, time.monotonic() - before, exits, said)
        )
        show(outcomes[-1])
    shutil.rmtree(finished)
    shutil.move(original, finished)
    return outcomes


def show(outcome: Outcome) -> None:
    exits = ", ".join(map(str, outcome.exits))
    print(
        f"{outcome.verdict:6} {outcome.part:7} {outcome.fault}: exit {exits}, {outcome.seconds:.0f} s  "
        f"{outcome.said}",
        flush=True,
    )


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = ["| fault | outcome | exit | what was said |", "|---|---|---|---|"]
    for outcome in outcomes:
        said = outcome.said.replace("|", "\\|")
        lines.append(
            f"| {outcome.fault} | {outcome.verdict} | {', '.join(map(str, outcome.exits))} | {said} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="for the runs (default: a temporary one, removed at the end)")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"parts, separated by commas (default: {','.join(PARTS)})"
    )
    parser.add_argument("--kills", type=int, default=12, help="disturbances of the one run (default: 12)")
    parser.add_argument(
        "--damages", type=int, default=24, help="damaged copies, drawn from all (default: 24)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", help="write the outcomes to this file as a Markdown table")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    folder = Path(options.folder or tempfile.mkdtemp(prefix="medray-soak-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rng, started, outcomes = random.Random(options.seed), time.monotonic(), []
    finished = folder / "reference"
    status, printed = SoakJob(finished).finish()
    if status:
        raise SystemExit(f"the undisturbed job failed:\n{printed[-4000:]}")
    reference = Reference.of(finished)
    print(f"reference: {time.monotonic() - started:.0f} s, {exactly_once(finished)}", flush=True)
    if "two" in only:
        outcomes += soak_two(folder, reference)
    if "disk" in only:
        outcomes += soak_disk(folder, reference, finished)
    if "kills" in only:
        outcomes += soak_kills(folder, reference, options.kills, rng)
    if "damage" in only:
        outcomes += soak_damage(folder, reference, finished, options.damages, rng)
    if options.table:
        Path(options.table).write_text(table(outcomes))
    wrong = [outcome for outcome in outcomes if outcome.verdict == "WRONG"]
    summary = {
        "benchmark": "soak",
        "seed": options.seed,
        "seconds": round(time.monotonic() - started),
        "faults": len(outcomes),
    }
    print(json.dumps({**summary, "wrong": len(wrong), "outcomes": [asdict(outcome) for outcome in outcomes]}))
    if not options.folder:
        shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
