"""Errors of an engine in the endpoint's form, and schemas that it cannot follow. The engine itself:
test_app.py.
"""

import asyncio
import json
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError
from transformers import AutoTokenizer
from vllm.exceptions import GenerationError

from medray.models.bundled import model_path
from medray.serving.chat.engine_answers import checked
from medray.serving.chat.grammars import Grammars
from medray.serving.chat.request import ApiError

ROLE = (
    'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, '
    '"finish_reason": null}]}\n\n'
)
WORD = (
    'data: {"choices": [{"index": 0, "delta": {"content": "Round"}, "logprobs": null, "finish_reason": '
    "null}]}\n\n"
)
END = (
    'data: {"choices": [{"index": 0, "delta": {"content": ""}, "logprobs": null, "finish_reason": '
    '"stop"}]}\n\n'
)
DONE = "data: [DONE]\n\n"


def error_event(code=400, message="too long", param=None):
    return (
        "data: "
        + json.dumps({"error": {"message": message, "type": "BadRequestError", "param": param, "code": code}})
        + "\n\n"
    )


def read(*items):
    """(what is yielded, refused errors, the error that is raised)."""
    refused, seen = [], []

    async def source():
        for item in items:
            yield item

    async def reading():
        async for item in checked(source(), lambda error: refused.append(error) or "refused"):
            seen.append(item)

    try:
        asyncio.run(reading())
    except ApiError as error:
        return seen, refused, error
    return seen, refused, None


def test_a_stream_goes_through_whole_from_its_first_word():
    assert read(ROLE, WORD, END, DONE) == ([[ROLE, WORD], [END], [DONE]], [], None)
    assert read([ROLE], [WORD, END], [DONE]) == ([[ROLE, WORD, END], [DONE]], [], None)
    assert read([ROLE, END, DONE]) == ([[ROLE, END, DONE]], [], None), "no word at all"
    assert read(ROLE) == ([[ROLE]], [], None)
    answer = SimpleNamespace(choices=[])
    assert read(answer) == ([answer], [], None)


@pytest.mark.parametrize("before", [[], [ROLE], [ROLE, ROLE], [[ROLE]]])
@pytest.mark.parametrize("batched", [False, True])
def test_an_error_before_the_first_word_is_an_answer_of_its_own(before, batched):
    event = [error_event(), DONE] if batched else error_event()
    seen, refused, raised = read(*before, event, DONE)
    assert seen == ["refused"] and raised is None
    assert (refused[0].status, refused[0].param, refused[0].message) == (400, "messages", "too long")


def test_an_error_after_the_first_word_ends_the_stream():
    seen, refused, raised = read([ROLE, WORD], [END, error_event(500, "a 54 year old man")], [DONE])
    assert seen == [[ROLE, WORD], [END]] and not refused
    assert (raised.status, raised.code, raised.kind) == (
        500,
        "internal_error",
        "server_error",
    ) and "54" not in raised.message


@pytest.mark.parametrize(
    ("param", "named"), [(None, "messages"), ("input_tokens", "messages"), ("temperature", "temperature")]
)
def test_the_field_is_named(param, named):
    error = SimpleNamespace(
        error=SimpleNamespace(message="no", code=400, param=param, type="BadRequestError")
    )
    assert (
        read(error)[1][0].param
        == read([error])[1][0].param
        == read(error_event(param=param))[1][0].param
        == named
    )


def test_errors_of_a_replica_are_told_from_the_loss_of_one():
    """Every RayTaskError is a RayError, but says that the replica's code raised."""
    from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
    from ray.serve.llm.openai_api_models import ChatCompletionRequest

    from medray.serving.chat.app import to_api_error

    def of_task(cause):
        return RayTaskError("chat", "a traceback", cause).as_instanceof_cause()

    def said(error):
        told = to_api_error(error, "r1")
        return told.status, told.param, told.code

    assert said(RayActorError()) == said(of_task(RayActorError())) == (503, None, "overloaded")
    assert (
        said(of_task(GenerationError("Internal server error")))
        == said(of_task(KeyError("x")))
        == said(KeyError("x"))
        == (500, None, "internal_error")
    )
    assert said(of_task(ApiError("no", 400, "stop", "invalid_value"))) == (400, "stop", "invalid_value")
    assert said(OpenAIHTTPException(400, "no", "invalid_request_error/messages")) == (
        400,
        "messages",
        "invalid_request",
    )
    assert said(OpenAIHTTPException(500, "a 54 year old man", "InternalServerError")) == (
        500,
        None,
        "internal_error",
    )
    with pytest.raises(ValueError) as error:
        ChatCompletionRequest.model_validate({"model": "m", "messages": [], "temperature": "hot"})
    assert said(error.value) == (400, "temperature", "invalid_value")


@pytest.fixture(scope="module")
def grammars():
    tokenizer = AutoTokenizer.from_pretrained(model_path("generalist"))
    return Grammars(tokenizer, len(tokenizer))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": -1},
        {"$ref": "#"},
        {"anyOf": [{"$ref": "#"}]},
        {"$ref": "#/nowhere"},
        {"$ref": 5},
        {"enum": []},
        {"properties": 5},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "integer", "minimum": 1e300},
        {"type": "string", "pattern": 5},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "object", "minProperties": 3, "maxProperties": 1},
        {"enum": [float("nan")]},
        {"type": "string", "maxLength": "3"},
        {"type": ["string"], "format": []},
        {"type": "string", "format": []},
        {"type": "number", "multipleOf": 2},
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        {"type": "string", "format": "nonsense"},
    ],
)
def test_schemas_that_no_answer_can_follow_are_refused(grammars, schema):
    for _ in range(2):  # from memory too
        problem = asyncio.run(grammars.problem(schema))
        assert (
            problem.startswith(("the schema cannot be compiled", "the schema uses a keyword", "no text fits"))
            and "/project" not in problem
            and "\n" not in problem
        )


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "object", "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {
            "$defs": {"Side": {"enum": ["left", "right"]}},
            "type": "object",
            "properties": {"side": {"$ref": "#/$defs/Side"}},
            "required": ["side"],
            "additionalProperties": False,
        },
    ],
)
def test_schemas_that_answers_can_follow_are_not(grammars, schema):
    assert asyncio.run(grammars.problem(schema)) is None


def test_a_schema_that_takes_very_long_is_given_up():
    """While another one, asked at the same time, is answered."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("generalist"))
    grammars = Grammars(tokenizer, len(tokenizer), seconds=0.2)
    # over a second of a free core
    long = {"anyOf": [{"type": "string", "minLength": number, "maxLength": 1000} for number in range(60)]}

    async def both():
        return await asyncio.gather(grammars.problem(long), grammars.problem({"type": "boolean"}))

    slow, quick = asyncio.run(both())
    assert "more than 0.2 seconds" in slow and quick is None
    # more than there are compilers: none of them is lost to a schema that takes very long
    for number in range(3):
        assert "more than 0.2 seconds" in asyncio.run(grammars.problem({**long, "title": str(number)}))
    assert asyncio.run(grammars.problem({"type": "null"})) is None


def test_a_tokenizer_that_xgrammar_cannot_use_ends_no_replica():
    assert "tokenizer" in asyncio.run(Grammars(object(), 100).problem({"type": "boolean"}))
