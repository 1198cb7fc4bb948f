"""The trained networks of the reproduction: real data path, real engine, float32 on the CPU."""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from common.config import OptimConfig, TrackingConfig
from common.data.corpora import build_text_dataset
from common.data.loader import build_train_loader
from common.data.tokenizer import ByteTokenizer
from common.diffusion.schedules import build_schedule
from common.hooks import TrainState
from common.reproduction.curves import HELD_OUT, training_curve
from common.reproduction.jobs import Interrupted
from common.seeding import generator
from common.trainer import fit
from radd.config import DataConfig, NoiseConfig, TrainConfig, TrainingConfig
from radd.losses import compute_loss, draw_loss_inputs
from radd.model import ModelConfig
from radd.reproduction.settings import Settings
from radd.task import RADDTask


def dataset(settings: Settings, split: str, cache_dir: str):
    """Packed blocks of the embedded text."""
    return build_text_dataset(
        f"embedded:{settings.source}",
        split,
        length=settings.length,
        tokenizer="byte",
        cache_dir=cache_dir,
        progress=False,
    )


def blocks(settings: Settings, split: str, cache_dir: str, limit: int | None = None) -> Tensor:
    """The first ``limit`` blocks of a split as one int64 tensor."""
    data = dataset(settings, split, cache_dir)
    count = len(data) if limit is None else min(limit, len(data))
    return data.fetch(range(count))["tokens"]


def prepare_data(settings: dict, cache_dir: str) -> dict:
    """Builds the token caches, so that parallel jobs only read them; returns the number of blocks."""
    settings = Settings(**settings)
    return {split: len(dataset(settings, split, cache_dir)) for split in ("train", "test")}


def model_config(settings: Settings) -> ModelConfig:
    """The specification's small network."""
    return ModelConfig(
        name="reproduction",
        hidden_size=settings.hidden_size,
        length=settings.length,
        n_blocks=settings.n_blocks,
        n_heads=settings.n_heads,
        dropout=0.0,
    )


def train_config(settings: Settings, *, loss_type: str, noise: str, seed: int, run_dir: str, cache_dir: str):
    """The run as ``radd.train`` would receive it."""
    return TrainConfig(
        name=f"reproduction-{loss_type}",
        run_dir=run_dir,
        seed=seed,
        tokens=ByteTokenizer.vocab_size,
        precision="fp32",
        training=TrainingConfig(
            batch_size=settings.batch_size,
            n_iters=settings.steps,
            snapshot_freq=0,
            snapshot_sampling=False,
            log_freq=1,
            eval_freq=0,
            snapshot_freq_for_preemption=max(1, settings.steps // 4),
            ema=None,
            loss_type=loss_type,
        ),
        data=DataConfig(
            train=f"embedded:{settings.source}",
            valid=f"embedded:{settings.source}",
            tokenizer="byte",
            cache_dir=cache_dir,
            num_workers=0,
        ),
        noise=NoiseConfig(type=noise),
        optim=OptimConfig(
            lr=settings.lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            warmup=settings.warmup,
            grad_clip=settings.grad_clip,
            schedule="cosine",
            min_ratio=settings.min_ratio,
        ),
        model=model_config(settings),
        tracking=TrackingConfig(progress=False),
    )


class HeldOutBound:
    """A hook that logs the bound of the test blocks: the same estimator and the same masks whatever loss is trained.

    The validation loss of the engine is each run's own loss; its estimates differ by more than the networks do.
    """

    at_end = True
    passes = 2  # over all sequences, every pass with its own masks

    def __init__(self, settings: Settings, cache_dir: str, seed: int) -> None:
        self.every_steps = max(1, settings.steps // 10)
        self.x_BL = blocks(settings, "test", cache_dir, settings.test_sequences)
        self.seed = seed

    def __call__(self, state: TrainState) -> dict[str, float]:
        with state.eval_model() as model:
            means = [held_out_loss(model, self.x_BL, self.seed, number) for number in range(self.passes)]
        return {HELD_OUT: sum(means) / len(means)}


def held_out_loss(model: nn.Module, x_BL: Tensor, seed: int, number: int) -> float:
    """k_DCE in nats per token with counts stratified over the sequences."""
    draws = draw_loss_inputs(
        "k_DCE",
        *x_BL.shape,
        generator_for=lambda purpose: generator(seed, f"reproduction held out {purpose}", number),
        sampler="stratified",
    )
    device = next(model.parameters()).device
    draws = {name: value.to(device) for name, value in draws.items()}
    loss_B = compute_loss("k_DCE", model, x_BL.to(device), draws, build_schedule("loglinear"), mask_id=model.mask_id)
    return float(loss_B.mean()) / x_BL.shape[1]


def train(settings: dict, loss_type: str, noise: str, seed: int, run_dir: str, cache_dir: str) -> dict:
    """Trains one loss (or continues it) and returns its curve.

    Raises: Interrupted if a signal stopped it; the run folder then holds a checkpoint to continue from.
    """
    settings = Settings(**settings)
    config = train_config(settings, loss_type=loss_type, noise=noise, seed=seed, run_dir=run_dir, cache_dir=cache_dir)
    trainer = config.trainer_config(1)
    train_loader = build_train_loader(
        dataset(settings, "train", cache_dir),
        global_size=trainer.batch.global_size,
        micro_size=trainer.batch.micro_size,
        seed=seed,
        rank=0,
        world_size=1,
    )
    done = fit(
        RADDTask(config),
        trainer,
        train_loader=train_loader,
        hooks=[HeldOutBound(settings, cache_dir, seed)],
        run_config=asdict(config),
    )
    if done.stopped_early:
        raise Interrupted(f"training of {loss_type} was stopped at step {done.step}; run the same command to continue")
    return training_curve(Path(run_dir) / "metrics.jsonl")
