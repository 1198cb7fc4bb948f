"""The figure of a sweep: loss over learning rate at every width, and where optimum and edge lie."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from common.report import Figure, Theme, draw_figure
from mup_dit.sweep import Row, Transfer

TOP = 2.0  # largest loss shown, as a multiple of the least one; larger ones are drawn at the top


def loss_panel(ax: Axes, theme: Theme, rows: Mapping[int, Row], transfer: Transfer, title: str) -> None:
    """One line a width; a ring at the fitted optimum; crosses at the top for runs beyond the panel."""
    least = min(optimum.loss for optimum in transfer.optima.values())
    top = TOP * least
    for index, (width, row) in enumerate(rows.items()):
        colour, rates = theme.colour(index), sorted(row)
        losses = np.array([min(row[rate], top) for rate in rates])
        ax.plot(rates, losses, color=colour, marker="o", markersize=3.5, label=f"width {width}")
        beyond = [rate for rate in rates if row[rate] > top]
        ax.plot(beyond, [top] * len(beyond), "x", color=colour)
        optimum = transfer.optima[width]
        ax.plot([optimum.vertex], [optimum.loss], "o", color=colour, markersize=9, fillstyle="none")
    ax.set_ylim(top=1.03 * top)
    ax.set_xlabel("log2 base learning rate")
    ax.set_title(title)


def transfer_figure(
    rows: Mapping[str, Mapping[int, Row]], transfers: Mapping[str, Transfer], *, name: str = "transfer"
) -> Figure:
    """A panel per sweep (their labels are the titles), and one with optima and edges over width."""
    labels = list(rows)

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        *panels, last = axes
        for ax, label in zip(panels, labels, strict=True):
            loss_panel(ax, theme, rows[label], transfers[label], label)
        panels[0].set_ylabel("held-out loss")
        panels[0].legend()
        for index, label in enumerate(labels):
            optima = transfers[label].optima
            widths, colour = list(optima), theme.colour(index)
            last.plot(widths, [o.vertex for o in optima.values()], "-o", color=colour, label=f"{label}: fitted optimum")
            last.plot(widths, [o.edge for o in optima.values()], "--^", color=colour, label=f"{label}: edge")
        last.set_xscale("log", base=2)
        if widths:
            last.set_xticks(widths, [str(width) for width in widths])
        last.minorticks_off()
        last.set_xlabel("width")
        last.set_title("log2 rate")
        last.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)

    spans = [spread for transfer in transfers.values() for spread in (transfer.argmin_spread,) if math.isfinite(spread)]
    caption = (
        "Held-out loss over the base learning rate, one line a width; rings: minimum of the fitted parabola; crosses: "
        f"loss above {TOP:g} times the least, or diverged. Right: fitted optimum and edge of divergence over width "
        f"(best rates spread by {', '.join(f'{value:g}' for value in spans)} octaves)."
    )
    return draw_figure(name, caption, plot, size=(3.4 * (len(labels) + 1), 3.7), panels=len(labels) + 1)
