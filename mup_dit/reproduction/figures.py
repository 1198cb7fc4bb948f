"""Figures of the reproduction, from the jobs' results."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from common.report import Figure, Theme, draw_figure
from mup_dit.reproduction.settings import LABELS, Settings


def coordinate_figure(settings: Settings, checks: Mapping[str, Mapping]) -> Figure:
    """Activations over width after the last step, one panel per parametrisation, one line per module."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        for ax, (name, found) in zip(axes, checks.items(), strict=True):
            for index, (module, sizes) in enumerate(found["sizes"].items()):
                drawn = [(width, value) for width, value in sizes if value > 0]
                style = {"linewidth": 2.6} if not module else {"linewidth": 1.2, "alpha": 0.8}
                ax.plot(
                    [width for width, _ in drawn], [value for _, value in drawn], marker="o", markersize=3,
                    color=theme.colour(index), label=module or "output", **style,
                )  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_title(f"{LABELS[name]}: {'passes' if found['verdict']['passed'] else 'fails'}")
            ax.set_xlabel("width")
        axes[0].set_ylabel("mean |output|")
        axes[-1].legend(fontsize=7)

    caption = (
        f"Coordinate check: size of activations in step {settings.check_steps} over width, mean of "
        f"{settings.check_seeds} seeds. Under muP they keep their size; under the standard parametrisation and with "
        "muP's init alone they grow."
    )
    return draw_figure("coordinates", caption, plot, size=(3.4 * len(checks) + 0.8, 3.5), panels=len(checks))


def convergence_figure(curves: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Held-out loss over steps at the widest network; label -> (step, loss) pairs."""

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        (ax,) = axes
        for index, (label, points) in enumerate(curves.items()):
            ax.plot(*zip(*points, strict=True), marker="o", markersize=4, color=theme.colour(index), label=label)
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("held-out loss")
        ax.legend()

    caption = (
        "Held-out loss of the widest network. What muP gains over SP's customary rate is the rate: SP with a rate "
        "tuned at this width does as well, but that rate must be searched for at this width."
    )
    return draw_figure("convergence", caption, plot, size=(6.4, 3.4))
