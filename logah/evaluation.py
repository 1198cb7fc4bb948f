"""What ``python -m logah.evaluate`` does: predicts networks, scores them on held-out data, measures their parameters.

``work_dir`` then holds ``results.json``, ``section.html``, a CSV per table (``tensors.csv`` has a row per tensor), the
figures and, while it lasts, a line per finished network: a suite that was stopped continues with the rest.
"""

import fnmatch
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError, DataError, QuintetError
from common.evaluation.partial_results import PartialResults
from common.parallel import Parallel, start
from common.report.section_folder import RESULTS, holds_section
from logah.architectures import Architecture, resolve_target
from logah.checkpoints import Loaded
from logah.data import TrainingData, build_data
from logah.evaluation_config import EvaluateConfig
from logah.matching import match_data, require_kind
from logah.parameter_statistics import measure_parameters
from logah.prediction_folder import load_prediction, read_architecture
from logah.scoring import metric_values, score
from logah.starts import EXPORT_FOLDER, Start, Starter, file_facts, weights_folder
from logah.targets import torchvision_classifiers

SIZES = ("num_layers", "n_layer", "num_hidden_layers", "hidden_dim", "n_embd", "hidden_size")
"""Options that a short name shows: depth, then width."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One network to score: predicted or random weights of a target, or those of a folder."""

    name: str
    source: str  # hypernetwork, random, or folder
    target: Any
    seed: int


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Evaluates as configured and, on the main process, writes and prints. Returns a record per network.

    Raises: ConfigError, DataError or CheckpointError for anything the user can repair; a network of several that
        cannot be predicted is reported and left out.
    """
    from logah.evaluation_report import write_report

    folder = Path(config.work_dir)
    if (folder / RESULTS).exists() and not (config.overwrite and holds_section(folder)):
        hint = "use overwrite=true, or " if holds_section(folder) else ""
        raise ConfigError(f"work_dir={folder} holds {RESULTS} already; {hint}choose another folder.")
    items = items_of(config)
    with start("ddp") as parallel:
        evaluator = Evaluator(config, parallel)
        kept = PartialResults(folder, "networks", evaluator.settings(items), parallel)
        for number in kept.pending(len(items)):
            kept.append(number, evaluator.run(items[number], alone=len(items) == 1))
        records = list(kept.collect().values())
        if all("error" in record for record in records):
            raise ConfigError(f"none of the {len(records)} networks could be evaluated; {records[0]['error']}")
        if parallel.is_main:
            write_report(config, records)
    return records


def items_of(config: EvaluateConfig) -> list[Item]:
    """Everything to score, in the order of the options.

    Raises: ConfigError if a pattern fits no network of the suite.
    """
    targets = [(_name(target), target) for target in config.targets]
    if config.suite == "torchvision":
        names = [name for name in torchvision_classifiers() if fnmatch.fnmatch(name, config.pattern or "*")]
        if not names:
            raise ConfigError(f"pattern={config.pattern!r} fits no classifier of torchvision, e.g. pattern='resnet*'.")
        targets += [(name, f"torchvision:{name}") for name in names[: config.limit]]
    sources = (["hypernetwork"] if config.checkpoint else []) + (["random"] if config.random else [])
    found = [
        Item(name, source, target, seed) for name, target in targets for source in sources for seed in config.seeds
    ]
    return found + [Item(_folder_name(folder), "folder", folder, config.seeds[0]) for folder in config.predictions]


def _folder_name(folder: str) -> str:
    path = Path(folder)
    return path.parent.name if path.name == EXPORT_FOLDER else path.name


def _name(target: Any) -> str:
    """What the user wrote; of a description its kind and sizes."""
    if not isinstance(target, Mapping):
        return str(target)
    architecture = resolve_target(target)
    options = architecture.options
    sizes = [options.get(name) for name in SIZES if options.get(name) is not None]
    return f"{architecture.family} {' x '.join(map(str, sizes))}" if sizes else str(architecture)


class Evaluator:
    """Makes the networks one after the other and scores them on the same data."""

    def __init__(self, config: EvaluateConfig, parallel: Parallel) -> None:
        self.config = config
        self.device = torch.device(config.device) if config.device else parallel.device
        self.data: TrainingData | None = build_data(config.data) if config.score else None
        self._hypernetworks: dict[str, Loaded] = {}

    def settings(self, items: list[Item]) -> dict[str, Any]:
        """All that decides the records: an evaluation with others starts anew."""
        config = self.config
        ignored = ("work_dir", "overwrite", "figures", "device")
        options = {name: value for name, value in asdict(config).items() if name not in ignored}
        files = [file_facts(path) for path in (config.checkpoint, *config.predictions)]
        return options | {"items": [asdict(item) for item in items], "files": files}

    def run(self, item: Item, *, alone: bool) -> dict[str, Any]:
        """The record of one network.

        Args:
            alone: whether it is the only one, whose error is the evaluation's.
        """
        began = time.perf_counter()
        record: dict[str, Any] = {"name": item.name, "weights": item.source, "seed": item.seed}
        try:
            network, architecture, facts = self._make(item)
            record |= facts | {"architecture": architecture.to_json()} | measure_parameters(network)
            if self.data is not None:
                record |= self._score(network, architecture, item)
        except (QuintetError, RuntimeError, NotImplementedError) as error:
            # a suite goes on without networks that cannot be built, traced or run on these data
            if alone:
                raise
            record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            logger.warning("%s: %s", item.name, record["error"])
        record["seconds"] = round(time.perf_counter() - began, 3)
        return record

    def _make(self, item: Item) -> tuple[nn.Module, Architecture, dict[str, Any]]:
        if item.source == "folder":
            folder = weights_folder(item.target)
            architecture = read_architecture(folder)
            if self.data is not None:
                require_kind(architecture, self.data)
            return load_prediction(folder), architecture, {}
        architecture = resolve_target(item.target)
        if self.data is not None:
            architecture = match_data(architecture, self.data, enabled=self.config.match_data)
        starter = Starter(architecture, self.config.start, hypernetworks=self._hypernetworks)
        source = self.config.checkpoint if item.source == "hypernetwork" else None
        made = starter.make(Start(item.source, item.source, source), item.seed)
        return made.network, architecture, made.facts

    def _score(self, network: nn.Module, architecture: Architecture, item: Item) -> dict[str, Any]:
        batches = self.data.test_batches if self.config.split == "test" else self.data.validation_batches
        try:
            metrics = score(
                network.to(self.device),
                batches(),
                kind=architecture.kind,
                device=self.device,
                batchnorm="auto" if item.source == "folder" else self.config.batchnorm,
                image_size=architecture.image_size,
                max_batches=self.config.max_batches,
            )
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise DataError(
                f"{item.name}: {error}: a batch norm sees one value of a channel; use larger batches "
                "(data.eval_batch_size) or images, or batchnorm=running."
            ) from None
        return metric_values(metrics)
