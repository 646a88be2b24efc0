import re

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from pgl_ext.checkpoints import CheckpointHandler
from pgl_ext.engines import PretrainTrainer
from pgl_ext.handlers import PretrainMetricsLog, ViewPictures
from pgl_ext.segmentation.handlers import OverlayPictures, SegmentationMetricsLog
from pgl_ext.settings import check_kind, check_positive, parse_bool
from pgl_ext.task import SegmentationTask

TASK = SegmentationTask({"liver": 1})


def evaluator() -> Engine:
    return Engine(lambda engine, batch: None)


def trainer(micro_batch_size: int) -> PretrainTrainer:
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return PretrainTrainer("cpu", 1, [{}], network, optimizer, micro_batch_size=micro_batch_size)


MADE_WITH = {
    "checkpoint_interval": lambda n: CheckpointHandler("out", nn.Linear(1, 1), {}, None, None, {}, interval=n),
    "log_interval of pre-training": lambda n: PretrainMetricsLog("out", evaluator(), 4, interval=n),
    "log_interval of fine-tuning": lambda n: SegmentationMetricsLog("out", evaluator(), 4, TASK, interval=n),
    "micro_batch_size": trainer,
    "picture_interval of pre-training": lambda n: ViewPictures("out", n),
    "picture_interval of fine-tuning": lambda n: OverlayPictures(evaluator(), "out", TASK, interval=n),
}


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("setting", MADE_WITH)
def test_a_setting_that_counts_is_refused_at_once(setting, value):
    """And not by a division in the middle of training."""
    name, *_ = setting.split()
    with pytest.raises(ValueError, match=rf"^{name} must be at least 1, got {value}: .+\.$"):
        MADE_WITH[setting](value)


@pytest.mark.parametrize("setting", MADE_WITH)
def test_one_is_enough(setting):
    MADE_WITH[setting](1)
    assert check_positive(1, "n", "") == 1


@pytest.mark.parametrize("setting", MADE_WITH)
@pytest.mark.parametrize("value", [1.5, "2", True, [1]], ids=str)
def test_only_whole_numbers_count(setting, value):
    name, *_ = setting.split()
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number, got "):
        MADE_WITH[setting](value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False), (" no ", False)],
)
def test_words_that_switch(value, expected):
    assert parse_bool(value, "overwrite") is expected


@pytest.mark.parametrize("value", ["", "maybe", None, 2, [True]])
def test_other_words(value):
    with pytest.raises(ValueError, match=r"^overwrite must be true or false, got"):
        parse_bool(value, "overwrite")


@pytest.mark.parametrize(
    ("value", "default"),
    [
        (3, 500),
        (3, 0.2),
        (0.5, 1.0),
        (-5, -1),
        ("no", True),
        (0, True),
        ("paper", "exact"),
        (["training", "test"], "training"),
        ([1, 2.5], [0, 1]),
        ((1, "$2"), [0, 1]),
        ([0, 5, 6], [0]),
        ([], [0]),
        ([400, 1000], []),
        (None, 500),
        (None, [0, 1]),
        ("$1 + 1", 500),
        ("@batch_size", 8),
        ("anything", None),
        ([1], "$@record.input.spacing"),
        ("anything", {"_target_": "x"}),
        ("anything", ["views", "affines"]),
    ],
)
def test_a_value_of_its_defaults_kind(value, default):
    check_kind(value, default, "x")


@pytest.mark.parametrize(
    ("value", "default", "message"),
    [
        ("many", 500, "x must be a whole number, such as 500, got 'many'."),
        (2.5, 500, "x must be a whole number, such as 500, got 2.5."),
        (True, 500, "x must be a whole number, such as 500, got True."),
        ("1e-3", 0.2, "x must be a number, such as 0.2, got '1e-3'."),
        ([1], 0.2, "x must be a number, such as 0.2, got [1]."),
        (-0.1, 0.2, "x must not be negative, got -0.1."),
        (-1, 0, "x must not be negative, got -1."),
        ("maybe", False, "x must be true or false, got 'maybe'."),
        (5, "exact", "x must be text, such as 'exact', got 5."),
        (["a", 5], "exact", "x must be text, such as 'exact', got ['a', 5]."),
        (5, [0, 1], "x must be a list of 2 numbers, such as [0, 1], got 5."),
        ([1, 2, 3], [0, 1], "x must be a list of 2 numbers, such as [0, 1], got [1, 2, 3]."),
        ([1, "a"], [0, 1], "x must be a list of 2 numbers, such as [0, 1], got [1, 'a']."),
        ("5", [0], "x must be a list of numbers, such as [0], got '5'."),
        (5, [], "x must be a list of numbers, such as [1, 2], got 5."),
    ],
)
def test_a_value_of_another_kind(value, default, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        check_kind(value, default, "x")
