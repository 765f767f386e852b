"""python -m pytest tests/test_imports.py

The tests are about who imports whom: there is no circle, only look.py imports grpo.py, and files that work on
text alone do not load torch.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]


def module_of(path: Path) -> str:
    """kernels/ counts as one module."""
    return "kernels" if path.parent.name == "kernels" else path.stem


MODULES = {module_of(path) for path in FILES}


def imports_of(source: str) -> set[str]:
    """The modules of this project that a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:  # a relative one stays in its package
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & MODULES


def graph() -> dict[str, set[str]]:
    """Module -> what it imports."""
    imports: dict[str, set[str]] = {name: set() for name in MODULES}
    for path in FILES:
        imports[module_of(path)] |= imports_of(path.read_text(encoding="utf-8")) - {module_of(path)}
    return imports


def test_imports_are_found_anywhere():
    source = (
        "import os, data\ndef f():\n    if 1:\n        from kernels.chunked import x\n    from . import toy"
    )
    assert imports_of(source) == {"data", "kernels"}
    assert {"grpo", "run", "data", "kernels"} <= MODULES and "run" in graph()["grpo"]


def test_there_is_no_import_circle():
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_only_look_imports_grpo():
    assert [name for name, imports in graph().items() if "grpo" in imports] == ["look"]
    assert [name for name, imports in graph().items() if imports & {"look", "report"}] == []


@pytest.mark.slow
def test_one_process_imports_nothing_of_several():
    assert [name for name, imports in graph().items() if "parallel" in imports] == ["grpo"]
    code = "import sys, grpo; sys.exit('parallel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["reward", "retriever", "config", "report"])
def test_text_alone_needs_no_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"import {name} loads torch"
