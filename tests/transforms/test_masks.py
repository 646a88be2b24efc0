import pytest
from torch.utils.data import default_collate

from pgl_ext.transforms import NameToIndexd


def test_names_are_numbered_in_the_order_given():
    transform = NameToIndexd(["task", "group"], ["b", "a", 3])
    samples = [{"task": task, "group": "a", "image": "x"} for task in ("a", "b", 3, "3")]
    numbered = [transform(sample) for sample in samples]
    assert [sample["task"] for sample in numbered] == [1, 0, 2, 2]
    assert all(sample["group"] == 1 and sample["image"] == "x" for sample in numbered)
    assert samples[0]["task"] == "a"
    assert str(default_collate(numbered)["task"].dtype) == "torch.int64"


def test_another_name():
    with pytest.raises(ValueError, match=r"task 'c' is not among the names \['a', 'b'\]"):
        NameToIndexd("task", ["a", "b"])({"task": "c"})
