"""Losses against TRL's and transformers' own, and what a step computes."""

import pytest
import torch
import torch.nn.functional as F

from medray.data.collate import collate_dpo, collate_sft
from medray.data.pixels import normalise_pixels
from medray.models.vlm import load_processor, load_vlm, plain_model, prepare_trainable, shared_image_features
from medray.train import objectives
from medray.train.objectives import (
    answer_logps,
    dpo_loss,
    dpo_objective,
    sequence_logps,
    sft_loss,
    sft_objective,
    supervised_logits,
)
from tests.support.encoded_rows import DPO, SFT, encoded


def batch_of(path: str, kind: str, count: int = 3) -> dict:
    rows, info = encoded(path, kind, count)
    batch = collate_dpo(rows, info) if kind == "dpo" else collate_sft(rows, info, 0.5, 0, 0)
    batch["pixel_values"] = normalise_pixels(batch["pixel_values"], load_processor(path).image_processor)
    return batch


def separately(batch: dict) -> dict:
    """The batch with every image twice, as a plain forward of 2B sequences wants it."""
    return {name: value for name, value in batch.items() if not name.startswith("ref_")} | {
        "pixel_values": torch.cat([batch["pixel_values"]] * 2)
    }


def test_sft_loss_is_transformers_own(tiny):
    model, batch = load_vlm(tiny, "fp32"), batch_of(tiny, "sft")
    with torch.no_grad():
        own = model(**batch)
        loss, weight, _ = sft_objective(model, batch)
    assert weight == (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(loss / weight, own.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(sft_loss(own.logits, batch["labels"]), own.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        sft_loss(own.logits, batch["labels"], 7.0), own.loss * weight / 7, rtol=1e-5, atol=0
    )


def test_shared_features_give_the_logits_of_separate_encoding(tiny):
    model, batch = load_vlm(tiny, "fp32"), batch_of(tiny, "dpo")
    with torch.no_grad():
        with shared_image_features(model, 2):
            shared, labels, rows = supervised_logits(model, batch)
        apart, _, _ = supervised_logits(model, separately(batch))
        whole = model(**{k: v for k, v in separately(batch).items() if k != "labels"}).logits
    assert len(rows) == len(labels) == (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart, whole[:, :-1][batch["labels"][:, 1:] != -100], rtol=1e-5, atol=1e-5)


def test_packed_pairs_give_the_log_probabilities_of_separate_sequences(tiny):
    """Ragged answers, so that padding, positions and the mask between the answers all matter; gradients
    too.
    """
    model, batch = load_vlm(tiny, "fp32"), batch_of(tiny, "dpo", count=4)
    head = model.get_output_embeddings().weight
    packed, lengths = answer_logps(model, batch)
    assert lengths.tolist() == (batch["labels"] != -100).sum(1).tolist()
    assert len(set(lengths.tolist())) > 2
    model.set_attn_implementation("eager")
    whole = model(**{k: v for k, v in separately(batch).items() if k != "labels"}).logits
    apart, _ = sequence_logps(whole, batch["labels"])
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-4)
    weights = torch.arange(1.0, 9.0)
    gradients = [torch.autograd.grad((weights * logps).sum(), head)[0] for logps in (packed, apart)]
    # Sums over many tokens, which cancel: rounding goes by the largest of them, and by the machine's order of
    # adding.
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * float(gradients[1].abs().max()))


def test_only_supervised_positions_reach_the_vocabulary(tiny):
    model, batch = load_vlm(tiny, "fp32"), batch_of(tiny, "dpo")
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, out: shapes.append(out.shape))
    dpo_objective(model, batch)
    assert shapes == [
        (int((batch["labels"][:, 1:] != -100).sum()), model.config.get_text_config().vocab_size)
    ]


def test_each_image_is_encoded_once_per_dpo_step(tiny):
    model, batch = load_vlm(tiny, "fp32"), batch_of(tiny, "dpo", count=3)
    tower = plain_model(model).model
    tower = getattr(tower, "vision_tower", None) or tower.visual
    seen = []
    tower.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    loss, pairs, _ = dpo_objective(model, batch)
    loss.backward()
    assert pairs == 3
    assert seen == [len(batch["pixel_values"])]
    assert "get_image_features" not in vars(plain_model(model).model)


def test_chunks_change_neither_log_probabilities_nor_gradients(monkeypatch):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 9, 11, requires_grad=True), torch.randint(0, 11, (4, 9))
    labels[:, :3] = -100
    whole = sequence_logps(logits, labels)
    gradient = torch.autograd.grad(whole[0].sum(), logits)[0]
    monkeypatch.setattr(objectives, "CHUNK", 5)
    parts = sequence_logps(logits, labels)
    torch.testing.assert_close(parts[0], whole[0])
    assert parts[1].tolist() == [6] * 4
    torch.testing.assert_close(torch.autograd.grad(parts[0].sum(), logits)[0], gradient)
    by_hand = sum(F.log_softmax(logits[0, t - 1], -1)[labels[0, t]] for t in range(3, 9))
    torch.testing.assert_close(whole[0][0], by_hand)


def test_dpo_loss_by_hand():
    loss, metrics = dpo_loss(
        torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-2.0]), torch.tensor([-2.5]), beta=0.5
    )
    margin = 0.5 * ((-1 + 3) - (-2 + 2.5))
    assert loss.item() == pytest.approx(-torch.tensor(margin).sigmoid().log().item())
    assert metrics["rewards/chosen"].item() == pytest.approx(0.5)
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.25)
    assert metrics["rewards/accuracy"].item() == 1.0
    smoothed, _ = dpo_loss(
        torch.tensor([-1.0]),
        torch.tensor([-3.0]),
        torch.tensor([-2.0]),
        torch.tensor([-2.5]),
        beta=0.5,
        label_smoothing=0.1,
    )
    assert smoothed.item() == pytest.approx(loss.item() + 0.1 * margin)


def test_dpo_is_trls(tiny, tmp_path):
    """Loss, log-probabilities, rewards and gradients of TRL's DPOTrainer on the same batch, with adapters
    that have moved.
    """
    import copy

    import datasets
    from trl import DPOConfig, DPOTrainer

    batch = batch_of(tiny, "dpo")
    reference = load_vlm(tiny, "fp32")
    policy = prepare_trainable(
        copy.deepcopy(reference), DPO.model_copy(update={"gradient_checkpointing": False})
    ).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in policy.parameters() if p.requires_grad):
            parameter += 0.02 * torch.randn_like(parameter)
        logps, _ = answer_logps(reference, batch)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = logps.chunk(2)

    from PIL import Image

    rows = datasets.Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (64, 64))],
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "c"}],
            }
        ]
    )
    arguments = DPOConfig(
        str(tmp_path),
        beta=0.1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    trainer = DPOTrainer(
        policy, ref_model=reference, args=arguments, train_dataset=rows, processing_class=load_processor(tiny)
    )
    for parameter in policy.parameters():
        parameter.grad = None
    inputs = {name: value for name, value in separately(batch).items() if name != "labels"} | {
        "completion_mask": (batch["labels"] != -100).long()
    }
    policy.eval()
    theirs = trainer.compute_loss(policy, inputs)
    theirs.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    for parameter in policy.parameters():
        parameter.grad = None
    loss, pairs, metrics = dpo_objective(policy, batch, beta=0.1)
    (loss / pairs).backward()
    torch.testing.assert_close(loss / pairs, theirs, rtol=1e-4, atol=0)
    logged = {name: values[-1] for name, values in trainer._metrics["eval"].items()}
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert float(metrics[name] / pairs) == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)


def test_flipped_questions_are_supervised(tiny_llava):
    rows, info = encoded(tiny_llava, "sft", 2)
    plain, asked = (collate_sft(rows, info, rho, SFT.seed, 0) for rho in (0.0, 1.0))
    assert (asked["labels"] != -100).sum() > (plain["labels"] != -100).sum()
