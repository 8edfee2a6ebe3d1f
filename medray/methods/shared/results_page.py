"""Models side by side: results.html (one file that opens offline), Markdown and LaTeX tables.

`results` is what jobs/evaluate.py writes as results.json: {"benchmarks": {name: {"models": {model:
scores.score}, and where there are any "comparison": scores.compare_models, "win_rates": {"b against a":
win_rate.win_rate}, "chats": {model: chat_score.chat_score}, "definition": {what makes the benchmark},
"counts": {...}}}}. Legacy and strict columns stand side by side everywhere, with n, the mean answer length
and 95 % intervals over images.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from medray.evaluation.prediction_table import GROUPS, answer_numbers
from medray.reporting import html_report

Models = Mapping[str, Mapping[str, Any]]  # model name -> what scores.score returns
# row of records.QUESTION with its image, answer of each model
Example = tuple[Mapping[str, Any], Mapping[str, str]]

# Columns of a block of one answer type: (head, way to the score).
_BLOCK: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    "open": (
        ("recall, legacy", ("legacy", "recall")),
        ("recall, strict", ("strict", "recall")),
        ("recall, set", ("set_recall",)),
        ("F1, legacy", ("legacy", "f1")),
        ("F1, strict", ("strict", "f1")),
        ("exact match", ("accuracy",)),
        *((f"BLEU-{order}", ("bleu", order - 1)) for order in range(1, 5)),
        ("ROUGE-L", ("rouge_l",)),
    ),
    "closed": (
        ("accuracy, legacy", ("legacy",)),
        ("accuracy, strict", ("strict",)),
        ("legacy as published", ("legacy_published",)),
        ("by likelihood", ("likelihood", "accuracy")),
        ("by likelihood per token", ("likelihood", "normalised")),
    ),
    "mcq": (
        ("accuracy, strict", ("strict",)),
        ("by likelihood", ("likelihood", "accuracy")),
        ("by likelihood per token", ("likelihood", "normalised")),
    ),
}
_TITLES = {"open": "open questions", "closed": "closed questions", "mcq": "multiple choice"}
# The columns of the narrow tables: (head, answer type, way to the score).
_HEADLINE = (
    ("open recall, legacy", "open", ("legacy", "recall")),
    ("open recall, strict", "open", ("strict", "recall")),
    ("open recall, set", "open", ("set_recall",)),
    ("closed, legacy", "closed", ("legacy",)),
    ("closed, strict", "closed", ("strict",)),
    ("multiple choice, strict", "mcq", ("strict",)),
)
_READING = (
    "legacy: bug-compatible with LLaVA-Med's public evaluation, to compare with papers (a repeated right "
    "word raises recall; yes, no "
    "and the reference are looked for as substrings). strict: multiset overlap; the parsed answer equals the "
    "reference; one option letter. "
    "set: share of the reference's distinct words. Legacy as published: LLaVA-Med's script leaves closed "
    "questions out of its mean where the answer "
    'says yes or no and is wrong; "left out" is their share. Brackets hold 95 % bootstrap intervals over '
    "images; questions on one image are kept together. "
    "Unparsable answers count as wrong and are listed; questions without an answer (errors) are in no mean. "
    "Floors: the best constant answer of "
    "each attribute (majority), drawing an option (chance), and the same model with a blank image (text "
    "only)."
)


def write_page(
    results: Mapping[str, Any],
    examples: Mapping[str, Iterable[Example]] | None = None,
    timeline: Sequence[Mapping[str, Any]] = (),
    title: str = "Evaluation",
    most: int = 12,
) -> str:
    """The HTML page.

    Args:
        examples: benchmark -> (row of records.QUESTION with its image, answer of each model), for the gallery
            of wins and losses of the last model against the first; read until `most` of each are found.
        timeline: the run's stages, for a plot of where time went.
    """
    sections = [("How to read this", f'<p class="soft">{html.escape(_READING)}</p>')]
    for name, benchmark in results["benchmarks"].items():
        sections += [
            (f"{name}: {head}", inner)
            for head, inner in _sections(benchmark, (examples or {}).get(name, ()), most)
        ]
    sections.append(("Time", html_report.timeline(list(timeline))))
    return html_report.page(title, sections, f"{', '.join(results['benchmarks'])}")


def _sections(
    benchmark: Mapping[str, Any], examples: Iterable[Example], most: int
) -> Iterator[tuple[str, str]]:
    models = benchmark["models"]
    kinds = _kinds([models])
    yield "models", _pairs(benchmark) + _wide(_head(kinds), _rows(models, kinds)) + _plots(models, kinds)
    yield from ((_TITLES[kind], _block_table(models, kind)) for kind in kinds)
    yield "length and form of the answers", _form(models, kinds)
    yield "floors", _floors(models, kinds)
    yield "paired differences", _comparisons(benchmark["comparison"]) if benchmark.get("comparison") else ""
    yield "win rate", _win_rates(benchmark["win_rates"]) if benchmark.get("win_rates") else ""
    yield "chat score", _chats(benchmark["chats"]) if benchmark.get("chats") else ""
    for key, label in GROUPS.items():
        rows = _rows(models, kinds, key)
        yield (
            f"by {label}",
            _wide(_head(kinds, key), rows)
            if len({row[0] for row in rows}) > 1 or key == "by_attribute"
            else "",
        )
    yield "wins and losses", wins_and_losses(examples, list(models), most)


def markdown_table(results: Mapping[str, Any], by: str | None = None) -> str:
    """All benchmarks and models as a Markdown table, scores in per cent.

    Args:
        by: a table of the scores such as "by_modality": a line per benchmark, group and model; default all
            questions.
    """
    head, rows = _table(results, by)
    marks = [
        "---" if name in ("benchmark", "model", by and by.removeprefix("by_")) else "---:" for name in head
    ]
    lines = [head, marks, *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in lines) + "\n"


def latex_table(results: Mapping[str, Any], by: str | None = None, caption: str = "", label: str = "") -> str:
    r"""All benchmarks and models as a LaTeX table (booktabs), scores in per cent; `by` as for
    `markdown_table`.

    Texts are escaped; `label` is written as it stands.
    """
    head, rows = _table(results, by)
    body = [" & ".join(_latex(_plain(cell)) for cell in row) + r" \\" for row in rows]
    names = 2 if by is None else 3
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{'l' * names}{'r' * (len(head) - names)}}}",
        r"\toprule",
        " & ".join(_latex(name) for name in head) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    lines += [rf"\caption{{{_latex(caption)}}}"] if caption else []
    lines += [rf"\label{{{label}}}"] if label else []
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _table(results: Mapping[str, Any], by: str | None) -> tuple[list[str], list[list[Any]]]:
    """Head and rows over all benchmarks."""
    kinds = _kinds([benchmark["models"] for benchmark in results["benchmarks"].values()])
    rows = [
        [name, *row]
        for name, benchmark in results["benchmarks"].items()
        for row in _rows(benchmark["models"], kinds, by)
    ]
    return _filled(["benchmark", *_head(kinds, by)], rows)


def wins_and_losses(examples: Iterable[Example], models: list[str], most: int = 12) -> str:
    """Cards of questions on which the last model beats the first, and of those where it is the other way
    round.

    Better is a higher strict score (open: F1 of the words shared with the reference; else a hit).
    """
    if len(models) < 2:
        return ""
    first, last = models[0], models[-1]
    cards: dict[str, list[str]] = {f"{last} better than {first}": [], f"{first} better than {last}": []}
    wins, losses = cards.values()
    for row, answers in examples:
        if first not in answers or last not in answers:
            continue
        scores = {model: _strict(row, text) for model, text in answers.items()}
        side = wins if scores[last] > scores[first] else losses if scores[last] < scores[first] else None
        if side is not None and len(side) < most:
            side.append(_card(row, answers, scores))
        if len(wins) == len(losses) == most:
            break
    return "".join(f"<h3>{html.escape(head)}</h3>{''.join(found)}" for head, found in cards.items() if found)


def _strict(row: Mapping[str, Any], answer: str) -> float:
    numbers = answer_numbers(answer, row["reference"], row["answer_type"], tuple(row.get("choices") or ()))
    return numbers["strict_f1" if row["answer_type"] == "open" else "accuracy"]


def _card(row: Mapping[str, Any], answers: Mapping[str, str], scores: Mapping[str, float]) -> str:
    best = max(scores.values())
    lines = "".join(
        (
            f'<div class="{"good" if scores[model] == best else "bad"}">{html.escape(model)} '
            f"({scores[model]:.2f}): {html.escape(text)}</div>"
        )
        for model, text in answers.items()
    )
    what = " · ".join(
        str(row[name]) for name in ("answer_type", "attribute", "modality", "sample_id") if row.get(name)
    )
    return (
        "<div "
        f'class="card">{_image(row.get("image"))}<div><b>{html.escape(row["question"])}</b><div>reference: '
        f"{html.escape(row['reference'])}</div>"
        f'{lines}<div class="tag">{html.escape(what)}</div></div></div>'
    )


def _image(data: bytes | None) -> str:
    from PIL import Image

    try:
        return html_report.image_tag(data) if data else "<i>no image</i>"
    except (OSError, ValueError, Image.DecompressionBombError):
        # the row boundary: one bad image must not cost the page
        return "<i>image cannot be shown</i>"


def _kinds(tables: Iterable[Models]) -> list[str]:
    there = {kind for models in tables for result in models.values() for kind in result["by_type"]}
    return [kind for kind in _BLOCK if kind in there]


def _at(block: Mapping[str, Any] | None, way: tuple[Any, ...]) -> Any:
    """The value at the end of the way, None where it breaks off."""
    for step in way:
        if block is None or (isinstance(block, Mapping) and step not in block):
            return None
        block = block[step]
    return block


def _head(kinds: list[str], by: str | None = None) -> list[str]:
    columns = [head for head, kind, _ in _HEADLINE if kind in kinds]
    return [*([by.removeprefix("by_")] if by else []), "model", "n", "images", *columns, "words", "tokens"]


def _rows(models: Models, kinds: list[str], by: str | None = None) -> list[list[Any]]:
    """Cells of the narrow table; scores are still {"value", "low", "high"}."""

    def cells(group: Mapping[str, Any], types: Mapping[str, Any]) -> list[Any]:
        scores = [_at(types.get(kind), way) for _, kind, way in _HEADLINE if kind in kinds]
        return [group["n"], group["images"], *scores, group["answer_words"], group["answer_tokens"]]

    if by is None:
        return [[model, *cells(result["overall"], result["by_type"])] for model, result in models.items()]
    names = sorted({name for result in models.values() for name in result[by]})
    return [
        [name, model, *cells(result[by][name], result[by][name]["types"])]
        for name in names
        for model, result in models.items()
        if name in result[by]
    ]


def _plain(cell: Any) -> str:
    """A cell as text: scores in per cent with their interval, other numbers with one decimal."""
    if cell is None:
        return ""
    if isinstance(cell, Mapping):
        return f"{100 * cell['value']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _filled(head: list[str], rows: Iterable[list[Any]]) -> tuple[list[str], list[list[Any]]]:
    """The table without columns that are empty throughout."""
    rows = list(rows)
    kept = [column for column in range(len(head)) if any(row[column] is not None for row in rows)]
    return [head[column] for column in kept], [[row[column] for column in kept] for row in rows]


def _wide(head: list[str], rows: Iterable[list[Any]]) -> str:
    """A table that may be wider than the page."""
    head, rows = _filled(head, rows)
    return f'<div style="overflow-x:auto">{html_report.table(head, rows)}</div>'


def _pairs(benchmark: Mapping[str, Any]) -> str:
    """What makes the benchmark: its split, the words put after the question, its note."""
    pairs = {**benchmark.get("definition", {}), **benchmark.get("counts", {})}
    rows = [
        [name, _words(value)]
        for name, value in pairs.items()
        if value not in ("", None) and value != [] and value != () and value != {}
    ]
    return html_report.table(["benchmark", ""], rows) if rows else ""


def _words(value: Any) -> Any:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _block_table(models: Models, kind: str) -> str:
    rows = [
        [
            model,
            block["n"],
            block["images"],
            *(_at(block, way) for _, way in _BLOCK[kind]),
            block.get("legacy_left_out"),
            block.get("unparsable"),
            block["answer_words"],
        ]
        for model, result in models.items()
        if (block := result["by_type"].get(kind))
    ]
    left_out = "left out"
    return _wide(
        ["model", "n", "images", *(head for head, _ in _BLOCK[kind]), left_out, "unparsable", "words"], rows
    )


def _plots(models: Models, kinds: list[str]) -> str:
    def plot(title: str, found: Callable[[Mapping[str, Any]], Any]) -> str:
        scores = {model: score for model, result in models.items() if (score := found(result)) is not None}
        return html_report.arms_plot(scores, title)

    drawn = [plot("all: strict accuracy", lambda result: result["overall"]["accuracy"])]
    for head, kind, way in _HEADLINE:
        if kind in kinds:
            drawn.append(plot(head, lambda result, kind=kind, way=way: _at(result["by_type"].get(kind), way)))
    return f'<div class="plots">{"".join(drawn)}</div>'


def _form(models: Models, kinds: list[str]) -> str:
    rows = [
        [
            model,
            kind,
            block["n"],
            block["errors"],
            block["answer_words"],
            block["answer_tokens"],
            block["truncated"],
            block.get("unparsable"),
            block.get("unfinished_thinking") or None,
        ]
        for model, result in models.items()
        for kind in kinds
        if (block := result["by_type"].get(kind))
    ]
    return _wide(
        ["model", "kind", "n", "errors", "words", "tokens", "truncated", "unparsable", "unfinished thinking"],
        rows,
    ) + "".join(_notes(models))


def _notes(models: Models) -> Iterator[str]:
    """What was not scored as it stands: answers with thinking before them, and questions without an
    answer by reason.
    """
    for model, result in models.items():
        said = []
        if (thinking := result.get("thinking") or {}).get("answers"):
            said.append(
                f"{thinking['answers']:,} answers hold thinking; what stands after it is scored. "
                f"{thinking['unfinished']:,} never end it "
                "and count as empty answers; give the model more tokens (evaluate.max_tokens)"
            )
        said += [
            f"{number:,} without an answer: {reason}"
            for reason, number in (result.get("error_reasons") or {}).items()
        ]
        if said:
            yield f'<p class="soft">{html.escape(model)}: {html.escape("; ".join(said))}.</p>'


def _floors(models: Models, kinds: list[str]) -> str:
    rows = [
        [
            model,
            kind,
            block["accuracy"],
            block["chance"],
            block["majority"],
            *(_at(block, ("text_only", name)) for name in ("accuracy", "gain", "recall", "recall_gain")),
        ]
        for model, result in models.items()
        for kind in kinds
        if (block := result["by_type"].get(kind))
    ]
    text_only = [
        "text only: accuracy",
        "gain by the image",
        "text only: recall",
        "gain by the image (recall)",
    ]
    return _wide(["model", "kind", "accuracy, strict", "chance", "majority", *text_only], rows)


def _comparisons(comparisons: Mapping[str, Any]) -> str:
    rows = []
    for model, found in comparisons["models"].items():
        for kind, difference in {"all": found["accuracy"], **found["by_type"]}.items():
            tests = [difference[name] for name in ("p_bootstrap", "p_permutation")]
            rows.append(
                [
                    model,
                    kind,
                    found["n"] if kind == "all" else None,
                    difference,
                    *tests,
                    difference.get("p_holm"),
                ]
            )
    about = (
        f"Strict accuracy minus that of {comparisons['against']}, on the same questions; p-values are "
        "two-sided, by images."
    )
    head = ["model", "kind", "n", "difference", "p (bootstrap)", "p (sign flips)", "p (sign flips, Holm)"]
    return f'<p class="soft">{html.escape(about)}</p>' + _wide(head, rows)


def _win_rates(win_rates: Mapping[str, Mapping[str, Any]]) -> str:
    names = ("win_rate", "win", "tie", "loss", "p_permutation", "order_disagreement", "first_shown")
    rows = [
        [pair, group, found["asked"], found["n"], *(found[name] for name in names), *found["failed"].values()]
        for pair, result in win_rates.items()
        for group, found in {"all": result, **result["by_type"], **result["by_modality"]}.items()
    ]
    failed = [f"failed: {reason}" for result in list(win_rates.values())[:1] for reason in result["failed"]]
    return _wide(
        ["pair", "questions", "asked", "judged", *(name.replace("_", " ") for name in names), *failed], rows
    )


def _chats(chats: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for model, result in chats.items():
        for group, found in {"all": result, **result["by_type"], **result["by_modality"]}.items():
            score = found["score"]
            shown = f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]" if score else None
            rows.append(
                [
                    model,
                    group,
                    found["asked"],
                    found["n"],
                    shown,
                    found["reference_mean"],
                    found["answer_mean"],
                    sum(found["failed"].values()),
                ]
            )
    return _wide(
        ["model", "questions", "asked", "rated", "score", "reference rated", "answer rated", "failed"], rows
    )
