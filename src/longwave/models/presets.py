"""Published sizes, as functions that give a LanguageModel.Config; `PRESETS` lists them by their published names.

Mamba: arXiv:2312.00752, table 12, and the checkpoints state-spaces/mamba-*. Mamba-2: arXiv:2405.21060, table 10, and
state-spaces/mamba2-*. Both take the GPT-NeoX tokenizer's 50277 tokens, filled up to a multiple of 8 and of 16.
Transformer++, the baseline of both papers: rotary attention, SwiGLU, RMSNorm, no bias, in the widths and depths of
GPT-3 (arXiv:2005.14165, table 2.1) as arXiv:2312.00752, table 12 has them, with the vocabulary of Mamba-2.
Jamba: arXiv:2403.19887, section 3, and ai21labs/Jamba-v0.1. Bamba: ibm-ai-platform/Bamba-9B.
H3: arXiv:2212.14052, and the checkpoints danfu09/H3-* (of 2.7B the one with three attention layers), with the GPT-2
tokenizer's 50257 tokens, filled up to a multiple of 8. StripedHyena: togethercomputer/StripedHyena-Hessian-7B. Evo:
Nguyen et al. 2024, doi:10.1126/science.ado9336, and togethercomputer/evo-1-8k-base.
"""

from collections.abc import Callable
from functools import partial

from longwave.mixers import H3, MLP, Attention, HyenaModal, Mamba, Mamba2, MoE, SwiGLU
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
    "h3-125m": partial(h3, 768, 12, (6,), 12),
    "h3-355m": partial(h3, 1024, 24, (8, 16), 16),
    "h3-1.3b": partial(h3, 2048, 24, (8, 16), 16),
    "h3-2.7b": partial(h3, 2560, 32, (8, 16, 24), 20),
    "stripedhyena-7b": stripedhyena,
    "evo-1-8k": evo,
    "evo-1-131k": partial(evo, 16.0),
}
