"""What a writer of dialogues is asked, and how its reply is read (pure).

BioMed-VITAL's prompts are in its appendix; prompts/dialogue.txt is ours, after what they ask for. Its
released parser cut answers at the end of their first line; here a turn reaches to the next one.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medray.data.exchanges import normal
from medray.inference.prompting import fill, known
from medray.inference.thinking import UNFINISHED, without_blocks
from medray.records import check_turns

Turn = dict[str, str]
# {"dialogue_id", "image_id", "modality", "context", "rounds": [{"question", "answer"}]}
Demonstration = dict[str, Any]
# "User:", "**User 2:**", "2. Question:", "## Assistant -": a role at the beginning of a line, with what
# writers put around it.
_ROLE = re.compile(
    r"^[ \t]*(?:[#>*_-]+[ \t]*)?(?:\d{1,3}[.)][ "
    r"\t]*)?[*_]*(?P<role>user|human|question|q|assistant|answer|gpt|a)(?:[ \t]*\d{1,3})?[*_]*[ "
    r"\t]*[::][ \t]*[*_]*",
    re.IGNORECASE | re.MULTILINE,
)
_RULE = re.compile(r"\s*(?:([-=*_])\1{2,}\s*)?")  # or an empty line
# "### Round 2", "**Turn 3:**"
_HEADING = re.compile(
    r"[\s#*_=:.-]*(?:round|turn|exchange|dialogue)[\s#*_:.-]*\d{1,3}[\s#*_=:.-]*", re.IGNORECASE
)
# Who answers whom. The first turn says which words a writer uses; "A: benign" among a user's choices is no
# turn then.
_ANSWERS = {"user": ("assistant",), "human": ("assistant", "gpt"), "question": ("answer",), "q": ("a",)}


class DialogueError(ValueError):
    """A reply that is no dialogue of the form that was asked for."""


def dialogue_prompt(
    caption: str | None, context: str | None, shown: Sequence[Demonstration], rounds: tuple[int, int]
) -> str:
    """The user turn that goes with the image: instructions, what is known of the image, the
    demonstrations.
    """
    examples = "".join(
        (
            "Example of a dialogue that clinicians approved, about another "
            f"image{_about(one)}:\n{_written(one)}\n\n"
        )
        for one in shown
    )
    wanted = str(rounds[0]) if rounds[0] == rounds[1] else f"{rounds[0]} to {rounds[1]}"
    return fill("dialogue.txt", known=known(caption, context), demonstrations=examples, rounds=wanted)


def answer_again_prompt(caption: str | None, context: str | None, questions: Sequence[str]) -> str:
    """The user turn that asks for another answer to each of the questions."""
    listed = "\n".join(f"{number}. {question}" for number, question in enumerate(questions, 1))
    return fill("answer_again.txt", known=known(caption, context), questions=listed)


def one_per_modality(demonstrations: Iterable[Demonstration], seed: str) -> list[Demonstration]:
    """One demonstration of each modality, drawn by the seed, in random order."""
    by_modality: dict[str, list[Demonstration]] = defaultdict(list)
    for one in demonstrations:
        by_modality[one["modality"] or ""].append(one)
    rng = random.Random(seed)
    drawn = [
        rng.choice(sorted(group, key=lambda one: one["dialogue_id"]))
        for _, group in sorted(by_modality.items())
    ]
    return rng.sample(drawn, len(drawn))


def parse_dialogue(reply: str) -> list[Turn]:
    """The turns of a reply, {"role": user | assistant, "text"}; a turn's text may have any number of lines.

    Words before the first turn ("Here is the dialogue:") are left out, thinking wherever it stands, and lines
    of marks and headings ("### Round 2") between turns.

    Raises DialogueError unless user and assistant take turns, beginning with the user and ending with the
    assistant, all with something to say.
    """
    reply, thinking = without_blocks(reply)
    if thinking == UNFINISHED:
        raise DialogueError("unfinished thinking: the reply never closes it; raise generate.max_tokens")
    found = list(_ROLE.finditer(reply))
    if not found:
        raise DialogueError("no turns")
    first = found[0]["role"].lower()
    found = [match for match in found if match["role"].lower() in (first, *_ANSWERS.get(first, ()))]
    turns = [
        {
            "role": "user" if match["role"].lower() in _ANSWERS else "assistant",
            "text": _text(match, following),
        }
        for match, following in zip(found, [*found[1:], None], strict=True)
    ]
    problem = check_turns(turns)
    if problem is not None:
        raise DialogueError(problem)
    return turns


def without_repeats(rounds: Sequence[Mapping[str, str]]) -> tuple[list[Mapping[str, str]], list[str]]:
    """(the rounds whose question was not asked before, the questions of the others)."""
    seen: set[str] = set()
    kept, repeated = [], []
    for one in rounds:
        same = normal(one["question"])
        if same in seen:
            repeated.append(one["question"])
        else:
            seen.add(same)
            kept.append(one)
    return kept, repeated


def parse_rounds(reply: str, rounds: tuple[int, int]) -> list[Mapping[str, str]]:
    """The {"question", "answer"} of a reply.

    Raises DialogueError for what is no dialogue, or one of another length.
    """
    turns = parse_dialogue(reply)
    found = len(turns) // 2
    if not rounds[0] <= found <= rounds[1]:
        raise DialogueError(f"rounds: {found} of them; {rounds[0]} to {rounds[1]} were asked for")
    return [
        {"question": turns[at]["text"], "answer": turns[at + 1]["text"]} for at in range(0, len(turns), 2)
    ]


def _text(role: re.Match[str], following: re.Match[str] | None) -> str:
    """What is said between two roles, without rules ("---") and headings at its end and the end of an
    emphasis that began before it.
    """
    lines = role.string[role.end() : following.start() if following else None].split("\n")
    # A heading has a line of its own, and a role after it: the last answer may well end with "Round 2".
    while lines and (
        _RULE.fullmatch(lines[-1]) or (following and len(lines) > 1 and _HEADING.fullmatch(lines[-1]))
    ):
        lines.pop()
    text = "\n".join(lines).strip()
    marks = re.findall(r"\*+(?![*\s])|(?<=[^*\s])\*+", role[0])  # not those of a list, which a blank follows
    if len(marks) % 2:  # "**User: What is this?**"
        text = re.sub(rf"(?<![*\s]){re.escape(marks[-1])}[ \t]*$", "", text, count=1, flags=re.MULTILINE)
    return text


def _about(one: Demonstration) -> str:
    return f" ({one['modality']})" if one["modality"] else ""


def _written(one: Demonstration) -> str:
    return "\n".join(f"User: {round['question']}\nAssistant: {round['answer']}" for round in one["rounds"])
