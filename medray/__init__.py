"""medray: tunes medical vision-language models on a Ray cluster. What a notebook wants is here: docs/api.md.

Each name is loaded when it is first used, so importing medray loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "load_config": "medray.config",
    "self_train": "medray.methods.self_train.pipeline",
    "instruction_free": "medray.methods.instruction_free.pipeline",
    "clinician_preference": "medray.methods.clinician_preference.pipeline",
    "read_source": "medray.ingest.source_index",
    "score": "medray.evaluation.scores",
    "ProxyInstruction": "medray.models.proxy_instruction",
    "RatingModel": "medray.rating_model.model",
}

__all__ = [*_HOMES]

if TYPE_CHECKING:
    from medray.config import load_config as load_config
    from medray.evaluation.scores import score as score
    from medray.ingest.source_index import read_source as read_source
    from medray.methods.clinician_preference.pipeline import clinician_preference as clinician_preference
    from medray.methods.instruction_free.pipeline import instruction_free as instruction_free
    from medray.methods.self_train.pipeline import self_train as self_train
    from medray.models.proxy_instruction import ProxyInstruction as ProxyInstruction
    from medray.rating_model.model import RatingModel as RatingModel


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"medray has no {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
