"""Whether what is to be served can be placed, and its port had, before anything starts: Ray waits without
end for a place that no node has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from medray.errors import ConfigError, MedrayError
from medray.plan.demand import Demand
from medray.plan.groups import Group, misfits, read_groups

_OF_RAY = ("CPU", "GPU", "memory", "object_store_memory")

log = logging.getLogger("ray.serve")


def check_fits(wanted: Sequence[Demand], fix: str) -> None:
    """Raise ConfigError if the cluster cannot hold all of it at once, however far it may grow.

    Args:
        fix: which fields may be changed.
    """
    groups = cluster_groups()
    if groups is None:
        log.info("whether the cluster has room was not checked: what it may grow to is not known here")
        return
    problems = misfits({"serving": list(wanted)}, groups)
    if problems:
        there = ", ".join(f"{group.most} x {group.name} ({_amounts(group)})" for group in groups)
        raise ConfigError(
            "\n".join(
                [*problems, f"the cluster has {there or 'no node'}, so serving would never be ready; {fix}"]
            )
        )


def check_port() -> None:
    """Raise ConfigError if `serve run` would share its port with a server that is there already: Ray
    Serve's sockets do not refuse that.
    """
    from ray.serve.config import HTTPOptions

    command = _command()
    try:
        if command is None or _address(command) is not None:
            return  # Ray Serve of a cluster that runs may listen already, and rightly
    except (OSError, RuntimeError, ValueError):  # no such cluster: Ray says it better when it joins
        return
    options = HTTPOptions()
    with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as probe:
        # connections that have just ended do not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise ConfigError(
                f"port {options.port} of {options.host} cannot be had ({error.strerror}): another server "
                "listens there, and requests would go to either. End it (serve "
                "shutdown), or serve a config file with http_options.port (docs/serving.md)"
            ) from None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of medray end `serve run` with their own words, and without a traceback."""
    import click

    try:
        yield
    except MedrayError as error:
        if _command() is None:
            raise
        raise click.ClickException(str(error)) from error


def cluster_groups() -> list[Group] | None:
    """The nodes that are there or may come: of the cluster that this process has joined, or that `serve run`
    is about to join or start.

    None if it cannot be known.
    """
    import ray
    from ray._private.state import GlobalState, state

    if ray.is_initialized():
        return _groups_of(state, ray.get_runtime_context().gcs_address)
    command = _command()
    if command is None:
        return None
    try:
        address = _address(command)
        if address is None:
            return [_local_node()]
        if address.startswith("ray://"):
            return None
        from ray._raylet import GcsClientOptions

        joined = GlobalState()
        joined._initialize_global_state(
            GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        return _groups_of(joined, address)
    except (OSError, RuntimeError, ValueError) as error:  # Ray says it better when it joins
        log.info("cluster not looked at: %s", type(error).__name__)
        return None


def _groups_of(state: Any, address: str) -> list[Group] | None:
    more = _may_come(address)
    if more is None:
        return None
    nodes = [
        _group(node["NodeManagerHostname"] or node["NodeID"][:8], node["Resources"], node["Labels"])
        for node in state.node_table()
        if node["Alive"]
    ]
    return nodes + more


def _may_come(address: str) -> list[Group] | None:
    """Groups of the autoscaler of a cluster whose head is this machine, none where it has none; None on other
    machines.

    Ray (2.60) tells nobody what its autoscaler may add. Its monitor, beside the head, is started with the
    autoscaler's file.
    """
    import ray._private.worker

    node = ray._private.worker._global_node
    if node is not None and node.is_head():
        return []  # started by this very process, without one
    port = address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        values = dict(
            word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word
        )
        if (
            any(word.endswith("monitor.py") for word in words)
            and values.get("gcs-address", "").rpartition(":")[2] == port
        ):
            file = values.get("autoscaling-config")
            try:
                return read_groups(file) if file else []
            except (ConfigError, KeyError):
                return None
    return None


def _local_node() -> Group:
    """The node that `serve run` starts, as Ray will count it."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    spec = ResourceAndLabelSpec()
    spec.resolve(is_head=True, node_ip_address="127.0.0.1")
    return _group("this machine", spec.to_resource_dict(), dict(spec.labels or {}))


def _group(name: str, amounts: dict[str, float], labels: dict[str, str]) -> Group:
    custom = {
        key: amount for key, amount in amounts.items() if key not in _OF_RAY and not key.startswith("node:")
    }
    return Group(
        name,
        amounts.get("CPU", 0),
        amounts.get("GPU", 0),
        amounts.get("memory", 0) / 2**30,
        labels,
        1,
        custom,
    )


def _amounts(group: Group) -> str:
    return ", ".join(
        [f"{group.cpus:g} CPUs"]
        + [f"{group.gpus:g} GPUs"] * bool(group.gpus)
        + [f"{group.memory_gib:.1f} GiB"]
    )


def _command() -> dict[str, Any] | None:
    """Options of the `serve run` command that builds the application, which joins or starts Ray only
    afterwards; None in other programs.
    """
    import click
    import ray

    context = click.get_current_context(silent=True)
    return (
        None if context is None or "address" not in context.params or ray.is_initialized() else context.params
    )


def _address(command: dict[str, Any]) -> str | None:
    """Of the cluster that ray.init will join, None where it will start one."""
    from ray._private.services import canonicalize_bootstrap_address

    address = command["address"] or os.environ.get("RAY_ADDRESS")
    if address == "local" or (address or "").startswith("ray://"):
        return None if address == "local" else address
    return canonicalize_bootstrap_address(address)
