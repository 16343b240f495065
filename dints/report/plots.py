"""Plots of a page: matplotlib's SVG, with text in the page's font and colour."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

# not pyplot, which would choose a window system and keep every figure
from matplotlib.figure import Figure

from dints.running import curves

# Of Okabe and Ito, safe for colour-blind readers, those first that are seen well on grey; one a
# class.
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
MARKERS = "osD^vPX"  # beside colours, so that classes are told apart without them
UNLIKE = 8  # times as large, volumes of two classes are shown on a logarithmic scale
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dints",  # names of parts do not differ from time to time
    "text.parse_math": False,  # a class may be called $
    "path.simplify_threshold": 1.0,  # points, within which long curves may be simplified
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def colour(label: int) -> str:
    """Return the colour of a class, by its label value from 1."""
    return COLOURS[(label - 1) % len(COLOURS)]


def strips(
    values: Mapping[str, Sequence[float]],
    cases: Sequence[str],
    best: float | None = None,
    first_label: int = 1,
) -> str:
    """Draw each class's values as points that lead to their cases, over a box of quartiles.

    Args:
        values: of each class by its name, a value a case; those that are not finite are left out.
        cases: names for people.
        best: the end of the axis, where it has one.
        first_label: the first class's label value.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 0.45 + 0.5 * len(values)), layout="constrained")
        axes = figure.subplots()
        for row, of_class in enumerate(values.values()):
            kept = np.flatnonzero(np.isfinite(of_class))
            # beside each other, and the same every time
            y = row + 0.26 * np.sin(2.4 * np.arange(len(kept)))
            _points(axes, first_label + row, kept, np.asarray(of_class)[kept], y, s=16, zorder=2)
            if len(kept) > 2:
                _box(axes, np.asarray(of_class)[kept], row)
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.4, -0.6)
        if best is not None:
            axes.set_xlim(right=best + 0.01 * (best - axes.get_xlim()[0]))
        axes.grid(alpha=0.3, axis="x")
        axes.tick_params(axis="y", length=0)
        return svg(figure, cases)


def _points(axes: Axes, number: int, cases: np.ndarray, x: np.ndarray, y: np.ndarray, **settings):
    """Draw a class's points, each of which leads to its case."""
    settings |= {"color": colour(number), "marker": MARKERS[(number - 1) % len(MARKERS)]}
    points = axes.scatter(x, y, edgecolors="black", linewidths=0.4, **settings)
    points.set_urls([f"#case-{case}" for case in cases])


def _box(axes: Axes, values: np.ndarray, row: int) -> None:
    line = {"color": "black", "linewidth": 1.1}
    axes.boxplot(
        [values],
        positions=[row],
        orientation="horizontal",
        widths=0.72,
        showfliers=False,
        zorder=1,
        manage_ticks=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops={"color": "black", "linewidth": 2.2},
    )


def agreement(
    reference: Mapping[str, Sequence[float]],
    prediction: Mapping[str, Sequence[float]],
    cases: Sequence[str],
) -> str:
    """Draw the predicted volume of each case and class over the reference's, both in ml."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        axes = figure.subplots()
        for label, (name, x) in enumerate(reference.items(), start=1):
            kept = np.flatnonzero(np.isfinite(x))
            x, y = (np.asarray(values)[kept] for values in (x, prediction[name]))
            _points(axes, label, kept, x, y, s=18, label=name)
        volumes = np.array([*reference.values(), *prediction.values()])
        largest = 1.05 * np.nanmax(volumes) or 1.0
        axes.plot((0, largest), (0, largest), color="black", linewidth=1, linestyle="--", zorder=0)
        found = [of_class[of_class > 0] for of_class in volumes]
        medians = [np.median(of_class) for of_class in found if len(of_class)]
        # a lesion beside its organ would lie at the origin
        if medians and max(medians) > UNLIKE * min(medians):
            scale = {"linthresh": min(medians) / UNLIKE, "linscale": 0.5}
            axes.set_xscale("symlog", **scale)  # not log, which has no 0
            axes.set_yscale("symlog", **scale)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")  # in place of powers of ten in TeX
            largest *= 1.5
        axes.set(xlim=(0, largest), ylim=(0, largest), aspect="equal")
        axes.set(xlabel="reference, ml", ylabel="segmentation, ml")
        axes.grid(alpha=0.3)
        if 1 < len(reference) <= len(COLOURS):
            axes.legend(frameon=False)
        return svg(figure, cases)


def course(folder: Path) -> dict[str, str]:
    """Draw a run's folder's tables: pictures of `dints.running.curves`, by their names."""
    with matplotlib.rc_context(STYLE):
        return {name: svg(figure) for name, figure in curves.figures(folder).items()}


def svg(figure: Figure, cases: Sequence[str] = ()) -> str:
    """Return a figure as SVG for a page: black is the page's colour, points lead to their case.

    Args:
        cases: names of those that points lead to, as ``#case-<number>``.
    """
    content = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(content, format="svg", transparent=True, metadata=NO_METADATA)
    return inline(
        content.getvalue(),
        (r"<style.*?</style>", ""),  # it would hold for the whole page
        (r'<g id="[^"]*"', "<g"),  # several plots have the same ones
        (r"; font-family: [^;\">]*", ""),
        ("#000000", "currentColor"),
        # tenths of a point are enough
        (r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0])),
        (
            r'<a xlink:href="#case-(\d+)" target="_blank">',
            lambda found: _link(int(found[1]), cases),
        ),
        ("xlink:href", "href"),
    )


def inline(text: str, *changes: tuple[str, str | Callable[[re.Match], str]]) -> str:
    """Return SVG for the inside of a page, with patterns replaced."""
    text = text[text.index("<svg") :]
    head = r'\A<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">'
    for pattern, instead in (head, *changes, (r"\s*\n\s*", "\n")):
        text = re.sub(pattern, instead, text, flags=re.DOTALL)
    return text


def _link(number: int, cases: Sequence[str]) -> str:
    # Hidden from the tab key, and as the whole plot from screen readers: a table has the numbers.
    return f'<a href="#case-{number}" tabindex="-1"><title>{html.escape(cases[number])}</title>'
