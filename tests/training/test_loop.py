"""The loop as a whole: learning, equality of runs, accumulation, evaluation, non-finite losses."""

import dataclasses
import math
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

import longwave
from longwave.errors import LongwaveError, UsageError
from longwave.hub.run_folder import complete_checkpoints
from longwave.mixers import Attention, Mamba2, SwiGLU
from longwave.models.language_model import LanguageModel
from longwave.tasks.text import IGNORE, Text
from longwave.training.config import Optim, Train
from longwave.training.interrupt import Interrupted
from longwave.training.job import Job
from longwave.training.log import read_log
from longwave.training.loop import train


def losses(config: Train.Config) -> list[float]:
    return [entry["loss"] for entry in read_log(config.out) if entry["event"] == "step"]


def optimizer_file(config: Train.Config) -> bytes:
    return (complete_checkpoints(config.out)[-1] / "optimizer.safetensors").read_bytes()


def test_two_halves_equal_the_whole_bit_for_bit(make, tmp_path):
    torch.manual_seed(123)  # what the caller did to the global generator does not matter
    whole = make(steps=20, out=str(tmp_path / "whole"))
    expected = train(whole).model.state_dict()
    half = make(steps=20, out=str(tmp_path / "half"))
    _stop_after(10, half)
    resumed = train(
        dataclasses.replace(half, resume="auto", eval_every=3)
    ).model.state_dict()  # evaluations change nothing
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert losses(whole) == losses(half)
    assert len(losses(half)) == 20
    assert optimizer_file(whole) == optimizer_file(half)


def _stop_after(step: int, config: Train.Config) -> None:
    """Train, with Ctrl-C arriving in the middle of that step."""
    before = Job.gradients

    def gradients(job, number):
        if number == step - 1:
            signal.raise_signal(signal.SIGINT)
        return before(job, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "gradients", gradients)
        with pytest.raises(Interrupted, match=rf"after step {step},.*resume=.auto"):
            train(config)


def test_ctrl_c_restores_the_handlers_and_gives_the_shells_status(make):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    config = make(steps=50)
    _stop_after(2, config)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert Interrupted("", signal.SIGINT).exit_status == 130
    assert Interrupted("", signal.SIGTERM).exit_status == 143
    assert complete_checkpoints(config.out)[-1].name == "step-00000002"


def test_a_second_ctrl_c_stops_at_once(make, monkeypatch):
    def gradients(job, number):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(Job, "gradients", gradients)
    with pytest.raises(KeyboardInterrupt):
        train(make())


def test_a_checkpoint_is_a_model_folder(make):
    config = make(steps=2)
    trained = train(config)
    loaded = longwave.load(config.out)  # the newest checkpoint of the run
    tokens = torch.arange(20)[None]
    assert torch.equal(trained.model(tokens)[0], loaded.model(tokens)[0])
    assert str(loaded.complete("st", max_tokens=5, seed=1)) == str(trained.complete("st", max_tokens=5, seed=1))


@pytest.mark.parametrize("step", [0, 3])
def test_accumulation_equals_a_larger_batch(make, step):
    together, apart = Job(make(batch_size=4)), Job(make(batch_size=1, accumulation=4))
    assert torch.allclose(together.gradients(step), apart.gradients(step), rtol=1e-6)
    for (name, p), q in zip(together.model.named_parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_depend_on_the_weights_and_the_step_alone(make):
    job = Job(make())
    first = job.gradients(5).item(), job.model.embedding.weight.grad.clone()
    job.gradients(6)
    job.bits_per_byte()
    torch.rand(7)
    assert job.gradients(5).item() == first[0]
    assert torch.equal(job.model.embedding.weight.grad, first[1])


def test_bits_per_byte_of_a_uniform_model(make, corpus):
    job = Job(make())
    for parameter in job.model.parameters():
        torch.nn.init.zeros_(parameter)  # all logits 0: every token is as likely as any
    targets = sum(int((batch.targets != IGNORE).sum()) for batch in job.task.validation())
    held_out = len(corpus.read_bytes()) * 0.05
    bits_per_byte, n_bytes = job.bits_per_byte()
    assert n_bytes == pytest.approx(held_out, abs=2)
    assert bits_per_byte == pytest.approx(math.log2(257) * targets / n_bytes, rel=1e-6)


def test_an_evaluation_may_read_a_part(make):
    whole, part = Job(make(eval_tokens=0)), Job(make(eval_tokens=100))
    assert 64 <= part.bits_per_byte()[1] <= 200 < whole.bits_per_byte()[1]
    assert part.bits_per_byte() == part.bits_per_byte()


def test_bfloat16_keeps_the_parameters_in_float32(make):
    config = make(steps=3, dtype="bfloat16")
    model = train(config).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses(config) != losses_of_float32(make)
    assert losses(config) == pytest.approx(losses_of_float32(make), rel=0.02)


def losses_of_float32(make) -> list[float]:
    config = make(steps=3, out=make().out + "32", resume="auto")
    train(config)
    return losses(config)


def test_a_nan_parameter_is_named(make, monkeypatch):
    config = make(steps=10, checkpoint_every=2)
    before = Job.gradients

    def gradients(job, number):
        if number == 3:
            dict(job.model.named_parameters())[poisoned].data.view(-1)[0] = float("nan")
        return before(job, number)

    poisoned = next(n for n, _ in Job(config).model.named_parameters() if n.endswith("in_proj.weight"))
    monkeypatch.setattr(Job, "gradients", gradients)
    with pytest.raises(LongwaveError) as caught:
        train(config)
    message = str(caught.value)
    assert message.startswith("step 4: the loss is nan")
    assert f"{poisoned.removesuffix('.weight')} (Linear)" in message
    assert "step-00000002" in message
    assert complete_checkpoints(config.out)[-1].name == "step-00000002"


def test_a_run_in_minutes_ends_in_time_and_reaches_the_final_rate(make):
    config = make(steps=None, minutes=1.5 / 60, optim=Optim.Config(final=0.5))
    train(config)
    steps = [entry for entry in read_log(config.out) if entry["event"] == "step"]
    assert sum(entry["seconds"] for entry in steps[1:]) + 1.0 >= 1.5
    assert steps[-1]["lr"] == pytest.approx(0.5 * config.optim.lr, rel=0.2)
    assert any(entry["event"] == "eval" for entry in read_log(config.out))


def test_presets_take_the_tokenizers_vocabulary(make):
    with pytest.raises(UsageError, match=r"mamba-13m.*mean"):
        Job(make(model="mamba-13m"))


def test_an_absent_device_is_one_line(make):
    with pytest.raises(UsageError, match="device 'tpu'"):
        Job(make(device="tpu"))


def test_a_hybrid_learns_python(tmp_path):
    """Far below what the frequencies of bytes alone can give, after a few seconds on the standard library."""
    folder = Path(dataclasses.__file__).parent
    files = tuple(
        str(folder / name) for name in ("argparse.py", "dataclasses.py", "inspect.py", "typing.py", "pathlib.py")
    )
    config = Train.Config(
        model=LanguageModel.Config(
            vocab_size=257,
            d_model=64,
            layers=(Mamba2.Config(d_state=16, d_head=32), SwiGLU.Config(d_inner=128), Attention.Config(n_heads=2)),
        ),
        task=Text.Config(paths=files, seq_len=128, split="tail", cache_dir=str(tmp_path / "cache")),
        optim=Optim.Config(lr=1e-2),
        out=str(tmp_path / "run"),
        steps=60,
        batch_size=8,
        eval_every=0,
        checkpoint_every=0,
        sample_tokens=0,
        device="cpu",
    )
    train(config)
    text = b"".join(Path(name).read_bytes() for name in files)
    unigram = -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())
    bits = next(entry["bits_per_byte"] for entry in read_log(config.out) if entry["event"] == "eval")
    assert bits < 0.8 * unigram
