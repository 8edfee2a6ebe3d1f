"""Which of two answers is better: rows of records.SELF_PLAY in, rows of records.JUDGED out.

Every unordered pair of distinct answers of a question gets a verdict. Kinds of judge:

- api: any OpenAI-compatible /chat/completions (medray.inference.judges.api);
- vllm, scoring "scores": a local VLM, same prompt and parser;
- vllm, scoring "likelihood": the mean log-probability per token (nats, end token included) that the local
  judge gives an answer to the bare question. It knows no order, so order_agreement is null. It prefers what
  the judge would have said itself, also in wording and length; meant for judges too small to write scores;
- rater: the rating model of clinician preference alignment (medray.inference.judges.rating_model), an
  extension;
- random: coin flips seeded by id, an ablation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from medray.config import DataConfig, EngineConfig, JudgeConfig, SamplingConfig, ScoreConfig
from medray.inference.judges.api import ApiJudge
from medray.inference.judges.base import Judge, Verdict, written_verdict
from medray.inference.judges.prompt import HIGHEST, LOWEST, judge_prompt
from medray.inference.row_worker import EngineWorker
from medray.running.actor_pools import client_options, map_options
from medray.stable_draws import seed_for

logger = logging.getLogger("medray")


class RandomJudge(Judge):
    """Scores drawn by question id and answer number: the same pair gets the same verdict on every run."""

    name = "random"

    def __init__(self, config: JudgeConfig | dict):
        super().__init__(rows_in_flight=64)
        self.config = JudgeConfig.model_validate(config)

    async def verdicts(self, row, question, places, usage):
        def score(index: int) -> float:
            share = seed_for(self.config.seed, question["question_id"], "random", index) / 2**62
            return LOWEST + (HIGHEST - LOWEST) * share

        return [Verdict(score(first), score(second)) for first, second in places]


class EngineJudge(EngineWorker, Judge):
    """A local VLM as judge, through its own chat template.

    Args:
        config: the judge section; `scoring` chooses written scores or likelihood, `model_settings` how it is
            asked.
        model, data_config, engine_config: see EngineWorker.
    """

    def __init__(
        self,
        config: JudgeConfig | dict,
        model: str,
        data_config: DataConfig | dict,
        engine_config: EngineConfig | dict,
    ):
        self.config = JudgeConfig.model_validate(config)
        self.name = f"vllm:{self.config.model}:{self.config.scoring}"
        super().__init__(model, self.config.own_model(), data_config, engine_config)

    async def verdicts(self, row, question, places, usage):
        image, key = await self.image(row)
        if self.config.scoring == "likelihood":
            return await self._likely(question, places, image, key, usage)

        sampling = SamplingConfig(
            temperature=self.config.temperature, top_k=0, top_p=1.0, max_tokens=self.config.max_tokens
        )

        async def ask(question_id: str, text: str, first: str, second: str, order: int) -> str:
            prompt = self.engine.chat.prompt_ids(
                [{"role": "user", "text": judge_prompt(text, first, second)}]
            )
            # Seeded by what is compared, so that the verdicts of one question differ from each other.
            seed = seed_for(self.config.seed, question_id, "judge", first, second)
            return self.spoken(prompt, await self.sampled(prompt, image, key, sampling, seed, usage))

        return await asyncio.gather(
            *(written_verdict(question, i, j, ask, self.config.both_orders) for i, j in places)
        )

    async def _likely(self, question, places, image, key, usage) -> list[Verdict]:
        used = sorted({index for place in places for index in place})
        turns = [{"role": "user", "text": question["question"]}]
        results = await asyncio.gather(
            *(
                self.engine.loglikelihood(turns, image, question["answers"][index]["text"], image_id=key)
                for index in used
            )
        )
        usage.requests += len(used)
        usage.prompt_tokens += sum(result.prompt_tokens for result in results)
        scores = {index: result.nats / result.tokens for index, result in zip(used, results, strict=True)}
        return [Verdict(scores[first], scores[second]) for first, second in places]


def judge_map(
    config: JudgeConfig,
    model: str | None,
    data_config: DataConfig,
    engine_config: EngineConfig,
) -> tuple[type[Judge], dict[str, Any]]:
    """The judge as (callable class, arguments) for `map_batches`.

    Args:
        model: resolved path of the local judge or rating model; not used by the other kinds.
        engine_config: the judge's (OwnEngineConfig.beside).
    """
    if config.kind == "vllm":
        logger.info(config.described("judge"))
        kwargs = {
            "config": config.model_dump(),
            "model": model,
            "data_config": data_config.model_dump(),
            "engine_config": engine_config.model_dump(),
        }
        return EngineJudge, {**map_options(engine_config), "fn_constructor_kwargs": kwargs}
    if config.kind == "rater":
        from medray.inference.judges.rating_model import RaterJudge

        score = ScoreConfig(
            cpus_per_actor=engine_config.cpus_per_actor, gpus_per_actor=engine_config.gpus_per_actor
        )
        kwargs = {
            "config": config.model_dump(),
            "rater": model,
            "score_config": score.model_dump(),
            "data_config": data_config.model_dump(),
        }
        return RaterJudge, {**map_options(engine_config), "fn_constructor_kwargs": kwargs}
    pool = client_options(engine_config)
    if config.kind == "random":
        return RandomJudge, {**pool, "fn_constructor_kwargs": {"config": config.model_dump()}}
    return ApiJudge, {
        **pool,
        "fn_constructor_kwargs": {"config": config.model_dump(), "data_config": data_config.model_dump()},
    }


def cost_ledger(rows: Iterable[dict[str, Any]], config: JudgeConfig) -> dict[str, Any]:
    """Sums over JUDGED rows: requests, retries, tokens and, for the api judge, USD at the configured
    prices.
    """
    names = ("requests", "retries", "prompt_tokens", "completion_tokens")
    total: dict[str, Any] = dict.fromkeys(names, 0)
    for row in rows:
        for name in names:
            total[name] += row.get(name) or 0
    usd = 0.0
    if config.kind == "api":
        usd = (
            total["prompt_tokens"] * config.usd_per_million_input
            + total["completion_tokens"] * config.usd_per_million_output
        ) / 1e6
    return {**total, "usd": round(usd, 6)}
