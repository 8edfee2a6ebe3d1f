"""Run by Ray in every worker process of a local session, before anything else (what a runtime_env calls
worker_process_setup_hook).
"""

import logging
import warnings

# What these say at INFO goes by once per epoch and worker (plans, splits, checkpoints) and is in the run's
# own records.
CHATTY = ("ray.data._internal", "ray.train.v2._internal")


def quiet() -> None:
    """Leaves what a reader of a job's log can act on."""
    from ray.util.annotations import RayDeprecationWarning

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray Train's placement group cleaner asks the dashboard once a second and warns each time that there is
    # none.
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(
        logging.ERROR
    )
    # About calls inside Ray, and ray_remote_args_fn, for which Ray 2.60 has no successor that takes
    # max_task_retries.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
