"""Labelled cases: finding them, checking and caching them, and splitting them for training and evaluation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pgl_ext.data.cache import VolumeCache, prepare_items
from pgl_ext.data.datalist import (
    ITK_SUFFIXES,
    NIFTI_SUFFIXES,
    file_suffix,
    find_volumes,
    item_name,
    load_datalist,
    walk_folders,
)
from pgl_ext.distributed import rank_and_world_size
from pgl_ext.files import write_atomically
from pgl_ext.task import SegmentationTask

__all__ = ["find_cases", "labelled_items", "prepare_cases", "split_cases"]

logger = logging.getLogger(__name__)

PARTS = ("training", "validation", "test", "unused")
"""The lists of a split, in the file that records it as well."""

_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))


def labelled_items(
    data_list_file_path: str | os.PathLike | Sequence[str | os.PathLike],
    dataset_dir: str | os.PathLike | None = None,
    key: str = "training",
    annotated_key: str | None = None,
) -> list[dict]:
    """Read the labelled cases of a data list in the style of the Medical Segmentation Decathlon.

    Args:
        data_list_file_path: JSON file that maps ``key`` to a list of dicts with ``"image"`` and ``"label"``; or several
            such files.
        dataset_dir: folder that relative paths start from; by default the folder of the JSON file, of each its own.
        key: which list of the file to take.
        annotated_key: field of an entry that lists the organs annotated in its label map; those not listed are
            unknown there, not background. Where an entry lacks it, its field ``"annotated"`` counts, which the files
            written by :func:`prepare_cases` have. None: every label map shows all organs.

    Returns:
        Cases in the file's order: ``{"image": absolute path, "label": absolute path}``, plus ``"series_uid"`` where
        given and ``"annotated"``, a list of names, with an ``annotated_key``.

    Raises:
        ValueError: the list cannot be used (see :func:`pgl_ext.data.datalist.load_datalist`), or entries lack a label
            or, with an ``annotated_key``, the names of the annotated organs. All such entries are named at once.
    """
    fields = ["label", "annotated"] + ([annotated_key] if annotated_key else [])
    cases, problems = [], []
    for item in load_datalist(data_list_file_path, dataset_dir, key, keep=fields):
        case = {name: item[name] for name in ("image", "series_uid") if name in item}
        label = item.get("label")
        if isinstance(label, str) and label:
            case["label"] = label
        else:
            problems.append(f"{item_name(item)} has no single 'label' path, but {label!r}")
        if annotated_key:
            annotated = item.get(annotated_key, item.get("annotated"))
            if isinstance(annotated, list) and all(isinstance(name, str) for name in annotated):
                case["annotated"] = list(annotated)
            else:
                problems.append(f"{item_name(item)} has no list of organ names under {annotated_key!r}: {annotated!r}")
        cases.append(case)
    if problems:
        raise ValueError(
            f"{len(problems)} entries under {key!r} of data list {data_list_file_path} cannot be used:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nComplete or remove them."
        )
    return cases


def find_cases(dataset_dir: str | os.PathLike) -> list[dict]:
    """Pair the images and label maps in the folders ``imagesTr`` and ``labelsTr``, or ``images`` and ``labels``.

    An image and its label map have the same path below their folders but for the file type, or the image's name ends
    in nnU-Net's ``_0000``. An image may also be a folder that holds a DICOM series.

    Args:
        dataset_dir: folder that holds both folders. A data list in it is not read.

    Returns:
        Cases ordered by image: ``{"image": absolute path, "label": absolute path}``, plus ``"series_uid"`` for a
        DICOM series.

    Raises:
        ValueError: the folders are missing or empty, or images and label maps do not pair off; all those left over are
            named at once.
    """
    root = os.path.abspath(dataset_dir)
    folders = [tuple(os.path.join(root, name) for name in names) for names in _FOLDERS]
    found = next((pair for pair in folders if all(map(os.path.isdir, pair))), None)
    if found is None:
        raise ValueError(
            f"Dataset folder {root} has neither imagesTr and labelsTr nor images and labels: set --dataset_dir to a "
            "folder that does, or give a --data_list_file_path that names image and label of each case."
        )
    labels: dict[str, str] = {}
    problems = []
    for path in _label_files(found[1]):
        if labels.setdefault(_case_name(path, found[1]), path) != path:
            problems.append(f"{path} has the name of {labels[_case_name(path, found[1])]}")
    cases, used = [], {}
    for item in find_volumes(found[0]):
        name = _case_name(item["image"], found[0])
        name = name if name in labels else name.removesuffix("_0000")
        if name not in labels:
            problems.append(f"{item_name(item)} has no label map in {found[1]}")
        elif name in used:
            problems.append(f"{labels[name]} belongs to both {used[name]} and {item_name(item)}")
        else:
            used[name] = item_name(item)
            cases.append({**item, "label": labels[name]})
    problems += [f"{labels[name]} has no image in {found[0]}" for name in sorted(set(labels) - set(used))]
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
    suffixes = NIFTI_SUFFIXES + ITK_SUFFIXES
    paths = (os.path.join(inside, name) for inside, names, _ in walk_folders(folder) for name in names)
    return sorted(path for path in paths if file_suffix(path) in suffixes)


def _case_name(path: str, folder: str) -> str:
    name = os.path.relpath(path, folder)
    suffix = "" if os.path.isdir(path) else file_suffix(path)
    return name[: len(name) - len(suffix)].removesuffix(".seg")


def split_cases(
    cases: Iterable[Mapping],
    test_cases: int = 0,
    validation_fraction: float = 0.2,
    label_fraction: float = 1.0,
    labelled_cases: int | None = None,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """Split cases at random: some for testing, of the others the labelled ones, and of these some for validation.

    The split depends on the arguments and on which cases there are, not on their order. For one seed the test cases
    are the same whatever share is labelled, and the splits are nested: what a smaller share trains on, a larger share
    trains on too, and so with validation.

    Args:
        cases: all cases.
        test_cases: how many to hold out for testing.
        validation_fraction: share of the labelled cases to validate on, in [0, 1). Above 0 it is at least one case and
            leaves at least one for training; a single case serves as both.
        label_fraction: share of the cases not held out that are taken as labelled, in (0, 1]; at least 2 cases where
            there are as many.
        labelled_cases: their exact number, instead of ``label_fraction``.
        seed: of the random choice.

    Returns:
        ``training``, ``validation``, ``test`` and ``unused``: lists of cases ordered by image.

    Raises:
        ValueError: a setting is out of range or asks for more cases than there are.
    """
    ordered = sorted((dict(case) for case in cases), key=item_name)
    count = _labelled_count(len(ordered), test_cases, validation_fraction, label_fraction, labelled_cases)
    drawn = [ordered[index] for index in np.random.RandomState(seed).permutation(len(ordered))]
    test, labelled, unused = drawn[:test_cases], drawn[test_cases:][:count], drawn[test_cases + count :]
    held_out = [_validation_count(n, validation_fraction) for n in range(count + 1)]
    # A case goes to validation where the rounded number of validation cases rises: smaller splits lie in larger ones.
    training = [case for n, case in enumerate(labelled) if held_out[n] == held_out[n + 1]]
    validation = [case for n, case in enumerate(labelled) if held_out[n] < held_out[n + 1]]
    if count == 1 and validation:
        logger.warning("Only one labelled case, %s: it serves for training and for validation.", validation[0]["image"])
        training = [dict(validation[0])]
    parts = zip(PARTS, (training, validation, test, unused), strict=True)
    return {name: sorted(part, key=item_name) for name, part in parts}


def _labelled_count(
    total: int, test_cases: int, validation_fraction: float, label_fraction: float, labelled_cases: int | None
) -> int:
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}.")
    if not 0 <= test_cases < total:
        raise ValueError(
            f"test_cases must be 0 or more and leave cases to train on, got {test_cases} of {total} cases: set "
            "--test_cases to a smaller number."
        )
    rest = total - test_cases
    if labelled_cases is None:
        if not 0 < label_fraction <= 1:
            raise ValueError(f"label_fraction must be in (0, 1], got {label_fraction}.")
        return min(max(2, round(label_fraction * rest)), rest)
    if not 1 <= labelled_cases <= rest:
        raise ValueError(
            f"labelled_cases must be from 1 to {rest}, the {total} cases less {test_cases} for testing, got "
            f"{labelled_cases}."
        )
    return labelled_cases


def _validation_count(labelled: int, fraction: float) -> int:
    """How many of ``labelled`` cases to validate on; it grows by 0 or 1 with each case."""
    if fraction == 0 or labelled == 0:
        return 0
    return 1 if labelled == 1 else min(max(1, round(fraction * labelled)), labelled - 1)


def prepare_cases(
    cache: VolumeCache,
    task: SegmentationTask,
    dataset_dir: str | None = None,
    data_list_file_path: str | Sequence[str] | None = None,
    data_list_key: str = "training",
    annotated_key: str | None = None,
    test_cases: int = 0,
    validation_fraction: float = 0.2,
    label_fraction: float = 1.0,
    labelled_cases: int | None = None,
    seed: int = 0,
    split_path: str | None = None,
    skip_bad_files: bool = False,
    report_path: str | None = None,
) -> dict[str, list[dict]]:
    """The start-up scan of a training: find the cases, split them, check and cache those in use, record the split.

    In a distributed run every process caches its share and learns of the others' bad files.

    Args:
        cache: where the preprocessed cases are kept.
        task: what is to be segmented.
        dataset_dir: folder with a ``dataset.json``, or with images and label maps (see :func:`find_cases`), or that
            the data list's paths are relative to.
        data_list_file_path: Decathlon-style JSON to use instead, or several.
        data_list_key: the list in the JSON.
        annotated_key: see :func:`labelled_items`.
        test_cases: see :func:`split_cases`, like the next four.
        validation_fraction: share of the labelled cases to validate on.
        label_fraction: share of the cases not held out for testing that are taken as labelled.
        labelled_cases: their exact number instead.
        seed: of the split.
        split_path: JSON file for the split. Where it exists already, for the same settings and the same cases, its
            split is used. The file is a data list itself, with the keys ``training``, ``validation``, ``test`` and
            ``unused``.
        skip_bad_files: go on without bad files and write their list to ``report_path``. The recorded split names them
            still.
        report_path: text file, one ``path<TAB>reason`` per line.

    Returns:
        ``training`` and ``validation``: lists of cases.

    Raises:
        BadVolumesError: listing all bad cases in use at once.
        ValueError: folder or list are missing or empty, a case occurs twice, an organ is annotated in no case, the
            split is impossible, no good case is left to train or validate on, or ``split_path`` holds another split.
    """
    cases = _listed_cases(dataset_dir, data_list_file_path, data_list_key, annotated_key)
    settings = {
        "seed": seed,
        "label_fraction": label_fraction,
        "labelled_cases": labelled_cases,
        "validation_fraction": validation_fraction,
        "test_cases": test_cases,
    }
    recorded = split_path is not None and os.path.exists(split_path)
    split = _recorded_split(split_path, settings, cases) if recorded else split_cases(cases, **settings)
    _check_annotated(cases, split["training"], task)
    in_use = {item_name(case): case for part in ("training", "validation") for case in split[part]}
    good = {item_name(case) for case in prepare_items(cache, list(in_use.values()), skip_bad_files, report_path)}
    parts = {name: [case for case in split[name] if item_name(case) in good] for name in ("training", "validation")}
    for name, part in parts.items():
        if split[name] and not part:
            raise ValueError(
                f"none of the {len(split[name])} cases for {name} can be used, such as {split[name][0]['image']} with "
                f"{split[name][0]['label']}: repair them, take more cases, or split with another seed."
            )
    if rank_and_world_size()[0] == 0:
        counts = {**{name: len(part) for name, part in split.items()}, **{n: len(part) for n, part in parts.items()}}
        logger.info("Cases: %s.", ", ".join(f"{count} {name}" for name, count in counts.items()))
        if split_path is not None and not recorded:
            content = json.dumps({**settings, **split}, indent=2) + "\n"
            write_atomically(lambda file: file.write(content.encode()), split_path)
    return parts


def _listed_cases(
    dataset_dir: str | None, data_list_file_path: str | Sequence[str] | None, key: str, annotated_key: str | None
) -> list[dict]:
    if not data_list_file_path and dataset_dir:
        in_folder = os.path.join(dataset_dir, "dataset.json")
        if _has_lists(in_folder):
            if rank_and_world_size()[0] == 0:
                logger.info("Taking the cases under %r of %s.", key, in_folder)
            data_list_file_path = in_folder
    if data_list_file_path:
        return labelled_items(data_list_file_path, dataset_dir, key, annotated_key)
    if not dataset_dir:
        raise ValueError(
            "no cases given: set --dataset_dir to a folder of images and labels, or --data_list_file_path to a list."
        )
    if annotated_key:
        raise ValueError(
            f"annotated_key is {annotated_key!r}, but folders do not say which organs are annotated: set "
            '--data_list_file_path to a list that does, or --annotated_key "\\$None" if all are.'
        )
    return find_cases(dataset_dir)


def _has_lists(path: str) -> bool:
    """Whether a data list is there. nnU-Net writes a ``dataset.json`` without lists beside its folders."""
    if not os.path.isfile(path):
        return False
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return True  # Reading the list says what is wrong with it.
    return not isinstance(content, dict) or any(isinstance(value, list) and value for value in content.values())


def _check_annotated(cases: Sequence[Mapping], training: Sequence[Mapping], task: SegmentationTask) -> None:
    """Find organs that are annotated nowhere, usually since the data list spells their names otherwise, and cases that
    are annotated in part where the task needs all."""

    def absent(some: Sequence[Mapping]) -> list[str]:
        annotated = {name for case in some for name in case.get("annotated", task.names)}
        return [name for name in task.names if name not in annotated]

    if absent(cases):
        named = sorted({name for case in cases for name in case["annotated"]})
        raise ValueError(
            f"the organs {absent(cases)} are annotated in no case; the data list names {named} as annotated: give the "
            "task's organs the names that they have there."
        )
    partly = [case for case in training if absent([case])]
    if partly and not task.multi_label:
        raise ValueError(
            f"{len(partly)} of the training cases, such as {item_name(partly[0])}, are not annotated for all organs "
            f"({', '.join(absent(partly[:1]))} there), so that a multi-class task can not tell these from background: "
            "set multi_label to true, or leave those organs or cases out."
        )
    if absent(training):
        logger.warning("The organs %s are annotated in no training case and cannot be learned.", absent(training))


def _recorded_split(
    path: str | os.PathLike, settings: Mapping[str, object], cases: Sequence[Mapping]
) -> dict[str, list[dict]]:
    """The split in a file, if it was made with these settings from these cases."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        split = {name: [dict(case) for case in content[name]] for name in PARTS}
        recorded = {name: content[name] for name in settings}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a split written by an earlier run ({type(error).__name__}: {error}): remove it, or set "
            "another --output_dir."
        ) from error
    differences = [
        f"{name} was {recorded[name]} and is {value}" for name, value in settings.items() if recorded[name] != value
    ]
    before = {_identity(case) for part in split.values() for case in part}
    now = {_identity(case) for case in cases}
    for some, what in ((before - now, "there no more, or changed"), (now - before, "new, or changed")):
        if some:
            names = sorted(json.loads(case)["image"] for case in some)
            differences.append(f"{len(some)} cases are {what}, such as {names[0]}")
    if differences:
        raise ValueError(
            f"{path} holds the split of an earlier run that was set up otherwise: {'; '.join(differences)}. Set "
            "another --output_dir to keep that run, remove the file to split anew, or go back to its settings."
        )
    return split


def _identity(case: Mapping) -> str:
    return json.dumps(dict(case), sort_keys=True)
