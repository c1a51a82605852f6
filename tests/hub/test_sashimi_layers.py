"""SaShiMi's published names: the exact keys and shapes, and values against the equations written out in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from torch.testing import assert_close

from longwave.errors import LongwaveError, UsageError
from longwave.hub.sashimi import load_sashimi, sashimi_state_dict
from longwave.mixers import GRU, S4, S4D
from longwave.models.sashimi import SaShiMi

torch.set_num_threads(1)
V, D, N, POOL, LENGTH = 11, 2, 2, 3, 16


def published(unet: bool = False) -> dict[str, Tensor]:
    """A state dict as the authors' Sashimi(d_model=2, n_layers=1, pool=[3], d_state=4) has it, with an embedding and a
    head around; C for kernels of 16 tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def s4_block(name: str, d: int) -> dict[str, Tensor]:
        layer = f"{name}.layer.layer"
        return {
            f"{layer}.D": draw(1, d),
            f"{layer}.kernel.C": draw(1, d, N, 2),
            f"{layer}.kernel.inv_dt": draw(d, 1) - 1,
            f"{layer}.kernel.B": draw(1, d, N, 2),
            f"{layer}.kernel.P": draw(1, d, N, 2),
            f"{layer}.kernel.A_real": draw(d, N),
            f"{layer}.kernel.A_imag": draw(d, N),
            f"{layer}.kernel.l_kernel": torch.tensor(LENGTH),
            f"{name}.layer.output_linear.0.weight": draw(2 * d, d),
            f"{name}.layer.output_linear.0.bias": draw(2 * d),
            f"{name}.norm.weight": 1 + draw(d),
            f"{name}.norm.bias": draw(d),
        }

    def ff_block(name: str, d: int) -> dict[str, Tensor]:
        return {
            f"{name}.layer.ff.0.0.weight": draw(2 * d, d, 1),
            f"{name}.layer.ff.0.0.bias": draw(2 * d),
            f"{name}.layer.ff.2.weight": draw(d, 2 * d, 1),
            f"{name}.layer.ff.2.bias": draw(d),
            f"{name}.norm.weight": 1 + draw(d),
            f"{name}.norm.bias": draw(d),
        }

    before = s4_block("d_layers.0", D) | ff_block("d_layers.1", D) if unet else {}
    down = f"d_layers.{2 if unet else 0}.linear"
    return {
        **before,
        f"{down}.weight": draw(2 * D, POOL * D, 1),
        f"{down}.bias": draw(2 * D),
        **s4_block("c_layers.0", 2 * D),
        **ff_block("c_layers.1", 2 * D),
        "u_layers.0.0.linear.weight": draw(POOL * D, 2 * D, 1),
        "u_layers.0.0.linear.bias": draw(POOL * D),
        **s4_block("u_layers.0.1", D),
        **ff_block("u_layers.0.2", D),
        "norm.weight": 1 + draw(D),
        "norm.bias": draw(D),
        "encoder.0.weight": draw(V, D),
        "decoder.0.output_transform.weight": draw(V, D),
        "decoder.0.output_transform.bias": draw(V),
    }


AROUND = {"embedding": "encoder.0.weight", "head": "decoder.0.output_transform"}


def s4(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x (l, d). One dense matrix of all N modes and their conjugates for each channel, step by step."""
    of = {key: tensors[f"{name}.layer.layer.kernel.{key}"] for key in ("C", "inv_dt", "B", "P", "A_real", "A_imag")}
    ys = []
    for i in range(x.shape[1]):
        Lambda = -of["A_real"][i].exp() - 1j * of["A_imag"][i]
        P, B, C = (torch.view_as_complex(of[key][0, i]) for key in ("P", "B", "C"))
        Lambda, P, B, C = (torch.cat([t, t.conj()]) for t in (Lambda, P, B, C))
        A, half, eye = torch.diag(Lambda) - torch.outer(P, P.conj()), of["inv_dt"][i].exp() / 2, torch.eye(2 * N)
        inverse = torch.linalg.inv(eye - half * A)
        Abar, Bbar = inverse @ (eye + half * A), 2 * half * inverse @ B
        C = torch.linalg.solve((eye - torch.linalg.matrix_power(Abar, LENGTH)).T, C)
        state = torch.zeros(2 * N, dtype=torch.complex128)
        y = []
        for u in x[:, i]:
            state = Abar @ state + Bbar * u
            y.append((C @ state).real)
        ys.append(torch.stack(y) + tensors[f"{name}.layer.layer.D"][0, i] * x[:, i])
    a, b = (gelu(torch.stack(ys, 1)) @ tensors[f"{name}.layer.output_linear.0.weight"].T
            + tensors[f"{name}.layer.output_linear.0.bias"]).chunk(2, -1)  # fmt: skip
    return a * b.sigmoid()


def block(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    z = layer_norm(x, x.shape[-1:], tensors[f"{name}.norm.weight"], tensors[f"{name}.norm.bias"])
    if f"{name}.layer.layer.D" in tensors:
        return x + s4(tensors, name, z)
    first, second = f"{name}.layer.ff.0.0", f"{name}.layer.ff.2"
    z = gelu(z @ tensors[f"{first}.weight"][..., 0].T + tensors[f"{first}.bias"])
    return x + z @ tensors[f"{second}.weight"][..., 0].T + tensors[f"{second}.bias"]


@torch.no_grad()
@pytest.mark.parametrize("unet", [False, True])
def test_the_equations_written_out(unet):
    tensors, samples = published(unet), torch.randint(V, (1, 15))
    skips = [tensors["encoder.0.weight"][samples[0]]]
    if unet:
        skips.append(block(tensors, "d_layers.0", skips[-1]))
        skips.append(block(tensors, "d_layers.1", skips[-1]))
    down, up = f"d_layers.{2 if unet else 0}.linear", "u_layers.0.0.linear"
    grouped = skips[-1].view(5, POOL, D).transpose(1, 2).reshape(5, D * POOL)  # channels first, then tokens
    low = grouped @ tensors[f"{down}.weight"][..., 0].T + tensors[f"{down}.bias"]
    low = low + block(tensors, "c_layers.1", block(tensors, "c_layers.0", low))
    high = low @ tensors[f"{up}.weight"][..., 0].T + tensors[f"{up}.bias"]
    high = torch.cat([torch.zeros(1, D * POOL), high[:-1]])  # a group later
    x = high.view(5, D, POOL).transpose(1, 2).reshape(15, D) + skips.pop()
    u = x
    for name in ("u_layers.0.1", "u_layers.0.2"):
        x = block(tensors, name, x) + (skips.pop() if unet else 0)
    x = x if unet else x + u
    x = layer_norm(x, (D,), tensors["norm.weight"], tensors["norm.bias"])
    head = "decoder.0.output_transform"
    expected = x @ tensors[f"{head}.weight"].T + tensors[f"{head}.bias"]

    model = load_sashimi(tensors, **AROUND)
    assert model.config == SaShiMi.Config(
        vocab_size=V, d_model=D, n_layers=1, pool=(POOL,), unet=unet, mixer=S4.Config(d_state=2 * N)
    )
    assert_close(model(samples)[0][0], expected)
    state = model.init_state(1)
    assert_close(torch.stack([model.step(samples[:, t], state) for t in range(15)], 1)[0], expected)


@pytest.mark.parametrize("unet", [False, True])
def test_there_and_back(unet):
    tensors = published(unet)
    prefixed = {name if name.startswith(("enc", "dec")) else f"model.{name}": t for name, t in tensors.items()}
    model = load_sashimi(prefixed, prefix="model.", **AROUND)
    back = sashimi_state_dict(model, prefix="model.", l_kernel=LENGTH, **AROUND)
    assert back.keys() == prefixed.keys()
    for name, tensor in prefixed.items():
        assert back[name].shape == tensor.shape
        if name.endswith("kernel.C"):
            assert_close(back[name], tensor)
        else:
            assert torch.equal(back[name], tensor), name


def test_diagonal_layers_and_a_backbone_alone():
    mixer = S4D.Config(d_state=4, n_ssm=1)
    model = SaShiMi(SaShiMi.Config(vocab_size=V, d_model=4, n_layers=2, pool=(2, 2), ff=0, mixer=mixer))
    tensors = sashimi_state_dict(model)
    again = load_sashimi(tensors, embedding="embedding.weight", head="head")
    x = torch.randint(V, (2, 9))
    assert again.config == model.config
    assert_close(again(x)[0], model(x)[0])
    alone = {name: t for name, t in tensors.items() if not name.startswith(("embedding", "head"))}
    fresh = load_sashimi(alone, vocab_size=7)
    assert fresh(torch.randint(7, (1, 9)))[0].shape == (1, 9, 7)
    with pytest.raises(UsageError, match="vocab_size=256"):
        load_sashimi(alone)


def test_tensors_of_another_model():
    tensors = published()
    cases = [
        ({"norm.weight"}, {}, "is no SaShiMi"),
        ({"u_layers.0.0.linear.bias"}, {}, r"u_layers\.0\.0\.linear\.bias: expected \[6\], missing"),
        (set(), {"d_layers.9.x": torch.zeros(3)}, r"d_layers\.9\.x: not expected, found \[3\]"),
        ({"u_layers.0.1.layer.layer.D"}, {}, "layer.D"),
        ({"encoder.0.weight"}, {}, r"there is no tensor encoder\.0\.weight"),
    ]
    for without, beside, said in cases:
        changed = {name: t for name, t in tensors.items() if name not in without} | beside
        with pytest.raises(LongwaveError, match=said):
            load_sashimi(changed, **AROUND)
    with pytest.raises(UsageError, match="blocks of s4 or s4d"):
        sashimi_state_dict(SaShiMi(SaShiMi.Config(d_model=8, n_layers=1, mixer=GRU.Config())))
