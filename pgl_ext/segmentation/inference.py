"""Segmenting new scans: which ones, and the files that are written of each."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from monai.config import PathLike
from monai.utils import convert_to_numpy

from pgl_ext.data.find import find_scans
from pgl_ext.data.prepare import check_items, resolve_bad
from pgl_ext.errors import few
from pgl_ext.files import append_csv, claim_folder, read_csv, release_folder, write_csv, write_nifti
from pgl_ext.segmentation.cases import draw_case, segmented_items
from pgl_ext.segmentation.dicom_seg import require_highdicom, write_dicom_seg
from pgl_ext.settings import parse_bool
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.formats import NIFTI_SUFFIXES, READING_FIELDS, file_suffix, is_dicom_file
from pgl_ext.transforms.load import series_files

__all__ = ["SaveSegmentations", "scans_to_segment"]

logger = logging.getLogger(__name__)

_NIFTI_OUTPUTS = ("_seg.nii.gz", "_probabilities.nii.gz", "_uncertainty.nii.gz")
_VOLUMES = "volumes.csv"
_OUTPUTS = (*_NIFTI_OUTPUTS, "_seg.dcm", "_overlay.png")


def scans_to_segment(
    output_dir: PathLike,
    loading: Callable[[Mapping], Any],
    dataset_dir: PathLike | None = None,
    data_list_file_path: PathLike | None = None,
    data_list_key: str = "test",
    skip_bad_files: bool = False,
    overwrite: bool = False,
    dicom_seg: bool = True,
    resume: bool = False,
    channel_names: Sequence[str] = (),
) -> list[dict]:
    """The scans to segment, after making sure that all can be read and that nothing is overwritten.

    Args:
        output_dir: where the segmentations will be written.
        loading: transforms that load and check one item, to find bad scans before anything is computed.
        dataset_dir, data_list_file_path, data_list_key: see :func:`~pgl_ext.data.find.find_scans`.
        skip_bad_files: leave out scans that cannot be read instead of raising.
        overwrite: whether outputs of an earlier run may be replaced.
        dicom_seg: whether DICOM SEG will be written for DICOM series.
        resume: leave out the scans that an earlier run has finished; its last one is done again.
        channel_names: see :func:`~pgl_ext.data.find.find_volumes`.

    Returns:
        Items with ``"image"``, ``"name"`` (unique, usable as a file name) and ``"series_uid"`` for a DICOM series.

    Raises:
        ValueError: there is nothing to segment.
        BadVolumesError: scans that cannot be read, all of them.
        FileExistsError: there are outputs of these scans already.
        ImportError: a package for DICOM SEG is not installed.
    """
    overwrite, resume = parse_bool(overwrite, "overwrite"), parse_bool(resume, "resume")
    items = find_scans(dataset_dir, data_list_file_path, data_list_key, _NIFTI_OUTPUTS, channel_names)
    paths = [Path(output_dir) / f"{item['name']}{suffix}" for item in items for suffix in _OUTPUTS]
    present = [str(path) for path in paths if path.exists()]
    if present and not overwrite and not resume:
        raise FileExistsError(
            f"{few(present, 3)} exist already: give another folder with --output_dir DIR, go on where the earlier run "
            "was stopped with --resume true, or replace them with --overwrite true."
        )
    table = Path(output_dir) / _VOLUMES
    if resume and table.is_file():
        *finished, _ = dict.fromkeys(row["case"] for row in read_csv(table)) or [None]
        items = [item for item in items if item["name"] not in finished]
    if parse_bool(dicom_seg, "save_dicom_seg") and any(_is_dicom(item["image"]) for item in items):
        require_highdicom()
    return resolve_bad(check_items(items, loading), items, skip_bad_files, Path(output_dir) / "skipped_files.txt")


def _is_dicom(path: str) -> bool:
    return os.path.isdir(path) or is_dicom_file(path)


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
    """

    def __init__(
        self, output_dir: PathLike, task: SegmentationTask, dicom_seg: bool = True, overlays: bool = True
    ) -> None:
        self.output_dir = Path(output_dir)
        self.task = task
        self.dicom_seg = parse_bool(dicom_seg, "save_dicom_seg")
        self.overlays = parse_bool(overlays, "overlays")
        self._volumes: dict[str, list[dict[str, str]]] | None = None

    def attach(self, engine: Engine) -> None:
        """Write after each iteration; where another run writes to the folder now, a FileExistsError ends this one."""
        engine.add_event_handler(Events.STARTED, lambda: claim_folder(self.output_dir))
        engine.add_event_handler(Events.COMPLETED, lambda: release_folder(self.output_dir))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_all)

    def _save_all(self, engine: Engine) -> None:
        for data in segmented_items(engine):
            self.save(data)

    def save(self, data: Mapping[str, Any]) -> None:
        """Write the files of one scan.

        Its data are ``name``; ``image``, the preprocessed scan, whose meta names its file; on the grid of the file
        ``pred``, the label map (1, X, Y, Z), and ``organs``, the masks (organs, X, Y, Z); and optionally
        ``pred_probabilities``, ``pred_uncertainty`` (channels, X, Y, Z) and what else the scan was read by.
        """
        name, path = data["name"], str(data["image"].meta["filename_or_obj"])
        *nifti, dicom, overlay = outputs = [self.output_dir / f"{name}{suffix}" for suffix in _OUTPUTS]
        for file in outputs:
            # What an earlier run wrote must not be taken for this one's.
            file.unlink(missing_ok=True)
        affine = np.asarray(data["pred"].affine, dtype=np.float64)
        header = nib.load(path).header if file_suffix(path) in NIFTI_SUFFIXES else None
        for file, key in zip(nifti, ("pred", "pred_probabilities", "pred_uncertainty"), strict=True):
            if key in data:
                values = np.moveaxis(convert_to_numpy(data[key]), 0, -1)
                write_nifti(values[..., 0] if values.shape[-1] == 1 else values, affine, file, header)
        masks = convert_to_numpy(data["organs"])
        if self.dicom_seg and _is_dicom(path):
            self._write_dicom(dicom, masks, path, data.get("series_uid", ""))
        if self.overlays:
            draw_case(
                {"image": path, **{field: data[field] for field in READING_FIELDS if field in data}},
                {"segmentation": data["organs"]},
                self.task,
                overlay,
                name,
            )
        # Last, since it says that the scan is finished.
        self._add_volumes(name, masks, affine)
        logger.info("%s: segmented, %s", path, nifti[0])

    def _add_volumes(self, name: str, masks: np.ndarray, affine: np.ndarray) -> None:
        path = self.output_dir / _VOLUMES
        if self._volumes is None:
            rows = read_csv(path) if path.is_file() else []
            self._volumes = {
                case: [row for row in rows if row["case"] == case] for case in {r["case"]: 0 for r in rows}
            }
            is_new = True
        else:
            is_new = name in self._volumes
        voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
        volumes = [np.count_nonzero(mask) * voxel_ml for mask in masks]
        added = [
            {"case": name, "organ": organ, "millilitres": f"{volume:.3f}"}
            for organ, volume in zip(self.task.names, volumes, strict=True)
        ]
        self._volumes.pop(name, None)
        self._volumes[name] = added
        if is_new:
            write_csv(path, [{n: row.get(n, "") for n in added[0]} for rows in self._volumes.values() for row in rows])
        else:  # not all anew for each of thousands of scans
            append_csv(path, added)

    def _write_dicom(self, out: Path, masks: np.ndarray, path: str, series_uid: str) -> None:
        files = series_files(path, series_uid) if os.path.isdir(path) else [path]
        try:
            write_dicom_seg(masks, self.task.names, files, out)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            # Headers can be wrong in many ways. The other scans, and the NIfTI of this one, must not be lost for it.
            logger.error("%s: no DICOM SEG, as its headers do not allow it: %s", path, error)
