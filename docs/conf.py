"""Sphinx's settings. `make docs` builds docs/_build/html; a warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "convert"), str(ROOT / "serving")]

import jaxllama  # noqa: E402

project = "jaxllama"
author = "the jaxllama authors"
version = release = jaxllama.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "README.md"]

html_theme = "sphinx_book_theme"
html_title = "jaxllama"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "home_page_in_toc": False,
    "navbar_persistent": [],
}
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False

# Notebooks are shown as they were saved; tests/e2e/notebook_test.py runs them.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# `make docs` needs no network: a link out of the documentation is not followed, one inside must lead somewhere.
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
# Docstrings quote code as `code`.
default_role = "code"


def _write_sections_as_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """ "Raises:" and "Source:" are paragraphs whose further lines are indented: bold, and flush, for Sphinx."""
    inside = False
    for index, line in enumerate(lines):
        if line.startswith(("Raises:", "Source:")):
            title, _, text = line.partition(":")
            lines[index] = f"**{title}:** {text.strip()}"
            inside = True
        elif inside:
            inside = line.startswith(" ")
            lines[index] = line.strip()


def setup(app: Sphinx) -> None:
    """Writes the pages that are made from the code before Sphinx looks for pages."""
    import generate

    app.connect("autodoc-process-docstring", _write_sections_as_text)
    app.connect("config-inited", lambda *_: generate.write_pages(HERE / "generated"))
