"""What `pip install` of the wheel gives, away from the checkout."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (path,) = folder.glob("medray-*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Run a program of an environment with the wheel in it, and with what this one has installed, in an
    empty folder.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env")
    python = folder / "env/bin/python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(command, check=True)
    # A line of a .pth file adds a folder, and nothing that the .pth files in that folder add: not this
    # checkout.
    site = next((folder / "env").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (folder / "empty").mkdir()

    def run(*arguments):
        program, *rest = arguments
        environment = {"PATH": f"{folder}/env/bin:/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [folder / "env/bin" / program, *rest],
            cwd=folder / "empty",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_wheel_brings_one_module(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {"medray", "medray_torchvision_shim.pth"}
    inner = zipfile.ZipFile(wheel).namelist()
    for part in (
        "recipes/self_train/tiny-cpu.yaml",
        "recipes/templates/llava-v1.jinja",
        "serving/static/style.css",
        "serving/chat/static/try.html",
        "serving/clinician_page/static/index.html",
        "inference/prompts/judge.txt",
        "testbed/models/base/model.safetensors",
        "py.typed",
    ):
        assert f"medray/{part}" in inner


def test_the_command_works_in_an_empty_folder(run):
    told = run("medray", "--help")
    assert told.returncode == 0 and "self-train" in told.stdout
    assert "self_train/llava-1.5-7b" in run("medray", "recipes").stdout
    checked = run("medray", "self-train", "--check")
    assert checked.returncode == 0 and "configuration OK" in checked.stderr, checked.stderr
    assert "usage: medray self-train" in run("medray", "self-train", "--help").stdout
    for name in ("", "nothing", "prepare-data", "evaluate", "serve", "annotate"):
        refused = run("medray", *([name] if name else []))
        assert refused.returncode == 2 and "usage: medray" in refused.stderr, name


def test_the_public_names_are_those_of_the_wheel(run):
    code = (
        "import medray, importlib.util as u; print(medray.__file__); [getattr(medray, name) for name in "
        "medray.__all__]; print([n for n in ('serve','jobs','tests','configs','studies') if u.find_spec(n)])"
    )
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert "/env/" in lines[0] and lines[-1] == "[]"


def test_a_template_that_comes_along_is_found(run):
    code = (
        "from medray.config.recipes import read_template; print(len(read_template('medray:llava-v1.jinja')))"
    )
    assert int(run("python", "-c", code).stdout) > 10
