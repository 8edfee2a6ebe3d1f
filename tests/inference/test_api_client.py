"""The endpoint client against a real HTTP server: which rows are set aside, when the stage stops, and
what the next start asks.
"""

import json

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from medray.config import (
    ClusterConfig,
    DataConfig,
    EndpointConfig,
    EngineConfig,
    EvaluateJobConfig,
    load_config,
)
from medray.errors import ConfigError, StageError
from medray.evaluation.predict import ApiPredict
from medray.inference.api_client import Endpoint, EndpointDown
from medray.inference.completions import Usage, read_reply, request_body, retry_after
from medray.records import BENCHMARK_QUESTION
from medray.running.actor_pools import client_options
from medray.running.ray_session import ray_session
from medray.storage.resumable import write_resumable
from tests.support.peer import Peer

UNSUPPORTED = {
    "error": {
        "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "unsupported_parameter",
    }
}


def completion(content="Yes", finish="stop", **message):
    return {
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {"completion_tokens": 3},
    }


def questions(png, count, start=0):
    rows = [
        {
            "sample_id": f"q{number}",
            "image_id": f"i{number}",
            "image": png(0),
            "question": f"Is there a mass? {number}",
            "reference": "yes",
            "answer_type": "closed",
            "key": f"q{number}",
        }
        for number in range(start, start + count)
    ]
    return pa.Table.from_pylist(rows, schema=BENCHMARK_QUESTION)


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(Endpoint, "backoff_seconds", 0.01)

    def make(peer, **settings):
        settings = {"retries": 0, "concurrency": 1, **settings}
        return ApiPredict(
            EndpointConfig(model="m", base_url=peer.url, key_env="MEDRAY_NO_KEY", **settings),
            DataConfig(),
            "m",
        )

    return make


def asked(body):
    return body["messages"][0]["content"][1]["text"]


NO_ANSWER = {
    "400": (400, UNSUPPORTED),
    "401": (401, {"error": {"message": "bad key"}}),
    "403": (403, {"message": "no right to this"}),
    "404": (404, {"detail": "Not Found"}),
    "413": (413, b"<html>too large</html>"),
    "422": (
        422,
        {
            "detail": [
                {
                    "loc": ["body", "seed"],
                    "msg": "Extra inputs are not permitted",
                    "input": "data:image/png;base64,AAAA",
                }
            ]
        },
    ),
    "307": (307, b"", {"location": "https://user:secret@elsewhere/v1"}),
    "429": (429, {"error": "slow down"}),
    "503": (503, b""),
    "an error with 200": (200, {"error": {"message": "the model is gone", "code": 500}}),
    "no choices": (200, {"choices": []}),
    "no content": (200, completion(None)),
    "empty content": (200, completion("")),
    "not JSON": (200, b"<html>sign in</html>"),
    "nothing": (200, b""),
    "not an object": (200, [1]),
    "an error in a choice": (200, {"choices": [{"error": {"message": "overloaded", "code": 502}}]}),
    "thinking alone": (200, completion("", "length", reasoning_content="hm")),
    "204": (204, b""),
    "tool call": (200, completion(None, "tool_calls", tool_calls=[{"id": "1"}])),
}


@pytest.mark.parametrize("response", NO_ANSWER.values(), ids=NO_ANSWER)
def test_whatever_every_request_is_met_with_stops_the_stage_after_ten(api, png, response):
    peer = Peer(respond=lambda number, body: response)
    with pytest.raises(
        EndpointDown, match=r"^api: every request to the endpoint fails: .*check api\.base_url .*api\.model m"
    ) as stopped:
        api(peer)(questions(png, 40))
    assert 2 <= len(peer.bodies) <= 11
    assert "secret" not in str(stopped.value) and "AAAA" not in str(stopped.value)


def test_reasons_that_differ_are_one_count(api, png):
    kinds = list(NO_ANSWER.values())
    peer = Peer(respond=lambda number, body: kinds[number % len(kinds)])
    with pytest.raises(EndpointDown):
        api(peer, concurrency=4)(questions(png, 40))
    assert len(peer.bodies) <= 40
    peer = Peer(respond=lambda number, body: (503, b"") if number % 2 else (400, UNSUPPORTED))
    with pytest.raises(EndpointDown, match="10 requests one after the other failed"):
        api(peer, retries=1)(questions(png, 40))
    assert len(peer.bodies) <= 20


@pytest.mark.parametrize("response", NO_ANSWER.values(), ids=NO_ANSWER)
def test_a_single_refusal_among_answers_is_a_row(api, png, response):
    peer = Peer(respond=lambda number, body: response if asked(body).endswith(" 7") else (200, completion()))
    rows = api(peer)(questions(png, 20)).to_pylist()
    assert [row["answer"] for row in rows if row["sample_id"] != "q7"] == ["Yes"] * 19
    assert (rows[7]["error"] is not None) or (rows[7]["answer"] == "")
    first = Peer(respond=lambda number, body: response if asked(body).endswith(" 0") else (200, completion()))
    assert [row["answer"] or None for row in api(first)(questions(png, 5)).to_pylist()] == [None] + [
        "Yes"
    ] * 4


def test_neighbouring_rows_that_each_are_refused_do_not_stop_a_stage_whose_endpoint_answers(api, png):
    refused = {f" {number}" for number in range(5, 30)}
    peer = Peer(
        respond=lambda number, body: (
            (400, {"error": "no such picture"})
            if asked(body)[len("Is there a mass?") :] in refused
            else (200, completion())
        )
    )
    rows = api(peer)(questions(png, 40)).to_pylist()
    assert sum(row["error"] is None for row in rows) == 15 and "no such picture" in rows[5]["error"]
    assert len(peer.bodies) < 40 + 5


def test_an_endpoint_that_goes_down_later_stops_the_stage(api, png):
    peer = Peer(respond=lambda number, body: (200, completion()) if number < 12 else (400, UNSUPPORTED))
    with pytest.raises(EndpointDown):
        api(peer)(questions(png, 40))
    assert len(peer.bodies) == 12 + 10 + 1  # and one that was answered before, to be sure


def test_nothing_is_asked_of_an_endpoint_that_is_down(api, png):
    peer = Peer(respond=lambda number, body: (400, UNSUPPORTED))
    worker = api(peer, concurrency=8)
    with pytest.raises(EndpointDown):
        worker(questions(png, 200))
    count = len(peer.bodies)
    assert count <= 10 + 8
    with pytest.raises(EndpointDown):
        worker(questions(png, 5))
    assert len(peer.bodies) == count


def test_the_last_rows_of_a_table_are_not_kept_before_it_is_known_who_is_to_blame(api, png):
    """Nine failures at a table's end would else be set aside for good before the tenth shows that the
    endpoint is down.
    """
    peer = Peer(respond=lambda number, body: (200, completion()) if number < 11 else (400, UNSUPPORTED))
    with pytest.raises(EndpointDown, match="9 requests one after the other failed"):
        api(peer)(questions(png, 20))
    few = Peer(respond=lambda number, body: (422, {"detail": "no"}))
    with pytest.raises(EndpointDown, match="3 requests one after the other failed"):
        api(few)(questions(png, 3))


@pytest.mark.ray
def test_rows_that_failed_before_a_stage_stopped_are_asked_again(ray_cluster, png, tmp_path):
    mended = []
    peer = Peer(
        respond=lambda number, body: (200, completion()) if mended or number < 12 else (400, UNSUPPORTED)
    )
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(questions(png, 40), source / "a.parquet")
    settings = {
        "config": EndpointConfig(
            model="m", base_url=peer.url, key_env="MEDRAY_NO_KEY", retries=0, concurrency=2
        ).model_dump(),
        "data_config": DataConfig().model_dump(),
        "name": "m",
    }
    options = {**client_options(EngineConfig(rows_per_task=4)), "fn_constructor_kwargs": settings}
    arguments = (
        str(source),
        str(tmp_path / "rows"),
        str(tmp_path / "committed"),
        lambda rows: rows.map_batches(ApiPredict, **options),
        4,
        0.5,
    )
    with (
        pytest.raises(EndpointDown, match=r"--set 'api\.rename=\{max_tokens: max_completion_tokens\}'"),
        ray_session(ClusterConfig()),
    ):
        write_resumable(*arguments)
    before = len(peer.bodies)
    assert before < 40
    mended.append(True)
    assert write_resumable(*arguments).rows == 40
    rows = pq.read_table(tmp_path / "rows").to_pylist()
    assert {row["answer"] for row in rows} == {"Yes"} and all(row["error"] is None for row in rows)
    assert len(peer.bodies) - before >= 40 - 12


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (UNSUPPORTED, "it refuses max_tokens: add --set 'api.rename={max_tokens: max_completion_tokens}'"),
        (
            {
                "error": {
                    "message": "Unsupported value: 'temperature' does not support 0.2 with this model. Only "
                    "the default (1) value is supported.",
                    "param": "temperature",
                }
            },
            "it refuses temperature: add --set 'api.omit=[temperature]'",
        ),
        (
            {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "seed"],
                        "msg": "Extra inputs are not permitted",
                    }
                ]
            },
            "it refuses seed: add --set 'api.omit=[seed]'",
        ),
        (
            {"object": "error", "message": "Unrecognized request arguments supplied: seed, temperature"},
            "it refuses temperature, seed: add",
        ),
        ({"error": "bad request"}, "if it refuses a parameter, --set 'api.omit=[seed]' leaves one"),
    ],
)
def test_the_error_says_how_to_leave_out_or_rename_a_parameter(api, png, error, fix):
    with pytest.raises(EndpointDown) as stopped:
        api(Peer(respond=lambda number, body: (400, error)))(questions(png, 12))
    assert fix in str(stopped.value)


def test_the_fix_that_the_error_names_is_one(api, png):
    def respond(number, body):
        if "max_tokens" in body:
            return 400, UNSUPPORTED
        return (
            (400, {"error": {"message": "Unsupported value: 'temperature' does not support 0.0"}})
            if "temperature" in body
            else (200, completion())
        )

    peer = Peer(respond=respond)
    overrides = ["api.retries=0", f"api.base_url={peer.url}"]
    for _ in range(2):
        config = load_config(EvaluateJobConfig, None, overrides).api
        with pytest.raises(EndpointDown) as stopped:
            ApiPredict(config, DataConfig(), "m")(questions(png, 3))
        overrides.append(str(stopped.value).split("--set '")[1].split("'")[0])
    config = load_config(EvaluateJobConfig, None, overrides).api
    assert ApiPredict(config, DataConfig(), "m")(questions(png, 3))["answer"].to_pylist() == ["Yes"] * 3
    assert (
        "max_completion_tokens" in peer.bodies[-1]
        and "temperature" not in peer.bodies[-1]
        and "seed" in peer.bodies[-1]
    )


def test_parameters_are_sent_as_configured():
    config = EndpointConfig(
        rename={"max_tokens": "max_completion_tokens"},
        omit=("seed", "temperature"),
        parameters={"reasoning_effort": "low"},
        max_tokens=5,
    )
    body = request_body(config, "What?", None, 1)
    dotted = load_config(
        EvaluateJobConfig,
        None,
        [
            "api.rename.max_tokens=max_completion_tokens",
            "api.parameters.reasoning_effort=low",
            "api.omit=[seed, temperature]",
            "api.max_tokens=5",
        ],
    )
    assert request_body(dotted.api, "What?", None, 1) == body
    assert body == {
        "model": "gpt-4o",
        "max_completion_tokens": 5,
        "reasoning_effort": "low",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
    }
    for wrong in (
        "rename={max_token: x}",
        "rename.max_token=x",
        "omit.seed=x",
        "rename.max_tokens.x=y",
        "omit=[top_p]",
        "parameters={messages: []}",
        "parameters={seed: 1}",
        "rename={seed: temperature}",
        "omit=[seed]",
        "rename={seed: model}",
    ):
        more = ["api.rename={seed: s}"] if wrong == "omit=[seed]" else []
        with pytest.raises(ConfigError, match=r"api"):
            load_config(EvaluateJobConfig, None, [*more, f"api.{wrong}"])
    with pytest.raises(ValidationError):
        EndpointConfig(omit=("max_token",))


@pytest.mark.parametrize(
    ("content", "message", "text", "thinking"),
    [
        ("Yes", {}, "Yes", None),
        ([{"type": "text", "text": "Ye"}, {"type": "text", "text": "s"}], {}, "Yes", None),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "No"}]},
                {"type": "text", "text": "Yes"},
            ],
            {},
            "Yes",
            "finished",
        ),
        ([{"type": "output_text", "text": {"value": "Yes"}}], {}, "Yes", None),
        (["Yes"], {}, "Yes", None),
        ([{"type": "refusal", "refusal": "I cannot."}], {}, "I cannot.", None),
        (None, {"refusal": "I cannot."}, "I cannot.", None),
        ("Yes", {"reasoning_content": "No?"}, "Yes", "finished"),
        ("Yes", {"reasoning": "No?"}, "Yes", "finished"),
        ("Yes", {"reasoning_content": None}, "Yes", None),
        ("", {"reasoning_content": "Perhaps"}, "", "unfinished"),
        (None, {"reasoning": "Perhaps"}, "", "unfinished"),
        ([{"type": "thinking", "thinking": []}], {}, "", "unfinished"),
    ],
)
def test_the_content_of_a_reply(content, message, text, thinking):
    reply = read_reply(httpx.Response(200, json=completion(content, **message)), Usage())
    assert (reply.text, reply.thinking, reply.finish_reason, reply.tokens) == (text, thinking, "stop", 3)


def test_thinking_is_left_out_of_answers_and_told(api, png):
    said = ["<think>No</think>Yes", "<think>Yes", "Yes"]
    peer = Peer(
        respond=lambda number, body: (
            (200, completion(said[int(asked(body)[-1])]))
            if asked(body)[-1] < "3"
            else (200, completion("", "length", reasoning_content="Yes"))
        )
    )
    rows = api(peer)(questions(png, 5)).to_pylist()[:3] + api(peer)(questions(png, 4)).to_pylist()[3:]
    assert [(row["answer"], row["thinking"], row["error"]) for row in rows] == [
        ("Yes", "finished", None),
        ("", "unfinished", None),
        ("Yes", None, None),
        ("", "unfinished", None),
    ]


def test_replies_cut_off_in_the_thinking_say_so(api, png):
    peer = Peer(respond=lambda number, body: (200, completion("", "length")))
    with pytest.raises(
        EndpointDown,
        match=r"without content \(finish_reason length\); its tokens were used up before the answer: raise "
        r"evaluate\.max_tokens",
    ):
        api(peer)(questions(png, 12))


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"retry-after": "2"}, 2, 2),
        ({"retry-after": "1.5"}, 1.5, 1.5),
        ({"retry-after-ms": "250"}, 0.25, 0.25),
        ({"retry-after": "Mon, 30 Nov 2099 23:00:00 GMT"}, 1e6, 1e10),
        ({"retry-after": "Mon, 30 Nov 1999 23:00:00 GMT"}, 0, 0),
        ({"retry-after": "soon"}, 0, 0),
        ({"retry-after": "-1"}, 0, 0),
        ({"retry-after": "nan"}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_the_wait_that_a_server_asks_for(headers, low, high):
    assert low <= retry_after(httpx.Response(429, headers=headers)) <= high


def test_an_error_with_200_is_retried_as_its_code_says(api, png):
    peer = Peer(
        respond=lambda number, body: (
            (200, {"error": {"code": 429, "message": "slow"}}) if number < 2 else (200, completion())
        )
    )
    assert api(peer, retries=3)(questions(png, 1))["answer"].to_pylist() == ["Yes"]


def test_a_key_is_checked_and_never_shown(monkeypatch, api, png):
    monkeypatch.setenv("MEDRAY_NO_KEY", "sk-very-secret\n")
    peer = Peer(
        respond=lambda number, body: (
            401,
            {"error": {"message": "Incorrect API key provided: sk-very-secret"}},
        )
    )
    with pytest.raises(EndpointDown) as stopped:
        api(peer)(questions(png, 1))
    assert "sk-very-secret" not in str(stopped.value) and "Incorrect API key" in str(stopped.value)
    assert peer.headers[0]["Authorization"] == "Bearer sk-very-secret"
    monkeypatch.setenv("MEDRAY_NO_KEY", "sk-\u2026")
    with pytest.raises(StageError, match="MEDRAY_NO_KEY holds characters that no key has"):
        api(peer)


def test_an_endpoint_that_answers_the_trial_alone_stops_the_stage(api, png):
    """Questions about images are refused, all of them, for what ends a stage at once; the picture of the
    trial is small enough.
    """

    def respond(_, body):
        return (
            None
            if len(body["messages"][0]["content"][0]["image_url"]["url"]) < 300
            else (404, {"detail": "no model for images"})
        )

    with pytest.raises(EndpointDown, match="every request to the endpoint fails"):
        api(Peer(script=lambda text: "Yes", respond=respond))(questions(png, 30))


@pytest.mark.parametrize(
    ("content", "tokens", "answer"), [("Yes \ud83d", 3, "Yes ?"), ("Yes", 10**30, "Yes")]
)
def test_what_arrow_has_no_room_for_ends_no_stage(api, png, content, tokens, answer):
    body = completion(content) | {"usage": {"completion_tokens": tokens}}
    (row,) = api(Peer(respond=lambda *_: (200, json.dumps(body).encode())))(questions(png, 1)).to_pylist()
    assert (row["error"], row["answer"]) == (None, answer)
