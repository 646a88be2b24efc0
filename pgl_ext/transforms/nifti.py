"""NIfTI: voxels with the file's scale, and the grid that sform, qform, voxel size and units agree on."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from typing import BinaryIO

import nibabel as nib
import numpy as np

from pgl_ext.transforms.checks import BadVolumeError

__all__ = ["assumed_affine", "nifti_grid", "read_nifti"]

_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # mm of NIfTI's codes: unknown, metre, millimetre, micrometre
_STANDARD_SPACE = (3, 4)  # codes of Talairach and MNI: what an sform maps to may be larger or smaller than the patient
_ROUNDING = 0.01  # share by which voxel sizes may differ


def nifti_grid(path: str, orientation: str | None = None) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape in voxels, and affine (4, 4), voxel index to RAS mm, as the header has them; see :func:`read_nifti`."""
    with _opened(path) as (_, _, header):
        return header.get_data_shape(), _affine(header, path, orientation)


def read_nifti(path: str, orientation: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole NIfTI file, checksum included.

    The grid is the sform's, or the qform's where there is no sform, or where the sform maps to a standard space of
    another scale.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        orientation: axes of a file that has neither, such as ``"LAS"``; its origin is in the middle then.

    Returns:
        voxels in the order of the file, and the affine (4, 4), voxel index to RAS mm.

    Raises:
        BadVolumeError: the header leaves the grid or the values open, or contradicts itself.
        EOFError, OSError, ValueError, nibabel's errors: the file is damaged or no NIfTI.
    """
    with _opened(path) as (file, kind, header):
        affine = _affine(header, path, orientation)
        slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
        if np.isfinite(intercept) and intercept != 0 and (slope == 0 or not np.isfinite(slope)):
            raise BadVolumeError(f"{path} has scl_slope {slope:g}, but scl_inter {intercept:g}: correct its header.")
        # Into memory: a mapped file may change or go.
        voxels = np.asanyarray(kind.from_file_map(kind.make_file_map({"image": file}), mmap=False).dataobj)
        # The checksum of compressed files lies behind the last voxel.
        while file.read(1 << 20):
            pass
    return voxels, affine


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, type[nib.Nifti1Image], nib.Nifti1Header]]:
    """The file, its kind, and its header as it is: nibabel puts 1 mm where there is no voxel size."""
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
        kinds = (nib.Nifti1Image, nib.Nifti2Image)
        kind = next((kind for kind in kinds if kind.header_class.may_contain_header(start)), None)
        if kind is None:
            raise ValueError("it does not begin as NIfTI files do")
        file.seek(0)
        header = kind.header_class.from_fileobj(file, check=False)
        file.seek(0)
        yield file, kind, header


def _affine(header: nib.Nifti1Header, path: str, orientation: str | None) -> np.ndarray:
    pixdim = header["pixdim"].astype(np.float64)
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    unit = _UNITS.get(int(header["xyzt_units"]) % 8)
    sform, qform = header.get_sform() if 0 < sform_code <= 5 else None, _qform(header)
    has_form = sform is not None or qform is not None
    for name, is_right in {
        f"pixdim {pixdim[1:4].tolist()}": np.isfinite(pixdim[1:4]).all() and pixdim[1:4].min() > 0,
        f"xyzt_units {header['xyzt_units']}": unit is not None,
        f"sform_code {sform_code}, and a qform of code {qform_code}, qfac {pixdim[0]:g} and its quaternion": has_form
        or sform_code == qform_code == 0,
    }.items():
        if not is_right:
            raise BadVolumeError(f"{path} has {name}: correct its header.")
    to_mm = np.diag([unit, unit, unit, 1.0])
    if not has_form:
        return to_mm @ assumed_affine(pixdim[1:4], header.get_data_shape()[:3], orientation, path)
    sizes = np.linalg.norm(header.get_sform()[:3, :3], axis=0)
    if sform is not None and np.allclose(sizes, pixdim[1:4], rtol=_ROUNDING, atol=0):
        # A few degrees between the two are an alignment; more, and one has left and right, or other ends, reversed.
        if qform is not None and np.diag(np.linalg.solve(qform[:3, :3], sform[:3, :3])).min() < 0.5:
            axes = ["".join(nib.aff2axcodes(form)) for form in (sform, qform)]
            raise BadVolumeError(
                f"{path} has the axes {axes[0]} by its sform, but {axes[1]} by its qform: correct one."
            )
        return to_mm @ sform
    if qform is not None and (sform is None or sform_code in _STANDARD_SPACE):
        return to_mm @ qform
    raise BadVolumeError(
        f"{path} has voxels of {sizes.tolist()} by its sform, but of {pixdim[1:4].tolist()} by its pixdim: correct its "
        "header."
    )


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    """The qform (4, 4), None where there is none, or its code, qfac or quaternion is out of bounds."""
    if not 0 < header["qform_code"] <= 5 or header["pixdim"][0] not in (-1, 0, 1):
        return None
    header["pixdim"][0] = header["pixdim"][0] or 1  # as NIfTI says of files older than it
    try:
        return header.get_qform()
    except (ValueError, nib.spatialimages.HeaderDataError):  # such as a quaternion longer than 1
        return None


def assumed_affine(
    spacing: np.ndarray, shape: tuple[int, ...], orientation: str | None, path: str, missing: str = "qform and sform"
) -> np.ndarray:
    """The affine (4, 4) of a file that does not say how its axes lie, with the origin in the middle.

    Args:
        spacing: of its voxels, 3 numbers.
        shape: in voxels.
        orientation: the axes that the item gives, such as ``"LAS"``.
        path, missing: the file, and what it lacks, for messages.

    Raises:
        BadVolumeError: the item gives none.
    """
    if orientation is None:
        raise BadVolumeError(
            f"{path} has no {missing}, so that left and right are unknown: add them, or list the scan with its axes, "
            f'such as {{"image": ..., "orientation": "LAS"}} (left, anterior, superior), in a --data_list_file_path.'
        )
    try:
        axes = nib.orientations.axcodes2ornt(tuple(orientation))
    except (TypeError, ValueError):
        axes = np.empty((0, 2))
    if sorted(axes[:, 0]) != [0, 1, 2]:
        raise BadVolumeError(f'the orientation {orientation!r} given for {path} names no three axes, as "LAS" does.')
    affine = np.eye(4)
    affine[:3, :3] = 0
    affine[axes[:, 0].astype(int), range(3)] = axes[:, 1] * spacing
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine
