"""DICOM: the files of a series, and the voxels and the grid that its slices or frames make up."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pgl_ext.errors import few
from pgl_ext.files import visible_files
from pgl_ext.transforms.checks import BadVolumeError
from pgl_ext.transforms.formats import DICOM_SUFFIXES, file_suffix, has_known_suffix, is_dicom_file

__all__ = ["may_be_dicom", "read_dicom", "scan_header", "series_files"]

_NO_SCANS = ("SEG", "RTDOSE")
_IN_UNITS = ("CT", "PT")  # modalities whose values are physical: HU, Bq/ml
# How many numbers each element has, and where it lies in a multi-frame file; in single slices all lie at the top.
_ELEMENTS = {
    "ImagePositionPatient": (3, "PlanePositionSequence"),
    "ImageOrientationPatient": (6, "PlaneOrientationSequence"),
    "PixelSpacing": (2, "PixelMeasuresSequence"),
    "RescaleSlope": (1, "PixelValueTransformationSequence"),
    "RescaleIntercept": (1, "PixelValueTransformationSequence"),
}
_OTHER_NAMES = {"PixelSpacing": "NominalScannedPixelSpacing"}  # of secondary captures
_FRAMES = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
_HEADER = ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "Rows", "NumberOfFrames"]

_ROUNDING = 0.01  # of unit vectors, and of the spacing of slices
_UNEVEN = 0.1  # share of the median step by which steps may differ, or mm, as positions are often rounded
_SAME_PLACE = 0.01  # mm
_DRIFT = 1.0  # mm from the first slice to the last, across the stack


class _Frame(NamedTuple):
    """One slice: its file, (rows, columns), and the numbers of its elements, NaN where the header has none."""

    file: str
    modality: str
    size: tuple[int, int]
    elements: dict[str, np.ndarray]


def may_be_dicom(path: str) -> bool:
    """Whether a file is called or begins as DICOM files do."""
    return file_suffix(path) in DICOM_SUFFIXES or (not has_known_suffix(path) and is_dicom_file(path))


def _dataset(path: str, **options: Any) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ImportError(f"Reading the DICOM file {path} needs the package 'pydicom': pip install pydicom") from error
    try:
        return pydicom.dcmread(path, **options)
    except pydicom.errors.InvalidDicomError as error:
        raise OSError(str(error)) from error


def scan_header(path: str, tags: Sequence[str] = ()) -> Any:
    """The ``pydicom.Dataset`` of a DICOM file's UIDs and further ``tags``; None where it holds no scan.

    Raises:
        ImportError: ``pydicom`` is not installed.
        OSError: the file cannot be read, or is not DICOM.
    """
    header = _header(path, tags)
    return header if _is_scan(header) else None


def _header(path: str, tags: Sequence[str]) -> Any:
    return _dataset(path, stop_before_pixels=True, specific_tags=[*_HEADER, *tags])


def _is_scan(header: Any) -> bool:
    return "Rows" in header and header.get("Modality") not in _NO_SCANS and bool(header.get("SeriesInstanceUID"))


def series_files(directory: str, series_uid: str | None = None) -> list[str]:
    """The files of one DICOM series in and below a folder, in the order of their slices along the scan axis.

    Raises:
        BadVolumeError: the folder has no such series, or several where none is named; or a DICOM file in it cannot be
            read or lacks elements, which might be one of the series.
        ImportError: ``pydicom`` is not installed.
    """
    series: dict[str, dict[tuple, tuple[Any, str]]] = {}
    others: dict[str, str] = {}
    for folder, _, names in visible_files(directory):
        for path in filter(may_be_dicom, (os.path.join(folder, name) for name in names)):
            try:
                header = _header(path, [*_ELEMENTS, *_OTHER_NAMES.values(), *_FRAMES])
            except OSError as error:
                raise BadVolumeError(
                    f"Cannot read the DICOM file {path}: {error}. Restore it, or remove it from the folder."
                ) from error
            uid = str(header.get("SeriesInstanceUID", ""))
            if _is_scan(header):
                # Copies of a slice are one slice.
                slice_ = header.get("SOPInstanceUID", path), str(header.get("ImagePositionPatient"))
                series.setdefault(uid, {}).setdefault(slice_, (header, path))
            elif uid or "Rows" in header:
                others.setdefault(uid, path)
    uids = sorted(series)
    if not uids:
        raise BadVolumeError(f"Folder {directory} holds no DICOM series: give a folder of DICOM files, or a file.")
    if not series_uid and len(uids) > 1:
        raise BadVolumeError(
            f"Folder {directory} holds {len(uids)} DICOM series: set 'series_uid' to one of {', '.join(uids)}."
        )
    if series_uid and series_uid not in uids:
        raise BadVolumeError(f"Folder {directory} has no DICOM series {series_uid!r}, only {', '.join(uids)}.")
    uid = series_uid or uids[0]
    if lost := others.get(uid, others.get("")):
        # A slice less would go unnoticed at the end of a scan.
        raise BadVolumeError(
            f"{lost} may be a slice of the DICOM series {uid}, but its SeriesInstanceUID, Rows or Modality is missing "
            "or no scan's: correct it, or remove it from the folder."
        )
    frames = [_frames(header, path)[0] for header, path in series[uid].values()]
    return [frames[index].file for index in _order(frames)]


def read_dicom(files: Sequence[str], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the slices or frames of one DICOM series, each with its own place and its own scale.

    A voxel is slope * stored value + intercept, for CT in HU. Padding, which is no part of the scan, gets the lowest
    value of the rest.

    Args:
        files: of the series, in any order.
        name: what to call the series in messages.

    Returns:
        float32 voxels (X, Y, Z), x along the columns of a slice, z along the normal of the slices; and the affine
        (4, 4), voxel index to RAS mm.

    Raises:
        BadVolumeError: the slices are no regular volume, or their values cannot be told: what is wrong, and what helps.
        ImportError: ``pydicom`` is not installed, or ``itk``, which decompresses.
    """
    frames: list[_Frame] = []
    values: list[np.ndarray] = []
    for file in files:
        dataset = _dataset(file)
        _check_pixels(dataset, file)
        new = _frames(dataset, file)
        try:
            values += _values(dataset, file, new)
        except ImportError:
            raise
        except Exception as error:  # what damaged files make of the decoders has no bounds
            raise BadVolumeError(f"The pixels of {file} cannot be read, {error}: restore the file.") from error
        frames += new
    problem = _problem(frames)
    if problem:
        raise BadVolumeError(f"{name} is no regular volume: {problem}.")
    order = _order(frames)
    voxels = np.stack([values[index] for index in order]).T
    padding = np.isnan(voxels)
    if padding.any() and not padding.all():
        voxels[padding] = np.nanmin(voxels)
    return voxels, _affine([frames[index] for index in order])


def _frames(header: Any, file: str) -> list[_Frame]:
    count = int(header.get("NumberOfFrames") or 1)
    shared, per_frame = ([*header.get(name, [])] for name in _FRAMES)
    if count > 1 and len(per_frame) != count:
        raise ValueError(f"{file} has {count} frames, but places of {len(per_frame)}")
    size = int(header.Rows), int(header.get("Columns") or 0)
    groups = [[frame, *shared] for frame in per_frame] or [[header]]
    modality = str(header.get("Modality", ""))
    return [_Frame(file, modality, size, {tag: _element(group, tag) for tag in _ELEMENTS}) for group in groups]


def _element(groups: Sequence[Any], tag: str) -> np.ndarray:
    count, macro = _ELEMENTS[tag]
    for group in groups:
        (values, *_) = group.get(macro) or [group]
        value = values.get(tag, values.get(_OTHER_NAMES.get(tag, tag)))
        if np.size(value) == count and value not in (None, ""):
            return np.asarray(value, dtype=np.float64).reshape(count)
    return np.full(count, np.nan)


# --- the values -----------------------------------------------------------------------------------------------------


def _check_pixels(dataset: Any, file: str) -> None:
    photometric = dataset.get("PhotometricInterpretation")
    if dataset.get("SamplesPerPixel", 1) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadVolumeError(f"{file} is no grey image but {photometric}: convert or remove it.")
    if photometric == "MONOCHROME1" and dataset.get("Modality") not in _IN_UNITS:
        raise BadVolumeError(f"{file} is stored inverted (MONOCHROME1): convert it to MONOCHROME2, or remove it.")
    if "ModalityLUTSequence" in dataset:
        raise BadVolumeError(f"{file} has its values in a table (ModalityLUTSequence): convert it to NIfTI.")


def _values(dataset: Any, file: str, frames: Sequence[_Frame]) -> list[np.ndarray]:
    """float32 (rows, columns) of each frame, NaN where there is padding."""
    stored = _stored(dataset, file).reshape(len(frames), *frames[0].size)
    values = []
    for pixels, frame in zip(stored, frames, strict=True):
        slope, intercept = frame.elements["RescaleSlope"], frame.elements["RescaleIntercept"]
        scaled = (pixels if np.isnan(slope) else pixels * slope + intercept).astype(np.float32)
        first = dataset.get("PixelPaddingValue")
        if first is not None and pixels.dtype.kind in "iu":
            # As the pixels are signed or not, whatever type the element has.
            limits = np.array([first, dataset.get("PixelPaddingRangeLimit", first)]).astype(pixels.dtype)
            scaled[(pixels >= limits.min()) & (pixels <= limits.max())] = np.nan
        values.append(scaled)
    return values


def _stored(dataset: Any, file: str) -> np.ndarray:
    """The stored values of all frames, without what else the bits of a pixel hold."""
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        kind = "i" if dataset.PixelRepresentation else "u"
        return _decompressed(file).astype(f"{kind}{dataset.BitsAllocated // 8}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = dataset.pixel_array
    if pixels.dtype.kind == "f":
        return pixels
    bits = 8 * pixels.dtype.itemsize
    # A little may pad the end. A row too many, and the size is wrong.
    if len(dataset.PixelData) >= pixels.nbytes + dataset.Columns * pixels.itemsize:
        raise ValueError(f"PixelData of {len(dataset.PixelData)} bytes is too long for its Rows and Columns")
    above = bits - dataset.BitsStored
    if above < 0 or dataset.HighBit + 1 != dataset.BitsStored:
        raise ValueError(f"HighBit {dataset.HighBit} and BitsStored {dataset.BitsStored} contradict each other")
    return np.right_shift(np.left_shift(pixels, above), above)


def _decompressed(file: str) -> np.ndarray:
    """By ITK, which knows more compressions than pydicom does alone."""
    try:
        import itk
    except ImportError as error:
        raise ImportError(f"Decompressing {file} needs the package 'itk': pip install itk") from error
    image_io = itk.GDCMImageIO.New()
    image_io.SetFileName(file)
    image_io.ReadImageInformation()
    values = itk.array_from_image(itk.imread(file)).astype(np.float64)
    # It scales all frames as the first.
    return np.rint((values - image_io.GetRescaleIntercept()) / image_io.GetRescaleSlope())


# --- the grid -------------------------------------------------------------------------------------------------------


def _array(frames: Sequence[_Frame], tag: str) -> np.ndarray:
    return np.array([frame.elements[tag] for frame in frames])


def _normal(frame: _Frame) -> np.ndarray:
    row, column = frame.elements["ImageOrientationPatient"].reshape(2, 3)
    normal = np.cross(row, column)
    return normal / np.linalg.norm(normal)


def _order(frames: Sequence[_Frame]) -> list[int]:
    return np.argsort(_array(frames, "ImagePositionPatient") @ _normal(frames[0]), kind="stable").tolist()


def _problem(frames: Sequence[_Frame]) -> str:
    """Why slices are no regular grid of known values, and what helps; empty where they are.

    With missing slices, several acquisitions in one series or a tilted gantry, anatomy would be squeezed or skewed.
    """
    if len(frames) < 2:
        return "it is a single slice: give the folder of its series"
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        bad = [frame.file for frame in frames if not np.isfinite(frame.elements[tag]).all()]
        if bad:
            return f"{len(bad)} of its {len(frames)} slices have no {tag} ({few(bad, 1)}): complete or convert them"
    row, column = np.moveaxis(_array(frames, "ImageOrientationPatient").reshape(-1, 2, 3), 1, 0)
    products = [(row * row).sum(1) - 1, (column * column).sum(1) - 1, (row * column).sum(1)]
    if np.abs(products).max() > 2 * _ROUNDING:
        return "the axes of its slices (ImageOrientationPatient) are no unit vectors at right angles: correct them"
    sizes = {frame.size for frame in frames}
    spacings = _array(frames, "PixelSpacing")
    if spacings.min() <= 0:
        return f"its slices have the PixelSpacing {spacings.min()} mm: correct it"
    modalities = {frame.modality for frame in frames}
    if len(sizes) > 1 or len(modalities) > 1 or (np.ptp(spacings, axis=0) > _ROUNDING * spacings[0]).any():
        return "its slices differ in size or PixelSpacing, or Modality, as of several scans: make a series of each"
    orientations = _array(frames, "ImageOrientationPatient")
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        return "its slices lie in several planes, as those of a localizer: leave it out"
    normal, places = _normal(frames[0]), _array(frames, "ImagePositionPatient")[_order(frames)]
    steps = np.diff(places @ normal)
    median = np.median(steps)
    if steps.min() < _SAME_PLACE:
        return "several slices lie at one place, as of several phases or acquisitions: make a series of each"
    if np.abs(steps - median).max() > max(_UNEVEN * median, _UNEVEN) + 1e-6:
        return (
            f"its slices lie {steps.min():.4g} to {steps.max():.4g} mm apart: complete the series, or convert it to a "
            "file with even steps"
        )
    total = places[-1] - places[0]
    drift = np.linalg.norm(total - (total @ normal) * normal)
    if drift > _DRIFT:
        return (
            f"its slices shift by {drift:.4g} mm from the first to the last, as with a tilted gantry: convert it to "
            "NIfTI with a tool that corrects this"
        )
    scales = np.hstack([_array(frames, "RescaleSlope"), _array(frames, "RescaleIntercept")])
    missing = np.isnan(scales)
    # Without units, as in MR, stored values are as good as any, if all slices have them.
    if missing.any() and (not missing.all() or frames[0].modality in _IN_UNITS):
        return (
            f"{missing.any(axis=1).sum()} of its {len(frames)} slices lack RescaleSlope or RescaleIntercept, so that "
            "their values are unknown: add them (1 and 0 where values are stored as they are), or convert it to NIfTI"
        )
    if np.isinf(scales).any() or not scales[:, 0].all():
        return "a RescaleSlope is 0 or infinite, or a RescaleIntercept is: correct it"
    return ""


def _affine(order: Sequence[_Frame]) -> np.ndarray:
    places, normal = _array(order, "ImagePositionPatient"), _normal(order[0])
    row, column = (axis / np.linalg.norm(axis) for axis in order[0].elements["ImageOrientationPatient"].reshape(2, 3))
    between_rows, between_columns = order[0].elements["PixelSpacing"]
    step = (places[-1] - places[0]) @ normal / (len(order) - 1)
    to_lps = np.stack([row * between_columns, column * between_rows, normal * step, places[0]], axis=-1)
    return np.vstack([np.diag([-1.0, -1, 1]) @ to_lps, [0, 0, 0, 1]])
