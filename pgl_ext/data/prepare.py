"""The start-up scan: what there is to train on or to test, which of it is bad, and how it is split."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from monai.config import PathLike

from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.datalist import item_name, labelled_items, load_datalist, named_items, source_names
from pgl_ext.data.find import find_cases, find_volumes
from pgl_ext.data.seen import patients_text, seen_scans, seen_text
from pgl_ext.data.split import recorded_split, split_cases, split_volumes, write_split
from pgl_ext.distributed import gather, rank_and_world_size
from pgl_ext.errors import transform_error
from pgl_ext.files import read_json, write_text
from pgl_ext.settings import parse_bool
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms.checks import BadVolumeError, BadVolumesError

__all__ = [
    "cases_of_models",
    "check_items",
    "evaluation_cases",
    "listed_cases",
    "prepare_cases",
    "prepare_items",
    "prepare_volumes",
    "resolve_bad",
]

logger = logging.getLogger(__name__)


def prepare_volumes(
    cache: VolumeCache,
    dataset_dir: str | None = None,
    data_list_file_path: str | Sequence[str] | None = None,
    data_list_key: str | Sequence[str] = "training",
    validation_fraction: float = 0.05,
    seed: int = 0,
    skip_bad_files: bool = False,
    report_path: str | None = None,
    source_fields: Sequence[str] = (),
    channel_names: Sequence[str] = (),
) -> dict[str, list[dict]]:
    """The start-up scan of pre-training: find the volumes, check and cache each, and hold some out for validation.

    Args:
        cache, skip_bad_files, report_path: see :func:`prepare_items`.
        dataset_dir: folder that is searched recursively, or that the data list's paths are relative to.
        data_list_file_path: Decathlon-style JSON to use instead of searching, or several.
        data_list_key: the list in that JSON, or several.
        validation_fraction, seed: see :func:`split_volumes`.
        source_fields: what the method has to know of every scan, of ``"task"`` and ``"group"``.
        channel_names: see :func:`find_volumes`.

    Returns:
        ``training`` and ``validation``: lists of items.

    Raises:
        BadVolumesError: see :func:`prepare_items`.
        ValueError: folder or list are missing or empty, or scans lack a source field.
    """
    if data_list_file_path:
        items = load_datalist(data_list_file_path, dataset_dir, data_list_key)
    elif dataset_dir:
        items = find_volumes(dataset_dir, channel_names)
    else:
        raise ValueError("no scans given: set --dataset_dir to a folder of scans, or --data_list_file_path to a list.")
    # Before volumes are prepared, which can take hours.
    for field in source_fields:
        source_names(items, field)
    items = prepare_items(cache, items, skip_bad_files, report_path)
    training, validation = split_volumes(items, validation_fraction, seed)
    if rank_and_world_size()[0] == 0:
        logger.info("%d volumes for training, %d held out for validation.", len(training), len(validation))
    return {"training": training, "validation": validation}


def prepare_cases(
    cache: VolumeCache,
    task: SegmentationTask,
    dataset_dir: str | None = None,
    data_list_file_path: str | Sequence[str] | None = None,
    data_list_key: str | Sequence[str] = "training",
    annotated_key: str | None = None,
    test_cases: int = 0,
    validation_fraction: float | None = 0.2,
    label_fraction: float = 1.0,
    labelled_cases: int | None = None,
    seed: int = 0,
    split_path: str | None = None,
    skip_bad_files: bool = False,
    report_path: str | None = None,
    test_fold: Sequence[int] | None = None,
    channel_names: Sequence[str] = (),
) -> dict[str, list[dict]]:
    """The start-up scan of fine-tuning: find the cases, split them, check and cache those in use, record the split.

    Args:
        cache, skip_bad_files, report_path: see :func:`prepare_items`; the recorded split names bad cases too.
        task: what is to be segmented.
        dataset_dir: folder with a ``dataset.json``, or with images and label maps (see :func:`find_cases`), or that
            the data list's paths are relative to.
        data_list_file_path: Decathlon-style JSON to use instead, or several.
        data_list_key: the list in the JSON, or several.
        test_cases, validation_fraction, label_fraction, labelled_cases, seed, test_fold: see :func:`split_cases`.
        annotated_key, channel_names: see :func:`labelled_items` and :func:`~pgl_ext.data.find.find_volumes`.
        split_path: JSON file for the split, see :func:`write_split`. Where it exists already, for the same settings and
            the same cases, its split is used.

    Returns:
        ``training`` and ``validation``: lists of cases.

    Raises:
        BadVolumesError: see :func:`prepare_items`.
        ValueError: folder or list are missing or empty, a case occurs twice, an organ is annotated in no case, the
            split is impossible, no good case is left to train or validate on, or ``split_path`` holds another split.
    """
    cases = listed_cases(dataset_dir, data_list_file_path, data_list_key, annotated_key, channel_names)
    settings = {
        "seed": seed,
        "label_fraction": label_fraction,
        "labelled_cases": labelled_cases,
        "validation_fraction": validation_fraction,
        "test_cases": test_cases,
        "test_fold": test_fold,
    }
    recorded = split_path is not None and os.path.exists(split_path)
    split = recorded_split(split_path, settings, cases) if recorded else split_cases(cases, **settings)
    _check_annotated(cases, split["training"], task)
    in_use = list({item_name(case): case for case in split["training"] + split["validation"]}.values())
    good = {item_name(case) for case in prepare_items(cache, in_use, skip_bad_files, report_path)}
    usable = {name: [case for case in split[name] if item_name(case) in good] for name in ("training", "validation")}
    for name, cases in usable.items():
        if split[name] and not cases:
            raise ValueError(
                f"none of the {len(split[name])} cases for {name} can be used, such as {split[name][0]['image']} with "
                f"{split[name][0]['label']}: repair them, take more cases, or split with another seed."
            )
    if rank_and_world_size()[0] == 0:
        counts = [f"{len(cases)} {name}" for name, cases in {**split, **usable}.items()]
        logger.info("Cases: %s.", ", ".join(counts))
        _warn(patients_text({**split, "unused": []}))
        if split_path is not None and not recorded:
            write_split(split_path, settings, split)
    return usable


def listed_cases(
    dataset_dir: str | None,
    data_list_file_path: str | Sequence[str] | None,
    key: str | Sequence[str] = "training",
    annotated_key: str | None = None,
    channel_names: Sequence[str] = (),
) -> list[dict]:
    """The labelled cases of a data list or folder; see :func:`prepare_cases`."""
    if not data_list_file_path and dataset_dir and _has_lists(os.path.join(dataset_dir, "dataset.json")):
        data_list_file_path = os.path.join(dataset_dir, "dataset.json")
        if rank_and_world_size()[0] == 0:
            logger.info("Taking the cases under %r of %s.", key, data_list_file_path)
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
    return find_cases(dataset_dir, channel_names)


def _has_lists(path: str) -> bool:
    """Whether a data list is there. nnU-Net writes a ``dataset.json`` without lists beside its folders."""
    if not os.path.isfile(path):
        return False
    try:
        content = read_json(path)
        return "dataset" in content or any(isinstance(value, list) and value for value in content.values())
    except ValueError:
        return True  # Reading the list says what is wrong with it.


def _check_annotated(cases: Sequence[Mapping], training: Sequence[Mapping], task: SegmentationTask) -> None:
    """Find organs that are annotated nowhere, often misspelt, and cases annotated in part where the task needs all."""

    def absent(cases: Sequence[Mapping]) -> list[str]:
        annotated = {name for case in cases for name in case.get("annotated", task.names)}
        return [name for name in task.names if name not in annotated]

    if absent(cases):
        listed = sorted({name for case in cases for name in case["annotated"]})
        raise ValueError(
            f"the organs {absent(cases)} are annotated in no case; the data list names {listed} as annotated: give the "
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


def evaluation_cases(
    data_list_file_path: PathLike | None,
    dataset_dir: PathLike | None = None,
    data_list_key: str | Sequence[str] = "test",
    annotated_key: str | None = None,
    split_path: PathLike | None = None,
    seen: Collection[str] = (),
) -> list[dict]:
    """The labelled cases of a data list, or without one the test cases of a training, with a unique ``"name"`` each.

    Args: those of :func:`~pgl_ext.data.datalist.labelled_items`, as are returns and errors, and:
        split_path: the ``split.json`` of the training, which lists the cases that it held out to test on.
        seen: digests of scans that the network has seen; a warning names test scans among them.

    Raises:
        ValueError: there is no list, and the training held out no cases.
    """
    if data_list_file_path is None:
        if split_path is None or not os.path.isfile(split_path) or not read_json(split_path).get("test"):
            raise ValueError(
                "there are no test cases: give labelled ones with --data_list_file_path FILE --data_list_key KEY (of a "
                "probe --test_data_list_file_path, --test_data_list_key), or hold some out in training with "
                "--test_cases N; then its split.json, two folders above the model, lists them and is taken by itself."
            )
        data_list_file_path, data_list_key = split_path, "test"
    cases = labelled_items(data_list_file_path, dataset_dir, data_list_key, annotated_key)
    _warn(seen_text(cases, seen))
    trained = read_json(split_path) if split_path is not None and os.path.isfile(split_path) else {}
    _warn(patients_text({**{name: trained.get(name, ()) for name in ("training", "validation")}, "test": cases}))
    return named_items(cases)


def _warn(text: str) -> None:
    if text:
        logger.warning("%s", text)


def cases_of_models(
    models: Sequence[PathLike],
    data_list_file_path: PathLike | None = None,
    dataset_dir: PathLike | None = None,
    data_list_key: str | Sequence[str] = "test",
    annotated_key: str | None = None,
) -> list[dict]:
    """The cases to evaluate trained networks on: of a data list, or those that the trainings held out.

    Args:
        models: the networks' files, two folders below the ``split.json`` of each training.
        data_list_file_path, dataset_dir, data_list_key, annotated_key: see :func:`evaluation_cases`.

    Returns:
        Cases as of :func:`evaluation_cases`, and ``"models"``: the numbers, from 0, of those that are to segment each:
        all of a data list's, else those whose trainings held it out.

    Raises:
        ValueError: see :func:`evaluation_cases`.
    """
    by_name: dict[str, dict] = {}
    for number, model in enumerate(models):
        held_out = Path(model).absolute().parents[1] / "split.json", seen_scans(model)
        for case in evaluation_cases(data_list_file_path, dataset_dir, data_list_key, annotated_key, *held_out):
            by_name.setdefault(item_name(case), {**case, "models": []})["models"].append(number)
    return named_items(list(by_name.values()))


# --- bad files ------------------------------------------------------------------------------------------------------


def check_items(items: Sequence[Mapping], loading: Callable[[Mapping], Any]) -> dict[str, str]:
    """Load every item once, so that all bad ones are known before anything is done with the first.

    Args:
        items: data items with ``"image"``.
        loading: transforms that load and check one item.

    Returns:
        Why items cannot be used, by name, see :func:`~pgl_ext.data.datalist.item_name`.
    """
    bad = {}
    for item in items:
        try:
            loading(item)
        except Exception as error:
            cause = transform_error(error)
            if not isinstance(cause, (BadVolumeError, FileNotFoundError)):
                raise  # a missing package, or a bug
            bad[item_name(item)] = str(cause)
    return bad


def resolve_bad(
    bad: Mapping[str, str], items: Sequence[Mapping], skip_bad_files: bool = False, report_path: PathLike | None = None
) -> list[dict]:
    """Leave out the volumes that cannot be used, or stop because of them.

    Args:
        bad: reasons by item name, as :meth:`VolumeCache.prepare` gives them, of all processes.
        items: all items.
        skip_bad_files: leave bad volumes out instead of raising.
        report_path: text file for what is left out, one ``path<TAB>reason`` per line.

    Returns:
        The good items, in the order given.

    Raises:
        BadVolumesError: there are bad volumes and ``skip_bad_files`` is false, or no good volume is left.
    """
    good = [dict(item) for item in items if item_name(item) not in bad]
    if not bad:
        return good
    if not parse_bool(skip_bad_files, "skip_bad_files") or not good:
        raise BadVolumesError(bad, len(items))
    logger.warning("Left out %d of %d volumes that cannot be used.", len(bad), len(items))
    if report_path is not None:
        write_text(Path(report_path), "".join(f"{name}\t{reason}\n" for name, reason in sorted(bad.items())))
    return good


def prepare_items(
    cache: VolumeCache, items: Sequence[Mapping], skip_bad_files: bool = False, report_path: PathLike | None = None
) -> list[dict]:
    """Check and cache items, each process of a distributed run its share, and leave out or stop at the bad ones.

    Every process learns of all bad files; the first draws the progress bar and writes the report.

    Args:
        cache: where the preprocessed volumes are kept.
        items: all items, the same in every process.
        skip_bad_files, report_path: see :func:`resolve_bad`, like what is returned and raised.
    """
    rank, world_size = rank_and_world_size()
    shares = gather(cache.prepare(items[rank::world_size], show_progress=rank == 0), wait=timedelta(weeks=1))
    bad = {name: reason for share in shares for name, reason in share.items()}
    return resolve_bad(bad, items, skip_bad_files, report_path if rank == 0 else None)
