"""A study from its file to its report."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from pgl_ext.files import write_csv
from pgl_ext.tools.study.cells import Cell
from pgl_ext.tools.study.fingerprint import check_cells, code_digests, fingerprint
from pgl_ext.tools.study.plan import Study, read_study
from pgl_ext.tools.study.report import draw_figures, write_study_report
from pgl_ext.tools.study.results import comparison_rows, read_results
from pgl_ext.tools.study.runner import Runner, default_jobs, time_left
from pgl_ext.tools.study.tables import verdicts, write_tables

__all__ = ["choose_rates", "run_study"]


def run_study(
    file: str | os.PathLike,
    out: str | os.PathLike,
    bundles: str | os.PathLike | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> str:
    """Run what is not finished of a study, and write its tables, pictures and report.

    Args:
        file: study file; see :func:`pgl_ext.tools.study.study_file.read_study_file`.
        out: folder of the study.
        bundles: folder of the two bundles.
        jobs: cells at a time; by default one on each GPU, or one.
        dry_run: only say which cells there are, which are finished, and how long the others will take.
        overrides: of entries of the study file.

    Returns:
        In words, what was found.

    Raises:
        ChildProcessError: cells failed; the message says which and why. The tables cover the others.
        ValueError: the study cannot be run as it is written, or cells are of another version of code or settings.
    """
    study = read_study(file, out, bundles, overrides)
    # By default it would end this process alone, and leave the commands running.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(study, default_jobs() if jobs is None else jobs, dry_run)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: Any) -> None:
    raise SystemExit(143)


def _run(study: Study, jobs: int, dry_run: bool) -> str:
    selection = _selection_cells(study)
    rates, learning_rates = choose_rates(study)
    cells = {cell.name: cell for cell in (*selection, *study.cells(rates))}.values()
    fingerprints = _checked_fingerprints(cells)
    if dry_run:
        return _plan_text(study, cells, jobs)
    failures = {}
    try:
        if selection:
            failures = Runner(selection, fingerprints, jobs).run()
            rates, learning_rates = choose_rates(study, failures)
            fingerprints = _checked_fingerprints(study.cells(rates))
        failures |= Runner(study.cells(rates), fingerprints, jobs).run()
    finally:  # what is finished can be read also where the study was stopped
        cells = study.cells(rates)
        text = _write_results(study, cells, selection, learning_rates, failures)
    if failures:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        total = len({cell.name for cell in (*selection, *cells)})
        raise ChildProcessError(f"{len(failures)} of {total} cells failed:\n{listed}\n{text}")
    return text


def _write_results(
    study: Study,
    cells: Sequence[Cell],
    selection: Sequence[Cell],
    learning_rates: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
) -> str:
    results = read_results(cells)
    if not results.scores:
        return "No fine-tuning is finished."
    results.missing += [cell for cell in selection if not cell.is_finished]
    rows = comparison_rows(study, results)
    (study.folder / "learning_rates.csv").unlink(missing_ok=True)
    if learning_rates:
        write_csv(study.folder / "learning_rates.csv", learning_rates)
    write_tables(study, results, rows)
    draw_figures(study, results, rows)
    report = write_study_report(study, results, rows, learning_rates, failures)
    return "\n".join([*verdicts(study, rows), f"Tables and pictures in {study.folder}, report: {report}"])


def _selection_cells(study: Study) -> list[Cell]:
    """What is to be run before learning rates can be chosen."""
    chosen_by = [cell for cells in study.selection().values() for cell in cells.values()]
    return [part for cell in chosen_by for part in (cell.pretraining, cell) if part is not None]


def choose_rates(study: Study, failed: Container[str] = frozenset()) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The rate of each method that has the best Dice of validation cases, of equal ones the smallest.

    Args:
        study: whose candidates may be finished or not.
        failed: names of cells; a rate that ends in one, since it is too large, is not chosen and not waited for.

    Returns:
        The rates by method, of those all of whose candidates are through; and rows that say how they were chosen.
    """
    rates, rows = {}, []
    for method, cells in study.selection().items():
        scores = {rate: cell.result()["val_mean_dice"] for rate, cell in cells.items() if cell.is_finished}
        if None in scores.values():
            raise ValueError(
                f"the learning rate of {method!r} cannot be chosen, since fine-tuning had no validation: set "
                "validation_fraction above 0 under fine_tuning: settings, or give the method an lr."
            )
        lost = [rate for rate, cell in cells.items() if cell.name in failed]
        if scores and len(scores) + len(lost) == len(cells):
            rates[method] = max(sorted(scores), key=scores.__getitem__)
        for rate, score in {**scores, **dict.fromkeys(lost, "failed")}.items():
            rows.append({"method": method, "lr": rate, "val_mean_dice": score, "chosen": rates.get(method) == rate})
    return rates, rows


def _checked_fingerprints(cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    code = code_digests()
    fingerprints = {cell.name: fingerprint(cell, code) for cell in cells}
    check_cells(cells, fingerprints)
    return fingerprints


def _plan_text(study: Study, cells: Collection[Cell], jobs: int) -> str:
    lines = []
    for cell in cells:
        state = tqdm.format_interval(cell.result()["seconds"]) if cell.is_finished else "to do"
        lines.append(f"  {state:>8}  {cell.name}")
    finished = sum(cell.is_finished for cell in cells)
    left = time_left(cells, jobs) or "not known before a pre-training and a fine-tuning are finished"
    rates, _ = choose_rates(study)
    undecided = [method for method in study.selection() if method not in rates]
    more = f"\nFurther cells follow once the learning rates of {', '.join(undecided)} are chosen." if undecided else ""
    lines.append(f"{finished} of {len(cells)} cells finished; time left with {jobs} at a time: {left}")
    return "\n".join(lines) + more
