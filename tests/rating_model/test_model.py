"""The rating model: raw logits, inputs that keep the answer, folders that come back as they were."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medray.config import DataConfig
from medray.errors import ConfigError
from medray.rating_model.model import RatingModel
from tests.support.rating_pairs import cell


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory):
    """A SigLIP of some 40k parameters with random weights: texts of fixed length, no mask, attention
    pooling.
    """
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    from medray.testbed.tiny_vlm import build_tokenizer

    tokenizer = build_tokenizer(
        ["Question: What is this?\nAnswer: red"], ("<pad>", "<s>", "<|end|>"), 320, template=None
    )
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(
            text_config={
                **tower,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 40,
                "projection_size": 32,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**tower, "image_size": 32, "patch_size": 8},
        )
    )
    path = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(path)
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(path)
    return str(path)


def inputs_of(model, count=3):
    inputs = model.inputs(DataConfig())
    answers = ("red", "a rather long answer about the red cell", "blue")
    texts = [inputs.text("Which colour?", answers[number % 3], None).ids for number in range(count)]
    batch = inputs.batch(
        texts, [inputs.pixels(cell(number)[0]) for number in range(count)], list(range(count))
    )
    return {**batch, "pixel_values": batch["pixel_values"].float() / 255}


@pytest.fixture(params=["clip", "siglip"])
def encoder(request, tiny_clip, tiny_siglip):
    return {"clip": tiny_clip, "siglip": tiny_siglip}[request.param]


def test_it_is_the_mlp_of_both_embeddings(tiny_clip):
    """[text ; image], each of length 1, through hidden layers with ReLU, and no sigmoid at the end."""
    model = RatingModel.from_encoder(tiny_clip, hidden=(8, 8)).eval()
    assert [type(layer).__name__ for layer in model.mlp] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert [tuple(layer.weight.shape) for layer in model.mlp if hasattr(layer, "weight")] == [
        (8, 32),
        (8, 8),
        (1, 8),
    ]
    batch = inputs_of(model)
    with torch.no_grad():
        text, image = (
            features / features.norm(dim=1, keepdim=True)
            for features in (
                model.encoder.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output,
                model.encoder.get_image_features(batch["pixel_values"]).pooler_output,
            )
        )
        torch.testing.assert_close(model(**batch), model.mlp(torch.cat([text, image], 1))[:, 0])
        model.mlp[-1].bias += 7.0
        assert model(**batch).min() > 5, "a logit is not kept in (0, 1)"


def test_padding_and_sharing_images_change_no_score(encoder):
    """Whatever else is in a batch; and one image of several texts gives what copies of it give."""
    model = RatingModel.from_encoder(encoder, hidden=(8,)).eval()
    batch = inputs_of(model)
    with torch.no_grad():
        together = model(**batch)
        for place in range(3):
            inputs = model.inputs(DataConfig())
            length = int(batch["attention_mask"][place].sum())
            alone = {
                **inputs.padded([batch["input_ids"][place][:length].tolist()]),
                "pixel_values": batch["pixel_values"][place : place + 1],
            }
            torch.testing.assert_close(model(**alone)[0], together[place], rtol=1e-4, atol=1e-6)
        shared = model(
            batch["pixel_values"][:2],
            batch["input_ids"],
            batch["attention_mask"],
            image_of=torch.tensor([1, 0, 1]),
        )
        copied = model(batch["pixel_values"][[1, 0, 1]], batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(shared, copied, rtol=1e-4, atol=1e-6)
    assert together.std() > 0


def test_every_weight_but_the_contrastive_scale_learns(encoder):
    model = RatingModel.from_encoder(encoder, hidden=(8,)).train()
    model(**inputs_of(model)).sum().backward()
    assert not {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # DeepSpeed refuses parameters without dimensions, such as this one, but the encoder keeps it.
    assert all(parameter.dim() for parameter in model.parameters())
    assert "encoder.logit_scale" in model.state_dict()


def test_a_folder_comes_back_as_it_was(encoder, tmp_path):
    model = RatingModel.from_encoder(encoder, hidden=(8, 4), max_length=24, pad_to_square=True, seed=3).eval()
    model.save_pretrained(tmp_path / "rater")
    files = {path.name for path in Path(tmp_path, "rater").iterdir()}
    assert {"config.json", "model.safetensors", "head.safetensors", "rater.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert json.loads((tmp_path / "rater" / "rater.json").read_text()) == {
        "hidden": [8, 4],
        "max_length": 24,
        "pad_to_square": True,
    }
    again = RatingModel.from_pretrained(str(tmp_path / "rater"))
    assert not again.training
    assert (again.inputs(DataConfig()).max_length, again.inputs(DataConfig()).square) == (
        model.inputs(DataConfig()).max_length,
        True,
    )
    batch = inputs_of(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch), model(**batch), rtol=0, atol=0)
    # It is an encoder's folder too: a further rater may begin from it.
    torch.testing.assert_close(
        RatingModel.from_encoder(str(tmp_path / "rater")).encoder.state_dict(),
        model.encoder.state_dict(),
        rtol=0,
        atol=0,
    )
    assert oct((tmp_path / "rater" / "rater.json").stat().st_mode)[-3:] == "644"


def test_a_failed_save_leaves_the_old_folder(tiny_clip, tmp_path, monkeypatch):
    model = RatingModel.from_encoder(tiny_clip, hidden=(8,))
    model.save_pretrained(tmp_path / "rater")
    before = load_file(tmp_path / "rater" / "head.safetensors")
    with torch.no_grad():
        model.mlp[0].weight.zero_()
    model.hidden = object()  # what cannot be written comes after the weights
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path / "rater")
    torch.testing.assert_close(load_file(tmp_path / "rater" / "head.safetensors"), before)
    assert os.listdir(tmp_path) == ["rater"]


def test_the_head_follows_the_seed(tiny_clip):
    one, same, other = (
        RatingModel.from_encoder(tiny_clip, hidden=(8,), seed=seed).mlp[0].weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_wrong_folders_are_config_errors(tiny_clip, tiny_llava, tmp_path):
    with pytest.raises(ConfigError, match=r"rater\.json"):
        RatingModel.from_pretrained(tiny_clip)
    with pytest.raises(ConfigError, match="no encoder of images and texts"):
        RatingModel.from_encoder(tiny_llava)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="safetensors"):
        RatingModel.from_encoder(str(tmp_path))
