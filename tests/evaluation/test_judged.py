"""Win rate and chat score from judges' replies, by hand."""

import asyncio
import json

import pyarrow as pa
import pytest

from medray.config import DataConfig, EvaluateConfig
from medray.evaluation.chat_score import chat_rows, chat_score
from medray.evaluation.win_rate import NO_ANSWER, judge_rows, judged, prompts, win_rate
from medray.inference.judges.base import IDENTICAL, written_verdict
from medray.ingest.canonical_rows import ToSamples
from medray.ingest.group_by_image import group_rows
from medray.ingest.readers.canonical import members_of
from medray.ingest.source_index import INDEX, index_rows
from medray.methods.shared.training_sets import questions
from medray.records import JUDGED, QUESTION, SELF_PLAY
from tests.images.test_decoding import noise

CONFIG = EvaluateConfig(bootstrap=100)


def question(number, modality="ct", kind="open", attribute=None):
    return {
        "sample_id": f"q{number}",
        "image_id": f"i{number}",
        "image": b"png",
        "question": "What is shown?",
        "reference": "a {mass}",
        "answer_type": kind,
        "attribute": attribute,
        "modality": modality,
    }


def test_rows_for_the_judge_hold_reference_and_both_answers():
    rows = list(judge_rows([question(0), question(1)], {"q0": "A mass.", "q1": "x"}, {"q0": " ", "q2": "y"}))
    assert [row["sample_id"] for row in rows] == ["q0"]  # q1 was not answered by the second model
    assert pa.Table.from_pylist(rows, schema=SELF_PLAY).num_rows == 1
    first, second = prompts(rows[0])
    assert "What is shown?" in first and "a {mass}" in first
    assert first.index("A mass.") < first.index(NO_ANSWER) and second.index(NO_ANSWER) < second.index(
        "A mass."
    )


@pytest.mark.parametrize(
    "replies", [["8 3\nwhy", "2 9"], ["3 8", "3 8"], ["5 5", "5 5"], ["8 3", "none"], ["11 3", "5 5"]]
)
def test_a_verdict_is_the_one_our_judges_would_give(replies):
    row = next(judge_rows([question(0)], {"q0": "a"}, {"q0": "b"}))

    async def ask(question_id, text, first, second, order):
        return replies[order]

    wanted = asyncio.run(written_verdict(row["questions"][0], 0, 1, ask, both_orders=True))
    found = judged(row, replies)["verdicts"][0]
    assert {name: found[name] for name in vars(wanted)} == vars(wanted)
    assert pa.Table.from_pylist([judged(row, replies)], schema=JUDGED).num_rows == 1


def test_win_rate():
    replies = [
        ["8 3", "2 9"],  # first model wins in both orders
        ["3 8", "9 2"],  # second wins
        ["8 3", "8 3"],  # the one shown first: a tie
        ["5 5", "5 5"],
        ["good", "5 5"],
        ["", "5 5"],
    ]
    questions = [question(number, "mri" if number == 1 else "ct") for number in range(8)]
    rows = [
        judged(row, reply, "j")
        for row, reply in zip(
            judge_rows(
                questions[:6],
                dict.fromkeys(("q0", "q1", "q2", "q3", "q4", "q5"), "a"),
                dict.fromkeys(("q0", "q1", "q2", "q3", "q4", "q5"), "b"),
            ),
            replies,
            strict=True,
        )
    ]
    rows.append({"sample_id": "q6", "error": "no image", "verdicts": None, "judge": "j"})
    rows.append(
        {
            "sample_id": "q7",
            "error": None,
            "judge": "j",
            "verdicts": [
                {
                    "question_id": "q7",
                    "first": 0,
                    "second": 1,
                    "first_score": None,
                    "second_score": None,
                    "order_agreement": None,
                    "raw": [],
                    "error": IDENTICAL,
                },
            ],
        }
    )
    result = win_rate(rows, {row["sample_id"]: row for row in questions}, CONFIG)
    assert (result["schema"], result["judge"], result["asked"], result["n"], result["images"]) == (
        1,
        "j",
        8,
        5,
        5,
    )
    assert [result[name]["value"] for name in ("win", "tie", "loss", "win_rate")] == pytest.approx(
        [1 / 5, 3 / 5, 1 / 5, 1 / 2]
    )
    assert (
        result["order_disagreement"] == pytest.approx(1 / 5)
        and result["identical"] == 1
        and result["one_order"] == 0
    )
    assert result["failed"] == {"unparsed": 1, "no reply": 1, "row error": 1}
    assert result["first_shown"] == pytest.approx((1 + 1 + 2) / 6)  # six decided replies
    assert result["p_permutation"] == 1.0
    assert result["by_modality"]["mri"]["win_rate"]["value"] == 1.0 and result["by_modality"]["ct"]["n"] == 4
    assert result["by_type"]["open"]["asked"] == 8


def test_no_verdict_at_all_gives_no_rate():
    row = judged(next(judge_rows([question(0)], {"q0": "a"}, {"q0": "b"})), ["", ""])
    result = win_rate([row], {"q0": question(0)}, CONFIG)
    assert (result["asked"], result["n"], result["win_rate"], result["first_shown"]) == (1, 0, None, None)


def test_likelihoods_have_no_order():
    verdict = {
        "question_id": "q0",
        "first": 0,
        "second": 1,
        "first_score": -2.0,
        "second_score": -1.0,
        "order_agreement": None,
        "raw": [],
        "error": None,
    }
    result = win_rate(
        [{"sample_id": "q0", "error": None, "verdicts": [verdict], "judge": "j"}], {"q0": question(0)}, CONFIG
    )
    assert result["win"]["value"] == 1.0 and result["one_order"] == 1


def test_chat_prompt_holds_what_llava_meds_judge_reads(tmp_path):
    """From the published file to the judge; the figure's caption is in no question that a model is asked."""
    record = {
        "question_id": 7,
        "image": "1_F3.png",
        "pair_id": "1_F3",
        "text": "What is shown?\n<image>",
        "gpt4_answer": "A cyst.",
        "type": "conversation",
        "fig_label": "Fig. 3",
        "fig_caption": "A {cystic} wall.",
        "in_text_mention": [{"tokens": "No cells were found ( Fig. 3 ) .", "entities": []}],
        "domain": {"histology": True},
    }
    path = tmp_path / "qa50.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    noise((40, 30)).save(tmp_path / "1_F3.png")
    index = pa.Table.from_pylist(
        list(index_rows(str(path), 0, path.stat().st_size, "llava-med-qa", str(tmp_path))), schema=INDEX
    )
    groups = group_rows(index.append_column("order", pa.array([0])), DataConfig().model_dump())
    (sample,) = ToSamples(DataConfig().model_dump(), "llava-med-qa")(groups).to_pylist()
    asked = [
        {**sample, **question}
        for question in questions([list(member) for member in members_of(sample)], ("open",), 0)
    ]
    (row,) = pa.Table.from_pylist(asked, schema=QUESTION).to_pylist()
    assert row["question"] == "What is shown?"
    (made,) = chat_rows([row], {"qa50:7": "A mass."})
    assert prompts(made)[0].startswith(
        "You compare two answers to a question about the attached medical image. Judge only what the image "
        "and established medical knowledge support.\n\n"
        "Question:\nWhat is shown?\n\nWhat is known of the image:\nFigure Caption:\nFig. 3: A {cystic} "
        "wall.\n\nFigure Context:\n"
        "\t- No cells were found ( Fig. 3 ) .\n\nAnswer 1:\nA cyst.\n\nAnswer 2:\nA mass.\n\nRate each answer"
    )


def test_chat_score():
    questions = [
        question(0, "ct", "open", "conversation"),
        *(question(n, "mri", "open", "detailed_description") for n in (1, 2, 3, 4)),
    ]
    questions[0]["context"] = "Figure 1: a mass."
    rows = list(chat_rows(questions, {f"q{n}": f"answer {n}" for n in range(5)}))
    assert [answer["text"] for answer in rows[0]["questions"][0]["answers"]] == ["a {mass}", "answer 0"]
    assert (
        "Figure 1: a mass." in rows[0]["questions"][0]["question"]
        and "known" not in rows[1]["questions"][0]["question"]
    )
    seen = [
        judged(row, [reply], "j")
        for row, reply in zip(rows, ["8 4", "5 10", "9 great", "5 5", "6 3"], strict=True)
    ]
    seen[3]["verdicts"][0] |= {"first_score": 0.0}
    seen[4]["verdicts"][0] |= {"first_score": None, "second_score": None, "raw": [], "error": IDENTICAL}
    result = chat_score(seen, {row["sample_id"]: row for row in questions}, CONFIG)
    assert (result["asked"], result["n"], result["zero_reference"], result["identical"]) == (5, 3, 1, 1)
    assert result["failed"] == {"unparsed": 1, "no reply": 0, "row error": 0}
    # 100 * mean(s2/s1), not of the means
    assert result["score"]["value"] == pytest.approx((50 + 200 + 100) / 3)
    assert result["reference_mean"] == pytest.approx(6.5) and result["answer_mean"] == pytest.approx(7.0)
    assert result["by_type"]["conversation"]["score"]["value"] == pytest.approx(50)
    assert result["by_modality"]["mri"]["score"]["value"] == pytest.approx(150)
