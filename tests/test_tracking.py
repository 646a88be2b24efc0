"""Runs of both bundles as an MLflow server has them in the end."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import socket
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler
from programs import SEGMENTATION_CONFIGS, fine_tuning_arguments, run, start, training_arguments, wait_for

from pgl_ext.tools.phantom import write_dataset
from pgl_ext.tracking import complete_mlflow


class RecordingClient:
    """Keeps what it is told, and as a server does, takes each parameter once."""

    def __init__(self) -> None:
        self.params: dict = {}
        self.metrics: dict = defaultdict(list)
        self.files: list[str] = []

    def get_run(self, run_id):
        return SimpleNamespace(data=SimpleNamespace(params=self.params))

    def log_param(self, run_id, name, value):
        assert name not in self.params
        self.params[name] = str(value)

    def log_metric(self, run_id, name, value, step):
        self.metrics[name].append((step, value))

    def log_artifact(self, run_id, path):
        self.files.append(Path(path).name)


class OfflineHandler(MLFlowHandler):
    """MONAI's handler with a client that needs no server."""

    def __init__(self, client: RecordingClient, artifacts: tuple) -> None:
        self.client = client
        self.iteration_log = self.close_on_complete = False
        self.epoch_log = True
        self.epoch_logger = None
        self.artifacts = artifacts
        self.cur_run = None

    def start(self, engine):
        self.cur_run = SimpleNamespace(info=SimpleNamespace(run_id="run"))


@pytest.fixture
def train(tmp_path):
    """Runs three epochs, with validation before them and after the second, and returns what was logged."""

    def engines(handlers: list, validate_handlers: list, files: list) -> None:
        trainer = Engine(lambda engine, batch: engine.state.metrics.update(loss=batch))
        evaluator = Engine(lambda engine, batch: None)

        def validate(engine):
            evaluator.run([0])

        trainer.add_event_handler(Events.STARTED | Events.EPOCH_COMPLETED(every=2), validate)
        score = {"val_dice_tumour (core)": 0.5}
        evaluator.add_event_handler(Events.COMPLETED, lambda _: trainer.state.metrics.update(score))
        for engine, attached in ((trainer, handlers), (evaluator, validate_handlers)):
            for handler in attached:
                if hasattr(handler, "attach"):
                    handler.attach(engine)
        complete_mlflow(trainer, evaluator, handlers, validate_handlers, tmp_path, files)
        trainer.run([7.0], max_epochs=3)

    def call(artifacts: tuple, files: list, known: dict | None = None) -> RecordingClient:
        client = RecordingClient()
        client.params.update(known or {})
        # Handlers of other kinds, also plain functions, stand beside it.
        engines([print, OfflineHandler(client, artifacts)], [OfflineHandler(client, (None,))], files)
        return client

    call.without = engines
    return call


CONFIG = {
    "_meta_": {},
    "imports": ["$import os"],
    "lr": 0.5,
    "patch_size": [32, 16],
    "spacing": None,
    "encoder_path": "$@output_dir + '/encoder.pt'",
    "network_def": {"_target_": "pgl_ext.methods.PGL", "hidden_channels": 8},
    "train": {"trainer": {}},
    "run": ["$@train#trainer.run()"],
    "save_execute_config": "OUT + '/config_2.json'",
}


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "config_1.json").write_text("{}")  # of an earlier run
    path = tmp_path / "config_2.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_each_metric_at_its_epoch_once(train, config):
    logged = train((str(config),), [])
    # As a name, MLflow would refuse it with the brackets.
    assert logged.metrics == {"loss": [(1, 7.0), (2, 7.0), (3, 7.0)], "val_dice_tumour _core_": [(0, 0.5), (2, 0.5)]}


@pytest.mark.parametrize("told", ["{}", "{} + 'spoilt'"])
def test_settings_and_files(train, config, tmp_path, told):
    (tmp_path / "encoder.pt").touch()
    logged = train((told.format(config),), [tmp_path / "encoder.pt", str(tmp_path / "absent.pt")])
    assert logged.params == {"lr": "0.5", "patch_size": "[32, 16]", "network_def": "pgl_ext.methods.PGL"}
    assert logged.files == ["config_2.json", "encoder.pt"]


def test_a_run_that_goes_on_keeps_its_parameters(train, config):
    assert train((str(config),), [], known={"lr": "0.1"}).params["lr"] == "0.1"


def test_no_config_where_none_was_to_be_saved(train, config):
    logged = train((None,), [])
    assert (logged.params, logged.files) == ({}, [])


def test_nothing_happens_without_tracking(train):
    train.without([print], [], [])


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Address of an MLflow server of its own, with a store in SQLite."""
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed: it comes with requirements.txt, or with pip install 'pgl-ext[tracking]'")
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    arguments = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments += ["--backend-store-uri", f"sqlite:///{folder / 'store.db'}", "--artifacts-destination", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # it would outdo --tracking_uri
        process = start(arguments, folder, folder / "log")
        try:
            wait_for(lambda: _answers(f"{address}/health"), process, folder / "log", seconds=240)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> os.PathLike:
    return write_dataset(tmp_path_factory.mktemp("phantoms") / "data", 4, shape=(64, 64, 32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "arguments", "settings", "files"),
    [
        (
            "pgl_pretrain",
            training_arguments,
            {"batch_size": "4", "view_size": "[32, 32, 16]", "network_def": "pgl_ext.methods.PGL"},
            ("models/pgl_encoder.pt", "models/pgl_encoder.json", "metrics.csv", "metrics.png", "views.png"),
        ),
        (
            "pgl_segmentation",
            fine_tuning_arguments,
            {"batch_size": "4", "patch_size": "[32, 32, 16]", "network_def": "pgl_ext.networks.SegmentationNet"},
            ("models/model.pt", "models/model.json", "split.json", "metrics.csv", "metrics.png", "overlay.png"),
        ),
    ],
)
def test_server_has_parameters_metrics_and_files(server, data, tmp_path, experiment, arguments, settings, files):
    from mlflow import MlflowClient

    out = tmp_path / "out"
    tracking = {"tracking": "mlflow", "tracking_uri": server}
    result = run(arguments(data_list_file_path=data, output_dir=out, max_epochs=2, **tracking), cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]

    client = MlflowClient(server)
    (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert found.info.run_name == str(out)
    assert found.info.status == "FINISHED"
    assert found.data.params.items() >= {**settings, "max_epochs": "2"}.items()

    def history(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]

    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    assert history("train_loss") == _nearly(losses)
    names = [name for name in rows[0] if name.startswith("val_") and any(row[name] for row in rows)]
    assert len(names) >= 5
    for name in names:
        assert history(name) == _nearly([(int(row["epoch"]), float(row[name])) for row in rows if row[name]]), name

    (config,) = (path.name for path in out.glob("config_*.json"))
    listed = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert listed == {config, *(Path(name).name for name in files)}
    for name in files:
        logged = Path(client.download_artifacts(found.info.run_id, Path(name).name, str(tmp_path)))
        assert logged.read_bytes() == (out / name).read_bytes(), name


@pytest.mark.slow
def test_server_has_the_scores_of_an_evaluation(server, data, tmp_path):
    from mlflow import MlflowClient

    trained = run(fine_tuning_arguments(data_list_file_path=data, output_dir=tmp_path / "out", max_epochs=1), tmp_path)
    assert trained.returncode == 0, trained.stdout[-3000:]
    out = tmp_path / "evaluation"
    arguments = [
        "-m",
        "monai.bundle",
        "run",
        "evaluating",
        "--config_file",
        str(SEGMENTATION_CONFIGS / "evaluate.json"),
    ]
    arguments += ["--model_path", str(tmp_path / "out" / "models" / "model.pt"), "--output_dir", str(out)]
    arguments += ["--data_list_file_path", str(data), "--data_list_key", "training"]
    result = run([*arguments, "--tracking", "mlflow", "--tracking_uri", server], tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]

    client = MlflowClient(server)
    (found,) = client.search_runs([client.get_experiment_by_name("pgl_segmentation_evaluation").experiment_id])
    assert (found.info.run_name, found.info.status) == (str(out), "FINISHED")
    assert found.data.params.items() >= {"overlap": "0.5", "data_list_key": "training"}.items()
    summary = json.loads((out / "summary.json").read_text())
    means = {f"dice {organ}": entry["dice"]["mean"] for organ, entry in summary["organs"].items()}
    assert found.data.metrics.items() >= {**means, "hd95_mm average": summary["average"]["hd95_mm"]["mean"]}.items()
    (config,) = (path.name for path in out.glob("config_*.json"))
    listed = {item.path for item in client.list_artifacts(found.info.run_id)}
    pictures = {"boxplots.png", "best.png", "median.png", "worst.png"}
    assert listed == {config, "cases.csv", "summary.csv", "summary.json", *pictures}


def _nearly(pairs: list[tuple[int, float]]) -> list:
    """Equal steps, and values as exact as a CSV has them."""
    assert all(math.isfinite(value) for _, value in pairs)
    return [(step, pytest.approx(value, rel=1e-5)) for step, value in pairs]
