"""Answers to benchmark questions: rows of records.QUESTION (or BENCHMARK_QUESTION) in, rows of
records.ANSWERED out.

Their scores are made in `medray.evaluation.scores`, which needs no model.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from typing import Any

from medray.config import DataConfig, EndpointConfig, EngineConfig, ModelConfig, SamplingConfig
from medray.evaluation import metrics
from medray.inference.api_client import Endpoint, data_url
from medray.inference.completions import Usage
from medray.inference.row_worker import EngineWorker, RowWorker
from medray.inference.thinking import said
from medray.inference.vllm_engine import Output
from medray.records import ANSWERED
from medray.stable_draws import seed_for

Suffixes = Mapping[str | None, Mapping[str, str]]  # benchmark -> answer type -> words


def question_text(row: dict[str, Any], suffixes: Suffixes) -> str:
    """What the model is asked; the words after a question are part of its benchmark's definition."""
    suffix = suffixes.get(row.get("benchmark"), {}).get(row["answer_type"])
    return f"{row['question']}\n{suffix}" if suffix else row["question"]


def options_of(row: dict[str, Any]) -> list[str]:
    """The answers a question can have: the options of multiple choice, yes and no; empty for open
    questions.
    """
    if row.get("choices"):
        return list(row["choices"])
    is_yes_no = row["answer_type"] == "closed" and metrics.normalise(row["reference"]) in ("yes", "no")
    return ["yes", "no"] if is_yes_no else []


class Predict(EngineWorker):
    """One greedy answer per question, by a model in vLLM.

    Args:
        model, model_config, data_config, engine_config: see EngineWorker.
        name: written to the column `model`.
        max_tokens: longest answer.
        suffixes: put after the questions of a benchmark, by answer type, e.g. {"slake": {"closed": "Answer
            with yes or no."}}.
        option_likelihood: also take the log-likelihood of each option as an answer to the question.
        options: the texts of a question's options as they would be answered (default: as they are shown);
            none: no likelihood.
        text_only: also ask with a picture without content: what the text alone gives away.
    """

    schema = ANSWERED
    stage = "predict"

    def __init__(
        self,
        model: str,
        model_config: ModelConfig | dict,
        data_config: DataConfig | dict,
        engine_config: EngineConfig | dict,
        name: str,
        max_tokens: int = 128,
        suffixes: Suffixes | None = None,
        option_likelihood: bool = False,
        text_only: bool = False,
        options: Callable[[dict[str, Any]], list[str]] = options_of,
    ):
        super().__init__(model, model_config, data_config, engine_config)
        self.name, self.suffixes = name, suffixes or {}
        self.option_likelihood, self.text_only, self.options = option_likelihood, text_only, options
        self.sampling = SamplingConfig(temperature=0, top_k=0, top_p=1.0, max_tokens=max_tokens)

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        image, key = await self.image(row)
        turns = [{"role": "user", "text": question_text(row, self.suffixes)}]
        shown = [(image, key), blank(image.size)] if self.text_only else [(image, key)]
        prompt = self.engine.chat.prompt_ids(turns)
        (output, *_), *others = await asyncio.gather(
            *(self.engine.generate(prompt, one, self.sampling, image_id=name) for one, name in shown)
        )
        self.metrics.tokens(len(output.token_ids) + sum(len(other.token_ids) for other, *_ in others))
        answer, thinking = self._plain(prompt, output)
        options = self.options(row) if self.option_likelihood else []
        likely = await asyncio.gather(
            *(self.engine.loglikelihood(turns, image, option, image_id=key) for option in options)
        )
        return {
            **row,
            "choices": row.get("choices") or options or None,
            "answer": answer,
            "thinking": thinking,
            "model": self.name,
            "finish_reason": output.finish_reason,
            "tokens": len(output.token_ids),
            "error": None,
            "option_logps": [one.nats for one in likely] or None,
            "option_tokens": [one.tokens for one in likely] or None,
            "text_only_answer": self._plain(prompt, others[0][0])[0] if others else None,
        }

    def _plain(self, prompt: list[int], output: Output) -> tuple[str, str | None]:
        """(answer, whether there was thinking before it)."""
        answer, thinking = self.said(prompt, output)
        return (
            answer if thinking is None else self.engine.chat.without_special_text(answer)
        ).strip(), thinking

    def failed(self, row: dict[str, Any], reason: str) -> dict[str, Any]:
        return {**super().failed(row, reason), "model": self.name}


def blank(size: tuple[int, int]) -> tuple[Any, str]:
    """A picture of one colour and its cache key."""
    from PIL import Image

    from medray.images.decoding import PAD_COLOUR

    return Image.new("RGB", size, PAD_COLOUR), f"blank-{size[0]}x{size[1]}"


class ApiPredict(RowWorker):
    """One answer per question from an OpenAI-compatible endpoint; see Predict. A failed request is the
    row's `error`.
    """

    schema = ANSWERED
    stage = "predict"

    def __init__(
        self,
        config: EndpointConfig | dict,
        data_config: DataConfig | dict,
        name: str,
        suffixes: Suffixes | None = None,
        text_only: bool = False,
        seed: int = 0,
    ):
        config = EndpointConfig.model_validate(config)
        super().__init__(rows_in_flight=config.concurrency)
        self.endpoint = Endpoint(config, "api")
        self.data_config = DataConfig.model_validate(data_config)
        self.name, self.seed = name, seed
        self.suffixes, self.text_only = suffixes or {}, text_only

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        text = question_text(row, self.suffixes)
        shown = (
            [row["image"], await asyncio.to_thread(self._blank, row["image"])]
            if self.text_only
            else [row["image"]]
        )
        urls = [await asyncio.to_thread(data_url, data, self.data_config) for data in shown]
        seed = seed_for(self.seed, row["sample_id"], "predict") >> 31
        reply, *others = await asyncio.gather(*(self.endpoint.ask(text, url, seed, Usage()) for url in urls))
        answer, thinking = said(reply.spoken)
        return {
            **row,
            "answer": answer.strip(),
            "thinking": thinking or reply.thinking,
            "model": self.name,
            "finish_reason": reply.finish_reason,
            "tokens": reply.tokens,
            "error": None,
            "text_only_answer": said(others[0].spoken).answer.strip() if others else None,
        }

    async def settled(self) -> None:
        await self.endpoint.settled()

    def _blank(self, data: bytes) -> bytes:
        from medray.images.decoding import decode

        buffer = io.BytesIO()
        blank(decode(data, self.data_config).size)[0].save(buffer, "PNG")
        return buffer.getvalue()

    def failed(self, row: dict[str, Any], reason: str) -> dict[str, Any]:
        return {**super().failed(row, reason), "model": self.name}
