"""After an export: does vLLM read the model as transformers does?

Catches what a wrong weight name, template, image size or dtype does silently: answers that are merely worse.
"""

from __future__ import annotations

from typing import Any

from medray.config import DataConfig, EngineConfig, ModelConfig, SamplingConfig, VerifyConfig
from medray.errors import DataError, MedrayError, StageError
from medray.inference.chat import Chat
from medray.inference.row_worker import EngineWorker
from medray.models.cache import localize


def verify_export(
    model_dir: str,
    rows: list[dict[str, Any]],
    config: VerifyConfig,
    model_config: ModelConfig,
    data_config: DataConfig,
    engine_config: EngineConfig,
) -> dict[str, Any]:
    """Compare greedy decoding of vLLM and of transformers on questions about images.

    First training's encoding of the rows against the model's own processor. Then the prompt ids (transformers
    renders and tokenises on its own path), then the tokens. A differing token is allowed only where
    transformers' own log-probability of vLLM's choice is within config.logprob_tolerance nats of its best
    token; the row is not compared further, as the texts part there.

    Args:
        model_dir: local folder or remote address.
        rows: dicts with sample_id, image (bytes) and question; the first config.rows usable ones are
            compared.

    Returns {"rows", "tokens", "equal_rows", "near_ties", "largest_tie": nats, "skipped": unusable rows}.

    Raises StageError naming the row and position of the first difference, or where no row was usable. Holds
    one model at a time; run it in a process of its own (`verify_on_cluster`).
    """
    if not any(row.get("image") and row.get("question") for row in rows):
        raise StageError(f"verify: none of {len(rows)} rows could be used")
    model_dir = localize(model_dir)
    worker = EngineWorker(model_dir, model_config, data_config, engine_config)
    try:
        # The two runs must not share a mistake in reading the rows, but may share the decoded image.
        taken, skipped = worker.run(_vllm_rows(worker, rows, config))
    finally:
        worker.close()
    if not taken:
        raise StageError(f"verify: none of {len(rows)} rows could be used")
    return {
        **_against_transformers(
            model_dir, taken, config, model_config, on_gpu=engine_config.gpus_per_actor > 0
        ),
        "skipped": skipped,
    }


def verify_on_cluster(
    model_dir: str,
    rows: list[dict[str, Any]],
    config: VerifyConfig,
    model_config: ModelConfig,
    data_config: DataConfig,
    engine_config: EngineConfig,
) -> dict[str, Any]:
    """verify_export in a Ray task with an engine actor's resources; its StageError is raised here."""
    import ray

    task = ray.remote(
        num_cpus=engine_config.cpus_per_actor,
        num_gpus=engine_config.gpus_per_actor,
        max_calls=1,
        **engine_config.place.options,
    )(verify_export)
    try:
        return ray.get(task.remote(model_dir, rows, config, model_config, data_config, engine_config))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StageError):
            raise StageError(str(error.cause)) from None
        raise


async def _vllm_rows(
    worker: EngineWorker, rows: list[dict[str, Any]], config: VerifyConfig
) -> tuple[list[dict[str, Any]], int]:
    greedy = SamplingConfig(temperature=0, top_k=0, top_p=1.0, max_tokens=config.max_tokens)
    taken, skipped = [], 0
    for row in rows:
        if len(taken) == config.rows:
            break
        try:
            image, _ = await worker.image(row)
            prompt = worker.engine.chat.prompt_ids([{"role": "user", "text": row["question"]}])
        except (DataError, ValueError):
            skipped += 1
            continue
        output = (await worker.engine.generate(prompt, image, greedy))[0]
        seen = await worker.engine.prompt_ids(prompt, image)
        taken.append(
            {
                "sample_id": row["sample_id"],
                "question": row["question"],
                "image": image,
                "prompt_ids": seen,
                "token_ids": output.token_ids,
            }
        )
    return taken, skipped


def _against_transformers(
    model_dir: str,
    taken: list[dict[str, Any]],
    config: VerifyConfig,
    model_config: ModelConfig,
    on_gpu: bool,
) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig

    from medray.models.vlm import load_vlm

    device = "cuda" if on_gpu else "cpu"
    model = load_vlm(model_dir, model_config.precision, model_config.trust_remote_code, device)
    chat = Chat(model_dir, model_config)
    _check_encoder(model_dir, model_config, taken)
    # Not the model's own settings: a repetition penalty there would change even greedy decoding.
    eos = model.generation_config.eos_token_id or chat.tokenizer.eos_token_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=config.max_tokens,
        eos_token_id=eos,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    report = {"rows": len(taken), "tokens": 0, "equal_rows": 0, "near_ties": 0, "largest_tie": 0.0}
    for row in taken:
        inputs = _inputs(chat, row).to(device)
        length = inputs["input_ids"].shape[1]
        if inputs["input_ids"][0].tolist() != row["prompt_ids"]:
            raise StageError(
                f"verify: row {row['sample_id']}: vLLM sees other prompt ids than transformers "
                f"({len(row['prompt_ids'])} against {length} "
                "tokens): the chat template, tokenizer or image processor of the export differs between them"
            )
        with torch.inference_mode():
            result = model.generate(
                **inputs, generation_config=settings, return_dict_in_generate=True, output_logits=True
            )
        wanted = result.sequences[0, length:].tolist()
        gap = _first_gap(row["token_ids"], wanted, result.logits, report)
        if gap is None:
            report["equal_rows"] += 1
            continue
        place, nats = gap
        if nats > config.logprob_tolerance:
            raise StageError(
                f"verify: row {row['sample_id']}, token {place}: vLLM chose "
                f"{_shown(chat, row['token_ids'], place)}, transformers "
                f"{_shown(chat, wanted, place)}, {nats:.3f} nats more likely (allowed "
                f"{config.logprob_tolerance}): the export is not read alike"
            )
        report["near_ties"] += 1
        report["largest_tie"] = max(report["largest_tie"], nats)
    return report


def _check_encoder(model_dir: str, model_config: ModelConfig, taken: list[dict[str, Any]]) -> None:
    """Hold training's encoding of the questions, each with a plain answer, against the model's own
    processor.
    """
    from medray.data.collate import Encoder

    encoder = Encoder(model_dir, model_config.model_dump(), {}, "dpo")
    for row in taken:
        turns = [{"role": "user", "text": row["question"]}, {"role": "assistant", "text": "yes"}]
        try:
            encoder.check_row(turns, row["image"])
        except MedrayError as error:
            raise StageError(f"verify: row {row['sample_id']}: {error}") from error


def _first_gap(
    ours: list[int], wanted: list[int], logits: Any, report: dict[str, Any]
) -> tuple[int, float] | None:
    """Where the tokens part and by how much transformers prefers its own (nats); None where they are
    equal.
    """
    for place in range(max(len(ours), len(wanted))):
        if place >= min(len(ours), len(wanted)):
            return place, float("inf")  # one side stopped where the other went on after equal tokens
        if ours[place] != wanted[place]:
            logprobs = logits[place][0].float().log_softmax(-1)
            return place, float(logprobs[wanted[place]] - logprobs[ours[place]])
        report["tokens"] += 1
    return None


def _inputs(chat: Chat, row: dict[str, Any]) -> Any:
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
    messages = [{"role": "user", "content": content}]
    if chat.config.system_prompt:
        messages.insert(
            0, {"role": "system", "content": [{"type": "text", "text": chat.config.system_prompt}]}
        )
    return chat.dialogues.processor.apply_chat_template(
        messages,
        chat_template=chat.dialogues.template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _shown(chat: Chat, ids: list[int], place: int) -> str:
    return repr(chat.tokenizer.decode([ids[place]])) if place < len(ids) else "nothing"
