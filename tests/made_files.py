"""Affines of scans, data lists, and files of every format, made with libraries that the package does not read with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

SHAPE = (5, 6, 7)


def voxels(shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def oblique(axes=(0, 1, 2), flips=(1, 1, 1), tilt=0.0) -> np.ndarray:
    """Affine to RAS mm of a scan turned by about 11 degrees, its axes permuted and flipped; tilt about x in radians."""
    c, s = np.cos(0.2), np.sin(0.2)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    c, s = np.cos(tilt), np.sin(tilt)
    rotation = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ rotation
    matrix = np.eye(4)
    matrix[:3, :3] = (rotation @ np.diag(flips))[:, list(axes)] @ np.diag([1.5, 2.0, 2.5])
    matrix[:3, 3] = [10, -20, 30]
    return matrix


def touch(root: Path, *names: str) -> None:
    """Files with no content to speak of."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def write_list(path: Path, entries: list, key: str = "training") -> Path:
    path.write_text(json.dumps({"name": "x", key: entries}))
    return path


def sitk_image(array: np.ndarray, affine: np.ndarray):
    """A SimpleITK image of voxels (X, Y, Z); ITK's world is LPS."""
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    to_lps = np.diag([-1, -1, 1]) @ affine[:3]
    spacing = np.linalg.norm(to_lps[:, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((to_lps[:, :3] / spacing).ravel().tolist())
    image.SetOrigin(to_lps[:, 3].tolist())
    return image


def save_dicom_series(folder: Path, array: np.ndarray, affine: np.ndarray, uid: str, prefix: str = "") -> Path:
    """One file per slice, the names in reverse order of the slices."""
    sitk = pytest.importorskip("SimpleITK")
    folder.mkdir(parents=True, exist_ok=True)
    volume = sitk_image(array, affine)
    direction = np.reshape(volume.GetDirection(), (3, 3))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    count = array.shape[2]
    for index in range(count):
        image = volume[:, :, index : index + 1]
        tags = {
            "0008|0060": "CT",
            "0020|000d": "1.2",
            "0020|000e": uid,
            "0020|0032": "\\".join(f"{x:.10g}" for x in image.GetOrigin()),
            "0020|0037": "\\".join(f"{x:.10g}" for x in [*direction[:, 0], *direction[:, 1]]),
            "0020|0013": str(count - index),
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{prefix}{count - index:03}.dcm"))
        writer.Execute(image)
    return folder


def oblique_affine(spacing=(0.9, 1.7, 3.1), shear: float = 0.0) -> np.ndarray:
    """Voxel axes permuted, partly reversed, and turned about two axes; anisotropic."""
    a, b = 0.3, 0.2
    about_z = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    affine = np.eye(4)
    turned = about_z @ about_x @ np.array([[0, -1, 0], [0, 0, 1], [1, 0, 0]])
    affine[:3, :3] = turned @ np.array([[1, 0, shear], [0, 1, 0], [0, 0, 1]]) @ np.diag(spacing)
    affine[:3, 3] = [10, -20, 30]
    return affine
