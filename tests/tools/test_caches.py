"""What ``pgl cache`` says of a cache, and removes from it."""

import nibabel
import numpy as np
import pytest

from pgl_ext.data.cache import VolumeCache
from pgl_ext.tools.caches import cache_report
from pgl_ext.tools.cli import main
from pgl_ext.transforms import preprocessing


@pytest.fixture
def files(tmp_path):
    """Three scans, cached for two preprocessings."""
    items = []
    for number in range(3):
        voxels = np.random.default_rng(number).normal(size=(20, 20, 20)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{number}.nii")
        items.append({"image": str(tmp_path / f"{number}.nii")})
    for spacing in (None, [2, 2, 2]):
        VolumeCache(tmp_path / "cache", preprocessing(["image"], spacing=spacing)).prepare(items)
    return sorted((tmp_path / "cache").glob("*.b2nd"))


def test_files_by_preprocessing(files, tmp_path):
    lines = cache_report(tmp_path / "cache").splitlines()
    assert len(files) == 6
    assert len(lines) == 2
    assert all(line.startswith("3 volumes, 0.00 GiB, preprocessing ") for line in lines)


def test_damaged_files_are_found_and_removed(files, tmp_path):
    content = bytearray(files[2].read_bytes())
    content[len(content) // 2] ^= 4
    files[2].write_bytes(content)
    files[4].write_bytes(b"")
    report = cache_report(tmp_path / "cache", verify=True)
    assert f"removed, since damaged: {files[2]}" in report
    assert "4 of 6 volumes are as they were written." in report
    assert [file.exists() for file in files] == [True, True, False, True, False, True]
    assert "4 of 4" in cache_report(tmp_path / "cache", verify=True)


def test_what_is_no_cache(tmp_path):
    with pytest.raises(ValueError, match="holds no cached volumes"):
        cache_report(tmp_path)


def test_a_cache_is_filled_in_shards(tmp_path, monkeypatch, capsys):
    """In any order, and what is there is left alone."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for number in range(5):
        voxels = np.random.default_rng(number).normal(size=(20, 20, 20)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2, 2, 2, 1])), scans / f"{number}.nii")
    times = []
    for shard in ("1/2", "0/2", "0/1"):
        monkeypatch.setattr(
            "sys.argv", ["pgl", "cache", str(scans), str(out), "--spacing", "[4, 4, 4]", "--shard", shard]
        )
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        times.append({file.name: file.stat().st_mtime_ns for file in out.glob("*.b2nd")})
    assert [len(each) for each in times] == [2, 5, 5]
    assert times[2] == {**times[1], **times[0]}
    said = capsys.readouterr().out
    assert [f"{good} of {good} volumes are cached in {out}." in said for good in (2, 3, 5)] == [True] * 3
    assert (out / "plan.yaml").is_file()
