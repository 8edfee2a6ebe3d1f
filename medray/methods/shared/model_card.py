"""What goes with a run's models: models.json, by which they are served, and a model card beside each
export's weights.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from medray import __version__
from medray.config import ClinicianPreferenceConfig, RaterConfig, Section
from medray.config.section import without_passwords
from medray.methods.shared.stages import AnyMethodConfig, Model
from medray.models.published import MODELS, NOT_A_DEVICE
from medray.rating_model.pairs import ORIGINS
from medray.running.run import Run

CARD = "README.md"
# Fields that name a place: a folder, file, address or hub id. Those of _LOCAL hold no hub id, and those of
# _WHERE say where the work ran, which is never published.
_PLACES = {"path", "encoder", "model", "base_url", "source", "images", "chat_template", "general"}
_LOCAL = {"source", "images", "chat_template", "general"}
_WHERE = {"cluster", "place"}


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        job: script in jobs/, without .py.
        limits: sentences that hold for every model tuned so.
    """

    name: str
    paper: str
    job: str
    tags: tuple[str, ...]
    says: str
    limits: tuple[str, ...] = ()


SELF_TRAINING = Method(
    "Self-training",
    "2406.19973",
    "self_train",
    ("self-training", "dpo"),
    "It was tuned to ask and to answer questions on a labelled share of the images, then by direct "
    "preference optimisation on pairs of its own answers to its own "
    "questions about images without labels, of which a stronger judge said which is better.",
    ("What the judge gets wrong, the model was rewarded for.",),
)
INSTRUCTION_FREE = Method(
    "Instruction-free tuning",
    "2603.19482",
    "instruction_free",
    ("instruction-free-tuning",),
    "It was tuned on pairs of image and description alone, without instructions; the vision tower and the "
    "projector were trained.",
    ("No question was in its tuning data: how it follows instructions comes from its base model.",),
)
CLINICIAN_PREFERENCE = Method(
    "Clinician preference alignment",
    "2406.13173",
    "clinician_preference",
    ("clinician-preference", "data-selection"),
    "It was tuned on dialogues that a strong model wrote and that a rating model selected, which had learned "
    "from the choices of clinicians and of a strong model.",
    ("The dialogues are generated: wrong statements in them were learned unless they were selected away.",),
)


def publish_models(
    run: Run,
    config: AnyMethodConfig,
    method: Method,
    models: Mapping[str, Model],
    tuned: str,
    results: dict[str, Any],
    limits: tuple[str, ...] = (),
) -> None:
    """Write models.json and the cards of the models that lie in this run.

    Args:
        models: by name; `base` is the one that was tuned, and the only one that may lie outside the run.
        tuned: the name of the model the run is for.
        results: as in results.json; `table` and `counts` are shown, `accuracy` or `measures` go into the
            card's metadata.
        limits: sentences that hold for this run, beside the method's.
    """
    inside = {
        name: posixpath.relpath(model.path, run.uri)
        for name, model in models.items()
        if model.path.startswith(run.uri + "/")
    }
    outside = config.model.path if config.model.path.startswith("testbed:") else models["base"].path
    run.write_json(
        {
            "method": method.job,
            "tuned": tuned,
            "base": "base",
            "models": {
                name: {"path": inside.get(name, outside), "hash": model.hash}
                for name, model in models.items()
            },
        },
        MODELS,
    )
    for name, place in inside.items():
        text = card(config, method, name, results, limits)
        if not run.exists(place, CARD) or run.read_text(place, CARD) != text:
            run.write_text(text, place, CARD)


def card(
    config: AnyMethodConfig, method: Method, name: str, results: dict[str, Any], limits: tuple[str, ...] = ()
) -> str:
    """A model card in Hugging Face's form: Markdown behind YAML metadata."""
    from huggingface_hub import ModelCardData

    base, source = _public(config.model.path), _public(config.data.source, hub=False)
    scores = _metrics(results, name)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["medical", "medray", *method.tags],
        model_name=f"{base}, {method.name.lower()} ({name})",
        base_model=_hub_id(config.model.path),
        eval_results=_eval_results(scores, source),
    )
    counts = [
        f"- {stage}: "
        + ", ".join(f"{what} {number}" for what, number in found.items() if not isinstance(number, dict))
        for stage, found in results["counts"].items()
        if found
    ]
    said = [
        NOT_A_DEVICE,
        *method.limits,
        *limits,
        f"The numbers above are of held-out images of {source} only; other devices, stains, patients and "
        "languages may give others.",
    ]
    use = (
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\nmodel = "
        "AutoModelForImageTextToText.from_pretrained(FOLDER)\nprocessor = "
        "AutoProcessor.from_pretrained(FOLDER)\n```"
    )
    shown = "are padded to a square first" if config.model.pad_to_square else "go in as they are"
    system = (
        f"; conversations begin with the system prompt `{config.model.system_prompt}`"
        if config.model.system_prompt
        else ""
    )
    return _sheet(
        metadata,
        f"{base}, {method.name.lower()} ({name})",
        f"{base}, tuned on {source} by {method.name.lower()} ([arXiv "
        f"{method.paper}](https://arxiv.org/abs/{method.paper})) with medray {__version__}, "
        f"`jobs/{method.job}.py`. {method.says}",
        results="Of all models of the run, on held-out images; brackets hold 95 % bootstrap intervals over "
        f"images.\n\n```\n{results['table'].strip()}\n```",
        data="Rows by stage:\n\n" + "\n".join(counts),
        limits=said,
        use=f"{use}\n\nImages {shown}{system}.",
        section=config,
    )


def rater_card(
    config: ClinicianPreferenceConfig,
    rater: RaterConfig,
    counts: Mapping[str, Any],
    quality: Mapping[str, Any],
    clinicians: str,
) -> str:
    """The card of a rating model.

    Args:
        counts: pairs it was trained on and measured with, as in its stage's manifest.
        quality: what evaluation.rating.evaluate_rater measured.
        clinicians: who judged, in one line.
    """
    from huggingface_hub import ModelCardData

    encoder, source = _public(rater.encoder), _public(config.data.source, hub=False)
    measured = {
        f"{origin} pairs ordered as judged": found["pair_accuracy"]
        for origin in ORIGINS
        if (found := quality.get(origin))
    }
    metadata = ModelCardData(
        tags=["medical", "medray", "rating-model", *CLINICIAN_PREFERENCE.tags],
        model_name=f"{encoder}, rating model",
        base_model=_hub_id(rater.encoder),
        eval_results=_eval_results({name: score["value"] for name, score in measured.items()}, source),
    )
    results = [
        f"- {name}: {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
        for name, score in measured.items()
    ] or ["- none: no pair was held out"]
    said = [
        NOT_A_DEVICE,
        "It prefers what its clinicians and its strong model preferred, their mistakes included.",
        "Easy questions and common answers score higher: compare scores of like questions.",
        f"The numbers above are of pairs about held-out images of {source} only, which also chose the epoch.",
    ]
    return _sheet(
        metadata,
        f"{encoder}, rating model",
        "Rates a question and its answer about an image; of two, the higher rated is the one that "
        f"clinicians are expected to prefer ([arXiv {CLINICIAN_PREFERENCE.paper}]"
        f"(https://arxiv.org/abs/{CLINICIAN_PREFERENCE.paper})). Trained with medray {__version__}, "
        f"`jobs/{CLINICIAN_PREFERENCE.job}.py`, on {source}. {clinicians}",
        results="Brackets hold 95 % bootstrap intervals over images.\n\n" + "\n".join(results),
        data="\n".join(
            f"- {what}: {number}" for what, number in counts.items() if not isinstance(number, dict)
        ),
        limits=said,
        use="```python\nfrom medray.rating_model.model import RatingModel\n\nrater = "
        "RatingModel.from_pretrained(FOLDER)\n```",
        section=rater,
    )


def _sheet(
    metadata: Any,
    title: str,
    about: str,
    results: str,
    data: str,
    limits: list[str],
    use: str,
    section: Section,
) -> str:
    """What all cards look like; `section` is the configuration that is shown."""
    parts = {
        "Results": results,
        "Data": data,
        "Limits": "\n".join(f"- {sentence}" for sentence in limits),
        "Use": use,
        "Configuration": f"```yaml\n{yaml.safe_dump(_settings(section), sort_keys=False).strip()}\n```",
    }
    head = [f"---\n{metadata.to_yaml().strip()}\n---\n", f"# {title}\n", f"> {NOT_A_DEVICE}\n", f"{about}\n"]
    return "\n".join(
        [*head, *(line for name, text in parts.items() for line in (f"## {name}\n", f"{text}\n"))]
    )


def _hub_id(reference: str) -> str | None:
    """The reference where a hub knows it; no folder, address or bundled model."""
    return reference if _public(reference) == reference and not reference.startswith("testbed:") else None


def _settings(section: Section) -> dict[str, Any]:
    """A section as it may be published; places that are a field's default stand in medray's own code and
    stay.
    """
    public = without_passwords(section.model_dump(mode="json", exclude=_WHERE))
    for name in public:
        value = getattr(section, name)
        if isinstance(value, Section):
            public[name] = _settings(value)
        elif name in _PLACES and value is not None and value != type(section).model_fields[name].default:
            public[name] = _public(value, hub=name not in _LOCAL)
    return public


def _public(place: str, hub: bool = True) -> str:
    """A name to publish: hub ids and bundled names stay, of folders and addresses only the end is told.

    Args:
        hub: whether "a/b" is a hub id; else it is a path.
    """
    if "://" in place:
        scheme, _, rest = without_passwords(place).partition("://")
        host, _, path = re.split("[?#]", rest)[0].rstrip("/").partition("/")
        # a bucket's name, but no host's
        return posixpath.basename(path) or (host if scheme in ("s3", "gs") else scheme)
    is_path = place.startswith(("/", ".", "~")) or place.count("/") > (1 if hub else 0)
    return posixpath.basename(place.rstrip("/")) if is_path else place


def _metrics(results: dict[str, Any], name: str) -> dict[str, float]:
    found = (
        results["measures"].get(name, {})
        if "measures" in results
        else {"accuracy": results["accuracy"].get(name)}
    )
    plain = {what: value["value"] if isinstance(value, dict) else value for what, value in found.items()}
    return {what: value for what, value in plain.items() if value is not None}


def _eval_results(scores: dict[str, float], source: str) -> list[Any] | None:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=source,
            dataset_name=f"{source}, held-out images",
            metric_type=what.lower().replace(" ", "_"),
            metric_name=what,
            metric_value=round(value, 4),
        )
        for what, value in scores.items()
    ] or None
