"""Which of two answers is better: rows of records.SELF_PLAY in, rows of records.JUDGED out.

Every unordered pair of distinct answers of a question gets a verdict. Kinds of judge:

- api: any OpenAI-compatible /chat/completions (medray.inference.judge_api);
- vllm, scoring "scores": a local VLM, same prompt and parser;
- vllm, scoring "likelihood": the mean log-probability per token (nats, end token included) that the local judge gives
  an answer to the bare question. It knows no order, so order_agreement is null. It prefers what the judge would have
  said itself, also in wording and length; meant for judges too small to write scores;
- random: coin flips seeded by id, an ablation.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from medray.config import DataConfig, EngineConfig, JudgeConfig, ModelConfig, SamplingConfig
from medray.inference.engine import seed_for
from medray.inference.judge_prompt import HIGHEST, LOWEST, VerdictError, judge_prompt, parse_scores
from medray.inference.pairs import IDENTICAL
from medray.inference.worker import EngineWorker, RowWorker, map_options
from medray.records import JUDGED

EMPTY = "empty answer"


@dataclass
class Usage:
    """What judging one row took. A retry is a request that failed and was sent again; it is not in `requests`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0
    retries: int = 0


@dataclass
class Verdict:
    """A judge's opinion on one pair; the fields of records.VERDICT beside the ids."""

    first_score: float | None = None
    second_score: float | None = None
    order_agreement: bool | None = None
    raw: list[str] = field(default_factory=list)
    error: str | None = None


# (question_id, question, first answer, second answer, order) -> the judge's reply
Ask = Callable[[str, str, str, str, int], Awaitable[str]]


async def written_verdict(question: dict[str, Any], first: int, second: int, ask: Ask, both_orders: bool) -> Verdict:
    """Ask for two written scores, in one or both orders, and average them after un-swapping.

    order_agreement: both orders prefer the same answer, or both tie. A reply that cannot be read makes the verdict
    an error; the words are kept in `raw`.
    """
    texts = [question["answers"][index]["text"] for index in (first, second)]
    orders = (0, 1) if both_orders else (0,)
    shown = [texts if order == 0 else texts[::-1] for order in orders]
    replies = await asyncio.gather(
        *(ask(question["question_id"], question["question"], *pair, order) for order, pair in zip(orders, shown, strict=True)),
        return_exceptions=True,
    )
    verdict = Verdict(raw=["" if isinstance(reply, BaseException) else reply for reply in replies])
    scores: list[tuple[float, float]] = []
    for order, reply in zip(orders, replies, strict=True):
        if isinstance(reply, JudgeUnavailable):
            verdict.error = f"order {order + 1}: {reply}"
        elif isinstance(reply, BaseException):
            raise reply
        else:
            try:
                pair = parse_scores(reply)
                scores.append(pair if order == 0 else pair[::-1])
            except VerdictError as error:
                verdict.error = f"order {order + 1}: {error}"
    if verdict.error is None:
        verdict.first_score = sum(pair[0] for pair in scores) / len(scores)
        verdict.second_score = sum(pair[1] for pair in scores) / len(scores)
        if both_orders:
            preferred = {(a > b) - (a < b) for a, b in scores}
            verdict.order_agreement = len(preferred) == 1
    return verdict


class JudgeUnavailable(Exception):
    """The judge gave no reply, after all retries. Becomes the verdict's error."""


class _Judge(RowWorker):
    """What all judges share: pairs of answers, and pairs that need no judge."""

    schema = JUDGED
    stage = "judge"
    config: JudgeConfig
    name: str

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        if row.get("error") is not None:
            return {**row, "verdicts": None, "judge": self.name}
        usage = Usage()
        judged = await asyncio.gather(*(self._question(row, question, usage) for question in row["questions"] or []))
        return {**row, "verdicts": list(itertools.chain.from_iterable(judged)), "judge": self.name, **vars(usage)}

    async def _question(self, row: dict[str, Any], question: dict[str, Any], usage: Usage) -> list[dict[str, Any]]:
        answers = [candidate["text"].strip() for candidate in question["answers"]]
        places = list(itertools.combinations(range(len(answers)), 2))
        trivial = {
            (i, j): Verdict(error=EMPTY if not (answers[i] and answers[j]) else IDENTICAL)
            for i, j in places if not (answers[i] and answers[j]) or answers[i] == answers[j]
        }
        asked = [place for place in places if place not in trivial]
        verdicts = dict(zip(asked, await self.verdicts(row, question, asked, usage), strict=True)) if asked else {}
        return [
            {"question_id": question["question_id"], "first": place[0], "second": place[1], **vars({**trivial, **verdicts}[place])}
            for place in places
        ]

    async def verdicts(self, row: dict[str, Any], question: dict[str, Any], places: list[tuple[int, int]], usage: Usage) -> list[Verdict]:
        """One verdict per pair of answer indices."""
        raise NotImplementedError


class RandomJudge(_Judge):
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


class EngineJudge(EngineWorker, _Judge):
    """A local VLM as judge, through its own chat template.

    Args:
        config: the judge section; `scoring` chooses written scores or likelihood.
        model, model_config, data_config, engine_config: see EngineWorker. Written scores are asked without the
            system prompt, which is about a conversation and not about judging.
    """

    def __init__(
        self, config: JudgeConfig | dict, model: str, model_config: ModelConfig | dict, data_config: DataConfig | dict,
        engine_config: EngineConfig | dict,
    ):
        self.config = JudgeConfig.model_validate(config)
        self.name = f"vllm:{self.config.model}:{self.config.scoring}"
        model_config = ModelConfig.model_validate(model_config)
        if self.config.scoring == "scores":
            model_config = model_config.model_copy(update={"system_prompt": ""})
        super().__init__(model, model_config, data_config, engine_config)

    async def verdicts(self, row, question, places, usage):
        image, key = await self.image(row)
        if self.config.scoring == "likelihood":
            return await self._likely(question, places, image, key, usage)

        sampling = SamplingConfig(temperature=self.config.temperature, top_k=0, top_p=1.0, max_tokens=self.config.max_tokens)

        async def ask(question_id: str, text: str, first: str, second: str, order: int) -> str:
            prompt = self.engine.chat.prompt_ids([{"role": "user", "text": judge_prompt(text, first, second)}])
            # Seeded by what is compared, so that the verdicts of one question differ from each other.
            seed = seed_for(self.config.seed, question_id, "judge", first, second)
            output = (await self.engine.generate(prompt, image, sampling, seed, image_id=key))[0]
            usage.requests += 1
            usage.prompt_tokens += output.prompt_tokens
            usage.completion_tokens += len(output.token_ids)
            return output.text

        return await asyncio.gather(*(written_verdict(question, i, j, ask, self.config.both_orders) for i, j in places))

    async def _likely(self, question, places, image, key, usage) -> list[Verdict]:
        used = sorted({index for place in places for index in place})
        turns = [{"role": "user", "text": question["question"]}]
        results = await asyncio.gather(*(
            self.engine.loglikelihood(turns, image, question["answers"][index]["text"], image_id=key) for index in used
        ))
        usage.requests += len(used)
        usage.prompt_tokens += sum(result.prompt_tokens for result in results)
        scores = {index: result.nats / result.tokens for index, result in zip(used, results, strict=True)}
        return [Verdict(scores[first], scores[second]) for first, second in places]


def judge_map(
    config: JudgeConfig, model: str | None, model_config: ModelConfig, data_config: DataConfig, engine_config: EngineConfig,
) -> tuple[type[_Judge], dict[str, Any]]:
    """The judge as (callable class, arguments) for `map_batches`.

    Args:
        model: resolved path of the local judge; not used by the other kinds.
    """
    import ray.data

    if config.kind == "vllm":
        kwargs = {
            "config": config.model_dump(), "model": model, "model_config": model_config.model_dump(),
            "data_config": data_config.model_dump(), "engine_config": engine_config.model_dump(),
        }
        return EngineJudge, {**map_options(engine_config), "fn_constructor_kwargs": kwargs}
    pool = {
        **map_options(engine_config), "num_cpus": 0.5, "num_gpus": 0,
        "compute": ray.data.ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
    }
    if config.kind == "random":
        return RandomJudge, {**pool, "fn_constructor_kwargs": {"config": config.model_dump()}}
    from medray.inference.judge_api import ApiJudge

    return ApiJudge, {**pool, "fn_constructor_kwargs": {"config": config.model_dump(), "data_config": data_config.model_dump()}}


def cost_ledger(rows: Iterable[dict[str, Any]], config: JudgeConfig) -> dict[str, Any]:
    """Sums over JUDGED rows: requests, retries, tokens and, for the api judge, USD at the configured prices."""
    names = ("requests", "retries", "prompt_tokens", "completion_tokens")
    total: dict[str, Any] = dict.fromkeys(names, 0)
    for row in rows:
        for name in names:
            total[name] += row.get(name) or 0
    usd = 0.0
    if config.kind == "api":
        usd = (total["prompt_tokens"] * config.usd_per_million_input + total["completion_tokens"] * config.usd_per_million_output) / 1e6
    return {**total, "usd": round(usd, 6)}
