"""Structures as data lists of the Decathlon and of nnU-Net name them, or as the label maps show them."""

import nibabel
import numpy as np
import pytest

from pgl_ext.data.structures import annotated_field, found_structures, listed_ignore_label, listed_structures


@pytest.mark.parametrize(
    ("labels", "structures"),
    [
        ({"0": "background", "1": "liver", "2": "tumour"}, {"liver": [1], "tumour": [2]}),  # Decathlon, nnU-Net 1
        ({"background": 0, "liver": 1, "tumour": 2}, {"liver": [1], "tumour": [2]}),  # nnU-Net 2
        ({"background": 0, "kidney": [1, 2], "tumour": [2]}, {"kidney": [1, 2], "tumour": [2]}),  # regions
        ({"Clear Label": "0", "liver": "6"}, {"liver": [6]}),
        (["background", "liver"], {"liver": [1]}),
        (None, {}),
        ({"background": 0, "liver": 1, "ignore": 2}, {"liver": [1]}),
        ({}, {}),
    ],
)
def test_listed(labels, structures):
    assert listed_structures({"labels": labels}, "dataset.json") == structures


@pytest.mark.parametrize(
    ("labels", "value"),
    [({"background": 0, "liver": 1, "ignore": 2}, 2), ({"liver": 1}, None), ({"1": "ignore"}, None), ({}, None)],
)
def test_what_is_to_be_ignored(labels, value):
    assert listed_ignore_label({"labels": labels}) == value


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"liver": "one"}, "'liver': 'one'"),
        ({"liver": True}, "'liver': True"),
        ({"liver": []}, "'liver'"),
        ("liver", "'liver'"),
    ],
)
def test_labels_of_another_form(labels, message):
    with pytest.raises(ValueError, match=message):
        listed_structures({"labels": labels}, "dataset.json")


def write_labels(folder, *values):
    path = folder / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.array(values, np.float32).reshape(-1, 1, 1), np.eye(4)), path)
    return [{"label": str(path)}]


def test_found(tmp_path):
    assert found_structures(write_labels(tmp_path, 0, 3, 3, 1)) == {"structure 1": [1], "structure 3": [3]}


@pytest.mark.parametrize("values", [(0, 0), (0, 0.5), (0, -1)])
def test_label_maps_without_structures(tmp_path, values):
    with pytest.raises(ValueError, match="whole number above 0"):
        found_structures(write_labels(tmp_path, *values))


def test_field_of_what_was_annotated():
    entries = [{"image": "a", "contoured": ["SpinalCord", "Larynx"]}, {"image": "b", "contoured": ["SpinalCord"]}]
    names = ["spinal_cord", "larynx"]
    assert annotated_field(entries, names) == ("contoured", {"spinal_cord": "SpinalCord", "larynx": "Larynx"})
    assert annotated_field([{"image": "a", "protocol": ["venous"]}], names) == (None, {})
    assert annotated_field([entries[0], {"image": "c"}], names) == (None, {})
