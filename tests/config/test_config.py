"""A wrong configuration fails at once, naming the field and the fix."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from medray.config import (
    ClinicianPreferenceConfig,
    DpoConfig,
    InstructionFreeConfig,
    JudgeConfig,
    LoopConfig,
    SelfTrainingConfig,
    SftConfig,
    load_config,
)
from medray.config.reference_page import markdown
from medray.errors import ConfigError
from medray.plan.preflight import check_self_training

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(SelfTrainingConfig, tmp_path, [])


def test_defaults_are_the_papers():
    config = SelfTrainingConfig()
    sft, dpo, play = config.sft, config.dpo, config.self_play
    assert (sft.lr_llm, sft.lr_projector, sft.lr_vision) == (2e-4, 2e-5, 5e-5)
    assert (dpo.lr_llm, dpo.lr_projector, dpo.lr_vision) == (5e-6, 2e-5, 2e-5)
    assert (sft.lora_llm.rank, sft.lora_llm.alpha, sft.lora_llm.dropout) == (128, 256, 0.05)
    assert (sft.lora_vision.rank, sft.lora_vision.alpha, sft.lora_vision.dropout) == (32, 64, 0.2)
    assert dpo.lora_vision.dropout == 0.1
    assert (sft.micro_batch, sft.accumulation, sft.epochs) == (8, 4, 3)
    assert (dpo.micro_batch, dpo.accumulation, dpo.epochs, dpo.beta) == (4, 16, 1, 0.1)
    assert (sft.warmup_ratio, sft.weight_decay, sft.zero_stage, sft.self_questioning) == (0.03, 0.0, 3, 0.5)
    assert (play.questions, play.ask.temperature, play.ask.top_k, play.ask.top_p, play.ask.max_tokens) == (
        5,
        1.2,
        300,
        0.95,
        300,
    )
    assert (play.answers, play.answer.top_k, play.answer.max_tokens, play.describe.temperature) == (
        2,
        100,
        1024,
        0,
    )
    assert config.judge.temperature == 0.2
    assert config.rounds == 1


@pytest.mark.parametrize(
    ("override", "field", "hint"),
    [
        ("dpo.bta=1", "dpo", "did you mean 'beta'"),
        ("nope.x=1", "nope", "known: model, data"),
        ("dpo.micro_batch=0", "dpo.micro_batch", "greater than or equal to 1"),
        ("sft.num_workers=many", "sft.num_workers", "integer"),
        ("sft.num_workers=[3, 1]", "sft.num_workers", "ordered"),
        (
            "sft={global_batch: 7, accumulation: 4}",
            "sft",
            "micro_batch 8 x accumulation 4 x 1 workers is 32; leave accumulation out",
        ),
        ("sft.accumulation=null", "sft", "give global_batch"),
        ("model.precision=fp8", "model.precision", "'bf16' or 'fp32'"),
        ("dpo.beta=0", "dpo.beta", "greater than 0"),
        ("dpo.beta=.nan", "dpo.beta", "finite"),
        ("judge.scoring=likelihood", "judge", "needs kind vllm"),
        ("dpo.beta", "dpo.beta", "section.field=value"),
    ],
)
def test_bad_override_names_the_field(override, field, hint):
    with pytest.raises(ConfigError) as error:
        load_config(SelfTrainingConfig, None, [override])
    assert field in str(error.value)
    assert hint in str(error.value)


def test_unknown_key_in_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sft:\n  epoch: 3\n")
    with pytest.raises(
        ConfigError, match=r"sft\.epoch: unknown field 'epoch', did you mean 'epochs'.*c\.yaml"
    ):
        load_config(SelfTrainingConfig, path)


def test_not_yaml_and_missing_files(tmp_path):
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(SelfTrainingConfig, tmp_path / "c.yaml")
    (tmp_path / "l.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(SelfTrainingConfig, tmp_path / "l.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(SelfTrainingConfig, tmp_path / "none.yaml")


def test_numbers_written_without_a_dot(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sft: {lr_llm: 2e-3}\n")
    config = load_config(SelfTrainingConfig, path, ["dpo.lr_llm=5E-7"])
    assert config.sft.lr_llm == 0.002
    assert config.dpo.lr_llm == 5e-7


def test_elastic_workers_keep_the_global_batch():
    config = SftConfig(num_workers=(1, 4))
    assert config.samples_per_step == 8 * 4 * 4
    assert DpoConfig(global_batch=64).samples_per_step == 64


@pytest.mark.parametrize("workers", [1, 2, 3, 32, (1, 32)])
def test_global_batch_is_what_the_recipe_says_at_any_number_of_workers(workers):
    config = SftConfig(global_batch=128, num_workers=workers)
    assert config.samples_per_step == 128
    again = SftConfig.model_validate(config.model_dump())  # as it reaches the training workers
    assert (again.samples_per_step, again.accumulation) == (128, None)
    passes = {one: again.passes_at(one) for one in (1, 2, 3, 32)}
    assert "128 samples per optimiser step" in config.batch_line
    assert passes == {1: 16, 2: 8, 3: 6, 32: 1}  # of 8 samples at most: 128 / 3 workers is 43, in six passes


def test_workers_without_a_sample_are_named():
    assert "24 of 32 workers would get no sample" in SftConfig(global_batch=8, num_workers=32).batch_line


@pytest.mark.parametrize(
    "path", sorted((ROOT / "medray/recipes").glob("*/*7b.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_more_workers_leave_the_batch_of_a_gpu_recipe(path):
    kind = {
        "self_train": SelfTrainingConfig,
        "instruction_free": InstructionFreeConfig,
        "clinician_preference": ClinicianPreferenceConfig,
    }[path.parent.name]
    as_written = load_config(kind, path)
    for name in (name for name in kind.model_fields if isinstance(getattr(as_written, name), LoopConfig)):
        wider = load_config(kind, path, [f"{name}.num_workers=32"])
        assert getattr(wider, name).samples_per_step == getattr(as_written, name).samples_per_step


def test_one_seed_reaches_every_stage():
    config = load_config(SelfTrainingConfig, None, ["seed=7"])
    assert (config.sft.seed, config.dpo.seed, config.self_play.seed, config.judge.seed) == (7, 7, 7, 7)
    assert config.evaluate.seed == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/no/such/model"], "model.path: /no/such/model does not exist"),
        (["model.path=testbed:huge"], "model.path: unknown bundled model"),
        (["data.source=/no/such/data"], "data.source: /no/such/data does not exist"),
        (
            ["sft.num_workers=4"],
            "sft.num_workers: 4 workers x 1 CPUs, 0.25 to encode (data.read_cpus) and a CPU to read data "
            "need more than the 4 CPUs here",
        ),
        (["dpo.cpus_per_worker=3"], "dpo.num_workers: 1 workers x 3 CPUs"),
        (
            ["dpo.cpus_per_worker=2.5"],
            "dpo.reference_workers: 1 workers x 2.5 CPUs, and a CPU each to read data and to leave out what "
            "is done,",
        ),
        (["engine.cpus_per_actor=2.5"], "engine.actors: 1 actors x 2.5 CPUs"),
        (["engine.actors=[3, 3]"], "engine.actors: 3 actors x 2 CPUs"),
        (
            ["judge.kind=api", "judge.scoring=scores"],
            "judge.key_env: the environment variable OPENAI_API_KEY is not set",
        ),
        (["judge.model=/no/judge"], "judge.model: /no/judge does not exist"),
        (["data.eval_split=train"], "data.eval_split: must differ"),
    ],
)
def test_preflight_names_the_field(overrides, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(SelfTrainingConfig, ROOT / "medray/recipes/self_train/tiny-cpu.yaml", overrides)
    with pytest.raises(ConfigError) as error:
        check_self_training(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sft.gpus_per_worker=8"],
            "sft.gpus_per_worker: 1 x 8 GPUs (sft.num_workers) are 8, and there are 2 here; set "
            "sft.gpus_per_worker=0",
        ),
        (["engine.gpus_per_actor=4"], "engine.gpus_per_actor: 1 x 4 GPUs (engine.actors)"),
        (
            ["dpo.gpus_per_worker=1", "dpo.reference_workers=[3, 3]"],
            "dpo.gpus_per_worker: 3 x 1 GPUs (dpo.reference_workers)",
        ),
        (
            [
                "dpo.gpus_per_worker=1",
                "sft.gpus_per_worker=2",
                "sft.num_workers=[1, 8]",
                "sft.cpus_per_worker=0.1",
            ],
            None,
        ),
    ],
)
def test_gpus_are_counted_as_cpus_are(overrides, message, monkeypatch):
    """Ray would wait forever for GPUs that this machine has not."""
    from medray.plan import preflight

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(preflight, "_ray_runs", lambda: False)
    monkeypatch.setattr(preflight, "local_gpus", lambda: 2)
    config = load_config(
        SelfTrainingConfig,
        ROOT / "medray/recipes/self_train/tiny-cpu.yaml",
        ["cluster.num_cpus=64", *overrides],
    )
    if message is None:
        check_self_training(config)
    else:
        with pytest.raises(ConfigError) as error:
            check_self_training(config)
        assert message in str(error.value)
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster may have them, or grow
    check_self_training(config)


def test_splits_of_a_prepared_directory_are_checked_before_anything_starts(tmp_path):
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"kind": "medray-dataset", "splits": {"train": 313, "test": 203}}')
    config = load_config(
        SelfTrainingConfig, ROOT / "medray/recipes/self_train/tiny-cpu.yaml", [f"data.source={tmp_path}"]
    )
    with pytest.raises(
        ConfigError,
        match=r"data\.eval_split: no image of split 'val' in .*; there are train \(313\), test \(203\)$",
    ):
        check_self_training(config)
    config.data.eval_split = "test"
    check_self_training(config)
    config.data.eval_split = "val"
    # drawn by hash, or another file of that name
    for other in ('{"kind": "medray-dataset", "splits": {"unknown": 9}}', '{"kind": "other"}', "[]", "cut"):
        manifest.write_text(other)
        check_self_training(config)


def test_hidden_gpus_do_not_count(monkeypatch):
    from medray.plan.preflight import local_gpus

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert not local_gpus()


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("sft.lr=1", "did you mean 'lr_llm'?"),
        ("sft.lora_llm.r=8", "did you mean 'rank'?"),
        ("sft.per_device_train_batch_size=8", "did you mean 'micro_batch'?"),
        ("beta=0.2", "did you mean dpo.beta?"),
        ("sft.beta=0.2", "did you mean dpo.beta?"),
        ("cutoff_len=9", "did you mean model.max_length?"),
        ("engine.gpu_memory_utilization=1", "did you mean 'memory_utilization'?"),
        ("sft.zzz=1", "known: num_workers"),
    ],
)
def test_another_name_is_answered_with_ours(override, hint):
    with pytest.raises(ConfigError) as error:
        load_config(SelfTrainingConfig, None, [override])
    assert hint in str(error.value)


def test_unknown_field_of_a_file_is_found_elsewhere(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sft: {beta: 0.2}\n")
    with pytest.raises(ConfigError, match=r"sft\.beta: unknown field 'beta', did you mean dpo\.beta\?"):
        load_config(SelfTrainingConfig, path)


def test_check_says_which_recipe_and_batch(capsys, tmp_path, monkeypatch):
    from medray.commands.self_train import main

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["--check"]) == 0
    said = capsys.readouterr().err
    assert "recipe: tiny-cpu (--config names none; there are also llava-1.5-7b" in said
    assert "sft: 16 samples per optimiser step at 1 worker(s)" in said and "warning" not in said
    assert main(["--check", "--data", str(tmp_path)]) == 0
    assert "warning: data.source is yours, and this recipe is the demo's" in capsys.readouterr().err
    assert (
        main(
            [
                "--check",
                "--config",
                str(ROOT / "medray/recipes/self_train/tiny-cpu.yaml"),
                "--data",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert "recipe:" not in capsys.readouterr().err


@pytest.mark.parametrize("job", ["prepare_data", "evaluate"])
def test_a_job_without_what_it_needs_prints_its_usage(job, capsys):
    """jobs/prepare_data.py once rendered the synthetic set."""
    import importlib

    assert importlib.import_module(f"medray.commands.{job}").main([]) == 2
    said = capsys.readouterr().err
    assert f"usage: jobs/{job}.py" in said
    assert (
        "SOURCE: name what to prepare" if job == "prepare_data" else "name --model, --benchmark and --data"
    ) in said


def test_preflight_passes_the_demo():
    config = load_config(SelfTrainingConfig, ROOT / "medray/recipes/self_train/tiny-cpu.yaml")
    check_self_training(config)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "medray/recipes").glob("self_train/*.yaml")), ids=lambda p: p.name
)
def test_every_recipe_loads(path):
    config = load_config(SelfTrainingConfig, path)
    assert yaml.safe_load(path.read_text())["model"]["path"] == config.model.path


def test_job_rejects_a_bad_config_without_heavy_imports():
    """The guard of "under two seconds": no torch, Ray or vLLM is loaded on the way to the error."""
    code = (
        "import sys, runpy; sys.argv = ['self_train.py', '--set', 'dpo.bta=1']\n"
        "try: runpy.run_path('jobs/self_train.py', run_name='__main__')\n"
        "except SystemExit as e: print('status', e.code)\n"
        "print('heavy', sorted({'torch', 'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "status 2" in done.stdout
    assert "heavy []" in done.stdout
    assert "did you mean 'beta'" in done.stderr


def test_reference_page_is_current():
    assert (ROOT / "docs/reference/config.md").read_text().strip() == markdown().strip(), "run: make docs"


def test_judge_likelihood_is_for_local_judges():
    assert JudgeConfig(kind="vllm", scoring="likelihood").scoring == "likelihood"
