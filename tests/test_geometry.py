import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from pgl_ext.geometry import (
    axis_scale_and_offset,
    cell_samples,
    derive_stride,
    linear_interpolation_matrix,
    overlap_extent,
    resample_axes,
    roi_align_3d,
)


def affine(scale: tuple, offset: tuple) -> torch.Tensor:
    matrix = torch.diag(torch.tensor([*scale, 1.0]))
    matrix[:3, 3] = torch.tensor(offset)
    return matrix


def brute_force_roi_align(features: np.ndarray, boxes: np.ndarray, output_size: tuple, ratio: int) -> np.ndarray:
    """Trilinear interpolation by SciPy at the sample points of every cell, then their mean."""
    result = np.empty((*features.shape[:2], *output_size))
    for b, box in enumerate(boxes):
        points = []
        for (low, high), cells in zip(box, output_size, strict=True):
            step = (high - low) / (cells * ratio)
            points.append(low - 0.5 + step * (np.arange(cells * ratio) + 0.5))
        grid = np.meshgrid(*points, indexing="ij")
        for c, channel in enumerate(features[b]):
            sampled = map_coordinates(channel, grid, order=1, mode="nearest")
            split = sampled.reshape(output_size[0], ratio, output_size[1], ratio, output_size[2], ratio)
            result[b, c] = split.mean((1, 3, 5))
    return result


class TestAffines:
    def test_scale_and_offset(self):
        scale, offset = axis_scale_and_offset(affine((1.5, -2, 1), (3, 4, -5)).expand(2, 3, 4, 4))
        assert scale.shape == offset.shape == (2, 3, 3)
        assert scale[1, 2].tolist() == [1.5, -2, 1]
        assert offset[0, 1].tolist() == [3, 4, -5]

    @pytest.mark.parametrize(
        ("row", "column", "value"), [(0, 1, 0.1), (1, 0, -0.01), (2, 0, 1.0), (1, 1, 0.0)], ids=str
    )
    @pytest.mark.parametrize("shape", [(), (2, 2)], ids=["single", "batch"])
    def test_shear_and_singular_are_refused(self, row, column, value, shape):
        bad = torch.eye(4)
        bad[row, column] = value
        affines = torch.eye(4).expand(*shape, 4, 4).clone()
        affines[(-1,) * len(shape)] = bad
        with pytest.raises(ValueError, match="axis-aligned affines") as error:
            axis_scale_and_offset(affines)
        assert str(bad.tolist()) in str(error.value), "names the offending matrix, not a good one"

    def test_rotation_is_refused(self):
        angle = np.radians(10)
        rotated = torch.eye(4, dtype=torch.float64)
        rotated[:2, :2] = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        with pytest.raises(ValueError, match="must not be rotated or sheared"):
            axis_scale_and_offset(rotated)

    def test_wrong_shape(self):
        with pytest.raises(ValueError, match=r"\(\.\.\., 4, 4\), got \(2, 3, 4\)"):
            axis_scale_and_offset(torch.zeros(2, 3, 4))


class TestOverlap:
    def test_half_voxel_edges_and_flips(self):
        # View 1 covers source [9.5, 29.5]; view 2, flipped and zoomed by 2, [3.5, 23.5].
        affines = torch.stack([affine((1, 1, 1), (10, 10, 10)), affine((-2, 2, -2), (22.5, 4.5, 22.5))])[None]
        lower, upper = overlap_extent(affines, (20, 20, 20))
        first = np.array([[9.5, 29.5]] * 3)
        second = np.sort([[22.5 + 1, 22.5 - 2 * 19 - 1], [4.5 - 1, 4.5 + 2 * 19 + 1], [22.5 + 1, 22.5 - 39]])
        np.testing.assert_allclose(lower[0], np.maximum(first[:, 0], second[:, 0]))
        np.testing.assert_allclose(upper[0], np.minimum(first[:, 1], second[:, 1]))

    def test_single_view_is_its_own_extent(self):
        lower, upper = overlap_extent(affine((2, 1, -1), (0, 5, 9)).expand(1, 1, 4, 4), (4, 6, 8))
        assert lower.tolist() == [[-1, 4.5, 1.5]]
        assert upper.tolist() == [[7, 10.5, 9.5]]

    @pytest.mark.parametrize("distance", [8.0, 100.0], ids=["touching", "apart"])
    def test_no_overlap(self, distance):
        good = torch.eye(4).expand(2, 4, 4)
        bad = torch.stack([torch.eye(4), affine((1, 1, 1), (0, distance, 0))])
        with pytest.raises(ValueError, match="the views of sample 1 do not overlap"):
            overlap_extent(torch.stack([good, bad]), (8, 8, 8))


class TestMatrices:
    @pytest.mark.parametrize(("cells", "ratio"), [(1, 1), (4, 1), (3, 2), (5, 3)])
    def test_cell_samples(self, cells, ratio):
        samples = cell_samples(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), cells, ratio)
        assert samples.shape == (2, cells, ratio)
        for row, (low, high) in zip(samples, [(1, 3), (-2, 0.5)], strict=True):
            edges = np.linspace(low, high, cells * ratio + 1)
            np.testing.assert_allclose(row.flatten(), (edges[1:] + edges[:-1]) / 2, atol=1e-6)

    @pytest.mark.parametrize("size", [1, 2, 7])
    @pytest.mark.parametrize("samples", [1, 3])
    def test_rows_are_weights(self, size, samples):
        positions = torch.rand(4, 5, samples, dtype=torch.float64) * (size + 6) - 3
        weights = linear_interpolation_matrix(positions, size)
        assert weights.shape == (4, 5, size)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 5, dtype=torch.float64))
        # Linear interpolation reproduces a ramp; outside, the border value is repeated.
        ramp = weights @ torch.arange(size, dtype=torch.float64)
        torch.testing.assert_close(ramp, positions.clamp(0, size - 1).mean(-1))

    @pytest.mark.parametrize(
        ("shape", "cells"), [((2, 3, 4, 5, 6), (3, 2, 7)), ((1, 1, 1, 1, 1), (2, 2, 2)), ((3, 8, 6, 6, 2), (6, 6, 2))]
    )
    @pytest.mark.parametrize("contiguous", [True, False])
    def test_resample_axes(self, shape, cells, contiguous):
        features = torch.rand(shape, dtype=torch.float64)
        if not contiguous:
            features = features.contiguous(memory_format=torch.channels_last_3d)
        weights = [torch.rand(shape[0], c, n, dtype=torch.float64) for c, n in zip(cells, shape[2:], strict=True)]
        expected = torch.einsum("bcxyz,bix,bjy,bkz->bcijk", features, *weights)
        torch.testing.assert_close(resample_axes(features, weights), expected)


class TestRoiAlign:
    @pytest.mark.parametrize("output_size", [(6, 6, 2), (3, 5, 4), (1, 1, 1)], ids=str)
    @pytest.mark.parametrize("ratio", [1, 2, 3])
    def test_equals_brute_force(self, output_size, ratio):
        rng = np.random.default_rng(ratio)
        features = rng.normal(size=(3, 2, 6, 5, 4))
        # From a small part of a cell to boxes that hang over the map.
        low = rng.uniform(-1, 3, (3, 3))
        boxes = np.stack([low, low + rng.uniform(0.1, 5, (3, 3))], -1)
        result = roi_align_3d(torch.from_numpy(features), torch.from_numpy(boxes), output_size, ratio)
        np.testing.assert_allclose(result, brute_force_roi_align(features, boxes, output_size, ratio), atol=1e-12)

    def test_whole_map_is_identity(self):
        features = torch.rand(2, 3, 6, 5, 2)
        boxes = torch.tensor([[0.0, 6.0], [0.0, 5.0], [0.0, 2.0]]).expand(2, 3, 2)
        torch.testing.assert_close(roi_align_3d(features, boxes, (6, 5, 2), sampling_ratio=1), features)

    def test_aligned_box_is_a_slice(self):
        features = torch.rand(1, 2, 8, 8, 8)
        boxes = torch.tensor([[[2.0, 6.0], [0.0, 3.0], [7.0, 8.0]]])
        torch.testing.assert_close(roi_align_3d(features, boxes, (4, 3, 1), 1), features[:, :, 2:6, :3, 7:])

    def test_gradients(self):
        features = torch.rand(2, 2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
        low = torch.tensor([[0.13, 0.27, 0.31], [1.07, -0.2, 0.0]], dtype=torch.float64)
        boxes = torch.stack([low, low + 1.43], -1).requires_grad_()
        assert torch.autograd.gradcheck(lambda f, b: roi_align_3d(f, b, (3, 2, 2)), (features, boxes))

    @pytest.mark.parametrize(
        ("features", "boxes"), [((1, 1, 4, 4), (1, 3, 2)), ((2, 1, 4, 4, 4), (1, 3, 2)), ((1, 1, 4, 4, 4), (1, 6))]
    )
    def test_wrong_shapes(self, features, boxes):
        with pytest.raises(ValueError, match=r"expected features \(B, C, X, Y, Z\)"):
            roi_align_3d(torch.zeros(features), torch.zeros(boxes), (2, 2, 2))


class TestStride:
    @pytest.mark.parametrize(
        ("view", "feature", "stride"), [((96, 96, 16), (6, 6, 2), (16, 16, 8)), ((8, 6, 5), (8, 3, 1), (1, 2, 5))]
    )
    def test_divides(self, view, feature, stride):
        assert derive_stride(view, feature) == stride

    @pytest.mark.parametrize("axis", range(3))
    def test_does_not_divide(self, axis):
        view = [96, 96, 16]
        view[axis] += 1
        with pytest.raises(ValueError, match=r"is not a multiple of the feature map's size \(6, 6, 2\)"):
            derive_stride(view, (6, 6, 2))


def test_all_reflections_commute_with_alignment():
    """Flipping the features and mirroring the box flips the result."""
    features = torch.rand(1, 2, 6, 5, 4, dtype=torch.float64)
    size = torch.tensor([6.0, 5.0, 4.0], dtype=torch.float64)
    boxes = torch.tensor([[[0.4, 3.3], [1.2, 4.9], [0.1, 2.2]]], dtype=torch.float64)
    expected = roi_align_3d(features, boxes, (3, 4, 2))
    for flips in itertools.product([False, True], repeat=3):
        axes = [2 + i for i, flip in enumerate(flips) if flip]
        flip = torch.tensor(flips)[None, :, None]
        mirrored = torch.where(flip, (size[None, :, None] - boxes).flip(-1), boxes)
        torch.testing.assert_close(roi_align_3d(features.flip(axes), mirrored, (3, 4, 2)), expected.flip(axes))
