"""Options of ``python -m rpg.evaluate``."""

from dataclasses import dataclass, field
from typing import Any

from common.config import require_at_least
from common.errors import ConfigError
from rpg.baselines import NOISE_LEVELS
from rpg.generation_config import SamplingOverrides
from rpg.testing import TesterSection


@dataclass(frozen=True, kw_only=True)
class BaselineSection:
    """Options ``baselines.*``: networks made of the originals that the generated ones are compared with."""

    # over the deviation of each tensor; the paper's levels and larger ones, for generated networks less like originals
    noise: list[float] = field(default_factory=lambda: [*NOISE_LEVELS, 0.1, 0.2])
    noise_repeats: int = 5  # networks per level
    mean: bool = True  # the mean of all originals, and of all generated networks
    interpolations: int = 5  # networks half-way between two originals; 0: none
    regression: bool = True  # class vectors -> weights, linear and with pairwise products; task networks only
    penalty: float = 1.0  # of the regression; larger: nearer to the mean

    def __post_init__(self) -> None:
        for level in self.noise:
            if not level >= 0:
                raise ConfigError(f"baselines.noise={level} must be at least 0.")
        require_at_least("baselines.noise_repeats", self.noise_repeats, 1)
        require_at_least("baselines.interpolations", self.interpolations, 0)
        require_at_least("baselines.penalty", self.penalty, 0)


@dataclass(frozen=True, kw_only=True)
class EfficiencySection:
    """Options ``efficiency.*``: what generating costs."""

    networks: int = 0  # draw so many, one at a time, and measure seconds and peak memory; 0: do not measure
    warm_up: int = 1  # draws before the clock starts

    def __post_init__(self) -> None:
        require_at_least("efficiency.networks", self.networks, 0)
        require_at_least("efficiency.warm_up", self.warm_up, 0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of ``python -m rpg.evaluate``."""

    originals: str | None = None  # folder of checkpoints that the generator was trained on
    pattern: str | None = None  # of the originals' file names, e.g. "*seed0001*"; null: all
    held_out: str | None = None  # folder of trained networks that the generator has not seen, to compare with
    generated: str | None = None  # folder of generated networks
    generator: str | None = None  # or a run or exported folder to draw them from
    num_generated: int | None = None  # networks to draw, per condition; null: 10, or 1 per condition
    tasks: Any = None  # of a conditional generator: unseen, seen, or a list of numbers
    num_tasks: int | None = None  # so many of the seen (null: 20) or unseen (null: all held out)
    features: str | None = None  # of a generator with other conditions: JSON {label: [numbers]}
    states: Any = "auto"  # permutation states: auto, random, balanced, none, or a list
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    rows_per_pass: int = 512  # tokens per forward pass of the denoiser; does not change a result

    tester: TesterSection = field(default_factory=TesterSection)
    baselines: BaselineSection = field(default_factory=BaselineSection)
    efficiency: EfficiencySection = field(default_factory=EfficiencySection)
    ensembles: bool = True  # accuracy of averaged logits
    per_class: bool = True  # accuracy by class of the test samples
    memory_gb: float = 2.0  # for the values of all networks; more networks or larger ones are compared on a sample
    max_originals: int | None = None  # so many of the originals, evenly spaced; null: all

    work_dir: str = "evaluation"  # tables, figures, results.json
    overwrite: bool = False  # replace the results that are there
    cache: bool = True  # remember predictions between evaluations
    cache_dir: str | None = None  # where; null: work_dir/predictions
    figures: bool = True
    seed: int = 0  # of generated networks, noise and interpolation
    device: str | None = None  # of the generator; null: the GPU if there is one; testers have an option of their own
    progress: bool = True

    def __post_init__(self) -> None:
        if not (self.originals or self.generated or self.generator):
            raise ConfigError(
                "there is nothing to evaluate: give originals=DIR, generated=DIR, generator=RUN, or some of them."
            )
        if self.generated and self.generator:
            raise ConfigError(
                f"generated={self.generated} and generator={self.generator} both name the generated networks; give "
                "one of them."
            )
        if self.efficiency.networks and not self.generator:
            raise ConfigError("efficiency.networks measures a generator; add generator=RUN.")
        for name in ("tasks", "features"):
            if getattr(self, name) is not None and not self.generator:
                raise ConfigError(f"{name} says what to draw; add generator=RUN, or leave {name} out.")
        for name in ("num_generated", "rows_per_pass", "max_originals", "num_tasks"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_at_least("memory_gb", self.memory_gb, 0.001)
        if not self.work_dir:
            raise ConfigError("work_dir is empty; give a folder for the results.")
