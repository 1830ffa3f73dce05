"""What pyproject.toml cannot say: README.md for a package index, where relative links lead nowhere.

In the repository the links stay relative, so that they work in every clone and fork. Here they get the address of the
repository that pyproject.toml names.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINK = re.compile(r"(!?)(\[(?:[^][]|\[[^]]*])*])\((?!https?:|#)([^)\s]+)\)")  # the text may hold a linked badge


def absolute(readme: str, repository: str) -> str:
    """Turn relative links into absolute ones: to the page of a file, or to the picture itself."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found[1] else "blob"
        return f"{found[1]}{found[2]}({repository}/{kind}/HEAD/{found[3]})"

    return LINK.sub(link, readme)


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute(readme, project["urls"]["Repository"]),
        long_description_content_type="text/markdown",
    )
