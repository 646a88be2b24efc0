import shutil

import pytest
from programs import ROOT

from pgl_ext.tools import bundles
from pgl_ext.tools.bundles import bundle_folder, bundles_folder, config_names, config_paths


def test_a_checkout_has_its_own():
    assert bundles_folder() == ROOT / "bundles"
    assert bundle_folder("pgl_pretrain") == ROOT / "bundles" / "pgl_pretrain"


def test_an_installed_package_has_those_within_it(tmp_path, monkeypatch):
    for name in ("bundles", "studies"):
        shutil.copytree(ROOT / name, tmp_path / "shipped" / name)
    monkeypatch.setattr(bundles, "_PLACES", (tmp_path / "shipped", ROOT))
    assert bundles_folder() == tmp_path / "shipped" / "bundles"
    (path,) = config_paths("studies", ["phantom.yaml"])
    assert path == str(tmp_path / "shipped" / "studies" / "phantom.yaml")


def test_a_package_without_bundles_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "_PLACES", (tmp_path / "shipped", tmp_path))
    with pytest.raises(FileNotFoundError, match="install the package again"):
        bundles_folder()


@pytest.mark.parametrize("name", ["pgl", "unit_tests", ""])
def test_a_wrong_name_is_answered_with_the_right_ones(name):
    with pytest.raises(FileNotFoundError, match="only pgl_pretrain, pgl_segmentation"):
        bundle_folder(name)


def test_config_names():
    names = config_names()
    assert {"pgl_pretrain train.json", "pgl_segmentation tasks/bcv.yaml", "studies phantom.yaml"} <= set(names)
    for bundle, name in map(str.split, names):
        assert config_paths(bundle, [name])
    assert config_names("pgl_pretrain") == [name for name in names if name.startswith("pgl_pretrain ")]


def test_config_paths_may_be_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_task.yaml").touch()
    folder = ROOT / "bundles" / "pgl_segmentation" / "configs"
    paths = config_paths("pgl_segmentation", ["train.json", "my_task.yaml"])
    assert paths == [str(folder / "train.json"), str(tmp_path / "my_task.yaml")]
    with pytest.raises(FileNotFoundError, match=r"the config tran\.json is neither in .*pgl_segmentation"):
        config_paths("pgl_segmentation", ["tran.json"])
