"""Describe -> ask -> answer: the model makes its own questions and candidate answers (STLLaVA-Med, stages 3
and 4).

Per image: a greedy description; n independent questions in the questioner's role after [describe prompt,
description]; m answers to each kept question, single turn, without the description in context. One engine
start serves all three phases, and continuous batching mixes the phases of different images.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from medray.config import DataConfig, EngineConfig, ModelConfig, SamplingConfig, SelfPlayConfig
from medray.config.clinician_preference_sections import GenerateConfig
from medray.data.exchanges import normal
from medray.inference.chat import Turn
from medray.inference.completions import Usage
from medray.inference.row_worker import EngineWorker
from medray.inference.thinking import UNFINISHED
from medray.inference.vllm_engine import Output
from medray.records import SELF_PLAY
from medray.stable_draws import seed_for

UNFINISHED_THINKING = "unfinished thinking"  # the finish_reason of an output that never came to its answer


class Questioner(EngineWorker):
    """What a model does that asks about an image and answers: subclasses set `config` and `round`."""

    config: SelfPlayConfig | GenerateConfig  # ask, answer, answers, describe_prompt and seed are read
    round: int = 0  # part of every seed

    async def described(
        self, sample_id: str, image: Any, key: str, sampling: SamplingConfig, usage: Usage
    ) -> list[Turn]:
        """The turns that come before a question: the describe prompt and the model's description."""
        opening: list[Turn] = [{"role": "user", "text": self.config.describe_prompt}]
        prompt = self.engine.chat.prompt_ids(opening)
        output = await self.sampled(prompt, image, key, sampling, self._seed(sample_id, "describe"), usage)
        return [
            *opening,
            {
                "role": "assistant",
                "text": self.engine.chat.without_special_text(self.said(prompt, output).answer).strip(),
            },
        ]

    async def asked(
        self,
        sample_id: str,
        described: list[Turn],
        indices: Iterable[int],
        image: Any,
        key: str,
        usage: Usage,
    ) -> list[Output]:
        """One question per index, each sampled by itself."""
        asking = self.engine.chat.prompt_ids(described, role="questioner")
        outputs = await asyncio.gather(
            *(
                self.sampled(asking, image, key, self.config.ask, self._seed(sample_id, "ask", index), usage)
                for index in indices
            )
        )
        return [self._without_thinking(asking, output) for output in outputs]

    async def answers(
        self, sample_id: str, question: int, text: str, image: Any, key: str, usage: Usage
    ) -> list[dict[str, Any]]:
        """config.answers rows of records.CANDIDATE, sampled without the description in sight."""
        prompt = self.engine.chat.prompt_ids([{"role": "user", "text": text}])
        seeds = [self._seed(sample_id, "answer", question, index) for index in range(self.config.answers)]
        return [
            self._candidate(self._without_thinking(prompt, output))
            for output in await asyncio.gather(
                *(self.sampled(prompt, image, key, self.config.answer, seed, usage) for seed in seeds)
            )
        ]

    def _without_thinking(self, prompt: list[int], output: Output) -> Output:
        """The output with its answer as text; an unfinished thinking leaves none, and is its
        finish_reason.
        """
        answer, thinking = self.said(prompt, output)
        if thinking is None:
            return output
        return replace(
            output,
            text=answer,
            special=False,
            finish_reason=UNFINISHED_THINKING if thinking == UNFINISHED else output.finish_reason,
        )

    def _candidate(self, output: Output) -> dict[str, Any]:
        # An answer that spells a special token would become that token in training: it counts as empty.
        broken = output.special or self.engine.chat.has_special_text(output.text)
        return {
            "text": "" if broken else output.text.strip(),
            "seed": output.seed,
            "finish_reason": "special_token" if broken else output.finish_reason,
            "tokens": len(output.token_ids),
        }

    def _seed(self, sample_id: str, *place: str | int) -> int:
        return seed_for(self.config.seed, sample_id, self.round, *place)


class SelfPlay(Questioner):
    """Rows with sample_id and image in, rows of records.SELF_PLAY out.

    Args:
        model, model_config, data_config, engine_config: see EngineWorker.
        config: sampling of the three phases and how many questions and answers.
        round: number of the self-training round; part of every id and seed.

    The same ids, images and configuration give the same rows, in whatever order and batches they come.
    """

    schema = SELF_PLAY
    stage = "self_play"
    config: SelfPlayConfig

    def __init__(
        self,
        model: str,
        model_config: ModelConfig | dict,
        data_config: DataConfig | dict,
        engine_config: EngineConfig | dict,
        config: SelfPlayConfig | dict,
        round: int = 1,
    ):
        super().__init__(model, model_config, data_config, engine_config)
        self.config = SelfPlayConfig.model_validate(config)
        self.round = round

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        sample_id, usage = row["sample_id"], Usage()
        image, key = await self.image(row)
        described = await self.described(sample_id, image, key, self.config.describe, usage)
        outputs = await self.asked(sample_id, described, range(self.config.questions), image, key, usage)
        kept, dropped = keep_questions(outputs, self.engine.chat.has_special_text)
        answers = await asyncio.gather(
            *(self.answers(sample_id, index, text, image, key, usage) for index, text in kept)
        )
        return {
            "sample_id": sample_id,
            "image": row["image"],
            "description": described[-1]["text"],
            "questions": [
                {
                    "question_id": f"{sample_id}/r{self.round}/q{index}",
                    "question": text,
                    "seed": self._seed(sample_id, "ask", index),
                    "answers": candidates,
                }
                for (index, text), candidates in zip(kept, answers, strict=True)
            ],
            "dropped_questions": dropped,
            "error": None,
        }


def keep_questions(
    asked: list[Output], has_special_text: Any
) -> tuple[list[tuple[int, str]], list[dict[str, str]]]:
    """Which of the sampled questions are worth answering.

    Args:
        asked: in the order sampled; the first of several equal ones is kept.
        has_special_text: says whether a text spells out a special token.

    Returns (index and text of those kept, {"question", "reason"} of the others); reasons are "empty",
    "special_token", "unfinished thinking" and "duplicate" (equal after lower-casing and dropping everything
    but letters and digits).
    """
    kept: list[tuple[int, str]] = []
    dropped: list[dict[str, str]] = []
    seen: set[str] = set()
    for index, output in enumerate(asked):
        text = output.text.strip()
        same = normal(text)
        if output.finish_reason == UNFINISHED_THINKING:
            reason = UNFINISHED_THINKING
        elif output.special or has_special_text(text):
            reason = "special_token"
        elif not same:
            reason = "empty"
        elif same in seen:
            reason = "duplicate"
        else:
            seen.add(same)
            kept.append((index, text))
            continue
        dropped.append({"question": text, "reason": reason})
    return kept, dropped
