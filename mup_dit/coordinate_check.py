"""Runs the coordinate check of a configured network, and writes its records, slopes, figure and verdict.

Widths grow by heads of one size. Every width trains on the same images with the same times and noise.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import nn
from tqdm import tqdm

from common import provenance
from common.config import OptimConfig, require_at_least, require_choice
from common.errors import ConfigError
from common.optim import build_optimizer, set_learning_rate
from common.report import Figure, Theme, draw_figure
from common.report.page import pretty_json, write_atomically
from common.seeding import derive_seed, generator
from mup_dit.building import ModelConfig, build_model, read_model_config
from mup_dit.coordinates import (
    SLOPE_LIMIT,
    Coordinate,
    StepFunction,
    Verdict,
    coordinates,
    judge,
    mean_sizes,
    slopes,
)
from mup_dit.data import DataSection, build_data
from mup_dit.objective import ObjectiveConfig
from mup_dit.task import DiffusionTask

RESULT = "verdict.json"


@dataclass(frozen=True, kw_only=True)
class CoordCheckConfig:
    """Options of ``python -m mup_dit.coord_check``."""

    output: str = "runs/coord_check"
    seed: int = 0
    model: dict[str, Any]
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataSection = field(default_factory=DataSection)
    heads: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])  # widths, in heads of the model's head size
    lr: float = 2.0**-7  # base learning rate
    optimizer: Literal["mup", "plain"] = "mup"  # plain: one rate for all, whatever the parametrisation
    steps: int = 4
    seeds: int = 3
    batch_size: int = 64
    limit: float = SLOPE_LIMIT  # largest absolute slope that passes
    device: str = "cpu"

    def __post_init__(self) -> None:
        require_choice("optimizer", self.optimizer, ("mup", "plain"))
        for name in ("steps", "seeds", "batch_size"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("limit", self.limit, 0)
        if len(set(self.heads)) < 2 or min(self.heads, default=0) < 1:
            raise ConfigError(f"heads={self.heads} must be at least two different positive numbers, narrow to wide.")
        for heads in self.heads:
            self.network.at_heads(heads)  # its checks

    @cached_property
    def network(self) -> ModelConfig:
        """Network and parametrisation; its own width is of no account."""
        return read_model_config(self.model)


def run_check(config: CoordCheckConfig, *, progress: bool = True) -> tuple[list[Coordinate], Verdict]:
    """Trains all widths and judges the slopes."""
    data = build_data(config.data, config.network, seed=config.seed)
    rows = np.arange(min(config.batch_size, len(data.train)))
    batch = {name: value.to(config.device) for name, value in data.train.fetch(rows).items()}
    optim = OptimConfig(lr=config.lr, warmup=0)

    def prepare(heads: int, seed: int) -> tuple[nn.Module, StepFunction]:
        network = config.network.at_heads(heads)
        rng = generator(seed, "coordinate check")
        task = DiffusionTask(
            network,
            config.objective,
            seed=seed,
            latent_scale=data.latent_scale,
            encoder=data.encoder,
            build=lambda: build_model(network, rng),
        )
        model = task.build_model().to(config.device).train()
        groups = task.param_groups(model, 0.0)
        if config.optimizer == "plain":
            groups = [{**group, "lr_scale": 1.0} for group in groups]
        optimizer = build_optimizer(groups, optim, torch.device(config.device))
        set_learning_rate(optimizer, optim.lr)
        done = iter(range(config.steps))

        def step() -> None:
            draws = {name: value.to(config.device) for name, value in task.draw(next(done), len(rows)).items()}
            (task.training_step(model, batch, draws).loss_sum / len(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, step

    widths = {heads: heads * config.network.network.head_size for heads in sorted(set(config.heads))}
    seeds = [derive_seed(config.seed, "coordinate check", index) for index in range(config.seeds)]
    with tqdm(total=len(widths) * len(seeds), unit="network", disable=None if progress else True) as bar:
        found = coordinates(prepare, widths, steps=config.steps, seeds=seeds, progress=bar.update)
    return found, judge(found, config.limit)


def write_check(folder: Path, config: CoordCheckConfig, found: Sequence[Coordinate], verdict: Verdict) -> list[Path]:
    """Writes records.csv, slopes.csv, coordinates.png (and -dark) and verdict.json; replaces those of an earlier check.

    Raises: ConfigError if the folder holds files, but no earlier check.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / RESULT).is_file():
        raise ConfigError(f"output={folder} holds other files; choose an empty or a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    figure = coordinate_figure(found, config)
    measured = slopes(found)
    files = {
        "records.csv": table_text(["seed", "width", "step", "module", "l1"], [asdict(item) for item in found]),
        "slopes.csv": table_text(["module", "step", "slope"], [asdict(item) for item in measured]),
        "coordinates.png": figure.light_png,
        "coordinates-dark.png": figure.dark_png,
        RESULT: pretty_json({**verdict.as_dict(), "config": asdict(config), **provenance.collect(seed=config.seed)}),
    }
    for name, content in files.items():
        write_atomically(folder / name, content if isinstance(content, bytes) else content.encode())
    return [folder / name for name in files]


def table_text(columns: Sequence[str], rows: Sequence[dict]) -> str:
    """CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def coordinate_figure(found: Sequence[Coordinate], config: CoordCheckConfig) -> Figure:
    """One panel per step: mean absolute output against width, both axes base 2, one line per top-level module."""
    sizes = mean_sizes(found)
    steps = sorted({step for _, step in sizes})
    names = shown_modules([module for module, step in sizes if step == steps[0]])

    def plot(axes: Sequence[Axes], theme: Theme) -> None:
        for ax, step in zip(axes, steps, strict=True):
            for index, name in enumerate(names):
                by_width = {width: value for width, value in sizes[name, step].items() if value > 0}
                style = {"color": theme.colour(index), "linestyle": "-" if index < 6 else "--"}
                ax.plot(
                    list(by_width), list(by_width.values()), marker="o", markersize=3, label=name or "output", **style
                )
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_title(f"step {step}")
            ax.set_xlabel("width")
        axes[0].set_ylabel("mean |output|")
        lowest, highest = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(lowest, highest)
        axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    caption = (
        f"Size of activations over width, mean of {config.seeds} seeds; {config.network.family}, "
        f"{config.network.parametrization}, {config.optimizer} optimizer, base rate {config.lr:g}. Flat lines: muP."
    )
    size = (2.8 * len(steps) + 1.8, 3.4)
    return draw_figure("coordinates", caption, plot, size=size, panels=len(steps))


def shown_modules(names: Sequence[str]) -> list[str]:
    """The embedders, first and last block, and the whole network: a line each."""
    top = [name for name in names if name and "." not in name and not name.startswith(("final", "norm", "proj_out"))]
    blocks = [name for name in names if name.count(".") == 1 and name.split(".")[0].endswith("blocks")]
    return [*top, *dict.fromkeys([*blocks[:1], *blocks[-1:]]), ""]
