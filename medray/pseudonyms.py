"""Show paths without patients' numbers: parts that look like one are replaced by a hash.

Paths of medical images often hold the patient: p10000032/s50414267/1.jpg, sub-01/anat.png, DOE^JANE/1.dcm.
Errors and the quarantine name the row of the source as it is, and the image's path with these parts replaced,
the same part always by the same hash. Under MEDRAY_PATIENT_KEY the hashes are keyed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import posixpath
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from medray.errors import ConfigError

KEY_VARIABLE = "MEDRAY_PATIENT_KEY"
LONGEST_SHOWN = 200  # characters of a path or a value in a message

# A word for a person with a number, a date, a number of five digits or more. The word must stand alone:
# xmlab12 stays.
_WORD = r"patients?|subjects?|subj|sub|pat|pt|pid|mrn|person|case|p|s"
_IDENTITY = re.compile(
    rf"(?<![a-z])(?:{_WORD})[-_ ]?(?:id[-_ ]?)?\d+|\d{{4}}[-._]\d{{2}}[-._]\d{{2}}(?!\d)|\d{{5,}}",
    re.IGNORECASE,
)
_PATIENT_FIELDS = frozenset(
    (
        "patientid",
        "patient",
        "patientname",
        "patientnumber",
        "patno",
        "subjectid",
        "subject",
        "mrn",
        "medicalrecordnumber",
        "personid",
        "accessionnumber",
        "accession",
    )
)
_NO_UNICODE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BLOB = re.compile(r"[A-Za-z0-9+/=_%-]{80,}")


def patient_key(environ: Mapping[str, str] = os.environ) -> bytes | None:
    """The secret of MEDRAY_PATIENT_KEY, or None. Read it once on the driver and hand it on: every worker must
    use the same.

    Raises ConfigError where it is shorter than 16 characters: ids could then be found by trying keys.
    """
    value = environ.get(KEY_VARIABLE)
    if not value:
        return None
    if len(value) < 16:
        raise ConfigError(
            f"{KEY_VARIABLE} is shorter than 16 characters; make one with: python -c 'import secrets; "
            "print(secrets.token_hex(32))'"
        )
    return value.encode()


def pseudonym(text: str, key: bytes | None) -> str:
    """16 hex digits of HMAC-SHA256 under the key; without a key of plain SHA-256, which anyone can check
    who guesses the text.
    """
    data = text.encode("utf-8", "surrogatepass")
    digest = hmac.digest(key, data, "sha256") if key else hashlib.sha256(data).digest()
    return digest.hex()[:16]


def patients_of(record: Any) -> list[str]:
    """The values of a record's fields that are named after a patient (patient_id, PatientID, subject_id,
    MRN, ...).
    """
    if not isinstance(record, Mapping):
        return []
    named = (value for field, value in record.items() if _names_a_patient(str(field)))
    values = [str(value).strip() for value in named if isinstance(value, str | int)]
    return [value for value in values if len(value) > 1]


@lru_cache(4096)
def _names_a_patient(field: str) -> bool:
    return re.sub(r"[^a-z]", "", field.lower()) in _PATIENT_FIELDS


def _may_hold(path: str, name: str) -> bool:
    """False only where the pattern of `name` cannot match; letters outside ASCII have cases that `lower`
    does not unite.
    """
    return not (path + name).isascii() or name.lower() in path.lower()


@lru_cache(256)  # rows of one patient come together
def _hidden_parts(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join([*map(re.escape, names), _IDENTITY.pattern]), re.IGNORECASE)


def shown_path(path: str, patients: Iterable[str] = (), key: bytes | None = None) -> str:
    """A path for a message: what may be a patient's number or name becomes "id-" and 8 hex digits.

    That is: `patients` wherever they stand, names as DICOM writes them (DOE^JANE), dates, numbers of five
    digits or more, and numbers after a word for a person (p10, sub-01, patient_7).
    """

    def hidden(match: re.Match[str]) -> str:
        return f"id-{pseudonym(match[0], key)[:8]}"

    names = sorted((name for name in patients if name and _may_hold(path, name)), key=len, reverse=True)
    own = _hidden_parts(tuple(names))
    parts = [
        hidden(re.fullmatch(".*", part, re.DOTALL)) if "^" in part else own.sub(hidden, part)
        for part in path.split("/")
    ]
    return shortened("/".join(parts))


def shortened(text: str, most: int = LONGEST_SHOWN) -> str:
    """A text for a message: at most `most` characters, without control characters, and with base64 and
    the like cut.
    """
    text = _CONTROL.sub("?", _NO_UNICODE.sub("?", text[: 20 * most]))
    text = _BLOB.sub(lambda match: f"{match[0][:16]}...", text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def file_name(path: str) -> str:
    """The name of a file for a message."""
    return shown_path(posixpath.basename(path))
