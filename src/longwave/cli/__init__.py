"""The `longwave` command: one file per verb, imported when used. Alone it prints the verbs, without importing torch."""

import importlib
import os
import sys

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
    """Run one command line. Exit status: 0, 1 when something failed, 2 for wrong usage, 130 for Ctrl-C."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    try:
        if arguments[0] in ("-V", "--version"):
            from longwave import __version__

            print(__version__)
            return 0
        return _call(arguments[0], arguments[1:]) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (LongwaveError, OSError) as error:
        if debug:
            raise
        return _report(error)


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


def _call(verb: str, arguments: list[str]) -> int | None:
    from longwave.config import nearest

    if verb not in VERBS:
        raise UsageError(f"there is no verb {verb!r}.{nearest(verb, VERBS)}")
    from cyclopts import CycloptsError

    module = importlib.import_module(f"longwave.cli.{'import_' if verb == 'import' else verb}")
    try:
        return module.app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise UsageError(f"{' '.join(str(error).split())} See `longwave {verb} --help`.") from error


def _report(error: LongwaveError | OSError) -> int:
    """Say one line of what went wrong, and give the exit status."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print(f"longwave: {' '.join(text.split())}", file=sys.stderr)
    return error.exit_status if isinstance(error, LongwaveError) else 1
