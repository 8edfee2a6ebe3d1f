"""Image-description pairs to batches: the proxy's placeholders, this epoch's order of the parts, and that
else they are plain SFT's.
"""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from medray.config import DataConfig, ModelConfig
from medray.data.chat_spans import Dialogues
from medray.data.collate import IGNORE, Encoder, collate_sft
from medray.errors import ConfigError
from medray.models.proxy_instruction import PLACEHOLDER
from medray.models.vlm import load_processor

MODEL = ModelConfig(system_prompt="", max_length=512)
TEXTS = (
    "big cell, round nucleus, pink granules, light blue cytoplasm",
    "small cell, segmented nucleus, no granules",
    "A cell.",
)


def png(seed=0, size=(40, 30)):
    data = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def table(texts=TEXTS):
    return pa.Table.from_pylist(
        [
            {"sample_id": f"d{n}", "image": png(n, (40 + 30 * n, 60)), "description": text}
            for n, text in enumerate(texts)
        ]
    )


def encoder_of(path, model=MODEL, **train):
    return Encoder(path, model.model_dump(), DataConfig().model_dump(), "description", train)


@pytest.fixture(params=["llava", "qwen"])
def path(request, tiny_llava, tiny_qwen):
    return {"llava": tiny_llava, "qwen": tiny_qwen}[request.param]


@pytest.mark.parametrize("system_prompt", ["", "Be brief."])
def test_with_an_instruction_in_words_rows_are_those_of_plain_sft(path, system_prompt):
    model = MODEL.model_copy(update={"system_prompt": system_prompt})
    encoder = encoder_of(path, model, instruction="Describe this image.", shuffling="none")
    rows = [encoder.in_order(row, 3) for row in encoder(table()).to_pylist()]
    turns = [
        [{"role": "user", "text": "Describe this image."}, {"role": "assistant", "text": text}]
        for text in TEXTS
    ]
    plain = Encoder(path, model.model_dump(), DataConfig().model_dump(), "sft")
    expected = plain(table().drop(["description"]).append_column("turns", pa.array(turns))).to_pylist()
    for row, other in zip(rows, expected, strict=True):
        assert {
            name: list(row[name]) if name in ("input_ids", "spans") else row[name] for name in other
        } == other
        assert row["error"] is None


@pytest.mark.parametrize("count", [1, 8])
def test_every_sample_holds_the_placeholders_once_and_supervises_its_description_alone(path, count):
    encoder = encoder_of(path, proxy={"count": count})
    rows = [encoder.in_order(row, 0) for row in encoder(table()).to_pylist()]
    batch = collate_sft(rows, encoder.dialogues.info(questioner=False), 0.0, 0, 0)
    tokenizer = encoder.dialogues.tokenizer
    placeholder = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    assert placeholder == len(load_processor(path).tokenizer)  # beyond the model's vocabulary
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        places = (ids == placeholder).nonzero()[:, 0].tolist()
        assert places == list(range(places[0], places[0] + count))
        images = (ids == encoder.dialogues.image_token_id).nonzero()[:, 0].tolist()
        assert images == list(range(images[0], images[0] + row["image_tokens"]))
        assert images[-1] < places[0] and (labels[: places[-1] + 1] == IGNORE).all()
        said = tokenizer.decode(labels[labels != IGNORE])
        assert said.endswith(tokenizer.eos_token)
        assert sorted(said.removesuffix(tokenizer.eos_token).split(", ")) == sorted(
            row["description"].split(", ")
        )


def said(encoder, row, epoch):
    """The description a row is trained on, read back from its supervised tokens."""
    row = encoder.in_order(row, epoch)
    ((_, start, end),) = row["spans"].reshape(-1, 3).tolist()
    return encoder.dialogues.tokenizer.decode(row["input_ids"][start : end - 1])


def test_parts_are_in_a_new_order_each_epoch_and_the_same_after_a_restart(path):
    encoder, again, other = encoder_of(path, seed=1), encoder_of(path, seed=1), encoder_of(path, seed=2)
    (row, *_) = encoder(table()).to_pylist()
    epochs = [said(encoder, row, epoch) for epoch in range(12)]
    assert (
        epochs
        == [said(again, row, epoch) for epoch in range(12)]
        != [said(other, row, epoch) for epoch in range(12)]
    )
    assert len(set(epochs)) > 6
    assert {tuple(sorted(text.split(", "))) for text in epochs} == {tuple(sorted(TEXTS[0].split(", ")))}
    assert said(encoder, row, None) == TEXTS[0]  # evaluation
    assert said(encoder_of(path, shuffling="none"), row, 3) == TEXTS[0]


def test_sentences_and_other_separators(tiny_llava):
    (report, listed) = encoder_of(tiny_llava)(
        table(["The cell is big. The nucleus is round.", "big cell; round nucleus"])
    ).to_pylist()
    by_sentence = {said(encoder_of(tiny_llava, shuffling="sentences"), report, epoch) for epoch in range(8)}
    assert by_sentence == {"The cell is big. The nucleus is round.", "The nucleus is round. The cell is big."}
    assert {said(encoder_of(tiny_llava, separator=";"), listed, epoch) for epoch in range(8)} == {
        "big cell; round nucleus",
        "round nucleus; big cell",
    }


def test_an_order_that_is_too_long_gives_way_to_the_original(tiny_llava):
    # "irregular shape" in front, without its blank, is three tokens longer
    text = "yes, irregular shape, cytoplasm"
    wide = encoder_of(tiny_llava)
    (row,) = wide(table([text])).to_pylist()
    lengths = [len(wide.in_order(row, epoch)["input_ids"]) for epoch in (None, *range(12))]
    limit, longest = lengths[0], max(lengths)
    assert longest == limit + 3
    tight = encoder_of(tiny_llava, MODEL.model_copy(update={"max_length": limit}))
    assert tight(table([text])).to_pylist() == [row]
    for epoch, length in enumerate(lengths[1:]):
        expected = text if length > limit else said(wide, row, epoch)
        assert said(tight, row, epoch) == expected
    shorter = encoder_of(tiny_llava, MODEL.model_copy(update={"max_length": limit - 1}))
    assert (
        f"{limit} tokens are over model.max_length {limit - 1}"
        in shorter(table([text])).to_pylist()[0]["error"]
    )


def test_rows_that_cannot_be_encoded_carry_their_reason(tiny_llava):
    encoder = encoder_of(tiny_llava, MODEL.model_copy(update={"max_length": 300}))
    texts = ["good", " ", None, f"a cell {PLACEHOLDER}", "a cell<|end|>", "round, " * 300]
    broken = pa.Table.from_pylist(
        [{"sample_id": "broken", "image": b"\x89PNG broken", "description": "good"}]
    )
    rows = encoder(pa.concat_tables([table(texts), broken])).to_pylist()
    reasons = [row["error"] for row in rows]
    assert reasons[0] is None
    for reason, expected in zip(
        reasons[1:],
        ("empty", "empty", PLACEHOLDER, "<|end|>", "model.max_length 300", "cannot be decoded"),
        strict=True,
    ):
        assert expected in reason
    assert encoder.in_order(rows[1], 0) == rows[1]


def test_templates_and_instructions_that_cannot_serve(tiny_llava, tmp_path):
    with pytest.raises(ConfigError, match="special token <image>"):
        encoder_of(tiny_llava, instruction="Describe <image>")
    template = load_processor(tiny_llava).chat_template
    loud = tmp_path / "loud.jinja"
    loud.write_text(template.replace("part['text']", "part['text'] | upper"))
    encoder = encoder_of(tiny_llava, MODEL.model_copy(update={"chat_template": str(loud)}))
    assert "changes the text" in encoder(table()).to_pylist()[0]["error"]


def test_a_template_without_a_questioner_will_do(tiny_llava, tmp_path):
    strict = tmp_path / "strict.jinja"
    strict.write_text(
        (
            "{% for message in messages %}{% if message['role'] == 'vuser' %}{{ raise_exception('unknown "
            "role') "
            "}}{% endif %}{% endfor %}"
        )
        + load_processor(tiny_llava).chat_template
    )
    dialogues = Dialogues(load_processor(tiny_llava), MODEL.model_copy(update={"chat_template": str(strict)}))
    assert dialogues.info(questioner=False).questioner_prefix_ids == ()
    with pytest.raises(Exception, match="unknown role"):
        dialogues.info()
