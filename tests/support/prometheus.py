"""What the cluster's nodes tell Prometheus, read as Prometheus reads it."""

import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def told(ray, name, seconds=120, **labels):
    """Values of a metric, one per process, when there are some: processes tell theirs every ten seconds,
    and as they end.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        values = []
        for node in ray.nodes():
            if node["Alive"]:
                with urllib.request.urlopen(
                    f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30
                ) as answer:
                    families = text_string_to_metric_families(answer.read().decode())
                values += [
                    one.value
                    for family in families
                    for one in family.samples
                    if one.name == name and labels.items() <= one.labels.items()
                ]
        if values:
            return values
        time.sleep(1)
    raise AssertionError(f"nobody tells {name} of {labels}")
