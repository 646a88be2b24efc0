"""Which probe foretells fine-tuning? Rank correlation of probes' Dice with fine-tuned Dice over the methods of a study.

Every protocol (classifier, levels, standardisation, batch norm, strength) is run on the encoder of every finished
fine-tuning of a study, on its labelled cases, and scored on its test cases, on the preprocessed grid. Results are added
to probes.csv in the folder of the study, and what is there is not computed again.

    python benchmarks/probes.py STUDY --configs train.json tasks/openkbp.yaml small.yaml
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from scipy.stats import spearmanr
from torch import nn

from pgl_ext.data.case_dataset import CaseDataset
from pgl_ext.probes import fit_probe
from pgl_ext.probes.features import re_estimate_batch_norm
from pgl_ext.summary import table
from pgl_ext.task import SegmentationTask

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "pgl_segmentation" / "configs"
PROTOCOL = ("classifier", "levels", "standardisation", "batch_norm", "strength")
COLUMNS = ("cell", *PROTOCOL, "dice", "seconds")
Protocol = tuple[str, ...]


class Remembering(nn.Module):
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


def read_cell(folder: Path, configs: Iterable[str]) -> ConfigParser:
    """The config of a fine-tuning, with the probe's sections and the study's test cases."""
    config = ConfigParser(ConfigParser.load_config_files([str(BUNDLE / name) for name in (*configs, "probe.yaml")]))
    config.update(json.loads((folder / "training.json").read_text()))
    test = json.loads((folder / "evaluating.json").read_text())
    for name in ("data_list_file_path", "data_list_key"):
        if name in test:
            config[f"test_{name}"] = test[name]
    return config


def test_cases(config: ConfigParser) -> list[dict[str, Any]]:
    """The test cases as the labelled ones are prepared."""
    named = config.get_parsed_content("evaluation#cases")
    parts = {name: config.get_parsed_content(name) for name in ("cache", "task")}
    transform = config.get_parsed_content("validate#preprocessing")
    data = [{key: value for key, value in case.items() if key != "name"} for case in named]
    return list(CaseDataset(data, transform=transform, memory_limit_gib=0, **parts))


def mean_dice(probe: nn.Module, cases: Iterable[Mapping[str, Any]], task: SegmentationTask) -> float:
    means = []
    for case in cases:
        masks, reference = task.masks(probe(case["image"][None]))[0], task.masks_of_labels(case["label"])
        sizes = masks.flatten(1).sum(1) + reference.flatten(1).sum(1)
        dice = 2 * (masks & reference).flatten(1).sum(1) / sizes  # NaN of an organ that neither has
        means.append(float(dice[case["annotated"] if "annotated" in case else slice(None)].nanmean()))
    return float(np.nanmean(means))


def measure(config: ConfigParser, protocols: Iterable[Protocol]) -> Iterator[dict[str, Any]]:
    """Rows of probes.csv."""
    set_determinism(config["seed"])  # of the random weights, as in fine-tuning
    original = config.get_parsed_content("network").encoder.eval()
    task, labelled, test = (
        config.get_parsed_content("task"),
        list(config.get_parsed_content("labelled")),
        test_cases(config),
    )
    for batch_norm, some in itertools.groupby(sorted(protocols, key=lambda p: p[3]), key=lambda p: p[3]):
        encoder = copy.deepcopy(original)
        if batch_norm == "re-estimated":
            re_estimate_batch_norm(encoder, (case["image"][None] for case in labelled))
        encoder = Remembering(encoder)
        for protocol in some:
            start = time.process_time()
            settings = {
                "levels": [int(level) for level in protocol[1]],
                "standardisation": protocol[2],
                "strength": "chosen" if protocol[4] == "chosen" else float(protocol[4]),
                "seed": config["seed"],
            }
            dice = mean_dice(fit_probe(encoder, labelled, task, protocol[0], **settings), test, task)
            row = {**dict(zip(PROTOCOL, protocol, strict=True)), "dice": dice}
            yield {**row, "seconds": round(time.process_time() - start, 2)}


def add_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()


def read_rows(path: Path) -> dict[tuple[str, Protocol], float]:
    """Dice by cell and protocol."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {
            (row["cell"], tuple(row[name] for name in PROTOCOL)): float(row["dice"]) for row in csv.DictReader(file)
        }


# --- correlation ----------------------------------------------------------------------------------------------------


def agreement(fine_tuned: Mapping[str, float], probed: Mapping[str, float]) -> dict[str, float]:
    """How well probes rank the methods of cells METHOD/LABELS/SEED.

    Returns:
        ``rho``: Spearman's, of the means over those seeds that all methods have; ``within``: the mean of those of each
        seed; ``lost``: fine-tuned Dice of the best method less that of the one that the probes put first.
    """
    seeds: dict[str, dict[str, str]] = {}
    for cell in fine_tuned:
        method, _, seed = cell.split("/")
        seeds.setdefault(seed, {})[method] = cell
    methods = sorted({method for some in seeds.values() for method in some})
    common = [some for some in seeds.values() if len(some) == len(methods)] or [max(seeds.values(), key=len)]
    methods = sorted(common[0])
    tuned, guessed = (
        [np.mean([values[some[m]] for some in common]) for m in methods] for values in (fine_tuned, probed)
    )
    within = [
        spearmanr([fine_tuned[cell] for cell in some.values()], [probed[cell] for cell in some.values()]).statistic
        for some in seeds.values()
        if len(some) > 2
    ]
    rho = spearmanr(tuned, guessed).statistic if len(methods) > 2 else math.nan
    return {"rho": rho, "within": np.mean(within or [math.nan]), "lost": max(tuned) - tuned[int(np.argmax(guessed))]}


def report(
    fine_tuned: Mapping[str, float], dice: Mapping[tuple[str, Protocol], float], protocols: Sequence[Protocol]
) -> str:
    """Tables per number of labels: fine-tuned Dice by method, and the protocols with their agreement."""
    parts = []
    for labels in sorted({cell.split("/")[1] for cell in fine_tuned}):
        cells = {cell: value for cell, value in fine_tuned.items() if cell.split("/")[1] == labels}
        methods = sorted({cell.split("/")[0] for cell in cells})

        def by_method(values: Mapping[str, float], methods: Sequence[str] = methods) -> list[str]:
            return [f"{np.mean([v for cell, v in values.items() if cell.split('/')[0] == m]):.3f}" for m in methods]

        rows = [["fine-tuned", "", "", "", *by_method(cells)]]
        for protocol in protocols:
            probed = {cell: dice[cell, protocol] for cell in cells if (cell, protocol) in dice}
            if len(probed) == len(cells):
                found = [
                    f"{value:.2f}" if name != "lost" else f"{value:.3f}"
                    for name, value in agreement(cells, probed).items()
                ]
                rows.append([" ".join(protocol), *found, *by_method(probed)])
        head = ["protocol", "rho", "within seeds", "lost Dice", *methods]
        parts.append(f"{labels}, {len(cells)} fine-tunings; mean Dice by method\n{table(head, rows)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("--configs", nargs="+", default=["train.json", "tasks/openkbp.yaml", "small.yaml"])
    parser.add_argument("--cells", default="*/*/seed_*", help="which of the fine-tunings: METHOD/LABELS/seed_SEED")
    parser.add_argument("--classifiers", nargs="+", default=["linear"])
    parser.add_argument("--levels", nargs="+", default=["01234", "012", "234", "34", "4"])
    parser.add_argument("--standardisations", nargs="+", default=["case", "dataset"])
    parser.add_argument("--batch_norms", nargs="+", default=["stored", "re-estimated"])
    parser.add_argument("--strengths", nargs="+", default=["0.01", "chosen"], help="l2 or k, or chosen")
    arguments = parser.parse_args()
    names = ("classifiers", "levels", "standardisations", "batch_norms", "strengths")
    protocols = list(itertools.product(*(getattr(arguments, name) for name in names)))
    folders = [path.parent for path in sorted((arguments.study / "fine_tuning").glob(f"{arguments.cells}/cell.json"))]
    if not folders:
        raise SystemExit(f"{arguments.study / 'fine_tuning'} holds no finished cell {arguments.cells}.")
    fine_tuned = {"/".join(f.parts[-3:]): json.loads((f / "cell.json").read_text())["mean_dice"] for f in folders}
    path = arguments.study / "probes.csv"
    for folder, cell in zip(folders, fine_tuned, strict=True):
        done = read_rows(path)
        missing = [protocol for protocol in protocols if (cell, protocol) not in done]
        if missing:
            add_rows(path, ({"cell": cell, **row} for row in measure(read_cell(folder, arguments.configs), missing)))
            print(cell, flush=True)
    print(report(fine_tuned, read_rows(path), protocols))


if __name__ == "__main__":
    main()
