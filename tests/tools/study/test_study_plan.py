from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_studies import make_study, other_scans, write_list, write_study
from programs import CONFIGS, ROOT

from pgl_ext.settings import flat_entries
from pgl_ext.tools.cli import main
from pgl_ext.tools.study.configs import merged_config
from pgl_ext.tools.study.fingerprint import fingerprint
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.study.runs import Rates
from pgl_ext.tools.study.study_file import read_study_file


def config_of(run, section="training"):
    """Of the training, or of the evaluation of what it leaves in the end."""
    return next(command for command in run.commands if command.section == section).config()


# --- runs -----------------------------------------------------------------------------------------------------------


def test_runs_in_their_order(tmp_path):
    assert [run.name for run in make_study(tmp_path).runs({})] == [
        "fine_tuning/random/3_cases/seed_0",
        "fine_tuning/random/5_cases/seed_0",
        "pretraining/PGL/seed_0",
        "fine_tuning/PGL/3_cases/seed_0",
        "fine_tuning/PGL/5_cases/seed_0",
        "fine_tuning/random/3_cases/seed_1",
        "fine_tuning/random/5_cases/seed_1",
        "pretraining/PGL/seed_1",
        "fine_tuning/PGL/3_cases/seed_1",
        "fine_tuning/PGL/5_cases/seed_1",
    ]


def test_methods_differ_by_the_encoder_alone(tmp_path):
    study = make_study(tmp_path)
    random, pgl = (study.fine_tuning(method, 3, 1) for method in ("random", "PGL"))
    first, second = (flat_entries(config_of(run).get(), lists=True) for run in (random, pgl))
    assert {name for name in first if first[name] != second[name]} == {"output_dir", "pretrained_encoder"}
    assert first["pretrained_encoder"] is None
    assert second["pretrained_encoder"] == str(tmp_path / "runs/pretraining/PGL/seed_1/models/pgl_encoder.pt")
    assert (first["seed"], first["split_seed"], first["labelled_cases"]) == (1, 1, 3)
    evaluated = config_of(pgl, "evaluating")
    assert evaluated["model_path"] == str(pgl.folder / "models" / "model.pt")
    assert evaluated["data_list_key"] == "test"


def test_studies_of_several_tasks_share_encoders(tmp_path):
    overrides = {"pretraining#folder": str(tmp_path / "encoders")}
    first, second = (make_study(tmp_path / name, overrides).fine_tuning("PGL", 3, 0) for name in ("spleen", "liver"))
    assert first.folder != second.folder
    assert first.pretraining.folder == second.pretraining.folder == tmp_path / "encoders/pretraining/PGL/seed_0"
    assert config_of(first)["pretrained_encoder"] == str(first.pretraining.folder / "models/pgl_encoder.pt")


def test_as_many_patches_for_few_cases_as_for_many(tmp_path):
    study = make_study(tmp_path)
    # Of 3 cases 1 is for validation, of 5 also 1: 2 x 24 = 4 x 12 patches.
    assert [config_of(study.fine_tuning("PGL", n, 0))["patches_per_case"] for n in (3, 5)] == [24, 12]


def test_fractions_of_the_labels(tmp_path):
    study = make_study(tmp_path, labelled_cases=None, label_fractions=[1.0, 0.5])
    assert study.labels == [0.5, 1.0]
    half = study.fine_tuning("random", 0.5, 0)
    assert half.name == "fine_tuning/random/50_percent/seed_0"
    assert config_of(half)["label_fraction"] == 0.5
    assert config_of(half)["labelled_cases"] is None
    # Of 10 cases 5 are labelled, 4 of them for training.
    assert config_of(half)["patches_per_case"] == 12


def test_own_settings_of_a_method_win(tmp_path):
    pretraining = {
        "configs": ["train.json", "small.yaml"],
        "settings": {"data_list_file_path": str(tmp_path / "data" / "dataset.json"), "scale_range": [0.8, 1.0]},
    }
    methods = {
        "random": {"encoder": None},
        "PGL": {},
        "w/o CS": {"configs": ["methods/pgl_without_crop_scale.yaml"]},
        "mine": {"settings": {"scale_range": [1.0, 1.5]}},
    }
    study = make_study(tmp_path, pretraining=pretraining, methods=methods)
    ranges = [config_of(study.pretraining(name, 0))["scale_range"] for name in ("PGL", "w/o CS", "mine")]
    assert ranges == [[0.8, 1.0], [1.0, 1.0], [1.0, 1.5]]
    assert study.pretraining("w/o CS", 0).name == "pretraining/w_o_CS/seed_0"


def test_another_preprocessing_has_another_cache(tmp_path):
    methods = {"random": {"encoder": None}, "PGL": {}, "narrow": {"settings": {"hu_window": [-200, 300]}}}
    study = make_study(tmp_path, methods=methods)
    folders = [config_of(study.pretraining(name, seed))["cache_dir"] for name in ("PGL", "narrow") for seed in (0, 1)]
    assert folders[0] == folders[1] != folders[2] == folders[3]


def test_an_encoder_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = make_study(tmp_path, methods={"random": {"encoder": None}, "theirs": {"encoder": "resnet_50.pth"}})
    run = study.fine_tuning("theirs", 3, 0)
    assert run.pretraining is None
    assert config_of(run)["pretrained_encoder"] == str(tmp_path / "resnet_50.pth")


def test_a_decoder_that_was_pretrained_too(tmp_path):
    methods = {"random": {"encoder": None}, "both": {"configs": ["methods/models_genesis.yaml"], "decoder": True}}
    run = make_study(tmp_path, methods=methods).fine_tuning("both", 3, 1)
    assert config_of(run)["pretrained_decoder"] == str(run.pretraining.folder / "models" / "pgl_decoder.pt")


def test_a_variant_shares_the_pretraining(tmp_path):
    genesis = {"configs": ["methods/models_genesis.yaml"], "settings": {"lr": 0.5}, "decoder": True}
    methods = {"random": {"encoder": None}, "alone": {"pretrained_as": "both"}, "both": genesis}
    study = make_study(tmp_path, methods=methods)
    alone, both = (study.fine_tuning(name, 3, 1) for name in ("alone", "both"))
    assert alone.folder != both.folder
    assert alone.pretraining.name == both.pretraining.name == "pretraining/both/seed_1"
    assert fingerprint(alone.pretraining) == fingerprint(both.pretraining)
    encoders = {config_of(run)["pretrained_encoder"] for run in (alone, both)}
    assert encoders == {str(both.pretraining.folder / "models" / "pgl_encoder.pt")}
    assert config_of(alone)["pretrained_decoder"] is None
    assert [run.name for run in study.runs({}) if run.is_pretraining] == [f"pretraining/both/seed_{s}" for s in (0, 1)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"pretrained_as": "nobody"}, "is pretrained_as 'nobody': name a method of the study"),
        ({"pretrained_as": "random"}, "name a method of the study that is pre-trained itself"),
        ({"pretrained_as": "PGL", "encoder": "a.pt"}, "give no encoder"),
        ({"pretrained_as": "PGL", "settings": {"lr": 1.0}}, "besides it can have decoder and fine_tuning"),
    ],
)
def test_variants_of_nothing(tmp_path, entry, words):
    with pytest.raises(ValueError, match=words):
        make_study(tmp_path, methods={"random": {"encoder": None}, "PGL": {}, "variant": entry})


# --- test cases -----------------------------------------------------------------------------------------------------


def test_held_out_cases_are_the_same_in_all_runs(tmp_path):
    study = make_study(tmp_path, test={"cases": 4}, pretraining=other_scans(tmp_path))
    (path,) = (tmp_path / "runs").glob("split_*.json")
    split = json.loads(path.read_text())
    assert (len(split["training"]), len(split["test"])) == (6, 4)
    images = [Path(case["image"]).name for part in split.values() for case in part]
    assert len(set(images)) == 10
    for run in (study.fine_tuning(method, 3, seed) for method in ("random", "PGL") for seed in (0, 1)):
        assert config_of(run)["data_list_file_path"] == str(path)
        assert config_of(run)["dataset_dir"] == str(tmp_path / "data")
        assert (config_of(run)["data_list_key"], config_of(run)["test_cases"]) == ("training", 0)
        assert config_of(run, "evaluating")["data_list_key"] == "test"


def test_folds_of_all_cases(tmp_path):
    """Each has a training of its own, and one evaluation is on the cases that each held out."""
    study = make_study(tmp_path, test={"folds": 2}, pretraining=other_scans(tmp_path))
    run = study.fine_tuning("PGL", 3, 1)
    *trainings, evaluation = (command.config() for command in run.commands)
    assert [config["test_fold"] for config in trainings] == [[0, 2], [1, 2]]
    assert [config["output_dir"] for config in trainings] == [str(run.folder / f"fold_{k}") for k in range(2)]
    assert len({config["cache_dir"] for config in trainings}) == 1
    assert {config["split_seed"] for config in trainings} == {1}
    assert evaluation["model_path"] == [str(run.folder / f"fold_{k}" / "models" / "model.pt") for k in range(2)]
    assert evaluation["data_list_file_path"] is None
    assert not run.is_for_selection
    assert not list((tmp_path / "runs").glob("split_*.json"))


def test_no_case_of_a_cross_validation_is_pretrained_on(tmp_path):
    with pytest.raises(ValueError, match="of the 10 test scans are pre-trained on"):
        make_study(tmp_path, test={"folds": 2})


def test_a_look_at_another_study_leaves_the_held_out_cases_alone(tmp_path):
    make_study(tmp_path, test={"cases": 4}, pretraining=other_scans(tmp_path))
    (path,) = (tmp_path / "runs").glob("split_*.json")
    before = path.read_bytes()
    make_study(tmp_path, test={"cases": 5}, pretraining=other_scans(tmp_path))
    assert path.read_bytes() == before


def test_annotated_key_of_the_test_list_may_be_another(tmp_path):
    training = {"data_list_file_path": write_list(tmp_path / "data" / "dataset.json", 10, test=4)}
    study = make_study(tmp_path)
    assert config_of(study.fine_tuning("PGL", 3, 0), "evaluating")["annotated_key"] is None
    list_ = json.loads(Path(training["data_list_file_path"]).read_text())
    for entry in list_["test"]:
        entry["contoured"] = ["liver"]
    other = tmp_path / "data" / "test.json"
    other.write_text(json.dumps(list_))
    overrides = {"test#settings#data_list_file_path": str(other), "test#settings#annotated_key": "contoured"}
    run = Study(tmp_path / "study.yaml", tmp_path / "runs", overrides=overrides).fine_tuning("PGL", 3, 0)
    assert config_of(run)["annotated_key"] is None
    assert config_of(run, "evaluating")["annotated_key"] == "contoured"


def test_scans_prepared_differently_are_told(tmp_path):
    overrides = {"pretraining#settings#spacing": [5, 5, 5], "fine_tuning#settings#spacing": [4, 4, 4]}
    assert make_study(tmp_path, overrides).note == (
        "Pre-training and fine-tuning prepare scans differently: spacing [5, 5, 5], then [4, 4, 4]."
    )


def test_what_a_study_writes_is_not_pre_trained_on(tmp_path):
    scans = {"configs": ["train.json"], "settings": {"dataset_dir": str(tmp_path)}}
    with pytest.raises(ValueError, match=r"runs lies within the scans to pre-train on.*give an --out elsewhere"):
        make_study(tmp_path, pretraining=scans)


def test_labelled_cases_are_not_tested_on(tmp_path):
    with pytest.raises(ValueError, match=r"10 test cases are among the labelled ones, such as .*case_0\.nii\.gz"):
        make_study(tmp_path, {"test#settings#data_list_key": "training"})


def test_test_scans_are_not_pre_trained_on(tmp_path):
    folder = {"configs": ["train.json"], "settings": {"dataset_dir": str(tmp_path / "data")}}
    for entries in ({}, {"pretraining": folder}):
        with pytest.raises(
            ValueError, match=r"4 of the 4 test scans are pre-trained on, such as .*case_\d\.nii\.gz: give"
        ):
            make_study(tmp_path, test={"cases": 4}, **entries)
    # The same file by another name: a link to its folder.
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    linked = {"configs": ["train.json"], "settings": {"data_list_file_path": str(tmp_path / "linked/dataset.json")}}
    with pytest.raises(ValueError, match="4 of the 4 test scans are pre-trained on"):
        make_study(tmp_path, test={"cases": 4}, pretraining=linked)


def test_copies_of_test_scans_are_not_pre_trained_on(tmp_path):
    """Two files of one size, of which one is a copy."""
    pretraining = other_scans(tmp_path)
    make_study(tmp_path, pretraining=pretraining)
    scans = [tmp_path / "scans/images" / f"case_{number}.nii.gz" for number in (0, 1)]
    test = tmp_path / "data/images/case_12.nii.gz"
    for path, content in ((test, b"scan 12"), (scans[0], b"scan 00"), (scans[1], b"scan 11")):
        path.write_bytes(content)
    Study(tmp_path / "study.yaml", tmp_path / "runs")
    scans[1].write_bytes(b"scan 12")
    with pytest.raises(ValueError, match=r"1 of the 4 test scans are pre-trained on, such as .*/data/images/case_12"):
        Study(tmp_path / "study.yaml", tmp_path / "runs")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("seeds", 3, r"seeds must have the form \[0, 1, 2\], got 3"),
        ("labelled_cases", 3, "labelled_cases must have the form"),
        ("methods", ["PGL"], r"methods must have the form NAME: VALUE, got \['PGL'\]"),
        ("test", "dataset.json", "test must have the form NAME: VALUE"),
    ],
)
def test_values_of_the_wrong_kind(tmp_path, name, value, words):
    with pytest.raises(ValueError, match=words):
        make_study(tmp_path, {name: value})


def test_a_file_that_is_not_yaml(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("methods: {PGL: {}\n")
    with pytest.raises(ValueError, match=r"study\.yaml, .*is not valid YAML"):
        read_study_file(path)


# --- learning rates -------------------------------------------------------------------------------------------------


def test_learning_rates_to_choose_among(tmp_path):
    methods = {
        "random": {"encoder": None},
        "PGL": {},
        "fixed": {"settings": {"lr": 0.7}},
        "file": {"configs": [str(tmp_path / "own.yaml")]},
        "optimizer": {"settings": {"optimizer#lr": 0.5}},
        "BYOL": {"learning_rates": [0.1]},
        "preset": {"learning_rates": []},
    }
    (tmp_path / "own.yaml").write_text("lr: 0.9\n")
    study = make_study(tmp_path, {"pretraining#learning_rates": [1.0, 0.3]}, methods=methods)
    selection = study.selection()
    assert {method: list(runs) for method, runs in selection.items()} == {
        "PGL": [Rates(0.3), Rates(1.0)],
        "BYOL": [Rates(0.1)],
    }
    assert [run.name for run in selection["PGL"].values()] == [
        f"fine_tuning/PGL_lr_{rate}/5_cases/seed_0" for rate in ("0.3", "1")
    ]
    assert config_of(selection["PGL"][Rates(0.3)].pretraining)["lr"] == 0.3
    assert config_of(study.pretraining("fixed", 0))["lr"] == 0.7
    assert config_of(study.pretraining("file", 0))["lr"] == 0.9
    assert not any("PGL" in run.name for run in study.runs({}))
    with pytest.raises(ValueError, match="'fixed' sets its learning rate itself: remove it, or its learning_rates"):
        make_study(tmp_path, methods={**methods, "fixed": {"settings": {"lr": 0.7}, "learning_rates": [1.0]}})
    # What the choice was made by is part of the study.
    assert selection["PGL"][Rates(0.3)].name in [run.name for run in study.runs({"PGL": Rates(0.3)})]


def test_learning_rates_of_fine_tuning(tmp_path):
    """Of each method as many; what is to be chosen is set after everything else."""
    methods = {"random": {"encoder": None}, "PGL": {"fine_tuning": {"learning_rates": [0.03, 0.01]}}}
    entries = {"fine_tuning#learning_rates": [0.2, 0.1], "fine_tuning#settings#lr": 7}
    study = make_study(tmp_path, entries, methods=methods)
    selection = study.selection()
    assert {method: list(runs) for method, runs in selection.items()} == {
        "random": [Rates(None, 0.1), Rates(None, 0.2)],
        "PGL": [Rates(None, 0.01), Rates(None, 0.03)],
    }
    run = selection["PGL"][Rates(None, 0.03)]
    assert run.name == "fine_tuning/PGL_fine_tuning_lr_0.03/5_cases/seed_0"
    assert run.pretraining.name == "pretraining/PGL/seed_0"
    assert config_of(run)["lr"] == 0.03
    # There are validation cases, so that what the choice is made by is part of the study.
    assert run.name in [one.name for one in study.runs({"PGL": Rates(None, 0.03)})]
    assert study.runs({}) == []


def test_rates_of_pretraining_with_those_of_fine_tuning(tmp_path):
    rates = {"pretraining#learning_rates": [1, 2], "fine_tuning#learning_rates": [3, 4]}
    selection = make_study(tmp_path, rates).selection()
    assert list(selection["random"]) == [Rates(None, 3), Rates(None, 4)]
    assert list(selection["PGL"]) == [Rates(1, 3), Rates(1, 4), Rates(2, 3), Rates(2, 4)]
    run = selection["PGL"][Rates(2, 3)]
    assert run.name == "fine_tuning/PGL_lr_2_fine_tuning_lr_3/5_cases/seed_0"
    assert (config_of(run)["lr"], config_of(run.pretraining)["lr"]) == (3, 2)
    assert str(run) == "PGL, learning rate 2, fine-tuned with 3, 5 labelled cases, seed 0"


@pytest.mark.parametrize("fraction", [0, None])
def test_cases_to_choose_by_where_all_are_trained_on(tmp_path, fraction):
    entries = {"fine_tuning#learning_rates": [0.1], "fine_tuning#settings#validation_fraction": fraction}
    study = make_study(tmp_path, entries)
    run = study.selection()["PGL"][Rates(None, 0.1)]
    assert run.name == "fine_tuning/PGL_fine_tuning_lr_0.1/5_cases_for_selection/seed_0"
    assert [command.section for command in run.commands] == ["training"]  # not tested
    # 2 of 5 for validation; as many patches from 3 as from 5.
    assert (config_of(run)["validation_fraction"], config_of(run)["patches_per_case"]) == (0.34, 16)
    chosen = study.fine_tuning("PGL", 5, 0, Rates(None, 0.1))
    assert (config_of(chosen)["validation_fraction"], config_of(chosen)["patches_per_case"]) == (fraction, 10)
    assert run.name not in [one.name for one in study.runs(dict.fromkeys(study.methods, Rates(None, 0.1)))]


@pytest.mark.parametrize(
    ("of_random", "of_pgl", "words"),
    [
        ({"learning_rates": [0.1]}, {}, r"different numbers .*\(random: 1, PGL: 0\)"),
        ({"learning_rates": [0.1, 0.2]}, {"learning_rates": [0.1]}, r"\(random: 2, PGL: 1\)"),
        ({"learning_rates": [0.1], "settings": {"lr": 1}}, {}, "'random' sets its learning rate of fine-tuning itself"),
        ({"learning_rates": [0.1], "settings": {"optimizer#lr": 1}}, {}, "an optimizer without '@lr'"),
    ],
)
def test_as_many_learning_rates_for_each_start(tmp_path, of_random, of_pgl, words):
    methods = {"random": {"encoder": None, "fine_tuning": of_random}, "PGL": {"fine_tuning": of_pgl}}
    with pytest.raises(ValueError, match=words):
        make_study(tmp_path, methods=methods)


# --- recipes of fine-tuning -----------------------------------------------------------------------------------------


def test_starts_have_recipes_of_their_own(tmp_path):
    """Configs of all, of the start, settings of all, configs and settings of the method: later ones win."""
    for name, lr in (("scratch", 0.1), ("weights", 0.2), ("mine", 0.3)):
        (tmp_path / f"{name}.yaml").write_text(f"lr: {lr}\nweight_decay: {lr}\nwarmup_steps: {lr}\n")
    methods = {
        "random": {"encoder": None},
        "file": {"encoder": "resnet_50.pth"},
        "PGL": {},
        "mine": {"fine_tuning": {"configs": [str(tmp_path / "mine.yaml")], "settings": {"warmup_steps": 9}}},
        "random too": {"encoder": None, "fine_tuning": {"settings": {"lr": 5}}},
    }
    starts = {
        "fine_tuning#random_start": [str(tmp_path / "scratch.yaml")],
        "fine_tuning#pretrained_start": [str(tmp_path / "weights.yaml")],
        "fine_tuning#settings#weight_decay": 0.7,
    }
    study = make_study(tmp_path, starts, methods=methods)
    found = {name: config_of(study.fine_tuning(name, 3, 0)) for name in methods}
    values = {name: [c["lr"], c["weight_decay"], c["warmup_steps"]] for name, c in found.items()}
    assert values == {
        "random": [0.1, 0.7, 0.1],
        "file": [0.2, 0.7, 0.2],
        "PGL": [0.2, 0.7, 0.2],
        "mine": [0.3, 0.3, 9],
        "random too": [5, 0.7, 0.1],
    }


def test_recipes_that_come_with_the_bundle(tmp_path):
    starts = {
        "fine_tuning#random_start": ["start/random.yaml"],
        "fine_tuning#pretrained_start": ["start/pretrained.yaml"],
    }
    study = make_study(tmp_path, starts)
    configs = [config_of(study.fine_tuning(name, 3, 0)) for name in ("random", "PGL")]
    assert [config["optimizer"]["_target_"] for config in configs] == ["torch.optim.AdamW"] * 2
    assert [config["warmup_steps"].split()[-1] for config in configs] == ["20", "10"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_list_key", "test"),
        ("validation_fraction", 0.5),
        ("organs", {"liver": 1}),
        ("spacing", [2, 2, 2]),
        ("patch_size", [32, 32, 32]),
        ("max_epochs", 3),
        ("steps_per_epoch", 3),
        ("patches_per_case", 3),
        ("batch_size", 2),
        ("kept_steps", [3]),
        ("train#sampler#batch_size", 2),
    ],
)
def test_one_budget_of_fine_tuning(tmp_path, name, value):
    (tmp_path / "more.yaml").write_text(json.dumps({name: value}))
    methods = {"random": {"encoder": None}, "greedy": {"fine_tuning": {"configs": [str(tmp_path / "more.yaml")]}}}
    with pytest.raises(ValueError, match=rf"method 'greedy' changes {name}.* Set it under fine_tuning"):
        make_study(tmp_path, methods=methods)
    with pytest.raises(ValueError, match=rf"method 'random' changes {name}.* Set it under fine_tuning"):
        make_study(tmp_path, {"fine_tuning#random_start": [str(tmp_path / "more.yaml")]})


# --- kept steps -----------------------------------------------------------------------------------------------------


def test_kept_models_are_evaluated_after_training(tmp_path):
    study = make_study(tmp_path, {"fine_tuning#settings#kept_steps": [40, 20]})
    assert study.kept_steps == [20, 40]
    run = study.fine_tuning("PGL", 3, 0)
    assert [command.section for command in run.commands] == ["training", *["evaluating"] * 3]
    configs = [command.config() for command in run.commands[1:]]
    assert [Path(config["output_dir"]) for config in configs] == [
        run.folder / name for name in ("evaluation", "evaluation_step_20", "evaluation_step_40")
    ]
    assert [Path(config["model_path"]) for config in configs] == [
        run.folder / "models" / name for name in ("model.pt", "model_step_20.pt", "model_step_40.pt")
    ]
    assert {config["data_list_key"] for config in configs} == {"test"}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 20),
        ("batch_size", 8),
        ("micro_batch_size", 4),
        ("patches_per_volume", 70),
        ("data_list_key", "validation"),
        ("validation_fraction", 0.5),
        ("train#sampler#batch_size", 8),
        ("volumes#data_list_key", "validation"),
    ],
)
def test_one_budget_for_all_methods(tmp_path, name, value):
    (tmp_path / "more.yaml").write_text(f"{name}: {value}\n")
    for entry in ({"settings": {name: value}}, {"configs": [str(tmp_path / "more.yaml")]}):
        methods = {"random": {"encoder": None}, "greedy": entry}
        with pytest.raises(ValueError, match=rf"method 'greedy' changes {name} from .* to {value}"):
            make_study(tmp_path, methods=methods)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("view_size", [48, 48, 48]),
        ("data_list_file_path", "other.json"),
        ("dataset_dir", "elsewhere"),
        ("volumes#dataset_dir", "elsewhere"),
        ("train#trainer#max_epochs", 20),
    ],
)
def test_one_input_and_length_for_all_methods(tmp_path, name, value):
    methods = {"random": {"encoder": None}, "greedy": {"settings": {name: value}}}
    with pytest.raises(ValueError, match=f"method 'greedy' changes {name}"):
        make_study(tmp_path, methods=methods)


def test_a_method_may_not_add_to_the_encoder(tmp_path):
    encoder = merged_config((str(CONFIGS / "train.json"), str(CONFIGS / "small.yaml"), {}))["encoder"]
    (tmp_path / "more.yaml").write_text(json.dumps({"encoder": {**encoder, "bias_downsample": True}}))
    methods = {"random": {"encoder": None}, "other": {"configs": [str(tmp_path / "more.yaml")]}}
    with pytest.raises(ValueError, match="changes encoder#bias_downsample from None to True"):
        make_study(tmp_path, methods=methods)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pretraning": {}}, r"the study has the entries \['pretraning'\], which mean nothing there"),
        ({"fine_tuning#max_epochs": 3}, r"fine_tuning has the entries \['max_epochs'\].*go under 'settings'"),
        ({"methods#PGL#fine_tuning": {"decoder": True}}, r"fine_tuning of method 'PGL' has the entries \['decoder'\]"),
        ({"pretraining#settings#max_epoch": 3}, r"the settings \['max_epoch'\] are not in .*train\.json"),
        ({"fine_tuning#settings#seed": 3}, r"fine_tuning sets \['seed'\], which the study sets itself"),
        ({"methods#PGL#configs": ["methods/none.yaml"]}, r"config methods/none\.yaml is neither in"),
        ({"reference": "Random"}, r"reference or ablations name \['Random'\]"),
        ({"ablations": ["PGL w/o F"]}, r"reference or ablations name \['PGL w/o F'\]"),
        ({"methods#P/G/L": {}, "methods#P-G-L": {}, "methods#P G L": {}}, "would share a folder"),
        ({"label_fractions": [0.5]}, "give one of them"),
        ({"labelled_cases": [30]}, "labelled_cases must be from 1 to 10"),
        ({"seeds": []}, "seeds is empty"),
        ({"test#settings#data_list_file_path": None}, "test has no data_list_file_path"),
        ({"test#folds": 3}, "test has both folds, each of them to hold out once, and a data_list_file_path"),
        ({"test#cases": 3}, "test has both cases, to hold out of the labelled ones, and a data_list_file_path"),
        ({"methods#random#settings": {"lr": 1}}, "method 'random' has an encoder and is not pre-trained"),
    ],
)
def test_mistakes_are_named(tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_study(tmp_path, overrides)


# --- the file -------------------------------------------------------------------------------------------------------


def test_base_files_and_overrides(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "methods.yaml").write_text("methods: {PGL: {}}\nseeds: [0]\n")
    (tmp_path / "parts" / "base.yaml").write_text("base: methods.yaml\nmethods#BYOL: {configs: [methods/byol.yaml]}\n")
    (tmp_path / "study.yaml").write_text("base: [parts/base.yaml]\nseeds: [3, 4]\n")
    overrides = {
        "pretraining#settings#encoder#layers": [1, 1, 1, 1],
        "methods::BYOL::settings::lr": 0.5,
        "title": "Mine",
    }
    content = read_study_file(tmp_path / "study.yaml", overrides)
    assert content["seeds"] == [3, 4]
    assert content["title"] == "Mine"
    assert content["pretraining"]["settings"] == {"encoder#layers": [1, 1, 1, 1]}
    assert content["methods"]["PGL"] == {
        **{"configs": [], "settings": {}, "decoder": False, "learning_rates": None, "pretrained_as": None},
        "fine_tuning": {"configs": [], "settings": {}, "learning_rates": None},
    }
    assert content["methods"]["BYOL"]["configs"] == ["methods/byol.yaml"]
    assert content["methods"]["BYOL"]["settings"] == {"lr": 0.5}


STUDIES = [path for path in sorted((ROOT / "studies").glob("*.yaml")) if "title:" in path.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_files_that_come_with_the_project(path, tmp_path):
    content = read_study_file(path)
    test = content["test"]
    count = (test["cases"] or 5) + max(15, *content["labelled_cases"], 0)
    data = write_list(tmp_path / "labelled" / "dataset.json", count, validation=5, test=5)
    scans = write_list(tmp_path / "scans" / "dataset.json", 5, test=2)
    lists = {"pretraining": scans, "fine_tuning": data, "test": data}
    overrides = {
        f"{part}#settings#{name}": value
        for part, list_ in lists.items()
        for name, value in (("data_list_file_path", list_), ("dataset_dir", None))
        if part != "test" or test["cases"] is None
    }
    study = Study(path, tmp_path / "runs", overrides={**overrides, "pretraining#scans": []})
    selection = study.selection()
    runs = study.runs({method: next(iter(runs)) for method, runs in selection.items()})
    trained = {study.pretrained_as(name) for name in study.methods if name != "random"}
    fine_tunings = len(study.methods) * len(study.labels) * len(study.seeds)
    assert len(runs) == fine_tunings + len(trained) * len(study.seeds)
    for name in trained:
        # It is refused here where views cannot overlap as the method asks.
        config_of(study.pretraining(name, 0)).get_parsed_content("train#preprocessing#transforms#0")
    for run in runs:
        for command in run.commands:
            assert command.section in command.config()


def test_command_line(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("pgl_ext.tools.study.run.planned_runs", lambda *args: calls.append(args) or "done")
    options = ["--pretraining#settings#spacing", "[4, 4, 3]", "--methods#PGL w/o F#settings#amp", "false"]
    options += ["--fine_tuning#settings#hu_window", "null", "--title", "Mine", "--jobs", "2", "--dry_run"]
    monkeypatch.setattr("sys.argv", ["pgl", "study", "study.yaml", "--out", "runs", *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    ((*arguments, overrides),) = calls
    assert arguments == [Path("study.yaml"), Path("runs"), None, 2]
    assert overrides == {
        "pretraining#settings#spacing": [4, 4, 3],
        "methods#PGL w/o F#settings#amp": False,
        "fine_tuning#settings#hu_window": None,
        "title": "Mine",
    }


def test_paths_start_from_the_working_directory(tmp_path, monkeypatch):
    path = write_study(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    study = Study(path, "out", overrides={"pretraining#settings#data_list_file_path": ["dataset.json"]})
    assert study.folder == tmp_path / "data" / "out"
    assert config_of(study.pretraining("PGL", 0))["data_list_file_path"] == [str(tmp_path / "data" / "dataset.json")]
