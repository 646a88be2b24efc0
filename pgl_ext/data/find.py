"""Finding what there is in a folder: volumes, labelled cases, scans to run on."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from monai.config import PathLike

from pgl_ext.data.datalist import has_known_suffix, item_name, load_datalist, named_items, without_suffix
from pgl_ext.transforms.formats import (
    DICOM_SUFFIXES,
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    SUPPORTED,
    dicom_header,
    file_suffix,
    is_dicom_file,
)
from pgl_ext.transforms.load import series_files

__all__ = ["find_cases", "find_scans", "find_volumes"]

logger = logging.getLogger(__name__)

_FILE_SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES
_LABEL_FOLDERS = {"labels": "images", "labelstr": "imagestr", "labelsts": "imagests"}
_CASE_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))


def find_volumes(dataset_dir: PathLike) -> list[dict]:
    """Find every volume in a folder and the folders below it.

    NIfTI, NRRD and MetaImage files and DICOM series are found. Files of other types and hidden files are passed
    over, so are DICOM objects that hold no image volume. Folders called ``labels``, ``labelsTr`` or ``labelsTs`` next
    to ``images``, ``imagesTr`` or ``imagesTs``, and ``.seg.nrrd`` files, are left out.

    Args:
        dataset_dir: folder to search; links to folders are followed.

    Returns:
        Items ordered by path: the absolute path ``"image"`` of a file, or of a folder with the ``"series_uid"`` of each
        DICOM series in it.

    Raises:
        ValueError: the folder is missing, is a file, or holds no volume.
        ImportError: there are DICOM files and ``pydicom`` is not installed.
    """
    root = os.path.abspath(dataset_dir)
    remedy = f"Set it to a folder of volumes; {SUPPORTED}."
    if not os.path.isdir(root):
        problem = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"Dataset folder {root} {problem}. {remedy}")
    items: list[dict] = []
    left_out = 0
    for folder, names, is_label_folder in _walk_folders(root):
        volumes = [n for n in names if file_suffix(n) in _FILE_SUFFIXES]
        labels = [n for n in volumes if is_label_folder or n.lower().endswith(".seg.nrrd")]
        left_out += len(labels)
        items += [{"image": os.path.join(folder, n)} for n in volumes if n not in labels]
        if not is_label_folder:
            items += [{"image": folder, "series_uid": uid} for uid in _dicom_series(folder, names)]
    if left_out:
        logger.info("%s: left out %d label files.", root, left_out)
    if not items:
        raise ValueError(f"Dataset folder {root} holds no volumes. {remedy}")
    return sorted(items, key=item_name)


def _walk_folders(root: str) -> Iterator[tuple[str, list[str], bool]]:
    """Each folder below ``root`` once: its path, its visible files, and whether it lies in a label folder."""
    label_roots: set[str] = set()
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # Links may form a loop.
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        siblings = {f.lower() for f in folders}
        inside = folder in label_roots
        label_roots.update(
            os.path.join(folder, f) for f in folders if inside or _LABEL_FOLDERS.get(f.lower()) in siblings
        )
        yield folder, sorted(n for n in names if not n.startswith(".")), inside


def _dicom_series(folder: str, names: Sequence[str]) -> list[str]:
    """UIDs of the DICOM series in ``folder`` that make up a volume."""
    paths = [os.path.join(folder, n) for n in names]
    paths = [p for p in paths if file_suffix(p) in DICOM_SUFFIXES or (not has_known_suffix(p) and is_dicom_file(p))]
    slices: Counter[str] = Counter()
    for path in paths:
        uid, count = _series_and_slices(path)
        slices[uid] += count
    del slices[""]
    single = {uid for uid, count in slices.items() if count < 2}
    if single:
        logger.info("%s: left out %d DICOM series of a single slice.", folder, len(single))
    return sorted(slices.keys() - single)


def _series_and_slices(path: str) -> tuple[str, int]:
    """SeriesInstanceUID, empty if it holds no scan, and number of slices of one DICOM file."""
    try:
        header = dicom_header(path, ["SeriesInstanceUID", "Modality", "Rows", "NumberOfFrames"])
    except OSError as error:
        logger.warning("%s is not a readable DICOM file and is left out: %s", path, error)
        return "", 0
    is_scan = "Rows" in header and header.get("Modality") not in ("SEG", "RTDOSE")
    uid = str(header.get("SeriesInstanceUID", "")) if is_scan else ""
    return uid, int(header.get("NumberOfFrames") or 1)


def find_cases(dataset_dir: PathLike) -> list[dict]:
    """Pair the images and label maps in the folders ``imagesTr`` and ``labelsTr``, or ``images`` and ``labels``.

    An image and its label map have the same path below their folders but for the file type, or the image's name ends
    in nnU-Net's ``_0000``. An image may also be a folder that holds a DICOM series.

    Args:
        dataset_dir: folder that holds both folders. A data list in it is not read.

    Returns:
        Cases ordered by image: absolute ``"image"`` and ``"label"`` paths, and ``"series_uid"`` of a DICOM series.

    Raises:
        ValueError: the folders are missing or empty, or images and label maps do not pair off.
    """
    root = os.path.abspath(dataset_dir)
    pairs = [[os.path.join(root, name) for name in names] for names in _CASE_FOLDERS]
    images, label_maps = next((pair for pair in pairs if all(map(os.path.isdir, pair))), (None, None))
    if images is None:
        raise ValueError(
            f"Dataset folder {root} has neither imagesTr and labelsTr nor images and labels: set --dataset_dir to a "
            "folder that does, or give a --data_list_file_path that names image and label of each case."
        )
    labels: dict[str, str] = {}
    problems = []
    for path in _label_files(label_maps):
        same = labels.setdefault(_case_name(path, label_maps), path)
        if same != path:
            problems.append(f"{path} has the name of {same}")
    cases, used = [], {}
    for item in find_volumes(images):
        name = _case_name(item["image"], images)
        name = name if name in labels else name.removesuffix("_0000")
        if name not in labels:
            problems.append(f"{item_name(item)} has no label map in {label_maps}")
        elif name in used:
            problems.append(f"{labels[name]} belongs to both {used[name]} and {item_name(item)}")
        else:
            used[name] = item_name(item)
            cases.append({**item, "label": labels[name]})
    problems += [f"{labels[name]} has no image in {images}" for name in sorted(set(labels) - set(used))]
    if problems:
        raise ValueError(
            f"{len(problems)} files in {root} do not pair off:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nGive an image and its label map the same name, with one single-channel image for each label map, or "
            "name the pairs in a --data_list_file_path."
        )
    return cases


def _label_files(folder: str) -> list[str]:
    """Label maps below a folder: unlike :func:`find_volumes` with those called ``.seg.nrrd``, but without DICOM."""
    paths = (os.path.join(inside, name) for inside, names, _ in _walk_folders(folder) for name in names)
    return sorted(path for path in paths if file_suffix(path) in _FILE_SUFFIXES)


def _case_name(path: str, folder: str) -> str:
    return os.path.relpath(without_suffix(path), folder).removesuffix(".seg")


def find_scans(
    dataset_dir: PathLike | None = None,
    data_list_file_path: PathLike | None = None,
    data_list_key: str = "training",
    passed_over: Sequence[str] = (),
) -> list[dict]:
    """The scans that inference runs on.

    Args:
        dataset_dir: folder of scans, searched with the folders below it, or one file; a slice of a DICOM series stands
            for its series. With a data list the folder that its paths start from.
        data_list_file_path, data_list_key: JSON data list to take the scans from instead, see :func:`load_datalist`.
        passed_over: endings of the files in the folder that inference itself has written.

    Returns:
        Items with ``"image"``, ``"name"`` (unique, usable as a file name) and ``"series_uid"`` for a DICOM series.

    Raises:
        ValueError: there is nothing to run on.
    """
    if data_list_file_path is not None:
        items = load_datalist(data_list_file_path, dataset_dir, data_list_key)
    elif dataset_dir is None:
        raise ValueError("dataset_dir is not set: give a folder of scans, or one file, with --dataset_dir PATH.")
    elif os.path.isfile(dataset_dir):
        items = [_whole_series(os.path.abspath(dataset_dir))]
    else:
        volumes = find_volumes(dataset_dir)
        items = [item for item in volumes if not item["image"].endswith(tuple(passed_over))]
        if len(items) < len(volumes):
            logger.info("Passed over %d outputs of earlier runs.", len(volumes) - len(items))
        if not items:
            raise ValueError(f"Dataset folder {dataset_dir} holds only outputs of earlier runs: give one of scans.")
    return named_items(items)


def _whole_series(path: str) -> dict:
    """The series that a DICOM file is a slice of; other files stand for themselves."""
    folder = os.path.dirname(path)
    uid, slices = _series_and_slices(path) if is_dicom_file(path) else ("", 0)
    if uid and slices == 1 and len(series_files(folder, uid)) > 1:
        return {"image": folder, "series_uid": uid}
    return {"image": path}
