"""Describe -> ask -> answer: the model makes its own questions and candidate answers (STLLaVA-Med, stages 3 and 4).

Per image: a greedy description; n independent questions in the questioner's role after [describe prompt,
description]; m answers to each kept question, single turn, without the description in context. One engine start
serves all three phases, and continuous batching mixes the phases of different images.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from medray.config import DataConfig, EngineConfig, ModelConfig, SelfPlayConfig
from medray.inference.chat import Turn
from medray.inference.engine import Output, seed_for
from medray.inference.worker import EngineWorker
from medray.records import SELF_PLAY


class SelfPlay(EngineWorker):
    """Rows with sample_id and image in, rows of records.SELF_PLAY out.

    Args:
        model, model_config, data_config, engine_config: see EngineWorker.
        config: sampling of the three phases and how many questions and answers.
        round: number of the self-training round; part of every id and seed.

    The same ids, images and configuration give the same rows, in whatever order and batches they come.
    """

    schema = SELF_PLAY
    stage = "self_play"

    def __init__(
        self, model: str, model_config: ModelConfig | dict, data_config: DataConfig | dict, engine_config: EngineConfig | dict,
        config: SelfPlayConfig | dict, round: int = 1,
    ):
        super().__init__(model, model_config, data_config, engine_config)
        self.config = SelfPlayConfig.model_validate(config)
        self.round = round

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        sample_id = row["sample_id"]
        image, key = await self.image(row)
        chat, config = self.engine.chat, self.config

        opening: list[Turn] = [{"role": "user", "text": config.describe_prompt}]
        described = await self.engine.generate(
            chat.prompt_ids(opening), image, config.describe, self._seed(sample_id, "describe"), image_id=key,
        )
        description = chat.without_special_text(described[0].text).strip()

        after = [*opening, {"role": "assistant", "text": description}]
        asking = chat.prompt_ids(after, role="questioner")
        seeds = [self._seed(sample_id, "ask", index) for index in range(config.questions)]
        asked = await asyncio.gather(*(
            self.engine.generate(asking, image, config.ask, seed, image_id=key) for seed in seeds
        ))
        kept, dropped = keep_questions([outputs[0] for outputs in asked], chat.has_special_text)
        answers = await asyncio.gather(*(self._answers(sample_id, index, text, image, key) for index, text in kept))
        return {
            "sample_id": sample_id,
            "image": row["image"],
            "description": description,
            "questions": [
                {"question_id": f"{sample_id}/r{self.round}/q{index}", "question": text, "seed": seeds[index], "answers": candidates}
                for (index, text), candidates in zip(kept, answers, strict=True)
            ],
            "dropped_questions": dropped,
            "error": None,
        }

    async def _answers(self, sample_id: str, question: int, text: str, image: Any, key: str) -> list[dict[str, Any]]:
        prompt = self.engine.chat.prompt_ids([{"role": "user", "text": text}])
        seeds = [self._seed(sample_id, "answer", question, index) for index in range(self.config.answers)]
        sampled = await asyncio.gather(*(
            self.engine.generate(prompt, image, self.config.answer, seed, image_id=key) for seed in seeds
        ))
        return [self._candidate(outputs[0]) for outputs in sampled]

    def _candidate(self, output: Output) -> dict[str, Any]:
        # An answer that spells a special token would become that token in training: it counts as empty.
        broken = output.special or self.engine.chat.has_special_text(output.text)
        return {
            "text": "" if broken else output.text.strip(), "seed": output.seed,
            "finish_reason": "special_token" if broken else output.finish_reason, "tokens": len(output.token_ids),
        }

    def _seed(self, sample_id: str, *place: str | int) -> int:
        return seed_for(self.config.seed, sample_id, self.round, *place)


def keep_questions(asked: list[Output], has_special_text: Any) -> tuple[list[tuple[int, str]], list[dict[str, str]]]:
    """Which of the sampled questions are worth answering.

    Args:
        asked: in the order sampled; the first of several equal ones is kept.
        has_special_text: says whether a text spells out a special token.

    Returns (index and text of those kept, {"question", "reason"} of the others); reasons are "empty",
    "special_token" and "duplicate" (equal after lower-casing and dropping everything but letters and digits).
    """
    kept: list[tuple[int, str]] = []
    dropped: list[dict[str, str]] = []
    seen: set[str] = set()
    for index, output in enumerate(asked):
        text = output.text.strip()
        same = " ".join(re.findall(r"\w+", text.lower()))
        if output.special or has_special_text(text):
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
