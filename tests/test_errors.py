import pickle
import sys

import pytest
from monai.transforms import Compose
from monai.utils import OptionalImportError

from pgl_ext.errors import few, report_root_cause, root_cause, transform_error


def wrapped(cause: Exception, times: int = 3) -> Exception:
    """The error that is caught where each layer wraps the one below."""
    error = cause
    for layer in range(times):
        try:
            raise RuntimeError(f"layer {layer}") from error
        except RuntimeError as outer:
            error = outer
    return error


@pytest.fixture
def report(monkeypatch, capsys):
    """What the hook prints for an uncaught error."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delenv("PGL_TRACEBACK", raising=False)

    def show(error: Exception) -> str:
        report_root_cause()
        sys.excepthook(type(error), error, error.__traceback__)
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    return show


@pytest.mark.parametrize("times", [0, 1, 4])
def test_root_cause(times):
    cause = ValueError("the cause")
    assert root_cause(wrapped(cause, times)) is cause


def in_a_circle(*errors: Exception) -> Exception:
    """The first of some errors, each of which was raised from the next, and the last from the first."""
    for error, cause in zip(errors, (*errors[1:], errors[0]), strict=True):
        error.__cause__ = cause
    return errors[0]


class TestTransformError:
    @pytest.mark.parametrize("error", [TypeError, ValueError, FileNotFoundError, MemoryError, KeyError])
    @pytest.mark.parametrize("nested", [0, 1, 3])
    def test_is_what_the_transform_raised(self, error, nested):
        cause = error("of a transform")

        def fail(data: object) -> None:
            raise cause

        step = fail
        for _ in range(nested):
            step = Compose([step])
        with pytest.raises((error, RuntimeError)) as caught:
            step(1)
        assert transform_error(caught.value) is cause

    def test_is_not_what_that_was_raised_from(self):
        cause = ValueError("damaged")
        cause.__cause__ = OSError("short read")
        outer = RuntimeError("applying transform x")
        outer.__cause__ = cause
        assert transform_error(outer) is cause

    def test_ends_where_causes_form_a_circle(self):
        errors = [RuntimeError("applying transform x"), RuntimeError("applying transform y")]
        assert transform_error(in_a_circle(*errors)) is errors[1]
        assert transform_error(in_a_circle(errors[0])) is errors[0]
        memory = MemoryError("of a transform")
        assert transform_error(in_a_circle(errors[0], memory)) is memory


def test_root_cause_ends_where_causes_form_a_circle(report):
    """As where the error of a transform is raised from the error that wraps it."""
    broken, wrapper = AssertionError("too large"), RuntimeError("applying transform x")
    assert root_cause(in_a_circle(broken, wrapper)) is wrapper
    assert root_cause(in_a_circle(broken)) is broken
    assert "AssertionError: too large" in report(in_a_circle(broken, wrapper))
    bad = ValueError("bad --lr")
    assert root_cause(in_a_circle(wrapper, broken, bad)) is bad
    memory = MemoryError("cpu has no memory for 8 samples in a pass: try --micro_batch_size 4, or auto.")
    assert root_cause(in_a_circle(wrapper, memory)) is memory
    assert "error: cpu has no memory" in report(memory)
    assert "error: MemoryError()" in report(MemoryError())


def test_an_error_raised_while_handling_another_is_its_own_cause():
    error = KeyError("second")
    error.__context__ = ValueError("first")
    assert root_cause(error) is error


@pytest.mark.parametrize(
    "cause",
    [
        ValueError("bad --lr"),
        FileNotFoundError("no such file: x.nii"),
        FloatingPointError("the loss has been nan"),
        OptionalImportError("please install mlflow"),
        ImportError("Reading x.mha needs the package 'itk': pip install itk"),
    ],
)
@pytest.mark.parametrize("times", [0, 3])
def test_errors_about_the_input_are_shown_as_their_message_alone(report, cause, times):
    text = report(wrapped(cause, times))
    assert text.splitlines()[1] == f"error: {cause}"
    assert "Traceback" not in text
    assert "layer" not in text
    assert "PGL_TRACEBACK=1" in text


@pytest.mark.parametrize("within", [KeyError("a"), RuntimeError("not a zip archive"), ValueError("line 1 column 1")])
def test_an_error_that_explains_another_is_shown_instead_of_it(report, within):
    try:
        raise ValueError("model.pt is damaged: copy it again.") from wrapped(within, 1)
    except ValueError as error:
        text = report(wrapped(error))
    assert text.splitlines()[1] == "error: model.pt is damaged: copy it again."
    assert "Traceback" not in text


@pytest.mark.parametrize("times", [0, 2])
def test_a_full_disk_is_shown_with_a_remedy(report, times):
    text = report(wrapped(OSError(28, "No space left on device"), times))
    assert "No space left on device. Make room" in text.splitlines()[1]
    assert "Traceback" not in text


@pytest.mark.parametrize("cause", [KeyError("bug"), AssertionError("bug"), pickle.PicklingError("bug")])
def test_other_errors_keep_their_traceback(report, cause):
    text = report(wrapped(cause))
    assert "Traceback" in text
    assert "bug" in text
    assert "layer 2" in text


def test_ctrl_c_is_one_line(report, monkeypatch):
    assert report(KeyboardInterrupt()) == "\nstopped by Ctrl-C\n"
    monkeypatch.setenv("PGL_TRACEBACK", "1")
    assert "KeyboardInterrupt" in report(KeyboardInterrupt())


def test_the_traceback_can_be_asked_for(report, monkeypatch):
    monkeypatch.setenv("PGL_TRACEBACK", "1")
    text = report(wrapped(ValueError("bad --lr")))
    assert "Traceback" in text
    assert "ValueError: bad --lr" in text


@pytest.mark.parametrize(
    ("count", "separator", "expected"),
    [
        (2, ", ", "0, 1"),
        (3, ", ", "0, 1, 2"),
        (5, ", ", "0, 1, 2 and 2 more"),
        (4, "\n  ", "0\n  1\n  2\n  and 1 more"),
    ],
)
def test_long_lists_are_cut(count, separator, expected):
    assert few([str(number) for number in range(count)], 3, separator) == expected
