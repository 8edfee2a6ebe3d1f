"""A model's hash follows all that decides its answers, and nothing else; a model that is not the recorded
one is named.
"""

import shutil

import pytest

from medray.errors import StageError
from medray.models.fingerprint import check_model, model_hash

PARTS = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "processor_config.json",
)
MORE = (
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "merges.txt",
    "vocab.json",
    "tokenizer.model",
    "pytorch_model.bin",
    "additional_chat_templates/tool_use.jinja",
    "1_pooling/config.json",
)


@pytest.fixture
def folder(tiny_llava, tmp_path):
    return shutil.copytree(tiny_llava, tmp_path / "model")


@pytest.mark.parametrize("name", PARTS)
def test_a_changed_or_missing_file_changes_the_hash(folder, name):
    before, content = model_hash(folder), (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert model_hash(folder) != before
    (folder / name).unlink()
    assert model_hash(folder) != before
    (folder / name).write_bytes(content)
    assert model_hash(folder) == before


@pytest.mark.parametrize("name", MORE)
def test_a_further_file_of_a_model_changes_the_hash(folder, name):
    before = model_hash(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    first = model_hash(folder)
    (folder / name).write_text("[]")
    assert len({before, first, model_hash(folder)}) == 3


def test_texts_about_a_model_and_the_place_of_its_folder_do_not(folder, tmp_path):
    before = model_hash(folder)
    for name in (
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "NOTICE.txt",
        "picture.png",
        ".gitattributes",
        ".cache/x.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("words")
    assert model_hash(folder) == before
    # Files written in another order, at another place.
    other = tmp_path / "elsewhere"
    other.mkdir()
    for file in sorted((path for path in folder.iterdir() if path.is_file()), reverse=True):
        shutil.copy(file, other / file.name)
    assert model_hash(other) == before


def test_swapped_contents_change_the_hash(folder):
    before = model_hash(folder)
    first, second = folder / "config.json", folder / "generation_config.json"
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    assert model_hash(folder) != before


def test_a_damaged_model_is_named_with_its_file(folder):
    recorded = model_hash(folder)
    check_model(folder, recorded)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged, said in (
        (whole[:-100], r"model\.safetensors is cut"),
        (b"", r"model\.safetensors is empty"),
        (b"\xff" * 100, "header"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(StageError, match=said):
            check_model(folder, recorded)
    middle = len(whole) // 2
    weights.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(StageError, match="not those that the run recorded"):
        check_model(folder, recorded)
    weights.write_bytes(whole)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(StageError, match=r"tokenizer\.json is damaged"):
        check_model(folder, recorded)
    shutil.rmtree(folder)
    with pytest.raises(StageError, match="no model"):
        check_model(folder, recorded)


def test_a_stage_holds_its_model_against_the_recorded_hash(folder):
    from medray.methods.shared.stages import Model, check_weights

    recorded = model_hash(folder)
    check_weights(Model(str(folder), recorded))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"\x7f")
    with pytest.raises(StageError, match="rerun the same command"):
        check_weights(Model(str(folder), recorded))
