"""Runs a study: reads its file, carries out what is not finished, and writes tables, pictures and report."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from pgl_ext.errors import few
from pgl_ext.tools.cluster import Cluster
from pgl_ext.tools.study.figures import draw_figures
from pgl_ext.tools.study.fingerprint import checked_fingerprints
from pgl_ext.tools.study.jobs import JobRunner
from pgl_ext.tools.study.plan import Study
from pgl_ext.tools.study.report import verdicts, write_study_report, write_tables
from pgl_ext.tools.study.results import Results
from pgl_ext.tools.study.runner import Runner, default_jobs, time_left
from pgl_ext.tools.study.runs import Rates, Run

__all__ = ["choose_rates", "planned_runs", "run_one", "run_study"]


def run_study(
    file: str | os.PathLike,
    out: str | os.PathLike,
    bundles: str | os.PathLike | None = None,
    jobs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    cluster: Cluster | None = None,
) -> tuple[str, Results]:
    """Run what is not finished of a study, and write its tables, pictures and report.

    Args:
        file: study file; see :func:`pgl_ext.tools.study.study_file.read_study_file`.
        out: folder of the study.
        bundles: folder of the two bundles.
        jobs: runs at a time; by default one on each GPU, or one.
        overrides: of entries of the study file.
        cluster: that each run is sent to as a job of its own; None: they are run here.

    Returns:
        In words, what was found, and the results that are there.

    Raises:
        ChildProcessError: runs failed; the message says which and why. The tables cover the others.
        ValueError: the study cannot be run as it is written, or runs are of another version of code or settings.
    """
    study = Study(file, out, bundles, overrides)
    # By default it would end this process alone, and leave the commands running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = default_jobs() if jobs is None and cluster is None else jobs

    def carry_out(runs: Sequence[Run], fingerprints: Mapping[str, Any]) -> dict[str, str]:
        if cluster is None:
            return Runner(runs, fingerprints, jobs).run()
        at_a_time = max(1, len(runs)) if jobs is None else jobs
        return JobRunner(runs, fingerprints, at_a_time, cluster, lambda run: _job(run, file, out, overrides)).run()

    try:
        return _run(study, carry_out)
    finally:
        signal.signal(signal.SIGTERM, before)


def _job(run: Run, file: str | os.PathLike, out: str | os.PathLike, overrides: Mapping[str, Any] | None) -> list[str]:
    """The command that a job of a run executes."""
    line = [sys.executable, "-m", "pgl_ext", "study", os.path.abspath(file), "--out", os.path.abspath(out)]
    for name, value in (overrides or {}).items():
        line += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return [*line, "--only", run.name]


def run_one(
    file: str | os.PathLike, out: str | os.PathLike, name: str, overrides: Mapping[str, Any] | None = None
) -> str:
    """Run one of a study's runs, and write no tables; see :func:`run_study`.

    Args:
        file, out, overrides: see there.
        name: of the run, its path in the study's folder; its pre-training has to be finished.

    Raises:
        ChildProcessError: the run failed.
        ValueError: the study has no such run.
    """
    study = Study(file, out, None, overrides)
    selection, rates, _ = _known_runs(study)
    runs = {run.name: run for run in (*selection, *study.runs(rates))}
    if name not in runs:
        raise ValueError(f"the study has no run {name!r}: its runs are {few(list(runs))}.")
    run = runs[name]
    failures = Runner([run], checked_fingerprints([run]), 1).run()
    if failures:
        raise ChildProcessError(f"{name} failed: {failures[name]}")
    return f"{run} is finished."


def _run(study: Study, carry_out: Callable[[Sequence[Run], Mapping[str, Any]], dict[str, str]]) -> tuple[str, Results]:
    selection, rates, tried = _known_runs(study)
    fingerprints = checked_fingerprints({run.name: run for run in (*selection, *study.runs(rates))}.values())
    failures: dict[str, str] = {}
    try:
        if selection:
            failures = carry_out(selection, fingerprints)
            rates, tried = choose_rates(study, failures)
            fingerprints = checked_fingerprints(study.runs(rates))
        failures |= carry_out(study.runs(rates), fingerprints)
    finally:  # what is finished can be read also where the study was stopped
        results = Results(study, study.runs(rates))
        results.missing += [run for run in selection if not run.is_finished]
        text = _write_results(results, tried, failures)
    if failures:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        total = len({run.name for run in (*selection, *study.runs(rates))})
        raise ChildProcessError(f"{len(failures)} of {total} runs failed:\n{listed}\n{text}")
    return text, results


def _known_runs(study: Study) -> tuple[list[Run], dict[str, Rates], list[dict[str, Any]]]:
    """The runs that rates are chosen by, and what :func:`choose_rates` finds already."""
    candidates = [run for runs in study.selection().values() for run in runs.values()]
    # Those of one pre-training share it.
    selection = {part.name: part for run in candidates for part in run.with_pretraining}
    return list(selection.values()), *choose_rates(study)


def _write_results(results: Results, tried: Sequence[Mapping[str, Any]], failures: Mapping[str, str]) -> str:
    if not results.scores:
        return "No fine-tuning is finished."
    write_tables(results, tried)
    draw_figures(results)
    report = write_study_report(results, tried, failures)
    return "\n".join([*verdicts(results), f"Tables and pictures in {results.study.folder}, report: {report}"])


def choose_rates(study: Study, failed: Container[str] = frozenset()) -> tuple[dict[str, Rates], list[dict[str, Any]]]:
    """The rates of each method that have the best Dice of validation cases, of equal ones the smallest.

    Args:
        study: whose candidates may be finished or not.
        failed: names of runs; rates that end in one, since they are too large, are not chosen and not waited for.

    Returns:
        The rates by method, of those all of whose candidates are through; and rows that say how they were chosen.

    Raises:
        ValueError: fine-tuning has no validation to choose by.
    """
    rates, rows = {}, []
    for method, runs in study.selection().items():
        scores = {one: run.result()["val_mean_dice"] for one, run in runs.items() if run.is_finished}
        if None in scores.values():
            raise ValueError(
                f"the learning rate of {method!r} cannot be chosen, since fine-tuning had no validation: set "
                "selection_validation_fraction above 0 under fine_tuning, or give the method an lr."
            )
        lost = [one for one, run in runs.items() if run.name in failed]
        if scores and len(scores) + len(lost) == len(runs):
            rates[method] = max(sorted(scores), key=scores.__getitem__)
        for one, score in {**scores, **dict.fromkeys(lost, "failed")}.items():
            tried = {"method": method, "lr": one.pretraining, "fine_tuning_lr": one.fine_tuning}
            rows.append({**tried, "val_mean_dice": score, "chosen": rates.get(method) == one})
    return rates, rows


def planned_runs(
    file: str | os.PathLike,
    out: str | os.PathLike,
    bundles: str | os.PathLike | None = None,
    jobs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> str:
    """Which runs there are, which are finished, and how long the others will take; see :func:`run_study`."""
    study = Study(file, out, bundles, overrides)
    jobs = default_jobs() if jobs is None else jobs
    selection, rates, _ = _known_runs(study)
    runs = {run.name: run for run in (*selection, *study.runs(rates))}.values()
    checked_fingerprints(runs)
    states = [tqdm.format_interval(run.result()["seconds"]) if run.is_finished else "to do" for run in runs]
    lines = [f"  {state:>8}  {run.name}" for state, run in zip(states, runs, strict=True)]
    finished = sum(run.is_finished for run in runs)
    left = time_left(runs, jobs) or "not known before a pre-training and a fine-tuning are finished"
    lines.append(f"{finished} of {len(runs)} runs finished; time left with {jobs} at a time: {left}")
    undecided = [method for method in study.selection() if method not in rates]
    if undecided:
        lines.append(f"Further runs follow once the learning rates of {', '.join(undecided)} are chosen.")
    return "\n".join(lines)
