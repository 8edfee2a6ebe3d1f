"""Images and their captions as vectors: rows of records.IMAGE_TEXT in, rows of records.EMBEDDED out."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa

from medray.config import DataConfig
from medray.config.clinician_preference_sections import DemonstrationsConfig
from medray.records import EMBEDDED
from medray.storage.begun import Begun

logger = logging.getLogger("medray")


class Embed:
    """Callable for `map_batches(batch_format="pyarrow")`; reads sample_id, image, caption and modality.

    An embedding is [image features ; text features], each divided by its own length, so that both count alike
    (BioMed-VITAL's images and texts are embedded apart and joined). A row without a caption has zeros for the
    text. An image that cannot be read gives a row without an embedding and with the reason in `error`.

    Args:
        encoder: see medray.models.encoder.load_encoder.
        config, data_config: the sections, or their dumps; limits of images are data_config's.
    """

    def __init__(self, encoder: str, config: DemonstrationsConfig | dict, data_config: DataConfig | dict):
        import torch

        from medray.models.encoder import load_encoder

        config = DemonstrationsConfig.model_validate(config)
        self.data_config = DataConfig.model_validate(data_config)
        torch.set_num_threads(max(1, int(config.cpus_per_actor)))
        self.encoder = load_encoder(encoder, config.precision)
        self.begun = Begun()

    def __call__(self, table: pa.Table) -> pa.Table:
        self.begun(table.num_rows)
        rows = table.select(["sample_id", "image", "caption", "modality"]).to_pylist()
        images, errors = zip(*(self._decoded(row) for row in rows), strict=True) if rows else ((), ())
        good = [place for place, error in enumerate(errors) if error is None]
        embeddings: list[np.ndarray | None] = [None] * len(rows)
        errors = list(errors)
        texts = [row["caption"] or "" for row in rows]
        try:
            found = (
                self._embedded([images[place] for place in good], [texts[place] for place in good])
                if good
                else ()
            )
            for place, embedding in zip(good, found, strict=True):
                embeddings[place] = embedding
        except MemoryError:
            raise
        except Exception:  # a row that the encoder's processor cannot take: found by asking for each alone
            for place in good:
                embeddings[place], errors[place] = self._alone(
                    rows[place]["sample_id"], images[place], texts[place]
                )
        made = (
            {**row, "embedding": embedding, "error": error}
            for row, embedding, error in zip(rows, embeddings, errors, strict=True)
        )
        return pa.Table.from_pylist(list(made), schema=EMBEDDED)

    def _embedded(self, images: list[Any], texts: list[str]) -> np.ndarray:
        halves_N2D = np.stack([unit_rows(self.encoder.images(images).numpy())] * 2, axis=1)
        halves_N2D[:, 1] = 0
        said = [place for place, text in enumerate(texts) if text.strip()]
        if said:
            halves_N2D[said, 1] = unit_rows(self.encoder.texts([texts[place] for place in said]).numpy())
        return halves_N2D.reshape(len(images), -1)

    def _alone(self, sample_id: str, image: Any, text: str) -> tuple[np.ndarray | None, str | None]:
        try:
            return self._embedded([image], [text])[0], None
        except Exception as error:  # the boundary of a row
            reason = f"the encoder cannot take it: {type(error).__name__}: {str(error)[:200]}"
            logger.warning("embed: row %s set aside: %s", sample_id, reason)
            return None, reason

    def _decoded(self, row: dict[str, Any]) -> tuple[Any, str | None]:
        from medray.images.decoding import ImageError, decode

        try:
            return decode(row["image"], self.data_config), None
        except ImageError as error:
            logger.warning("embed: row %s set aside: %s", row["sample_id"], error)
            return None, str(error)


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows (N, D) divided by their Euclidean length; a row of zeros stays."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def embed_map(
    config: DemonstrationsConfig, data_config: DataConfig, encoder: str
) -> tuple[type[Embed], dict[str, Any]]:
    """The stage as (callable class, arguments) for `map_batches`.

    Args:
        encoder: resolved path of config.encoder.
    """
    import ray.data

    low, high = config.actors
    kwargs = {"encoder": encoder, "config": config.model_dump(), "data_config": data_config.model_dump()}
    return Embed, {
        "fn_constructor_kwargs": kwargs,
        "batch_size": config.batch,
        "batch_format": "pyarrow",
        "num_cpus": config.cpus_per_actor,
        "num_gpus": config.gpus_per_actor,
        "compute": ray.data.ActorPoolStrategy(min_size=low, max_size=high),
        "udf_modifying_row_count": False,
        **config.place.options,
    }
