from __future__ import annotations

import copy
import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from made_files import oblique, oblique_affine, save_dicom_series
from monai.bundle import ConfigParser
from programs import SEGMENTATION_CONFIGS, run

from pgl_ext.errors import root_cause
from pgl_ext.networks import SegmentationNet
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.phantom import generate_case
from pgl_ext.transforms.checks import BadVolumesError
from pgl_ext.weights import InputRecord, ModelRecord, save_weights

CONFIG = SEGMENTATION_CONFIGS / "inference.json"
TASK = SegmentationTask({"liver": [1], "left kidney": [2], "spleen": [4]})
SHAPE = (48, 40, 32)  # of the NIfTI scan in RAS order


@pytest.fixture(scope="module")
def network() -> SegmentationNet:
    """Random, but with an output that varies from voxel to voxel, so that every organ is found somewhere."""
    torch.manual_seed(0)
    encoder = {"layers": (1, 1, 1, 1), "block": "basic", "widen_factor": 0.125}
    network = SegmentationNet(1, 4, encoder=encoder, aspp_channels=16, decoder_channels=(16, 8, 8)).eval()
    with torch.no_grad():
        volume = torch.from_numpy(generate_case(5, SHAPE)[0])[None, None].float().clip(-1024, 325)
        logits = network((volume - volume.mean()) / volume.std())
        head = [module for module in network.modules() if isinstance(module, torch.nn.Conv3d)][-1]
        assert head.bias is not None
        mean, std = logits.mean((0, 2, 3, 4)), logits.std((0, 2, 3, 4))
        head.weight /= std[:, None, None, None, None]
        head.bias.copy_((head.bias - mean) / std)
    return network


@pytest.fixture
def model(network, tmp_path) -> Path:
    return save_model(network, tmp_path / "models" / "model.pt")


def save_model(network: SegmentationNet, path: Path, **inputs) -> Path:
    record = ModelRecord(
        task=TASK.description(),
        network=network.architecture,
        input=InputRecord(**{"hu_window": [-1024, 325], "patch_size": SHAPE, **inputs}),
    )
    save_weights(network.state_dict(), path, record)
    return path


@pytest.fixture
def scan(tmp_path) -> Path:
    """A phantom whose file has its axes in another order, turned, oblique and anisotropic."""
    image, _, _ = generate_case(3, SHAPE)
    start = nib.orientations.axcodes2ornt(("R", "A", "S"))
    stored = nib.orientations.aff2axcodes(oblique_affine())
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(stored))
    voxels = nib.orientations.apply_orientation(image, turn)
    path = tmp_path / "scans" / "phantom.nii.gz"
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(voxels), oblique_affine()), path)
    return path


@pytest.fixture
def series(tmp_path) -> Path:
    image, _, _ = generate_case(4, (44, 40, 20))
    return save_dicom_series(tmp_path / "scans" / "study", image, oblique(flips=(-1, -1, 1)), "1.2.3")


def segment(model: Path, out: Path, **settings) -> Path:
    """Run the bundle in this process; what its `run` does beside that is about messages."""
    parser = ConfigParser()
    parser.read_config(str(CONFIG))
    parser.update({"model_path": str(model), "output_dir": str(out), "device": "cpu", **settings})
    parser.get_parsed_content("evaluator").run()
    return out


def expected_probabilities(network: SegmentationNet, path: Path) -> np.ndarray:
    """What the network says of a scan, in the order of the file's axes: with nibabel and NumPy alone."""
    stored = nib.load(path)
    canonical = nib.as_closest_canonical(stored)
    volume = torch.from_numpy(canonical.get_fdata(dtype=np.float32)).clip(-1024, 325)
    volume = (volume - volume.mean()) / volume.std(correction=0)
    with torch.no_grad():
        probabilities = network(volume[None, None])[0].softmax(0).numpy()
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(canonical.affine), nib.orientations.io_orientation(stored.affine)
    )
    return np.stack([nib.orientations.apply_orientation(channel, turn) for channel in probabilities], axis=-1)


def test_a_rotated_oblique_nifti_scan(model, network, scan, tmp_path):
    out = segment(model, tmp_path / "out", dataset_dir=str(scan), save_probabilities=True, save_uncertainty=True)
    expected = expected_probabilities(network, scan)
    source, labels = nib.load(scan), nib.load(out / "phantom_seg.nii.gz")
    assert source.shape != SHAPE
    for name in ("seg", "probabilities", "uncertainty"):
        image = nib.load(out / f"phantom_{name}.nii.gz")
        assert image.shape[:3] == source.shape
        for field in ("srow_x", "srow_y", "srow_z", "qform_code", "sform_code", "quatern_b", "qoffset_x"):
            assert np.array_equal(image.header[field], source.header[field])
    probabilities = nib.load(out / "phantom_probabilities.nii.gz").get_fdata()
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    values = np.array([0, 1, 2, 4])[expected.argmax(-1)]
    assert (np.asarray(labels.dataobj) != values).mean() < 1e-3
    assert set(np.unique(labels.dataobj)) == {0, 1, 2, 4}
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(-1) / np.log(4)
    np.testing.assert_allclose(nib.load(out / "phantom_uncertainty.nii.gz").get_fdata(), entropy, atol=1e-4)
    assert (out / "phantom_overlay.png").stat().st_size > 10_000
    assert not (out / "phantom_seg.dcm").exists()


@pytest.mark.parametrize("as_folder", [False, True])
def test_probabilities_of_several_models_are_averaged(network, scan, tmp_path, as_folder):
    torch.manual_seed(1)
    networks = [network, copy.deepcopy(network)]
    for parameter in networks[1].parameters():
        parameter.data += 0.1 * parameter.data.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    paths = [tmp_path / "run" / f"fold_{number}" / "models" / "model.pt" for number in range(2)]
    files = [str(save_model(one, path)) for one, path in zip(networks, paths, strict=True)]
    out = segment(
        tmp_path / "run", tmp_path / "out", dataset_dir=str(scan), save_probabilities=True, overlays=False,
        **({} if as_folder else {"model_path": files}),
    )  # fmt: skip
    each = [expected_probabilities(one, scan) for one in networks]
    assert np.abs(each[0] - each[1]).max() > 0.1
    probabilities = nib.load(out / "phantom_probabilities.nii.gz").get_fdata()
    np.testing.assert_allclose(probabilities, np.mean(each, axis=0), atol=1e-4)
    values = np.array([0, 1, 2, 4])[np.mean(each, axis=0).argmax(-1)]
    assert (np.asarray(nib.load(out / "phantom_seg.nii.gz").dataobj) != values).mean() < 1e-3


def test_another_spacing_returns_to_the_file(network, scan, tmp_path):
    """Resampled for the network and back, windows smaller than the scan: the header is still the file's."""
    model = save_model(network, tmp_path / "models" / "model.pt", spacing=[2, 2, 2], patch_size=[24, 24, 16])
    out = segment(model, tmp_path / "out", dataset_dir=str(scan), flip_axes=[0, 1], overlays=False)
    source, labels = nib.load(scan), nib.load(out / "phantom_seg.nii.gz")
    assert labels.shape == source.shape
    assert np.array_equal(labels.affine, source.affine)
    assert len(np.unique(labels.dataobj)) > 1
    assert {path.name for path in out.iterdir()} == {"phantom_seg.nii.gz", "volumes.csv"}


def test_a_dicom_series(model, series, tmp_path):
    """The label map lies where SimpleITK reads the series, and the SEG has its voxels."""
    out = segment(model, tmp_path / "out", dataset_dir=str(series), keep_components=1)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    source, labels = reader.Execute(), SimpleITK.ReadImage(str(out / "study_seg.nii.gz"))
    assert labels.GetSize() == source.GetSize()
    for name in ("Spacing", "Origin", "Direction"):
        np.testing.assert_allclose(getattr(labels, f"Get{name}")(), getattr(source, f"Get{name}")(), atol=1e-4)
    voxels = SimpleITK.GetArrayFromImage(labels)
    with open(out / "volumes.csv", newline="") as file:
        volumes = {row["organ"]: float(row["millilitres"]) for row in csv.DictReader(file)}
    seg = pydicom.dcmread(out / "study_seg.dcm")
    groups = seg.PerFrameFunctionalGroupsSequence
    numbers = np.array([int(g.SegmentIdentificationSequence[0].ReferencedSegmentNumber) for g in groups])
    for number, (name, value) in enumerate(zip(TASK.names, TASK.label_values, strict=True), start=1):
        count = int((voxels == value).sum())
        assert int(seg.pixel_array[numbers == number].sum()) == count
        assert volumes[name] == pytest.approx(count * np.prod(source.GetSpacing()) / 1000, abs=2e-3)
        components = SimpleITK.ConnectedComponent(labels == value, True)
        assert len(np.unique(SimpleITK.GetArrayViewFromImage(components))) <= 2


def test_bad_scans_stop_the_run_before_anything_is_written(model, scan, tmp_path):
    (scan.parent / "cut.nii.gz").write_bytes(scan.read_bytes()[:500])
    (scan.parent / "text.nii").write_text("hello")
    with pytest.raises(RuntimeError) as error:
        segment(model, tmp_path / "out", dataset_dir=str(scan.parent))
    cause = root_cause(error.value)
    assert isinstance(cause, BadVolumesError)
    assert len(cause.bad) == 2
    assert not (tmp_path / "out").exists()


def test_network_is_built_without_any_file(tmp_path):
    """As the Model Zoo's checks do."""
    parser = ConfigParser()
    parser.read_config(str(CONFIG))
    parser.update({"model_path": str(tmp_path / "absent.pt"), "bundle_root": str(CONFIG.parents[1])})
    assert parser.get_parsed_content("network_def").architecture["arguments"]["out_channels"] == 14
    assert parser.get_parsed_content("task").out_channels == 14


@pytest.mark.slow
def test_as_a_user_runs_it(model, scan, series, tmp_path):
    """From another folder, a folder of scans; the second time nothing is overwritten."""
    arguments = ["-m", "monai.bundle", "run", "--config_file", str(CONFIG), "--model_path", str(model)]
    arguments += ["--dataset_dir", str(scan.parent), "--output_dir", "out", "--amp", "false", "--overlays", "false"]
    result = run(arguments, tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"phantom_seg.nii.gz", "study_seg.nii.gz", "study_seg.dcm", "volumes.csv"}
    again = run([*arguments, "--overwrite", "false"], tmp_path)
    assert again.returncode != 0
    assert "--overwrite true" in again.stdout.splitlines()[-2]
