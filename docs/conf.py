"""The site, built by `sphinx-build -W docs docs/_build`: the extra is `docs`."""

import re
import shutil
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

import jaxsoft

HERE = Path(__file__).parent

project = "jaxsoft"
author = "The jaxsoft developers"
project_copyright = author
release = jaxsoft.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# The notebooks are stored executed. Sphinx reads what lies beside this file.
nb_execution_mode = "off"
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# A page for every name of the table in api.md. Docstrings say what the types are, with
# shapes and units.
autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Gradient", "Edge cases"]
default_role = "py:obj"

html_theme = "furo"
html_title = f"jaxsoft {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
# Formulas are MathML, which browsers draw without a script and without a network.
html_math_renderer = "mathml"


def readable(app, what, name, obj, options, lines):
    """The plain text of a docstring as reStructuredText, in place."""
    summary, *sections = re.split(r"(?m)^(?=Args:$)", "\n".join(lines))
    # An indented formula is a formula, not a quotation.
    summary = re.sub(r"\n\n(?= {4}\S)", r"\n\n::\n\n", summary)
    text = summary + "".join(sections)
    # Napoleon wants the names of several arguments on one line.
    text = re.sub(r"(?m)^( *(?:\w+, )+\w+,)\n +(\w+: )", r"\1 \2", text)
    # Every derivative has a line of its own.
    text = re.sub(r"(?m)^(?= {4}(?:d\S+|d\(.+\)/d\S+) = )", r"\n", text)
    # An asterisk would begin an emphasis.
    text = re.sub(r"(?<!`)\*(?=batch)", r"\\*", text)
    lines[:] = text.split("\n")


def inline_math(translator, node):
    translator.body.append(convert(node.astext()))
    raise SkipNode


def displayed_math(translator, node):
    formula = convert(node.astext(), display="block")
    translator.body.append(f'<div class="math">{formula}</div>')
    raise SkipNode


def setup(app):
    inline, displayed = (inline_math, None), (displayed_math, None)
    app.add_html_math_renderer("mathml", inline, displayed)
    # Before Napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", readable, priority=400)
