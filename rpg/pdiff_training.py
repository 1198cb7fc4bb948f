"""A run of a p-diff baseline: the autoencoder, where there is one, then the diffusion, in the engine of all models.

The last stage trains in the run folder itself, an autoencoder before it in ``run_dir/vae``; each stage resumes on its
own, so the same command continues wherever it was stopped.

Dimensions: K checkpoints, N values of one network, Z latent values.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import cli
from common.checkpoint import load_weights
from common.data.loader import BatchedDataset, build_train_loader
from common.precision import resolve_precision
from common.seeding import derive_seed
from common.task import Task
from common.trainer import REQUEUE_FILE, FitResult, TrainState, fit
from rpg.data import GeneratorData, build_data
from rpg.generated_files import GeneratedFolder, read_records
from rpg.pdiff import PdiffModel
from rpg.pdiff_config import VAE_FOLDER, PdiffTrainConfig, StageConfig
from rpg.pdiff_generation import draw_vectors, generation_facts, write_networks
from rpg.pdiff_saving import EXPORT_FOLDER, load_pdiff, save_pdiff
from rpg.pdiff_task import Latents, NetworkVectors, VAETask, VectorDiffusionTask
from rpg.requests import build_requests
from rpg.snapshots import Snapshots
from rpg.vae import ParameterVAE

GENERATED_FOLDER = "generated"
ENCODED_TOGETHER = 16  # networks


@dataclass(frozen=True)
class PdiffResult:
    """How a run ended; ``export`` is None if a signal stopped it."""

    fit: FitResult
    export: Path | None = None
    records: Sequence[dict[str, Any]] = ()


def run_training(config: PdiffTrainConfig) -> PdiffResult:
    """Trains all stages to the end, or to a signal, exports the model and draws ``sampling.num_generated`` networks.

    Raises: DataError and ConfigError, before anything is trained.
    """
    config.trainer_config(config.training, Path(config.run_dir), cli.world_size())  # its checks come first
    data = build_data(config.data)
    data.require_tokens()
    model = PdiffModel(num_values(data), config.model)
    run_dir = Path(config.run_dir)
    if config.model.has_vae:
        folder = run_dir / VAE_FOLDER if config.model.has_diffusion else run_dir
        stage = config.vae_training if config.model.has_diffusion else config.training
        done = fit_vae(config, stage, folder, data, model)
        if done.stopped_early:
            if folder != run_dir and cli.is_main_process():
                shutil.copy(folder / REQUEUE_FILE, run_dir / REQUEUE_FILE)
            return PdiffResult(done)
        model.vae.load_state_dict(load_weights(folder)[0])
    if config.model.has_diffusion:
        done = fit_diffusion(config, run_dir, data, model)
        if done.stopped_early:
            return PdiffResult(done)
        model.diffusion.load_state_dict(load_weights(run_dir)[0])
    if not cli.is_main_process():
        return PdiffResult(done)
    folder = export(config, model, data, done)
    return PdiffResult(done, folder, generate_after(config, folder))


def num_values(data: GeneratorData) -> int:
    """N: values of a network, its padding to whole tokens included."""
    return data.codec.num_tokens * data.codec.dim


def fit_vae(
    config: PdiffTrainConfig, stage: StageConfig, folder: Path, data: GeneratorData, model: PdiffModel
) -> FitResult:
    """Trains the autoencoder in ``folder``."""
    task = VAETask(num_values(data), config.model, seed=config.seed)
    hooks = [] if config.model.has_diffusion else _snapshots(config, stage, data, model)
    dataset = NetworkVectors(data.tokens, model.vae.padded_length)
    return _fit(config, stage, folder, task, dataset, hooks)


def fit_diffusion(config: PdiffTrainConfig, folder: Path, data: GeneratorData, model: PdiffModel) -> FitResult:
    """Trains the denoiser in ``folder``, on networks or, by the trained autoencoder of ``model``, on their latents."""
    dataset: BatchedDataset = NetworkVectors(data.tokens)
    if config.model.has_vae:
        latent_KZ = encode_all(model.vae, NetworkVectors(data.tokens, model.vae.padded_length))
        if config.model.standardise:
            model.latent.fit(latent_KZ)
        dataset = Latents(model.latent.encode(latent_KZ))
    task = VectorDiffusionTask(model.size, config.model, seed=config.seed)
    hooks = _snapshots(config, config.training, data, model)
    return _fit(config, config.training, folder, task, dataset, hooks)


@torch.no_grad()
def encode_all(vae: ParameterVAE, networks: NetworkVectors) -> Tensor:
    """Means of the latents (K, Z) of all networks, by the running statistics; the same in every process."""
    vae.eval()
    rows = torch.arange(len(networks)).split(ENCODED_TOGETHER)
    return torch.cat([vae.encode(networks.fetch(part.numpy())["x"])[0] for part in rows])


def _fit(
    config: PdiffTrainConfig,
    stage: StageConfig,
    folder: Path,
    task: Task,
    dataset: BatchedDataset,
    hooks: Sequence["PdiffSnapshots"],
) -> FitResult:
    trainer = config.trainer_config(stage, folder, cli.world_size())
    done = fit(
        task,
        trainer,
        train_loader=build_train_loader(
            dataset,
            global_size=trainer.batch.global_size,
            micro_size=trainer.batch.micro_size,
            seed=config.seed,
            rank=cli.rank(),
            world_size=cli.world_size(),
            num_workers=config.data.num_workers,
        ),
        hooks=hooks,
        run_config=_options_that_matter(config, is_last=folder == Path(config.run_dir)),
    )
    for hook in hooks:
        hook.finish(done.step)
    return done


def _options_that_matter(config: PdiffTrainConfig, *, is_last: bool) -> dict[str, Any]:
    """The options that a stage's result depends on: a change of others is no reason against resuming it."""
    options = asdict(config)
    # networks are drawn after training; those that are drawn during it have no influence either
    del options["sampling"]
    for name in ("training", "vae_training"):
        del options[name]["sample_freq"]
    if not is_last:
        del options["training"]
    return options


class PdiffSnapshots(Snapshots):
    """Hook that writes and tests a network every ``sample_freq`` steps of the last stage, and at the end."""

    def __init__(self, config: PdiffTrainConfig, every_steps: int, data: GeneratorData, whole: PdiffModel) -> None:
        super().__init__(config, data, None)
        self.every_steps, self.whole = every_steps, whole

    def draw(self, model: torch.nn.Module, state: TrainState) -> tuple[Tensor, str]:
        """Tokens of one network, drawn in full by every process."""
        whole, codec = self.whole, self.data.codec
        name = "diffusion" if whole.config.has_diffusion else "vae"
        kept = getattr(whole, name)
        setattr(whole, name, model)
        try:
            seed = derive_seed(self.config.seed, "snapshot", state.step)
            vector_1N = draw_vectors(whole.to(state.device).eval(), [seed], self.config.sampling)
        finally:
            setattr(whole, name, kept)
        return vector_1N.view(codec.num_tokens, codec.dim), ""


def _snapshots(
    config: PdiffTrainConfig, stage: StageConfig, data: GeneratorData, model: PdiffModel
) -> list[PdiffSnapshots]:
    return [PdiffSnapshots(config, stage.sample_freq, data, model)] if stage.sample_freq else []


def export(config: PdiffTrainConfig, model: PdiffModel, data: GeneratorData, done: FitResult) -> Path:
    """Writes the trained model, its averaged weights where there are some, to ``run_dir/export``."""
    facts = {
        "num_checkpoints": len(data.names),
        "tester": asdict(config.data.tester),
        "adapter_config": data.adapter_config,
    }
    return save_pdiff(
        Path(config.run_dir) / EXPORT_FOLDER,
        model.to("cpu"),
        data.codec,
        tag=config.name,
        data=facts,
        metadata={"run": Path(config.run_dir).name, "seed": config.seed, "step": done.step},
        overwrite=True,
    )


def generate_after(config: PdiffTrainConfig, folder: Path) -> list[dict[str, Any]]:
    """The networks that a finished run draws, with their tests; nothing is drawn twice, and nothing replaced."""
    sampling, seed = config.sampling, config.seed
    if not sampling.num_generated:
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_pdiff(folder, device)
    generated = GeneratedFolder(
        Path(config.run_dir) / GENERATED_FOLDER,
        loaded.tag,
        "pth" if loaded.adapter_config is None else "peft",
        adapter_config=loaded.adapter_config,
    )
    facts = generation_facts(loaded, sampling, seed)
    there = [record for record in read_records(generated.folder) if record.get("facts_sha256") == facts["facts_sha256"]]
    if len(there) >= sampling.num_generated:
        return there[: sampling.num_generated]
    requests = build_requests(None, sampling.num_generated, seed=seed, first=generated.next_indices([""]))
    return write_networks(
        loaded,
        generated,
        requests,
        sampling,
        seed=seed,
        batch_size=sampling.batch_size,
        precision=resolve_precision(config.precision, device),
        tester=config.data.tester,
    )
