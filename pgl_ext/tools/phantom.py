"""Phantom torso CTs with label maps: random and free of patient data, for demonstrations and tests.

A case is painted in the coordinates of a standard torso: mm, x to the patient's right, y to the front, z to the head,
the origin in the middle of the body at the height of the diaphragm. Random deformations, sizes, positions, contrast and
spacing make the cases differ. Results on phantoms show that a pipeline works; they say nothing about patients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel.affines import from_matvec
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.interpolate import BSpline
from scipy.ndimage import gaussian_filter

from pgl_ext.files import write_nifti, write_text

__all__ = ["LABELS", "ORIENTATIONS", "generate_case", "write_dataset"]

#: Name of every value of the label maps; the index is the value.
LABELS = ("background", "lungs", "ribs", "spine", "liver", "spleen", "kidneys", "aorta", "stomach")
#: Directions in which the voxel axes of a case may point.
ORIENTATIONS = ("RAS", "LPS", "LAS")

_NONE, _LUNGS, _RIBS, _SPINE, _LIVER, _SPLEEN, _KIDNEYS, _AORTA, _STOMACH = range(len(LABELS))
# Ellipsoids of the standard torso, painted in this order: label, HU without contrast agent, HU that the most contrast
# agent adds, HU that vessels add, centre (mm), radii (mm).
_PARTS = (
    (_LUNGS, -850, 0, 850, (70, 0, 75), (55, 83, 122)),
    (_LUNGS, -850, 0, 850, (-70, 0, 75), (55, 83, 114)),
    (_NONE, 50, 50, 0, (-16, 24, 32), (60, 50, 50)),  # heart
    (_NONE, 43, 140, 0, (-22, 20, 30), (36, 28, 30)),  # its blood
    (_NONE, -980, 0, 0, (4, -2, 140), (9, 9, 70)),  # windpipe
    (_LIVER, 58, 45, 25, (66, 8, -40), (64, 70, 66)),
    (_LIVER, 58, 45, 25, (12, 38, -28), (56, 32, 34)),
    (_SPLEEN, 48, 55, 0, (-92, -30, -34), (29, 46, 52)),
    (_STOMACH, 62, 10, 0, (-56, 28, -38), (46, 42, 50)),
    (_STOMACH, 20, 0, 0, (-56, 28, -40), (38, 34, 42)),  # its content
    (_STOMACH, -950, 0, 0, (-56, 44, -40), (26, 12, 26)),  # and gas
    (_KIDNEYS, 35, 130, 0, (60, -44, -108), (27, 24, 46)),
    (_KIDNEYS, 35, 130, 0, (-60, -44, -96), (27, 24, 46)),
    (_NONE, 43, 100, 0, (20, -24, -140), (13, 10, 150)),  # vena cava
    (_AORTA, 45, 180, 0, (-14, -24, 0), (12, 12, 1000)),
)


class _Torso:
    """One case while it is painted: arrays (X, Y, Z) of what each voxel holds, ``hu`` and ``label``, and where it is.

    ``xyz`` are coordinates (mm) in the standard torso; ``wall`` is 0 on the axis of the body and 1 at the inner side of
    the wall of chest and abdomen; ``outline`` and ``texture`` are random fields that vary more and more quickly;
    ``vessels`` is 1 on curved lines and 0 away from them.
    """

    def __init__(self, rng: np.random.Generator, axes: Sequence[np.ndarray]) -> None:
        self.rng = rng
        self.axes = axes
        self.contrast = rng.random()
        straight = np.meshgrid(*axes, indexing="ij")
        self.xyz = [c / self.draw(1, 0.08) + 5 * self.noise(75) + 1.5 * self.noise(32) for c in straight]
        self.wall = self._relative_distance()
        self.outline = self.noise(28)
        self.texture = self.noise(12)
        self.vessels = np.exp(-40 * (self.noise(20) ** 2 + self.noise(20) ** 2))  # both are zero on lines only
        self.hu = np.full_like(self.wall, -1000)
        self.label = np.zeros(self.wall.shape, np.uint8)

    def draw(self, value: float, spread: float) -> float:
        return self.rng.uniform(value - spread, value + spread)

    def noise(self, wavelength: float) -> np.ndarray:
        """Smooth random field of unit variance with one random number every ``wavelength`` mm, at any resolution."""
        reach = 240 + 4 * wavelength  # mm from the origin: more than any case, so that the numbers are always the same
        knots = np.arange(-reach, reach, wavelength)
        values = self.rng.standard_normal([len(knots) - 4] * 3, dtype=np.float32)
        for axis in self.axes:
            weights = BSpline.design_matrix(axis, knots, 3).toarray().astype(np.float32)
            values = np.tensordot(values, weights, (0, 1))
        return values * (315 / 151) ** 1.5  # a cubic B-spline of white noise has variance 151/315 per axis

    def paint(self, mask: np.ndarray, hu: float | np.ndarray, label: int = _NONE) -> None:
        """Set HU (a number, or an array of the whole grid) and label inside ``mask``, over what is there."""
        np.copyto(self.hu, hu, where=mask)
        self.label[mask] = label

    def _relative_distance(self) -> np.ndarray:
        x, y, z = self.xyz
        narrowing = 1.2e-3 * np.maximum(z, 0) ** 2  # towards the shoulders
        x = x / (self.draw(119, 5) - narrowing)
        y = y / (self.draw(86, 5) - 0.6 * narrowing)
        power = 2.5  # between an ellipse and a rectangle
        return (np.abs(x) ** power + np.abs(y) ** power) ** (1 / power)


def _paint_body(t: _Torso) -> None:
    """Fat under the skin, the muscular wall, soft tissue in the chest, and in the abdomen fat and loops of bowel."""
    _, y, z = t.xyz
    muscle = 1.16 + 0.02 * t.noise(60)
    fat = t.draw(0.14, 0.06) + 0.02 * t.noise(70)
    t.paint(t.wall < muscle + fat, -105 + 8 * t.texture + 60 * t.vessels)
    t.paint(t.wall < muscle, 52 - 15 * np.abs(t.texture))
    t.paint(t.wall < 1, 10 + 30 * t.texture)
    abdomen = (t.wall < 1) & (z < -30)
    t.paint(abdomen, -98 + 10 * t.texture + 110 * t.vessels)
    room = abdomen & (t.wall < 0.95) & (y > -25) & (z < t.draw(-62, 6))
    depth = np.abs(t.outline)
    t.paint(room & (depth > 0.15), 55)
    t.paint(room & (depth > 0.45), 25 + 25 * t.texture)
    t.paint(room & (depth > 1.3), -900)


def _paint_ribs(t: _Torso) -> None:
    """Arches in the wall that fall towards the front and are open there."""
    x, y, z = t.xyz
    height = z + t.draw(0.42, 0.05) * y
    level = np.mod(height + t.draw(15, 15), t.draw(27, 2))
    arch = (np.abs(t.wall - 1.06) < 0.04) & (np.abs(x) > 24) & (y < 65) & (height > t.draw(-125, 10))
    t.paint(arch & (level < 11), t.draw(450, 50) + 80 * t.texture, _RIBS)


def _paint_parts(t: _Torso) -> None:
    """The ellipsoids, each of random place and size with a slightly irregular outline, cut off by the wall."""
    for label, hu, contrast, vessels, centre, radii in _PARTS:
        size = t.draw(1, 0.08)
        distance = 0.05 * t.outline
        for coordinate, middle, radius in zip(t.xyz, centre, radii, strict=True):
            distance += ((coordinate - t.draw(middle, 3)) / (size * t.draw(radius, 0.05 * radius))) ** 2
        hu = hu + t.contrast * contrast + vessels * t.vessels + 6 * t.texture
        t.paint((distance < 1) & (t.wall < 0.97), hu, label)


def _paint_spine(t: _Torso) -> None:
    """Vertebrae with a hard rim, arch and process, soft discs between them, and the canal."""
    x, y, z = t.xyz
    level = np.mod(z + t.draw(15, 15), t.draw(30, 2))  # mm above the lower end of a disc
    body = np.hypot(x / 21, (y + 52) / 17)
    canal = np.hypot(x, y + 78)
    process = (np.abs(x) < 5) & (np.abs(y + 95) < 8)
    bone = t.draw(210, 40) + 18 * t.texture
    t.paint(((canal < 16) | process) & (np.abs(level - 18) < 9), 2 * bone, _SPINE)
    t.paint(body < 1, 2.2 * bone, _SPINE)
    t.paint(body < 0.85, bone, _SPINE)
    t.paint((body < 1) & (level < 6), 85, _SPINE)
    t.paint((canal < 9) & (body > 1), 30)


def _scan(t: _Torso) -> np.ndarray:
    """HU (X, Y, Z) as int16, with the blur and the noise of a scanner."""
    noise = t.rng.standard_normal(t.hu.shape, dtype=np.float32)
    image = gaussian_filter(t.hu, t.draw(0.55, 0.1)) + gaussian_filter(t.draw(30, 10) * noise, 0.6)
    return np.maximum(np.rint(image), -1024).astype(np.int16)


def generate_case(
    seed: int, shape: Sequence[int] | None = None, orientation: str = "RAS"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one phantom torso, from the middle of the chest to the lower ends of the kidneys.

    The same arguments give the same arrays. ``shape`` and ``orientation`` change the grid, not the patient.

    Args:
        seed: number that the case is drawn from, >= 0.
        shape: voxels along x, y and z, each at least 16, of about 380 x 380 x 250 mm. None: 128 x 128 and 56 to 76
            slices, drawn per case.
        orientation: direction of the voxel axes, one of :data:`ORIENTATIONS`.

    Returns:
        HU as int16 (X, Y, Z), the values of :data:`LABELS` as uint8 (X, Y, Z), and the affine (4, 4) from voxel indices
        to mm in RAS+ world coordinates.

    Raises:
        ValueError: for a negative seed, a shape that is not three numbers >= 16, or an unknown orientation.
    """
    if seed < 0 or orientation not in ORIENTATIONS:
        raise ValueError(f"seed must be >= 0 and orientation one of {ORIENTATIONS}, got {seed} and {orientation!r}")
    if shape is not None and (len(shape) != 3 or min(shape) < 16):
        raise ValueError(f"shape must be three numbers of voxels, each at least 16, got {tuple(shape)}")
    rng = np.random.default_rng(seed)
    slices = int(rng.integers(56, 77))
    shape = tuple(shape or (128, 128, slices))
    width, height = rng.uniform(365, 395), rng.uniform(232, 268)
    spacing, middle = np.array([width, width, height]) / shape, rng.uniform((-8, -14, -30), (8, -2, -18))
    first = middle - spacing * (np.array(shape) - 1) / 2
    axes = [(f + s * np.arange(n)).astype(np.float32) for f, s, n in zip(first, spacing, shape, strict=True)]
    torso = _Torso(rng, axes)
    _paint_body(torso)
    _paint_ribs(torso)
    _paint_parts(torso)
    _paint_spine(torso)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    image, label = (np.ascontiguousarray(apply_orientation(array, turn)) for array in (_scan(torso), torso.label))
    return image, label, from_matvec(np.diag(spacing), first) @ inv_ornt_aff(turn, shape)


def _data_list(cases: int, test_cases: int, description: str) -> dict:
    """Content of ``dataset.json``."""
    items = []
    for number in range(cases + test_cases):
        part = "Tr" if number < cases else "Ts"
        name = f"phantom_{number:03d}.nii.gz"
        items.append({"image": f"./images{part}/{name}", "label": f"./labels{part}/{name}"})
    return {
        "name": "Phantom torso",
        "description": description,
        "licence": "Apache-2.0",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(LABELS)},
        "numTraining": cases,
        "numTest": test_cases,
        "training": items[:cases],
        **({"test": items[cases:]} if test_cases else {}),  # MONAI cannot read an empty list
    }


def write_dataset(
    out: str | Path, cases: int, seed: int = 0, test_cases: int = 0, shape: Sequence[int] | None = None
) -> Path:
    """Write phantoms and their label maps as a data set in the style of the Medical Segmentation Decathlon.

    ``imagesTr``, ``labelsTr``, ``imagesTs`` and ``labelsTs`` hold ``phantom_000.nii.gz`` and so on. ``dataset.json``,
    written last, has the lists ``training`` and, if there are test cases, ``test``. Case i depends on ``seed``,
    ``shape`` and i only.

    Args:
        out: folder, new or empty; one that an equal call has filled is left as it is.
        cases: number of training cases, >= 1.
        seed: number that the data set is drawn from, >= 0.
        test_cases: number of further, held-out cases.
        shape: voxels along x, y and z, see :func:`generate_case`.

    Returns:
        Path of ``dataset.json``.

    Raises:
        ValueError: for cases < 1, test_cases < 0, seed < 0 or a bad shape.
        FileExistsError: if ``out`` holds anything else.
    """
    if cases < 1 or test_cases < 0 or seed < 0:
        raise ValueError(f"cases must be >= 1, seed and test_cases >= 0, got {cases}, {seed} and {test_cases}")
    size = "128 x 128" if shape is None else " x ".join(map(str, shape))
    content = _data_list(cases, test_cases, f"Random torso CTs, no patient data: version 2, seed {seed}, {size} voxels")
    text = json.dumps(content, indent=2) + "\n"
    path = Path(out) / "dataset.json"
    if path.is_file() and path.read_text() == text:
        return path
    if path.parent.exists() and any(path.parent.iterdir()):
        raise FileExistsError(f"{out} holds other files or an unfinished data set; give a new or empty folder")
    for number, item in enumerate([*content["training"], *content.get("test", [])]):
        case_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        image, label, affine = generate_case(case_seed, shape, ORIENTATIONS[number % len(ORIENTATIONS)])
        write_nifti(image, affine, path.parent / item["image"])
        write_nifti(label, affine, path.parent / item["label"])
    write_text(path, text)
    return path
