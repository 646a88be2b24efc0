"""Plans: each setting follows from the data, by rules that are computed here otherwise."""

import json

import nibabel
import numpy as np
import pytest
import torch
import yaml

from pgl_ext.networks import DynUNet
from pgl_ext.tools.bundles import bundle_folder
from pgl_ext.tools.cli.options import Architecture
from pgl_ext.tools.plan import ARCHITECTURES, Plan, _largest_patch, make_plan, read_data, saved_bytes

CONFIGS = bundle_folder("pgl_segmentation") / "configs"


@pytest.fixture
def write_data(tmp_path):
    """Writes scans of given spacings, (60, 50, 40) voxels, with label maps if any, and their ``dataset.json``."""

    def write(spacings, low=-1000, values=None, **content):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir()
        entries = []
        for number, spacing in enumerate(spacings):
            affine = np.diag([*spacing, 1.0])
            voxels = np.zeros((60, 50, 40), np.int16)
            voxels[:3] = low
            nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / f"images/{number}.nii.gz")
            entries.append({"image": f"images/{number}.nii.gz"})
            if values is not None:
                voxels = np.zeros((60, 50, 40), np.uint8)
                voxels.flat[: len(values)] = values
                nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / f"labels/{number}.nii.gz")
                entries[-1]["label"] = f"labels/{number}.nii.gz"
        (tmp_path / "dataset.json").write_text(json.dumps({"training": entries, **content}))
        return read_data(tmp_path)

    return write


@pytest.mark.parametrize(
    ("spacings", "expected"),
    [
        ([(1, 1, 2), (1, 1, 3), (1, 1, 2.5)], [1, 1, 2.5]),  # the median
        ([(1, 1, 5)] * 9 + [(1, 1, 3.5)] * 2, [1, 1, 3.5]),  # anisotropic: the 10th percentile
        ([(1, 1, 4)] * 10 + [(1, 1, 0.5)] * 2, [1, 1, 1]),  # but not finer than the other axes
    ],
)
def test_spacing_by_the_rule_of_nnunet(write_data, spacings, expected):
    assert make_plan(write_data(spacings), CONFIGS).settings["spacing"] == expected


@pytest.mark.parametrize(
    ("low", "content", "window"),
    [
        (-1000, {"modality": {"0": "CT"}}, [-1024, 325]),
        (0, {"channel_names": {"0": "CT"}}, [-1024, 325]),
        (-1000, {"modality": {"0": "MRI"}}, None),
        (-1000, {}, [-1024, 325]),  # air
        (0, {}, None),
    ],
)
def test_intensity(write_data, low, content, window):
    assert make_plan(write_data([(1, 1, 1)] * 2, low, **content), CONFIGS).settings["hu_window"] == window


@pytest.mark.parametrize(
    ("names", "window"),
    [
        (["CT", "PET"], [[-1024, 325], None]),
        (["T1", "T2"], None),
        (["CT", "ct"], [-1024, 325]),
        (None, [[-1024, 325], None]),  # as the intensities tell
    ],
)
def test_several_channels(write_data, tmp_path, names, window):
    write_data([(1, 1, 1)] * 2)
    content = json.loads((tmp_path / "dataset.json").read_text())
    for number, entry in enumerate(content["training"]):
        other = nibabel.load(tmp_path / entry["image"])
        path = f"images/other_{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.abs(other.get_fdata()), other.affine), tmp_path / path)
        entry["image"] = [entry["image"], path]
    (tmp_path / "dataset.json").write_text(json.dumps(content | ({"channel_names": names} if names else {})))
    settings = make_plan(read_data(tmp_path), CONFIGS).settings
    assert settings["hu_window"] == window
    assert settings["channel_names"] == (names or ["channel 0", "channel 1"])


def test_what_is_to_be_ignored_is_no_structure(write_data):
    data = write_data([(1, 1, 1)], values=[1, 9], labels={"liver": 1, "ignore": 9})
    settings = make_plan(data, CONFIGS).settings
    assert (settings["organs"], settings["ignore_label"]) == ({"liver": [1]}, 9)


@pytest.mark.parametrize(
    ("content", "organs", "multi_label"),
    [
        ({"labels": {"0": "background", "2": "liver"}}, {"liver": [2]}, False),
        ({"labels": {"background": 0, "kidney": [1, 2], "cyst": 2}}, {"kidney": [1, 2], "cyst": [2]}, True),
        ({}, {"structure 1": [1], "structure 2": [2]}, False),
    ],
)
def test_structures_come_from_the_data(write_data, content, organs, multi_label):
    settings = make_plan(write_data([(1, 1, 1)], values=[1, 2], **content), CONFIGS).settings
    assert (settings["organs"], settings["multi_label"]) == (organs, multi_label)


def test_structures_that_are_not_annotated_everywhere(tmp_path, write_data):
    write_data([(1, 1, 1)] * 2, values=[1, 2])
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["labels"] = {"0": "background", "1": "spinal_cord", "2": "larynx"}
    content["training"][0]["contoured"], content["training"][1]["contoured"] = ["SpinalCord", "Larynx"], ["SpinalCord"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    settings = make_plan(read_data(tmp_path), CONFIGS).settings
    assert settings["organs"] == {"SpinalCord": [1], "Larynx": [2]}
    assert settings["multi_label"]
    assert settings["annotated_key"] == "contoured"


def test_the_written_plan_is_an_overlay_that_loads_again(tmp_path, write_data):
    plan = make_plan(write_data([(1, 1, 2)], values=[1]), CONFIGS, "segresnet", small=True)
    path = tmp_path / "plan.yaml"
    path.write_text(plan.text())
    again = Plan.load(path)
    assert (again.settings, again.architecture, again.small) == (plan.settings, "segresnet", True)
    assert again.configs == ["networks/segresnet.yaml", "small.yaml", "networks/segresnet_small.yaml"]
    entries = yaml.safe_load(path.read_text())
    assert {name: value for name, value in entries.items() if not name.startswith("_desc_")} == plan.settings


@pytest.mark.parametrize("text", ["spacing: [1, 1, 1]", "- 1", "a: [", ""])
def test_what_is_no_plan(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match="is no plan"):
        Plan.load(tmp_path / "plan.yaml")


def test_what_is_recorded_beside_weights_is_not_chosen_anew(write_data):
    record = {"spacing": [3, 3, 3], "hu_window": None}
    plan = make_plan(write_data([(1, 1, 1)], values=[1]), CONFIGS, record=record)
    assert {name: plan.settings[name] for name in record} == record


@pytest.mark.parametrize(("median", "most"), [((100, 60, 120), 64**3), ((35, 50, 36), 10**9), ((9, 9, 9), 10)])
def test_patches_have_the_proportions_of_the_scans(median, most):
    multiple = np.array([16, 16, 8])
    patch = _largest_patch(np.array(median), multiple, lambda patch: patch.prod() <= most)
    assert (patch % multiple == 0).all()
    assert patch.prod() <= most or (patch == multiple).all()
    assert (patch < median + multiple).all()
    if most == 64**3:  # one step larger along any axis would not fit, or not be shrunk by the proportions
        assert np.ptp(patch / median) < (multiple / median).max() + 1e-9


def test_kept_bytes_are_those_of_a_chain_counted_by_hand():
    """A convolution keeps its input, an instance norm its input, and a leaky ReLU its output."""
    with torch.device("meta"):
        network = DynUNet(1, 2, filters=[8, 8, 8], strides=[1, 2, 2]).train()
    small, large = (saved_bytes(network, (size, 16, 16)) for size in (16, 32))
    assert large == pytest.approx(2 * small, rel=0.01)
    # Full resolution: two blocks of two convolutions of 8 channels, and the joined 16 channels of the decoder.
    full = 16**3 * 4 * (8 * 4 + 16)
    assert full < small < 3 * full


def test_a_larger_memory_takes_larger_patches(write_data):
    data = write_data([(1, 1, 1)], values=[1])
    sizes = [make_plan(data, CONFIGS, small=False, memory=gib * 2**30).settings["patch_size"] for gib in (2, 40)]
    assert np.prod(sizes[0]) < np.prod(sizes[1])


def test_options_are_all_architectures():
    """The command knows them by itself: it reads its options before PyTorch is loaded."""
    assert [architecture.value for architecture in Architecture] == list(ARCHITECTURES)


def test_unknown_architectures(write_data):
    with pytest.raises(ValueError, match="resnet50, dynunet, segresnet"):
        make_plan(write_data([(1, 1, 1)]), CONFIGS, "transformer")


def test_data_that_are_not_there(tmp_path):
    (tmp_path / "list.json").write_text("{}")
    for path in (tmp_path / "nowhere", tmp_path / "list.json"):
        with pytest.raises(ValueError, match=path.name):
            read_data(path)


def test_scans_without_their_label_maps(tmp_path, write_data):
    """Pre-training takes the images of any labelled set, also of one whose label maps do not pair off."""
    write_data([(1, 1, 1)] * 2, values=[1])
    assert not read_data(tmp_path, labelled=False).labelled
    (tmp_path / "dataset.json").unlink()
    assert read_data(tmp_path).labelled
    (tmp_path / "labels/0.nii.gz").unlink()
    assert [item.keys() for item in read_data(tmp_path, labelled=False).items] == [{"image"}, {"image"}]
    with pytest.raises(ValueError, match="do not pair off"):
        read_data(tmp_path)


def test_patches_are_of_the_spacing_that_is_given(write_data):
    data = write_data([(1, 1, 1)])
    plan = make_plan(data, CONFIGS, given={"spacing": [4, 4, 4]})
    assert plan.settings["spacing"] == [4, 4, 4]
    assert plan.settings["hu_window"] == [-1024, 325]
    assert plan.settings["patch_size"] == [16, 16, 16]
    assert np.prod(make_plan(data, CONFIGS).settings["patch_size"]) > 16**3
