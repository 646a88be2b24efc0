"""Files that are complete or absent, tables that survive a power cut, and folders that one run has at a time."""

import csv
import subprocess
import sys

import pytest

from pgl_ext.files import claim_folder, read_csv, write_atomically, write_csv, write_text

CLAIM = """
import os, sys
from pgl_ext.files import claim_folder
claim_folder(sys.argv[1])
print("has it", flush=True)
if os.fork() == 0:
    sys.stdin.read()  # goes on where the first was killed
sys.stdin.read()
"""


def test_a_folder_is_for_one_process_until_that_is_dead(tmp_path):
    """Its children, which may outlive it, do not count."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "has it\n"
    with pytest.raises(
        FileExistsError, match=rf"out is in use by another run \(process {process.pid} on .*--output_dir"
    ):
        claim_folder(tmp_path / "out")
    process.kill()
    process.wait()
    claim_folder(tmp_path / "out")
    claim_folder(tmp_path / "out")
    process.stdin.close()


def test_nothing_of_it_stays(tmp_path):
    code = "import sys; from pgl_ext.files import claim_folder; claim_folder(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_run_left_half_written_is_removed(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "cache").mkdir()
    left = [tmp_path / "tmp-1.json", tmp_path / "models" / "tmp-2.pt"]
    others = [tmp_path / "cache" / "tmp-3.b2nd", tmp_path / "models" / "model.pt", tmp_path / "tmp.txt"]
    for path in [*left, *others]:
        path.touch()
    claim_folder(tmp_path)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("end", ["\0" * 300, "3,0.", "3", "\0\0,"])
def test_a_table_that_was_cut_off(tmp_path, end):
    (tmp_path / "table.csv").write_bytes(f"step,loss,lr\n1,0.5,1\n2,0.4,1\n{end}".encode())
    assert [row["step"] for row in read_csv(tmp_path / "table.csv")] == ["1", "2"]


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\tx"])
def test_text_is_no_formula_of_a_spreadsheet(tmp_path, text):
    write_csv(tmp_path / "table.csv", [{"case": text, "dice": -0.5}])
    with open(tmp_path / "table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"case": f"'{text}", "dice": "-0.5"}


def test_what_cannot_be_written_names_the_folder_and_the_remedy(tmp_path, monkeypatch):
    """A full disk, as torch reports it too, and a folder that is none; what was there before stays."""
    path = tmp_path / "a" / "x.pt"
    write_text(path, "old")
    (tmp_path / "file").touch()

    def full(file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as torch.save does

    for save, place, reason in ((full, path, "No space left"), (bytes, tmp_path / "file" / "x.pt", "File exists")):
        with pytest.raises(OSError, match=rf"Cannot write {place}: {reason}.*Make room in {place.parent}.*--resume"):
            write_atomically(save, place)
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["x.pt"]
