"""Dialogues by an endpoint and by a small local model."""

import re

import pyarrow as pa
import pytest

from medray.config import DataConfig, SamplingConfig
from medray.config.clinician_preference_sections import GenerateConfig
from medray.methods.clinician_preference.small_model_writer import Asking
from medray.methods.clinician_preference.write_dialogues import ApiGenerate, EngineGenerate
from medray.records import GENERATED, IMAGE_TEXT
from tests.methods.clinician_preference.test_dialogue_prompt import demonstration, written
from tests.support.peer import Peer


def images(png, count=2, modality="CT"):
    rows = [
        {
            "sample_id": f"i{number}",
            "image": png(number),
            "caption": f"Caption {number}.",
            "context": None,
            "modality": modality,
            "attributes": [("label", "secret")],
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=IMAGE_TEXT)


@pytest.fixture
def api(monkeypatch):
    from medray.inference.api_client import Endpoint

    monkeypatch.setattr(Endpoint, "backoff_seconds", 0.01)

    def make(peer, demonstrations=(), **settings):
        return ApiGenerate(
            GenerateConfig(model="m", base_url=peer.url, key_env="MEDRAY_NO_KEY", **settings),
            demonstrations,
            DataConfig(),
        )

    return make


def asked(peer):
    return [body["messages"][0]["content"][1]["text"] for body in peer.bodies]


def test_a_dialogue_for_each_image_shown_one_demonstration_per_modality(api, png):
    peer = Peer(script=lambda text: written(4))
    bank = [
        *(demonstration(f"ct{number}", "CT") for number in range(9)),
        demonstration("mri0", "MRI"),
        demonstration("i1", "histology"),
    ]
    table = api(peer, bank)(images(png))
    assert table.schema == GENERATED
    rows = table.to_pylist()
    assert [row["error"] for row in rows] == [None, None] and [len(row["rounds"]) for row in rows] == [4, 4]
    assert rows[0]["rounds"][3] == {"question": "Question 3?", "answers": ["Answer 3."]}
    assert (
        rows[0]["requests"] == 1
        and rows[0]["prompt_tokens"] == 100
        and rows[0]["image"] == png(0)
        and rows[0]["caption"] == "Caption 0."
    )
    assert (
        len(rows[0]["demonstrations"]) == 3
        and "mri0" in rows[0]["demonstrations"]
        and "i1" in rows[0]["demonstrations"]
    )
    assert len(rows[1]["demonstrations"]) == 2 and "i1" not in rows[1]["demonstrations"], (
        "an image's own dialogue must not be copied"
    )
    text = next(text for text in asked(peer) if "Caption 0." in text)
    assert all(f"What of {name}?" in text for name in rows[0]["demonstrations"]) and "secret" not in text
    assert {
        row["sample_id"]: row["demonstrations"] for row in api(peer, bank[::-1])(images(png)).to_pylist()
    } == {row["sample_id"]: row["demonstrations"] for row in rows}


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_no_more_than_that(api, png):
    bad = iter(["Sorry.", written(4)])
    row = api(Peer(script=lambda text: next(bad)))(images(png, 1)).to_pylist()[0]
    assert (
        row["error"] is None
        and row["requests"] == 2
        and row["dropped"] == [{"text": "Sorry.", "reason": "no turns"}]
    )

    peer = Peer(script=lambda text: written(1))
    row = api(peer, attempts=3)(images(png, 1)).to_pylist()[0]
    assert len(peer.bodies) == 3 == len(row["dropped"]) and len({body["seed"] for body in peer.bodies}) == 3
    assert row["error"] == "no dialogue: rounds: 1 of them; 4 to 5 were asked for" and row["rounds"] is None
    assert row["image"] == png(0) and row["prompt_tokens"] == 300


def test_an_endpoint_that_fails_is_not_asked_again_beyond_its_retries(api, png):
    peer = Peer(failures=2, script=lambda text: "yes")
    row = api(peer, retries=1, attempts=5)(images(png, 1)).to_pylist()[0]
    # the last asks whether the endpoint answers at all
    assert "HTTP 503" in row["error"] and len(peer.bodies) == 3


def test_repeated_questions_are_dropped_and_counted(api, png):
    row = api(Peer(script=lambda text: written(4) + "\nUser: question 2\nAssistant: Again."))(
        images(png, 1)
    ).to_pylist()[0]
    assert [one["question"] for one in row["rounds"]] == [f"Question {number}?" for number in range(4)]
    assert row["dropped"] == [{"text": "question 2", "reason": "duplicate question"}]
    row = api(Peer(script=lambda text: written(3) + "\nUser: question 2\nAssistant: Again."))(
        images(png, 1)
    ).to_pylist()[0]
    assert "3 of them do not repeat a question" in row["error"]


def test_second_answers_are_to_the_same_questions(api, png):
    def script(text):
        if "The questions:" not in text:
            return written(4)
        questions = re.findall(r"^\d\. (.+)$", text.split("The questions:")[1], re.MULTILINE)
        assert len(questions) == 4
        # Another order, one left out, one that nobody asked.
        return "\n".join(
            f"User: {question}\nAssistant: Other {question[-2]}."
            for question in [*questions[::-1][:3], "Who?"]
        )

    row = api(Peer(script=script), answers=2)(images(png, 1)).to_pylist()[0]
    assert [one["answers"] for one in row["rounds"]] == [
        ["Answer 0.", None],
        *([f"Answer {n}.", f"Other {n}."] for n in (1, 2, 3)),
    ]
    assert row["requests"] == 2

    row = api(Peer(script=lambda text: written(4) if "The questions:" not in text else "No."), answers=2)(
        images(png, 1)
    ).to_pylist()[0]
    assert row["error"] is None and [one["answers"] for one in row["rounds"]] == [
        [f"Answer {n}.", None] for n in range(4)
    ]
    assert [one["reason"] for one in row["dropped"]] == ["no turns"] * 2


def test_a_picture_that_cannot_be_read_is_set_aside(api, png):
    table = images(png, 2).set_column(1, "image", [[b"not an image", png(1)]])
    rows = api(Peer(script=lambda text: written(5)))(table).to_pylist()
    assert (
        "cannot be decoded" in rows[0]["error"] and rows[0]["rounds"] is None and rows[0]["sample_id"] == "i0"
    )
    assert rows[1]["error"] is None


@pytest.mark.vllm
def test_a_small_model_asks_and_answers_itself(on_engine, png):
    short = SamplingConfig(max_tokens=12)
    config = GenerateConfig(
        kind="vllm", model="tiny", writing="asking", rounds=(2, 3), answers=2, ask=short, answer=short
    )
    bank = [
        demonstration("ct0", "CT"),
        demonstration("ct1", "CT"),
        demonstration("mri0", "MRI"),
        demonstration("i0", "CT"),
    ]
    table = on_engine(Asking, config=config, demonstrations=bank)(images(png, 4))
    assert table.schema == GENERATED
    rows = table.to_pylist()
    good = [row for row in rows if row["error"] is None]
    assert good, rows
    for row in good:
        assert 2 <= len(row["rounds"]) <= 3 and all(len(one["answers"]) == 2 for one in row["rounds"])
        assert row["requests"] >= 1 + 2 * len(row["rounds"]) and row["prompt_tokens"] > 64
    shown = {name for row in rows for name in row["demonstrations"]}
    assert shown and shown <= {"ct0", "ct1", "i0"} and "i0" not in rows[0]["demonstrations"], (
        "questions of the image's modality, about other images"
    )
    texts = [one["question"] for row in good for one in row["rounds"]]
    assert any(text.startswith("What of ct") for text in texts) and not all(
        text.startswith("What of ct") for text in texts
    )
    assert (
        on_engine(Asking, config=config, demonstrations=bank[::-1])(images(png, 4).take([3, 1, 0, 2]))
        .take([2, 1, 3, 0])
        .to_pylist()
        == rows
    )
    without = on_engine(Asking, config=config, demonstrations=())(images(png, 4)).to_pylist()
    assert all(not row["demonstrations"] for row in without)


@pytest.mark.vllm
def test_a_local_writer_that_writes_no_dialogue(on_engine, png):
    worker = on_engine(
        EngineGenerate, config=GenerateConfig(kind="vllm", model="tiny", max_tokens=8), demonstrations=()
    )
    row = worker(images(png, 1)).to_pylist()[0]
    assert row["error"].startswith("no dialogue: ") and row["requests"] == 2 and len(row["dropped"]) == 2
