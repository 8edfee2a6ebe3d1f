"""Ratings from 0 to 10: strictly read, or missing."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config import ClusterConfig, DataConfig, EngineConfig
from medray.config.clinician_preference_sections import RateConfig
from medray.inference.api_client import EndpointDown
from medray.inference.judges.judges import cost_ledger
from medray.methods.clinician_preference.rate_exchanges import (
    RATING,
    ApiRate,
    EngineRate,
    rate_map,
    rating_counts,
)
from medray.methods.clinician_preference.rate_prompt import RatingError, parse_score, rate_prompt
from medray.records import EXCHANGE, RATED
from medray.running.ray_session import ray_session
from medray.storage.resumable import write_resumable
from tests.support.peer import Peer


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("8\nGood.", 8),
        ("8.5", 8.5),
        ("8/10", 8),
        (" 8 / 10 \nas it", 8),
        ("Score: 7", 7),
        ("**Rating: 9**\n3 of 4", 9),
        ("[10]", 10),
        ("0", 0),
        ("Score - 6.", 6),
        ("8 out of 10", 8),
        ("# Score\u003a 4", 4),
        ("８", 8),
        ("Score：7。", 7),
        ("Rating – 6", 6),
        ("\u00a09\u00a0", 9),
    ],
)
def test_a_number_alone_on_the_first_line_is_the_score(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "\n",
        "Good.",
        "I would say 8",
        "The image shows 2 cells.",
        "8 9",
        "8-9",
        "8, or 9",
        "11",
        "-1",
        "10.5",
        "4/5",
        "80%",
        "80/100",
        "8 because",
        "eight",
        "1e1",
        "8.5.1",
        "Good.\n8",
        "NaN",
        "8/10/10",
    ],
)
def test_anything_else_is_missing_and_never_a_number(reply):
    with pytest.raises(RatingError):
        parse_score(reply)


def test_the_prompt_takes_braces_as_they_are():
    text = rate_prompt("Is {answer} it?", "{known}", "A {question}.")
    assert (
        "Question:\nIs {answer} it?\n" in text
        and "Answer:\n{known}\n" in text
        and "written about the image:\nA {question}.\n" in text
    )
    assert "written about the image" not in rate_prompt("q", "a", None)


def exchanges(png, *answers):
    rows = [
        {
            "sample_id": f"i{number}/d0#0",
            "dialogue_id": f"i{number}/d0",
            "turn": 0,
            "image_id": f"i{number}",
            "image": png(number),
            "modality": None,
            "context": "A smear.",
            "question": "What is it?",
            "answer": answer,
        }
        for number, answer in enumerate(answers)
    ]
    return pa.Table.from_pylist(rows, schema=EXCHANGE)


@pytest.fixture
def api(monkeypatch):
    from medray.inference.api_client import Endpoint

    monkeypatch.setattr(Endpoint, "backoff_seconds", 0.01)

    def make(peer, **settings):
        return ApiRate(
            RateConfig(model="m", base_url=peer.url, key_env="MEDRAY_NO_KEY", **settings), DataConfig()
        )

    return make


def test_a_reply_without_a_score_takes_none_from_the_row_before(api, png, tmp_path):
    """The released script's loop would have given the second row the first one's 9."""
    peer = Peer(script=lambda text: text.split("Answer:\n")[1].split("\n")[0])
    table = api(peer, concurrency=1)(exchanges(png, "9", "no digit", "8.5", "8/10", "  ", "3\nthree"))
    assert table.schema == RATING and table.schema.names[: len(RATED)] == RATED.names
    rows = table.to_pylist()
    assert [row["score"] for row in rows] == [9, None, 8.5, 8, None, 3]
    assert rows[1]["raw"] == "no digit" and "first line" in rows[1]["error"]
    assert rows[4]["error"] == "empty question or answer" and rows[4]["requests"] == 0
    assert [row["requests"] for row in rows] == [1, 1, 1, 1, 0, 1] and len(peer.bodies) == 5
    assert {body["temperature"] for body in peer.bodies} == {0}
    assert cost_ledger(rows, RateConfig(usd_per_million_input=2, usd_per_million_output=10)) == {
        "requests": 5,
        "retries": 0,
        "prompt_tokens": 500,
        "completion_tokens": 50,
        "usd": 0.0015,
    }
    pq.write_table(table, tmp_path / "a.parquet")
    assert rating_counts(str(tmp_path)) == {
        "exchanges": 6,
        "no score: empty question or answer": 1,
        "no score: the first line is not one number from # to #": 1,
        "score 3": 1,
        "score 8": 2,
        "score 9": 1,
    }


def test_an_endpoint_that_fails_gives_no_score_after_its_retries(api, png):
    down = Peer(failures=3, script=lambda text: "yes")
    row = api(down, retries=2)(exchanges(png, "x")).to_pylist()[0]
    assert row["score"] is None and "HTTP 503" in row["error"] and (row["requests"], row["retries"]) == (0, 2)
    assert len(down.bodies) == 4  # the last asks whether the endpoint answers at all
    assert row["image"] is not None


def test_requests_that_fail_one_after_the_other_are_the_endpoints_fault(api, png):
    """Ten, whatever rows they are of and whatever they fail with; one that is answered begins the count
    anew.
    """
    rate = api(Peer(failures=9, script=lambda text: "8"), retries=0, concurrency=1)
    assert sum(row["score"] is None for row in rate(exchanges(png, *"abcdefghij")).to_pylist()) == 9
    for status in (400, 403, 503):
        peer = Peer(failures=10**6, status=status)
        with pytest.raises(
            EndpointDown,
            match=rf"10 requests one after the other failed, the last with HTTP {status}.*rate.base_url",
        ):
            api(peer, retries=0, concurrency=1)(exchanges(png, *"abcdefghijkl"))
        assert len(peer.bodies) == 10
    assert api(Peer(failures=1, status=403, script=lambda text: "8"), concurrency=1)(
        exchanges(png, "a", "b")
    )["score"].to_pylist() == [None, 8]


@pytest.mark.ray
def test_a_stage_whose_endpoint_refuses_its_key_stops_and_goes_on(ray_cluster, png, tmp_path):
    peer = Peer(failures=10**6, status=401, script=lambda text: "8")
    config = RateConfig(model="m", base_url=peer.url, key_env="MEDRAY_NO_KEY")
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(exchanges(png, "a", "b", "c"), source / "a.parquet")
    work, options = rate_map(config, None, DataConfig(), EngineConfig())
    arguments = (
        str(source),
        str(tmp_path / "rows"),
        str(tmp_path / "committed"),
        lambda rows: rows.map_batches(work, **options),
        8,
        0.5,
    )
    with pytest.raises(EndpointDown) as stopped, ray_session(ClusterConfig()):
        write_resumable(*arguments)
    assert str(stopped.value).startswith("rate: every request to the endpoint fails: ") and str(
        stopped.value
    ).endswith("the key in MEDRAY_NO_KEY")
    assert "HTTP 401" in str(stopped.value)
    peer.failures = 0
    assert write_resumable(*arguments).rows == 3
    assert [row["score"] for row in pq.read_table(tmp_path / "rows").to_pylist()] == [8, 8, 8]


@pytest.mark.vllm
def test_likelihood_is_ten_times_the_probability_per_token(on_engine, png, player):
    rate = on_engine(EngineRate, config=RateConfig(kind="vllm", scoring="likelihood"))
    answers = ["the image shows", "10 useless numbers"]
    table = rate(
        pa.concat_tables(
            [exchanges(png, *answers), exchanges(png, "x").set_column(4, "image", [[b"broken"]])]
        )
    )
    rows = table.to_pylist()
    for number, row in enumerate(rows[:2]):
        image, _ = player.run(player.image({"image": png(number)}))
        nats, tokens, _ = player.run(
            player.engine.loglikelihood([{"role": "user", "text": "What is it?"}], image, answers[number])
        )
        assert row["score"] == pytest.approx(10 * math.exp(nats / tokens), rel=1e-4) and 0 < row["score"] < 10
    assert rows[0]["error"] is None and rows[0]["raw"] is None
    assert rows[2]["score"] is None and "cannot be decoded" in rows[2]["error"]


@pytest.mark.vllm
def test_a_local_model_that_cannot_write_scores_gives_none(on_engine, png):
    row = on_engine(EngineRate, config=RateConfig(kind="vllm", max_tokens=8))(
        exchanges(png, "a cell")
    ).to_pylist()[0]
    assert row["score"] is None and row["raw"] is not None and "first line" in row["error"]
    assert row["requests"] == 1 and 0 < row["completion_tokens"] <= 8
