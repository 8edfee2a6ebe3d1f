"""Instruction-free tuning (arXiv 2603.19482): a model learns images from descriptions alone and goes on
following instructions.

Reads top to bottom like the method. In place of an instruction stands a proxy, a few learnable vectors that
are dropped at inference, and the parts of a description come in a new order every epoch. Every constant is a
field of `medray.config.InstructionFreeConfig` whose default is the paper's.

    data            descriptions of the training images; of the held-out ones multiple-choice questions and
    descriptions; general questions warm_up         only the proxy trains (not where tune.instruction is a
    text) tune            vision tower, projector and proxy train together; the model is exported, the proxy
    lies beside it verify          vLLM and transformers agree on the export evaluate        base and tuned
    model: multiple choice read strictly and by likelihood, plain questions, leaked descriptions,
                    general questions kept, descriptions
    report          report.html, results.json, metrics.jsonl; a model card with the export

Runs that differ in some fields only can share what these do not touch (data, warm-up, the base model's
evaluation): see `shared_uri`, and studies/instruction_free.py for a study made so.
"""

from __future__ import annotations

import time
from typing import Any

from medray.config import InstructionFreeConfig
from medray.methods.instruction_free import stages as steps
from medray.methods.instruction_free.report import write_report
from medray.methods.shared import stages
from medray.methods.shared.model_card import INSTRUCTION_FREE, publish_models
from medray.methods.shared.stages import shared_stage
from medray.plan.preflight import check_instruction_free
from medray.running.ray_session import ray_session
from medray.running.run import Run
from medray.running.run_hold import held


def instruction_free(
    config: InstructionFreeConfig, run_uri: str, shared_uri: str | None = None
) -> dict[str, Any]:
    """Run or continue the whole method in the run directory `run_uri`.

    Args:
        shared_uri: run directory for the stages that other runs can use too. One run at a time may work in
            it.

    Returns the summary that the job prints: run, base and tuned (each as instruction_free_report.measures),
    floors, seconds, report, model, proxy, and a text table.

    Raises ConfigError before anything starts, DataError where there is nothing to tune on, StageError where a
    stage cannot go on; the run directory stays and the same call continues it.
    """
    check_instruction_free(config)
    started = time.time()
    run = Run(run_uri)
    shared = Run(shared_uri) if shared_uri else run
    with held(run, shared), ray_session(config.cluster):
        run.write_config(config)
        data = shared_stage(
            run, shared, "00-data", steps.data_inputs(config), lambda stage: steps.prepare_data(stage, config)
        )
        base = stages.resolve_base(config)
        common = {"data": data["hash"], "model": stages.model_inputs(config.model), "base": base.hash}

        warm_up = None
        if config.tune.instruction is None:
            warm_up = shared_stage(
                run,
                shared,
                "01-warm_up",
                {**common, "train": config.warm_up.outcome()},
                lambda stage: steps.warm_up(stage, config, base, data),
            )
        proxy = warm_up and warm_up["outputs"]["proxy"]
        tuned = run.stage(
            "02-tune",
            {**common, "train": config.tune.outcome(), "proxy": warm_up and warm_up["hash"]},
            lambda stage: steps.tune(stage, config, base, data, proxy),
        )
        model = stages.exported(tuned)
        stages.verify(run, "03-verify", config, model, data)

        asked = {
            "data": data["hash"],
            **stages.asked_inputs(config),
            "config": config.evaluate.outcome("arms"),
        }
        before = shared_stage(
            run,
            shared,
            "90-evaluate-base",
            {**asked, "model": base.hash},
            lambda stage: steps.evaluate(stage, config, base, "base", data),
        )
        after = run.stage(
            "90-evaluate-tuned",
            {**asked, "model": model.hash, "base": before["hash"]},
            lambda stage: steps.evaluate(stage, config, model, "tuned", data, before),
        )
        results = write_report(run, shared, config, data, before, after)
        publish_models(run, config, INSTRUCTION_FREE, {"base": base, "tuned": model}, "tuned", results)
    return {
        "run": run.uri,
        **results["measures"],
        "floors": results["floors"],
        "seconds": round(sum(stage["seconds"] for stage in run.timeline), 1),
        "wall_seconds": round(time.time() - started, 1),
        "report": run.path("report.html"),
        "model": model.path,
        "proxy": tuned["outputs"].get("proxy"),
        **data["outputs"].get("account", {}),
        "table": results["table"],
    }
