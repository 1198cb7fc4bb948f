"""Options of ``python -m mup_dit.transfer``: those of a training run, the sweep around it, and the target."""

import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from common.cli import SWEPT_VARIABLE
from common.config import require_at_least
from common.errors import ConfigError
from mup_dit.arms import StopRule
from mup_dit.building import ModelConfig, build_skeleton, read_model_config
from mup_dit.config import TrainConfig
from mup_dit.search import SearchConfig, draw_trial
from mup_dit.sweep import RunSize


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    """How the runs of a sweep are made comparable, and when one is given up."""

    stop: StopRule = field(default_factory=StopRule)
    validation_draws: int = 1  # (time, noise) of every held-out image; more of them: less noise between rates
    keep_checkpoints: bool = False  # keep the weights of finished runs

    def __post_init__(self) -> None:
        require_at_least("sweep.validation_draws", self.validation_draws, 1)


@dataclass(frozen=True, kw_only=True)
class TargetSection:
    """The run that is tuned for; only its cost and width enter here."""

    heads: int = 16  # width, in heads of the model's head size
    batch_size: int = 256
    n_iters: int = 2_400_000  # optimizer steps

    def __post_init__(self) -> None:
        for name in ("heads", "batch_size", "n_iters"):
            require_at_least(f"target.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class TransferConfig(TrainConfig):
    """One run of a sweep."""

    heads: int | None = None  # width of this run, in heads; null: the model's
    trial: int | None = None  # number of this run in a random search; null: the options as they are
    sweep: SweepSection = field(default_factory=SweepSection)
    search: SearchConfig = field(default_factory=SearchConfig)
    target: TargetSection = field(default_factory=TargetSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.valid is None:
            raise ConfigError(
                "data.valid is null, but runs are judged by their held-out loss; name images to hold out."
            )
        for name in ("init_from", "save_base_shapes"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} has no meaning in a sweep, whose widths differ; leave it out.")

    @cached_property
    def network(self) -> ModelConfig:
        """Network and parametrisation at this run's width."""
        network = read_model_config(self.model)
        return network if self.heads is None else network.at_heads(self.heads)

    @cached_property
    def drawn(self) -> dict[str, float]:
        """What the random search sets in this run."""
        return {} if self.trial is None else draw_trial(self.search, self.seed, self.trial)

    def with_drawn(self) -> "TransferConfig":
        """This run with the options that the random search drew."""
        found, config = self.drawn, self
        if "loglr" in found:
            config = replace(config, mup=replace(config.mup, loglr=found["loglr"]))
        if "grad_clip" in found:
            config = replace(config, optim=replace(config.optim, grad_clip=found["grad_clip"]))
        if "warmup" in found:
            steps = round(found["warmup"] * config.training.n_iters)
            config = replace(config, optim=replace(config.optim, warmup=steps))
        if "repa_weight" in found:
            config = replace(config, objective=replace(config.objective, repa_weight=found["repa_weight"]))
        return config

    def target_size(self) -> RunSize:
        """Cost of the target run."""
        network = read_model_config(self.model).at_heads(self.target.heads)
        return RunSize(
            parameters=trainable_parameters(network), batch_size=self.target.batch_size, steps=self.target.n_iters
        )


class SweptOptions(Callback):
    """Remembers the options that all runs of a sweep share, for the report that follows the last run."""

    of_sweep: dict | None = None

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        shared = {name: value for name, value in config.items() if name != "hydra"}
        type(self).of_sweep = OmegaConf.to_container(OmegaConf.create(shared), resolve=True)


def arm_folder() -> str:
    """A run's folder inside the sweep's: its values of the options that vary, by default or on the command line."""
    hydra = HydraConfig.get()
    swept = {*os.environ.get(SWEPT_VARIABLE, "").split(","), *hydra.sweeper.params}
    values = [override for override in hydra.overrides.task if override.split("=")[0].lstrip("+") in swept]
    name = re.sub(r"[^\w.=,+-]+", "_", ",".join(sorted(values)))
    return name if 0 < len(name) <= 200 else str(hydra.job.num)


OmegaConf.register_new_resolver("arm_folder", arm_folder, replace=True)


def trainable_parameters(network: ModelConfig) -> int:
    """Counted on the meta device: no weight is allocated."""
    return sum(p.numel() for p in build_skeleton(network).parameters() if p.requires_grad)
