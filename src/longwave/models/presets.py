"""Published sizes, as functions that give a LanguageModel.Config; `PRESETS` lists them by their published names.

Mamba: arXiv:2312.00752, table 12, and the checkpoints state-spaces/mamba-*. Mamba-2: arXiv:2405.21060, table 10, and
state-spaces/mamba2-*. Both take the GPT-NeoX tokenizer's 50277 tokens, filled up to a multiple of 8 and of 16.
Transformer++, the baseline of both papers: rotary attention, SwiGLU, RMSNorm, no bias, in the widths and depths of
GPT-3 (arXiv:2005.14165, table 2.1) as arXiv:2312.00752, table 12 has them, with the vocabulary of Mamba-2.
Jamba: arXiv:2403.19887, section 3, and ai21labs/Jamba-v0.1. Bamba: ibm-ai-platform/Bamba-9B.
H3: arXiv:2212.14052, and the checkpoints danfu09/H3-* (of 2.7B the one with three attention layers), with the GPT-2
tokenizer's 50257 tokens, filled up to a multiple of 8. HyenaDNA: arXiv:2306.15794, and LongSafari/hyenadna-*-seqlen,
whose 12 tokens are filled up to 16. StripedHyena: togethercomputer/StripedHyena-Hessian-7B. Evo:
Nguyen et al. 2024, doi:10.1126/science.ado9336, and togethercomputer/evo-1-8k-base. Falcon-H1: arXiv:2507.22448, and
tiiuae/Falcon-H1-0.5B-Base. Nemotron-H: arXiv:2504.03624, and nvidia/Nemotron-H-8B-Base-8K; Nemotron 3 Nano:
nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16. Zamba2: arXiv:2411.15242, and Zyphra/Zamba2-7B. Their dt is clamped from
below as transformers does it.
"""

import math
from collections.abc import Callable
from functools import partial

from longwave.mixers import H3, MLP, Attention, Hyena, HyenaModal, Mamba, Mamba2, MoE, Parallel, Shared, SwiGLU
from longwave.models.language_model import LanguageModel


def mamba(d_model: int, n_layers: int) -> LanguageModel.Config:
    """Mamba-1: one slot per layer."""
    return LanguageModel.Config(
        vocab_size=50280, d_model=d_model, layers=(Mamba.Config(),) * n_layers, residual_fp32=True
    )


def mamba2(d_model: int, n_layers: int) -> LanguageModel.Config:
    """Mamba-2: one slot per layer."""
    return LanguageModel.Config(
        vocab_size=50288, d_model=d_model, layers=(Mamba2.Config(),) * n_layers, residual_fp32=True
    )


def transformerpp(d_model: int, n_layers: int, n_heads: int) -> LanguageModel.Config:
    """Transformer++: two slots per layer, attention and SwiGLU of 8/3 the width."""
    block = (Attention.Config(n_heads=n_heads), SwiGLU.Config())
    return LanguageModel.Config(vocab_size=50288, d_model=d_model, layers=block * n_layers, residual_fp32=True)


def jamba() -> LanguageModel.Config:
    """Jamba: of 8 mixers one is attention, without positions; every other MLP is 16 experts, of which 2 work."""
    mamba = Mamba.Config(inner_norm="learned")
    attention = Attention.Config(n_heads=32, n_kv_heads=8, rotary=0.0)
    mlp = SwiGLU.Config(d_inner=14336)
    moe = MoE.Config(n_experts=16, top_k=2, expert=mlp, router="softmax_topk")
    block = (mamba, mlp, mamba, moe) * 2 + (attention, mlp, mamba, moe) + (mamba, mlp, mamba, moe)
    return LanguageModel.Config(vocab_size=65536, d_model=4096, layers=block * 4, norm_eps=1e-6, tie_embeddings=False)


def bamba() -> LanguageModel.Config:
    """Bamba: Mamba-2 but for three layers of attention, which turns half of each head; a SwiGLU after each."""
    attention = Attention.Config(n_heads=32, n_kv_heads=8, rotary=0.5)
    mixers = [attention if i in (9, 18, 27) else Mamba2.Config() for i in range(32)]
    layers = tuple(slot for mixer in mixers for slot in (mixer, SwiGLU.Config(d_inner=14336)))
    return LanguageModel.Config(vocab_size=128256, d_model=4096, layers=layers, tie_embeddings=False)


def falcon_h1() -> LanguageModel.Config:
    """Falcon-H1, 0.5B: Mamba-2 beside attention in every layer, and a SwiGLU after them; multipliers as trained."""
    root = 0.3535533905932738  # of 1/8
    ssm = Mamba2.Config(d_inner=1536, norm=False, in_multipliers=(root, 0.25, root, 0.5, root))
    attention = Attention.Config(
        n_heads=8, n_kv_heads=2, d_head=64, rotary_base=1e11, key_multiplier=0.39062499999999994
    )
    both = Parallel.Config(
        mixers=(ssm, attention), in_multipliers=(1.25, 1.0), out_multipliers=(0.23570226039551587, 0.9375)
    )
    mlp = SwiGLU.Config(d_inner=2048, gate_multiplier=0.8838834764831844, down_multiplier=0.5859375)
    return LanguageModel.Config(
        vocab_size=32784,
        d_model=1024,
        layers=(both, mlp) * 36,
        tie_embeddings=False,
        embedding_multiplier=5.656854249492381,
        logits_multiplier=0.0390625,
    )


def nemotron_h(d_model: int, n_ssm_heads: int, d_mlp: int, n_kv_heads: int, pattern: str) -> LanguageModel.Config:
    """Nemotron-H. A layer is M, Mamba-2; *, attention without positions; -, an MLP; or E, 128 experts, 6 at work."""
    expert, shared = (MLP.Config(d_inner=d, activation="relu2", bias=False) for d in (d_mlp, 2 * d_mlp))
    layers = {
        "M": Mamba2.Config(d_inner=64 * n_ssm_heads, n_groups=8, dt_limit=(1e-3, math.inf)),
        "*": Attention.Config(n_heads=32, n_kv_heads=n_kv_heads, d_head=128, rotary=0.0),
        "-": expert,
        "E": MoE.Config(n_experts=128, top_k=6, expert=expert, shared=shared, router="sigmoid", scale=2.5),
    }
    return LanguageModel.Config(
        vocab_size=131072, d_model=d_model, layers=tuple(layers[letter] for letter in pattern), tie_embeddings=False
    )


def zamba2() -> LanguageModel.Config:
    """Zamba2, 7B: Mamba-2, and with every sixth layer one of two shared Transformers in turn."""
    ssm = Mamba2.Config(d_state=64, n_groups=2, dt_limit=(1e-3, math.inf))
    attention = Attention.Config(n_heads=32, n_kv_heads=32, d_head=224, scale=112**-0.5)
    shared = [Shared.Config(mixer=ssm, index=i, attention=attention, d_inner=14336) for i in (0, 1)]
    callers = {i: shared[call % 2] for call, i in enumerate((6, *range(11, 78, 6)))}
    return LanguageModel.Config(vocab_size=32000, d_model=3584, layers=tuple(callers.get(i, ssm) for i in range(81)))


def h3(d_model: int, n_layers: int, attention_at: tuple[int, ...], n_heads: int) -> LanguageModel.Config:
    """H3: an MLP after each mixer, a few of which are attention without positions."""
    attention = Attention.Config(n_heads=n_heads, rotary=0.0, qkv_bias=True, out_bias=True)
    mixers = [attention if i in attention_at else H3.Config() for i in range(n_layers)]
    layers = tuple(slot for mixer in mixers for slot in (mixer, MLP.Config()))
    return LanguageModel.Config(vocab_size=50264, d_model=d_model, layers=layers, norm="layer")


def stripedhyena() -> LanguageModel.Config:
    """StripedHyena: Hyena blocks of two modes, and grouped-query attention in every second place."""
    attention = Attention.Config(n_heads=32, n_kv_heads=8, rotary_base=500_000.0)
    mlp = SwiGLU.Config(d_inner=14336)
    layers = (HyenaModal.Config(n_heads=32, d_state=2), mlp, attention, mlp) * 16
    return LanguageModel.Config(vocab_size=32000, d_model=4096, layers=layers, tie_embeddings=False)


def evo(rotary_scaling: float = 1.0) -> LanguageModel.Config:
    """Evo-1, a model of DNA by single bases: Hyena blocks of eight modes but for three layers of attention."""
    attention = Attention.Config(n_heads=32, rotary_scaling=rotary_scaling, qkv_bias=True, out_bias=True)
    hyena, mlp = HyenaModal.Config(n_heads=32), SwiGLU.Config(d_inner=10928, activation="gelu")
    layers = tuple(slot for i in range(32) for slot in (attention if i in (8, 16, 24) else hyena, mlp))
    return LanguageModel.Config(vocab_size=512, d_model=4096, layers=layers, norm="rms_outer_eps", norm_eps=1e-6)


def hyenadna(d_model: int, n_layers: int, l_max: int) -> LanguageModel.Config:
    """HyenaDNA, a model of DNA by single bases: an MLP after each Hyena, whose filters span the whole sequence."""
    hyena = Hyena.Config(l_max=l_max, d_position=5, frequency=10.0, shift=0.05)
    layers = (hyena, MLP.Config()) * n_layers
    return LanguageModel.Config(vocab_size=16, d_model=d_model, layers=layers, norm="layer", residual_fp32=True)


NEMOTRON_H = "M-M-M-M*" + "-M-M-M-M-M*" * 3 + "-M-M-M-M-M-"
NEMOTRON_3_NANO = "MEMEM*E" * 5 + "MEMEMEM*E" + "MEMEMEME"
PRESETS: dict[str, Callable[[], LanguageModel.Config]] = {
    "mamba-130m": partial(mamba, 768, 24),
    "mamba-370m": partial(mamba, 1024, 48),
    "mamba-790m": partial(mamba, 1536, 48),
    "mamba-1.4b": partial(mamba, 2048, 48),
    "mamba-2.8b": partial(mamba, 2560, 64),
    "mamba2-130m": partial(mamba2, 768, 24),
    "mamba2-370m": partial(mamba2, 1024, 48),
    "mamba2-780m": partial(mamba2, 1536, 48),
    "mamba2-1.3b": partial(mamba2, 2048, 48),
    "mamba2-2.7b": partial(mamba2, 2560, 64),
    "transformerpp-125m": partial(transformerpp, 768, 12, 12),
    "transformerpp-350m": partial(transformerpp, 1024, 24, 16),
    "transformerpp-760m": partial(transformerpp, 1536, 24, 16),
    "transformerpp-1.3b": partial(transformerpp, 2048, 24, 32),
    "transformerpp-2.7b": partial(transformerpp, 2560, 32, 32),
    "jamba-v0.1": jamba,
    "bamba-9b": bamba,
    "falcon-h1-0.5b": falcon_h1,
    "nemotron-h-4b": partial(nemotron_h, 3072, 112, 12288, 8, NEMOTRON_H),
    "nemotron-h-8b": partial(nemotron_h, 4096, 128, 21504, 8, NEMOTRON_H),
    "nemotron-3-nano-30b": partial(nemotron_h, 2688, 64, 1856, 2, NEMOTRON_3_NANO),
    "zamba2-7b": zamba2,
    "h3-125m": partial(h3, 768, 12, (6,), 12),
    "h3-355m": partial(h3, 1024, 24, (8, 16), 16),
    "h3-1.3b": partial(h3, 2048, 24, (8, 16), 16),
    "h3-2.7b": partial(h3, 2560, 32, (8, 16, 24), 20),
    "stripedhyena-7b": stripedhyena,
    "evo-1-8k": evo,
    "evo-1-131k": partial(evo, 16.0),
    "hyenadna-tiny-1k": partial(hyenadna, 128, 2, 1026),
    "hyenadna-tiny-1k-d256": partial(hyenadna, 256, 2, 1026),
    "hyenadna-tiny-16k-d128": partial(hyenadna, 128, 2, 16386),
    "hyenadna-small-32k": partial(hyenadna, 256, 4, 32770),
    "hyenadna-medium-160k": partial(hyenadna, 256, 8, 160_002),
    "hyenadna-medium-450k": partial(hyenadna, 256, 8, 450_002),
    "hyenadna-large-1m": partial(hyenadna, 256, 8, 1_000_002),
}
