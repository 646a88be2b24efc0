"""NRRD and MetaImage: voxels as ITK reads them, where the header says what ITK takes for granted."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping

import numpy as np

from pgl_ext.transforms.checks import BadVolumeError
from pgl_ext.transforms.nifti import assumed_affine

__all__ = ["read_itk"]

_SPACES = ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps")
_UNITS = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001, "": 1.0, "?": 1.0}
_UNITS |= {"millimeter": 1.0, "millimetre": 1.0, "micron": 0.001, "micrometer": 0.001, "meter": 1000.0}
# How many numbers some fields have; ITK makes 0 or 1 of what is missing or no number.
_COUNTS = {"sizes": 3, "spacedirections": 9, "spaceorigin": 3, "DimSize": 3, "ElementSpacing": 3, "ElementSize": 3}
_COUNTS |= dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), 9)
_COUNTS |= dict.fromkeys(("Offset", "Position", "Origin"), 3)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_LONGEST_HEADER = 1 << 20  # bytes


def read_itk(path: str, orientation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read an NRRD or MetaImage file.

    Args:
        path: of the file, or of its header.
        orientation: axes of a file that names none, such as ``"LAS"``; its origin is in the middle then.

    Returns:
        voxels in the order of the file, several values of a voxel along the last axis; and the affine (4, 4), voxel
        index to RAS mm.

    Raises:
        BadVolumeError: the header leaves the grid or the values open.
        ImportError: ``itk`` is not installed.
        RuntimeError, ValueError, zlib.error: the file is damaged, or neither NRRD nor MetaImage.
    """
    try:
        import itk
    except ImportError as error:
        raise ImportError(f"Reading {path} needs the package 'itk': pip install itk") from error
    is_nrrd = path.lower().endswith((".nrrd", ".nhdr"))
    fields, start = _header(path, is_nrrd)
    stored = _data_bytes(path, fields, start)
    image_io = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
    # Without one the file cannot be read at all, and reading it says why.
    if image_io:
        image_io.SetFileName(path)
        image_io.ReadImageInformation()
        channels = image_io.GetNumberOfComponents()
        if channels > 1:  # ITK's Python package has no type for most of them
            shape = [image_io.GetDimensions(axis) for axis in range(image_io.GetNumberOfDimensions())]
            return np.empty((*shape, channels), np.uint8), np.eye(4)
    image = itk.imread(path)
    voxels = itk.array_from_image(image).T
    # A little may pad the end. As much as one more row or slice, and the size or the type is wrong.
    if stored is not None and not 0 <= stored - voxels.nbytes < max(voxels.nbytes // max(voxels.shape, default=1), 1):
        raise ValueError(f"it holds {stored} bytes of {voxels.nbytes}, by its size and type")
    if voxels.ndim != 3:
        return voxels, np.eye(4)
    return voxels, _affine(image, voxels.shape, path, fields, is_nrrd, orientation)


def _header(path: str, is_nrrd: bool) -> tuple[dict[str, str], int]:
    """Fields by name, of NRRD in lower case without blanks, and where the data begin."""
    with open(path, "rb") as file:
        text = file.read(_LONGEST_HEADER)
    end = re.search(rb"\r?\n\r?\n" if is_nrrd else rb"ElementDataFile\s*=.*\r?\n", text)
    start = end.end() if end else len(text)
    fields: dict[str, str] = {}
    for line in text[:start].decode("latin-1").splitlines():
        name, sign, value = line.partition(":" if is_nrrd else "=")
        if not sign or value[:1] == "=" or name.startswith("#"):  # a comment, or a user's own value
            continue
        name, value = name.lower().replace(" ", "") if is_nrrd else name.strip(), value.strip()
        if fields.setdefault(name, value) != value:
            raise ValueError(f"it has two values for {name}, {fields[name]} and {value}")
    return fields, start


def _is_true(fields: Mapping[str, str], name: str) -> bool:
    return fields.get(name, "").upper().startswith(("T", "1"))  # as ITK takes it


def _data_bytes(path: str, fields: Mapping[str, str], start: int) -> int | None:
    """Size of the data, of compressed ones after reading all of them with their checksum; None where it is unknown."""
    encoding = fields.get("encoding", "raw").lower()
    is_gzip = encoding in ("gzip", "gz")
    is_packed = is_gzip or _is_true(fields, "CompressedData")
    if "ElementDataFile" in fields and not is_packed and not _is_true(fields, "BinaryData"):
        raise BadVolumeError(f"{path} does not say BinaryData = True: convert text to binary data, or add it.")
    name = fields.get("datafile") or fields.get("ElementDataFile") or "LOCAL"
    if re.search("LIST|%", name):
        if is_packed:
            raise BadVolumeError(f"{path} has several compressed data files: convert it to a single one.")
        return None
    if name != "LOCAL":
        path, start = os.path.join(os.path.dirname(path), name), 0
    if not is_packed:
        skips = [fields.get(skip, "0") for skip in ("lineskip", "byteskip", "HeaderSize")]
        return os.path.getsize(path) - start if encoding == "raw" and set(skips) == {"0"} else None
    decoder, size = zlib.decompressobj(47), 0  # zlib or gzip
    with open(path, "rb") as file:
        file.seek(start)
        for _ in range(int(fields.get("lineskip", 0))):
            file.readline()
        while not decoder.eof and (chunk := file.read(1 << 20)):
            size += len(decoder.decompress(chunk))
        used = file.tell() - start - len(decoder.unused_data)
        rest = decoder.unused_data + file.read(1 << 10)
    if not decoder.eof or rest.strip(b"\0\r\n"):
        raise ValueError("more follows its compressed data" if decoder.eof else "its compressed data end early")
    # ITK makes noise of data that are not as long as MetaImage's header says.
    if not is_gzip and int(fields.get("CompressedDataSize", 0)) != used:
        raise ValueError(
            f"its CompressedDataSize is {fields.get('CompressedDataSize')}, but its data have {used} bytes"
        )
    return size


def _affine(
    image: object, shape: tuple[int, ...], path: str, fields: Mapping[str, str], is_nrrd: bool, orientation: str | None
) -> np.ndarray:
    import itk

    for name in fields.keys() & _COUNTS.keys():
        words = re.sub("[(),]", " ", fields[name]).split()
        if (len(words) != _COUNTS[name] and words != ["none"]) or not all(map(_NUMBER.fullmatch, words)):
            raise BadVolumeError(f"{path} has {fields[name]!r} for {name}, not {_COUNTS[name]} numbers: correct it.")
    if is_nrrd:
        units = re.findall('"(.*?)"', fields.get("spaceunits") or fields.get("units", "")) or [""]
        placed = fields.get("space", "").lower() in _SPACES and "spacedirections" in fields
        sized = "spacedirections" in fields or "spacings" in fields
        missing, size = "space and space directions", "spacings"
    else:
        units = [fields.get("DistanceUnits", "")]
        placed = any(name in fields for name in ("TransformMatrix", "Rotation", "Orientation"))
        sized = fields.get("ElementSpacing") or fields.get("ElementSize")
        missing, size = "TransformMatrix", "ElementSpacing"
        for name, neutral in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
            if float(fields.get(name, neutral)) != neutral:
                raise BadVolumeError(f"{path} has values by an {name}, which is not applied: convert the file.")
    if not sized:
        raise BadVolumeError(f"{path} has no {size}, so that the size of its voxels is unknown: add it to its header.")
    # Of symbols, capitals matter: Mm are no mm.
    scales = [_UNITS.get((unit.lower() if len(unit) > 2 else unit).strip().removesuffix("s")) for unit in units]
    if None in scales or len(scales) not in (1, 3):
        raise BadVolumeError(f"{path} has the units {', '.join(units)}: give its voxels in mm, and say so.")
    scales = np.broadcast_to(scales, 3)
    spacing, direction = np.array(image.GetSpacing()), itk.array_from_matrix(image.GetDirection())
    # ITK turns axes whose spacing is negative.
    wrong = [] if is_nrrd else [size for size in sized.split() if not float(size) > 0]
    if wrong or not np.allclose(np.linalg.norm(direction, axis=0), 1, rtol=0, atol=0.01):
        raise BadVolumeError(f"{path} has a spacing that is not above 0, or axes that are no unit vectors: correct it.")
    if not placed:
        return np.diag([*scales, 1]) @ assumed_affine(spacing, shape, orientation, path, missing)
    to_lps = np.column_stack([direction * spacing, np.array(image.GetOrigin())])
    return np.vstack([np.diag(scales * [-1, -1, 1]) @ to_lps, [0, 0, 0, 1]])
