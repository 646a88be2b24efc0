"""Segmenting new scans: which ones, and the files that are written of each."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Orientationd
from monai.utils import convert_to_numpy

from pgl_ext.data.find import find_scans
from pgl_ext.data.prepare import check_items, resolve_bad
from pgl_ext.files import write_csv, write_nifti
from pgl_ext.segmentation.dicom_seg import require_highdicom, write_dicom_seg
from pgl_ext.settings import parse_bool
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.formats import NIFTI_SUFFIXES, file_suffix, is_dicom_file
from pgl_ext.transforms.load import LoadVolumed, series_files

__all__ = ["SaveSegmentations", "scans_to_segment"]

logger = logging.getLogger(__name__)

_LABELS, _PROBABILITIES, _UNCERTAINTY = "_seg.nii.gz", "_probabilities.nii.gz", "_uncertainty.nii.gz"
_DICOM, _OVERLAY = "_seg.dcm", "_overlay.png"
_OUTPUTS = (_LABELS, _PROBABILITIES, _UNCERTAINTY, _DICOM, _OVERLAY)
_COLUMNS = ("case", "organ", "millilitres")


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

    Args:
        output_dir: where the segmentations will be written.
        loading: transforms that load and check one item, to find bad scans before anything is computed.
        dataset_dir: see :func:`~pgl_ext.data.find.find_scans`, like the next two.
        data_list_file_path: JSON data list.
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
    written = (_LABELS, _PROBABILITIES, _UNCERTAINTY)
    items = find_scans(dataset_dir, data_list_file_path, data_list_key, passed_over=written)
    _check_outputs(items, Path(output_dir), parse_bool(overwrite, "overwrite"))
    if parse_bool(dicom_seg, "save_dicom_seg") and any(_is_dicom(item["image"]) for item in items):
        require_highdicom()
    return resolve_bad(check_items(items, loading), items, skip_bad_files, Path(output_dir) / "skipped_files.txt")


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
        is_nifti = file_suffix(source["image"]) in NIFTI_SUFFIXES
        header = nib.load(source["image"]).header if is_nifti else None
        write_nifti(convert_to_numpy(labels)[0], affine, self._path(name, _LABELS), header)
        for suffix in (_PROBABILITIES, _UNCERTAINTY):
            extra = data.get(f"{self.pred_key}{suffix.removesuffix('.nii.gz')}")
            if extra is not None:
                values = np.moveaxis(convert_to_numpy(extra), 0, -1)
                values = values[..., 0] if values.shape[-1] == 1 else values
                write_nifti(values, affine, self._path(name, suffix), header)
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
        from pgl_ext.figures.overlays import plot_overlay, thinning

        data = {**LoadVolumed("image")(source), "masks": masks}
        data = Orientationd(["image", "masks"], axcodes="RAS", labels=None)(data)
        thinned = thinning(data["image"].shape[1:])
        plot_overlay(
            convert_to_numpy(data["image"])[0][thinned],
            {"segmentation": convert_to_numpy(data["masks"])[(slice(None), *thinned)]},
            self.task.names,
            np.multiply(affine_to_spacing(data["image"].affine), [part.step for part in thinned]),
            self._path(name, _OVERLAY),
            name,
        )
