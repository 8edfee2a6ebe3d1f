"""jobs/evaluate.py with a tiny model on files as published: predictions, scores, floors, re-scoring."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.dataset
import pytest

from medray.commands.evaluate import check_folders, main, models_of, parse, sources_of
from medray.config import (
    DataConfig,
    EndpointConfig,
    EngineConfig,
    EvaluateConfig,
    EvaluateJobConfig,
    JudgeConfig,
    ModelConfig,
)
from medray.errors import ConfigError, StageError
from medray.evaluation.scores import rescore
from medray.methods.evaluate.pipeline import evaluate_models
from medray.methods.shared.benchmark_answers import Asked, predict
from medray.running.run import Run
from tests.integration.test_prepare_data import picture

pytestmark = [pytest.mark.whole_job, pytest.mark.ray, pytest.mark.vllm]

CONFIG = EvaluateJobConfig(
    model=ModelConfig(precision="fp32", system_prompt=""),
    data=DataConfig(read_cpus=0.25),
    engine=EngineConfig(
        enforce_eager=True, max_model_len=512, cpus_per_actor=1, max_num_seqs=16, rows_per_task=8
    ),
    evaluate=EvaluateConfig(bootstrap=200, max_tokens=8),
    text_only=True,
    judge=JudgeConfig(kind="random"),
)


def write_vqa_rad(folder):
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(6):
        (folder / "images" / f"{i}.png").write_bytes(picture(i))
        common = {
            "image_name": f"{i}.png",
            "image_organ": "CHEST",
            "question_type": "PRES",
            "phrase_type": "test_freeform" if i < 4 else "freeform",
        }
        records.append(
            {
                **common,
                "qid": 2 * i,
                "question": "Is there a mass?",
                "answer": "Yes" if i % 2 else "No",
                "answer_type": "CLOSED",
            }
        )
        records.append(
            {
                **common,
                "qid": 2 * i + 1,
                "question": "Which organ is shown?",
                "answer": "lung",
                "answer_type": "OPEN",
            }
        )
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(records))


def write_slake(folder):
    """Its questions have the same ids as some of VQA-RAD's."""
    (folder / "imgs").mkdir(parents=True)
    records = []
    for i in range(3):
        (folder / "imgs" / f"{i}.png").write_bytes(picture(10 + i))
        common = {
            "img_name": f"{i}.png",
            "q_lang": "en",
            "modality": "CT",
            "content_type": "Organ",
            "answer_type": "CLOSED",
        }
        records.append({**common, "qid": i, "question": "Is it a liver?", "answer": "Yes"})
    (folder / "test.json").write_text(json.dumps(records))


def rows_of(folder):
    return pyarrow.dataset.dataset(str(folder), format="parquet").to_table().to_pylist()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_llava, ray_cluster):
    root = tmp_path_factory.mktemp("evaluate")
    write_vqa_rad(root / "vqa-rad")
    write_slake(root / "slake")
    models = [Asked("one", path=tiny_llava), Asked("two", path=tiny_llava)]
    sources = {name: str(root / name) for name in ("vqa-rad", "slake")}
    return root, evaluate_models(CONFIG, models, sources, str(root / "run"))


def test_every_test_question_is_answered_once_by_every_model(evaluated):
    root, _ = evaluated
    for name in ("one", "two"):
        together = rows_of(root / "run" / "stages" / f"05-answers-{name}" / "rows")
        assert (
            len(together),
            len({row["key"] for row in together}),
            {row["benchmark"] for row in together},
        ) == (11, 11, {"slake", "vqa-rad"})
        rows = rows_of(root / "run" / "stages" / f"10-slake-{name}" / "rows")
        assert sorted(
            (row["sample_id"], row["model"], row["benchmark"], row["error"], row["reference"]) for row in rows
        ) == [(f"test:{i}", name, "slake", None, "Yes") for i in range(3)]
        rows = rows_of(root / "run" / "stages" / f"10-vqa-rad-{name}" / "rows")
        assert sorted(row["sample_id"] for row in rows) == sorted(
            f"VQA_RAD Dataset Public:{i}" for i in range(8)
        )
        assert {(row["model"], row["benchmark"], row["error"]) for row in rows} == {(name, "vqa-rad", None)}
        assert all(row["text_only_answer"] is not None for row in rows)
        likely = {row["answer_type"]: row["option_logps"] for row in rows}
        assert likely["open"] is None
        assert len(likely["closed"]) == 2 and max(likely["closed"]) < 0


@pytest.fixture
def endpoint():
    """(address, bodies of the requests) of an endpoint that says yes to everything."""
    requests = []

    class Yes(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            reply = json.dumps(
                {
                    "choices": [{"message": {"content": " Yes."}, "finish_reason": "stop"}],
                    "usage": {"completion_tokens": 2},
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Yes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def test_an_added_benchmark_is_asked_alone(evaluated, endpoint, tmp_path):
    root, _ = evaluated
    address, requests = endpoint
    questions = {
        name: json.loads((root / "run" / "stages" / f"02-{name}-questions" / "manifest.json").read_text())
        for name in ("vqa-rad", "slake")
    }
    config = CONFIG.model_copy(update={"api": EndpointConfig(base_url=address), "text_only": False})

    def asked(*names):
        requests.clear()
        return predict(
            Run(tmp_path / "run"), config, {name: questions[name] for name in names}, Asked("away", api="m")
        )

    first = asked("vqa-rad")
    assert len(requests) == 8
    both = asked("vqa-rad", "slake")
    assert [request["messages"][0]["content"][1]["text"] for request in requests] == ["Is it a liver?"] * 3
    assert both["vqa-rad"] == first["vqa-rad"]  # the stage is done: what was made of it stays good
    assert asked("slake") == {"slake": both["slake"]} and not requests
    rows = rows_of(both["slake"]["outputs"]["rows"])
    assert {(row["model"], row["benchmark"], row["answer"], row["tokens"], row["error"]) for row in rows} == {
        ("away", "slake", "Yes.", 2, None)
    }


def test_no_engine_starts_where_all_is_answered(evaluated, tiny_llava):
    """The stage works again, with an engine that could not start: there is no such memory."""
    root, _ = evaluated
    shutil.copytree(root / "run", root / "again")
    shutil.rmtree(root / "again" / "stages" / "10-slake-one")
    config = CONFIG.model_copy(update={"engine": CONFIG.engine.model_copy(update={"kv_cache_gib": 10**6})})
    evaluate_models(
        config, [Asked("one", path=tiny_llava)], {"slake": str(root / "slake")}, str(root / "again")
    )
    assert rows_of(root / "again" / "stages" / "10-slake-one" / "rows") == rows_of(
        root / "run" / "stages" / "10-slake-one" / "rows"
    )


def test_results_hold_floors_intervals_and_the_comparison(evaluated):
    root, summary = evaluated
    result = json.loads((root / "run" / "results.json").read_text())["benchmarks"]["vqa-rad"]
    one, two = result["models"]["one"], result["models"]["two"]
    assert one["overall"]["accuracy"] == two["overall"]["accuracy"] == summary["accuracy"]["vqa-rad"]["one"]
    assert (
        one["overall"]["n"],
        one["overall"]["images"],
        one["by_type"]["closed"]["chance"],
        one["by_type"]["closed"]["majority"],
    ) == (8, 4, 0.5, 0.5)
    assert one["by_type"]["closed"]["likelihood"]["n"] == 4
    assert one["overall"]["text_only"]["n"] == 8
    difference = result["comparison"]["models"]["two"]["accuracy"]
    assert (difference["value"], difference["low"], difference["high"], difference["p_permutation"]) == (
        0,
        0,
        0,
        1,
    )
    assert result["definition"]["splits"] == ["test"]
    assert "| vqa-rad | one |" in (root / "run" / "table.md").read_text()
    assert r"\toprule" in (root / "run" / "table.tex").read_text()
    assert "gain by the image" in (root / "run" / "results.html").read_text()


def test_judged_models(evaluated):
    """Equal answers are ties whoever judges; a judge that writes scores rates each model against the
    references.
    """
    root, _ = evaluated
    results = json.loads((root / "run" / "results.json").read_text())["benchmarks"]
    result = results["vqa-rad"]
    rate = result["win_rates"]["two against one"]
    assert (rate["asked"], rate["n"], rate["tie"]["value"], rate["win_rate"]["value"]) == (4, 4, 1.0, 0.5)
    assert {model: chat["asked"] for model, chat in result["chats"].items()} == {"one": 4, "two": 4}
    assert (results["slake"]["win_rates"], results["slake"]["chats"]) == ({}, {})  # no open question
    assert "two against one" in (root / "run" / "results.html").read_text()


def test_saved_predictions_score_the_same_without_a_model(evaluated):
    root, _ = evaluated
    again = rescore(str(root / "run" / "stages" / "10-vqa-rad-one" / "rows"), CONFIG.evaluate)
    first = json.loads((root / "run" / "results.json").read_text())["benchmarks"]["vqa-rad"]["models"]["one"]
    assert json.loads(json.dumps(again)) == first


def test_a_split_without_questions_is_an_error(evaluated, tiny_llava):
    root, _ = evaluated
    with pytest.raises(StageError, match="no question of the splits"):
        evaluate_models(
            CONFIG,
            [Asked("one", path=tiny_llava)],
            {"vqa-rad": str(root / "vqa-rad")},
            str(root / "none"),
            ("val",),
        )


def test_arguments(tmp_path, tiny_llava):
    (tmp_path / "slake").mkdir()
    found = sources_of(parse(["--benchmark", "slake", "--data", str(tmp_path)]))
    assert found == {"slake": f"{tmp_path}/slake"}
    models = models_of(
        parse(["--model", f"tuned={tiny_llava}", "--model", "testbed:base", "--model", "api:gpt-4o"])
    )
    assert [(model.name, model.path, model.api) for model in models] == [
        ("tuned", tiny_llava, None),
        ("testbed-base", "testbed:base", None),
        ("api-gpt-4o", None, "gpt-4o"),
    ]
    with pytest.raises(ConfigError, match="'slake-zh-x'"):
        check_folders(["slake", "slake-zh"], [Asked("x"), Asked("zh-x")])
    with pytest.raises(ConfigError, match="each needs a folder"):
        sources_of(parse(["--benchmark", "vqa-rad,pmc-vqa", "--data", str(tmp_path)]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--model", "testbed:base", "--benchmark", "vqarad", "--data", "."],
            "unknown vqarad; known: vqa-rad",
        ),
        (["--benchmark", "slake", "--data", "."], "at least one model"),
        (
            ["--model", "testbed:base", "--model", "testbed:base", "--benchmark", "slake", "--data", "."],
            "two models are named",
        ),
        (["--model", "/no/model", "--benchmark", "slake", "--data", "."], "/no/model does not exist"),
        (["--model", "testbed:base", "--benchmark", "slake"], "--data"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
