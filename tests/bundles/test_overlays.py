from __future__ import annotations

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from pgl_ext.figures.base import figure_to_array, organ_colors
from pgl_ext.figures.overlays import plot_overlay
from pgl_ext.segmentation.cases import draw_case
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.phantom import LABELS, generate_case
from pgl_ext.transforms.load import LoadVolumed

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
        shown = row[1].images[0].get_array()[:, ::-1]  # rows go up: the second axis of the plane, the first to the left
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
    for patch, (x, y) in zip(legend.get_patches(), [(25, 6), (17, 7)], strict=True):
        color = np.array(patch.get_facecolor()[:3])
        np.testing.assert_allclose(axial[y, x] / axial[y, x].max(), color / color.max(), atol=1e-6)
    assert (axial[20, 20] == 0).all()


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SLA"])
def test_the_right_anterior_superior_corner_is_up_on_the_left(tmp_path, monkeypatch, axcodes):
    """In all planes of the picture, whatever the order of the file's axes; none of their other corners is."""
    figures = []
    monkeypatch.setattr("pgl_ext.figures.overlays.save_figure", lambda figure, path: figures.append(figure))
    affine, shape = np.zeros((4, 4)), []
    for column, letter in enumerate(axcodes):
        axis = next(number for number, ends in enumerate(("RL", "AP", "SI")) if letter in ends)
        affine[axis, column] = SPACING[axis] * (1 if letter in "RAS" else -1)
        shape.append(SHAPE[axis])
    affine[:, 3] = (40, -30, 7, 1)
    # The place of each voxel in the patient, mm to the right, to the front and up.
    places = np.einsum("ij,jxyz->ixyz", affine[:3, :3], np.indices(shape)) + affine[:3, 3].reshape(3, 1, 1, 1)
    farthest = places.max((1, 2, 3), keepdims=True)
    marked = (places > farthest - np.reshape(SPACING, (3, 1, 1, 1)) * 3.5).all(0).astype(np.uint8)
    for name, voxels in (("image", 100 * marked), ("label", marked)):
        nib.save(nib.Nifti1Image(voxels, affine), tmp_path / f"{name}.nii.gz")
    maps = LoadVolumed("reference")({"reference": tmp_path / "label.nii.gz"})
    draw_case({"image": tmp_path / "image.nii.gz"}, maps, SegmentationTask({"liver": 1}), tmp_path / "o.png", "")
    (figure,) = figures
    picture = figure_to_array(figure).astype(int)
    color = np.array(figure.legends[0].get_patches()[0].get_facecolor()[:3]) * 255
    for axes, letters in zip(figure.axes, ("RLAP", "RLSI", "APSI"), strict=True):
        box = axes.get_window_extent()
        left, right, up, down = box.x0 + 6, box.x1 - 6, len(picture) - box.y1 + 6, len(picture) - box.y0 - 6
        corners = [picture[round(row), round(column)] for row in (up, down) for column in (left, right)]
        np.testing.assert_allclose(corners[0], 0.65 * 255 + 0.35 * color, atol=2)
        assert not np.any(corners[1:])
        texts = {text.get_text(): text.get_window_extent() for text in axes.texts}
        places = [texts[letter] for letter in letters]
        assert places[0].x1 < box.x0 + 0.2 * box.width
        assert places[1].x0 > box.x1 - 0.2 * box.width
        assert places[2].y0 > places[0].y1 > places[0].y0 > places[3].y1


@pytest.mark.parametrize(("size", "text"), [(300, "50 mm"), (90, "20 mm"), (47, "10 mm"), (9.5, "2 mm")])
def test_the_bar_is_as_long_as_it_says(size, text):
    """The axial panel is 30 voxels wide, in all ``size`` mm."""
    spacing = (size / 30, size / 40, size / 20)
    figure = plot_overlay(np.zeros(SHAPE), {"prediction": np.zeros((1, *SHAPE), dtype=bool)}, ["liver"], spacing)
    figure_to_array(figure)
    axes = figure.axes[0]
    (bar,), (label,) = axes.lines, [t for t in axes.texts if t.get_text().endswith("mm")]
    assert label.get_text() == text
    ends = bar.get_transform().transform(bar.get_xydata())
    millimetres = np.ptp(ends[:, 0]) / axes.get_window_extent().width * size
    assert millimetres == pytest.approx(float(text.split()[0]))


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
    assert np.array_equal(organ_colors(3), colors[:3])  # those of a structure do not depend on how many there are
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
