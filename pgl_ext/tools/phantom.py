"""Phantom torso CTs: random, labelled and small, for demonstrations, tests and checks without patient data.

A case is drawn in the coordinates of a standard torso (mm; x to the patient's right, y anterior, z superior, the origin
in the middle of the body at the height of the diaphragm). Smooth random deformations, scales, organ positions, contrast
phase, spacing and slice count make every case a different person in a different scanner. The anatomy is deliberately
simple, but every place has something that tells it from its neighbours, which is what self-supervised methods that
compare corresponding locations need.

The phantoms show that a pipeline works. They say nothing about how well a method does on patients.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["LABELS", "ORIENTATIONS", "generate_case", "write_dataset"]

#: Name of every value of the label maps; the index is the value.
LABELS = ("background", "lungs", "ribs", "spine", "liver", "spleen", "kidneys", "aorta", "stomach")
#: Directions in which the voxel axes of a case may point.
ORIENTATIONS = ("RAS", "LPS", "LAS")

_LUNGS, _RIBS, _SPINE, _LIVER, _SPLEEN, _KIDNEYS, _AORTA, _STOMACH = range(1, len(LABELS))
_VERSION = 1  # of the anatomy: a folder written by another version is another data set

# HU by contrast phase.
_PHASES = {
    "native": {
        "muscle": 52, "liver": 58, "vein": 42, "spleen": 50, "cortex": 36, "medulla": 32, "aorta": 43, "cava": 42,
        "blood": 43, "myocardium": 50, "pancreas": 42,
    },
    "arterial": {
        "muscle": 56, "liver": 68, "vein": 80, "spleen": 95, "cortex": 175, "medulla": 75, "aorta": 240, "cava": 75,
        "blood": 215, "myocardium": 95, "pancreas": 100,
    },
    "portal": {
        "muscle": 62, "liver": 105, "vein": 160, "spleen": 108, "cortex": 170, "medulla": 140, "aorta": 150,
        "cava": 135, "blood": 140, "myocardium": 105, "pancreas": 85,
    },
}  # fmt: skip


def _spline_weights(points: np.ndarray, wavelength: float) -> np.ndarray:
    """Cubic B-spline weights (points, knots) for knots every `wavelength` mm that cover `points` (mm)."""
    knots = int(np.ceil((points.max() - points.min()) / wavelength)) + 4
    distance = np.abs((points - points.min())[:, None] / wavelength - (np.arange(knots)[None] - 1))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


def _separable(weights: Sequence[np.ndarray], values: np.ndarray) -> np.ndarray:
    """Multiply one matrix (out, in) into each axis of `values`; z first, so that the small products come first."""
    values = values @ weights[2].T
    values = np.matmul(weights[1], values)
    return (weights[0] @ values.reshape(values.shape[0], -1)).reshape(-1, *values.shape[1:])


def _gaussian_matrix(size: int, sigma: float) -> np.ndarray:
    """Matrix (size, size) that blurs one axis with a Gaussian of `sigma` voxels; rows sum to 1, also at the border."""
    index = np.arange(size)
    weights = np.exp(-0.5 * ((index[:, None] - index[None]) / sigma) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _blur(values: np.ndarray, sigma: Sequence[float]) -> np.ndarray:
    return _separable([_gaussian_matrix(n, s) for n, s in zip(values.shape, sigma, strict=True)], values)


def _smoothstep(values: np.ndarray, width: float) -> np.ndarray:
    """0 below -width, 1 above width, smooth between."""
    t = np.clip(values / (2 * width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _ellipsoid(
    xyz: tuple[np.ndarray, np.ndarray, np.ndarray],
    centre: Sequence[float],
    radii: Sequence[float],
    tilt_xy: float = 0.0,
    tilt_xz: float = 0.0,
) -> np.ndarray:
    """Squared normalised radius: below 1 inside the ellipsoid; the tilts (radians) turn it in the x-y, x-z plane."""
    x, y, z = (a - np.float32(c) for a, c in zip(xyz, centre, strict=True))
    if tilt_xy:
        c, s = np.float32(np.cos(tilt_xy)), np.float32(np.sin(tilt_xy))
        x, y = c * x + s * y, c * y - s * x
    if tilt_xz:
        c, s = np.float32(np.cos(tilt_xz)), np.float32(np.sin(tilt_xz))
        x, z = c * x + s * z, c * z - s * x
    rx, ry, rz = (np.float32(1 / r) for r in radii)
    return (x * rx) ** 2 + (y * ry) ** 2 + (z * rz) ** 2


@dataclass
class _Torso:
    """One case while it is being painted: its grid in standard-torso coordinates, its HU and its labels."""

    rng: np.random.Generator
    axes: tuple[np.ndarray, np.ndarray, np.ndarray]  # mm along x, y, z, before deformation
    tissue: dict[str, float]
    xyz: tuple[np.ndarray, np.ndarray, np.ndarray] = field(init=False)
    hu: np.ndarray = field(init=False)
    label: np.ndarray = field(init=False)
    wall: np.ndarray = field(init=False)  # mm outward from the inner wall of the trunk
    diaphragm: np.ndarray = field(init=False)  # mm above the diaphragm
    abdomen: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(len(a) for a in self.axes)
        self.hu = np.full(shape, -1000, np.float32)
        self.label = np.zeros(shape, np.uint8)
        self.xyz = self._deformed_coordinates()
        self.wall = self._wall_distance()
        self.diaphragm = self._diaphragm_height()
        self.abdomen = (self.wall < -1) & (self.diaphragm < -2)

    def noise(self, wavelength: float) -> np.ndarray:
        """Smooth random field of unit variance with knots every `wavelength` mm."""
        weights = [_spline_weights(a, wavelength) for a in self.axes]
        knots = self.rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
        # A cubic B-spline of white noise has variance 151/315 per axis.
        return _separable(weights, knots) * np.float32((315 / 151) ** 1.5)

    def tubes(self, wavelength: float, width: float | np.ndarray) -> np.ndarray:
        """Vessel tree stand-in in [0, 1]: the curves on which two smooth random fields are both zero."""
        return np.exp(-(self.noise(wavelength) ** 2 + self.noise(wavelength) ** 2) / (2 * width * width))

    def draw(self, value: float, spread: float) -> float:
        return value + self.rng.uniform(-spread, spread)

    def place(self, centre: Sequence[float], spread: float = 4.0) -> list[float]:
        return [self.draw(c, spread) for c in centre]

    def size(self, radii: Sequence[float], spread: float = 0.1) -> list[float]:
        scale = self.draw(1, spread)
        return [r * scale * self.draw(1, spread / 2) for r in radii]

    def paint(self, mask: np.ndarray, hu: float | np.ndarray, label: int = 0) -> None:
        """Set HU (a number, or an array on the whole grid) and label inside `mask`; what is painted later wins."""
        self.hu[mask] = hu[mask] if isinstance(hu, np.ndarray) else hu
        self.label[mask] = label

    def _deformed_coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        coordinates = np.meshgrid(*self.axes, indexing="ij")
        scales = (self.draw(1, 0.09), self.draw(1, 0.09), self.draw(1, 0.07))
        return tuple(
            c / np.float32(s) + 5 * self.noise(75) + 1.5 * self.noise(32)
            for c, s in zip(coordinates, scales, strict=True)
        )

    def _wall_distance(self) -> np.ndarray:
        x, y, z = self.xyz
        chest = np.clip(z, 0, None) ** 2 * 1.2e-3
        waist = _smoothstep(-z - 110, 50) * 8
        a, b = self.draw(130, 5) - chest - waist, self.draw(88, 5) - 0.6 * chest - waist
        n = 2.5  # between an ellipse and a box
        normalised = (np.abs(x / a) ** n + np.abs(y / b) ** n) ** (1 / n)
        distance = np.hypot(x, y)
        return distance - distance / np.maximum(normalised, 1e-3)

    def _diaphragm_height(self) -> np.ndarray:
        x, y, z = self.xyz
        drop = self.draw(42, 6)
        right = self.draw(8, 5) - drop * (((x - 65) / 62) ** 2 + ((y - 12) / 95) ** 2)
        left = self.draw(-6, 5) - drop * (((x + 65) / 62) ** 2 + ((y - 12) / 95) ** 2)
        side = _smoothstep(x, 25)
        # Between the domes the heart rests on a nearly flat centre.
        centre = -22 - 20 * ((y - 20) / 80) ** 2
        return z - np.maximum(side * right + (1 - side) * left, centre * np.exp(-((x / 45) ** 2)) - 60 * (x / 90) ** 2)


def _paint_trunk(t: _Torso) -> None:
    """Skin, subcutaneous fat, the muscular wall, the back and psoas muscles, and fat in the cavity."""
    x, y, z = t.xyz
    back = np.exp(-((x / 62) ** 2)) * _smoothstep(-y - 40, 40)
    shoulder = _smoothstep(z - 25, 60)  # pectoral and latissimus muscles
    muscle = t.draw(13, 2) + 1.5 * t.noise(60) + 13 * back + 9 * shoulder * (1 + 0.5 * np.sin(np.abs(x) / 35))
    fat = t.rng.uniform(9, 26) * (1 + 0.35 * np.tanh(y / 60) - 0.25 * np.tanh((z - 10) / 80)) + 2 * t.noise(70)
    skin = muscle + np.maximum(fat, 4)
    strands = t.tubes(16, 0.12)
    t.paint(t.wall < skin, 15.0)
    t.paint(t.wall < skin - 2.5, -108 + 8 * t.noise(20) + 70 * strands)
    t.paint(t.wall < muscle, t.tissue["muscle"] - 12 * np.abs(t.noise(12)))
    t.paint(t.wall < 0, -98 + 10 * t.noise(14) + 110 * t.tubes(22, 0.14))
    sheath = np.abs(t.wall - 12 - 3 * t.noise(40)) < 1.3  # fat between the layers of muscle
    t.paint(sheath & (t.wall < muscle - 2), -70.0)
    for side in (-1, 1):
        erector = _ellipsoid(t.xyz, (side * 31, -94, 0), t.size((29, 19, 1e4)))
        t.paint((erector < 1) & (t.wall < muscle), t.tissue["muscle"] - 22 * np.abs(t.noise(11)))
        psoas = _ellipsoid(t.xyz, (side * 38, -54, -190), t.size((19, 22, 118)))
        t.paint((psoas < 1) & (t.wall < 2), t.tissue["muscle"] + 3 * t.noise(15))


def _paint_thorax(t: _Torso) -> None:
    """Mediastinum, lungs with vessels, diaphragm, heart, trachea and oesophagus."""
    x, y, _ = t.xyz
    cavity = (t.wall < -1) & (t.diaphragm > -2)
    t.paint(cavity, 10 + 35 * t.noise(14))
    medial = t.draw(17, 3) + t.draw(19, 3) * np.exp(-(((y + 8) / 34) ** 2)) + 2 * t.noise(35)
    lungs = cavity & (t.diaphragm > 1.5) & (t.wall < -3) & (np.abs(x + 3) > medial)
    hilum = np.minimum(*(_ellipsoid(t.xyz, (s * 38, -10, 62), (70, 70, 70)) for s in (-1, 1)))
    near = np.exp(-hilum)
    vessels = np.maximum(t.tubes(24, 0.09 + 0.2 * near), 0.75 * t.tubes(13, 0.1 + 0.1 * near))
    parenchyma = t.draw(-855, 25) - 0.5 * y + 14 * t.noise(12) + 12 * t.noise(40)
    t.paint(lungs, parenchyma + (40 - parenchyma) * vessels, _LUNGS)
    _paint_heart(t)
    _paint_tubes_of_the_chest(t)


def _paint_heart(t: _Torso) -> None:
    centre, radii = t.place((-20, 26, 24)), t.size((72, 53, 55))
    heart = _ellipsoid(t.xyz, centre, radii, tilt_xy=-0.5, tilt_xz=0.35)
    inside = (t.diaphragm > 0) & (t.wall < -4)
    t.paint((heart < 1.12) & inside, -70.0)  # epicardial fat
    t.paint((heart < 1) & inside, t.tissue["myocardium"] + 6 * t.noise(15))
    for offset, size, gain in (((-24, -4, -6), (32, 21, 27), 1.0), ((20, 18, 0), (29, 22, 30), 0.85)):
        chamber = _ellipsoid(t.xyz, [c + o for c, o in zip(centre, offset, strict=True)], size, tilt_xy=-0.5)
        t.paint((chamber < 1) & (heart < 0.85) & inside, t.tissue["blood"] * gain)
    atrium = _ellipsoid(t.xyz, (centre[0] + 22, centre[1] - 30, centre[2] + 22), (36, 20, 26))
    t.paint((atrium < 1) & inside & (t.label != _LUNGS) & (heart > 0.7), t.tissue["blood"] * 0.9)


def _paint_tubes_of_the_chest(t: _Torso) -> None:
    x, y, z = t.xyz
    above = t.diaphragm > 0
    oesophagus = np.hypot(x + 6 + 0.05 * (40 - z), y + 28 - 0.06 * (40 - z))
    t.paint((oesophagus < 8) & above, 45.0)
    t.paint((oesophagus < 2.5) & above, -200.0)
    # The trachea divides into the two main bronchi.
    split = t.draw(92, 6)
    bronchi = np.hypot(np.abs(x) - np.clip(split - z, 0, 60) * 0.9, y + 12) * np.where(z < split, 0.75, 1)
    airway = above & (z > split - 48)
    t.paint((bronchi < 9.5) & airway, 30.0)
    t.paint((bronchi < 7) & airway, -985.0)


def _paint_ribs(t: _Torso) -> None:
    """Ribs that fall towards the front, costal cartilage and sternum."""
    x, y, z = t.xyz
    height = z + t.draw(0.42, 0.05) * (y + 88) + 2 * t.noise(60)
    spacing, start = t.draw(27, 2), t.rng.uniform(0, 27)
    index = np.round((height - start) / spacing)
    along = np.abs(height - start - index * spacing)
    origin = start + index * spacing  # height of the rib at the spine
    front = np.clip(t.draw(25, 5) + 0.75 * origin, -60, 74)
    shell = np.hypot((t.wall - 5) / 4.6, along / 6.5)
    rib = (shell < 1) & (origin > -110) & (np.abs(x) > 24)
    t.paint(rib & (y < 88) & (origin > 40), 105 + 15 * t.noise(10))  # cartilage
    t.paint(rib & (y < front), t.draw(260, 30) + 420 * _smoothstep(shell - 0.6, 0.3), _RIBS)
    bone = (np.abs(x) < t.draw(17, 2)) & (t.wall > 0) & (t.wall < 10) & (y > 0) & (z > t.draw(-8, 6))
    t.paint(bone, 190 + 160 * _smoothstep(np.abs(t.wall - 5) - 3, 2) + 30 * t.noise(10))


def _paint_spine(t: _Torso) -> None:
    """Vertebral bodies with a cortex, discs, the canal, and transverse and spinous processes."""
    x, y, z = t.xyz
    x = x - t.draw(0, 3) * np.sin(z / t.draw(70, 10))
    y = y + 54 - t.draw(5, 2) * np.cos((z + 90) / 75)  # 0 in the middle of the vertebral body
    period, disc, phase = t.draw(30, 2), t.draw(6.5, 1), t.rng.uniform(0, 30)
    level = np.mod(z - phase + 0.1 * y, period)  # discs are tilted a little
    grow = 1 + 0.0012 * np.clip(-z, -100, 150)
    radius = np.hypot(x / (20.5 * grow), y / (16 * grow))
    # The waist of each vertebra, narrower than its end plates.
    body = radius + 0.12 * np.sin(np.pi * np.clip((level - disc) / (period - disc), 0, 1)) < 1.04
    trabecular, cortex = t.draw(210, 40) + 18 * t.noise(7), t.draw(520, 60)
    canal = np.hypot(x, y + 26 * grow)
    middle = np.abs(level - disc - 0.45 * (period - disc))
    arch = (canal < 15.5) & (middle < 10)
    transverse = (np.abs(y + 27) + 0.12 * np.abs(x) < 7.5) & (np.abs(x) < 36) & (middle < 6)
    lower = np.abs(np.mod(z - phase - disc - 0.25 * (y + 30), period) - 0.4 * (period - disc))
    spinous = (np.abs(x) < 4.5) & (y < -34) & (y > -58) & (lower < 8.5)
    pedicle = (np.abs(np.abs(x) - 13) < 4.5) & (y < -8) & (y > -30) & (middle < 8)
    t.paint(arch | transverse | spinous | pedicle, cortex * 0.85 + 40 * t.noise(8), _SPINE)
    edge = np.maximum(_smoothstep(radius - 0.85, 0.1), 1 - _smoothstep(np.minimum(level - disc, period - level) - 2, 1))
    t.paint(body & (level >= disc), trabecular + (cortex - trabecular) * edge, _SPINE)
    t.paint(body & (level < disc), t.draw(85, 10), _SPINE)
    t.paint((canal < 9) & (radius > 1), 22.0)
    t.paint(canal < 4.5, 38.0)  # the cord


def _paint_bowel(t: _Torso) -> None:
    """Loops with wall, content and gas, and the pancreas: unlabelled, to fill the abdomen with texture."""
    x, y, z = t.xyz
    room = t.abdomen & (t.wall < -5) & (y > -30 + 10 * t.noise(40)) & (z < t.draw(-62, 6) - 0.15 * y - 0.25 * x)
    loops = t.noise(26)
    inside = np.abs(loops) - 0.15
    content = 25 + 25 * t.noise(11) + t.rng.choice([0.0, 150.0]) * (t.noise(45) > 0.3)
    t.paint(room & (inside > 0), 55.0)
    t.paint(room & (inside > 0.3), content)
    t.paint(room & (inside > 0.65) & (y > 5) & (t.noise(30) > 0.5), -900.0)
    curve = np.hypot(y - 12 + 0.0045 * (x - 10) ** 2, z + 72 - 0.18 * (10 - x))
    pancreas = (curve < 11 + 2 * t.noise(25)) & (x > -72) & (x < 38) & t.abdomen
    t.paint(pancreas, t.tissue["pancreas"] + 22 * np.minimum(t.noise(8), 0.5))


def _paint_stomach(t: _Torso) -> None:
    """Wall, content and, as the patient lies on the back, gas above a level."""
    centre, radii = t.place((-54, 26, -38)), t.size((46, 42, 48))
    fundus = _ellipsoid(t.xyz, centre, radii, tilt_xy=0.35)
    antrum = _ellipsoid(t.xyz, (centre[0] + 42, centre[1] + 14, centre[2] - 34), t.size((46, 20, 19)), tilt_xz=0.3)
    radius = np.minimum(fundus, antrum) + 0.05 * t.noise(25)
    stomach = (radius < 1) & t.abdomen & (t.wall < -3)
    level = centre[1] + t.rng.uniform(0, 14)
    lying = np.broadcast_to(t.axes[1][None, :, None], t.hu.shape)  # gravity knows no deformation
    content = t.rng.choice([12.0, 30.0, 120.0]) + 14 * t.noise(9)
    t.paint(stomach, t.tissue["muscle"] + 12, _STOMACH)
    lumen = stomach & (radius < 0.78) & (t.wall < -7) & (t.diaphragm < -6)
    t.paint(lumen, content, _STOMACH)
    t.paint(lumen & (lying > level), -960.0, _STOMACH)


def _paint_liver(t: _Torso) -> None:
    """Two lobes under the right dome with vessels, and the gallbladder."""
    centre = t.place((72, 0, -46), 5)
    right = _ellipsoid(t.xyz, centre, t.size((70, 77, 73)))
    left = _ellipsoid(t.xyz, (centre[0] - 70, centre[1] + 38, centre[2] + 16), t.size((66, 32, 36)), tilt_xz=-0.2)
    liver = (np.minimum(right, left) + 0.05 * t.noise(35) < 1) & t.abdomen & (t.wall < -3)
    parenchyma = t.tissue["liver"] + 4 * t.noise(10) + 4 * t.noise(45)
    vessels = t.tubes(28, 0.13)
    t.paint(liver, parenchyma + (t.tissue["vein"] - parenchyma) * vessels, _LIVER)
    bladder = _ellipsoid(t.xyz, t.place((42, 40, -92), 3), t.size((14, 17, 24)))
    t.paint((bladder < 1) & t.abdomen, 60.0)
    t.paint((bladder < 0.75) & t.abdomen, 12.0)


def _paint_spleen(t: _Torso) -> None:
    centre = t.place((-96, -30, -40))
    spleen = _ellipsoid(t.xyz, centre, t.size((30, 50, 54), 0.12), tilt_xy=-0.4)
    hilum = _ellipsoid(t.xyz, (centre[0] + 34, centre[1] + 16, centre[2]), (19, 26, 36))
    body = (spleen + 0.05 * t.noise(25) < 1) & (hilum > 1) & t.abdomen & (t.wall < -3)
    patchy = 0.14 if t.tissue["aorta"] > 200 else 0.04  # the arterial phase shows bands
    t.paint(body, t.tissue["spleen"] * (1 + patchy * t.noise(13)), _SPLEEN)


def _paint_kidneys(t: _Torso) -> None:
    """Cortex, pyramids, and a hilum of fat with the renal pelvis; the right kidney lies lower."""
    for side, height in ((1, -104), (-1, -90)):
        centre, radii = t.place((side * 60, -42, height)), t.size((27, 25, 50))
        tilts = {"tilt_xy": side * 0.5, "tilt_xz": side * 0.22}
        radius = _ellipsoid(t.xyz, centre, radii, **tilts)
        hilum = _ellipsoid(t.xyz, (centre[0] - side * 19, centre[1] + 9, centre[2]), (17, 13, 20), **tilts)
        below = t.diaphragm < -4
        t.paint((radius < 1.3) & t.abdomen & below, -100 + 8 * t.noise(15))
        kidney = (radius < 1) & (hilum > 1) & below & (t.wall < 0)
        columns = _smoothstep(radius - 0.52 + 0.25 * t.noise(13), 0.12)
        medulla, cortex = t.tissue["medulla"], t.tissue["cortex"]
        t.paint(kidney, medulla + (cortex - medulla) * columns, _KIDNEYS)
        t.paint((hilum < 0.45) & below, 10.0)
        t.paint(np.abs(hilum - 0.6) < 0.1, t.tissue["cava"])


def _paint_great_vessels(t: _Torso) -> None:
    """Aorta, left in front of the spine, and inferior vena cava on the right below the heart."""
    x, y, z = t.xyz
    aorta = np.hypot(x + t.draw(11, 2) + 0.06 * np.clip(z, -60, 90), y + t.draw(28, 2) + 0.06 * np.clip(z, -60, 90))
    radius = t.draw(12, 1.5) + 0.02 * z
    cava = np.hypot((x - t.draw(20, 2)) / 1.25, y + t.draw(24, 2) - 0.15 * np.clip(z + 60, 0, 60))
    t.paint((cava < 11) & (z < t.draw(12, 4)), t.tissue["cava"] + 10 * t.noise(25))
    t.paint(aorta < radius + 1.5, 48.0)
    t.paint(aorta < radius, t.tissue["aorta"], _AORTA)


def _paint_table(t: _Torso) -> None:
    """Carbon-fibre shell with a foam core, straight along z."""
    x, y, _ = np.meshgrid(*t.axes, indexing="ij", sparse=True)
    body = np.flatnonzero((t.hu > -900).any((0, 2)))
    top = t.axes[1][body[0]] + 0.0012 * x**2 - 4  # the body lies in a shallow trough
    air = t.hu < -990
    wide = np.abs(x) < 190
    depth = np.broadcast_to(top - y, t.hu.shape)
    t.paint(air & wide & (depth > 0) & (depth < 18), -930.0)
    t.paint(air & wide & (((depth > 0) & (depth < 4)) | ((depth > 14) & (depth < 18))), -250.0)


def _scan(t: _Torso) -> np.ndarray:
    """What the scanner adds: partial volume, white and correlated noise, int16 HU."""
    sigma = t.rng.uniform(0.45, 0.7)
    image = _blur(t.hu, (sigma, sigma, 0.5))
    white = t.rng.standard_normal(image.shape, dtype=np.float32)
    grain = _blur(t.rng.standard_normal(image.shape, dtype=np.float32), (1.0, 1.0, 0.4)) * 4  # about unit variance
    image += t.rng.uniform(5, 12) * white + t.rng.uniform(4, 9) * grain
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def _oriented(
    arrays: Sequence[np.ndarray], spacing: np.ndarray, first: np.ndarray, orientation: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Turn RAS arrays whose voxel 0 lies at `first` (mm) to `orientation`, with the affine that says so."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = first
    for axis, (wanted, positive) in enumerate(zip(orientation, "RAS", strict=True)):
        if wanted != positive:
            arrays = [np.flip(a, axis) for a in arrays]
            affine[axis, 3] += affine[axis, axis] * (arrays[0].shape[axis] - 1)
            affine[axis, axis] *= -1
    return [np.ascontiguousarray(a) for a in arrays], affine


def _check(seed: int, shape: Sequence[int] | None) -> None:
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    if shape is not None and (len(shape) != 3 or min(shape) < 16):
        raise ValueError(f"shape must be three numbers of voxels, each at least 16, got {tuple(shape)}")


def generate_case(
    seed: int, shape: Sequence[int] | None = None, orientation: str | None = None, table: bool | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one phantom torso from the middle of the chest to the lower poles of the kidneys.

    The same arguments give the same arrays; numpy's global random state is neither read nor changed. `shape` sets the
    resolution: the field of view is a property of the case (about 375 x 375 x 250 mm), so the spacing follows from it.

    Args:
        seed: number that the case is drawn from, >= 0.
        shape: voxels along x, y and z, each at least 16. None: 128 x 128 and 56 to 76 slices, drawn per case.
        orientation: direction of the voxel axes, one of :data:`ORIENTATIONS`. None: drawn per case.
        table: whether the patient table is seen. None: drawn per case.

    Returns:
        image: int16 HU (X, Y, Z).
        label: uint8 (X, Y, Z) with the values of :data:`LABELS`.
        affine: float64 (4, 4), voxel index -> mm in RAS+ world coordinates.

    Raises:
        ValueError: for a negative seed, a shape that is not three numbers >= 16, or an unknown orientation.

    Example:
        >>> image, label, affine = generate_case(0, shape=(64, 64, 32))
        >>> image.shape, int(label.max())
        ((64, 64, 32), 8)
    """
    if orientation not in (None, *ORIENTATIONS):
        raise ValueError(f"orientation must be one of {ORIENTATIONS} or None, got {orientation!r}")
    _check(seed, shape)
    rng = np.random.default_rng(seed)
    slices, drawn_orientation, drawn_table = rng.integers(56, 77), rng.choice(ORIENTATIONS), rng.random() < 0.7
    shape = tuple(shape or (128, 128, int(slices)))

    side = rng.uniform(350, 400)
    extent = np.array([side, side, rng.uniform(232, 268)])
    spacing = np.round(extent / shape, 4)
    middle = np.array([rng.uniform(-8, 8), rng.uniform(-14, -2), rng.uniform(-30, -18)])
    axes = tuple(
        ((np.arange(n) - (n - 1) / 2) * s + m).astype(np.float32)
        for n, s, m in zip(shape, spacing, middle, strict=True)
    )
    phase = _PHASES[str(rng.choice(list(_PHASES)))]
    torso = _Torso(rng, axes, {name: hu * rng.uniform(0.94, 1.06) for name, hu in phase.items()})
    for paint in (
        _paint_trunk,
        _paint_thorax,
        _paint_ribs,
        _paint_bowel,
        _paint_stomach,
        _paint_liver,
        _paint_spleen,
        _paint_kidneys,
        _paint_spine,
        _paint_great_vessels,
    ):
        paint(torso)
    if drawn_table if table is None else table:
        _paint_table(torso)
    scanner_origin = np.round(rng.uniform(-150, 150, 3), 1)
    first = np.array([a[0] for a in axes], np.float64) + scanner_origin
    arrays, affine = _oriented([_scan(torso), torso.label], spacing, first, orientation or str(drawn_orientation))
    return arrays[0], arrays[1], affine


def _dataset_json(names: dict[str, list[str]]) -> dict:
    def entries(part: str) -> list[dict[str, str]]:
        return [{"image": f"./images{part}/{n}.nii.gz", "label": f"./labels{part}/{n}.nii.gz"} for n in names[part]]

    return {
        "name": "Phantom torso",
        "description": "Random labelled phantom torso CTs, written by pgl_ext.tools.phantom; no patient data.",
        "reference": "pgl_ext",
        "licence": "Apache-2.0",
        "release": f"{_VERSION}.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(LABELS)},
        "numTraining": len(names["Tr"]),
        "numTest": len(names["Ts"]),
        "training": entries("Tr"),
        # MONAI cannot read an empty list.
        **({"test": entries("Ts")} if names["Ts"] else {}),
    }


def _claim_folder(out: Path, settings: dict) -> None:
    """Mark an empty folder as ours, or make sure that it is ours and was written with the same settings."""
    record = out / "phantom.json"
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder")
    if record.is_file():
        written = json.loads(record.read_text())
        if written != settings:
            raise FileExistsError(
                f"{out} holds phantoms written with other settings ({written}, not {settings}); give another folder"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and was not written by this function; give a new or empty folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(settings) + "\n")


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI file so that an interruption leaves no half file under its name."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    partial = path.with_name(f".partial-{path.name}")
    nib.save(image, partial)
    os.replace(partial, path)


def write_dataset(
    out: str | Path, cases: int, seed: int = 0, test_cases: int = 0, shape: Sequence[int] | None = None
) -> Path:
    """Write phantoms as a Medical Segmentation Decathlon style data set.

    `imagesTr/`, `labelsTr/` and, where there are test cases, `imagesTs/`, `labelsTs/` hold `phantom_000.nii.gz`, ...;
    `dataset.json` lists them (``training`` and ``test``, both with image and label) for
    :func:`monai.data.load_decathlon_datalist`. The orientations take turns. A repeated call with the same settings does
    nothing but write what is missing, so an interrupted one can be continued. Case number i depends on `seed`, `shape`
    and i only.

    Args:
        out: folder, new or empty, or written before with the same settings.
        cases: number of training cases, >= 1.
        seed: number that the data set is drawn from, >= 0.
        test_cases: number of further, held-out cases.
        shape: see :func:`generate_case`.

    Returns:
        Path of `dataset.json`.

    Raises:
        ValueError: for cases < 1, test_cases < 0, seed < 0 or a bad shape.
        FileExistsError: if `out` holds anything else.
        NotADirectoryError: if `out` is a file.
    """
    if cases < 1:
        raise ValueError(f"cases must be at least 1, got {cases}")
    if test_cases < 0:
        raise ValueError(f"test_cases must be >= 0, got {test_cases}")
    _check(seed, shape)
    out = Path(out)
    settings = {
        "version": _VERSION, "cases": cases, "test_cases": test_cases, "seed": seed,
        "shape": None if shape is None else [int(n) for n in shape],
    }  # fmt: skip
    _claim_folder(out, settings)
    names: dict[str, list[str]] = {"Tr": [], "Ts": []}
    for number in range(cases + test_cases):
        part, name = "Tr" if number < cases else "Ts", f"phantom_{number:03d}"
        names[part].append(name)
        image_path, label_path = (out / f"{kind}{part}" / f"{name}.nii.gz" for kind in ("images", "labels"))
        if image_path.is_file() and label_path.is_file():
            continue
        image_path.parent.mkdir(exist_ok=True)
        label_path.parent.mkdir(exist_ok=True)
        case_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        image, label, affine = generate_case(case_seed, shape, ORIENTATIONS[number % len(ORIENTATIONS)])
        _save(image_path, image, affine)
        _save(label_path, label, affine)
    path = out / "dataset.json"
    if not path.is_file():
        path.write_text(json.dumps(_dataset_json(names), indent=2) + "\n")
    return path
