"""Clinician preference alignment's configuration, what its stages depend on, the wait for clinicians; the
job itself is in tests/integration.
"""

import io
import itertools
import logging
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from medray import records
from medray.clinicians.judgements import item_fingerprint
from medray.clinicians.store import Store, Word
from medray.commands.command_line import run_job
from medray.config import ClinicianPreferenceConfig, SftConfig, load_config
from medray.errors import ConfigError, DataError, StageError, Waiting
from medray.methods.clinician_preference import stages as steps
from medray.methods.clinician_preference.collect_judgements import collect, exported_judgements
from medray.methods.clinician_preference.ground_truth import against_truth
from medray.methods.clinician_preference.report import clinicians_share, table
from medray.plan.preflight import check_clinician_preference
from medray.running.run import Run, Stage, digest
from medray.storage.shards import stored_rows, write_shard
from tests.clinicians.test_simulated import RECORD

ROOT = Path(__file__).resolve().parents[3]


def config(*overrides, file="tiny-cpu.yaml"):
    return load_config(
        ClinicianPreferenceConfig, ROOT / "medray/recipes/clinician_preference" / file, overrides
    )


def test_defaults_are_the_papers():
    plain = ClinicianPreferenceConfig()
    assert (plain.demonstrations.clusters, plain.generate.rounds, plain.pairs.max_pairs) == (
        60,
        (4, 5),
        30_000,
    )
    assert (
        plain.rater.hidden,
        plain.rater.loss,
        plain.rater.margin,
        plain.rater.paper_exact,
        plain.rater.lr,
        plain.rater.epochs,
    ) == ((512, 512, 512), "hinge", 1.0, False, 1e-5, 6)
    assert plain.rater.samples_per_step == 64
    assert (
        plain.tune.lr_llm,
        plain.tune.lr_vision,
        plain.tune.samples_per_step,
        plain.tune.epochs,
        plain.model.max_length,
    ) == (2e-5, None, 128, 3, 2048)
    assert (plain.tune.self_questioning, plain.model.system_prompt, plain.data.label_fraction) == (
        0.0,
        "",
        1.0,
    )
    assert plain.clinicians.kind == "simulated"


def test_one_seed_for_every_stage_that_draws_and_none_for_what_is_measured_on():
    one = config("seed=7")
    assert {
        one.demonstrations.seed,
        one.clinicians.seed,
        one.generate.seed,
        one.rate.seed,
        one.pairs.seed,
        one.rater.seed,
        one.select.seed,
        one.tune.seed,
    } == {7}
    assert (one.evaluate.seed, one.rater.split_seed) == (0, 0)
    assert ClinicianPreferenceConfig.model_validate(one.model_dump(mode="json")) == one
    # what training workers take
    assert SftConfig.model_validate(one.tune.model_dump()).model_dump() == one.tune.model_dump()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/no/such/model"], "model.path: /no/such/model does not exist"),
        (["data.source=/no/such/data"], "data.source: /no/such/data does not exist"),
        (["data.label_fraction=0"], "data.label_fraction: 0 leaves no image"),
        (["generate.model=/no/such/model"], "generate.model: /no/such/model does not exist"),
        (["rate.model=testbed:clip"], "rate.model: unknown bundled model 'testbed:clip'"),
        (
            ["demonstrations.encoder=testbed:base"],
            "demonstrations.encoder: unknown bundled encoder 'testbed:base'; there is testbed:encoder",
        ),
        (
            ["rater.encoder=open_clip:hf-hub:org/name"],
            "rater.encoder: open_clip:hf-hub:org/name must be in Hugging Face format",
        ),
        (
            ["generate.kind=api", "generate.writing=dialogue"],
            "generate.key_env: the environment variable OPENAI_API_KEY is not set",
        ),
        (
            ["rate.kind=api", "rate.scoring=scores", "rate.base_url=gpt"],
            "rate.base_url: 'gpt' is not an http(s) address",
        ),
        (
            ["clinicians.kind=export", "clinicians.source=/no/such/folder"],
            "clinicians.source: /no/such/folder is no folder",
        ),
        (
            ["clinicians.kind=database", "clinicians.source=judgements.db"],
            "clinicians.source: judgements.db is no SQLAlchemy URL",
        ),
        (
            ["weights=[1, 10]", "rater.train_on=model"],
            "weights: with rater.train_on model there is nothing to weigh",
        ),
        (["weights=[1, 10, 1]"], "names a weight twice"),
        (["rater.num_workers=4"], "rater.num_workers: 4 workers"),
        (["tune.num_workers=4"], "tune.num_workers: 4 workers"),
    ],
)
def test_preflight_names_the_field(overrides, message, monkeypatch):
    for name in ("RAY_ADDRESS", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as error:
        check_clinician_preference(config(*overrides))
    assert message in str(error.value)


def test_preflight_passes_the_demo():
    check_clinician_preference(config())
    check_clinician_preference(config("demonstrations.encoder=open_clip:hf-hub:org/name", "weights=[1, 100]"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "medray/recipes/clinician_preference").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_recipe_loads(path):
    assert config(file=path.name).select.fraction == 0.4


def inputs(one):
    """What every stage depends on beside the stages before it, by its section."""
    rater = next(iter(steps.rater_configs(one).values()))
    found = {
        "data": steps.data_inputs(one),
        "embed": steps.embed_inputs(one),
        "draw": steps.draw_inputs(one),
        "generate": steps.generate_inputs(one, None),
        "rate": steps.rate_inputs(one, None),
        "split": steps.split_inputs(one),
        "rater": steps.rater_inputs(rater),
        "score": steps.score_inputs(one),
    }
    return {name: digest(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("engine.rows_per_task=1", set()),
        ("data.read_cpus=1", set()),
        ("generate.concurrency=2", set()),
        ("rate.timeout=1", set()),
        ("select.fraction=0.1", set()),
        ("demonstrations.batch=8", set()),
        ("score.rows_per_task=8", set()),
        ("tune.epochs=1", set()),
        ("seed=1", {"draw", "generate", "rate", "rater"}),
        ("data.max_labelled=7", {"data"}),
        ("captions.attributes=0", {"data"}),
        ("demonstrations.draw=7", {"draw"}),
        ("demonstrations.precision=bf16", {"embed"}),
        ("generate.rounds=[3, 3]", {"generate"}),
        ("rater.split_seed=3", {"split", "rater"}),
        ("rater.clinician_weight=3", {"rater"}),
        ("score.precision=bf16", {"score"}),
    ],
)
def test_stages_start_over_where_their_outcome_changes_and_only_there(override, changed):
    """A seed draws no images where all are taken."""
    before, after = inputs(config()), inputs(config(override))
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_weight_matters_only_where_pairs_are_mixed():
    alone = [
        next(
            iter(steps.rater_configs(config("rater.train_on=model", f"rater.clinician_weight={w}")).values())
        )
        for w in (1, 10)
    ]
    assert steps.rater_inputs(alone[0]) == steps.rater_inputs(alone[1])
    grid = steps.rater_configs(config("weights=[1, 10, 400]"))
    assert {name: one.clinician_weight for name, one in grid.items()} == {"-w1": 1, "-w10": 10, "-w400": 400}
    assert len({digest(steps.rater_inputs(one)) for one in grid.values()}) == 3


@pytest.mark.parametrize(
    ("weight", "train_on", "share"),
    [(100, "mixture", 0.75), (1, "mixture", 45 / 1545), (100, "model", 0), (0.1, "clinician", 1)],
)
def test_a_weight_is_told_as_the_clinicians_share(weight, train_on, share):
    rater = config(f"rater.train_on={train_on}").rater
    assert clinicians_share({"train, clinician": 45, "train, model": 1500}, weight, rater) == share
    assert clinicians_share({"train, clinician": 0, "train, model": 0}, weight, rater) == 0


def quality(clinician=None, model=0.7):
    sides = {"clinician": clinician, "model": model}
    return {
        "outputs": {
            "quality": {
                name: {"pair_accuracy": {"value": value}}
                for name, value in sides.items()
                if value is not None
            }
        }
    }


def test_the_grid_is_decided_by_held_out_clinicians_pairs():
    assert (
        steps.best_rater({"-w1": quality(0.6, 0.9), "-w10": quality(0.8, 0.5), "-w100": quality(0.8, 0.6)})
        == "-w10"
    )
    # no clinician's pair is held out
    assert steps.best_rater({"-w1": quality(None, 0.6), "-w10": quality(None, 0.9)}) == "-w10"


def picture():
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    return data.getvalue()


def judge(database, items):
    """A clinician takes that many items from the page's store and calls the first answer shown the good
    one.
    """
    store = Store(database)
    for number in range(items):
        shown = store.next_item("dr-ada")
        store.save(
            "dr-ada",
            shown.item_id,
            f"{shown.item_id}-{number}",
            Word("judged", good_first=True, good_second=False, seconds=2.0),
        )
    store.close()


def write(folder, schema, rows):
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(iter([pa.Table.from_pylist(rows, schema=schema)]), str(folder), "part")
    return str(folder)


@pytest.fixture
def asked(tmp_path):
    """Four questions about two images, in shards: (items stage, draw stage)."""
    questions = ["What is the cell size?", "Is the cell granular?"]
    items = [
        {
            "item_id": f"{image}/d0#{turn}",
            "image_id": image,
            "image": picture(),
            "dialogue_id": f"{image}/d0",
            "turn": turn,
            "question": question,
            "answer_a": ("small", "yes")[turn],
            "answer_b": ("big", "no")[turn],
            "context": "a cell",
        }
        for image, (turn, question) in itertools.product(("one", "two"), enumerate(questions))
    ]
    drawn = [{"sample_id": image, "attributes": list(RECORD.items())} for image in ("one", "two")]
    parts = {
        "items": write(tmp_path / "items", records.CLINICIAN_ITEM, items),
        "drawn": write(tmp_path / "drawn", records.IMAGE_TEXT, drawn),
    }
    return {"hash": "items", "outputs": {**parts, "counts": {}}}, {"outputs": parts}


def test_simulated_clinicians_become_pairs_and_demonstrations(asked, tmp_path):
    stage = Stage(Run(tmp_path / "run"), "stages/04-clinicians")
    one = config("clinicians.error_rate=0", "clinicians.judgements_per_item=2")
    for _ in range(2):  # a second attempt makes the same
        outputs = collect(stage, one, *asked)
        judgements, pairs, shown = (
            list(stored_rows(outputs[part])) for part in ("judgements", "pairs", "demonstrations")
        )
        assert [row["simulated"] for row in judgements] == [True] * 8
        assert len({(row["item_id"], row["clinician"]) for row in judgements}) == 8
        assert {(row["chosen_answer"], row["rejected_answer"], row["origin"]) for row in pairs} == {
            ("small", "big", "clinician"),
            ("yes", "no", "clinician"),
        }
        assert len(pairs) == len({row["sample_id"] for row in pairs}) == 8
        assert sorted(row["answer"] for row in shown) == ["small", "small", "yes", "yes"]
        assert (outputs["counts"]["items"], outputs["counts"]["judgements"], outputs["counts"]["pairs"]) == (
            4,
            8,
            8,
        )
        assert outputs["agreement"]["fleiss_kappa"]["ticks"]["kappa"] == 1.0


def test_real_clinicians_are_waited_for(asked, tmp_path, caplog, capsys):
    """Exit status 3 and how to serve the page, until enough is judged; then the stage is done."""
    database = f"sqlite:///{tmp_path}/judgements.db"
    one = config("clinicians.kind=database", f"clinicians.source={database}", "clinicians.enough=0.75")
    run = Run(tmp_path / "run")

    def stage():
        return run.stage("04-clinicians", {"items": "same"}, lambda stage: collect(stage, one, *asked))

    def job():
        stage()
        return {}

    caplog.set_level(logging.CRITICAL)
    assert run_job(job, "--run there") == 3
    said = capsys.readouterr().err
    assert "0 of 4 questions are judged by 1 clinicians each, 3 are needed" in said
    assert f"serve run serve.annotate:build items={asked[0]['outputs']['items']} database={database}" in said
    assert "with --run there to resume" in said
    judge(database, 2)
    with pytest.raises(Waiting, match="2 of 4"):
        stage()
    judge(database, 1)
    outputs = stage()["outputs"]
    assert len(list(stored_rows(outputs["judgements"]))) == 3
    assert not any(row["simulated"] for row in stored_rows(outputs["judgements"]))
    assert outputs["counts"]["pairs"] == 3
    exported = config(
        "clinicians.kind=export", f"clinicians.source={outputs['judgements']}", "clinicians.enough=0.75"
    )
    again = collect(Stage(Run(tmp_path / "other"), "stages/04-clinicians"), exported, *asked)
    assert list(stored_rows(again["pairs"])) == list(stored_rows(outputs["pairs"]))
    with pytest.raises(Waiting, match=r"3 of 4 questions .* 4 are needed"):
        collect(
            Stage(Run(tmp_path / "third"), "stages/04-clinicians"),
            exported.model_copy(
                update={"clinicians": exported.clinicians.model_copy(update={"enough": 1.0})}
            ),
            *asked,
        )


def test_what_an_export_wrote_is_found_and_anything_else_is_named(tmp_path):
    judged = write(
        tmp_path / "all" / "judgements",
        records.JUDGEMENT,
        [{"item_id": "one", "clinician": "dr-ada", "status": "skipped"}],
    )
    pairs = write(tmp_path / "all" / "pairs", records.RATING_PAIR, [{"sample_id": "one"}])
    assert exported_judgements(str(tmp_path / "all")) == exported_judgements(judged) == judged
    with pytest.raises(DataError, match="lacks clinician, good_a, good_b, item_id, status"):
        exported_judgements(pairs)
    with pytest.raises(DataError, match="neither it nor its folder judgements has a Parquet file"):
        exported_judgements(str(tmp_path))


def test_judgements_of_another_runs_questions_are_refused(asked, tmp_path):
    """Items of the same images have the same ids in every run."""
    items = list(stored_rows(asked[0]["outputs"]["items"]))
    mine = [
        {
            "item_id": row["item_id"],
            "clinician": "dr-ada",
            "simulated": False,
            "status": "not_answerable",
            "item": item_fingerprint(row),
        }
        for row in items
    ]
    theirs = [*mine[:-1], {**mine[-1], "item": item_fingerprint({**items[-1], "answer_b": "maybe"})}]
    for name, rows in (("mine", mine), ("theirs", theirs)):
        one = config(
            "clinicians.kind=export", f"clinicians.source={write(tmp_path / name, records.JUDGEMENT, rows)}"
        )
        stage = Stage(Run(tmp_path / f"run-{name}"), "stages/04-clinicians")
        if name == "mine":
            assert collect(stage, one, *asked)["counts"]["judgements"] == 4
        else:
            with pytest.raises(DataError, match=r"1 of the judgements in .* two/d0#1 first"):
                collect(stage, one, *asked)


def test_skipped_questions_are_named_while_waiting(asked, tmp_path):
    rows = [
        {
            "item_id": row["item_id"],
            "clinician": "dr-ada",
            "simulated": False,
            "status": "skipped" if turn else "judged",
            "good_a": not turn or None,
            "good_b": None if turn else False,
        }
        for turn, row in enumerate(stored_rows(asked[0]["outputs"]["items"]))
        if turn < 2
    ]
    one = config(
        "clinicians.kind=export",
        f"clinicians.source={write(tmp_path / 'judgements', records.JUDGEMENT, rows)}",
    )
    with pytest.raises(
        Waiting,
        match=r"1 of 4 questions are judged .*\n1 more were skipped: another clinician can judge them",
    ):
        collect(Stage(Run(tmp_path / "run"), "stages/04-clinicians"), one, *asked)


def test_without_a_choice_there_is_nothing_to_ask(tmp_path):
    empty = write(tmp_path / "items", records.CLINICIAN_ITEM, [])
    with pytest.raises(StageError, match="no question got two different answers"):
        collect(
            Stage(Run(tmp_path / "run"), "s"),
            config(),
            {"outputs": {"items": empty, "counts": {}}},
            {"outputs": {"drawn": empty}},
        )


def test_scores_and_dialogues_are_held_against_the_truth(tmp_path):
    names = [f"image-{n}" for n in range(40)]
    captioned = write(
        tmp_path / "captioned",
        records.IMAGE_TEXT,
        [{"sample_id": name, "attributes": list(RECORD.items())} for name in names],
    )
    answers = [("small", 0.9), ("big", 0.1)]

    def turns(said):
        return [
            {"role": "user", "text": "What is the cell size?"},
            {"role": "assistant", "text": said},
            {"role": "user", "text": "What is the mood?"},
            {"role": "assistant", "text": "good"},
        ]

    rows = [
        {"sample_id": f"{name}/d{k}", "image_id": name, "turns": turns(said)}
        for name in names
        for k, (said, _) in enumerate(answers)
    ]
    written = write(tmp_path / "written", records.CONVERSATION, rows)
    kept = write(tmp_path / "kept", records.CONVERSATION, rows[::2])
    scored = [
        {
            "sample_id": f"{name}{k}",
            "image_id": name,
            "question": "What is the cell size?",
            "answer": said,
            "score": score,
        }
        for name in names
        for k, (said, score) in enumerate(answers)
    ]
    forth = write(tmp_path / "scored", records.SCORED, scored)
    back = write(tmp_path / "rated", records.RATED, [{**row, "score": -row["score"]} for row in scored])
    made = {
        "data": {"outputs": {"captioned": captioned}},
        "written": {"outputs": {"conversations": written}},
        "scored": {"outputs": {"rows": forth}},
        "rated": {"outputs": {"rows": back}},
    }
    truth = against_truth(config(), made, {"selected": {"outputs": {"conversations": kept}}})
    auc = {"rating VLM": 0.0, "rating model": 1.0}
    assert truth == {
        "images": 40,
        "right": {"written": 0.5, "selected": 1.0},
        "auc": auc,
        "auc, not in the caption": auc,
    }
    # Of images with a caption the size is stated, the colour is not; answers about that are scored the wrong
    # way round.
    told = [{**row, "context": "small cell size, round cell shape\nFigure 2."} for row in scored]
    colours = [(RECORD["cytoplasm_colour"], 0.2), ("no colour", 0.8)]
    told += [
        {
            **told[0],
            "question": "Which colour does the cytoplasm have?",
            "answer": said,
            "image_id": name,
            "score": score,
        }
        for name in names
        for said, score in colours
    ]
    seen = against_truth(
        config(),
        {**made, "scored": {"outputs": {"rows": write(tmp_path / "told", records.SCORED, told)}}},
        {},
    )
    assert (seen["auc"]["rating model"], seen["auc, not in the caption"]["rating model"]) == (0.75, 0.0)
    free = [
        {**row, "turns": [{"role": "user", "text": "Why?"}, {"role": "assistant", "text": "So."}]}
        for row in rows
    ]
    free_scores = {
        "outputs": {
            "rows": write(
                tmp_path / "free_scores", records.SCORED, [{**row, "question": "Why?"} for row in scored]
            )
        }
    }
    free_made = {
        **made,
        "written": {"outputs": {"conversations": write(tmp_path / "free", records.CONVERSATION, free)}},
        "scored": free_scores,
        "rated": free_scores,
    }
    nothing = against_truth(config(), free_made, {})
    none = {"rating VLM": None, "rating model": None}
    assert nothing == {"images": 40, "right": {"written": None}, "auc": none, "auc, not in the caption": none}
    unknown = write(
        tmp_path / "unknown",
        records.IMAGE_TEXT,
        [{"sample_id": "image-0", "attributes": [("mass_shape", "oval")]}],
    )
    assert against_truth(config(), {**made, "data": {"outputs": {"captioned": unknown}}}, {}) == {}


def test_the_arm_of_right_answers_keeps_right_ones_first_and_wrong_ones_last(tmp_path):
    """Whatever the rating model thinks of them; what cannot be checked lies between."""
    names = [f"image-{n}" for n in range(20)]
    captioned = write(
        tmp_path / "captioned",
        records.IMAGE_TEXT,
        [{"sample_id": name, "attributes": list(RECORD.items())} for name in names],
    )
    asked = [
        ("What is the cell size?", RECORD["cell_size"], 0.0),
        ("What is the cell size?", "none", 9.0),
        ("What is the mood?", "good", 5.0),
    ]
    scored = [
        {
            "sample_id": f"{name}/d{k}#0",
            "dialogue_id": f"{name}/d{k}",
            "turn": 0,
            "image_id": name,
            "image": b"",
            "modality": "ct",
            "question": question,
            "answer": answer,
            "score": score,
        }
        for name in names
        for k, (question, answer, score) in enumerate(asked)
    ]
    made = {
        "data": {"outputs": {"captioned": captioned}},
        "scored": {"outputs": {"rows": write(tmp_path / "scored", records.SCORED, scored)}},
    }
    for top, kept in (
        (20, {asked[0][1]: 20}),
        (30, {asked[0][1]: 20, "good": 10}),
        (50, {asked[0][1]: 20, "good": 20, "none": 10}),
    ):
        one = config("select.fraction=null", f"select.top={top}", "select.relative_to=exchange")
        found = steps.select(Stage(Run(tmp_path / f"run-{top}"), "s"), one, made, steps.ORDERS["right"])
        assert Counter(row["turns"][1]["text"] for row in stored_rows(found["conversations"])) == kept
    steps.check_arms(config("evaluate.arms=[right]"), made["data"])
    unknown = {
        "outputs": {
            "captioned": write(
                tmp_path / "unknown",
                records.IMAGE_TEXT,
                [{"sample_id": "image-0", "attributes": [("mass_shape", "oval")]}],
            )
        }
    }
    steps.check_arms(config(), unknown)
    with pytest.raises(
        DataError,
        match=r"evaluate.arms: right needs the true attributes of images, and testbed:cells has none",
    ):
        steps.check_arms(config("evaluate.arms=[right]"), unknown)


def test_the_table_names_simulated_clinicians_as_such():
    people = {"simulated-1": {"simulated": True}, "simulated-2": {"simulated": True}}
    clinicians = {
        "kind": "simulated",
        "error_rate": 0.1,
        "judgements": 120,
        "pairs": 50,
        "agreement": {"clinicians": people},
    }
    rater = {"clinician": {"pair_accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}}, "model": None}
    text = table(
        {
            "scores": {},
            "rater": rater,
            "clinicians": clinicians,
            "truth": {"right": {"written": 0.7, "selected": 0.85}},
        }
    )
    assert text.splitlines() == [
        "rating model, held-out pairs ordered as judged: clinicians' 0.800 [0.700, 0.900]",
        "2 simulated clinicians, error rate 0.1: 120 judgements, 50 preference pairs",
        "right answers in the dialogues: written 0.700, selected 0.850",
    ]

    def said(people, truth=None):
        return table(
            {
                "scores": {},
                "rater": rater,
                "clinicians": {
                    **clinicians,
                    "kind": "export",
                    "error_rate": None,
                    "agreement": {"clinicians": people},
                },
                "truth": truth or {},
            }
        )

    assert "2 clinicians: 120 judgements" in said(
        {"dr-ada": {"simulated": False}, "dr-bo": {"simulated": False}}
    )
    assert "2 simulated clinicians: 120" in said(people), "exported by a run that simulated them"
    assert "2 simulated clinicians and 1 clinicians: 120" in said({**people, "dr-ada": {"simulated": False}})
    assert "written none can be checked" in said(people, {"right": {"written": None}})
