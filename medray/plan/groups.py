"""The node groups of a cluster file, and whether what stages ask for fits them: a request that no node can
take waits for ever.

Three kinds of file are read: Ray's cluster launcher (available_node_types; on-premise clusters say in
metadata.nodes what their machines have), and KubeRay's RayCluster, RayJob and RayService.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medray.config import EngineConfig
from medray.config.serving import ServeConfig
from medray.errors import ConfigError
from medray.plan.demand import Demand

_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class Group:
    """Nodes of one shape: what one offers to tasks and actors, and how many there can be."""

    name: str
    cpus: float
    gpus: float
    memory_gib: float
    labels: dict[str, str]
    most: int
    resources: dict[str, float] = field(default_factory=dict)  # custom ones

    @property
    def amounts(self) -> dict[str, float]:
        """What an empty node offers, by resource."""
        return {"CPU": self.cpus, "GPU": self.gpus, "GiB": self.memory_gib, **self.resources}

    def takes(self, demand: Demand) -> bool:
        """Whether an empty node can hold one place of this demand."""
        return self.matches(demand.labels) and all(
            amount <= self.amounts.get(name, 0) for name, amount in demand.amounts.items()
        )

    def matches(self, selector: dict[str, str]) -> bool:
        return all(matches(self.labels.get(key), wanted) for key, wanted in selector.items())


def matches(value: str | None, selector: str) -> bool:
    """Ray's rule: value, !value, in(a,b), !in(a,b). A label that is absent is in no set."""
    wanted = selector.removeprefix("!")
    among = re.fullmatch(r"in\((.*)\)", wanted)
    choices = {choice.strip() for choice in among[1].split(",")} if among else {wanted}
    return (value in choices) != selector.startswith("!")


def read_groups(path: str | Path) -> list[Group]:
    """The groups of a cluster file, the head among them.

    Raises ConfigError for a file of another kind, or one that does not say what its nodes have.
    """
    for document in _documents(path):
        if "provider" in document:
            return (
                _on_premise(path, document)
                if document["provider"].get("type") == "local"
                else _launcher(document)
            )
        spec = document.get("spec", {})
        cluster = {
            "RayCluster": spec,
            "RayJob": spec.get("rayClusterSpec"),
            "RayService": spec.get("rayClusterConfig"),
        }.get(document.get("kind"))
        if cluster:
            return [_pod_group("head", cluster["headGroupSpec"], 1)] + [
                _pod_group(group["groupName"], group, group["maxReplicas"])
                for group in cluster["workerGroupSpecs"]
            ]
    raise ConfigError(f"{path}: neither a file of `ray up` (provider) nor a RayCluster, RayJob or RayService")


def _documents(path: str | Path) -> list[dict[str, Any]]:
    try:
        return [
            document for document in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")) if document
        ]
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error


def read_served(path: str | Path, engine: EngineConfig) -> tuple[ServeConfig, dict[str, EngineConfig]]:
    """The endpoint of a Serve config file or RayService, and the engine of each model it serves.

    Args:
        engine: of runs, where the file does not say another. Which runs share their base stands in the runs
            alone: one base is counted.

    Raises ConfigError for a file without the endpoint, or with settings it does not know.
    """
    for document in _documents(path):
        config = (
            yaml.safe_load(document["spec"].get("serveConfigV2", "")) or {}
            if document.get("kind") == "RayService"
            else document
        )
        for application in config.get("applications", []):
            if application.get("import_path") == "serve.app:build":
                try:
                    served = ServeConfig.model_validate(application.get("args", {}))
                except ValidationError as error:
                    raise ConfigError(f"{path}: args of {application.get('name')}: {error}") from error
                runs = [*(["tuned"] if served.run else []), *served.runs]
                bases = ["base"] if runs and served.base else []
                named = {model.name: served.engine_of() for model in served.models}
                return served, dict.fromkeys((*runs, *bases), served.engine_of(engine)) | named
    raise ConfigError(f"{path}: no application with the import_path serve.app:build")


def _launcher(config: dict[str, Any]) -> list[Group]:
    head, most = config["head_node_type"], config.get("max_workers", 2)
    return [
        _group(
            name,
            node.get("resources", {}),
            node.get("labels", {}),
            1 if name == head else min(node.get("max_workers", most), most),
        )
        for name, node in config["available_node_types"].items()
    ]


def _on_premise(path: str | Path, config: dict[str, Any]) -> list[Group]:
    nodes = config.get("metadata", {}).get("nodes")
    if not nodes:
        raise ConfigError(
            f"{path}: an on-premise cluster's file does not say what its machines have; write it under "
            "metadata.nodes, as cluster/local.yaml does"
        )
    return [
        _group(name, node.get("resources", {}), node.get("labels", {}), node.get("count", 1))
        for name, node in nodes.items()
    ]


def _group(name: str, resources: dict[str, float], labels: dict[str, str], most: int) -> Group:
    custom = {
        key: amount
        for key, amount in resources.items()
        if key not in ("CPU", "GPU", "memory", "object_store_memory")
    }
    return Group(
        name,
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        resources.get("memory", 0) / 2**30,
        labels,
        most,
        custom,
    )


def _pod_group(name: str, spec: dict[str, Any], most: int) -> Group:
    container = spec["template"]["spec"]["containers"][0]  # Ray's, by KubeRay's rule
    limits, start = container["resources"]["limits"], spec.get("rayStartParams", {})
    cpus = float(start.get("num-cpus", math.ceil(quantity(limits["cpu"]))))
    gpus = float(start.get("num-gpus", quantity(limits.get("nvidia.com/gpu", 0))))
    # KubeRay starts Ray with the whole limit, object store or not
    memory = float(start.get("memory", quantity(limits["memory"])))
    # quoted twice, for the shell of the pod
    custom = json.loads(start.get("resources", "{}").strip('"').replace("\\", ""))
    return Group(name, cpus, gpus, memory / 2**30, spec.get("labels", {}), most, custom)


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity ("500m", "64Gi", 2) as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    return float(number) / 1000 if unit == "m" else float(number) * _UNITS[unit]


def misfits(stages: dict[str, list[Demand]], groups: Sequence[Group]) -> list[str]:
    """Why stages would wait for ever, one line each; empty where every stage can begin.

    Each place must fit a node of some group, and what a stage holds at the same time must fit all nodes there
    can be. The packing is first-fit decreasing: a cluster so tight that only a cleverer packing fits is
    refused too.
    """
    found: dict[str, str] = {}  # stages share what reads their rows: said once
    for stage, wanted in stages.items():
        unplaced = [demand for demand in wanted if not any(group.takes(demand) for group in groups)]
        for demand in unplaced:
            found.setdefault(
                f"{demand.field} {demand}",
                f"{stage}: {demand.field}: no node takes {demand}; {_nearest(demand, groups)}",
            )
        if not unplaced and not _pack(wanted, groups):
            found[stage] = (
                f"{stage}: needs at once {' + '.join(map(str, wanted))}, more than all nodes together hold; "
                f"raise a group's limit or lower {wanted[0].field}"
            )
    return list(found.values())


def _nearest(demand: Demand, groups: Sequence[Group]) -> str:
    labelled = [group for group in groups if group.matches(demand.labels)]
    if not labelled:
        return "no group has such labels: " + ", ".join(f"{group.name} {group.labels}" for group in groups)
    return "nodes with its labels have " + ", ".join(
        ", ".join(
            [
                f"{group.name} {group.cpus:g} CPUs",
                f"{group.gpus:g} GPUs",
                f"{group.memory_gib:.0f} GiB",
                *(f"{amount:g} {name}" for name, amount in group.resources.items()),
            ]
        )
        for group in labelled
    )


def _pack(wanted: Sequence[Demand], groups: Sequence[Group]) -> bool:
    """Whether the places fit together, the largest first, each onto the fitting node with the fewest GPUs."""
    nodes: dict[str, list[dict[str, float]]] = {group.name: [] for group in groups}
    by_gpus = sorted(groups, key=lambda group: (group.gpus, group.cpus))
    for demand in sorted(wanted, key=lambda demand: (demand.gpus, demand.cpus), reverse=True):
        for _ in range(demand.least):
            if not any(
                group.takes(demand) and _take(nodes[group.name], group, demand.amounts) for group in by_gpus
            ):
                return False
    return True


def _take(nodes: list[dict[str, float]], group: Group, place: dict[str, float]) -> bool:
    for free in nodes:
        if all(amount <= free.get(name, 0) for name, amount in place.items()):
            break
    else:
        if len(nodes) >= group.most:
            return False
        free = dict(group.amounts)
        nodes.append(free)
    for name, amount in place.items():
        free[name] = free.get(name, 0) - amount
    return True
