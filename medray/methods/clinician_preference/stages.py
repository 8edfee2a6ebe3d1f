"""The stages of clinician preference alignment that other methods do not have (medray.methods.shared.stages
holds what they share).

They only place work. The clinicians' stage is in medray.methods.clinician_preference.collect_judgements.
"""

from __future__ import annotations

from typing import Any

from medray.config import ClinicianPreferenceConfig, RaterConfig
from medray.data.attribute_questions import ATTRIBUTES
from medray.errors import DataError
from medray.methods.clinician_preference.ground_truth import checkable, correctness_scorer
from medray.methods.clinician_preference.report import clinicians_of, describe_clinicians
from medray.methods.shared import stages
from medray.methods.shared.model_card import CARD, rater_card
from medray.methods.shared.stages import Model
from medray.running.run import Run, Stage
from medray.running.set_aside import check_set_aside, check_something, set_aside_in

_DRAW = {"clusters", "kmeans_batch", "passes", "draw", "picture_points", "seed"}
# of an arm: select.order, or the true attributes
ORDERS = {"selected": "score", "random": "random", "right": "truth"}


def data_inputs(config: ClinicianPreferenceConfig) -> dict[str, Any]:
    """What the data stage depends on. The seed draws the images, so it counts only where some are left
    out.
    """
    evaluate = config.evaluate
    return {
        "data": config.data.outcome("unlabelled_per_round"),
        "captions": config.captions,
        "seed": config.generate.seed if config.data.label_fraction < 1 else None,
        "kinds": evaluate.kinds,
        "eval_seed": evaluate.seed,
        "max_eval": evaluate.max_images,
        "eval_rows": config.tune.eval_rows,
    }


def prepare_data(stage: Stage, config: ClinicianPreferenceConfig) -> dict[str, Any]:
    """Source -> images with captions, held-out questions, quarantine (Parquet shards)."""
    from medray.methods.clinician_preference.training_sets import PARTS, write_captioned

    asked = config.evaluate
    counts = write_captioned(
        config.data,
        config.captions,
        stage.dir,
        asked.kinds,
        config.generate.seed,
        asked.seed,
        asked.max_images,
        config.tune.eval_rows,
        bool(asked.arms),
    )
    account = stages.checked_account(stage, config)
    if asked.arms and not counts["questions"]:
        raise DataError(
            f"data.source: {config.data.source} has no question in its split {config.data.eval_split!r} to "
            "evaluate with; give a source that has some "
            "(docs/data.md), or evaluate.arms=[] to stop after the rating model"
        )
    return {"counts": counts, "account": account, **{part: stage.path(part) for part in PARTS}}


def check_arms(config: ClinicianPreferenceConfig, data: dict[str, Any]) -> None:
    """Raises DataError where an arm needs true attributes and the images have none."""
    if "right" in config.evaluate.arms and not checkable(data["outputs"]["captioned"]):
        raise DataError(
            f"evaluate.arms: right needs the true attributes of images, and {config.data.source} has none "
            f"(of {len(ATTRIBUTES)}: {', '.join(ATTRIBUTES)}); leave it out"
        )


def embed_inputs(config: ClinicianPreferenceConfig) -> dict[str, Any]:
    return config.demonstrations.outcome("encoder", *_DRAW)


def embed(
    stage: Stage, config: ClinicianPreferenceConfig, encoder: str, data: dict[str, Any]
) -> dict[str, Any]:
    """Image and caption of every row as one vector (records.EMBEDDED)."""
    from medray.methods.clinician_preference.embed_images import embed_map
    from medray.storage.resumable import write_resumable

    embedder, options = embed_map(config.demonstrations, config.data, encoder)
    rows, again = write_resumable(
        data["outputs"]["captioned"],
        stage.path("rows"),
        stage.path("committed"),
        lambda rows: rows.map_batches(embedder, **options),
        8 * config.demonstrations.batch,
        config.data.read_cpus,
    )
    found = set_aside_in(stage.path("rows"))
    check_something("embedding", rows - found.total, found)
    check_set_aside("images", rows, found, config.max_quarantined, stage.path("rows"))
    return {"rows": stage.path("rows"), "counts": {"images": rows, **again}}


def draw_inputs(config: ClinicianPreferenceConfig) -> dict[str, Any]:
    return config.demonstrations.model_dump(include=_DRAW)


def draw(
    stage: Stage, config: ClinicianPreferenceConfig, data: dict[str, Any], embedded: dict[str, Any]
) -> dict[str, Any]:
    """k-means over the embeddings, and the images that clinicians will see: spread over modalities and
    clusters.
    """
    from medray.methods.clinician_preference import draw_images
    from medray.methods.clinician_preference.cluster_plot import cluster_plot

    found = draw_images.fit_clusters(embedded["outputs"]["rows"], config.demonstrations)
    counts = draw_images.assign(embedded["outputs"]["rows"], found, stage.path("assigned"))
    drawn = draw_images.draw(stage.path("assigned"), config.demonstrations)
    images = draw_images.take_rows(
        data["outputs"]["captioned"], {row["sample_id"] for row in drawn}, stage.path("drawn")
    )
    picture = cluster_plot(embedded["outputs"]["rows"], found, drawn, config.demonstrations)
    stage.run.write_text(picture, stage.folder, "clusters.svg")
    return {
        "drawn": stage.path("drawn"),
        "picture": stage.path("clusters.svg"),
        "spread": draw_images.spread(drawn),
        "counts": {**counts, "drawn": images},
    }


def generate_inputs(config: ClinicianPreferenceConfig, model: Model | None) -> dict[str, Any]:
    """What dialogues depend on beside images and demonstrations."""
    return {
        "config": config.generate.outcome("answers", *stages.OWN),
        "writer": model and model.hash,
        "local": stages.own_inputs(config.generate),
    }


def candidates(
    stage: Stage, config: ClinicianPreferenceConfig, writer: Model | None, drawn: dict[str, Any]
) -> dict[str, Any]:
    """Dialogues about the drawn images, each question with two answers: what clinicians are shown
    (records.CLINICIAN_ITEM).
    """
    return _write_dialogues(stage, config, writer, drawn["outputs"]["drawn"], None, answers=2)


def generate(
    stage: Stage,
    config: ClinicianPreferenceConfig,
    writer: Model | None,
    data: dict[str, Any],
    demonstrations: str | None,
) -> dict[str, Any]:
    """Dialogues about all images, after demonstrations where there are some."""
    return _write_dialogues(
        stage, config, writer, data["outputs"]["captioned"], demonstrations, config.generate.answers
    )


def _write_dialogues(
    stage: Stage,
    config: ClinicianPreferenceConfig,
    writer: Model | None,
    images: str,
    demonstrations: str | None,
    answers: int,
) -> dict[str, Any]:
    from medray.data.exchanges import demonstrations_of, unpack
    from medray.methods.clinician_preference.write_dialogues import generate_map
    from medray.storage.resumable import write_resumable

    settings = config.generate.model_copy(update={"answers": answers})
    engine = settings.engine.beside(config.engine)
    work, options = generate_map(
        settings, writer and writer.path, config.data, engine, demonstrations_of(demonstrations)
    )
    rows, again = write_resumable(
        images,
        stage.path("rows"),
        stage.path("committed"),
        lambda rows: rows.map_batches(work, **options),
        engine.rows_per_task,
        config.data.read_cpus,
    )
    ledger = stages.ledger_of(stage, config.generate)
    counts = unpack(stage.path("rows"), stage.dir)
    # A model that asks for itself (writing asking) may repeat itself until too few questions are left:
    # dropped texts, counted below, and no failed row.
    asking = config.generate.writing == "asking"
    found = set_aside_in(
        stage.path("rows"),
        lambda row: (None if asking and row["dropped"] else row["error"],),
        ("error", "dropped"),
    )
    check_something(
        "dialogue",
        counts.get("exchanges", 0),
        found,
        f"none of {rows} images got one that can be used: {dict(counts)}",
    )
    check_set_aside("images", rows, found, config.max_quarantined, stage.path("rows"))
    return {
        **{part: stage.path(part) for part in ("conversations", "exchanges", "items")},
        "ledger": ledger,
        "counts": {"images": rows, **again, **counts},
    }


def rate_inputs(config: ClinicianPreferenceConfig, model: Model | None) -> dict[str, Any]:
    return {
        "config": config.rate.outcome(*stages.OWN),
        "rater": model and model.hash,
        "local": stages.own_inputs(config.rate),
    }


def rate(
    stage: Stage, config: ClinicianPreferenceConfig, model: Model | None, written: dict[str, Any]
) -> dict[str, Any]:
    """A strong model's score from 0 to 10 for every exchange (records.RATED)."""
    from medray.methods.clinician_preference.rate_exchanges import rate_map, rating_counts
    from medray.storage.resumable import write_resumable

    engine = config.rate.engine.beside(config.engine)
    work, options = rate_map(config.rate, model and model.path, config.data, engine)
    rows, again = write_resumable(
        written["outputs"]["exchanges"],
        stage.path("rows"),
        stage.path("committed"),
        lambda rows: rows.map_batches(work, **options),
        8 * engine.rows_per_task,
        config.data.read_cpus,
    )
    found = set_aside_in(stage.path("rows"))
    check_something("rating", rows - found.total, found)
    check_set_aside("exchanges", rows, found, config.max_quarantined, stage.path("rows"))
    ledger = stages.ledger_of(stage, config.rate)
    return {
        "rows": stage.path("rows"),
        "ledger": ledger,
        "counts": {"exchanges": rows, **again, **rating_counts(stage.path("rows"))},
    }


def make_pairs(stage: Stage, config: ClinicianPreferenceConfig, rated: dict[str, Any]) -> dict[str, Any]:
    """Pairs of rated exchanges of two score levels, both of training images of the rating model or both
    held out.
    """
    from medray.methods.clinician_preference.rate_exchanges import rater_name
    from medray.methods.clinician_preference.rated_pairs import model_pairs
    from medray.rating_model.pairs import held_out

    counts = model_pairs(
        rated["outputs"]["rows"],
        stage.path("rows"),
        config.pairs,
        rater_name(config.rate),
        lambda image: held_out(image, config.rater),
    )
    return {"rows": stage.path("rows"), "counts": counts}


def split_inputs(config: ClinicianPreferenceConfig) -> dict[str, Any]:
    """What says which images are held out from the rating model."""
    return config.rater.model_dump(include={"held_out_fraction", "split_seed"})


def rater_configs(config: ClinicianPreferenceConfig) -> dict[str, RaterConfig]:
    """The rating models to train, by the end of their stages' names: one for each weight, or just one."""
    weights = config.weights if config.rater.train_on == "mixture" else ()
    return {f"-w{w:g}": config.rater.model_copy(update={"clinician_weight": w}) for w in weights} or {
        "": config.rater
    }


def rater_inputs(rater: RaterConfig) -> dict[str, Any]:
    """What the rating model depends on beside pairs and encoder: a weight, only where both kinds of pairs
    are mixed.
    """
    return rater.outcome("encoder", *(() if rater.train_on == "mixture" else ("clinician_weight",)))


def measured_inputs(config: ClinicianPreferenceConfig) -> dict[str, Any]:
    """What the measures of a rating model on held-out pairs depend on beside the model and the pairs."""
    return {"score": score_inputs(config), "bootstrap": config.evaluate.bootstrap}


def select_inputs(config: ClinicianPreferenceConfig, order: str) -> dict[str, Any]:
    """What the dialogues of an arm depend on beside their scores. The arm says the order, in place of
    select.order.
    """
    return {
        "config": config.select.outcome("order", *(("relative_to",) if order == "truth" else ())),
        "order": order,
    }


def train_rater(
    stage: Stage,
    config: ClinicianPreferenceConfig,
    rater: RaterConfig,
    pairs: dict[str, Any],
    judged: dict[str, Any],
) -> dict[str, Any]:
    """Train the rating model on the pairs of the rating VLM and of the clinicians; measure it on pairs of
    held-out images.
    """
    from medray.rating_model.metrics import evaluate_rater
    from medray.rating_model.training import export_rater
    from medray.rating_model.training import train_rater as train
    from medray.train.worker import check_trained

    both = [pairs["outputs"]["rows"], judged["outputs"]["pairs"]]
    result = train(stage.path("train"), both, rater, config.data, config.max_quarantined)
    stages.keep_logs(stage, result)
    check_trained(result, config.max_quarantined, stage.path("quarantine.jsonl"))
    stage.publish("model", lambda folder: export_rater(result.best, folder, rater))
    quality = evaluate_rater(
        both,
        stage.path("held_out"),
        stage.path("held_out_committed"),
        stage.path("model"),
        rater,
        config.score,
        config.data,
        config.evaluate.bootstrap,
    )
    if quality["pairs"]:
        _check_scored(stage.path("held_out"), config.max_quarantined, "held-out pairs")
    clinicians = f"The clinicians were {describe_clinicians(clinicians_of(config, judged))}."
    stage.run.write_text(
        rater_card(config, rater, result.counts, quality, clinicians), stage.folder, "model", CARD
    )
    return {
        "model": stage.path("model"),
        "metrics": stage.path("metrics.jsonl"),
        "counts": result.counts,
        "weight": rater.clinician_weight,
        "selected_by": result.selected_by,
        "best_epoch": result.best_epoch,
        "quality": quality,
    }


def best_rater(trained: dict[str, dict[str, Any]]) -> str:
    """The name of the rating model best aligned with held-out clinicians' pairs, or, where none is held
    out, with the model's; of equal ones the first.
    """

    def alignment(name: str) -> float:
        quality = trained[name]["outputs"]["quality"]
        return next(
            (
                quality[origin]["pair_accuracy"]["value"]
                for origin in ("clinician", "model")
                if quality.get(origin)
            ),
            0.0,
        )

    return max(trained, key=alignment)


def score_inputs(config: ClinicianPreferenceConfig) -> dict[str, Any]:
    return config.score.outcome()


def score(
    stage: Stage, config: ClinicianPreferenceConfig, rater: str, written: dict[str, Any]
) -> dict[str, Any]:
    """The rating model's score of every exchange (records.SCORED)."""
    from medray.rating_model.scoring import score_exchanges

    counts = score_exchanges(
        written["outputs"]["exchanges"],
        stage.path("rows"),
        stage.path("committed"),
        rater,
        config.score,
        config.data,
    )
    _check_scored(stage.path("rows"), config.max_quarantined)
    return {"rows": stage.path("rows"), "counts": counts}


def _check_scored(uri: str, limit: float, what: str = "exchanges") -> None:
    """Raise StageError if too many rows of a folder have no score or rating, or all."""
    from medray.storage.shards import count_rows

    rows, found = count_rows(uri), set_aside_in(uri)
    check_something("score", rows - found.total, found)
    check_set_aside(what, rows, found, limit, uri)


def select(
    stage: Stage, config: ClinicianPreferenceConfig, made: dict[str, dict[str, Any]], order: str
) -> dict[str, Any]:
    """The dialogues to tune on (records.CONVERSATION), and the mix of modalities before and after."""
    from medray.methods.clinician_preference.select_dialogues import select as keep

    by_truth = order == "truth"
    asked = config.select.model_copy(
        update={"order": "score", "relative_to": None} if by_truth else {"order": order}
    )
    found = keep(
        made["scored"]["outputs"]["rows"],
        stage.path("rows"),
        asked,
        correctness_scorer(made["data"]["outputs"]["captioned"]) if by_truth else None,
    )
    return {"conversations": stage.path("rows"), **found}


def evaluate(
    stage: Stage,
    config: ClinicianPreferenceConfig,
    model: Model,
    name: str,
    data: dict[str, Any],
    others: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Greedy answers to the held-out questions, scored, and compared with those of other models.

    Args:
        others: by name, the manifests of evaluations to compare with.
    """
    from medray.evaluation.predict import Predict
    from medray.evaluation.scores import compare, not_scored
    from medray.evaluation.scores import score as scored
    from medray.running.actor_pools import map_options
    from medray.storage.resumable import write_resumable

    stages.check_weights(model)
    arguments = {
        **stages.engine_arguments(config, model),
        "name": name,
        "max_tokens": config.evaluate.max_tokens,
    }
    rows, again = write_resumable(
        data["outputs"]["questions"],
        stage.path("rows"),
        stage.path("committed"),
        lambda rows: rows.map_batches(Predict, fn_constructor_kwargs=arguments, **map_options(config.engine)),
        8 * config.engine.rows_per_task,
        config.data.read_cpus,
    )
    stages.check_answered(stage.path("rows"), rows, config.max_quarantined)
    scores = scored(stage.path("rows"), config.evaluate)
    differences = {
        other: compare(found["outputs"]["rows"], stage.path("rows"), config.evaluate)["accuracy"]
        for other, found in others.items()
    }
    return {
        "rows": stage.path("rows"),
        "scores": scores,
        "differences": differences,
        "counts": {"questions": rows, **again, **not_scored([scores])},
    }


def win_rates(
    run: Run, config: ClinicianPreferenceConfig, data: dict[str, Any], scores: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """How often a judge prefers each arm's answers to the base model's, and the selected arm's to the
    random one's (medray.evaluation.win_rate).
    """
    from medray.methods.shared.judged_models import judge_models

    if config.judge is None or not scores:
        return {}
    questions = {"hash": data["hash"], "outputs": {"rows": data["outputs"]["questions"]}}
    rivals = {arm: scores[arm] for arm in ("random", "selected") if arm in scores}
    found = [
        judge_models(run, config, "held-out", questions, folders, chats=False)["win_rates"]
        for folders in (scores, rivals)
        if len(folders) > 1
    ]
    return {name: rate for rates in found for name, rate in rates.items()}
