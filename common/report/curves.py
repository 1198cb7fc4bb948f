"""Figures of a report, drawn twice (for a light and a dark page) with matplotlib's Agg canvas; no global state."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

MAX_POINTS = 2000  # of one curve; more are averaged in bins, which keeps pages small and noise readable
CATEGORIES = 6  # distinguishable colours of a theme


@dataclass(frozen=True)
class Theme:
    """Colours of one page background; ``colours`` are told apart in greyscale order and by colour-blind readers."""

    background: str
    text: str
    grid: str
    colours: tuple[str, ...]

    def colour(self, index: int) -> str:
        """Colour of the ``index``-th category; wraps around after ``CATEGORIES``."""
        return self.colours[index % len(self.colours)]

    def settings(self) -> dict[str, object]:
        """matplotlib's parameters for this theme."""
        return {
            "figure.facecolor": self.background,
            "axes.facecolor": self.background,
            "savefig.facecolor": self.background,
            "text.color": self.text,
            "axes.labelcolor": self.text,
            "axes.edgecolor": self.grid,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "xtick.color": self.text,
            "ytick.color": self.text,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "font.size": 9.5,
            "lines.linewidth": 1.8,
        }


LIGHT = Theme("#ffffff", "#1f2328", "#d9dde3", ("#1f5fbf", "#d4611a", "#0f8a74", "#9b3fa6", "#8a6d00", "#5c6470"))
DARK = Theme("#161b22", "#e6edf3", "#39424e", ("#6ea8fe", "#f59b5b", "#44c7ac", "#d38be0", "#d8b84a", "#a6afbb"))


@dataclass(frozen=True)
class Figure:
    """A finished figure: PNG bytes for a light and a dark page, and what it shows."""

    name: str
    caption: str
    light_png: bytes
    dark_png: bytes


@dataclass(frozen=True)
class Series:
    """One line of ``line_figure``: a label and its points, in the order of ``x``."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def draw_figure(
    name: str,
    caption: str,
    plot: Callable[[Sequence[Axes], Theme], None],
    *,
    size: tuple[float, float] = (7.2, 4.0),
    panels: int = 1,
) -> Figure:
    """Runs ``plot(axes, theme)`` for both themes.

    Args:
        name: file name without suffix.
        caption: one or two sentences under the figure, also its alternative text.
        plot: draws on ``panels`` axes, side by side; takes colours from ``theme.colour(i)``.
        size: width and height in inches, at 130 dots each.
        panels: number of axes.
    """
    images = []
    for theme in (LIGHT, DARK):
        with matplotlib.rc_context(theme.settings()):
            canvas = Canvas(figsize=size, layout="constrained")
            FigureCanvasAgg(canvas)
            plot(list(np.atleast_1d(canvas.subplots(1, panels))), theme)
            buffer = io.BytesIO()
            # The creation date and version would make equal figures differ.
            canvas.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        images.append(buffer.getvalue())
    return Figure(name, caption, *images)


def binned(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` points: means of equal runs of neighbours (NaN where a whole run is not finite)."""
    x_S, y_S = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x_S) <= limit:
        return x_S, y_S
    width = -(-len(x_S) // limit)
    starts = np.arange(0, len(x_S), width)
    finite_S = np.isfinite(y_S)
    counts = np.add.reduceat(finite_S.astype(float), starts)
    sums = np.add.reduceat(np.where(finite_S, y_S, 0.0), starts)
    lengths = np.add.reduceat(np.ones_like(x_S), starts)
    means = np.full(len(starts), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return np.add.reduceat(x_S, starts) / lengths, means


def smoothed(y: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average over ``window`` points, not-finite ones left out; symmetric also where it shrinks at the
    ends, so that a steep start is not dragged down."""
    y_S = np.asarray(y, dtype=float)
    finite_S = np.isfinite(y_S)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite_S, y_S, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(finite_S.astype(float))])
    index = np.arange(len(y_S))
    half = np.minimum(window // 2, np.minimum(index, len(y_S) - 1 - index))
    low, high = index - half, index + half + 1
    count = counts[high] - counts[low]
    mean = np.full(len(y_S), np.nan)
    np.divide(sums[high] - sums[low], count, out=mean, where=count > 0)
    return mean


def line_figure(
    name: str,
    caption: str,
    series: Sequence[Series],
    *,
    x_label: str = "optimizer step",
    y_label: str = "",
    smooth: int = 0,
) -> Figure:
    """Lines over steps; with ``smooth`` points of moving average the raw points stay visible behind the line."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        # An outlier at the first steps would flatten the rest: a range above 100 is drawn on a logarithmic axis.
        values = np.concatenate([np.asarray(line.y, dtype=float) for line in series]) if series else np.zeros(0)
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() > 100 * values.min():
            ax.set_yscale("log")
        for index, line in enumerate(series):
            x, y = binned(line.x, line.y)
            colour = theme.colour(index)
            style = "-" if index < CATEGORIES else "--"
            marker = "o" if len(x) < 20 else None
            if smooth > 1 and len(x) > 20 * smooth:
                ax.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
                ax.plot(x, smoothed(y, smooth), style, color=colour, label=line.label)
            else:
                ax.plot(x, y, style, color=colour, label=line.label, marker=marker, markersize=3.5)
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        if len(series) > 1:
            ax.legend()

    return draw_figure(name, caption, plot, size=(7.2, 3.4))
