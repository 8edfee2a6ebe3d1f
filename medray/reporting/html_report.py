"""report.html of a run: one file that opens offline, with plots, counts and a gallery to read.

Pure apart from drawing: it takes what the run recorded and returns HTML. Plots are SVG inside the page.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from medray.config.section import without_passwords

STYLE = """
:root{--ink:#1c2733;--soft:#5d6b7a;--line:#dde3ea;--good:#0b7a53;--bad:#b3362b;--accent:#2457a6}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
p.soft,td.soft{color:var(--soft)}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft)}
td.n{text-align:right}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:1rem}
.plots svg{width:100%;height:auto}
.card{display:grid;grid-template-columns:128px 1fr;gap:1rem;padding:.8rem;margin:.7rem 0}
.card{border:1px solid var(--line);border-radius:8px}
.card img{width:128px;border-radius:4px}
.good{color:var(--good)}
.bad{color:var(--bad)}
details pre{white-space:pre-wrap;font-size:12px}
.big{font-size:1.25rem}.tag{font-size:12px;color:var(--soft)}
"""


def page(title: str, sections: Iterable[tuple[str, str]], subtitle: str = "") -> str:
    """Whole HTML document out of (heading, inner HTML) sections."""
    body = "".join(
        f"<section><h2>{html.escape(head)}</h2>{inner}</section>" for head, inner in sections if inner
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f'<p class="soft">{html.escape(subtitle)}</p>{body}</html>'
    )


def table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """HTML table; numbers are set right, scores ({"value", "low", "high"}) with their interval,
    everything is escaped.
    """
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    lines = []
    for row in rows:
        lines.append("<tr>" + "".join(_cell(value) for value in row) + "</tr>")
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.3f}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="n">{value:,}</td>'
    if isinstance(value, Mapping):
        value = with_interval(value)
    return f"<td>{html.escape('' if value is None else str(value))}</td>"


def with_interval(score: dict[str, float]) -> str:
    """0.712 [0.690, 0.731] from {"value", "low", "high"}."""
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def as_svg(figure: Any) -> str:
    """A matplotlib figure as an <svg> element; the figure is closed."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def new_figure(width: float = 5.2, height: float = 3.0) -> tuple[Any, Any]:
    """Figure and axes in the report's style; sizes in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def timeline(stages: list[dict[str, Any]]) -> str:
    """Bar per stage from the manifests' started/finished times (seconds since the epoch)."""
    if not stages:
        return ""
    figure, axes = new_figure(9, 0.32 * len(stages) + 0.8)
    # A resumed run has pauses of hours between stages: bars follow one another by their own seconds.
    begin = 0.0
    for index, stage in enumerate(stages):
        axes.barh(index, stage["seconds"], left=begin, color="#2457a6", height=0.7)
        axes.text(begin + stage["seconds"], index, f" {stage['seconds']:.0f} s", va="center", fontsize=8)
        begin += stage["seconds"]
    axes.set_yticks(range(len(stages)), [stage["stage"] for stage in stages], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of work")
    return as_svg(figure)


def curve(points: dict[str, list[tuple[float, float]]], title: str, xlabel: str = "optimiser step") -> str:
    """Line per name in `points`; empty input draws nothing."""
    points = {name: line for name, line in points.items() if line}
    if not points:
        return ""
    figure, axes = new_figure()
    for name, line in points.items():
        xs, ys = zip(*line, strict=True)
        axes.plot(xs, ys, label=name, linewidth=1.3)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    if len(points) > 1:
        axes.legend(fontsize=8, frameon=False)
    return as_svg(figure)


def training_curves(
    metrics: Mapping[str, list[dict[str, Any]]], plots: Mapping[str, Mapping[str, str]]
) -> str:
    """The training metrics of every stage: for each plot (title -> {name of the line: metric}) one curve."""
    drawn = []
    for stage, rows in metrics.items():
        for title, lines in plots.items():
            drawn.append(
                curve(
                    {
                        name: [(row["step"], row[key]) for row in rows if key in row]
                        for name, key in lines.items()
                    },
                    f"{stage}: {title}",
                )
            )
    return f'<div class="plots">{"".join(drawn)}</div>'


def arms_plot(arms: dict[str, dict[str, float]], title: str) -> str:
    """Dot and interval per arm; each score is {"value", "low", "high"}."""
    if not arms:
        return ""
    figure, axes = new_figure(5.2, 0.42 * len(arms) + 1)
    for index, score in enumerate(arms.values()):
        axes.plot([score["low"], score["high"]], [index, index], color="#5d6b7a")
        axes.plot(score["value"], index, "o", color="#2457a6")
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    return as_svg(figure)


def image_tag(data: bytes, side: int = 160) -> str:
    """An <img> with the picture inside, shrunk so that the page stays small; no file metadata survives."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def gallery(judged: Iterable[dict[str, Any]], most: int = 12) -> str:
    """Cards of images with their self-asked question, both answers and the judge's scores.

    Args:
        judged: rows of records.JUDGED; one verdict of each row is shown.
    """
    cards = []
    for row in judged:
        verdicts = [v for v in row.get("verdicts") or [] if v["error"] is None]
        if not verdicts or row.get("image") is None:
            continue
        verdict = verdicts[0]
        question = next(q for q in row["questions"] if q["question_id"] == verdict["question_id"])
        first, second = question["answers"][verdict["first"]], question["answers"][verdict["second"]]
        better = verdict["first_score"] >= verdict["second_score"]
        cards.append(
            f'<div class="card">{image_tag(row["image"])}<div><b>{html.escape(question["question"])}</b>'
            f"{_answer(first['text'], verdict['first_score'], better)}"
            f"{_answer(second['text'], verdict['second_score'], not better)}"
            f'<div class="tag">description: {html.escape(row["description"] or "")}</div></div></div>'
        )
        if len(cards) == most:
            break
    return "".join(cards)


def _answer(text: str, score: float, chosen: bool) -> str:
    kind, word = ("good", "chosen") if chosen else ("bad", "rejected")
    return f'<div class="{kind}">{word} ({score:.2f}): {html.escape(text)}</div>'


def config_section(config: dict[str, Any]) -> str:
    return (
        "<details><summary>resolved "
        "configuration</summary>"
        f"<pre>{html.escape(json.dumps(without_passwords(config), indent=1))}</pre></details>"
    )
