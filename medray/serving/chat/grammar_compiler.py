"""A process that tries JSON schemas: a compilation cannot be interrupted, but a process can be ended.

Started by medray.serving.chat.grammars with this file's path. It reads JSON lines: first {"tokenizer": what
TokenizerInfo.serialize_json gave, "vocab_size"}, then a schema (as text) on each line; it writes "ready",
then for each schema {"problem": text or null}. It ends with its standard input.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

_MEMORY = 8 * 2**30  # bytes of address space beyond what the libraries take: some schemas need any amount


def problem_of(compiler: Any, vocab_size: int, text: str) -> str | None:
    """Why no answer can follow the schema, or None."""
    import xgrammar

    try:
        compiled = compiler.compile_json_schema(text, any_whitespace=False)
    except MemoryError:
        return "the schema cannot be compiled: it takes too much memory"
    except Exception as error:  # C++ reports what it was given with errors of many types
        # "[time] /project/cpp/file.cc:line: reason"
        reason = str(error).strip().partition(".cc:")[2].partition(": ")[2] or type(error).__name__
        return f"the schema cannot be compiled: {reason.splitlines()[0][:300]}"
    matcher = xgrammar.GrammarMatcher(compiled)
    allowed = xgrammar.allocate_token_bitmask(1, vocab_size)
    matcher.fill_next_token_bitmask(allowed)
    return None if (allowed != 0).any() else "no text fits the schema: its references lead back to themselves"


def main() -> None:
    # Ctrl-C at the server: it ends this process by its standard input
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: also where the server is killed while a schema is compiled
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import xgrammar

    start = json.loads(sys.stdin.readline())
    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.deserialize_json(start["tokenizer"]), max_threads=1, cache_enabled=False
    )
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    print("ready", file=answers)
    for line in sys.stdin:
        print(
            json.dumps({"problem": problem_of(compiler, start["vocab_size"], json.loads(line))}), file=answers
        )


if __name__ == "__main__":
    main()
