"""RESULTS.md, of which every script writes one section."""

import re
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"


def write(name: str, text: str):
    """Puts `text` between the marker comments of `name` in RESULTS.md, and leaves the rest of it alone."""
    old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Measured\n"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{begin}\n{text}\n{end}"
    new, found = re.subn(f"{begin}.*?{end}", lambda _: section, old, flags=re.DOTALL)
    RESULTS.write_text(new if found else f"{old.rstrip()}\n\n{section}\n", encoding="utf-8")
