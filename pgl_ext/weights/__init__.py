"""Files of weights with the records beside them: writing, loading with a report, and building networks."""

from pgl_ext.weights.files import load_state, model_files, save_decoder, save_encoder, save_weights
from pgl_ext.weights.loading import (
    LoadReport,
    build_encoder,
    build_network,
    compare_states,
    load_decoder,
    load_encoder,
    load_model,
    network_of,
)
from pgl_ext.weights.records import EncoderRecord, InputRecord, ModelRecord
from pgl_ext.weights.start import decoder_file, load_pretrained, recorded_architecture, recorded_input, start_method

__all__ = [
    "EncoderRecord",
    "InputRecord",
    "LoadReport",
    "ModelRecord",
    "build_encoder",
    "build_network",
    "compare_states",
    "decoder_file",
    "load_decoder",
    "load_encoder",
    "load_model",
    "load_pretrained",
    "load_state",
    "model_files",
    "network_of",
    "recorded_architecture",
    "recorded_input",
    "save_decoder",
    "save_encoder",
    "save_weights",
    "start_method",
]
