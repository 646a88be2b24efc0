"""Mutated headers: the voxels and the grid that independent readers see, or an error that names the file.

``PGL_FUZZ_MUTANTS`` (of each format) and ``PGL_FUZZ_SEED`` make a long run of it, see ``make fuzz``.
"""

from __future__ import annotations

import collections
import gzip
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from made_dicom import write_series
from made_files import oblique

from pgl_ext.transforms import LoadVolumed
from pgl_ext.transforms.checks import BadVolumeError, check_volume

pydicom = pytest.importorskip("pydicom")
nrrd = pytest.importorskip("nrrd")
sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("itk")

MUTANTS, SEED = int(os.environ.get("PGL_FUZZ_MUTANTS", "200")), int(os.environ.get("PGL_FUZZ_SEED", "0"))
VOXELS = np.random.default_rng(0).integers(-999, 999, (6, 7, 8)).astype(np.int16)
TO_RAS = np.diag([-1.0, -1, 1])
MM = {"mm": 1, "um": 1e-3, "cm": 10, "m": 1000, "": 1, "?": 1}

Scan = tuple[np.ndarray, np.ndarray]  # voxels (X, Y, Z), affine (3, 4) to RAS mm


class Format(NamedTuple):
    """``mutate(rng, folder)`` writes a file and returns it with the name of the field; ``readers`` raise or return."""

    mutate: Callable[[np.random.Generator, Path], tuple[Path, str]]
    readers: tuple[Callable[[Path], Scan], ...]
    neutral: frozenset[str]  # fields that carry neither grid nor intensity


# --- NIfTI ----------------------------------------------------------------------------------------------------------

NIFTI_FIELDS = nib.Nifti1Header.template_dtype.fields
NUMBERS = {"i": [0, 1, 2, 3, 4, 5, 6, -1, 7, 8, 16, 64, 255, 512], "f": [0, 1, -1, np.nan, np.inf, 0.5, 2, 1e-6, -2.5]}
NUMBERS["u"] = NUMBERS["i"]


def nifti_mutant(rng: np.random.Generator, folder: Path) -> tuple[Path, str]:
    image, affine, forms = nib.Nifti1Image(VOXELS, None), oblique((2, 0, 1), (-1, 1, 1)), rng.integers(3)
    image.header["pixdim"][1:4] = nib.affines.voxel_sizes(affine)
    image.header.set_xyzt_units("mm")
    if forms != 1:
        image.set_qform(affine, 1)
    if forms != 0:
        image.set_sform(affine, 1)
    content = bytearray(image.to_bytes())
    name = str(rng.choice(list(NIFTI_FIELDS)))
    kind, start = NIFTI_FIELDS[name]
    numbers = NUMBERS.get(kind.base.kind)
    if numbers is None or rng.random() < 0.5:
        content[start + rng.integers(kind.itemsize)] ^= 1 << int(rng.integers(8))
    else:
        values = np.frombuffer(content, kind.base, kind.itemsize // kind.base.itemsize, start)
        values[rng.integers(len(values))] = np.array(rng.choice(numbers)).astype(kind.base)
    path = folder / ("a.nii.gz" if rng.random() < 0.2 else "a.nii")
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path, name


def nifti_by_simpleitk(path: Path) -> Scan:
    image = sitk.ReadImage(str(path), sitk.sitkFloat32)
    direction = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return sitk.GetArrayFromImage(image).T, TO_RAS @ np.column_stack([direction, image.GetOrigin()])


def nifti_by_nibabel(path: Path) -> Scan:
    image = nib.load(path)
    to_mm = {"meter": 1000, "micron": 1e-3}.get(image.header.get_xyzt_units()[0], 1)
    return np.asarray(image.dataobj, np.float32), to_mm * image.affine[:3]


# --- headers of text ------------------------------------------------------------------------------------------------


NUMBER_TEXTS = ("0", "1", "-1", "3", "nan", "inf", "1e-6", "-2.5", "7", "600")


def text_mutant(rng: np.random.Generator, header: str, separator: str, values: dict[str, list[str]]) -> tuple[str, str]:
    """One line gets another value; or it is left out, doubled or with a flipped bit, and then its field has no name."""
    lines = header.split("\n")
    index, kind = int(rng.integers(len(lines))), rng.integers(6)
    line = lines[index]
    name, _, value = line.partition(separator)
    if kind < 3 and name in values:
        new = str(rng.choice(values[name]))
        numbers = re.findall(r"[-.\w]+", value)
        if new == "a number":
            new = value.replace(str(rng.choice(numbers)), str(rng.choice(NUMBER_TEXTS)), 1)
        lines[index] = line.replace(value, new)
        return "\n".join(lines), name
    if kind == 3:
        del lines[index]
    elif kind == 4:
        lines.insert(index, line if name not in values else name + separator + str(rng.choice(values[name])))
    else:
        place = int(rng.integers(len(line)))
        lines[index] = line[:place] + chr(ord(line[place]) ^ 1 << int(rng.integers(7))) + line[place + 1 :]
    return "\n".join(lines), ""


NRRD = """NRRD0005
type: int16
dimension: 3
space: left-posterior-superior
sizes: 6 7 8
space directions: (2,0.5,0) (0,3,0) (0,0,-4)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (1,2,3)
space units: "mm" "mm" "mm"
content: a scan
measurement frame: (1,0,0) (0,1,0) (0,0,1)
comment:=a remark"""
TEXTS = ["a", "3", "space: 7", "<script>", "a=b"]
NRRD_VALUES = {
    "type": ["uint16", "float", "double", "uchar", "block", "short"],
    "dimension": ["2", "4", "1"],
    "space": ["RAS", "LAS", "right-anterior-superior", "scanner-xyz", "left-anterior-superior", "RAST"],
    "sizes": ["8 7 6", "3 7 16", "6 7", "a number"],
    "space directions": ["(1,0,0) (0,2,0) (0,0,3)", "(0,1,0) (2,0,0) (0,0,3)", "(1,0,0) none (0,0,3)", "a number"],
    "kinds": ["space space space", "domain domain list", "domain domain vector", "3-color domain domain"],
    "endian": ["big", "little"],
    "encoding": ["gzip", "raw", "ascii", "hex", "bzip2"],
    "space origin": ["(4,5,6)", "none", "(1,2)", "a number"],
    "space units": ['"cm" "cm" "cm"', '"m" "mm" "um"', '"mm" "mm"', '"" "" ""', '"px" "px" "px"'],
    "content": TEXTS,
    "measurement frame": ["(0,1,0) (1,0,0) (0,0,1)", "(2,0,0) (0,1,0) (0,0,1)"],
    "comment": TEXTS,
}


def nrrd_mutant(rng: np.random.Generator, folder: Path) -> tuple[Path, str]:
    packed = rng.random() < 0.3
    text = NRRD.replace("encoding: raw", "encoding: gzip") if packed else NRRD
    text, name = text_mutant(rng, text, ":=" if "comment" in text and rng.random() < 0.07 else ": ", NRRD_VALUES)
    data = VOXELS.tobytes(order="F")
    path = folder / "a.nrrd"
    path.write_bytes(f"{text}\n\n".encode("latin-1") + (gzip.compress(data, 1) if packed else data))
    return path, name


def nrrd_affine(space: str, directions: Any, origin: Any, units: list[str]) -> np.ndarray:
    spaces = {"left-posterior-superior": (-1, -1, 1), "left-anterior-superior": (-1, 1, 1), "LAS": (-1, 1, 1)}
    spaces |= {"right-anterior-superior": (1, 1, 1), "RAS": (1, 1, 1)}
    scale = [sign * MM[unit] for sign, unit in zip(spaces[space], units, strict=True)]
    return np.diag(scale) @ np.column_stack([np.transpose(directions), origin])


def nrrd_by_pynrrd(path: Path) -> Scan:
    voxels, header = nrrd.read(str(path))
    origin, units = header.get("space origin", np.zeros(3)), header.get("space units", ["mm"] * 3)
    return voxels, nrrd_affine(header["space"], header["space directions"], origin, units)


def nrrd_by_hand(path: Path) -> Scan:
    text, data = path.read_bytes().split(b"\n\n", 1)
    magic, *lines = text.decode("latin-1").split("\n")
    pairs = [line.split(": ", 1) for line in lines if ":=" not in line]
    fields = {name.lower(): value.strip() for name, value in pairs}
    if len(fields) < len(pairs) or not fields.keys() <= NRRD_VALUES.keys() or not re.fullmatch("NRRD000[1-5]", magic):
        raise ValueError(magic)
    if fields["dimension"] != "3" or not set(fields.get("kinds", "space").split()) <= {"domain", "space"}:
        raise ValueError(fields)
    data = {"raw": bytes, "gzip": gzip.decompress}[fields["encoding"]](data)
    kind = {"int16": "i2", "short": "i2", "uint16": "u2", "float": "f4", "uchar": "u1", "double": "f8"}[fields["type"]]
    numbers = {
        name: re.findall(r"[-+.\w]+", fields.get(name, "none").replace("none", "0 0 0"))
        for name in ("space directions", "space origin")
    }
    directions = np.array(numbers["space directions"], float).reshape(3, 3)
    origin = np.array(numbers["space origin"], float).reshape(3)
    units = re.findall('"(.*?)"', fields.get("space units", '"" "" ""'))
    if not directions.any(axis=1).all():
        raise ValueError(directions)
    return shaped(data, fields["sizes"], kind, ">" if fields["endian"] == "big" else "<"), nrrd_affine(
        fields["space"], directions, origin, units
    )


def shaped(data: bytes, sizes: str, kind: str, order: str) -> np.ndarray:
    """Voxels (X, Y, Z) of bytes that are neither too few nor too many."""
    shape = [int(size) for size in sizes.split()]
    if len(shape) != 3 or len(data) != np.prod(shape) * np.dtype(kind).itemsize:
        raise ValueError(shape)
    return np.frombuffer(data, order + kind).reshape(shape, order="F")


META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 0 1 0 -1 0 0 0 0 1
Offset = 1 2 3
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = 2 3 4
DimSize = 6 7 8
Comment = a scan
Modality = MET_MOD_CT
ElementMin = 3
DistanceUnits = mm
ElementType = MET_SHORT
ElementDataFile = LOCAL"""
META_VALUES = {
    "ObjectType": ["Scene", "Tube", "Group"],
    "NDims": ["2", "4", "10"],
    "BinaryData": ["False", "1", "0"],
    "BinaryDataByteOrderMSB": ["True", "1", "0"],
    "CompressedData": ["True", "False"],
    "CompressedDataSize": ["7", "0", "-1", "100000"],
    "TransformMatrix": ["1 0 0 0 1 0 0 0 1", "1 0 0 0 0 1 0 1 0", "-1 0 0 0 1 0 0 0 -1", "1 0 0 0 1 0", "a number"],
    "Offset": ["4 5 6", "4 5", "-1 -2 -3.5", "a number"],
    "CenterOfRotation": ["1 2 3", "0 0 1e3"],
    "AnatomicalOrientation": ["RAS", "LPI", "???"],
    "ElementSpacing": ["1 1 1", "0.5 0.5 2.5", "2 3", "a number"],
    "DimSize": ["8 7 6", "3 7 16", "6 7", "a number"],
    "Comment": TEXTS,
    "Modality": ["MET_MOD_MR", "MET_MOD_OTHER"],
    "ElementMin": ["-7", "1000"],
    "DistanceUnits": ["um", "cm", "furlong", "?"],
    "ElementType": ["MET_USHORT", "MET_FLOAT", "MET_UCHAR", "MET_DOUBLE", "MET_STRING", "MET_SHORT_ARRAY", "short"],
    "ElementDataFile": ["a.raw", "LIST", "a%03d.raw 1 8 1", "/etc/hostname", "Local"],
}


def meta_mutant(rng: np.random.Generator, folder: Path) -> tuple[Path, str]:
    data, text = VOXELS.tobytes(order="F"), META
    if rng.random() < 0.3:
        data = zlib.compress(data, 1)
        text = text.replace("CompressedData = False", f"CompressedData = True\nCompressedDataSize = {len(data)}")
    text, name = text_mutant(rng, text, " = ", META_VALUES)
    path = folder / "a.mha"
    path.write_bytes(f"{text}\n".encode("latin-1") + data)
    return path, name


def meta_by_hand(path: Path) -> Scan:
    text, place, data = re.split(rb"ElementDataFile = (.*)\n", path.read_bytes(), maxsplit=1)
    pairs = {tuple(line.split("=", 1)) for line in text.decode("latin-1").splitlines() if "=" in line}
    fields = {name.strip(): value.strip() for name, value in pairs}
    truth = {name: fields.get(name, "False")[0] in "Tt1" for name in META_VALUES}
    if len(fields) < len(pairs) or fields["NDims"] != "3" or place != b"LOCAL":
        raise ValueError(fields)
    if not truth["BinaryData"] and ("BinaryData" in fields or not truth["CompressedData"]):
        raise ValueError("text")
    if truth["CompressedData"]:
        data = zlib.decompress(data) if int(fields["CompressedDataSize"]) == len(data) else b""
    kinds = {"MET_SHORT": "i2", "MET_USHORT": "u2", "MET_FLOAT": "f4", "MET_UCHAR": "u1", "MET_DOUBLE": "f8"}
    voxels = shaped(data, fields["DimSize"], kinds[fields["ElementType"]], "<>"[truth["BinaryDataByteOrderMSB"]])
    matrix, spacing, origin = (
        np.array(text.split(), float)
        for text in (fields["TransformMatrix"], fields["ElementSpacing"], fields.get("Offset", "0 0 0"))
    )
    if min(spacing) <= 0 or not np.allclose(np.linalg.norm(matrix.reshape(3, 3), axis=1), 1):
        raise ValueError(matrix)
    to_lps = np.column_stack([matrix.reshape(3, 3).T * spacing, origin])
    return voxels, MM[fields.get("DistanceUnits", "")] * TO_RAS @ to_lps


# --- DICOM ----------------------------------------------------------------------------------------------------------

DICOM_VALUES = {
    "Rows": [0, 5, 8, 14], "Columns": [0, 3, 7, 12], "BitsAllocated": [8, 16, 32], "BitsStored": [8, 12, 16, 17],
    "HighBit": [7, 11, 15, 16], "PixelRepresentation": [0, 1], "SamplesPerPixel": [1, 3],
    "PhotometricInterpretation": ["MONOCHROME1", "MONOCHROME2", "RGB"], "Modality": ["MR", "PT", "SEG", "OT"],
    "RescaleSlope": [0, 1, 2, "0.37", "nan", -1], "RescaleIntercept": [0, -1024, "7.5", "inf"],
    "ImagePositionPatient": [[5, 6, 3], [5, 6, 100], [5, 9, 0], [0, 0], [5, 6, "nan"]],
    "ImageOrientationPatient": [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, -1, 0], [1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 2, 0]],
    "PixelSpacing": [[1.5, 2], [0, 1], [-2, 1.5], [2], ["nan", 1], [3, 3]], "NumberOfFrames": [1, 2, 0],
    "SeriesInstanceUID": ["1.2.9", ""], "SOPInstanceUID": ["1.2.3.1", "1.2.3.2"], "StudyInstanceUID": ["1.9", "1.2"],
    "PatientID": ["A", ""], "PixelPaddingValue": [0, 17, 60000],
}  # fmt: skip
DICOM_NEUTRAL = {
    "PatientName": ["A^B", ""], "InstanceNumber": [0, 7, -3], "SliceThickness": [0, 1, 3], "WindowCenter": [40, 1e6],
    "SeriesDescription": ["x", ""], "ImageType": [["ORIGINAL"], []], "AcquisitionDate": ["20200101", ""],
    "SpacingBetweenSlices": [1, 3], "SliceLocation": [-4, 0], "KVP": [100, ""], "BodyPartExamined": ["HEAD"],
    "RescaleType": ["US", "HU"], "PatientAge": ["003Y"], "BurnedInAnnotation": ["YES"], "GantryDetectorTilt": [0],
}  # fmt: skip
STORED = (np.transpose(VOXELS[:, :, :4], (2, 1, 0)) + 1000).astype(np.uint16)  # (slices, rows, columns)


def dicom_mutant(rng: np.random.Generator, folder: Path) -> tuple[Path, str]:
    path = write_series(folder / "dicom", STORED)
    values = DICOM_VALUES | DICOM_NEUTRAL
    name = str(rng.choice(list(values)))
    files = sorted(path.iterdir())
    value = [None, *values[name]][rng.integers(len(values[name]) + 1)]
    for file in files if rng.random() < 0.5 else [files[rng.integers(len(files))]]:
        dataset = pydicom.dcmread(file)
        if value is None:
            dataset.pop(name, None)
        else:
            dataset.add_new(name, pydicom.datadict.dictionary_VR(name).split()[0], value)
        dataset.save_as(file)
    return path, name


def dicom_by_hand(path: Path) -> Scan:
    slices = [pydicom.dcmread(file) for file in path.iterdir()]
    for name in ("SeriesInstanceUID", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "Modality"):
        (one,) = {str(slice_.get(name, "")) for slice_ in slices}
        if one == "SEG" or (not one and name != "Modality"):
            raise ValueError(name)
    row, column = np.reshape(np.array(slices[0].ImageOrientationPatient, float), (2, 3))
    normal = np.cross(row, column)
    slices.sort(key=lambda slice_: np.dot(slice_.ImagePositionPatient, normal))
    places = np.array([slice_.ImagePositionPatient for slice_ in slices], float)
    steps = np.diff(places, axis=0)
    units = np.array([row @ row, column @ column, row @ column])
    if not np.allclose(units, [1, 1, 0]) or not np.allclose(steps, 3 * normal):
        raise ValueError(places)
    values = []
    for slice_ in slices:
        bits = slice_.BitsStored
        if (slice_.BitsAllocated, slice_.HighBit, slice_.SamplesPerPixel) != (16, bits - 1, 1) or bits > 16:
            raise ValueError(bits)
        if slice_.PhotometricInterpretation == "RGB" or int(slice_.get("NumberOfFrames") or 1) != 1:
            raise ValueError("no grey slice")
        pixels = np.frombuffer(slice_.PixelData, "<u2").reshape(slice_.Rows, slice_.Columns).astype(int) % 2**bits
        if slice_.PixelRepresentation:
            pixels = np.where(pixels >= 2 ** (bits - 1), pixels - 2**bits, pixels)
        slope, intercept = float(slice_.RescaleSlope), float(slice_.RescaleIntercept)
        if not np.isfinite([slope, intercept]).all() or not slope:
            raise ValueError(slope)
        scaled = pixels * slope + intercept
        values.append(np.where(pixels == slice_.get("PixelPaddingValue"), np.nan, scaled))
    voxels = np.stack(values).T
    voxels[np.isnan(voxels)] = np.nanmin(voxels)
    between_rows, between_columns = (float(size) for size in slices[0].PixelSpacing)
    if not min(between_rows, between_columns) > 0:
        raise ValueError(between_rows)
    return voxels, TO_RAS @ np.column_stack([row * between_columns, column * between_rows, 3 * normal, places[0]])


# --- the test -------------------------------------------------------------------------------------------------------

FORMATS = {
    "nifti": Format(
        nifti_mutant,
        (nifti_by_simpleitk, nifti_by_nibabel),
        frozenset(
            filter(re.compile("data_t|db|ext|ses|reg|dim_|intent_[pn]|sli|cal|to|gl|de|aux").match, NIFTI_FIELDS)
        ),
    ),
    "nrrd": Format(nrrd_mutant, (nrrd_by_pynrrd, nrrd_by_hand), frozenset({"content", "comment"})),
    "meta": Format(
        meta_mutant,
        (meta_by_hand,),
        frozenset({"CenterOfRotation", "AnatomicalOrientation", "Comment", "Modality", "ElementMin"}),
    ),
    "dicom": Format(dicom_mutant, (dicom_by_hand,), frozenset(DICOM_NEUTRAL)),
}


def reading(reader: Callable[[Path], Scan], path: Path) -> Scan | None:
    try:
        with np.errstate(all="ignore"):
            return reader(path)
    except Exception:  # of a header that it does not understand
        return None


def alike(one: Scan, other: Scan) -> bool:
    return (
        one[0].shape == other[0].shape
        and np.allclose(np.float32(one[0]), np.float32(other[0]), rtol=1e-5, atol=1e-3, equal_nan=True)
        and np.allclose(one[1], other[1], rtol=1e-3, atol=1e-2)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_headers(tmp_path, name, capsys):
    kind, rng = FORMATS[name], np.random.default_rng(SEED)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    counts, wrong, refused = collections.Counter(), [], []
    for number in range(MUTANTS):
        path, field = kind.mutate(rng, tmp_path)
        expected = [reading(reader, path) for reader in kind.readers]
        try:
            image = LoadVolumed("image")({"image": str(path)})["image"]
            check_volume(image, str(path))
            found = image.numpy()[0], image.affine.numpy()[:3]
            outcome = "equal" if any(scan and alike(scan, found) for scan in expected) else "differing"
        except BadVolumeError as error:
            outcome, found = "refused" if str(path) in str(error) else "not named", error
        except Exception as error:
            outcome, found = "crashed", error
        is_clear = field in kind.neutral or (None not in expected and all(alike(expected[0], e) for e in expected))
        counts[outcome] += 1
        counts["clear"] += is_clear
        if outcome not in ("equal", "refused"):
            wrong.append((number, field, outcome, expected, found))
        elif is_clear and outcome == "refused":
            refused.append((number, field, found))
    with capsys.disabled():
        print(f"\n{name}: {MUTANTS} mutants of seed {SEED}, {dict(counts)}, clear but refused {len(refused)}")
    assert not wrong
    assert counts["clear"] >= MUTANTS / 4
    assert len(refused) <= counts["clear"] / 100, refused
