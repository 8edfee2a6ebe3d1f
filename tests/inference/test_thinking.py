from types import SimpleNamespace

import pytest

from medray.inference.judges.prompt import VerdictError, parse_scores
from medray.inference.thinking import FINISHED, UNFINISHED, opens, said, without_blocks
from medray.inference.vllm_engine import Output
from medray.methods.clinician_preference.dialogue_prompt import DialogueError, parse_dialogue
from medray.methods.clinician_preference.rate_prompt import RatingError, parse_score
from medray.methods.self_train.self_play import keep_questions


@pytest.mark.parametrize(
    "text",
    [
        "<think>No mass on the left... wait.</think>\n\nYes",
        "<thinking>No.</thinking>Yes",
        "<THINK>No</THINK>Yes",
        "<reasoning>no</reasoning>\nYes",
        "[THINK]no[/THINK]Yes",
        "no mass</think>Yes",
        "<think>no</think>No<think>yes</think>Yes",
        "<think>a<think>b</think></think>Yes",
        "<think>\n\n</think>\n\nYes",
        "<think>no</think><answer>Yes</answer>",
        "<think>no</think>\n<answer>Yes",
        "<seed:think>no</seed:think>Yes",
        "◁think▷no◁/think▷Yes",
        "<|begin_of_thought|>no<|end_of_thought|>Yes",
        "<|START_THINKING|>no<|END_THINKING|>Yes",
        "<unused94>thought\nno<unused95>Yes",
        "<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>final<|message|>Yes",
        "<SUMMARY>x</SUMMARY><REASONING>no</REASONING>\n<CONCLUSION>Yes</CONCLUSION>",
        "<think>no</think>Yes</think>",
        "<think>no</think>Yes<|im_end|>\n",
        "analysisno, since there is none.assistantfinalYes",
        "<think>no</think><answer>Yes</answer>.",
    ],
)
def test_the_answer_stands_after_the_last_closing_tag(text):
    assert said(text) == ("Yes", FINISHED)


@pytest.mark.parametrize(
    "text",
    ["<think>Is it yes?", "<think>", "[THINK]yes", "<think>no</think>Yes<think>or no", "<reasoning>\nyes"],
)
def test_thinking_that_is_never_closed_leaves_no_answer(text):
    assert said(text) == ("", UNFINISHED)


@pytest.mark.parametrize(
    "text", ["Yes", "I think yes", "3 < 5 and 7 > 6", "<b>Yes</b>", "x < think > y", "[1] Yes", ""]
)
def test_a_text_without_thinking_stays_as_it_is(text):
    assert said(text) == (text, None) and without_blocks(text) == (text, None)


def test_a_tag_that_opens_and_closes_at_once_is_no_thinking():
    assert said("<think />Yes") == ("Yes", None)


def test_an_answer_in_tags_is_taken_out_of_them():
    assert said("<answer> B </answer>") == ("B", None)
    assert said("see <answer>B</answer>").answer == "see <answer>B</answer>"


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|assistant|>\n<think>\n", True),
        ("assistant:", False),
        ("<think>\n\n</think>\n\n", False),
        ("use <think> tags", False),
    ],
)
def test_a_template_may_open_the_thinking(prompt, opened):
    assert opens(prompt) is opened


def test_scores_are_read_after_the_judges_thinking():
    assert parse_scores("<think>\n3 for the first,\n9 9 9\n</think>\n\n8 7\nbecause") == (8, 7)
    assert parse_score("10 or 2?</think>\nScore: 7") == 7
    with pytest.raises(VerdictError, match=r"unfinished thinking.*judge\.max_tokens"):
        parse_scores("<think>\n8 7")
    with pytest.raises(RatingError, match=r"unfinished thinking.*rate\.max_tokens"):
        parse_score("<think>8")


def test_no_thinking_becomes_part_of_a_dialogue():
    turns = parse_dialogue(
        "<think>User: perhaps this?\nAssistant: no</think>User: What?\nAssistant: <think>hm</think>A "
        "cell.\nUser: Big?\nAssistant: Yes."
    )
    assert [turn["text"] for turn in turns] == ["What?", "A cell.", "Big?", "Yes."]
    with pytest.raises(DialogueError, match="unfinished thinking"):
        parse_dialogue("User: What?\nAssistant: A cell.\nUser: Big?\nAssistant: <think>is it")


@pytest.fixture(scope="module")
def worker():
    """An engine worker with a bundled model's chat, whose tags of thinking are special tokens; no engine."""
    from medray.config import ModelConfig
    from medray.inference.chat import Chat
    from medray.methods.self_train.self_play import SelfPlay
    from medray.models.vlm import resolve_model

    chat = Chat(resolve_model("testbed:base"), ModelConfig())
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    made = SelfPlay.__new__(SelfPlay)
    made.engine = SimpleNamespace(chat=chat)
    return made


def output(worker, text, finish="stop"):
    """As the engine gives it: the text lacks special tokens, and the ids end with the end token."""
    tokenizer = worker.engine.chat.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*ids, tokenizer.eos_token_id] if finish == "stop" else ids
    return Output(tokenizer.decode(ids, skip_special_tokens=True), ids, finish, 1, None, "<" in text, 10)


def test_tags_that_are_special_tokens_are_seen(worker):
    prompt = worker.engine.chat.tokenizer("what is it?", add_special_tokens=False)["input_ids"]
    found = output(worker, "<think> no mass </think> yes")
    assert "think" not in found.text and "no mass" in found.text
    assert tuple(worker.said(prompt, found)) == ("yes", FINISHED)
    assert tuple(worker.said(prompt, output(worker, "<think> no mass", "length"))) == ("", UNFINISHED)
    assert worker.said(prompt, output(worker, "yes")) == (output(worker, "yes").text, None)


def test_thinking_that_the_prompt_opens_is_seen(worker):
    prompt = worker.engine.chat.tokenizer("what is it? <think>", add_special_tokens=False)["input_ids"]
    assert tuple(worker.said(prompt, output(worker, "no mass </think> yes"))) == ("yes", FINISHED)
    assert tuple(worker.said(prompt, output(worker, "no mass", "length"))) == ("", UNFINISHED)


def test_an_answer_is_without_its_thinking_and_empty_where_that_is_unfinished(worker):
    prompt = worker.engine.chat.tokenizer("what is it?", add_special_tokens=False)["input_ids"]
    answers = [
        worker._candidate(worker._without_thinking(prompt, output(worker, text, finish)))
        for text, finish in (("<think> no </think> yes", "stop"), ("<think> no", "length"), ("yes", "stop"))
    ]
    assert [(answer["text"], answer["finish_reason"]) for answer in answers] == [
        ("yes", "stop"),
        ("", "unfinished thinking"),
        ("yes", "stop"),
    ]
    asked = [
        worker._without_thinking(prompt, output(worker, text, finish))
        for text, finish in (("<think> what ? </think> where is it ?", "stop"), ("<think> what", "length"))
    ]
    kept, dropped = keep_questions(asked, worker.engine.chat.has_special_text)
    assert [text for _, text in kept] == [asked[0].text] and "what" not in asked[0].text
    assert dropped == [{"question": "", "reason": "unfinished thinking"}]
