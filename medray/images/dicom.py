"""DICOM files: index rows without identities, and single frames as 8-bit PNG (pure, no Ray).

Nothing that names a patient leaves this module: tags are read from a short list, coded values are compared
with closed vocabularies, ids are hashes, and the words of pydicom's errors and warnings, which quote tags,
are never passed on. What is burned into the pixels cannot be taken out here; `warnings_of` names the files to
look at.

Standard: DICOM PS3.16 Annex L (body parts); `dicom_pixels` for what pixels mean.
Pillow decodes JPEG Baseline and JPEG 2000, pydicom RLE; JPEG Lossless, JPEG-LS and 12-bit JPEG need `pip
install 'medray[dicom]'`.
"""

from __future__ import annotations

import io
import json
import logging
import posixpath
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import get_decoder

from medray.config import DataConfig
from medray.images.decoding import ImageError, check_size
from medray.images.dicom_pixels import OTHER_COLOUR_SPACE, render
from medray.pseudonyms import pseudonym

# pydicom logs and warns with the values of tags in its words.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

MAX_FRAMES = 65_536  # a few bytes can claim two thousand million frames, and each would become a row

# Modality (0008,0060): the codes of pictures, in words; None where the code does not say what is shown.
MODALITIES: dict[str, str | None] = {
    "CR": "x-ray",
    "DX": "x-ray",
    "RG": "x-ray",
    "MG": "mammography",
    "IO": "dental x-ray",
    "PX": "dental x-ray",
    "RF": "fluoroscopy",
    "XA": "angiography",
    "CT": "ct",
    "MR": "mri",
    "PT": "pet",
    "NM": "nuclear medicine",
    "US": "ultrasound",
    "IVUS": "ultrasound",
    "ES": "endoscopy",
    "GM": "microscopy",
    "SM": "microscopy",
    "DMS": "dermoscopy",
    "OP": "fundus photography",
    "OPT": "oct",
    "OCT": "oct",
    "IVOCT": "oct",
    "XC": "photograph",
    "TG": "thermography",
    "BMD": "bone densitometry",
    "OT": None,
}
# pixels, if any, are masks or doses
NO_PICTURES = ("SEG", "RTDOSE", "RWV", "REG", "SR", "PR", "KO", "RTPLAN", "RTSTRUCT")
_BODY_PARTS = """
    ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BILEDUCT BLADDER BRAIN BREAST BRONCHUS
    BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS
    CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS
    EXTREMITY EYE EYELID FACE FEMUR FIBULA FINGER FOOT FOREARM GALLBLADDER HAND HEAD HEADNECK HEART HIP
    HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER LSPINE LSSPINE LUNG MAXILLA
    MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV NOSE ORBIT OVARY PANCREAS PAROTID
    PATELLA PELVIS PENIS PHARYNX PROSTATE RADIUS RADIUSULNA RECTUM RETINA RIB SCALP SCAPULA SCLERA SCROTUM
    SHOULDER SINUS SKIN SKULL SPINE SPLEEN SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THORAX THUMB
    THYMUS THYROID TIBIA TIBIAFIBULA TLSPINE TMJ TOE TONGUE TRACHEA TSPINE ULNA URETER URETHRA UTERUS
    VAGINA VULVA WHOLEBODY WRIST ZYGOMA
"""
_VIEWS = (
    "AP PA LL RL LLD RLD LLO RLO LAO RAO LPO RPO LAT LATERAL OBLIQUE AXIAL MLO CC ML LM LMO XCCL XCCM CV AT"
)
# Coded tags that may become attributes, with every value they may take there. A name typed into one of them
# is left out.
VOCABULARY: dict[str, frozenset[str]] = {
    "Modality": frozenset(MODALITIES),
    "BodyPartExamined": frozenset(_BODY_PARTS.split()),
    "ViewPosition": frozenset(_VIEWS.split()),
    "Laterality": frozenset("RLBU"),
    "ImageLaterality": frozenset("RLBU"),
    "PhotometricInterpretation": frozenset(
        (
            "MONOCHROME1",
            "MONOCHROME2",
            "RGB",
            "PALETTE COLOR",
            "YBR_FULL",
            "YBR_FULL_422",
            "YBR_ICT",
            "YBR_RCT",
            "YBR_PARTIAL_420",
            "YBR_PARTIAL_422",
        )
    ),
}
# Modalities whose pictures usually carry text (names too) drawn into the pixels.
USUALLY_BURNED_IN = ("US", "IVUS", "SC", "OT", "XC", "ES", "GM", "OP", "XA", "RF")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# What sites type into PatientID in place of an id: it would make one patient of everybody.
NO_PATIENT = frozenset(
    (
        "",
        "0",
        "anon",
        "anonymous",
        "anonymized",
        "anonymised",
        "unknown",
        "none",
        "na",
        "n/a",
        "noid",
        "no id",
    )
)

_SHAPE_TAGS = ["Rows", "Columns", "NumberOfFrames", "Modality"]
_WARNING_TAGS = ["BurnedInAnnotation", "RecognizableVisualFeatures", "Modality", "SOPClassUID"]
_FRAME_TAGS = [
    *_SHAPE_TAGS,
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *(
        f"{colour}PaletteColorLookupTable{part}"
        for colour in ("Red", "Green", "Blue")
        for part in ("Descriptor", "Data")
    ),
]
_PIXEL_TAGS = ["PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
_NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
_ONE_SAMPLE = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.JPEG2000MCLossless, uid.JPEG2000MC)
_EXTRA = "pip install 'medray[dicom]' adds JPEG Lossless, JPEG-LS and 12-bit JPEG"
# pydicom's plugins in the order they are tried. Not gdcm: a damaged JPEG makes it abort the whole process, so
# nothing could be quarantined.
_PLUGINS = ("pydicom", "pillow", "pylibjpeg", "pyjpegls")


T = TypeVar("T")


def _quietly(what: str, fix: str, read: Callable[..., T], *args: Any) -> T:
    """What `read` returns, with pydicom kept from speaking: its warnings and errors quote tags. What it
    raises becomes an ImageError with the error's class alone, raised outside the handler so that no chain
    leads back to its words.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(*args)
        except ImageError:
            raise
        except Exception as error:  # a damaged file makes pydicom raise anything; the row is quarantined
            failed = type(error).__name__
    raise ImageError(f"{what} cannot be read ({failed}){fix}")


def file_id(relative: str, key: bytes | None = None) -> str:
    """The id under which a file stands in rows and reports: "dcm-" and a hash of its path below the source.

    With a key the hash is keyed, since paths often hold patients' numbers.
    """
    return "dcm-" + pseudonym(relative, key)


def _read(data: bytes, tags: list[str], pixels: bool = False) -> Dataset:
    """The named tags of a DICOM file, up to its pixels or with them. Call it inside `_quietly`."""
    if data[128:132] != b"DICM":
        raise ImageError("no DICOM file: the mark DICM at byte 128 is missing")
    buffer = io.BytesIO(data)
    read_preamble(buffer, force=False)
    meta = read_dataset(
        buffer, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2
    )
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        # pydicom would inflate all of it at once, and a small file can inflate to any size.
        raise ImageError(
            "its transfer syntax is Deflated Explicit VR Little Endian; convert the file to an uncompressed "
            "one"
        )
    buffer.seek(0)
    return dcmread(buffer, stop_before_pixels=not pixels, specific_tags=tags)


def _check_picture(header: Dataset) -> int:
    """Frames of the picture. Raises ImageError where the file holds none."""
    modality = str(header.get("Modality") or "").strip().upper()
    if modality in NO_PICTURES:
        raise ImageError(f"modality {modality} holds no picture")
    if not header.get("Rows") or not header.get("Columns"):
        raise ImageError("holds no picture: Rows or Columns is missing (or the file is cut off)")
    frames = int(header.get("NumberOfFrames") or 1)
    if not 1 <= frames <= MAX_FRAMES:
        raise ImageError(f"claims less than 1 or more than {MAX_FRAMES} frames")
    return frames


def index_rows(path: str, relative: str, data: bytes, key: bytes | None = None) -> Iterator[dict[str, Any]]:
    """INDEX rows of one file, one per frame, from its header alone.

    Args:
        path: where the file is; goes into image_file as "path#frame=N" (N from 0), and nowhere else.
        relative: the path below the source, the same on every machine. Ids come from it.
        data: the file's bytes, or its beginning up to the pixels.
        key: secret of the pseudonyms (`patient_key`). With it group_id is a keyed hash of PatientID (where
            that is empty or a stand-in such as "ANONYMOUS", of StudyInstanceUID), which cannot be found by
            trying ids. Without it no patient tag is read: group_id is the SHA-256 of the file's folder, so
            splits go by folder, and files of one patient in two folders may be spread.

    `where` is the file's id, not its name: names often hold patients' names or numbers. A file that cannot be
    used gives one row with `error`, which quotes no tag.
    """
    key = key or None
    identity = file_id(relative, key)
    row = {
        "image": None,
        "split": None,
        "group_id": None,
        "modality": None,
        "payload": "{}",
        "where": identity,
        "error": None,
    }
    try:
        frames, facts = _quietly("the header", "", _facts, data, relative, key)
    except ImageError as error:
        yield {
            "sample_id": identity,
            "image_id": identity,
            "image_file": f"{path}#frame=0",
            **row,
            "error": str(error),
        }
        return
    for frame in range(frames):
        name = identity if frames == 1 else f"{identity}/f{frame:04d}"
        yield {"sample_id": name, "image_id": name, "image_file": f"{path}#frame={frame}", **row, **facts}


def _facts(data: bytes, relative: str, key: bytes | None) -> tuple[int, dict[str, Any]]:
    header = _read(data, [*_SHAPE_TAGS, *VOCABULARY, *(["PatientID", "StudyInstanceUID"] if key else [])])
    attributes = _attributes(header)
    return _check_picture(header), {
        "group_id": _group(header, relative, key),
        "modality": MODALITIES.get(attributes.get("Modality", "")),
        "payload": json.dumps({"attributes": attributes} if attributes else {}),
    }


def _attributes(header: Dataset) -> dict[str, str]:
    """Coded tags whose value is in the vocabulary, under their keyword; the word that goes out is the
    vocabulary's.
    """
    found = {}
    for name, words in VOCABULARY.items():
        value = str(header.get(name) or "").strip().upper()
        if name == "BodyPartExamined":
            value = value.replace(" ", "").replace("_", "")
        if value in words:
            found["Laterality" if name == "ImageLaterality" else name] = value
    return found


def _group(header: Dataset, relative: str, key: bytes | None) -> str:
    folder = posixpath.dirname(relative)
    if key is None:
        return pseudonym(folder, None)
    patient = str(header.get("PatientID") or "").strip()
    if patient.casefold() not in NO_PATIENT:
        return pseudonym(f"patient:{patient}", key)
    study = str(header.get("StudyInstanceUID") or "").strip()
    return pseudonym(f"study:{study}" if study else f"folder:{folder}", key)


def dimensions(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels by a file's header, which its beginning is enough for. Raises ImageError
    where it holds no picture.
    """
    return _quietly("the header", "", _dimensions, data)


def _dimensions(data: bytes) -> tuple[int, int]:
    header = _read(data, _SHAPE_TAGS)
    _check_picture(header)
    return int(header.Columns), int(header.Rows)


def warnings_of(data: bytes) -> list[str]:
    """Categories of what may still show a person in a file's pixels, to be counted; [] for a file that
    cannot be read.
    """
    try:
        return _quietly("the header", "", _warnings, data)
    except ImageError:
        return []


def _warnings(data: bytes) -> list[str]:
    header = _read(data, _WARNING_TAGS)
    burned_in = burned_in_warning(header)
    recognizable = str(header.get("RecognizableVisualFeatures") or "").strip().upper() == "YES"
    return [*([burned_in] if burned_in else []), *(["recognizable-features"] if recognizable else [])]


def burned_in_warning(dataset: Dataset) -> str | None:
    """ "burned-in-text" where BurnedInAnnotation says so, "burned-in-text-likely" where it says nothing
    and the modality (or a secondary capture) usually carries text, else None.
    """
    declared = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    if declared in ("YES", "NO"):
        return "burned-in-text" if declared == "YES" else None
    usual = str(dataset.get("Modality") or "").strip().upper() in USUALLY_BURNED_IN
    return (
        "burned-in-text-likely"
        if usual or str(dataset.get("SOPClassUID") or "").startswith(SECONDARY_CAPTURE)
        else None
    )


def other_frames_of(data: bytes) -> list[str]:
    """["first-frame-of-DICOM"] for a file of several frames, to be counted if one is read; else []."""
    try:
        return ["first-frame-of-DICOM"] if _quietly("the header", "", _frames, data) > 1 else []
    except ImageError:
        return []


def _frames(data: bytes) -> int:
    return _check_picture(_read(data, _SHAPE_TAGS))


def frame_png(data: bytes, frame: int, limits: DataConfig) -> bytes:
    """One frame (from 0) as an 8-bit grey or RGB PNG without metadata.

    Grey values go through the modality LUT or rescale slope and intercept, then the VOI LUT or the first
    window; a file with neither is spread between its 0.5 and 99.5 percentiles (without padding) if it has
    more than 8 bits, and else taken as it is. MONOCHROME1 is inverted, padding is black. Size limits are
    checked on the header and on a compressed frame's own header, before decoding.

    Raises ImageError with a reason that quotes no tag but sizes and the transfer syntax's name.
    """
    if len(data) > limits.max_image_bytes:
        raise ImageError(
            f"image file of {len(data)} bytes is over data.max_image_bytes {limits.max_image_bytes}"
        )
    header, syntax = _quietly("the header", "", _frame_header, data, frame, limits)
    stored, photometric = _decode(data, frame, syntax)
    picture = _quietly(
        "a tag that turns stored values into grey or colour (rescale, window, LUT, palette)",
        "",
        render,
        stored,
        photometric,
        header,
        frame,
    )
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def _frame_header(data: bytes, frame: int, limits: DataConfig) -> tuple[Dataset, uid.UID]:
    header = _read(data, _FRAME_TAGS)
    frames = _check_picture(header)
    if not 0 <= frame < frames:
        raise ImageError(f"frame {frame} was asked for; the file has {frames}")
    check_size((int(header.Columns), int(header.Rows)), limits)
    for name in (
        "BitsAllocated",
        "BitsStored",
        "SamplesPerPixel",
        "PixelRepresentation",
        "PhotometricInterpretation",
    ):
        if header.get(name) in (None, ""):
            raise ImageError(f"{name} is missing")
    if int(header.BitsAllocated) not in (8, 16, 32) or int(header.SamplesPerPixel) not in (1, 3):
        raise ImageError("BitsAllocated must be 8, 16 or 32 and SamplesPerPixel 1 or 3")
    if str(header.PhotometricInterpretation) not in VOCABULARY["PhotometricInterpretation"]:
        raise ImageError(OTHER_COLOUR_SPACE)
    if (int(header.SamplesPerPixel) == 1) != (str(header.PhotometricInterpretation) in _ONE_SAMPLE):
        raise ImageError("PhotometricInterpretation and SamplesPerPixel contradict each other")
    syntax = uid.UID(str(header.file_meta.get("TransferSyntaxUID") or _guessed_syntax(header)))
    _check_bits(header, syntax)
    return header, syntax


def _guessed_syntax(header: Dataset) -> str:
    """The transfer syntax of a file whose meta group does not name it. pydicom has found out how the tags
    are written; the pixels are then taken as uncompressed, and `_with_pixels` refuses those that are not.
    """
    implicit, little = header.original_encoding
    if not little:
        return uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian


def _check_bits(header: Dataset, syntax: uid.UID) -> None:
    """Raises ImageError where the bits of a value cannot be where the header says."""
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    high = _high_bit(header)
    if not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
        raise ImageError(
            f"BitsAllocated {allocated}, BitsStored {stored} and HighBit {high} contradict each other"
        )
    if high != stored - 1 and syntax not in _NATIVE and syntax != uid.RLELossless:
        raise ImageError(
            f"HighBit is {high} where BitsStored is {stored}, in compressed pixels; convert the file"
        )
    if int(header.SamplesPerPixel) == 3 and header.get("PlanarConfiguration", 0) not in (0, 1, None):
        raise ImageError("PlanarConfiguration must be 0 or 1")


def _high_bit(header: Dataset) -> int:
    high = header.get("HighBit")
    return int(header.BitsStored) - 1 if high is None else int(high)


def _decode(data: bytes, frame: int, syntax: uid.UID) -> tuple[np.ndarray, str]:
    """Stored values [rows, columns] or [rows, columns, 3], and their photometric interpretation (YBR has
    become RGB).
    """
    known = syntax.is_transfer_syntax and not syntax.is_private  # else its text could be anything
    try:
        decoder = get_decoder(syntax) if known else None
    except NotImplementedError:
        decoder = None
    if decoder is None:
        raise ImageError(
            f"{syntax.name if known else 'an unknown transfer syntax'} cannot be decoded; convert the file"
        )
    plugins = (
        [name for name in _PLUGINS if name in decoder.available_plugins] if syntax.is_encapsulated else [""]
    )
    if not plugins:
        raise ImageError(f"no decoder for {syntax.name} is installed; {_EXTRA}")
    dataset = _quietly("the pixels", "", _with_pixels, data, frame, syntax)
    shift = _high_bit(dataset) + 1 - int(dataset.BitsStored)
    if shift:  # values in the upper bits, as before 2000: decoded with the bits below them, which go then
        dataset.BitsStored = int(dataset.BitsStored) + shift
    fix = "; the file may be damaged" + (
        "" if syntax in _NATIVE or syntax == uid.RLELossless else f", or need another decoder: {_EXTRA}"
    )
    for plugin in plugins:  # one may lack what the next can do: Pillow has no 12-bit JPEG
        try:
            stored, properties = _quietly(
                f"pixels in {syntax.name}",
                fix,
                partial(decoder.as_array, dataset, index=frame, decoding_plugin=plugin),
            )
            return stored >> shift if shift else stored, str(properties["photometric_interpretation"])
        except ImageError as error:
            reason = str(error)
    raise ImageError(reason)


def _with_pixels(data: bytes, frame: int, syntax: uid.UID) -> Dataset:
    dataset = _read(data, [*_FRAME_TAGS, *_PIXEL_TAGS], pixels=True)
    if "PixelData" not in dataset:
        raise ImageError("PixelData is missing, or the file is cut off before its end")
    if int(dataset.SamplesPerPixel) == 3 and dataset.get("PlanarConfiguration") is None:
        dataset.PlanarConfiguration = 0  # colour by pixel, as nearly every file has it
    if dataset["PixelData"].is_undefined_length and not syntax.is_encapsulated:
        raise ImageError(
            "its pixels are compressed, and TransferSyntaxUID does not say how; convert the file"
        )
    if syntax in _NATIVE:
        _check_length(dataset)
    elif syntax != uid.RLELossless:  # RLE claims no size of its own: pydicom fills the header's
        encoded = _check_codestream(dataset, frame)
        if syntax in _JPEG_2000 and int(dataset.SamplesPerPixel) == 3 and _has_colour_transform(encoded):
            # The decoder gives RGB then, whatever the tag says: some writers leave the space before
            # compression there.
            dataset.PhotometricInterpretation = "RGB"
    return dataset


def _check_length(dataset: Dataset) -> None:
    samples = (
        int(dataset.Rows)
        * int(dataset.Columns)
        * int(dataset.SamplesPerPixel)
        * int(dataset.get("NumberOfFrames") or 1)
    )
    wanted = samples * int(dataset.BitsAllocated) // 8
    if str(dataset.PhotometricInterpretation) == "YBR_FULL_422":
        wanted = wanted * 2 // 3  # two pixels share their colour
    if len(dataset.PixelData) < wanted:
        raise ImageError(
            f"the file is cut off: {len(dataset.PixelData)} bytes of pixels, {wanted} are needed"
        )


def _has_colour_transform(frame: bytes) -> bool:
    """Whether a JPEG 2000 stream says that its colours are transformed from RGB (COD, T.800 A.6.1)."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 2**16)
    at = start + 2
    # SOT: the pixels
    while start >= 0 and at + 9 <= len(frame) and frame[at] == 0xFF and frame[at + 1] != 0x90:
        if frame[at + 1] == 0x52:
            return frame[at + 8] == 1
        at += 2 + int.from_bytes(frame[at + 2 : at + 4])
    return False


def _check_codestream(dataset: Dataset, frame: int) -> bytes:
    """The frame as it is stored. A compressed frame says its own size, and decoders believe it: it must
    be the size that passed the limits.
    """
    offsets = (
        (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
        if "ExtendedOffsetTable" in dataset
        else None
    )
    encoded = get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=int(dataset.get("NumberOfFrames") or 1),
        extended_offsets=offsets,
    )
    size = _codestream_size(encoded)
    if size is None:
        raise ImageError("the compressed frame has no readable header of its own")
    if size != (int(dataset.Columns), int(dataset.Rows)):
        raise ImageError(
            f"the compressed frame is {size[0]} x {size[1]} pixels, the file says {dataset.Columns} x "
            f"{dataset.Rows}"
        )
    return encoded


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(width, height) in the header of a JPEG or JPEG-LS (SOF, ITU T.81 B.2.2) or JPEG 2000 stream (SIZ,
    T.800 A.5.1).
    """
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack_from(">HH", frame, at + 5)
            return width, height
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4])  # 0xFF fills
    start = frame.find(b"\xff\x4f\xff\x51", 0, 2**16)  # bare, or inside a JP2 box
    if frame[:2] == b"\xff\xd8" or start < 0 or len(frame) < start + 24:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
    return right - left, bottom - top
