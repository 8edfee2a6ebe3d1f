"""What each stage of a job asks Ray for, read from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medray.config import (
    DemonstrationsConfig,
    DpoConfig,
    EngineConfig,
    GenerateConfig,
    JudgeConfig,
    LoopConfig,
    RateConfig,
    ScoreConfig,
    Section,
)
from medray.config.serving import ServeConfig

# of the actor that waits for an endpoint, as medray.running.actor_pools.client_options reserves
CLIENT_CPUS = 0.5
# What Ray Data (2.60) reserves beside a stage's own tasks and actors, and gives no option for: a CPU for each
# task that lists files or cuts rows into other blocks, and, where a stage is continued, one for the actor
# that leaves out the rows that are done.
LISTING_CPUS, FILTER_CPUS = 1.0, 1.0
_PLACES = ("actors", "cpus_per_actor", "gpus_per_actor", "place")


@dataclass(frozen=True)
class Demand:
    """Places of one shape, each on one node, that a stage holds at the same time.

    field: the configuration's, to be changed where the places cannot be had.
    least, most: how many; the stage begins with `least`.
    labels: label selectors a node must match.
    """

    field: str
    least: int
    most: int
    cpus: float
    gpus: float = 0.0
    memory_gib: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)

    @property
    def amounts(self) -> dict[str, float]:
        """What one place takes, by resource."""
        return {"CPU": self.cpus, "GPU": self.gpus, "GiB": self.memory_gib, **self.resources}

    def __str__(self) -> str:
        parts = (
            [f"{self.cpus:g} CPUs"]
            + [f"{self.gpus:g} GPUs"] * bool(self.gpus)
            + [f"{self.memory_gib:g} GiB"] * bool(self.memory_gib)
        )
        parts += [f"{amount:g} {name}" for name, amount in self.resources.items()]
        return f"{self.least} x ({', '.join(parts)})" + "".join(
            f" on {key}={value}" for key, value in self.labels.items()
        )


def demands(config: Section) -> dict[str, list[Demand]]:
    """By stage, what it holds at the same time: its workers or actors, the tasks that feed them, and Ray
    Data's own.

    Stages are the configuration's sections, "data" the reading of the source. Data's labels hold where a
    stage's own placement does not name the same label, as in Ray Data.
    """
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    data, cluster = sections["data"], sections["cluster"]
    reader = Demand("data.read_cpus", 1, data.encoders, data.read_cpus, labels=cluster.data_labels)
    listing, kept = (
        Demand("cluster.data_labels", 1, 1, cpus, labels=cluster.data_labels)
        for cpus in (LISTING_CPUS, FILTER_CPUS)
    )
    continued = [reader, kept, listing]
    found = {"data": [reader]}
    for name, section in sections.items():
        if isinstance(section, LoopConfig):
            found[name] = [_workers(name, section), reader, reader, listing]  # one reads, one encodes
        elif isinstance(section, EngineConfig | ScoreConfig | DemonstrationsConfig):
            found[name] = [_pool(name, section, cluster.data_labels), *continued]
        elif isinstance(section, JudgeConfig | GenerateConfig | RateConfig) and section.kind in (
            "api",
            "random",
        ):
            found[name] = [Demand(f"{name}.kind", 1, 1, CLIENT_CPUS, labels=cluster.data_labels), *continued]
        elif isinstance(section, JudgeConfig | GenerateConfig | RateConfig):
            own = section.engine.beside(config.engine)
            # else it runs in the engine's places
            if any(getattr(own, field) != getattr(config.engine, field) for field in _PLACES):
                found[name] = [_pool(f"{name}.engine", own, cluster.data_labels), *continued]
        if isinstance(section, DpoConfig):
            labels = cluster.data_labels | section.place.selector
            actors = Demand(
                f"{name}.reference_workers",
                *section.reference_workers,
                section.cpus_per_worker,
                section.gpus_per_worker,
                section.place.memory_gib,
                labels,
                section.place.resources,
            )
            found["reference"] = [actors, *continued]
    return found


def _pool(
    name: str, section: EngineConfig | ScoreConfig | DemonstrationsConfig, data_labels: dict[str, str]
) -> Demand:
    place = section.place
    return Demand(
        f"{name}.actors",
        *section.actors,
        section.cpus_per_actor,
        section.gpus_per_actor,
        place.memory_gib,
        data_labels | place.selector,
        place.resources,
    )


def served_demands(config: ServeConfig, engines: Mapping[str, EngineConfig]) -> dict[str, list[Demand]]:
    """What the endpoint holds at the same time: its ingress, and the replicas of every model with the
    engine it is served by.
    """
    models = []
    for engine in engines.values():
        places, cpus, gpus = config.bundle(engine)
        models.append(
            Demand(
                "replicas",
                config.replicas[0] * places,
                config.replicas[1] * places,
                cpus,
                gpus,
                config.place.memory_gib,
                config.place.selector,
                config.place.resources,
            )
        )
    return {
        "endpoint": [
            *models,
            Demand("ingress_replicas", config.ingress_replicas, config.ingress_replicas, config.ingress_cpus),
        ]
    }


def _workers(name: str, section: LoopConfig) -> Demand:
    least = section.num_workers if isinstance(section.num_workers, int) else section.num_workers[0]
    return Demand(
        f"{name}.num_workers",
        least,
        section.max_workers,
        section.cpus_per_worker,
        section.gpus_per_worker,
        section.place.memory_gib,
        section.place.selector,
        section.place.resources,
    )
