"""The schema of KubeRay's three objects (ray.io/v1, KubeRay 1.5), for the API server's part of checking a manifest.

KubeRay's own CustomResourceDefinitions are on no package registry, so their fields, types, required ones and enumerations stand
here; the pods, services and containers inside them are Kubernetes' own, taken from the strict schemas of the package
kubernetes-validate. Unknown fields are errors: an API server would drop them without a word, and a misspelt limit with them.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from referencing import Registry, Resource

KUBERNETES = "v1.34.0-local-strict"
_DEFINITIONS = "/api/_definitions.json"

TEXT, WHOLE, NUMBER, YES_NO = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
TEXTS = {"type": "object", "additionalProperties": TEXT}
COUNT = {"type": "integer", "minimum": 0}


def kubernetes(name: str) -> dict[str, str]:
    return {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.api.{name}"}


def several(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def section(required: tuple[str, ...] = (), **fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


POD = kubernetes("core.v1.PodTemplateSpec")
AUTOSCALER = section(
    version={"enum": ["v1", "v2"]}, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}, idleTimeoutSeconds=COUNT, image=TEXT, imagePullPolicy=TEXT,
    resources=kubernetes("core.v1.ResourceRequirements"), securityContext=kubernetes("core.v1.SecurityContext"), env=several(kubernetes("core.v1.EnvVar")),
    envFrom=several(kubernetes("core.v1.EnvFromSource")), volumeMounts=several(kubernetes("core.v1.VolumeMount")),
)
HEAD = section(
    ("template",), template=POD, headService=kubernetes("core.v1.Service"), enableIngress=YES_NO, serviceType=TEXT, rayStartParams=TEXTS, labels=TEXTS, resources=TEXTS)
WORKERS = section(
    ("groupName", "minReplicas", "maxReplicas", "template"), groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, numOfHosts=COUNT, idleTimeoutSeconds=COUNT,
    suspend=YES_NO, rayStartParams=TEXTS, labels=TEXTS, resources=TEXTS, template=POD, scaleStrategy=section(workersToDelete=several(TEXT)),
)
CREDENTIAL = section(value=TEXT, valueFrom=kubernetes("core.v1.EnvVarSource"))
CLUSTER = section(
    ("headGroupSpec",), rayVersion=TEXT, suspend=YES_NO, managedBy=TEXT, headServiceAnnotations=TEXTS, enableInTreeAutoscaling=YES_NO, autoscalerOptions=AUTOSCALER,
    authOptions=section(mode={"enum": ["disabled", "token"]}), headGroupSpec=HEAD, workerGroupSpecs=several(WORKERS),
    gcsFaultToleranceOptions=section(("redisAddress",), redisAddress=TEXT, externalStorageNamespace=TEXT, redisUsername=CREDENTIAL, redisPassword=CREDENTIAL),
)
JOB = section(
    entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT, submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]}, submitterPodTemplate=POD,
    submitterConfig=section(backoffLimit=COUNT), backoffLimit=COUNT, activeDeadlineSeconds=WHOLE, clusterSelector=TEXTS, metadata=TEXTS, managedBy=TEXT, suspend=YES_NO,
    entrypointNumCpus=NUMBER, entrypointNumGpus=NUMBER, entrypointResources=TEXT, shutdownAfterJobFinishes=YES_NO, ttlSecondsAfterFinished=COUNT, rayClusterSpec=CLUSTER,
)
SERVICE = section(
    serveConfigV2=TEXT, rayClusterConfig=CLUSTER, serveService=kubernetes("core.v1.Service"), upgradeStrategy=section(type={"enum": ["NewCluster", "None"]}),
    excludeHeadPodFromServeSvc=YES_NO, rayClusterDeletionDelaySeconds=COUNT,
)


def check(document: dict[str, Any]) -> None:
    """Raise jsonschema.ValidationError where an API server with KubeRay would refuse the document, or drop a part of it."""
    spec = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}.get(document["kind"])
    if spec is None:
        schema = json.loads((_folder() / f"{document['kind'].lower()}-{_group_and_version(document['apiVersion'])}.json").read_text())
    else:
        metadata = {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
        schema = section(("apiVersion", "kind", "metadata", "spec"), apiVersion={"const": "ray.io/v1"}, kind=TEXT, metadata=metadata, spec=spec)
    jsonschema.Draft202012Validator({"$id": "/api/document.json", **schema}, registry=_registry()).validate(document)


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
