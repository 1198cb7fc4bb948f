"""Diversity of the layers of stored networks; ``python -m logah.similarity`` is its command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from common.checkpoint import read_weights
from common.config import require_at_least
from common.errors import ConfigError, DataError
from common.report.curves import Figure, draw_figure
from common.report.page import pretty_json, write_atomically
from common.report.tables import Table
from logah.diversity import Diversity, network_diversity
from logah.prediction_folder import read_state


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    networks: tuple[str, ...]  # folders or safetensors files
    shapes: tuple[tuple[int, ...], ...] | None = None  # null: every shape that two weights have
    most_rows: int = 4096  # with shapes=null: leave out weights with more rows; matching takes time with their cube
    output: str | None = None  # JSON file with all distances
    figure: str | None = None  # PNG file with a map of distances for each shape of the first network
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.networks:
            raise ConfigError("networks is empty; name a folder of weights, e.g. networks=[runs/prediction].")
        require_at_least("most_rows", self.most_rows, 1)
        for name in ("output", "figure"):
            path = getattr(self, name)
            if path is not None and Path(path).exists() and not self.overwrite:
                raise DataError(f"{name}={path} exists; add overwrite=true, or choose another file.")


def read_network(path: str) -> dict[str, Tensor]:
    """Weights of a folder or of one safetensors file.

    Raises: CheckpointError if there are none.
    """
    place = Path(path)
    if place.is_file():
        return read_weights(place)
    if (place / "export").is_dir():
        place = place / "export"
    return read_state(place)


def compare_networks(config: SimilarityConfig) -> dict[str, list[Diversity]]:
    """Diversity of every network by its path; writes what ``config`` asks for."""
    found = {
        path: network_diversity(read_network(path), config.shapes, most_rows=config.most_rows)
        for path in config.networks
    }
    if config.output is not None:
        write_atomically(Path(config.output), pretty_json(as_json(found)).encode())
    if config.figure is not None:
        write_atomically(Path(config.figure), distance_figure(next(iter(found.values()))).light_png)
    return found


def diversity_table(found: dict[str, list[Diversity]]) -> Table:
    """One row per network and shape; larger numbers mean more different layers."""
    rows = [
        [path, "x".join(map(str, each.shape)), len(each.names), each.mean, each.mean_of_pairs, each.standard_error]
        for path, of_shapes in found.items()
        for each in of_shapes
    ]
    return Table(
        name="diversity",
        columns=["network", "shape", "layers", "mean distance", "of different layers", "standard error"],
        rows=rows,
        caption="cosine distances of layers after matching their rows; the mean includes the diagonal, as published",
    )


def as_json(found: dict[str, list[Diversity]]) -> dict[str, object]:
    """Every distance, JSON-able."""
    return {
        path: [
            {
                "shape": list(each.shape), "layers": list(each.names), "mean": each.mean,
                "mean_of_pairs": each.mean_of_pairs, "distance": each.distance_KK.tolist(),
            }
            for each in of_shapes
        ]
        for path, of_shapes in found.items()
    }  # fmt: skip


def distance_figure(of_shapes: Sequence[Diversity], most_panels: int = 4) -> Figure:
    """Maps of the distances between layers, for the shapes that most layers have."""
    shown = sorted(of_shapes, key=lambda each: -len(each.names))[:most_panels]

    def plot(axes, theme) -> None:
        for ax, each in zip(axes, shown, strict=True):
            image = ax.imshow(each.distance_KK, vmin=0, vmax=1)
            ax.set_title("x".join(map(str, each.shape)))
            ax.set_xlabel("layer")
            ax.grid(False)
            ax.figure.colorbar(image, ax=ax, shrink=0.7)

    caption = "Cosine distances between layers of one shape after matching rows; 0 on the diagonal, 1 unrelated."
    return draw_figure("distances", caption, plot, size=(3.6 * len(shown), 3.2), panels=len(shown))
