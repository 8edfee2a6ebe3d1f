"""A run directory continues: done stages are skipped, changed ones start over, killed ones go on."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from medray.config import ClinicianPreferenceConfig, DpoConfig, SelfTrainingConfig
from medray.config.section import without_passwords
from medray.errors import ConfigError
from medray.running.run import Run, digest


def test_digest_sees_every_field():
    assert digest({"a": DpoConfig()}) == digest({"a": DpoConfig()})
    assert digest({"a": DpoConfig()}) != digest({"a": DpoConfig(beta=0.2)})
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_done_stage_is_skipped_and_changed_one_starts_over(tmp_path):
    calls = []

    def work(stage):
        calls.append(stage.exists("left"))
        stage.run.write_text("x", stage.folder, "left")
        return {"n": len(calls)}

    run = Run(tmp_path / "r")
    first = run.stage("a", {"x": 1}, work)
    assert Run(tmp_path / "r").stage("a", {"x": 1}, work) == first
    assert calls == [False]
    changed = run.stage("a", {"x": 2}, work)
    assert calls == [False, False]  # the folder was emptied first
    assert changed["hash"] != first["hash"]
    assert changed["outputs"] == {"n": 2}


def test_killed_stage_goes_on_from_what_it_left(tmp_path):
    def dies(stage):
        stage.run.write_text("half", stage.folder, "part")
        raise KeyboardInterrupt

    run = Run(tmp_path / "r")
    with pytest.raises(KeyboardInterrupt):
        run.stage("a", {"x": 1}, dies)
    done = Run(tmp_path / "r").stage(
        "a", {"x": 1}, lambda stage: {"part": stage.run.read_text(stage.folder, "part")}
    )
    assert done["outputs"] == {"part": "half"}
    assert done["attempts"] == 2


def test_parts_come_and_go_in_a_folder_that_stays(tmp_path):
    def work(stage):
        stage.run.write_text("x", stage.folder, f"made-{len(list(Path(stage.dir).glob('made-*')))}")
        return {"made": len(list(Path(stage.dir).glob("made-*")))}

    run = Run(tmp_path / "r")
    one = run.stage("a", {"x": 1}, work, {"p": "h1"})
    assert run.stage("a", {"x": 1}, lambda _: pytest.fail("ran again"), {"p": "h1"}) == one
    two = run.stage("a", {"x": 1}, work, {"p": "h1", "q": "h2"})
    assert (one["outputs"], two["outputs"], two["attempts"]) == ({"made": 1}, {"made": 2}, 2)
    assert two["hash"] != one["hash"]
    # the folder was emptied first
    assert run.stage("a", {"x": 2}, work, {"p": "h1", "q": "h2"})["outputs"] == {"made": 1}


def test_a_folder_that_a_killed_run_was_emptying_is_emptied(tmp_path):
    run = Run(tmp_path / "r")
    run.write_text("half of another run", "stages", "a", "left")
    assert run.stage("a", {"x": 1}, lambda stage: {"left": stage.exists("left")})["outputs"] == {
        "left": False
    }


def test_publish_replaces_whole_folders(tmp_path):
    run = Run(tmp_path / "r")

    def make(text):
        def write(folder):
            with open(f"{folder}/f", "w") as handle:
                handle.write(text)

        return write

    def dies(folder):
        make("half")(folder)
        raise RuntimeError("killed")

    run.stage("a", {}, lambda stage: stage.publish("model", make("one")) or {})
    with pytest.raises(RuntimeError):
        run.stage("b", {}, lambda stage: stage.publish("model", dies))
    assert run.read_text("stages/a/model/f") == "one"
    assert not run.exists("stages/b/model")


def test_memory_filesystem_behaves_like_a_store():
    run = Run("memory://bucket/run")
    manifest = run.stage(
        "a",
        {"x": 1},
        lambda stage: stage.publish("model", lambda d: Path(d, "f").write_text("x")) and {"k": 1},
    )
    assert run.read_text("stages/a/model/f") == "x"
    assert Run("memory://bucket/run").stage("a", {"x": 1}, lambda _: pytest.fail("ran again")) == manifest


def test_config_is_written_resolved(tmp_path):
    run = Run(tmp_path / "r")
    run.write_config(SelfTrainingConfig())
    assert (
        SelfTrainingConfig.model_validate(yaml.safe_load((tmp_path / "r/config.yaml").read_text()))
        == SelfTrainingConfig()
    )


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("postgresql+psycopg://me:p@host/name", "postgresql+psycopg://me@host/name"),
        (
            "postgresql+psycopg://me:p@ss@host:5432/name?sslmode=require",
            "postgresql+psycopg://me@host:5432/name?sslmode=require",
        ),
        ("postgresql+psycopg://me:p/w@host/name", "postgresql+psycopg://me@host/name"),
        (
            "postgresql+psycopg://me@host/name?password=p&host=/run/pg",
            "postgresql+psycopg://me@host/name?host=/run/pg",
        ),
        (
            "postgresql+psycopg://me@/name?host=/run/pg&sslpassword=p&password=p",
            "postgresql+psycopg://me@/name?host=/run/pg",
        ),
        ("redis://:p@host:6379", "redis://@host:6379"),
        ("http://me:p@a.example/v1,https://you:p@b.example", "http://me@a.example/v1,https://you@b.example"),
        *[
            (same, same)
            for same in (
                "postgresql+psycopg://me@host/name",
                "postgresql+psycopg://me@/name?host=/run/pg",
                "sqlite:////data/a:b@c.db",
                "http://localhost:8000/v1",
                "http://localhost:8000/a@b",
                "http://[::1]:8000/a@b",
                "s3://bucket/key:with@at",
                "ray://10.0.0.1:10001",
                "testbed:cells",
                "Is it a:b@c? See https://x.example/?a=b.",
                "a  b",
            )
        ],
    ],
)
def test_urls_are_written_without_their_passwords(url, written):
    got = without_passwords(url)
    assert got == written
    assert without_passwords(got) == got


def test_a_password_is_nowhere_in_a_run_and_a_new_one_starts_nothing_over(tmp_path):
    def job(source):
        config = ClinicianPreferenceConfig(clinicians={"kind": "database", "source": source})
        run = Run(tmp_path / "r")
        run.write_config(config)
        return run.stage(
            "04-clinicians",
            {"items": "h", "config": config.clinicians, "data": {"source": source}},
            lambda _: {"seen": config.clinicians.source},
        )

    first = job("postgresql+psycopg://me:s3cret@host/name")
    assert first["outputs"]["seen"] == "postgresql+psycopg://me:s3cret@host/name", "the work itself has it"
    for same in (
        "postgresql+psycopg://me:s3cret@host/name",
        "postgresql+psycopg://me:another@host/name",
        "postgresql+psycopg://me@host/name",
    ):
        assert job(same)["hash"] == first["hash"] and job(same)["attempts"] == 1
    written = {
        file.name: file.read_text()
        for file in (tmp_path / "r").rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    assert set(written) == {"config.yaml", "inputs.json", "files.jsonl", "04-clinicians.json"} and not any(
        re.search("s3cret|another", text) for text in written.values()
    )
    assert (
        ClinicianPreferenceConfig.model_validate(yaml.safe_load(written["config.yaml"])).clinicians.source
        == "postgresql+psycopg://me@host/name"
    )
    assert job("postgresql+psycopg://me:s3cret@host/other")["hash"] != first["hash"]


def test_without_a_password_hashes_are_those_of_plain_json():
    """What runs of before were continued by must not change."""
    config = ClinicianPreferenceConfig(
        clinicians={"kind": "database", "source": "postgresql+psycopg://me@host/name"},
        data={"source": "s3://bucket/a:b@c"},
    )
    value = {
        "stage": "a",
        "inputs": {
            "clinicians": config.clinicians,
            "config": config,
            "limits": (1, 2.5, None),
            "by": {2: "x", 10: "y"},
        },
    }
    plain = json.dumps(
        value, sort_keys=True, default=lambda section: section.settings(), separators=(",", ":")
    )
    assert digest(value) == hashlib.sha256(plain.encode()).hexdigest()[:16]


def test_unwritable_and_unknown_places():
    with pytest.raises(ConfigError, match="--run nosuch://x"):
        Run("nosuch://x/y")


def test_manifest_is_json(tmp_path):
    run = Run(tmp_path / "r")
    run.stage("a", {"x": 1}, lambda _: {"counts": {"rows": 3}})
    manifest = json.loads((tmp_path / "r/stages/a/manifest.json").read_text())
    assert set(manifest) == {
        "stage",
        "hash",
        "key",
        "content",
        "outputs",
        "attempts",
        "started",
        "finished",
        "seconds",
        "checksum",
    }
