"""How fast this is beside what one would use instead, nnU-Net and stock MONAI, on a CPU.

    python -m venv NNUNET
    NNUNET/bin/python -m pip install torch==2.13.0
    NNUNET/bin/python -m pip install nnunetv2==2.8.1
    python benchmarks/peers.py FOLDER --nnunet NNUNET/bin/python [--monai PYTHON] [--rows training views] [--quick]

FOLDER is a Decathlon-style folder: ``dataset.json`` with ``training`` cases of one channel in ``.nii.gz`` files.
Without ``--nnunet`` it is left out. Each side of each row is a process of its own, with one thread, in the environment
of that side, see ``peer_sides.py``; network, patch and data are the same. The sides take turns; the first of each does
not count. The table has the median of the turns, per second of processor time and of the clock, and the largest memory
of the process, with its libraries. Ratios are those of the times of one round: how many times faster this is, as median
(smallest to largest of the rounds). Below 1 it is slower.

- ``training``: steps of fine-tuning, from the drawing of patches to the optimiser, each with its own loader,
  augmentation and loss, in one process: the segmentation bundle's ``train.json`` with MONAI's ``DynUNet``; nnU-Net's
  trainer with a ``PlainConvUNet`` of the same channels and strides; MONAI's ``SupervisedTrainer`` with ``CacheDataset``
  and ``DynUNet``. In the precision that each takes by itself; where that is not float32 for all, in float32 too.
- ``inference``: sliding windows with an overlap of one half, Gaussian weights and no mirroring over a volume in memory
  of two patches along each axis: the bundle's inferer, ``nnUNetPredictor``, ``SlidingWindowInferer``.
- ``views``: two views of a volume, cropped, resized and flipped, of volumes that were prepared before: the loader of
  the pre-training bundle, and ``CacheDataset`` with ``RandSpatialCropd``, ``Resized`` and ``RandFlipd``, whose views
  need not overlap.
- ``cold``, ``resampled``: preparing cases with label maps, read, checked and written to a cache, as they are stored and
  resampled to ``--spacing``: the bundle's cache, and the preprocessing of nnU-Net's default plan, which resamples scans
  with cubic splines and not linearly. Neither starts processes here, as ``nnUNetv2_preprocess`` would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SIDES = Path(__file__).with_name("peer_sides.py")
NAMES = {"ours": "this", "nnunet": "nnU-Net", "monai": "stock MONAI"}
ROWS = {
    "training": ("steps of fine-tuning", ("ours", "nnunet", "monai")),
    "training, float32": ("steps of fine-tuning in float32", ("ours", "nnunet", "monai")),
    "inference": ("volumes segmented", ("ours", "nnunet", "monai")),
    "views": ("pairs of views", ("ours", "monai")),
    "cold": ("cases prepared", ("ours", "nnunet")),
    "resampled": ("cases resampled and prepared", ("ours", "nnunet")),
}
QUICK = {"cases": 4, "repeats": 2, "steps": 1, "pairs": 16, "filters": [4, 8, 8, 8], "patch": [16, 16, 16]}


class Side:
    """A process that works when it is told to, and says what each turn took.

    Args:
        command: that starts it.
        environment: its environment.
        log: where all that it prints goes.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=errors, text=True)

    def turn(self) -> dict:
        """CPU and clock seconds for one unit of work, the peak memory so far in GiB, and the precision."""
        with contextlib.suppress(BrokenPipeError):
            print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self.process.args)} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(row: str, commands: Mapping[str, Sequence[str]], environment: Mapping, folder: Path, repeats: int) -> dict:
    """Turns of each side of a row, by side, in the order of the rounds."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, command in commands.items():
            sides[name] = Side([*command, row], environment, folder / f"{row}_{name}.log")
            stack.callback(sides[name].end)
            sides[name].turn()
        rounds = [{name: side.turn() for name, side in sides.items()} for _ in range(repeats)]
    return {name: [turns[name] for turns in rounds] for name in sides}


def table_rows(title: str, measured: Mapping[str, Sequence[Mapping]]) -> Iterator[str]:
    """Lines of the table: speed and memory of each side, and how many times faster the first is than the others."""
    first, *_ = measured
    for name, turns in measured.items():
        cells = [title if name == first else "", " ".join([NAMES[name], turns[0]["precision"]]).rstrip()]
        cells += [f"{1 / statistics.median(turn[clock] for turn in turns):.3g}" for clock in ("cpu", "wall")]
        cells.append(f"{turns[-1]['peak']:.2f}")
        for clock in ("cpu", "wall"):
            ratios = [turn[clock] / own[clock] for turn, own in zip(turns, measured[first], strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells.append("" if name == first else spread)
        yield f"| {' | '.join(cells)} |"


def cases(folder: Path, count: int) -> dict:
    """The data list of the folder with its first cases, paths made absolute."""
    data = json.loads((folder / "dataset.json").read_text())
    chosen = data["training"][:count]
    if len(chosen) < count:
        raise SystemExit(f"{folder}/dataset.json has {len(chosen)} cases for training, fewer than --cases {count}.")
    training = [{key: str((folder / case[key]).resolve()) for key in ("image", "label")} for case in chosen]
    return {**data, "training": training, "test": []}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nnunet", help="Python of an environment with nnunetv2")
    parser.add_argument("--monai", default=sys.executable, help="Python of an environment with it; default: this one")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="turns that count")
    parser.add_argument("--steps", type=int, default=5, help="of training in a turn")
    parser.add_argument("--pairs", type=int, default=256, help="of views in a turn")
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 56, 40], help="voxels along x, y, z")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--filters", type=int, nargs="+", default=[8, 16, 32, 64], help="channels of each level")
    parser.add_argument("--view", type=int, nargs=3, default=[24, 32, 24], help="voxels of a view along x, y, z")
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 0.8], help="mm, of the row resampled")
    parser.add_argument("--quick", action="store_true", help="a smoke test, whose numbers mean nothing")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    pythons = {"ours": sys.executable, "nnunet": args.nnunet, "monai": args.monai}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "dataset.json").write_text(json.dumps(cases(args.folder, args.cases)))
        (work / "settings.json").write_text(json.dumps({**vars(args), "folder": work}, default=str))
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
        threads = dict.fromkeys(names, "1")
        # nnU-Net's: one process for data and training, no compilation.
        folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
        environment = {**os.environ, **threads, **folders, "nnUNet_compile": "f", "CUDA_VISIBLE_DEVICES": ""}
        commands = {
            name: [python, str(SIDES), str(work / "settings.json"), name] for name, python in pythons.items() if python
        }
        if args.nnunet:
            with (work / "plan.log").open("w") as log:
                subprocess.run([*commands["nnunet"], "plan"], env=environment, stdout=log, stderr=log, check=True)
        print("| | | per CPU second | per second | peak, GiB | this is faster, CPU time | by the clock |")
        print("|---|---|---|---|---|---|---|")
        precisions: set[str] = set()
        for row in args.rows:
            title, names = ROWS[row]
            if row == "training, float32" and precisions == {"float32"}:
                continue
            chosen = {name: commands[name] for name in names if name in commands}
            measured = measure(row, chosen, environment, work, args.repeats)
            print("\n".join(table_rows(title, measured)), flush=True)
            if row == "training":
                precisions = {turns[0]["precision"] for turns in measured.values()}


if __name__ == "__main__":
    main()
