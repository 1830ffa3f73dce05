"""Write docs/start/first.ipynb from docs/start/first.md: ``python docs/notebook.py``."""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parent / "start" / "first.md"
CODE = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def cells(page: str) -> list[dict[str, object]]:
    """Cut a page into cells of a notebook."""
    found: list[dict[str, object]] = []
    for number, part in enumerate(CODE.split(page)):
        lines = part.strip("\n").splitlines(keepends=True)
        if not lines:
            continue
        kind: dict[str, object] = {"cell_type": "markdown"}
        if number % 2:
            kind = {"cell_type": "code", "execution_count": None, "outputs": []}
        found.append({**kind, "id": f"cell-{number}", "metadata": {}, "source": lines})
    return found


def notebook(page: str) -> str:
    """Return the notebook of a page, without outputs, as JSON."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    facts = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells(page), "metadata": facts, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.with_suffix(".ipynb").write_text(notebook(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
