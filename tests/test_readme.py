"""The README's map from the papers to the code must not drift.

python -m pytest tests/test_readme.py
python tests/test_readme.py                    # writes the line numbers anew
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MODULES = "kernels.reference data retriever rollout runner reward simulator evaluate grpo".split()
ROW = re.compile(r"^(\| .* \| `([\w.]+)` \| )(\S+)( \|)$", re.MULTILINE)


def lines(name: str) -> str:
    """grpo.advantages -> grpo.py:125-140"""
    module, parts = next((m, name[len(m) + 1 :]) for m in MODULES if name.startswith(m + "."))
    source, first = inspect.getsourcelines(attrgetter(parts)(importlib.import_module(module)))
    return f"{module.replace('.', '/')}.py:{first}-{first + len(source) - 1}"


def test_line_numbers():
    rows = ROW.findall(README.read_text())
    assert len(rows) >= 10
    for _, name, written, _ in rows:
        assert written == lines(name), "python tests/test_readme.py writes them anew"


def test_commands_name_flags_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    programs = map(importlib.import_module, ("grpo", "evaluate", "retriever", "methods"))
    flags = {name for program in programs for name in program.Config.__dataclass_fields__} | {"help"}
    assert set(re.findall(r"--(?:no-)?([a-z_]+)", README.read_text())) <= flags


def test_a_method_of_your_own(tmp_path):
    """The README's file, as it stands there, trains."""
    from test_grpo import write_world

    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 25
    (tmp_path / "brief.py").write_text(code)
    flags = write_world(tmp_path) | {"method": "brief", "max_steps": "1"}
    command = [
        sys.executable,
        "brief.py",
        *(x for name, value in flags.items() for x in (f"--{name}", value)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["method"] == "brief"
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    README.write_text(ROW.sub(lambda m: m[1] + lines(m[2]) + m[4], README.read_text()))
