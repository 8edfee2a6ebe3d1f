"""Rating pairs (records.RATING_PAIR) to what the rating model trains on and is measured on: split by image,
weighted, mixed.

The released code splits by pair, so that its test shows images, and whole exchanges, that it has trained on.
Here an image is on one side for good, by a hash of its id, and a pair of two images on different sides is
left out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from medray.config import DataConfig, RaterConfig
from medray.errors import DataError
from medray.images.decoding import ImageError
from medray.rating_model.inputs import InputError
from medray.stable_draws import unit

ORIGINS = ("clinician", "model")
# Of one pair; the rejected pixels are null where both sides show the same image.
ENCODED_PAIR = pa.schema(
    [
        ("sample_id", pa.string()),
        ("origin", pa.string()),
        ("weight", pa.float32()),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("chosen_pixels", pa.binary()),
        ("rejected_pixels", pa.binary()),
        ("pixel_shape", pa.list_(pa.int32())),
        ("cut", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


def right_order(chosen_P: Any, rejected_P: Any) -> Any:
    """1 per pair whose better exchange is rated higher, 0.5 for a tie; of numpy arrays or torch tensors.
    The mean is the pair accuracy, and over clinicians' pairs the clinician alignment rate (the released
    code counts a tie as wrong).
    """
    return (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)


def held_out(image_id: str, config: RaterConfig) -> bool:
    """Whether the pairs of an image measure the rating model rather than train it: fixed by the id and
    config.split_seed.
    """
    return unit("rater", config.split_seed, image_id) < config.held_out_fraction


def side_of(chosen_image_id: str, rejected_image_id: str, config: RaterConfig) -> str | None:
    """ "train" or "held_out"; None for a pair of two images on different sides."""
    sides = {held_out(image_id, config) for image_id in (chosen_image_id, rejected_image_id)}
    return None if len(sides) == 2 else "held_out" if sides.pop() else "train"


def pair_counts(uris: list[str], config: RaterConfig) -> dict[str, int]:
    """Pairs by side and origin, such as {"train, clinician": 40, "dropped, model": 12}; all are named.

    Raises DataError for a pair of another origin.
    """
    from medray.storage.shards import tables

    counts: Counter[str] = Counter(
        {f"{side}, {origin}": 0 for side in ("train", "held_out", "dropped") for origin in ORIGINS}
    )
    for uri in uris:
        for table in tables(uri, ["sample_id", "origin", "chosen_image_id", "rejected_image_id"]):
            for sample_id, origin, *images in zip(
                *(column.to_pylist() for column in table.columns), strict=True
            ):
                if origin not in ORIGINS:
                    raise DataError(
                        f"{uri}: pair {sample_id} has origin {origin!r}; it is clinician or model"
                    )
                counts[f"{side_of(*images, config) or 'dropped'}, {origin}"] += 1
    return dict(counts)


def pairs_of(
    uris: list[str], side: str, config: RaterConfig, data_config: DataConfig, trained: bool = False
) -> Any:
    """Lazy ray.data.Dataset of one side's pairs (RATING_PAIR columns and `weight`).

    Args:
        trained: only those that config.train_on trains on, in an order that their ids fix. Clinicians' few
            pairs so come among the models' many, whatever folders they lie in. Else: clinicians' pairs first.
    """
    from medray.storage.shards import parquet_files, read_rows

    files = [path for uri in uris for path in parquet_files(uri)]
    rows = read_rows(files, num_cpus=data_config.read_cpus).map_batches(
        _ordered,
        fn_kwargs={"side": side, "config": config.model_dump(), "trained": trained},
        batch_format="pyarrow",
        batch_size=256,
        num_cpus=data_config.read_cpus,
    )
    return rows.sort("order").drop_columns(["order"])


def trains_on(origin: str, config: RaterConfig) -> bool:
    return config.train_on in ("mixture", origin)


def on_side(table: pa.Table, side: str, config: RaterConfig | dict[str, Any]) -> pa.Table:
    """The pairs of one side."""
    settings = RaterConfig.model_validate(config)
    images = zip(table["chosen_image_id"].to_pylist(), table["rejected_image_id"].to_pylist(), strict=True)
    return table.filter(
        pa.array([side_of(chosen, rejected, settings) == side for chosen, rejected in images], pa.bool_())
    )


def _ordered(table: pa.Table, side: str, config: dict[str, Any], trained: bool) -> pa.Table:
    """The pairs of one side, with `weight` and `order`."""
    settings = RaterConfig.model_validate(config)
    table = on_side(table, side, settings)
    origins = table["origin"].to_pylist()
    if trained:
        table = table.filter(pa.array([trains_on(origin, settings) for origin in origins], pa.bool_()))
        origins = table["origin"].to_pylist()
    weights = [settings.clinician_weight if origin == "clinician" else 1.0 for origin in origins]
    order = [
        unit("pair", sample_id) + (not trained and origin != "clinician")
        for sample_id, origin in zip(table["sample_id"].to_pylist(), origins, strict=True)
    ]
    return table.append_column("weight", pa.array(weights, pa.float32())).append_column(
        "order", pa.array(order, pa.float64())
    )


class PairEncoder:
    """Callable for Dataset.map_batches(batch_format="pyarrow"): rows of records.RATING_PAIR with `weight` to
    ENCODED_PAIR, one for one. A pair that cannot be encoded carries its reason in `error`.

    Args:
        encoder: path of the encoder or rating model, whose processor is used.
        max_length, square: see RaterInputs.
        data_config: as a dict.
    """

    def __init__(self, encoder: str, max_length: int, square: bool, data_config: dict[str, Any]):
        from medray.rating_model.model import load_inputs

        self.inputs = load_inputs(encoder, max_length, square, DataConfig.model_validate(data_config))

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for pair in table.to_pylist():
            kept = {name: pair[name] for name in ("sample_id", "origin", "weight")}
            try:
                rows.append(kept | self.encode(pair))
            except (InputError, ImageError) as error:
                rows.append(kept | {"error": str(error)})
            except Exception as error:
                # the row boundary: a processor may raise anything for one odd image or text
                rows.append(kept | {"error": f"{type(error).__name__}: {error}"})
        return pa.Table.from_pylist(rows, schema=ENCODED_PAIR)

    def encode(self, pair: dict[str, Any]) -> dict[str, Any]:
        """Ids, pixels and cuts ("chosen answer", ...) of one pair. Raises InputError, ImageError."""
        texts = {
            side: self.inputs.text(*(pair[f"{side}_{part}"] for part in ("question", "answer", "context")))
            for side in ("chosen", "rejected")
        }
        chosen = self.inputs.pixels(pair["chosen_image"])
        same = pair["chosen_image_id"] == pair["rejected_image_id"]
        rejected = None if same else self.inputs.pixels(pair["rejected_image"])
        if rejected is not None and rejected.shape != chosen.shape:
            raise InputError(
                f"the encoder's processor gives images of different sizes ({chosen.shape}, "
                f"{rejected.shape}); set rater.pad_to_square"
            )
        return {
            **{f"{side}_ids": text.ids for side, text in texts.items()},
            "pixel_shape": list(chosen.shape),
            "chosen_pixels": chosen.tobytes(),
            "rejected_pixels": None if rejected is None else rejected.tobytes(),
            "cut": [f"{side} {part}" for side, text in texts.items() for part in text.cut],
        }
