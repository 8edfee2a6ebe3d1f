"""Which models an app serves."""

import base64
import io
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from medray.config import DataConfig, EngineConfig, SelfTrainingConfig
from medray.config.serving import ReplicaConfig, ServeConfig
from medray.errors import ConfigError
from medray.images.decoding import decode
from medray.serving.chat.examples import _shown
from medray.serving.chat.served_models import Hosted, hosted


@pytest.fixture
def run_dir(tmp_path, tiny_llava):
    """Makes a finished run's directory; its tuned model is a folder in it."""

    def make(name, base="testbed:base", **model):
        folder = tmp_path / name
        (folder / "stages/01-sq_sft").mkdir(parents=True)
        (folder / "stages/01-sq_sft/model").symlink_to(tiny_llava)
        config = SelfTrainingConfig(
            model={"path": base, "precision": "fp32", "pad_to_square": False, "system_prompt": "S", **model},
            engine={"max_model_len": 99},
        )
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        made = {
            "method": "self_train",
            "tuned": "sft",
            "base": "base",
            "models": {
                "base": {"path": base, "hash": "a"},
                "sft": {"path": "stages/01-sq_sft/model", "hash": "b"},
            },
        }
        (folder / "models.json").write_text(json.dumps(made))
        return str(folder)

    return make


def test_a_run_is_served_as_it_was_tuned(run_dir, tiny_llava):
    uri = run_dir("first")
    tuned, base = hosted(ServeConfig(run=uri))
    assert (
        (tuned.name, base.name) == ("tuned", "base")
        and tuned.path == tiny_llava
        and base.path.endswith("/base")
    )
    for model in (tuned, base):
        assert (
            model.precision,
            model.pad_to_square,
            model.system_prompt,
            model.engine.max_model_len,
            model.trust_remote_code,
        ) == ("fp32", False, "S", 99, False)
    assert "first" in tuned.about and "self_train" in tuned.about
    assert [model.name for model in hosted(ServeConfig(run=uri, base=False))] == ["tuned"]
    assert hosted(ServeConfig(run=uri, engine={"max_model_len": 7}))[0].engine.max_model_len == 7


def test_several_runs_share_the_base_they_were_tuned_from_in_the_same_way(run_dir):
    runs = {
        "a": run_dir("a"),
        "b": run_dir("b"),
        "c": run_dir("c", system_prompt="other"),
        "d": run_dir("d", base="testbed:generalist"),
    }
    assert [model.name for model in hosted(ServeConfig(runs=runs))] == [
        "a",
        "b",
        "c",
        "d",
        "a-base",
        "c-base",
        "d-base",
    ]


def test_models_of_no_run(tiny_llava):
    (model,) = hosted(ServeConfig(models=[{"name": "mine", "path": tiny_llava, "precision": "fp32"}]))
    assert (model.name, model.path, model.system_prompt) == ("mine", tiny_llava, "")


def test_what_is_no_finished_run(run_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"config.yaml.*no run directory"):
        hosted(ServeConfig(run=str(tmp_path / "none")))
    uri = run_dir("half")
    (tmp_path / "half/models.json").unlink()
    with pytest.raises(ConfigError, match=r"models.json.*not finished.*--run"):
        hosted(ServeConfig(run=uri))
    (tmp_path / "half/models.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        hosted(ServeConfig(run=uri))
    (tmp_path / "half/models.json").write_text('{"tuned": "sft"}')
    with pytest.raises(ConfigError, match="another version"):
        hosted(ServeConfig(run=uri))


def test_names_that_are_taken(run_dir, tiny_llava):
    uri = run_dir("one")
    mine = {"path": tiny_llava}
    with pytest.raises(ConfigError, match="two models are named base"):
        hosted(ServeConfig(run=uri, models=[{"name": "base", **mine}]))
    for bad in (
        {"run": uri, "models": [{"name": "tuned", **mine}]},
        {"runs": {"a b": uri}},
        {"models": [{"name": "", **mine}]},
        {},
        {"run": uri, "replicas": [3, 2]},
        {"run": uri, "limits": {"hosts": ["https://x.org/y"]}},
        {"run": uri, "unknown": 1},
    ):
        with pytest.raises(ValueError, match="1 validation error"):
            ServeConfig.model_validate(bad)


def test_placement_is_known_without_the_model():
    """A model at an address is fetched by its replica, not by the process that deploys it."""
    from medray.serving.chat.model_server import settings

    model = Hosted(name="far", path="s3://bucket/model", engine=EngineConfig(cpus_per_actor=3))
    config = ReplicaConfig(replicas=(0, 5), place={"memory_gib": 2})
    found = settings(model, config)
    assert found.placement_group_config["bundle_per_worker"] == {"CPU": 3, "memory": 2 * 2**30}
    assert {"min_replicas": 0, "max_replicas": 5, "initial_replicas": 0}.items() <= found.deployment_config[
        "autoscaling_config"
    ].items()
    on_gpus = Hosted(
        name="far",
        path="s3://bucket/model",
        engine=EngineConfig(cpus_per_actor=8, gpus_per_actor=4, tensor_parallel_size=4),
    )
    found = settings(on_gpus, ReplicaConfig(replicas=(1, 2)))
    assert found.placement_group_config["bundle_per_worker"] == {"CPU": 2, "GPU": 1}
    assert found.engine_kwargs["tensor_parallel_size"] == 4


def test_replicas_go_where_they_are_placed(ray_cluster, run_dir):
    """What Serve is asked for: the label selector holds for every bundle of a replica's placement group."""
    from ray.serve._private.build_app import build_app

    from medray.serving.chat.app import build

    uri = run_dir("placed")
    for place, selectors in (
        (
            {"labels": {"medray-group": "!data"}, "accelerator": "!in(A100,H100)"},
            [{"medray-group": "!data", "ray.io/accelerator-type": "!in(A100,H100)"}],
        ),
        ({}, None),
    ):
        deployments = build_app(build(ServeConfig(run=uri, open=True, place=place)), name="app").deployments
        found = {one.name: one._replica_config.placement_group_bundle_label_selector for one in deployments}
        assert found == {"ModelServer:tuned": selectors, "ModelServer:base": selectors, "ingress": None}


def test_what_has_no_room_is_not_built(ray_cluster, run_dir):
    from medray.serving.chat.app import build

    uri = run_dir("large")
    for options in (
        {"engine_cpus": 2},
        {"place": {"labels": {"medray-group": "generate"}}},
        {"place": {"accelerator": "A100"}},
        {"ingress_cpus": 5},
    ):
        with pytest.raises(ConfigError, match="lower engine_cpus"):
            build(ServeConfig(run=uri, open=True, **options))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"model mine: .*no config.json"):
        hosted(ServeConfig(models=[{"name": "mine", "path": str(tmp_path)}]))


def test_lists_and_maps_of_a_command_line():
    config = ServeConfig.model_validate(
        {
            "run": "r",
            "replicas": "[0,4]",
            "title": "[a] page",
            "limits": "{tokens: 9, hosts: [a.example]}",
            "engine": "{max_num_seqs: 3}",
        }
    )
    assert (
        config.replicas,
        config.title,
        config.limits.tokens,
        config.limits.hosts,
        config.engine.max_num_seqs,
    ) == ((0, 4), "[a] page", 9, ["a.example"], 3)
    with pytest.raises(ValueError, match="cannot be read"):
        ServeConfig.model_validate({"run": "r", "replicas": "[0,"})


def test_a_replica_is_replaced_for_its_own_settings_only():
    before = ServeConfig(run="r").of_replicas
    assert (
        ServeConfig(
            run="r", revision="2", limits={"hosts": ["a.example"], "seconds": 900, "text_chars": 5}
        ).of_replicas
        == before
    )
    assert ServeConfig(run="r", limits={"tokens": 5}).of_replicas != before


def test_examples_look_as_models_see_them():
    """Sixteen bits by their own range, upright: the page sends on what it shows."""
    stream, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.arange(40 * 20, dtype=np.uint16).reshape(20, 40)).save(stream, "PNG", exif=turned)
    shown = _shown({"question": "Q?", "reference": None, "image": stream.getvalue()})
    found = Image.open(io.BytesIO(base64.b64decode(shown["image"].partition(",")[2])))
    assert found.size == (20, 40) and np.array_equal(
        np.asarray(found), np.asarray(decode(stream.getvalue(), DataConfig()))
    )
    assert np.asarray(found).min() == 0 and np.asarray(found).max() == 255
