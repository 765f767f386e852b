"""RESULTS.md, and the README's toy table: every script writes its own section."""

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def write(name: str, text: str, file: Path = RESULTS):
    """Puts `text` between the marker comments of `name` in a file, and leaves the rest of it alone."""
    old = file.read_text(encoding="utf-8") if file.exists() else "# Measured\n"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{begin}\n{text}\n{end}"
    new, found = re.subn(f"{begin}.*?{end}", lambda _: section, old, flags=re.DOTALL)
    file.write_text(new if found else f"{old.rstrip()}\n\n{section}\n", encoding="utf-8")
