from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd
from pgl_ext.point_similarity import PointSimilarity, feature_at

from pgl_ext.data.datalist import inference_items, unique_names
from pgl_ext.evaluation.feature_maps import FeatureMapInferer, SaveFeatureMapd, recorded_input
from pgl_ext.geometry import upsample_features
from pgl_ext.networks.dense import DenseFeatures, load_weights
from pgl_ext.tools.phantom import generate_case
from pgl_ext.transforms import LoadVolumed
from pgl_ext.weights import save_encoder
from pgl_ext.weights.loading import build_encoder

CONFIG = Path(__file__).parents[1] / "bundles" / "pgl_pretrain" / "configs" / "inference.json"
TINY = {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 0.25}
STRIDE = (16, 16, 8)


@pytest.fixture
def encoder_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "models" / "tiny.pt"
    description = {"architecture": TINY, "normalization": {"clip_hu": [-500, 200]}, "spacing": None}
    save_encoder(build_encoder(**TINY), path, description)
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
    assert recorded_input(encoder_file) == {"hu_window": [-500, 200], "spacing": None}


def test_without_files_the_default_is_built_but_not_loaded(tmp_path):
    path = tmp_path / "absent.pt"
    assert build_encoder(path, load=False).channels[-1] == 2048
    assert recorded_input(path) == {"hu_window": [-1024, 325], "spacing": None}
    with pytest.raises(FileNotFoundError, match=r"absent\.pt does not exist.*--pretrained_encoder"):
        build_encoder(path, **TINY)


def test_weights_that_do_not_fit_are_refused(encoder_file):
    with pytest.raises(ValueError, match="does not fit"):
        build_encoder(encoder_file, widen_factor=0.5)
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(DenseFeatures(build_encoder(**{**TINY, "layers": (1, 1, 1, 2)})), encoder_file)
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


# --- items ----------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_the_query_comes_first(tmp_path):
    for name in ("a/ct.nii.gz", "b/ct.nii.gz", "b/ct.nrrd", "b/other.nii", "b/ct_features.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    items = inference_items(tmp_path)
    assert [item["name"] for item in items] == ["a_ct", "b_ct_1", "b_ct_2", "other"]
    for query in ("other", 3, "other.nii", str(tmp_path / "b/other.nii")):
        assert [i["name"] for i in inference_items(tmp_path, query_volume=query)] == [
            "other",
            "a_ct",
            "b_ct_1",
            "b_ct_2",
        ]
    with pytest.raises(ValueError, match=r"query_volume 'ct\.nii\.gz' names several of the 4 scans"):
        inference_items(tmp_path, query_volume="ct.nii.gz")
    with pytest.raises(ValueError, match="query_volume 7 names none of the 4 scans"):
        inference_items(tmp_path, query_volume=7)
    assert [i["name"] for i in inference_items(tmp_path / "b" / "other.nii")] == ["other"]
    with pytest.raises(ValueError, match="--dataset_dir"):
        inference_items()


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/scan.nii", "a/scan.nii.gz", "a/scan_1.nii.gz"], ["scan_0", "scan_2", "scan_1"]),
        (["a/scan_0.nii", "a/scan_1.nii", "a/scan.nii", "a/scan.mha"], ["scan_0", "scan_1", "scan_2", "scan_3"]),
        (["a/ct.nii", "b/ct.nii", "a_ct.nii"], ["a_ct_0", "b_ct", "a_ct_2"]),
        (["a/ct.nii", "a/ct.nii.gz", "a_ct.nii", "a_ct_1.nii", "b/ct.nii"], None),
        (["x.nii", "x.nii.gz", "x.mha", "x_1.nii", "x_1.nii.gz", "x_1_3.nii", "x_2.nii"], None),
        (["b/1.nii", "a/1.nii"], ["b_1", "a_1"]),
        (["b/1.nii", "a/2.nii"], ["1", "2"]),
    ],
)
def test_names_are_unique_whatever_scans_are_called(paths, expected):
    names = unique_names([{"image": f"/data/{path}"} for path in paths])
    assert len(set(names)) == len(paths)
    assert expected in (None, names)


def test_items_of_a_data_list(scans):
    path = scans / "list.json"
    path.write_text(json.dumps({"testing": ["case_2.nii.gz"]}))
    assert [i["name"] for i in inference_items(scans, path, "testing")] == ["case_2"]


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
    torch.testing.assert_close(feature_at(features, (24, 16, 8), STRIDE), dense[:, 24, 16, 8])


def similarity_item(path: Path, name: str, features: torch.Tensor) -> dict:
    data = Compose([LoadVolumed("image"), Orientationd("image", axcodes="RAS", labels=None)])({"image": str(path)})
    return {**data, "scan": data["image"], "name": name, "pred": features}


def test_the_point_is_found_in_file_voxels_of_both_scans(scans, tmp_path):
    """The same feature is planted at known voxels of both scans, one of which is stored flipped along x and y."""
    features = torch.randn(2, 32, 4, 4, 4)
    features[1, :, 3, 0, 2] = features[0, :, 1, 2, 3] * 5
    # Voxel (16, 32, 24) of the first scan in RAS order, of 64 x 64 x 32 voxels, which its file stores as LPS.
    handler = PointSimilarity(tmp_path / "out", STRIDE, query_point=[63 - 16, 63 - 32, 24])
    for seed in (1, 2):
        handler.add(similarity_item(scans / f"case_{seed}.nii.gz", f"case_{seed}", features[seed - 1]))
    handler._save()
    report = json.loads((tmp_path / "out" / "similarity.json").read_text())
    (match,) = report["matches"]
    assert report["query"]["voxel"] == [47, 31, 24]
    assert match["voxel"] == [48, 0, 16]
    assert match["similarity"] == pytest.approx(1, abs=1e-3)
    for seed, place in ((1, report["query"]), (2, match)):
        affine = nib.load(scans / f"case_{seed}.nii.gz").affine
        np.testing.assert_allclose(place["mm"], (affine @ [*place["voxel"], 1])[:3], atol=0.01)
    assert (tmp_path / "out" / "similarity.png").stat().st_size > 10_000


def test_default_point_is_in_the_body_next_to_the_middle(tmp_path):
    image = torch.full((1, 32, 32, 16), -1000.0)
    image[:, 20:, 10:25, 4:12] = 0
    item = {"name": "x", "image": MetaTensor(image), "scan": image, "pred": torch.rand(4, 2, 2, 2)}
    handler = PointSimilarity(tmp_path, STRIDE)
    handler.add(item)
    assert handler._point.tolist() == [20, 15, 7]


def test_the_middle_is_measured_in_mm(tmp_path):
    """3 voxels off the middle along x are 3 mm, 2 along z are 10 mm."""
    image = torch.full((1, 33, 33, 17), -1000.0)
    image[:, 19, 16, 8] = image[:, 16, 16, 10] = 0
    tensor = MetaTensor(image, affine=np.diag([1.0, 1, 5, 1]))
    handler = PointSimilarity(tmp_path, STRIDE)
    handler.add({"name": "x", "image": tensor, "scan": image, "pred": torch.rand(4, 3, 3, 3)})
    assert handler._point.tolist() == [19, 16, 8]


def test_a_single_scan_is_searched_itself(scans, tmp_path):
    features = torch.randn(32, 4, 4, 4)
    handler = PointSimilarity(tmp_path, STRIDE, query_point=[63 - 16, 63 - 32, 24])
    handler.add(similarity_item(scans / "case_1.nii.gz", "case_1", features))
    handler._save()
    report = json.loads((tmp_path / "similarity.json").read_text())
    (match,) = report["matches"]
    assert match["voxel"] == report["query"]["voxel"] == [47, 31, 24]
    assert match["similarity"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("point", [[64, 0, 0], [0, -1, 0], [10, 10, 500]])
def test_point_outside_the_scan(scans, tmp_path, point):
    handler = PointSimilarity(tmp_path, STRIDE, query_point=[p - 1 if p < 0 else p + 1 for p in point])
    with pytest.raises(ValueError, match=r"case_1.*from \[0, 0, 0\] to \[63, 63, 31\]"):
        handler.add(similarity_item(scans / "case_1.nii.gz", "case_1", torch.rand(4, 4, 4, 4)))


@pytest.mark.parametrize("point", [[1, 2], "1,2,3", 5])
def test_malformed_point(tmp_path, point):
    with pytest.raises(ValueError, match="three voxel indices"):
        PointSimilarity(tmp_path, STRIDE, query_point=point)


# --- the bundle -----------------------------------------------------------------------------------------------------


def run_bundle(cwd: Path, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(CONFIG), *map(str, options)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


@pytest.mark.slow
def test_bundle_runs_from_another_folder(scans, encoder_file, tmp_path):
    out = tmp_path / "out"
    result = run_bundle(
        tmp_path,
        *("--dataset_dir", scans, "--output_dir", out, "--pretrained_encoder", encoder_file),
        *("--query_volume", "case_2", "--query_point", "[30, 20, 10]"),
    )
    assert result.returncode == 0, result.stderr
    assert {p.name for p in out.iterdir()} == {
        "case_1_features.nii.gz",
        "case_2_features.nii.gz",
        "similarity.json",
        "similarity.png",
    }
    report = json.loads((out / "similarity.json").read_text())
    assert (report["query"]["name"], report["query"]["voxel"]) == ("case_2", [30, 20, 10])
    assert [match["name"] for match in report["matches"]] == ["case_1"]
    # The window recorded beside the weights is used, the volume is in RAS order, and its features are the encoder's.
    image = similarity_item(scans / "case_1.nii.gz", "", torch.empty(0))["image"]
    volume = torch.as_tensor(np.asarray(image)).clip(-500, 200)
    with torch.no_grad():
        features = build_encoder(encoder_file).eval()(((volume - volume.mean()) / volume.std())[None])[-1][0]
    saved = nib.load(out / "case_1_features.nii.gz")
    # The file holds float16 values: half a unit in the last place, 2^-11, and where windows meet a little more.
    np.testing.assert_allclose(np.moveaxis(saved.get_fdata(), -1, 0), features, rtol=2**-11, atol=2e-3)
    np.testing.assert_allclose(saved.affine, np.asarray(image.affine) @ np.diag([*STRIDE, 1]), atol=1e-4)


@pytest.mark.slow
def test_bundle_without_weights_says_what_to_give(scans, tmp_path):
    result = run_bundle(tmp_path, "--dataset_dir", scans, "--output_dir", tmp_path / "out")
    assert result.returncode != 0
    assert "pgl_encoder.pt does not exist" in result.stderr
    assert "--pretrained_encoder" in result.stderr.splitlines()[-2]
