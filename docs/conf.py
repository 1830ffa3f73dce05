"""How the documentation site is built: ``sphinx-build -W -b html docs docs/_build``."""

import sys
from pathlib import Path

import disparse_plugin

sys.path.insert(0, str(Path(__file__).parent))  # for gallery.py

project = "disparse-plugin"
author = "the disparse-plugin developers"
version = release = disparse_plugin.__version__
extensions = [
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"disparse-plugin {release}"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_mock_imports = ["accelerate", "transformers"]  # not needed to build the site
autoclass_content = "both"  # the arguments of a class are in the docstring of its __init__
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(?!watershed)\w+\.py$",  # all but watershed.py, which needs __file__
    "reset_argv": "gallery.arguments",
    "image_scrapers": ("gallery.saved_pictures",),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "within_subsection_order": "FileNameSortKey",
}
