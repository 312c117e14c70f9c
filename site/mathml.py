"""Formulas as MathML, which browsers draw themselves: the usual way is a script from another host."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def drawn(formula: str, as_block: bool = False) -> str:
    """With the thin space behind a function's name, as in ln n, which browsers leave out."""
    name_ends = "&ApplyFunction;</mo>"
    return tex2mathml(formula, as_block=as_block).replace(name_ends, f'{name_ends}<mspace width="0.17em"/>')


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(drawn(node.astext()))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(drawn(node.astext(), as_block=True))
    raise nodes.SkipNode


def add_mathml(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
