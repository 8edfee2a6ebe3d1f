"""One Ray session per job: start or join Ray, keep its logs readable, leave it in order."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from medray.config import ClusterConfig
from medray.running.failures import error_of_ours
from medray.running.interrupts import handlers_kept
from medray.running.terminal import without_tracebacks

logger = logging.getLogger("medray")

SLOW_START = "timed out during startup"
STARTS = 3
_LOST_ACTOR = ("ActorDiedError", "ActorUnavailableError")
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_RETRIES = 10  # with growing pauses, longer than Ray takes to find a node dead (half a minute)


def start_ray(**arguments: Any) -> None:
    """ray.init, once more where a local Ray was not up within the 30 seconds that Ray gives it: on a machine
    at work it needs longer.

    Raises what ray.init raises, at the last of three attempts.
    """
    import ray

    for attempt in range(1, STARTS + 1):
        try:
            ray.init(**arguments)
            return
        except Exception as error:  # Ray has no type for it
            if SLOW_START not in str(error) or attempt == STARTS:
                raise
            logger.warning(
                "Ray did not start in time (the machine is busy); attempt %d of %d", attempt + 1, STARTS
            )


def _not_of_the_job(variables: dict[str, str]) -> dict[str, str]:
    """Without those that `ray job submit` was given for this job: they hold for its workers too, and Ray
    takes none twice, equal or not.
    """
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    given = (submitted.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in variables.items() if name not in given}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """This process's environment with `variables`, for the time of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster at `config.address` (or RAY_ADDRESS), else start a local Ray, for the time of the
    block.

    An already initialised Ray (a test, a notebook) is used as it is and left running.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
    from ray.util.annotations import RayDeprecationWarning

    terminal = sys.stderr.isatty()
    started = not ray.is_initialized()
    if started:
        if not os.environ.get("RAY_ADDRESS"):
            os.environ.pop("RAY_ADDRESS", None)  # Ray takes an empty one for an address
        address = config.address or os.environ.get("RAY_ADDRESS") or "local"
        local = (
            {}
            if address != "local"
            else {
                "num_cpus": config.num_cpus,
                "include_dashboard": False,
                "object_store_memory": int(config.object_store_gib * 2**30)
                if config.object_store_gib
                else None,
            }
        )
        variables = {
            "RAY_TRAIN_V2_ENABLED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        arguments = {"address": address, "log_to_driver": True, "logging_level": logging.WARNING, **local}
        if local:
            # A Ray of our own inherits them. Given as a runtime_env they would cost every worker a second
            # interpreter: Ray starts it by way of another that imports Ray too, and throws away those that it
            # has started before. On a single machine the preemption watcher, a process of its own in each
            # training, is unnecessary.
            watcher = {_WATCHER: os.environ.get(_WATCHER, "0")}
            # Ray's own handler of SIGTERM, which init installs, would exit silently.
            with (
                handlers_kept(),
                _environment(
                    {**variables, **watcher, WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "medray._worker_setup.quiet"}
                ),
            ):
                start_ray(**arguments)
        else:
            with handlers_kept():
                start_ray(**arguments, runtime_env={"env_vars": _not_of_the_job(variables)})
    context = ray.data.DataContext.get_current()
    # A log file wants lines, a terminal wants bars.
    context.enable_progress_bars = terminal
    context.enable_rich_progress_bars = False
    # Stages are reproducible only where blocks keep their order.
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = config.data_labels or None
    # Ray Data reads Parquet footers in actors that it spreads over all nodes and does not restart (2.60). One
    # that lands on a node that died a moment ago, before Ray has noticed, would end the job. Listing is in
    # order, so it can begin again.
    context.retried_map_errors = list(_LOST_ACTOR)
    context.max_map_retries = _RETRIES
    context.raise_original_map_exception = True  # else a StageError of an actor comes as one of Ray's
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.INFO if terminal else logging.WARNING)
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    try:
        with without_tracebacks():
            yield
    except ray.exceptions.RayError as error:
        ours = error_of_ours(error)
        if ours is None:
            raise
        # An error of ours that a task or an actor's constructor raised, without the remote traceback and
        # Ray's words about its retries.
        raise type(ours)(str(ours).partition("\nFailed to apply UDF transform")[0]) from error
    finally:
        if started:
            ray.shutdown()
