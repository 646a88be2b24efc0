"""Scans of several channels, compared with nibabel, SimpleITK and NumPy."""

import nibabel
import numpy as np
import pytest
import torch
from made_files import oblique, sitk_image
from monai.transforms import ConcatItemsd

from pgl_ext.data.cache import VolumeCache
from pgl_ext.data.dataset import CaseDataset
from pgl_ext.segmentation.inferers import VolumeInferer
from pgl_ext.task import SegmentationTask
from pgl_ext.transforms import LoadVolumed, RandOrganPatchd, preprocessing
from pgl_ext.transforms.checks import BadVolumeError, CheckVolumed
from pgl_ext.transforms.masks import SplitCased

NAMES = ["CT", "PET"]
AFFINE = oblique()
SHAPE = (12, 10, 8)


def values(seed: int, shape: tuple = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100 * seed, 30 * (seed + 1), shape).astype(np.float32)


def save(path, array, affine=AFFINE) -> str:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return str(path)


@pytest.fixture
def scan(tmp_path) -> dict:
    """An item of two channels in a file each."""
    files = [save(tmp_path / f"a_000{n}.nii.gz", values(n)) for n in (0, 1)]
    return {"image": files[0], "further_channels": files[1:], "channel_names": NAMES}


def load(item: dict, names=NAMES, **settings) -> torch.Tensor:
    return LoadVolumed("image", channel_names=names, **settings)(item)["image"]


class TestLoading:
    @pytest.mark.parametrize("names", [None, NAMES])
    def test_files_are_channels_in_their_order(self, scan, names):
        image = load(scan, names)
        expected = [nibabel.load(file).get_fdata() for file in (scan["image"], *scan["further_channels"])]
        np.testing.assert_allclose(image, expected, rtol=1e-6)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
        assert image.meta["filename_or_obj"] == scan["image"]
        assert tuple(image.meta["spatial_shape"]) == SHAPE

    @pytest.mark.parametrize("item", [{"channel_names": ["a", "b", "c", "d"]}, {}])
    def test_the_last_axis_has_the_channels_that_are_named(self, tmp_path, item):
        array = values(1, (*SHAPE, 4))
        item = {**item, "image": save(tmp_path / "a.nii", array)}
        np.testing.assert_array_equal(load(item, ["a", "b", "c", "d"]), np.moveaxis(array, -1, 0))

    def test_a_channel_whose_axes_are_stored_otherwise(self, scan, tmp_path):
        sitk = pytest.importorskip("SimpleITK")
        pytest.importorskip("itk")
        flipped = AFFINE @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        sitk.WriteImage(sitk_image(values(1)[::-1], flipped), str(tmp_path / "pet.mha"))
        image = load({**scan, "further_channels": [str(tmp_path / "pet.mha")]})
        np.testing.assert_allclose(image[1], values(1), rtol=1e-6)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"further_channels": None, "channel_names": None},
                r"a_0000.*shape \(12, 10, 8\).*\['CT', 'PET'\] are needed",
            ),
            ({"channel_names": NAMES[::-1]}, r"a_0000.*a_0001.*\['PET', 'CT'\], but \['CT', 'PET'\] are needed"),
            ({"channel_names": ["CT", "MR"]}, r"\['CT', 'MR'\], but"),
            ({"channel_names": None, "further_channels": ["b", "c"]}, r"channels are 3, but"),
        ],
    )
    def test_missing_or_in_another_order(self, scan, changes, message):
        with pytest.raises(BadVolumeError, match=message):
            load({**scan, **changes})

    def test_a_network_of_one_channel(self, scan):
        with pytest.raises(BadVolumeError, match=r"\['CT', 'PET'\], but \['image'\] are needed"):
            load(scan, ["image"])

    def test_a_missing_file(self, scan):
        with pytest.raises(FileNotFoundError, match=r"b\.nii"):
            load({**scan, "further_channels": ["b.nii"]})

    def test_four_dimensions_without_names_may_be_time(self, tmp_path):
        with pytest.raises(BadVolumeError, match=r"time points, name these in their order.*--channel_names"):
            load({"image": save(tmp_path / "a.nii", values(0, (*SHAPE, 2)))}, None)

    def test_another_grid_is_refused_or_resampled(self, scan, tmp_path):
        """Onto the grid of the first channel, linearly, as SimpleITK does it."""
        sitk = pytest.importorskip("SimpleITK")
        affine = AFFINE @ np.diag([1.2, 1.3, 1.5, 1])
        item = {**scan, "further_channels": [save(tmp_path / "pet.nii", values(1, (14, 9, 7)), affine)]}
        with pytest.raises(
            BadVolumeError, match=r"pet.nii lies on another grid than the first channel .*a_0000.*--res"
        ):
            load(item)
        image = load(item, resample_channels=True)
        first, second = sitk_image(values(0), AFFINE), sitk_image(values(1, (14, 9, 7)), affine)
        expected = sitk.GetArrayFromImage(sitk.Resample(second, first, sitk.Transform(), sitk.sitkLinear, 0.0)).T
        inside = expected != 0
        assert inside.sum() > 300
        np.testing.assert_allclose(image[1].numpy()[inside], expected[inside], atol=0.05)


class TestPreprocessing:
    @pytest.mark.parametrize("window", [None, (0, 90), [None, (50, 120)], [(0, 10), None]])
    def test_each_channel_has_its_window_mean_and_deviation(self, scan, window):
        image = preprocessing(hu_window=window, channel_names=NAMES)(scan)["image"]
        raw = load({**scan})
        windows = window if isinstance(window, list) else [window, window]
        for channel, voxels, each in zip(image, raw.numpy().astype(np.float64), windows, strict=True):
            clipped = voxels if each is None else voxels.clip(*each)
            expected = (clipped - clipped.mean()) / clipped.std()
            # Turned to RAS.
            np.testing.assert_allclose(np.sort(channel.numpy().ravel()), np.sort(expected.ravel()), atol=1e-4)

    @pytest.mark.parametrize("window", [[None, None, None], [(5, 1), None]])
    def test_windows_that_do_not_fit(self, window):
        with pytest.raises(ValueError, match="hu_window"):
            preprocessing(hu_window=window, channel_names=NAMES)

    def test_what_is_said_of_the_channels_changes_the_digest(self):
        assert preprocessing(channel_names=NAMES).digest != preprocessing(channel_names=NAMES[::-1]).digest

    def test_a_constant_channel(self, scan, tmp_path):
        item = {**scan, "further_channels": [save(tmp_path / "pet.nii", np.ones(SHAPE, np.float32))]}
        with pytest.raises(BadVolumeError, match=r"channel 1 of .*constant"):
            CheckVolumed("image")({"image": load(item)})


class TestCases:
    TASK = SegmentationTask({"organ": [2]}, ignore_label=9)

    @pytest.fixture
    def dataset(self, scan, tmp_path):
        label = np.zeros(SHAPE, np.uint8)
        label[3:6, 4:7, 2:5], label[0] = 2, 9
        case = {**scan, "label": save(tmp_path / "label.nii.gz", label)}
        extra = [ConcatItemsd(["image", "label"], name="image", dim=0)]
        steps = preprocessing(["image", "label"], task=self.TASK, channel_names=NAMES, extra=extra)

        def make(transform):
            return CaseDataset([case], VolumeCache(tmp_path / "cache", steps), transform, self.TASK)

        return make

    def test_image_channels_come_first_and_the_label_map_last(self, dataset):
        whole = dataset(RandOrganPatchd("image", 4))
        (points,) = whole.inputs(0, whole.cache.open(whole.data[0]))["organ_points"]
        assert len(points) == 27  # and none of the voxels to ignore
        case = SplitCased("image")({"image": whole.cache.open(whole.data[0])})
        assert case["image"].shape == (2, *SHAPE)
        assert (case["label"] == 2).sum() == 27
        x, y, z = points.T
        assert (case["label"][0, x, y, z] == 2).all()

    def test_patches_are_padded_with_each_channels_own_minimum(self, dataset):
        patch = dataset(RandOrganPatchd("image", (40, 8, 8), scale_range=(1, 1), flip_prob=0))[0]
        assert patch["image"].shape == (2, 40, 8, 8)
        outside = patch["image"][:, 0]
        assert torch.equal(outside.amin((1, 2)), outside.amax((1, 2)))
        assert torch.equal(outside[:, 0, 0], patch["image"].amin((1, 2, 3)))


def test_windows_over_small_volumes_are_padded_with_each_channels_own_minimum():
    volume = torch.rand(1, 2, 4, 9, 5) + torch.tensor([0.0, 10.0]).view(1, 2, 1, 1, 1)
    seen = []
    result = VolumeInferer((8, 8, 8))(volume, lambda windows: seen.append(windows.clone()) or windows.clone())
    torch.testing.assert_close(result, volume)
    for channel, low in enumerate(volume.amin((0, 2, 3, 4))):
        assert float(seen[0][:, channel].min()) == float(low)
