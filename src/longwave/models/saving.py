"""Files of tensors: safetensors, written whole or not at all, and read with every name and shape checked first."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longwave.config import to_dict
from longwave.errors import LongwaveError, UsageError

Model = TypeVar("Model", bound=nn.Module)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SHOWN = 10  # tensors named in an error before the rest is only counted


class Stored(NamedTuple):
    """A tensor in a file. `read()` fetches it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, and rename it to `path` when the block ends.

    If the block fails, what was at `path` stays. Raises LongwaveError when the disk or its permissions are the reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise LongwaveError(
            f"cannot write {path}: {first_line(error)}; nothing there has changed. "
            "Check that the folder exists and is yours to write to, and that its disk has room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write or replace a UTF-8 file. Raises LongwaveError as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write or replace a safetensors file; `header` is its metadata. Raises LongwaveError as `replacing`."""
    with replacing(path) as temporary:
        temporary.touch()
        usual = temporary.stat().st_mode  # safetensors makes files that no other user may read
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(header))
        temporary.chmod(usual)


def open_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by name, unread, and its header. Raises LongwaveError if it is missing or damaged."""
    try:
        handle = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise LongwaveError(
            f"cannot read {path} as safetensors: {what}; check the path, or copy the file again"
        ) from error

    def stored(name: str) -> Stored:
        return Stored(tuple(handle.get_slice(name).get_shape()), lambda: handle.get_tensor(name))

    return {name: stored(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118 - no mapping


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    remedy: str = "Use the config.json that was saved with it",
) -> None:
    """Raise LongwaveError that lists the first ten missing, extra and mis-shaped tensors of `where`."""
    wrong = [
        f"{name}: expected {list(shape)}, {f'found {list(found[name])}' if name in found else 'missing'}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    wrong += [f"{name}: not expected, found {list(found[name])}" for name in found if name not in expected]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise LongwaveError(
            f"{where} does not fit its model: of its tensors, {len(wrong)} differ: {'; '.join(wrong[:SHOWN])}{more}. "
            f"{remedy}"
        )


def fill(model: nn.Module, stored: Mapping[str, Stored], where: str, device: torch.device | str = "cpu") -> None:
    """Replace every parameter of `model`, which may be on the meta device, by the stored tensor of its name.

    The stored dtype is kept; so are shared parameters, and marks such as `_no_weight_decay`. Every name and shape is
    checked, and every tensor read, before the model is touched. Raises LongwaveError as `check_shapes`.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_shapes(shapes, {name: tensor.shape for name, tensor in stored.items()}, where)
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in parameters.items():
        # A copy, because a tensor mapped from the file begins anywhere, and products want aligned memory.
        tensor = stored[name].read()
        copy = torch.empty_like(tensor, device=device).copy_(tensor)
        fresh[old] = nn.Parameter(copy, requires_grad=old.requires_grad)
        vars(fresh[old]).update(vars(old))  # marks such as _no_weight_decay
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, fresh[old])


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write model.config and the parameters into `folder`, made if need be; each file is replaced whole or not at all.

    Raises LongwaveError when they cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongwaveError(f"cannot make the folder {folder}: {error.strerror}; name another") from error
    write_safetensors(folder / WEIGHTS, dict(model.named_parameters()), {"format": "pt"})
    write_text(folder / CONFIG, json.dumps(to_dict(model.config), indent=1) + "\n")


def load_model(build: Callable[[Any], Model], folder: str | Path, device: torch.device | str) -> Model:
    """build(settings of config.json) with the parameters that `save_model` wrote, on `device`, in their dtypes.

    Raises UsageError for a folder without config.json, LongwaveError for damaged files and, as `check_shapes`, for
    tensors that do not fit.
    """
    settings = read_settings(folder)
    with torch.device("meta"):
        model = build(settings)
    stored, _ = open_safetensors(Path(folder) / WEIGHTS)
    fill(model, stored, str(Path(folder) / WEIGHTS), device)
    return model


def read_settings(folder: str | Path) -> Any:
    """What config.json holds. Raises UsageError where there is none, LongwaveError where it is not JSON."""
    file = Path(folder) / CONFIG
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}; give a folder that model.save has written") from error
    except ValueError as error:
        raise LongwaveError(f"{file} is not JSON ({error}); copy the folder again") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
