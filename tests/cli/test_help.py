"""The help of every verb: readable, complete, and with examples that can be typed."""

import importlib
import re
import shlex

import pytest

from longwave.cli import EXAMPLES, VERBS, overview
from longwave.models.blocks import LAYERS
from longwave.models.presets import PRESETS


def app_of(verb: str):
    return importlib.import_module(f"longwave.cli.{'import_' if verb == 'import' else verb}").app


def examples_of(text: str) -> list[str]:
    return re.findall(r"^  (longwave .*)$", text.partition("Examples:")[2], re.M)


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal_and_ends_with_examples(verb, longwave):
    done = longwave(verb, "--help")
    assert done.status == 0
    assert done.out.startswith(f"Usage: longwave {verb}")
    assert max(map(len, done.out.splitlines())) <= 80
    assert len(examples_of(done.out)) >= 2
    assert all(line.startswith(f"longwave {verb}") for line in examples_of(done.out))
    assert "--empty-" not in done.out
    assert "default: None" not in done.out
    assert "default: False" not in done.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_described(verb):
    app = app_of(verb)
    commands = [app[name] for name in app if not name.startswith("-")] or [app]
    for command in commands:
        shown = [argument for argument in command.assemble_argument_collection(parse_docstring=True) if argument.show]
        assert shown
        assert [argument.name for argument in shown if not argument.parameter.help] == []


@pytest.mark.parametrize("verb", VERBS)
def test_examples_can_be_typed(verb, longwave):
    examples = examples_of(longwave(verb, "--help").out)
    examples += [line for line in examples_of(overview()) if line.split()[1] == verb]
    for line in examples:
        words = shlex.split(line.partition(" < ")[0])[2:]
        _, _, unused = app_of(verb).parse_args(words, exit_on_error=False, print_error=False)
        assert not unused


def test_train_help_groups_nested_options_and_lists_models(longwave):
    out = longwave("train", "--help").out
    for part in ("Model", "Text", "Run", "Optimiser and schedule"):
        assert f"─ {part} ─" in out
    for option in ("--optim.lr FLOAT", "--task.seq-len INT", "--steps INT", "[choices: cosine, wsd, constant]"):
        assert option in out
    assert '"mamba2*3 attention' in out
    assert all(name in out for name in (*PRESETS, *LAYERS))


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",), ("help",)])
def test_overview(words, longwave):
    done = longwave(*words)
    assert done.status == 0
    assert all(f"  {verb} " in done.out for verb in VERBS)
    assert all(example in done.out for example in EXAMPLES)
    assert len(EXAMPLES) == 3


def test_version(longwave):
    from longwave import __version__

    assert longwave("--version").out == __version__ + "\n"
