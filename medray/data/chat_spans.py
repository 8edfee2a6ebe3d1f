"""Dialogues to token ids with the spans of their turns, through the model's own chat template (pure).

Masks come from incremental rendering: the template is asked for the dialogue up to each turn, and what it
adds is that turn. Character spans become token spans by the fast tokenizer's offsets. No string is searched
for but a turn's own text inside its own turn; any mismatch is an error that names the turn, never a silently
wrong mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from medray.config import ModelConfig
from medray.config.recipes import read_template
from medray.errors import ConfigError, DataError

ANSWER, QUESTION, QUESTION_PREFIX = 0, 1, 2
_MARK = "QXQ"  # stands where a text will


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of all special tokens by spelling: those that transformers has a name for, and those that only
    the tokenizer's own file marks as special (Gemma's <end_of_turn>, Idefics' <global-img>). Tokens of
    blanks alone are text.
    """
    marked = {
        token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {token: index for token, index in {**marked, **named}.items() if token.strip()}


def image_token_of(processor: Any) -> str:
    """The token that stands for an image's features in the model's ids.

    Raises ConfigError where the processor names none.
    """
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise ConfigError(
            f"model.path: {type(processor).__name__} names no image token; this model family is not "
            "supported yet"
        )
    return token


class EncodeError(DataError):
    """One dialogue that cannot be encoded; its row is quarantined with this reason."""


@dataclass(frozen=True)
class TokenInfo:
    """What collating needs to know of a tokenizer and template.

    questioner_prefix_ids: what the template writes before a questioner's text, in place of the user's prefix.
    """

    pad_id: int
    image_token_id: int
    questioner_prefix_ids: tuple[int, ...]
    wants_token_types: bool  # Qwen-VL models of transformers 5 locate images by mm_token_type_ids


class Dialogues:
    """Turns -> ids and spans, for one processor.

    Raises ConfigError where the model has no chat template.
    """

    def __init__(self, processor: Any, config: ModelConfig):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.config = config
        if config.chat_template:
            self.template = read_template(config.chat_template)
        else:
            self.template = processor.chat_template or self.tokenizer.chat_template
        if not self.template:
            raise ConfigError("model.chat_template: the model has none of its own; give a Jinja file")
        if not isinstance(self.template, str):
            raise ConfigError(
                "model.chat_template: the model has several templates; give one as a Jinja file"
            )
        self.image_token = image_token_of(processor)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        special = special_tokens(self.tokenizer)
        self.special_ids = set(special.values())
        self._specials = sorted({*special, self.image_token})

    def info(self, questioner: bool = True) -> TokenInfo:
        """`questioner` False: without the questioner's prefix, which not every template can write."""
        pad = self.tokenizer.pad_token_id
        return TokenInfo(
            pad_id=self.tokenizer.eos_token_id if pad is None else pad,
            image_token_id=self.image_token_id,
            questioner_prefix_ids=tuple(self._questioner_prefix()) if questioner else (),
            wants_token_types="mm_token_type_ids" in self.processor.model_input_names,
        )

    def render(self, turns: list[dict[str, str]], opening: bool = False) -> str:
        """Text of the dialogue; the first user turn carries the image; `opening` adds the assistant's
        prefix.
        """
        try:
            return self.processor.apply_chat_template(
                self.messages(turns),
                chat_template=self.template,
                add_generation_prompt=opening,
                tokenize=False,
            )
        except TemplateError as error:
            # also what a template raises itself: an unknown role, an order of roles it does not know
            roles = ", ".join(dict.fromkeys(message["role"] for message in self.messages(turns)))
            raise EncodeError(
                f"the chat template refuses a dialogue with the roles {roles}: {error}; set "
                "model.chat_template"
            ) from error

    def encode(self, turns: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (one image token, not yet expanded) int32 [T] and spans int32 [S, 3] of (kind, start, end),
        half-open.

        ANSWER: an answer with its end token (assistants' always, and questions of explicit questioner turns).
        QUESTION_PREFIX, QUESTION: in pairs, the role prefix and the text with end token of each user turn
        after the first.
        """
        turns = self.with_system(turns)
        self._check_text(turns)
        text = self.render(turns)
        spans: list[tuple[int, int, int]] = []
        first_user = next(i for i, turn in enumerate(turns) if turn["role"] in ("user", "questioner"))
        for index, turn in enumerate(turns):
            if index <= first_user:
                continue
            until = text if index == len(turns) - 1 else self.render(turns[: index + 1])
            self._expect_prefix(text, until, index)
            if turn["role"] == "assistant":
                opened = self.render(turns[:index], opening=True)
                self._expect_prefix(until, opened, index)
                spans.append((ANSWER, len(opened.rstrip(" ")), len(until.rstrip())))
                continue
            before = self.render(turns[:index])
            self._expect_prefix(until, before, index)
            content = until.find(turn["text"], len(before))
            if content < 0:
                raise EncodeError(
                    f"turn {index}: the chat template changes the text of the turn, so it cannot be masked"
                )
            begin = len(until[:content].rstrip(" "))
            if turn["role"] == "user":
                spans.append((QUESTION_PREFIX, len(before), begin))
                spans.append((QUESTION, begin, len(until.rstrip())))
            else:
                spans.append((ANSWER, begin, len(until.rstrip())))
        return self.tokenise(text, spans)

    def encode_answer(self, question: str, answer: str) -> tuple[np.ndarray, int]:
        """Ids of a single-turn question and answer, cut after the answer's end token, and where the
        answer starts.
        """
        ids, spans = self.encode([{"role": "user", "text": question}, {"role": "assistant", "text": answer}])
        _, start, end = spans[-1]
        return ids[:end], int(start)

    def expand(self, ids: np.ndarray, spans: np.ndarray, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The one image token repeated `image_tokens` times, spans moved along."""
        places = np.flatnonzero(ids == self.image_token_id)
        if len(places) != 1:
            raise EncodeError(f"the dialogue holds {len(places)} image tokens where one image was given")
        place = int(places[0])
        grown = np.concatenate(
            [ids[:place], np.full(image_tokens, self.image_token_id, np.int32), ids[place + 1 :]]
        )
        moved = spans.copy()
        moved[:, 1:] += (image_tokens - 1) * (spans[:, 1:] > place)
        return grown, moved

    def with_system(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        if self.config.system_prompt and turns[0]["role"] != "system":
            return [{"role": "system", "text": self.config.system_prompt}, *turns]
        return turns

    def messages(self, turns: list[dict[str, str]]) -> list[dict[str, Any]]:
        """Turns as chat templates take them."""
        messages, image_given = [], False
        for turn in turns:
            role = self.config.questioner_role if turn["role"] == "questioner" else turn["role"]
            content: list[dict[str, str]] = [{"type": "text", "text": turn["text"]}]
            if turn["role"] in ("user", "questioner") and not image_given:
                content.insert(0, {"type": "image"})
                image_given = True
            messages.append({"role": role, "content": content})
        return messages

    def _check_text(self, turns: list[dict[str, str]]) -> None:
        for index, turn in enumerate(turns):
            if token := self.special_in(turn["text"]):
                raise EncodeError(
                    f"turn {index}: the text contains the special token {token}; remove or rewrite it"
                )

    def special_in(self, text: str) -> str | None:
        """A special token that a text spells, if any."""
        return next((token for token in self._specials if token in text), None)

    @staticmethod
    def _expect_prefix(text: str, prefix: str, index: int) -> None:
        if not text.startswith(prefix):
            raise EncodeError(
                f"turn {index}: the chat template rewrites earlier turns, so turns cannot be masked; set "
                "model.chat_template"
            )

    def tokenise(self, text: str, spans: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and spans as of `encode`, of a rendered text and (kind, begin, end) in characters."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], np.int32)
        starts = [start for start, _ in encoded["offset_mapping"]]
        ends = [end for _, end in encoded["offset_mapping"]]
        out = np.empty((len(spans), 3), np.int32)
        for row, (kind, begin, end) in enumerate(spans):
            first = int(np.searchsorted(ends, begin, side="right"))
            last = int(np.searchsorted(starts, end, side="left"))
            if first >= last or starts[first] < begin or ends[last - 1] > end:
                raise EncodeError(
                    f"a turn's edge at character {begin} or {end} falls inside a token; set "
                    "model.chat_template to one with special tokens between turns"
                )
            if kind != QUESTION_PREFIX and int(ids[last - 1]) not in self.special_ids:
                raise EncodeError(
                    "the chat template ends a turn without an end token, so the model would not learn to "
                    "stop; set model.chat_template (see medray/recipes/templates)"
                )
            out[row] = (kind, first, last)
        return ids, out

    def _questioner_prefix(self) -> list[int]:
        turns = [
            {"role": "user", "text": "a"},
            {"role": "assistant", "text": "b"},
            {"role": "questioner", "text": _MARK},
        ]
        try:
            before, through = self.render(turns[:2]), self.render(turns)
        except EncodeError as error:
            raise ConfigError(
                f"model.questioner_role: {error}, which writes the role {self.config.questioner_role!r} too"
            ) from error
        if not through.startswith(before) or _MARK not in through[len(before) :]:
            raise ConfigError(
                "model.questioner_role: the chat template writes nothing usable for the role "
                f"{self.config.questioner_role!r}"
            )
        opened = through[: through.rindex(_MARK)].rstrip(" ")
        if opened == before.rstrip(" "):
            raise ConfigError(
                f"model.questioner_role: the chat template gives the role {self.config.questioner_role!r} no "
                "prefix; set model.chat_template"
            )
        return self._ids(opened)[len(self._ids(before)) :]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Descriptions:
    """Dialogues of one turn, [image][instruction] -> description, as instruction-free tuning trains them.

    What the template writes around a description is rendered once: shuffled, it is tokenised anew in every
    epoch.

    Args:
        instruction: the text of the user's turn; None for `proxy_count` placeholders of the proxy
            instruction, each of which the tokenizer (in memory) then knows as one token.

    Raises ConfigError where the instruction holds a special token, or the template does not write turn after
    turn.
    """

    def __init__(self, dialogues: Dialogues, instruction: str | None, proxy_count: int):
        from medray.models.proxy_instruction import PLACEHOLDER, add_placeholder

        self.dialogues = dialogues
        self._placeholder = PLACEHOLDER
        if instruction is None:
            add_placeholder(dialogues.tokenizer)
            instruction = PLACEHOLDER * proxy_count
        elif token := self._special_in(instruction):
            raise ConfigError(f"instruction: it contains the special token {token}; remove or rewrite it")
        self._asked = dialogues.with_system([{"role": "user", "text": instruction}])
        opened, text = dialogues.render(self._asked, opening=True).rstrip(" "), self._render(_MARK)
        if not text.startswith(opened) or _MARK not in text[len(opened) :]:
            raise ConfigError(
                "model.chat_template: it does not write the assistant's turn behind the user's; give another"
            )
        self._opened = len(opened)
        self._before, _, self._after = text.rpartition(_MARK)

    def check(self, description: str) -> None:
        """Raises EncodeError for a text that holds a special token or a placeholder, or that the template
        changes.
        """
        if token := self._special_in(description):
            raise EncodeError(f"the description contains the special token {token}; remove or rewrite it")
        if self._render(description) != self._before + description + self._after:
            raise EncodeError("the chat template changes the text of the description, so it cannot be masked")

    def encode(self, description: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and spans as `Dialogues.encode` gives them for the two turns, of a text that `check` lets
        pass.
        """
        text = self._before + description + self._after
        return self.dialogues.tokenise(text, [(ANSWER, self._opened, len(text.rstrip()))])

    def turns(self, description: str) -> list[dict[str, str]]:
        """The dialogue of a description."""
        return [*self._asked, {"role": "assistant", "text": description}]

    def _render(self, description: str) -> str:
        return self.dialogues.render(self.turns(description))

    def _special_in(self, text: str) -> str | None:
        return self._placeholder if self._placeholder in text else self.dialogues.special_in(text)
