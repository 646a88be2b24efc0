"""Command line: ``python -m pgl_ext COMMAND``."""

from __future__ import annotations

import sys

import fire


def phantom(out: str, cases: int = 12, seed: int = 0, test_cases: int = 0) -> str:
    """Generate phantom torso CTs with label maps and a Decathlon-style dataset.json.

    Args:
        out: folder to write.
        cases: number of training cases.
        seed: the same seed gives the same cases.
        test_cases: number of further cases listed as test.
    """
    from pgl_ext.data.phantom import write_dataset

    return str(write_dataset(out, cases, seed=seed, test_cases=test_cases))


def export_encoder(checkpoint: str, out: str, layout: str = "pgl") -> str:
    """Write the encoder of a training checkpoint to a file of its own, with its description beside it.

    Args:
        checkpoint: file written during pre-training.
        out: file to write, ending in .pt.
        layout: pgl (keys encoder.*) or monai_resnet (stock MONAI keys).
    """
    from pgl_ext.weights import export_encoder as export

    return str(export(checkpoint, out, layout))


def main() -> None:
    try:
        fire.Fire({"phantom": phantom, "export_encoder": export_encoder}, name="pgl_ext")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
