import pytest

from pgl_ext.settings import parse_bool


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False), (" no ", False)],
)
def test_words(value, expected):
    assert parse_bool(value, "overwrite") is expected


@pytest.mark.parametrize("value", ["", "maybe", None, 2, [True]])
def test_anything_else(value):
    with pytest.raises(ValueError, match=r"^overwrite must be true or false, got"):
        parse_bool(value, "overwrite")
