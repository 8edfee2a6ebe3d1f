"""Callables for Ray Data's `map_batches` that work on rows as coroutines.

One output row per input row. A row that fails carries its reason in `error` and never stops the batch; a dead
engine ends the actor's process, so that Ray starts a new one and gives it the unfinished rows again. An
endpoint that answers nothing fails the stage, and the rows it failed are not kept.

Example::

    rows = read_rows(uri).map_batches(
        SelfPlay, fn_constructor_kwargs={"model": path, ...}, **map_options(config.engine),
    )
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Any, ClassVar

import pyarrow as pa

from medray.config import DataConfig, EngineConfig, ModelConfig, SamplingConfig
from medray.inference.api_client import EndpointDown
from medray.inference.completions import Usage
from medray.inference.thinking import Said, opens, said
from medray.inference.vllm_engine import EngineLost, Output, VLMEngine, image_key
from medray.models.cache import localize
from medray.prometheus import RowMetrics
from medray.records import conform
from medray.storage.begun import Begun

logger = logging.getLogger("medray")

_STAGE_ERRORS = (EngineLost, EndpointDown)
_LAST_IDS = 16  # of a prompt, that an opening tag would be in


class RowWorker:
    """Base of the callables: a table in, a table of `schema` with as many rows out.

    Subclasses give `schema`, `row` and the name of their `stage`. Calls may overlap; `rows_in_flight` bounds
    them together.
    """

    schema: ClassVar[pa.Schema]
    stage: ClassVar[str] = "rows"

    def __init__(self, rows_in_flight: int):
        # One loop for the actor's life: vLLM's engine is bound to the loop it was first used in.
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(rows_in_flight)
        threading.Thread(target=self._loop.run_forever, name=f"{self.stage}-rows", daemon=True).start()
        self.begun, self.metrics = Begun(), RowMetrics(self.stage)

    async def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Work on one row; what it raises becomes the row's `error`."""
        raise NotImplementedError

    def failed(self, row: dict[str, Any], reason: str) -> dict[str, Any]:
        """The output row of an input row that could not be worked on: what both schemas share, without
        the image.
        """
        kept = {name: row.get(name) for name in self.schema.names if name != "image"}
        return {**kept, "error": reason}

    def __call__(self, table: pa.Table) -> pa.Table:
        self.begun(table.num_rows)
        try:
            rows = self.run(self._rows(table.to_pylist()))
        except EngineLost:
            _end_actor()
            raise
        set_aside = sum(row["error"] is not None for row in rows)
        self.metrics.rows(len(rows) - set_aside, set_aside)
        return conform(pa.Table.from_pylist(rows, schema=self.schema), self.schema)

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine in the worker's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._guarded(row)) for row in rows]
        lost = next((task.result() for task in tasks if isinstance(task.result(), _STAGE_ERRORS)), None)
        if lost is not None:
            raise lost
        await self.settled()
        return [task.result() for task in tasks]

    async def settled(self) -> None:
        """Called when a table's rows are done and before they are handed on, and so kept; what it raises
        fails the stage.
        """

    async def _guarded(self, row: dict[str, Any]) -> dict[str, Any] | EngineLost | EndpointDown:
        async with self._slots:
            try:
                return await self.row(row)
            except _STAGE_ERRORS as lost:
                return lost
            except Exception as error:
                # the row boundary: whatever is wrong with one row is named and set aside
                reason = f"{type(error).__name__}: {error}"
                logger.warning("%s: row %s set aside: %s", self.stage, row.get("sample_id"), reason)
                return self.failed(row, reason)


class EngineWorker(RowWorker):
    """A row worker with an engine.

    Args:
        model: model folder, hub id or remote address (copied to a cache first).
        model_config, data_config, engine_config: the sections, or their dumps.
    """

    def __init__(
        self,
        model: str,
        model_config: ModelConfig | dict,
        data_config: DataConfig | dict,
        engine_config: EngineConfig | dict,
    ):
        self.model_config = ModelConfig.model_validate(model_config)
        self.data_config = DataConfig.model_validate(data_config)
        engine_config = EngineConfig.model_validate(engine_config)
        super().__init__(engine_config.rows_in_flight)
        self.engine = self.run(_made(localize(model), self.model_config, engine_config))

    async def image(self, row: dict[str, Any]) -> tuple[Any, str]:
        """The row's decoded (and, where the model wants it, padded) image, and its cache key.

        Raises medray.errors.DataError or ValueError for an image outside the limits.
        """
        data = row.get("image")
        if not data:
            raise ValueError("no image")
        return await asyncio.to_thread(self._decode, data), image_key(data, self.model_config.pad_to_square)

    async def sampled(
        self, prompt: list[int], image: Any, key: str, sampling: SamplingConfig, seed: int, usage: Usage
    ) -> Output:
        """One output about an image (with its cache key); what it took is added to `usage`."""
        output = (await self.engine.generate(prompt, image, sampling, seed, image_id=key))[0]
        usage.requests += 1
        usage.prompt_tokens += output.prompt_tokens
        usage.completion_tokens += len(output.token_ids)
        self.metrics.tokens(len(output.token_ids))
        return output

    def spoken(self, prompt: list[int], output: Output) -> str:
        """An output's text with its thinking in tags, where it has any: some models' tags are special
        tokens, which the output's own text lacks, and some templates write the opening one into the
        prompt.
        """
        tokenizer = self.engine.chat.tokenizer
        text = output.text
        if output.special:
            whole = tokenizer.decode(
                output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
            )
            text = whole if said(whole).thinking is not None else text
        return f"<think>{text}" if opens(tokenizer.decode(prompt[-_LAST_IDS:])) else text

    def said(self, prompt: list[int], output: Output) -> Said:
        """The answer in an output, without the thinking before it."""
        return said(self.spoken(prompt, output))

    def _decode(self, data: bytes) -> Any:
        from medray.images.decoding import decode, pad_to_square

        image = decode(data, self.data_config)
        return pad_to_square(image) if self.model_config.pad_to_square else image

    def close(self) -> None:
        """End the engine (a Ray actor need not: the engine ends with its process)."""
        self.run(_closed(self.engine))


async def _made(model_dir: str, model_config: ModelConfig, engine_config: EngineConfig) -> VLMEngine:
    # Inside the loop: vLLM starts its output handler in the running one.
    return VLMEngine(model_dir, model_config, engine_config)


async def _closed(engine: VLMEngine) -> None:
    engine.close()


def _end_actor() -> None:
    """End this process if it is a Ray actor: Ray restarts it elsewhere and redoes the rows (an exception
    would not).
    """
    import ray

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id():
        logger.error(
            "the vLLM engine died; this actor ends, Ray starts a new one and gives it the unfinished rows"
        )
        logging.shutdown()
        os._exit(1)
