"""Distillation: modes that are there are found, the error is the true one, and decoding agrees up to it."""

import pytest
import torch
from mixer_cases import shake

from longwave.errors import UsageError
from longwave.mixers import MLP, Hyena, HyenaModal
from longwave.mixers.hyena_distill import distill, fit_modes
from longwave.models.distill import distill_model
from longwave.models.language_model import LanguageModel

torch.set_num_threads(1)


def modal_filters(p, residues, l):
    return (residues[..., None] * p[..., None] ** torch.arange(l)).real.sum(1)


@pytest.mark.parametrize("l", [200, 1025, 9000])
def test_modes_that_are_there_are_found(l):
    """Slow and fast decay, oscillation and none, from three channels of three modes each, all to rounding."""
    life = torch.tensor([[1.0, 0.3, 0.02], [0.5, 0.1, 0.05], [2.0, 0.2, 0.03]]).double() * l
    turn = torch.tensor([[0.0, 9.0, 40.0], [3.0, 0.0, 60.0], [1.0, 15.0, 70.0]]).double() / l
    p = torch.exp(torch.complex(-1 / life, turn))
    residues = torch.complex(torch.tensor([1.0, 0.5, 2.0]).double(), torch.tensor([0.0, -0.5, 1.0]).double()).expand(
        3, 3
    )
    h = modal_filters(p, residues, l)
    found = modal_filters(*fit_modes(h, 3), l)
    assert ((found - h).norm(dim=1) / h.norm(dim=1)).max() < 1e-7


@pytest.mark.parametrize("l", [1, 2, 3, 7])
def test_more_modes_than_taps(l):
    h = torch.randn(4, l, dtype=torch.float64)
    p, residues = fit_modes(h, 6)
    assert (p.abs() < 1).all()
    torch.testing.assert_close(modal_filters(p, residues, l), h, atol=1e-5, rtol=1e-5)


def test_zero_and_constant_filters():
    h = torch.stack([torch.zeros(50), torch.ones(50)]).double()
    torch.testing.assert_close(modal_filters(*fit_modes(h, 2), 50), h, atol=1e-4, rtol=0)


def test_poles_are_stable_and_the_same_every_time():
    h = torch.randn(3, 90, dtype=torch.float64)  # no modes at all
    before = torch.get_rng_state()
    p, residues = fit_modes(h, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert (p.abs() < 1).all()
    again, _ = fit_modes(h, 5)
    torch.testing.assert_close(again, p, atol=1e-6, rtol=0)
    error = (modal_filters(p, residues, 90) - h).norm(dim=1)
    assert (error < h.norm(dim=1)).all()


def make(**options):
    mixer = Hyena(8, Hyena.Config(**{"l_max": 300, "d_filter": 16} | options))
    shake(mixer.in_proj)
    return mixer


@pytest.mark.parametrize("bias", [True, False])
def test_the_mixer_agrees_up_to_the_error(bias, capsys):
    torch.manual_seed(0)
    mixer, x = make(bias=bias), torch.randn(2, 300, 8)
    modal, report = distill(mixer, 8)
    assert isinstance(modal, HyenaModal)
    assert report.worst < 1e-4
    assert capsys.readouterr().out == f"{report}\n"
    assert f"{report.worst:.1e} in the worst" in str(report)
    with torch.no_grad():
        exact, y = mixer(x)[0], modal(x)[0]
        torch.testing.assert_close(y, exact, atol=20 * report.worst * float(exact.abs().max()), rtol=0)
        state = modal.init_state(2)
        steps = torch.stack([modal.step(x[:, t], state) for t in range(300)], 1)
        torch.testing.assert_close(steps, y, atol=1e-4, rtol=1e-4)
    assert modal.state_bytes(10) == modal.state_bytes(10**6) < mixer.state_bytes(300)


def test_the_error_is_the_true_one():
    """Of filters with more in them than two modes can hold, against the impulse response of the mixer."""
    torch.manual_seed(0)
    mixer = make(frequency=10.0, shift=0.05, d_position=5)
    modal, report = distill(mixer, 2, verbose=False)
    p, residues = (
        torch.view_as_complex(getattr(modal.filter, name).detach()[:, :, 0].double()) for name in ("poles", "residues")
    )
    with torch.no_grad():
        h = mixer.filter_fn.filters(300)[0].double()
    errors = (modal_filters(p, residues, 300) - h).norm(dim=1) / h.norm(dim=1)
    torch.testing.assert_close(report.errors, errors, rtol=1e-6, atol=1e-9)
    assert 0.05 < report.worst < 1
    better = distill(mixer, 12, verbose=False)[1]
    assert better.worst < report.worst


def test_a_whole_model(capsys):
    torch.manual_seed(0)
    layers = (Hyena.Config(l_max=100, d_filter=16), MLP.Config()) * 2
    model = LanguageModel(LanguageModel.Config(vocab_size=20, d_model=8, layers=layers, norm="layer"))
    modal, reports = distill_model(model, 6)
    assert sorted(reports) == [0, 2]
    assert capsys.readouterr().out.startswith("layer 0: 8 filters of 100 taps in 6 modes: relative error ")
    assert [layer.kind for layer in modal.config.layers] == ["hyena_modal", "mlp"] * 2
    tokens = torch.randint(0, 20, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(modal(tokens)[0], model(tokens)[0], atol=1e-3, rtol=0)
    assert modal.state_bytes(1) == modal.state_bytes(10**9)


def test_what_cannot_be_distilled():
    with pytest.raises(UsageError, match="order=3"):
        distill(make(order=3), 4)
    with pytest.raises(UsageError, match="d_state must be at least 1, got 0"):
        distill(make(), 0)
    config = LanguageModel.Config(vocab_size=4, d_model=8, layers=(MLP.Config(),))
    with pytest.raises(UsageError, match="layers of kind hyena are distilled, and this model has"):
        distill_model(LanguageModel(config), 4)
