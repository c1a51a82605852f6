"""Model folders: bit for bit there and back, and damage is named."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from longwave.errors import LongwaveError, UsageError
from longwave.mixers import Mamba2
from longwave.models.language_model import LanguageModel


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(model, tokens, tmp_path, tied):
    model = LanguageModel(LanguageModel.Config(**vars(model.config) | {"tie_embeddings": tied}))
    folder = tmp_path / "deep" / "model"
    model.save(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    back = LanguageModel.load(folder)
    assert back.config == model.config
    assert back.fingerprint == model.fingerprint
    for (name, a), (other, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert b.requires_grad
    assert torch.equal(back(tokens)[0], model(tokens)[0])
    assert (back.lm_head.weight is back.embedding.weight) == tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied


def test_tied_weights_train_as_one(build, tokens, tmp_path):
    build("mamba").save(tmp_path)
    model = LanguageModel.load(tmp_path)
    model.loss(tokens, tokens).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.lm_head.weight, model.embedding.weight)
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})


def test_dtypes_and_marks_are_kept(build, tmp_path):
    model = build("hybrid").bfloat16()
    model.save(tmp_path)
    back = LanguageModel.load(tmp_path)
    assert {n: p.dtype for n, p in back.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert back.layers[0].mixer.A_log.dtype == torch.float32
    marked = [n for n, p in back.named_parameters() if getattr(p, "_no_weight_decay", False)]
    assert marked == [n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)]
    assert "layers.0.mixer.A_log" in marked
    assert all(p.data_ptr() % 64 == 0 for p in back.parameters())


def test_weights_outlive_their_file(build, tokens, tmp_path):
    model = build("mamba")
    model.save(tmp_path)
    back = LanguageModel.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"gone")
    assert torch.equal(back(tokens)[0], model(tokens)[0])


def test_saving_over_an_older_model(build, tokens, tmp_path):
    build("mamba").save(tmp_path)
    model = LanguageModel.load(tmp_path)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path)(tokens)[0], model(tokens)[0])
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_older_model(build, tokens, tmp_path, monkeypatch):
    model = build("mamba")
    model.save(tmp_path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longwave.models.saving.save_file", full_disk)
    with pytest.raises(LongwaveError, match=r"cannot write .*model.safetensors: .*No space left"):
        build("mamba").save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path)(tokens)[0], model(tokens)[0])
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_wrong_tensors_are_listed(build, tmp_path):
    build("hybrid").save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    names = sorted(name for name in tensors if name.startswith("layers.4"))
    for name in names:
        del tensors[name]
    tensors["norm_f.weight"] = torch.ones(31)
    tensors["layers.0.mixer.adapter"] = torch.ones(2, 3)
    save_file(tensors, file)
    with pytest.raises(LongwaveError) as caught:
        LanguageModel.load(tmp_path)
    message = str(caught.value)
    assert f"{len(names) + 2} differ" in message
    assert message.count("expected [") == 10
    assert "missing" in message
    assert f"and {len(names) + 2 - 10} more" in message


def test_a_tensor_of_another_shape(build, tmp_path):
    build("mamba").save(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"norm_f.weight": torch.ones(31)}, file)
    with pytest.raises(LongwaveError, match=r"1 differ: norm_f.weight: expected \[32\], found \[31\]\. "):
        LanguageModel.load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), UsageError, "cannot read .*config.json: No such file"),
        (lambda f: (f / "config.json").write_text('{"vocab'), LongwaveError, "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), UsageError, r"expected an object of settings, got \[1\]"),
        (lambda f: (f / "model.safetensors").unlink(), LongwaveError, "cannot read .*model.safetensors"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
            LongwaveError,
            "cannot read .*model.safetensors as safetensors: .*copy the file again",
        ),
    ],
)
def test_damaged_folders(build, tmp_path, damage, error, message):
    build("mamba").save(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message) as caught:
        LanguageModel.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_in_the_folder_s_place(build, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(LongwaveError, match=r"cannot make the folder .*taken: File exists"):
        build("mamba").save(tmp_path / "taken")


def test_loading_holds_one_copy(tmp_path):
    """The model is built on the meta device: no parameter is drawn or allocated before the file's tensors are."""
    layers = (Mamba2.Config(d_head=16),) * 2
    LanguageModel(LanguageModel.Config(vocab_size=300, d_model=64, layers=layers)).save(tmp_path)
    state = torch.get_rng_state()
    LanguageModel.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
