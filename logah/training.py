"""One training run of a hypernetwork, from options to the engine: data, networks, task, exported result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common import cli
from common.checkpoint import load_weights
from common.hooks import Hook
from common.trainer import FitResult, fit
from logah.architecture_sets import ArchitectureSource
from logah.checkpoints import load_hypernetwork, load_state, save_hypernetwork
from logah.config import TrainConfig
from logah.data import TrainingData, build_data
from logah.meta_learner import MetaLearner
from logah.model_config import HyperNetworkConfig
from logah.slots import Slots, build_slot_loader
from logah.task import HyperNetworkTask
from logah.validation import Validation, validation_source

EXPORT_FOLDER = "export"
LM_CLASSES = 10  # no class layer depends on it; what the released language models were built with


@dataclass(frozen=True)
class Prepared:
    """What a run trains and on what."""

    data: TrainingData
    config: HyperNetworkConfig
    task: HyperNetworkTask


def prepare(config: TrainConfig) -> Prepared:
    """Reads the data and makes the task.

    Raises: DataError and ConfigError, before anything is trained.
    """
    data = build_data(config.data, seed=config.seed)
    model = config.model_config(num_classes=data.num_classes if data.kind == "vision" else LM_CLASSES)
    source = ArchitectureSource(config.nets, seed=config.seed, data_options=data_options(data))
    return Prepared(data, model, build_task(config, model, source))


def data_options(data: TrainingData) -> dict[str, Any]:
    """What the data decide about the networks."""
    if data.kind == "vision":
        return {"num_classes": data.num_classes, "image_size": data.image_size}
    return {"vocab_size": data.vocab_size, "n_positions": data.block_size}


def build_task(config: TrainConfig, model: HyperNetworkConfig, source: ArchitectureSource | None) -> HyperNetworkTask:
    """What is trained; without networks for estimates only."""

    def build() -> MetaLearner:
        learner = MetaLearner(model)
        if config.init_from is not None:
            loaded = load_hypernetwork(config.init_from)
            load_state(learner, loaded.model.state_dict(), f"init_from={config.init_from}")
        return learner

    training = config.training
    return HyperNetworkTask(
        model,
        build=build,
        source=source,
        seed=config.seed,
        norm_penalty=training.norm_penalty,
        label_smoothing=training.label_smoothing,
        scheme=training.scheme,
    )


def run_training(config: TrainConfig, *, hooks: Sequence[Hook] = ()) -> FitResult:
    """Trains to the end, or to a signal, and exports the hypernetwork to ``run_dir/export``.

    Args:
        hooks: what runs beside training, besides tests and exports at intervals.
    """
    prepared = prepare(config)
    data, per_epoch = prepared.data, prepared.data.steps_per_epoch
    trainer = config.trainer_config(cli.world_size(), per_epoch)
    slots = Slots(data, config.nets.meta_batch, trainer.total_steps)
    done = fit(
        prepared.task,
        trainer,
        train_loader=build_slot_loader(
            slots, micro_size=trainer.batch.micro_size, seed=config.seed, rank=cli.rank(), world_size=cli.world_size()
        ),
        hooks=[*default_hooks(config, prepared), *hooks],
        run_config=asdict(config) | {"model": asdict(prepared.config)},
    )
    if not done.stopped_early and cli.is_main_process():
        export(config, prepared, done)
    return done


def default_hooks(config: TrainConfig, prepared: Prepared) -> list[Hook]:
    """Tests of networks that are not trained on, and exports, between epochs."""
    found: list[Hook] = []
    per_epoch = prepared.data.steps_per_epoch
    if config.training.valid_epoch:
        source = validation_source(config, data_options(prepared.data))
        found.append(Validation(config, source, prepared.data, per_epoch))
    if config.training.interm_epoch:
        found.append(Exports(config, prepared, first=True))
        found.append(Exports(config, prepared, first=False))
    return found


class Exports:
    """Hook that keeps the hypernetwork after the first epoch, or after every ``interm_epoch`` epochs, in
    ``epochs/epoch_N``."""

    def __init__(self, config: TrainConfig, prepared: Prepared, *, first: bool) -> None:
        self.config, self.prepared, self.first = config, prepared, first
        self.per_epoch = prepared.data.steps_per_epoch
        self.every_steps = self.per_epoch * (1 if first else config.training.interm_epoch)

    def __call__(self, state) -> None:
        epoch = state.step // self.per_epoch
        if self.first and (epoch != 1 or self.config.training.interm_epoch == 1):
            return
        with state.eval_model() as model:
            if state.is_main:
                folder = state.run_dir / "epochs" / f"epoch_{epoch}"
                write_export(folder, self.config, self.prepared, model, state.step)


def export(config: TrainConfig, prepared: Prepared, done: FitResult) -> Path:
    """Writes the trained hypernetwork (the moving average, if there is one)."""
    weights, _ = load_weights(done.run_dir)
    return write_export(
        done.run_dir / EXPORT_FOLDER, config, prepared, MetaLearner(prepared.config), done.step, weights
    )


def write_export(
    folder: Path,
    config: TrainConfig,
    prepared: Prepared,
    model: nn.Module,
    step: int,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """A folder that ``load_hypernetwork`` reads."""
    metadata = {
        "run": Path(config.run_dir).name,
        "seed": config.seed,
        "step": step,
        "epoch": step / prepared.data.steps_per_epoch,
        "data": asdict(config.data),
        "nets": asdict(config.nets),
    }
    return save_hypernetwork(folder, model, metadata, state=weights, overwrite=True)
