"""Imports point down only, and importing the package loads no heavy library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank

PACKAGE = Path(lowrank.__file__).parent
MODULES = sorted(p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py"))
HEAVY = (
    "transformers",
    "timm",
    "datasets",
    "tokenizers",
    "matplotlib",
    "PIL",
    "sklearn",
    "medmnist",
    "torchvision",
    "pandas",
)

# Which rooms a room may use, beside itself. `infra` is everyone's; what a room is not listed for, it must not import.
BASE = {"infra"}
MAY_USE = {
    "infra": set(),
    "linalg": BASE,
    "adapters": BASE | {"linalg"},
    "optim": BASE | {"linalg"},
    "data": BASE,
    "models": BASE | {"data"},
    "targets": BASE | {"adapters"},
    "methods": BASE | {"adapters", "optim", "linalg", "targets"},
    "memory": BASE | {"optim", "plan"},
    "boundary": BASE | {"adapters", "optim", "linalg"},
    "notes": BASE | {"adapters", "methods"},
    "binding": BASE | {"adapters", "optim", "targets", "methods", "notes"},
    "plan": BASE | {"adapters", "optim", "targets", "methods", "memory", "boundary", "binding"},
}
NEVER = [
    ("adapters", "optim"),
    ("optim", "adapters"),
    ("models", "methods"),
    ("data", "methods"),
    ("models", "plan"),
    ("data", "plan"),
]
UPPER = {"cli", "recipes", "compare", "report", "train"}


def room(module: Path) -> str:
    return module.parts[0]


def imports(module: Path, top_level: bool) -> set[str]:
    """The full names that a module imports (from the package: ``lowrank.…``); at its top level, or anywhere."""
    path = PACKAGE / module.with_suffix(".py")
    tree = ast.parse(path.read_text())
    nodes = top(tree) if top_level else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run at import: not those under ``if TYPE_CHECKING``."""
    return [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]


def rooms_used(module: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(module, top_level=True) if name.startswith("lowrank.")}
    known = {room(other) for other in MODULES}
    return (names & known) - {room(module)}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in MAY_USE], ids=str)
def test_down_only(module: Path) -> None:
    upwards = rooms_used(module) - MAY_USE[room(module)]
    assert not upwards, f"{module} imports {', '.join(sorted(upwards))}"


@pytest.mark.parametrize(
    "module", [m for m in MODULES if room(m) not in UPPER | {"__init__", "__main__", "commands"}], ids=str
)
def test_nobody_below_uses_the_top(module: Path) -> None:
    assert not {"cli"} & rooms_used(module)


def test_rooms_that_never_meet() -> None:
    """Neither at import nor inside a function."""
    for module in MODULES:
        for here, there in NEVER:
            if room(module) == here:
                met = [name for name in imports(module, top_level=False) if name.startswith(f"lowrank.{there}")]
                assert not met, f"{module} imports {met}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_heavy_libraries_are_imported_where_they_are_used(module: Path) -> None:
    """Inside functions; a module that lives by one may import it, and is then itself imported only inside functions."""
    if {name.split(".")[0] for name in imports(module, top_level=True)} & set(HEAVY):
        name = "lowrank." + ".".join(module.parts)
        users = [other for other in MODULES if other != module and name in imports(other, top_level=True)]
        assert not users, f"{name} imports a heavy library and is imported by {users}"


def test_importing_the_package_is_light() -> None:
    code = f"import sys, lowrank; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
