"""The code blocks of docs/architecture.md, which are whole files."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"


def code_of(heading: str) -> str:
    """The first block of Python under a heading."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{PAGE} has no code under {heading!r}"
    return found[1]


def installed(folder: Path, package: str, module: str, code: str) -> None:
    """Write a module and what says that a package is installed that names it in its entry points."""
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    facts = folder / f"{package}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[compressor.plugins]\n{package} = {module}\n")
