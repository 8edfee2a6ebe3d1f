"""The api judge: written scores from an OpenAI-compatible endpoint (see medray.inference.api_client)."""

from __future__ import annotations

import asyncio

from medray.config import DataConfig, JudgeConfig
from medray.inference.api_client import Endpoint, EndpointError, data_url
from medray.inference.judges.base import Judge, JudgeUnavailable, written_verdict
from medray.inference.judges.prompt import judge_prompt
from medray.stable_draws import seed_for


class ApiJudge(Judge):
    """Written scores from an endpoint.

    Args:
        config: endpoint, model, bounds and prices.
        data_config: limits an image must keep.

    Raises StageError where a remote endpoint has no key in this actor's environment.
    """

    def __init__(self, config: JudgeConfig | dict, data_config: DataConfig | dict):
        self.config = JudgeConfig.model_validate(config)
        super().__init__(rows_in_flight=self.config.concurrency)
        self.data_config = DataConfig.model_validate(data_config)
        self.name = f"api:{self.config.model}"
        self.endpoint = Endpoint(self.config, "judge")

    async def verdicts(self, row, question, places, usage):
        url = await asyncio.to_thread(data_url, row["image"], self.data_config)

        async def ask(question_id: str, text: str, first: str, second: str, order: int) -> str:
            # endpoints take 32 bits at most
            seed = seed_for(self.config.seed, question_id, "judge", first, second) >> 31
            try:
                return (await self.endpoint.ask(judge_prompt(text, first, second), url, seed, usage)).spoken
            except EndpointError as error:
                raise JudgeUnavailable(str(error)) from error

        return await asyncio.gather(
            *(written_verdict(question, i, j, ask, self.config.both_orders) for i, j in places)
        )

    async def settled(self) -> None:
        await self.endpoint.settled()
