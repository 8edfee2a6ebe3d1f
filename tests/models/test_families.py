"""Tiny models of many families: each gives what transformers gives (ids, pixels, losses, gradients,
export), or is refused by name.
"""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from medray.config import (
    DataConfig,
    DpoConfig,
    LoraConfig,
    ModelConfig,
    SelfTrainingConfig,
    SftConfig,
    load_config,
)
from medray.data.collate import Encoder, collate_dpo, collate_sft
from medray.data.encoding_check import own_inputs
from medray.data.model_check import check_support
from medray.data.pixels import normalise_pixels
from medray.errors import ConfigError, StageError
from medray.images.decoding import filler_picture
from medray.models.export import save_vlm
from medray.models.vlm import check_parts, load_processor, load_vlm, merge, part_of, prepare_trainable
from medray.plan.preflight import check_self_training
from medray.train.objectives import answer_logps, sequence_logps, sft_objective
from medray.train.pair_pass import packing_problem, separate_images
from medray.train.pair_probe import choose_pair_pass, probe_rows
from tests.support.families import PACKED, REFUSED, TUNED, clip_vision, gemma3, internvl, text_config

torch.set_num_threads(1)
MODEL = ModelConfig(precision="fp32", system_prompt="", max_length=1024, pad_to_square=False)
SMALL = {
    "lora_llm": LoraConfig(rank=2, alpha=4, dropout=0.0),
    "lora_vision": LoraConfig(rank=2, alpha=4, dropout=0.0),
}
SMALLEST = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
TURNS = [
    {"role": "user", "text": "What is the shape of the nucleus?"},
    {"role": "assistant", "text": "It is round."},
    {"role": "user", "text": "Is the cell big?"},
    {"role": "assistant", "text": "yes"},
]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Folder of a family's tiny model, built once."""
    built = {}

    def build(family):
        if family not in built:
            torch.manual_seed(0)
            built[family] = tmp_path_factory.mktemp("family") / family.__name__
            family(built[family])
        return str(built[family])

    return build


def png(seed, size):
    data = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def encoder_of(path, kind):
    return Encoder(path, MODEL.model_dump(), DataConfig().model_dump(), kind)


def names(families):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.__name__)


def placed(batch, processor):
    return batch | {"pixel_values": normalise_pixels(batch["pixel_values"], processor.image_processor)}


def pair_batch(encoder, rows):
    encoded = encoder(pa.Table.from_pylist(rows)).to_pylist()
    assert [row["error"] for row in encoded] == [None] * len(rows)
    return placed(collate_dpo(encoded, encoder.dialogues.info(questioner=False)), encoder.processor)


def preferences():
    answers = ("It is round.", "no", "The cell is big and round", "yes it is")
    return [
        {
            "sample_id": f"p{i}",
            "image": png(i, (56 + 20 * i, 84)),
            "prompt": "Is the cell big?",
            "chosen": answers[i],
            "rejected": answers[(i + 1) % 4],
            "ref_chosen_logp": None,
            "ref_rejected_logp": None,
        }
        for i in range(4)
    ]


@names(TUNED)
def test_ids_pixels_and_sft_loss_are_transformers_own(family, folder_of):
    path = folder_of(family)
    check_support(path, MODEL, questioner=True)
    encoder = encoder_of(path, "sft")
    rows = [
        {"sample_id": f"s{i}", "image": png(i, size), "turns": TURNS[: 4 - 2 * i]}
        for i, size in enumerate([(64, 64), (50, 140)])
    ]
    encoded = encoder(pa.Table.from_pylist(rows)).to_pylist()
    assert [row["error"] for row in encoded] == [None, None]
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    batch = placed(collate_sft(encoded, encoder.dialogues.info(), 0.0, 0, 0), encoder.processor)
    loss, weight, _ = sft_objective(model, batch)
    total = torch.zeros(())
    for number, row in enumerate(rows):
        own = own_inputs(encoder.dialogues, row["turns"], Image.open(io.BytesIO(row["image"])))
        assert own["input_ids"][0].tolist() == encoded[number]["input_ids"]
        labels = batch["labels"][number : number + 1, : own["input_ids"].shape[1]]
        output = model(**{name: torch.from_numpy(value) for name, value in own.items()}, labels=labels)
        total += output.loss * (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-4)
    assert weight == (batch["labels"][:, 1:] != -100).sum()


@names(TUNED)
def test_dpo_is_that_of_separate_rows(family, folder_of):
    """Packed only where each layer is full causal attention; as the modules say, and as measured;
    gradients too.
    """
    path = folder_of(family)
    encoder, model = encoder_of(path, "dpo"), load_vlm(path, "fp32")
    assert (packing_problem(model) is None) == (family in PACKED)
    batch = pair_batch(encoder, preferences())
    inputs = {name: value for name, value in separate_images(batch, 2).items() if name != "labels"}
    own, _ = sequence_logps(model(**inputs).logits, batch["labels"])
    with torch.no_grad():
        measured = choose_pair_pass(model, pair_batch(encoder, probe_rows(filler_picture())))
    assert (measured == "packed") == (family in PACKED)
    weights = torch.arange(1.0, 9.0)
    head = model.get_output_embeddings().weight
    wanted = torch.autograd.grad((weights * own).sum(), head)[0]
    for way in (None, measured, "separate"):
        logps, lengths = answer_logps(model, batch, way)
        assert lengths.tolist() == (batch["labels"] != -100).sum(1).tolist()
        torch.testing.assert_close(logps, own, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(
            torch.autograd.grad((weights * logps).sum(), head)[0], wanted, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("phi3", {"sliding_window": 8}),
        ("starcoder2", {"sliding_window": 8}),
        ("cohere2", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
        ("llama4_text", {"attention_chunk_size": 8, "intermediate_size_mlp": 64, "num_local_experts": 2}),
        ("exaone4", {"sliding_window": 8}),
        ("gpt_oss", {"sliding_window": 8, "num_local_experts": 4}),
        ("minimax", {"num_local_experts": 2, "block_size": 8}),
        (
            "granitemoehybrid",
            {
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_d_state": 8,
                "layer_types": ["mamba", "attention"],
            },
        ),
        ("jamba", {"mamba_d_state": 8, "use_mamba_kernels": False, "num_experts": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_language_models_that_are_not_full_attention_are_never_packed(kind, more):
    """Where packing would be wrong by tenths of nats to nats, reading the modules says so."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

        def __len__(self):
            return 300

    torch.manual_seed(0)
    text = AutoConfig.for_model(**{**text_config(Tokenizer(), kind), **more})
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip_vision(), text_config=text, image_token_id=299, vision_feature_layer=-1
        )
    ).eval()
    prompt = torch.cat([torch.full((2, 16), 299), torch.randint(10, 290, (2, 10))], 1)
    ids = torch.cat([prompt.repeat(2, 1), torch.randint(10, 290, (4, 6))], 1)
    labels = torch.where(torch.arange(32) < 26, -100, ids)
    batch = {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 32, 32),
    }
    inputs = {name: value for name, value in separate_images(batch, 2).items() if name != "labels"}
    with torch.no_grad():
        own, _ = sequence_logps(model(**inputs, use_cache=False).logits, labels)
        torch.testing.assert_close(answer_logps(model, batch)[0], own, rtol=1e-5, atol=1e-4)
    assert packing_problem(model)


def test_what_reading_does_not_see_is_measured(folder_of, monkeypatch):
    """A model that says it is plain, and is not: its mask reaches no layer."""
    from tests.support.families import llava

    path = folder_of(llava)
    encoder, model = encoder_of(path, "dpo"), load_vlm(path, "fp32")
    decoder = model.get_decoder()
    plain = decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda *args, attention_mask=None, **kwargs: plain(*args, **kwargs)
    )
    monkeypatch.setattr("medray.train.pair_pass.packing_problem", lambda model: None)
    with torch.no_grad():
        assert choose_pair_pass(model, pair_batch(encoder, probe_rows(filler_picture()))) == "shared"


@names(REFUSED)
def test_other_families_are_refused_by_name_before_anything_starts(family, folder_of):
    path = folder_of(family)
    with pytest.raises(ConfigError) as error:
        check_support(path, MODEL, questioner=True)
    assert family.__name__ in str(error.value) and REFUSED[family] in str(error.value)
    settings = [
        f"model.path={path}",
        "model.pad_to_square=false",
        "model.system_prompt=''",
        "model.precision=fp32",
    ]
    with pytest.raises(ConfigError, match=family.__name__):
        check_self_training(
            load_config(SelfTrainingConfig, "medray/recipes/self_train/tiny-cpu.yaml", settings)
        )
    if family.__name__ != "llama":
        with pytest.raises(ConfigError, match=family.__name__):
            encoder_of(path, "dpo")


@names([*TUNED, *(family for family in REFUSED if family.__name__ != "llama")])
def test_every_parameter_has_a_part_and_gets_gradients_when_it_is_named(family, folder_of):
    model = load_vlm(folder_of(family), "fp32")
    assert {part_of(name) for name, _ in model.named_parameters()} == {"vision", "projector", "llm"}
    rates = {"lr_llm": 1e-3, "lr_projector": 1e-3, "lr_vision": 1e-3, "gradient_checkpointing": False}
    opened = prepare_trainable(model, SftConfig(**rates, **SMALL))
    trained = {part_of(name) for name, parameter in opened.named_parameters() if parameter.requires_grad}
    assert trained == {"vision", "projector", "llm"}
    if family not in TUNED:
        return
    encoder = encoder_of(folder_of(family), "sft")
    rows = encoder(
        pa.Table.from_pylist([{"sample_id": "s", "image": png(0, (64, 64)), "turns": TURNS}])
    ).to_pylist()
    batch = placed(collate_sft(rows, encoder.dialogues.info(), 0.0, 0, 0), encoder.processor)
    sft_objective(opened, batch)[0].backward()
    reached = {
        part_of(name)
        for name, parameter in opened.named_parameters()
        if parameter.requires_grad and parameter.grad is not None and float(parameter.grad.abs().max()) > 0
    }
    assert reached == {"vision", "projector", "llm"}


@names([*TUNED, internvl, gemma3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_export_is_read_back_whole(family, dtype, folder_of, tmp_path):
    """After adapters have moved and are merged: transformers finds every tensor, and each as it was in
    memory.
    """
    path = folder_of(family)
    model = prepare_trainable(load_vlm(path, "fp32"), DpoConfig(**SMALL, gradient_checkpointing=False))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn_like(parameter)
    merged = merge(model)
    save_vlm(merged, load_processor(path), tmp_path / "model", dtype)
    again, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, read, start = merged.state_dict(), again.state_dict(), load_vlm(path, "fp32").state_dict()
    assert before.keys() == read.keys()
    assert all(torch.equal(before[name].to(dtype or torch.float32).float(), read[name]) for name in before)
    assert {part_of(name) for name in read if not torch.equal(start[name], before[name])} == {
        "vision",
        "projector",
        "llm",
    }
    assert load_processor(str(tmp_path / "model")).chat_template == load_processor(path).chat_template


def test_an_export_that_is_not_read_back_fails_by_name(folder_of, tmp_path, monkeypatch):
    """InternVL's tower with the names of CLIP's would be random for whoever loads it."""
    path = folder_of(internvl)
    model = load_vlm(path, "fp32")
    monkeypatch.setattr("medray.models.export._tower_needs_prefix", lambda model: True)
    with pytest.raises(StageError, match=r"internvl.*vision_tower"):
        save_vlm(model, load_processor(path), tmp_path / "model")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with torch.no_grad():
        next(model.parameters())[0] = torch.nan
    with pytest.raises(StageError, match="NaN"):
        save_vlm(model, load_processor(path), tmp_path / "model")


def test_a_folder_that_lacks_tensors_is_refused(tiny_llava, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llava, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {name.replace("vision_tower.", "tower."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"llava.*vision_tower"):
        load_vlm(str(tmp_path / "model"), "fp32")


def test_pickled_weights_are_refused(tiny_llava, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llava, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(
        AutoModelForImageTextToText.from_pretrained(tiny_llava).state_dict(), folder / "pytorch_model.bin"
    )
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        load_vlm(str(folder), "fp32")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        check_self_training(
            load_config(
                SelfTrainingConfig, "medray/recipes/self_train/tiny-cpu.yaml", [f"model.path={folder}"]
            )
        )
    with pytest.raises(ConfigError, match=r"judge\.model.*pytorch_model\.bin"):
        settings = ["judge.kind=vllm", f"judge.model={folder}", "rounds=1"]
        check_self_training(
            load_config(SelfTrainingConfig, "medray/recipes/self_train/tiny-cpu.yaml", settings)
        )


def test_parameters_without_a_part_fail_by_name():
    """An audio tower, say, would be frozen without a word."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=clip_vision(), text_config={"model_type": "llama", **SMALLEST})
    )
    check_parts(model)
    model.model.audio_tower = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"llava.*audio_tower"):
        check_parts(model)


def test_a_rate_for_a_part_without_parameters_is_an_error(tiny_llava):
    model = load_vlm(tiny_llava, "fp32")
    model.model.multi_modal_projector = torch.nn.Identity()
    with pytest.raises(ConfigError, match="lr_projector"):
        prepare_trainable(model, SftConfig(**SMALL))


def test_a_template_that_refuses_the_questioner_is_named(tiny_llava, tmp_path):
    strict = (
        "{% for m in messages %}{% if m['role'] == 'vuser' %}{{ raise_exception('Roles must alternate') "
        "}}{% endif %}{% endfor %}"
    )
    template = tmp_path / "strict.jinja"
    template.write_text(strict + AutoProcessor.from_pretrained(tiny_llava).chat_template)
    model = MODEL.model_copy(update={"chat_template": str(template)})
    with pytest.raises(ConfigError, match=r"model\.questioner_role.*Roles must alternate"):
        check_support(tiny_llava, model, questioner=True)
    check_support(tiny_llava, model, questioner=False)


def test_an_end_that_does_not_stop_the_model_is_named(tiny_llava, tmp_path):
    template = tmp_path / "other-end.jinja"
    template.write_text(
        AutoProcessor.from_pretrained(tiny_llava).chat_template.replace("<|end|>", "<|system|>")
    )
    with pytest.raises(ConfigError, match=r"<\|system\|>.*does not stop"):
        check_support(tiny_llava, MODEL.model_copy(update={"chat_template": str(template)}), questioner=False)


def test_gemmas_end_of_turn_is_a_special_token(folder_of):
    from medray.data.chat_spans import special_tokens
    from medray.inference.chat import special_texts

    processor = AutoProcessor.from_pretrained(folder_of(gemma3))
    assert special_tokens(processor.tokenizer)["<end_of_turn>"] == processor.tokenizer.convert_tokens_to_ids(
        "<end_of_turn>"
    )
    assert "<start_of_turn>" in special_texts(processor)


def test_an_image_that_the_processor_cannot_take_sets_its_row_aside(tiny_llava, monkeypatch):
    encoder = encoder_of(tiny_llava, "sft")
    plain = encoder._pixels

    def fails_on_wide(image):
        if image.width > 100:
            raise TypeError("mean must have 3 elements if it is an iterable, got 4")
        return plain(image)

    monkeypatch.setattr(encoder, "_pixels", fails_on_wide)
    rows = [
        {"sample_id": f"s{i}", "image": png(i, (40, width)), "turns": TURNS}
        for i, width in enumerate((40, 120))
    ]
    good, bad = encoder(pa.Table.from_pylist(rows)).to_pylist()
    assert good["error"] is None and "mean must have 3 elements" in bad["error"]
    assert all("mean must" in row["error"] for row in encoder(pa.Table.from_pylist(rows[1:] * 3)).to_pylist())


def test_a_row_that_the_processor_reads_otherwise_stops_the_stage_by_name(tiny_llava, monkeypatch):
    """A template that trims texts, which no made-up dialogue shows: the rows themselves are compared."""
    encoder = encoder_of(tiny_llava, "sft")
    row = {"sample_id": "s", "image": png(0, (40, 40)), "turns": TURNS}
    encode = encoder.dialogues.encode
    monkeypatch.setattr(
        encoder.dialogues, "encode", lambda turns: encode([*turns[:-1], {"role": "assistant", "text": "no"}])
    )
    with pytest.raises(ConfigError, match=r"llava: token \d+ is"):
        encoder(pa.Table.from_pylist([row]))


def test_a_leftover_adapter_is_refused(folder_of, tmp_path):
    shutil.copytree(folder_of(TUNED[0]), tmp_path / "model")
    (tmp_path / "model/adapter_config.json").write_text("{}")
    for read in (lambda path: check_support(path, MODEL, questioner=True), load_vlm):
        with pytest.raises(ConfigError, match=r"adapter_config\.json"):
            read(str(tmp_path / "model"))


def test_a_quantised_model_is_refused(folder_of, tmp_path):
    shutil.copytree(folder_of(TUNED[0]), tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        )
    )
    with pytest.raises(ConfigError, match=r"quantised .gptq."):
        check_support(str(tmp_path / "model"), MODEL, questioner=True)


def test_settings_of_sampling_without_do_sample_do_not_fail_the_export(folder_of, tmp_path):
    shutil.copytree(folder_of(TUNED[0]), tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_p": 0.9}))
    model = load_vlm(str(tmp_path / "model"), "fp32")
    save_vlm(model, load_processor(str(tmp_path / "model")), tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["do_sample"] is True
