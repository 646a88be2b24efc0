"""What runs: the configs of a plan in their order, with the weights, and what is said of the result."""

import json
from copy import deepcopy

import nibabel
import numpy as np
import pytest
import torch
import yaml
from made_public import ct_fm, res_enc

from pgl_ext.data.split import split_cases
from pgl_ext.networks import DynUNet, ResNetEncoder
from pgl_ext.tools.gain import answer, gain_study, held_out
from pgl_ext.tools.plan import Plan, read_data
from pgl_ext.tools.study.configs import merged_config
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.workflows import (
    Pretrained,
    fine_tuning,
    inference,
    plan_of,
    pretraining,
    probe,
    recorded,
    weights_file,
)
from pgl_ext.weights import EncoderRecord, InputRecord, load_decoder, load_encoder, save_decoder, save_encoder

SMALL = {"in_channels": 1, "out_channels": 1, "filters": [4, 8, 8, 16], "strides": [1, 2, 2, 2]}
INPUT = InputRecord(hu_window=[-100, 200], spacing=[2, 2, 3], patch_size=[16, 16, 16])


@pytest.fixture
def data(tmp_path):
    """Nine labelled cases with two structures."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    entries = []
    for number in range(9):
        labels = np.zeros((20, 20, 20), np.uint8)
        labels[5:9], labels[12:15] = 1, 2
        for folder, voxels in (("images", labels * 100.0 - 1000 + number), ("labels", labels)):
            nibabel.save(
                nibabel.Nifti1Image(voxels.astype(np.int16), np.eye(4)), tmp_path / folder / f"{number}.nii.gz"
            )
        entries.append({"image": f"images/{number}.nii.gz", "label": f"labels/{number}.nii.gz"})
    content = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return read_data(tmp_path, labelled=True)


@pytest.fixture
def weights(tmp_path):
    """The folder of a pre-training of a DynUNet."""
    network = DynUNet(**SMALL)
    record = EncoderRecord(architecture=network.architecture, input=INPUT)
    save_encoder(network, tmp_path / "pre/models/pgl_encoder.pt", record)
    save_decoder(network, tmp_path / "pre/models/pgl_decoder.pt", record)
    return tmp_path / "pre"


def names(files):
    return [file.rpartition("/configs/")[2] or file for file in files]


def test_pretraining_of_a_plan(data, tmp_path):
    run = pretraining(data, tmp_path / "out", Plan(small=True), "pgl_mae", {"seed": "3"}, processes=2)
    assert names(run.configs)[:-1] == [
        "train.json",
        "networks/dynunet.yaml",
        "small.yaml",
        "networks/dynunet_small.yaml",
        "methods/pgl_mae.yaml",
        "small_adamw.yaml",
        "multi_gpu_train.json",
    ]
    assert run.configs[-1] == str(tmp_path / "out" / "plan.yaml")
    assert (tmp_path / "out" / "plan.yaml").is_file()
    assert run.settings["data_list_file_path"].endswith("dataset.json")
    assert run.settings["seed"] == "3"


@pytest.mark.parametrize(
    ("architecture", "small", "expected"),
    [
        ("resnet50", False, ["train.json"]),
        ("resnet50", True, ["train.json", "small.yaml"]),
        ("dynunet", False, ["train.json", "networks/dynunet.yaml", "start/random.yaml"]),
        (
            "segresnet",
            True,
            [
                "train.json",
                "networks/segresnet.yaml",
                "small.yaml",
                "networks/segresnet_small.yaml",
                "start/random.yaml",
                "start/small.yaml",
            ],
        ),
    ],
)
def test_fine_tuning_of_a_plan(data, tmp_path, architecture, small, expected):
    plan = plan_of(data, architecture, small, None, {})
    run = fine_tuning(data, tmp_path / "out", plan, None, {})
    assert names(run.configs)[:-1] == expected


def test_fine_tuning_from_weights_builds_the_network_that_they_are_of(data, weights, tmp_path):
    """The plan is made for the weights, and what MONAI makes of the configs loads them."""
    pretrained = Pretrained(weights)
    run = fine_tuning(data, tmp_path / "out", plan_of(data, "resnet50", True, pretrained, {}), pretrained, {})
    assert "start/pretrained.yaml" in names(run.configs)
    config = merged_config([*run.configs, dict(run.settings)])
    assert config["spacing"] == [2, 2, 3]
    assert config["hu_window"] == [-100, 200]
    assert config["lr"] == 0.02
    network = config.get_parsed_content("network")
    state = torch.load(weights / "models/pgl_encoder.pt", weights_only=True)
    for key, value in state.items():
        assert torch.equal(network.state_dict()[key], value), key
    assert network.arguments["out_channels"] == 3
    assert network.deep_supervision


@pytest.mark.parametrize(("name", "given"), [("spacing", "[2, 2, 2]"), ("hu_window", "null")])
def test_settings_that_contradict_the_weights_are_refused(weights, name, given):
    with pytest.raises(ValueError, match=rf"--{name} is {given[:2].replace('[', '.')}.*{getattr(INPUT, name)[0]}"):
        Pretrained(weights).check({name: given})
    Pretrained(weights).check({"spacing": "[2, 2, 3.0]", "hu_window": [-100, 200]})


def test_weights_of_one_channel_for_scans_of_two(data, weights, tmp_path):
    """The window recorded of one is not taken for both; the network has as many channels as the scans."""
    content = json.loads((tmp_path / "dataset.json").read_text())
    for entry in content["training"]:
        entry["image"] = [entry["image"], entry["image"]]
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "modality": ["CT", "PET"]}))
    pretrained = Pretrained(weights)
    plan = plan_of(read_data(tmp_path, labelled=True), "dynunet", True, pretrained, {})
    assert (plan.settings["channel_names"], plan.settings["hu_window"]) == (["CT", "PET"], [[-1024, 325], None])
    config = merged_config(list(fine_tuning(data, tmp_path / "out", plan, pretrained, {}).configs))
    network = config.get_parsed_content("network_def")
    assert network.arguments["in_channels"] == 2
    assert "repeated (1)" in str(load_encoder(network, pretrained.encoder))


def test_weights_of_the_papers_encoder(data, tmp_path):
    encoder = ResNetEncoder(layers=(1, 1, 1, 1), block="basic", widen_factor=0.125)
    save_encoder(encoder, tmp_path / "e.pt", EncoderRecord(architecture=encoder.architecture, input=INPUT))
    pretrained = Pretrained(tmp_path / "e.pt")
    assert pretrained.decoder is None
    run = fine_tuning(data, tmp_path / "out", plan_of(data, "dynunet", True, pretrained, {}), pretrained, {})
    network = merged_config([*run.configs, dict(run.settings)]).get_parsed_content("network")
    assert torch.equal(network.encoder.conv1.weight, encoder.conv1.weight)


def test_what_holds_no_weights(tmp_path):
    for function in (Pretrained, weights_file, recorded):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            function(tmp_path)


def test_the_record_of_a_folder(weights):
    assert recorded(weights)["architecture"]["family"] == "dynunet"


@pytest.mark.parametrize(("scans", "key"), [("scans", "dataset_dir"), ("l.json", "data_list_file_path")])
def test_inference_on_a_folder_or_a_list(tmp_path, scans, key):
    run = inference(tmp_path / "model.pt", tmp_path / scans, tmp_path / "out", {})
    assert run.settings[key] == str(tmp_path / scans)
    assert run.section == ""


@pytest.mark.parametrize(("cases", "count"), [(12, 5), (30, 10)])
def test_a_third_is_held_out_and_at_least_five(cases, count):
    assert held_out(cases) == {"cases": count}


@pytest.mark.parametrize("cases", [5, 8, 11])
def test_of_few_cases_each_is_held_out_once(cases):
    assert held_out(cases) == {"folds": 3}


def test_too_few_cases_to_hold_some_out():
    with pytest.raises(ValueError, match="4 labelled cases are too few"):
        held_out(4)


def test_a_gain_is_a_study_of_both_starts(data, weights, tmp_path):
    pretrained = Pretrained(weights)
    plan = plan_of(data, "dynunet", True, pretrained, {})
    file = gain_study(data, tmp_path / "gain", plan, pretrained, 3, 5, None, {})
    study = Study(file, tmp_path / "gain")
    assert (study.methods, study.seeds, study.labels) == (["random", "pre-trained"], [0, 1, 2], [4])
    assert study.kept_steps == [250, 500, 750]
    random, start = (study.fine_tuning(method, 4, 0).commands[0].config() for method in study.methods)
    assert start["pretrained_decoder"] == str(weights / "models/pgl_decoder.pt")
    assert random["pretrained_encoder"] is None
    assert random["lr"] == start["lr"] == 0.02
    for name in ("network_def", "spacing", "patch_size", "organs", "max_epochs", "steps_per_epoch", "batch_size"):
        assert random[name] == start[name], name
    assert yaml.safe_load(file.read_text())["test"] == {"cases": 5}


def test_a_gain_of_a_folder_without_a_list(data, weights, tmp_path):
    (tmp_path / "dataset.json").unlink()
    found, pretrained = read_data(tmp_path, labelled=True), Pretrained(weights)
    plan = plan_of(found, "dynunet", True, pretrained, {})
    file = gain_study(found, tmp_path / "gain", plan, pretrained, 3, None, None, {})
    assert len(Study(file, tmp_path / "gain").runs({})) == 6


def test_a_gain_on_few_cases_tests_each_once_with_each_seed(data, weights, tmp_path):
    """All seeds and both starts on the same nine; the two starts are trained on the same of them."""
    pretrained = Pretrained(weights)
    plan = plan_of(data, "dynunet", True, pretrained, {})
    study = Study(gain_study(data, tmp_path / "gain", plan, pretrained, 3, None, None, {}), tmp_path / "gain")
    images = {item["image"] for item in data.items}
    for seed in study.seeds:
        splits = {}
        for method in study.methods:
            run = study.fine_tuning(method, 1.0, seed)
            configs = [command.config() for command in run.commands if command.section == "training"]
            names = ("labelled_cases", "label_fraction", "validation_fraction", "test_cases", "test_fold")
            splits[method] = [
                split_cases(data.items, seed=config["split_seed"], **{name: config[name] for name in names})
                for config in configs
            ]
            tested = [case["image"] for split in splits[method] for case in split["test"]]
            assert (len(tested), set(tested)) == (9, images)
            for split in splits[method]:
                assert len(split["training"]) == 6
        assert splits["random"] == splits["pre-trained"]
    with_four = yaml.safe_load(gain_study(data, tmp_path / "four", plan, pretrained, 3, None, 4, {}).read_text())
    assert (with_four["test"], with_four["labelled_cases"]) == ({"folds": 3}, [4])


class Results:
    """What a finished gain's study found."""

    def __init__(self, seeds, difference, low, high, sooner=None):
        row = {"paired_seeds": seeds, "paired_cases": 12, "difference": difference, "ci95_low": low, "ci95_high": high}
        self.study = type("Study", (), {"labels": [4], "folds": None})
        self.select = lambda **wanted: [row]
        self.sooner = sooner
        run = type("Run", (), {"is_pretraining": False})
        self.finished = [(run, {"steps": 1000})]


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        (
            Results(5, 0.021, 0.006, 0.038, 310),
            "On 12 test cases, pre-training gives +2.1 Dice (95 % interval 0.6 to 3.8, 5 seeds) and reaches random's "
            "final Dice after 31 % of its steps.",
        ),
        (
            Results(5, -0.021, -0.038, -0.006),
            "On 12 test cases, pre-training gives -2.1 Dice (95 % interval -3.8 to -0.6, 5 seeds).",
        ),
        (
            Results(5, 0.004, -0.008, 0.014, 500),
            "On 12 test cases, no difference can be told (95 % interval -0.8 to 1.4, 5 seeds): more than +1.4 Dice is "
            "unlikely.",
        ),
        (
            Results(1, 0.021, 0.006, 0.038),
            "On 12 test cases, pre-training gave +2.1 Dice with one seed, which is no verdict: single trainings differ "
            "by their seed; three seeds or more tell.",
        ),
    ],
)
def test_answers(monkeypatch, results, sentence):
    monkeypatch.setattr("pgl_ext.tools.gain.steps_to_reach", lambda *_: results.sooner)
    assert answer(results) == sentence


def test_the_answer_of_a_cross_validation():
    results = Results(1, 0.021, 0.006, 0.038)
    results.study.folds = 3
    assert answer(results).startswith("On 12 cross-validated cases, pre-training gave +2.1 Dice")


def test_a_probe_fits_on_what_fine_tuning_would_have(data, weights, tmp_path):
    pretrained = Pretrained(weights)
    plan = plan_of(data, "dynunet", True, pretrained, {})
    run = probe(data, tmp_path / "out", plan, pretrained, {"labelled_cases": "3", "test_data_list_key": "training"})
    assert run.section == "probing"
    config = merged_config([*run.configs, dict(run.settings)])
    assert config["pretrained_encoder"] == str(weights / "models/pgl_encoder.pt")
    assert config["spacing"] == INPUT.spacing
    assert config["network_def"]["filters"] == SMALL["filters"]
    assert config.get_parsed_content("evaluation#cases")[0]["label"] == data.items[0]["label"]


@pytest.mark.parametrize("published", [False, True], ids=["ours", "published"])
def test_pretraining_that_goes_on(data, weights, tmp_path, published):
    """The network is that of the weights, and the method starts from them; of a published file, also its spacing."""
    file = weights / "models/pgl_encoder.pt"
    if published:
        file = tmp_path / "published.pth"
        torch.save(res_enc().content, file)
    pretrained = Pretrained(file)
    plan = plan_of(data, "resnet50", True, pretrained, {})
    settings = {"view_size": [16, 16, 16], "hidden_channels": 8, "out_channels": 4, "device": "cpu"}
    run = pretraining(data, tmp_path / "out", plan, "pgl_mae", settings, pretrained=pretrained)
    config = merged_config([*run.configs, dict(run.settings)])
    assert config["spacing"] == ([1.5, 1.0, 3.0] if published else [2, 2, 3])
    method = config.get_parsed_content("network")
    assert type(method.encoder).__name__ == ("ResidualEncoderUNet" if published else "DynUNet")
    reference = deepcopy(method.encoder)
    load_encoder(reference, file)
    load_decoder(reference, pretrained.decoder)
    for copy, keys in ((method.encoder, method.encoder.encoder_keys()), (method.encoder, reference.decoder_keys())):
        assert all(torch.equal(copy.state_dict()[key], reference.state_dict()[key]) for key in keys)
    target = method.target_encoder.state_dict()
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in target.items())


def test_fine_tuning_from_a_published_file(data, tmp_path):
    """Without a record the plan chooses what the file does not tell."""
    published = ct_fm()
    torch.save(published.content, tmp_path / "ct_fm.pt")
    pretrained = Pretrained(tmp_path / "ct_fm.pt")
    plan = plan_of(data, "dynunet", True, pretrained, {})
    assert plan.reasons["hu_window"].startswith("HU; CT")
    run = fine_tuning(data, tmp_path / "out", plan, pretrained, {"device": "cpu"})
    network = merged_config([*run.configs, dict(run.settings)]).get_parsed_content("network")
    state = network.state_dict()
    encoder = {key: value for key, value in published.content.items() if key.startswith("encoder.")}
    assert all(torch.equal(state[key], value) for key, value in encoder.items())
    assert network.arguments["out_channels"] == 3
