"""Data sets packed for a machine that is reached by a narrow way: python archives.py pack FOLDER OUT.tar.xz.

CT goes in 8-bit codes, in steps of 6 HU within the window of [-1024, 325] HU and coarser above it, where it is clipped;
label maps go as they are. ``unpack`` makes HU of the codes again, by the table in the archive's ``dataset.json``.
"""

from __future__ import annotations

import io
import json
import lzma
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

# OpenKBP's air, -1000 HU, is one of the levels.
LEVELS = np.concatenate([np.arange(-1024, 332, 6), np.round(np.geomspace(360, 3071, 29))]).astype(np.int16)
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4, "lp": 0, "pb": 0, "dict_size": 1 << 26}]


def entries(lists: dict) -> Iterator[dict]:
    """All entries of a Decathlon-style list that are objects."""
    for items in lists.values():
        if isinstance(items, list):
            yield from (item for item in items if isinstance(item, dict))


def pack(folder: str, out: str) -> None:
    """Write an archive of a data set's volumes and list."""
    lists = json.loads((Path(folder) / "dataset.json").read_text())
    packed = set()
    with (
        lzma.open(out, "wb", format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=FILTERS) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for item in entries(lists):
            for part in ("image", "label"):
                if part in item:
                    source, item[part] = item[part], item[part].removesuffix(".gz")
                    if source not in packed:
                        packed.add(source)
                        add(item[part], _encoded(nib.load(Path(folder) / source), part == "image").to_bytes())
        add("dataset.json", json.dumps({**lists, "levels": LEVELS.tolist()}).encode())
    print(f"{out}: {len(packed)} files, {Path(out).stat().st_size / 2**20:.2f} MiB")


def _encoded(image: nib.Nifti1Image, coded: bool) -> nib.Nifti1Image:
    voxels = np.asarray(image.dataobj)
    if coded:
        voxels = np.searchsorted((LEVELS[1:].astype(np.float32) + LEVELS[:-1]) / 2, voxels.astype(np.float32))
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    return nib.Nifti1Image(voxels.astype(np.uint8), image.affine, header)


def unpack(archive: str | Path, target: Path) -> None:
    """Unpack an archive, once."""
    if (target / "dataset.json").is_file():
        return
    target.mkdir(parents=True, exist_ok=True)
    with lzma.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(target, filter="data")
    lists = json.loads((target / "dataset.json").read_text())
    levels = np.array(lists.pop("levels"), dtype=np.int16)
    for path in {item["image"] for item in entries(lists)}:
        image = nib.load(target / path)
        header, affine = image.header.copy(), image.affine
        header.set_data_dtype(np.int16)
        hu = levels[np.asarray(image.dataobj).astype(np.uint8)]
        del image  # which maps the file that is written
        nib.save(nib.Nifti1Image(hu, affine, header), target / path)
    (target / "dataset.json").write_text(json.dumps(lists))


if __name__ == "__main__":
    {"pack": pack, "unpack": lambda archive, target: unpack(archive, Path(target))}[sys.argv[1]](*sys.argv[2:])
