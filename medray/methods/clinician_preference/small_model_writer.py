"""Dialogues by a model too small to write them (an extension): it asks about the image, and answers each
question by itself.

Records.IMAGE_TEXT in, records.GENERATED out, by the means of self-play (medray.methods.self_train.self_play):
a description, questions in the questioner's role, sampled answers. Demonstrations steer it by what they ask:
some of the questions are theirs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from medray.config import DataConfig, EngineConfig, SamplingConfig
from medray.config.clinician_preference_sections import GenerateConfig
from medray.inference.completions import Usage
from medray.inference.vllm_engine import Output
from medray.methods.clinician_preference.dialogue_prompt import Demonstration
from medray.methods.self_train.self_play import Questioner, keep_questions
from medray.records import GENERATED


class Asking(Questioner):
    """config.rounds questions about each image, config.answers answers to each.

    Args:
        config: the section; rounds[1] questions are aimed at. Where too many repeat each other, more are
            asked, in config.attempts turns at most; an image with fewer than rounds[0] left goes without a
            dialogue.
        demonstrations: config.demonstrated of the questions are drawn from those of the image's modality
            (about other images).
        model, data_config, engine_config: see EngineWorker.
    """

    schema = GENERATED
    stage = "generate"
    config: GenerateConfig

    def __init__(
        self,
        config: GenerateConfig | dict,
        demonstrations: Sequence[Demonstration],
        model: str,
        data_config: DataConfig | dict,
        engine_config: EngineConfig | dict,
    ):
        self.config, self.demonstrations = GenerateConfig.model_validate(config), demonstrations
        super().__init__(model, self.config.own_model(), data_config, engine_config)

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        sample_id, usage = row["sample_id"], Usage()
        image, key = await self.image(row)
        taken = self.demonstrated(row)
        outputs = [Output(text, [], "stop", None, None, False, 0) for _, text in taken]
        made = {
            **row,
            "demonstrations": sorted({name for name, _ in taken}),
            "writer": f"vllm:{self.config.model}:asking",
            "error": None,
        }

        described = await self.described(sample_id, image, key, greedy(self.config.answer), usage)
        for _ in range(self.config.attempts):
            missing = self.config.rounds[1] - len(
                keep_questions(outputs, self.engine.chat.has_special_text)[0]
            )
            if not missing:
                break
            outputs += await self.asked(
                sample_id, described, range(len(outputs), len(outputs) + missing), image, key, usage
            )
        kept, dropped = keep_questions(outputs, self.engine.chat.has_special_text)
        dropped = [{"text": one["question"], "reason": f"{one['reason']} question"} for one in dropped]
        if len(kept) < self.config.rounds[0]:
            return {
                **made,
                "dropped": dropped,
                "error": f"no dialogue: {len(kept)} questions are left; {self.config.rounds[0]} are needed",
                **vars(usage),
            }
        answers = await asyncio.gather(
            *(self.answers(sample_id, index, text, image, key, usage) for index, text in kept)
        )
        rounds = [
            {"question": text, "answers": [one["text"] or None for one in said]}
            for (_, text), said in zip(kept, answers, strict=True)
        ]
        dropped += [
            {"text": one["question"], "reason": "empty answer"}
            for one in rounds
            for answer in one["answers"]
            if answer is None
        ]
        return {**made, "rounds": rounds, "dropped": dropped, **vars(usage)}

    def demonstrated(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        """(dialogue_id, question) of those taken from demonstrations."""
        rng = random.Random(f"{self.config.seed}|{row['sample_id']}|demonstrated")
        wanted = sum(rng.random() < self.config.demonstrated for _ in range(self.config.rounds[1]))
        fitting = [
            one
            for one in self.demonstrations
            if one["modality"] == row.get("modality") and one["image_id"] != row["sample_id"]
        ]
        asked = {round["question"]: one["dialogue_id"] for one in fitting for round in one["rounds"]}
        return [
            (asked[question], question) for question in rng.sample(sorted(asked), min(wanted, len(asked)))
        ]


def greedy(sampling: SamplingConfig) -> SamplingConfig:
    return sampling.model_copy(update={"temperature": 0, "top_k": 0, "top_p": 1.0})
