"""The files of preprocessed volumes: compressed in blocks, with a checksum for each chunk of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

from pgl_ext.transforms.checks import BadVolumeError

__all__ = ["CacheReadError", "CachedVolume", "cache_file_content"]

# Chosen with benchmarks/volume_cache.py. One crop of a view touches few enough blocks, and so few chunks that looking
# them up costs little. LZ4's first level decodes fastest; on float16 CT the slower codecs save little.
_CHUNK = (1, 64, 64, 64)
_BLOCK = (1, 32, 32, 8)
_COMPRESSION = {"codec": blosc2.Codec.LZ4, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE]}
_SUMS = "crc32"


class CacheReadError(OSError):
    """A cached volume cannot be read; unlike any error of a transform, nothing to stop for."""


class _DamagedError(Exception):
    """What is stored is not what was written."""

    def __str__(self) -> str:
        return "it is damaged again at once: check the disk"


def cache_file_content(voxels: np.ndarray, affine: np.ndarray, source: str) -> bytes:
    """A volume as the bytes of a file.

    Args:
        voxels: (C, X, Y, Z), in the range of float16.
        affine: voxel index to mm, (4, 4).
        source: name of the scan.
    """
    volume = blosc2.asarray(
        # Readers give volumes in Fortran order; torch turns and converts them three times faster than NumPy.
        torch.as_tensor(voxels).half().contiguous().numpy(),
        chunks=tuple(map(min, _CHUNK, voxels.shape)),
        blocks=tuple(map(min, _BLOCK, voxels.shape)),
        cparams={**_COMPRESSION, "nthreads": 1},
    )
    # blosc2 would start a thread for each core to compress each of these small entries.
    threads = blosc2.set_nthreads(1)
    try:
        volume.vlmeta["affine"] = np.asarray(affine).tolist()
        volume.vlmeta["source"] = source
        volume.vlmeta["layout"] = _layout(volume)
        volume.vlmeta[_SUMS] = [
            zlib.crc32(volume.schunk.decompress_chunk(number)) for number in range(volume.schunk.nchunks)
        ]
    finally:
        blosc2.set_nthreads(threads)
    return volume.to_cframe()


def _layout(volume: blosc2.NDArray) -> list:
    return [*map(list, (volume.shape, volume.chunks, volume.blocks)), str(volume.dtype)]


class CachedVolume:
    """A volume (C, X, Y, Z) in a file: slices are float16 arrays, made sure of by the checksums of their chunks.

    Args:
        path: of the file.
        remake: writes the file anew, where it turns out to be damaged.
        checked: numbers of chunks that need no second look; those that are found to be right are added.

    Attributes:
        shape, dtype, ndim, nbytes: as NumPy has them.
        vlmeta: ``"affine"``, 4 x 4, voxel index of the preprocessed volume to mm, and ``"source"``.

    Raises:
        CacheReadError: there is no such file, or its head is damaged. A chunk that is damaged, again after the file was
            made anew, raises it where it is read.
    """

    def __init__(self, path: Path, remake: Callable[[], Any], checked: set[int]) -> None:
        self.path = path
        self._remake = remake
        self._checked = checked
        self._open()

    def _open(self) -> None:
        try:
            # One thread: a loader's workers already use the cores. A mapped file costs one system call less per block.
            dparams = blosc2.DParams(nthreads=1)
            self._array = blosc2.open(str(self.path), mode="r", mmap_mode="r", dparams=dparams)
            self.vlmeta = self._array.vlmeta
            self._sums = self.vlmeta[_SUMS]
            is_whole = self.vlmeta["layout"] == _layout(self._array) and len(self._sums) == self._array.schunk.nchunks
        except Exception as error:  # what damaged files make of the reader has no bounds
            raise CacheReadError(f"{self.path} cannot be read: {error}") from error
        if not is_whole:
            raise CacheReadError(f"{self.path} is damaged")
        self.shape, self.dtype, self.ndim = self._array.shape, self._array.dtype, self._array.ndim
        self.nbytes = self._array.nbytes

    def __getitem__(self, place: Any) -> np.ndarray:
        try:
            return self._read(place)
        except _DamagedError:
            self._checked.clear()
        try:
            self._remake()
            self._open()
            return self._read(place)
        except (OSError, BadVolumeError, _DamagedError) as error:
            raise CacheReadError(f"{self.path} is damaged, and cannot be made anew: {error}") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def _read(self, place: Any) -> np.ndarray:
        try:
            for number in self._chunks(place) - self._checked:
                if zlib.crc32(self._array.schunk.decompress_chunk(number)) != self._sums[number]:
                    raise _DamagedError
                self._checked.add(number)
            return self._array[place]
        except OSError as error:
            raise CacheReadError(f"{self.path}: {error}") from error
        except RuntimeError as error:  # blosc2's for what it cannot decode
            raise _DamagedError from error

    def _chunks(self, place: Any) -> set[int]:
        """Numbers of the chunks that a slice touches, in C order of their grid."""
        chunks = self._array.chunks
        grid = [-(-size // chunk) for size, chunk in zip(self.shape, chunks, strict=True)]
        axes = place if isinstance(place, tuple) else (place,)
        if not all(isinstance(axis, (int, np.integer, slice)) for axis in axes):
            return set(range(len(self._sums)))
        touched = [np.arange(number) for number in grid]
        for axis, part in enumerate(axes):
            places = range(self.shape[axis])[part]
            places = places if isinstance(part, slice) else [places]
            touched[axis] = np.arange(min(places) // chunks[axis], max(places) // chunks[axis] + 1) if places else []
        return set(np.ravel_multi_index(np.ix_(*touched), grid).ravel().tolist()) if all(map(len, touched)) else set()
