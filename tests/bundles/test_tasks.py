"""The overlays of tasks and of the download in the segmentation bundle's configs."""

import json
import re
import sys
from pathlib import Path

import monai.apps.datasets
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from programs import SEGMENTATION_CONFIGS, TEST_DATA

from pgl_ext.data.datalist import labelled_items
from pgl_ext.data.prepare import prepare_cases
from pgl_ext.data.split import split_cases
from pgl_ext.errors import root_cause
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.phantom import LABELS, write_dataset

TASKS = sorted(path.stem for path in (SEGMENTATION_CONFIGS / "tasks").glob("*.yaml"))
DATA = TEST_DATA / "data"


def config_of(name: str) -> ConfigParser:
    files = [SEGMENTATION_CONFIGS / "train.json", SEGMENTATION_CONFIGS / "tasks" / f"{name}.yaml"]
    parser = ConfigParser()
    parser.read_config(files)
    return parser


def real_data(name: str) -> dict:
    path = DATA / name / "dataset.json"
    if not path.is_file():
        pytest.skip(f"needs the data set {name}, which is not part of the project")
    return json.loads(path.read_text())


def letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def test_every_task_is_there():
    expected = ["bcv", "hippocampus", "kits19", "msd_liver", "msd_spleen", "openkbp", "openkbp_all", "phantom"]
    assert expected == TASKS


@pytest.mark.parametrize("name", TASKS)
def test_overlay_gives_a_valid_task(name):
    parser = config_of(name)
    task = parser.get_parsed_content("task")
    assert isinstance(task, SegmentationTask)
    assert list(task.names) == list(parser["organs"])
    for key in ("patch_size", "flip_prob"):
        assert len(parser[key]) == 3
    assert all(isinstance(size, int) and size >= 16 for size in parser["patch_size"])
    assert all(0 <= probability <= 1 for probability in parser["flip_prob"])
    assert parser["spacing"] is None or len(parser["spacing"]) == 3
    assert parser["hu_window"] in (None, [-1024, 325])


@pytest.mark.parametrize("name", TASKS)
def test_overlay_sets_only_what_the_configs_know(name):
    known = set(ConfigParser.load_config_file(SEGMENTATION_CONFIGS / "train.json"))
    assert set(ConfigParser.load_config_file(SEGMENTATION_CONFIGS / "tasks" / f"{name}.yaml")) <= known


@pytest.mark.parametrize("name", TASKS)
def test_overlay_says_how_it_is_run(name):
    text = (SEGMENTATION_CONFIGS / "tasks" / f"{name}.yaml").read_text()
    assert f"--config_file \"['configs/train.json','configs/tasks/{name}.yaml'" in text
    assert text.startswith("# ")


@pytest.mark.parametrize(
    ("name", "cases", "training", "test", "channels"),
    [
        ("bcv", 30, 15, 15, 14),
        ("msd_liver", 131, 66, 65, 2),
        ("kits19", 210, 105, 105, 2),
        ("msd_spleen", 41, 20, 21, 1),
    ],
)
def test_the_paper_s_splits_and_channels(name, cases, training, test, channels):
    parser = config_of(name)
    items = [{"image": f"/{n:03}.nii", "label": "/l.nii"} for n in range(cases)]
    settings = {key: parser[key] for key in ("test_cases", "validation_fraction")}
    split = split_cases(items, **settings)
    assert len(split["test"]) == test
    assert len(split["training"]) + len(split["validation"]) == training
    assert len(split["validation"]) == round(0.2 * training)
    assert parser.get_parsed_content("task").out_channels == channels


@pytest.mark.parametrize("name", ["msd_liver", "kits19"])
def test_a_tumour_is_part_of_its_organ(name):
    organ, tumour = config_of(name).get_parsed_content("task").masks_of_labels(torch.tensor([0, 1, 2]).view(1, 3, 1, 1))
    assert organ.flatten().tolist() == [False, True, True]
    assert tumour.flatten().tolist() == [False, False, True]


def test_bcv_is_what_the_configs_are_set_to():
    alone = ConfigParser.load_config_file(SEGMENTATION_CONFIGS / "train.json")
    overlay = ConfigParser.load_config_file(SEGMENTATION_CONFIGS / "tasks" / "bcv.yaml")
    of_the_paper = {
        "organs": overlay["organs"],
        "flip_prob": [0.5, 0.5, 0.5],
        "patches_per_case": 4,
        "validation_fraction": 0.2,
    }
    assert {key: value for key, value in overlay.items() if value != alone[key]} == {"test_cases": 15, **of_the_paper}
    assert list(overlay["organs"].values()) == list(range(1, 14))


def test_phantom_organs_are_the_generator_s():
    assert config_of("phantom")["organs"] == {name: value for value, name in enumerate(LABELS) if value}


@pytest.mark.parametrize(
    ("name", "data"), [("openkbp", "openkbp_seg"), ("openkbp_all", "openkbp_seg"), ("hippocampus", "msd_hippocampus")]
)
def test_values_and_names_are_those_of_the_real_data(name, data):
    labels = real_data(data)["labels"]
    parser = config_of(name)
    task = parser.get_parsed_content("task")
    assert {organ: letters(labels[str(value)]) for organ, (value,) in task.organs.items()} == {
        organ: letters(organ) for organ in task.names
    }
    assert set(task.values) == set(map(int, labels))


def test_openkbp_organs_are_spelt_as_in_the_data_list():
    content = real_data("openkbp_seg")
    parser = config_of("openkbp_all")
    organs = set(parser["organs"])
    for key in ("training", "validation"):
        cases = labelled_items(DATA / "openkbp_seg/dataset.json", key=key, annotated_key=parser["annotated_key"])
        assert len(cases) == len(content[key])
        assert set().union(*(case["annotated"] for case in cases)) == organs
        # The organs of the other overlay are those annotated everywhere.
        assert set(config_of("openkbp")["organs"]) <= set.intersection(*(set(case["annotated"]) for case in cases))


@pytest.mark.parametrize(
    ("name", "data"), [("openkbp", "openkbp_seg"), ("openkbp_all", "openkbp_seg"), ("hippocampus", "msd_hippocampus")]
)
def test_real_cases_are_prepared(tmp_path, name, data):
    """As the config sets it up; no good case is refused, and the label map keeps the task's values."""
    real_data(data)
    parser = config_of(name)
    parser.update({"output_dir": str(tmp_path), "dataset_dir": str(DATA / data), "num_workers": 0})
    parser.update({"labelled_cases": 4, "validation_fraction": 0.25})
    parts = parser.get_parsed_content("cases")
    assert [len(parts[part]) for part in ("training", "validation")] == [3, 1]
    cache, task = parser.get_parsed_content("cache"), parser.get_parsed_content("task")
    for case in parts["training"]:
        volume = cache.open(case)
        image, label = volume[:]
        spacing = np.linalg.norm(np.array(volume.vlmeta["affine"])[:3, :3], axis=0)
        np.testing.assert_allclose(spacing, parser["spacing"], rtol=1e-3)
        assert abs(image.astype(float).mean()) < 0.01
        assert set(np.unique(label)) <= set(task.values)
        # Nearest neighbour changes the volume of thin organs by some percent, here up to 10.
        source = nibabel.load(case["label"])
        before = (np.asarray(source.dataobj) > 0).sum() * abs(np.linalg.det(source.affine[:3, :3]))
        assert (label > 0).sum() * spacing.prod() == pytest.approx(before, rel=0.15)


def test_phantoms_are_prepared(tmp_path):
    write_dataset(tmp_path / "phantoms", cases=4, shape=(40, 40, 24))
    parser = config_of("phantom")
    parser.update({"output_dir": str(tmp_path / "out"), "dataset_dir": str(tmp_path / "phantoms"), "num_workers": 0})
    parts = parser.get_parsed_content("cases")
    assert [len(parts[part]) for part in ("training", "validation")] == [3, 1]
    assert (tmp_path / "out" / "split.json").is_file()


def test_no_case_of_an_organ_that_the_list_spells_otherwise(tmp_path):
    real_data("openkbp_seg")
    task = SegmentationTask({"brainstem": 1, "spinal_cord": 2}, [0, 3, 4, 5, 6, 7])
    with pytest.raises(ValueError, match=r"\['brainstem', 'spinal_cord'\] are annotated in no case.*'SpinalCord'"):
        prepare_cases(None, task, str(DATA / "openkbp_seg"), annotated_key="organs_contoured")


class TestDownload:
    @pytest.fixture
    def downloads(self, monkeypatch) -> list[dict]:
        """Plays the download: what it was asked for; it leaves a data list whose volumes do not exist."""
        calls: list[dict] = []

        def download(url, filepath, output_dir, **settings) -> None:
            calls.append({"url": url, "filepath": filepath, "output_dir": output_dir, **settings})
            folder = Path(filepath).with_suffix("")
            folder.mkdir(exist_ok=True)
            entries = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in range(10)]
            names = ["name", "description", "reference", "licence", "tensorImageSize", "modality", "labels"]
            content = {**dict.fromkeys(names, "x"), "numTraining": 10, "numTest": 0, "training": entries}
            (folder / "dataset.json").write_text(json.dumps(content))

        monkeypatch.setattr(monai.apps.datasets, "download_and_extract", download)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the config sets
        return calls

    @staticmethod
    def parser(**settings: str) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(SEGMENTATION_CONFIGS / "download_msd.yaml")
        parser.update(settings)
        return parser

    def test_downloads_the_task_and_reads_no_volume(self, downloads, tmp_path, capsys):
        folder = tmp_path / "new" / "folder"
        self.parser(task_name="Task03_Liver", dataset_dir=str(folder)).get_parsed_content("run")
        (call,) = downloads
        assert call["url"].endswith("/Task03_Liver.tar")
        assert call["filepath"] == str(folder / "Task03_Liver.tar")
        assert Path(call["output_dir"]) == folder
        assert call["hash_type"] == "md5"
        assert f"10 labelled cases: train with --dataset_dir {folder / 'Task03_Liver'}" in capsys.readouterr().out

    def test_reading_the_config_downloads_nothing(self, downloads):
        self.parser().parse()
        assert downloads == []

    def test_unknown_task(self, downloads, tmp_path):
        with pytest.raises(RuntimeError) as error:
            self.parser(task_name="Task11", dataset_dir=str(tmp_path)).get_parsed_content("run")
        assert "Unsupported task: Task11" in str(root_cause(error.value))
        assert downloads == []
