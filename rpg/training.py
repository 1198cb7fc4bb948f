"""One training run, from options to the engine: the data, the network that fits them, the task, the exported result."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common import cli
from common.checkpoint import CONFIG_FILE, load_weights, write_json
from common.data.loader import build_train_loader
from common.folders import write_folder
from common.hooks import Hook
from common.trainer import FitResult, fit
from rpg.codec import TokenCodec
from rpg.config import TrainConfig
from rpg.data import DataSection, GeneratorData, build_data
from rpg.loading import DESCRIPTION_FOLDER, build_empty, load_generator, load_state
from rpg.model import Generator, build_generator
from rpg.model_config import GeneratorConfig
from rpg.saving import CODEC_FOLDER, describe, facts_of, save_generator
from rpg.snapshots import Snapshots
from rpg.sources import Sources, find_sources
from rpg.task import GeneratorTask
from rpg.zoo.testers import collection_tester

EXPORT_FOLDER = "export"


class NetworkNumbers(torch.utils.data.Dataset):
    """``{"network": (B,) int64}``; the task reads the tokens that it has drawn."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def fetch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {"network": torch.as_tensor(rows, dtype=torch.int64)}


@dataclass(frozen=True)
class Prepared:
    """What a run trains and on what."""

    data: GeneratorData
    config: GeneratorConfig
    sources: Sources
    task: GeneratorTask


def prepare(config: TrainConfig) -> Prepared:
    """Reads or builds the tokens and makes the task.

    Raises: DataError and ConfigError, before anything is trained.
    """
    data = build_data(with_tester(config.data))
    data.require_tokens()
    network = network_for(config, data)
    used = network.condition != "none"
    sources = find_sources(data.group_K, data.condition_KC if used else None, use_states=network.num_states > 0)
    return Prepared(data, network, sources, build_task(config, network, data.codec, sources, data))


def with_tester(section: DataSection) -> DataSection:
    """The data with the tester of their collection, if they are one and no other tester is named."""
    if section.tester.kind != "none" or section.folder is None:
        return section
    tester = collection_tester(section.folder)
    return section if tester is None else replace(section, tester=tester)


def network_for(config: TrainConfig, data: GeneratorData) -> GeneratorConfig:
    """The generator's options with what the data decide."""
    return config.generator_config(
        num_tokens=data.codec.num_tokens,
        num_states=len(data.groups) if config.effective_states == "groups" else 0,
        condition_size=0 if data.condition_KC is None else data.condition_KC.shape[1],
    )


def build_task(
    config: TrainConfig,
    network: GeneratorConfig,
    codec: TokenCodec,
    sources: Sources,
    data: GeneratorData | None = None,
) -> GeneratorTask:
    """What is trained; without data for estimates only."""

    def build() -> Generator:
        model = build_generator(network, codec, [entry.name for entry in codec.structure.varying])
        if config.init_from is not None:
            load_state(model, load_generator(config.init_from).model.state_dict(), f"init_from={config.init_from}")
        return model

    training = config.training
    return GeneratorTask(
        network,
        build=build,
        tokens=None if data is None else data.tokens,
        sources=sources,
        valid_L=codec.valid_L,
        seed=config.seed,
        tokens_per_network=training.tokens_per_network(network.num_tokens),
        shared=training.stacking == "shared",
        drop_condition=training.drop_condition,
        rows_per_pass=training.rows_per_pass,
    )


def run_training(config: TrainConfig, *, hooks: Callable[[Prepared], Sequence[Hook]] | None = None) -> FitResult:
    """Trains to the end, or to a signal, and exports the generator to ``run_dir/export``.

    Args:
        hooks: what runs beside training; None: generation and tests at intervals, as configured.
    """
    trainer = config.trainer_config(cli.world_size())  # its checks come before any data is read
    prepared = prepare(config)
    if cli.is_main_process():
        write_description(config, prepared)
    made = default_hooks(config, prepared) if hooks is None else hooks(prepared)
    done = fit(
        prepared.task,
        trainer,
        train_loader=build_train_loader(
            NetworkNumbers(len(prepared.data.names)),
            global_size=trainer.batch.global_size,
            micro_size=trainer.batch.micro_size,
            seed=config.seed,
            rank=cli.rank(),
            world_size=cli.world_size(),
            num_workers=config.data.num_workers,
        ),
        hooks=made,
        run_config=asdict(config),
    )
    for hook in made:
        if isinstance(hook, Snapshots):
            hook.finish(done.step)
    if not done.stopped_early and cli.is_main_process():
        export(config, prepared, done)
    return done


def write_description(config: TrainConfig, prepared: Prepared) -> None:
    """What a checkpoint of this run lacks to be a generator, so that networks can be drawn before the run has ended."""
    facts = facts_of(prepared.data, prepared.config, condition_dropout=config.training.drop_condition)
    described = describe(prepared.config, facts, run_metadata(config))

    def write(folder: Path) -> None:
        write_json(folder / CONFIG_FILE, described)
        prepared.data.codec.to_folder(folder / CODEC_FOLDER)

    write_folder(Path(config.run_dir) / DESCRIPTION_FOLDER, write)


def run_metadata(config: TrainConfig) -> dict[str, object]:
    """What a generator says of the run it comes from."""
    return {"run": Path(config.run_dir).name, "seed": config.seed, "sampling": asdict(config.sampling)}


def default_hooks(config: TrainConfig, prepared: Prepared) -> list[Hook]:
    """Generation and tests at intervals, exported generators at intervals."""
    found: list[Hook] = []
    if config.training.sample_freq:
        found.append(Snapshots(config, prepared.data, prepared.sources))
    if config.training.snapshot_freq:
        found.append(Exports(config, prepared))
    return found


class Exports:
    """Hook that keeps the averaged generator of every ``training.snapshot_freq`` steps in ``snapshots/step_N``."""

    def __init__(self, config: TrainConfig, prepared: Prepared) -> None:
        self.config, self.prepared, self.every_steps = config, prepared, config.training.snapshot_freq

    def __call__(self, state) -> None:
        with state.eval_model() as model:
            if state.is_main:
                folder = state.run_dir / "snapshots" / f"step_{state.step}"
                write_export(folder, self.config, self.prepared, model, state.step)


def export(config: TrainConfig, prepared: Prepared, done: FitResult) -> Path:
    """Writes the trained generator (the moving average, if there is one)."""
    weights, _ = load_weights(done.run_dir)
    skeleton = build_empty(prepared.config)
    return write_export(done.run_dir / EXPORT_FOLDER, config, prepared, skeleton, done.step, weights)


def write_export(
    folder: Path,
    config: TrainConfig,
    prepared: Prepared,
    model: nn.Module,
    step: int,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """A folder that ``load_generator`` reads."""
    facts = facts_of(prepared.data, prepared.config, condition_dropout=config.training.drop_condition)
    metadata = run_metadata(config) | {"step": step}
    return save_generator(folder, model, prepared.data.codec, facts, metadata, state=weights, overwrite=True)
