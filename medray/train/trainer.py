"""Ray Train's trainer, without its handler of Ctrl-C."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):
    """TorchTrainer that leaves signals alone.

    Its fit (2.60) installs a handler of SIGINT and leaves it there: the first Ctrl-C ends the process with
    status 1, and one that comes after the training is dropped. The job's own handler
    (medray.running.interrupts) ends a training as well: Ray ends the workers with the job.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave the handlers as they are."""
