"""`longwave inspect` of a folder of every format: its pattern of layers, parameters, and state at given lengths."""

import json
import math
from typing import Any

import pytest
import torch

from longwave.cli import run
from longwave.hub import FORMATS
from longwave.hub.export import export
from longwave.hub.load import load
from longwave.mixers import H3, MLP, Attention, Hyena, HyenaModal, Mamba, Mamba2, MoE, Parallel, Shared, SwiGLU
from longwave.models.language_model import LanguageModel

SSM = Mamba2.Config(d_state=8, d_head=8)
ABOVE = Mamba2.Config(d_state=8, d_head=8, dt_limit=(1e-3, math.inf))
ATTENTION, UNTURNED = Attention.Config(n_heads=2), Attention.Config(n_heads=2, rotary=0.0)
SWIGLU, SQUARED = SwiGLU.Config(d_inner=128), MLP.Config(d_inner=24, activation="relu2", bias=False)
LEARNED = Mamba.Config(inner_norm="learned")
JAMBA_EXPERTS = MoE.Config(n_experts=4, expert=SWIGLU, router="softmax_topk")
GRANITE_EXPERTS = MoE.Config(n_experts=4, expert=SwiGLU.Config(d_inner=24), shared=SWIGLU)
NEMOTRON_EXPERTS = MoE.Config(n_experts=4, expert=SQUARED, shared=SQUARED, router="sigmoid")
HALF = Attention.Config(n_heads=2, rotary=0.5)
SIDE_BY_SIDE = Parallel.Config(mixers=(SSM, ATTENTION))
GELU = MLP.Config(d_inner=128)
CALLER = Shared.Config(mixer=ABOVE, attention=Attention.Config(n_heads=4, scale=8**-0.5), d_inner=24, rank=3)
UNTIED = {"tie_embeddings": False}

TINY: dict[str, tuple[tuple[Any, ...], str, dict[str, Any]]] = {
    "mamba": ((Mamba.Config(),) * 3, "mamba*3", {}),
    "mamba2": ((SSM,) * 3, "mamba2*3", {}),
    "falcon_mamba": ((Mamba.Config(inner_norm="weightless"),), "mamba", {}),
    "jamba": (
        (LEARNED, SWIGLU, UNTURNED, JAMBA_EXPERTS, LEARNED, SWIGLU),
        "mamba swiglu attention moe mamba swiglu",
        {"norm_eps": 1e-6, **UNTIED},
    ),
    "bamba": ((SSM, SWIGLU, SSM, SWIGLU, HALF, SWIGLU), "(mamba2 swiglu)*2 attention swiglu", UNTIED),
    "granitemoehybrid": ((SSM, GRANITE_EXPERTS, UNTURNED, GRANITE_EXPERTS), "mamba2 moe attention moe", UNTIED),
    "falcon_h1": ((SIDE_BY_SIDE, SWIGLU) * 2, "(parallel(mamba2 attention) swiglu)*2", UNTIED),
    "nemotron_h": ((ABOVE, SQUARED, ABOVE, UNTURNED, NEMOTRON_EXPERTS), "mamba2 mlp mamba2 attention moe", UNTIED),
    "zamba2": ((ABOVE, CALLER, ABOVE, CALLER), "(mamba2 shared(mamba2))*2", {}),
    "state_spaces": ((SSM, SWIGLU, ATTENTION, SWIGLU), "mamba2 swiglu attention swiglu", {"residual_fp32": True}),
    "h3": ((H3.Config(d_state=8), GELU, ATTENTION, GELU), "h3 mlp attention mlp", {"norm": "layer"}),
    "hyena": ((Hyena.Config(l_max=300), GELU) * 2, "(hyena mlp)*2", {"norm": "layer"}),
    "stripedhyena": (
        (HyenaModal.Config(), SWIGLU, ATTENTION, SWIGLU),
        "hyena_modal swiglu attention swiglu",
        {"norm": "rms_outer_eps", **UNTIED},
    ),
}


@pytest.mark.parametrize("format", FORMATS)
def test_inspect(format, tmp_path, capsys):
    layers, pattern, options = TINY[format]
    torch.manual_seed(0)
    export(LanguageModel(LanguageModel.Config(vocab_size=40, d_model=32, layers=layers, **options)), tmp_path, format)
    assert run(["inspect", str(tmp_path), "--length", "7", "200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = load(tmp_path).model
    assert found["layers"] == pattern
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert [row["state_bytes"] for row in found["lengths"]] == [model.init_state(1, length=n).nbytes for n in (7, 200)]
    assert [row["flops"] for row in found["lengths"]] == [model.flops(7), model.flops(200)]

    touched = model(torch.zeros(1, 1, dtype=torch.int64))[0]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(touched.sum(), [p for p in parameters if p.requires_grad], allow_unused=True)
    held = dict(zip((n for n, p in zip(names, parameters, strict=True) if p.requires_grad), gradients, strict=True))
    idle = sum(p.numel() for n, p in zip(names, parameters, strict=True) if ".experts." in n and held[n] is None)
    assert found["active_parameters"] == found["parameters"] - idle

    assert run(["inspect", str(tmp_path), "--length", "200"]) == 0
    text = capsys.readouterr().out
    assert pattern in text
    assert f"{found['parameters']:,} parameters" in text
    assert (f"({found['active_parameters']:,} work on a token)" in text) == (idle > 0)
    assert f"{model.state_bytes(200) / 2**20:,.2f}" in text
