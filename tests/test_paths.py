"""Paths that libraries would read as patterns or as other addresses are refused before anything starts."""

import pytest

from medray.commands.prepare_data import main
from medray.config import DataConfig
from medray.errors import ConfigError
from medray.paths import address_problems, model_folder_problems, output_problems
from medray.plan.preflight import check_run, model_problems, source_problems


@pytest.mark.parametrize(
    "path", ["a [1]/b", "c*d", "e?f", "g#h", "100%", "ü é", "s3://bucket/a b", "{x}", "a:b", "C:/x"]
)
def test_names_that_are_only_names(path):
    assert address_problems("data.source", path) == []


@pytest.mark.parametrize(
    ("path", "words"), [("/data/a::b/x", "'::'"), ("/data/x://b", "'://'"), ("s3://b/zip::x", "'::'")]
)
def test_names_that_are_other_addresses(tmp_path, path, words):
    for problems in (
        address_problems("f", path),
        output_problems("f", path),
        model_folder_problems("f", path),
    ):
        assert len(problems) == 1
        assert words in problems[0] and path in problems[0]
    assert any(words in problem for problem in source_problems(DataConfig(source=path)))
    (tmp_path / "in").mkdir()
    assert main([str(tmp_path / "in"), "--to", path]) == 2


def test_patterns_where_something_is_removed_or_models_are_loaded(tmp_path):
    assert output_problems("--to", "out [a1]") == []
    assert "read as a pattern" in output_problems("--to", "s3://bucket/out [a1]")[0]
    with pytest.raises(ConfigError, match="--run"):
        check_run(str(tmp_path / "run [1]"))
    check_run(str(tmp_path / "run 1"))
    folder = tmp_path / "model [a]"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    assert "rename it" in model_problems("model.path", str(folder))[-1]


def test_a_folder_of_images_that_is_not_there(tmp_path):
    assert (
        "is no folder" in source_problems(DataConfig(source=str(tmp_path), images=str(tmp_path / "none")))[0]
    )
