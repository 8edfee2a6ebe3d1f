"""An autoscaling cluster on one machine: Ray's own autoscaler with its fake provider, whose nodes are
processes here.

For tests and benchmarks/elasticity.py. What is real: the autoscaler, scheduling by labels, nodes that come
when work asks for them and go when they are idle, and what Ray does when one dies.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from medray.running.ray_session import STARTS

_HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # the provider numbers the nodes after it
_BIN = Path(sys.executable).parent


class FakeCluster:
    """A head, and nodes of the given types between none and `most` of each.

    Args:
        folder: for configuration and logs.
        groups: by name the CPUs and the greatest number of its nodes; a node's label medray-group is the
            name, and it has as many of a custom resource of that name as CPUs.
        idle_seconds: a node without work goes after so long.
        environment: variables of its processes, besides this process's own; RAY_AUTH_MODE=token asks for the
            token under its HOME.

    Use as a context manager; `address` is for RAY_ADDRESS, `environment` for processes that join, `dashboard`
    for `ray job --address`.
    """

    def __init__(
        self,
        folder: Path,
        groups: dict[str, tuple[float, int]],
        head_cpus: int = 1,
        idle_seconds: float = 10,
        environment: dict[str, str] | None = None,
    ):
        self.folder, self.groups, self.head_cpus = folder, groups, head_cpus
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.dashboard_port = free_port()
        self.dashboard = f"http://127.0.0.1:{self.dashboard_port}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": self.address,
            "RAY_TRAIN_V2_ENABLED": "1",
            **(environment or {}),
        }
        self.settings = {
            "cluster_name": "fake",
            "max_workers": sum(most for _, most in groups.values()),
            "idle_timeout_minutes": idle_seconds / 60,
            "upscaling_speed": 1.0,
            "provider": {
                "type": "external",
                "module": "medray.testbed.fake_provider.Provider",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "launch_multiple": True,
                "head_node_id": _HEAD,
                "gcs_address": self.address,
                "no_capacity": str(folder / "no_capacity"),
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
                **{
                    name: {
                        "resources": {"CPU": cpus, name: cpus, "object_store_memory": 200 * 2**20},
                        "labels": {"medray-group": name},
                        "node_config": {},
                        "min_workers": 0,
                        "max_workers": most,
                    }
                    for name, (cpus, most) in groups.items()
                },
            },
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            "file_mounts_sync_continuously": False,
            **{
                name: []
                for name in (
                    "initialization_commands",
                    "setup_commands",
                    "head_setup_commands",
                    "worker_setup_commands",
                    "head_start_ray_commands",
                    "worker_start_ray_commands",
                    "cluster_synced_files",
                    "rsync_exclude",
                    "rsync_filter",
                )
            },
        }

    def __enter__(self) -> FakeCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        command = [
            _BIN / "ray",
            "start",
            "--head",
            "--block",
            f"--port={self.port}",
            f"--num-cpus={self.head_cpus}",
            f"--autoscaling-config={config}",
            "--include-dashboard=true",
            f"--dashboard-port={self.dashboard_port}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.folder / 'ray'}",
            "--disable-usage-stats",
            f"--object-store-memory={300 * 2**20}",
            "--node-ip-address=127.0.0.1",
        ]
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"} | {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
        }
        attempt = 1
        while not self._head_started(command, environment):
            self.__exit__()
            said = (self.folder / "head.log").read_text()
            if attempt == STARTS:  # on a machine at work Ray gives up in many words
                raise RuntimeError(f"the fake cluster's head did not start:\n{said[-3000:]}")
            attempt += 1
        return self

    def _head_started(self, command: list[Any], environment: dict[str, str]) -> bool:
        log = self.folder / "head.log"
        self.log = log.open("w")
        self.head = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        until = time.monotonic() + 600
        while self.head.poll() is None and time.monotonic() < until:
            if "Ray runtime started" in log.read_text():
                return True
            time.sleep(0.3)
        return False

    def __exit__(self, *_: Any) -> None:
        killed: list[psutil.Process] = []
        for process in [
            *self._raylets().values(),
            *(one for one in _alive() if str(self.folder / "ray") in " ".join(one.info["cmdline"] or ())),
        ]:
            killed += _kill(process)
        if self.head.poll() is None:
            killed += _kill(psutil.Process(self.head.pid))
        self.head.wait()
        until = time.monotonic() + 60
        # until then they write into the folder
        while not set(_alive()).isdisjoint(killed) and time.monotonic() < until:
            time.sleep(0.1)
        self.log.close()

    def nodes(self) -> dict[str, list[str]]:
        """Group -> ids of its living nodes, by the raylets that run."""
        found: dict[str, list[str]] = {name: [] for name in self.groups}
        for name, identity in self._raylets():
            found[name].append(identity)
        return found

    @contextlib.contextmanager
    def without_capacity(self, group: str) -> Iterator[None]:
        """No further node of the group can be had for the time of the block, as happens with spot
        machines.
        """
        gone = self.folder / "no_capacity" / group
        gone.parent.mkdir(exist_ok=True)
        gone.touch()
        try:
            yield
        finally:
            gone.unlink()

    def kill_node(self, group: str, runs: str = "") -> str:
        """SIGKILL a node, the oldest of its group that runs an actor of the class `runs` (any node where
        empty), with everything it started.

        Returns its id. Raises LookupError where there is none.
        """
        raylets = self._raylets()
        of_group = sorted(
            key for key, raylet in raylets.items() if key[0] == group and (not runs or _runs(raylet, runs))
        )
        if not of_group:
            raise LookupError(f"no node of group {group} is there" + (f" that runs {runs}" if runs else ""))
        _kill(raylets[of_group[0]])
        return of_group[0][1]

    def _raylets(self) -> dict[tuple[str, str], psutil.Process]:
        """(group, node id) -> its raylet."""
        found = {}
        for process in _alive():
            command = " ".join(process.info["cmdline"] or ())
            if "/raylet/raylet" not in command or self.address not in command:
                continue
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if variables.get("RAY_NODE_TYPE_NAME") in self.groups:
                    found[variables["RAY_NODE_TYPE_NAME"], variables["RAY_CLOUD_INSTANCE_ID"]] = process
        return found


def _alive() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def _runs(raylet: psutil.Process, actor: str) -> bool:
    below = set(raylet.children(recursive=True))
    return any(one in below and f"ray::{actor}" in " ".join(one.info["cmdline"] or ()) for one in _alive())


def _kill(process: psutil.Process) -> list[psutil.Process]:
    """SIGKILL the process and all below it; returns them."""
    family = [process]
    with contextlib.suppress(psutil.Error):
        family += process.children(recursive=True)
    for one in family:
        with contextlib.suppress(psutil.Error):
            one.kill()
    return family


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now; below those that the kernel gives out, for
    Ray, vLLM and gloo take from these.
    """
    while True:
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
