"""What pyproject.toml cannot say: README.md for a package index, where relative links lead nowhere.

In the repository the links stay relative, so that they work in every clone and fork. Here they get the address of the
repository that pyproject.toml names.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*])*)]\((?!https?:|#)([^)\s]+)\)")  # a picture may be inside the text
SOURCE = re.compile(r'\b(src|srcset)="(?!https?:)([^"]+)"')


def absolute(readme: str, repository: str) -> str:
    """Turn relative links into absolute ones: to the page of a file, or to the picture itself."""

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        return f"{mark}[{LINK.sub(link, text)}]({repository}/{'raw' if mark else 'blob'}/HEAD/{target})"

    return SOURCE.sub(rf'\1="{repository}/raw/HEAD/\2"', LINK.sub(link, readme))


if __name__ == "__main__":
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=absolute(readme, project["urls"]["Repository"]),
        long_description_content_type="text/markdown",
    )
