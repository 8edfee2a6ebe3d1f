"""report.html of a prepared dataset, and the sample sheet of `prepare_data.py --inspect`."""

from __future__ import annotations

import html
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medray.config import PrepareDataConfig
from medray.ingest.unread import unread_line
from medray.private_files import write_private
from medray.reporting import html_report
from medray.running.run import Run

_SHEET_COLUMNS = [
    "sample_id",
    "split",
    "modality",
    "image",
    "width",
    "height",
    "attributes",
    "captions",
    "dialogues",
    "questions",
    "preferences",
    "error",
]


def write_report(
    run: Run,
    config: PrepareDataConfig,
    manifest: dict[str, Any],
    account: dict[str, Any],
    leaks: dict[str, Any],
) -> None:
    counts = {name: value for name, value in manifest.items() if isinstance(value, (int, str))}
    side = account["longest_side"]
    tallies = "".join(
        f"<h3>{html.escape(name.replace('_', ' '))}</h3>{html_report.table(['', 'rows'], tally.items())}"
        for name, tally in account["tallies"].items()
        if set(tally) - {"unknown"}
    )
    picture = f"<p>{_png(run.fs.cat_file(leaks['picture']))}</p>" if leaks["picture"] else ""
    sections = [
        (
            "What is inside",
            html_report.table(["", ""], counts.items())
            + html_report.table(["split", "images"], manifest["splits"].items()),
        ),
        (
            "Images",
            f"<p>longest side {side['smallest']} to {side['largest']} pixels, median {side['median']}</p>",
        ),
        ("In numbers", tallies),
        (
            "Set aside",
            html_report.table(["reason", "rows"], account["reasons"].items())
            if account["reasons"]
            else "<p>nothing</p>",
        ),
        *not_used(manifest),
        ("Leaks between splits", f"<pre>{html.escape(leaks['table'])}</pre>{picture}"),
        ("Samples", sheet(run.path("shards"), 12)),
        ("Stages", html_report.timeline(run.timeline)),
        ("Configuration", html_report.config_section(config.model_dump(mode="json"))),
    ]
    run.write_text(
        html_report.page("Prepared data", sections, f"{manifest['format']} from {config.data.source}"),
        "report.html",
    )


def not_used(seen: dict[str, Any]) -> list[tuple[str, str]]:
    """Sections of a report: files that nothing was read from, fields that no reader understands.

    Args:
        seen: `unread` and `unused` of medray.ingest.unread.account_of.
    """
    unused = [
        (file, ", ".join(f"{field} ({number:,})" for field, number in fields.items()))
        for file, fields in seen.get("unused", {}).items()
    ]
    unread = seen.get("unread", {})
    return [
        (
            "Files not read",
            html_report.table(["suffix", "files"], unread.items()) if unread else "<p>none</p>",
        ),
        ("Fields not used", html_report.table(["file", "fields (records)"], unused) if unused else ""),
    ]


def seen_lines(summary: dict[str, Any]) -> str:
    """What the last lines of a job say of a source, beside what was read: a line for each kind; "" for
    nothing.
    """
    unused = [f"{file}: {', '.join(fields)}" for file, fields in summary.get("unused", {}).items()]
    warned = ", ".join(f"{number:,} x {name}" for name, number in summary.get("warnings", {}).items())
    lines = [
        unread_line(summary.get("unread", {})),
        (
            "fields not used: "
            f"{'; '.join(unused[:8])}{f' and {len(unused) - 8} more files' if len(unused) > 8 else ''}"
        )
        if unused
        else "",
        f"warnings: {warned}" if warned else "",
    ]
    return "\n".join(line for line in lines if line)


def account_of_run(timeline: list[dict[str, Any]]) -> dict[str, Any]:
    """What the data stage of a method saw and did not use
    (medray.methods.shared.training_sets.read_account); {} if none is recorded.
    """
    outputs = [stage["outputs"] for stage in timeline if stage["stage"].startswith("00-data")]
    return next((found["account"] for found in outputs if "account" in found), {})


def prepared_lines(summary: dict[str, Any]) -> str:
    """The last lines of jobs/prepare_data.py for people: counts, what was not read, the report."""
    splits = ", ".join(f"{number:,} {name}" for name, number in summary["splits"].items())
    read = (
        f"images {summary['images']:,} ({splits})   quarantined {summary['quarantined']:,}   duplicates "
        f"{summary['duplicates']:,}"
    )
    seen = seen_lines(summary)
    return f"{read}\n{seen + chr(10) if seen else ''}report {summary['report']}"


def _png(data: bytes) -> str:
    import base64

    return (
        '<img alt="pairs of leaked images" style="max-width:100%" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )


def sheet(shards_uri: str, most: int, seed: int = 0) -> str:
    """HTML cards of some images with everything that is known of them."""
    cards = []
    for row in some_rows(shards_uri, most, seed):
        lines = [
            f"<b>{html.escape(row['sample_id'])}</b> <span class='tag'>{row['split']} · {row['width']} x "
            f"{row['height']} · {row['modality'] or 'modality unknown'}</span>"
        ]
        lines += [
            "; ".join(f"{html.escape(name)}: {html.escape(value)}" for name, value in one["values"])
            for one in (row["attributes"] or [])[:1]
        ]
        lines += [html.escape(one["caption"][:400]) for one in (row["captions"] or [])[:1]]
        lines += [
            f"{html.escape(one['question'][:300])} <i>{html.escape(one['reference'][:200])}</i>"
            for one in (row["questions"] or [])[:3]
        ]
        lines += [
            " / ".join(html.escape(turn["text"][:160]) for turn in one["turns"][:4])
            for one in (row["dialogues"] or [])[:1]
        ]
        lines += [
            (
                f"{html.escape(one['prompt'][:200])}: <span "
                f"class='good'>{html.escape(one['chosen'][:200])}</span>"
            )
            for one in (row["preferences"] or [])[:1]
        ]
        cards.append(
            f'<div class="card">{html_report.image_tag(row["image"])}<div>{"<br>".join(lines)}</div></div>'
        )
    return "".join(cards)


def some_rows(shards_uri: str, most: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Up to `most` usable rows from row groups drawn over all files."""
    from medray.storage.shards import parquet_files

    rng = random.Random(seed)
    files = parquet_files(shards_uri)
    rng.shuffle(files)
    share = -(-most // max(1, len(files)))
    given = 0
    for path in files:
        fs, inner = url_to_fs(path)
        with fs.open(inner, "rb") as handle:
            file = pq.ParquetFile(handle)
            if not file.num_row_groups:
                continue
            rows = [
                row
                for row in file.read_row_group(
                    rng.randrange(file.num_row_groups), columns=_SHEET_COLUMNS
                ).to_pylist()
                if row["error"] is None
            ]
        for row in rows[:share]:
            if given == most:
                return
            given += 1
            yield row


def inspect(uri: str, rows: int, out: str | None = None) -> dict[str, Any]:
    """The manifest of a prepared dataset; writes its sample sheet (HTML) to `out`, default sheet.html in the
    dataset.

    Raises DataError where `uri` is no prepared dataset.
    """
    from medray.errors import DataError
    from medray.ingest.source_index import manifest_of

    manifest = manifest_of(uri)
    if manifest is None:
        raise DataError(
            f"{uri} has no manifest.json; give a directory that jobs/prepare_data.py has finished"
        )
    page = html_report.page(
        "Samples",
        [("Samples", sheet(f"{uri.rstrip('/')}/shards", rows))],
        f"{manifest['format']}, {manifest['images']} images",
    )
    target = out or f"{uri.rstrip('/')}/sheet.html"
    fs, path = url_to_fs(target)
    if isinstance(fs, LocalFileSystem):
        write_private(Path(path), page)  # it shows patients' images
    else:
        fs.pipe_file(path, page.encode())
    return {**manifest, "sheet": target}
