"""python -m pytest tests/test_timeout.py

A test that hangs must not hang the whole suite: pyproject.toml sets a limit for every single test.
"""

import subprocess
import sys
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_a_test_that_hangs_ends_the_program(tmp_path, pytestconfig):
    """The stacks of all threads show where it hangs. Here the limit is shorter than in pyproject.toml."""
    assert 60 <= pytestconfig.getini("faulthandler_timeout") <= 600
    file = tmp_path / "test_hang.py"
    file.write_text("import threading\n\ndef test_hang():\n    threading.Event().wait()\n")
    command = [sys.executable, "-m", "pytest", "-c", str(PYPROJECT), "--rootdir", str(tmp_path), str(file)]
    command += ["-o", "faulthandler_timeout=0.3", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Timeout" in done.stderr and "in test_hang\n" in done.stderr
