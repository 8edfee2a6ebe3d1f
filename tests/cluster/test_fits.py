"""What stages ask for, what nodes have, and the refusal of a recipe that would wait for ever. Values
counted by hand.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from medray.config import (
    ClinicianPreferenceConfig,
    DpoConfig,
    EngineConfig,
    InstructionFreeConfig,
    Placement,
    SelfTrainingConfig,
    load_config,
)
from medray.config.serving import ServeConfig
from medray.errors import ConfigError
from medray.plan.demand import Demand, demands, served_demands
from medray.plan.groups import Group, matches, misfits, quantity, read_groups, read_served

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [
    ("self_train/llava-1.5-7b", SelfTrainingConfig),
    ("self_train/qwen2.5-vl-7b", SelfTrainingConfig),
    ("instruction_free/qwen2.5-vl-7b", InstructionFreeConfig),
    ("clinician_preference/qwen2.5-vl-7b", ClinicianPreferenceConfig),
]
TRAINING = {
    SelfTrainingConfig: ["sft", "dpo"],
    InstructionFreeConfig: ["warm_up", "tune"],
    ClinicianPreferenceConfig: ["rater", "tune"],
}
POOLS = {
    SelfTrainingConfig: ["engine"],
    InstructionFreeConfig: ["engine"],
    ClinicianPreferenceConfig: ["engine", "demonstrations", "score"],
}
LABELLED = ["aws", "gcp", "kuberay/raycluster", "kuberay/rayjob"]


def recipe(name, cls, overrides=()):
    return load_config(cls, ROOT / "medray/recipes" / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize("cluster", [*LABELLED, "local"])
@pytest.mark.parametrize(("name", "cls"), RECIPES)
def test_every_gpu_recipe_fits_every_cluster(name, cls, cluster):
    groups = read_groups(ROOT / "cluster" / f"{cluster}.yaml")
    assert misfits(demands(recipe(name, cls)), groups) == []


@pytest.mark.parametrize("cluster", LABELLED)
@pytest.mark.parametrize(("name", "cls"), RECIPES)
def test_placed_by_label_they_fit_too_at_their_largest(name, cls, cluster):
    training = [f"{stage}.place.labels={{medray-group: train}}" for stage in TRAINING[cls]]
    pools = [f"{stage}.place.labels={{medray-group: generate}}" for stage in POOLS[cls]]
    config = recipe(name, cls, ["cluster.data_labels={medray-group: data}", *training, *pools])
    for section in (getattr(config, stage) for stage in TRAINING[cls]):
        section.num_workers = section.max_workers
    for section in (getattr(config, stage) for stage in POOLS[cls]):
        section.actors = (section.actors[1],) * 2
    assert misfits(demands(config), read_groups(ROOT / "cluster" / f"{cluster}.yaml")) == []


def test_what_stages_ask_for():
    config = SelfTrainingConfig(
        engine=EngineConfig(
            actors=(2, 4), cpus_per_actor=3, gpus_per_actor=2, place=Placement(accelerator="in(A100,H100)")
        ),
        dpo=DpoConfig(
            num_workers=(1, 6),
            cpus_per_worker=5,
            gpus_per_worker=1,
            reference_workers=(2, 3),
            place=Placement(labels={"zone": "b"}, memory_gib=7),
        ),
    )
    config.data.read_cpus = 0.5
    config.cluster.data_labels = {"zone": "a"}
    found = demands(config)
    reader, own = (
        Demand("data.read_cpus", 1, 8, 0.5, labels={"zone": "a"}),
        Demand("cluster.data_labels", 1, 1, 1, labels={"zone": "a"}),
    )
    assert set(found) == {"data", "sft", "engine", "judge", "dpo", "reference"}
    assert found["dpo"] == [Demand("dpo.num_workers", 1, 6, 5, 1, 7, {"zone": "b"}), reader, reader, own]
    assert found["engine"] == [
        Demand("engine.actors", 2, 4, 3, 2, 0, {"zone": "a", "ray.io/accelerator-type": "in(A100,H100)"}),
        reader,
        own,
        own,
    ], "data's labels hold for engines that do not name the same label"
    assert found["reference"][0] == Demand("dpo.reference_workers", 2, 3, 5, 1, 7, {"zone": "b"})
    assert found["judge"] == [Demand("judge.kind", 1, 1, 0.5, labels={"zone": "a"}), reader, own, own]


def test_clinician_preferences_stages():
    config = recipe(
        "clinician_preference/qwen2.5-vl-7b", ClinicianPreferenceConfig, ["score.place.labels={zone: a}"]
    )
    found = demands(config)
    assert set(found) == {"data", "demonstrations", "generate", "rate", "rater", "score", "tune", "engine"}
    assert found["score"][0] == Demand("score.actors", 1, 8, 1, 1, 0, {"zone": "a"})
    assert found["generate"][0] == Demand("generate.kind", 1, 1, 0.5), "an endpoint writes"


@pytest.mark.parametrize(("name", "cls"), RECIPES)
def test_the_endpoint_of_every_gpu_recipe_fits_the_kubernetes_service(name, cls):
    path = ROOT / "cluster/kuberay/rayservice.yaml"
    served, engines = read_served(path, recipe(name, cls).engine)
    assert set(engines) == {"tuned", "base"}
    assert misfits(served_demands(served, engines), read_groups(path)) == []


def test_what_the_endpoint_asks_for(tmp_path):
    engine = EngineConfig(cpus_per_actor=8, gpus_per_actor=4, tensor_parallel_size=4)
    served = ServeConfig(
        run="r", replicas=(1, 2), place={"labels": {"zone": "a"}, "memory_gib": 9}, ingress_replicas=3
    )
    replica, cpu = (
        Demand("replicas", 4, 8, 2, 1, 9, {"zone": "a"}),
        Demand("replicas", 1, 2, 3, 0, 9, {"zone": "a"}),
    )
    assert served_demands(served, {"tuned": engine, "base": EngineConfig(cpus_per_actor=3)}) == {
        "endpoint": [replica, cpu, Demand("ingress_replicas", 3, 3, 0.5)]
    }
    path = tmp_path / "serve.yaml"
    path.write_text(
        "applications: [{import_path: serve.app:build, args: {runs: {x: a, y: b}, models: [{name: m, path: "
        "p}]}}]"
    )
    found, engines = read_served(path, engine)
    assert found.runs == {"x": "a", "y": "b"} and engines == {
        "x": engine,
        "y": engine,
        "base": engine,
        "m": EngineConfig(cpus_per_actor=0.5),
    }
    path.write_text("applications: [{import_path: serve.app:build, args: {run: a, replica: 1}}]")
    with pytest.raises(ConfigError, match=r"serve.yaml: args of.*\n*.*replica"):
        read_served(path, engine)
    path.write_text("applications: [{import_path: other:app}]")
    with pytest.raises(ConfigError, match="no application with the import_path"):
        read_served(path, engine)


def test_a_request_too_large_for_any_node_is_named():
    groups = [Group("small", 8, 1, 30, {}, 4), Group("gpu", 16, 4, 100, {}, 1)]
    (line,) = misfits({"sft": [Demand("sft.num_workers", 1, 2, 20, 1)]}, groups)
    assert line == (
        "sft: sft.num_workers: no node takes 1 x (20 CPUs, 1 GPUs); nodes with its labels have small 8 "
        "CPUs, 1 GPUs, 30 GiB, gpu 16 CPUs, 4 GPUs, 100 GiB"
    )
    (line,) = misfits({"engine": [Demand("engine.actors", 1, 1, 1, 8)]}, groups)
    assert "engine.actors: no node takes 1 x (1 CPUs, 8 GPUs)" in line, "an engine's GPUs are on one node"
    (line,) = misfits({"sft": [Demand("sft.num_workers", 1, 1, 1, 0, 101)]}, groups)
    assert "101 GiB" in line
    (line,) = misfits({"sft": [Demand("sft.num_workers", 1, 1, 1, labels={"medray-group": "trian"})]}, groups)
    assert "no group has such labels" in line


@pytest.mark.parametrize(
    ("workers", "reader_cpus", "fits"), [(4, 2, True), (5, 2, False), (4, 3, False), (2, 4, True)]
)
def test_what_is_held_at_once_must_fit_together(workers, reader_cpus, fits):
    """Two nodes of 8 CPUs and 2 GPUs: four workers of 3 CPUs leave two CPUs on each; a fifth has no GPU."""
    stages = {
        "sft": [
            Demand("sft.num_workers", workers, workers, 3, 1),
            Demand("data.read_cpus", 2, 2, reader_cpus),
        ]
    }
    found = misfits(stages, [Group("gpu", 8, 2, 0, {}, 2)])
    assert (found == []) is fits
    assert fits or "needs at once" in found[0]


def test_readers_leave_gpu_nodes_to_those_who_need_them():
    groups = [Group("gpu", 4, 1, 0, {}, 1), Group("data", 4, 0, 0, {}, 1)]
    assert (
        misfits({"sft": [Demand("sft.num_workers", 1, 1, 4, 1), Demand("data.read_cpus", 1, 1, 4)]}, groups)
        == []
    )


@pytest.mark.parametrize(
    ("value", "selector", "expected"),
    [
        ("A100", "A100", True),
        ("A100", "!A100", False),
        ("L4", "in(A100, L4)", True),
        ("L4", "!in(A100,L4)", False),
        (None, "A100", False),
        (None, "!A100", True),
    ],
)
def test_label_selectors(value, selector, expected):
    assert matches(value, selector) is expected


def test_label_rule_is_rays(ray_cluster):
    """The same rule, asked of a running Ray: what it starts on its one node, and what it keeps waiting."""
    (node,) = ray_cluster.nodes()
    name = node["NodeID"]
    probe = ray_cluster.remote(num_cpus=0.1)(lambda: True)
    # No operators on ray.io/node-id: Ray 2.60 takes that label's value for an id before it reads it as a
    # selector, and ends the driver.
    cases = {
        ("ray.io/node-id", name): True,
        ("zone", "!b"): True,
        ("zone", "!in(a,b)"): True,
        ("zone", "b"): False,
        ("zone", "in(a,b)"): False,
    }
    assert {case: matches(node["Labels"].get(case[0]), case[1]) for case in cases} == cases
    started = {case: probe.options(label_selector=dict([case])).remote() for case in cases}
    wanted = [started[case] for case, runs in cases.items() if runs]
    assert ray_cluster.get(wanted, timeout=120) == [True] * 3
    waiting = [started[case] for case, runs in cases.items() if not runs]
    assert ray_cluster.wait(waiting, num_returns=2, timeout=1)[0] == []
    for task in waiting:
        ray_cluster.cancel(task)


def test_groups_of_the_files():
    aws = {group.name: group for group in read_groups(ROOT / "cluster/aws.yaml")}
    assert aws["train"] == Group(
        "train",
        96,
        8,
        640,
        {"medray-group": "train", "ray.io/accelerator-type": "A100", "ray.io/market-type": "spot"},
        2,
        {"medray-train": 8},
    )
    assert (aws["head"].cpus, aws["head"].most) == (0, 1)
    pods = {group.name: group for group in read_groups(ROOT / "cluster/kuberay/rayjob.yaml")}
    assert (pods["train"].cpus, pods["train"].gpus, pods["train"].most) == (44, 4, 4)
    assert pods["train"].memory_gib == 512
    assert pods["head"].cpus == 0
    assert (pods["train"].resources, pods["generate"].resources) == ({"medray-train": 4}, {})


def test_custom_resources_are_used_up():
    groups = [Group("train", 8, 4, 0, {}, 1, {"medray-train": 2}), Group("generate", 8, 4, 0, {}, 1)]
    workers = Demand("sft.num_workers", 2, 4, 1, 1, resources={"medray-train": 1})
    assert misfits({"sft": [workers]}, groups) == []
    (line,) = misfits({"sft": [replace(workers, least=3)]}, groups)
    assert "needs at once 3 x (1 CPUs, 1 GPUs, 1 medray-train)" in line
    (line,) = misfits({"sft": [workers]}, groups[1:])
    assert line == (
        "sft: sft.num_workers: no node takes 2 x (1 CPUs, 1 GPUs, 1 medray-train); nodes with its labels "
        "have generate 8 CPUs, 4 GPUs, 0 GiB"
    )


def test_custom_resources_are_read_as_ray_reads_them():
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources

    for name in ("raycluster", "rayjob"):
        path = ROOT / f"cluster/kuberay/{name}.yaml"
        (spec,) = [
            document["spec"]
            for document in yaml.safe_load_all(path.read_text())
            if document["kind"].startswith("Ray")
        ]
        offered = {
            group["groupName"]: _get_custom_resources({}, group["rayStartParams"], group["groupName"])
            for group in spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
        }
        assert offered == {group.name: group.resources for group in read_groups(path) if group.name != "head"}
        assert offered["train"] == {"medray-train": 4}
    assert [group.most for group in read_groups(ROOT / "cluster/local.yaml")] == [1, 2]


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("2", 2), (4, 4), ("64Gi", 64 * 2**30), ("1.5k", 1500)]
)
def test_quantities(text, value):
    assert quantity(text) == value


def test_files_that_say_nothing_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("provider: {type: local}\n")
    with pytest.raises(ConfigError, match=r"metadata\.nodes"):
        read_groups(path)
    path.write_text("kind: Deployment\n")
    with pytest.raises(ConfigError, match="neither a file of `ray up`"):
        read_groups(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_groups(tmp_path / "none.yaml")


def plan(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "medray.plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_says_whether_a_recipe_fits():
    good = plan("--fits", "cluster/aws.yaml", "--config", "medray/recipes/self_train/llava-1.5-7b.yaml")
    assert good.returncode == 0, good.stderr
    assert "fits cluster/aws.yaml" in good.stdout
    bad = plan(
        "--fits",
        "cluster/aws.yaml",
        "--config",
        "medray/recipes/self_train/llava-1.5-7b.yaml",
        "--set",
        "engine.gpus_per_actor=2",
        "--set",
        "engine.place.labels={medray-group: generate}",
    )
    assert bad.returncode == 1
    assert "engine.actors: no node takes 1 x (4 CPUs, 2 GPUs) on medray-group=generate" in bad.stdout
    service = "cluster/kuberay/rayservice.yaml"
    endpoint = plan(
        "--fits", service, "--serve", service, "--config", "medray/recipes/self_train/llava-1.5-7b.yaml"
    )
    assert endpoint.returncode == 0 and f"{service} fits {service}" in endpoint.stdout, endpoint.stderr
