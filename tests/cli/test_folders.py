"""`longwave import`, `export` and `inspect`: folders and files, looked at and turned into one another."""

import json
from pathlib import Path

import pytest
import torch

import longwave as lw
from longwave.errors import UsageError
from longwave.hub import FORMATS
from longwave.models.pattern import layers_from, pattern_of
from longwave.models.presets import PRESETS
from longwave.tasks.tokenizer import train_bpe


def test_there_and_back(longwave, trained):
    for name in ("mamba", "state_spaces"):
        assert longwave("export", trained, name, "--format", name).out == f"{name}: written as {name}\n"
        done = longwave("import", name, f"back-{name}")
        assert done.status == 0
        assert done.out.startswith(f"back-{name}: mamba*2, ")
        ours, back = lw.load(trained).model, lw.load(f"back-{name}").model
        assert torch.equal(ours(torch.arange(50)[None])[0], back(torch.arange(50)[None])[0])


def test_json(longwave, trained):
    done = longwave("export", trained, "hf", "--format", "mamba", "--json")
    assert json.loads(done.out) == {"folder": "hf", "format": "mamba"}
    found = json.loads(longwave("import", "hf", "mine", "--json").out)
    parameters = lw.load(trained).model.parameter_count()
    assert found == {"folder": "mine", "layers": "mamba*2", "parameters": parameters, "tokenizer": True}


def test_dtype(longwave, trained):
    longwave("export", trained, "hf", "--format", "mamba", "--dtype", "float16")
    longwave("import", trained, "mine", "--dtype", "bfloat16")
    assert lw.load("hf").model.embedding.weight.dtype == torch.float16
    assert lw.load("mine").model.embedding.weight.dtype == torch.bfloat16


def test_import_with_a_tokenizer(longwave, model, corpus):
    (model / "tokenizer.json").unlink()
    done = longwave("import", model, "without")
    assert "--tokenizer" in done.out
    assert lw.load("without").tokenizer is None
    assert longwave("import", model, "with", "--tokenizer", "bytes").status == 0
    assert lw.load("with").tokenizer.vocab_size == 257
    train_bpe([corpus.read_text()], 300).save("bpe")
    done = longwave("import", model, "wrong", "--tokenizer", "bpe")
    assert (done.status, Path("wrong").exists()) == (2, False)
    assert "do not belong together" in done.complaint
    done = longwave("import", model, "wrong", "--tokenizer", model)
    assert "has no tokenizer.json" in done.complaint


def test_export_that_cannot_be_expressed(longwave, trained):
    done = longwave("export", trained, "hf", "--format", "mamba2")
    assert (done.status, Path("hf").exists()) == (2, False)
    assert "model.save(folder) keeps every model" in done.complaint
    done = longwave("export", trained, "hf", "--format", "mamba3")
    assert f"Did you mean {'mamba'!r}" in done.complaint or all(name in done.complaint for name in FORMATS)


def test_inspect_a_run(longwave, trained):
    found = json.loads(longwave("inspect", trained, "--length", 7, 1000, "--json").out)
    model = lw.load(trained).model
    assert found["layers"] == "mamba*2"
    assert found["dtype"] == "float32"
    assert found["parameters"] == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    assert found["weight_bytes"] == 4 * found["parameters"]
    assert found["lengths"][0]["state_bytes"] == model.init_state(1, length=7).nbytes
    assert [row["flops"] for row in found["lengths"]] == [model.flops(7), model.flops(1000)]
    assert lw.LanguageModel.Config.from_dict(found["config"]) == model.config
    text = longwave("inspect", trained).out
    assert f"{found['parameters']:,} parameters" in text
    assert "262,144" in text


def test_inspect_a_preset_reads_and_builds_no_weights(longwave, monkeypatch):
    monkeypatch.setattr("longwave.cli.inspect.open_weights", None)
    found = json.loads(longwave("inspect", "mamba-2.8b", "--dtype", "bfloat16", "--json").out)
    assert found["layers"] == "mamba*64"
    assert found["parameters"] == 2_768_345_600  # as the published checkpoint has it
    assert 2 * found["parameters"] < found["weight_bytes"] < 2.1 * found["parameters"]  # A_log and D are float32
    assert "--length must be at least 1, got 0" in longwave("inspect", "mamba-2.8b", "--length", 0).complaint


def test_inspect_a_foreign_folder(longwave, trained):
    longwave("export", trained, "hf", "--format", "state_spaces", "--dtype", "bfloat16")
    found = json.loads(longwave("inspect", "hf", "--json").out)
    assert (found["layers"], found["dtype"]) == ("mamba*2", "bfloat16")


def test_inspect_a_state(longwave, trained):
    longwave("generate", trained, "state", "--max-tokens", 4, "--state-out", "a.state")
    model = lw.load(trained).model
    found = json.loads(longwave("inspect", "a.state", "--json").out)
    assert found == {"model": model.fingerprint, "tokens": [9], "bytes": model.state_bytes(9)}
    assert f"after 9 tokens, {model.state_bytes(9):,} bytes" in longwave("inspect", "a.state").out


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("mamba2 mamba2 mamba2 attention mamba2", "mamba2*3 attention mamba2"),
        ("lstm", "lstm"),
        ("mamba mlp " * 5, "(mamba mlp)*5"),
        ("gru gru lstm gru gru lstm", "(gru*2 lstm)*2"),
        ("attention swiglu", "attention swiglu"),
        (("mamba mlp " * 3 + "attention mlp ") * 2 + "mamba mlp", "((mamba mlp)*3 attention mlp)*2 mamba mlp"),
        ("parallel(gru gru lstm) mlp " * 2, "(parallel(gru*2 lstm) mlp)*2"),
        ("parallel", "parallel(mamba2 attention)"),
        ("shared(parallel(mamba lstm)) shared(mamba)*2", "shared(parallel(mamba lstm)) shared(mamba)*2"),
    ],
)
def test_pattern_of(kinds, pattern):
    layers = layers_from(kinds)
    assert pattern_of(layers) == pattern
    assert layers_from(pattern) == layers


@pytest.mark.parametrize("pattern", ["(mamba", "mamba)", "()*2", "mamba *", "*2", "(mamba)*2*2", "mamba*two", "( )"])
def test_a_pattern_that_cannot_be_read(pattern):
    with pytest.raises(UsageError, match="cannot read the layers"):
        layers_from(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("mamba2(attention)", r"mamba2 holds no layers, got 1; mamba2 \(...\) with a space is two words"),
        ("shared(mamba2 attention)", "shared holds one layer, got 2"),
        ("paralel(mamba2)", r"no layer 'paralel'\. Did you mean 'parallel'"),
    ],
)
def test_layers_of_layers_that_do_not_fit(pattern, message):
    with pytest.raises(UsageError, match=message):
        layers_from(pattern)


@pytest.mark.parametrize("name", PRESETS)
def test_inspect_every_preset(longwave, name):
    text = longwave("inspect", name, "--dtype", "bfloat16", "--length", 4096).out
    config = PRESETS[name]()
    with torch.device("meta"):
        model = lw.LanguageModel(config).bfloat16()
    assert text.startswith(f"{name}: {pattern_of(config.layers)}\n")
    assert f"{model.parameter_count():,} parameters" in text
    assert text.split()[-1] == f"{model.state_bytes(4096) / 2**20:,.2f}"


@pytest.mark.parametrize("name", PRESETS)
def test_pattern_of_presets_is_short(name):
    layers = PRESETS[name]().layers
    assert len(pattern_of(layers)) < 100
    assert [layer.kind for layer in layers_from(pattern_of(layers))] == [layer.kind for layer in layers]
