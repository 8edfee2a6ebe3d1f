"""Models rated by a judge: its stage is continued where it was left."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medray.config import DataConfig, EngineConfig, EvaluateJobConfig, JudgeConfig
from medray.evaluation.prediction_files import write_predictions
from medray.methods.shared.judged_models import judge_models
from medray.plan.demand import FILTER_CPUS, LISTING_CPUS
from medray.records import QUESTION
from medray.running.actor_pools import map_options
from medray.running.run import Run

OPEN = 40


@pytest.fixture()
def asked(tmp_path):
    """Questions, every other one open, and two models' answers."""
    kinds = ["open", "closed"] * OPEN
    rows = [
        {
            "sample_id": f"q-{i:02d}",
            "image_id": f"i-{i // 4}",
            "image": b"an image",
            "question": "Which?",
            "reference": "this",
            "answer_type": kind,
        }
        for i, kind in enumerate(kinds)
    ]
    (tmp_path / "questions").mkdir()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=QUESTION), tmp_path / "questions/0.parquet", row_group_size=8
    )
    for model in ("base", "tuned"):
        write_predictions(
            [
                {
                    "sample_id": row["sample_id"],
                    "answer_type": row["answer_type"],
                    "answer": f"{model} says {row['sample_id']}",
                }
                for row in rows
            ],
            str(tmp_path / model),
        )
    return {
        name: {"hash": name, "outputs": {"rows": str(tmp_path / name)}}
        for name in ("questions", "base", "tuned")
    }


@pytest.mark.timeout(600)
def test_a_judges_stage_goes_on_with_as_few_cpus_as_it_began_with(ray_cluster, asked, tmp_path, monkeypatch):
    """With a judge that leaves of four CPUs the two that Ray Data itself needs, three of five blocks are
    gone; only they are judged again.
    """
    config = EvaluateJobConfig(
        judge=JudgeConfig(kind="random"),
        engine=EngineConfig(rows_per_task=1, cpus_per_actor=4 - FILTER_CPUS - LISTING_CPUS),
        data=DataConfig(read_cpus=0.25),
    )
    # this judge needs no engine, and is to reserve what one does
    monkeypatch.setattr("medray.inference.judges.judges.client_options", map_options)
    models = {"base": asked["base"], "tuned": asked["tuned"]}

    def judged():
        return judge_models(Run(tmp_path / "run"), config, "vqa", asked["questions"], models, chats=False)

    def stored():
        return {
            path.name: {row["sample_id"]: row["verdicts"] for row in pq.read_table(path).to_pylist()}
            for path in (stage / "rows").glob("*.parquet")
        }

    first = judged()
    (stage,) = Path(tmp_path, "run/stages").glob("30-*")
    files = stored()
    ids = [identity for file in files.values() for identity in file]
    assert len(files) >= 5 and len(ids) == len(set(ids)) == OPEN

    (stage / "manifest.json").unlink()
    gone = sorted(files)[:3]
    for name in gone:
        (stage / "rows" / name).unlink()
        (committed,) = [path for path in (stage / "committed").iterdir() if name.startswith(path.stem)]
        committed.unlink()
    assert judged() == first
    again = stored()
    assert {name: again.get(name) for name in set(files) - set(gone)} == {
        name: files[name] for name in set(files) - set(gone)
    }, "what was committed is left alone"
    assert {k: v for file in again.values() for k, v in file.items()} == {
        k: v for file in files.values() for k, v in file.items()
    }
    assert sum(map(len, again.values())) == OPEN
    assert json.loads((stage / "manifest.json").read_text())["outputs"]["counts"]["questions"] == OPEN
