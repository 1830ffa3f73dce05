"""Run the examples in full and write their pages: ``python docs/gallery.py [NAME ...]``; only the pages: ``--pages``.

What an example printed, when, on what and for how long is kept in ``docs/gallery/runs``, its picture in
``docs/images/gallery``. The tests run every example with ``--quick``; the site, the README and ``examples/README.md``
show these full runs.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
RUNS, PICTURES = DOCS / "gallery" / "runs", DOCS / "images" / "gallery"
ORDER = {  # as a reader would want to see them, and what each shows
    "quickstart": "seven ways to prune two unequal tasks",
    "smp_two_task": "an SMP Unet with a mask and a label",
    "detector": "a torchvision detector, by its own losses",
    "text_two_heads": "a Hugging Face text model",
    "trainer_six_lines": "six lines in a training script",
    "sparse_training": "sparse from the first step: DiSparse, RigL, SET",
    "structured_timm": "a timm trunk loses channels and milliseconds",
    "structured_smp": "a small SMP model, saved and rebuilt",
    "semi_structured": "two of every four weights",
    "watershed": "where tasks part ways, with controls",
}
COLUMNS = 5  # of the README's table
BEGIN, END = "<!-- examples: begin, written by docs/gallery.py -->", "<!-- examples: end -->"
INDEX = """# Examples

Scripts with data that the packages bring along: nothing is downloaded, and a CPU is enough. All take `--quick` (a few
steps, to see that it runs), `--seed`, `--device` and `--out` (where the picture goes), and explain themselves with
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
:lines: {first}-
```
"""


def describe(name: str) -> tuple[str, str]:
    """Return the title of an example and what its docstring says under it, as Markdown."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))) or ""
    title, _, text = docstring.split("\n", 2)
    text = re.sub(r"``([^`]+)``", r"`\1`", text.strip())
    return title, re.sub(r"\n\n((?:    .*\n?)+)", lambda found: f"\n\n```sh\n{dedent(found[1])}\n```\n", text)


def first_line(name: str) -> int:
    """Return the number of the first line of code: the docstring is the text of the page."""
    return ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")).body[1].lineno


def dedent(block: str) -> str:
    """Take the four spaces off every line."""
    return "\n".join(line[4:] for line in block.rstrip().splitlines())


def run(name: str) -> None:
    """Run an example as a reader would, keep what it prints and draws."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py", "--out", folder],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        keep(name, done.stdout, Path(folder), seconds)


def keep(name: str, printed: str, folder: Path, seconds: float) -> None:
    """Write down what was printed, when, on what, and the seconds that one core worked; take over the picture."""
    import torch
    from PIL import Image  # comes with matplotlib

    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
    RUNS.mkdir(parents=True, exist_ok=True)
    printed = printed.replace(f"{folder}{os.sep}", "").strip("\n")
    when = f"{datetime.date.today()}, {where}, {seconds:.0f} s of one core"
    (RUNS / f"{name}.txt").write_text(f"{when}\n\n{printed}\n", encoding="utf-8")
    for picture in folder.glob(f"{name}*.png"):
        PICTURES.mkdir(parents=True, exist_ok=True)
        few = Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # a third of the size
        few.save(PICTURES / picture.name, optimize=True)


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
        picture = picture_of(name, title, ":::{{div}} wide\n![{title}: what the run below gave]({path})\n:::\n\n")
        result, first = result_of(name), first_line(name)
        page = PAGE.format(title=title, text=text.rstrip(), picture=picture, result=result, name=name, first=first)
        (DOCS / "gallery" / f"{name}.md").write_text(page, encoding="utf-8")
        top = picture_of(name, title, ":img-top: {path}\n:img-alt: {title}\n")
        cards.append(CARD.format(title=title, name=name, picture=top, sentence=" ".join(text.split("\n\n")[0].split())))
    index = INDEX.format(cards="\n".join(cards).rstrip(), names="\n".join(ORDER))
    (DOCS / "gallery" / "index.md").write_text(index, encoding="utf-8")


def minutes(name: str) -> str:
    """Return how long the run that was kept took one core, in words; nothing if that was not kept."""
    path = RUNS / f"{name}.txt"
    found = re.search(r", (\d+) s of one core\n", path.read_text(encoding="utf-8")) if path.exists() else None
    if found is None:
        return ""
    seconds = int(found[1])
    return f"{round(seconds / 60)} min" if seconds >= 90 else f"{seconds} s"


def readme_table() -> str:
    """Return the README's table: a row of pictures, a row of what they show, and so on."""
    rows, names = [], list(ORDER)
    for start in range(0, len(names), COLUMNS):
        part = names[start : start + COLUMNS]
        rows.append([picture_of(name, name, "![{title}](docs/images/gallery/{title}.png)") for name in part])
        rows.append(
            [", ".join(filter(None, [f"[{ORDER[name]}](docs/gallery/{name}.md)", minutes(name)])) for name in part]
        )
    rows.insert(1, [":---:"] * COLUMNS)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def examples_table() -> str:
    """Return the table of ``examples/README.md``."""
    lines = [f"| [{name}.py]({name}.py) | {shows} | {minutes(name)} |" for name, shows in ORDER.items()]
    return "\n".join(["| script | what it shows | one core |", "| --- | --- | ---: |", *lines])


def write_tables() -> None:
    """Put the tables where their marks are."""
    for path, table in ((DOCS.parent / "README.md", readme_table()), (EXAMPLES / "README.md", examples_table())):
        before, after = re.split(rf"{BEGIN}\n.*?{END}", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


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
    write_tables()


if __name__ == "__main__":
    main()
