"""Images and captions as vectors, by a tiny CLIP and a tiny SigLIP with random weights."""

import io
import json
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from medray.config import DataConfig
from medray.config.clinician_preference_sections import DemonstrationsConfig
from medray.errors import ConfigError
from medray.images.decoding import decode
from medray.methods.clinician_preference.embed_images import Embed, embed_map
from medray.records import EMBEDDED, IMAGE_TEXT
from medray.storage.resumable import write_resumable


@pytest.fixture(scope="module", params=["clip", "siglip"])
def tiny_encoder(request, tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
        SiglipProcessor,
    )

    folder = tmp_path_factory.mktemp(request.param)
    words = ["<pad>", "<end>", "<unk>", "a", "cell", "round", "red", "nucleus"]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=8,
    )
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = (
        {**size, "vocab_size": 8, "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 0},
        {**size, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        processor = CLIPProcessor(
            CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), fast
        )
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), fast)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def images(png, count=5):
    captions = ["a round cell", "a red nucleus", None, " ", "a " * 50]
    rows = [
        {
            "sample_id": f"i{number}",
            "image": png(number),
            "caption": captions[number % 5],
            "modality": "smear",
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(
        [*rows, {"sample_id": "broken", "image": b"no image", "caption": "a cell", "modality": None}],
        schema=IMAGE_TEXT,
    )


def test_each_half_has_length_one_and_equals_the_models_own_features(tiny_encoder, png):
    table = Embed(tiny_encoder, DemonstrationsConfig(), DataConfig())(images(png))
    assert table.schema == EMBEDDED
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    broken = rows.pop("broken")
    assert broken["embedding"] is None and "cannot be decoded" in broken["error"]
    assert all(row["error"] is None and row["modality"] == "smear" for row in rows.values())
    vectors = np.array([row["embedding"] for row in rows.values()])
    half = vectors.shape[1] // 2
    assert np.linalg.norm(vectors[:, :half], axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    assert np.linalg.norm(vectors[:, half:], axis=1) == pytest.approx([1, 1, 0, 0, 1], abs=1e-5), (
        "no text, no direction"
    )

    from transformers import AutoModel, AutoProcessor

    model, processor = (
        AutoModel.from_pretrained(tiny_encoder).eval(),
        AutoProcessor.from_pretrained(tiny_encoder),
    )
    padding = "max_length" if model.config.model_type == "siglip" else True
    inputs = processor(
        text=["a round cell"],
        images=Image.open(io.BytesIO(png(0))).convert("RGB"),
        return_tensors="pt",
        padding=padding,
        max_length=8,
        truncation=True,
    )
    with torch.inference_mode():
        output = model(**inputs)
    expected = torch.cat([output.image_embeds[0], output.text_embeds[0]])  # both normalised by the model
    assert vectors[0] == pytest.approx(expected.numpy(), abs=1e-4)


def test_batches_do_not_matter(tiny_encoder, png):
    embed = Embed(tiny_encoder, DemonstrationsConfig(), DataConfig())
    whole = embed(images(png)).to_pylist()
    parts = [row for start in range(6) for row in embed(images(png).slice(start, 1)).to_pylist()]
    for one, other in zip(whole, parts, strict=True):
        assert one["sample_id"] == other["sample_id"]
        assert (one["embedding"] is None) == (other["embedding"] is None)
        if one["embedding"] is not None:
            assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-4)


def test_an_image_that_the_processor_cannot_take_sets_its_row_aside(tiny_encoder, png, monkeypatch):
    embed = Embed(tiny_encoder, DemonstrationsConfig(), DataConfig())
    whole = embed(images(png)).to_pylist()
    plain, odd = embed.encoder.images, decode(png(1), DataConfig())

    def fails_on_odd(pictures):
        if any(picture.tobytes() == odd.tobytes() for picture in pictures):
            raise TypeError("mean must have 3 elements if it is an iterable, got 4")
        return plain(pictures)

    monkeypatch.setattr(embed.encoder, "images", fails_on_odd)
    rows = embed(images(png)).to_pylist()
    assert [row["sample_id"] for row in rows if row["error"]] == ["i1", "broken"]
    assert "mean must have 3 elements" in rows[1]["error"]
    for one, other in zip(rows, whole, strict=True):
        if one["embedding"] is not None:
            assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-4)


def test_what_cannot_embed_is_named(tiny_llava, monkeypatch):
    with pytest.raises(ConfigError, match="give a CLIP or SigLIP class model"):
        Embed(tiny_llava, DemonstrationsConfig(), DataConfig())
    with pytest.raises(ConfigError, match=r"open_clip:ViT-B-32 cannot be loaded: .*NAME@TAG"):
        Embed("open_clip:ViT-B-32", DemonstrationsConfig(), DataConfig())  # an architecture without weights
    with pytest.raises(ConfigError, match="open_clip:no-such-model cannot be loaded"):
        Embed("open_clip:no-such-model@openai", DemonstrationsConfig(), DataConfig())
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match="open_clip_torch"):
        Embed("open_clip:ViT-B-32@openai", DemonstrationsConfig(), DataConfig())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_of_open_clip(tmp_path, png, precision):
    import open_clip

    layers = {"width": 16, "layers": 2}
    shape = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 8, **layers},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "heads": 2, **layers},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**shape)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    mean_std = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": shape, "preprocess_cfg": mean_std})
    )
    table = Embed(f"open_clip:local-dir:{tmp_path}", DemonstrationsConfig(precision=precision), DataConfig())(
        images(png, 2)
    )
    vectors = np.array([row["embedding"] for row in table.to_pylist()[:2]])
    preprocess = open_clip.image_transform(32, is_train=False, **mean_std)
    with torch.inference_mode():
        expected = torch.cat(
            [
                model.encode_image(
                    preprocess(Image.open(io.BytesIO(png(0))).convert("RGB"))[None], normalize=True
                )[0],
                model.encode_text(
                    open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a round cell"]), normalize=True
                )[0],
            ]
        )
    assert vectors[0] == pytest.approx(expected.numpy(), abs=1e-4 if precision == "fp32" else 0.05)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.parametrize("tiny_encoder", ["clip"], indirect=True)
def test_a_killed_stage_goes_on_where_it_was(ray_cluster, tiny_encoder, png, tmp_path):
    config = DemonstrationsConfig(batch=4, cpus_per_actor=0.5)
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(images(png, 11), source / "a.parquet")
    marks = tmp_path / "marks"
    marks.mkdir()

    folder = tmp_path / "done"

    def committed():
        # a pending one will be undone
        return [path for path in folder.glob("*.parquet") if not path.name.endswith(".pending.parquet")]

    class Dying(Embed):
        def __call__(self, table):
            if "broken" in table["sample_id"].to_pylist() and not (marks / "died").exists():
                (marks / "died").touch()
                deadline = time.monotonic() + 300
                while not committed() and time.monotonic() < deadline:
                    time.sleep(0.1)
                raise RuntimeError("the encoder dies")
            for name in table["sample_id"].to_pylist():
                (marks / name).open("a").write("x")
            return super().__call__(table)

    _, options = embed_map(config, DataConfig(), tiny_encoder)
    arguments = (
        str(source),
        str(tmp_path / "out"),
        str(folder),
        lambda rows: rows.map_batches(Dying, **options),
        4,
        0.5,
    )
    with pytest.raises(Exception, match="the encoder dies"):
        write_resumable(*arguments)
    before = [name for path in committed() for name in pq.read_table(path)["sample_id"].to_pylist()]
    assert before
    assert write_resumable(*arguments).rows == 12
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert sorted(row["sample_id"] for row in rows) == sorted(
        [*(f"i{number}" for number in range(11)), "broken"]
    )
    assert [row["sample_id"] for row in rows if row["embedding"] is None] == ["broken"]
    assert all((marks / name).read_text() == "x" for name in before), (
        "what was committed is not embedded again"
    )
