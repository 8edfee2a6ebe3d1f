"""Written dialogues: what is asked, and every way a reply can go wrong."""

import pytest

from medray.methods.clinician_preference.dialogue_prompt import (
    DialogueError,
    answer_again_prompt,
    dialogue_prompt,
    one_per_modality,
    parse_dialogue,
    parse_rounds,
    without_repeats,
)


def texts(reply):
    return [(turn["role"], turn["text"]) for turn in parse_dialogue(reply)]


LONG = """Sure, here is the dialogue:

**User:** Which findings are there?
Please list them.
**Assistant:** There are two:

1. A mass in the left upper lobe.
2. A pleural effusion: small, on the right.

Neither was named before.
### User 2: Is a mass
present?
Assistant: Yes.
---
"""


def test_turns_keep_all_their_lines():
    assert texts(LONG) == [
        ("user", "Which findings are there?\nPlease list them."),
        (
            "assistant",
            "There are two:\n\n1. A mass in the left upper lobe.\n2. A pleural effusion: small, on the "
            "right.\n\nNeither was named before.",
        ),
        ("user", "Is a mass\npresent?"),
        ("assistant", "Yes."),
    ]


@pytest.mark.parametrize(
    "reply",
    [
        "user: A?\nassistant: B.",
        "Human: A?\nGPT: B.",
        "Q: A?\nA: B.",
        "1. Question: A?\n   Answer: B.",
        "- **Question 1**: A?\n- **Answer 1**: B.",
        "USER: A?\n\nASSISTANT: B.\n\n***\n",
    ],
)
def test_ways_to_name_the_turns(reply):
    assert texts(reply) == [("user", "A?"), ("assistant", "B.")]


@pytest.mark.parametrize(
    "heading",
    [
        "### Round 2",
        "**Round 3**",
        "Round 2:",
        "## **Turn 2:**",
        "**Exchange 2**:",
        "---\n\n# Dialogue 2.\n\n---",
        "\n*Round 12*\n",
        "### Round 2\n**Turn 3**",
    ],
)
def test_a_heading_between_rounds_is_nobodys_text(heading):
    reply = (
        f"### Round 1\nUser: What is it?\nAssistant: A cell.\n\n{heading}\nUser: Which?\nAssistant: A "
        "monocyte."
    )
    assert texts(reply) == [
        ("user", "What is it?"),
        ("assistant", "A cell."),
        ("user", "Which?"),
        ("assistant", "A monocyte."),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "Round 2",
        "In the second scan:\nround 2 shows less fluid.",
        "Round 2:\nthe scan after treatment.",
        "There are\nRounds 2",
        "It is seen in\n## Round 2 of chemotherapy",
        "Turn\n90 degrees.",
        "Grade:\n2.",
        "Dialogue",
        "Stage 2*",
        "HLA-B*27",
        "A **mass**\nand **fluid**",
        "Two:\n* left\n* right",
        "5 mg*\n\n*daily",
    ],
)
def test_words_that_look_like_marks_stay(answer):
    assert texts(f"User: What is it?\nAssistant: {answer}\nUser: Which?\nAssistant: {answer}") == [
        ("user", "What is it?"),
        ("assistant", answer),
        ("user", "Which?"),
        ("assistant", answer),
    ]
    assert texts(f"* User: What is it?\n* **Assistant:** {answer}") == [
        ("user", "What is it?"),
        ("assistant", answer),
    ]


def test_the_last_answers_last_line_is_no_heading():
    assert texts("User: Which one?\nAssistant: It is in\nRound 2") == [
        ("user", "Which one?"),
        ("assistant", "It is in\nRound 2"),
    ]


@pytest.mark.parametrize(
    ("reply", "question"),
    [
        ("**User: What is this?**\n**Assistant: A cell.**", "What is this?"),
        ("User: **What is this?**\nAssistant: A cell.", "What is this?"),
        ("*User 1: HLA-B27?*\nAssistant: *A cell.*", "HLA-B27?"),
        ("**User:** Is **this** a cell?\n**Assistant**: **A cell.**", "Is **this** a cell?"),
        ("**User: Which?**\nA. red\nB. blue\n**Assistant: A cell.**", "Which?\nA. red\nB. blue"),
        ("**User: Is it HLA-B*27*?**\n***Assistant: A cell.***", "Is it HLA-B*27*?"),
        ("**User: **Stage 2*\n- **Assistant: A cell.**\n---", "Stage 2*"),
    ],
)
def test_emphasis_that_begins_before_a_role_ends_with_its_text(reply, question):
    assert texts(reply) == [("user", question), ("assistant", "A cell.")]


def test_a_choice_named_a_is_no_answer():
    reply = "User: Which is it?\nA: benign\nQ: malignant\nAnswer: one letter\nAssistant: A"
    assert texts(reply) == [
        ("user", "Which is it?\nA: benign\nQ: malignant\nAnswer: one letter"),
        ("assistant", "A"),
    ]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "no turns"),
        ("I cannot help with medical images.", "no turns"),
        ("User: What?", "the last turn has no answer"),
        ("Assistant: A cell.\nUser: What?", "turn 0: assistant where user was expected"),
        ("User: What?\nUser: Where?\nAssistant: Left.", "turn 1: user where assistant was expected"),
        ("User: What?\nAssistant: One.\nAssistant: Two.", "turn 2: assistant where user was expected"),
        ("User: What?\nAssistant:\nUser: Where?\nAssistant: Left.", "turn 1: empty assistant text"),
    ],
)
def test_what_is_no_dialogue_is_refused_with_its_reason(reply, reason):
    with pytest.raises(DialogueError, match=reason):
        parse_dialogue(reply)


def written(rounds):
    return "\n".join(f"User: Question {number}?\nAssistant: Answer {number}." for number in range(rounds))


@pytest.mark.parametrize("rounds", [1, 3, 6, 100])
def test_a_dialogue_of_another_length_is_refused(rounds):
    assert len(parse_dialogue(written(rounds))) == 2 * rounds
    with pytest.raises(DialogueError, match=f"rounds: {rounds} of them; 4 to 5 were asked for"):
        parse_rounds(written(rounds), (4, 5))


def test_rounds_and_repeated_questions():
    rounds = parse_rounds(written(4), (4, 5))
    assert rounds[3] == {"question": "Question 3?", "answer": "Answer 3."}
    kept, repeated = without_repeats([*rounds, {"question": "question  3", "answer": "x"}])
    assert kept == rounds and repeated == ["question  3"]


def demonstration(name, modality, answer="An answer."):
    return {
        "dialogue_id": name,
        "image_id": name,
        "modality": modality,
        "context": None,
        "rounds": [{"question": f"What of {name}?", "answer": answer}],
    }


def test_one_demonstration_of_each_modality_by_the_seed():
    bank = [
        demonstration(f"{modality}{number}", modality)
        for modality in ("CT", "MRI", None)
        for number in range(20)
    ]
    drawn = one_per_modality(bank, "0|i1")
    assert sorted(one["modality"] or "" for one in drawn) == ["", "CT", "MRI"]
    assert drawn == one_per_modality(bank[::-1], "0|i1")
    assert (
        len(
            {
                one["dialogue_id"]
                for image in range(50)
                for one in one_per_modality(bank, f"0|i{image}")
                if one["modality"] == "CT"
            }
        )
        > 12
    )
    assert one_per_modality([], "0") == []


def test_the_prompt_holds_what_is_known_the_demonstrations_and_the_rounds():
    text = dialogue_prompt("CT of {rounds}.", "Fever.", [demonstration("ct1", "CT", "Use {known}.")], (4, 5))
    assert "What is written about the image:\nCT of {rounds}.\nFever.\n" in text
    assert "about another image (CT):\nUser: What of ct1?\nAssistant: Use {known}.\n" in text
    assert "Write 4 to 5 rounds" in text
    bare = dialogue_prompt(None, " ", [], (4, 4))
    assert "written about the image:" not in bare and "Example" not in bare and "Write 4 rounds" in bare
    assert "1. What?\n2. Where?" in answer_again_prompt(None, None, ["What?", "Where?"])
