"""The simulation of verdicts on made-up scores, with few draws."""

import importlib.util

import numpy as np
import pytest
from programs import ROOT

from pgl_ext.files import write_csv


@pytest.fixture
def simulation(monkeypatch):
    spec = importlib.util.spec_from_file_location("verdict_simulation", ROOT / "benchmarks" / "verdict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DRAWS", 40)
    return module


def write_scores(path, seeds: int, of_seeds: float = 0.002) -> None:
    """Dice of two organs; the second lacks in one case."""
    rng = np.random.default_rng(0)
    rows = [
        {"seed": seed, "case": f"case_{case}", "organ": organ, "dice": 0.8 + shift + 0.01 * case + rng.normal(0, 0.004)}
        for seed, shift in enumerate(rng.normal(0, of_seeds, seeds))
        for case in range(6)
        for organ in ("anterior", "posterior")
        if (case, organ) != (2, "posterior")
    ]
    write_csv(path, rows)


def test_table(simulation, tmp_path, monkeypatch, capsys):
    write_scores(tmp_path / "scores.csv", 10)
    monkeypatch.setattr("sys.argv", ["verdict.py", str(tmp_path / "scores.csv")])
    simulation.main()
    head, _, names, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("scores.csv: 10 seeds, 6 cases, mean Dice 0.8")
    assert names.split() == ["seeds", "of", "each", "cases", "equal", "+0.01", "+0.02", "+0.04"]
    shares = {line[:30].rstrip(): [float(cell) for cell in line.split()[-4:]] for line in lines}
    assert len(lines) == 5
    equal, *_, largest = shares[next(iter(shares))]
    assert equal < 25
    assert largest > 90


def test_groups_have_no_seed_in_common(simulation):
    scores = np.arange(10.0)[:, None] + np.zeros((10, 4))
    for first, second in simulation.draws(scores, 5, resampled=True):
        assert sorted([*first[:, 0], *second[:, 0]]) == list(range(10))


def test_scores_that_do_not_do(simulation, tmp_path):
    write_scores(tmp_path / "few.csv", 9)
    with pytest.raises(ValueError, match="has 9 seeds, two groups of 5 need 10"):
        simulation.read_scores(tmp_path / "few.csv")
    write_scores(tmp_path / "lacking.csv", 10)
    text = (tmp_path / "lacking.csv").read_text().splitlines()
    (tmp_path / "lacking.csv").write_text("\n".join(text[:-2]) + "\n")
    with pytest.raises(ValueError, match="does not have every case for every seed"):
        simulation.read_scores(tmp_path / "lacking.csv")
