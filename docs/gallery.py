"""How the site runs the examples: with which arguments, and what becomes of the pictures that they save."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sphinx_gallery.scrapers import figure_rst

# A few steps of each are enough to see that they run. With this variable set, they run as a reader would run them.
FULL = "DISPARSE_FULL_EXAMPLES"
QUICK = {
    "quickstart.py": ["--quick"],
    "smp_two_task.py": ["--steps", "2"],
    "sparse_training.py": ["--quick"],
    "structured_smp.py": ["--steps", "2"],
    "structured_timm.py": ["--epochs", "1"],
}
SAVES_PICTURES = ("quickstart.py", "sparse_training.py")
PICTURES = Path(tempfile.mkdtemp(prefix="disparse-examples-"))


def arguments(_: dict[str, Any], script_vars: dict[str, Any]) -> list[str]:
    """Return the command line of an example."""
    name = Path(script_vars["src_file"]).name
    out = ["--out", str(PICTURES)] if name in SAVES_PICTURES else []
    return out + ([] if os.environ.get(FULL) else QUICK.get(name, []))


def saved_pictures(_: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Show what the example saved to its folder."""
    shown = []
    for picture in sorted(PICTURES.glob("*.png")):
        place = next(block_vars["image_path_iterator"])
        shutil.move(picture, place)
        shown.append(place)
    return figure_rst(shown, gallery_conf["src_dir"])
