"""The JSON beside files of weights: what it says, files of earlier versions, and files that are not what they seem."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from made_weights import checkpoint_content, edit_json, encoder_record, input_record, model_record
from monai.bundle import ConfigParser

from pgl_ext import __version__
from pgl_ext.networks import ResNetEncoder, SegmentationNet
from pgl_ext.settings import flat_entries
from pgl_ext.task import SegmentationTask
from pgl_ext.tools.export import export_encoder
from pgl_ext.weights import (
    EncoderRecord,
    InputRecord,
    ModelRecord,
    build_encoder,
    build_network,
    load_pretrained,
    load_state,
    save_encoder,
    save_weights,
)

INFERENCE = Path(__file__).parents[2] / "bundles" / "pgl_segmentation" / "configs" / "inference.json"
EARLIER = Path(__file__).parent / "written_by_0.1.0"
ENCODER = {"layers": [1, 1, 1, 1], "block": "basic", "widen_factor": 1 / 32}
TASK = SegmentationTask({"liver": [1], "kidneys": [2, 3]}, background_values=[0, 4])


def make_network(**arguments) -> SegmentationNet:
    return SegmentationNet(
        **{"out_channels": 3, "encoder": ENCODER, "aspp_channels": 4, "decoder_channels": (4, 4, 4), **arguments}
    )


@pytest.fixture
def encoder_file(tmp_path) -> Path:
    encoder = ResNetEncoder(**ENCODER)
    save_encoder(encoder, tmp_path / "pgl_encoder.pt", encoder_record(encoder))
    return tmp_path / "pgl_encoder.pt"


@pytest.fixture
def model_file(tmp_path) -> Path:
    network = make_network()
    save_weights(network.state_dict(), tmp_path / "model.pt", model_record(network, TASK))
    return tmp_path / "model.pt"


# --- files of earlier versions --------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path) -> Path:
    """Copies that may be changed."""
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def ramp() -> torch.Tensor:
    return torch.linspace(-1, 1, 32 * 32 * 16).reshape(1, 1, 32, 32, 16)


class TestEarlierVersions:
    def test_the_record_of_an_encoder(self):
        record = EncoderRecord.load(EARLIER / "pgl_encoder.pt")
        assert record.architecture == {
            "family": "resnet",
            "arguments": {**ENCODER, "in_channels": 1, "stem_stride": [2, 2, 1], "last_stage_stride": 1},
        }
        assert record.input == InputRecord([-1024, 325], [1.5, 1.5, 3.0], [32, 32, 16], 1, "RAS")
        assert (record.method, record.steps, record.pairs, record.version) == ("PGL", 6, 12, "0.1.0")
        assert (record.stride, record.channels) == ([16, 16, 8], [2, 2, 4, 8, 16])
        assert record.data == {"training_volumes": 5}
        assert record.others == {
            "views": {"scale_range": [1.1, 1.4], "min_overlap": 0.1, "flip_prob": 0.5},
            "optimizer": "LARS",
            "lr": 0.2,
            "seed": 3,
        }

    def test_the_record_of_a_model(self):
        record = ModelRecord.load(EARLIER / "model.pt")
        task = SegmentationTask(**record.task)
        assert (task.organs, task.background_values) == (TASK.organs, TASK.background_values)
        assert not task.multi_label
        assert record.network["family"] == "resnet"
        assert record.network["arguments"]["encoder"]["widen_factor"] == 1 / 32
        assert record.input == InputRecord([-200, 300], None, [32, 32, 16], 1, "RAS")
        assert (record.annotated_key, record.pretrained_encoder) == ("annotated", "models/pgl_encoder.pt")
        assert (record.steps, record.epoch, record.val_mean_dice, record.version) == (8, 2, 0.5, "0.1.0")
        assert record.pretrained_decoder is None
        assert record.others == {"optimizer": "SGD", "lr": 0.01, "seed": 0}

    def test_the_weights_of_an_encoder(self):
        """The means of its features are those that the version that wrote it found."""
        with torch.no_grad():
            features = build_encoder(EARLIER / "pgl_encoder.pt").eval()(ramp())
        means = [float(feature.mean()) for feature in features]
        assert means == pytest.approx([0.139263, 0.392031, 0.241748, 0.192963, 0.100481], rel=1e-4)

    def test_the_weights_of_a_model(self):
        network = build_network(EARLIER / "model.pt")
        assert network.dropout.p == 0.25
        with torch.no_grad():
            logits = network(ramp())
        assert logits.mean((0, 2, 3, 4)).tolist() == pytest.approx([0.366074, 0.606966, 0.289550], rel=1e-4)
        assert logits.std((0, 2, 3, 4)).tolist() == pytest.approx([0.649534, 0.499084, 0.504223], rel=1e-4)

    def test_in_the_config_of_inference(self):
        parser = inference_config(EARLIER / "model.pt")
        assert parser.get_parsed_content("hu_window") == [-200, 300]
        assert parser.get_parsed_content("spacing") is None
        assert parser.get_parsed_content("patch_size") == [32, 32, 16]
        assert parser.get_parsed_content("task").names == ("liver", "kidneys")
        assert isinstance(parser.get_parsed_content("network"), SegmentationNet)

    def test_fine_tuning_starts_from_an_encoder(self, caplog):
        network = make_network(encoder=ENCODER)
        load_pretrained(
            network, EARLIER / "pgl_encoder.pt", input={"hu_window": [-1024, 325], "spacing": [1.5, 1.5, 3]}
        )
        assert not caplog.records
        state = load_state(EARLIER / "pgl_encoder.pt")
        assert all(torch.equal(value, state[f"encoder.{key}"]) for key, value in network.encoder.state_dict().items())

    def test_and_is_told_of_other_input(self, caplog):
        load_pretrained(make_network(), EARLIER / "pgl_encoder.pt", input={"hu_window": [0, 1]})
        assert "clipped to [-1024, 325] HU, here [0.0, 1.0]" in caplog.text
        assert "spacing [1.5, 1.5, 3.0], here as stored" in caplog.text

    @pytest.mark.parametrize("kind", ["checkpoint", "encoder file"])
    def test_export(self, earlier, kind):
        """A checkpoint had the same description as the encoder file that was written with it."""
        path, expected = earlier / "pgl_encoder.pt", EncoderRecord.load(EARLIER / "pgl_encoder.pt")
        state = load_state(path)
        if kind == "checkpoint":
            description = json.loads(path.with_suffix(".json").read_text())
            path = earlier / "checkpoint_00000006.pt"
            torch.save({"network": state, "description": description, "step": 6}, path)
        out = export_encoder(path, earlier / "out" / "encoder.pt")
        assert EncoderRecord.load(out) == expected
        written = json.loads(out.with_suffix(".json").read_text())
        assert written["input"]["hu_window"] == [-1024, 325]
        assert {"normalization", "spacing", "view_size", "orientation"}.isdisjoint(written)
        found = load_state(out)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)

    @pytest.mark.parametrize(
        ("normalization", "window"), [({}, None), ({"clip_hu": None}, None), ({"clip_hu": [0, 9]}, [0, 9])]
    )
    def test_normalization(self, earlier, normalization, window):
        edit_json(earlier / "model.pt", normalization=normalization)
        assert ModelRecord.load(earlier / "model.pt").input.hu_window == window

    def test_channels_are_those_of_the_network(self, earlier):
        content = json.loads((earlier / "model.json").read_text())
        edit_json(earlier / "model.pt", network={**content["network"], "in_channels": 2})
        assert ModelRecord.load(earlier / "model.pt").input.channels == 2

    def test_a_model_without_a_patch_size(self, earlier):
        content = json.loads((earlier / "model.json").read_text())
        del content["patch_size"]
        (earlier / "model.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"model\.json does not describe a segmentation model.*patch_size"):
            ModelRecord.load(earlier / "model.pt")


# --- round trip -----------------------------------------------------------------------------------------------------


class TestRoundTrip:
    def test_of_an_encoder(self):
        record = encoder_record(
            ResNetEncoder(**ENCODER),
            input=input_record(spacing=[1, 2, 3.5]),
            pairs=24,
            data={"training_volumes": 5},
            version="0.0.9",
            others={"views": {"scale_range": [1.1, 1.4]}, "lr": 0.2, "notes": ["a", {"b": None}]},
        )
        assert EncoderRecord.from_json(json.loads(json.dumps(record.to_json())), "file") == record

    def test_of_a_model(self):
        record = model_record(
            make_network(),
            TASK,
            annotated_key="annotated",
            pretrained_encoder="pgl_encoder.pt",
            epoch=3,
            val_mean_dice=0.25,
            others={"optimizer": "SGD", "seed": 0},
        )
        assert ModelRecord.from_json(json.loads(json.dumps(record.to_json())), "file") == record

    def test_entries(self):
        """Further ones beside the known ones, as plain values: tuples are lists."""
        record = EncoderRecord(
            architecture={"family": "resnet", "arguments": {"layers": (1, 1, 1, 1)}},
            input=InputRecord((-1024, 325.5), None, (32, 32, 16)),
            others={"lr": 0.2, "views": {"flip_prob": (0.5, 0.5)}},
        )
        assert record.to_json() == {
            "architecture": {"family": "resnet", "arguments": {"layers": [1, 1, 1, 1]}},
            "input": {
                "hu_window": [-1024, 325.5],
                "spacing": None,
                "patch_size": [32, 32, 16],
                "channels": 1,
                "orientation": "RAS",
                "channel_names": ["image"],
            },
            "method": None,
            "pairs": None,
            "stride": None,
            "channels": None,
            "pretrained": None,
            "steps": 0,
            "data": {},
            "version": __version__,
            "lr": 0.2,
            "views": {"flip_prob": [0.5, 0.5]},
        }

    def test_unknown_entries_stay_through_files(self, encoder_file, tmp_path):
        added = {"site": {"scanner": "A", "slices": [1, 2]}, "others": {"x": 1}, "normalization": "by site"}
        edit_json(encoder_file, **added)
        record = EncoderRecord.load(encoder_file)
        assert record.others == added
        assert record.input == input_record()
        out = export_encoder(encoder_file, tmp_path / "out.pt")
        assert EncoderRecord.load(out) == record
        assert added.items() <= json.loads(out.with_suffix(".json").read_text()).items()

    @pytest.mark.parametrize(("arguments", "channels"), [({}, 1), ({"in_channels": 2}, 2)])
    def test_channels_of_the_input_are_those_of_the_network(self, arguments, channels):
        content = model_record(make_network(**arguments), TASK).to_json()
        del content["input"]["channels"], content["input"]["channel_names"]
        assert ModelRecord.from_json(content, "file").input.channels == channels


# --- files that are not what they seem ------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that is there to be imported; tells whether it was."""
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "canary.py").write_text("def sing(*_, **__): pass\n")
    monkeypatch.syspath_prepend(tmp_path / "canary")
    return lambda: "canary" in sys.modules


def inference_config(model: Path) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(INFERENCE))
    parser.update({"model_path": str(model), "bundle_root": str(INFERENCE.parents[1]), "device": "cpu"})
    return parser


CODE = ["$__import__('canary')", "$import canary", "@canary", "%canary#sing", {"_target_": "canary.sing"}]
# Instead of an architecture.
NO_ARCHITECTURES = [
    {"_target_": "canary.sing"},
    {"_target_": "canary.sing", "family": "resnet", "arguments": {}},
    {"family": "resnet", "arguments": {"_target_": "canary.sing"}},
    {"family": "resnet", "arguments": {"block": "canary.sing"}},
    {"family": "resnet", "arguments": {"block": "$__import__('canary').sing"}},
    {"family": "resnet", "arguments": {"layers": "$__import__('canary')"}},
    {"family": "resnet", "arguments": {"layers": [1, 1, 1]}},
    {"family": "resnet", "arguments": {"attention": True}},
    {"family": "resnet", "arguments": {"self": 1}},
    {"family": "resnet", "arguments": {"in_channels": -1}},
    {"family": "resnet", "arguments": "$import canary"},
    {"family": "resnet", "arguments": [1, 1, 1, 1]},
    {"family": "resnet", "arguments": None},
    {"family": "resnet"},
    {"family": "swin", "arguments": {}},
    {"family": "canary.sing", "arguments": {}},
    {"family": "__class__", "arguments": {}},
    {"family": ["resnet"], "arguments": {}},
    {"family": None, "arguments": {}},
    "$import canary",
    ["resnet"],
    None,
    7,
]


class TestOddFiles:
    @pytest.mark.parametrize("architecture", NO_ARCHITECTURES, ids=str)
    def test_no_architecture_of_an_encoder(self, encoder_file, canary, architecture):
        edit_json(encoder_file, architecture=architecture)
        with pytest.raises(ValueError, match=r"pgl_encoder\.(json|pt)"):
            build_encoder(encoder_file)
        assert not canary()

    @pytest.mark.parametrize(
        "network",
        [
            *NO_ARCHITECTURES,
            {"family": "resnet", "arguments": {"encoder": {"_target_": "canary.sing"}}},
            {"family": "resnet", "arguments": {"encoder": "$__import__('canary')"}},
            {"family": "resnet", "arguments": {"encoder": {**ENCODER, "in_channels": 3}}},
            {"family": "resnet", "arguments": {"encoder": ENCODER, "decoder_channels": ["canary", 1, 1]}},
        ],
        ids=str,
    )
    def test_no_architecture_of_a_network(self, model_file, canary, network):
        edit_json(model_file, network=network)
        with pytest.raises(ValueError, match=r"model\.(json|pt)"):
            build_network(model_file)
        assert not canary()

    @pytest.mark.parametrize("code", CODE, ids=str)
    def test_code_stays_text(self, model_file, canary, code):
        """Also in a config, where text like this would be code."""
        task = {"organs": {str(code): [1], "kidneys": [2]}, "background_values": [0], "multi_label": False}
        edit_json(model_file, task=task, notes=code, data={"training_cases": code}, **{"_target_": "canary.sing"})
        parser = inference_config(model_file)
        record = parser.get_parsed_content("record")
        assert (record.others["notes"], record.others["_target_"]) == (code, "canary.sing")
        assert parser.get_parsed_content("task").names == (str(code), "kidneys")
        for name in ("network", "preprocessing", "inferer"):
            parser.get_parsed_content(name)
        assert not canary()

    @pytest.mark.parametrize("code", CODE, ids=str)
    @pytest.mark.parametrize("name", ["hu_window", "spacing", "patch_size", "orientation"])
    def test_code_instead_of_input(self, model_file, canary, name, code):
        edit_json(model_file, input={**model_record(make_network(), TASK).to_json()["input"], name: code})
        if name == "orientation" and isinstance(code, str):
            assert ModelRecord.load(model_file).input.orientation == code
        else:
            with pytest.raises(ValueError, match=rf"model\.json gives {name} as"):
                ModelRecord.load(model_file)
        inference_config(model_file)
        assert not canary()

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"input": {"window": [0, 1]}}, r"describes its input by \['window'\]"),
            ({"input": None}, r"describes its input by \[None\]"),
            ({"input": []}, r"describes its input by \[\[\]\]"),
            ({"input": "RAS"}, r"describes its input by \['RAS'\]"),
            ({"input": {"hu_window": "-1024, 325"}}, "gives hu_window as '-1024, 325'"),
            ({"input": {"hu_window": [True, "x"]}}, "gives hu_window as"),
            ({"input": {"spacing": 1.5}}, r"gives spacing as 1\.5"),
            ({"input": {"patch_size": [32, 32, 1.5]}}, "gives patch_size as"),
            ({"input": {"channels": "1"}}, "gives channels as '1'"),
            ({"input": {"orientation": None}}, "gives orientation as None"),
            ({"architecture": "resnet"}, "gives architecture as 'resnet'"),
            (
                {"architecture": {"arguments": {"in_channels": "x"}, "family": "resnet"}, "input": {}},
                "gives channels as",
            ),
            ({"method": 5}, "gives method as 5"),
            ({"steps": "many"}, "gives steps as 'many'"),
            ({"steps": None}, "gives steps as None"),
            ({"steps": True}, "gives steps as True"),
            ({"data": [1]}, r"gives data as \[1\]"),
            ({"version": 1.0}, r"gives version as 1\.0"),
            ({"stride": "16"}, "gives stride as '16'"),
        ],
        ids=str,
    )
    def test_other_kinds_in_the_record_of_an_encoder(self, encoder_file, entries, message):
        edit_json(encoder_file, **entries)
        with pytest.raises(ValueError, match=rf"pgl_encoder\.json {message}"):
            EncoderRecord.load(encoder_file)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"task": ["liver"]}, r"gives task as \['liver'\]"),
            ({"task": {}}, "describes a task that is none"),
            ({"task": {"organs": ["liver"]}}, r"describes a task that is none \(organs must give label values by name"),
            ({"task": {"organs": {"liver": [-1]}}}, "describes a task that is none"),
            ({"task": {"organs": {"liver": [1]}, "multi_label": "perhaps"}}, "describes a task that is none"),
            ({"task": {"organs": {"liver": [1]}, "code": "$import os"}}, "describes a task that is none"),
            ({"network": []}, r"gives network as \[\]"),
            ({"epoch": "2"}, "gives epoch as '2'"),
            ({"val_mean_dice": "0.5"}, r"gives val_mean_dice as '0\.5'"),
            ({"annotated_key": ["a"]}, "gives annotated_key as"),
            ({"pretrained_encoder": {"_target_": "os.system"}}, "gives pretrained_encoder as"),
        ],
        ids=str,
    )
    def test_other_kinds_in_the_record_of_a_model(self, model_file, entries, message):
        edit_json(model_file, **entries)
        with pytest.raises(ValueError, match=rf"model\.json {message}"):
            ModelRecord.load(model_file)

    @pytest.mark.parametrize("normalization", ["zscore", 3, ["clip_hu"], {"clip_hu": 5}])
    def test_odd_normalization_of_an_earlier_version(self, earlier, normalization):
        edit_json(earlier / "pgl_encoder.pt", normalization=normalization)
        with pytest.raises(ValueError, match=r"pgl_encoder\.json gives hu_window as"):
            EncoderRecord.load(earlier / "pgl_encoder.pt")

    @pytest.mark.parametrize("description", [None, [], "text", {"architecture": {}}, {"input": {}}])
    def test_a_checkpoint_with_another_description(self, encoder_file, tmp_path, description):
        content = checkpoint_content(ResNetEncoder(**ENCODER), EncoderRecord.load(encoder_file))
        content["network"] = load_state(encoder_file)
        torch.save({**content, "description": description}, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=r"checkpoint\.pt (holds a|does not describe an encoder)"):
            export_encoder(tmp_path / "checkpoint.pt", tmp_path / "out.pt")

    def test_a_checkpoint_without_a_description(self, encoder_file, tmp_path):
        torch.save({"network": load_state(encoder_file)}, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=r"checkpoint\.pt holds a NoneType, no description"):
            export_encoder(tmp_path / "checkpoint.pt", tmp_path / "out.pt")


# --- differences ----------------------------------------------------------------------------------------------------


class TestDifferences:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({}, {}),
            ({"hu_window": (-1024, 325)}, {"hu_window": [-1024.0, 325.0]}),
            ({"spacing": [1, 1, 2]}, {"spacing": (1.0, 1.0, 2.0)}),
            # A network takes patches of any size.
            ({"patch_size": [16, 16, 8]}, {"patch_size": [32, 32, 32]}),
        ],
        ids=str,
    )
    def test_none(self, first, second):
        assert InputRecord(**first).differences(InputRecord(**second)) == []

    @pytest.mark.parametrize(
        ("recorded", "here", "expected"),
        [
            (
                {"hu_window": [-1024, 325]},
                {"hu_window": (0, 9)},
                ["clipped to [-1024, 325] HU, here [0.0, 9.0] (--hu_window)"],
            ),
            ({"hu_window": [-1024, 325]}, {}, ["clipped to [-1024, 325] HU, here None (--hu_window)"]),
            ({}, {"hu_window": [0, 9]}, ["clipped to None HU, here [0.0, 9.0] (--hu_window)"]),
            ({}, {"spacing": (1, 1, 2)}, ["spacing as stored, here [1.0, 1.0, 2.0] mm (--spacing)"]),
            ({"spacing": [1, 1, 2]}, {}, ["spacing [1, 1, 2], here as stored mm (--spacing)"]),
            ({"orientation": "LPS"}, {}, ["voxel axes LPS, here RAS"]),
        ],
        ids=str,
    )
    def test_one(self, recorded, here, expected):
        assert InputRecord(**recorded).differences(InputRecord(**here)) == expected

    def test_all(self):
        other = InputRecord([0, 9], [1, 1, 1], orientation="LPS")
        assert len(InputRecord().differences(other)) == 3


def test_a_model_file_can_be_started_from_too(model_file, caplog):
    """Its encoder, and what its record says of the input."""
    network = load_pretrained(make_network(), model_file, input={"hu_window": [-1024, 325]})
    state = load_state(model_file)
    assert all(torch.equal(value, state[f"encoder.{key}"]) for key, value in network.encoder.state_dict().items())
    assert not caplog.records
    load_pretrained(make_network(), model_file, input={"hu_window": [0, 1]})
    assert "was pre-trained on other input: clipped to [-1024, 325] HU" in caplog.text


def test_a_json_of_something_else_beside_a_stock_file(tmp_path, caplog):
    torch.save(ResNetEncoder(**ENCODER).state_dict(), tmp_path / "resnet.pt")
    (tmp_path / "resnet.json").write_text('{"source": "MedicalNet"}')
    load_pretrained(make_network(), tmp_path / "resnet.pt")
    assert "the JSON beside it says nothing of its normalisation and spacing" in caplog.text


def test_ids_of_nested_entries():
    content = {"input": {"spacing": None, "hu_window": [0, 1]}, "lr": 0.1, "data": {}, "a": {"b": {"c": 1}}}
    same = {"input#spacing": None, "lr": 0.1, "data": {}, "a#b#c": 1}
    assert flat_entries(content) == {**same, "input#hu_window": [0, 1]}
    assert flat_entries(content, lists=True) == {**same, "input#hu_window#0": 0, "input#hu_window#1": 1}
