"""The rows that travel between stages, as pyarrow schemas, and the checks they must pass.

Every row has a `sample_id`: text, unique within its set, the same on every run and machine. Images are the
encoded bytes as found (JPEG, PNG), never decoded arrays. Derived rows keep the image's own id in `image_id`,
so that questions, pairs and predictions can be clustered by image.
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

Role = Literal["system", "user", "assistant", "questioner"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "questioner")
ANSWER_TYPES: tuple[str, ...] = ("open", "closed", "mcq")

TURN = pa.struct([("role", pa.string()), ("text", pa.string())])
CANDIDATE = pa.struct(
    [("text", pa.string()), ("seed", pa.int64()), ("finish_reason", pa.string()), ("tokens", pa.int32())]
)

IMAGE_TEXT = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image", pa.binary()),
        ("image_format", pa.string()),  # JPEG, PNG, ...
        ("source", pa.string()),
        ("split", pa.string()),
        ("caption", pa.string()),
        ("context", pa.string()),
        ("attributes", pa.map_(pa.string(), pa.string())),
        ("modality", pa.string()),
    ]
)

# What `jobs/prepare_data.py` writes: one row per image and split, with everything the source says of it.
SAMPLE = pa.schema(
    [
        ("sample_id", pa.string()),  # the image's id, with "@split" where the source has it in several splits
        ("image_id", pa.string()),
        ("image", pa.binary()),  # null where `error` is not
        ("image_format", pa.string()),  # JPEG, PNG, ...
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
        ("source", pa.string()),  # the format it was read from
        ("split", pa.string()),
        (
            "group_id",
            pa.string(),
        ),  # what must not be spread over splits (the patient), hashed; null: the image
        ("modality", pa.string()),
        ("image_hash", pa.string()),  # of the decoded pixels
        ("phash", pa.uint64()),  # 64-bit perceptual hash; null for a picture without structure
        ("warnings", pa.list_(pa.string())),
        (
            "attributes",
            pa.list_(pa.struct([("sample_id", pa.string()), ("values", pa.map_(pa.string(), pa.string()))])),
        ),
        (
            "captions",
            pa.list_(
                pa.struct([("sample_id", pa.string()), ("caption", pa.string()), ("context", pa.string())])
            ),
        ),
        ("dialogues", pa.list_(pa.struct([("sample_id", pa.string()), ("turns", pa.list_(TURN))]))),
        (
            "questions",
            pa.list_(
                pa.struct(
                    [
                        ("sample_id", pa.string()),
                        ("question", pa.string()),
                        ("reference", pa.string()),
                        ("answer_type", pa.string()),
                        ("attribute", pa.string()),
                        ("choices", pa.list_(pa.string())),
                        ("language", pa.string()),
                        ("context", pa.string()),
                    ]
                )
            ),
        ),
        (
            "preferences",
            pa.list_(
                pa.struct(
                    [
                        ("sample_id", pa.string()),
                        ("prompt", pa.string()),
                        ("chosen", pa.string()),
                        ("rejected", pa.string()),
                    ]
                )
            ),
        ),
        (
            "set_aside",
            pa.list_(pa.struct([("sample_id", pa.string()), ("file", pa.string()), ("reason", pa.string())])),
        ),
        ("error", pa.string()),  # null, or why nothing of this image can be used
    ]
)

CONVERSATION = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),
        ("turns", pa.list_(TURN)),
    ]
)

DESCRIPTION = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),
        ("modality", pa.string()),
        ("description", pa.string()),
    ]
)

QUESTION = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),
        ("question", pa.string()),
        ("reference", pa.string()),
        ("answer_type", pa.string()),  # open | closed | mcq
        ("attribute", pa.string()),  # or the question's type, e.g. PRES in VQA-RAD; null where unknown
        ("choices", pa.list_(pa.string())),  # mcq: the options' texts in the order shown; null otherwise
        ("modality", pa.string()),
        ("language", pa.string()),
        # what a judge of the answers may know of the image (its caption), and models are not shown; null:
        # nothing
        ("context", pa.string()),
    ]
)

# Questions of several benchmarks that a model is asked together.
BENCHMARK_QUESTION = pa.schema(
    [
        *QUESTION,
        ("benchmark", pa.string()),
        # the sample_id after the benchmark's name and the hash of what its questions were made of: unique
        # over all
        ("key", pa.string()),
    ]
)

# One row per image and round, so that a resumed stage can tell finished rows by their id.
SELF_PLAY = pa.schema(
    [
        ("sample_id", pa.string()),  # the image's id
        ("image", pa.binary()),
        ("description", pa.string()),
        (
            "questions",
            pa.list_(
                pa.struct(
                    [
                        ("question_id", pa.string()),  # "{sample_id}/r{round}/q{index}"
                        ("question", pa.string()),
                        ("seed", pa.int64()),
                        ("answers", pa.list_(CANDIDATE)),
                    ]
                )
            ),
        ),
        # empty, duplicate, ...
        ("dropped_questions", pa.list_(pa.struct([("question", pa.string()), ("reason", pa.string())]))),
        ("error", pa.string()),  # null, or why the row could not be worked on (the row is then quarantined)
    ]
)

VERDICT = pa.struct(
    [
        ("question_id", pa.string()),
        ("first", pa.int32()),  # indices into the question's answers
        ("second", pa.int32()),
        ("first_score", pa.float64()),  # mean over the orders asked
        ("second_score", pa.float64()),
        ("order_agreement", pa.bool_()),  # both orders prefer the same answer; null where one order was asked
        ("raw", pa.list_(pa.string())),  # the judge's own words, one per order
        ("error", pa.string()),  # null, or why there is no verdict
    ]
)

JUDGED = pa.schema(
    [
        *SELF_PLAY,
        ("verdicts", pa.list_(VERDICT)),
        ("judge", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("requests", pa.int64()),
        ("retries", pa.int64()),
    ]
)

PREFERENCE = pa.schema(
    [
        ("sample_id", pa.string()),  # the question_id
        ("image_id", pa.string()),
        ("image", pa.binary()),
        ("prompt", pa.string()),  # the question
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
        ("judge", pa.string()),
        ("order_agreement", pa.bool_()),
    ]
)

# Reference log-probabilities: nats, summed over the answer's tokens and its end token.
PREFERENCE_WITH_REFERENCE = pa.schema(
    [
        *PREFERENCE,
        ("ref_chosen_logp", pa.float64()),
        ("ref_rejected_logp", pa.float64()),
        ("ref_model", pa.string()),  # hash of the reference model's weights
        ("ref_error", pa.string()),  # null, or why there are no log-probabilities
    ]
)

# An image and its caption as a vector.
EMBEDDED = pa.schema(
    [
        ("sample_id", pa.string()),
        ("modality", pa.string()),
        # the image's half, then the text's, each of length 1 (all zero without a text)
        ("embedding", pa.list_(pa.float32())),
        ("error", pa.string()),  # null, or why there is no embedding
    ]
)

# Dialogues a model wrote about an image: rounds of a question and one or two answers to it.
GENERATED = pa.schema(
    [
        ("sample_id", pa.string()),  # the image's id
        ("image", pa.binary()),
        ("modality", pa.string()),
        ("caption", pa.string()),
        ("context", pa.string()),
        # an answer is null where it could not be had
        ("rounds", pa.list_(pa.struct([("question", pa.string()), ("answers", pa.list_(pa.string()))]))),
        # questions and whole replies that were not used
        ("dropped", pa.list_(pa.struct([("text", pa.string()), ("reason", pa.string())]))),
        ("demonstrations", pa.list_(pa.string())),  # dialogue_ids of those shown to the writer
        ("writer", pa.string()),
        ("error", pa.string()),  # null, or why there is no dialogue
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("requests", pa.int64()),
        ("retries", pa.int64()),
    ]
)

# One question and its answer: what clinicians tick, what is rated, scored and selected.
EXCHANGE = pa.schema(
    [
        ("sample_id", pa.string()),  # "{dialogue_id}#{turn}"
        ("dialogue_id", pa.string()),
        ("turn", pa.int32()),  # from 0, counted in exchanges
        ("image_id", pa.string()),
        ("image", pa.binary()),
        ("modality", pa.string()),  # null where unknown
        # what is known of the image beside it (caption, in-text mention); null: nothing
        ("context", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
    ]
)

# A rater's word on an exchange. A score that could not be read is missing, never a number.
RATED = pa.schema(
    [
        *EXCHANGE,
        ("score", pa.float64()),  # 0 to 10, or null
        ("raw", pa.string()),  # the rater's own words
        ("error", pa.string()),  # null, or why there is no score
    ]
)

# The rating model's word on an exchange.
SCORED = pa.schema([*EXCHANGE, ("score", pa.float64())])

# The better and the worse of two exchanges, of one image or of two.
_SIDE = [
    ("image_id", pa.string()),
    ("image", pa.binary()),
    ("context", pa.string()),
    ("question", pa.string()),
    ("answer", pa.string()),
    ("score", pa.float64()),
]
RATING_PAIR = pa.schema(
    [
        ("sample_id", pa.string()),
        ("origin", pa.string()),  # clinician | model
        ("judge", pa.string()),  # the clinician's id, or the rater's name
        *[(f"chosen_{name}", kind) for name, kind in _SIDE],  # a score is null where a clinician chose
        *[(f"rejected_{name}", kind) for name, kind in _SIDE],
    ]
)

# What a clinician is shown: an image, a question and two answers.
CLINICIAN_ITEM = pa.schema(
    [
        ("item_id", pa.string()),
        ("image_id", pa.string()),
        ("image", pa.binary()),
        ("modality", pa.string()),
        ("caption", pa.string()),
        ("context", pa.string()),  # what is known beside the caption (in-text mention)
        ("dialogue_id", pa.string()),  # of the dialogue that `answer_a` is a turn of; null: none
        ("turn", pa.int32()),
        ("question", pa.string()),
        ("answer_a", pa.string()),  # a and b are stored names; the order on the page is drawn per clinician
        ("answer_b", pa.string()),
    ]
)

# One clinician's word on an item; the last one of a clinician and item counts.
JUDGEMENT = pa.schema(
    [
        ("item_id", pa.string()),
        ("clinician", pa.string()),
        ("simulated", pa.bool_()),
        ("status", pa.string()),  # judged | skipped | not_answerable
        ("good_a", pa.bool_()),  # null where not judged
        ("good_b", pa.bool_()),
        ("edited_question", pa.string()),  # null: left as it was
        ("edited_a", pa.string()),
        ("edited_b", pa.string()),
        ("first_shown", pa.string()),  # a | b
        ("judged_at", pa.timestamp("us", tz="UTC")),
        ("seconds", pa.float64()),  # from showing to saving
        # judgements.item_fingerprint of what was judged; null, or no such column, in older files
        ("item", pa.string()),
    ]
)

PREDICTION = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("question", pa.string()),
        ("reference", pa.string()),
        ("answer", pa.string()),
        ("answer_type", pa.string()),
        ("attribute", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("model", pa.string()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        ("error", pa.string()),
        # Null where unknown or not asked for.
        ("modality", pa.string()),
        ("language", pa.string()),  # en, zh
        # per choice, nats: log-probability of its text given the question, summed over tokens
        ("option_logps", pa.list_(pa.float64())),
        ("option_tokens", pa.list_(pa.int32())),  # per choice, the tokens of that sum
        ("benchmark", pa.string()),
        ("text_only_answer", pa.string()),  # the same model's answer with a blank image
        # finished | unfinished: the model thought aloud before its answer, which is without it; null: it did
        # not
        ("thinking", pa.string()),
    ]
)

# As models answer, in whatever order; `key` is null where the questions had none.
ANSWERED = pa.schema([*PREDICTION, ("key", pa.string())])

QUARANTINE = pa.schema(
    [
        ("sample_id", pa.string()),
        ("file", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly the schema's columns, in order; missing columns become nulls.

    Raises pa.ArrowInvalid where a column's values do not fit its type.
    """
    columns = []
    for field in schema:
        if field.name in table.column_names:
            columns.append(table[field.name].cast(field.type))
        else:
            columns.append(pa.nulls(table.num_rows, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def check_turns(turns: list[dict[str, str]]) -> str | None:
    """Why a dialogue cannot be trained on, or None.

    A dialogue is an optional system turn, then user (or questioner) and assistant in turn, ending with the
    assistant, every text non-empty.
    """
    if not turns:
        return "no turns"
    expected = "user"
    for index, turn in enumerate(turns):
        role, text = turn.get("role"), turn.get("text")
        if role not in ROLES:
            return f"turn {index}: unknown role {role!r}"
        if not isinstance(text, str) or not text.strip():
            return f"turn {index}: empty {role} text"
        if role == "system" and index == 0:
            continue
        if (role == "assistant") != (expected == "assistant") or role == "system":
            return f"turn {index}: {role} where {expected} was expected"
        expected = "user" if role == "assistant" else "assistant"
    if expected == "assistant":
        return "the last turn has no answer"
    return None
