"""What the verbs share: how an app is made, and configuration dataclasses as options."""

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

from longwave.errors import UsageError
from longwave.hub.folder import find_folder


def make_app(verb: str, examples: tuple[str, ...], notes: tuple[str, ...] = ()) -> App:
    """The cyclopts app of a verb; its help ends with `notes`, a paragraph each, and `examples`."""
    paragraphs = [textwrap.fill(note, 78) for note in notes]
    paragraphs.append("\n".join(["Examples:", *(f"  {line}" for line in examples)]))
    app = App(
        name=f"longwave {verb}",
        default_parameter=Parameter(negative=(), show_default=_shown),
        group_parameters=Group("Options", sort_key=0),
        help_format="plaintext",  # as Markdown, "mamba2*3" would lose its star
        help_epilogue="\n\n".join(paragraphs),
        version_flags=[],
        result_action="return_value",
        help_on_error=False,
        suppress_keyboard_interrupt=False,
    )
    app["--help"].show = False
    return app


def options_of(config: type, *, without: tuple[str, ...] = (), groups: Mapping[str, Group] = {}) -> type:
    """A dataclass with the fields of `config`, but for those `without`, for use as a parameter of a verb.

    `chosen(options)` below gives them back as keywords. Help texts are the strings that follow the fields; `groups`
    names the part of the help in which a field is shown, where it is not that of the parameter.
    """
    hints = typing.get_type_hints(config)
    docs = _field_docs(config)

    def annotated(name: str) -> Any:
        hint = Annotated[hints[name], Parameter(help=docs.get(name))]
        return Annotated[hint, Parameter(group=groups[name])] if name in groups else hint

    fields = [(f.name, annotated(f.name), _default(f)) for f in dataclasses.fields(config) if f.name not in without]
    name = config.__qualname__.split(".")[0] + "Options"
    # Without a module of its own the class passes for one of Python's, and cyclopts does not look at its fields.
    namespace = {"__module__": config.__module__}
    return dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True, namespace=namespace)


def chosen(options: Any) -> dict[str, Any]:
    """The options as keywords for the configuration they came from."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


def print_json(value: Any) -> None:
    """One line of JSON, for programs."""
    print(json.dumps(value), flush=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UsageError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error


def check_target(source: str, target: Path) -> None:
    """Raise UsageError if `target` is the folder that is read, whose files would be replaced."""
    if target.resolve() in (Path(source).resolve(), find_folder(source).resolve()):
        raise UsageError(f"{target} is what is read, and would be replaced; name another folder to write")


def _shown(default: Any) -> str | None:
    """A default as one would type it; None where there is nothing to type."""
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return None if default is None or default is False or default == "" else str(default)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=field.default) if field.default is not dataclasses.MISSING else dataclasses.field()


def _field_docs(config: type) -> dict[str, str]:
    """The string literal that follows each field in the source of `config`."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = inspect.cleandoc(text)
    return docs
