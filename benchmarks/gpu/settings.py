"""Settings of the GPU runs, from environment variables; TINY=1 is a miniature for a CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

TINY = os.environ.get("TINY") == "1"


def setting(name: str, default: Any, tiny: Any = None) -> Any:
    """An environment variable as the default's type; without it the default, or the miniature's."""
    value = os.environ.get(name)
    if value is None:
        return tiny if TINY and tiny is not None else default
    return type(default)(value)


T0 = float(os.environ["T0"])
PROJECT, OUT, WORK = (Path(os.environ[name]) for name in ("PROJECT", "OUT", "WORK"))
KIT = Path(__file__).parent
LOGS = WORK / "logs"
DATA = WORK / "data"
PY = os.environ["PY"]
CORES = os.cpu_count() or 1
BUDGET = setting("BUDGET", 530)  # seconds of the campaign, from the start of the script
PRETRAIN, SEGMENT = "bundles/pgl_pretrain/configs", "bundles/pgl_segmentation/configs"
AMP = setting("AMP", "auto")  # bfloat16, float16, or what the benchmark found faster

# Pre-training.
SPACING = setting("SPACING", "[2,2,3]", "[8,8,6]")  # mm
VIEW = setting("VIEW", "[96,96,16]", "[48,48,32]")  # voxels
PRE_SECONDS = setting("PRE_SECONDS", 150, 8)  # of steps, without start-up
PRE_BATCH = setting("PRE_BATCH", 128, 16)
PRE_MICRO = setting("PRE_MICRO", 64, 8)
PRE_PATCHES = setting("PRE_PATCHES", 16, 4)  # with 160 training scans and a batch of 128: 20 equal steps per epoch
PRE_LR = setting("PRE_LR", "1.0")
PRE_MOMENTUM = setting("PRE_MOMENTUM", "0.99")
PRE_VALIDATION = setting("PRE_VALIDATION", "0.03", "0.2")
PRE_WORKERS = setting("PRE_WORKERS", max(1, min(12, CORES - 3)), 0)
PRE_EXTRA = setting("PRE_EXTRA", "").split()  # further arguments of the command, such as "--compile true"
METHODS = setting("METHODS", "PGL").split(",")  # PGL, or names of configs/methods, one after another

# Fine-tuning.
PATCH = setting("PATCH", "[128,96,48]", "[48,48,32]")  # voxels
FT_SECONDS = setting("FT_SECONDS", 190, 10)  # for all fine-tunings together
FT_JOBS = setting("FT_JOBS", 6, 2)  # at a time
FT_BATCH = setting("FT_BATCH", 8, 4)
FT_LR = setting("FT_LR", "0.05", "0.2")
FT_VALIDATIONS = setting("FT_VALIDATIONS", 4, 2)
FT_WORKERS = setting("FT_WORKERS", 2, 0)
FT_EXTRA = setting("FT_EXTRA", "").split()
RUNS = setting("RUNS", "3:0 7:0 70:0", "3:0").split()  # labelled cases : seed, the most important first
EVAL_SECONDS = setting("EVAL_SECONDS", 75, 200)  # kept for the evaluations and the end


def configs(folder: str, *names: str) -> str:
    """The argument of ``--config_file``: ``train.json`` of a bundle with overlays, and the small preset if tiny."""
    files = ["train.json", *names, *(["small.yaml"] if TINY else [])]
    return "[" + ",".join(f"'{folder}/{name}'" for name in files) + "]"


def limit(seconds: float, tiny: float) -> float:
    """A time limit, which a miniature on a CPU does not share."""
    return tiny if TINY else seconds
