"""Options of Ray Data for pools of engines and of clients of an endpoint."""

from __future__ import annotations

from typing import Any

from medray.config import EngineConfig, Placement

# Ray Data's default is to retry for ever, but a batch that ends its engine time and again is a fault of its
# own. Spot nodes lose a few actors in a normal run.
_TASK_RETRIES = 8


def map_options(config: EngineConfig) -> dict[str, Any]:
    """Arguments of `map_batches` for engine actors: pool, reservation, retry unit and Arrow batches.

    Two batches are in an actor at once, so that the engine is not left idling at the end of each.
    """
    import ray.data

    low, high = config.actors
    return {
        "batch_size": config.rows_per_task,
        "batch_format": "pyarrow",
        "num_cpus": config.cpus_per_actor,
        "num_gpus": config.gpus_per_actor,
        **config.place.options,
        "compute": ray.data.ActorPoolStrategy(
            min_size=low,
            max_size=high,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        "udf_modifying_row_count": False,
        "ray_remote_args_fn": _bounded_retries,
    }


def client_options(config: EngineConfig) -> dict[str, Any]:
    """Arguments of `map_batches` for one actor that needs no engine: it waits for an endpoint, or for
    nothing.

    One, so that it sees all requests of its stage: it tells an endpoint that is down from rows that are
    refused.
    """
    import ray.data

    pool = ray.data.ActorPoolStrategy(
        size=1, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
    )
    anywhere = config.model_copy(update={"place": Placement()})
    return {**map_options(anywhere), "num_cpus": 0.5, "num_gpus": 0, "compute": pool}


def _bounded_retries() -> dict[str, int]:
    return {"max_task_retries": _TASK_RETRIES}
