"""Clinician preference alignment (BioMed-VITAL, arXiv 2406.13173): clinicians' choices shape the instruction
data, twice.

Their accepted answers are the demonstrations after which a strong model writes dialogues, and their choices,
with those of a strong model, train a rating model that selects what is tuned on. Reads top to bottom like the
paper; every constant is a field of `medray.config.ClinicianPreferenceConfig` whose default is the paper's.

    data          training images with caption and context, held-out questions
    embed, draw   image and caption as vectors, k-means, images spread over clusters and modalities
    candidates    dialogues about the drawn images, two answers to each question
    clinicians    each answer ticked or not: preference pairs, and accepted answers as demonstrations
    generate      dialogues about all images, after demonstrations
    rate          each exchange scored from 0 to 10 by a strong model
    pairs         exchanges of two score levels
    rater         the rating model, on both kinds of pairs, a clinician's with weight w (a grid of weights:
    one model for each) score         every exchange by the rating model per arm (selected: the best; random:
    as many drawn; all; right: as many that are
                    right by the true attributes, where there are some):
      select      the dialogues that are kept
      tune        supervised fine-tuning, exported
      evaluate    held-out questions, greedy; win rates where there is a judge
    verify        vLLM and transformers agree on the first arm's export
    report        report.html, results.json, metrics.jsonl; a model card with every export

Real clinicians take their time: the run ends when their questions are ready (medray.errors.Waiting) and goes
on, by the same call, when enough is judged. Runs that differ in some fields only can share all stages up to
the scores: see `shared_uri`, and studies/clinician_preference.py for a study made so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from medray.config import ClinicianPreferenceConfig
from medray.methods.clinician_preference import collect_judgements
from medray.methods.clinician_preference import stages as steps
from medray.methods.clinician_preference.report import describe_clinicians, write_report
from medray.methods.shared import stages
from medray.methods.shared.model_card import CLINICIAN_PREFERENCE, publish_models
from medray.plan.preflight import check_clinician_preference
from medray.running.ray_session import ray_session
from medray.running.run import Run, Stage
from medray.running.run_hold import held

Manifests = dict[str, dict[str, Any]]
Common = Callable[[str, dict[str, Any], Callable[[Stage], dict[str, Any]]], dict[str, Any]]


def clinician_preference(
    config: ClinicianPreferenceConfig, run_uri: str, shared_uri: str | None = None
) -> dict[str, Any]:
    """Run or continue the whole method in the run directory `run_uri`.

    Args:
        shared_uri: run directory for the stages that other runs can use too. One run at a time may work in
            it.

    Returns the summary that the job prints: run, accuracy of the base and of each arm, rater (its weight, and
    the share of held-out pairs that it orders as the clinicians and the strong model did), clinicians, truth,
    seconds, report, model, rating_model, and a text table.

    Raises ConfigError before anything starts, Waiting where clinicians are still to judge, DataError where
    there is nothing to work on, StageError where a stage cannot go on; the run directory stays and the same
    call continues it.
    """
    check_clinician_preference(config)
    started = time.time()
    run = Run(run_uri)
    shared = Run(shared_uri) if shared_uri else run

    def common(name: str, inputs: dict[str, Any], work: Callable[[Stage], dict[str, Any]]) -> dict[str, Any]:
        return stages.shared_stage(run, shared, name, inputs, work)

    with held(run, shared), ray_session(config.cluster):
        run.write_config(config)
        made = write_and_judge(config, common)
        raters = train_raters(config, made, common)
        chosen = steps.best_rater(raters)
        rater = raters[chosen]["outputs"]["model"]
        made["scored"] = common(
            "09-score",
            {
                "rows": made["written"]["hash"],
                "rater": raters[chosen]["hash"],
                "config": steps.score_inputs(config),
            },
            lambda stage: steps.score(stage, config, rater, made["written"]),
        )
        kept = select(run, config, made)
        models, scores = tune_and_evaluate(run, config, made["data"], kept, common)
        results = write_report(
            run,
            shared,
            config,
            made,
            raters,
            chosen,
            kept,
            scores,
            steps.win_rates(run, config, made["data"], scores),
        )
        if models:
            said = (f"The clinicians were {describe_clinicians(results['clinicians'])}.",)
            publish_models(run, config, CLINICIAN_PREFERENCE, models, config.evaluate.arms[0], results, said)
    alignment = {
        origin: found["pair_accuracy"]
        for origin in ("clinician", "model")
        if (found := results["rater"][origin])
    }
    return {
        "run": run.uri,
        **results["accuracy"],
        "rater": {"weight": results["rater"]["weight"], **alignment},
        "truth": results["truth"],
        "clinicians": {
            name: results["clinicians"].get(name) for name in ("kind", "error_rate", "judgements", "pairs")
        },
        "seconds": round(sum(stage["seconds"] for stage in run.timeline), 1),
        "wall_seconds": round(time.time() - started, 1),
        **made["data"]["outputs"].get("account", {}),
        "report": run.path("report.html"),
        "model": models[config.evaluate.arms[0]].path if models else None,
        "rating_model": rater,
        "table": results["table"],
    }


def write_and_judge(config: ClinicianPreferenceConfig, common: Common) -> Manifests:
    """Stages 00 to 07: what clinicians and the strong model prefer. Returns their manifests."""
    data = common("00-data", steps.data_inputs(config), lambda stage: steps.prepare_data(stage, config))
    steps.check_arms(config, data)
    encoder = stages.local_model(config.demonstrations.encoder)
    writer, scorer = (
        stages.local_model(one.model) if one.kind == "vllm" else None
        for one in (config.generate, config.rate)
    )

    embedded = common(
        "01-embed",
        {"data": data["hash"], "encoder": encoder.hash, "config": steps.embed_inputs(config)},
        lambda stage: steps.embed(stage, config, encoder.path, data),
    )
    drawn = common(
        "02-draw",
        {"rows": embedded["hash"], "config": steps.draw_inputs(config)},
        lambda stage: steps.draw(stage, config, data, embedded),
    )
    items = common(
        "03-candidates",
        {"drawn": drawn["hash"], **steps.generate_inputs(config, writer)},
        lambda stage: steps.candidates(stage, config, writer, drawn),
    )
    judged = common(
        "04-clinicians",
        {"items": items["hash"], "config": config.clinicians},
        lambda stage: collect_judgements.collect(stage, config, items, drawn),
    )

    shown = judged if config.with_demonstrations else None
    written = common(
        "05-generate",
        {
            "data": data["hash"],
            "demonstrations": shown and shown["hash"],
            "answers": config.generate.answers,
            **steps.generate_inputs(config, writer),
        },
        lambda stage: steps.generate(
            stage, config, writer, data, shown and shown["outputs"]["demonstrations"]
        ),
    )
    rated = common(
        "06-rate",
        {"rows": written["hash"], **steps.rate_inputs(config, scorer)},
        lambda stage: steps.rate(stage, config, scorer, written),
    )
    pairs = common(
        "07-pairs",
        {"rows": rated["hash"], "config": config.pairs, "split": steps.split_inputs(config)},
        lambda stage: steps.make_pairs(stage, config, rated),
    )
    return {
        "data": data,
        "drawn": drawn,
        "items": items,
        "clinicians": judged,
        "written": written,
        "rated": rated,
        "pairs": pairs,
    }


def train_raters(config: ClinicianPreferenceConfig, made: Manifests, common: Common) -> Manifests:
    """Stage 08: the rating model, one for each weight of the grid; their manifests by the end of the
    stages' names.
    """
    encoder = stages.local_model(config.rater.encoder)
    return {
        name: common(
            f"08-rater{name}",
            {
                "model": made["pairs"]["hash"],
                "clinicians": made["clinicians"]["hash"],
                "encoder": encoder.hash,
                "config": steps.rater_inputs(rater),
                "measured": steps.measured_inputs(config),
            },
            lambda stage, rater=rater: steps.train_rater(
                stage, config, rater, made["pairs"], made["clinicians"]
            ),
        )
        for name, rater in steps.rater_configs(config).items()
    }


def select(run: Run, config: ClinicianPreferenceConfig, made: Manifests) -> Manifests:
    """Stage 10: the dialogues of each arm; all of them need no selection."""
    return {
        arm: made["written"]
        if arm == "all"
        else run.stage(
            f"10-select-{arm}",
            {"rows": made["scored"]["hash"], **steps.select_inputs(config, steps.ORDERS[arm])},
            lambda stage, arm=arm: steps.select(stage, config, made, steps.ORDERS[arm]),
        )
        for arm in config.evaluate.arms
    }


def tune_and_evaluate(
    run: Run,
    config: ClinicianPreferenceConfig,
    data: dict[str, Any],
    kept: Manifests,
    common: Common,
) -> tuple[dict[str, stages.Model], Manifests]:
    """Stages 11, 12 and 90: the base and each arm's model, and their evaluations; none where there is no arm.

    The first arm is what the run is for: it comes last, so that it is compared with all others.
    """
    base = stages.resolve_base(config)
    asked = {"data": data["hash"], **stages.asked_inputs(config), "config": config.evaluate.outcome("arms")}
    models = {"base": base} if kept else {}
    scores: Manifests = {}
    if kept:
        scores["base"] = common(
            "90-evaluate-base",
            {**asked, "model": base.hash},
            lambda stage: steps.evaluate(stage, config, base, "base", data, {}),
        )
    for arm, rows in reversed(kept.items()):
        tuned = run.stage(
            f"11-tune-{arm}",
            {
                "rows": rows["hash"],
                "model": stages.model_inputs(config.model),
                "base": base.hash,
                "train": config.tune.outcome(),
            },
            lambda stage, rows=rows: stages.tune(
                stage,
                config,
                base,
                rows["outputs"]["conversations"],
                "sft",
                config.tune,
                data["outputs"]["eval_conversations"],
            ),
        )
        model = stages.exported(tuned)
        if arm == config.evaluate.arms[0]:
            stages.verify(run, f"12-verify-{arm}", config, model, data)
        before = dict(scores)
        scores[arm] = run.stage(
            f"90-evaluate-{arm}",
            {**asked, "model": model.hash, "others": {name: one["hash"] for name, one in before.items()}},
            lambda stage, arm=arm, model=model, before=before: steps.evaluate(
                stage, config, model, arm, data, before
            ),
        )
        models[arm] = model
    return models, scores
