"""A command that cannot be read, explained in one line."""

import difflib
from collections.abc import Iterable

from cyclopts import CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnknownOptionError, UnusedCliTokensError


def explain(error: CycloptsError, verb: str) -> str:
    """What is wrong, with the option that was perhaps meant, and where to read on."""
    see = f"See `longwave {verb} --help`."
    if isinstance(error, UnknownOptionError):
        return f"{_unknown(error)} {see}"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"{error.unused_tokens[0]!r} is one argument too many. {see}"
    if isinstance(error, MissingArgumentError) and error.argument and not error.keyword and not error.argument.tokens:
        is_positional = error.argument.field_info.is_positional
        name = error.argument.name.lstrip("-").upper() if is_positional else error.argument.name
        return f"{name} is missing. {see}"
    return f"{' '.join(str(error).split())} {see}"


def _unknown(error: UnknownOptionError) -> str:
    word = (error.token.keyword or error.token.value).partition("=")[0]
    arguments = [argument for argument in error.argument_collection if argument.parse]
    names = [name for argument in arguments for name in argument.names]
    if word in names:
        return f"{word} stands behind --, where everything is text; put it before."
    if close := nearest_option(word, names):
        return f"there is no option {word}. Did you mean {close}?"
    takes_text = any(argument.field_info.is_positional for argument in arguments)
    return f"there is no option {word}." + (" A text that begins with - goes behind --." if takes_text else "")


def nearest_option(word: str, names: Iterable[str]) -> str | None:
    """The option that `word` was perhaps meant to be, by what stands behind its last dot; None if nothing is close."""
    group, last = _split(word.replace("_", "-"))
    known: dict[str, list[str]] = {}
    for name in names:
        known.setdefault(_split(name)[1], []).append(name)
    begun = [name for name in known if len(last) > 2 and name.startswith(last)]
    close = begun or difflib.get_close_matches(last, known, n=1)
    if not close:
        return None
    return next((name for name in known[close[0]] if _split(name)[0] == group), known[close[0]][0])


def _split(name: str) -> tuple[str, str]:
    """--optim.lr -> optim, lr."""
    group, _, last = name.lstrip("-").rpartition(".")
    return group, last
