"""STLLaVA-Med (arXiv 2406.19973): a model that learns to ask as well as answer makes its own preference data.

Reads top to bottom like the paper. Stage names are its steps; every constant is a field of
`medray.config.SelfTrainingConfig` whose default is the paper's.

    data          conversations of the labelled share, unlabelled images, held-out questions
    sq_sft        visual self-questioning instruction tuning (SQ-LLaVA, arXiv 2403.11299), merged and exported
    verify        vLLM and transformers agree on the export
    per round r = 1 .. rounds:
      self_play   describe, ask n questions, answer each twice        (vLLM actors)
      judge       a stronger judge rates both answers                 (api, vLLM actors or random)
      pairs       clear preferences become pairs, the rest is counted
      reference   log-probabilities under the frozen round r-1 model
      dpo         direct preference optimisation, merged and exported
      verify
    evaluate      every model on the held-out questions, greedy
    report        report.html, results.json, metrics.jsonl; a model card with every export
"""

from __future__ import annotations

import time
from typing import Any

from medray.config import SelfTrainingConfig
from medray.errors import StageError
from medray.methods.self_train import stages as steps
from medray.methods.self_train.report import write_report
from medray.methods.shared import stages
from medray.methods.shared.model_card import SELF_TRAINING, publish_models
from medray.plan.preflight import check_self_training
from medray.running.ray_session import ray_session
from medray.running.run import Run
from medray.running.run_hold import held


def self_train(config: SelfTrainingConfig, run_uri: str) -> dict[str, Any]:
    """Run or continue the whole method in the run directory `run_uri`.

    Returns the summary that the job prints: run, base, tuned (mean accuracy with interval), pairs, seconds,
    report, model, and a text table of the arms.

    Raises ConfigError before anything starts, StageError where a stage cannot go on (for example when the
    judge leaves no pair); the run directory stays and the same call continues it.
    """
    check_self_training(config)
    started = time.time()
    run = Run(run_uri)
    with held(run), ray_session(config.cluster):
        run.write_config(config)
        data = run.stage(
            "00-data", steps.data_inputs(config), lambda stage: steps.prepare_data(stage, config)
        )
        base = stages.resolve_base(config)

        sft = run.stage(
            "01-sq_sft",
            {
                "data": data["hash"],
                "model": stages.model_inputs(config.model),
                "base": base.hash,
                "train": config.sft.outcome(),
            },
            lambda stage: stages.tune(
                stage, config, base, data["outputs"]["conversations"], "sft", config.sft
            ),
        )
        model = stages.exported(sft)
        stages.verify(run, "01-verify", config, model, data)

        models = {"base": base, "sft": model}
        pairs_made = 0
        for number in range(1, config.rounds + 1):
            played = run.stage(
                f"{number}1-self_play",
                {
                    "data": data["hash"],
                    "model": model.hash,
                    "config": config.self_play,
                    "round": number,
                    **stages.asked_inputs(config),
                    "fresh": config.data.unlabelled_per_round == "fresh" and config.rounds,
                },
                lambda stage, model=model, number=number: steps.self_play(stage, config, model, data, number),
            )
            judged = run.stage(
                f"{number}2-judge",
                {"rows": played["hash"], **stages.judge_inputs(config)},
                lambda stage, played=played: steps.judge(stage, config, played),
            )
            pairs = run.stage(
                f"{number}3-pairs",
                {"rows": judged["hash"], "rules": steps.pair_rules(config)},
                lambda stage, judged=judged: steps.make_pairs(stage, config, judged),
            )
            if pairs["outputs"]["counts"]["pairs"] == 0:
                raise StageError(
                    f"round {number}: the judge left no preference pair ({pairs['outputs']['counts']}); "
                    "lower judge.min_margin or judge.min_chosen_score, raise self_play.answer.temperature or "
                    "question more images"
                )
            reference = run.stage(
                f"{number}4-reference",
                {"pairs": pairs["hash"], "model": model.hash, "settings": stages.model_inputs(config.model)},
                lambda stage, pairs=pairs, model=model: steps.reference_logps(stage, config, model, pairs),
            )
            tuned = run.stage(
                f"{number}5-dpo",
                {
                    "pairs": reference["hash"],
                    "model": model.hash,
                    "settings": stages.model_inputs(config.model),
                    "train": config.dpo.outcome(),
                },
                lambda stage, reference=reference, model=model: stages.tune(
                    stage, config, model, reference["outputs"]["rows"], "dpo", config.dpo
                ),
            )
            model = stages.exported(tuned)
            stages.verify(run, f"{number}6-verify", config, model, data)
            models[f"dpo-{number}"] = model
            pairs_made += pairs["outputs"]["counts"]["pairs"]

        scores: dict[str, dict[str, Any]] = {}
        for name, one in models.items():
            if steps.arm_of(name) not in config.evaluate.arms:
                continue
            before = scores.get(steps.previous_model(name) or "")
            scores[name] = run.stage(
                f"90-evaluate-{name}",
                {"data": data["hash"], "model": one.hash, **steps.evaluation_inputs(config, before)},
                lambda stage, one=one, name=name, before=before: steps.evaluate(
                    stage, config, one, name, data, before
                ),
            )
        results = write_report(run, config, scores)
        publish_models(run, config, SELF_TRAINING, models, list(models)[-1], results)
    return {
        "run": run.uri,
        "base": results["accuracy"].get("base"),
        "tuned": results["accuracy"][list(scores)[-1]],
        "pairs": pairs_made,
        "seconds": round(sum(stage["seconds"] for stage in run.timeline), 1),
        "wall_seconds": round(time.time() - started, 1),
        "report": run.path("report.html"),
        "model": model.path,
        **data["outputs"].get("account", {}),
        "table": results["table"],
    }
