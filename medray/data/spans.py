"""Dialogues to token ids with the spans of their turns, through the model's own chat template (pure).

Masks come from incremental rendering: the template is asked for the dialogue up to each turn, and what it adds is that
turn. Character spans become token spans by the fast tokenizer's offsets. No string is searched for but a turn's own
text inside its own turn; any mismatch is an error that names the turn, never a silently wrong mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medray.config import ModelConfig
from medray.errors import ConfigError, DataError

ANSWER, QUESTION, QUESTION_PREFIX = 0, 1, 2


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
            self.template = Path(config.chat_template).read_text(encoding="utf-8")
        else:
            self.template = processor.chat_template or self.tokenizer.chat_template
        if not self.template:
            raise ConfigError("model.chat_template: the model has none of its own; give a Jinja file")
        self.image_token = processor.image_token
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        self.special_ids = set(self.tokenizer.all_special_ids)
        self._specials = [token for token in {*self.tokenizer.all_special_tokens, self.image_token} if token]

    def info(self) -> TokenInfo:
        pad = self.tokenizer.pad_token_id
        return TokenInfo(
            pad_id=self.tokenizer.eos_token_id if pad is None else pad, image_token_id=self.image_token_id,
            questioner_prefix_ids=tuple(self._questioner_prefix()),
            wants_token_types="mm_token_type_ids" in self.processor.model_input_names,
        )

    def render(self, turns: list[dict[str, str]], opening: bool = False) -> str:
        """Text of the dialogue; the first user turn carries the image; `opening` adds the assistant's prefix."""
        return self.processor.apply_chat_template(self._messages(turns), chat_template=self.template, add_generation_prompt=opening, tokenize=False)

    def encode(self, turns: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (one image token, not yet expanded) int32 [T] and spans int32 [S, 3] of (kind, start, end), half-open.

        ANSWER: an answer with its end token (assistants' always, and questions of explicit questioner turns).
        QUESTION_PREFIX, QUESTION: in pairs, the role prefix and the text with end token of each user turn after the first.
        """
        turns = self._with_system(turns)
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
                raise EncodeError(f"turn {index}: the chat template changes the text of the turn, so it cannot be masked")
            begin = len(until[:content].rstrip(" "))
            if turn["role"] == "user":
                spans.append((QUESTION_PREFIX, len(before), begin))
                spans.append((QUESTION, begin, len(until.rstrip())))
            else:
                spans.append((ANSWER, begin, len(until.rstrip())))
        return self._tokenise(text, spans)

    def encode_answer(self, question: str, answer: str) -> tuple[np.ndarray, int]:
        """Ids of a single-turn question and answer, cut after the answer's end token, and where the answer starts."""
        ids, spans = self.encode([{"role": "user", "text": question}, {"role": "assistant", "text": answer}])
        _, start, end = spans[-1]
        return ids[:end], int(start)

    def expand(self, ids: np.ndarray, spans: np.ndarray, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The one image token repeated `image_tokens` times, spans moved along."""
        places = np.flatnonzero(ids == self.image_token_id)
        if len(places) != 1:
            raise EncodeError(f"the dialogue holds {len(places)} image tokens where one image was given")
        place = int(places[0])
        grown = np.concatenate([ids[:place], np.full(image_tokens, self.image_token_id, np.int32), ids[place + 1:]])
        moved = spans.copy()
        moved[:, 1:] += (image_tokens - 1) * (spans[:, 1:] > place)
        return grown, moved

    def _with_system(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        if self.config.system_prompt and turns[0]["role"] != "system":
            return [{"role": "system", "text": self.config.system_prompt}, *turns]
        return turns

    def _messages(self, turns: list[dict[str, str]]) -> list[dict[str, Any]]:
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
            for token in self._specials:
                if token in turn["text"]:
                    raise EncodeError(f"turn {index}: the text contains the special token {token}; remove or rewrite it")

    @staticmethod
    def _expect_prefix(text: str, prefix: str, index: int) -> None:
        if not text.startswith(prefix):
            raise EncodeError(f"turn {index}: the chat template rewrites earlier turns, so turns cannot be masked; set model.chat_template")

    def _tokenise(self, text: str, spans: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], np.int32)
        starts = [start for start, _ in encoded["offset_mapping"]]
        ends = [end for _, end in encoded["offset_mapping"]]
        out = np.empty((len(spans), 3), np.int32)
        for row, (kind, begin, end) in enumerate(spans):
            first = int(np.searchsorted(ends, begin, side="right"))
            last = int(np.searchsorted(starts, end, side="left"))
            if first >= last or starts[first] < begin or ends[last - 1] > end:
                raise EncodeError(f"a turn's edge at character {begin} or {end} falls inside a token; set model.chat_template to one with special tokens between turns")
            if kind != QUESTION_PREFIX and int(ids[last - 1]) not in self.special_ids:
                raise EncodeError("the chat template ends a turn without an end token, so the model would not learn to stop; set model.chat_template (see configs/templates)")
            out[row] = (kind, first, last)
        return ids, out

    def _questioner_prefix(self) -> list[int]:
        mark = "QXQ"
        turns = [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "questioner", "text": mark}]
        before, through = self.render(turns[:2]), self.render(turns)
        if not through.startswith(before) or mark not in through[len(before):]:
            raise ConfigError(f"model.questioner_role: the chat template writes nothing usable for the role {self.config.questioner_role!r}")
        opened = through[: through.rindex(mark)].rstrip(" ")
        if opened == before.rstrip(" "):
            raise ConfigError(f"model.questioner_role: the chat template gives the role {self.config.questioner_role!r} no prefix; set model.chat_template")
        return self._ids(opened)[len(self._ids(before)):]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
