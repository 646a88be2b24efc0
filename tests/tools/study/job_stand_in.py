"""A job of a study whose commands are stood in for: python job_stand_in.py FILE OUT RUN"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

if __name__ == "__main__":
    from made_studies import make_fast

    from pgl_ext.tools.study.run import run_one

    with pytest.MonkeyPatch.context() as monkeypatch:
        make_fast(monkeypatch)
        print(run_one(*sys.argv[1:]))
