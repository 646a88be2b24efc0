from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from pgl_ext.figures.base import figure_to_array, organ_colors
from pgl_ext.figures.overlays import plot_overlay
from pgl_ext.tools.phantom import LABELS, generate_case

SHAPE = (30, 24, 12)
SPACING = (1.0, 1.5, 4.0)


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(size=SHAPE)


@pytest.fixture
def masks():
    """Two boxes; most of their voxels lie in the slices x = 5, y = 7, z = 3."""
    masks = np.zeros((3, *SHAPE), dtype=bool)
    masks[0, 4:7, 6:9, 3] = True
    masks[0, 5, 7, 2:5] = True
    masks[1, 5, 5:16, 3] = True
    masks[1, 3:16, 7, 3] = True
    return masks


def test_slices_and_proportions(image, masks):
    figure = plot_overlay(image, {"reference": masks, "prediction": np.zeros_like(masks)}, "abc", SPACING)
    panels = np.array(figure.axes).reshape(3, 2)
    expected = [image[:, :, 3], image[:, 7, :], image[5]]
    for row, cut, size in zip(panels, expected, [(30, 36), (30, 48), (36, 48)], strict=True):
        shown = row[1].images[0].get_array()  # rows go up: the second axis of the plane
        assert shown.shape[:2] == cut.T.shape
        # Where nothing is predicted, the picture is the grey slice.
        grey = np.clip((cut.T - np.quantile(image, 0.005)) / np.ptp(np.quantile(image, (0.005, 0.995))), 0, 1)
        np.testing.assert_allclose(shown, np.repeat(grey[..., None], 3, -1), atol=1e-6)
        # The panel is as wide and high as the slice is in mm.
        assert shown.shape[0] * row[1].get_aspect() / shown.shape[1] == pytest.approx(size[1] / size[0])
        assert row[0].images[0].origin == "lower"
    assert [axes.get_title() for axes in panels[0]] == ["reference", "prediction"]
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["axial", "coronal", "sagittal"]


def test_organs_are_tinted_with_the_colour_of_the_legend(image, masks):
    figure = plot_overlay(np.zeros(SHAPE), {"prediction": masks}, ["first", "second", "nowhere"], SPACING)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]
    axial = figure.axes[0].images[0].get_array()
    for patch, (x, y) in zip(legend.get_patches(), [(4, 6), (12, 7)], strict=True):
        color = np.array(patch.get_facecolor()[:3])
        np.testing.assert_allclose(axial[y, x] / axial[y, x].max(), color / color.max(), atol=1e-6)
    assert (axial[20, 20] == 0).all()


def test_a_volume_of_one_slice(tmp_path):
    masks = np.zeros((1, 32, 32, 1), dtype=bool)
    masks[0, 8:16, 8:16] = True
    plot_overlay(np.zeros((32, 32, 1)), {"prediction": masks}, ["liver"], SPACING, tmp_path / "o.png")
    assert (tmp_path / "o.png").stat().st_size > 5000


def test_legend_covers_no_panel_even_with_many_organs(tmp_path):
    image, labels, affine = generate_case(1, (48, 48, 24), "RAS")
    names = [f"{name}, part {number}" for number in range(3) for name in LABELS[1:]]
    masks = np.concatenate([np.roll([labels == value for value in range(1, 9)], shift, 1) for shift in (0, 3, 6)])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    figure = plot_overlay(image, {"a": masks, "b": masks}, names, spacing, tmp_path / "new" / "o.png", "case")
    array = figure_to_array(figure)
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert 0 <= legend.x0 < legend.x1 <= array.shape[1]
    assert 0 <= legend.y0 < legend.y1 <= array.shape[0]
    assert matplotlib.image.imread(tmp_path / "new" / "o.png").shape[:2] == array.shape[:2]


def test_colours_are_distinct():
    colors = organ_colors(40)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + np.eye(40)
    assert colors.shape == (40, 3)
    assert distances.min() > 0.02
    assert distances[:14, :14].min() > 0.2
    assert organ_colors(0).shape == (0, 3)


def test_without_any_organ_the_middle_is_shown(image):
    figure = plot_overlay(image, {"prediction": np.zeros((1, *SHAPE), dtype=bool)}, ["liver"], SPACING)
    assert not figure.legends
    assert figure.axes[0].images[0].get_array().shape == (24, 30, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((2, 3))}, r"shape \(X, Y, Z\)"),
        ({"masks": {}}, "masks is empty"),
        ({"names": ["a"]}, r"masks of 'prediction' have shape \(3, 30, 24, 12\), expected \(1, 30, 24, 12\)"),
        ({"spacing": (1, 0, 1)}, "spacing must be three positive"),
    ],
)
def test_bad_arguments(image, masks, change, message):
    arguments = {"image": image, "masks": {"prediction": masks}, "names": "abc", "spacing": SPACING}
    with pytest.raises(ValueError, match=message):
        plot_overlay(**{**arguments, **change})
