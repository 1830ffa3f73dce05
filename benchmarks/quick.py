"""What every benchmark says of its quick run."""

from __future__ import annotations


def say_if_quick(quick: bool) -> None:
    """Say what the figures of a quick run are worth, where it was one."""
    if quick:
        print("A quick run only shows that the script works: its figures mean nothing.")
