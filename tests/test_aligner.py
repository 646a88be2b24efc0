import itertools

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flip, Resize, SpatialCrop
from torch import nn

from pgl_ext.aligner import PriorGuidedAligner

FLIPS = list(itertools.product([False, True], repeat=3))
STRIDE = (16, 16, 8)
VIEW = (96, 96, 16)


def coordinate_ramp(size: tuple) -> MetaTensor:
    """A volume whose three channels are the voxel's own coordinates."""
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij")
    return MetaTensor(torch.stack(grid), affine=torch.eye(4))


def stock_view(volume: MetaTensor, start: tuple, size: tuple, view_size: tuple, flips: tuple) -> MetaTensor:
    axes = [axis for axis, flip in enumerate(flips) if flip]
    return Compose(
        [
            SpatialCrop(roi_start=start, roi_end=[a + c for a, c in zip(start, size, strict=True)]),
            Resize(view_size, mode="trilinear"),
            *([Flip(axes)] if axes else []),
        ]
    )(volume)


def batch(*views: MetaTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample of the batch contract; double precision, so that only the aligner's own rounding counts."""
    affines = torch.stack([torch.as_tensor(view.affine) for view in views])[None]
    return torch.stack([view.as_tensor() for view in views])[None].double(), affines


def cell_centres(boxes: list[tuple], output_size: tuple) -> list[np.ndarray]:
    """Centres of the common grid's cells, in source voxels, from the (start, size) of the crops."""
    centres = []
    for axis, cells in enumerate(output_size):
        low = max(start[axis] for start, _ in boxes) - 0.5
        high = min(start[axis] + size[axis] for start, size in boxes) - 0.5
        centres.append(low + (high - low) * (np.arange(cells) + 0.5) / cells)
    return centres


class TestViewsOfStockTransforms:
    """The features are the view itself (stride 1), so that each cell must show its own coordinates."""

    view_size = (24, 20, 12)
    boxes = (((5, 3, 2), (30, 26, 15)), ((14, 7, 0), (27, 28, 13)))
    volume = coordinate_ramp((48, 40, 20))

    @pytest.mark.parametrize("flips", [*((FLIPS[0], f) for f in FLIPS), (FLIPS[5], FLIPS[3]), (FLIPS[7], FLIPS[7])])
    @pytest.mark.parametrize("ratio", [1, 2])
    def test_cells_show_their_own_coordinates(self, flips, ratio):
        # Crops larger than the view: shrinking a ramp by interpolation is exact up to its border. Few enough cells for
        # their sample points to stay half a voxel away from the views' edges, where the border value is repeated.
        output_size = (4, 4, 3) if ratio == 1 else (4, 4, 2)
        views, affines = batch(
            *(
                stock_view(self.volume, start, size, self.view_size, flip)
                for (start, size), flip in zip(self.boxes, flips, strict=True)
            )
        )
        aligned = PriorGuidedAligner(output_size, sampling_ratio=ratio)(views, affines, self.view_size)[0]
        expected = torch.from_numpy(np.stack(np.meshgrid(*cell_centres(self.boxes, output_size), indexing="ij")))
        assert (aligned[0] - aligned[1]).abs().max() < 1e-4
        assert (aligned - expected).abs().max() < 1e-4

    def test_enlarged_and_shrunk_views(self):
        # Enlarging repeats the ramp's border value in the outermost voxels: compare the inner cells.
        boxes = (((10, 8, 4), (14, 16, 9)), ((5, 3, 2), (30, 26, 15)))
        flips = ((True, False, True), (False, False, True))
        views, affines = batch(
            *(stock_view(self.volume, *box, self.view_size, flip) for box, flip in zip(boxes, flips, strict=True))
        )
        aligned = PriorGuidedAligner((7, 8, 5))(views, affines, self.view_size)[0, ..., 1:-1, 1:-1, 1:-1]
        centres = [c[1:-1] for c in cell_centres(boxes, (7, 8, 5))]
        expected = torch.from_numpy(np.stack(np.meshgrid(*centres, indexing="ij")))
        assert (aligned - expected).abs().max() < 1e-4

    def test_more_than_two_views(self):
        boxes = (*self.boxes, ((8, 9, 3), (28, 24, 14)))
        flips = (FLIPS[1], FLIPS[2], FLIPS[4])
        views, affines = batch(
            *(stock_view(self.volume, *box, self.view_size, flip) for box, flip in zip(boxes, flips, strict=True))
        )
        aligned = PriorGuidedAligner((3, 3, 2), sampling_ratio=1)(views, affines, self.view_size)[0]
        assert aligned.shape == (3, 3, 3, 3, 2)
        assert (aligned - aligned[:1]).abs().max() < 1e-4


class TestStridedEncoder:
    """Feature j of convolutions with odd kernels and stride s is centred on view voxel s * j."""

    boxes = (((20, 12, 6), (118, 130, 20)), ((33, 25, 3), (124, 112, 21)))

    volume = coordinate_ramp((170, 160, 32))

    @staticmethod
    def encode(view: torch.Tensor) -> torch.Tensor:
        return view[..., :: STRIDE[0], :: STRIDE[1], :: STRIDE[2]]

    @classmethod
    def errors(cls, flips: tuple, alignment: str) -> list[np.ndarray]:
        """Per axis, how far apart (in source voxels) the two views' features in the same cells lie."""
        views, affines = batch(
            *(stock_view(cls.volume, *box, VIEW, flip) for box, flip in zip(cls.boxes, flips, strict=True))
        )
        aligned = PriorGuidedAligner(alignment=alignment)(cls.encode(views), affines, VIEW)[0]
        difference = (aligned[0] - aligned[1]).abs().numpy()
        # On a ramp, a channel varies along its own axis only.
        return [difference[0].max((1, 2)), difference[1].max((0, 2)), difference[2].max((0, 1))]

    @classmethod
    def reaches_last_feature(cls, flips: tuple, axis: int) -> np.ndarray:
        """Which cells have a sample point beyond the outermost feature centres of a view, where a value is repeated.

        Feature centres are the view voxels 0, s, ..., P - s: on the last s - 1 voxels there is nothing to interpolate.
        """
        cells, ratio = VIEW[axis] // STRIDE[axis], 2
        low = max(start[axis] for start, _ in cls.boxes) - 0.5
        high = min(start[axis] + size[axis] for start, size in cls.boxes) - 0.5
        points = low + (high - low) * (np.arange(cells * ratio) + 0.5) / (cells * ratio)
        repeated = np.zeros(cells * ratio, dtype=bool)
        for (start, size), flip in zip(cls.boxes, flips, strict=True):
            voxel = (points - start[axis] + 0.5) * VIEW[axis] / size[axis] - 0.5
            if flip[axis]:
                voxel = VIEW[axis] - 1 - voxel
            repeated |= (voxel < 0) | (voxel > VIEW[axis] - STRIDE[axis])
        return repeated.reshape(cells, ratio).any(1)

    def test_convolutions_are_centred(self):
        """Why slicing stands for the encoder: four centred convolutions of stride 2 do the same to a ramp."""
        layers = []
        for stride in [(2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 1)]:
            kernel = [3 if s > 1 else 1 for s in stride]
            layers.append(nn.Conv3d(1, 1, kernel, stride, padding=[k // 2 for k in kernel], bias=False))
            nn.init.constant_(layers[-1].weight, 1 / np.prod(kernel))
        view = coordinate_ramp(VIEW).as_tensor()[:, None]
        with torch.no_grad():
            features = nn.Sequential(*layers)(view)
        # Zero padding spoils feature 0 of each axis.
        torch.testing.assert_close(features[:, 0, 1:, 1:, 1:], self.encode(view)[:, 0, 1:, 1:, 1:])

    @pytest.mark.parametrize("flips", [(FLIPS[0], f) for f in FLIPS] + [(FLIPS[6], FLIPS[3])])
    def test_exact(self, flips):
        for axis, error in enumerate(self.errors(flips, "exact")):
            repeated = self.reaches_last_feature(flips, axis)
            assert (error[~repeated] < 1e-4).all()
            cell = 100 / 6 if axis < 2 else 15 / 2
            assert error.max() < cell
            if axis < 2:
                assert not repeated[1:4].any(), "the test covers the middle of the overlap"
                assert error.mean() < 0.5 * cell

    @pytest.mark.parametrize("flips", [(FLIPS[0], f) for f in FLIPS] + [(FLIPS[6], FLIPS[3])])
    def test_inside(self, flips):
        """No cell lies where a value is repeated, even on z with its two features."""
        assert max(error.max() for error in self.errors(flips, "inside")) < 1e-4

    def test_inside_keeps_an_axis_where_views_have_no_features_in_common(self):
        """Features of the one end before those of the other begin, though the views overlap."""
        affines = torch.eye(4).repeat(1, 2, 1, 1)
        affines[0, 1, 0, 3] = 85  # of 96 voxels; the last feature of the first is at 80
        whole, cut = (
            PriorGuidedAligner(alignment=name).axis_matrices(affines, VIEW, (6, 6, 2)) for name in ("exact", "inside")
        )
        torch.testing.assert_close(cut[0], whole[0], rtol=0, atol=0)
        assert not torch.equal(cut[1], whole[1])

    @pytest.mark.parametrize("flips", [(FLIPS[0], f) for f in FLIPS])
    def test_paper(self, flips):
        for axis, error in enumerate(self.errors(flips, "paper")):
            if axis == 2:
                continue  # only two features: no cell is free of repeated border values
            if flips[0][axis] == flips[1][axis]:
                # Shifted alike up to the difference of the two crops' zooms.
                assert error[1:-1].max() < 2
            else:
                # s - 1 view voxels of 1.2 to 1.35 source voxels each.
                np.testing.assert_allclose(error[2:4], 15 * 1.26, atol=1.5)

    def test_exact_beats_paper(self):
        def mean_error(alignment: str) -> float:
            flips = (FLIPS[0], FLIPS[7])
            return np.mean(np.concatenate(self.errors(flips, alignment)[:2]))

        assert mean_error("exact") < mean_error("paper") / 3


class TestProperties:
    affines = torch.eye(4).expand(2, 2, 4, 4)

    @pytest.mark.parametrize("alignment", ["exact", "paper"])
    def test_identical_views(self, alignment):
        features = torch.rand(2, 1, 4, 6, 6, 2).expand(2, 2, 4, 6, 6, 2)
        aligned = PriorGuidedAligner(alignment=alignment)(features, self.affines, VIEW)
        torch.testing.assert_close(aligned[:, 0], aligned[:, 1], rtol=0, atol=0)

    def test_whole_view_in_half_pixel_coordinates_is_identity(self):
        features = torch.rand(2, 2, 4, 6, 6, 2)
        aligned = PriorGuidedAligner(alignment="paper", sampling_ratio=1)(features, self.affines, VIEW)
        torch.testing.assert_close(aligned, features)

    def test_flips_of_one_crop_are_undone_exactly(self):
        """Of all 64 pairs of flips by MONAI: nothing is resampled, so that this is the paper's FlipAlign alone."""
        volume = coordinate_ramp((110, 104, 24))
        crops = {flip: batch(stock_view(volume, (7, 3, 5), VIEW, VIEW, flip))[1][0, 0] for flip in FLIPS}
        aligner, features = PriorGuidedAligner(alignment="paper", sampling_ratio=1), torch.randn(1, 2, 3, 6, 6, 2)
        for flips in itertools.product(FLIPS, FLIPS):
            aligned = aligner(features, torch.stack([crops[flip] for flip in flips])[None], VIEW)
            for view, flip in enumerate(flips):
                expected = torch.flip(features[0, view], [axis + 1 for axis in range(3) if flip[axis]])
                torch.testing.assert_close(aligned[0, view], expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("output_size", "expected"), [(None, (6, 6, 2)), ((4, 5, 3), (4, 5, 3)), ([1, 1, 1], (1, 1, 1))]
    )
    def test_output_size(self, output_size, expected):
        aligned = PriorGuidedAligner(output_size)(torch.rand(2, 2, 4, 6, 6, 2), self.affines, VIEW)
        assert aligned.shape == (2, 2, 4, *expected)

    @pytest.mark.parametrize("shift", [(95.0, 0, 0), (-95.5, 95.5, 15.5), (95.999, 0, 0)], ids=str)
    def test_thin_overlap(self, shift):
        """Less than one cell, or one voxel, is shared."""
        affines = self.affines.clone()
        affines[:, 1, :3, 3] = torch.tensor(shift)
        features = torch.rand(2, 2, 4, 6, 6, 2, requires_grad=True)
        aligned = PriorGuidedAligner()(features, affines, VIEW)
        aligned.square().sum().backward()
        assert torch.isfinite(aligned).all()
        assert torch.isfinite(features.grad).all()
        assert (aligned >= features.min()).all()
        assert (aligned <= features.max()).all()

    def test_batch_and_view_order(self):
        affines = torch.eye(4).repeat(3, 2, 1, 1)
        affines[:, :, :3, 3] = torch.rand(3, 2, 3) * 8
        affines[1, 0, 0, 0], affines[1, 0, 0, 3] = -1.2, 100.0
        features = torch.rand(3, 2, 4, 6, 6, 2)
        aligner = PriorGuidedAligner()
        aligned = aligner(features, affines, VIEW)
        for b in range(3):
            torch.testing.assert_close(aligner(features[b : b + 1], affines[b : b + 1], VIEW)[0], aligned[b])
        torch.testing.assert_close(aligner(features.flip(1), affines.flip(1), VIEW), aligned.flip(1))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype_of_affines(self, dtype):
        affines = self.affines.clone()
        affines[:, 1] = torch.tensor([[-1.25, 0, 0, 96], [0, 1.5, 0, 8], [0, 0, 1, 4], [0, 0, 0, 1]])
        features = torch.rand(2, 2, 4, 6, 6, 2)
        aligner = PriorGuidedAligner()
        # Computed in float32: these numbers are exact in every dtype, so that the result is too.
        torch.testing.assert_close(
            aligner(features, affines.to(dtype), VIEW), aligner(features, affines, VIEW), rtol=0, atol=0
        )

    def test_gradients(self):
        affines = torch.eye(4, dtype=torch.float64).repeat(1, 2, 1, 1)
        affines[0, 1, 0, 0], affines[0, 1, :3, 3] = -1.3, torch.tensor([9.0, 1.5, 0.5], dtype=torch.float64)
        features = torch.rand(1, 2, 2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
        aligner = PriorGuidedAligner((3, 2, 2))
        assert torch.autograd.gradcheck(lambda f: aligner(f, affines, (8, 4, 4)), (features,))

    def test_autocast(self):
        affines = self.affines.clone()
        affines[:, 1, :3, 3] = torch.tensor([20.0, 7, 3])
        features = torch.rand(2, 2, 16, 6, 6, 2, requires_grad=True)
        aligner = PriorGuidedAligner()
        expected = aligner(features, affines, VIEW)
        with torch.autocast("cpu", torch.bfloat16):
            aligned = aligner(features, affines, VIEW)
        assert aligned.dtype == torch.bfloat16
        torch.testing.assert_close(aligned.float(), expected, atol=0.02, rtol=0.02)
        aligned.float().mean().backward()
        assert torch.isfinite(features.grad).all()

    def test_no_parameters(self):
        assert not PriorGuidedAligner().state_dict()


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"alignment": "half"}, r"alignment must be one of \('exact', 'inside', 'paper'\), got 'half'"),
            ({"sampling_ratio": 0}, "sampling_ratio must be at least 1, got 0"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            PriorGuidedAligner(**kwargs)

    @pytest.mark.parametrize(
        ("features", "affines"),
        [((2, 4, 6, 6, 2), (2, 2, 4, 4)), ((2, 2, 4, 6, 6, 2), (2, 4, 4)), ((2, 2, 4, 6, 6, 2), (2, 3, 4, 4))],
    )
    def test_shapes(self, features, affines):
        with pytest.raises(ValueError, match=r"expected features \(B, V, C, x, y, z\)"):
            PriorGuidedAligner()(torch.zeros(features), torch.zeros(affines), VIEW)

    @pytest.mark.parametrize(
        ("change", "message"),
        [((0, 1, 0.2), "axis-aligned"), ((0, 3, 200.0), "sample 1 do not overlap"), ((1, 1, 0.0), "axis-aligned")],
    )
    def test_affines(self, change, message):
        row, column, value = change
        affines = torch.eye(4).repeat(2, 2, 1, 1)
        affines[1, 0, row, column] = value
        with pytest.raises(ValueError, match=message):
            PriorGuidedAligner()(torch.zeros(2, 2, 4, 6, 6, 2), affines, VIEW)

    def test_view_size(self):
        with pytest.raises(ValueError, match=r"\(96, 96, 15\) is not a multiple"):
            PriorGuidedAligner()(torch.zeros(2, 2, 4, 6, 6, 2), torch.eye(4).expand(2, 2, 4, 4), (96, 96, 15))


@pytest.mark.parametrize("centre", [0, 3.5, (1.98, -0.4, 0.0)], ids=str)
def test_cells_may_be_centred_on_another_voxel(centre):
    """Features that say which source voxel they are centred on: aligned, both views say the same, also if flipped."""
    size, stride = np.array([64, 64, 32]), np.array([8, 8, 4])
    scales, offsets = np.array([[1, 1, 1], [-1, 1, -1]]), np.array([[0, 0, 0], [63, 0, 31]])
    affines, features = torch.eye(4).repeat(1, 2, 1, 1), np.zeros((1, 2, 3, *(size // stride)))
    for view, (scale, offset) in enumerate(zip(scales, offsets, strict=True)):
        affines[0, view, :3, :3], affines[0, view, :3, 3] = torch.diag(torch.tensor(scale)), torch.tensor(offset)
        cells = np.stack(np.meshgrid(*map(np.arange, size // stride), indexing="ij"), axis=-1)
        features[0, view] = np.moveaxis(scale * (stride * cells + np.broadcast_to(centre, 3)) + offset, -1, 0)
    aligner = PriorGuidedAligner(centre=centre)
    first, second = aligner(torch.from_numpy(features).float(), affines, tuple(size))[0]
    # At the edges, where no cell is centred, the nearest one's features are taken.
    inner = (slice(None), *(slice(1, -1),) * 3)
    torch.testing.assert_close(first[inner], second[inner], rtol=0, atol=1e-3)
    if np.any(centre):
        wrong = PriorGuidedAligner()(torch.from_numpy(features).float(), affines, tuple(size))[0]
        assert (wrong[0][inner] - wrong[1][inner]).abs().max() > 1
