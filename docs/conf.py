"""How the documentation site is built: ``sphinx-build -W -b html docs docs/_build``. It needs no network."""

import sys
from pathlib import Path

import disparse_plugin

sys.path.insert(0, str(Path(__file__).parent))  # for the modules below

import inventories
import reference

project = "disparse-plugin"
author = "the disparse-plugin developers"
version = release = disparse_plugin.__version__
extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "gallery/notes"]
html_theme = "furo"
html_title = "disparse-plugin"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True, "source_repository": reference.repository()}
html_theme_options |= {"source_branch": "main", "source_directory": "docs/"}
html_math_renderer = "mathml"  # the browser's own, with nothing to fetch
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_mock_imports = ["accelerate", "transformers"]  # not needed to build the site
autoclass_content = "both"  # the arguments of a class are in the docstring of its __init__
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autosummary_generate = True
autosummary_ignore_module_all = False
templates_path = ["templates"]
reference.write(Path(__file__).parent / "api" / "generated")  # one table per public module, from its __all__

intersphinx_mapping = inventories.write(Path(__file__).parent / "_build" / "inventories")

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
