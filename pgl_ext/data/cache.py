"""Preprocessed volumes on disk, compressed in blocks so that a crop is read without reading the volume."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import pickle
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import PathLike
from monai.transforms import Compose, RandomizableTrait
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from pgl_ext.data.cache_file import CachedVolume, CacheReadError, cache_file_content
from pgl_ext.data.datalist import item_name
from pgl_ext.errors import few, transform_error
from pgl_ext.files import files_below, write_atomically, write_text
from pgl_ext.transforms.checks import BadVolumeError, check_volume
from pgl_ext.transforms.formats import image_files

__all__ = ["VolumeCache", "can_be_sent"]

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 2
_REMARKS = "remarks"
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_ABANDONED_AFTER = 24 * 3600  # seconds; no volume takes that long to write
_ABOUT_THE_FILE = (BadVolumeError, FileNotFoundError)


class VolumeCache:
    """Preprocessed volumes as float16 files that crops are read from.

    Each volume is written once: its file is named by the source (path, size, time of change), the preprocessing and the
    file format, and written anew when one of them changes; where the source has changed, the outdated file is removed.
    Several processes, of one preprocessing or of several, may fill and read one folder at the same time.

    Of a labelled case, an item with ``"label"``, image and label map are kept as channels of one volume: end the
    preprocessing with ``ConcatItemsd(["image", "label"], name="image", dim=0)``. Label values up to 2048 stay exact.

    Args:
        cache_dir: folder of the files; made if missing.
        preprocessing: from :func:`pgl_ext.transforms.preprocessing`: maps an item to a dict with ``"image"``, a volume
            ``(C, X, Y, Z)``, and has a ``digest``. Must not be random.
        num_workers: processes that :meth:`prepare` uses; 0 works in the calling process.

    Raises:
        ValueError: the preprocessing has random transforms or no digest, or ``num_workers`` is negative.
        OSError: ``cache_dir`` cannot be made.
    """

    def __init__(self, cache_dir: PathLike, preprocessing: Callable, num_workers: int = 0) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}.")
        # Compose itself is randomizable whatever it holds.
        steps = preprocessing.flatten().transforms if isinstance(preprocessing, Compose) else [preprocessing]
        random = sorted({type(step).__name__ for step in steps if isinstance(step, RandomizableTrait)})
        if random:
            raise ValueError(
                f"The cache's preprocessing must not be random, but has {', '.join(random)}: its result is computed "
                "once and kept. Move random transforms to the training transforms."
            )
        self.cache_dir = Path(os.path.abspath(cache_dir))
        self.num_workers = num_workers
        self.digest = getattr(preprocessing, "digest", None)
        if not self.digest:
            raise ValueError(
                "The cache's preprocessing has no digest, which tells when cached volumes are outdated: make it with "
                "pgl_ext.transforms.preprocessing, whose extra takes steps of your own."
            )
        self.preprocessing = preprocessing
        self._paths: dict[str, Path] = {}
        self._checked: dict[Path, set[int]] = {}  # chunks whose checksum this process has seen to be right
        self._listed: dict[str, set[str]] | None = None  # names of files by what they have in common with outdated ones
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"Cannot make the cache folder {self.cache_dir}: {error}. Set another cache_dir.") from error

    def key(self, item: Mapping) -> str:
        """Digest of an item's source files as they are now, the preprocessing and the file format.

        Raises:
            FileNotFoundError: a source does not exist.
        """
        parts = [_FORMAT_VERSION, self.digest, *_source(item), *map(_source_state, _source_paths(item))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def path(self, item: Mapping) -> Path:
        """Where the cache file of an item is, or would be."""
        return self.cache_dir / f"{self._stem(item)}-{self.key(item)[:32]}.b2nd"

    def _stem(self, item: Mapping) -> str:
        preprocessing = hashlib.sha256(f"{_FORMAT_VERSION} {self.digest}".encode()).hexdigest()[:8]
        return f"{_source_digest(item)}-{preprocessing}"

    def open(self, item: Mapping) -> CachedVolume:
        """Open an item's preprocessed volume, making its file first where it is missing or damaged.

        The source is looked at when an item is first opened and by :meth:`prepare`; in between it is taken as
        unchanged, since asking for every slice of a DICOM series would take longer than reading a crop.

        Args:
            item: ``{"image": path}``, with ``"series_uid"`` for a DICOM series and ``"label"`` for a labelled case.

        Returns:
            Volume ``(C, X, Y, Z)`` on disk; slicing it gives float16 NumPy arrays. Damage of its file that shows only
            then is mended in the same way.

        Raises:
            FileNotFoundError: the source does not exist.
            BadVolumeError: the source cannot be read, or not used for training.
        """
        name = item_name(item)
        path = self._paths.get(name) or self.path(item)
        try:
            volume = self._opened(path, item)
        except CacheReadError:
            path = self._write(item)
            try:
                volume = self._opened(path, item)
            except CacheReadError as error:
                raise OSError(f"{error}, though just written: check the disk.") from error
        self._paths[name] = path
        return volume

    def _opened(self, path: Path, item: Mapping) -> CachedVolume:
        return CachedVolume(path, lambda: self._write(item), self._checked.setdefault(path, set()))

    def nbytes(self, item: Mapping) -> int:
        """Bytes that an item's preprocessed volume takes in memory, as float16. Opens the file like :meth:`open`."""
        return self.open(item).nbytes

    def prepare(self, items: Sequence[Mapping], show_progress: bool = True) -> dict[str, str]:
        """Make the cache files of items that have none yet, and find the volumes that cannot be used.

        Args:
            items: those whose files are there already are not read; :meth:`open` mends what is damaged.
            show_progress: draw a progress bar if there is anything to do and standard error is a terminal.

        Returns:
            Why a volume cannot be used, by name, see :func:`pgl_ext.data.datalist.item_name`.

        Raises:
            ImportError: a package needed to read a file is not installed.
            OSError: a cache file cannot be written.
            RuntimeError: a worker process died.
        """
        self._listed = self._list()
        bad: dict[str, str] = {}
        missing, warnings = [], []
        for item in items:
            name = item_name(item)
            try:
                self._paths[name] = self.path(item)
            except OSError as error:
                kept = self._listed.get(self._stem(item))
                if kept:
                    logger.warning("%s Going on with what is cached of it.", error)
                    self._paths[name] = self.cache_dir / min(kept)
                else:
                    bad[name] = str(error)
            else:
                if self._paths[name].name not in self._listed.get(self._stem(item), ()):
                    missing.append(dict(item))
                elif (remark := self._paths[name].with_suffix(".txt")).name in self._listed[_REMARKS]:
                    warnings.append(remark.read_text(encoding="utf-8"))
        if warnings:
            logger.warning("%s", few(warnings, separator="\n"))
        progress = tqdm(
            self._prepare_missing(missing),
            desc="Preparing volumes",
            total=len(missing),
            unit="volume",
            # None: only on a terminal.
            disable=None if show_progress and missing else True,
        )
        bad.update({name: reason for name, reason in progress if reason is not None})
        return bad

    def _prepare_missing(self, items: list[dict]) -> Iterator[tuple[str, str | None]]:
        workers = min(self.num_workers, len(items))
        if workers and not can_be_sent(self):
            logger.warning("The preprocessing cannot be sent to worker processes (a lambda?): working in this one.")
            workers = 0
        # Not fork: the calling process may hold CUDA, and has threads.
        context = "spawn" if workers else None
        loader = DataLoader(
            items,
            batch_size=None,
            num_workers=workers,
            collate_fn=self._try,
            multiprocessing_context=context,
            generator=torch.Generator(),  # The loader draws from it: results do not depend on what was cached before.
        )
        try:
            for name, error in loader:
                if error is not None and not isinstance(error, _ABOUT_THE_FILE):
                    raise error
                yield name, error and " ".join(str(error).split())
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise RuntimeError(
                f"A worker process died while preparing volumes for {self.cache_dir}, for lack of memory, or since a "
                "script lacks `if __name__ == '__main__':`. Use fewer workers, or num_workers=0 for none."
            ) from error

    def _try(self, item: Mapping) -> tuple[str, Exception | None]:
        """Prepare an item; returns its name and the error that this ended with, if any."""
        try:
            self._write(item)
        except Exception as error:  # raised in the calling process, where it is not wrapped in the loader's words
            if get_worker_info() is not None and not can_be_sent(error):
                error = RuntimeError(f"{type(error).__name__}: {error}")
            return item_name(item), error
        return item_name(item), None

    def _write(self, item: Mapping) -> Path:
        """Preprocess an item, write its file, remove its outdated ones, and return the path."""
        # Named before reading, so that a source that changes meanwhile is read again next time.
        path = self.path(item)
        frame, remark = self._compressed(item)
        try:
            if remark:
                write_text(path.with_suffix(".txt"), remark)
            write_atomically(lambda file: file.write(frame), path)
        except OSError as error:
            raise OSError(
                f"Cannot write the cache file {path}: {error.__cause__ or error}. Make room or set another cache_dir."
            ) from error
        if self._listed is None:
            self._listed = self._list()
        stem = self._stem(item)
        for outdated in self._listed.get(stem, set()) - {path.name}:
            (self.cache_dir / outdated).unlink(missing_ok=True)
            (self.cache_dir / outdated).with_suffix(".txt").unlink(missing_ok=True)
        self._listed[stem] = {path.name}
        return path

    def _compressed(self, item: Mapping) -> tuple[bytes, str]:
        """The content of an item's file, and what is to be said of it at every start."""
        image = self._preprocessed(item)
        name = item_name(item)
        if image.ndim != 4:
            raise ValueError(f"{name}: preprocessing gave shape {tuple(image.shape)}, need (C, X, Y, Z)")
        # The channel behind the image's holds label values, which may well be constant.
        check_volume(image[:-1] if "label" in item else image, f"{name}, after preprocessing (hu_window, spacing),")
        voxels = np.asarray(image)
        largest = max(abs(voxels.min()), abs(voxels.max()))
        if largest > _FLOAT16_MAX:
            raise BadVolumeError(
                f"{name} has values up to {largest:g} after preprocessing, too large for float16: clip or normalise "
                "the intensities"
            )
        content = cache_file_content(voxels, np.asarray(getattr(image, "affine", np.eye(4))), name)
        return content, getattr(image, "meta", {}).get("warning", "")

    def _preprocessed(self, item: Mapping) -> np.ndarray | torch.Tensor:
        try:
            return self.preprocessing(dict(item))["image"]
        except Exception as error:
            cause = transform_error(error)
        # What is not about the file is a bug of a transform, and must not pass for a bad file.
        if not isinstance(cause, _ABOUT_THE_FILE):
            logger.error("preparing %s failed", item_name(item))
        raise cause

    def _list(self) -> dict[str, set[str]]:
        """Names of the files in the folder, but for what killed processes left half written, which is removed."""
        listed = defaultdict(set)
        for entry in os.scandir(self.cache_dir):
            if entry.name.startswith("tmp-"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - entry.stat().st_mtime > _ABANDONED_AFTER:
                        os.unlink(entry)
            elif entry.name.endswith(".b2nd"):
                listed[entry.name.rpartition("-")[0]].add(entry.name)
            elif entry.name.endswith(".txt"):
                listed[_REMARKS].add(entry.name)
        return listed


def _source_paths(item: Mapping) -> list[str]:
    return [*image_files(item), *([str(item["label"])] if "label" in item else [])]


def _source(item: Mapping) -> tuple[str, ...]:
    image, *label = map(os.path.abspath, _source_paths(item))
    said = [item.get("orientation"), *(item.get("channel_names") or ())]
    return image, str(item.get("series_uid") or ""), *label, *filter(None, said)


def _source_digest(item: Mapping) -> str:
    return hashlib.sha256("\0".join(_source(item)).encode()).hexdigest()[:16]


def _source_state(path: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file a volume may be read from.

    For a folder these are all visible files in and below it, since telling which belong to a series means opening them.
    For a header with the voxels in a file of their own (.mhd, .nhdr) that one too, or where it names several, all files
    with the header's stem.
    """
    files: list[os.DirEntry | Path] = [Path(path)]
    if os.path.isdir(path):
        files = [*map(Path, files_below(path))]
    elif path.lower().endswith((".mhd", ".nhdr")) and os.path.isfile(path):
        beside = Path(path).with_name(_voxel_file(path))
        stem = Path(path).stem
        # One file is looked at, not the folder, which may hold thousands of such pairs.
        files = [*files, beside] if beside.is_file() else list(Path(path).parent.glob(f"{glob.escape(stem)}*"))
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    if not states:
        raise FileNotFoundError(f"{path} does not exist or holds no files: check the data list and the dataset folder.")
    return sorted((name, state.st_size, state.st_mtime_ns) for name, state in states)


def _voxel_file(header: str) -> str:
    """What the header of a MetaImage or NRRD file names as the file of its voxels."""
    with open(header, "rb") as file:
        text = file.read(65536).decode("latin-1")
    found = re.search(r"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", text, re.IGNORECASE | re.MULTILINE)
    return found[1] if found else "LIST"


def can_be_sent(value: object) -> bool:
    """Whether another process receives an object as it is."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # classes may raise what they like
        return False
    return True
