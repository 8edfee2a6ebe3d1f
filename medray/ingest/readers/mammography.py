"""CBIS-DDSM case descriptions (Lee et al., Scientific Data 2017) and its images, in each of the layouts
people have.

The tables name an image "Mass-Training_P_00001_LEFT_CC/<study UID>/<series UID>/000000.dcm" (the crop and the
mask of the first
abnormality: "Mass-Training_P_00001_LEFT_CC_1/..."). The first downloads lie like that. In later ones the
files have other names (1-1.dcm), the NBIA Data Retriever's descriptive folders are
"<name>/07-20-2016-DDSM-NA-74994/1.000000-full mammogram images-24515", tools that fetch by series write
"<series UID>/1-1.dcm", and Kaggle's JPEGs (awsaf49) are "jpeg/<series UID>/1-172.jpg". So a series is looked
for and not a file.

Which of an abnormality's two files is the crop and which the mask is not told by their order, by the names of
the series or by the tables, which all exchange them in some cases; but a mask is as large as its mammogram,
and a crop is smaller.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator
from math import inf
from typing import Any

from PIL import Image

from medray.data.attribute_vocabularies import VALUES
from medray.errors import BadRecord
from medray.images.decoding import ImageError
from medray.ingest.readers.common import IMAGE_SUFFIXES, Place, Row, inside, mcq, need_text, row
from medray.stable_draws import digest

"""The closed sets that a multiple-choice question offers, in the order of its letters."""

_SHAPES = ("mass_shape", "mass_margins", "calc_type", "calc_distribution")
# The column, or its other spelling in the mass files.
_PLAIN = {
    "breast_density": ("breast density", "breast_density"),
    "assessment": ("assessment",),
    "subtlety": ("subtlety",),
    "laterality": ("left or right breast",),
    "view": ("image view",),
}


def cbis_ddsm(record: dict[str, Any], place: Place) -> Iterator[Row]:
    """One abnormality of mass_ or calc_case_description_{train,test}_set.csv: its attributes, a caption of
    them and a multiple-choice question for each attribute with one value.

    The image is the crop where there is one, else the full mammogram, which may show other abnormalities too.
    Ids come from the table, so that they are the same in every layout. Quirks: paths end in a line feed;
    values are joined by "-"; N/A; LUCENT_CENTER for LUCENT_CENTERED; the benign without callback are benign.
    """
    kind = need_text(record, "abnormality type").lower()
    pathology = need_text(record, "pathology").lower().replace("_", " ").removesuffix(" without callback")
    values = {name: _values(record.get(name.replace("_", " "))) for name in _SHAPES}
    values |= {"abnormality_type": [kind], "pathology": [pathology]}
    for name in ("abnormality_type", "pathology"):
        if values[name][0] not in VALUES[name]:
            raise BadRecord(
                f"{name.replace('_', ' ')} is {values[name][0]!r}; allowed values: {', '.join(VALUES[name])}"
            )
    named = {name: " and ".join(found) for name, found in values.items() if found}
    plain = {
        name: next(
            (str(record[c]).strip().lower() for c in columns if str(record.get(c) or "").strip()), None
        )
        for name, columns in _PLAIN.items()
    }
    common = {"group_id": digest(need_text(record, "patient_id")), "modality": "mammography"}
    written, file = _image(record, place)
    image_id = f"cbis-{digest(posixpath.splitext(written)[0])}"
    sample = f"{image_id}/{need_text(record, 'abnormality id')}"
    yield row(
        f"{sample}/attributes",
        image_id,
        file,
        {"attributes": named | {name: value for name, value in plain.items() if value}},
        **common,
    )
    caption = [
        *(f"{named[name]} {name.replace('_', ' ')}" for name in _SHAPES if name in named),
        kind,
        pathology,
    ]
    yield row(f"{sample}/caption", image_id, file, {"caption": ", ".join(caption), "context": None}, **common)
    for name, found in values.items():
        if len(found) == 1 and found[0] in VALUES[name]:
            payload = mcq(
                f"What is the {name.replace('_', ' ')}?", VALUES[name], VALUES[name].index(found[0]), name
            )
            yield row(f"{sample}/mcq/{name}", image_id, file, payload, **common)


def _values(field: Any) -> list[str]:
    """The values of a field that joins several by "-": ["irregular", "spiculated"]; [] for none."""
    text = str(field or "").strip().lower()
    if text in ("", "n/a", "nan"):
        return []
    words = [part.replace("_", " ").strip() for part in text.split("-")]
    return list(dict.fromkeys("lucent centered" if w == "lucent center" else w for w in words if w))


def _image(record: dict[str, Any], place: Place) -> tuple[str, str]:
    """(path in the table, image_file) of the crop where there is one, else of the full mammogram.

    Raises BadRecord where there is neither. No message holds a path: it begins with the patient's number.
    """
    need_text(record, "image file path")
    full, crop, mask = (
        _written(record, field)
        for field in ("image file path", "cropped image file path", "ROI mask file path")
    )
    mammograms, crops = _files(place, full), _files(place, crop)
    if crops:
        pixels = {file: _pixels(place, file) for file in dict.fromkeys([*crops, *_files(place, mask)])}
        smallest = min(pixels, key=pixels.__getitem__)
        # One alone, or beside one that cannot be read, may be the mask.
        known = len(pixels) > 1 and inf not in pixels.values()
        if known or not mammograms or pixels[smallest] < _pixels(place, mammograms[0]):
            return crop, _framed(smallest)
    if not mammograms:
        raise BadRecord(
            "neither its crop nor its mammogram is there; name the folder of the Mass-... folders, or of "
            "jpeg/, with data.images"
        )
    return full, _framed(mammograms[0])


def _written(record: dict[str, Any], field: str) -> str:
    """The path in a table's field; "" for none."""
    return str(record.get(field) or "").strip().strip('"').strip()


def _files(place: Place, path: str) -> list[str]:
    """The file that a path of the table names (also as PNG or JPEG, which many convert to), else the
    images of its series.
    """
    if not path:
        return []
    relative = posixpath.normpath(path.replace("\\", "/"))
    try:
        folder, name = posixpath.split(inside(place.images, relative))
    except BadRecord:
        raise BadRecord("an image's path leads out of the image folder") from None
    there = place.names(folder)
    found = next(
        (
            other
            for other in (name, *(posixpath.splitext(name)[0] + suffix for suffix in (".png", ".jpg")))
            if other in there
        ),
        None,
    )
    if found is not None:
        return [posixpath.join(folder, found)]
    parts = relative.split("/")
    if len(parts) < 3:
        return []
    for of_series in (
        folder,
        posixpath.join(place.images, "jpeg", parts[-2]),
        posixpath.join(place.images, parts[-2]),
    ):
        images = _images_in(place, of_series)
        if images:
            return images
    # Folders with names of their own, one for the study and in it one for the series.
    studies = _below(place, [posixpath.join(place.images, parts[0])])
    return [file for of_series in _below(place, studies) for file in _images_in(place, of_series)]


def _below(place: Place, folders: list[str]) -> list[str]:
    return [posixpath.join(folder, name) for folder in folders for name in place.names(folder)]


def _images_in(place: Place, folder: str) -> list[str]:
    return [file for file in _below(place, [folder]) if file.lower().endswith((".dcm", *IMAGE_SUFFIXES))]


def _framed(file: str) -> str:
    return f"{file}#frame=0" if file.lower().endswith(".dcm") else file


def _pixels(place: Place, file: str) -> float:
    """Width times height by the file's header; infinite where it cannot be read."""
    try:
        if file.lower().endswith(".dcm"):
            from medray.images.dicom import dimensions

            width, height = dimensions(place.head(file))
        else:
            with Image.open(io.BytesIO(place.head(file))) as image:
                width, height = image.size
    except (ImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return inf
    return width * height
