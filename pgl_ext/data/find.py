"""Finding what there is in a folder: volumes, labelled cases, scans to run on."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from monai.config import PathLike

from pgl_ext.data.channels import channel_item, channels_of_folder, grouped_channels, numbered_files
from pgl_ext.data.datalist import item_name, load_datalist, named_items, without_suffix
from pgl_ext.files import visible_files
from pgl_ext.transforms.dicom import may_be_dicom, scan_header
from pgl_ext.transforms.formats import ITK_SUFFIXES, NIFTI_SUFFIXES, SUPPORTED, file_suffix, is_dicom_file

__all__ = ["find_cases", "find_scans", "find_volumes"]

logger = logging.getLogger(__name__)

_FILE_SUFFIXES = NIFTI_SUFFIXES + ITK_SUFFIXES
_LABEL_FOLDERS = {"labels": "images", "labelstr": "imagestr", "labelsts": "imagests"}
_CASE_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))


def find_volumes(dataset_dir: PathLike, channel_names: Sequence[str] = ()) -> list[dict]:
    """Find every volume in a folder and the folders below it.

    NIfTI, NRRD and MetaImage files and DICOM series are found. Files of other types and hidden files are passed
    over, so are DICOM objects that hold no image volume. Folders called ``labels``, ``labelsTr`` or ``labelsTs`` next
    to ``images``, ``imagesTr`` or ``imagesTs``, and ``.seg.nrrd`` files, are left out.

    Args:
        dataset_dir: folder to search; links to folders are followed.
        channel_names: of scans of several channels, whose files nnU-Net numbers, where no ``dataset.json`` in the
            folder of a file, or beside it, names them.

    Returns:
        Items ordered by path: the absolute path ``"image"`` of a file, or of a folder with the ``"series_uid"`` of each
        DICOM series in it; of a series in several folders the folder that they lie in. Of several channels the file of
        the first, with ``"further_channels"`` and ``"channel_names"``.

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
    dicom: list[str] = []
    for folder, names, is_label_folder in _walk_folders(root):
        volumes = [n for n in names if file_suffix(n) in _FILE_SUFFIXES]
        labels = [n for n in volumes if is_label_folder or n.lower().endswith(".seg.nrrd")]
        left_out += len(labels)
        images = [os.path.join(folder, n) for n in volumes if n not in labels]
        items += grouped_channels(images, images and (channels_of_folder(folder) or channel_names))
        if not is_label_folder:
            dicom += filter(may_be_dicom, (os.path.join(folder, n) for n in names))
    items += _series_items(dicom)
    if left_out:
        logger.info("%s: left out %d label files.", root, left_out)
    if not items:
        raise ValueError(f"Dataset folder {root} holds no volumes. {remedy}")
    return sorted(items, key=item_name)


def _walk_folders(root: str) -> Iterator[tuple[str, list[str], bool]]:
    """Each folder below ``root`` once: its path, its visible files, and whether it lies in a label folder."""
    label_roots: set[str] = set()
    for folder, folders, names in visible_files(root):
        siblings = {f.lower() for f in folders}
        inside = folder in label_roots
        label_roots.update(
            os.path.join(folder, f) for f in folders if inside or _LABEL_FOLDERS.get(f.lower()) in siblings
        )
        yield folder, names, inside


def _series_items(paths: Iterable[str]) -> list[dict]:
    """An item for each DICOM series of more than one slice, with the folder that all of it lies in or below."""
    slices: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for path in paths:
        try:
            header = scan_header(path)
        except OSError as error:
            logger.warning("%s is not a readable DICOM file and is left out: %s", path, error)
            continue
        if header is not None:
            # Where names were taken out badly, two patients' series may have one UID.
            uids = (str(header.get(tag, "")) for tag in ("SeriesInstanceUID", "StudyInstanceUID", "PatientID"))
            slices[tuple(uids)][os.path.dirname(path)] += int(header.get("NumberOfFrames") or 1)
    several = {uids: folders for uids, folders in slices.items() if folders.total() > 1}
    if len(several) < len(slices):
        logger.info("Left out %d DICOM series of a single slice.", len(slices) - len(several))
    return [{"image": os.path.commonpath(folders), "series_uid": uid} for (uid, *_), folders in several.items()]


def find_cases(dataset_dir: PathLike, channel_names: Sequence[str] = ()) -> list[dict]:
    """Pair the images and label maps in the folders ``imagesTr`` and ``labelsTr``, or ``images`` and ``labels``.

    An image and its label map have the same path below their folders but for the file type, or the image's name ends
    in nnU-Net's ``_0000``. An image may also be a folder that holds a DICOM series.

    Args:
        dataset_dir: folder that holds both folders. A data list in it is not read, but for names of channels.
        channel_names: see :func:`find_volumes`.

    Returns:
        Cases ordered by image: absolute ``"label"`` paths, and what :func:`find_volumes` says of images.

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
    for item in find_volumes(images, channel_names):
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
            + "\nGive an image and its label map the same name, with one image for each label map (several channels "
            "are named with --channel_names), or name the pairs in a --data_list_file_path."
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
    data_list_key: str | Sequence[str] = "training",
    passed_over: Sequence[str] = (),
    channel_names: Sequence[str] = (),
) -> list[dict]:
    """The scans that inference runs on.

    Args:
        dataset_dir: folder of scans, searched with the folders below it, or one file; a slice of a DICOM series stands
            for its series, and the file of a channel that nnU-Net numbers for its scan. With a data list the folder
            that its paths start from.
        data_list_file_path, data_list_key: JSON data list to take the scans from instead, see :func:`load_datalist`.
        passed_over: endings of the files in the folder that inference itself has written.
        channel_names: see :func:`find_volumes`.

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
        items = [_whole_scan(os.path.abspath(dataset_dir), channel_names)]
    else:
        volumes = find_volumes(dataset_dir, channel_names)
        items = [item for item in volumes if not item["image"].endswith(tuple(passed_over))]
        if len(items) < len(volumes):
            logger.info("Passed over %d outputs of earlier runs.", len(volumes) - len(items))
        if not items:
            raise ValueError(f"Dataset folder {dataset_dir} holds only outputs of earlier runs: give one of scans.")
    return named_items(items)


def _whole_scan(path: str, channel_names: Sequence[str]) -> dict:
    """The series that a DICOM file is a slice of, or the channels that a numbered file is one of; else the file."""
    folder = os.path.dirname(path)
    names = channels_of_folder(folder) or channel_names
    if len(names) > 1 and (files := numbered_files(path, len(names))):
        return channel_item(files, names)
    header = scan_header(path) if is_dicom_file(path) else None
    if header is not None and int(header.get("NumberOfFrames") or 1) == 1:
        return {"image": folder, "series_uid": str(header.SeriesInstanceUID)}
    return {"image": path}
