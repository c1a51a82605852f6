"""The house rules of docs/design.md that a machine can hold: floors, ceilings, folders of operators."""

import ast
from pathlib import Path

import pytest

import longwave

ROOT = Path(longwave.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = ["errors", "config", "ops", "mixers", "models", "tasks", "generate", "hub", "training", "bench", "cli"]
NOT_OF_SEQUENCES = {"cross_entropy", "linear_step", "ssm_kernel"}  # they take logits, one token, or parameters
OPERATOR_FILES = {"__init__.py", "api.py", "reference.py", "cpu.py", "samples.py", "triton.py", "hopper.py"}


def imports(path: Path) -> set[str]:
    """The longwave modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "longwave"}


def floor(module: str) -> int:
    return FLOORS.index(module)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    home = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if home in ("__init__", "__main__"):
        return
    for module in imports(path):
        parts = module.split(".")
        if len(parts) > 1:
            assert floor(parts[1]) <= floor(home), f"{path.name} imports {module} from a higher floor"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    is_kernel = path.name in ("cpu.py", "triton.py", "hopper.py") or path.name.startswith(("numba_", "hopper_"))
    ceiling = 800 if is_kernel else 400
    assert len(path.read_text().splitlines()) <= ceiling


def test_every_package_is_on_a_floor():
    homes = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} - {"__init__", "__main__"}
    assert homes == set(FLOORS)
    assert not {p.name for p in FILES} & {"utils.py", "common.py", "helpers.py"}


def test_operator_folders():
    from longwave.ops import OPS

    folders = {p.name: p for p in (ROOT / "ops").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert set(folders) == set(OPS) | NOT_OF_SEQUENCES
    for folder in folders.values():
        files = {p.name for p in folder.glob("*.py") if not p.name.startswith("hopper_")}  # parts of hopper.py
        assert {"__init__.py", "api.py", "reference.py", "cpu.py", "samples.py"} <= files <= OPERATOR_FILES


def test_backends_do_not_import_one_another():
    for path in (ROOT / "ops").rglob("*.py"):
        if path.name in ("cpu.py", "triton.py", "hopper.py", "reference.py"):
            others = {"cpu", "triton", "hopper"} - {path.stem}
            assert not {m.split(".")[-1] for m in imports(path)} & others, path


def test_test_files_have_names_of_their_own():
    """pytest imports them by name: of two that share one, the second is an error."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
