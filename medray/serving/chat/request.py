"""What a chat request may say. Everything else is refused before a model sees it (pure but for the images'
loader).

The fields are OpenAI's, and top_k, min_p and repetition_penalty of vLLM. Fields that vLLM knows beyond these
are refused: some run a template of the caller's, some hand options to processors. A field that is null or
empty asks for nothing and is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medray.config.serving import LimitsConfig
from medray.serving.chat.schemas import PARAM as SCHEMA
from medray.serving.chat.schemas import SchemaError, check_schema

ANSWER_TOKENS = "max_completion_tokens"
# Beyond any limit that can be configured with sense, and checked while the body is read: each item in vain
# costs a kilobyte, and an error.
_MOST_MESSAGES, _MOST_PARTS, _MOST_STOPS = 10_000, 1000, 64
_FIELDS = 10_000  # commas of a body outside its texts and its schema
_NOT_IN_CHOICES = frozenset("\n\r\0")


class ApiError(Exception):
    """A request that is answered with an error in OpenAI's form.

    Args:
        status: 4xx.
        param: the field at fault, such as messages.0.content.
        code: short and stable, for programs.
        retry_after: seconds after which the request may come again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str = "invalid_request",
        kind: str = "invalid_request_error",
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.kind = message, status, param, code, kind
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}


def _is_empty(value: Any) -> bool:
    """Whether a field asks for nothing: null, "", [], {}, or an object with no other values. Not false
    and 0, which are values.
    """
    return (
        value is None
        or value in ("", [])
        or (isinstance(value, dict) and all(map(_is_empty, value.values())))
    )


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _ignore_empty_fields(cls, given: Any) -> Any:
        """Many clients write every field that they know, and send an answer back as the next turn with
        all of its fields.
        """
        if not isinstance(given, dict):
            return given
        required = {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}
        return {key: value for key, value in given.items() if key in required or not _is_empty(value)}


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(
        max_length=_MOST_PARTS
    )
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _one_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False  # OpenAI's random padding, which is not added here


class JsonSchema(_Part):
    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Part):
    """vLLM's: one of these texts is the answer."""

    choice: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(min_length=1, max_length=100)

    @field_validator("choice")
    @classmethod
    def _on_one_line(cls, choices: list[str]) -> list[str]:
        for index, choice in enumerate(choices):
            # vLLM 0.29 writes choices into a grammar as they are, where a line ends a rule.
            if not _NOT_IN_CHOICES.isdisjoint(choice):
                raise ValueError(f"choice {index} has a line break or a NUL character; leave it out")
        return choices


class ChatRequest(_Part):
    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=_MOST_STOPS)]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # What OpenAI's service keeps; nothing is kept here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @model_validator(mode="before")
    @classmethod
    def _ignore_defaults(cls, given: Any) -> Any:
        """What asks for nothing but what is done anyway is no error: no tools are used, and answers are
        text.
        """
        if not isinstance(given, dict):
            return given
        return {
            key: value
            for key, value in given.items()
            if not any(value is known or value == known for known in _DONE_ANYWAY.get(key, ()))
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop


_DROPPED = {"user", "metadata", "store"}
_DONE_ANYWAY: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}


def parsed(body: bytes, limits: LimitsConfig) -> ChatRequest:
    """The request in a body. Raises ApiError (400) that names the field."""
    # Before it is read: in memory a number of one digit takes fifteen times its two bytes, and an error of
    # its own. Commas of texts are within their limits.
    if body.count(b",") > limits.text_chars + limits.schema_bytes + _FIELDS:
        raise ApiError(
            f"the body has more than {limits.text_chars + limits.schema_bytes + _FIELDS} commas, more than "
            "its texts and fields can have",
            code="limit_exceeded",
        )
    try:
        value = json.loads(body.decode())  # of bytes it would also read UTF-16, and surrogates
        if b"\\ud" in body.lower():
            # JSON can write half a surrogate pair, which no tokenizer can read.
            json.dumps(value, ensure_ascii=False).encode()
        return ChatRequest.model_validate(value)
    except UnicodeEncodeError:
        raise ApiError("the body has half a surrogate pair", code="invalid_json") from None
    except (ValueError, RecursionError) as error:  # ValidationError is a ValueError
        if isinstance(error, ValidationError):
            raise _named(error) from None
        said = "the body is nested too deep" if isinstance(error, RecursionError) else "the body is not JSON"
        raise ApiError(said, code="invalid_json") from None


def _named(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    place = list(first["loc"])
    if place[2:3] == ["content"]:
        del place[4:5]  # the part's type, which pydantic puts after its index
    param = ".".join(str(part) if len(str(part)) <= 64 else f"{str(part)[:64]}…" for part in place) or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            f"{param} is not supported here; leave it out", param=param, code="unsupported_parameter"
        )
    return ApiError(f"{param}: {first['msg']}" if param else first["msg"], param=param, code="invalid_value")


def check(request: ChatRequest, limits: LimitsConfig) -> None:
    """Raises ApiError (400) where a limit is passed or fields do not go together."""
    texts = [
        "\n".join(part.text for part in message.content if isinstance(part, TextPart))
        for message in request.messages
    ]
    images = sum(isinstance(part, ImagePart) for message in request.messages for part in message.content)
    for what, found, most, param in (
        ("messages", len(request.messages), limits.messages, "messages"),
        ("characters", sum(map(len, texts)), limits.text_chars, "messages"),
        ("images", images, limits.images, "messages"),
        ("answers", request.n or 1, limits.samples, "n"),
        (
            "tokens",
            request.max_completion_tokens or request.max_tokens or 1,
            limits.tokens,
            "max_completion_tokens" if request.max_completion_tokens else "max_tokens",
        ),
        ("stop texts", len(request.stop or ()), 16, "stop"),
    ):
        if found > most:
            raise ApiError(
                f"{param}: {found} {what}, at most {most} are allowed", param=param, code="limit_exceeded"
            )
    if any(
        isinstance(part, ImagePart)
        for message in request.messages
        for part in message.content
        if message.role != "user"
    ):
        raise ApiError("messages: images belong into user messages", param="messages", code="invalid_value")
    if request.messages[-1].role != "user":
        raise ApiError("messages: the last one must be the user's", param="messages", code="invalid_value")
    if request.top_logprobs and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if (request.n or 1) > 1 and request.temperature == 0:
        raise ApiError(
            f"n: {request.n} answers at temperature 0 would all be the same; ask for one, or raise "
            "temperature",
            param="n",
            code="invalid_value",
        )
    if request.stream_options and request.stream_options.include_usage and not request.stream:
        raise ApiError("stream_options needs stream: true", param="stream_options", code="invalid_value")
    if (request.response_format and request.response_format.type != "text") and request.structured_outputs:
        raise ApiError(
            "structured_outputs and response_format exclude each other",
            param="structured_outputs",
            code="invalid_value",
        )
    if request.response_format:
        _check_format(request.response_format, limits)


def _check_format(form: ResponseFormat, limits: LimitsConfig) -> None:
    if (form.type == "json_schema") != (form.json_schema is not None):
        raise ApiError(f"{SCHEMA} belongs to type json_schema", param=SCHEMA, code="invalid_value")
    if form.json_schema is None:
        return
    try:
        check_schema(form.json_schema.schema_, limits)
    except SchemaError as error:
        raise ApiError(f"{SCHEMA}: {error}", param=SCHEMA, code=error.code) from None


async def prepared(
    request: ChatRequest, limits: LimitsConfig, system_prompt: str, load: Callable[[str], Awaitable[str]]
) -> dict[str, Any]:
    """The request as a model's engine gets it: checked images, in front of the text they came with, as in
    tuning.

    Args:
        system_prompt: of conversations that bring none; empty for none.
        load: URL of an image -> data URI of an image that was decoded and encoded here. Raises ApiError.
    """
    messages = []
    for index, message in enumerate(request.messages):
        pictures, texts = [], []
        for place, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                try:
                    pictures.append(
                        {"type": "image_url", "image_url": {"url": await load(part.image_url.url)}}
                    )
                except ApiError as error:
                    error.param = f"messages.{index}.content.{place}.image_url.url"
                    raise
            else:
                texts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        messages.append(
            {
                "role": role,
                "content": [*pictures, *texts] if pictures else "\n".join(text["text"] for text in texts),
            }
        )
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    dropped = {
        "messages",
        "max_tokens",
        "max_completion_tokens",
        *_DROPPED,
        *(() if request.stream else ("stream_options",)),
    }
    body = request.model_dump(exclude_none=True, by_alias=True, exclude=dropped)
    if "stream_options" in body:
        body["stream_options"].pop("include_obfuscation")
    most = request.max_completion_tokens or request.max_tokens
    return {**body, "messages": messages, **({} if most is None else {"max_completion_tokens": most})}
