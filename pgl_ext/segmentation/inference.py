"""Segmenting new scans: which ones, clean-up of what the network finds, and the files that are written."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Compose, MapTransform, Orientationd
from monai.utils import convert_to_numpy, convert_to_tensor
from scipy import ndimage

from pgl_ext.data.cache import resolve_bad
from pgl_ext.transforms.checks import BadVolumesError
from pgl_ext.data.datalist import NIFTI_SUFFIXES, dicom_header, file_suffix, is_dicom_file
from pgl_ext.data.datalist import inference_items, unique_names
from pgl_ext.segmentation.dicom_seg import require_highdicom, write_dicom_seg
from pgl_ext.evaluation.handler import check_cases
from pgl_ext.figures.overlays import plot_overlay, thinning
from pgl_ext.files import write_atomically, write_csv
from pgl_ext.settings import parse_bool
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.load import LoadVolumed, series_files

__all__ = ["KeepComponentsd", "LabelMapd", "SaveSegmentations", "scans_to_segment"]

logger = logging.getLogger(__name__)

_LABELS, _PROBABILITIES, _UNCERTAINTY = "_seg.nii.gz", "_probabilities.nii.gz", "_uncertainty.nii.gz"
_DICOM, _OVERLAY = "_seg.dcm", "_overlay.png"
_OUTPUTS = (_LABELS, _PROBABILITIES, _UNCERTAINTY, _DICOM, _OVERLAY)
_COLUMNS = ("case", "organ", "millilitres")
# Fields of a NIfTI header that say where its voxels lie.
_GRID_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
    "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


# --- what to run on -------------------------------------------------------------------------------------------------


def scans_to_segment(
    output_dir: str | os.PathLike,
    loading: Callable[[Mapping], Any],
    dataset_dir: str | os.PathLike | None = None,
    data_list_file_path: str | os.PathLike | None = None,
    data_list_key: str = "test",
    skip_bad_files: bool = False,
    overwrite: bool = False,
    dicom_seg: bool = True,
) -> list[dict]:
    """The scans to segment, after making sure that all can be read and that nothing is overwritten.

    Outputs of earlier runs that lie in ``dataset_dir`` are passed over.

    Args:
        output_dir: where the segmentations will be written.
        loading: transforms that load and check one item, to find bad scans before anything is computed.
        dataset_dir: folder of scans, searched with the folders below it, or one file; a slice of a DICOM series stands
            for its series. With a data list the folder that its paths start from.
        data_list_file_path: JSON data list to take the scans from instead.
        data_list_key: which list of the file to take.
        skip_bad_files: leave out scans that cannot be read instead of raising.
        overwrite: whether outputs of an earlier run may be replaced.
        dicom_seg: whether DICOM SEG will be written for DICOM series.

    Returns:
        Items with ``"image"``, ``"name"`` (unique, usable as a file name) and ``"series_uid"`` for a DICOM series.

    Raises:
        ValueError: there is nothing to segment.
        BadVolumesError: scans that cannot be read, all of them.
        FileExistsError: there are outputs of these scans already.
        ImportError: a package for DICOM SEG is not installed.
    """
    items = _items(dataset_dir, data_list_file_path, data_list_key)
    _check_outputs(items, Path(output_dir), parse_bool(overwrite, "overwrite"))
    if parse_bool(dicom_seg, "save_dicom_seg") and any(_is_dicom(item["image"]) for item in items):
        require_highdicom()
    try:
        check_cases(items, loading)
    except BadVolumesError as error:
        skip = parse_bool(skip_bad_files, "skip_bad_files")
        return resolve_bad(error.bad, items, skip, Path(output_dir) / "skipped_files.txt")
    return items


def _items(dataset_dir: Any, data_list_file_path: Any, data_list_key: str) -> list[dict]:
    if data_list_file_path is None and dataset_dir is not None and os.path.isfile(dataset_dir):
        item = _whole_series(os.path.abspath(dataset_dir))
        return [{**item, "name": name} for name in unique_names([item])]
    found = inference_items(dataset_dir, data_list_file_path, data_list_key)
    items = [item for item in found if not item["image"].endswith((_LABELS, _PROBABILITIES, _UNCERTAINTY))]
    if len(items) < len(found):
        logger.info("Passed over %d outputs of earlier runs.", len(found) - len(items))
    if not items:
        raise ValueError(f"Dataset folder {dataset_dir} holds only segmentations: set it to a folder of scans.")
    return items


def _whole_series(path: str) -> dict:
    """The series that a DICOM file is a slice of; other files stand for themselves."""
    if is_dicom_file(path):
        header = dicom_header(path, ["SeriesInstanceUID", "NumberOfFrames"])
        folder, uid = os.path.dirname(path), str(header.get("SeriesInstanceUID", ""))
        if int(header.get("NumberOfFrames") or 1) == 1 and uid and len(series_files(folder, uid)) > 1:
            return {"image": folder, "series_uid": uid}
    return {"image": path}


def _is_dicom(path: str) -> bool:
    return os.path.isdir(path) or is_dicom_file(path)


def _check_outputs(items: Sequence[Mapping], output_dir: Path, overwrite: bool) -> None:
    paths = [output_dir / f"{item['name']}{suffix}" for item in items for suffix in _OUTPUTS]
    present = [str(path) for path in paths if path.exists()]
    if present and not overwrite:
        more = f" and {len(present) - 3} more" if len(present) > 3 else ""
        raise FileExistsError(
            f"{', '.join(present[:3])}{more} exist already: give another folder with --output_dir DIR, or replace them "
            "with --overwrite true."
        )


# --- outputs --------------------------------------------------------------------------------------------------------


class SaveSegmentations:
    """Handler that writes each scan's segmentation as soon as it is there.

    ``NAME_seg.nii.gz``: label map on the grid of the scan's file; of a NIfTI scan also with its qform and sform.
    ``NAME_probabilities.nii.gz`` and ``NAME_uncertainty.nii.gz`` where postprocessing made them: float32, channels
    along the fourth axis. ``NAME_seg.dcm``: DICOM SEG of a DICOM series. ``NAME_overlay.png``: picture.
    ``volumes.csv``: millilitres of each organ; rows of other scans that it already has are kept.

    Args:
        output_dir: folder of the files; made if missing.
        task: names and values of the organs.
        dicom_seg: write DICOM SEG.
        overlays: draw pictures.
        image_key: key of the preprocessed scan, whose meta names its file.
        pred_key: key of the label map (1, X, Y, Z) on the grid of the file.
        masks_key: key of the masks (organs, X, Y, Z) there.
        name_key: key of the name.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        task: SegmentationTask,
        dicom_seg: bool = True,
        overlays: bool = True,
        image_key: str = "image",
        pred_key: str = "pred",
        masks_key: str = "organs",
        name_key: str = "name",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.task = task
        self.dicom_seg = parse_bool(dicom_seg, "save_dicom_seg")
        self.overlays = parse_bool(overlays, "overlays")
        self.image_key = image_key
        self.pred_key = pred_key
        self.masks_key = masks_key
        self.name_key = name_key

    def attach(self, engine: Engine) -> None:
        """Write after each iteration."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_all)

    def _save_all(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            # Postprocessing may have left either of them to either dict.
            self.save({**item, **output})

    def save(self, data: Mapping[Hashable, Any]) -> None:
        """Write the files of one scan.

        Args:
            data: what inference and postprocessing made of it.
        """
        name, labels, masks = data[self.name_key], data[self.pred_key], data[self.masks_key]
        source = {"image": str(data[self.image_key].meta["filename_or_obj"])}
        if "series_uid" in data:
            source["series_uid"] = data["series_uid"]
        for suffix in _OUTPUTS:
            # What an earlier run wrote must not be taken for this one's.
            self._path(name, suffix).unlink(missing_ok=True)
        affine = np.asarray(labels.affine, dtype=np.float64)
        _write_nifti(convert_to_numpy(labels)[0], affine, source["image"], self._path(name, _LABELS))
        for suffix in (_PROBABILITIES, _UNCERTAINTY):
            extra = data.get(f"{self.pred_key}{suffix.removesuffix('.nii.gz')}")
            if extra is not None:
                values = np.moveaxis(convert_to_numpy(extra), 0, -1)
                values = values[..., 0] if values.shape[-1] == 1 else values
                _write_nifti(values, affine, source["image"], self._path(name, suffix))
        self._add_volumes(name, convert_to_numpy(masks), affine)
        if self.dicom_seg and _is_dicom(source["image"]):
            self._write_dicom(name, convert_to_numpy(masks), source)
        if self.overlays:
            self._draw(name, masks, source)
        logger.info("%s: segmented, %s", source["image"], self._path(name, _LABELS))

    def _path(self, name: str, suffix: str) -> Path:
        return self.output_dir / f"{name}{suffix}"

    def _add_volumes(self, name: str, masks: np.ndarray, affine: np.ndarray) -> None:
        path = self.output_dir / "volumes.csv"
        rows = []
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["case"] != name]
        millilitres = abs(np.linalg.det(affine[:3, :3])) / 1000
        for organ, mask in zip(self.task.names, masks, strict=True):
            volume = np.count_nonzero(mask) * millilitres
            rows.append({"case": name, "organ": organ, "millilitres": f"{volume:.3f}"})
        write_csv(path, [{column: row.get(column, "") for column in _COLUMNS} for row in rows])

    def _write_dicom(self, name: str, masks: np.ndarray, source: Mapping[str, str]) -> None:
        path, uid = source["image"], source.get("series_uid", "")
        files = series_files(path, uid) if os.path.isdir(path) else [path]
        try:
            write_dicom_seg(masks, self.task.names, files, self._path(name, _DICOM))
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            # Headers can be wrong in many ways. The other scans, and the NIfTI of this one, must not be lost for it.
            logger.error("%s: no DICOM SEG, as its headers do not allow it: %s", path, error)

    def _draw(self, name: str, masks: MetaTensor, source: Mapping[str, str]) -> None:
        data = {**LoadVolumed("image")(source), "masks": masks}
        data = Compose([Orientationd(["image", "masks"], axcodes="RAS", labels=None)])(data)
        thinned = thinning(data["image"].shape[1:])
        plot_overlay(
            convert_to_numpy(data["image"])[0][thinned],
            {"segmentation": convert_to_numpy(data["masks"])[(slice(None), *thinned)]},
            self.task.names,
            np.multiply(affine_to_spacing(data["image"].affine), [part.step for part in thinned]),
            self._path(name, _OVERLAY),
            name,
        )


def _write_nifti(voxels: np.ndarray, affine: np.ndarray, source: str, path: Path) -> None:
    """Write voxels (X, Y, Z[, C]) on the grid of the scan in ``source``; its header's fields if it is NIfTI."""
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    if file_suffix(source) in NIFTI_SUFFIXES:
        header = nib.load(source).header
        for field in _GRID_FIELDS:
            image.header[field] = header[field]
        image.header["pixdim"][4:] = 1
    else:
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)

    def save(file: io.BufferedIOBase) -> None:
        # As nibabel does, but no time of writing: the same segmentation is the same file.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as compressed:
            image.to_stream(compressed)

    write_atomically(save, path)
