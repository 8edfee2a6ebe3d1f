"""The files in cluster/ are what Ray's launcher, EC2 and a Kubernetes API server take."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cluster.kuberay import check

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ["aws", "gcp", "local"]
KUBERAY = ["raycluster", "rayjob", "rayservice"]


def read(name):
    folder = ROOT / "cluster" / ("kuberay" if name in KUBERAY else "")
    return list(yaml.safe_load_all((folder / f"{name}.yaml").read_text()))


def launcher(name):
    """The file as `ray up` sees it: defaults merged, then Ray's own validation."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read(name)[0])
    validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_launcher_takes_the_file(name):
    config = launcher(name)
    assert config["cluster_name"] == "medray"
    start = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert start.count("ray start") == start.count("--object-spilling-directory=/spill") == start.count("RAY_AUTH_MODE=token") / 2 == 2
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in start, "the dashboard is for the head itself; `ray dashboard` forwards it"


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_groups_grow_from_nothing_and_are_told_apart_by_label(name):
    config = launcher(name)
    groups = config["available_node_types"]
    assert {group: node["labels"]["medray-group"] for group, node in groups.items()} == {group: group for group in ("head", "data", "train", "generate")}
    assert all(groups[group]["min_workers"] == 0 for group in ("data", "train", "generate"))
    assert [group for group, node in groups.items() if node["resources"].get("GPU")] == ["train", "generate"]
    assert groups["head"]["resources"]["CPU"] == 0, "a head that works dies of what its tasks do"
    assert "RAY_enable_autoscaler_v2=1" in " ".join(config["head_start_ray_commands"]), "the first autoscaler knows no labels"
    assert groups["train"]["docker"]["worker_image"].endswith("-gpu") and config["docker"]["image"].endswith("-cpu")


def test_a_mistake_is_found_by_rays_validation():
    config = launcher("aws")
    config["available_node_types"]["train"]["max_worker"] = 3
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(config)


def test_ec2_takes_every_node_config():
    """Against EC2's own model of RunInstances, as botocore ships it."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, group in launcher("aws")["available_node_types"].items():
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **group["node_config"]}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        spot = group["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert spot == (None if name == "head" else "spot") and group["labels"].get("ray.io/market-type") == spot
        assert all(disk["Ebs"]["Encrypted"] for disk in group["node_config"]["BlockDeviceMappings"])
        assert group["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_takes_every_document(name):
    documents = read(name)
    for document in documents:
        check(document)
    assert {"PodDisruptionBudget", {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}[name]} <= {one["kind"] for one in documents}


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("spec", "autoscalerOptions", "idleTimeoutSecond"), 60, "idleTimeoutSecond"),
        (("spec", "authOptions", "mode"), "tokens", "tokens"),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "8", "integer"),
        (("spec", "workerGroupSpecs", 0, "rayStartParams", "num-cpus"), 4, "string"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resource"), {}, "resource"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "livenessProbe", "httpGet", "paths"), "/", "paths"),
        (("spec", "headGroupSpec", "template", "spec", "containers"), [{"image": "x"}], "name"),
    ],
)
def test_a_mistake_in_a_manifest_is_found(where, value, message):
    document = copy.deepcopy(read("raycluster")[-1])
    inner = document
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=message):
        check(document)


@pytest.mark.parametrize("name", KUBERAY)
def test_clusters_on_kubernetes_are_guarded(name):
    document = read(name)[-1]
    spec = {"rayjob": "rayClusterSpec", "rayservice": "rayClusterConfig"}.get(name)
    cluster = document["spec"][spec] if spec else document["spec"]
    assert cluster["authOptions"]["mode"] == "token" and cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= cluster["headGroupSpec"]["template"]["spec"]["containers"][0].keys()
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"], "a pod that may be evicted for memory takes its rows with it"
        assert container["image"].endswith("-gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "-cpu")
    budgets = [one["spec"]["selector"]["matchLabels"] for one in read(name) if one["kind"] == "PodDisruptionBudget"]
    labels = {"ray.io/cluster": document["metadata"]["name"], "ray.io/node-type": "head"} | cluster["headGroupSpec"]["template"].get("metadata", {}).get("labels", {})
    assert any(selector.items() <= labels.items() for selector in budgets), "a budget that selects no pod guards nothing"


def test_serve_takes_the_services_config():
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(read("rayservice")[-1]["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert (application.import_path, application.route_prefix, list(application.args)) == ("serve.app:build", "/", ["run"])


def test_the_jobs_entrypoint_is_a_configuration():
    """What the RayJob submits passes the script's own parsing, placement and all."""
    import shlex

    from medray.config import SelfTrainingConfig, load_config
    from medray.job import method_parser

    program, script, *arguments = shlex.split(read("rayjob")[-1]["spec"]["entrypoint"])
    assert program == "python" and (ROOT / script).is_file()
    options = method_parser("self_train", None, "").parse_args(arguments)
    config = load_config(SelfTrainingConfig, ROOT / options.config, options.overrides)
    assert config.cluster.data_labels == {"medray-group": "data"}
    assert [config.sft.place.selector, config.engine.place.selector] == [{"medray-group": "train"}, {"medray-group": "generate"}]


def test_the_images_are_made_of_what_is_there():
    lines = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [path for line in lines if line.startswith("COPY") for path in line.split()[2:-1]]
    allowed = {line[1:] for line in (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == allowed and all((ROOT / path).exists() for path in copied)
    versions = re.search(r"ray\[.*\]==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert f"ARG RAY={versions[1]}" in lines
    for name in KUBERAY:
        assert f"rayVersion: {versions[1]}" in (ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text()
    for pin in ("torch==", "torchvision=="):
        (pinned,) = [line for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines() if line.startswith(pin)]
        assert any(f'"{pinned}+cpu"' in line for line in lines)
