"""The house's own rules: who may import whom, how long a file and a function may be, and that --help is quick to load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/sartor"

# A room imports rooms of lower floors only (docs/structure.md). `cli`, `api` and `demo` are the roof.
FLOORS = [
    {"errors", "folders"},
    {"job"},
    {"machine"},
    {"kernels"},
    {"model", "data"},
    {"methods"},
    {"step"},
    {"parallel"},
    {"predict"},
    {"plan"},
    {"placement"},
    {"train"},
    {"launch", "serve"},
    {"report"},
    {"api", "demo"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Rooms of sartor that a file imports anywhere, functions included."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {parts[1] for name in names if (parts := name.split("."))[0] == "sartor" and len(parts) > 1 and parts[1] in FLOOR_OF}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_lower_floors_only(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} is on no floor: add it to docs/structure.md and to this test"
    for other in imports(ast.parse(path.read_text(encoding="utf-8"))) - {room}:
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_the_training_loop_reads_in_one_sitting() -> None:
    assert (SOURCE / "train/loop.py").read_text(encoding="utf-8").count("\n") < 300


def output_of(script: str) -> str:
    """What a fresh interpreter prints; fails with its error."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom sartor.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    assert "train" in output_of(script)


def test_planning_imports_no_training_code() -> None:
    script = (
        "import sys, sartor.plan, sartor.report\n"
        "loaded = {name for name in sys.modules if name.startswith(('sartor.train', 'sartor.serve'))}\nassert not loaded, loaded"
    )
    output_of(script)


def test_functions_of_the_public_face_are_not_hidden_by_rooms() -> None:
    import sartor
    import sartor.plan.make
    import sartor.train.loop
    from sartor.plan import Plan

    assert sartor.plan.__module__ == sartor.train.__module__ == "sartor.api"
    assert sartor.Plan is Plan
