"""The trained networks of the reproduction: real data path, real engine, float32 on the CPU."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from common.checkpoint import load_weights
from common.config import BatchConfig, CheckpointConfig, OptimConfig, TrackingConfig, TrainerConfig
from common.data.cache import TokenRecipe, load_or_build_tokens
from common.data.dataset import TokenDataset
from common.data.loader import build_train_loader
from common.data.sources import EmbeddedText
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.hooks import TrainState
from common.reproduction.curves import HELD_OUT, training_curve
from common.reproduction.jobs import Interrupted
from common.trainer import fit
from diffullama.config import ObjectiveConfig
from diffullama.model import DiffusionLM
from diffullama.nelbo import causal_nats, nelbo
from diffullama.reproduction.settings import Arm, Settings
from diffullama.task import AdaptationTask

# ---------------------------------------------------------------- data


def tokenizer(settings: Settings, cache_dir: str) -> Tokenizer:
    """Byte pairs learnt from the training documents; the model's last id, the mask, is not among them."""
    documents = EmbeddedText("train", settings.source).documents()
    return load_tokenizer(f"bpe:{settings.vocab_size - 1}", documents=documents, cache_dir=cache_dir)


def dataset(settings: Settings, split: str, cache_dir: str) -> TokenDataset:
    """Packed blocks of the embedded text."""
    made = tokenizer(settings, cache_dir)
    stream = load_or_build_tokens(
        TokenRecipe(source=EmbeddedText(split, settings.source), tokenizer=made), cache_dir, progress=False
    )
    return TokenDataset(stream, settings.length, vocab_size=made.vocab_size, name=settings.source, split=split)


def blocks(settings: Settings, split: str, cache_dir: str, limit: int | None = None) -> Tensor:
    """The first ``limit`` blocks of a split as one int64 tensor."""
    data = dataset(settings, split, cache_dir)
    count = len(data) if limit is None else min(limit, len(data))
    return data.fetch(range(count))["tokens"]


def prepare_data(settings: dict, cache_dir: str) -> dict:
    """Trains the tokenizer and builds the token caches, so that parallel jobs only read them; returns blocks."""
    settings = Settings.from_dict(settings)
    return {split: len(dataset(settings, split, cache_dir)) for split in ("train", "test")}


# ---------------------------------------------------------------- networks


def build_model(settings: Settings, *, shift: bool = True) -> DiffusionLM:
    """A freshly initialised network of the reproduction's size."""
    config = GPT2Config(
        vocab_size=settings.vocab_size,
        n_positions=settings.length,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's own, in one kernel
        attn_implementation="sdpa",
    )
    return DiffusionLM.from_causal_lm(GPT2LMHeadModel(config), settings.mask_id, shift)


def load_model(run_dir: str | Path, settings: Settings, arm: Arm) -> DiffusionLM:
    """The trained network of one run, in eval mode."""
    model = build_model(settings, shift=arm.shift)
    model.load_state_dict(load_weights(run_dir, ema=False)[0])
    return model.eval()


def objective(arm: Arm) -> ObjectiveConfig:
    """What the arm is trained for."""
    if arm.kind == "ar":
        return ObjectiveConfig(stage="pt")
    return ObjectiveConfig(stage="ddm", shift=arm.shift, anneal_steps=arm.anneal_steps)


def trainer_config(settings: Settings, arm: Arm, *, seed: int, run_dir: str) -> TrainerConfig:
    """When things happen, and the optimizer."""
    return TrainerConfig(
        run_dir=run_dir,
        total_steps=arm.steps,
        seed=seed,
        batch=BatchConfig(global_size=settings.batch_size, micro_size=settings.batch_size),
        optim=OptimConfig(
            lr=settings.learning_rates[arm.name],
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup,
            grad_clip=settings.grad_clip,
            schedule="cosine",
            min_ratio=settings.min_ratio,
        ),
        checkpoint=CheckpointConfig(interval_steps=max(1, arm.steps // 4), keep_last=1),
        tracking=TrackingConfig(progress=False),
        precision="fp32",
        ema_decay=None,
        log_interval_steps=1,
    )


class HeldOutBound:
    """A hook that logs the bound of the first test blocks, with the same masks at every step and for every arm."""

    at_end = True
    draws = 4

    def __init__(self, settings: Settings, arm: Arm, cache_dir: str) -> None:
        self.every_steps = max(1, arm.steps // settings.held_out_points)
        self.x_BL = blocks(settings, "test", cache_dir, min(settings.held_out_blocks, settings.test_blocks))
        self.causal = arm.kind == "ar"

    @torch.no_grad()
    def __call__(self, state: TrainState) -> dict[str, float]:
        with state.eval_model() as model:
            if self.causal:
                nats = causal_nats(model, self.x_BL)
                return {HELD_OUT: sum(nats) / (len(nats) * (self.x_BL.shape[1] - 1))}
            return {HELD_OUT: nelbo(model, self.x_BL, draws=self.draws, given=1).value}


def train(settings: dict, arm: str, seed: int, run_dir: str, cache_dir: str, parent_dir: str | None = None) -> dict:
    """Trains one arm (or continues it) and returns its curve.

    All arms see the blocks in the same order, and arms from scratch start from the same weights as the AR network.

    Raises: Interrupted if a signal stopped it; the run folder then holds a checkpoint to continue from.
    """
    settings = Settings.from_dict(settings)
    chosen = settings.arm(arm)
    config = trainer_config(settings, chosen, seed=seed, run_dir=run_dir)
    loader = build_train_loader(
        dataset(settings, "train", cache_dir),
        global_size=config.batch.global_size,
        micro_size=config.batch.micro_size,
        seed=seed,
    )
    task = AdaptationTask(_builder(settings, chosen, parent_dir), objective(chosen), seed=seed, length=settings.length)
    done = fit(
        task,
        config,
        train_loader=loader,
        hooks=[HeldOutBound(settings, chosen, cache_dir)],
        run_config={"trainer": asdict(config), "arm": asdict(chosen), "settings": settings.as_dict()},
    )
    if done.stopped_early:
        raise Interrupted(f"training of {arm} was stopped at step {done.step}; run the same command to continue")
    return training_curve(Path(run_dir) / "metrics.jsonl")


def _builder(settings: Settings, arm: Arm, parent_dir: str | None) -> Callable[[], DiffusionLM]:
    def build() -> DiffusionLM:
        model = build_model(settings, shift=arm.shift)
        if arm.parent:
            assert parent_dir is not None, f"{arm.name} starts from the AR network"
            model.load_state_dict(load_weights(parent_dir, ema=False)[0])
        return model

    return build
