"""Whether an engine can follow a request's JSON schema: tried here first, as the engine compiles it.

vLLM (0.29) checks that xgrammar can read a schema, not that it can compile it, nor that any text fits it. Its engine process then fails the
request with an internal error. A few kilobytes of schema can also take minutes to compile.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_AT_ONCE = 2  # compilations; one uses a core
_REMEMBERED = 1000  # verdicts


class Grammars:
    """Tries schemas with an engine's tokenizer.

    Args:
        tokenizer: Hugging Face tokenizer of the engine.
        vocab_size: of the model.
        seconds: that compiling one schema may take.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, seconds: float = 10.0):
        self._tokenizer, self._vocab_size, self.seconds = tokenizer, vocab_size, seconds
        self._compiler: Any = None  # made for the first schema: a model that is asked for none may have a tokenizer that xgrammar cannot use
        self._making = threading.Lock()
        self._threads = ThreadPoolExecutor(_AT_ONCE, "grammar")
        self._verdicts: OrderedDict[str, str | None] = OrderedDict()

    async def problem(self, schema: dict[str, Any]) -> str | None:
        """Why no answer can follow the schema, or None."""
        text = json.dumps(schema)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            return self._verdicts[key]
        started = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> str | None:
            loop.call_soon_threadsafe(started.set)
            return self._tried(text)

        future = loop.run_in_executor(self._threads, work)
        await started.wait()  # the time in the queue is not the schema's
        done, _ = await asyncio.wait([future], timeout=self.seconds)
        if done:
            verdict = future.result()
        else:
            # The compiler cannot be interrupted: its thread works on, but the engine is spared.
            verdict = f"the schema takes more than {self.seconds:g} seconds to compile; use fewer alternatives, optional properties or lengths"
        self._verdicts[key] = verdict
        while len(self._verdicts) > _REMEMBERED:
            self._verdicts.popitem(last=False)
        return verdict

    def _tried(self, text: str) -> str | None:
        import xgrammar
        from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

        if has_xgrammar_unsupported_json_features(json.loads(text)):
            return "the schema uses a keyword that no grammar can follow here (multipleOf, uniqueItems, contains, propertyNames, a format beside a length, or an unknown format)"
        try:
            with self._making:
                if self._compiler is None:
                    info = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._vocab_size)
                    self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        except (RuntimeError, ValueError, TypeError) as error:
            return f"structured output does not work with this model's tokenizer ({type(error).__name__})"
        try:
            compiled = self._compiler.compile_json_schema(text, any_whitespace=False)
        except (RuntimeError, ValueError) as error:
            # "[time] /project/cpp/file.cc:line: reason"
            return f"the schema cannot be compiled: {str(error).strip().partition('.cc:')[2].partition(': ')[2] or type(error).__name__}"
        matcher = xgrammar.GrammarMatcher(compiled)
        allowed = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        matcher.fill_next_token_bitmask(allowed)
        return None if (allowed != 0).any() else "no text fits the schema: its references lead back to themselves"


def schema_of(request: Any) -> dict[str, Any] | None:
    """The JSON schema of a vLLM chat request, None if it has none."""
    form = getattr(request.response_format, "json_schema", None)
    return None if form is None else form.json_schema


def has_grammar(request: Any) -> bool:
    """Whether a vLLM chat request restricts the form of its answer."""
    return request.structured_outputs is not None or getattr(request.response_format, "type", "text") != "text"


