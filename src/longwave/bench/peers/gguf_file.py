"""Write an HF folder of `mamba` or `mamba2` as a GGUF file without a tokenizer, for llama.cpp to run beside us.

Matrices take the asked-for type; convolutions, A, D, norms and biases stay float32, as llama.cpp expects them. A row
whose length is no multiple of a quantised type's block is written as float16, as its own quantiser does.
"""

import json
import math
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
from safetensors.numpy import load_file

_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_MATRICES = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Write the float32 HF folder `folder` to `path` with matrices in `dtype`, one of TYPES."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, config["model_type"])
    _write_settings(writer, config, dtype)
    for key, value in load_file(folder / "model.safetensors").items():
        name, array = _tensor(key, value.astype(np.float32), config)
        data, kind = _encode(name, array, TYPES[dtype])
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_settings(writer: gguf.GGUFWriter, config: dict, dtype: str) -> None:
    is_mamba2 = config["model_type"] == "mamba2"
    inner = config.get("intermediate_size", config["expand"] * config["hidden_size"])
    rank = config["num_heads"] if is_mamba2 else config["time_step_rank"]
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_context_length(2**20)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(config["state_size"])
    writer.add_ssm_time_step_rank(math.ceil(config["hidden_size"] / 16) if rank == "auto" else rank)
    if is_mamba2:
        writer.add_ssm_group_count(config["n_groups"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _tensor(key: str, value: np.ndarray, config: dict) -> tuple[str, np.ndarray]:
    """A tensor's name and values as llama.cpp wants them, from its HF key."""
    key = key.removeprefix("backbone.")
    if not key.startswith("layers."):
        names = {"embeddings.weight": "token_embd.weight", "norm_f.weight": "output_norm.weight"}
        return names.get(key, "output.weight"), value
    _, layer, rest = key.split(".", 2)
    if rest == "mixer.A_log":
        value = -np.exp(value)
    elif rest == "mixer.conv1d.weight":
        value = value[:, 0]
    if config["model_type"] == "mamba2":
        if rest in ("mixer.A_log", "mixer.D"):
            value = value[:, None]
        elif rest == "mixer.norm.weight":
            value = value.reshape(config["n_groups"], -1)
    return f"blk.{layer}.{_LAYER[rest]}", value


def _encode(name: str, array: np.ndarray, kind: gguf.GGMLQuantizationType):
    if not name.endswith(_MATRICES):
        kind = gguf.GGMLQuantizationType.F32
    elif array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    return gguf.quants.quantize(array, kind), kind
