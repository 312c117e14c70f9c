"""Sphinx's settings for both languages; site/build.sh says which, and brings the pages together."""

import os
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
from alt_texts import describe_figures
from docstrings import marked_up
from links import rewrite
from mathml import add_mathml
from search_zh import SearchPairs
from stage import pages, without_ending

CHINESE = os.environ["SITE_LANGUAGE"] == "zh"
repository = os.environ.get("REPOSITORY", "")  # https://host/owner/name

project = html_title = "train_llava"
language = "zh_CN" if CHINESE else "en"
html_search_language = "zh" if CHINESE else "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["benchmarks"]
smartquotes = False  # it would turn the two lines of a --flag into one

myst_heading_anchors = 4
myst_enable_extensions, html_math_renderer = ["dollarmath"], "mathml"
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # they would come from other hosts
nb_code_prompt_show, nb_code_prompt_hide = ("显示代码", "收起代码") if CHINESE else ("Show the code", "Hide the code")

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
default_role = "literal"  # docstrings have `names` as Markdown has them

html_theme, html_favicon = "furo", "static/icon.svg"
html_static_path, templates_path, html_css_files = ["static"], ["templates"], ["site.css"]
html_copy_source = html_show_sphinx = html_show_copyright = False
OTHER = "en" if CHINESE else "zh"
html_context = {"other_language": OTHER, "other_name": "English" if CHINESE else "中文"}
html_context["twins"] = {*map(without_ending, pages(OTHER)), "search", "genindex", "py-modindex"}
html_sidebars = {
    "**": [
        f"sidebar/{name}.html" for name in ("brand", "language", "search", "scroll-start", "navigation", "scroll-end")
    ]
}


def setup(app: Sphinx) -> None:
    app.add_config_value("repository", "", "env")
    app.add_search_language(SearchPairs)
    add_mathml(app)
    app.connect("source-read", rewrite)
    app.connect("source-read", describe_figures)
    app.connect("autodoc-process-docstring", marked_up)
