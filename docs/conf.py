"""Sphinx: the pages of this folder, and the API's from docstrings. ``sphinx-build -W docs build/site``; nothing is fetched."""

project = "featherlight"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["tables.py"]
html_theme = "furo"
html_title = "featherlight"
myst_heading_anchors = 3
myst_links_external_new_tab = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": False}
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
