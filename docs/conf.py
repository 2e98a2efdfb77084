"""Sphinx settings; `make docs` builds with every warning an error and without network."""

import importlib.util
import sys
from pathlib import Path

import prefloss

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "prefloss"
author = "The prefloss authors"
copyright = f"2026, {author}"
version = release = prefloss.__version__

# No intersphinx: it would fetch other projects' inventories at build time.
extensions = [
    "evidence_pages",
    "loss_pages",
    # Brings myst_parser for the pages, and executes the notebooks.
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
# Docstrings write `names` in single backticks.
default_role = "literal"
# Shapes such as [..., T] keep their dots.
smartquotes = False
exclude_patterns = ["_build", "_ext", "evidence/results"]
html_theme = "furo"
html_title = f"prefloss {release}"
# MathJax comes with the site, as one file: no page loads anything from the network.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0]
html_static_path = ["_static", f"{_mathjax}/static/mathjax/tex-svg-full.js"]
mathjax_path = "tex-svg-full.js"
html_css_files = ["prefloss.css"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Notebooks are committed without outputs. The build runs them, in temporary folders, and a failing cell fails it.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120  # seconds for a cell
nb_code_prompt_show = "Show the code of the picture"
nb_code_prompt_hide = "Hide the code of the picture"
# tqdm and the trainers write advice there, which depends on the machine.
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
