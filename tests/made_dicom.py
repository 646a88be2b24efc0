"""DICOM files whose every element a test may set, written with pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

CT, ENHANCED_CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.4"


def _file(sop_class: str, uid: str, pixels: np.ndarray, fields: dict[str, Any]):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = "1.2", "1.2.3", "CT"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in fields.items():
        if value is None:
            if name in dataset:
                delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.add_new("PixelData", "OW", pixels.tobytes())
    return dataset


def _save(dataset, path: Path) -> None:
    import pydicom

    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def write_slice(path: Path, pixels: np.ndarray, number: int = 0, **fields: Any) -> None:
    """One slice (rows, columns), by default CT at z = 3 mm * number, 2 mm between rows and 1.5 mm between columns."""
    place = {
        "InstanceNumber": number + 1,
        "ImagePositionPatient": [5, 6, 3 * number],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [2, 1.5],
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
    }
    _save(_file(CT, f"1.2.3.{number + 1}", pixels, {**place, **fields}), path)


def write_series(folder: Path, stored: np.ndarray, change=lambda number: {}) -> Path:
    """A file for each slice of (slices, rows, columns), with the elements that ``change(number)`` gives."""
    for number, pixels in enumerate(stored):
        write_slice(folder / f"{number:02}.dcm", pixels, number, **change(number))
    return folder


def write_frames(path: Path, stored: np.ndarray, places: list, scales: list, shared: dict | None = None) -> Path:
    """One multi-frame file of (frames, rows, columns): the position of each frame, and its (slope, intercept)."""
    pydicom = pytest.importorskip("pydicom")

    def group(macros: dict[str, dict]):
        dataset = pydicom.Dataset()
        for macro, elements in macros.items():
            item = pydicom.Dataset()
            for name, value in elements.items():
                setattr(item, name, value)
            setattr(dataset, macro, [item])
        return dataset

    every = {
        "PixelMeasuresSequence": {"PixelSpacing": [2, 1.5]},
        "PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        **(shared or {}),
    }
    each = [
        {
            "PlanePositionSequence": {"ImagePositionPatient": list(place)},
            **(
                {
                    "PixelValueTransformationSequence": dict(
                        zip(("RescaleSlope", "RescaleIntercept"), scale, strict=True)
                    )
                }
                if scale
                else {}
            ),
        }
        for place, scale in zip(places, scales, strict=True)
    ]
    fields = {
        "NumberOfFrames": len(stored),
        "SharedFunctionalGroupsSequence": [group(every)],
        "PerFrameFunctionalGroupsSequence": [group(macros) for macros in each],
    }
    _save(_file(ENHANCED_CT, f"1.2.4.{path.stem}", stored, fields), path)
    return path
