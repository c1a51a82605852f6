"""The state as a value, and as a file."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longwave.errors import LongwaveError
from longwave.mixers import nested
from longwave.models.state import State


def tensors(state):
    return [state.position, *nested.tensors(state.layers)]


def equal(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tensors(a), tensors(b), strict=True))


def touch(a, b):
    """Whether two states share memory, counters aside."""
    spans = [
        {t.untyped_storage().data_ptr() for t in tensors(s) if t.numel() and t.is_floating_point()} for s in (a, b)
    ]
    return bool(spans[0] & spans[1])


@torch.no_grad()
def test_copies_are_apart(model, tokens):
    _, state = model(tokens)
    for copy in (state.clone(), state.index_select([0, 1, 2]), state.reserve(3)):
        assert not touch(copy, state)
        kept = state.clone()
        model.step(tokens[:, 0], copy.reserve(1))
        assert equal(state, kept)
    assert equal(state.clone(), state)
    assert equal(state.index_select(torch.tensor([0, 1, 2])), state)
    assert equal(state.to("cpu"), state)


@torch.no_grad()
def test_forks_and_reorders(model, tokens):
    _, state = model(tokens)
    rows = [2, 0, 2]
    chosen = state.index_select(rows)
    expected = model(tokens[:, :3], state)[0]
    forked = model(tokens[rows, :3], chosen)[0]
    torch.testing.assert_close(forked, expected[rows])
    assert state.index_select([]).position.shape == (0,)


def test_detach_cuts_the_graph(model, tokens):
    _, state = model(tokens)
    assert any(t.requires_grad for t in tensors(state))
    assert not any(t.requires_grad for t in tensors(state.detach()))
    assert equal(state.detach(), state)
    assert any(t.requires_grad for t in tensors(state.clone()))


@torch.no_grad()
def test_nbytes(model, tokens):
    _, state = model(tokens)
    assert state.reserve(0).nbytes == 3 * model.state_bytes(17)
    assert model.init_state(2, length=9).nbytes == 2 * model.state_bytes(9)
    assert model.init_state(1, length=9, dtype=torch.bfloat16).nbytes == model.state_bytes(9, torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1, 4, 5, 17])
def test_file(model, tokens, tmp_path, length):
    state = model(tokens[:, :length])[1] if length else model.init_state(3)
    path = tmp_path / "talk.state"
    state.reserve(20).save(path)
    back = State.load(path, model)
    assert equal(back, state.reserve(0))
    assert back.fingerprint == state.fingerprint
    payload = sum(tensor.nbytes for tensor in load_file(path).values())
    assert payload == 3 * model.state_bytes(length)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert path.stat().st_size == 8 + header + payload
    assert os.listdir(tmp_path) == ["talk.state"]
    assert not path.stat().st_mode & stat.S_IXUSR
    assert torch.equal(model(tokens, back)[0], model(tokens, state.reserve(0))[0])


@torch.no_grad()
def test_file_of_rows_at_different_positions(build, tokens, tmp_path):
    model = build("hybrid")
    _, state = model(tokens, lengths=torch.tensor([3, 17, 0]))
    state.save(tmp_path / "s")
    back = State.load(tmp_path / "s", model)
    assert equal(back, state.reserve(0))
    assert back.position.tolist() == [3, 17, 0]


@torch.no_grad()
def test_file_of_a_bfloat16_model(build, tokens, tmp_path):
    model = build("hybrid").bfloat16()
    _, state = model(tokens[:1])
    state.save(tmp_path / "s")
    assert equal(State.load(tmp_path / "s", model), state.reserve(0))
    assert sum(t.nbytes for t in load_file(tmp_path / "s").values()) == model.state_bytes(17)
    wider = State.load(tmp_path / "s", build("hybrid"))
    assert wider.layers[0].conv.dtype == torch.float32
    assert torch.equal(wider.layers[0].conv, state.layers[0].conv.float())


def test_file_of_a_state_with_a_graph(model, tokens, tmp_path):
    _, state = model(tokens)
    state.save(tmp_path / "s")
    assert equal(State.load(tmp_path / "s", model), state.reserve(0).detach())


def test_saving_is_whole_or_not_at_all(build, tokens, tmp_path, monkeypatch):
    model = build("hybrid")
    state = model(tokens)[1].detach()
    path = tmp_path / "s"
    state.save(path)
    before = path.read_bytes()

    def full_disk(tensors, file, header):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longwave.models.saving.save_file", full_disk)
    with pytest.raises(LongwaveError, match=r"cannot write .*/s: .*No space left on device; nothing there has changed"):
        model(tokens, state)[1].save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


def test_nowhere_to_save(build, tmp_path):
    state = build("mamba").init_state(1)
    with pytest.raises(LongwaveError, match=r"cannot write .*/missing/s: .*No such file or directory"):
        state.save(tmp_path / "missing" / "s")


def assert_refused(path, model, message):
    with pytest.raises(LongwaveError, match=message) as caught:
        State.load(path, model)
    assert "\n" not in str(caught.value)


def test_state_of_another_model(build, tmp_path):
    build("mamba").init_state(1).save(tmp_path / "s")
    assert_refused(tmp_path / "s", build("mamba2"), "of another model: 2 mamba, d_model 32 .*this one is 2 mamba2")
    other = build("mamba", norm_eps=1e-6)
    assert_refused(tmp_path / "s", other, "of another model: 2 mamba, d_model 32")


def test_missing_truncated_and_foreign_files(build, tmp_path):
    model = build("hybrid")
    path = tmp_path / "s"
    assert_refused(path, model, "cannot read .*/s as safetensors: .*o such file")
    assert_refused(tmp_path, model, "cannot read")
    model.init_state(2, length=3).save(path)
    whole = path.read_bytes()
    for end in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert_refused(path, model, "cannot read .*/s as safetensors")
    path.write_text("Once upon a time, there was a file that was no state at all.")
    assert_refused(path, model, "cannot read .*/s as safetensors")
    save_file({"weight": torch.ones(3)}, path)
    assert_refused(path, model, "holds no state")


def test_tampered_files(build, tmp_path):
    model = build("hybrid")
    path = tmp_path / "s"
    model.init_state(2).save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    good = load_file(path)
    counters = json.loads(header["counters"])

    def rewrite(tensors, **changes):
        save_file(tensors, path, header | changes)

    rewrite({name: tensor for name, tensor in good.items() if name != "layers.0.ssm"})
    assert_refused(path, model, r"layers.0.ssm: expected \[2, 64, 4\], missing")
    rewrite(good | {"layers.0.ssm": torch.zeros(2, 5, 4), "layers.9.ssm": torch.zeros(1)})
    assert_refused(path, model, r"layers.0.ssm: .* found \[2, 5, 4\].*layers.9.ssm: not expected")
    for bad in ("", "[]", "{", json.dumps(counters | {"position": None}), json.dumps(counters | {"position": ["x"]})):
        rewrite(good, counters=bad)
        assert_refused(path, model, "counters cannot be read")
    rewrite(good, counters=json.dumps({name: count for name, count in counters.items() if name != "position"}))
    assert_refused(path, model, r"position: .*missing")
