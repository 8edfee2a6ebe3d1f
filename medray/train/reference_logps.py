"""Reference log-probabilities of preference pairs, by a frozen model in a Ray Data actor."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from medray.config import DataConfig, ModelConfig
from medray.data.collate import Encoder, collate_dpo
from medray.data.pixels import normalise_pixels
from medray.images.decoding import filler_picture
from medray.records import PREFERENCE_WITH_REFERENCE, conform
from medray.storage.begun import Begun


class Reference:
    """Callable for map_batches: rows of records.PREFERENCE in, PREFERENCE_WITH_REFERENCE out.

    ref_chosen_logp and ref_rejected_logp are nats summed over the answer's tokens and its end token, from the
    very encoding and objective code that DPO uses, without dropout. Pairs that cannot be encoded keep null
    there; training sets them aside by name.
    """

    def __init__(
        self,
        model_dir: str,
        model_hash: str,
        model_config: dict[str, Any],
        data_config: dict[str, Any],
        threads: int = 1,
    ):
        import torch

        from medray.models.vlm import load_vlm
        from medray.train.pair_probe import choose_pair_pass, probe_rows

        torch.set_num_threads(threads)
        self.config = ModelConfig.model_validate(model_config)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder = Encoder(
            model_dir, model_config, DataConfig.model_validate(data_config).model_dump(), "dpo"
        )
        self.info = self.encoder.dialogues.info(questioner=False)
        self.model = load_vlm(model_dir, self.config.precision, self.config.trust_remote_code, self.device)
        self.model_hash = model_hash
        self.begun = Begun()
        probe = self.encoder(pa.Table.from_pylist(probe_rows(filler_picture()))).to_pylist()
        with torch.no_grad():
            # The rule that training follows, on the same rows.
            self.pair_pass = (
                None
                if any(row["error"] for row in probe)
                else choose_pair_pass(self.model, self._batch(probe))
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        self.begun(table.num_rows)
        encoded = self.encoder(table).to_pylist()
        usable = [row for row in encoded if row["error"] is None]
        scores = (
            dict(zip((row["sample_id"] for row in usable), self._logps(usable), strict=True))
            if usable
            else {}
        )
        pairs = [scores.get(row["sample_id"], (None, None)) for row in encoded]
        table = table.append_column(
            "ref_chosen_logp", pa.array([chosen for chosen, _ in pairs], pa.float64())
        )
        table = table.append_column(
            "ref_rejected_logp", pa.array([rejected for _, rejected in pairs], pa.float64())
        )
        table = table.append_column("ref_model", pa.array([self.model_hash] * len(pairs)))
        table = table.append_column("ref_error", pa.array([row["error"] for row in encoded], pa.string()))
        return conform(table, PREFERENCE_WITH_REFERENCE)

    def _logps(self, rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
        import torch

        from medray.train.objectives import answer_logps

        with torch.no_grad():
            logps, _ = answer_logps(self.model, self._batch(rows), self.pair_pass)
        chosen, rejected = logps.double().cpu().chunk(2)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {
            name: value.to(self.device)
            for name, value in collate_dpo(
                [{**row, "ref_chosen_logp": None} for row in rows], self.info
            ).items()
        }
        return batch | {
            "pixel_values": normalise_pixels(
                batch["pixel_values"], self.encoder.processor.image_processor, self.model.dtype
            )
        }
