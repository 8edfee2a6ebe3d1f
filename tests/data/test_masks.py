"""Self-questioning masks: cases worked by hand, the rate of questions, re-drawing and reproducibility."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from medray.config import DataConfig, ModelConfig
from medray.data.chat_spans import ANSWER, QUESTION, QUESTION_PREFIX, Dialogues, EncodeError
from medray.data.collate import IGNORE, Encoder, apply_self_questioning, collate_sft, draw_flips

# <s> | <user> q1 . | <assistant> a1 a1 . | <user> q2 . | <assistant> a2 . | <user> q3 q3 . | <assistant> a3 .
IDS = np.array([1, 10, 21, 9, 11, 31, 32, 9, 10, 22, 9, 11, 33, 9, 10, 23, 24, 9, 11, 34, 9])
SPANS = np.array(
    [
        (ANSWER, 5, 8),
        (QUESTION_PREFIX, 8, 9),
        (QUESTION, 9, 11),
        (ANSWER, 12, 14),
        (QUESTION_PREFIX, 14, 15),
        (QUESTION, 15, 18),
        (ANSWER, 19, 21),
    ]
)
QUESTIONER = (50, 51)  # two tokens, so that a replaced prefix moves what follows
X = IGNORE


def test_no_flip_supervises_answers_only():
    ids, labels = apply_self_questioning(IDS, SPANS, [False, False], QUESTIONER)
    assert ids.tolist() == IDS.tolist()
    assert labels.tolist() == [X] * 5 + [31, 32, 9] + [X] * 4 + [33, 9] + [X] * 5 + [34, 9]


def test_a_flipped_turn_gets_the_questioners_prefix_and_its_text_is_supervised():
    ids, labels = apply_self_questioning(IDS, SPANS, [True, False], QUESTIONER)
    assert ids.tolist() == [1, 10, 21, 9, 11, 31, 32, 9, 50, 51, 22, 9, 11, 33, 9, 10, 23, 24, 9, 11, 34, 9]
    assert labels.tolist() == [X] * 5 + [31, 32, 9, X, X, 22, 9, X, 33, 9] + [X] * 5 + [34, 9]


def test_both_flipped():
    ids, labels = apply_self_questioning(IDS, SPANS, [True, True], QUESTIONER)
    assert ids.tolist() == [
        1,
        10,
        21,
        9,
        11,
        31,
        32,
        9,
        50,
        51,
        22,
        9,
        11,
        33,
        9,
        50,
        51,
        23,
        24,
        9,
        11,
        34,
        9,
    ]
    assert labels.tolist() == [X] * 5 + [31, 32, 9, X, X, 22, 9, X, 33, 9, X, X, 23, 24, 9, X, 34, 9]


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 1.0])
def test_flip_rate_converges_to_rho(rho):
    flips = np.concatenate([draw_flips(f"image-{i}", 4, rho, seed=1, epoch=0) for i in range(5000)])
    deviations = abs(flips.mean() - rho) / max(np.sqrt(rho * (1 - rho) / flips.size), 1e-9)
    assert deviations < 4


def test_flips_are_redrawn_each_epoch_and_fixed_by_the_seed():
    def draw(seed, epoch):
        return np.concatenate([draw_flips(f"image-{i}", 4, 0.5, seed, epoch) for i in range(500)])

    assert (draw(0, 0) == draw(0, 0)).all()
    for other in (draw(0, 1), draw(1, 0)):
        assert 0.4 < (draw(0, 0) == other).mean() < 0.6


@pytest.fixture(params=["llava", "qwen"])
def processor(request, tiny_llava, tiny_qwen):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained({"llava": tiny_llava, "qwen": tiny_qwen}[request.param])


TURNS = [
    {"role": "user", "text": "What is the shape?"},
    {"role": "assistant", "text": "round"},
    {"role": "user", "text": "Is it round?"},
    {"role": "assistant", "text": "yes, it is round"},
    {"role": "user", "text": "yes"},
    {"role": "assistant", "text": "yes"},
]


def test_spans_of_real_templates_hold_each_turn_and_its_end_token(processor):
    """Also where a turn's text occurs in earlier turns and in the answer."""
    dialogues = Dialogues(processor, ModelConfig(system_prompt="Be brief."))
    ids, spans = dialogues.encode(TURNS)
    end = processor.tokenizer.eos_token
    texts = [(kind, processor.tokenizer.decode(ids[start:stop])) for kind, start, stop in spans.tolist()]
    assert [text for kind, text in texts if kind == ANSWER] == [turn["text"] + end for turn in TURNS[1::2]]
    assert [text for kind, text in texts if kind == QUESTION] == [turn["text"] + end for turn in TURNS[2::2]]
    assert all("user" in text for kind, text in texts if kind == QUESTION_PREFIX)


def test_flipped_dialogue_is_what_the_template_writes_for_a_questioner(processor):
    config = ModelConfig(system_prompt="")
    dialogues = Dialogues(processor, config)
    ids, spans = dialogues.encode(TURNS)
    flipped, labels = apply_self_questioning(
        ids, spans, [True, False], dialogues.info().questioner_prefix_ids
    )
    turns = [dict(turn) for turn in TURNS]
    turns[2]["role"] = "questioner"
    written, written_spans = dialogues.encode(turns)
    assert flipped.tolist() == written.tolist()
    supervised = [
        tuple(written[start:stop]) for kind, start, stop in written_spans.tolist() if kind == ANSWER
    ]
    assert [token for span in supervised for token in span] == labels[labels != IGNORE].tolist()


@pytest.mark.parametrize(
    ("text", "problem"), [("look at <image> here", "<image>"), ("done <|end|> now", "<|end|>")]
)
def test_special_tokens_in_text_are_refused(tiny_llava, text, problem):
    from transformers import AutoProcessor

    dialogues = Dialogues(AutoProcessor.from_pretrained(tiny_llava), ModelConfig(system_prompt=""))
    with pytest.raises(EncodeError) as error:
        dialogues.encode([{"role": "user", "text": text}, {"role": "assistant", "text": "yes"}])
    assert problem in str(error.value)


def _row(sample_id, image, turns):
    return {"sample_id": sample_id, "image": image, "turns": turns}


def _png(mode="RGB", size=(40, 30)):
    data = io.BytesIO()
    Image.new(mode, size).save(data, "PNG")
    return data.getvalue()


def test_rows_that_cannot_be_encoded_carry_their_reason(tiny_llava):
    long = [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "round " * 600}]
    empty = [{"role": "user", "text": "What?"}, {"role": "assistant", "text": " "}]
    encoder = Encoder(tiny_llava, ModelConfig(max_length=300).model_dump(), DataConfig().model_dump(), "sft")
    rows = encoder(
        pa.Table.from_pylist(
            [
                _row("good", _png(), TURNS),
                _row("long", _png(), long),
                _row("broken", b"\x89PNG broken", TURNS),
                _row("empty", _png(), empty),
            ]
        )
    ).to_pylist()
    reasons = {row["sample_id"]: row["error"] for row in rows}
    assert reasons["good"] is None
    assert "model.max_length 300" in reasons["long"]
    assert "cannot be decoded" in reasons["broken"]
    assert "empty" in reasons["empty"]


def test_collated_batch_pads_right_and_supervises_the_same_tokens_as_each_row(tiny_llava):
    encoder = Encoder(tiny_llava, ModelConfig(max_length=512).model_dump(), DataConfig().model_dump(), "sft")
    rows = encoder(
        pa.Table.from_pylist([_row("a", _png(), TURNS), _row("b", _png(size=(10, 50)), TURNS[:2])])
    ).to_pylist()
    info = encoder.dialogues.info()
    batch = collate_sft(rows, info, 0.5, seed=0, epoch=3)
    for index, row in enumerate(rows):
        alone = collate_sft([row], info, 0.5, seed=0, epoch=3)
        length = alone["input_ids"].shape[1]
        assert (batch["input_ids"][index, :length] == alone["input_ids"][0]).all()
        assert (batch["labels"][index, :length] == alone["labels"][0]).all()
        assert (batch["labels"][index, length:] == IGNORE).all()
        assert batch["attention_mask"][index].sum() == length
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
