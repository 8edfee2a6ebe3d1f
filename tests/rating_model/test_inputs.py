"""What the rating model reads: the answer is there whatever the context; one template; one image of a
pair once.
"""

import pyarrow as pa
import pytest
import torch

from medray.config import DataConfig
from medray.images.decoding import ImageError
from medray.rating_model.inputs import InputError, rating_text, special_ids
from medray.rating_model.model import load_inputs
from medray.rating_model.pairs import PairEncoder
from medray.records import RATING_PAIR
from medray.testbed.tiny_clip import POSITIONS
from tests.support.rating_pairs import QUESTION, cell, pair


@pytest.fixture(scope="module")
def inputs(tiny_clip):
    return load_inputs(tiny_clip, 48, False, DataConfig())


def words_of(inputs, text):
    return inputs.tokenizer.decode(text.ids, skip_special_tokens=True)


def test_question_and_answer_come_first(inputs):
    text = rating_text("What is\n this? ", " red", "A  smear.", inputs.tokenizer, 48)
    assert (
        inputs.tokenizer.decode(text.ids)
        == "<s>Question: What is this?\nAnswer: red\nContext: A smear.<|end|>"
    )
    assert text.cut == ()
    for nothing in (None, "", "  "):
        assert (
            words_of(inputs, rating_text("Q?", "red", nothing, inputs.tokenizer, 48))
            == "Question: Q?\nAnswer: red"
        )


def test_a_long_context_cannot_push_out_the_answer(inputs):
    """The released code puts the context first and cuts at 256 tokens: two answers to one question became
    one text.
    """
    context = "the smear shows many cells " * 100
    texts = [rating_text(QUESTION, answer, context, inputs.tokenizer, 48) for answer in ("red", "blue")]
    assert [text.cut for text in texts] == [("context",)] * 2
    assert all(len(text.ids) == 48 for text in texts)
    assert [
        f"\nAnswer: {answer}\nContext: the" in words_of(inputs, text)
        for answer, text in zip(("red", "blue"), texts)
    ] == [True, True]
    assert texts[0].ids != texts[1].ids
    assert texts[0].ids[-1] == inputs.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("question", "answer", "cut"),
    [
        ("Q?", "cell " * 100, ("answer", "context")),
        ("cell " * 100, "red", ("question", "context")),
        ("cell " * 100, "blue " * 100, ("question", "answer", "context")),
    ],
)
def test_what_is_too_long_is_cut_and_said_so(inputs, question, answer, cut):
    text = rating_text(question, answer, "a smear", inputs.tokenizer, 32)
    assert text.cut == cut and len(text.ids) == 32
    room = 32 - 2
    kept = len(
        inputs.tokenizer(words_of(inputs, text).partition("\nAnswer")[0], add_special_tokens=False).input_ids
    )
    if answer == "red":
        assert words_of(inputs, text).endswith("\nAnswer: red")
    else:
        assert room - kept >= room // 2, "the answer keeps at least half of the room"


def test_what_spells_a_special_token_is_text(inputs):
    """CLIP pools at the first end token: what came after one in an answer would not count."""
    from transformers import AutoTokenizer

    from medray.models.vlm import resolve_model

    bundled = AutoTokenizer.from_pretrained(resolve_model("testbed:encoder"))
    for tokenizer in (bundled, inputs.tokenizer):
        for token in tokenizer.all_special_tokens:
            spelled = f"red {token} blue{token}{token} {token.upper()}{token[:2]}{token}{token[2:]}"
            ids = rating_text(f"What {token}?", spelled, f"{token} A smear.", tokenizer, POSITIONS).ids
            assert [place for place, one in enumerate(ids) if one in tokenizer.all_special_ids] == [
                0,
                len(ids) - 1,
            ], token
            assert tokenizer.decode(ids[1:-1]).replace(
                " ", ""
            ) == f"Question: What {token}?\nAnswer: {spelled}\nContext: {token} A smear.".replace(" ", "")
        for plain in ("red <end| blue", "a < b > c |x| [SEP] </s", "ödem 2 µm, 漢"):
            assert (
                rating_text("Q?", plain, None, tokenizer, POSITIONS).ids
                == tokenizer(f"Question: Q?\nAnswer: {plain}").input_ids
            )


def test_a_tokenizer_that_reads_whole_words_finds_no_special_token_either():
    """Its vocabulary, not only its list of special tokens, has the end token in it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1, "red": 2, "blue": 3, "a": 4}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    assert rating_text("Q?", "red </s> blue", None, tokenizer, 48).ids == [0, 0, 0, 2, 0, 0, 3, 1]


def test_an_empty_question_or_answer_is_no_exchange(inputs):
    with pytest.raises(InputError, match="empty answer"):
        rating_text("Q?", " \n", None, inputs.tokenizer, 48)
    with pytest.raises(InputError, match="empty question"):
        rating_text("", "red", None, inputs.tokenizer, 48)


def test_special_tokens_are_the_tokenizers_own(inputs, tiny_llava):
    from transformers import AutoTokenizer

    assert special_ids(inputs.tokenizer) == ([inputs.tokenizer.bos_token_id], [inputs.tokenizer.eos_token_id])
    assert special_ids(AutoTokenizer.from_pretrained(tiny_llava)) == ([], [])


def test_pixels_are_what_the_processor_makes(inputs):
    from medray.data.pixels import normalise_pixels

    image, _ = cell(0, (40, 90))
    pixels = inputs.pixels(image)
    assert (pixels.shape, pixels.dtype.name) == ((3, 64, 64), "uint8")
    whole = inputs.image_processor(images=[_opened(image)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        normalise_pixels(torch.from_numpy(pixels)[None], inputs.image_processor), whole, atol=0.02, rtol=0
    )
    with pytest.raises(ImageError):
        inputs.pixels(b"no image")


def _opened(data):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def test_clinicians_pairs_and_model_pairs_are_encoded_alike(tiny_clip):
    """One template for every origin (the released code leaves the context out of clinicians' pairs)."""
    rows = [
        pair(0),
        pair(0, "clinician"),
        {**pair(0), "sample_id": "longer", "chosen_answer": "red " * 90},
        {**pair(1), "sample_id": "bad", "chosen_image": b"x"},
        {**pair(1), "sample_id": "empty", "rejected_answer": None},
    ]
    table = pa.Table.from_pylist(rows, schema=RATING_PAIR).append_column(
        "weight", pa.array([1.0, 100.0, 1.0, 1.0, 1.0], pa.float32())
    )
    model, clinician, longer, bad, empty = PairEncoder(tiny_clip, 64, False, {})(table).to_pylist()
    for name in ("chosen_ids", "rejected_ids", "chosen_pixels"):
        assert model[name] == clinician[name], name
    assert (model["cut"], longer["cut"]) == ([], ["chosen answer", "chosen context"])
    assert (model["weight"], clinician["weight"], clinician["origin"]) == (1.0, 100.0, "clinician")
    assert "cannot be decoded" in bad["error"] and empty["error"] == "empty answer"


def test_a_pairs_common_image_is_passed_once(tiny_clip):
    inputs = load_inputs(tiny_clip, 48, False, DataConfig())
    rows = [pair(0), pair(1, other=2), pair(3)]
    table = pa.Table.from_pylist(rows, schema=RATING_PAIR).append_column(
        "weight", pa.array([1.0, 5.0, 1.0], pa.float32())
    )
    batch = inputs.collate_pairs(PairEncoder(tiny_clip, 48, False, {})(table).to_pylist())
    assert batch["pixel_values"].shape == (4, 3, 64, 64)
    assert batch["image_of"].tolist() == [0, 1, 3, 0, 2, 3]
    for place, number in zip(batch["image_of"].tolist(), (0, 1, 3, 0, 2, 3)):
        assert torch.equal(batch["pixel_values"][place], torch.from_numpy(inputs.pixels(cell(number)[0])))
    assert batch["input_ids"].shape[0] == 6
    texts = [
        inputs.tokenizer.decode(ids, skip_special_tokens=True).split("\n")[1]
        for ids in batch["input_ids"].tolist()
    ]
    assert texts == [
        "Answer: red",
        "Answer: blue",
        "Answer: blue",
        "Answer: blue",
        "Answer: blue",
        "Answer: red",
    ]
    assert batch["weights"].tolist() == [1.0, 5.0, 1.0]


def test_an_image_that_the_processor_cannot_take_sets_its_pair_aside(tiny_clip, monkeypatch):
    encoder = PairEncoder(tiny_clip, 64, False, {})
    plain = type(encoder.inputs).pixels
    odd, _ = cell(1)

    def fails_on_odd(inputs, image):
        if image == odd:
            raise TypeError("mean must have 3 elements if it is an iterable, got 4")
        return plain(inputs, image)

    monkeypatch.setattr(type(encoder.inputs), "pixels", fails_on_odd)
    rows = [pair(0), pair(1)]
    table = pa.Table.from_pylist(rows, schema=RATING_PAIR).append_column(
        "weight", pa.array([1.0, 1.0], pa.float32())
    )
    good, bad = encoder(table).to_pylist()
    assert good["error"] is None and "mean must have 3 elements" in bad["error"]
