"""Reading files, and writing them so that a reader finds them complete or not at all."""

from __future__ import annotations

import atexit
import contextlib
import csv
import gzip
import io
import json
import math
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = [
    "append_csv",
    "claim_folder",
    "files_below",
    "pointer_problem",
    "read_csv",
    "read_json",
    "release_folder",
    "visible_files",
    "write_atomically",
    "write_csv",
    "write_json",
    "write_nifti",
    "write_text",
    "writing",
]

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a formula begins with
# Fields of a NIfTI header that say where its voxels lie.
_GRID_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
    "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def visible_files(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each folder in and below ``root`` once, links followed: its path, its folders and its files but hidden ones."""
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # Links may form a loop.
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, folders, sorted(name for name in names if not name.startswith("."))


def files_below(path: str) -> list[str]:
    """The visible files in and below a folder; of anything else its path alone."""
    return [os.path.join(folder, name) for folder, _, names in visible_files(path) for name in names] or [path]


def pointer_problem(path: str | os.PathLike) -> str:
    """What is wrong with a file that only stands for its content, as Git LFS and git-annex leave it; else empty."""
    try:
        with open(path, "rb") as file:
            start = file.read(200)
    except OSError:
        return ""
    for tool, mark, command in (("Git LFS", b"git-lfs", "git lfs pull"), ("git-annex", b"/annex/", "git annex get")):
        if mark in start and len(start) < 200:
            return f"is a pointer of {tool}, not the file itself: fetch it with `{command}`."
    return ""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn what goes wrong while a file is written (no space, quota, no access, a lost folder) into one clear error.

    Raises:
        OSError: with the file's path, the reason and what to do.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises the latter, with the reason behind it
        if getattr(error, "errno", 0) is None:  # not the system's: it says what to do already
            raise
        reasons = (e.strerror for e in (error, error.__context__) if isinstance(e, OSError) and e.strerror)
        raise OSError(
            f"Cannot write {path}: {next(reasons, error)}. Make room in {Path(path).parent}, or make it writable, and "
            "run the command again, with --resume true where it has that: what was finished is kept."
        ) from error


def write_atomically(save: Callable[[BinaryIO], Any], path: str | os.PathLike) -> None:
    """Have ``save(file)`` write a file that is either complete or absent, also after a power cut.

    Args:
        save: writes to the binary file object that it is given.
        path: where the file appears; its folder is made if missing. Until then the content is in ``tmp-*`` beside it.
    """
    path = Path(path)
    temporary = path.with_name(f"tmp-{uuid.uuid4().hex}{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                save(file)
                file.flush()
                # Otherwise a crash of the machine could leave the name with half the content.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # the folder may be gone
                temporary.unlink(missing_ok=True)


_claimed: dict[Path, tuple[Any, int]] = {}  # the locked file, and the process that has locked it


def claim_folder(folder: str | os.PathLike) -> None:
    """Keep other runs out of an output folder until :func:`release_folder` or the end of this process.

    What a dead run left half written is removed.

    The file ``.in_use`` in it is locked, which other machines see too where their storage passes locks on. Processes
    that this one starts do not hold the lock, so that a run that was killed can be repeated at once.

    Raises:
        FileExistsError: another process has the folder.
    """
    path = Path(os.path.abspath(folder), ".in_use")
    if path in _claimed and _claimed[path][1] == os.getpid():
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _claimed[path] = _locked(path), os.getpid()
    atexit.register(release_folder, folder)
    # Volumes may lie in a cache that other runs fill.
    for left in [*path.parent.glob("tmp-*"), *path.parent.glob("*/tmp-*")]:
        if left.suffix != ".b2nd":
            left.unlink(missing_ok=True)


def _locked(path: Path) -> Any:
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - until this process ends
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise FileExistsError(
                f"{path.parent} is in use by another run ({file.read() or 'unknown'}): wait for its end, or set "
                "another --output_dir."
            ) from error
        except OSError:  # storage without locks
            pass
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.close()
            return _locked(path)  # a run that ended just now has removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def release_folder(folder: str | os.PathLike) -> None:
    """Let others use a folder that this process has claimed."""
    path = Path(os.path.abspath(folder), ".in_use")
    file, process = _claimed.pop(path, (None, None))
    if process == os.getpid():  # and not of the process that has forked this one
        path.unlink(missing_ok=True)
        file.close()


def write_text(path: Path, text: str) -> None:
    """Write a text file that is complete or absent; its folder is made if missing."""
    write_atomically(lambda file: file.write(text.encode("utf-8")), path)


def read_json(path: str | os.PathLike, kind: str = "File", remedy: str = "restore or remove it") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        kind: what to call it in messages, such as ``"Data list"``.
        remedy: what to do about a file that holds none, for messages.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON, or something else than an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{kind} {path} is damaged, not valid JSON ({error}): {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{kind} {path} holds a {type(content).__name__}, not an object: {remedy}.")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is complete or absent; its folder is made if missing."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_csv(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, as text; a last one that was cut off, as by a power cut, is left out."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    return [row for row in rows if None not in row.values()]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with the first one's keys as header; NaN and None become empty cells.

    Text that a spreadsheet would take for a formula gets a quote before it.
    """
    header = io.StringIO()
    csv.DictWriter(header, rows[0]).writeheader()
    write_text(path, header.getvalue() + _csv_text(rows))


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a file that :func:`write_csv` has written with the same keys."""
    with writing(path), open(path, "a", newline="", encoding="utf-8") as file:
        file.write(_csv_text(rows))


def _csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, rows[0]).writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Empty where there is no value."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def write_nifti(voxels: np.ndarray, affine: np.ndarray, path: Path, header: nib.Nifti1Header | None = None) -> None:
    """Write a compressed NIfTI file that is complete or absent; the same voxels give the same bytes.

    Args:
        voxels: (X, Y, Z), or with channels (X, Y, Z, C).
        affine: voxel index to mm (RAS+), (4, 4).
        path: ending in ``.nii.gz``; its folder is made if missing.
        header: of the NIfTI scan that the voxels lie on, whose qform, sform and units are copied instead.
    """
    image = nib.Nifti1Image(voxels, affine if header is None else header.get_best_affine())
    image.header.set_xyzt_units("mm")
    if header is None:
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
    else:
        for field in _GRID_FIELDS:
            image.header[field] = header[field]
        image.header["pixdim"][4:] = 1

    def save(file: BinaryIO) -> None:
        # As nibabel does, but without the time of writing.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as compressed:
            image.to_stream(compressed)

    write_atomically(save, path)
