"""Benchmarks start where there is no GPU and say what they need."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted(path for path in (Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


def run(path, *arguments):
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_help_teaches(path):
    done = run(path, "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 5


def test_gpu_step_without_a_gpu_says_so():
    done = run(next(path for path in BENCHMARKS if path.stem == "gpu_step"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no CUDA device" in done.stdout
