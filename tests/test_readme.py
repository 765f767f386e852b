"""python -m pytest tests/test_readme.py

What README.md and bench/EQUATIONS.md say about the code must stay true.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

from worlds import write_world

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = ["kernels.reference", *(path.stem for path in ROOT.glob("*.py"))]


def test_every_equation_has_its_place():
    names = re.findall(
        r"^\| .* \| `([\w.]+)` \|$", (ROOT / "bench" / "EQUATIONS.md").read_text(), re.MULTILINE
    )
    assert len(names) >= 20
    for name in names:
        module = next(m for m in MODULES if name.startswith(f"{m}."))
        assert attrgetter(name[len(module) + 1 :])(importlib.import_module(module)), name


def test_the_files_that_the_readme_names_exist():
    names = re.findall(r"`((?:bench/)?\w+\.(?:py|md))`", README)
    assert len(names) >= 6
    for name in names:
        assert (ROOT / name).exists() or name == "brief.py", name


def test_commands_name_flags_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    names = "config", "evaluate", "look", "retriever", "methods", "coldstart", "toy"
    programs = map(importlib.import_module, names)
    flags = {name for program in programs for name in program.Config.__dataclass_fields__}
    flags |= {"help", "gpu", "quick", "small", "nproc_per_node", "shutdown"}  # of bench/ and of torchrun
    assert set(re.findall(r"--(?:no-)?([a-z0-9_]+)", README)) <= flags


def test_a_method_of_your_own(tmp_path):
    """The program that is printed in the README can train without any change."""
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 25
    (tmp_path / "brief.py").write_text(code)
    flags = write_world(tmp_path) | {"method": "brief", "max_steps": "1"}
    argv = [x for name, value in flags.items() for x in (f"--{name}", value)]
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "brief.py", *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["method"] == "brief"
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1
