import pytest

from medray.inference.vllm_engine import Output
from medray.methods.self_train.self_play import keep_questions
from medray.stable_draws import seed_for

pytestmark = pytest.mark.vllm


def asked(text, special=False):
    return Output(text, [], "stop", 0, None, special, 0)


def test_questions_empty_special_and_near_duplicate_are_dropped_with_their_reason():
    kept, dropped = keep_questions(
        [
            asked("What is it?"),
            asked(" ..."),
            asked("what is  IT"),
            asked("Is <image> round?"),
            asked("Where?", special=True),
            asked("Where?"),
        ],
        lambda text: "<image>" in text,
    )
    assert kept == [(0, "What is it?"), (5, "Where?")]
    assert [item["reason"] for item in dropped] == ["empty", "duplicate", "special_token", "special_token"]


def test_seeds_depend_on_every_part_and_stay_the_same():
    assert seed_for(0, "a", 1, "ask", 0) == 3522597700451894856
    seeds = {
        seed_for(*parts)
        for parts in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 11), (0, "a", 1, 1)]
    }
    assert len(seeds) == 6
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_rows_are_the_same_again_in_another_order_and_a_broken_image_is_set_aside(
    player, images, play_config
):
    rows = {row["sample_id"]: row for row in player(images).to_pylist()}
    again = player(images.take([6, 3, 1])).to_pylist() + player(images.take([5, 4, 2, 0])).to_pylist()
    assert rows == {row["sample_id"]: row for row in again}
    assert len(rows) == 7

    broken = rows.pop("broken")
    assert "cannot be decoded" in broken["error"]
    assert broken["image"] is None and broken["questions"] is None
    for name, row in rows.items():
        assert row["error"] is None
        assert len(row["questions"]) + len(row["dropped_questions"]) == play_config.questions
        for question in row["questions"]:
            index = int(question["question_id"].removeprefix(f"{name}/r2/q"))
            assert question["seed"] == seed_for(0, name, 2, "ask", index)
            assert [answer["seed"] for answer in question["answers"]] == [
                seed_for(0, name, 2, "answer", index, k) for k in (0, 1)
            ]
    # A random model at temperature 1.2 repeats itself only when seeds are not used.
    texts = [
        answer["text"]
        for row in rows.values()
        for question in row["questions"]
        for answer in question["answers"]
        if answer["text"]
    ]
    assert len(set(texts)) > 0.9 * len(texts) > 10


def test_another_round_asks_something_else(player, on_engine, images):
    from medray.methods.self_train.self_play import SelfPlay

    one = images.slice(0, 1)
    other = on_engine(SelfPlay, round=3)(one).to_pylist()[0]["questions"]
    assert {question["question"] for question in other}.isdisjoint(
        q["question"] for q in player(one).to_pylist()[0]["questions"]
    )


def test_likelihood_equals_transformers(player, images, talker):
    import numpy as np
    import torch

    from medray.models.vlm import load_processor, load_vlm

    row = images.slice(1, 1).to_pylist()[0]
    image, _ = player.run(player.image(row))
    turns = [{"role": "user", "text": "Rate the image."}]
    answer = "the image shows one cell"
    nats, tokens, seen = player.run(player.engine.loglikelihood(turns, image, answer))

    dialogues = player.engine.chat.dialogues
    prompt, ending = player.engine.chat.answer_ids(turns, answer)
    assert ending[-1] == player.engine.chat.tokenizer.eos_token_id and len(ending) == tokens
    ids, _ = dialogues.expand(np.asarray(prompt + ending, np.int32), np.empty((0, 3), np.int32), 64)
    pixels = load_processor(talker).image_processor(image, return_tensors="pt")["pixel_values"]
    assert seen == len(ids)
    with torch.inference_mode():
        logits = load_vlm(talker, "fp32")(
            input_ids=torch.tensor(ids[None].astype(np.int64)), pixel_values=pixels
        ).logits[0]
    logprobs = logits.float().log_softmax(-1)
    expected = sum(
        float(logprobs[len(ids) - tokens - 1 + place, token]) for place, token in enumerate(ending)
    )
    assert nats == pytest.approx(expected, abs=1e-3)


def test_n_samples_logprobs_and_patterns(player, images):
    from medray.config import SamplingConfig

    image, key = player.run(player.image(images.slice(0, 1).to_pylist()[0]))
    prompt = player.engine.chat.prompt_ids([{"role": "user", "text": "Rate."}])
    sampling = SamplingConfig(max_tokens=6)
    outputs = player.run(
        player.engine.generate(prompt, image, sampling, seed=5, n=3, image_id=key, logprobs=True)
    )
    assert [output.seed for output in outputs] == [5, 6, 7]
    assert all(
        len(output.logprobs) == len(output.token_ids) and max(output.logprobs) <= 0 for output in outputs
    )
    alone = player.run(player.engine.generate(prompt, image, sampling, seed=6, image_id=key))[0]
    assert alone.token_ids == outputs[1].token_ids
    held = player.run(
        player.engine.generate(prompt, image, SamplingConfig(max_tokens=20), seed=1, pattern="[1-9] [1-9]\\n")
    )[0]
    assert held.text[0] in "123456789" and held.text[1:3].strip() in list("123456789")
