"""Predictions in and out: our own Parquet and JSON Lines, lmms-eval's sample logs, VLMEvalKit's prediction
tables.

Everything is read into rows of records.PREDICTION, which `medray.evaluation.scores` scores without a model::

    write_predictions(read_lmms_eval("20250101_120000_samples_vqa_rad.jsonl"), "predictions/")
    score("predictions/", EvaluateConfig())

Reading needs no other package; .xlsx needs openpyxl. Formats: lmms_eval/evaluator.py and
loggers/evaluation_tracker.py (`*_samples_<task>.jsonl`), vlmeval/inference.py and smp/file.py (tables of
index, question, A.., answer, prediction).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import posixpath
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from medray.errors import DataError
from medray.evaluation.targets import LETTERS, TargetError, documented_options, lettered, question_of
from medray.inference.thinking import FINISHED, UNFINISHED, said
from medray.records import ANSWERED, PREDICTION, conform

logger = logging.getLogger("medray")

ROWS_PER_FILE = 65_536
_BATCH = 16_384
_EMPTY = dict.fromkeys(PREDICTION.names)
_TABLES = (".tsv", ".csv", ".xlsx")  # of VLMEvalKit


def read_predictions(uri: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """`prediction_tables` row by row."""
    for table in prediction_tables(uri, columns):
        yield from table.to_pylist()


def prediction_tables(uri: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Columns of records.PREDICTION from a file, or from a folder of Parquet or .jsonl files; columns a file
    lacks are null.

    A .jsonl file may also be a sample log of lmms-eval, and a .tsv, .csv or .xlsx file is a table of
    VLMEvalKit. Fields and columns that are not read are logged once per file.

    Raises DataError where there is no such file, naming the line and field of a JSON record of the wrong
    form, or the file with a column of another type.
    """
    fs, root = url_to_fs(uri)
    if not fs.exists(root):
        raise DataError(f"predictions: {uri} does not exist")
    schema = pa.schema([PREDICTION.field(name) for name in columns or PREDICTION.names])
    if root.endswith(_TABLES):
        yield from _tables(read_vlmevalkit(uri), schema, uri)
        return
    files = [root] if fs.isfile(root) else sorted(p for p in fs.find(root) if not _hidden(p, root))
    suffixes = Counter(posixpath.splitext(path)[1] or "no suffix" for path in files)
    there = ", ".join(f"{number} x {suffix}" for suffix, number in sorted(suffixes.items()))
    for suffix in (".parquet", ".jsonl"):
        chosen = [path for path in files if path.endswith(suffix)]
        if not chosen:
            continue
        if len(chosen) < len(files):
            logger.warning("%s: only the %s files are read, of %s", uri, suffix, there)
        for path in chosen:
            yield from (
                _parquet_tables(fs, path, schema)
                if suffix == ".parquet"
                else _tables(_jsonl_rows(fs, path, schema.names), schema, path)
            )
        return
    raise DataError(
        f"predictions: {uri} is or holds no .parquet, .jsonl, .tsv, .csv or .xlsx file; there is "
        f"{there or 'nothing'}"
    )


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith((".", "_")) for part in path[len(root) :].split("/"))


def _parquet_tables(fs: Any, path: str, schema: pa.Schema) -> Iterator[pa.Table]:
    with fs.open(path, "rb") as handle:
        file = pq.ParquetFile(handle)
        there = [name for name in schema.names if name in file.schema_arrow.names]
        _name_unread(path, set(file.schema_arrow.names) - set(ANSWERED.names), "columns")
        for batch in file.iter_batches(batch_size=_BATCH, columns=there):
            try:
                table = conform(pa.Table.from_batches([batch]), schema)
            except pa.ArrowException as error:
                raise DataError(
                    f"{posixpath.basename(path)}: a column is not of its type in records.PREDICTION ({error})"
                ) from None
            yield table


def _tables(rows: Iterable[dict[str, Any]], schema: pa.Schema, path: str) -> Iterator[pa.Table]:
    for part in _parts(rows, _BATCH):
        try:
            table = pa.Table.from_pylist(part, schema=schema)
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            raise DataError(
                f"{posixpath.basename(path)}: a value is outside its type in records.PREDICTION ({error})"
            ) from None
        yield table


def _jsonl_rows(fs: Any, path: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    name = posixpath.basename(path)
    unread: set[str] = set()
    first = True
    for number, line in _numbered_lines(fs, path, path):
        where = f"{name} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: holds a {type(record).__name__}, not an object")
        if first and "doc_id" in record and "sample_id" not in record:
            yield from (
                {column: row[column] for column in columns}
                for row in read_lmms_eval(fs.unstrip_protocol(path))
            )
            return
        if first and "sample_id" not in record:
            raise DataError(
                f"{where}: has neither 'sample_id' (our own predictions) nor 'doc_id' (lmms-eval); it has "
                f"{', '.join(sorted(record)) or 'no field'}. "
                "Write a record of sample_id, image_id, question, reference, answer and answer_type for "
                "each question"
            )
        first = False
        for column in columns:
            if not _fits(record.get(column), PREDICTION.field(column).type):
                raise DataError(f"{where}: field {column!r} is not of type {PREDICTION.field(column).type}")
        unread |= record.keys() - set(ANSWERED.names)
        yield {column: record.get(column) for column in columns}
    _name_unread(path, unread, "fields")


def _numbered_lines(fs: Any, inner: str, path: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text that are not blank. Raises DataError naming the file for another encoding."""
    with _opened(fs, inner, path) as handle:
        try:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise DataError(
                f"{posixpath.basename(path)}: not UTF-8 ({error.reason} at byte {error.start}); save it as "
                "UTF-8"
            ) from None


def _name_unread(path: str, names: Iterable[str], what: str) -> None:
    if names := sorted(names):
        logger.warning(
            "%s: %s that are not read: %s",
            posixpath.basename(path),
            what,
            ", ".join(names[:40]) + (", ..." if len(names) > 40 else ""),
        )


def _fits(value: Any, kind: pa.DataType) -> bool:
    if value is None:
        return True
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(
            item is not None and _fits(item, kind.value_type) for item in value
        )
    if pa.types.is_string(kind):
        return isinstance(value, str)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (pa.types.is_floating(kind) and isinstance(value, float))


def _once(rows: Iterable[dict[str, Any]], uri: str) -> Iterator[dict[str, Any]]:
    """The rows. Raises DataError for an id that comes twice: the later answer would take the place of the
    first.
    """
    seen: set[str] = set()
    for row in rows:
        if row["sample_id"] in seen:
            raise DataError(
                f"{uri}: sample_id {row['sample_id']!r} comes twice; leave one of its answers out"
            )
        seen.add(row["sample_id"])
        yield row


def by_id(uri: str, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Columns of the predictions that hold an answer, by sample_id."""
    rows = read_predictions(uri, list(dict.fromkeys(["sample_id", "answer", "error", *columns])))
    return {
        row["sample_id"]: {name: row[name] for name in columns}
        for row in _once(rows, uri)
        if row["error"] is None and row["answer"] is not None
    }


def answers(uri: str, answer_type: str | None = None) -> dict[str, str]:
    """sample_id -> answer of a set of predictions, without the thinking before it, to questions of one
    type or of all.
    """
    rows = read_predictions(uri, ["sample_id", "answer", "error", "answer_type"])
    return {
        row["sample_id"]: said(row["answer"]).answer
        for row in _once(rows, uri)
        if row["error"] is None and row["answer"] is not None and answer_type in (None, row["answer_type"])
    }


def write_predictions(rows: Iterable[dict[str, Any]], folder: str) -> int:
    """Rows as Parquet files of records.PREDICTION in a new or empty folder. Returns their number.

    Raises DataError where the folder holds Parquet files: predictions of two models must not mix.
    """
    fs, root = url_to_fs(folder)
    if fs.exists(root) and any(path.endswith(".parquet") for path in fs.find(root)):
        raise DataError(f"{folder} already holds predictions; name an empty folder")
    fs.makedirs(root, exist_ok=True)
    total = 0
    for number, part in enumerate(_parts(rows, ROWS_PER_FILE)):
        with fs.open(f"{root}/part-{number:05d}.parquet", "wb") as handle:
            pq.write_table(pa.Table.from_pylist(part, schema=PREDICTION), handle)
        total += len(part)
    return total


def _parts(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    part: list[dict[str, Any]] = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


# ---- lmms-eval
# -----------------------------------------------------------------------------------------------------


def write_lmms_eval(rows: Iterable[dict[str, Any]], folder: str, task: str, date: str) -> str:
    """Predictions as lmms-eval logs samples: `<folder>/<date>_samples_<task>.jsonl`, one object per question.

    doc holds our own columns, so that reading the file again loses nothing.

    Args:
        date: as lmms-eval writes it, such as 20250131_120000.

    Returns the file's URI.
    """
    uri = f"{folder.rstrip('/')}/{date}_samples_{task}.jsonl"
    with _text(uri) as handle:
        for number, row in enumerate(rows):
            doc = {name: row.get(name) for name in PREDICTION.names if name != "answer"}
            answer = row.get("answer") or ""
            sample = {
                "doc_id": number,
                "doc": doc,
                "target": row.get("reference") or "",
                "input": row.get("question") or "",
                "resps": [[answer]],
                "filtered_resps": [answer],
                "token_counts": [{"output_tokens": row.get("tokens")}],
                "doc_hash": hashlib.sha256(
                    json.dumps(doc, indent=2, ensure_ascii=False).encode()
                ).hexdigest(),
            }
            handle.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return uri


_LMMS_FIELDS = {
    "doc_id",
    "doc",
    "target",
    "input",
    "arguments",
    "resps",
    "filtered_resps",
    "token_counts",
    "doc_hash",
    "prompt_hash",
    "target_hash",
}


def read_lmms_eval(path: str, model: str | None = None) -> Iterator[dict[str, Any]]:
    """Predictions of a sample log (`*_samples_<task>.jsonl`) of lmms-eval or lm-evaluation-harness.

    The answer is the first of `filtered_resps` (else of `resps`: lmms-eval leaves out the one that equals the
    other). Logs written by lmms-eval itself hold no `doc`: the kind of question is then told from `target`
    and from lettered options in `input`, and each question counts as an image of its own. A line that cannot
    be used becomes a row with `error`; fields that are not read are logged once.

    Args:
        model: written to the column `model`; default the name of the folder, as lmms-eval lays files out.
    """
    fs, inner = url_to_fs(path)
    task = _task(posixpath.basename(path))
    model = model or posixpath.basename(posixpath.dirname(inner)) or None
    unread: set[str] = set()
    for number, line in _numbered_lines(fs, inner, path):
        yield _lmms_row(line, f"{task}@line {number}", task, model, unread)
    _name_unread(path, unread, "fields")


def _task(name: str) -> str:
    match = re.search(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT[\d.:-]+)?\.jsonl$", name)
    return match[1] if match else posixpath.splitext(name)[0]


def _lmms_row(line: str, place: str, task: str, model: str | None, unread: set[str]) -> dict[str, Any]:
    def bad(reason: str) -> dict[str, Any]:
        return {
            **_EMPTY,
            "sample_id": place,
            "image_id": place,
            "model": model,
            "benchmark": task,
            "error": reason,
        }

    try:
        sample = json.loads(line)
    except json.JSONDecodeError as error:
        return bad(f"the line is not JSON: {error.msg}")
    if not isinstance(sample, dict) or "doc_id" not in sample:
        return bad("field 'doc_id' is missing")
    unread |= sample.keys() - _LMMS_FIELDS
    answer = _first(sample.get("filtered_resps"))
    answer = _first(sample.get("resps")) if answer is None else answer
    if answer is None:
        return bad("neither 'filtered_resps' nor 'resps' holds one text")
    doc = sample.get("doc") if isinstance(sample.get("doc"), dict) else {}
    if doc.get("sample_id") and all(
        _fits(doc.get(name), PREDICTION.field(name).type) for name in PREDICTION.names
    ):
        return {
            **{name: doc.get(name) for name in PREDICTION.names},
            "answer": None if doc.get("error") else answer,
        }
    counts = sample.get("token_counts")
    tokens = (
        counts[0].get("output_tokens")
        if isinstance(counts, list) and counts and isinstance(counts[0], dict)
        else None
    )
    question = _lmms_question(sample, doc)
    image = next(
        (
            str(doc[key])
            for key in ("image_id", "img_id", "img_name", "image_name")
            if doc.get(key) is not None
        ),
        None,
    )
    identity = f"{task}:{sample['doc_id']}"
    try:
        kind = question_of(
            question,
            sample.get("target"),
            lettered(question)[1] or documented_options(doc),
            said(answer).answer,
        )
    except TargetError as error:
        return {**bad(str(error)), "sample_id": identity, "image_id": image or identity, "question": question}
    return {
        **_EMPTY,
        "sample_id": identity,
        "image_id": image or identity,
        "question": question,
        "answer": answer,
        "model": model,
        "benchmark": task,
        "tokens": tokens if isinstance(tokens, int) else None,
        **kind,
    }


def _lmms_question(sample: Mapping[str, Any], doc: Mapping[str, Any]) -> str:
    """What was asked: lmms-eval's `input`, lm-evaluation-harness's first argument, or the data set's own
    question.
    """
    first = sample.get("arguments")
    while isinstance(first, dict | list) and first:
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return next(
        (text for text in (sample.get("input"), first, doc.get("question")) if isinstance(text, str)), ""
    )


def _first(responses: Any) -> str | None:
    """The text in nested lists that hold just one."""
    while isinstance(responses, list) and len(responses) == 1:
        responses = responses[0]
    return responses if isinstance(responses, str) else None


# ---- VLMEvalKit
# ----------------------------------------------------------------------------------------------------

_FAILED = "Failed to obtain answer"  # VLMEvalKit's prediction where the model gave none
_OWN = [name for name in PREDICTION.names if name not in ("question", "reference", "answer", "choices")]


def write_vlmevalkit(rows: Iterable[dict[str, Any]], path: str) -> int:
    """Predictions as VLMEvalKit's table, .tsv or .xlsx by the file's name. Returns the number of rows.

    Its columns are index (a number), question (without its options), A, B, ..., answer and prediction; then
    come our own and `prompt`, the question as it was asked, so that reading the file again loses nothing.
    .xlsx cells cannot hold control characters, which are left out.
    """
    rows = list(rows)
    widest = max((len(row.get("choices") or ()) for row in rows), default=0)
    if widest > len(LETTERS):
        raise DataError(f"a question has {widest} options; a table has columns for {len(LETTERS)}")
    head = ["index", "question", *LETTERS[:widest], "answer", "prediction", "category", "prompt", *_OWN]
    _write_table(
        path,
        head,
        ([_cell(value) for value in _table_row(number, row, widest)] for number, row in enumerate(rows)),
    )
    return len(rows)


def _table_row(number: int, row: dict[str, Any], widest: int) -> list[Any]:
    choices = list(row.get("choices") or ())
    question = row.get("question") or ""
    stem, options = lettered(question)
    failed = row.get("error") is not None
    prediction = f"{_FAILED}: {row['error']}" if failed else row.get("answer")
    return [
        number,
        stem if options and options == choices else question,
        *choices,
        *[""] * (widest - len(choices)),
        row.get("reference"),
        prediction,
        row.get("attribute"),
        question,
        *(row.get(name) for name in _OWN),
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list) else str(value)


def read_vlmevalkit(path: str, model: str | None = None) -> Iterator[dict[str, Any]]:
    """Predictions of a VLMEvalKit table (.tsv, .csv or .xlsx): columns index, question, answer, prediction
    and, for multiple choice, A, B, ...

    An option's letter is that of its column; the text of an option whose cell is empty is lost (pandas writes
    "None" and "NA" so), and stays empty. The image is `image_path` where there is one, else each question
    counts as an image of its own. A row that cannot be used, or whose prediction says that it failed, becomes
    a row with `error`; columns that are not read are logged once.

    Args:
        model: written to the column `model` unless the table is our own; default the file's name.

    Raises DataError for a table without the columns index, question, answer and prediction, with one of them
    twice, or an .xlsx without openpyxl.
    """
    name = posixpath.splitext(posixpath.basename(path))[0]
    table = _read_table(path)
    head = [_column(value) for value in next(table, [])]
    missing = [column for column in ("index", "question", "answer", "prediction") if column not in head]
    if missing:
        raise DataError(
            f"{path}: a VLMEvalKit table needs the column {missing[0]!r}; it has {', '.join(head)}"
        )
    if twice := [column for column, times in Counter(head).items() if times > 1 and column in _READ_COLUMNS]:
        raise DataError(f"{path}: the column {twice[0]!r} is there twice; remove one")
    _name_unread(path, {column for column in head if column and column not in _READ_COLUMNS}, "columns")
    for number, cells in enumerate(table, 2):
        if any(cells):
            place = f"{name}@row {number}"
            if len(cells) < len(head) or any(cells[len(head) :]):
                yield {
                    **_EMPTY,
                    "sample_id": place,
                    "image_id": place,
                    "model": model or name,
                    "benchmark": name,
                    "error": f"the row has {len(cells)} cells, the table {len(head)} columns",
                }
            else:
                yield _vlmevalkit_row(dict(zip(head, cells, strict=False)), place, name, model or name)


_READ_COLUMNS = {
    "index",
    "question",
    *LETTERS,
    "answer",
    "prediction",
    "category",
    "prompt",
    "image_path",
    "image",
    *_OWN,
}


def _column(name: str) -> str:
    name = name.strip()
    return name if name in LETTERS and name else name.lower()


def _options(cells: dict[str, str]) -> list[str] | None:
    """The options by their columns, up to the last that has a text or is the answer."""
    letters = [letter for letter in LETTERS if letter in cells]
    if not any(cells[letter].strip() for letter in letters):
        return None
    answer = cells["answer"].strip().upper()
    last = max(letter for letter in letters if cells[letter].strip() or letter == answer)
    return [cells.get(letter, "") for letter in LETTERS[: LETTERS.index(last) + 1]]


def _vlmevalkit_row(cells: dict[str, str], place: str, name: str, model: str) -> dict[str, Any]:
    own = {
        column: value
        for column in _OWN
        if (value := _typed(cells.get(column, ""), PREDICTION.field(column).type)) is not None
    }
    if own.get("thinking") not in (None, UNFINISHED):
        own["thinking"] = FINISHED  # VLMEvalKit has the words themselves in a column of this name
    identity = own.get("sample_id") or (f"{name}:{cells['index']}" if cells["index"] else place)
    error = own.get("error")
    if error is None and cells["prediction"].startswith(_FAILED):
        error = cells["prediction"]
    if error is None and not cells["answer"]:
        error = "column 'answer' is empty"
    known: dict[str, Any] = {
        "model": None if "answer_type" in own else model,
        "benchmark": None if "answer_type" in own else name,
    }
    if "answer_type" in own:  # a table of our own
        known |= {"reference": cells["answer"], "choices": _options(cells)}
    elif cells["answer"]:
        try:
            known |= question_of(
                cells["question"], cells["answer"], _options(cells), said(cells["prediction"]).answer
            )
        except TargetError as problem:
            error = error or f"column 'answer': {problem}"
    return {
        **_EMPTY,
        "attribute": cells.get("category") or None,
        **known,
        **own,
        "sample_id": identity,
        "image_id": own.get("image_id") or cells.get("image_path") or identity,
        "question": cells.get("prompt") or cells["question"],
        "answer": cells["prediction"] if error is None else None,
        "error": error,
    }


def _typed(text: str, kind: pa.DataType) -> Any:
    """A cell of one of our own columns; None where it is empty or holds something else."""
    if not text or pa.types.is_string(kind):
        return text or None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if _fits(value, kind) else None


def _write_table(path: str, head: list[str], rows: Iterator[list[str]]) -> None:
    if path.endswith(".tsv"):
        with _text(path) as handle:
            writer = csv.writer(handle, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)
        return
    openpyxl = _openpyxl(path)
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()

    def cell(text: str) -> Any:
        made = openpyxl.cell.WriteOnlyCell(sheet, openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.sub("", text))
        made.data_type = "s"  # an answer that begins with "=" is a text and no formula
        return made

    sheet.append(head)
    for row in rows:
        sheet.append([cell(text) for text in row])
    buffer = io.BytesIO()
    book.save(buffer)
    fs, inner = url_to_fs(path)
    fs.makedirs(posixpath.dirname(inner), exist_ok=True)
    fs.pipe_file(inner, buffer.getvalue())


def _read_table(path: str) -> Iterator[list[str]]:
    """The cells of each row as text. "None", "NA" and the like are texts like others."""
    fs, inner = url_to_fs(path)
    if not path.endswith(".xlsx"):
        csv.field_size_limit(2**26)  # tables may carry images as base64
        kind = "tab" if path.endswith(".tsv") else "comma"
        with _opened(fs, inner, path) as handle:
            try:
                yield from csv.reader(handle, delimiter="\t" if kind == "tab" else ",", strict=True)
            except csv.Error as error:
                raise DataError(f"{path}: not a table of {kind}-separated values ({error})") from None
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
                ) from None
        return
    openpyxl = _openpyxl(path)
    if not fs.exists(inner):
        raise DataError(f"{path} does not exist")
    with fs.open(inner, "rb") as handle:
        try:
            book = openpyxl.load_workbook(handle, read_only=True, data_only=True)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not an .xlsx workbook ({error})") from None
        for row in book.active.iter_rows(values_only=True):
            yield ["" if value is None else str(value) for value in row]


def _openpyxl(path: str) -> Any:
    if not path.endswith(".xlsx"):
        raise DataError(f"{path}: a VLMEvalKit table ends in .tsv, .csv or .xlsx")
    try:
        import openpyxl
        import openpyxl.cell.cell
    except ImportError:
        raise DataError(
            f"{path}: .xlsx needs openpyxl (pip install openpyxl); or use .tsv, which VLMEvalKit writes with "
            "PRED_FORMAT=tsv"
        ) from None
    return openpyxl


def _opened(fs: Any, inner: str, path: str) -> Any:
    if not fs.exists(inner):
        raise DataError(f"{path} does not exist")
    return fs.open(inner, "rt", encoding="utf-8-sig", newline="")


def _text(uri: str) -> Any:
    fs, inner = url_to_fs(uri)
    fs.makedirs(posixpath.dirname(inner), exist_ok=True)
    return fs.open(inner, "wt", encoding="utf-8", newline="")
