"""The endpoint's routes around an answer that is made here: keys, limits, errors, ids. The real engines:
test_app.py.
"""

import asyncio
import base64
import io
import json
import logging

import httpx
import openai
import pytest
from PIL import Image
from starlette.responses import JSONResponse, StreamingResponse

from medray.config import EngineConfig
from medray.config.serving import LimitsConfig, ServeConfig
from medray.models.published import NOT_A_DEVICE
from medray.serving.chat.asgi_app import Endpoint, make_app
from medray.serving.chat.rate_limit import RateLimit
from medray.serving.chat.request import ApiError
from medray.serving.chat.served_models import Hosted
from medray.serving.tokens import Holder, Tokens, digest_of

SECRET = "a 54 year old man called Doe"
MODELS = [
    Hosted(
        name="tuned",
        path="x",
        precision="fp32",
        system_prompt="Be brief.",
        engine=EngineConfig(),
        about="run one",
    ),
    Hosted(name="base", path="y", pad_to_square=False, engine=EngineConfig()),
]
KEYS = Tokens({digest_of("key"): Holder("viewer"), digest_of("other"): Holder("lab")})


def picture(side=(8, 4)):
    out = io.BytesIO()
    Image.new("RGB", side, (9, 200, 9)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def size_of(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size


def chat(model="tuned", words="hi", image=None, **fields):
    content = [
        {"type": "text", "text": words},
        *([{"type": "image_url", "image_url": {"url": image}}] if image else []),
    ]
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


@pytest.fixture
def endpoint():
    """Makes a client; the checked requests come to `client.asked`."""
    clients = []

    def make(answer=None, ready=None, keys=KEYS, looked=None, **config):
        asked, observed = [], []

        async def echo(body, number):
            asked.append((body, number))
            return answer() if answer else JSONResponse({"id": number, "choices": []})

        async def states():
            return await looked() if looked else ready or {"tuned": True, "base": True}

        made = ServeConfig(run="r", limits=LimitsConfig(**config.pop("limits", {})), **config)
        one = Endpoint(
            made,
            MODELS,
            echo,
            states,
            lambda *what: observed.append(what),
            [{"question": "q", "reference": "r", "image": "data:"}],
        )
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(one, keys)),
            base_url="http://here",
            headers={"Authorization": "Bearer key"},
        )
        client.asked, client.observed = asked, observed
        clients.append(client)
        return client

    return make


def send(client, method, path, **options):
    return asyncio.run(client.request(method, path, **options))


def ask(client, **options):
    return send(client, "POST", "/v1/chat/completions", **options)


def error_of(answer):
    """The error's fields, of a body that is OpenAI's error and nothing more."""
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }
    return answer.json()["error"]


def test_a_request_reaches_its_model_checked(endpoint):
    client = endpoint()
    answer = ask(client, json=chat(image=picture(), max_tokens=5), headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == 200 and answer.headers["X-Request-ID"] == "mine-1"
    body, number = client.asked[0]
    assert number == "mine-1" and body["model"] == "tuned" and body["max_completion_tokens"] == 5
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    shown, text = body["messages"][1]["content"]
    assert size_of(shown["image_url"]["url"]) == (8, 8) and text == {"type": "text", "text": "hi"}
    ask(client, json=chat("base", image=picture()))
    # neither padded nor given a system prompt
    assert size_of(client.asked[1][0]["messages"][0]["content"][0]["image_url"]["url"]) == (8, 4)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tuned"),
        ("GET", "/try"),
        ("GET", "/v1/none"),
        ("GET", "/metrics"),
    ],
)
def test_no_key_no_answer(endpoint, method, path):
    client = endpoint()
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic key"}):
        answer = send(client, method, path, headers=headers)
        assert answer.status_code == 401 and error_of(answer)["type"] == "invalid_api_key"
    assert not client.asked


def test_what_needs_no_key(endpoint):
    client = endpoint()
    for path in ("/", "/health", "/ready", "/static/try.js", "/static/try.css"):
        assert send(client, "GET", path, headers={"Authorization": ""}).status_code == 200, path
    assert NOT_A_DEVICE in send(client, "GET", "/").text, "to be read before a key is asked for"
    assert (
        "no-store" in send(client, "GET", "/").headers["Cache-Control"]
        and "script-src 'self'" in send(client, "GET", "/").headers["Content-Security-Policy"]
    )


def test_an_open_endpoint_asks_for_no_key(endpoint):
    client = endpoint(keys=None, open=True)
    assert ask(client, json=chat(), headers={"Authorization": ""}).status_code == 200
    assert [
        model["id"]
        for model in send(client, "GET", "/v1/models", headers={"Authorization": ""}).json()["data"]
    ] == ["tuned", "base"]


def test_models(endpoint):
    client = endpoint()
    listed = send(client, "GET", "/v1/models").json()
    assert listed["object"] == "list" and listed["data"][0] == send(client, "GET", "/v1/models/tuned").json()
    assert {"id": "tuned", "object": "model", "owned_by": "medray", "about": "run one"}.items() <= listed[
        "data"
    ][0].items()
    missing = send(client, "GET", "/v1/models/none")
    assert missing.status_code == 404 and error_of(missing)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("request_body", "status", "param", "code"),
    [
        (b"{", 400, None, "invalid_json"),
        (chat("none"), 404, "model", "model_not_found"),
        (chat(None), 404, "model", "model_not_found"),
        (chat(n=99), 400, "n", "limit_exceeded"),
        (
            chat(image="http://169.254.169.254/latest"),
            400,
            "messages.0.content.1.image_url.url",
            "invalid_image_url",
        ),
        (chat(image="file:///etc/passwd"), 400, "messages.0.content.1.image_url.url", "invalid_image_url"),
        (chat(image=picture()[:82]), 400, "messages.0.content.1.image_url.url", "invalid_image"),
        (chat(chat_template="x"), 400, "chat_template", "unsupported_parameter"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(endpoint, request_body, status, param, code):
    client = endpoint()
    answer = ask(
        client, **({"content": request_body} if isinstance(request_body, bytes) else {"json": request_body})
    )
    assert answer.status_code == status and (error_of(answer)["param"], error_of(answer)["code"]) == (
        param,
        code,
    )
    assert not client.asked and client.observed[0][1] == status


def test_other_paths_and_methods(endpoint):
    client = endpoint()
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/static/../endpoint.py", 404),
        ("DELETE", "/v1/models/tuned", 405),
    ):
        answer = send(client, method, path)
        assert answer.status_code == status and error_of(answer)["type"] == "invalid_request_error", path


def test_a_body_over_the_limit(endpoint):
    answer = ask(endpoint(limits={"body_bytes": 300}), json=chat(words="x" * 300))
    assert answer.status_code == 413 and error_of(answer)["type"] == "request_too_large"


def test_errors_of_the_answer_are_passed_on(endpoint):
    def busy():
        error = ApiError("later", 503, None, "overloaded", "overloaded_error")
        error.headers["Retry-After"] = "2"
        raise error

    answer = ask(endpoint(busy), json=chat())
    assert (
        answer.status_code == 503
        and answer.headers["Retry-After"] == "2"
        and error_of(answer)["code"] == "overloaded"
    )


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_on_tokens_is_named_as_the_caller_wrote_it(endpoint, name):
    def refuse():
        raise ApiError("too long", 400, "max_completion_tokens")

    assert error_of(ask(endpoint(refuse), json=chat(**{name: 5})))["param"] == name


def test_each_key_has_its_own_rate(endpoint):
    client = endpoint(limits={"requests_per_minute": 2})

    async def several():
        return [
            await client.post("/v1/chat/completions", json=chat(), headers={"Authorization": f"Bearer {key}"})
            for key in ("key", "key", "key", "other")
        ]

    answers = asyncio.run(several())
    assert [answer.status_code for answer in answers] == [200, 200, 429, 200]
    assert (
        int(answers[2].headers["Retry-After"]) >= 1 and error_of(answers[2])["code"] == "rate_limit_exceeded"
    )


def test_buckets_refill_evenly():
    now = [0.0]
    limit = RateLimit(60, lambda: now[0])
    assert [limit.wait("a") for _ in range(60)] == [0.0] * 60
    assert limit.wait("a") == pytest.approx(1.0) and limit.wait("b") == 0.0
    now[0] = 0.25
    assert limit.wait("a") == pytest.approx(0.75)
    now[0] = 1.0
    assert limit.wait("a") == 0.0 and limit.wait("a") > 0
    now[0] = 1000.0
    assert [limit.wait("a") for _ in range(61)].count(0.0) == 60


def test_a_slow_answer_is_given_up(endpoint):
    class Slow(StreamingResponse):
        pass

    async def words():
        yield "data: {}\n\n"
        await asyncio.sleep(30)

    streamed = ask(
        endpoint(lambda: Slow(words(), media_type="text/event-stream"), limits={"seconds": 5}),
        json=chat(stream=True),
    )
    events = streamed.text.split("\n\n")
    assert (
        events[0] == "data: {}"
        and json.loads(events[1].removeprefix("data: "))["error"]["code"] == "timeout"
        and events[2] == "data: [DONE]"
    )


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ApiError("lost", 503, None, "overloaded", "overloaded_error"), 503, "overloaded"),
        (RuntimeError(SECRET), 500, "internal_error"),
    ],
)
def test_a_stream_that_breaks_off_says_so(endpoint, error, status, code):
    async def words():
        yield 'data: {"a": 1}\n\n'
        raise error

    client = endpoint(lambda: StreamingResponse(words(), media_type="text/event-stream"))
    streamed = ask(client, json=chat(stream=True))
    events = streamed.text.split("\n\n")
    told = json.loads(events[1].removeprefix("data: "))
    assert (
        streamed.status_code == 200 and events[0] == 'data: {"a": 1}' and events[2:] == ["data: [DONE]", ""]
    )
    assert (
        set(told["error"]) == {"message", "type", "param", "code"}
        and told["error"]["code"] == code
        and SECRET not in streamed.text
    )
    assert [observed[:2] for observed in client.observed] == [("tuned", status)]  # once, as it ended


def test_a_whole_stream_is_counted_once(endpoint):
    async def words():
        yield "data: [DONE]\n\n"

    client = endpoint(lambda: StreamingResponse(words(), media_type="text/event-stream"))
    assert ask(client, json=chat(stream=True)).text == "data: [DONE]\n\n" and [
        observed[:2] for observed in client.observed
    ] == [("tuned", 200)]


def test_the_openai_client_sends_its_answers_back(endpoint):
    message = {
        "role": "assistant",
        "content": "Round.",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    answer = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "tuned",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    http = endpoint(lambda: JSONResponse(answer))

    async def two_turns():
        async with openai.AsyncOpenAI(
            base_url="http://here/v1", api_key="key", http_client=http, max_retries=0
        ) as client:
            messages = [{"role": "user", "content": "What shape?"}]
            messages.append(
                (await client.chat.completions.create(model="tuned", messages=messages)).choices[0].message
            )
            messages.append({"role": "user", "content": "Sure?"})
            await client.chat.completions.create(model="tuned", messages=messages)

    asyncio.run(two_turns())
    assert http.asked[1][0]["messages"][1:] == [
        {"role": "user", "content": "What shape?"},
        {"role": "assistant", "content": "Round."},
        {"role": "user", "content": "Sure?"},
    ]


def test_errors_that_nobody_foresaw(endpoint, caplog, monkeypatch):
    for name, value in (("handlers", [caplog.handler]), ("propagate", False)):
        monkeypatch.setattr(logging.getLogger("ray.serve"), name, value)

    def broken():
        raise KeyError(SECRET)

    def not_ready():
        raise KeyError(SECRET)

    client = endpoint(broken, looked=not_ready)
    for answer in (
        ask(client, json=chat(), headers={"X-Request-ID": "r1"}),
        send(client, "GET", "/ready", headers={"X-Request-ID": "r1"}),
    ):
        assert (
            answer.status_code == 500
            and answer.headers["X-Request-ID"] == "r1"
            and "r1" in error_of(answer)["message"]
        )
        assert (error_of(answer)["type"], error_of(answer)["code"]) == ("server_error", "internal_error")
    assert [observed[:2] for observed in client.observed] == [("tuned", 500), ("", 500)]
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert (
        len(told) == 2
        and all(
            line.startswith("r1 failed: KeyError at ") and "serving/test_chat_app.py:" in line
            for line in told
        )
        and SECRET not in caplog.text
    )


def test_every_answer_has_an_id(endpoint):
    client = endpoint(limits={"body_bytes": 300})
    for method, path, options, status in (
        ("GET", "/v1/models", {}, 200),
        ("GET", "/health", {}, 200),
        ("GET", "/v1/none", {}, 404),
        ("GET", "/v1/models", {"headers": {"Authorization": ""}}, 401),
        ("POST", "/", {}, 405),
        ("POST", "/v1/chat/completions", {"content": "x" * 301}, 413),
        ("POST", "/v1/chat/completions", {"content": "x"}, 400),
    ):
        answer = send(client, method, path, **options)
        assert answer.status_code == status and len(answer.headers["X-Request-ID"]) == 32, path


def test_a_body_that_stalls(endpoint):
    async def pieces():
        yield b"{"
        await asyncio.sleep(30)

    answer = ask(endpoint(limits={"seconds": 0.2}), content=pieces())
    assert answer.status_code == 408 and error_of(answer)["code"] == "timeout"


def test_an_answer_that_does_not_come_is_408(endpoint):
    client = endpoint(limits={"seconds": 0.2})

    async def never(body, number):
        await asyncio.sleep(30)

    client._transport.app.app.routes[0].endpoint.__self__.answer = never
    answer = ask(client, json=chat())
    assert answer.status_code == 408 and error_of(answer)["code"] == "timeout"


def test_logs_tell_who_and_how_long_and_nothing_of_what(endpoint, caplog, monkeypatch):
    client = endpoint()
    # else not seen where an earlier test has started Ray, which keeps its own logs
    for name, value in (("handlers", [caplog.handler]), ("propagate", False), ("disabled", False)):
        monkeypatch.setattr(logging.getLogger("ray.serve"), name, value)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, logger="ray.serve"):
        ask(client, json=chat(words=SECRET, image=picture()), headers={"X-Request-ID": "r1"})
        ask(client, json=chat("none", words=SECRET))
        ask(
            client,
            json=chat(words=SECRET, image="data:image/png;base64,AAAA"),
            headers={"X-Request-ID": "bad\nid"},
        )
    told = [record.getMessage() for record in caplog.records if record.name == "ray.serve"]
    assert (
        told[0].startswith("r1 key viewer model tuned: 200 in ")
        and ": 404 in" in told[1]
        and ": 400 in" in told[2]
        and "bad" not in told[2]
    )
    everything = caplog.text + " ".join(map(str, client.observed))
    assert SECRET not in everything and "base64" not in everything and "Bearer" not in everything
    assert client.observed[0][:2] == ("tuned", 200) and client.observed[1][:2] == ("", 404)


def test_ready_only_when_every_model_is(endpoint):
    assert send(endpoint(), "GET", "/ready").json() == {
        "ready": True,
        "models": {"tuned": True, "base": True},
    }
    answer = send(endpoint(ready={"tuned": True, "base": False}), "GET", "/ready")
    assert answer.status_code == 503 and answer.json()["models"] == {"tuned": True, "base": False}
    for some in ({"tuned": True}, {"other": True}):  # of which the controller says nothing
        answer = send(endpoint(ready=some), "GET", "/ready")
        assert answer.status_code == 503 and answer.json() == {
            "ready": False,
            "models": {"tuned": "tuned" in some, "base": False},
        }


def test_ready_is_looked_up_once_for_many_and_again_after_a_second(endpoint):
    looks = []

    async def looked():
        looks.append(1)
        await asyncio.sleep(0.05)
        return {"tuned": True, "base": len(looks) == 1}

    async def several():
        client = endpoint(looked=looked)
        first = await asyncio.gather(*(client.get("/ready") for _ in range(20)))
        await asyncio.sleep(1)
        return [answer.status_code for answer in (*first, await client.get("/ready"))]

    assert asyncio.run(several()) == [200] * 20 + [503] and len(looks) == 2


def test_a_controller_that_does_not_answer_is_not_ready(endpoint, monkeypatch):
    monkeypatch.setattr("medray.serving.chat.asgi_app.READY_SECONDS", 0.1)
    answer = send(endpoint(looked=lambda: asyncio.sleep(30)), "GET", "/ready")
    assert answer.status_code == 503 and answer.json() == {
        "ready": False,
        "models": {"tuned": False, "base": False},
    }


def test_what_the_page_is_told(endpoint):
    told = send(endpoint(title="Smears"), "GET", "/try").json()
    assert told["title"] == "Smears" and "not a medical device" in told["notice"].lower()
    assert [model["id"] for model in told["models"]] == ["tuned", "base"] and told["examples"][0][
        "question"
    ] == "q"
