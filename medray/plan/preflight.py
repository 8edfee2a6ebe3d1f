"""Checks of a whole configuration before anything starts: cheap, without Ray, each error naming its field.

A local model that is to be tuned is looked at too, with torch and transformers, but without its weights.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from medray.config import (
    TESTBED_SCENES,
    ClinicianPreferenceConfig,
    CliniciansConfig,
    DataConfig,
    EndpointConfig,
    GenerateConfig,
    InstructionFreeConfig,
    JudgeConfig,
    LoopConfig,
    ModelConfig,
    OwnModelConfig,
    RateConfig,
    Section,
    SelfTrainingConfig,
)
from medray.config.recipes import template_path
from medray.errors import ConfigError
from medray.models.bundled import ENCODERS, MODELS
from medray.models.fingerprint import pickles_problem
from medray.paths import address_problems, model_folder_problems, output_problems
from medray.plan.demand import FILTER_CPUS, LISTING_CPUS, demands

# by the last name of their field: fed by Ray Data, and continued
POOLS = {"actors": "actors", "reference_workers": "workers"}
BUNDLED = ", ".join(f"testbed:{name}" for name in MODELS)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
RATER_FACTS = "rater.json"  # in the folder of every rating model (medray.rating_model.model)
_REMOTE = re.compile(r"[a-z0-9]+://")


def check_self_training(config: SelfTrainingConfig) -> None:
    """Raise ConfigError with every problem found, one a line."""
    problems = [
        *model_problems("model.path", config.model.path),
        *template_problems(config.model),
        *support_problems(config.model, questioner=True),
        *source_problems(config.data),
        *prepared_problems(config.data),
        *cpu_problems(config, {"sft": config.sft, "dpo": config.dpo}),
        *gpu_problems(config),
        *judge_problems(config),
    ]
    if "sft" not in config.evaluate.arms and "dpo" not in config.evaluate.arms:
        problems.append("evaluate.arms: name at least one tuned model, sft or dpo")
    if problems:
        raise ConfigError("\n".join(problems))


def check_instruction_free(config: InstructionFreeConfig) -> None:
    """Raise ConfigError with every problem found, one a line."""
    stages = (
        {"tune": config.tune} if config.tune.instruction else {"warm_up": config.warm_up, "tune": config.tune}
    )
    problems = [
        *model_problems("model.path", config.model.path),
        *template_problems(config.model),
        *support_problems(config.model, questioner=False, kind="description"),
        *source_problems(config.data),
        *prepared_problems(config.data),
        *cpu_problems(config, stages),
        *gpu_problems(config),
    ]
    if config.data.label_fraction == 0:
        problems.append("data.label_fraction: 0 leaves no image to tune on; 1.0 takes all")
    if not config.tune.trains_model:
        problems.append(
            "tune.lr_vision: with every learning rate of tune null the model itself would stay as it is; "
            "give at least one of lr_vision, lr_projector, lr_llm"
        )
    if any((config.warm_up.lr_llm, config.warm_up.lr_projector, config.warm_up.lr_vision)):
        problems.append(
            "warm_up.lr_vision: the warm-up leaves the model as it is, and only its proxy is kept; its "
            "learning rates of the model must be null or 0"
        )
    general = config.evaluate.general
    if (
        general is not None
        and general != TESTBED_SCENES
        and not _REMOTE.match(general)
        and not Path(general).expanduser().exists()
    ):
        problems.append(
            f"evaluate.general: {general} does not exist; give a source of questions, testbed:scenes or null"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def check_clinician_preference(config: ClinicianPreferenceConfig) -> None:
    """Raise ConfigError with every problem found, one a line."""
    problems = [
        *model_problems("model.path", config.model.path),
        *template_problems(config.model),
        *support_problems(config.model, questioner=True),
        *source_problems(config.data),
        *prepared_problems(config.data, bool(config.evaluate.arms)),
        *(
            []
            if config.demonstrations.encoder.startswith("open_clip:")
            else encoder_problems("demonstrations.encoder", config.demonstrations.encoder)
        ),
        *encoder_problems("rater.encoder", config.rater.encoder),
        *strong_model_problems("generate", config.generate),
        *strong_model_problems("rate", config.rate),
        *clinician_problems(config.clinicians),
        *(strong_model_problems("judge", config.judge) if config.judge is not None else []),
        *cpu_problems(config, {"rater": config.rater, "tune": config.tune}),
        *gpu_problems(config),
    ]
    if config.data.label_fraction == 0:
        problems.append("data.label_fraction: 0 leaves no image to write dialogues about; 1.0 takes all")
    if config.weights and config.rater.train_on != "mixture":
        problems.append(
            f"weights: with rater.train_on {config.rater.train_on} there is nothing to weigh; leave it empty "
            "or train on the mixture"
        )
    if config.judge is not None and config.judge.kind not in ("vllm", "api"):
        problems.append(
            f"judge.kind: {config.judge.kind} cannot compare two models' answers; use vllm or api"
        )
    if len(set(config.weights)) < len(config.weights):
        problems.append(f"weights: {list(config.weights)} names a weight twice")
    if problems:
        raise ConfigError("\n".join(problems))


def check_source(data: DataConfig) -> None:
    """Raise ConfigError with every problem of the source, one a line."""
    problems = source_problems(data)
    if problems:
        raise ConfigError("\n".join(problems))


def check_output(field: str, address: str) -> None:
    """Raise ConfigError for a place that could not be written, or would be read as another one."""
    problems = output_problems(field, address)
    if problems:
        raise ConfigError("\n".join(problems))


def check_run(address: str) -> None:
    """Raise ConfigError for a run directory that models could not be loaded from."""
    problems = model_folder_problems("--run", address)
    if problems:
        raise ConfigError("\n".join(problems))


def model_problems(field: str, path: str) -> list[str]:
    """Problems of a model reference: bundled name, local folder, remote URI or hub id."""
    if path.startswith("testbed:"):
        name = path.partition(":")[2]
        return [] if name in MODELS else [f"{field}: unknown bundled model {path!r}; there are {BUNDLED}"]
    if _REMOTE.match(path):
        return address_problems(field, path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return [f"{field}: {path} has no config.json; give a folder in Hugging Face format"]
        problem = pickles_problem(folder)
        return [*([f"{field}: {path} {problem}"] if problem else []), *model_folder_problems(field, path)]
    if _HUB_ID.fullmatch(path) and not path.startswith((".", "/", "~")):
        return []
    return [
        f"{field}: {path} does not exist; give a folder in Hugging Face format, a hub id (org/name), or one "
        f"of {BUNDLED}"
    ]


def support_problems(model: ModelConfig, questioner: bool, kind: str = "sft") -> list[str]:
    """Why a local model cannot be tuned, by its family, template and processor; others are looked at where
    they are first used.

    Args:
        questioner, kind: see medray.data.model_check.check_support.
    """
    folder = Path(model.path).expanduser()
    if not folder.is_dir() or model_problems("model.path", model.path) or template_problems(model):
        return []  # what is wrong is said there
    from medray.data.model_check import check_support

    try:
        check_support(str(folder.resolve()), model, questioner, kind)
    except ConfigError as error:
        return [str(error)]
    return []


def encoder_problems(field: str, path: str) -> list[str]:
    """Problems of a CLIP-family encoder's reference: as of a model's, but of the bundled encoders."""
    if path.startswith("testbed:"):
        known = [f"testbed:{name}" for name in ENCODERS]
        return (
            []
            if path in known
            else [f"{field}: unknown bundled encoder {path!r}; there is {', '.join(known)}"]
        )
    if path.startswith("open_clip:"):
        return [f"{field}: {path} must be in Hugging Face format; convert it first"]
    return model_problems(field, path)


def rater_problems(field: str, path: str) -> list[str]:
    """Problems of a rating model's reference: a folder or remote address."""
    if _REMOTE.match(path) or (Path(path).expanduser() / RATER_FACTS).is_file():
        return []
    return [
        f"{field}: {path} holds no rating model; give the folder stages/08-rater/model of a run of "
        "jobs/clinician_preference.py"
    ]


def strong_model_problems(section: str, config: GenerateConfig | RateConfig | JudgeConfig) -> list[str]:
    """Problems of a model that a section asks: a local one by its reference, or an endpoint's."""
    if config.kind != "vllm":
        return endpoint_problems(section, config)
    return [
        *model_problems(f"{section}.model", config.model),
        *template_problems(config.model_settings, f"{section}.model_settings"),
    ]


def clinician_problems(config: CliniciansConfig) -> list[str]:
    if (
        config.kind == "export"
        and not _REMOTE.match(config.source)
        and not Path(config.source).expanduser().is_dir()
    ):
        return [f"clinicians.source: {config.source} is no folder; give that of the exported judgements"]
    if config.kind == "database" and not re.match(r"[a-z0-9+]+://", config.source):
        return [
            f"clinicians.source: {config.source} is no SQLAlchemy URL such as sqlite:///judgements.db or "
            "postgresql+psycopg://user@host/name"
        ]
    return []


def template_problems(model: ModelConfig | OwnModelConfig, section: str = "model") -> list[str]:
    if model.chat_template and not template_path(model.chat_template).is_file():
        return [f"{section}.chat_template: file {model.chat_template} does not exist"]
    return []


def source_problems(data: DataConfig) -> list[str]:
    source = data.source
    problems = []
    if source.startswith("testbed:"):
        if source != "testbed:cells":
            problems.append(f"data.source: unknown bundled set {source!r}; there is testbed:cells")
    elif not _REMOTE.match(source) and not Path(source).expanduser().exists():
        problems.append(f"data.source: {source} does not exist")
    problems += address_problems("data.source", source)
    if data.images is not None:
        problems += address_problems("data.images", data.images)
        if not _REMOTE.match(data.images) and not Path(data.images).expanduser().is_dir():
            problems.append(
                f"data.images: {data.images} is no folder; name the folder that the records' image paths are "
                "relative to"
            )
    if data.train_split == data.eval_split:
        problems.append(
            f"data.eval_split: must differ from data.train_split ({data.train_split!r}), or the evaluation "
            "would see training images"
        )
    return problems


def prepared_problems(data: DataConfig, held_out: bool = True) -> list[str]:
    """Problems of the splits of a directory of jobs/prepare_data.py, whose manifest names them; none if it is
    another source.

    Args:
        held_out: whether data.eval_split is needed.
    """
    path = Path(data.source).expanduser() / "manifest.json"
    if _REMOTE.match(data.source) or not path.is_file():
        return []
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # reading the source says what is wrong with it
    if (
        not isinstance(manifest, dict)
        or manifest.get("kind") != "medray-dataset"
        or "unknown" in manifest.get("splits", {"unknown": 0})
    ):
        return []
    splits = manifest["splits"]
    there = ", ".join(f"{name} ({number:,})" for name, number in splits.items())
    fields = {"data.train_split": data.train_split} | (
        {"data.eval_split": data.eval_split} if held_out else {}
    )
    return [
        f"{field}: no image of split {split!r} in {data.source}; there are {there}"
        for field, split in fields.items()
        if split not in splits
    ]


def cpu_problems(
    config: SelfTrainingConfig | InstructionFreeConfig | ClinicianPreferenceConfig,
    training: Mapping[str, LoopConfig],
) -> list[str]:
    """A stage that reserves every CPU leaves Ray Data none to read the data, or to leave out what is
    done, and would hang.
    """
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return []  # the cluster may grow: Ray itself waits for nodes
    cpus = config.cluster.num_cpus or os.cpu_count() or 1
    problems = []
    for name, stage in training.items():
        if stage.max_workers * stage.cpus_per_worker + config.data.read_cpus + LISTING_CPUS > cpus:
            problems.append(
                f"{name}.num_workers: {stage.max_workers} workers x {stage.cpus_per_worker:g} CPUs, "
                f"{config.data.read_cpus:g} to encode (data.read_cpus) and a CPU to "
                f"read data need more than the {cpus} CPUs here; use fewer workers, a smaller "
                f"{name}.cpus_per_worker or data.read_cpus, more logical "
                f"CPUs (cluster.num_cpus), or a cluster (cluster.address)"
            )
    for pool, *_ in demands(config).values():
        what = POOLS.get(pool.field.rpartition(".")[2])
        if what and pool.least * pool.cpus + FILTER_CPUS + LISTING_CPUS > cpus:
            problems.append(
                f"{pool.field}: {pool.least} {what} x {pool.cpus:g} CPUs, and a CPU each to read data and to "
                f"leave out what is done, need more than the {cpus} CPUs here; use "
                f"fewer or smaller {what}, more logical CPUs (cluster.num_cpus), or a cluster "
                "(cluster.address)"
            )
    return problems


def gpu_problems(config: Section) -> list[str]:
    """A stage that asks for GPUs where there are too few waits forever; [min, max] workers and actors
    begin with the smaller number.
    """
    if config.cluster.address or os.environ.get("RAY_ADDRESS") or _ray_runs():
        return []
    here = local_gpus()
    problems = {}
    for pool, *_ in demands(config).values() if here is not None else ():
        if (wanted := pool.least * pool.gpus) > here:
            section, _, field = pool.field.rpartition(".")
            per = "gpus_per_worker" if field in ("num_workers", "reference_workers") else "gpus_per_actor"
            problems[f"{section}.{per}"] = (
                f"{section}.{per}: {pool.least} x {pool.gpus:g} GPUs ({pool.field}) are {wanted:g}, and "
                f"there are {here} here; "
                f"set {section}.{per}=0 to work on CPUs, fewer in {pool.field}, or a cluster "
                "(cluster.address)"
            )
    return list(problems.values())


def _ray_runs() -> bool:
    """Whether this process has joined a Ray, whose nodes may be others than this machine."""
    ray = sys.modules.get("ray")
    return ray is not None and hasattr(ray, "is_initialized") and ray.is_initialized()


def local_gpus() -> int | None:
    """GPUs that a local Ray would find here, without importing it; None if there may be some of a kind that
    only Ray can count.

    CUDA_VISIBLE_DEVICES, and its like of AMD, leave out the others, as they do for Ray.
    """
    if importlib.util.find_spec("dpctl") is not None:
        return None  # Intel's
    nvidia = max(
        len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]),
    )
    nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    amd = sum(_read(path).strip() not in ("", "0") for path in nodes)
    for found, variable in ((nvidia, "CUDA_VISIBLE_DEVICES"), (amd, "HIP_VISIBLE_DEVICES")):
        if found:
            visible = os.environ.get(variable)
            return (
                found
                if visible is None
                else min(
                    found,
                    len(
                        [name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
                    ),
                )
            )
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def judge_problems(config: SelfTrainingConfig) -> list[str]:
    judge = config.judge
    if config.rounds == 0 or judge.kind == "random":
        return []
    if judge.kind == "rater":
        return rater_problems("judge.model", judge.model)
    return strong_model_problems("judge", judge)


def endpoint_problems(section: str, config: EndpointConfig) -> list[str]:
    """Problems of an endpoint that is asked over the network."""
    problems = []
    if not re.match(r"https?://[^/]", config.base_url):
        return [
            f"{section}.base_url: {config.base_url!r} is not an http(s) address; write it as https://host/v1"
        ]
    if config.base_url.rstrip("/").endswith("/completions"):
        problems.append(
            f"{section}.base_url: {config.base_url} must end before /chat/completions, which is added to it"
        )
    if urlsplit(config.base_url).hostname not in ("localhost", "127.0.0.1", "::1") and not os.environ.get(
        config.key_env
    ):
        problems.append(
            f"{section}.key_env: the environment variable {config.key_env} is not set; it must hold the key "
            f"for {config.base_url}"
        )
    return problems
