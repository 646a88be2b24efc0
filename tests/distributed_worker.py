"""Started by torchrun in tests: trains through a bundle, then writes what this process saw and got."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigWorkflow

from pgl_ext.data.dataset import VolumeDataset
from pgl_ext.engines import StepTrainer


def main() -> None:
    arguments = json.loads(Path(sys.argv[1]).read_text())
    seen: list[tuple[int, int]] = []
    read = VolumeDataset.__getitem__

    def record(self: VolumeDataset, key: tuple[int, int] | int) -> dict:
        if isinstance(key, tuple):
            seen.append(key)
        return read(self, key)

    VolumeDataset.__getitem__ = record
    parts: list[tuple[int, int]] = []
    number_of_parts = StepTrainer._number_of_parts

    def record_parts(self: StepTrainer, size: int) -> int:
        parts.append((size, number_of_parts(self, size)))
        return parts[-1][1]

    StepTrainer._number_of_parts = record_parts
    workflow = ConfigWorkflow(workflow_type="train", **arguments)
    workflow.initialize()
    workflow.run()
    network = workflow.parser.get_parsed_content("network_def")
    folder = Path(arguments["output_dir"])
    rank = os.environ["RANK"]
    result = {"state": network.state_dict(), "seen": seen, "parts": parts}
    if "train#best_model" in workflow.parser:
        result["best_model"] = workflow.parser.get_parsed_content("train#best_model").state_dict()
    torch.save(result, folder.parent / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
