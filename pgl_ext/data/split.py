"""Which items are trained on, which are validated on, and which are held out."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from monai.config import PathLike

from pgl_ext.data.datalist import item_name
from pgl_ext.data.seen import patient_of
from pgl_ext.files import read_json, write_json

__all__ = ["PARTS", "recorded_split", "split_cases", "split_volumes", "write_split"]

logger = logging.getLogger(__name__)

PARTS = ("training", "validation", "test", "unused")
"""The lists of a split, in the file that records it as well."""


def split_volumes(items: Iterable[Mapping], validation_fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Hold out a random share of unlabelled volumes for validation, by the same rules as :func:`split_cases`.

    Args:
        items: data items with ``"image"``.
        validation_fraction, seed: see :func:`split_cases`.

    Returns:
        The training items and the validation items, each ordered by path.

    Raises:
        ValueError: the fraction is outside [0, 1).
    """
    items = list(items)
    if not items:
        return [], []
    if len(items) == 1:
        split = split_cases(items, validation_fraction=validation_fraction)
        return split["training"], split["validation"]
    count = _validation_count(len(items), validation_fraction)
    split = split_cases(items, test_cases=count, validation_fraction=0, seed=seed)
    return split["training"], split["test"]


def split_cases(
    cases: Iterable[Mapping],
    test_cases: int = 0,
    validation_fraction: float | None = 0.2,
    label_fraction: float = 1.0,
    labelled_cases: int | None = None,
    seed: int = 0,
    test_fold: Sequence[int] | None = None,
) -> dict[str, list[dict]]:
    """Split cases at random: some for testing, of the others the labelled ones, and of these some for validation.

    The split depends on the arguments and on which cases there are, not on their order. For one seed the test cases
    are the same whatever share is labelled, and the splits are nested: what a smaller share trains on, a larger share
    trains on too, and so with validation.

    Args:
        cases: all cases.
        test_cases: how many to hold out for testing.
        validation_fraction: share of the labelled cases to validate on, in [0, 1); above 0 at least one, with at least
            one left for training; a single case serves as both. None: 0.2 of ten or more, and of fewer none, so that
            all are trained on.
        label_fraction: share of the cases not held out that are taken as labelled, in (0, 1]; at least 2 cases where
            there are as many.
        labelled_cases: their exact number, instead of ``label_fraction``.
        seed: of the random choice.
        test_fold: (k, n): instead of ``test_cases``, the k-th of n equal parts, so that for k from 0 to n - 1 each case
            is held out once. Those of one patient are in one part, see :func:`~pgl_ext.data.seen.patient_of`.

    Returns:
        ``training``, ``validation``, ``test`` and ``unused``: lists of cases ordered by image.

    Raises:
        ValueError: a setting is out of range or asks for more cases than there are.
    """
    ordered = sorted((dict(case) for case in cases), key=item_name)
    drawn = [ordered[index] for index in np.random.RandomState(seed).permutation(len(ordered))]
    if test_fold is not None:
        drawn, test_cases = _fold_first(drawn, test_fold, test_cases)
    count = _labelled_count(len(ordered), test_cases, label_fraction, labelled_cases)
    test, labelled, unused = drawn[:test_cases], drawn[test_cases:][:count], drawn[test_cases + count :]
    if validation_fraction is None:
        validation_fraction = 0.2 if count >= 10 else 0.0
    held_out = [_validation_count(n, validation_fraction) for n in range(count + 1)]
    # A case goes to validation where the rounded number of validation cases rises: smaller splits lie in larger ones.
    training = [case for n, case in enumerate(labelled) if held_out[n] == held_out[n + 1]]
    validation = [case for n, case in enumerate(labelled) if held_out[n] < held_out[n + 1]]
    if count == 1 and validation:
        logger.warning("Only one volume, %s: it serves for training and for validation.", item_name(validation[0]))
        training = validation
    parts = zip(PARTS, (training, validation, test, unused), strict=True)
    return {name: sorted(listed, key=item_name) for name, listed in parts}


def _fold_first(cases: Sequence[dict], test_fold: Sequence[int], test_cases: int) -> tuple[list[dict], int]:
    """All cases, those of a fold before the others, and how many they are."""
    fold, folds = test_fold if np.shape(test_fold) == (2,) else (None, None)
    if folds not in range(2, len(cases) + 1) or fold not in range(folds) or test_cases:
        raise ValueError(
            f"test_fold must be [k, n], the k-th of n parts of the {len(cases)} cases, k from 0 to n - 1, and without "
            f"test_cases, such as [0, 5], got {test_fold} with {test_cases} test_cases."
        )
    patients: dict[str, list[dict]] = {}
    for case in cases:
        patients.setdefault(patient_of(case) or item_name(case), []).append(case)
    if len(patients) < folds:
        raise ValueError(f"the cases are of {len(patients)} patients, too few for {folds} folds: take fewer folds.")
    parts: list[list[dict]] = [[] for _ in range(folds)]
    for of_patient in patients.values():
        min(parts, key=len).extend(of_patient)
    test = parts.pop(fold)
    return [*test, *itertools.chain(*parts)], len(test)


def _labelled_count(total: int, test_cases: int, label_fraction: float, labelled_cases: int | None) -> int:
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


def _validation_count(items: int, fraction: float) -> int:
    """How many of some items to validate on; it grows by 0 or 1 with each item."""
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {fraction}.")
    if fraction == 0 or items == 0:
        return 0
    return 1 if items == 1 else min(max(1, round(fraction * items)), items - 1)


# --- the file that records a split ----------------------------------------------------------------------------------


def write_split(path: PathLike, settings: Mapping[str, object], split: Mapping[str, list[dict]]) -> None:
    """Record a split with the settings that it was made with, as a data list with the keys :data:`PARTS`."""
    write_json(Path(path), {**settings, **split})


def recorded_split(path: PathLike, settings: Mapping[str, object], cases: Sequence[Mapping]) -> dict[str, list[dict]]:
    """The split in a file.

    Args:
        path: that :func:`write_split` wrote.
        settings: that it must have been made with.
        cases: that it must have been made from.

    Raises:
        ValueError: it was made with other settings, or from other cases, or the file is something else.
    """
    try:
        content = read_json(path)
        split = {name: [dict(case) for case in content[name]] for name in PARTS}
        recorded = {name: content.get(name) for name in settings}  # earlier versions had fewer settings
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a split written by an earlier run ({type(error).__name__}: {error}): remove it, or set "
            "another --output_dir."
        ) from error
    differences = [
        f"{name} was {recorded[name]} and is {value}" for name, value in settings.items() if recorded[name] != value
    ]
    both = (itertools.chain(*split.values()), cases)
    before, now = ({json.dumps(dict(case), sort_keys=True) for case in listed} for listed in both)
    for changed, what in ((before - now, "there no more, or changed"), (now - before, "new, or changed")):
        if changed:
            names = sorted(json.loads(case)["image"] for case in changed)
            differences.append(f"{len(changed)} cases are {what}, such as {names[0]}")
    if differences:
        raise ValueError(
            f"{path} holds the split of an earlier run that was set up otherwise: {'; '.join(differences)}. Set "
            "another --output_dir to keep that run, remove the file to split anew, or go back to its settings."
        )
    return split
