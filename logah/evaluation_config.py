"""Options of ``python -m logah.evaluate``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from common.config import require_at_least, require_choice
from common.errors import ConfigError
from logah.data_config import DataSection
from logah.scoring import require_batchnorm
from logah.starts import StartOptions

SUITES = ("torchvision",)
SPLITS = ("validation", "test")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that ``logah.evaluate`` reads."""

    checkpoint: str | None = None  # hypernetwork: a run, an exported folder, or a file of a reference implementation
    targets: list[Any] = field(default_factory=list)  # networks to predict, see logah/targets.py
    suite: Literal["torchvision"] | None = None  # or all classifiers of torchvision
    pattern: str | None = None  # of the suite's names, e.g. "resnet*"
    limit: int | None = None  # the first so many of the suite
    predictions: list[str] = field(default_factory=list)  # folders of logah.predict or of trained networks to score
    random: bool = False  # score random weights of every target as well
    seeds: list[int] = field(default_factory=lambda: [0])  # of whatever is not predicted, and of random weights
    match_data: bool = True  # give networks the data's classes, or their vocabulary if theirs is smaller
    start: StartOptions = field(default_factory=StartOptions)
    score: bool = True  # false: only predict and measure the parameters
    data: DataSection = field(default_factory=DataSection)
    split: Literal["validation", "test"] = "test"
    batchnorm: Literal["batch", "running"] = "batch"  # where batch norms of predicted networks take statistics from
    max_batches: int | None = None  # score on the first so many batches; null: all
    work_dir: str = "evaluation"  # tables, figures, results.json, section.html; finished networks are kept there
    overwrite: bool = False  # replace the results that are there
    figures: bool = True
    device: str | None = None  # null: the GPU if there is one

    def __post_init__(self) -> None:
        if not (self.targets or self.suite or self.predictions):
            raise ConfigError(
                "there is nothing to evaluate: give targets=[...] or suite=torchvision with checkpoint=..., or "
                "predictions=[DIR]."
            )
        if (self.targets or self.suite) and not (self.checkpoint or self.random):
            raise ConfigError(
                "targets and suite are predicted by a hypernetwork: add checkpoint=PATH, or random=true for random "
                "weights."
            )
        if self.suite is not None:
            require_choice("suite", self.suite, SUITES)
        elif self.pattern is not None or self.limit is not None:
            raise ConfigError("pattern and limit choose from a suite; add suite=torchvision.")
        require_choice("split", self.split, SPLITS)
        require_batchnorm("batchnorm", self.batchnorm)
        for name in ("limit", "max_batches"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        if not self.seeds:
            raise ConfigError("seeds is empty; give at least one, for example seeds=[0].")
        if not self.work_dir:
            raise ConfigError("work_dir is empty; give a folder for the results.")
