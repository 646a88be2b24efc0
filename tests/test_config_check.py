"""Names and values that a run refuses before any work, and what it has to take."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow
from programs import CONFIGS, ROOT, SEGMENTATION_CONFIGS, run

from pgl_ext.config_check import StrictWorkflow, check_config
from pgl_ext.errors import root_cause

PRETRAINING = [CONFIGS / "train.json", CONFIGS / "small.yaml"]
FINE_TUNING = [SEGMENTATION_CONFIGS / "train.json", SEGMENTATION_CONFIGS / "small.yaml"]
INFERENCE = [SEGMENTATION_CONFIGS / "inference.json"]
EVALUATION = [SEGMENTATION_CONFIGS / "evaluate.json"]
DOWNLOAD = [SEGMENTATION_CONFIGS / "download_msd.yaml"]
CHECK = "pgl_ext.config_check.check_config"

either_way = pytest.mark.parametrize("kind", [ConfigWorkflow, StrictWorkflow])


@pytest.fixture(autouse=True)
def _leaves_nothing(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def workflow(kind: type[ConfigWorkflow], files: list[Path], **options) -> ConfigWorkflow:
    return kind([str(file) for file in files], logging_file=False, **options)


def run_here(kind: type[ConfigWorkflow], files: list[Path], **options) -> None:
    running = workflow(kind, files, **options)
    running.initialize()
    running.run()


def refusal(kind: type[ConfigWorkflow], files: list[Path], **options) -> str:
    """What is said of a run, which would have no data to work on."""
    before = sys.excepthook
    with pytest.raises((ValueError, RuntimeError)) as caught:
        run_here(kind, files, **options)
    assert sys.excepthook is not before, "the message would be at the end of a traceback"
    return str(root_cause(caught.value))


NO_SETTING = "the config has no setting "
REFUSED = [
    (PRETRAINING, {"max_epoch": 3}, f"{NO_SETTING}'max_epoch': did you mean max_epochs or warmup_epochs?"),
    (PRETRAINING, {"learning_rate": 0.1}, f"{NO_SETTING}'learning_rate': did you mean lr?"),
    (PRETRAINING, {"outputdir": "OUT"}, f"{NO_SETTING}'outputdir': did you mean output_dir?"),
    (FINE_TUNING, {"train#max_epochs": 3}, f"{NO_SETTING}'train#max_epochs': did you mean max_epochs?"),
    (PRETRAINING, {"momentum": 0.8}, f"{NO_SETTING}'momentum': did you mean optimizer#momentum or base_momentum?"),
    (PRETRAINING, {"help": True}, f"{NO_SETTING}'help'; the README of the bundle lists them"),
    (FINE_TUNING, {"workers": 2}, f"{NO_SETTING}'workers': did you mean num_workers?"),
    (INFERENCE, {"model": "m.pt"}, f"{NO_SETTING}'model': did you mean model_path?"),
    (EVALUATION, {"flip_axis": [0]}, f"{NO_SETTING}'flip_axis': did you mean flip_axes?"),
    (DOWNLOAD, {"task": "Task02_Heart"}, f"{NO_SETTING}'task': did you mean dataset#task or task_name?"),
    (
        PRETRAINING,
        {"optimizer#momentumm": 0.8},
        "pytorch_optimizer.LARS (optimizer) takes no argument 'momentumm': did you mean momentum?",
    ),
    (
        FINE_TUNING,
        {"optimizer#momentumm": 0.8},
        "torch.optim.SGD (optimizer) takes no argument 'momentumm': did you mean momentum?",
    ),
    (
        FINE_TUNING,
        {"train#trainer#max_epoch": 3},
        "pgl_ext.engines.SegmentationTrainer (train#trainer) takes no argument 'max_epoch': did you mean max_epochs?",
    ),
    (PRETRAINING, {"train#trainer#foo": 1}, "pgl_ext.engines.PretrainTrainer (train#trainer) takes no argument 'foo'"),
    (
        PRETRAINING,
        {"train#handlers#0#resumed": 3},
        "pgl_ext.checkpoints.CheckpointHandler (train#handlers#0) takes no argument 'resumed': did you mean resume?",
    ),
    (PRETRAINING, {"run_id": "trainin"}, "the config has nothing to run named 'trainin': did you mean training?"),
    (EVALUATION, {"run_id": "evaluate"}, "the config has nothing to run named 'evaluate': did you mean evaluating?"),
    (
        PRETRAINING,
        {"run_id": "training", "init_id": "output_dir=OUT"},
        "'output_dir=OUT' is nothing to run: an option is written --output_dir OUT",
    ),
    (
        FINE_TUNING,
        {"run_id": "training", "init_id": "max_epochs", "final_id": 3},
        "'max_epochs' is nothing to run: an option is written --max_epochs VALUE",
    ),
    (PRETRAINING, {"max_epochs": "many"}, "max_epochs must be a whole number, such as 500, got 'many'."),
    (FINE_TUNING, {"lr": "fast"}, "lr must be a number, such as 0.01, got 'fast'."),
    (PRETRAINING, {"hu_window": 5}, "hu_window must be a list of 2 numbers, such as [-1024, 325], got 5."),
    (PRETRAINING, {"batch_size": -1}, "batch_size must not be negative, got -1."),
    (FINE_TUNING, {"skip_bad_files": "maybe"}, "skip_bad_files must be true or false, got 'maybe'."),
]


@either_way
@pytest.mark.parametrize(("files", "options", "message"), REFUSED, ids=lambda part: part if type(part) is str else "")
def test_what_is_refused(kind, files, options, message):
    assert refusal(kind, files, **options) == message


def test_a_part_of_what_is_not_there():
    """MONAI alone ends in a KeyError while it reads the options, before any step of a config."""
    message = refusal(StrictWorkflow, PRETRAINING, **{"trian#trainer#max_epochs": 3})
    assert message == f"{NO_SETTING}'trian': did you mean train or train#trainer or training?"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["training", "--max_epoch", "3"], REFUSED[0][2]),
        (["training", "output_dir=OUT"], "'output_dir=OUT' is nothing to run: an option is written --output_dir OUT"),
    ],
)
def test_a_program_ends_with_one_line(tmp_path, arguments, line):
    files = str([str(file) for file in PRETRAINING])
    done = run(["-m", "monai.bundle", "run", *arguments, "--config_file", files], tmp_path)
    assert done.returncode == 1
    assert f"\nerror: {line}\n" in done.stdout
    assert "Traceback" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def overlays(configs: Path) -> list[list[Path]]:
    """All that train.json of a bundle is given with."""
    files = sorted([*configs.rglob("*.yaml"), configs / "multi_gpu_train.json"])
    original = configs / "methods" / "models_genesis.yaml"
    return [
        [configs / "train.json", *([original] if file.stem == "models_genesis_original" else []), file]
        for file in files
        if file.stem not in ("download_msd", "onnx_export")
    ]


SHIPPED = [
    *(PRETRAINING, FINE_TUNING, INFERENCE, EVALUATION, DOWNLOAD, [CONFIGS / "inference.json"]),
    *([*INFERENCE, SEGMENTATION_CONFIGS / "inference_trt.json"], *overlays(CONFIGS), *overlays(SEGMENTATION_CONFIGS)),
]


def accept(kind: type[ConfigWorkflow], files: list[Path], **options) -> None:
    """Run the check alone."""
    check = {"_target_": CHECK, "base": files[0].name}
    workflow(kind, files, **options, init_id="check", check=[check, "$None"]).initialize()


@either_way
@pytest.mark.parametrize("files", SHIPPED, ids=lambda files: "+".join(f"{f.parts[-3]}/{f.stem}" for f in files))
def test_what_the_bundles_have_is_known(kind, files):
    accept(kind, files)


@either_way
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3, "lr": 1, "spacing": [1, 1.5, 2], "hu_window": None, "resume": "true", "seed": 7},
        {"hu_window": "$None", "max_epochs": "$1 + 1", "lr": "@weight_decay", "view_size": ["@seed", 2, 3]},
        {"num_workers": 0, "amp": False, "device": "cpu", "cache_dir": "CACHE", "dataset_dir": "SCANS"},
        {"train::trainer::max_epochs": 1, "train#dataset#data": [{"image": "a.nii"}], "train#handlers": []},
        {"train#trainer#max_grad_norm": 1.0, "train#trainer#amp_kwargs": {}, "optimizer#nesterov": True},
        {"train#preprocessing#transforms#0#flip_prob": 0.1, "network_def#sampling_ratio": 1, "encoder#layers": [1] * 4},
        {"tracking_uri": "http://localhost", "experiment_name": "x", "run_name": "y", "save_execute_config": False},
        {"description#data#site": "A", "_desc_more": "a remark", "_comment_": "another"},
        {"train#dataset": {"_target_": "CacheDataset", "data": [], "transform": None}, "validate#pairs_per_volume": 1},
        {"optimizer": "$torch.optim.SGD(@network.parameters(), lr=@lr)", "run_id": "training"},
    ],
    ids=str,
)
def test_options_that_are_known(kind, options):
    accept(kind, PRETRAINING, **options)


OVERLAYS = {
    "read by a reference": {"rate": 0.1, "lr": "@rate"},
    "read in an expression": {"rate": 0.1, "lr": "$@rate * 2"},
    "read from where it is": {"optimizer#weight_decay": "@##decay", "decay": 0.1},
    "read in a part": {"own": {"a": 1, "b": {"c": 2}}, "lr": "@own#a", "seed": "$@own::b::c"},
    "copied": {"own_optimizer": {"_target_": "torch.optim.SGD", "params": [], "lr": 1}, "optimizer": "%own_optimizer"},
    "replaced": {"network_def": {"_target_": "pgl_ext.methods.BYOL", "encoder": "@encoder", "hidden_channels": 8}},
    "added to a list": {"+train#preprocessing#transforms": [{"_target_": "RandFlipd", "keys": "views", "prob": 0.5}]},
    "an entry of a list": {"train#preprocessing#transforms#0": {"_target_": "Identityd", "keys": "image"}},
    "a step": {"looking": ["$print(@max_epochs)"]},
    "what cannot be imported": {"own": {"_target_": "no_such.thing", "a": 1}, "lr": "@own"},
}


@either_way
@pytest.mark.parametrize("overlay", OVERLAYS.values(), ids=OVERLAYS)
def test_overlays_of_users(kind, overlay, tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(overlay))
    accept(kind, [*PRETRAINING, tmp_path / "own.yaml"])


def test_a_plain_value_that_is_copied(tmp_path):
    """MONAI has put it in its place before any step of the config: only the workflow sees that it was read."""
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"rate": 0.1, "lr": "%rate"}))
    accept(StrictWorkflow, [*PRETRAINING, tmp_path / "own.yaml"])
    assert refusal(ConfigWorkflow, [*PRETRAINING, tmp_path / "own.yaml"]).startswith(f"{NO_SETTING}'rate'")


@either_way
def test_tracking_of_monai(kind, tmp_path):
    accept(kind, PRETRAINING, tracking="mlflow", output_dir=str(tmp_path / "out"), tracking_uri="sqlite:///x.db")


def test_an_own_step_is_run(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"looking": [{"_target_": CHECK}, "$print(@max_epochs)"]}))
    run_here(ConfigWorkflow, [*PRETRAINING, tmp_path / "own.yaml"], run_id="looking", initialize=[])
    assert "10\n" in capsys.readouterr().out


def test_without_a_workflow_nothing_is_checked():
    """As where MONAI's exports and checks read a config."""
    check_config()
    parser = ConfigParser()
    parser.read_config(PRETRAINING)
    parser["max_epoch"] = 3
    parser["initialize"] = [{"_target_": CHECK}]
    parser.get_parsed_content("initialize")


def test_a_base_of_another_name(tmp_path):
    """Of a config of a user's own, only what its targets take is known."""
    shutil.copy(CONFIGS / "train.json", tmp_path / "mine.json")
    own = workflow(ConfigWorkflow, [tmp_path / "mine.json"], mine=1, initialize=[{"_target_": CHECK}])
    own.initialize()
    assert "momentumm" in refusal(ConfigWorkflow, [tmp_path / "mine.json"], **{"optimizer#momentumm": 1})


@pytest.mark.parametrize("configs", [CONFIGS, SEGMENTATION_CONFIGS])
def test_is_left_out_where_it_cannot_be_imported_yet(configs, monkeypatch):
    """MONAI can initialize a packaged bundle before it is told its folder, as in federated learning."""
    monkeypatch.setitem(sys.modules, "pgl_ext", None)
    initialized = workflow(ConfigWorkflow, [configs / "train.json"], max_epoch=3)
    assert initialized.initialize()[1] is None


def steps_of(config: dict) -> dict[str, list]:
    """What MONAI can run of a config: lists with expressions."""
    lists = {name: part for name, part in config.items() if isinstance(part, list) and not name.endswith("imports")}
    return {name: part for name, part in lists.items() if any(str(entry).startswith("$") for entry in part)}


def test_every_step_of_a_config_begins_with_the_check():
    """What initializes, for names of what to run; what runs too, since a misspelt option can take the other's place."""
    checked = []
    for path in sorted((ROOT / "bundles").glob("*/configs/*")):
        config = ConfigParser.load_config_file(path) if path.suffix in (".json", ".yaml") else {}
        base = "train.json" if path.stem in ("train", "multi_gpu_train", "probe") else path.name
        for name, (first, second, *_) in steps_of(config).items():
            initial = "$sys.path.insert(1, @bundle_root)"
            assert first == (initial if name == "initialize" else {"_target_": "pgl_ext.errors.report_root_cause"})
            where = {"_disabled_": "$not monai.utils.optional_import('pgl_ext')[1]"} if name == "initialize" else {}
            assert {"base": "train.json", **second} == {"_target_": CHECK, "base": base, **where}, path
            checked.append(name)
    assert sorted(set(checked)) == ["evaluating", "initialize", "probing", "run", "training"]
    assert len(checked) == 16
