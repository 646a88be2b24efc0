"""Which probe predicts fine-tuning? Rank correlation of probes' Dice with fine-tuned Dice over the methods of a study.

Every protocol (levels, standardisation, batch norm, strength) is run on the encoder of every finished fine-tuning of a
study, on its labelled cases, and scored on its test cases, on the preprocessed grid. Results are added to probes.csv in
the folder of the study, and what is there is not computed again. Entries of the study file are overridden as there.

    python benchmarks/probes.py studies/openkbp_small.yaml RUNS
    python benchmarks/probes.py studies/openkbp_small.yaml RUNS --step 192      # of the same probes
"""

from __future__ import annotations

import copy
import csv
import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
import torch
import yaml
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from scipy.stats import spearmanr
from torch import nn

from pgl_ext.data.dataset import CaseDataset
from pgl_ext.figures.curves import MetricsFile
from pgl_ext.evaluation.probes import fit_probe
from pgl_ext.evaluation.probes.features import re_estimate_batch_norm
from pgl_ext.tools.study.cells import Cell, labels_text
from pgl_ext.tools.study.configs import merged_config
from pgl_ext.tools.study.plan import read_study
from pgl_ext.tools.study.run import choose_rates
from pgl_ext.evaluation.summary import table
from pgl_ext.task import SegmentationTask

PROBE = str(Path(__file__).resolve().parents[1] / "bundles" / "pgl_segmentation" / "configs" / "probe.yaml")


class Protocol(NamedTuple):
    """Settings of a linear probe, as :func:`pgl_ext.evaluation.probes.fit_probe` describes them."""

    batch_norm: str
    levels: str
    standardisation: str
    strength: str


class RememberingEncoder(nn.Module):
    """An encoder that keeps the feature maps of volumes that it has seen; these must stay where they are in memory."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.strides = encoder.strides
        self._maps: dict[int, list[torch.Tensor]] = {}

    @torch.no_grad()
    def forward(self, volume: torch.Tensor) -> list[torch.Tensor]:
        if volume.data_ptr() not in self._maps:
            self._maps[volume.data_ptr()] = self.encoder(volume)
        return self._maps[volume.data_ptr()]


def probing_config(cell: Cell) -> ConfigParser:
    """The config of a fine-tuning, with the sections of the probe and the study's test cases."""
    training, evaluation = cell.stages
    evaluating = merged_config(evaluation.layers)
    tests = {f"test_{name}": evaluating[name] for name in ("data_list_file_path", "data_list_key")}
    return merged_config(
        (*training.layers, PROBE, {**tests, "evaluation#cases#dataset_dir": evaluating["dataset_dir"]})
    )


def test_cases(config: ConfigParser) -> list[dict[str, Any]]:
    """The test cases, prepared as the labelled ones are."""
    parts = {name: config.get_parsed_content(name) for name in ("cache", "task")}
    data = [{**case} for case in config.get_parsed_content("evaluation#cases")]
    for case in data:
        del case["name"]
    return list(
        CaseDataset(data, transform=config.get_parsed_content("validate#preprocessing"), memory_limit_gib=0, **parts)
    )


def mean_dice(probe: nn.Module, cases: Sequence[Mapping[str, Any]], task: SegmentationTask) -> float:
    means = []
    for case in cases:
        masks, reference = task.masks(probe(case["image"][None]))[0], task.masks_of_labels(case["label"])
        sizes = masks.flatten(1).sum(1) + reference.flatten(1).sum(1)
        dice = 2 * (masks & reference).flatten(1).sum(1) / sizes  # NaN of an organ that neither has
        means.append(float(dice[case["annotated"] if "annotated" in case else slice(None)].nanmean()))
    return float(np.nanmean(means))


def measure(cell: Cell, protocols: Collection[Protocol]) -> Iterator[dict[str, Any]]:
    """Rows of probes.csv."""
    config = probing_config(cell)
    set_determinism(cell.seed)  # of the random weights, as in fine-tuning
    original = config.get_parsed_content("network").encoder.eval()
    task, labelled = config.get_parsed_content("task"), list(config.get_parsed_content("labelled"))
    test = test_cases(config)
    for batch_norm, some in itertools.groupby(sorted(protocols), key=lambda protocol: protocol.batch_norm):
        encoder = copy.deepcopy(original)
        if batch_norm == "re-estimated":
            re_estimate_batch_norm(encoder, (case["image"][None] for case in labelled))
        remembering = RememberingEncoder(encoder)
        for protocol in some:
            start = time.process_time()
            probe = fit_probe(
                remembering,
                labelled,
                task,
                levels=[int(level) for level in protocol.levels],
                standardisation=protocol.standardisation,
                strength=protocol.strength if protocol.strength == "chosen" else float(protocol.strength),
                seed=cell.seed,
            )
            row = {"cell": cell.name, **protocol._asdict(), "dice": mean_dice(probe, test, task)}
            yield {**row, "seconds": round(time.process_time() - start, 2)}


def add_rows(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, ("cell", *Protocol._fields, "dice", "seconds"))
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()


def read_rows(path: Path) -> dict[Protocol, dict[str, float]]:
    """Dice by protocol and cell."""
    found: dict[Protocol, dict[str, float]] = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(Protocol(*(row[name] for name in Protocol._fields)), {})[row["cell"]] = float(
                    row["dice"]
                )
    return found


def by_method(cells: Sequence[Cell], dice: Mapping[str, float]) -> dict[str, float]:
    """Means over seeds."""
    methods = dict.fromkeys(cell.method for cell in cells)
    return {name: float(np.mean([dice[cell.name] for cell in cells if cell.method == name])) for name in methods}


def agreement(cells: Sequence[Cell], tuned: Mapping[str, float], probed: Mapping[str, float]) -> list[str]:
    """How well a probe ranks the methods.

    Returns:
        Spearman's correlation of the means over seeds; the mean of those of each seed; and what would be lost
        by taking the method that the probe puts first instead of the best one, in fine-tuned Dice.
    """
    seeds = {cell.seed for cell in cells}
    within = []
    for seed in seeds:
        names = [cell.name for cell in cells if cell.seed == seed]
        within.append(spearmanr([tuned[name] for name in names], [probed[name] for name in names]).statistic)
    best, guess = by_method(cells, tuned), by_method(cells, probed)
    overall = spearmanr(list(best.values()), list(guess.values())).statistic
    lost = max(best.values()) - best[max(guess, key=guess.__getitem__)]
    return [f"{overall:.2f}", f"{np.mean(within):.2f}", f"{lost:.3f}"]


def tuned_dice(cell: Cell, step: int | None) -> float:
    """Dice of the test cases in the end, or of the validation cases after so many steps."""
    if step is None:
        return cell.result()["mean_dice"]
    dice = dict(zip(*MetricsFile(cell.folder / "metrics.csv")("val_mean_dice"), strict=True))
    if step not in dice:
        raise ValueError(f"{cell} was not validated after step {step}, but after {list(map(int, dice))}.")
    return float(dice[step])


def report(cells: Sequence[Cell], probes: Mapping[Protocol, Mapping[str, float]], step: int | None) -> str:
    """Tables per number of labels: fine-tuned Dice by method, and the protocols with their agreement."""
    parts = []
    for labels in sorted({cell.labels for cell in cells}):
        some = [cell for cell in cells if cell.labels == labels]
        # Only seeds that all methods have: others would compare methods by different cases.
        methods = {cell.method for cell in some}
        some = [cell for cell in some if {other.method for other in some if other.seed == cell.seed} == methods]
        if len(methods) < 3 or not some:
            continue
        tuned = {cell.name: tuned_dice(cell, step) for cell in some}
        rows = [["fine-tuned", "", "", "", *(f"{value:.3f}" for value in by_method(some, tuned).values())]]
        for protocol, dice in probes.items():
            if all(cell.name in dice for cell in some):
                means = (f"{value:.3f}" for value in by_method(some, dice).values())
                rows.append([" ".join(protocol), *agreement(some, tuned, dice), *means])
        head = ["protocol", "rho", "within seeds", "lost Dice", *by_method(some, tuned)]
        parts.append(f"{labels_text(labels)}, {len(some)} fine-tunings; mean Dice by method\n{table(head, rows)}")
    return "\n\n".join(parts) or "Nothing to compare: no seed is finished of three methods."


def main(
    study: str,
    out: str,
    levels: Sequence[str] = ("01234", "012", "234", "34", "4"),
    standardisations: Sequence[str] = ("case", "dataset"),
    batch_norms: Sequence[str] = ("stored", "re-estimated"),
    strengths: Sequence[str] = ("0.01",),
    step: int | None = None,
    **overrides: object,
) -> None:
    """Probe what is finished of a study.

    Args:
        study: study file.
        out: folder of the study.
        levels: each the indices of feature maps, 0 the finest.
        standardisations: case or dataset.
        batch_norms: stored or re-estimated.
        strengths: l2, or chosen.
        step: predict the Dice of fine-tuning's validation cases after this step, not that of test cases in the end.
    """
    values = {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in overrides.items()}
    planned = read_study(study, out, overrides=values)
    rates, _ = choose_rates(planned)
    cells = [cell for cell in planned.cells(rates) if cell.is_finished and cell.labels]
    protocols = [
        Protocol(*map(str, parts)) for parts in itertools.product(batch_norms, levels, standardisations, strengths)
    ]
    path = Path(out) / "probes.csv"
    for cell in cells:
        done = read_rows(path)
        missing = [protocol for protocol in protocols if cell.name not in done.get(protocol, {})]
        if missing:
            add_rows(path, measure(cell, missing))
            print(cell, flush=True)
    print(report(cells, read_rows(path), step))


if __name__ == "__main__":
    fire.Fire(main)
