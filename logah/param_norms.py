"""Total norms of predicted networks beside published ones: the quickest check that a released hypernetwork was read,
and a network traced, as its authors did.

GHN-3 publishes ``ghn3_results.json``, one JSON object per line or one in all, that maps names of torchvision's
networks to numbers as text: ``ghn3`` is the accuracy in percent right after prediction, ``ghn3-paramnorm`` the norm.

Source: norm check of GHN-3's code (Knyazev et al., 2023).
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.config import require_at_least
from common.errors import ConfigError, DataError, QuintetError
from common.report.tables import Table
from logah.architectures import Architecture, resolve_target
from logah.checkpoints import Loaded, load_hypernetwork
from logah.prediction import fill
from logah.prediction_folder import load_prediction, read_architecture
from logah.starts import graph_for
from logah.targets import torchvision_classifiers

NORM_SUFFIX = "-paramnorm"
TOLERANCE = 1e-2
"""Largest difference that the authors allow."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckNormsConfig:
    results: str | None = None  # the published file, ghn3_results.json; null: only print norms
    column: str | None = None  # its column: ghn2, ghn3-t, ghn3, randinit; null with one column
    checkpoint: str | None = None  # hypernetwork that predicts the networks of targets
    targets: tuple[str, ...] | None = None  # null: every network of the file that torchvision has
    limit: int | None = None  # check the first so many; null: all
    predictions: tuple[str, ...] | None = None  # folders of logah.predict to look at instead
    tolerance: float = TOLERANCE  # largest difference that passes
    seed: int = 0  # of what the hypernetwork does not predict

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.predictions is None):
            raise ConfigError("either checkpoint=HYPERNETWORK or predictions=[DIR,...] is needed.")
        if self.results is None and self.predictions is None and not self.targets:
            raise ConfigError("results=FILE (published norms) or targets=[NAME,...] is needed with checkpoint.")
        if self.limit is not None:
            require_at_least("limit", self.limit, 1)
        require_at_least("tolerance", self.tolerance, 0)


@dataclass(frozen=True)
class NormRow:
    """A network's norm; ``published`` and ``accuracy`` (percent) where the file has them."""

    name: str
    norm: float
    published: float | None = None
    accuracy: float | None = None
    tolerance: float = TOLERANCE

    @property
    def agrees(self) -> bool | None:
        return None if self.published is None else abs(self.norm - self.published) <= self.tolerance


@torch.no_grad()
def total_norm(network: nn.Module) -> float:
    """Euclidean norm of all parameters together, tied ones once."""
    squares = [parameter.double().square().sum() for parameter in network.parameters()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def read_published(path: Path) -> dict[str, dict[str, float]]:
    """Numbers by network and column; lines later in the file win.

    Raises: DataError for a file that is missing or of another kind, with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"results={path} cannot be read ({error}).") from None
    found: dict[str, dict[str, float]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            for name, values in _by_network(json.loads(line)):
                known = found.setdefault(name, {})
                known |= {column: float(value) for column, value in values.items() if value is not None}
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"results={path}, line {number}: not the numbers of networks ({error}); "
                'expected {"resnet50": {"ghn3-paramnorm": "108.45", ...}, ...}.'
            ) from None
    if not found:
        raise DataError(f"results={path} holds no network.")
    return found


def _by_network(entry: Mapping) -> Iterable[tuple[str, Mapping]]:
    if isinstance(entry.get("arch"), str):  # one network per line
        return [(entry["arch"], {name: value for name, value in entry.items() if name != "arch"})]
    return entry.items()


def choose_column(published: Mapping[str, Mapping[str, float]], column: str | None, path: str) -> str:
    """The column of norms to compare with, without its suffix.

    Raises: ConfigError if there is no such column, or a choice between several.
    """
    columns = sorted(
        {name.removesuffix(NORM_SUFFIX) for each in published.values() for name in each if name.endswith(NORM_SUFFIX)}
    )
    if column is None and len(columns) == 1:
        return columns[0]
    if column not in columns:
        raise ConfigError(f"column={column}: results={path} has norms of {', '.join(columns) or 'nothing'}.")
    return column


def check_norms(config: CheckNormsConfig) -> list[NormRow]:
    """Norms of all networks that ``config`` names, with the published ones.

    Networks that cannot be built or predicted are logged and left out.

    Raises: ConfigError, DataError or CheckpointError for unusable options and files, or if no network is left.
    """
    published: dict[str, dict[str, float]] = {}
    column = ""
    if config.results is not None:
        published = read_published(Path(config.results))
        column = choose_column(published, config.column, config.results)
    rows = []
    if config.predictions is not None:
        for folder in config.predictions[: config.limit]:
            name = read_architecture(folder).options.get("name", folder)
            rows.append(_row(name, total_norm(load_prediction(folder)), published, column, config.tolerance))
        return rows
    loaded = load_hypernetwork(config.checkpoint)
    for name in _names(config.targets, published)[: config.limit]:
        try:
            norm = predicted_norm(loaded, resolve_target(name), seed=config.seed)
        except QuintetError as error:
            logger.warning("%s is left out: %s", name, error)
            continue
        rows.append(_row(name, norm, published, column, config.tolerance))
        logger.info("%s: norm %.4f", name, norm)
    if not rows:
        raise DataError("no network could be predicted; the warnings above say why.")
    return rows


def predicted_norm(loaded: Loaded, architecture: Architecture, *, seed: int = 0) -> float:
    """Norm of ``architecture`` with predicted parameters; those that are not predicted come from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = architecture.build()
    fill(loaded.model, network, graph=graph_for(loaded.config, architecture))
    return total_norm(network)


def norms_table(rows: Sequence[NormRow]) -> Table:
    """Networks with both norms and whether they agree."""
    return Table(
        name="norms",
        columns=["network", "norm", "published norm", "difference", "agrees", "published top-1 (%)"],
        rows=[
            [
                row.name, row.norm, row.published, None if row.published is None else row.norm - row.published,
                row.agrees, row.accuracy,
            ]
            for row in rows
        ],
        caption="Euclidean norms of all parameters",
        digits=6,
    )  # fmt: skip


def _names(targets: Sequence[str] | None, published: Mapping[str, object]) -> list[str]:
    if targets:
        return list(targets)
    known = set(torchvision_classifiers())
    return [name for name in published if name in known]


def _row(
    name: str, norm: float, published: Mapping[str, Mapping[str, float]], column: str, tolerance: float
) -> NormRow:
    numbers = published.get(name, {})
    return NormRow(name, norm, numbers.get(column + NORM_SUFFIX), numbers.get(column), tolerance)
