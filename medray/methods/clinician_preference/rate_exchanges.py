"""Single question-answer pairs rated from 0 to 10 (BioMed-VITAL, model preference): records.EXCHANGE in,
RATING out.

- api, vllm with scoring "scores": the rater writes a number
  (medray.methods.clinician_preference.rate_prompt);
- vllm with scoring "likelihood" (an extension): ten times the geometric mean of the probabilities that the
  model gives the answer's tokens, end token included, after the bare question. For models too small to write
  scores.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from typing import Any

import pyarrow as pa

from medray.config import DataConfig, EngineConfig, SamplingConfig
from medray.config.clinician_preference_sections import RateConfig
from medray.data.exchanges import kind_of_error
from medray.inference.api_client import Endpoint, EndpointError, data_url
from medray.inference.completions import Usage
from medray.inference.row_worker import EngineWorker, RowWorker
from medray.methods.clinician_preference.rate_prompt import HIGHEST, RatingError, parse_score, rate_prompt
from medray.records import RATED
from medray.running.actor_pools import client_options, map_options
from medray.stable_draws import seed_for
from medray.storage.shards import tables

logger = logging.getLogger("medray")

USAGE = pa.schema(
    [
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("requests", pa.int64()),
        ("retries", pa.int64()),
    ]
)
RATING = pa.schema([*RATED, *USAGE])


class Rate(RowWorker):
    """What raters share: a row gets a score, or the reason why it has none."""

    schema = RATING
    stage = "rate"
    config: RateConfig

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        usage = Usage()
        score, raw, error = None, None, None
        if not (row["question"] or "").strip() or not (row["answer"] or "").strip():
            error = "empty question or answer"
        else:
            try:
                score, raw = await self.rated(row, usage)
                if score is None:
                    score = parse_score(raw)
            except (RatingError, EndpointError) as problem:
                error = str(problem)
        return {**row, "score": score, "raw": raw, "error": error, **vars(usage)}

    async def rated(self, row: dict[str, Any], usage: Usage) -> tuple[float | None, str | None]:
        """The score itself, or the reply to read it from."""
        raise NotImplementedError


class EngineRate(EngineWorker, Rate):
    """A local VLM as rater, through its own chat template.

    Args:
        config: the section; `scoring` chooses written scores or likelihood, `model_settings` how it is asked.
        model, data_config, engine_config: see EngineWorker.
    """

    def __init__(
        self,
        config: RateConfig | dict,
        model: str,
        data_config: DataConfig | dict,
        engine_config: EngineConfig | dict,
    ):
        self.config = RateConfig.model_validate(config)
        super().__init__(model, self.config.own_model(), data_config, engine_config)

    async def rated(self, row, usage):
        image, key = await self.image(row)
        if self.config.scoring == "likelihood":
            found = await self.engine.loglikelihood(
                [{"role": "user", "text": row["question"]}], image, row["answer"], image_id=key
            )
            usage.requests += 1
            usage.prompt_tokens += found.prompt_tokens
            return HIGHEST * math.exp(found.nats / found.tokens), None
        sampling = SamplingConfig(
            temperature=self.config.temperature, top_k=0, top_p=1.0, max_tokens=self.config.max_tokens
        )
        prompt = self.engine.chat.prompt_ids(
            [{"role": "user", "text": rate_prompt(row["question"], row["answer"], row["context"])}]
        )
        output = await self.sampled(
            prompt, image, key, sampling, seed_for(self.config.seed, row["sample_id"], "rate"), usage
        )
        return None, self.spoken(prompt, output)


class ApiRate(Rate):
    """Written scores from an endpoint; see medray.inference.api_client.

    Raises StageError where a remote endpoint has no key in this actor's environment.
    """

    def __init__(self, config: RateConfig | dict, data_config: DataConfig | dict):
        self.config = RateConfig.model_validate(config)
        super().__init__(rows_in_flight=self.config.concurrency)
        self.data_config = DataConfig.model_validate(data_config)
        self.endpoint = Endpoint(self.config, "rate")

    async def rated(self, row, usage):
        url = await asyncio.to_thread(data_url, row["image"], self.data_config)
        seed = seed_for(self.config.seed, row["sample_id"], "rate") >> 31  # endpoints take 32 bits at most
        return None, (
            await self.endpoint.ask(
                rate_prompt(row["question"], row["answer"], row["context"]), url, seed, usage
            )
        ).spoken

    async def settled(self) -> None:
        await self.endpoint.settled()


def rate_map(
    config: RateConfig,
    model: str | None,
    data_config: DataConfig,
    engine_config: EngineConfig,
) -> tuple[type[Rate], dict[str, Any]]:
    """The rater as (callable class, arguments) for `map_batches`.

    Args:
        model: resolved path of the local rater; not used by kind api.
        engine_config: the rater's (OwnEngineConfig.beside).
    """
    if config.kind == "api":
        return ApiRate, {
            **client_options(engine_config),
            "fn_constructor_kwargs": {"config": config.model_dump(), "data_config": data_config.model_dump()},
        }
    logger.info(config.described("rate"))
    kwargs = {
        "config": config.model_dump(),
        "model": model,
        "data_config": data_config.model_dump(),
        "engine_config": engine_config.model_dump(),
    }
    return EngineRate, {**map_options(engine_config), "fn_constructor_kwargs": kwargs}


def rater_name(config: RateConfig) -> str:
    """Who rated, for the column `judge` of pairs."""
    return f"api:{config.model}" if config.kind == "api" else f"vllm:{config.model}:{config.scoring}"


def rating_counts(rated: str) -> dict[str, int]:
    """Rows by whole score ("score 8" holds 8 up to 9) and, where there is none, by reason."""
    counts: Counter[str] = Counter()
    for table in tables(rated, ["score", "error"]):
        for row in table.to_pylist():
            counts["exchanges"] += 1
            counts[
                f"score {math.floor(row['score'])}"
                if row["score"] is not None
                else f"no score: {kind_of_error(row['error'])}"
            ] += 1
    return dict(sorted(counts.items()))
