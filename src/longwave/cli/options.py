"""What the verbs share: how an app is made, and configuration dataclasses as options."""

import ast
import dataclasses
import inspect
import json
import textwrap
import typing
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from longwave.errors import UsageError
from longwave.generate.text_model import TextModel
from longwave.hub.load import load
from longwave.training import checkpoint


def make_app(verb: str, examples: tuple[str, ...]) -> App:
    """The cyclopts app of a verb; its help ends with `examples`."""
    epilogue = "Examples:\n\n" + "\n\n".join(f"    {line}" for line in examples)
    return App(
        name=f"longwave {verb}",
        help_epilogue=epilogue,
        version_flags=[],
        result_action="return_value",
        help_on_error=False,
    )


def options_of(config: type, *, without: tuple[str, ...] = ()) -> type:
    """A dataclass with the fields of `config`, but for those `without`, for use as a parameter of a verb.

    Its `chosen(options)` below gives them back as keywords. Help texts are the strings that follow the fields.
    """
    hints = typing.get_type_hints(config)
    docs = _field_docs(config)
    fields = [
        (f.name, Annotated[hints[f.name], Parameter(help=docs.get(f.name))], _default(f))
        for f in dataclasses.fields(config)
        if f.name not in without
    ]
    return dataclasses.make_dataclass(config.__qualname__.split(".")[0] + "Options", fields, frozen=True, kw_only=True)


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


def load_model(path: str, **options: Any) -> TextModel:
    """The model in a folder, or that of the newest checkpoint of a run's folder."""
    checkpoints = checkpoint.complete(path)
    return load(checkpoints[-1] if checkpoints else path, **options)


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
