"""The rating model's scores of exchanges, in bulk: rows of records.EXCHANGE in, records.SCORED out, by Ray
Data actors.

Every exchange of a dialogue is scored, not only its first (as the released filter does). An exchange that
cannot be scored has no score, and its reason beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from medray.config import DataConfig, ScoreConfig
from medray.rating_model.inputs import InputError
from medray.records import SCORED, conform
from medray.storage.begun import Begun

# What is stored: SCORED, why there is no score (null where there is one), and which parts of the text were
# cut.
SCORED_ROW = pa.schema([*SCORED, ("error", pa.string()), ("cut", pa.list_(pa.string()))])


class Score:
    """Callable for map_batches: EXCHANGE rows to SCORED_ROW, one for one. Within a batch each image is
    decoded and encoded once.

    Args:
        rater: path of the rating model (RatingModel.save_pretrained).
        config, data_config: the sections, or their dumps.

    Raises ConfigError where there is no rating model.
    """

    def __init__(self, rater: str, config: ScoreConfig | dict, data_config: DataConfig | dict):
        import torch

        from medray.rating_model.model import RatingModel

        self.config = ScoreConfig.model_validate(config)
        threads = max(1, int(self.config.cpus_per_actor))
        torch.set_num_threads(threads)
        self.device = "cuda" if self.config.gpus_per_actor and torch.cuda.is_available() else "cpu"
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.config.precision]
        self.model = RatingModel.from_pretrained(rater).to(self.device, self.dtype)
        self.inputs = self.model.inputs(DataConfig.model_validate(data_config))
        self.decoders = ThreadPoolExecutor(threads)
        self.begun = Begun()

    def __call__(self, table: pa.Table) -> pa.Table:
        self.begun(table.num_rows)
        rated = self.ratings(table.select(["image_id", "image", "context", "question", "answer"]).to_pylist())
        for name, kind in (("score", pa.float64()), ("error", pa.string()), ("cut", pa.list_(pa.string()))):
            table = table.append_column(name, pa.array([row[name] for row in rated], kind))
        return conform(table, SCORED_ROW)

    def ratings(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """{"score": logit or None, "error", "cut"} per exchange."""
        found: list[dict[str, Any]] = [{"score": None, "error": None, "cut": []} for _ in rows]
        images, failed = self._images(rows)
        texts: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            reason = failed.get(row["image_id"])
            try:
                text = self.inputs.text(row["question"], row["answer"], row["context"])
            except InputError as error:
                reason = str(error)
            if reason is not None:
                found[place]["error"] = reason
                continue
            texts[place], found[place]["cut"] = text.ids, list(text.cut)
        order = sorted(texts, key=lambda place: len(texts[place]))  # of like length: less padding
        for start in range(0, len(order), self.config.batch):
            part = order[start : start + self.config.batch]
            scores = self._rate(
                [texts[place] for place in part], [images[rows[place]["image_id"]] for place in part]
            )
            for place, score in zip(part, scores, strict=True):
                found[place]["score"] = score
        return found

    def _images(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
        """Embeddings by image_id, and the reasons of those that have none."""
        import torch

        from medray.data.pixels import normalise_pixels

        data = {row["image_id"]: row["image"] for row in rows}
        embeddings, failed, ready = {}, {}, []
        for image_id, pixels in zip(data, self.decoders.map(self._pixels, data.values()), strict=True):
            if isinstance(pixels, str):
                failed[image_id] = pixels
            else:
                ready.append((image_id, pixels))
        for start in range(0, len(ready), self.config.batch):
            ids, arrays = zip(*ready[start : start + self.config.batch], strict=True)
            with torch.inference_mode():
                pixels = normalise_pixels(
                    torch.from_numpy(np.stack(arrays)).to(self.device),
                    self.inputs.image_processor,
                    self.dtype,
                )
                embeddings |= dict(zip(ids, self.model.embed_images(pixels), strict=True))
        return embeddings, failed

    def _pixels(self, image: bytes | None) -> np.ndarray | str:
        from medray.images.decoding import ImageError

        try:
            return self.inputs.pixels(image)
        except ImageError as error:
            return str(error)
        except Exception as error:  # the row boundary: a processor may raise anything for one odd image
            return f"{type(error).__name__}: {error}"

    def _rate(self, texts: list[list[int]], images: list[Any]) -> list[float]:
        import torch

        with torch.inference_mode():
            padded = {name: value.to(self.device) for name, value in self.inputs.padded(texts).items()}
            return self.model.rate(self.model.embed_texts(**padded), torch.stack(images)).double().tolist()


def score_options(config: ScoreConfig, rater: str, data_config: DataConfig) -> dict[str, Any]:
    """Arguments of map_batches for Score, or a class made like it."""
    from medray.running.actor_pools import map_options

    arguments = {"rater": rater, "config": config.model_dump(), "data_config": data_config.model_dump()}
    return {"fn_constructor_kwargs": arguments, **map_options(config)}


def score_exchanges(
    source: str | list[str],
    target: str,
    committed: str,
    rater: str,
    config: ScoreConfig,
    data_config: DataConfig,
) -> dict[str, int]:
    """Score the EXCHANGE shards of `source` into `target` (SCORED_ROW); the same call after a kill finishes.

    Args:
        source: a folder, or several whose sample_ids differ.
        committed: where the ids that are done are kept.
        rater: path of the rating model, the same on every node, or its remote address.

    Returns counts: exchanges, without score, and with an answer, question or context that was cut.
    """
    from medray.storage.resumable import write_resumable
    from medray.storage.shards import tables

    rows, again = write_resumable(
        source,
        target,
        committed,
        lambda rows: rows.map_batches(Score, **score_options(config, rater, data_config)),
        config.rows_per_task,
        data_config.read_cpus,
    )
    counts: Counter[str] = Counter({"exchanges": rows, "without score": 0, **again})
    for table in tables(target, ["score", "error", "cut"]):
        counts["without score"] += table["score"].null_count
        for cut in table["cut"].to_pylist():
            counts.update(f"{part} cut" for part in cut)
    return dict(counts)
