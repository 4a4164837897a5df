"""Draws equations as SVG when the site is built: its pages need no JavaScript, no web fonts and no network.

`ziamath` sets TeX in outlines of the font STIX Two Math. A command that it does not know is a warning of the build.
"""

import html
import re
from functools import cache

import ziafont
import ziamath
from docutils import nodes
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

SIZE = 16.0  # pixels that an em has while an equation is set; the page scales it with its text
MARGIN = 1.0  # pixels around an equation, so that no outline is cut
ziafont.config.svg2 = False  # outlines without identifiers, which would be repeated in a page
ziafont.config.precision = 2
logger = logging.getLogger(__name__)


@cache
def svg(tex: str, inline: bool) -> str:
    """Returns an equation as an SVG element, its size and the place of its base line in units of the font's size."""
    equation = ziamath.Latex(tex.replace(r"\|", r"\Vert "), SIZE, inline=inline, color="currentColor", margin=MARGIN)
    unknown = re.findall(r"\\\w+", equation.mathmlstr())
    if unknown:
        raise ValueError(f"unknown commands: {', '.join(unknown)}")
    element = equation.svgxml()
    width, height = (float(element.attrib.pop(name)) / SIZE for name in ("width", "height"))
    style = f"width:{width:.3f}em;height:{height:.3f}em"
    if inline:
        style += f";vertical-align:{(equation.getyofst() - MARGIN) / SIZE:.3f}em"
    element.attrib.update({"role": "img", "aria-label": tex, "style": style})
    return ziamath.zmath.ET.tostring(element, encoding="unicode")


def drawn(node: nodes.Element, inline: bool) -> str:
    """Returns the SVG of a node; with a warning and as its source where it cannot be drawn."""
    tex = " ".join(node.astext().split())
    try:
        return svg(tex, inline)
    except Exception as error:  # whatever the two parsers raise
        logger.warning("cannot draw the equation %r: %s", tex, error, location=node)
        return f"<code>{html.escape(tex)}</code>"


def visit_inline(self, node: nodes.math) -> None:
    self.body.append(f'<span class="math">{drawn(node, inline=True)}</span>')
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node.get("number"):
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})</span>')
    self.body.append(f"{drawn(node, inline=False)}</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("svg", (visit_inline, None), (visit_block, None))
    app.config.html_math_renderer = "svg"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
