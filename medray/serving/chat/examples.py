"""Held-out questions of a run, to try on the page."""

from __future__ import annotations

import json
import logging
from typing import Any

from fsspec.core import url_to_fs

from medray.config.serving import ServeConfig
from medray.errors import DataError

logger = logging.getLogger("medray")

_SIDE = 512  # pixels: large enough for the models, small enough to send with the page


def examples_of(config: ServeConfig) -> list[dict[str, str]]:
    """{"question", "reference", "image"} of the first run's held-out questions, of one image each; image as a
    data URI.

    None where the run keeps its questions elsewhere (jobs with --shared), or has none.
    """
    uris = [*([config.run] if config.run else []), *config.runs.values()]
    if not uris or not config.examples:
        return []
    try:
        fs, root = url_to_fs(uris[0])
        manifest = json.loads(fs.cat_file(f"{root}/stages/00-data/manifest.json"))
        return [_shown(row) for row in _first(manifest["outputs"]["questions"], config.examples)]
    except (FileNotFoundError, KeyError):
        return []
    except (ValueError, DataError) as error:
        # a damaged file costs the page its examples, not the endpoint its start
        logger.warning("no examples for the page: a file of %s is damaged: %s", uris[0], error)
        return []


def _first(uri: str, most: int) -> list[dict[str, Any]]:
    """Rows of questions, each of another image."""
    from medray.storage.shards import stored_rows

    found: dict[bytes, dict[str, Any]] = {}
    for row in stored_rows(uri, ["question", "reference", "image"]):
        found.setdefault(row["image"], row)
        if len(found) == most:
            break
    return list(found.values())


def _shown(row: dict[str, Any]) -> dict[str, str]:
    from medray.config import DataConfig
    from medray.images.decoding import decode, png_url

    # as models see it, and without whatever the file tells beside its pixels
    small = decode(row["image"], DataConfig())
    small.thumbnail((_SIDE, _SIDE))
    return {"question": row["question"], "reference": row["reference"] or "", "image": png_url(small)}
