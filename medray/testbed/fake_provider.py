"""Ray's fake provider of nodes, each with a folder of its own for what jobs bring along; and it can be
out of machines, as clouds are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

_FOLDER = ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME


class Provider(FakeMultiNodeProvider):
    """As Ray's. There, nodes of one machine unpack a job's working directory into one place, and each removes
    what it finds there, under the processes of the others (MKL then ends them with "Cannot load
    libtorch_cpu.so": the folder they are in is gone).

    A file named after a group in the folder `no_capacity` of the provider's settings: no node of that group
    can be had.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        group = tags[TAG_RAY_USER_NODE_TYPE]
        if Path(self.provider_config["no_capacity"], group).exists():
            raise RuntimeError(f"InsufficientInstanceCapacity: no machines for {group}")
        with self.lock:
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"{_FOLDER}_{self._next_node_id + 1}"
            try:
                super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
            finally:
                ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = _FOLDER
