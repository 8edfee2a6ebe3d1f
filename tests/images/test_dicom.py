"""DICOM files made here: grey values worked out by hand, damaged files refused, and no identity in
anything that comes out.
"""

import hashlib
import importlib.util
import io
import json
import logging
import struct
import warnings

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, Sequence, config, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

from medray.config import DataConfig
from medray.errors import ConfigError
from medray.images.decoding import ImageError
from medray.images.dicom import file_id, frame_png, index_rows, warnings_of
from medray.pseudonyms import patient_key

LIMITS = DataConfig()
KEY = b"0123456789abcdef0123456789abcdef"
UNSAID = "1.2.826.0.1.3680043.10.1"  # a UID root for tests


def tagged(
    pixels, syntax=uid.ExplicitVRLittleEndian, frames=None, bits=None, photometric="MONOCHROME2", **tags
):
    """A data set around pixels [rows, columns], [frames, rows, columns] or [rows, columns, 3]."""
    pixels = np.asarray(pixels)
    colour = pixels.shape[-1] == 3 and photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"{UNSAID}.1"
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    if frames:
        dataset.NumberOfFrames = frames
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PhotometricInterpretation = photometric
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def saved(dataset):
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def encapsulated(dataset, streams, syntax):
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate(streams)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return saved(dataset)


def shown(data, frame=0):
    png = frame_png(data, frame, LIMITS)
    return np.asarray(Image.open(io.BytesIO(png)))


def table(values, first=0, bits=16, **tags):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), first, bits])
    item.add_new("LUTData", "OW", np.array(values, "<u2").tobytes())
    return Sequence([item])


def test_window_of_unsigned_16_bits():
    data = saved(
        tagged(
            np.array([[0, 900, 1000], [1050, 1100, 4000]], np.uint16),
            bits=12,
            WindowCenter=[1000.5, 40],
            WindowWidth=[201, 400],
        )
    )
    # LINEAR: (x - (1000.5 - 0.5)) / (201 - 1) + 0.5 = (x - 900) / 200
    assert shown(data).tolist() == [[0, 0, 128], [191, 255, 255]]


def test_other_window_functions():
    pixels = np.array([[900, 1000], [1050, 1100]], np.uint16)
    exact = saved(tagged(pixels, WindowCenter=1000, WindowWidth=200, VOILUTFunction="LINEAR_EXACT"))
    assert shown(exact).tolist() == [[0, 128], [191, 255]]  # (x - 1000) / 200 + 0.5
    sigmoid = saved(tagged(pixels, WindowCenter=1000, WindowWidth=200, VOILUTFunction="SIGMOID"))
    # 255 / (1 + exp(-4 (x - 1000) / 200)): e^2, e^0, e^-1, e^-2
    assert shown(sigmoid).tolist() == [[30, 128], [186, 225]]


def test_signed_ct_in_hounsfield_units():
    # Stored 0..2048 with slope 2 and intercept -1024: -1024, 0, 40, 240 HU; the soft-tissue window 40/401
    # begins at -160.5 + 0.5.
    data = saved(
        tagged(
            np.array([[0, 512], [532, 632]], np.int16),
            RescaleSlope=2,
            RescaleIntercept=-1024,
            WindowCenter=40.5,
            WindowWidth=401,
        )
    )
    assert shown(data).tolist() == [[0, 102], [128, 255]]  # (x + 160) / 400 * 255
    negative = saved(
        tagged(np.array([[-1000, -160], [40, 240]], np.int16), WindowCenter=40.5, WindowWidth=401)
    )
    assert shown(negative).tolist() == [[0, 0], [128, 255]]


def test_monochrome1_is_inverted():
    data = saved(tagged(np.array([[0, 51], [204, 255]], np.uint8), photometric="MONOCHROME1"))
    assert shown(data).tolist() == [[255, 204], [51, 0]]


def test_eight_bits_without_a_window_stay_as_they_are():
    pixels = np.array([[7, 51], [204, 250]], np.uint8)
    assert shown(saved(tagged(pixels))).tolist() == pixels.tolist()
    assert shown(saved(tagged(pixels, RescaleSlope=3, RescaleIntercept=-5))).tolist() == pixels.tolist()


def test_percentiles_leave_padding_out():
    # 0..999 and a block of padding far below; numpy's 0.5 and 99.5 percentiles of 0..999 are 4.995 and
    # 994.005.
    pixels = np.concatenate([np.arange(1000), np.full(1000, -2000)]).astype(np.int16).reshape(40, 50)
    dataset = tagged(pixels)
    dataset.add_new("PixelPaddingValue", "US", 63536)  # -2000 written as unsigned, as many scanners do
    image = shown(saved(dataset)).reshape(-1)
    expected = ((np.arange(1000) - 4.995) / 989.01 * 255).clip(0, 255).round()
    assert np.array_equal(image[:1000], expected)
    assert not image[1000:].any()


def test_padding_of_an_inverted_image_is_black():
    dataset = tagged(np.array([[0, 51], [204, 255]], np.uint8), photometric="MONOCHROME1")
    dataset.add_new("PixelPaddingValue", "US", 0)
    assert shown(saved(dataset)).tolist() == [[0, 204], [51, 0]]


def test_flat_image_does_not_divide_by_zero():
    assert shown(saved(tagged(np.full((4, 4), 700, np.uint16)))).tolist() == [[0] * 4] * 4


def test_modality_and_voi_tables():
    pixels = np.array([[9, 10], [11, 60000]], np.uint16)
    voi = saved(
        tagged(pixels, VOILUTSequence=table([0, 4095, 1365], first=9, bits=12), WindowCenter=1, WindowWidth=2)
    )
    assert shown(voi).tolist() == [[0, 255], [85, 85]]  # beyond the table: its last entry
    both = saved(
        tagged(
            pixels, ModalityLUTSequence=table([100, 200, 300], first=9), WindowCenter=200.5, WindowWidth=201
        )
    )
    assert shown(both).tolist() == [[0, 128], [255, 255]]


def test_window_of_the_frames_own_functional_group():
    def group(centre):
        window, values = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, 201
        values.RescaleSlope, values.RescaleIntercept = 1, 100
        item = Dataset()
        item.FrameVOILUTSequence, item.PixelValueTransformationSequence = (
            Sequence([window]),
            Sequence([values]),
        )
        return item

    pixels = np.array([[[0, 100], [150, 200]]] * 2, np.uint16)
    data = saved(
        tagged(pixels, frames=2, PerFrameFunctionalGroupsSequence=Sequence([group(200.5), group(300.5)]))
    )
    assert shown(data, 0).tolist() == [[0, 128], [191, 255]]
    assert shown(data, 1).tolist() == [[0, 0], [64, 128]]


def test_multi_frame_rows_and_frames():
    pixels = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)
    data = saved(tagged(pixels, frames=3))
    rows = list(index_rows("/in/a/b.dcm", "a/b.dcm", data))
    identity = "dcm-" + hashlib.sha256(b"a/b.dcm").hexdigest()[:16]
    assert [row["sample_id"] for row in rows] == [f"{identity}/f{i:04d}" for i in range(3)]
    assert [row["image_file"] for row in rows] == [f"/in/a/b.dcm#frame={i}" for i in range(3)]
    assert shown(data, 2).tolist() == pixels[2].tolist()
    with pytest.raises(ImageError, match="frame 3 was asked for; the file has 3"):
        frame_png(data, 3, LIMITS)


def test_rgb_and_planes():
    pixels = np.random.RandomState(0).randint(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(shown(saved(tagged(pixels, photometric="RGB"))), pixels)
    planes = tagged(pixels, photometric="RGB", PlanarConfiguration=1)
    planes.PixelData = pixels.transpose(2, 0, 1).tobytes()
    assert np.array_equal(shown(saved(planes)), pixels)


def test_ybr_full():
    # R = Y + 1.402 (Cr - 128), G = Y - 0.344 (Cb - 128) - 0.714 (Cr - 128), B = Y + 1.772 (Cb - 128)
    data = saved(tagged(np.array([[[76, 85, 255], [128, 128, 128]]] * 2, np.uint8), photometric="YBR_FULL"))
    assert shown(data)[0].tolist() == [[254, 0, 0], [128, 128, 128]]


def test_ybr_full_422_shares_colour_between_neighbours():
    dataset = tagged(np.zeros((2, 2, 3), np.uint8), photometric="YBR_FULL_422")
    dataset.PixelData = bytes([76, 150, 128, 128] * 2)  # Y1 Y2 Cb Cr, two rows
    assert shown(saved(dataset)).tolist() == [[[76] * 3, [150] * 3]] * 2


def palette(dataset, red, green, blue, bits=16, first=0):
    for name, values in (("Red", red), ("Green", green), ("Blue", blue)):
        dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [len(values), first, bits])
        dataset.add_new(
            f"{name}PaletteColorLookupTableData",
            "OW",
            np.array(values, "<u2" if bits == 16 else np.uint8).tobytes(),
        )
    return dataset


def test_palette_colour():
    dataset = tagged(np.array([[4, 5], [6, 255]], np.uint8), photometric="PALETTE COLOR")
    data = saved(
        palette(dataset, [0, 65535, 257 * 10, 0], [0, 0, 257 * 20, 65535], [0, 0, 257 * 30, 65535], first=4)
    )
    assert shown(data).tolist() == [[[0, 0, 0], [255, 0, 0]], [[10, 20, 30], [0, 255, 255]]]


def test_palette_of_8_bit_entries_for_16_bit_pixels():
    ramp = np.arange(1024) // 4
    dataset = tagged(np.array([[0, 255], [256, 1023]], np.uint16), photometric="PALETTE COLOR")
    assert shown(saved(palette(dataset, ramp, ramp, ramp[::-1], bits=8))).tolist() == [
        [[0, 0, 255], [63, 63, 192]],
        [[64, 64, 191], [255, 255, 0]],
    ]


def test_rle():
    pixels = np.random.RandomState(1).randint(0, 4096, (17, 13)).astype(np.uint16)
    dataset = tagged(pixels, bits=12, WindowCenter=2048, WindowWidth=4096)
    plain = shown(saved(dataset))
    dataset.compress(uid.RLELossless)
    assert np.array_equal(shown(saved(dataset)), plain)


def test_jpeg_baseline_in_colour():
    y, x = np.mgrid[:32, :48]
    pixels = np.stack([x * 5, y * 7, 255 - x * 5], axis=-1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    data = encapsulated(tagged(pixels, photometric="YBR_FULL_422"), [stream.getvalue()], uid.JPEGBaseline8Bit)
    assert np.abs(shown(data).astype(int) - pixels).mean() < 3


def jpeg_lossless(pixels):
    """A 16-bit lossless JPEG (ITU T.81 annex H, predictor 1, all codes 5 bits long), as X-ray systems
    write it.
    """
    rows, columns = pixels.shape
    values, bits = pixels.astype(int), ""
    for row in range(rows):
        for column in range(columns):
            before = values[row, column - 1] if column else values[row - 1, 0] if row else 2**15
            difference = int((values[row, column] - before + 2**15) % 2**16 - 2**15)
            size = abs(difference).bit_length()
            bits += f"{size:05b}" + (
                f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}" if size else ""
            )
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = b"\xff\xc3" + struct.pack(">HBHHBBBB", 11, 16, rows, columns, 1, 1, 0x11, 0)
    huffman = b"\xff\xc4" + struct.pack(">HB", 36, 0) + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))
    return (
        b"\xff\xd8"
        + frame
        + huffman
        + b"\xff\xda"
        + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0)
        + scan
        + b"\xff\xd9"
    )


def test_jpeg_lossless_needs_the_extra():
    pixels = np.random.RandomState(2).randint(0, 30000, (9, 14)).astype(np.uint16)
    dataset = tagged(pixels, WindowCenter=15000, WindowWidth=30000)
    plain = shown(saved(dataset))
    data = encapsulated(dataset, [jpeg_lossless(pixels)], uid.JPEGLosslessSV1)
    if importlib.util.find_spec("libjpeg"):
        assert np.array_equal(shown(data), plain)
    else:
        with pytest.raises(ImageError, match=r"no decoder for JPEG Lossless.*pip install 'medray\[dicom\]'"):
            frame_png(data, 0, LIMITS)


def cut(dataset, at):
    return saved(dataset)[:at]


def bomb():
    dataset = tagged(np.zeros((2, 2), np.uint8))
    dataset.Rows = dataset.Columns = 65535
    return saved(dataset)


def jpeg_bomb():
    stream = io.BytesIO()
    Image.new("L", (300, 200)).save(stream, "JPEG")
    return encapsulated(tagged(np.zeros((8, 8), np.uint8)), [stream.getvalue()], uid.JPEGBaseline8Bit)


def deflated():
    return saved(tagged(np.zeros((8, 8), np.uint8), syntax=uid.DeflatedExplicitVRLittleEndian))


def grey():
    return np.arange(64, dtype=np.uint16).reshape(8, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no DICOM file"),
        (b"\x89PNG" + b"\0" * 400, "no DICOM file"),
        (cut(tagged(grey()), 200), "holds no picture|cannot be read"),
        (cut(tagged(grey()), -30), "the file is cut off: 98 bytes of pixels, 128 are needed"),
        (bomb(), "65535 x 65535 pixels is over data.max_image_pixels"),
        (jpeg_bomb(), "the compressed frame is 300 x 200 pixels, the file says 8 x 8"),
        (
            encapsulated(tagged(grey()), [b"no picture at all"], uid.JPEGBaseline8Bit),
            "no readable header of its own",
        ),
        (
            encapsulated(tagged(grey()), [b"\0" * 80], uid.RLELossless),
            "pixels in RLE Lossless cannot be read",
        ),
        (
            encapsulated(tagged(grey()), [b"\0\0\1\xb3" * 9], uid.MPEG2MPML),
            "MPEG2 Main Profile / Main Level cannot be decoded",
        ),
        (deflated(), "Deflated Explicit VR"),
        (saved(tagged(grey(), Modality="SEG")), "modality SEG holds no picture"),
        (saved(tagged(grey(), photometric="MONOCHROME7")), "PhotometricInterpretation is not one of"),
        (saved(tagged(grey(), SamplesPerPixel=4)), "SamplesPerPixel 1 or 3"),
    ],
    ids=[
        "empty",
        "png",
        "cut header",
        "cut pixels",
        "bomb",
        "jpeg bomb",
        "no stream",
        "bad rle",
        "video",
        "deflated",
        "mask",
        "colour space",
        "samples",
    ],
)
def test_refused_with_a_reason(data, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        frame_png(data, 0, LIMITS)
    assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_limits_of_bytes_and_frames():
    data = saved(tagged(grey()))
    with pytest.raises(ImageError, match="max_image_bytes 100"):
        frame_png(data, 0, DataConfig(max_image_bytes=100))
    rows = list(index_rows("x", "x", saved(tagged(grey(), frames=19750312))))
    assert len(rows) == 1 and "more than 65536 frames" in rows[0]["error"] and "1975" not in rows[0]["error"]


def test_index_row_in_full():
    data = saved(
        tagged(
            grey(),
            Modality="DX",
            BodyPartExamined="CHEST_",
            ViewPosition="PA",
            ImageLaterality="L",
            PatientID="4711",
        )
    )
    (row,) = index_rows("/in/site/b.dcm", "site/b.dcm", data)
    identity = "dcm-" + hashlib.sha256(b"site/b.dcm").hexdigest()[:16]
    attributes = {
        "Modality": "DX",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "Laterality": "L",
        "PhotometricInterpretation": "MONOCHROME2",
    }
    assert row == {
        "sample_id": identity,
        "image_id": identity,
        "image_file": "/in/site/b.dcm#frame=0",
        "image": None,
        "split": None,
        "group_id": hashlib.sha256(b"site").hexdigest()[:16],
        "modality": "x-ray",
        "payload": json.dumps({"attributes": attributes}),
        "where": identity,
        "error": None,
    }
    # the header is enough
    assert list(index_rows("/in/site/b.dcm", "site/b.dcm", data[: data.index(b"\xe0\x7f\x10\x00")])) == [row]


def group_of(key, relative="a/b.dcm", **tags):
    (row,) = index_rows("x", relative, saved(tagged(grey(), **tags)), key)
    return row["group_id"]


def test_groups_are_patients_under_a_key():
    assert group_of(KEY, PatientID="4711") == group_of(KEY, "c/d.dcm", PatientID="4711 ")
    assert group_of(KEY, PatientID="4711") != group_of(KEY, PatientID="4712")
    assert group_of(KEY, PatientID="4711") != group_of(b"another key of enough bytes", PatientID="4711")
    assert group_of(KEY, PatientID="Anonymous", StudyInstanceUID="1.2.3") == group_of(
        KEY, "c/d.dcm", PatientID="", StudyInstanceUID="1.2.3"
    )
    assert group_of(KEY, PatientID="Anonymous", StudyInstanceUID="1.2.3") != group_of(
        KEY, PatientID="Anonymous", StudyInstanceUID="1.2.4"
    )
    assert group_of(KEY) == group_of(KEY, "a/other.dcm") != group_of(KEY, "c/d.dcm")
    for guess in ("4711", "patient:4711"):
        assert group_of(KEY, PatientID="4711") != hashlib.sha256(guess.encode()).hexdigest()[:16]


def test_without_a_key_groups_are_folders_and_no_patient_is_read():
    assert (
        group_of(None, PatientID="4711")
        == group_of(b"", "a/c.dcm", PatientID="9")
        == hashlib.sha256(b"a").hexdigest()[:16]
    )


def test_the_key_of_the_environment():
    assert patient_key({}) is None
    assert patient_key({"MEDRAY_PATIENT_KEY": "x" * 16}) == b"x" * 16
    with pytest.raises(ConfigError, match="MEDRAY_PATIENT_KEY is shorter than 16") as caught:
        patient_key({"MEDRAY_PATIENT_KEY": "geheim"})
    assert "geheim" not in str(caught.value)


def test_warnings():
    assert warnings_of(saved(tagged(grey(), Modality="CT"))) == []
    assert warnings_of(saved(tagged(grey(), Modality="US"))) == ["burned-in-text-likely"]
    assert warnings_of(saved(tagged(grey(), Modality="US", BurnedInAnnotation="NO"))) == []
    assert warnings_of(
        saved(tagged(grey(), Modality="CT", BurnedInAnnotation="YES", RecognizableVisualFeatures="YES"))
    ) == ["burned-in-text", "recognizable-features"]
    assert warnings_of(
        saved(tagged(grey(), Modality="CT", SOPClassUID=uid.SecondaryCaptureImageStorage))
    ) == ["burned-in-text-likely"]
    assert warnings_of(b"nothing") == []


IDENTITIES = {
    "PatientName": "Rossini^Giovanna",
    "PatientID": "MRN0815-4711",
    "PatientBirthDate": "19610203",
    "PatientAddress": "Via Larga 99",
    "OtherPatientNames": "Bianchini",
    "PatientMotherBirthName": "Verdiani",
    "ReferringPhysicianName": "Grigioni^Enzo",
    "OperatorsName": "Opmann",
    "PerformingPhysicianName": "Performi",
    "InstitutionName": "Ospedale Lungo",
    "InstitutionAddress": "Piazza 77",
    "StationName": "STATION66",
    "AccessionNumber": "ACC998877",
    "StudyID": "STUDY5544",
    "StudyDate": "20190807",
    "SeriesDate": "20190808",
    "ContentDate": "20190809",
    "AcquisitionDateTime": "20190810112233",
    "StudyTime": "112244",
    "StudyInstanceUID": f"{UNSAID}.777.1",
    "SeriesInstanceUID": f"{UNSAID}.777.2",
    "FrameOfReferenceUID": f"{UNSAID}.777.3",
    "SOPInstanceUID": f"{UNSAID}.777.4",
    "StudyDescription": "Verlauf Rossini",
    "PatientComments": "Nichte von Opmann",
    "DeviceSerialNumber": "SN445566",
    "PatientAge": "058Y",
    "PatientTelephoneNumbers": "0551234567",
    "ImageComments": "call Rossini",
    "ProtocolName": "Rossini spezial",
    "BodyPartExamined": "ROSSINI GIOVANNA",
    "ViewPosition": "ROSSINIPA",
    "ImageLaterality": "ROSSINIL",
    "Modality": "ROSSINIMOD",
}
SECRETS = sorted(
    {
        part.lower()
        for value in IDENTITIES.values()
        for part in (value, *value.replace("^", " ").split())
        if len(part) > 4
    }
    | {"rossini", "0815", "4711", "777"}
)


def identified(**changes):
    dataset = tagged(grey())
    for name, value in {**IDENTITIES, **changes}.items():
        setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = IDENTITIES["SOPInstanceUID"]
    dataset.private_block(0x0011, "Rossini Systems", create=True).add_new(1, "LO", "Rossini privat")
    request = Dataset()
    request.RequestingPhysician, request.RequestedProcedureDescription = "Grigioni^Enzo", "wie Rossini"
    dataset.RequestAttributesSequence = Sequence([request])
    return dataset


def mistyped(**changes):
    """The identified file with free text where a number or code belongs; pydicom's checks are off while
    it is written.
    """
    mode, config.settings.writing_validation_mode = config.settings.writing_validation_mode, config.IGNORE
    try:
        dataset = identified()
        for name, (vr, value) in changes.items():
            dataset.add_new(name, vr, value)
        with warnings.catch_warnings(action="ignore"):
            return saved(dataset)
    finally:
        config.settings.writing_validation_mode = mode


FILES = {
    "whole": lambda: saved(identified()),
    "cut header": lambda: saved(identified())[:700],
    "cut pixels": lambda: saved(identified())[:-20],
    "name as character set": lambda: mistyped(SpecificCharacterSet=("CS", "ROSSINI GIOVANNA")),
    "name as colour space": lambda: mistyped(PhotometricInterpretation=("CS", "ROSSINI")),
    "name as rows": lambda: mistyped(Rows=("LO", "Rossini")),
    "name as window": lambda: mistyped(WindowCenter=("LO", "Rossini"), WindowWidth=("LO", "4711")),
    "birth date as frames": lambda: mistyped(NumberOfFrames=("IS", "19610203")),
    "name as frames": lambda: mistyped(NumberOfFrames=("LO", "Rossini^Giovanna")),
    "name as uid": lambda: saved(identified()).replace(b"1.2.840.10008.1.2.1\0", b"Rossini^Giovanna...\0"),
    "name as window, bare": lambda: saved(identified(WindowCenter="1234.567", WindowWidth="1")).replace(
        b"1234.567", b"Rossini "
    ),
}


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
@pytest.mark.parametrize("name", FILES)
def test_no_identity_comes_out(name, key, caplog, capfd):
    data = FILES[name]()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        said = [json.dumps(row) for row in index_rows("/in/f.dcm", "a/f.dcm", data, key)] + warnings_of(data)
        try:
            said.append(frame_png(data, 0, LIMITS).decode("latin-1"))
        except ImageError as error:
            said.append(repr(error))
            assert error.__context__ is None and error.__cause__ is None
    everything = "\n".join(
        [*said, caplog.text, *capfd.readouterr(), *(str(w.message) for w in warned)]
    ).lower()
    assert said and not [secret for secret in SECRETS if secret in everything]


def test_the_identified_file_is_usable():
    (row,) = index_rows("/in/f.dcm", "a/f.dcm", FILES["whole"](), KEY)
    assert (row["modality"], row["error"]) == (None, None)
    assert json.loads(row["payload"]) == {"attributes": {"PhotometricInterpretation": "MONOCHROME2"}}
    assert row["sample_id"] == file_id("a/f.dcm", KEY) != file_id("a/f.dcm")


def test_the_png_holds_pixels_only():
    png = frame_png(FILES["whole"](), 0, LIMITS)
    kinds, at = [], 8
    while at < len(png):
        kinds.append(png[at + 4 : at + 8])
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


RAMP12 = np.tile(np.arange(0, 4096, 64, dtype=np.uint16), (8, 1))
# percentiles of 0, 64, ..., 4032 are its ends, almost
PLAIN12 = np.tile((np.arange(0, 4096, 64) / 4032 * 255).round(), (8, 1))


@pytest.mark.parametrize(
    ("pixels", "bits", "high"),
    [
        (RAMP12 << 4, 12, 15),
        (RAMP12 << 4 | 9, 12, 15),
        (RAMP12 | (np.arange(64, dtype=np.uint16) % 2 << 12), 12, 11),
        (((RAMP12.astype(np.int16) - 2048) << 4), 12, 15),
        ((RAMP12.astype(np.int16) - 2048) & 0xFFF, 12, 11),
        (RAMP12 << 2, 12, 13),
    ],
    ids=["left", "left-with-rubbish", "overlay-above", "signed-left", "signed-masked", "in-the-middle"],
)
def test_values_lie_where_high_bit_says(pixels, bits, high):
    """Values in the upper bits (before 2000), overlays in the unused bits (PS3.5 8.1.1): the values alone
    are shown.
    """
    plain = shown(saved(tagged(RAMP12, bits=12))).astype(int)
    assert np.abs(plain - PLAIN12).max() <= 2
    assert np.array_equal(shown(saved(tagged(pixels, bits=bits, HighBit=high))), plain)


def test_upper_bits_of_compressed_pixels_are_refused():
    stream = io.BytesIO()
    Image.fromarray(RAMP12).save(stream, "JPEG2000")
    data = encapsulated(tagged(RAMP12, bits=12, HighBit=15), [stream.getvalue()], uid.JPEG2000Lossless)
    with pytest.raises(ImageError, match="HighBit is 15 where BitsStored is 12"):
        shown(data)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"BitsStored": 20}, "contradict each other"),
        ({"HighBit": 5}, "contradict each other"),
        ({"HighBit": 16}, "contradict each other"),
        ({"BitsStored": None}, "BitsStored is missing"),
        ({"PixelRepresentation": None}, "PixelRepresentation is missing"),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation is missing"),
        ({"PhotometricInterpretation": "RGB"}, "SamplesPerPixel contradict"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel contradict"),
        (
            {"PlanarConfiguration": 3, "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
            "PlanarConfiguration",
        ),
    ],
)
def test_headers_that_contradict_themselves_are_refused(tags, reason):
    with pytest.raises(ImageError, match=reason):
        shown(saved(tagged(RAMP12, bits=12, **tags)))


def test_colour_without_planar_configuration_is_by_pixel():
    dataset = tagged(np.full((4, 6, 3), (200, 30, 20), np.uint8), photometric="RGB")
    del dataset.PlanarConfiguration
    assert shown(saved(dataset))[0, 0].tolist() == [200, 30, 20]


@pytest.mark.parametrize(
    ("transform", "photometric"), [(1, "YBR_RCT"), (1, "RGB"), (1, "YBR_FULL"), (0, "RGB")]
)
def test_jpeg_2000_says_itself_whether_its_colours_are_transformed(transform, photometric):
    pixels = np.full((16, 16, 3), (200, 30, 20), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG2000", irreversible=False, mct=transform)
    data = encapsulated(tagged(pixels, photometric=photometric), [stream.getvalue()], uid.JPEG2000Lossless)
    assert shown(data)[0, 0].tolist() == [200, 30, 20]


@pytest.mark.parametrize(
    ("bits", "entries"),
    [
        (16, lambda values: (values * 257).astype("<u2")),
        (8, lambda values: (values * 257).astype("<u2")),
        (8, lambda values: values.astype("<u2")),
        (8, lambda values: values.astype("u1")),
        (16, lambda values: values.astype("<u2")),
        (0, lambda values: (values * 257).astype("<u2")),
    ],
    ids=["words", "words-called-8", "padded-bytes", "bytes", "padded-bytes-called-16", "words-called-0"],
)
def test_palettes_are_scaled_by_what_they_hold(bits, entries):
    """PS3.3 C.7.6.3.1.5: the descriptor's bits and the entries differ in many ultrasound files."""
    palette = {}
    for colour, scale in (("Red", 1.0), ("Green", 0.5), ("Blue", 0)):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        palette[f"{colour}PaletteColorLookupTableData"] = entries(np.arange(256) * scale).tobytes()
    picture = shown(
        saved(tagged(np.array([[0, 128], [200, 255]], np.uint8), photometric="PALETTE COLOR", **palette))
    )
    assert (
        np.abs(
            picture.reshape(-1, 3).astype(int) - [[0, 0, 0], [128, 64, 0], [200, 100, 0], [255, 128, 0]]
        ).max()
        <= 1
    )


def test_a_voi_table_with_more_than_its_bits():
    data = saved(
        tagged(
            np.array([[0, 1], [2, 3]], np.uint8), VOILUTSequence=table([0, 20_000, 40_000, 65_535], bits=8)
        )
    )
    assert shown(data).tolist() == [[0, 78], [156, 255]]  # 20000 / 65535 * 255, ...


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_files_without_transfer_syntax_are_read_as_uncompressed(syntax):
    dataset = tagged(RAMP12, bits=12, syntax=syntax)
    data = saved(dataset)
    element = (
        b"\x02\x00\x10\x00UI"
        + struct.pack("<H", len(syntax) + len(syntax) % 2)
        + (syntax + "\0" * (len(syntax) % 2)).encode()
    )
    assert element in data
    at = data.index(b"\x02\x00\x00\x00UL\x04\x00") + 8
    length = struct.unpack_from("<I", data, at)[0] - len(element)
    bare = (data[:at] + struct.pack("<I", length) + data[at + 4 :]).replace(element, b"", 1)
    assert np.array_equal(shown(bare), shown(data))
    (row,) = index_rows("/d/a.dcm", "a.dcm", bare)
    assert row["error"] is None
