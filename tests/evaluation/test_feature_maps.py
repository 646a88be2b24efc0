from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd
from programs import CONFIGS, run

from pgl_ext.evaluation.feature_maps import FeatureMapInferer, SaveFeatureMapd
from pgl_ext.geometry import upsample_features
from pgl_ext.networks.dense import DenseFeatures
from pgl_ext.tools.phantom import generate_case
from pgl_ext.transforms import LoadVolumed
from pgl_ext.weights import EncoderRecord, InputRecord, build_encoder, load_model, save_encoder

TINY = {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.25}
STRIDE = (16, 16, 8)


@pytest.fixture
def encoder_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "models" / "tiny.pt"
    architecture = {"family": "resnet", "arguments": TINY}
    record = EncoderRecord(architecture=architecture, input=InputRecord(hu_window=[-500, 200]))
    save_encoder(build_encoder(**TINY), path, record)
    return path


@pytest.fixture
def scans(tmp_path):
    """Two phantom scans whose files have different axis directions."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed, orientation in ((1, "LPS"), (2, "RAS")):
        image, _, affine = generate_case(seed, (64, 64, 32), orientation)
        nib.save(nib.Nifti1Image(image, affine), folder / f"case_{seed}.nii.gz")
    return folder


# --- encoder --------------------------------------------------------------------------------------------------------


def test_dense_features_are_the_deepest_level_and_can_be_scripted():
    network = DenseFeatures(build_encoder(**TINY)).eval()
    x = torch.rand(1, 1, 48, 33, 17)
    features = network(x)
    assert network.stride == STRIDE
    assert features.shape == (1, 128, 3, 3, 3)
    assert torch.equal(features, network.encoder(x)[-1])
    torch.testing.assert_close(torch.jit.script(network)(x), features)


def test_encoder_is_built_as_recorded_and_loaded(encoder_file):
    encoder = build_encoder(encoder_file)
    saved = torch.load(encoder_file, weights_only=True)
    assert {f"encoder.{key}" for key in encoder.state_dict()} == set(saved)
    assert all(torch.equal(value, saved[f"encoder.{key}"]) for key, value in encoder.state_dict().items())
    assert set(DenseFeatures(encoder).state_dict()) == set(saved)
    unloaded = build_encoder(encoder_file, load=False)
    assert not torch.equal(unloaded.conv1.weight, encoder.conv1.weight)
    assert EncoderRecord.load_or_default(encoder_file).input == InputRecord(hu_window=[-500, 200])


def test_without_files_the_default_is_built_but_not_loaded(tmp_path):
    path = tmp_path / "absent.pt"
    assert build_encoder(path, load=False).channels[-1] == 2048
    assert EncoderRecord.load_or_default(path).input == InputRecord(hu_window=[-1024, 325])
    with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist.*--pretrained_encoder"):
        build_encoder(path, **TINY)


def test_weights_that_do_not_fit_are_refused(encoder_file):
    with pytest.raises(ValueError, match="does not fit"):
        build_encoder(encoder_file, widen_factor=0.5)
    with pytest.raises(ValueError, match="does not fit"):
        load_model(DenseFeatures(build_encoder(**{**TINY, "layers": (1, 1, 1, 2)})), encoder_file, encoder_only=True)
    with pytest.raises(ValueError, match="not one of ResNetEncoder"):
        build_encoder(encoder_file, depth=3)


# --- sliding windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 0.2, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [(150, 101, 77), (64, 160, 32), (70, 40, 200)])
def test_windows_lie_on_the_stride(size, overlap):
    """Average pooling has no borders: whatever the windows, the stitched map is that of the padded volume."""
    pool = torch.nn.AvgPool3d(STRIDE)
    inferer = FeatureMapInferer(STRIDE, (64, 48, 32), overlap)
    volume = torch.rand(1, 1, *size)
    windows = []
    stitched = inferer(volume, lambda window: windows.append(window.shape[2:]) or pool(window))
    padded = torch.full((1, 1, *(-(-n // s) * s for n, s in zip(size, STRIDE, strict=True))), float(volume.min()))
    padded[..., : size[0], : size[1], : size[2]] = volume
    torch.testing.assert_close(stitched, pool(padded), atol=1e-5, rtol=0)
    assert len(windows) > 1 or np.prod(size) <= 2 * 64 * 48 * 32


def test_features_keep_their_positions():
    """A network that reads the centre voxel, as the encoder's odd kernels do, yields the voxel's own coordinates."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (150, 101, 77)), indexing="ij"))[None]
    network = torch.nn.Conv3d(3, 3, (17, 17, 9), STRIDE, (8, 8, 4), bias=False)
    torch.nn.init.zeros_(network.weight)
    with torch.no_grad():
        for channel in range(3):
            network.weight[channel, channel, 8, 8, 4] = 1
        features = FeatureMapInferer(STRIDE, (64, 64, 32))(grid, network)
    expected = grid[..., ::16, ::16, ::8]
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)


def test_windows_agree_with_the_whole_volume_in_the_interior():
    """Where the receptive field crosses the borders of windows, their weight there is small."""
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 4, (17, 17, 9), STRIDE, (8, 8, 4))
    volume = torch.rand(1, 1, 240, 176, 96)
    with torch.no_grad():
        whole, stitched = network(volume), FeatureMapInferer(STRIDE, (96, 96, 48))(volume, network)
    difference = (whole - stitched).abs()
    assert difference.mean() < 0.01 * whole.std()
    assert difference.max() < 0.1 * whole.std()


def test_volumes_up_to_two_windows_are_passed_whole():
    network = DenseFeatures(build_encoder(**TINY)).eval()
    volume = torch.rand(1, 1, 96, 60, 24)
    with torch.no_grad():
        torch.testing.assert_close(
            FeatureMapInferer(STRIDE, (64, 64, 24))(volume, network),
            network(torch.nn.functional.pad(volume, (0, 0, 0, 4), value=float(volume.min()))),
        )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"roi_size": (96, 100, 32)}, r"roi_size \(96, 100, 32\) is not a multiple"), ({"overlap": 1}, "got 1")],
)
def test_bad_windows(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FeatureMapInferer(STRIDE, **kwargs)


# --- outputs --------------------------------------------------------------------------------------------------------


def test_feature_map_file_overlays_the_scan(tmp_path):
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1]])
    features = torch.rand(6, 3, 2, 4)
    item = {"name": "x", "image": MetaTensor(torch.zeros(1, 40, 30, 30), affine=affine), "pred": features}
    out = SaveFeatureMapd("pred", tmp_path, STRIDE)(item)
    image = nib.load(tmp_path / "x_features.nii.gz")
    assert image.shape == (3, 2, 4, 6)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.dataobj, features.permute(1, 2, 3, 0), rtol=1e-3)
    for matrix in (image.affine, np.asarray(out["pred"].affine)):
        np.testing.assert_allclose(matrix @ [2, 1, 3, 1], affine @ [32, 16, 24, 1])


def test_large_values_survive(tmp_path):
    item = {"name": "x", "image": MetaTensor(torch.zeros(1, 8, 8, 8)), "pred": torch.full((1, 1, 1, 1), 1e6)}
    SaveFeatureMapd("pred", tmp_path, STRIDE)(item)
    assert np.asarray(nib.load(tmp_path / "x_features.nii.gz").dataobj).item() == 1e6


def test_upsampling_puts_feature_j_on_voxel_stride_j():
    features = torch.rand(2, 4, 3, 5)
    dense = upsample_features(features[None], (60, 40, 39), STRIDE)[0]
    torch.testing.assert_close(dense[:, ::16, ::16, ::8], features)
    torch.testing.assert_close(dense[:, 24, 16, 8], (features[:, 1, 1, 1] + features[:, 2, 1, 1]) / 2)
    torch.testing.assert_close(dense[:, 59, 39, 38], features[:, -1, -1, -1])


# --- the bundle -----------------------------------------------------------------------------------------------------


def arguments(**settings: object) -> list[str]:
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    return ["-m", "monai.bundle", "run", "--config_file", str(CONFIGS / "inference.json"), *options]


@pytest.mark.slow
def test_bundle_runs_from_another_folder(scans, encoder_file, tmp_path):
    out = tmp_path / "out"
    done = run(arguments(dataset_dir=scans, output_dir=out, pretrained_encoder=encoder_file), tmp_path)
    assert done.returncode == 0, done.stdout
    assert {path.name for path in out.iterdir()} == {f"case_{seed}_features.nii.gz" for seed in (1, 2)}
    # The window recorded beside the weights is used, the volume is in RAS order, and its features are the encoder's.
    prepare = Compose([LoadVolumed("image"), Orientationd("image", axcodes="RAS", labels=None)])
    image = prepare({"image": str(scans / "case_1.nii.gz")})["image"]
    volume = torch.as_tensor(np.asarray(image)).clip(-500, 200)
    with torch.no_grad():
        features = build_encoder(encoder_file).eval()(((volume - volume.mean()) / volume.std())[None])[-1][0]
    saved = nib.load(out / "case_1_features.nii.gz")
    # The file holds float16 values: half a unit in the last place, 2^-11, and where windows meet a little more.
    np.testing.assert_allclose(np.moveaxis(saved.get_fdata(), -1, 0), features, rtol=2**-11, atol=2e-3)
    np.testing.assert_allclose(saved.affine, np.asarray(image.affine) @ np.diag([*STRIDE, 1]), atol=1e-4)


@pytest.mark.slow
def test_bundle_passes_over_the_maps_of_earlier_runs(scans, encoder_file, tmp_path):
    """Where they are written into the folder of the scans."""
    for _ in range(2):
        done = run(arguments(dataset_dir=scans, output_dir=scans, pretrained_encoder=encoder_file), tmp_path)
        assert done.returncode == 0, done.stdout
    names = {path.name.split(".")[0] for path in scans.iterdir()}
    assert names == {"case_1", "case_2", "case_1_features", "case_2_features"}


@pytest.mark.slow
def test_bundle_without_weights_says_what_to_give(scans, tmp_path):
    done = run(arguments(dataset_dir=scans, output_dir=tmp_path / "out"), tmp_path)
    assert done.returncode != 0
    assert "pgl_encoder.pt does not exist" in done.stdout
    assert "--pretrained_encoder" in done.stdout.splitlines()[-2]
