"""`longwave train` and `longwave demo`: what the words mean, what a run leaves, and how it goes on."""

import json
import shlex
import signal
import sys
from pathlib import Path

import pytest

import longwave as lw
from longwave.cli.train import run_config
from longwave.config import to_dict
from longwave.models.presets import PRESETS
from longwave.tasks.text import Text
from longwave.training.job import Job
from longwave.training.log import read_log

SMALL = ("--batch-size", 2, "--task.seq-len", 32, "--sample-tokens", 4, "--device", "cpu")
NARROW = (*SMALL, "--d-model", 16)
SHORT = (*NARROW, "--steps", 2)


def settings(out: str) -> dict:
    return read_log(out)[0]["config"]


def interrupt_at(step: int, patch: pytest.MonkeyPatch) -> None:
    before = Job.gradients

    def gradients(job, number):
        if number == step:
            signal.raise_signal(signal.SIGINT)
        return before(job, number)

    patch.setattr(Job, "gradients", gradients)


def test_options_reach_their_place(longwave, corpus):
    options = [
        "--optim.lr",
        "2e-3",
        "--optim.betas",
        "0.8",
        "0.9",
        "--optim.schedule",
        "wsd",
        "--task.val-fraction",
        "0.1",
    ]
    options += ["--seed", 5, "--accumulation", 2, "--keep", 1, "--dtype", "bfloat16"]
    done = longwave("train", "--text", corpus, "--model", "mamba", *SHORT, *options, "--out", "run", "--json")
    assert done.status == 0
    found = settings("run")
    assert found["optim"] | {"lr": 2e-3, "betas": [0.8, 0.9], "schedule": "wsd"} == found["optim"]
    assert found["task"] | {"paths": [str(corpus)], "val_fraction": 0.1, "seq_len": 32} == found["task"]
    assert (found["seed"], found["accumulation"], found["dtype"]) == (5, 2, "bfloat16")
    result = json.loads(done.out)
    assert result["step"] == 2
    assert result["tokens"] == 2 * 2 * 2 * 32
    assert result["checkpoint"] == "run/checkpoints/step-00000002"
    assert result["bits_per_byte"] > 0
    assert Path("run/report.html").exists()


def test_several_texts(longwave, corpus, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("more text " * 100)
    assert longwave("train", "--text", corpus, "more", "--model", "gru", *SHORT, "--out", "one").status == 0
    done = longwave("train", "--text", corpus, "--text", "more", "--model", "gru", *SHORT, "--out", "two")
    assert settings("one")["task"] == settings("two")["task"]
    assert "in 2 documents" in done.err
    assert "model: gru, " in done.err


def test_model_as_preset_layers_or_file(longwave, corpus, tmp_path):
    task = Text.Config(paths=(str(corpus),))
    assert run_config("mamba2-130m", None, task, {"steps": 1}).model == "mamba2-130m"
    layers = run_config("(mamba2 swiglu)*2 lstm", 64, task, {"steps": 1}).model
    assert (layers.vocab_size, layers.d_model) == (257, 64)
    assert [layer.kind for layer in layers.layers] == ["mamba2", "swiglu", "mamba2", "swiglu", "lstm"]

    config = to_dict(run_config("mamba", 24, task, {"steps": 1}).model)
    config["layers"][0]["d_state"] = 3
    (tmp_path / "mine.json").write_text(json.dumps(config))
    words = ["--model", "mine.json", *SMALL, "--steps", 1]
    assert longwave("train", "--text", corpus, *words, "--out", "run").status == 0
    assert lw.load("run").model.config.layers[0].d_state == 3
    assert "vocabulary" not in longwave("train", "--text", corpus, *words, "--out", "b", "--dry-run").err


def test_preset_takes_the_vocabulary_of_the_text(longwave, corpus, monkeypatch):
    small = lw.LanguageModel.Config.from_dict(
        {"vocab_size": 50280, "d_model": 16, "layers": [{"kind": "gru"}], "residual_fp32": True}
    )
    monkeypatch.setitem(PRESETS, "gru-tiny", lambda: small)
    done = longwave("train", "--text", corpus, "--model", "gru-tiny", *SMALL, "--steps", 1, "--out", "run")
    assert done.status == 0
    assert lw.load("run").model.config.vocab_size == 257


def test_bpe_from_text_to_generation(longwave, corpus):
    words = ["train", "--text", corpus, "--model", "mamba", *NARROW, "--bpe", 270, "--out", "run", "--steps"]
    assert longwave(*words, 2).status == 0
    model = lw.load("run")
    assert model.model.config.vocab_size == model.tokenizer.vocab_size == 270
    assert len(model.tokenizer.encode("state space")) < len("state space")
    assert longwave("generate", "run", "state space", "--max-tokens", 3).status == 0

    before = Path("run/bpe-270/tokenizer.json").stat().st_mtime_ns
    assert longwave(*words, 3, "--resume", "auto").status == 0
    assert Path("run/bpe-270/tokenizer.json").stat().st_mtime_ns == before


def test_bpe_follows_the_text_until_there_is_a_checkpoint(longwave, corpus, tmp_path):
    (tmp_path / "other.txt").write_text("entirely different letters " * 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longwave.cli.train.run_training", lambda config: sys.exit("stopped early"))
        for text in ("other.txt", corpus):
            with pytest.raises(SystemExit):
                longwave("train", "--text", text, "--model", "mamba", *SHORT, "--bpe", 270, "--out", "run")
    vocabulary = json.loads(Path("run/bpe-270/tokenizer.json").read_text())["model"]["vocab"]
    assert any("Ġs" in token for token in vocabulary)
    assert not any("ff" in token for token in vocabulary)


@pytest.mark.parametrize("bpe", [(), ("--bpe", 270)])
def test_dry_run_writes_nothing(bpe, longwave, corpus):
    done = longwave("train", "--text", corpus, "--model", "mamba", *SHORT, *bpe, "--out", "run", "--dry-run", "--json")
    assert done.status == 0
    assert json.loads(done.out)["tokens_per_step"] == 64
    assert not Path("run").exists()


def test_ctrl_c_prints_a_command_that_goes_on(longwave, corpus, monkeypatch):
    words = ["train", "--text", corpus, "--model", "mamba*2", *NARROW, "--steps", 5, "--optim.lr", "3e-3"]
    whole = longwave(*words, "--out", "the whole")
    assert whole.status == 0
    words = [str(word) for word in (*words, "--out", "in two halves")]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/longwave", *words])
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(2, patch)
        done = longwave(*words)
    assert done.status == 130
    line = done.err.splitlines()[-1]
    assert line.startswith("longwave: stopped after step 3, saved in in two halves/checkpoints/step-00000003.")
    _, _, command = line.partition("Go on with ")
    program, *typed = shlex.split(command)
    assert program == "longwave"
    assert longwave(*typed).status == 0
    halves, complete = (lw.load(out).model.state_dict() for out in ("in two halves", "the whole"))
    assert all((halves[name] == complete[name]).all() for name in complete)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory, corpus) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_text(corpus.read_text() * 4)
    return path


def test_demo(longwave, long_text, monkeypatch):
    """One step is enough to see everything but the quality."""
    monkeypatch.setattr("longwave.cli.demo.run_training", _one_step)
    done = longwave("demo", "--text", long_text, "--out", "runs/demo", "--seed", 2)
    assert done.status == 0
    assert "model: runs/demo/checkpoints/step-00000001" in done.out
    assert "report: runs/demo/report.html" in done.out
    assert 'go on with: longwave generate runs/demo ""' in done.out
    assert settings("runs/demo")["seed"] == 2

    before = Path("runs/demo/report.html").read_bytes()
    assert longwave("demo", "--text", "nowhere.txt", "--out", "runs/demo").status == 2
    assert longwave("demo", "--text", long_text, "--out", "runs/demo", "--device", "tpu").status == 2
    assert Path("runs/demo/report.html").read_bytes() == before

    done = longwave("demo", "--text", long_text, "--out", "runs/demo", "--json")
    assert json.loads(done.out)["checkpoint"] == "runs/demo/checkpoints/step-00000001"
    assert settings("runs/demo")["seed"] == 0


def _one_step(config):
    import dataclasses

    return lw.train(dataclasses.replace(config, steps=1, minutes=None, batch_size=1, sample_tokens=2))
