"""A point of one scan found again in others, by the features of a pre-trained encoder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.data.utils import affine_to_spacing
from monai.utils import convert_to_numpy, convert_to_tensor

from pgl_ext.figures import plot_similarity
from pgl_ext.geometry import linear_interpolation_matrix, resample_axes, upsample_features

__all__ = ["PointSimilarity", "feature_at"]

logger = logging.getLogger(__name__)


def feature_at(features: torch.Tensor, point: Sequence[float], stride: Sequence[int]) -> torch.Tensor:
    """The feature at a point, interpolated linearly.

    Args:
        features: (F, x, y, z); feature j lies on voxel ``stride * j``.
        point: voxel index (x, y, z), not necessarily whole numbers.
        stride: in voxels.

    Returns:
        (F,)
    """
    weights = [
        linear_interpolation_matrix(torch.tensor([[[place / step]]], dtype=torch.float64), cells).to(features)
        for place, step, cells in zip(point, stride, features.shape[1:], strict=True)
    ]
    return resample_axes(features[None], weights).flatten()


@dataclass
class _Scan:
    """One scan as the picture needs it. `volume` (X, Y, Z) and `similarity` (x, y, z) are on the preprocessed grid."""

    name: str
    image: str
    size: tuple[int, ...]
    affine: np.ndarray
    file_affine: np.ndarray
    similarity: np.ndarray
    volume: np.ndarray | None

    @property
    def spacing(self) -> np.ndarray:
        return affine_to_spacing(self.affine)

    def to_file(self, point: Sequence[float]) -> np.ndarray:
        return _map(np.linalg.inv(self.file_affine) @ self.affine, point)

    def to_world(self, point: Sequence[float]) -> np.ndarray:
        return _map(self.affine, point)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return convert_to_tensor(tensor, dtype=torch.float32, device="cpu")


def _map(affine: np.ndarray, point: Sequence[float]) -> np.ndarray:
    return affine[:3, :3] @ np.asarray(point, dtype=np.float64) + affine[:3, 3]


class PointSimilarity:
    """Handler that finds a point of the first scan again in the others, by the cosine similarity of features.

    Writes ``similarity.png``, which shows the first ``max_scans`` scans, and ``similarity.json`` with the most similar
    place in every scan: voxel index in its own file, and mm (RAS+). Places are as fine as the network's stride. With a
    single scan the point is looked for in that scan.

    Args:
        output_dir: folder of both files; made if missing.
        stride: output stride of the network per axis, in voxels.
        query_point: voxel index (x, y, z) in the file of the first scan. None: the voxel nearest to the middle of the
            scan that is brighter than the scan's mean, so not air.
        max_scans: number of scans in the picture beside the first.
        image_key: key of the preprocessed scan (C, X, Y, Z), what the network sees.
        scan_key: key of the scan in its own intensities, to be drawn; None: draw what the network sees.
        pred_key: key of the feature map (F, x, y, z).

    Raises:
        ValueError: ``query_point`` is not three numbers, or lies outside the first scan.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        stride: Sequence[int],
        query_point: Sequence[float] | None = None,
        max_scans: int = 5,
        image_key: str = "image",
        scan_key: str | None = "scan",
        pred_key: str = "pred",
    ) -> None:
        if query_point is not None and (isinstance(query_point, str) or np.shape(query_point) != (3,)):
            raise ValueError(f'query_point must be three voxel indices, such as "[64, 64, 30]", got {query_point!r}.')
        if max_scans < 1:
            raise ValueError(f"max_scans must be at least 1, got {max_scans}.")
        self.output_dir = Path(output_dir)
        self.stride = tuple(stride)
        self.query_point = query_point
        self.max_scans = max_scans
        self.image_key = image_key
        self.scan_key = scan_key or image_key
        self.pred_key = pred_key
        self._reset()

    def attach(self, engine: Engine) -> None:
        """Look at each scan's features, and write the files at the end."""
        engine.add_event_handler(Events.STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add_all)
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _reset(self) -> None:
        self._scans: list[_Scan] = []
        self._point: np.ndarray | None = None
        self._query: torch.Tensor | None = None

    def _add_all(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            # Postprocessing may have left either of them to either dict.
            self.add({**item, **output})

    def add(self, data: Mapping[Hashable, Any]) -> None:
        """Take in a scan; the first one holds the query point.

        Args:
            data: ``image``, ``scan``, ``pred`` and ``name``.
        """
        image, features = data[self.image_key], _plain(data[self.pred_key])
        scan = _Scan(
            name=str(data.get("name", len(self._scans))),
            image=str(image.meta.get("filename_or_obj", "")),
            size=tuple(image.shape[1:]),
            affine=convert_to_numpy(image.affine, dtype=np.float64),
            file_affine=np.asarray(image.meta.get("original_affine", image.affine), dtype=np.float64),
            similarity=np.zeros(0),
            volume=_plain(data[self.scan_key])[0].numpy() if len(self._scans) <= self.max_scans else None,
        )
        if self._query is None:
            self._point = (
                self._default_point(_plain(image)[0].numpy(), scan) if self.query_point is None else self._given(scan)
            )
            self._query = F.normalize(feature_at(features, self._point, self.stride), dim=0)
        scan.similarity = torch.einsum("f,fxyz->xyz", self._query, F.normalize(features, dim=0)).numpy()
        self._scans.append(scan)

    def _given(self, scan: _Scan) -> np.ndarray:
        point = _map(np.linalg.inv(scan.affine) @ scan.file_affine, self.query_point)
        last = np.array(scan.size) - 1
        # Resampling may leave less than a voxel of the file's border outside.
        if ((point < -1) | (point > last + 1)).any():
            corners = scan.to_file([0, 0, 0]), scan.to_file(last)
            low, high = np.rint(np.minimum(*corners)).astype(int), np.rint(np.maximum(*corners)).astype(int)
            raise ValueError(
                f"query_point {list(self.query_point)} lies outside {scan.image or scan.name}: its voxel indices go "
                f"from {low.tolist()} to {high.tolist()}."
            )
        return point.clip(0, last)

    @staticmethod
    def _default_point(image: np.ndarray, scan: _Scan) -> np.ndarray:
        middle = (np.array(scan.size) - 1) / 2
        squares = [((np.arange(n) - m) * s) ** 2 for n, m, s in zip(scan.size, middle, scan.spacing, strict=True)]
        distance = squares[0][:, None, None] + squares[1][:, None] + squares[2]
        distance[image <= image.mean()] = np.inf
        return np.array(np.unravel_index(np.argmin(distance), scan.size), dtype=np.float64)

    def _save(self) -> None:
        if not self._scans:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        others = self._scans[1:] or self._scans
        report = {
            "query": _place(self._scans[0], self._point),
            "resolution_mm": _rounded(self._scans[0].spacing * self.stride),
            "matches": [self._match(scan) for scan in others],
        }
        (self.output_dir / "similarity.json").write_text(json.dumps(report, indent=4) + "\n", encoding="utf-8")
        self._draw([scan for scan in others if scan.volume is not None][: self.max_scans])
        logger.info("Looked for %s in %d scans: %s", report["query"], len(others), self.output_dir / "similarity.json")

    def _match(self, scan: _Scan) -> dict[str, Any]:
        """Where a scan is most similar: linear interpolation has its maximum on a feature, stride * j."""
        best = np.unravel_index(np.argmax(scan.similarity), scan.similarity.shape)
        return {**_place(scan, np.multiply(best, self.stride)), "similarity": round(float(scan.similarity[best]), 4)}

    def _draw(self, others: Sequence[_Scan]) -> None:
        query = self._scans[0]
        voxel = ", ".join(str(i) for i in np.rint(query.to_file(self._point)).astype(int))
        plot_similarity(
            query.volume,
            self._point,
            f"{_shortened(query.name)}\nvoxel {voxel}",
            [
                {
                    "title": _shortened(scan.name),
                    "volume": scan.volume,
                    "similarity": upsample_features(
                        torch.as_tensor(scan.similarity)[None, None], scan.size, self.stride
                    )[0, 0],
                    "spacing": scan.spacing,
                }
                for scan in others
            ],
            self.output_dir / "similarity.png",
            query.spacing,
        )


def _place(scan: _Scan, point: Sequence[float]) -> dict[str, Any]:
    voxel = np.rint(scan.to_file(point)).astype(int).tolist()
    return {"name": scan.name, "image": scan.image, "voxel": voxel, "mm": _rounded(scan.to_world(point))}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 2) for v in values]


def _shortened(name: str, length: int = 18) -> str:
    return name if len(name) <= length else f"{name[: length // 2 - 1]}...{name[-(length // 2 - 2) :]}"
