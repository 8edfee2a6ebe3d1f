"""The rating model of clinician preference alignment as judge of self-training (an extension: in STLLaVA-Med
a VLM judges).

An answer's score is the rating model's logit of question and answer about the image; what is known of the
image beside it is not given, as self-training's images have no captions. It knows no order, so
order_agreement is null.
"""

from __future__ import annotations

import asyncio
from typing import Any

from medray.config import DataConfig, JudgeConfig, ScoreConfig
from medray.inference.judges.base import Judge, Verdict
from medray.rating_model.scoring import Score

ROWS_IN_FLIGHT = 64


class RaterJudge(Judge):
    """Scores by the rating model; all answers about an image in one pass.

    Args:
        config: the judge section.
        rater: path of the rating model (medray.rating_model.model).
        score_config: CPUs, GPU and batch of the actor.
        data_config: limits an image must keep.

    Raises ConfigError where there is no rating model.
    """

    def __init__(
        self,
        config: JudgeConfig | dict,
        rater: str,
        score_config: ScoreConfig | dict,
        data_config: DataConfig | dict,
    ):
        super().__init__(ROWS_IN_FLIGHT)
        self.config = JudgeConfig.model_validate(config)
        self.name = f"rater:{self.config.model}"
        self.score = Score(rater, score_config, data_config)
        self.turn = asyncio.Lock()

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        questions = row["questions"] or []
        exchanges = [
            {
                "image_id": row["sample_id"],
                "image": row["image"],
                "context": None,
                "question": question["question"],
                "answer": answer["text"],
            }
            for question in questions
            for answer in question["answers"]
        ]
        async with self.turn:
            ratings = iter(await asyncio.to_thread(self.score.ratings, exchanges))
        return await super().row(
            {
                **row,
                "ratings": {
                    question["question_id"]: [next(ratings) for _ in question["answers"]]
                    for question in questions
                },
            }
        )

    async def verdicts(self, row, question, places, usage):
        ratings = row["ratings"][question["question_id"]]
        usage.requests += len({index for place in places for index in place})
        return [_verdict(ratings[first], ratings[second]) for first, second in places]


def _verdict(first: dict[str, Any], second: dict[str, Any]) -> Verdict:
    error = first["error"] or second["error"]
    return Verdict(error=error) if error else Verdict(first["score"], second["score"])
