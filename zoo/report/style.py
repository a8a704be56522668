"""The house style of plots: a look per run that colour-blind people can tell apart, and SVG that fits into a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#3C3C3C")
DARK_COLOURS = ("#4C9FE0", "#F0803C", "#2DB58C", "#DB94BD", "#E8AE2E", "#9AD5F7", "#C9CED8")
"""The same for a dark page."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "pentagon", "hexagon")
"""The markers as plotly names them."""

DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)))

INK, FAINT, GRID = "#1c2330", "#667085", "#e6e9ef"

_RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b8bfca",
    "axes.grid": True,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.9,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
    "text.color": INK,
    "text.parse_math": False,  # a name with dollar signs is a name
    "xtick.color": FAINT,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.color": FAINT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


class Look(NamedTuple):
    """How one run is drawn, in every plot and in the table."""

    colour: str
    marker: str
    dash: Any

    @classmethod
    def of(cls, index: int, variant: int = 0) -> Look:
        """The look of row `index`; the first 28 differ in colour or dash, and mostly in marker too.

        Args:
            index: of the row.
            variant: of rows that share a colour, 0 for the first.
        """
        other = index + variant
        return cls(COLOURS[index % len(COLOURS)], MARKERS[other % len(MARKERS)], DASHES[other % len(DASHES)])

    def line(self, n_points: int) -> dict[str, Any]:
        """Keywords of `Axes.plot` for a curve of `n_points`, with a marker about eight times and at its end."""
        step = max(1, n_points // 8)
        return {
            "color": self.colour,
            "linestyle": self.dash,
            "marker": self.marker,
            "markevery": slice((n_points - 1) % step, None, step),
            "markeredgecolor": "white",
            "markeredgewidth": 0.8,
        }

    def swatch(self) -> str:
        """The look as a small SVG element, the key of the table on the page."""
        from matplotlib.markers import MarkerStyle

        style = MarkerStyle(self.marker)
        shape = np.asarray(style.get_path().transformed(style.get_transform()).to_polygons()[0])
        points = " ".join(f"{20 + 12 * x:.1f},{8 - 12 * y:.1f}" for x, y in shape)
        colour = f"var(--look-{COLOURS.index(self.colour)})"
        dash = "" if self.dash == "solid" else css_dash(self.dash)
        return (
            '<svg class="swatch" viewBox="0 0 40 16" width="40" height="16" aria-hidden="true">'
            f'<line x1="0" y1="8" x2="40" y2="8" style="stroke:{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>'
            f'<polygon points="{points}" style="fill:{colour};stroke:var(--paper)"/></svg>'
        )


def css_dash(dash: Any) -> str:
    """Dashes of a line of two pixels, as SVG and plotly write them."""
    return dash if dash == "solid" else ",".join(f"{2 * d:g}px" for d in dash[1])


def css_colours() -> str:
    """The colours as variables of a style sheet, for a light page and for a dark one."""
    light, dark = ("".join(f"--look-{i}:{c};" for i, c in enumerate(cs)) for cs in (COLOURS, DARK_COLOURS))
    by_choice, by_system = ":root[data-theme=dark]", ":root:not([data-theme=light])"
    return (
        f":root {{ {light} }}\n{by_choice} {{ {dark} }}\n"
        f"@media (prefers-color-scheme: dark) {{ {by_system} {{ {dark} }} }}"
    )


@contextmanager
def house_style() -> Iterator[None]:
    """Figures made and saved inside look like the house; what the caller has set elsewhere stays as it is."""
    from matplotlib import rc_context, rcdefaults, rcParams

    with rc_context():
        rcdefaults()
        rcParams.update(_RC)
        yield


def to_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as one SVG element to put into a page, as wide as its place there.

    Args:
        figure: what to draw.
        name: prefix of all ids inside, so that several plots get along on one page.
        description: read aloud instead of the picture. Escaped here.
    """
    from markupsafe import escape

    out = io.StringIO()
    with house_style():
        from matplotlib import rcParams

        rcParams["svg.hashsalt"] = name  # the same figure gives the same text
        figure.savefig(out, format="svg", transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None  # matplotlib always writes one
    head = f'<svg class="plot" {box[0]} role="img" aria-label="{escape(description)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
