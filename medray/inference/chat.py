"""Turns to prompt token ids for generation: the same rendering and the same edges as training's
(medray.data.chat_spans).
"""

from __future__ import annotations

from typing import Any

from medray.config import ModelConfig
from medray.data.chat_spans import Dialogues, EncodeError, image_token_of, special_tokens

Turn = dict[str, str]  # {"role": system | user | assistant | questioner, "text": ...}
_MARK = "QXQ"


def special_texts(processor: Any) -> tuple[str, ...]:
    """The spellings of a model's special tokens, its image token among them."""
    return tuple(
        token for token in {*special_tokens(processor.tokenizer), image_token_of(processor)} if token
    )


def spells_special(text: str, specials: tuple[str, ...]) -> bool:
    """Whether a text holds one of the spellings, and a template would make the token of it."""
    return any(token in text for token in specials)


class Chat:
    """A model's template and tokenizer. The first user turn of a dialogue carries the image.

    Args:
        model_dir: folder in Hugging Face format.
        config: chat_template, questioner_role and system_prompt are used.

    Raises ConfigError where the model has no chat template.
    """

    def __init__(self, model_dir: str, config: ModelConfig):
        from medray.models.vlm import load_processor

        self.config = config
        processor = load_processor(model_dir, config.trust_remote_code)
        self.dialogues = Dialogues(processor, config)
        self.tokenizer: Any = processor.tokenizer
        self.specials = special_texts(processor)

    def prompt_ids(self, turns: list[Turn], role: str = "assistant") -> list[int]:
        """Ids up to where `role` (assistant or questioner) begins to write; one image token, not expanded."""
        return self.tokenize(self.prompt_text(turns, role))

    def prompt_text(self, turns: list[Turn], role: str = "assistant") -> str:
        """Raises EncodeError for a turn whose text spells a special token."""
        for index, turn in enumerate(turns):
            if self.has_special_text(turn["text"]):
                raise EncodeError(
                    f"turn {index}: the text contains a special token of the model; remove or rewrite it"
                )
        turns = self._with_system(turns)
        if role == "assistant":
            opened = self.dialogues.render(turns, opening=True)
        else:
            opened = self.dialogues.render([*turns, {"role": role, "text": _MARK}]).rpartition(_MARK)[0]
        # Templates that write "ROLE: text" tokenise the blank with the text that follows it.
        return opened.rstrip(" ")

    def answer_ids(self, turns: list[Turn], answer: str) -> tuple[list[int], list[int]]:
        """(prompt ids, answer ids) of a given answer; the answer's ids end with the end-of-turn token.

        Raises EncodeError where the answer's edges cannot be told.
        """
        ids, spans = self.dialogues.encode([*self._with_system(turns), {"role": "assistant", "text": answer}])
        _, start, end = spans[-1].tolist()
        return ids[:start].tolist(), ids[start:end].tolist()

    def tokenize(self, text: str) -> list[int]:
        """Ids of rendered text; the template has written every special token itself."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def has_special_text(self, text: str) -> bool:
        """Whether a text spells out a special token, and would become one when rendered into a prompt."""
        return spells_special(text, self.specials)

    def without_special_text(self, text: str) -> str:
        # Removing one token may join the halves of another.
        while self.has_special_text(text):
            for token in self.specials:
                text = text.replace(token, "")
        return text

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        system = self.config.system_prompt
        return [{"role": "system", "text": system}, *turns] if system else turns
