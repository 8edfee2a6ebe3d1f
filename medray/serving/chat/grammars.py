"""Whether an engine can follow a request's JSON schema: tried here first, as the engine compiles it.

vLLM (0.29) checks that xgrammar can read a schema, not that it can compile it, nor that any text fits it. Its
engine process then fails the request with an internal error. A few kilobytes of schema can also take minutes
to compile: that is done in processes that can be ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_AT_ONCE = 2  # compilations; one uses a core
_REMEMBERED = 1000  # verdicts
# seconds for which a schema that took too long is not tried again: the machine may have been busy
_SLOW_FOR = 60.0
_UNFOLLOWED = (
    "the schema uses a keyword that no grammar can follow here (multipleOf, uniqueItems, contains, "
    "propertyNames, a format beside a length, or an unknown format)"
)


class Grammars:
    """Tries schemas with an engine's tokenizer.

    Args:
        tokenizer: Hugging Face tokenizer of the engine.
        vocab_size: of the model.
        seconds: that compiling one schema may take.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, seconds: float = 10.0):
        self._tokenizer, self._vocab_size, self.seconds = tokenizer, vocab_size, seconds
        # a compiler's first line, made for the first schema: a tokenizer may be one that xgrammar cannot use
        self._start: str | None = None
        self._making = threading.Lock()
        self._threads = ThreadPoolExecutor(_AT_ONCE, "grammar")
        self._own = threading.local()  # each thread's compiler
        self._verdicts: OrderedDict[str, tuple[str | None, float]] = OrderedDict()  # and until when they hold

    async def problem(self, schema: dict[str, Any]) -> str | None:
        """Why no answer can follow the schema, or None."""
        text = json.dumps(schema)
        key = hashlib.sha256(text.encode()).hexdigest()
        verdict, until = self._verdicts.get(key, (None, 0.0))
        if time.monotonic() >= until:
            verdict, until = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._tried, text
            )
            self._verdicts[key] = verdict, until
            while len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        return verdict

    def _tried(self, text: str) -> tuple[str | None, float]:
        """The verdict, and until when it holds."""
        from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

        forever = float("inf")
        try:
            if has_xgrammar_unsupported_json_features(json.loads(text)):
                return _UNFOLLOWED, forever
        except TypeError:  # a list where a name belongs
            return (
                "the schema cannot be compiled: a keyword has a value of another type than it takes",
                forever,
            )
        try:
            compiler = self._compiler()
        except Exception as error:  # a tokenizer may be of any kind
            return (
                f"structured output does not work with this model's tokenizer ({type(error).__name__})",
                forever,
            )
        slow = threading.Event()
        end = threading.Timer(self.seconds, lambda: (slow.set(), compiler.kill()))
        end.start()
        try:
            compiler.stdin.write(json.dumps(text) + "\n")
            compiler.stdin.flush()
            answer = compiler.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            end.cancel()
        if answer:
            return json.loads(answer)["problem"], forever
        self._own.compiler = None
        compiler.kill()
        compiler.wait()
        if slow.is_set():
            reason = (
                f"the schema takes more than {self.seconds:g} seconds to compile; use fewer "
                "alternatives, optional properties or lengths"
            )
        else:
            reason = "the schema cannot be compiled: the compiler failed at it"
        return reason, time.monotonic() + _SLOW_FOR

    def _compiler(self) -> subprocess.Popen:
        """This thread's process, started where there is none that lives."""
        import xgrammar

        compiler = getattr(self._own, "compiler", None)
        if compiler is not None and compiler.poll() is None:
            return compiler
        with self._making:
            if self._start is None:
                info = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._vocab_size)
                self._start = (
                    json.dumps({"tokenizer": info.serialize_json(), "vocab_size": self._vocab_size}) + "\n"
                )
        command = [sys.executable, "-P", str(Path(__file__).with_name("grammar_compiler.py"))]
        self._own.compiler = compiler = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        compiler.stdin.write(self._start)
        compiler.stdin.flush()
        if compiler.stdout.readline() != "ready\n":  # the time of its start is not the schema's
            raise RuntimeError("the grammar compiler did not start")
        return compiler


def schema_of(request: Any) -> dict[str, Any] | None:
    """The JSON schema of a vLLM chat request, None if it has none."""
    form = getattr(request.response_format, "json_schema", None)
    return None if form is None else form.json_schema


def has_grammar(request: Any) -> bool:
    """Whether a vLLM chat request restricts the form of its answer."""
    return (
        request.structured_outputs is not None or getattr(request.response_format, "type", "text") != "text"
    )
