import json

import pyarrow as pa
import pytest

from medray.config import DataConfig, JudgeConfig
from medray.inference.api_client import EndpointDown
from medray.inference.judges.judges import EngineJudge, RandomJudge, cost_ledger
from medray.inference.judges.prompt import VerdictError, judge_prompt, parse_scores
from medray.records import JUDGED, SELF_PLAY
from tests.support import peer


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 7\nbecause", (8, 7)),
        ("8, 7", (8, 7)),
        ("[9.5] [3]", (9.5, 3)),
        ("\n 10/1", (10, 1)),
        ("Scores: 4 and 6\nx", (4, 6)),
        ("８　７", (8, 7)),
        ("**8**, **7**", (8, 7)),
        ("8\u00a07", (8, 7)),
        ("8 — 7", (8, 7)),
        ("8；7。", (8, 7)),
    ],
)
def test_two_numbers_on_the_first_line_are_scores(reply, scores):
    assert parse_scores(reply) == scores


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "8",
        "8\n7",
        "Answer 1: 8, Answer 2: 7",
        "8/10 7/10",
        "11 3",
        "0 5",
        "-3 4",
        "good bad",
        "8.5.1 7",
        "1e1 3",
        "\u22123 4",
        "８／１０ ７／１０",
    ],
)
def test_anything_else_is_an_error_and_never_a_number(reply):
    with pytest.raises(VerdictError):
        parse_scores(reply)


def test_the_prompt_takes_braces_and_placeholders_as_they_are():
    text = judge_prompt("Is {first} it?", "{second}", "b {question}")
    assert "Is {first} it?" in text and "\n{second}\n" in text and "b {question}" in text


def answer(text):
    return {"text": text, "seed": 1, "finish_reason": "stop", "tokens": 3}


def table(png, *answers, count=1):
    rows = [
        {
            "sample_id": f"i{number}",
            "image": png(number),
            "description": "d",
            "dropped_questions": [],
            "error": None,
            "questions": [
                {
                    "question_id": f"i{number}/r1/q0",
                    "question": "What?",
                    "seed": 1,
                    "answers": [answer(text) for text in answers],
                }
            ],
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=SELF_PLAY)


class Peer(peer.Peer):
    """Prefers the answer with more words, or says what `script` says to the two answers."""

    def said(self, text):
        if "Answer 1:" not in text:
            return "yes"
        first, second = text.split("Answer 1:\n")[1].split("\n\nRate")[0].split("\n\nAnswer 2:\n")
        return (
            self.script(first, second)
            if self.script
            else f"{len(first.split())} {len(second.split())}\nwords"
        )


@pytest.fixture
def api(monkeypatch):
    from medray.inference.api_client import Endpoint
    from medray.inference.judges.api import ApiJudge

    monkeypatch.setattr(Endpoint, "backoff_seconds", 0.01)

    def make(peer, **kwargs):
        return ApiJudge(
            JudgeConfig(kind="api", model="m", base_url=peer.url, key_env="MEDRAY_TEST_KEY", **kwargs),
            DataConfig(),
        )

    return make


def test_both_orders_are_asked_unswapped_and_averaged(api, png, monkeypatch):
    monkeypatch.setenv("MEDRAY_TEST_KEY", "secret-key")
    peer = Peer()
    row = api(peer)(table(png, "one two three", "one")).to_pylist()[0]
    (verdict,) = row["verdicts"]
    assert (
        verdict["first_score"],
        verdict["second_score"],
        verdict["order_agreement"],
        verdict["error"],
    ) == (3, 1, True, None)
    assert verdict["raw"] == ["3 1\nwords", "1 3\nwords"]
    assert (row["requests"], row["retries"], row["prompt_tokens"], row["completion_tokens"]) == (
        2,
        0,
        200,
        20,
    )
    assert peer.headers[0]["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in json.dumps(row, default=str)
    assert peer.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )
    assert cost_ledger([row], JudgeConfig(kind="api", usd_per_million_input=2, usd_per_million_output=10))[
        "usd"
    ] == pytest.approx(0.0006)


@pytest.mark.parametrize(
    ("script", "agreement"),
    [
        (lambda a, b: "9 2", False),  # always the first one shown
        (lambda a, b: "5 5", True),  # ties both times
        (lambda a, b: "5 5" if a == "one" else "7 2", False),  # a tie in one order only
    ],
)
def test_orders_that_differ_do_not_agree(api, png, script, agreement):
    (verdict,) = api(Peer(script=script))(table(png, "one two three", "one")).to_pylist()[0]["verdicts"]
    assert verdict["order_agreement"] is agreement


def test_failures_are_retried_and_counted(api, png):
    row = api(Peer(failures=3))(table(png, "one two", "one")).to_pylist()[0]
    assert row["verdicts"][0]["error"] is None
    assert (row["requests"], row["retries"]) == (2, 3)


def test_retries_are_bounded_and_refusals_not_retried(api, png):
    down = Peer(failures=6)
    row = api(down, retries=2)(table(png, "one two", "one")).to_pylist()[0]
    assert "HTTP 503" in row["verdicts"][0]["error"] and row["verdicts"][0]["first_score"] is None
    # the last: does it answer at all?
    assert len(down.bodies) == 7 and (row["requests"], row["retries"]) == (0, 4)
    refusing = Peer(failures=2, status=400)
    assert "HTTP 400" in api(refusing)(table(png, "one two", "one")).to_pylist()[0]["verdicts"][0]["error"]
    assert len(refusing.bodies) == 3
    for status in (400, 401, 503):
        with pytest.raises(
            EndpointDown, match=f"judge: every request to the endpoint fails: .*HTTP {status}"
        ):
            api(Peer(failures=10**6, status=status), retries=0)(table(png, "one two", "one"))


def test_unreadable_replies_keep_their_words(api, png):
    (verdict,) = api(Peer(script=lambda a, b: "Both are fine."))(table(png, "one two", "one")).to_pylist()[0][
        "verdicts"
    ]
    assert verdict["raw"] == ["Both are fine."] * 2
    assert verdict["first_score"] is None and "0 numbers" in verdict["error"]


def test_identical_and_empty_answers_cost_nothing(api, png):
    peer = Peer()
    row = api(peer)(table(png, "same", "same ", "", "other")).to_pylist()[0]
    by_place = {(v["first"], v["second"]): v["error"] for v in row["verdicts"]}
    assert by_place == {
        (0, 1): "identical answers",
        (0, 2): "empty answer",
        (0, 3): None,
        (1, 2): "empty answer",
        (1, 3): None,
        (2, 3): "empty answer",
    }
    assert len(peer.bodies) == 4


def test_random_judge_is_the_same_again_and_fair(png):
    rows = RandomJudge(JudgeConfig(kind="random"))(table(png, "a", "b", count=200))
    assert rows.schema == JUDGED
    assert rows == RandomJudge(JudgeConfig(kind="random"))(table(png, "a", "b", count=200))
    wins = sum(
        row["verdicts"][0]["first_score"] > row["verdicts"][0]["second_score"] for row in rows.to_pylist()
    )
    assert 70 < wins < 130


@pytest.mark.vllm
def test_likelihood_judge_prefers_what_it_would_say_whatever_the_order(on_engine, png, player):
    judge = on_engine(EngineJudge, config=JudgeConfig(kind="vllm", scoring="likelihood"), name="vllm")
    answers = ["the image shows", "10 useless numbers"]
    judged = judge(table(png, *answers)).to_pylist()[0]
    (one,) = judged["verdicts"]
    (two,) = judge(table(png, *answers[::-1])).to_pylist()[0]["verdicts"]
    assert (one["first_score"], one["second_score"]) == pytest.approx(
        (two["second_score"], two["first_score"]), abs=1e-5
    )
    assert one["order_agreement"] is None and one["error"] is None
    image, _ = player.run(player.image({"image": png(0)}))
    nats, tokens, prompt_tokens = player.run(
        player.engine.loglikelihood([{"role": "user", "text": "What?"}], image, answers[0])
    )
    assert one["first_score"] == pytest.approx(nats / tokens, abs=1e-5)
    assert judged["requests"] == 2 and judged["prompt_tokens"] > prompt_tokens


@pytest.mark.vllm
def test_written_scores_of_a_model_that_cannot_write_them_are_errors(on_engine, png):
    judge = on_engine(EngineJudge, config=JudgeConfig(kind="vllm", max_tokens=8), name="vllm")
    row = judge(table(png, "one", "two")).to_pylist()[0]
    assert row["error"] is None
    assert "first line" in row["verdicts"][0]["error"] and len(row["verdicts"][0]["raw"]) == 2
    assert row["requests"] == 2 and row["completion_tokens"] <= 16 and row["prompt_tokens"] > 128
