"""Print the lower bound of every requirement of pyproject.toml as a constraint for pip: ``timm==1.0.8``.

Direct requirements only: what those need in turn is as new as it gets, as with uv's ``--resolution lowest-direct``,
which cannot choose among the builds of torch.
"""

import re
import sys
import tomllib
from pathlib import Path

BOUND = re.compile(r"^([\w.-]+)(?:\[[\w,]+])?\s*>=\s*([\w.]+)")


def constraints(project: dict, extras: list[str]) -> list[str]:
    """Return the constraints of the dependencies, the named extras and the extras inside them."""
    found, todo = [], [*project["dependencies"]]
    for extra in extras:
        todo += project["optional-dependencies"][extra]
    for requirement in todo:
        if inner := re.match(rf"^{project['name']}\[([\w,]+)]", requirement):
            found += constraints(project, inner[1].split(","))
        elif bound := BOUND.match(requirement):
            found.append(f"{bound[1]}=={bound[2]}")
        else:
            raise ValueError(f"{requirement!r}: every requirement needs a lower bound")
    return sorted(set(found))


if __name__ == "__main__":
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    print(*constraints(tomllib.loads(text)["project"], sys.argv[1:]), sep="\n")
