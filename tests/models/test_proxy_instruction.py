"""The proxy instruction: where its vectors go, what each mode does to them in a step, and that nothing
else changes.
"""

import re
import textwrap

import pytest
import torch
from PIL import Image

import medray.models.proxy_instruction as module
from medray.errors import ConfigError, DataError
from medray.models.proxy_instruction import INIT_BOUND, PLACEHOLDER, ProxyInstruction, add_placeholder
from medray.models.vlm import load_vlm

K = 3
TEXTS = ("A cell.", "It is a round nucleus, with pink granules in the cytoplasm")


@pytest.fixture(scope="module", params=["llava", "qwen"])
def path(request, tiny_llava, tiny_qwen):
    return {"llava": tiny_llava, "qwen": tiny_qwen}[request.param]


@pytest.fixture
def processor(path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path)


def fresh(path, precision="fp32"):
    torch.set_num_threads(1)
    return load_vlm(path, precision).requires_grad_(False)


def proxy_of(model, **kwargs):
    return ProxyInstruction(K, model.get_input_embeddings().embedding_dim, **kwargs)


def collated(processor, instruction, texts=TEXTS, side="right"):
    """Two samples of different length: [image][instruction] and a description, labels on the description."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    images = [Image.new("RGB", (64, 64), (40 * n, 90, 200)) for n in range(len(texts))]
    batch = dict(
        processor(
            text=[prompt + text for text in texts],
            images=images,
            padding=True,
            padding_side=side,
            return_tensors="pt",
        )
    )
    length = processor(text=[prompt], images=images[:1], return_tensors="pt")["input_ids"].shape[1]
    labels = batch["input_ids"].clone()
    for row, mask in enumerate(batch["attention_mask"]):
        labels[row, : int(mask.argmax()) + length] = -100
    labels[batch["attention_mask"] == 0] = -100
    return {**batch, "labels": labels}


def by_hand(model, batch, placeholder_id, vectors):
    """The model's output on input embeddings into which `vectors` were written, sample by sample."""
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(
        ids.clamp(max=model.get_input_embeddings().num_embeddings - 1)
    ).detach()
    rows = []
    for row, tokens in enumerate(ids):
        places = (tokens == placeholder_id).nonzero()[:, 0].tolist()
        assert len(places) == K
        pieces = list(embeds[row])
        for place, vector in zip(places, vectors, strict=True):
            pieces[place] = vector.to(embeds.dtype)
        rows.append(torch.stack(pieces))
    given = {name: value for name, value in batch.items() if name not in ("input_ids", "mm_token_type_ids")}
    if "mm_token_type_ids" in batch:
        given["position_ids"], _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=batch["mm_token_type_ids"],
            image_grid_thw=batch["image_grid_thw"],
            attention_mask=batch["attention_mask"],
        )
    return model(inputs_embeds=torch.stack(rows), **given)


def check_pass(model, proxy, placeholder, batch, leaf):
    """With the proxy attached a pass is the one with `leaf` put in by hand, and the vectors get its
    gradient; returns the pass.
    """
    expected = by_hand(model, batch, placeholder, leaf)
    expected.loss.backward()
    proxy.attach(model, placeholder)
    found = model(**batch)
    found.loss.backward()
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(proxy.vectors.grad, leaf.grad, rtol=1e-5, atol=1e-8)
    return found


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_sample_holds_the_vectors_in_order(path, processor, side):
    model = fresh(path)
    proxy = proxy_of(model, mode="free")
    placeholder = add_placeholder(processor.tokenizer)
    assert placeholder >= model.get_input_embeddings().num_embeddings  # beyond the vocabulary: no text has it
    batch = collated(processor, proxy.text, side=side)
    leaf = proxy.vectors.detach().clone().requires_grad_()
    found = check_pass(model, proxy, placeholder, batch, leaf)
    assert (leaf.grad.norm(dim=1) > 0).all()
    other = proxy.vectors.detach().flip(0)
    # the order counts
    assert not torch.allclose(by_hand(model, batch, placeholder, other).logits, found.logits, atol=1e-4)


def test_qwen3_vl():
    from tests.train.test_qwen3_vl import ragged_batch, tiny_qwen3_vl

    model, placeholder = tiny_qwen3_vl().requires_grad_(False), 600
    batch = {name: value for name, value in ragged_batch().items() if not name.startswith("ref_")}
    batch["input_ids"][:, 9 : 9 + K] = placeholder
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)
    proxy = proxy_of(model)
    proxy.attach(model, placeholder)
    found = model(**batch).logits
    proxy.detach()
    # Deepstack adds vision features at the image tokens, which need ids: rows of a larger embedding are the
    # hand's way here.
    model.resize_token_embeddings(600 + K, mean_resizing=False)
    model.get_input_embeddings().weight[600:] = proxy.vectors.detach()
    batch["input_ids"][:, 9 : 9 + K] = 600 + torch.arange(K)
    assert torch.equal(found, model(**batch).logits[..., :600])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(path, processor, reentrant):
    model = fresh(path).train()
    proxy = proxy_of(model)
    proxy.attach(model, add_placeholder(processor.tokenizer))
    batch = collated(processor, proxy.text)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.model.language_model.layers[0].gradient_checkpointing
        proxy.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        gradients.append(proxy.vectors.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)


def test_inputs_that_require_gradients_and_adapters(path, processor):
    """TRL makes the embeddings' output require gradients, PEFT wraps the model."""
    from peft import LoraConfig, get_peft_model

    model = fresh(path)
    proxy, placeholder = proxy_of(model), add_placeholder(processor.tokenizer)
    batch = collated(processor, proxy.text)
    expected = by_hand(model, batch, placeholder, proxy.vectors.detach()).logits
    model.enable_input_require_grads()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=".*language_model.*q_proj"))
    proxy.attach(wrapped, placeholder)
    out = wrapped(**batch)
    assert torch.equal(out.logits, expected)  # LoRA's B is zero
    out.loss.backward()
    assert proxy.vectors.grad.norm() > 0


def test_bf16_model_and_fp32_vectors(path, processor):
    model = fresh(path, "bf16")
    proxy = proxy_of(model, mode="free")
    placeholder = add_placeholder(processor.tokenizer)
    proxy.attach(model, placeholder)
    batch = collated(processor, proxy.text)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    out = model(**batch)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert proxy.vectors.grad.dtype == torch.float32
    assert torch.equal(out.logits, by_hand(model, batch, placeholder, proxy.vectors.detach()).logits)


def test_casting_what_holds_the_proxy_does_not_round_it():
    proxy = ProxyInstruction(K, 8)
    before = proxy.vectors.detach().clone()
    holder = torch.nn.ModuleDict({"proxy": proxy, "layer": torch.nn.Linear(2, 2)}).bfloat16().half()
    assert holder["layer"].weight.dtype == torch.float16
    assert {tensor.dtype for tensor in proxy.state_dict().values()} == {torch.float32}
    assert torch.equal(proxy.vectors, before)


def test_a_pass_without_placeholders_is_the_models_own(path, processor):
    model = fresh(path)
    batch = collated(processor, "Describe this image.")
    prompt = {
        name: value[:1]
        for name, value in batch.items()
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    }
    prompt["pixel_values"] = batch["pixel_values"][: len(batch["pixel_values"]) // 2]
    logits, answer = model(**batch).logits, model.generate(**prompt, max_new_tokens=8)
    proxy = proxy_of(model)
    ids = processor.tokenizer(TEXTS[0])["input_ids"]
    proxy.attach(model, add_placeholder(processor.tokenizer))
    assert processor.tokenizer(TEXTS[0])["input_ids"] == ids
    assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model.generate(**prompt, max_new_tokens=8), answer)
    with torch.no_grad():
        proxy.vectors.fill_(float("nan"))
    assert torch.equal(model(**batch).logits, logits)
    proxy.detach()
    assert (
        not model.get_input_embeddings()._forward_hooks
        and not model.get_input_embeddings()._forward_pre_hooks
    )


@pytest.mark.parametrize(("instruction", "found"), [(PLACEHOLDER, 1), (PLACEHOLDER * (K + 1), K + 1)])
def test_a_wrong_number_of_placeholders_is_an_error(tiny_llava, instruction, found):
    from transformers import AutoProcessor

    processor, model = AutoProcessor.from_pretrained(tiny_llava), fresh(tiny_llava)
    proxy = proxy_of(model)
    proxy.attach(model, add_placeholder(processor.tokenizer))
    with pytest.raises(DataError, match=f"sample 0 of the batch holds {found} proxy placeholders, not {K}"):
        model(**collated(processor, instruction))
    batch = collated(processor, proxy.text)
    batch["input_ids"][1][batch["input_ids"][1] == proxy.placeholder_id] = 5
    with pytest.raises(DataError, match="sample 1 of the batch holds 0 proxy placeholders"):
        model(**batch)
    assert model(**collated(processor, proxy.text)).loss > 0  # an error leaves nothing behind


def test_training_without_placeholders_is_an_error(tiny_llava):
    from transformers import AutoProcessor

    processor, model = AutoProcessor.from_pretrained(tiny_llava), fresh(tiny_llava)
    proxy = proxy_of(model)
    proxy.attach(model, add_placeholder(processor.tokenizer))
    model(**collated(processor, "Describe."))
    with torch.no_grad():
        model(**collated(processor, proxy.text))  # an evaluation pass trains nothing
    with pytest.raises(DataError, match="no training pass"):
        proxy.after_step()
    model(**collated(processor, proxy.text))
    proxy.after_step()
    with pytest.raises(DataError, match="no training pass"):
        proxy.after_step()


def ones(mode, momentum=0.9):
    """One vector (1, 1), and SGD of rate 0.5 on the loss |v|^2 / 2 of the vector v that a pass uses: its
    gradient is v.
    """
    proxy = ProxyInstruction(1, 2)
    with torch.no_grad():
        proxy.vectors.fill_(1.0)
    proxy.begin_stage(mode, momentum)
    return proxy


@pytest.mark.parametrize(
    ("mode", "used", "average", "vectors"),
    [
        # P 1 -> 0.5; Pbar = 0.9 + 0.05; reset; P 0.95 -> 0.475; Pbar = 0.855 + 0.0475; reset; P 0.9025 ->
        # 0.45125; ...
        ("released", [1, 0.95, 0.9025], [0.95, 0.9025, 0.857375], [0.95, 0.9025, 0.857375]),
        # P 1 -> 0.5 (gradient 1); Pbar 0.95; P 0.5 - 0.475 = 0.025; Pbar 0.855 + 0.0025; P 0.025 - 0.42875 =
        # -0.40375; ...
        ("textbook", [1, 0.95, 0.8575], [0.95, 0.8575, 0.731375], [0.5, 0.025, -0.40375]),
        ("free", [1, 0.5, 0.25], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]),
        ("frozen", [1, 1, 1], [1, 1, 1], [1, 1, 1]),
    ],
)
def test_three_steps_of_each_mode_by_hand(mode, used, average, vectors):
    proxy = ones(mode)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.5)
    seen = {"used": [], "average": [], "vectors": []}
    for _ in range(3):
        value = proxy.current()
        seen["used"].append(value[0, 0].item())
        if mode == "frozen":
            assert not value.requires_grad
        else:
            (value.square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        proxy.after_step()
        seen["average"].append(proxy.average[0, 1].item())
        seen["vectors"].append(proxy.vectors[0, 1].item())
    assert (
        seen["used"] == pytest.approx(used)
        and seen["average"] == pytest.approx(average)
        and seen["vectors"] == pytest.approx(vectors)
    )
    metrics = proxy.metrics()
    assert metrics["proxy_momentum"] == {"free": 0.0, "frozen": 1.0}.get(mode, 0.9)
    root = 2**0.5  # both places of the vector are equal
    assert metrics["proxy_norm"] == pytest.approx(average[-1] * root)
    assert metrics["proxy_moved"] == pytest.approx((1 - average[-1]) * root, abs=1e-6)
    assert metrics["proxy_gap"] == pytest.approx((average[-1] - vectors[-1]) * root, abs=1e-6)


def test_textbook_uses_the_average_exactly_and_its_gradient_goes_to_the_vectors(path, processor):
    model = fresh(path)
    proxy = proxy_of(model, mode="textbook")
    placeholder = add_placeholder(processor.tokenizer)
    with torch.no_grad():
        proxy.vectors.add_(torch.randn(proxy.vectors.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(proxy.current(), proxy.average)
    batch = collated(processor, proxy.text)
    leaf = proxy.average.clone().requires_grad_()
    check_pass(model, proxy, placeholder, batch, leaf)


@pytest.mark.parametrize(
    ("lr", "momentum", "steps", "atol"),
    [
        (0.1, 0.9, 20, 1e-6),
        # the paper's; a step of 2e-8 is rounded to the spacing of fp32 near 0.03, 2**-28
        (2e-5, 0.999, 20, 20 * 2**-28),
    ],
)
def test_released_equals_an_ordinary_step_of_lr_times_one_minus_m(lr, momentum, steps, atol):
    """With AdamW too, whose decay is decoupled and whose moments do not know the rate."""
    proxy = ProxyInstruction(8, 64, mode="released", momentum=momentum, seed=3)
    plain = torch.nn.Parameter(proxy.vectors.detach().clone())
    target = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    optimizers = [
        torch.optim.AdamW(proxy.parameters(), lr=lr, weight_decay=0.01),
        torch.optim.AdamW([plain], lr=lr * (1 - momentum), weight_decay=0.01),
    ]
    for _ in range(steps):
        for optimizer, value in zip(optimizers, (proxy.current(), plain), strict=True):
            optimizer.zero_grad()
            (value - target).square().sum().backward()
            optimizer.step()
        proxy.after_step()
    # AdamW steps by about its rate
    assert (plain - proxy.start).abs().mean() > 0.5 * steps * lr * (1 - momentum)
    torch.testing.assert_close(proxy.average, plain.detach(), rtol=0, atol=atol)


def test_in_bf16_the_average_would_stand_still():
    """Why the vectors are fp32: the authors' rule on bf16 tensors, and here."""
    drawn = ProxyInstruction(8, 4096, seed=0).vectors.detach()
    in_bf16 = drawn.bfloat16()
    assert torch.equal(0.999 * in_bf16 + 0.001 * in_bf16, in_bf16)
    generator = torch.Generator().manual_seed(0)
    step = 2e-5 * torch.randn(drawn.shape, generator=generator).sign()  # what Adam moves at the paper's rate
    stepped = (in_bf16 - step).bfloat16()
    assert 0.7 < (stepped == in_bf16).float().mean() < 0.9  # most elements do not even take the step
    assert (0.999 * in_bf16 + 0.001 * stepped == in_bf16).float().mean() > 0.999

    proxy = ProxyInstruction(8, 4096, mode="released", seed=0)
    with torch.no_grad():
        proxy.vectors.sub_(step)
    proxy.after_step()
    assert (proxy.average != drawn).all()


def test_warm_up_trains_the_proxy_alone(path, processor):
    model = fresh(path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    proxy = proxy_of(model, mode="free")
    proxy.attach(model, add_placeholder(processor.tokenizer))
    optimizer = torch.optim.AdamW([*model.parameters(), *proxy.parameters()], lr=1e-2)
    batch = collated(processor, proxy.text)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        proxy.after_step()
        losses.append(loss.item())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert losses[2] < losses[0] and proxy.metrics()["proxy_moved"] > 0
    proxy.begin_stage("frozen")
    assert proxy.metrics() == {
        "proxy_momentum": 1.0,
        "proxy_norm": pytest.approx(proxy.vectors.norm().item()),
        "proxy_moved": 0.0,
        "proxy_gap": 0.0,
    }
    assert not model(**batch).loss.requires_grad


def test_initial_values():
    first, again, other = (ProxyInstruction(8, 4096, seed=seed).vectors.detach() for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= INIT_BOUND == pytest.approx(0.0360844)
    assert first.std().item() == pytest.approx(INIT_BOUND / 3**0.5, rel=0.01)
    state = torch.random.get_rng_state()
    ProxyInstruction(8, 16, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)  # the model's own seeds are not disturbed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0, "width": 4}, "at least 1"),
        ({"count": 1, "width": 4, "momentum": 1.0}, "use mode frozen"),
        ({"count": 1, "width": 4, "momentum": -0.1}, "must be in"),
        ({"count": 1, "width": 4, "mode": "ema"}, "allowed values: released, textbook, frozen, free"),
    ],
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ProxyInstruction(**given)


def test_another_models_width_is_refused(tiny_llava):
    with pytest.raises(ConfigError, match="32 wide and the model's input embeddings are 128"):
        ProxyInstruction(K, 32).attach(fresh(tiny_llava), 999)


def test_file_round_trip_goes_on_as_before(tmp_path):
    def step(proxy):
        optimizer = torch.optim.SGD(proxy.parameters(), lr=0.5)
        (proxy.current().square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        proxy.after_step()

    for mode in ("released", "textbook", "frozen", "free"):
        proxy = ones(mode)
        if mode != "frozen":
            step(proxy)
        proxy.save(tmp_path / "proxy.safetensors", base_model="tiny")
        again = ProxyInstruction.load(tmp_path / "proxy.safetensors")
        assert (again.mode, again.momentum, again.vectors.requires_grad) == (
            mode,
            proxy.momentum,
            mode != "frozen",
        )
        if mode != "frozen":
            step(proxy)
            step(again)
        assert proxy.state_dict().keys() == again.state_dict().keys() == {"vectors", "average", "start"}
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in proxy.state_dict().items())
        assert again.metrics() == proxy.metrics()
    from safetensors import safe_open

    with safe_open(tmp_path / "proxy.safetensors", framework="pt") as handle:
        assert handle.metadata() == {
            "format": "medray.proxy_instruction",
            "mode": "free",
            "momentum": "0.0",
            "placeholder": PLACEHOLDER,
            "base_model": "tiny",
        }


def test_files_of_another_kind_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"vectors": torch.ones(1, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in (
        ("other", "holds no proxy instruction"),
        ("text", "cannot be read"),
        ("missing", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            ProxyInstruction.load(tmp_path / f"{name}.safetensors")


def test_the_example_in_the_docs_runs(tiny_llava, tmp_path):
    from transformers import AutoModelForImageTextToText
    from trl import SFTConfig

    example = textwrap.dedent(re.search(r"::\n\n(.*?)\n\nLabels", module.__doc__, re.S)[1])
    assert len(example.splitlines()) <= 20
    config = SFTConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        report_to="none",
        save_strategy="no",
        max_length=None,
    )
    pairs = [(Image.new("RGB", (64, 64), (40 * n, 80, 90)), text) for n, text in enumerate([*TEXTS, *TEXTS])]
    names = {"path": tiny_llava, "pairs": pairs, "sft_config": config, "out": str(tmp_path / "out")}
    exec(example, names)

    assert names["trainer"].state.global_step == 2
    assert names["proxy"].metrics()["proxy_moved"] > 0
    before, after = (
        fresh(tiny_llava).state_dict(),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict(),
    )
    assert before.keys() == after.keys()  # the export knows no proxy
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("vision_tower" in name for name in changed)
    assert torch.equal(
        ProxyInstruction.load(tmp_path / "out" / "proxy_instruction.safetensors").average,
        names["proxy"].average,
    )
