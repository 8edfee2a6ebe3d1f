"""Tell a model's answer from the thinking it wrote before it (pure).

Thinking models write "<think>...</think>answer", in many spellings of the tags; a chat template may have
written the opening one. What stands after the last closing tag is the answer. A text that opens thinking and
never closes it holds no answer.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Thinking = Literal["finished", "unfinished"]
FINISHED: Thinking = "finished"
UNFINISHED: Thinking = "unfinished"

_WORDS = (
    "think|thinking|thought|thoughts|thought_process|reason|reasoning|reasoning_process|reflection|analysis"
    "|scratchpad"
)
_NAME = rf"(?:[\w-]+:)?(?:(?:begin|end|start|end_of|begin_of|start_of)_)?(?:{_WORDS})"
# <think>, <seed:think>, <|begin_of_thought|>, [THINK], ◁think▷, <unused94>thought (MedGemma),
# <|channel|>analysis<|message|> (harmony).
_OPENING = (
    rf"<\|?(?!end){_NAME}(?:\s[^<>]*)?\s*\|?\s*>|\[\s*THINK\s*\]|◁\s*think\s*▷|<unused94>(?:thought)?"
    r"|<\|?channel\|?>\s*(?:analysis|commentary|thought)\b(?:\s*<\|message\|>)?"
)
_CLOSING = (
    rf"<\s*/\s*{_NAME}\s*>|<\s*\|\s*/?\s*(?:end|end_of)_(?:{_WORDS})\s*\|\s*>"
    rf"|<\s*\|\s*/\s*(?:{_WORDS})\s*\|\s*>|\[\s*/\s*THINK\s*\]|◁\s*/\s*think\s*▷"
    r"|<unused95>|<\|?channel\|?>\s*final\b(?:\s*<\|message\|>)?|(?<=.)<channel\|>"
)
_TAG = re.compile(rf"(?P<closing>{_CLOSING})|(?P<opening>{_OPENING})", re.IGNORECASE | re.DOTALL)
# An answer in tags of its own, and nothing beside them: <answer>B</answer>, LLaVA-CoT's <CONCLUSION>.
_WRAPPED = re.compile(
    r"\s*<\s*(answer|final_answer|conclusion)\s*>(?P<answer>.*?)(?:<\s*/\s*\1\s*>[\s.]*)?",
    re.IGNORECASE | re.DOTALL,
)


# What ends a turn, where special tokens are written out; harmony without them; a tag that opens and closes at
# once.
_END = re.compile(
    r"(?:\s*(?:<\|(?:im_end|eot_id|end|return|endoftext|end_of_text)\|>|</s>|<eos>|<end_of_turn>))+\s*$"
)
_BARE_HARMONY = re.compile(r"\s*analysis.*assistantfinal(?P<answer>.*)", re.DOTALL)
_EMPTY_TAG = re.compile(rf"<\s*{_NAME}\s*/\s*>", re.IGNORECASE)


class Said(NamedTuple):
    """What a model answered. `thinking` is None for a text without any; if it is unfinished, the answer is
    empty.
    """

    answer: str
    thinking: Thinking | None = None


def said(text: str) -> Said:
    """The answer in a text, without the thinking before it."""
    text = _EMPTY_TAG.sub("", _END.sub("", text))
    if bare := _BARE_HARMONY.fullmatch(text):
        return Said(bare["answer"].strip(), FINISHED)
    tags = list(_TAG.finditer(text))
    if not tags:
        return Said(_unwrapped(text))
    if tags[-1]["opening"]:
        return Said("", UNFINISHED)
    after = text[tags[-1].end() :]
    # a closing tag too many: <think>x</think>B</think>
    if not after.strip() and len(tags) > 1 and tags[-2]["closing"]:
        after = text[tags[-2].end() : tags[-1].start()]
    return Said(_unwrapped(after).strip(), FINISHED)


def without_blocks(text: str) -> Said:
    """The text without any of its blocks of thinking, wherever they stand: for replies that hold several
    turns.
    """
    kept, depth, end, tags = [], 0, 0, list(_TAG.finditer(text))
    for tag in tags:
        if depth == 0 and tag["opening"]:
            kept.append(text[end : tag.start()])
        elif depth == 0:
            kept = []  # the block was opened by the prompt
        depth = depth + 1 if tag["opening"] else max(0, depth - 1)
        end = tag.end()
    if depth:
        return Said("", UNFINISHED)
    return Said(_unwrapped("".join([*kept, text[end:]])).strip(), FINISHED if tags else None)


def opens(prompt: str) -> bool:
    """Whether a prompt ends with an opening tag, as the templates of some models write it."""
    tags = list(_TAG.finditer(prompt[-200:]))
    return bool(tags) and bool(tags[-1]["opening"]) and not prompt[-200:][tags[-1].end() :].strip()


def _unwrapped(text: str) -> str:
    found = _WRAPPED.fullmatch(text)
    return found["answer"].strip() if found else text
