"""MONAI's own ``--tracking mlflow`` with both trainings as they are."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from programs import fine_tuning_arguments, run, training_arguments

from pgl_ext.tools.phantom import write_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return Path(write_dataset(tmp_path_factory.mktemp("phantoms") / "data", 4, shape=(64, 64, 32)))


@pytest.mark.parametrize("store", ["given.db", None], ids=["in a given store", "in the output folder"])
@pytest.mark.parametrize("arguments", [training_arguments, fine_tuning_arguments])
def test_mlflow_has_the_loss_of_every_step(data, tmp_path, monkeypatch, arguments, store):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'pgl-ext[tracking]'")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # it would outdo --tracking_uri
    path = tmp_path / (store or "out/mlruns.db")
    settings = {"tracking": "mlflow", **({"tracking_uri": f"sqlite:///{path}"} if store else {})}
    done = run(arguments(data_list_file_path=data, output_dir=tmp_path / "out", max_epochs=2, **settings), tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]

    client = mlflow.MlflowClient(f"sqlite:///{path}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments)
    assert found.info.status == "FINISHED"
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    history = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "train_loss")}
    assert history == pytest.approx(losses, rel=1e-5)
    validated = [name for name in rows[0] if name.startswith("val_") and any(row[name] for row in rows)]
    assert set(validated) <= found.data.metrics.keys()
    assert all(math.isfinite(found.data.metrics[name]) for name in validated)
