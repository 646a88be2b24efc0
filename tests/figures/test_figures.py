from __future__ import annotations

import csv
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates

from pgl_ext.figures.base import figure_to_array
from pgl_ext.figures.curves import plot_metrics
from pgl_ext.figures.views import plot_views, source_to_view

VIEW_SIZE = (24, 20, 8)
# Per view: source voxels per view voxel (negative: flipped) and offset.
PRIORS = [
    [((1.2, 1.3, 1.1), (4.0, 3.0, 2.0)), ((-1.1, 1.25, 1.4), (38.0, 8.0, 1.0))],
    [((1.3, -1.2, -1.25), (2.0, 35.0, 14.0)), ((1.15, -1.35, 1.2), (9.0, 33.0, 3.5))],
]


def affine(scale, offset) -> np.ndarray:
    matrix = np.diag([*scale, 1.0])
    matrix[:3, 3] = offset
    return matrix


def cut(volume: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """View of a volume by scipy's interpolation at every voxel, independent of the package."""
    index = np.indices(VIEW_SIZE).reshape(3, -1)
    source = matrix[:3, :3] @ index + matrix[:3, 3:]
    return map_coordinates(volume, source, order=1, mode="nearest").reshape(VIEW_SIZE)


@pytest.fixture(scope="module")
def volume():
    x, y, z = np.indices((48, 44, 20)).astype(float)
    return 200 * np.sin(x / 3) * np.cos(y / 4) + 40 * np.sin(z / 2) + 3 * x


@pytest.fixture(scope="module")
def batch(volume):
    affines = np.array([[affine(*prior) for prior in pair] for pair in PRIORS])
    views = np.array([[cut(volume, a)[None] for a in pair] for pair in affines])
    return torch.from_numpy(views).float(), torch.from_numpy(affines).float()


def is_picture(array: np.ndarray) -> bool:
    return array.ndim == 3 and len(np.unique(array)) > 20 and array.std() > 5


# --- views ---


def test_source_to_view_inverts_the_affine(batch):
    points = torch.tensor([[10.0, 12.0, 5.0], [20.5, 7.25, 8.0]])
    found = source_to_view(batch[1], points)
    homogeneous = torch.cat([points, torch.ones(2, 1)], -1)
    expected = torch.einsum("bvij,nj->bvni", torch.linalg.inv(batch[1]), homogeneous)[..., :3]
    assert found.shape == (2, 2, 2, 3)
    assert torch.allclose(found, expected, atol=1e-5)


def test_numbered_points_are_the_same_source_point_in_both_views(volume, batch):
    # Views of the coordinate ramps tell, at a drawn point, which source point is shown there.
    figure = plot_views(*batch, num_points=4)
    panels = np.array(figure.axes).reshape(2, 5)
    ramps = np.indices(volume.shape).astype(float)
    for pair, row in enumerate(panels):
        drawn = [axes.collections[0].get_offsets().data for axes in row[:4]]
        assert all(len(points) == 4 for points in drawn)
        shown = []
        for view in range(2):
            matrix = batch[1][pair, view].numpy().astype(float)
            seen = [cut(ramp, matrix)[:, :, 4] for ramp in ramps[:2]]
            shown.append(np.array([map_coordinates(s, drawn[view].T, order=1) for s in seen]))
        assert np.allclose(*shown, atol=0.02)  # source voxels
        assert np.array_equal(drawn[2], drawn[3])  # one common grid


def test_rectangle_is_the_overlap_by_brute_force(volume, batch):
    figure = plot_views(*batch)
    panels = np.array(figure.axes).reshape(2, 5)
    for pair, row in enumerate(panels):
        matrices = batch[1][pair].numpy().astype(float)
        for view in range(2):
            fine = np.stack(
                np.meshgrid(*(np.linspace(-0.5, n - 0.5, 40 * n + 1) for n in VIEW_SIZE[:2]), indexing="ij"), -1
            )
            own, other = matrices[view][:2], matrices[1 - view][:2]
            in_other = (fine * own[[0, 1], [0, 1]] + own[:, 3] - other[:, 3]) / other[[0, 1], [0, 1]]
            inside = ((in_other >= -0.5) & (in_other <= np.array(VIEW_SIZE[:2]) - 0.5)).all(-1)
            expected = [fine[inside].min(0), fine[inside].max(0)]
            (box,) = row[view].patches
            corners = np.sort([box.get_xy(), np.add(box.get_xy(), (box.get_width(), box.get_height()))], axis=0)
            assert np.allclose(corners, expected, atol=0.03)


def test_aligned_overlaps_show_the_same(batch):
    figure = plot_views(*batch)
    for row in np.array(figure.axes).reshape(2, 5):
        first, second = (axes.images[0].get_array().data for axes in row[2:4])
        assert first.shape == second.shape
        assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.97


def test_views_written_and_rendered(batch, tmp_path):
    views, affines = batch
    figure = plot_views(MetaTensor(views), affines, tmp_path / "new" / "views.png", num_pairs=1)
    assert len(figure.axes) == 5
    assert is_picture(matplotlib.image.imread(tmp_path / "new" / "views.png") * 255)
    image = figure_to_array(figure)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert is_picture(image)


def test_views_without_structure(batch):
    assert plot_views(torch.zeros_like(batch[0]), batch[1]) is not None


def apart(affines: torch.Tensor) -> torch.Tensor:
    """Move the second view of every pair 500 voxels away."""
    moved = affines.clone()
    moved[:, 1, :3, 3] += 500
    return moved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, a: (v[:, 0], a, {}), r"views \(B, 2, C, X, Y, Z\)"),
        (lambda v, a: (v, a[:1], {}), r"got .*\(1, 2, 4, 4\)"),
        (lambda v, a: (v, a, {"num_pairs": 0}), "num_pairs must be at least 1"),
        (lambda v, a: (v, a + torch.ones(4, 4) * 0.1, {}), "axis-aligned"),
        (lambda v, a: (v, apart(a), {}), "do not overlap"),
    ],
)
def test_views_bad_arguments(batch, change, message):
    views, affines, kwargs = change(*batch)
    with pytest.raises(ValueError, match=message):
        plot_views(views, affines, **kwargs)


# --- metrics ---

COLUMNS = ["step", "epoch", "loss", "lr", "tau", "feature_std", "pairs_per_s", "val_loss", "val_feature_std"]
COLUMNS += ["val_retrieval_top1", "val_retrieval_chance", "val_retrieval_untrained"]


def write_metrics(path, columns=COLUMNS, rows=60):
    rng = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for step in range(rows):
            row = {name: rng.random() for name in columns if step % 20 == 19 or not name.startswith("val_")}
            row["step"] = step
            writer.writerow({k: v for k, v in row.items() if k in columns})
    return path


def panel_titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_metrics_all_panels(tmp_path):
    figure = plot_metrics(write_metrics(tmp_path / "m.csv"), tmp_path / "m.png", healthy_std=1 / 16)
    assert len(panel_titles(figure)) == 4
    labels = [text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert any("1/√C = 0.0625" in label for label in labels)
    assert any(label.startswith("chance") for label in labels)
    assert any(label.startswith("untrained") for label in labels)
    assert is_picture(matplotlib.image.imread(tmp_path / "m.png") * 255)


@pytest.mark.parametrize(
    ("columns", "panels"),
    [
        (["step", "loss"], ["loss"]),
        (["step", "loss", "lr"], ["loss", "learning rate"]),
        (["step", "val_loss", "feature_std", "tau"], ["loss", "feature standard deviation", "momentum tau"]),
    ],
)
def test_metrics_leave_out_panels_without_columns(tmp_path, columns, panels):
    figure = plot_metrics(write_metrics(tmp_path / "m.csv", columns), tmp_path / "m.png")
    assert panel_titles(figure) == panels


def test_metrics_of_a_running_and_of_a_resumed_job(tmp_path):
    # Step 2 was computed again after a restart, a value diverged, and the last row is only half written.
    (tmp_path / "m.csv").write_text("step,loss,lr\n1,5,0.1\n2,9,0.1\n3,nan,0.1\n2,4,0.1\n3,3,0.1\n4")
    figure = plot_metrics(tmp_path / "m.csv", tmp_path / "m.png")
    raw = figure.axes[0].lines[0]
    assert raw.get_xdata().tolist() == [1, 2, 3]
    assert raw.get_ydata().tolist() == [5, 4, 3]


def test_metrics_single_row(tmp_path):
    write_metrics(tmp_path / "m.csv", rows=1)
    plot_metrics(tmp_path / "m.csv", tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_metrics_of_a_segmentation(tmp_path):
    columns = ["step", "loss", "lr", "val_mean_dice", "val_dice_left kidney", "val_dice_liver"]
    figure = plot_metrics(write_metrics(tmp_path / "m.csv", columns), tmp_path / "m.png")
    assert panel_titles(figure) == ["loss", "validation Dice", "learning rate"]
    dice = figure.axes[1]
    with open(tmp_path / "m.csv", newline="") as file:
        values = [float(row["val_mean_dice"]) for row in csv.DictReader(file) if row["val_mean_dice"]]
    assert dice.lines[0].get_ydata().tolist() == values
    labels = [text.get_text() for text in dice.get_legend().get_texts()]
    assert labels == [f"mean, best {max(values):.3f}", "left kidney", "liver"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no metrics yet"),
        ("step,loss\n", "holds no metrics yet"),
        ("epoch,loss\n1,2\n", "no column 'step'"),
        ("step,epoch\n1,2\n", "none of the columns"),
    ],
)
def test_metrics_bad_files(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        plot_metrics(tmp_path / "m.csv", tmp_path / "m.png")
    assert not (tmp_path / "m.png").exists()


def test_pyplot_is_not_imported():
    modules = "base", "curves", "overlays", "views"
    imports = ", ".join(["sys", "pgl_ext.evaluation.figures", *(f"pgl_ext.figures.{name}" for name in modules)])
    code = f"import {imports}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
