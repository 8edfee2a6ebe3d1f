"""The endpoint whole: Ray Serve, ray.serve.llm and vLLM with the bundled models; asked by the openai
client, by curl and by a browser.
"""

import asyncio
import base64
import io
import json
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import yaml
from PIL import Image
from ray.exceptions import RayActorError
from ray.serve.schema import ServeStatus

from medray.config import SelfTrainingConfig
from medray.config.serving import ServeConfig
from medray.images.decoding import pad_to_square
from medray.models.bundled import model_path
from medray.records import QUESTION
from medray.serving.chat.request import ApiError
from medray.serving.tokens import add_holder
from tests.support.processes import descendants

pytestmark = [pytest.mark.whole_job, pytest.mark.ray]

ENGINE = {
    "cpus_per_actor": 1,
    "memory_utilization": 0.15,
    "max_model_len": 512,
    "enforce_eager": True,
    "max_num_seqs": 64,
}
QUESTION_TEXT = "What is the shape of the nucleus?"


def cell(size=(96, 64)):
    image = Image.new("RGB", size, (244, 230, 236))
    image.paste((120, 40, 150), (30, 15, 66, 50))
    return image


def uri_of(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def make_run(folder, tuned):
    """A finished run's directory with a held-out question: its tuned model is one of the bundled ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    questions = folder / "stages/00-data/questions"
    questions.mkdir(parents=True)
    out = io.BytesIO()
    cell().save(out, "PNG")
    row = dict.fromkeys(QUESTION.names) | {
        "sample_id": "q",
        "image_id": "i",
        "image": out.getvalue(),
        "question": QUESTION_TEXT,
        "reference": "round <b>",
        "answer_type": "open",
    }
    pq.write_table(pa.Table.from_pylist([row], schema=QUESTION), questions / "part-0.parquet")
    (folder / "stages/00-data/manifest.json").write_text(
        json.dumps({"outputs": {"questions": str(questions)}})
    )
    config = SelfTrainingConfig(
        model={"path": "testbed:base", "precision": "fp32", "max_length": 512}, engine=ENGINE
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "models.json").write_text(
        json.dumps(
            {
                "method": "self_train",
                "tuned": "sft",
                "base": "base",
                "models": {
                    "base": {"path": "testbed:base", "hash": ""},
                    "sft": {"path": f"testbed:{tuned}", "hash": ""},
                },
            }
        )
    )
    return str(folder)


@pytest.fixture(scope="module")
def endpoint(serve_address, tmp_path_factory):
    """(address under a prefix, key, deploys runs in place: tuned model -> options of ServeConfig)."""
    from ray import serve

    from medray.serving.chat.app import build

    folder = tmp_path_factory.mktemp("endpoint")
    keys = str(folder / "keys.txt")
    key = add_holder(keys, "tests")

    def deploy(tuned, **options):
        run = make_run(folder / f"run-{tuned}", tuned)
        config = ServeConfig(
            run=run,
            keys=keys,
            **options,
            limits={"tokens": 64, "requests_per_minute": 100_000},
            upscale_delay_s=1,
            downscale_delay_s=5,
            place={"labels": {"medray-group": "!elsewhere"}},
        )
        serve.run(build(config), name="vlm", route_prefix="/vlm")

    deploy("generalist")
    yield f"{serve_address}/vlm", key, deploy
    serve.delete("vlm")


@pytest.fixture
def client(endpoint):
    with openai.OpenAI(base_url=f"{endpoint[0]}/v1", api_key=endpoint[1], max_retries=0, timeout=120) as made:
        yield made


def message(text=QUESTION_TEXT, image=None):
    content = [
        {"type": "text", "text": text},
        *([{"type": "image_url", "image_url": {"url": uri_of(image)}}] if image else []),
    ]
    return [{"role": "user", "content": content}]


def ask(client, model="tuned", text=QUESTION_TEXT, image=None, **options):
    return client.chat.completions.create(
        model=model,
        messages=message(text, image or cell()),
        **({"temperature": 0, "max_tokens": 16} | options),
    )


@pytest.fixture(scope="module")
def by_transformers():
    """(text, prompt tokens) of a greedy answer by transformers, to an image and a question as the model
    was tuned on them.
    """
    import torch
    from transformers import AutoProcessor

    from medray.models.vlm import load_vlm

    def answer(model, system_prompt, tokens=16):
        path = model_path(model)
        processor, loaded = AutoProcessor.from_pretrained(path), load_vlm(path, "fp32")
        messages = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": pad_to_square(cell())},
                    {"type": "text", "text": QUESTION_TEXT},
                ],
            }
        ]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            made = loaded.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        length = inputs["input_ids"].shape[1]
        return processor.tokenizer.decode(made[0, length:], skip_special_tokens=True).strip(), length

    return answer


def test_both_models_answer_as_transformers_does_with_the_prompt_of_tuning(client, by_transformers):
    assert [model.id for model in client.models.list()] == ["tuned", "base"] and client.models.retrieve(
        "base"
    ).id == "base"
    system = SelfTrainingConfig().model.system_prompt
    texts = []
    for name, bundled in (("tuned", "generalist"), ("base", "base")):
        answer = ask(client, name)
        text, length = by_transformers(bundled, system)
        assert answer.usage.prompt_tokens == length
        assert answer.choices[0].message.content.strip() == text
        texts.append(text)
    assert texts[0] != texts[1]


def test_text_and_image_in_either_order_and_no_image(client):
    other = [{"role": "user", "content": list(reversed(message(image=cell())[0]["content"]))}]
    assert (
        client.chat.completions.create(model="tuned", messages=other, temperature=0, max_tokens=16)
        .choices[0]
        .message.content
        == ask(client).choices[0].message.content
    )
    assert (
        client.chat.completions.create(
            model="tuned", messages=message("Hello"), max_tokens=4
        ).usage.completion_tokens
        <= 4
    )


def test_a_stream_is_the_answer_in_pieces(client):
    options = {"text": "List the attributes.", "max_tokens": 40}
    answer = ask(client, **options)
    whole = answer.choices[0].message.content
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 1
    assert chunks[-1].usage == answer.usage


def test_a_stream_whose_replica_is_lost_says_so():
    from medray.serving.chat.app import _streamed

    async def chunks():
        yield "data: {}"
        raise RayActorError()

    async def read():
        seen = []
        with pytest.raises(ApiError) as error:
            async for chunk in _streamed(chunks(), "r1"):
                seen.append(chunk)
        return seen, error.value.status, error.value.code

    assert asyncio.run(read()) == (["data: {}"], 503, "overloaded")


@pytest.mark.parametrize("status", [ServeStatus(), RayActorError()])
def test_no_model_is_ready_where_the_controller_does_not_say_so(monkeypatch, status):
    from ray import serve

    from medray.serving.chat.app import Ingress

    def look():
        if isinstance(status, Exception):
            raise status
        return status

    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="vlm"))
    monkeypatch.setattr(serve, "status", look)
    with ThreadPoolExecutor(1) as looking:
        assert (
            asyncio.run(
                Ingress.func_or_class.ready(SimpleNamespace(looking=looking, handles={"tuned": None}))
            )
            == {}
        )


def test_sampling(client):
    def texts(**options):
        return [
            choice.message.content
            for choice in ask(
                client, text="Describe this image.", **({"temperature": 1.5, "n": 3} | options)
            ).choices
        ]

    first = texts(seed=7)
    assert len(first) == 3 and len(set(first)) > 1 and texts(seed=7) == first and texts(seed=8) != first
    likely = ask(client, logprobs=True, top_logprobs=3, max_tokens=2).choices[0].logprobs.content
    assert len(likely) == 2 and all(
        len(one.top_logprobs) == 3
        and one.logprob <= 0
        and one.top_logprobs[0].logprob == pytest.approx(one.logprob, abs=1e-4)
        for one in likely
    )
    whole = ask(client).choices[0].message.content
    word = whole.split()[-1]
    assert word not in ask(client, stop=[word]).choices[0].message.content
    assert ask(client, max_tokens=1).choices[0].finish_reason == "length"
    assert ask(client, max_tokens=openai.omit).usage.completion_tokens <= 64


def test_structured_output(client):
    chosen = (
        ask(client, extra_body={"structured_outputs": {"choice": ["alpha", "beta"]}})
        .choices[0]
        .message.content
    )
    assert chosen in ("alpha", "beta")
    form = {
        "type": "json_schema",
        "json_schema": {
            "name": "cell",
            "schema": {
                "type": "object",
                "properties": {"granular": {"type": "boolean"}},
                "required": ["granular"],
                "additionalProperties": False,
            },
        },
    }
    assert set(json.loads(ask(client, response_format=form, max_tokens=40).choices[0].message.content)) == {
        "granular"
    }


def test_curl(endpoint):
    address, key, _ = endpoint
    assert httpx.get(f"{address}/ready", timeout=60).json() == {
        "ready": True,
        "models": {"tuned": True, "base": True},
    }
    body = json.dumps({"model": "tuned", "messages": message(image=cell()), "max_tokens": 4})
    command = [
        "curl",
        "-s",
        "-w",
        "\n%{http_code}",
        f"{address}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "--data-binary",
        "@-",
    ]
    for header, status in ((f"Authorization: Bearer {key}", 200), ("Authorization: Bearer wrong", 401)):
        answer, _, code = subprocess.run(
            [*command, "-H", header], input=body, capture_output=True, text=True, check=True
        ).stdout.rpartition("\n")
        assert int(code) == status and ("choices" if status == 200 else "error") in json.loads(answer)


BAD = [
    ({"model": "none"}, 404),
    ({"messages": []}, 400),
    ({"n": 10_000}, 400),
    ({"max_tokens": 65}, 400),
    ({"logit_bias": {"5": 1}}, 400),
    ({"min_tokens": 5}, 400),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400),  # longer than the model's context
    ({"messages": [{"role": "user", "content": "an <image> that is not there"}]}, 400),
    ({"messages": [{"role": "user", "content": "the end<|end|>"}]}, 400),
    ({"messages": [{"role": "user", "content": "half a pair \ud83d"}]}, 400),
    ({"stop": "\udc00"}, 400),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}],
                }
            ]
        },
        400,
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                }
            ]
        },
        400,
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "nonsense"}},
            }
        },
        400,
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}},
            }
        },
        400,
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "array", "minItems": 5, "maxItems": 1}},
            }
        },
        400,
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "string", "minLength": -1}},
            }
        },
        400,
    ),
    *[
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}, 400)
        for schema in (
            {"$ref": "#"},
            {"type": "integer", "minimum": 1e300},
            {
                "type": "object",
                "properties": {"a": {"$ref": "#/properties/a"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        )
    ],
    ({"structured_outputs": {"choice": ["yes", "no\n"]}}, 400),
    ({"structured_outputs": {"choice": ['"', "\\"]}}, 200),
    ({"tools": [], "logit_bias": {}, "stop": None}, 200),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "number", "multipleOf": 2}},
            }
        },
        400,
    ),
    ({"n": 2, "temperature": 0}, 400),
    ({"temperature": 1e308}, 400),
    ({"top_k": 0}, 200),
    ({"seed": -1}, 200),
    ({"stop": "\u0000"}, 200),
    ({"temperature": 0.001, "seed": 3, "n": 2}, 200),
    ({"messages": [{"role": "assistant", "content": "I begin"}, {"role": "user", "content": "go on"}]}, 200),
    ({"messages": [{"role": "user", "content": ""}]}, 200),
    ({"messages": [{"role": "user", "content": "\U0001f600 \u202e \u0000"}]}, 200),
    ({"stream": True, "model": "none"}, 404),
    ({"stream": True, "max_tokens": 65}, 400),
]


@pytest.mark.parametrize("stream", [False, True])
def test_no_bad_request_ends_in_a_500_or_a_dead_replica(endpoint, stream):
    """Each is answered as it should be, as a stream too, and the engine that was there before answers
    after them all.
    """
    address, key, _ = endpoint
    engines = _replica_pids()
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=120) as http:
        for changes, status in BAD:
            body = json.dumps(
                {"model": "tuned", "messages": message("hi"), "max_tokens": 4, "stream": stream, **changes}
            )
            answer = http.post(
                "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
            )
            # A schema that no engine can use may also be one that ours can.
            assert answer.status_code == status or (
                status == 400 and "response_format" in changes and answer.status_code == 200
            ), (changes, answer.text)
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and isinstance(
                    error["code"], str
                ), changes
                assert error["code"] == "invalid_json" or (
                    error["param"]
                    and (error["param"].split(".")[0] in changes or error["param"] in ("model", "max_tokens"))
                ), (changes, error)
            assert answer.status_code >= 400 or '"error"' not in answer.text, (changes, answer.text)
        assert (
            http.post(
                "/v1/chat/completions",
                json={"model": "tuned", "messages": message(image=cell()), "max_tokens": 4},
            ).status_code
            == 200
        )
    assert _replica_pids() == engines


def test_a_replica_whose_engine_died_ends_and_each_client_hears_of_it_once_at_most(endpoint):
    """Plain requests and streams of six clients, who ask again at once; the engine's process is killed,
    the replica's is not.
    """
    address, key, _ = endpoint
    (replica,) = descendants("ServeReplica:vlm:ModelServer:tuned")
    (engine,) = [
        process for process in replica.children(recursive=True) if "EngineCore" in " ".join(process.cmdline())
    ]
    said, killed, over = {number: [] for number in range(6)}, threading.Event(), threading.Event()

    def keep_asking(number):
        body = {
            "model": "tuned",
            "messages": message("Describe this image.", cell()),
            "max_tokens": 32,
            "stream": number % 2 == 1,
        }
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=300) as http:
            while not over.is_set():
                after = killed.is_set()
                answer = http.post("/v1/chat/completions", json=body)
                status = 503 if '"code":"overloaded"' in answer.text.replace(" ", "") else answer.status_code
                said[number].append((after, status))
                time.sleep(0.02)

    threads = [threading.Thread(target=keep_asking, args=[number]) for number in said]
    for thread in threads:
        thread.start()
    try:
        while not all(len(answers) > 2 for answers in said.values()):
            time.sleep(0.01)
        engine.kill()
        killed.set()
        replica.wait(30)
        until = time.monotonic() + 600
        while not all((True, 200) in answers for answers in said.values()) and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    for answers in said.values():
        statuses = [status for _, status in answers]
        assert set(statuses) <= {200, 503} and statuses.count(503) <= 1 and answers[-1] == (True, 200), (
            answers
        )


def _replica_pids():
    """Process ids of the replicas of both models."""
    found = {process.pid for process in descendants("ServeReplica:vlm:ModelServer")}
    assert len(found) == 2
    return found


def test_logs_tell_who_asked_and_nothing_of_what(endpoint, ray_cluster):
    """In all files that Ray, Serve and vLLM write."""
    address, key, _ = endpoint
    secret, image = "a man of 54 called Zanzibar Doe", cell((37, 41))
    headers = {"Authorization": f"Bearer {key}", "X-Request-ID": "told-in-the-log"}
    for words, status in ((secret, 200), (f"{secret} <|end|>", 400), (f"{secret} " * 200, 400)):
        body = {"model": "tuned", "messages": message(words, image), "max_tokens": 4}
        assert (
            httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=120).status_code
            == status
        )
    data = uri_of(image).partition(",")[2]
    logs = Path(ray_cluster._private.worker.global_worker.node.get_logs_dir_path())
    time.sleep(1)
    texts = [file.read_text(errors="replace") for file in logs.rglob("*") if file.is_file()]
    assert any("told-in-the-log key tests model tuned: 400" in text for text in texts)
    assert not [text for text in texts if "Zanzibar" in text or data[:200] in text or key in text]


def test_the_page_asks_both_models(endpoint, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    from tests.serving.test_browser import screenshot

    address, key, _ = endpoint

    def at(name):
        return browser.find_element(By.ID, name)

    def until(condition):
        return WebDriverWait(browser, 120).until(lambda _: condition())

    browser.get(f"{address}/")
    until(lambda: at("key").is_displayed())
    at("key").send_keys("wrong", Keys.ENTER)
    until(lambda: "not known" in at("problem").text)
    at("key").send_keys(key, Keys.ENTER)
    until(lambda: at("ask").is_displayed())
    assert "not a medical device" in at("notice").text.lower()
    (example,) = browser.find_elements(By.CSS_SELECTOR, "#example-list button")
    assert "round <b>" in example.text  # shown as text
    example.click()
    until(lambda: at("shown-image").is_displayed())
    assert at("question-box").get_property("value") == QUESTION_TEXT
    at("question-box").send_keys(Keys.CONTROL, Keys.ENTER)
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".reply[data-done]")) == 2)
    replies = {
        reply.get_attribute("data-model"): reply for reply in browser.find_elements(By.CSS_SELECTOR, ".reply")
    }
    assert set(replies) == {"tuned", "base"} and not browser.find_elements(By.CSS_SELECTOR, ".reply.failed")
    assert all(reply.find_element(By.CLASS_NAME, "said").text for reply in replies.values())
    screenshot(browser, "try")
    assert at("tokens").get_property("value") == "64"  # what the endpoint allows
    browser.execute_script(
        "document.getElementById('tokens').max = 1000; document.getElementById('tokens').value = 65"
    )
    at("send").click()
    until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".reply.failed")) == 2)
    assert "max_tokens" in browser.find_element(By.CSS_SELECTOR, ".reply .said").text
    assert not [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and not re.search(r"40[01]", entry["message"])
    ]


def test_another_run_takes_over_without_a_failed_request(endpoint, client, by_transformers, tmp_path):
    _, _, deploy = endpoint
    run = make_run(tmp_path / "run", "generalist")
    before = ask(client).choices[0].message.content
    stop, failures, answers, streams = threading.Event(), [], [], []

    def answer():
        answers.append(ask(client).choices[0].message.content)

    def stream():
        """One that goes on for longer; a replica that is replaced finishes it."""
        chunks = list(
            ask(
                client,
                text="Describe this image.",
                stream=True,
                max_tokens=64,
                temperature=1.5,
                seed=len(streams),
            )
        )
        streams.append(chunks[-1].choices[0].finish_reason)

    def keep_asking(once):
        while not stop.is_set():
            try:
                once()
            except openai.OpenAIError as error:
                failures.append(error)
            time.sleep(0.1)

    threads = [threading.Thread(target=keep_asking, args=[once]) for once in (answer, answer, stream, stream)]
    for thread in threads:
        thread.start()
    try:
        # What was tuned stays, under another name, beside the new one: two runs at once.
        deploy("expert", runs={"earlier": run}, base=False)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures and before in answers and streams and set(streams) <= {"stop", "length"}
    after = ask(client).choices[0].message.content
    assert (
        after != before
        and after.strip() == by_transformers("expert", SelfTrainingConfig().model.system_prompt)[0]
    )
    assert [model.id for model in client.models.list()] == ["tuned", "earlier"] and ask(
        client, "earlier"
    ).choices[0].message.content == before
