"""Folders of files that speak for themselves: images alone, DICOM."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from medray.errors import BadRecord
from medray.images.decoding import TIFF_SUFFIXES, pages_of
from medray.ingest.files.reading import DICOM_HEAD, failure, is_dicom, open_file
from medray.ingest.files.walk import walk_files
from medray.ingest.readers.common import IMAGE_SUFFIXES, Row, error_row, row
from medray.pseudonyms import shown_path
from medray.split_names import split_of_folders

DICOM_SUFFIXES = (".dcm", ".dicom", ".dicm", ".ima")
# Almost every header ends within the first, none that is sound goes beyond the second (bytes).
HEADER_BYTES, LONGEST_HEADER = 2**18, 64 * 2**20
_APPLE_DOUBLE = "._"  # a Mac's notes on a file, beside it and with its suffix


def begins_as_dicom(path: str) -> bool:
    """Whether the file is DICOM by its content; False for one that cannot be read."""
    try:
        with open_file(path) as handle:
            return is_dicom(handle.read(DICOM_HEAD))
    except (OSError, ValueError):
        return False


def files_below(folder: str, depth: int | None = None) -> Iterator[str]:
    """URIs of the files in a folder (or of the one file), folder by folder in order of name; `depth`
    levels deep.
    """
    return (found.path for found in walk_files(folder, depth) if found.problem is None)


def image_rows(
    folder: str, root: str, depth: int | None = None, patient_key: bytes | None = None
) -> Iterator[Row]:
    """A row without payload for each image, and for each page of a TIFF file with several; the id is the
    path below `root`. The split is that of the nearest folder below the root whose name says one.
    """
    for path, problem in walk_files(folder, depth, part_of=root):
        relative = path.removeprefix(root).lstrip("/")
        shown = shown_path(relative, key=patient_key)
        if problem is not None:
            yield error_row(shown, shown, problem)
            continue
        if not path.lower().endswith(IMAGE_SUFFIXES) or posixpath.basename(path).startswith(_APPLE_DOUBLE):
            continue
        split = split_of_folders(relative)
        try:
            for page in _pages(path):
                name, file = (
                    (relative, path) if page is None else (f"{relative}/p{page:04d}", f"{path}#page={page}")
                )
                made = row(name, name, file, {}, split=split)
                yield {**made, "image_name": shown, "where": shown, "error": None}
        except BadRecord as bad:
            yield error_row(shown, shown, f"its name: {bad}") | {"image_file": None}


def _pages(path: str) -> list[int | None]:
    """The pages of a TIFF file with several, from 0; [None] for any other file, and for one that cannot
    be read: loading it says why.
    """
    if not path.lower().endswith(TIFF_SUFFIXES):
        return [None]
    try:
        with open_file(path) as handle:
            pages = pages_of(handle)
    except Exception:  # a damaged file: loading it quarantines its row
        return [None]
    return [*pages] if len(pages) > 1 else [None]


def dicom_rows(
    folder: str, root: str, depth: int | None = None, patient_key: bytes | None = None
) -> Iterator[Row]:
    """The rows that medray.images.dicom makes of each file with one of DICOM_SUFFIXES, and of each other
    file that begins as DICOM does, whatever its name. Of a file only its begin is read, and more where
    the header does not end there. A file or folder that cannot be read becomes a row with `error`, under
    the hash of its path.
    """
    from medray.images.dicom import file_id, index_rows

    for path, problem in walk_files(folder, depth, part_of=root):
        relative = path.removeprefix(root).lstrip("/")
        identity = file_id(relative, patient_key)
        if problem is not None:
            yield error_row(identity, identity, problem)
            continue
        if posixpath.basename(path).startswith(_APPLE_DOUBLE):
            continue
        try:
            with open_file(path) as handle:
                data = handle.read(HEADER_BYTES)
                if not path.lower().endswith(DICOM_SUFFIXES) and not is_dicom(data):
                    continue
                rows = list(index_rows(path, relative, data, patient_key))
                if rows[0]["error"] and len(data) == HEADER_BYTES:
                    rows = list(
                        index_rows(
                            path, relative, data + handle.read(LONGEST_HEADER - HEADER_BYTES), patient_key
                        )
                    )
        except Exception as error:  # one file; the words of the error may hold its name
            yield error_row(identity, identity, f"the file {failure(error)}")
            continue
        split = split_of_folders(relative)
        yield from (made | {"split": made["split"] or split} for made in rows)
