"""Models at remote addresses are copied once per node, and anew when they change."""

from pathlib import Path

import fsspec
import pytest

from medray.errors import StageError
from medray.models.cache import localize
from medray.models.vlm import load_processor, load_vlm, model_hash
from tests.integration.conftest import BUCKET, s3  # noqa: F401 (a fixture)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDRAY_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    return fs


def test_local_paths_and_hub_ids_stay(store):
    assert localize("/models/x") == "/models/x"
    assert localize("org/name") == "org/name"
    assert localize("file:///models/x") == "/models/x"


def test_copied_once_and_anew_after_a_change(store, tmp_path):
    store.pipe_file("/bucket/m/config.json", b"{}")
    store.pipe_file("/bucket/m/sub/a.txt", b"one")
    first = localize("memory://bucket/m")
    assert Path(first, "config.json").read_bytes() == b"{}"
    assert Path(first, "sub", "a.txt").read_bytes() == b"one"
    assert localize("memory://bucket/m") == first
    store.pipe_file("/bucket/m/sub/a.txt", b"other")
    second = localize("memory://bucket/m")
    assert second != first
    assert Path(second, "sub", "a.txt").read_bytes() == b"other"
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if p.name.startswith(".")]


def test_nothing_there(store):
    with pytest.raises(StageError, match="memory://bucket/none"):
        localize("memory://bucket/none")


def test_a_remote_model_loads_like_a_local_one(store, tiny_llava):
    store.put(tiny_llava + "/", "/bucket/llava/", recursive=True)
    assert model_hash("memory://bucket/llava") == model_hash(tiny_llava)
    assert (
        load_processor("memory://bucket/llava").tokenizer.eos_token
        == load_processor(tiny_llava).tokenizer.eos_token
    )
    remote, local = load_vlm("memory://bucket/llava", "fp32"), load_vlm(tiny_llava, "fp32")
    assert all(
        bool((a == b).all())
        for a, b in zip(remote.state_dict().values(), local.state_dict().values(), strict=True)
    )


def test_a_model_in_a_bucket_is_hashed_where_it_is(store, s3, monkeypatch, tiny_llava, tmp_path):  # noqa: F811
    environment, fs = s3
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def put(folder, **files):
        fs.put(tiny_llava + "/", f"{BUCKET}/{folder}/", recursive=True)
        for name, data in files.items():
            fs.pipe_file(f"{BUCKET}/{folder}/{name.replace('_', '.')}", data)
        fsspec.filesystem("s3").invalidate_cache()
        return model_hash(f"s3://{BUCKET}/{folder}")

    first = put("models/a")
    assert first == put("models/b"), "the same files elsewhere"
    assert first == put("models/a", README_md=b"no weights"), "what is no part of the model"
    assert first != put("models/a", extra_safetensors=b"more")
    weights = Path(tiny_llava, "model.safetensors").read_bytes()
    assert first != put("models/b", model_safetensors=weights[:-1] + bytes([weights[-1] ^ 1])), (
        "as many bytes, others"
    )
    assert not (tmp_path / "cache").exists(), "nothing was copied"
