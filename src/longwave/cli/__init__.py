"""The `longwave` command: one file per verb, imported when used. Alone it prints the verbs, without importing torch."""

import importlib
import os
import sys
import traceback

from longwave.errors import LongwaveError, UsageError

VERBS = {
    "demo": "train a small model on real text for about a minute, and let it speak",
    "train": "train a language model on your own files",
    "generate": "continue a prompt, streaming; carry the state over in a file",
    "inspect": "show a model's layers, parameters, FLOPs and state size",
    "doctor": "say what this machine has, and check every kernel against its reference",
    "import": "turn somebody else's checkpoint into a longwave folder",
    "export": "write a model in somebody else's format",
    "bench": "measure operators and models, beside other libraries where installed",
}
EXAMPLES = (
    "longwave demo",
    "longwave train --text notes/ --minutes 10 --out runs/notes",
    'longwave generate runs/notes "Dear diary" --temperature 0.8',
)


def main() -> None:
    """Entry point of the command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line. Exit status: 0, 1 when something failed, 2 for wrong usage, 128 + n for signal number n."""
    arguments, debug = _take_debug(arguments)
    try:
        status = _call(arguments)
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("longwave: stopped", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        status = 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"longwave: {_one_line(error)}", file=sys.stderr)
        status = getattr(error, "exit_status", 1)
    _drop_output_if_broken()
    return status


def overview() -> str:
    """The verbs and three examples."""
    width = max(map(len, VERBS))
    verbs = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    examples = [f"  {line}" for line in EXAMPLES]
    return "\n".join(
        [
            "longwave: state space sequence models, trained, streamed and measured",
            "",
            *verbs,
            "",
            "Examples:",
            *examples,
            "",
            "`longwave VERB --help` tells the options. `--debug` shows the traceback of an error.",
        ]
    )


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, and whether it was there. Behind `--` it is text, as every other option is."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [word for word in arguments[:end] if word != "--debug"]
    return options + arguments[end:], len(options) < end


def _call(arguments: list[str]) -> int:
    verb, *rest = arguments or ["help"]
    if verb in ("-h", "--help", "help"):
        print(overview())
        return 0
    if verb in ("-V", "--version"):
        from longwave import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        from longwave.config import nearest

        raise UsageError(f"there is no verb {verb!r}.{nearest(verb, VERBS)}")
    from cyclopts import CycloptsError

    from longwave.cli.explain import explain

    app = importlib.import_module(f"longwave.cli.{'import_' if verb == 'import' else verb}").app
    try:
        return app(rest, exit_on_error=False, print_error=False) or 0
    except CycloptsError as error:
        raise UsageError(explain(error, verb)) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, LongwaveError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return f"there is not enough memory for this; a smaller model, batch or window needs less ({text[:120]})"
    return f"internal error: {type(error).__name__}: {text[:200]}. The same command with --debug shows where"


def _drop_output_if_broken() -> None:
    """Where standard output cannot be written to, keep Python from failing over what is left of it at the end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
