"""How a command line ends: its exit status, and one line on standard error."""

import subprocess
import sys

import pytest

from longwave.cli import generate, run
from longwave.cli.explain import nearest_option

NAMES = ["--seed", "--task.seed", "--optim.lr", "--task.seq-len", "--steps", "--stop", "--temperature"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--optim.lrr", "--optim.lr"),
        ("--lr", "--optim.lr"),
        ("--optim.seq_len", "--task.seq-len"),
        ("--task.seqlen", "--task.seq-len"),
        ("--sede", "--seed"),
        ("--task.sed", "--task.seed"),
        ("--temp", "--temperature"),
        ("--learning-rate", None),
        ("-x", None),
    ],
)
def test_nearest_option(word, meant):
    assert nearest_option(word, NAMES) == meant


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("frob", "there is no verb 'frob'. Known: bench, demo"),
        ("trian", "Did you mean 'train'?"),
        (
            "train --optim.lrr 3",
            "there is no option --optim.lrr. Did you mean --optim.lr? See `longwave train --help`.",
        ),
        ("train --task.seqlen=3", "Did you mean --task.seq-len?"),
        ("train --seq_len 3", "Did you mean --task.seq-len?"),
        ("train --steps many", 'Invalid value for --steps: unable to convert "many" into int.'),
        ("train --steps", "--steps requires an argument"),
        (
            "train --optim.schedule linear --steps 1",
            'Invalid value "linear" for --optim.schedule. Choose from: "cosine"',
        ),
        ("train --optim.lr -1 --steps 1", "lr must be above 0, got -1.0"),
        ("train --task.seq_len 0 --steps 1", "seq_len must be at least 1, got 0"),
        ("train --steps 0", "steps must be above 0, got 0"),
        ("train notes.txt", "'notes.txt' is one argument too many"),
        ("train", "--steps 1000"),
        ("train --steps 1 --device tpu", "device 'tpu' is not to be had"),
        ("train --steps 1 --model mamba2-131m", "there is no preset 'mamba2-131m'. Did you mean 'mamba2-130m'?"),
        ("train --steps 1 --model mamba5", "there is no layer 'mamba5'. Did you mean 'mamba'?"),
        ("train --steps 1 --model (mamba", "cannot read the layers '(mamba'"),
        ("train --steps 1 --model mamba2-130m --d-model 8", "--d-model 8 is for a model given as layers"),
        ("train --steps 1 --bpe 100", "at least 257 tokens"),
        ("train --steps 1 --bpe 300 --task.tokenizer other.json", "exclude one another"),
        ("generate", "MODEL is missing"),
        ("export a b", "--format is missing"),
        ("generate m x --temperature -1", "temperature must be a number from 0 up; 0 is greedy; got -1.0"),
        ("generate m x --dtype int8", 'Choose from: "float32"'),
        ("generate m -y", "A text that begins with - goes behind --."),
        ("generate m -- x --seed 1", "--seed stands behind --"),
        ("inspect mamba2-131m", "there is no preset or folder 'mamba2-131m'. Did you mean 'mamba2-130m'?"),
        ("demo --minutes 0", "minutes must be above 0, got 0.0"),
    ],
)
def test_wrong_usage_is_explained_in_one_line(words, expected, longwave):
    done = longwave(*words.split(" "))
    assert done.status == 2
    assert expected in done.complaint
    assert done.out == ""


def test_both_spellings_of_a_nested_key(longwave):
    for spelling in ("--task.seq_len", "--task.seq-len"):
        assert "seq_len must be at least 1, got -7" in longwave("train", spelling, -7).complaint


def test_debug_shows_the_traceback_and_keeps_the_status(longwave):
    done = longwave("generate", "nowhere", "x", "--debug")
    assert done.status == 2
    assert done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith("longwave.errors.UsageError: there is no folder nowhere")


def test_debug_behind_two_dashes_is_text(longwave, trained, monkeypatch):
    prompts = []
    monkeypatch.setattr(generate, "_read_prompt", lambda prompt, continues: prompts.append(prompt) or prompt)
    done = longwave("generate", trained, "--max-tokens", 0, "--", "--debug")
    assert (done.status, prompts) == (0, ["--debug"])


def test_a_mistake_of_ours_is_one_line_too(longwave, monkeypatch):
    def fail(*_, **__):
        raise KeyError("layers.3\nand more")

    monkeypatch.setattr(generate, "load", fail)
    done = longwave("generate", "m", "x")
    assert done.status == 1
    assert done.complaint.startswith("internal error: KeyError: ")
    assert done.complaint.endswith("--debug shows where")
    assert "Traceback" in longwave("generate", "m", "x", "--debug").err


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (MemoryError(), 1, "there is not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "not enough memory"),
        (PermissionError(13, "Permission denied", "/root/model"), 1, "/root/model: Permission denied"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_errors_of_the_system(error, status, expected, longwave, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(generate, "load", fail)
    done = longwave("generate", "m", "x")
    assert done.status == status
    assert expected in done.complaint


def test_a_reader_that_goes_away_and_a_full_disk_behind_standard_output():
    """Both once failed only when Python shut down, with a second message and status 120."""
    command = [sys.executable, "-m", "longwave"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "longwave: No space left on device\n")

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before a process that has yet to start can write
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_run_leaves_its_arguments_alone():
    words = ["frob", "--debug"]
    run(words)
    assert words == ["frob", "--debug"]
