"""The method that the documentation writes from scratch trains as it stands."""

import re

import pytest
import torch
from programs import CONFIGS, run, training_arguments

from pgl_ext.tools.phantom import write_dataset

README = CONFIGS / "methods" / "README.md"


def code_block(language: str) -> tuple[str, str]:
    """Name, from its first line, and text of the only block in a language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.S)
    return re.match(r"# (\S+)", text)[1], text


def test_every_overlay_is_in_the_table():
    named = set(re.findall(r"\| `(\w+\.yaml)` \|", README.read_text()))
    assert named == {path.name for path in (CONFIGS / "methods").glob("*.yaml")}


@pytest.mark.slow
def test_the_example_trains(tmp_path):
    for language in ("python", "yaml"):
        name, text = code_block(language)
        (tmp_path / name).write_text(text)
    data = write_dataset(tmp_path / "data", 3, shape=(64, 64, 32))
    settings = {"data_list_file_path": data, "output_dir": tmp_path / "out", "max_epochs": 1}
    # Its working directory is on the Python path, as in the README.
    finished = run(training_arguments(str(tmp_path / "simsiam.yaml"), **settings), tmp_path)
    assert finished.returncode == 0, finished.stdout
    state = torch.load(tmp_path / "out" / "models" / "pgl_encoder.pt", weights_only=True)
    assert all(key.startswith("encoder.") for key in state)
