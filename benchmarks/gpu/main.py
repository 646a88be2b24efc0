"""check | campaign: what run.sh starts."""

from __future__ import annotations

import sys
import traceback

import campaign
import check
from runner import save, say
from settings import CORES, PROJECT, TINY

STAGES = {"check": check.main, "campaign": campaign.main}


def main() -> None:
    stages = sys.argv[1:] or ["check"]
    say(f"{' '.join(stages)}: {PROJECT.name}, {CORES} cores, tiny {TINY}")
    failed = False
    for stage in stages:
        try:
            STAGES[stage]()
        except Exception as error:
            traceback.print_exc()
            say(f"STAGE {stage} FAILED: {type(error).__name__}: {error}")
            failed = True
        finally:
            save()
    say("end")
    sys.exit(failed)


if __name__ == "__main__":
    main()
