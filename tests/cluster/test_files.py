"""The files in cluster/ are what Ray's launcher, EC2 and a Kubernetes API server take."""

import ast
import copy
import ipaddress
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from medray.config.serving import LimitsConfig, ServeConfig
from medray.plan.groups import quantity
from tests.support.kuberay import check

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
    assert (
        start.count("ray start")
        == start.count("--object-spilling-directory=/spill")
        == start.count("RAY_AUTH_MODE=token") / 2
        == 2
    )
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in start, (
        "the dashboard is for the head itself; `ray dashboard` forwards it"
    )


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_groups_grow_from_nothing_and_are_told_apart_by_label(name):
    config = launcher(name)
    groups = config["available_node_types"]
    assert {group: node["labels"]["medray-group"] for group, node in groups.items()} == {
        group: group for group in ("head", "data", "train", "generate")
    }
    assert all(groups[group]["min_workers"] == 0 for group in ("data", "train", "generate"))
    assert [group for group, node in groups.items() if node["resources"].get("GPU")] == ["train", "generate"]
    assert groups["head"]["resources"]["CPU"] == 0, "a head that works dies of what its tasks do"
    assert "RAY_enable_autoscaler_v2=1" in " ".join(config["head_start_ray_commands"]), (
        "the first autoscaler knows no labels"
    )
    assert groups["train"]["docker"]["worker_image"].endswith("-gpu") and config["docker"]["image"].endswith(
        "-cpu"
    )


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

    shape = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    for name, group in launcher("aws")["available_node_types"].items():
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **group["node_config"]}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        spot = group["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert (
            spot == (None if name == "head" else "spot") and group["labels"].get("ray.io/market-type") == spot
        )
        assert all(disk["Ebs"]["Encrypted"] for disk in group["node_config"]["BlockDeviceMappings"])
        assert group["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_nodes_log_in_to_the_registry_of_their_images(name):
    config = launcher(name)
    images = {
        config["docker"]["image"],
        *(
            node["docker"]["worker_image"]
            for node in config["available_node_types"].values()
            if "docker" in node
        ),
    }
    (registry,) = {image.partition("/")[0] for image in images}
    (login,) = [command for command in config["initialization_commands"] if registry in command]
    if name == "aws":
        assert (
            registry.split(".")[3] == config["provider"]["region"]
            and f"--region {config['provider']['region']} | docker login" in login
        )


def test_the_head_may_look_up_the_ami():
    text = (ROOT / "cluster/aws.yaml").read_text()
    assert "resolve:ssm:/aws/service/" in text
    assert re.search(
        r"for the head, which starts nodes:[^.]*ssm:GetParameters on "
        r"arn:aws:ssm:REGION::parameter/aws/service/\*",
        text,
    )


@pytest.mark.parametrize(
    ("gpus", "driver_after", "status"), [(False, 0, 0), (True, 0, 0), (True, 3, 0), (True, None, 1)]
)
def test_google_nodes_wait_for_the_driver_within_bounds(tmp_path, gpus, driver_after, status):
    """The command itself, run by bash as Ray runs it, with other devices and without the real waiting."""
    (command,) = [
        command for command in launcher("gcp")["initialization_commands"] if "nvidia-smi" in command
    ]
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:04.0/vendor").write_text("0x10de\n" if gpus else "0x1af4\n")
    calls = tmp_path / "calls"
    calls.touch()
    for tool, body in (
        ("sleep", f"echo slept $1 >> {calls}"),
        ("nvidia-smi", f"[ $(grep -c slept {calls}) -ge {10**6 if driver_after is None else driver_after} ]"),
    ):
        (tmp_path / tool).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / tool).chmod(0o755)
    assert "/sys/bus/pci/devices/*" in command
    done = subprocess.run(
        ["bash", "-c", f"true && ({command.replace('/sys/bus/pci/devices', str(tmp_path))})"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    slept = [int(line.split()[1]) for line in calls.read_text().splitlines()]
    assert (done.returncode, len(slept)) == (status, {None: 90}.get(driver_after, driver_after)), done.stderr
    assert ("no NVIDIA driver" in done.stderr) == bool(status) and sum(slept) <= 900


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_takes_every_document(name):
    documents = read(name)
    for document in documents:
        check(document)
    assert {
        "PodDisruptionBudget",
        "NetworkPolicy",
        {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}[name],
    } <= {one["kind"] for one in documents}


HEAD = ("spec", "headGroupSpec")
WORKERS = ("spec", "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    ("name", "where", "value", "message"),
    [
        ("raycluster", ("spec", "autoscalerOptions", "idleTimeoutSecond"), 60, "idleTimeoutSecond"),
        ("raycluster", ("spec", "authOptions", "mode"), "tokens", "tokens"),
        ("raycluster", ("spec", "managedBy"), "kuberay", "kuberay"),
        ("raycluster", (*WORKERS, "maxReplicas"), "8", "integer"),
        ("raycluster", (*WORKERS, "rayStartParams", "num-cpus"), 4, "string"),
        ("raycluster", (*WORKERS, "labels", "medray-group"), "data,train", "does not match"),
        ("raycluster", (*WORKERS, "template", "spec", "containers", 0, "resource"), {}, "resource"),
        ("raycluster", (*WORKERS, "template", "metadata"), {"generateName": "data-"}, "generateName"),
        (
            "raycluster",
            (*HEAD, "template", "spec", "containers", 0, "livenessProbe", "httpGet", "paths"),
            "/",
            "paths",
        ),
        ("raycluster", (*HEAD, "template", "spec", "containers"), [{"image": "x"}], "name"),
        ("raycluster", (*HEAD, "template", "spec", "containers"), [], "non-empty|too short"),
        ("raycluster", ("metadata", "name"), "1st", "does not match"),
        ("raycluster", ("spec", "rayVersion"), "2.51.1", "token needs rayVersion"),
        (
            "raycluster",
            (*HEAD, "template", "spec", "restartPolicy"),
            "Always",
            "head: autoscaler v2 needs restartPolicy",
        ),
        (
            "raycluster",
            (*HEAD, "template", "spec", "containers", 0, "env"),
            [{"name": "RAY_enable_autoscaler_v2", "value": "1"}],
            "say the same",
        ),
        (
            "raycluster",
            (*HEAD, "template", "spec", "containers", 0, "env"),
            [{"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}],
            "gcsFaultToleranceOptions",
        ),
        ("raycluster", (*HEAD, "resources"), {"CPU": "0"}, "head: resources and rayStartParams"),
        (
            "raycluster",
            (*WORKERS, "rayStartParams", "labels"),
            "medray-group=data",
            "data: labels are a field of the group",
        ),
        ("raycluster", (*WORKERS, "minReplicas"), 9, "data: minReplicas is above"),
        ("raycluster", (*WORKERS, "suspend"), True, "data: suspend needs the feature gate"),
        ("rayjob", ("spec", "backoffLimit"), -1, "minimum"),
        (
            "rayjob",
            ("spec", "deletionStrategy"),
            {"onSuccess": {"policy": "DeleteCluster"}},
            "not valid under any",
        ),
        (
            "rayjob",
            ("spec", "deletionStrategy"),
            {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]},
            "RayJobDeletionPolicy",
        ),
        ("rayjob", ("spec", "shutdownAfterJobFinishes"), False, "ttlSecondsAfterFinished needs"),
        (
            "rayjob",
            ("spec", "clusterSelector"),
            {"ray.io/cluster": "medray"},
            "clusterSelector goes with no backoffLimit",
        ),
        ("rayjob", ("spec", "submissionMode"), "InteractiveMode", "InteractiveMode goes with no"),
        ("rayjob", ("spec", "submissionMode"), "SidecarMode", "SidecarMode goes with no"),
        ("rayjob", ("spec", "runtimeEnvYAML"), "working_dir", "no mapping"),
        ("rayjob", ("spec", "rayClusterSpec", "autoscalerOptions", "version"), "v3", "v3"),
        ("rayjob", ("metadata", "name"), "m" * 48, "too long"),
        ("rayservice", ("spec", "upgradeStrategy", "type"), "Recreate", "Recreate"),
        (
            "rayservice",
            ("spec", "upgradeStrategy", "type"),
            "NewClusterWithIncrementalUpgrade",
            "RayServiceIncrementalUpgrade",
        ),
        (
            "rayservice",
            ("spec", "upgradeStrategy", "clusterUpgradeOptions"),
            {"stepSizePercent": 10, "intervalSeconds": 30},
            "gatewayClassName",
        ),
        (
            "rayservice",
            ("spec", "rayClusterConfig", "headGroupSpec", "headService"),
            {"metadata": {"name": "head"}},
            "headService",
        ),
    ],
)
def test_a_mistake_in_a_manifest_is_found(name, where, value, message):
    document = copy.deepcopy(read(name)[-1])
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
    assert (
        cluster["authOptions"]["mode"] == "token"
        and cluster["enableInTreeAutoscaling"]
        and cluster["autoscalerOptions"]["version"] == "v2"
    )
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= cluster["headGroupSpec"]["template"][
        "spec"
    ]["containers"][0].keys()
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"], (
            "a pod that may be evicted for memory takes its rows with it"
        )
        assert container["image"].endswith(
            "-gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "-cpu"
        )
        # quoted as Ray's autoscaler wants them KubeRay cannot read them, and adds no GPUs from the limits
        if "resources" in group["rayStartParams"]:
            assert group["rayStartParams"]["num-gpus"] == container["resources"]["limits"]["nvidia.com/gpu"]
    budgets = [one["spec"] for one in read(name) if one["kind"] == "PodDisruptionBudget"]
    labels = {"ray.io/cluster": document["metadata"]["name"], "ray.io/node-type": "head"} | cluster[
        "headGroupSpec"
    ]["template"].get("metadata", {}).get("labels", {})
    assert any(one["selector"]["matchLabels"].items() <= labels.items() for one in budgets), (
        "a budget that selects no pod guards nothing"
    )
    for budget in budgets:
        assert set(budget) == {"minAvailable", "selector"} and budget["minAvailable"] == 1, (
            "for pods of a RayCluster nothing else is worked out: no drain would ever go on"
        )


def test_the_service_account_of_all_pods_is_in_a_file_of_its_own():
    (account,) = yaml.safe_load_all((ROOT / "cluster/kuberay/serviceaccount.yaml").read_text())
    check(account)
    for name in KUBERAY:
        assert {one["kind"] for one in read(name)}.isdisjoint({"ServiceAccount"})
        used = set(
            re.findall(r"serviceAccountName: (\S+)", (ROOT / f"cluster/kuberay/{name}.yaml").read_text())
        )
        assert (account["kind"], used) == ("ServiceAccount", {account["metadata"]["name"]})
        assert (
            "apply -f cluster/kuberay/serviceaccount.yaml"
            in (ROOT / f"cluster/kuberay/{name}.yaml").read_text()
        )
    assert (
        "apply -f cluster/kuberay/serviceaccount.yaml"
        in (ROOT / "docs/how-to/kubernetes.md").read_text().partition("## A job")[0]
    )


def clusters():
    for name in KUBERAY:
        spec = read(name)[-1]["spec"]
        yield spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pod_templates(name):
    """(labels that the pods will have, pod spec) of every pod of the file's object, by what it is."""
    document, (cluster,) = (
        read(name)[-1],
        [cluster for cluster, of in zip(clusters(), KUBERAY, strict=True) if of == name],
    )
    found = {
        "head": cluster["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]},
    }
    # KubeRay gives its pods the cluster's name, which is made up for those of jobs and endpoints.
    given = {
        "ray.io/cluster": document["metadata"]["name"] if document["kind"] == "RayCluster" else "made-up"
    }
    made = {
        what: (given | template.get("metadata", {}).get("labels", {}), template["spec"])
        for what, template in found.items()
    }
    if document["kind"] == "RayJob":
        template = document["spec"]["submitterPodTemplate"]
        made["submitter"] = (template["metadata"]["labels"], template["spec"])
    return made


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_no_more_rights_than_they_need(name):
    """What Kubernetes' restricted standard asks for."""
    (cluster,) = [cluster for cluster, of in zip(clusters(), KUBERAY, strict=True) if of == name]
    boxes = [cluster["autoscalerOptions"]["securityContext"]]
    for what, (_, pod) in pod_templates(name).items():
        context = pod["securityContext"]
        assert (
            context["runAsNonRoot"] is True
            and context["runAsUser"] > 0
            and context["seccompProfile"] == {"type": "RuntimeDefault"}
        ), what
        assert context["fsGroup"] == context["runAsGroup"], "or /spill could not be written"
        assert pod.get("automountServiceAccountToken", True) is (what == "head"), (
            "the autoscaler beside the head asks Kubernetes for pods, nobody else does"
        )
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys() and all(
            "hostPath" not in volume for volume in pod.get("volumes", [])
        )
        boxes += [
            container["securityContext"] for container in (*pod["containers"], *pod.get("initContainers", []))
        ]
    for box in boxes:
        assert box == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert "runAsUser: 1000" in (ROOT / f"cluster/kuberay/{name}.yaml").read_text(), (
        "the user ray of Ray's images, to whom cluster/Dockerfile gives its files"
    )


def lets_through(rules, side, port, protocol="TCP", pod=None, namespace=None, address=None):
    """Whether rules of a NetworkPolicy let traffic through with a pod (labels, of the policy's namespace
    or one with labels) or an address.
    """

    def is_peer(peer):
        if "ipBlock" in peer:
            return address is not None and ipaddress.ip_address(address) in ipaddress.ip_network(
                peer["ipBlock"]["cidr"]
            )
        if address is not None or ("namespaceSelector" in peer) != (namespace is not None):
            return False
        wanted_namespace = peer.get("namespaceSelector", {}).get("matchLabels", {})
        return (
            wanted_namespace.items() <= (namespace or {}).items()
            and peer.get("podSelector", {}).get("matchLabels", {}).items() <= (pod or {}).items()
        )

    return any(
        (side not in rule or any(map(is_peer, rule[side])))
        and (
            "ports" not in rule
            or any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in rule["ports"])
        )
        for rule in rules
    )


@pytest.mark.parametrize("name", KUBERAY)
def test_a_clusters_pods_are_reached_by_whom_they_need_and_by_nobody_else(name):
    (policy,) = [one["spec"] for one in read(name) if one["kind"] == "NetworkPolicy"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    pods = {what: labels for what, (labels, _) in pod_templates(name).items()}
    for what, labels in pods.items():
        assert policy["podSelector"]["matchLabels"].items() <= labels.items(), f"{what} is under no policy"

    def comes_in(port, **peer):
        return lets_through(policy["ingress"], "from", port, **peer)

    def goes_out(port, protocol="TCP", **peer):
        return lets_through(policy["egress"], "to", port, protocol, **peer)

    for labels in pods.values():
        for port in (6379, 8265, 8080, 8000, 10002, 19999, 52365, 40001):  # Ray's workers take any
            assert comes_in(port, pod=labels) and goes_out(port, pod=labels)
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    assert comes_in(
        8265, pod=operator, namespace={"kubernetes.io/metadata.name": "default"}
    ) and not comes_in(6379, pod=operator, namespace={})
    assert comes_in(8080, namespace={"kubernetes.io/metadata.name": "monitoring"}) and not comes_in(
        8265, namespace={"kubernetes.io/metadata.name": "monitoring"}
    )
    for port in (6379, 8265, 8000, 8080, 10001, 52365):
        assert not comes_in(port, pod={"app": "other"}) and not comes_in(
            port, pod={"app": "other"}, namespace={"kubernetes.io/metadata.name": "other"}
        )
        assert not comes_in(port, address="10.1.2.3")
    clients = {"medray/endpoint": "allowed"}
    assert comes_in(8000, namespace=clients) == comes_in(8000, pod=operator, namespace={}) == (
        name == "rayservice"
    ) and not comes_in(8265, namespace=clients)
    assert goes_out(53, "UDP", pod={"k8s-app": "kube-dns"}, namespace={}) and goes_out(
        53, address="169.254.20.10"
    )
    for address in ("52.216.1.1", "10.0.0.1", "2600::1"):  # a bucket or judge, Kubernetes' API
        assert (
            goes_out(443, address=address)
            and goes_out(6443, address=address)
            and not goes_out(22, address=address)
            and not goes_out(5432, address=address)
        )
    assert (
        goes_out(80, address="169.254.169.254")
        and goes_out(988, address="169.254.169.252")
        and not goes_out(80, address="93.184.216.34")
    )


def test_secrets_that_not_every_job_needs_are_optional():
    """Without a judge behind an API there is no key: pods would wait for the secret without end."""
    sources = [
        source["secretRef"]
        for _, pod in pod_templates("rayjob").values()
        for container in pod["containers"]
        for source in container.get("envFrom", [])
    ]
    assert sources and all(source == {"name": "medray-judge", "optional": True} for source in sources)


def test_pods_fit_on_the_disks_that_the_how_to_names():
    rows = re.findall(
        r"^ *\| ([a-z, ]+) \| (\d+) GiB \| (\d+) \| (\d+) \|$",
        (ROOT / "docs/how-to/kubernetes.md").read_text(),
        re.MULTILINE,
    )
    disks = {group: tuple(map(int, numbers)) for groups, *numbers in rows for group in groups.split(", ")}
    for cluster in clusters():
        for name, group in [
            ("head", cluster["headGroupSpec"]),
            *((group["groupName"], group) for group in cluster["workerGroupSpecs"]),
        ]:
            pod = group["template"]["spec"]
            asked = quantity(pod["containers"][0]["resources"]["requests"]["ephemeral-storage"]) / 2**30
            spill = [
                volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "spill"
            ]
            wanted, gke, eks = disks[name]
            assert [quantity(size) / 2**30 for size in spill] == [asked] == [wanted], name
            # GKE: 94 % of the disk is a file system, of which a tenth is kept from pods, and what the second
            # bracket says. EKS: a tenth and 1 GiB.
            assert (
                asked <= 0.9 * 0.94 * gke - min(0.5 * gke, 6 + 0.35 * gke, 100) and asked <= 0.9 * eks - 1
            ), name


def test_the_endpoints_pods_have_time_to_finish_their_answers():
    from ray._private import ray_constants

    config = yaml.safe_load(read("rayservice")[-1]["spec"]["serveConfigV2"])["applications"][0]["args"]
    served = ServeConfig.model_validate(config)
    (workers,) = read("rayservice")[-1]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    variables = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    drain = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"), (
        "Ray reads the variable by this name"
    )
    assert (
        max(served.drain_seconds, served.limits.seconds, LimitsConfig().seconds)
        < drain
        < pod["terminationGracePeriodSeconds"]
    )


def test_serve_takes_the_services_config():
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(read("rayservice")[-1]["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert (application.import_path, application.route_prefix, list(application.args)) == (
        "serve.app:build",
        "/",
        ["run"],
    )


def test_the_jobs_entrypoint_is_a_configuration():
    """What the RayJob submits passes the script's own parsing, placement and all."""
    import shlex

    from medray.commands.command_line import method_parser
    from medray.config import SelfTrainingConfig, load_config

    program, script, *arguments = shlex.split(read("rayjob")[-1]["spec"]["entrypoint"])
    assert program == "python" and (ROOT / script).is_file()
    options = method_parser("self_train", None, "").parse_args(arguments)
    config = load_config(SelfTrainingConfig, options.config, options.overrides)
    assert config.cluster.data_labels == {"medray-group": "data"}
    assert [config.sft.place.selector, config.engine.place.selector] == [
        {"medray-group": "train"},
        {"medray-group": "generate"},
    ]


def test_the_images_are_made_of_what_is_there():
    lines = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [path for line in lines if line.startswith("COPY") for path in line.split()[2:-1]]
    allowed = {
        line[1:]
        for line in (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert set(copied) == allowed and all((ROOT / path).exists() for path in copied)
    versions = re.search(r"ray\[.*\]==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert f"ARG RAY={versions[1]}" in lines
    for name in KUBERAY:
        assert f"rayVersion: {versions[1]}" in (ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text()
    for pin in ("torch==", "torchvision=="):
        (pinned,) = [
            line
            for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
            if line.startswith(pin)
        ]
        assert any(f'"{pinned}+cpu"' in line for line in lines)


def exported_metrics():
    """{name: label names} of what serve/ and jobs export, with the names that Ray's own recorder gives
    them.
    """
    sources = [*(ROOT / "medray/serving").rglob("*.py"), ROOT / "medray" / "prometheus.py"]
    calls = [
        node
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Counter", "Gauge", "Histogram")
    ]
    made = [(call.func.id, *(ast.literal_eval(argument) for argument in call.args)) for call in calls]
    program = f"""
from prometheus_client import REGISTRY
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder
recorder = OpenTelemetryMetricRecorder()
for kind, name, about, *more in {made!r}:
    getattr(recorder, f"register_{{kind.lower()}}_metric")(name, about, *more[:-1])
    recorder.set_metric_value(name, dict.fromkeys(more[-1], "x"), 1.0)
samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
print(repr({{sample.name: sorted(sample.labels) for sample in samples if "medray" in sample.name}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_every_metric_that_is_shown_exists():
    import ray

    board = json.loads((ROOT / "cluster/grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += re.findall(r"\| `([^`]+)` \|$", (ROOT / "docs/how-to/monitoring.md").read_text(), re.MULTILINE)
    ours = exported_metrics()
    rays = "".join(
        path.read_text()
        for folder in ("serve", "dashboard/modules", "autoscaler/_private", "_private")
        for path in (Path(ray.__file__).parent / folder).rglob("*.py")
    )
    shown = set()
    for query in asked:
        names = set(re.findall(r"\b(?:ray|autoscaler)_\w+", query))
        shown |= names
        assert names, query
        for name in names:
            if name.startswith("ray_medray"):
                assert name in ours, name
                assert set(re.findall(r"\w+", re.search(r"by \(([^)]*)\)", query)[1])) <= set(ours[name]), (
                    query
                )
            else:
                # in Ray's own dashboards, or where it is made
                assert re.search(rf"\b({name}|{name.partition('_')[2]})\b", rays), name
    assert {re.sub("_(total|bucket)$", "", name) for name in shown if name.startswith("ray_medray")} == {
        re.sub("_(total|bucket|count|sum|created)$", "", name) for name in ours
    }
    assert "autoscaler_recently_failed_nodes" not in shown, (
        "with the second autoscaler: machines that are being ended"
    )
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_a_jobs_keys_go_by_a_file(tmp_path):
    """The file that the how-to shows is what Ray's command takes, and no how-to puts a key on a command
    line.
    """
    from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args

    text = (ROOT / "docs/how-to/aws.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "env.yaml").write_text(shown)
    environment = parse_runtime_env_args(runtime_env=str(tmp_path / "env.yaml"), working_dir=".")
    assert set(environment) == {"env_vars", "working_dir"} and all(
        isinstance(value, str) for value in environment["env_vars"].values()
    )
    assert "--working-dir . --runtime-env ~/medray-env.yaml" in text
    for path in [*(ROOT / "docs/how-to").glob("*.md"), *(ROOT / "cluster").rglob("*.yaml")]:
        assert not re.search(
            r"--(from-literal|runtime-env-json|set)[= ]\S*(API_KEY|PASSWORD)", path.read_text()
        ), path
