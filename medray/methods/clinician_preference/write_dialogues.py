"""Dialogues about images by a strong model (BioMed-VITAL, generation): records.IMAGE_TEXT in,
records.GENERATED out.

The writer sees the image, what is written about it, and one demonstration of each modality, drawn by the
image's id from the dialogues that clinicians approved. Where clinicians are to choose, the questions of its
dialogue are answered once more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from medray.config import DataConfig, EngineConfig, SamplingConfig
from medray.config.clinician_preference_sections import GenerateConfig
from medray.data.exchanges import normal
from medray.inference.api_client import Endpoint, EndpointError, data_url
from medray.inference.completions import Reply, Usage
from medray.inference.row_worker import EngineWorker, RowWorker
from medray.inference.thinking import UNFINISHED, without_blocks
from medray.methods.clinician_preference.dialogue_prompt import (
    Demonstration,
    DialogueError,
    answer_again_prompt,
    dialogue_prompt,
    one_per_modality,
    parse_rounds,
    without_repeats,
)
from medray.methods.clinician_preference.small_model_writer import Asking
from medray.records import GENERATED
from medray.running.actor_pools import client_options, map_options
from medray.stable_draws import seed_for

logger = logging.getLogger("medray")

ReadT = TypeVar("ReadT")
Write = Callable[..., Any]  # (text, place, usage) -> Reply


class Generate(RowWorker):
    """What writers of whole dialogues share.

    Args:
        config: rounds, answers, attempts, sampling.
        demonstrations: see medray.data.exchanges.demonstrations_of; those about an image are not shown for
            that image.
    """

    schema = GENERATED
    stage = "generate"
    config: GenerateConfig
    demonstrations: Sequence[Demonstration]

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        caption, context, usage = row.get("caption"), row.get("context"), Usage()
        others = [one for one in self.demonstrations if one["image_id"] != row["sample_id"]]
        shown = one_per_modality(others, f"{self.config.seed}|{row['sample_id']}")
        dropped: list[dict[str, str]] = []
        write = await self.writer(row, usage)
        made = {
            **row,
            "demonstrations": [one["dialogue_id"] for one in shown],
            "writer": writer_name(self.config),
            "dropped": dropped,
            "rounds": None,
            "error": None,
        }

        rounds = await self._read(
            write,
            dialogue_prompt(caption, context, shown, self.config.rounds),
            "dialogue",
            self._rounds,
            dropped,
        )
        if rounds is None:
            return {**made, "error": f"no dialogue: {dropped[-1]['reason']}", **vars(usage)}
        answers = [[one["answer"]] for one in rounds]
        if self.config.answers == 2:
            questions = [one["question"] for one in rounds]
            again = await self._read(
                write,
                answer_again_prompt(caption, context, questions),
                "again",
                lambda text: _answers_to(questions, text),
                dropped,
            )
            answers = [
                [*own, other] for own, other in zip(answers, again or [None] * len(rounds), strict=True)
            ]
        return {
            **made,
            "rounds": [
                {"question": one["question"], "answers": said}
                for one, said in zip(rounds, answers, strict=True)
            ],
            **vars(usage),
        }

    def _rounds(self, text: str) -> tuple[list[Mapping[str, str]], list[str]]:
        kept, repeated = without_repeats(parse_rounds(text, self.config.rounds))
        if len(kept) < self.config.rounds[0]:
            raise DialogueError(
                f"rounds: {len(kept)} of them do not repeat a question; at least {self.config.rounds[0]} "
                "were asked for"
            )
        return kept, repeated

    async def _read(
        self,
        write: Write,
        text: str,
        place: str,
        read: Callable[[str], tuple[ReadT, list[str]]],
        dropped: list[dict[str, str]],
    ) -> ReadT | None:
        """What `read` makes of a reply; asks config.attempts times at most, and lists what was not used,
        and why.
        """
        for attempt in range(self.config.attempts):
            try:
                reply = await write(text, f"{place} {attempt}")
            except EndpointError as error:
                dropped.append({"text": "", "reason": str(error)})
                return None  # it was sent again often enough
            except DialogueError as error:
                dropped.append({"text": "", "reason": str(error)})
                continue
            try:
                if reply.finish_reason == "length":
                    raise DialogueError("cut off: the reply reached generate.max_tokens")
                found, repeated = read(reply.spoken)
            except DialogueError as error:
                dropped.append({"text": reply.text, "reason": str(error)})
                continue
            dropped += [{"text": question, "reason": "duplicate question"} for question in repeated]
            return found
        return None

    async def writer(self, row: dict[str, Any], usage: Usage) -> Write:
        """(text, place) -> Reply about the row's image; the place is part of the seed."""
        raise NotImplementedError


def _answers_to(questions: Sequence[str], text: str) -> tuple[list[str | None], list[str]]:
    """An answer for each question, None where the reply does not repeat that question. Raises
    DialogueError where it repeats none.
    """
    said = {normal(one["question"]): one["answer"] for one in parse_rounds(text, (1, len(questions)))}
    found = [said.get(normal(question)) for question in questions]
    if not any(found):
        raise DialogueError("the second answers are not to the questions that were asked")
    return found, []


class EngineGenerate(EngineWorker, Generate):
    """A local VLM as writer, asked as `model_settings` says; see Generate and EngineWorker."""

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

    async def writer(self, row, usage):
        image, key = await self.image(row)
        sampling = SamplingConfig(
            temperature=self.config.temperature, top_k=0, top_p=1.0, max_tokens=self.config.max_tokens
        )

        async def write(text: str, place: str) -> Reply:
            prompt = self.engine.chat.prompt_ids([{"role": "user", "text": text}])
            output = await self.sampled(
                prompt, image, key, sampling, seed_for(self.config.seed, row["sample_id"], place), usage
            )
            text, thinking = without_blocks(self.spoken(prompt, output))
            if thinking == UNFINISHED:
                raise DialogueError(
                    "unfinished thinking: the reply never closes it; raise generate.max_tokens"
                )
            return Reply(
                self.engine.chat.without_special_text(text), output.finish_reason, len(output.token_ids)
            )

        return write


class ApiGenerate(Generate):
    """A writer behind an OpenAI-compatible endpoint; see Generate.

    Raises StageError where a remote endpoint has no key in this actor's environment.
    """

    def __init__(
        self,
        config: GenerateConfig | dict,
        demonstrations: Sequence[Demonstration],
        data_config: DataConfig | dict,
    ):
        self.config, self.demonstrations = GenerateConfig.model_validate(config), demonstrations
        super().__init__(rows_in_flight=self.config.concurrency)
        self.data_config = DataConfig.model_validate(data_config)
        self.endpoint = Endpoint(self.config, "generate")

    async def writer(self, row, usage):
        url = await asyncio.to_thread(data_url, row["image"], self.data_config)

        async def write(text: str, place: str) -> Reply:
            return await self.endpoint.ask(
                text, url, seed_for(self.config.seed, row["sample_id"], place) >> 31, usage
            )

        return write

    async def settled(self) -> None:
        await self.endpoint.settled()


def generate_map(
    config: GenerateConfig,
    model: str | None,
    data_config: DataConfig,
    engine_config: EngineConfig,
    demonstrations: Sequence[Demonstration] = (),
) -> tuple[type[RowWorker], dict[str, Any]]:
    """The writer as (callable class, arguments) for `map_batches`.

    Args:
        model: resolved path of the local writer; not used by kind api.
        engine_config: the writer's (OwnEngineConfig.beside).
    """
    common = {
        "config": config.model_dump(),
        "demonstrations": list(demonstrations),
        "data_config": data_config.model_dump(),
    }
    if config.kind == "api":
        return ApiGenerate, {**client_options(engine_config), "fn_constructor_kwargs": common}
    logger.info(config.described("generate"))
    engine = {"model": model, "engine_config": engine_config.model_dump()}
    worker = EngineGenerate if config.writing == "dialogue" else Asking
    return worker, {**map_options(engine_config), "fn_constructor_kwargs": {**common, **engine}}


def writer_name(config: GenerateConfig) -> str:
    """For the column `writer`."""
    return f"{config.kind}:{config.model}:{config.writing}"
