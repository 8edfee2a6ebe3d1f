"""What KubeRay takes: the schema of its three objects (ray.io/v1) and its operator's own rules, to check
manifests without a cluster.

KubeRay's own CustomResourceDefinitions are on no package registry, so their fields, types, required ones,
enumerations and CEL rules stand here as 1.5.1 has them, the first release with authOptions. They were checked
against KubeRay's sources of 1.6 and 1.7 (ray-operator/apis/ray/v1/ {raycluster,rayjob,rayservice}_types.go,
helm-chart/kuberay-operator/crds/ray.io_*.yaml, docs/reference/api.md), less what came after 1.5.1, whose own
were not at hand. 1.6 added upgradeStrategy of a RayCluster, authOptions' secretName and enableK8sTokenAuth,
preRunningDeadlineSeconds, jobDeploymentStatus, managedBy of a RayService; 1.7 networkPolicy, tlsOptions,
historyServerOptions, ingressOptions, backend and storage of gcsFaultToleranceOptions, priority of a group,
command and args of the autoscaler, suspend of a RayService. A RayService's two deprecated thresholds, which
nothing reads, are left out. The operator's rules (ray-operator/controllers/ray/utils/validation.go) are those
of 1.5 to 1.7 together, for the files must pass with each; those on annotations and on what a feature gate
keeps shut are left out.

The pods, services and containers inside are Kubernetes' own, taken from the strict schemas of the package
kubernetes-validate. Unknown fields are errors: an API server would drop them without a word, and a misspelt
limit with them.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

# KubeRay 1.5's CRDs hold the pods of 1.33 or 1.34; a field newer than theirs would be dropped
KUBERNETES = "v1.33.0-local-strict"
_DEFINITIONS = "/api/_definitions.json"

TEXT, NUMBER, YES_NO = ({"type": kind} for kind in ("string", "number", "boolean"))
TEXTS = {"type": "object", "additionalProperties": TEXT}
WHOLE = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
COUNT, POSITIVE, PERCENT = (
    {**WHOLE, "minimum": 0},
    {**WHOLE, "minimum": 1},
    {"type": "integer", "minimum": 0, "maximum": 100},
)
DNS, NAME = "[a-z0-9]([-a-z0-9]*[a-z0-9])?", "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABELS = {
    "type": "object",
    "propertyNames": {"pattern": rf"^({DNS}(\.{DNS})*/)?{NAME}$"},
    "additionalProperties": {**TEXT, "pattern": f"^({NAME})?$"},
}


def kubernetes(name: str) -> dict[str, Any]:
    return {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.{name}"}


def several(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def choice(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def section(required: tuple[str, ...] = (), **fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


# Where the CRDs say string and no more (submissionMode, types of upgrades and services, pull policies), the
# values that are acted upon; where they set no bounds, the operator's.
# all that the CRDs keep of metadata inside a spec
EMBEDDED = section(annotations=TEXTS, labels=TEXTS, finalizers=several(TEXT), name=TEXT, namespace=TEXT)
POD = section(
    ("spec",),
    metadata=EMBEDDED,
    spec={**kubernetes("api.core.v1.PodSpec"), "properties": {"containers": {"minItems": 1}}},
)
K8S_SERVICE = section(
    apiVersion=TEXT,
    kind=TEXT,
    metadata=EMBEDDED,
    spec=kubernetes("api.core.v1.ServiceSpec"),
    status=kubernetes("api.core.v1.ServiceStatus"),
)
MANAGER = choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
AUTOSCALER = section(
    version=choice("v1", "v2"),
    upscalingMode=choice("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=COUNT,
    image=TEXT,
    imagePullPolicy=choice("Always", "IfNotPresent", "Never"),
    resources=kubernetes("api.core.v1.ResourceRequirements"),
    securityContext=kubernetes("api.core.v1.SecurityContext"),
    env=several(kubernetes("api.core.v1.EnvVar")),
    envFrom=several(kubernetes("api.core.v1.EnvFromSource")),
    volumeMounts=several(kubernetes("api.core.v1.VolumeMount")),
)
HEAD = section(
    ("template",),
    template=POD,
    headService=K8S_SERVICE,
    serviceType=choice("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    enableIngress=YES_NO,
    rayStartParams=TEXTS,
    labels=LABELS,
    resources=TEXTS,
)
# the API server would fill in minReplicas and maxReplicas before it asks for them, the second with
# 2147483647: better said
WORKERS = section(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=POSITIVE,
    idleTimeoutSeconds=COUNT,
    suspend=YES_NO,
    rayStartParams=TEXTS,
    labels=LABELS,
    resources=TEXTS,
    template=POD,
    scaleStrategy=section(workersToDelete=several(TEXT)),
)
CREDENTIAL = section(value=TEXT, valueFrom=kubernetes("api.core.v1.EnvVarSource"))
CLUSTER = section(
    ("headGroupSpec",),
    rayVersion=TEXT,
    suspend=YES_NO,
    managedBy=MANAGER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=AUTOSCALER,
    authOptions=section(mode=choice("disabled", "token")),
    headGroupSpec=HEAD,
    workerGroupSpecs=several(WORKERS),
    gcsFaultToleranceOptions=section(
        ("redisAddress",),
        redisAddress=TEXT,
        externalStorageNamespace=TEXT,
        redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL,
    ),
)
POLICY = choice("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")
LEGACY = section(("policy",), policy=POLICY)
RULE = section(
    ("policy", "condition"),
    policy=POLICY,
    condition=section(("jobStatus",), jobStatus=choice("SUCCEEDED", "FAILED"), ttlSeconds=COUNT),
)
RULES = section(("deletionRules",), deletionRules={**several(RULE), "minItems": 1})
# CEL: one of the two, and whole
DELETION = {"anyOf": [section(("onSuccess", "onFailure"), onSuccess=LEGACY, onFailure=LEGACY), RULES]}
JOB = section(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterPodTemplate=POD,
    submitterConfig=section(backoffLimit=COUNT),
    backoffLimit=COUNT,
    activeDeadlineSeconds=POSITIVE,
    clusterSelector=TEXTS,
    metadata=TEXTS,
    managedBy=MANAGER,
    suspend=YES_NO,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    shutdownAfterJobFinishes=YES_NO,
    ttlSecondsAfterFinished=COUNT,
    deletionStrategy=DELETION,
    rayClusterSpec=CLUSTER,
)
INCREMENTAL = section(
    ("stepSizePercent", "intervalSeconds", "gatewayClassName"),
    maxSurgePercent=PERCENT,
    stepSizePercent=PERCENT,
    intervalSeconds=POSITIVE,
    gatewayClassName={**TEXT, "minLength": 1},
)
SERVICE = section(
    ("rayClusterConfig",),
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    serveService=K8S_SERVICE,
    excludeHeadPodFromServeSvc=YES_NO,
    rayClusterDeletionDelaySeconds=COUNT,
    upgradeStrategy=section(
        type=choice("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
        clusterUpgradeOptions=INCREMENTAL,
    ),
)
# And the longest name, from which those of the services are made, and of the clusters of jobs and endpoints.
KINDS = {"RayCluster": (CLUSTER, 53), "RayJob": (JOB, 47), "RayService": (SERVICE, 47)}


def check(document: dict[str, Any]) -> None:
    """Raise jsonschema.ValidationError where an API server would refuse the document or drop a part of
    it, or KubeRay's operator not act on it.
    """
    if document["kind"] in KINDS:
        spec, longest = KINDS[document["kind"]]
        name = {"type": "string", "pattern": f"^(?=[a-z]){DNS}$", "maxLength": longest}
        metadata = {
            **kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta"),
            "properties": {"name": name},
            "required": ["name"],
        }
        schema = section(
            ("apiVersion", "kind", "metadata", "spec"),
            apiVersion={"const": "ray.io/v1"},
            kind=TEXT,
            metadata=metadata,
            spec=spec,
        )
    else:
        schema = json.loads(
            (
                _folder() / f"{document['kind'].lower()}-{_group_and_version(document['apiVersion'])}.json"
            ).read_text()
        )
    jsonschema.Draft202012Validator({"$id": "/api/document.json", **schema}, registry=_registry()).validate(
        document
    )
    if refusals := list(_refusals(document)):
        raise jsonschema.ValidationError("; ".join(refusals))


def _refusals(document: dict[str, Any]) -> Iterator[str]:
    """The operator's rules for a whole object. What needs a feature gate is refused: by default 1.5 has
    these closed.
    """
    kind, spec = document["kind"], document["spec"] if document["kind"] in KINDS else {}
    if kind == "RayCluster":
        yield from _cluster_refusals(spec)
    if kind == "RayJob":
        mode, selector = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector", {})
        deletes, retries = spec.get("shutdownAfterJobFinishes", False), spec.get("backoffLimit", 0)
        environment = yaml.safe_load(spec.get("runtimeEnvYAML", ""))
        if "rayClusterSpec" in spec:
            yield from _cluster_refusals(spec["rayClusterSpec"])
        yield from _broken(
            ("rayClusterSpec" in spec or selector, "rayClusterSpec or clusterSelector must be there"),
            (not selector or selector.get("ray.io/cluster"), "clusterSelector names no ray.io/cluster"),
            (
                not selector or not (retries or spec.get("suspend") or mode == "SidecarMode"),
                "clusterSelector goes with no backoffLimit, suspend or SidecarMode",
            ),
            (
                deletes or not spec.get("ttlSecondsAfterFinished"),
                "ttlSecondsAfterFinished needs shutdownAfterJobFinishes",
            ),
            (deletes or not spec.get("suspend"), "suspend needs shutdownAfterJobFinishes"),
            (mode != "InteractiveMode" or not retries, "InteractiveMode goes with no backoffLimit"),
            (
                mode != "SidecarMode" or not {"submitterPodTemplate", "submitterConfig"} & spec.keys(),
                "SidecarMode goes with no submitterPodTemplate or submitterConfig",
            ),
            (environment is None or isinstance(environment, dict), "runtimeEnvYAML is no mapping"),
            ("deletionStrategy" not in spec, "deletionStrategy needs the feature gate RayJobDeletionPolicy"),
        )
    if kind == "RayService":
        upgrade = spec.get("upgradeStrategy", {}).get("type")
        yield from _cluster_refusals(spec["rayClusterConfig"])
        yield from _broken(
            (
                not spec["rayClusterConfig"]["headGroupSpec"]
                .get("headService", {})
                .get("metadata", {})
                .get("name"),
                "headService of a RayService has no name of its own",
            ),
            (
                upgrade != "NewClusterWithIncrementalUpgrade",
                f"{upgrade} needs the feature gate RayServiceIncrementalUpgrade",
            ),
        )


def _cluster_refusals(spec: dict[str, Any]) -> Iterator[str]:
    head, workers, options = (
        spec["headGroupSpec"],
        spec.get("workerGroupSpecs", []),
        spec.get("autoscalerOptions", {}),
    )
    scales, second = spec.get("enableInTreeAutoscaling", False), options.get("version") == "v2"
    variables = {
        one["name"]: one.get("value") for one in head["template"]["spec"]["containers"][0].get("env", [])
    }
    redis = {"RAY_REDIS_ADDRESS", "REDIS_USERNAME", "redis-username"} | (
        {"REDIS_PASSWORD", "redis-password"} if "gcsFaultToleranceOptions" in spec else set()
    )
    version = tuple(map(int, re.findall(r"\d+", spec.get("rayVersion", ""))))
    yield from _broken(
        (
            spec.get("authOptions", {}).get("mode") != "token" or version >= (2, 52),
            "a token needs rayVersion 2.52.0 or later",
        ),
        (
            scales or variables.get("RAY_enable_autoscaler_v2") not in ("1", "true"),
            "RAY_enable_autoscaler_v2 needs enableInTreeAutoscaling",
        ),
        (
            not (scales and "version" in options and "RAY_enable_autoscaler_v2" in variables),
            "autoscalerOptions.version and RAY_enable_autoscaler_v2 say the same",
        ),
        (
            not redis & (variables.keys() | head.get("rayStartParams", {}).keys()),
            "Redis belongs under gcsFaultToleranceOptions",
        ),
    )
    for name, group in [("head", head), *((group["groupName"], group) for group in workers)]:
        start = group.get("rayStartParams", {})
        restart = group["template"]["spec"].get("restartPolicy", "Never")
        yield from _broken(
            ("labels" not in start, f"{name}: labels are a field of the group, not of rayStartParams"),
            (
                not group.get("resources")
                or not {"num-cpus", "num-gpus", "memory", "resources"} & start.keys(),
                f"{name}: resources and rayStartParams both say what there is",
            ),
            (
                not (scales and second) or restart == "Never",
                f"{name}: autoscaler v2 needs restartPolicy Never",
            ),
            (
                group.get("minReplicas", 0) <= group.get("maxReplicas", 0),
                f"{name}: minReplicas is above maxReplicas",
            ),
            (
                second or "idleTimeoutSeconds" not in group,
                f"{name}: idleTimeoutSeconds of a group needs autoscaler v2",
            ),
            (
                not group.get("suspend"),
                f"{name}: suspend needs the feature gate RayJobDeletionPolicy, and no autoscaler",
            ),
        )


def _broken(*rules: tuple[Any, str]) -> Iterator[str]:
    return (message for kept, message in rules if not kept)


def _group_and_version(api: str) -> str:
    group, _, version = api.rpartition("/")
    return "-".join(filter(None, [group.partition(".")[0], version]))


@cache
def _registry() -> Registry:
    contents = json.loads((_folder() / "_definitions.json").read_text())
    contents.setdefault("$schema", "https://json-schema.org/draft/2020-12/schema")
    return Registry().with_resource(_DEFINITIONS, Resource.from_contents(contents))


def _folder() -> Path:
    (package,) = importlib.util.find_spec("kubernetes_validate").submodule_search_locations
    return Path(package, "kubernetes-json-schema", KUBERNETES)
