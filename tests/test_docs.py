"""What the pages of `docs/` name is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_a_page_names_exists() -> None:
    there = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    named = {name for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"] for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 20 and named - there == set()


def test_every_path_that_the_readme_names_exists() -> None:
    named = re.findall(r"(?:`|\()((?:flows|tasks|cluster|specs|tests|docs|docker)/[\w./-]*)(?:`|\))", (ROOT / "README.md").read_text())
    assert len(named) > 5 and [path for path in named if not (ROOT / path).exists()] == []
