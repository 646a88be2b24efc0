"""DICOM Segmentation objects (SEG) that overlay the series that was segmented."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from monai.config import PathLike

import pgl_ext
from pgl_ext.figures.base import organ_colors
from pgl_ext.files import write_atomically

__all__ = ["organ_codes", "require_highdicom", "write_dicom_seg"]

# Names that DICOM has under another word; letters only, lower case.
_SYNONYMS = {
    **{name: f"{name}gland" for name in ("parotid", "submandibular", "adrenal")},
    **dict.fromkeys(("tumour", "tumor", "cancer"), "neoplasm"),
    "oesophagus": "esophagus",
    "urinarybladder": "bladder",
    "vertebralcolumn": "spine",
}
# What references to a source are made from: anonymising tools drop it, but DICOM wants it, if only empty (type 2).
_WANTED = (
    "AccessionNumber", "PatientBirthDate", "PatientID", "PatientName", "PatientSex", "ReferringPhysicianName",
    "SeriesNumber", "SliceThickness", "StudyDate", "StudyID", "StudyTime",
)  # fmt: skip


def require_highdicom() -> ModuleType:
    """The package ``highdicom``; also to check, before hours of computation, that DICOM SEG can be written.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise ImportError(
            "Writing DICOM SEG needs the package 'highdicom': pip install highdicom, or go without with "
            "--save_dicom_seg false."
        ) from error
    return highdicom


def write_dicom_seg(
    masks: np.ndarray,
    names: Sequence[str],
    source_files: Sequence[PathLike],
    path: PathLike,
    series_description: str = "Segmentation",
) -> None:
    """Write masks of organs as one DICOM SEG object, whose frames lie on the slices of the source series.

    Each frame refers to the slice it was made from and takes position and orientation from it, also in oblique series
    and with uneven distances of the slices. Overlapping organs are kept.

    Args:
        masks: bool (organs, X, Y, Z): x along a slice's columns, y along its rows, z in the order of
            ``source_files``, as ITK reads a series.
        names: of the organs: labels of the segments, numbered from 1. An organ without a voxel is described too.
        source_files: single-frame DICOM files of the series, one per slice.
        path: file to write.
        series_description: of the new series.

    Raises:
        ImportError: ``highdicom`` is not installed.
        ValueError: the files do not fit the masks.
    """
    hd = require_highdicom()
    import pydicom

    # It reports every module of attributes that it copies.
    logging.getLogger("highdicom.base").setLevel(logging.WARNING)
    sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in source_files]
    _check(masks, names, sources, source_files)
    for source in sources:
        for name in _WANTED:
            source.setdefault(name, None)
        # All slices must share it; it need only differ from that of other series.
        source.FrameOfReferenceUID = source.get("FrameOfReferenceUID") or f"{source.SeriesInstanceUID}.1"[:64]
    seg = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=_frames(masks),
        segmentation_type="BINARY",
        segment_descriptions=_segments(hd, names),
        series_instance_uid=hd.UID(),
        series_number=int(sources[0].SeriesNumber or 0) % 10_000 + 1000,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="PGL for MONAI",
        manufacturer_model_name="pgl_segmentation",
        software_versions=pgl_ext.__version__,
        device_serial_number="none",
        content_label="SEGMENTATION",
        series_description=series_description,
    )
    write_atomically(seg.save_as, path)


def _check(masks: np.ndarray, names: Sequence[str], sources: Sequence[Any], files: Sequence) -> None:
    if masks.ndim != 4 or len(masks) != len(names):
        raise ValueError(f"masks have shape {masks.shape}, expected (organs, X, Y, Z) of {len(names)} organs.")
    shapes = {(int(source.get("NumberOfFrames") or 1), source.Columns, source.Rows) for source in sources}
    if shapes != {(1, *masks.shape[1:3])} or len(sources) != masks.shape[3]:
        raise ValueError(
            f"{len(sources)} DICOM files with (frames, columns, rows) {sorted(shapes)}, such as {files[0]}, do not fit "
            f"masks of {masks.shape[1:]} voxels: give the single-frame files that the scan was read from, in order."
        )


def _frames(masks: np.ndarray) -> np.ndarray:
    """(Z, Y, X) of segment numbers where organs do not overlap, a fraction of the memory, else (Z, Y, X, organs)."""
    labels = np.zeros(masks.shape[:0:-1], dtype=np.uint8 if len(masks) < 256 else np.uint16)
    for number, mask in enumerate(masks, start=1):
        if labels[mask.T].any():
            return np.ascontiguousarray(masks.T)
        labels[mask.T] = number
    return labels


def _segments(hd: ModuleType, names: Sequence[str]) -> list:
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name="pgl_segmentation", family=codes.DCM.ArtificialIntelligence, version=pgl_ext.__version__
    )
    segments = []
    for number, (name, color) in enumerate(zip(names, organ_colors(len(names)), strict=True), start=1):
        category, kind, region, side = organ_codes(name)
        segment = hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            anatomic_regions=[region] if region else None,
            display_color=hd.color.CIELabColor.from_rgb(*(round(255 * float(c)) for c in color)),
        )
        if side:
            coded = segment.SegmentedPropertyTypeCodeSequence[0]
            coded.SegmentedPropertyTypeModifierCodeSequence = [hd.sr.CodedConcept.from_code(side)]
        segments.append(segment)
    return segments


def organ_codes(name: str) -> tuple[Any, Any, Any, Any]:
    """SNOMED CT codes of an organ's name, from DICOM's lists of anatomy and of abnormalities.

    Args:
        name: such as "left adrenal gland", "RightParotid", "kidney tumour".

    Returns:
        Category, type, organ that an abnormality lies in, and side; the last two may be None. An unknown name has the
        type "Anatomical Structure".
    """
    from pydicom.sr.codedict import codes

    anatomy, abnormalities = codes.CID7192, codes.CID7159  # context groups of DICOM PS3.16
    category = codes.SCT.AnatomicalStructure
    words = re.findall("[a-z0-9]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())
    structure = _code(anatomy, words)
    if structure:
        return category, structure, None, None
    sides = {"left": codes.SCT.Left, "right": codes.SCT.Right}
    side = next((code for word, code in sides.items() if word in words), None)
    words = [word for word in words if word not in sides]
    structure, abnormality = _code(anatomy, words), _code(abnormalities, words[-1:])
    if abnormality and not structure:
        return codes.SCT.MorphologicallyAbnormalStructure, abnormality, _code(anatomy, words[:-1]), side
    return category, structure or category, None, side


def _code(group: Any, words: Sequence[str]) -> Any:
    """The code of a context group that words name, in singular or plural; None if there is none."""
    keywords = {keyword.lower(): keyword for keyword in group.dir()}
    letters = "".join(words)
    for candidate in (letters, letters.removesuffix("s")):
        keyword = keywords.get(_SYNONYMS.get(candidate, candidate))
        if keyword:
            return getattr(group, keyword)
    return None
