import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from pgl_ext.data.datalist import item_name
from pgl_ext.data.split import recorded_split, split_cases, split_volumes, write_split


def cases(count: int) -> list[dict]:
    return [{"image": f"/d/{n:03}.nii", "label": f"/l/{n:03}.nii"} for n in range(count)]


def names(part: list[dict]) -> set[str]:
    return {item_name(case) for case in part}


def sizes(split: dict[str, list[dict]]) -> list[int]:
    return [len(split[part]) for part in ("training", "validation", "test", "unused")]


class TestSplitCases:
    @pytest.mark.parametrize(
        ("count", "settings", "expected"),
        [
            # The paper's splits: half for testing, a fifth of the training half for validation.
            (131, {"test_cases": 65}, [53, 13, 65, 0]),
            (30, {"test_cases": 15}, [12, 3, 15, 0]),
            (30, {"test_cases": 15, "label_fraction": 0.2}, [2, 1, 15, 12]),
            (30, {"test_cases": 15, "label_fraction": 0.5}, [6, 2, 15, 7]),
            (70, {"labelled_cases": 7, "label_fraction": 0.9}, [6, 1, 0, 63]),
            (70, {"labelled_cases": 1}, [1, 1, 0, 69]),
            (70, {"label_fraction": 0.001}, [1, 1, 0, 68]),
            (2, {"test_cases": 1, "label_fraction": 0.1}, [1, 1, 1, 0]),
            (10, {"validation_fraction": 0.99}, [1, 9, 0, 0]),
            (10, {"validation_fraction": 0.01}, [9, 1, 0, 0]),
            (10, {"validation_fraction": 0}, [10, 0, 0, 0]),
        ],
    )
    def test_sizes(self, count, settings, expected):
        assert sizes(split_cases(cases(count), **settings)) == expected

    @pytest.mark.parametrize("settings", [{}, {"test_cases": 11, "label_fraction": 0.3}])
    def test_each_case_is_in_one_part(self, settings):
        split = split_cases(cases(40), **settings)
        assert sorted(itertools.chain(*split.values()), key=item_name) == cases(40)
        assert all(part == sorted(part, key=item_name) for part in split.values())

    def test_depends_on_the_seed_and_not_on_the_order(self):
        settings = {"test_cases": 9, "label_fraction": 0.5}
        shuffled = random.Random(1).sample(cases(40), 40)
        assert split_cases(shuffled, seed=3, **settings) == split_cases(cases(40), seed=3, **settings)
        assert len({str(split_cases(cases(40), seed=seed, **settings)) for seed in range(5)}) == 5

    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.35, 0.5, 0.8, 0.97])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_smaller_shares_are_contained_in_larger_ones(self, fraction, seed):
        settings = {"test_cases": 20, "validation_fraction": fraction, "seed": seed}
        splits = [split_cases(cases(83), labelled_cases=count, **settings) for count in range(2, 64)]
        for smaller, larger in itertools.pairwise(splits):
            assert smaller["test"] == larger["test"]
            for part in ("training", "validation"):
                assert names(smaller[part]) <= names(larger[part])
                assert smaller[part]
            count = len(larger["training"]) + len(larger["validation"])
            assert len(larger["validation"]) == min(max(1, round(fraction * count)), count - 1)

    @pytest.mark.parametrize(("labelled", "validation"), [(1, 0), (3, 0), (9, 0), (10, 2), (20, 4)])
    def test_few_cases_are_all_trained_on(self, labelled, validation):
        split = split_cases(cases(30), labelled_cases=labelled, validation_fraction=None)
        assert sizes(split) == [labelled - validation, validation, 0, 30 - labelled]

    def test_the_first_cases_of_a_list_are_not_preferred(self):
        means = [
            np.mean([int(Path(name).stem) for name in names(split_cases(cases(50), 10, seed=seed)[part])])
            for part in ("training", "validation", "test")
            for seed in range(30)
        ]
        assert abs(np.mean(means) - 24.5) < 1.5

    def test_a_single_case_serves_as_both(self, caplog):
        split = split_cases(cases(1))
        assert split["training"] == split["validation"] == cases(1)
        assert "/d/000.nii" in caplog.text

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"test_cases": 5}, "got 5 of 5 cases"),
            ({"test_cases": -1}, "got -1 of 5"),
            ({"label_fraction": 0}, r"\(0, 1\], got 0"),
            ({"label_fraction": 20}, r"\(0, 1\], got 20"),
            ({"labelled_cases": 4, "test_cases": 2}, "from 1 to 3, the 5 cases less 2 for testing, got 4"),
            ({"labelled_cases": 0}, "got 0"),
            ({"validation_fraction": 1}, r"\[0, 1\)"),
        ],
    )
    def test_impossible_splits(self, settings, message):
        with pytest.raises(ValueError, match=message):
            split_cases(cases(5), **settings)


class TestFolds:
    @pytest.mark.parametrize(("count", "folds"), [(4, 2), (7, 3), (10, 5), (11, 11)])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_each_case_is_held_out_once(self, count, folds, seed):
        splits = [split_cases(cases(count), seed=seed, test_fold=(fold, folds)) for fold in range(folds)]
        assert sorted(itertools.chain(*(split["test"] for split in splits)), key=item_name) == cases(count)
        for split in splits:
            assert len(split["test"]) in (count // folds, -(-count // folds))
            assert sorted(itertools.chain(*split.values()), key=item_name) == cases(count)

    @pytest.mark.parametrize("scans", [[3, 1, 1, 2, 1, 4], [1] * 6, [5, 1, 1]])
    def test_a_patient_is_never_on_both_sides(self, scans):
        patients = itertools.chain(*([f"p{number}"] * count for number, count in enumerate(scans)))
        items = [{**case, "patient": patient} for case, patient in zip(cases(sum(scans)), patients, strict=True)]
        tested = []
        for fold in range(3):
            split = split_cases(items, seed=2, test_fold=(fold, 3))
            test, others = ({case["patient"] for case in listed} for listed in (split["test"], split["training"]))
            assert test
            assert not test & others
            tested += split["test"]
        assert sorted(tested, key=item_name) == items

    def test_few_of_the_others_can_be_taken_as_labelled(self):
        split = split_cases(cases(20), labelled_cases=5, validation_fraction=0.2, test_fold=(1, 4))
        assert sizes(split) == [4, 1, 5, 10]

    @pytest.mark.parametrize(
        ("test_fold", "settings", "message"),
        [
            ((3, 3), {}, r"got \(3, 3\)"),
            ((0, 1), {}, "k-th of n"),
            ((0, 6), {}, "parts of the 5 cases"),
            (2, {}, "got 2 with"),
            ((0, 3), {"test_cases": 2}, "with 2 test_cases"),
        ],
    )
    def test_what_is_no_fold(self, test_fold, settings, message):
        with pytest.raises(ValueError, match=message):
            split_cases(cases(5), test_fold=test_fold, **settings)

    def test_too_few_patients(self):
        with pytest.raises(ValueError, match="of 2 patients, too few for 3 folds"):
            split_cases([{**case, "patient": n % 2} for n, case in enumerate(cases(5))], test_fold=(0, 3))


SETTINGS = {"seed": 3, "test_cases": 2}


class TestRecordedSplit:
    def test_is_what_was_written(self, tmp_path):
        split = split_cases(cases(9), **SETTINGS)
        write_split(tmp_path / "out" / "split.json", SETTINGS, split)
        assert recorded_split(tmp_path / "out" / "split.json", SETTINGS, cases(9)) == split

    def test_of_an_earlier_version_did_not_know_all_settings(self, tmp_path):
        split = split_cases(cases(9), **SETTINGS)
        write_split(tmp_path / "split.json", SETTINGS, split)
        assert recorded_split(tmp_path / "split.json", {**SETTINGS, "test_fold": None}, cases(9)) == split
        with pytest.raises(ValueError, match=r"test_fold was None and is \[0, 3\]"):
            recorded_split(tmp_path / "split.json", {**SETTINGS, "test_fold": [0, 3]}, cases(9))

    def test_of_other_settings_or_cases_is_refused(self, tmp_path):
        write_split(tmp_path / "split.json", SETTINGS, split_cases(cases(9), **SETTINGS))
        with pytest.raises(ValueError, match=r"seed was 3 and is 4; 1 cases are new, or changed, such as /d/009\.nii"):
            recorded_split(tmp_path / "split.json", {**SETTINGS, "seed": 4}, cases(10))


class TestSplitVolumes:
    @pytest.mark.parametrize(
        ("count", "fraction", "validation"),
        [(10, 0.2, 2), (10, 0.01, 1), (2, 0.9, 1), (3, 0.99, 2), (10, 0, 0), (0, 0.5, 0)],
    )
    def test_sizes_and_partition(self, count, fraction, validation):
        items = [{"image": f"/d/{i:02}.nii"} for i in range(count)]
        train, valid = split_volumes(items, fraction, seed=0)
        assert len(valid) == validation
        assert sorted(train + valid, key=item_name) == items

    def test_depends_on_the_seed_and_not_on_the_order(self):
        items = [{"image": f"/d/{i}.nii"} for i in range(40)]
        shuffled = random.Random(1).sample(items, len(items))
        assert split_volumes(items, 0.25, seed=3) == split_volumes(shuffled, 0.25, seed=3)
        splits = {tuple(map(item_name, split_volumes(items, 0.25, seed=s)[1])) for s in range(5)}
        assert len(splits) == 5

    def test_series_of_one_folder_are_items_of_their_own(self):
        items = [{"image": "/d/case", "series_uid": f"1.{i}"} for i in range(8)]
        train, valid = split_volumes(np.random.default_rng(0).permutation(items).tolist(), 0.25, seed=0)
        assert (len(train), len(valid)) == (6, 2)
        assert {item_name(i) for i in train}.isdisjoint(item_name(i) for i in valid)

    def test_a_single_volume_serves_as_both(self, caplog):
        items = [{"image": "/d/a.nii"}]
        assert split_volumes(items, 0.2, seed=0) == (items, items)
        assert "/d/a.nii" in caplog.text

    @pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
    def test_fraction_out_of_range(self, fraction):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            split_volumes([{"image": "a"}], fraction, seed=0)

    @pytest.mark.parametrize(
        ("seed", "fraction", "held_out"), [(0, 0.25, [4, 6, 11]), (3, 0.05, [5]), (7, 0.5, [0, 1, 2, 5, 7, 10])]
    )
    def test_is_as_ever(self, seed, fraction, held_out):
        """Runs of before go on with what they have held out."""
        _, validation = split_volumes(cases(12), fraction, seed)
        assert validation == [cases(12)[number] for number in held_out]
