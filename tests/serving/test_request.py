"""What a chat request may say."""

import asyncio
import json
import tracemalloc

import pytest

from medray.config.serving import LimitsConfig
from medray.serving.chat.request import ApiError, check, parsed, prepared

LIMITS = LimitsConfig(messages=4, text_chars=100, tokens=50, samples=2, schema_bytes=300)
PICTURE = {"type": "image_url", "image_url": {"url": "data:picture"}}


def user(*content):
    return {
        "role": "user",
        "content": list(content) if content and not isinstance(content[0], str) else content[0],
    }


def text(words):
    return {"type": "text", "text": words}


def body(**fields):
    return json.dumps({"model": "tuned", "messages": [user("hi")], **fields}).encode()


def schema(**inside):
    return {"type": "json_schema", "json_schema": {"name": "one", "schema": inside}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
        ({"messages": [user({"type": "audio", "audio": "x"})]}, "messages.0.content.0", "invalid_value"),
        ({"messages": [user({"type": "text"})]}, "messages.0.content.0.text", "invalid_value"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": 5}})]},
            "messages.0.content.0.image_url.url",
            "invalid_value",
        ),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 1e999}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stop": [""]}, "stop.0", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs", "unsupported_parameter"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools", "unsupported_parameter"),
        ({"tools": [{}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"logit_bias": {"5": 0}}, "logit_bias", "unsupported_parameter"),
        ({"ignore_eos": False}, "ignore_eos", "unsupported_parameter"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages.0.content", "invalid_value"),
        (
            {"response_format": {"type": None, "json_schema": {"name": "a", "schema": {}}}},
            "response_format.type",
            "invalid_value",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": None}}},
            "response_format.json_schema.schema",
            "invalid_value",
        ),
        ({"structured_outputs": {"choice": [], "regex": "a"}}, "structured_outputs.choice", "invalid_value"),
        ({"structured_outputs": {"choice": ["yes", "no\n"]}}, "structured_outputs.choice", "invalid_value"),
        ({"structured_outputs": {"choice": ["a\0"]}}, "structured_outputs.choice", "invalid_value"),
        (
            {"stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "invalid_value",
        ),
        ({"priority": 1}, "priority", "unsupported_parameter"),
        ({"store": True}, "store", "invalid_value"),
        ({"structured_outputs": {"regex": "(a{999}){999}"}}, "structured_outputs.choice", "invalid_value"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "invalid_value"),
    ],
)
def test_what_is_not_of_the_form_is_named(fields, param, code):
    with pytest.raises(ApiError) as error:
        parsed(body(**fields), LIMITS)
    assert (error.value.status, error.value.param, error.value.code) == (400, param, code)
    assert error.value.message.startswith(param.split(".")[0])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "\\ud800',
        '{"model": 1}'.encode("utf-16"),
        b'{"\xed\xa0\x80": 1, "messages": []}',
    ],
)
def test_what_is_no_json(data):
    with pytest.raises(ApiError, match=r"not JSON|nested too deep") as error:
        parsed(data, LIMITS)
    assert error.value.code == "invalid_json"


def test_half_of_a_surrogate_pair_is_no_text_and_a_whole_one_is():
    for words in ("\ud83d", "a \udc00"):
        with pytest.raises(ApiError, match="surrogate"):
            parsed(body(messages=[user(words)]), LIMITS)
    assert parsed(body(messages=[user("\U0001f600")]), LIMITS).messages[0].content[0].text == "\U0001f600"


@pytest.mark.parametrize("data", [b"[]", b"null", b"7"])
def test_json_that_is_no_request(data):
    with pytest.raises(ApiError) as error:
        parsed(data, LIMITS)
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [user("a")] * 5}, "messages"),
        ({"messages": [user("a" * 101)]}, "messages"),
        ({"messages": [user(text("a" * 60), text("b" * 60))]}, "messages"),
        ({"messages": [user(*[text("")] * 102)]}, "messages"),  # a newline between each two
        ({"messages": [user(PICTURE, PICTURE, text("x"))]}, "messages"),
        ({"messages": [user(PICTURE), user(PICTURE)]}, "messages"),
        ({"messages": [{"role": "system", "content": [PICTURE]}, user("x")]}, "messages"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "messages"),
        ({"n": 3}, "n"),
        ({"max_tokens": 51}, "max_tokens"),
        ({"max_completion_tokens": 51}, "max_completion_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"choice": ["a"]}},
            "structured_outputs",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": schema(type="object", title="x" * 300)}, "response_format.json_schema"),
        ({"response_format": schema(type="string", pattern="(a{999}){999}")}, "response_format.json_schema"),
        (
            {"response_format": schema(type="array", items={"type": "string", "maxLength": 100_000})},
            "response_format.json_schema",
        ),
        ({"response_format": schema(maxLength=10**200)}, "response_format.json_schema"),
        ({"response_format": schema(type="string", minLength=-1)}, "response_format.json_schema"),
        (
            {"response_format": schema(type="array", items={"type": "object", "maxProperties": -1})},
            "response_format.json_schema",
        ),
        ({"response_format": schema(type="array", minItems=1.5)}, "response_format.json_schema"),
        ({"n": 2, "temperature": 0}, "n"),
        *[
            ({"response_format": schema(**inside)}, "response_format.json_schema")
            for inside in (
                {"$ref": "#"},
                {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
                {"properties": {"a": {"$ref": "#/properties/a"}}},
                {"anyOf": [{"$ref": "#/anyOf/0"}]},
                {"$defs": {"a/b": {"$ref": "#/%24defs/a~1b"}}},
            )
        ],
        ({"response_format": schema(maxLength=float("nan"))}, "response_format.json_schema"),
    ],
)
def test_what_passes_a_limit_is_named(fields, param):
    request = parsed(body(**fields), LIMITS)
    with pytest.raises(ApiError) as error:
        check(request, LIMITS)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b'{"messages":[' + b"0," * 2_000_000 + b"0]}", None),
        (
            b'{"messages":[{"role":"user","content":[' + b'{"type":"text","text":""},' * 200_000 + b"{}]}]}",
            None,
        ),
        (b"{" + b",".join(b'"f%d":0' % number for number in range(200_000)) + b"}", None),
        (b'{"messages":[' + b"0," * 10_100 + b"0]}", "messages"),
        (body(messages=[user(*[text("")] * 1001)]), "messages.0.content"),
        (body(stop=["x"] * 65), "stop"),
    ],
    ids=["messages", "parts", "fields", "fewer messages", "fewer parts", "stops"],
)
def test_a_body_of_very_many_things_costs_little(data, param):
    """What is refused for their number is refused once, not once for each."""
    tracemalloc.start()
    with pytest.raises(ApiError) as error:
        parsed(data, LIMITS)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (error.value.status, error.value.param) == (400, param)
    assert most < 4 * len(data) + 8 * 2**20


def test_a_count_too_large_for_a_float():
    with pytest.raises(ApiError, match="maxLength: at most 1000"):
        check(parsed(body(response_format=schema(maxLength=10**400)), LIMITS), LimitsConfig())


@pytest.mark.parametrize("nothing", [None, "", [], {}, {"a": None, "b": {"c": []}}])
@pytest.mark.parametrize(
    "field",
    [
        "tools",
        "tool_choice",
        "logit_bias",
        "functions",
        "response_format",
        "stop",
        "user",
        "metadata",
        "stream_options",
        "structured_outputs",
        "temperature",
        "seed",
        "n",
        "max_tokens",
        "a_field_of_next_year",
    ],
)
def test_fields_that_are_null_or_empty_are_ignored(field, nothing):
    request = parsed(body(**{field: nothing}), LIMITS)
    check(request, LIMITS)
    assert asyncio.run(prepared(request, LIMITS, "", None)) == {"model": "tuned", "messages": [user("hi")]}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"parallel_tool_calls": True, "tools": None},
        {"modalities": ["text"]},
        {"service_tier": "auto"},
        {"stream_options": {"include_usage": False}},
        {"stream_options": {"include_usage": None, "include_obfuscation": None}},
        {"logprobs": False, "top_logprobs": 0},
        {"response_format": {"type": "text", "json_schema": None}},
        {"structured_outputs": {"choice": None, "regex": None}},
        {"store": False},
    ],
)
def test_fields_that_ask_for_what_is_done_anyway_are_accepted(fields):
    request = parsed(body(**fields), LIMITS)
    check(request, LIMITS)
    assert (
        not {"stream_options", "tools", "tool_choice", "modalities", "service_tier"}
        & asyncio.run(prepared(request, LIMITS, "", None)).keys()
    )


def test_empty_fields_of_parts_are_ignored():
    picture = {
        "type": "image_url",
        "image_url": {"url": "data:picture", "detail": None, "format": ""},
        "text": None,
        "cache_control": {},
    }
    request = parsed(
        body(messages=[user(picture, text("") | {"image_url": None, "annotations": []})]), LIMITS
    )
    assert [type(part).__name__ for part in request.messages[0].content] == [
        "ImagePart",
        "TextPart",
    ] and request.messages[0].content[1].text == ""
    with pytest.raises(ApiError) as error:
        parsed(body(messages=[user(text("a") | {"cache_control": {"type": "ephemeral"}})]), LIMITS)
    assert error.value.param == "messages.0.content.0.cache_control"


def test_an_answer_may_come_back_with_its_empty_fields():
    """As vLLM gives it and the openai client keeps it; clients write such fields into messages of other
    roles too.
    """
    empty = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning": "",
        "reasoning_content": None,
        "name": None,
        "tool_call_id": "",
    }
    for before, sent in (
        ({}, {"role": "user", "content": "a"}),
        ({"role": "user", "content": "a"}, {"role": "assistant", "content": "It is round."}),
    ):
        messages = [*([before] if before else []), sent | empty, user("b") | empty]
        made = asyncio.run(prepared(parsed(body(messages=messages), LIMITS), LIMITS, "", None))
        assert made["messages"] == [*([before] if before else []), sent, user("b")]
    answer = {"role": "assistant", "content": "It is round."}
    for changes, param in (
        ({"tool_calls": [{}]}, "messages.0.tool_calls"),
        ({"audio": {"id": "a"}}, "messages.0.audio"),
        ({"content": None}, "messages.0.content"),
    ):
        with pytest.raises(ApiError) as error:
            parsed(body(messages=[answer | changes]), LIMITS)
        assert error.value.param == param


@pytest.mark.parametrize(
    ("inside", "word"),
    [
        ({"type": "string", "not": {"const": "a"}}, "not"),
        ({"type": "object", "if": {}, "then": {}}, "if, then"),
        ({"type": "string", "nullable": True}, "nullable"),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "allOf"),
        ({"anyOf": [{"type": "string"}], "type": "string"}, "type beside anyOf"),
        ({"$defs": {"a": {"type": "string"}}, "$ref": "#/$defs/a", "maxLength": 3}, "maxLength beside $ref"),
        ({"enum": ["a"], "maxLength": 3}, "maxLength beside enum"),
        ({"$ref": "http://x/y"}, "http://x/y"),
        ({"$ref": "#a"}, "#a"),
        ({"$ref": "#/$defs/a"}, "names nothing"),
        ({"$ref": "#/anyOf/" + "9" * 4400}, "names nothing"),
        ({"type": ["array", "null"], "uniqueItems": True}, "uniqueItems"),
        ({"type": ["string", "null"], "format": "nonsense"}, "nonsense"),
        ({"type": "string", "format": ["email"]}, "email"),
        ({"type": "string", "format": "email", "maxLength": 9}, "format"),
        ({"minLength": 3}, "type string"),
        ({"type": "string", "minimum": 3}, "type number or integer"),
        ({"type": "object", "required": ["z"]}, "'z'"),
        ({"type": "integer", "enum": ["a"]}, "type integer"),
        ({"type": "integer", "multipleOf": 2}, "multipleOf"),
        ({"type": "string", "pattern": "a"}, "pattern"),
        ({"type": "string", "x" * 500: 1}, "xxx…"),
        # no finite text
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no text fits"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no text fits"),
        (
            {
                "$defs": {
                    "a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]},
                    "b": {"type": "array", "prefixItems": [{"$ref": "#/$defs/a"}], "minItems": 1},
                },
                "$ref": "#/$defs/a",
            },
            "no text fits",
        ),
    ],
)
def test_what_a_grammar_would_not_keep_is_refused_by_name(inside, word):
    with pytest.raises(ApiError) as error:
        check(parsed(body(response_format=schema(**inside)), LIMITS), LimitsConfig())
    assert (
        error.value.status == 400
        and word.replace("'", '"') in error.value.message
        and len(error.value.message) < 250
    )


@pytest.mark.parametrize(
    "inside",
    [
        {"type": "string", "enum": ["a", "b"], "title": "Side", "default": "a"},
        {"type": ["integer", "null"], "minimum": 0},
        {"properties": {"not": {"type": "string"}}},
        {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        {"oneOf": [{"type": "string"}, {"type": "null"}], "discriminator": {"propertyName": "not"}},
        {"type": "array", "prefixItems": [{"type": "string"}], "items": False},
        {"const": {"not": 1}},
        {"enum": [{"$ref": "#"}]},
        {"allOf": [{"type": "string"}]},
        {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
            "required": ["next"],
        },
    ],
)
def test_what_a_grammar_keeps_is_allowed(inside):
    check(parsed(body(response_format=schema(**inside)), LIMITS), LIMITS)


def test_a_body_too_deep_says_so():
    with pytest.raises(ApiError, match="nested too deep"):
        parsed(b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", LIMITS)


@pytest.mark.parametrize(
    "inside",
    [
        {"type": "object", "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "string"}}, "$ref": "#/$defs/a"},
        {"type": "object", "properties": {"$ref": {"type": "string"}}},
    ],
)
def test_references_that_end_are_well(inside):
    check(parsed(body(response_format=schema(**inside)), LIMITS), LIMITS)


def test_a_schema_too_deep():
    deep = {"type": "object"}
    for _ in range(9):
        deep = {"type": "object", "properties": {"x": deep}}
    with pytest.raises(ApiError, match="nested"):
        check(parsed(body(response_format=schema(**deep)), LIMITS), LimitsConfig())


def test_all_that_is_allowed_goes_through():
    fields = {
        "n": 2,
        "seed": -5,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "repetition_penalty": 1.1,
        "stop": ["a", "b"],
        "logprobs": True,
        "top_logprobs": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": schema(type="object", properties={"pattern": {"type": "string", "maxLength": 20}}),
    }
    request = parsed(
        body(**fields, max_completion_tokens=9, user="u", metadata={"a": "b"}, store=False), LIMITS
    )
    check(request, LIMITS.model_copy(update={"schema_bytes": 10_000}))
    made = asyncio.run(prepared(request, LIMITS, "", None))
    assert made == {"model": "tuned", "messages": [user("hi")], "max_completion_tokens": 9, **fields}


def test_images_are_loaded_and_stand_before_their_text_as_in_tuning():
    async def load(url):
        return url + "!"

    request = parsed(body(messages=[user(text("What"), PICTURE, text("is it?"))], max_tokens=5), LIMITS)
    made = asyncio.run(prepared(request, LIMITS, "Be brief.", load))
    shown = {"type": "image_url", "image_url": {"url": "data:picture!"}}
    assert made["messages"] == [
        {"role": "system", "content": "Be brief."},
        user(shown, text("What"), text("is it?")),
    ]
    assert made["max_completion_tokens"] == 5 and "max_tokens" not in made


def test_a_system_message_of_the_caller_stands_alone():
    request = parsed(body(messages=[{"role": "developer", "content": "Mine."}, user("hi")]), LIMITS)
    made = asyncio.run(prepared(request, LIMITS, "Ours.", None))
    assert made["messages"] == [{"role": "system", "content": "Mine."}, user("hi")]


def test_a_bad_image_is_named_by_its_place():
    async def load(url):
        raise ApiError("no image")

    with pytest.raises(ApiError) as error:
        asyncio.run(
            prepared(parsed(body(messages=[user("a"), user(text("x"), PICTURE)]), LIMITS), LIMITS, "", load)
        )
    assert error.value.param == "messages.1.content.1.image_url.url"
