"""Imports point down only, without a circle, and importing the package loads no heavy library.

``ROOMS`` is the whole rule: a room may import what stands below it, and no room on its own line.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank
from lowrank.run.overrides import TASKS

PACKAGE = Path(lowrank.__file__).parent
MODULES = sorted(p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py"))
HEAVY = (
    "torch",
    "numpy",
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

# From the roof to the basement. Rooms on one line stand beside each other.
ROOMS = [
    ("__main__",),
    ("cli",),
    ("train",),
    ("evaluate",),
    ("report", "interop", "recipes"),
    ("run", "doctor"),
    ("plan",),
    ("methods",),
    ("optim", "adapters", "models"),
    ("distributed", "linalg", "data"),
    ("infra",),
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
NEVER = [("models", "methods"), ("data", "methods"), ("models", "plan"), ("data", "plan")]


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


def rooms_used(module: Path, top_level: bool) -> set[str]:
    names = {name.split(".")[1] for name in imports(module, top_level) if name.startswith("lowrank.")}
    return (names & FLOOR.keys()) - {room(module)}


def test_every_folder_is_a_room() -> None:
    assert {room(module) for module in MODULES} - {"__init__"} == set(FLOOR)
    loose = {module for module in MODULES if len(module.parts) == 1}
    assert loose == {Path("__init__"), Path("__main__")}


@pytest.mark.parametrize("name", [r for rooms in ROOMS for r in rooms])
def test_down_only(name: str) -> None:
    """At a module's top level, and inside its functions too."""
    for module in MODULES:
        if room(module) == name:
            upwards = [other for other in rooms_used(module, top_level=False) if FLOOR[other] <= FLOOR[name]]
            assert not upwards, f"{module} imports {', '.join(sorted(upwards))}"


def test_rooms_that_never_meet() -> None:
    for module in MODULES:
        for here, there in NEVER:
            if room(module) == here:
                met = [name for name in imports(module, top_level=False) if name.startswith(f"lowrank.{there}")]
                assert not met, f"{module} imports {met}"


def test_no_circles_within_a_room() -> None:
    """Between modules, at import."""
    names = {"lowrank." + ".".join(m.parts): m for m in MODULES if m.name != "__init__"}
    below = {name: imports(module, top_level=True) & names.keys() for name, module in names.items()}
    while leaves := [name for name, used in below.items() if not used & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below, f"in or above a circle: {sorted(below)}"


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    """Inside functions; a module that lives by one may import it, and is then itself imported only inside functions."""
    for module in MODULES:
        if {name.split(".")[0] for name in imports(module, top_level=True)} & set(HEAVY[2:]):
            name = "lowrank." + ".".join(module.parts)
            users = [other for other in MODULES if other != module and name in imports(other, top_level=True)]
            assert not users, f"{name} imports a heavy library and is imported by {users}"


def test_importing_the_package_is_light() -> None:
    """Not even torch: a name's module is imported when the name is touched."""
    code = f"import sys, lowrank, lowrank.methods, lowrank.run; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", ["", *sorted({m.parts[0] for m in MODULES if len(m.parts) > 1})])
def test_every_promised_name_is_there_when_it_is_touched(package: str) -> None:
    module = importlib.import_module(f"lowrank.{package}".rstrip("."))
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_nobody_asks_for_a_task_by_its_name() -> None:
    """What a task is asked stands in `run/task`, so that a new one is one file; only a recipe names its own."""
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / module.with_suffix(".py")).read_text())):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            asked = any(isinstance(side, ast.Attribute) and side.attr == "task" for side in sides)
            named = {leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)}
            assert not (asked and named & TASKS.keys()), f"{module}, line {node.lineno}"
