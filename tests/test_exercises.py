"""python -m pytest -m "" tests/test_exercises.py

The exercises must not rot. In a copy of the repository their tests are red, and say where to read. Then the
answers are applied to it as patches, and all are green. Whoever changes the code below an answer makes it
again, as exercises/README.md says.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
NAMES = ["tokens", "dense", "gspo"]


def run_tests(folder: Path, environment: dict) -> dict[str, dict[str, str]]:
    """Exercise -> its tests -> the message of its failure, or "" if it passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml"]
    done = subprocess.run(
        [*command, "exercises"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    results: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        faults = [child.get("message", "?") for child in case if child.tag in ("failure", "error", "skipped")]
        file = case.get("classname").removeprefix("exercises.test_")
        results.setdefault(file, {})[case.get("name")] = "".join(faults)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(before, after) the answers: the results of all exercises, in two runs, because most of the time of a
    run is that of its imports."""
    folder = tmp_path_factory.mktemp("exercises") / "copy"
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("kernels", "exercises"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTHONPATH")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    before = run_tests(folder, environment)
    # in a folder below a repository git would look for the files in that repository
    environment["GIT_CEILING_DIRECTORIES"] = str(folder.parent)
    for name in NAMES:
        patch = folder / "exercises" / "answers" / f"{name}.patch"
        done = subprocess.run(["git", "apply", str(patch)], cwd=folder, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    return before, run_tests(folder, environment)


def test_every_exercise_has_a_test_and_an_answer(results):
    patches = sorted(path.stem for path in (ROOT / "exercises" / "answers").iterdir())
    assert sorted(results[0]) == patches == sorted(NAMES)


@pytest.mark.parametrize("number, name", [(i + 1, name) for i, name in enumerate(NAMES)])
def test_an_exercise_is_red_until_its_answer_is_there(results, number, name):
    before, after = (result[name] for result in results)
    assert before.keys() == after.keys() and len(before) >= 5
    for test, message in before.items():
        assert f"exercise {number}, exercises/README.md" in message, test
    assert {test: message for test, message in after.items() if message} == {}
