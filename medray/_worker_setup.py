"""Run by Ray in every worker process of a local session, before anything else (runtime_env worker_process_setup_hook)."""

import logging


def quiet() -> None:
    """Ray Train's placement group cleaner asks the dashboard once a second and warns each time that there is none."""
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)
