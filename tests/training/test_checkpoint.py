"""Checkpoints under kill -9, full disks, damage and changed settings."""

import dataclasses
import errno
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest

import longwave
from longwave.errors import LongwaveError, UsageError
from longwave.hub.run_folder import complete_checkpoints
from longwave.training import checkpoint
from longwave.training.config import Optim, Train
from longwave.training.log import read_log
from longwave.training.loop import train


def test_kill_at_any_moment_leaves_the_last_checkpoint_loadable(make, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes below
    config = make(steps=100_000, checkpoint_every=1, resume="auto", sample_tokens=0)
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["longwave.training.loop", "torch._dynamo"])  # imported once for all
    draw = random.Random(1)
    reached = 0
    for _ in range(5):
        process = start.Process(target=train, args=(config,))
        process.start()
        while process.is_alive() and _newest_step(config) == reached:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.2)  # somewhere in a step, in a write, in a rename
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert _newest_step(config) > reached, "the run goes on where it was killed"
        reached = _newest_step(config)
        longwave.load(complete_checkpoints(config.out)[-1])
    train(dataclasses.replace(config, steps=reached + 1))
    steps = [entry["step"] for entry in read_log(config.out) if entry["event"] == "step"]
    assert steps == list(range(1, reached + 2)), "every step is in the log once"
    assert not list(Path(config.out, "checkpoints").glob(".*")), "half-written folders are cleared away"


def _newest_step(config: Train.Config) -> int:
    return max((int(folder.name.removeprefix("step-")) for folder in complete_checkpoints(config.out)), default=0)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(make, monkeypatch):
    config = make(steps=2)
    train(config)
    monkeypatch.setattr(checkpoint, "write_safetensors", _no_space)
    with pytest.raises(LongwaveError, match=r"is full; .*step-00000002 is intact") as caught:
        train(dataclasses.replace(config, steps=4, resume="auto"))
    assert caught.value.exit_status == 1
    assert "\n" not in str(caught.value)
    assert [folder.name for folder in complete_checkpoints(config.out)] == ["step-00000002"]
    assert not list(Path(config.out, "checkpoints").glob(".*"))
    longwave.load(config.out)


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_other_oserrors_pass(tmp_path):
    with pytest.raises(PermissionError), checkpoint.full_disk_in_one_line(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_damaged_checkpoint_is_passed_over(make):
    config = make(steps=4, checkpoint_every=2, keep=3)
    train(config)
    older, newer = complete_checkpoints(config.out)
    weights = newer / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert complete_checkpoints(config.out) == [older]
    train(dataclasses.replace(config, resume="auto"))
    assert complete_checkpoints(config.out) == [older, newer]


def test_the_newest_are_kept(make):
    config = make(steps=5, checkpoint_every=1, keep=2)
    train(config)
    assert [folder.name for folder in complete_checkpoints(config.out)] == ["step-00000004", "step-00000005"]


def test_nothing_is_pickled(make):
    config = make(steps=1)
    train(config)
    assert {path.suffix for path in complete_checkpoints(config.out)[-1].iterdir()} <= {".json", ".safetensors"}


def test_a_run_is_not_overwritten(make):
    config = make(steps=1)
    train(config)
    with pytest.raises(UsageError, match=r"step-00000001.*--resume auto"):
        train(config)


def test_resume_names_what_differs(make):
    config = make(steps=1)
    train(config)
    changed = dataclasses.replace(config, resume="auto", batch_size=3, optim=Optim.Config(lr=1e-4))
    with pytest.raises(UsageError, match=r"batch_size was 2, now 3; optim.lr was 0.003, now 0.0001"):
        train(changed)
    layers = (*config.model.layers[:2], dataclasses.replace(config.model.layers[2], n_heads=4))
    with pytest.raises(UsageError, match=r"model.layers.2.n_heads was 2, now 4"):
        train(dataclasses.replace(config, resume="auto", model=dataclasses.replace(config.model, layers=layers)))
    train(dataclasses.replace(config, resume="auto", steps=2, eval_every=1))  # these may change


def test_resume_from_a_named_checkpoint(make, tmp_path):
    config = make(steps=4, checkpoint_every=2)
    train(config)
    first = complete_checkpoints(config.out)[0]
    with pytest.raises(UsageError, match="newer"):
        train(dataclasses.replace(config, resume=str(first)))
    elsewhere = dataclasses.replace(config, resume=str(first), out=str(tmp_path / "fork"))
    train(elsewhere)
    newest = "model.safetensors"
    assert (complete_checkpoints(elsewhere.out)[-1] / newest).read_bytes() == (
        complete_checkpoints(config.out)[-1] / newest
    ).read_bytes()
    with pytest.raises(UsageError, match=r"not a complete checkpoint.*step-00000004"):
        train(dataclasses.replace(config, resume=config.out))


def test_a_finished_run_has_nothing_left_to_do(make, capsys):
    config = make(steps=1)
    train(config)
    train(dataclasses.replace(config, resume="auto"))
    assert "nothing left to do" in capsys.readouterr().err
