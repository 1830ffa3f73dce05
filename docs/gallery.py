"""Run the examples in full and write their pages: ``python docs/gallery.py [NAME ...]``; only the pages: ``--pages``.

What an example printed, when and on what is kept in ``docs/gallery/runs``, its picture in ``docs/images/gallery``. The
tests run every example with ``--quick``; the site shows these full runs.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
RUNS, PICTURES = DOCS / "gallery" / "runs", DOCS / "images" / "gallery"
ORDER = (  # as a reader would want to see them
    "quickstart",
    "smp_two_task",
    "detector",
    "text_two_heads",
    "trainer_six_lines",
    "sparse_training",
    "structured_timm",
    "structured_smp",
    "semi_structured",
    "watershed",
)
INDEX = """# Examples

Scripts with data that the packages bring along: nothing is downloaded, and a CPU is enough. Most take `--quick` (a few
steps, to see that it runs), `--seed`, `--device` and `--out` (where the picture goes), and all explain themselves with
`--help`. They need `pip install -e '.[examples]'`. What is shown was printed by full runs; each page says when.

::::{{grid}} 1 2 2 3
:gutter: 3

{cards}
::::

```{{toctree}}
:hidden:

{names}
```
"""
RESULT = """## What it prints

```text
{printed}
```

Run on {when}.

{note}"""
CARD = """:::{{grid-item-card}} {title}
:link: {name}
:link-type: doc
{picture}{sentence}
:::
"""
PAGE = """# {title}

{text}

{picture}{result}## The program

[`examples/{name}.py`](../../examples/{name}.py)

```{{literalinclude}} ../../examples/{name}.py
:language: python
```
"""


def describe(name: str) -> tuple[str, str]:
    """Return the title of an example and what its docstring says under it, as Markdown."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))) or ""
    title, _, text = docstring.split("\n", 2)
    text = re.sub(r"``([^`]+)``", r"`\1`", text.strip())
    return title, re.sub(r"\n\n((?:    .*\n?)+)", lambda found: f"\n\n```sh\n{dedent(found[1])}\n```\n", text)


def dedent(block: str) -> str:
    """Take the four spaces off every line."""
    return "\n".join(line[4:] for line in block.rstrip().splitlines())


def run(name: str) -> None:
    """Run an example as a reader would, keep what it prints and draws."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py", "--out", folder],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        keep(name, done.stdout, Path(folder))


def keep(name: str, printed: str, folder: Path) -> None:
    """Write down what was printed, when and on what; take over the picture."""
    import torch

    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
    RUNS.mkdir(parents=True, exist_ok=True)
    printed = printed.replace(f"{folder}{os.sep}", "").strip("\n")
    (RUNS / f"{name}.txt").write_text(f"{datetime.date.today()}, {where}\n\n{printed}\n", encoding="utf-8")
    for picture in folder.glob(f"{name}*.png"):
        PICTURES.mkdir(parents=True, exist_ok=True)
        (PICTURES / picture.name).write_bytes(picture.read_bytes())


def picture_of(name: str, title: str, pattern: str) -> str:
    """Return the Markdown of an example's picture; nothing where it has none."""
    path = f"../images/gallery/{name}.png"
    return pattern.format(path=path, title=title) if (PICTURES / f"{name}.png").exists() else ""


def result_of(name: str) -> str:
    """Return the part of a page about its run, with what there is to say about it; nothing if it was not run."""
    path, note = RUNS / f"{name}.txt", DOCS / "gallery" / "notes" / f"{name}.md"
    if not path.exists():
        return ""
    when, printed = path.read_text(encoding="utf-8").split("\n\n", 1)
    said = note.read_text(encoding="utf-8") + "\n" if note.exists() else ""
    return RESULT.format(printed=printed.rstrip(), when=when, note=said)


def write_pages() -> None:
    """Write a page per example, and the index with its cards."""
    cards = []
    for name in ORDER:
        title, text = describe(name)
        picture = picture_of(name, title, "![{title}: what the run below gave]({path})\n\n")
        page = PAGE.format(title=title, text=text.rstrip(), picture=picture, result=result_of(name), name=name)
        (DOCS / "gallery" / f"{name}.md").write_text(page, encoding="utf-8")
        top = picture_of(name, title, ":img-top: {path}\n:img-alt: {title}\n")
        cards.append(CARD.format(title=title, name=name, picture=top, sentence=" ".join(text.split("\n\n")[0].split())))
    index = INDEX.format(cards="\n".join(cards).rstrip(), names="\n".join(ORDER))
    (DOCS / "gallery" / "index.md").write_text(index, encoding="utf-8")


def main() -> None:
    """Run what is asked for, then write all pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ORDER)} (default: all)")
    parser.add_argument("--pages", action="store_true", help="run nothing, write the pages from what was kept")
    options = parser.parse_args()
    for name in [] if options.pages else options.names or ORDER:
        print(name, flush=True)
        run(name)
    write_pages()


if __name__ == "__main__":
    main()
