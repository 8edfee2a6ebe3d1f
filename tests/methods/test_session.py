"""How a job starts or joins Ray."""

import json

import pytest
from ray._private.worker import _merge_runtime_env

from medray.methods.session import _not_of_the_job

VARIABLES = {"RAY_TRAIN_V2_ENABLED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.mark.parametrize("given", [{}, {"OPENAI_API_KEY": "sk"}, VARIABLES, {"RAY_TRAIN_V2_ENABLED": "0"}])
def test_variables_that_the_job_was_submitted_with_are_left_to_it(monkeypatch, given):
    """Ray itself refuses to start where both name one."""
    submitted = {"working_dir": ".", "env_vars": given}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": submitted}))
    merged = _merge_runtime_env(submitted, {"env_vars": _not_of_the_job(VARIABLES)})
    assert merged["env_vars"] == VARIABLES | given


@pytest.mark.parametrize("config", [None, "{}", '{"runtime_env": {}}', '{"runtime_env": {"working_dir": "."}}'])
def test_a_job_without_variables(monkeypatch, config):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if config is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
    assert _not_of_the_job(VARIABLES) == VARIABLES
