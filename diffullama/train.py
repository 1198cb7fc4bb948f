"""Adapts a causal language model into a diffusion model, or finetunes it; the same command again continues the run.

    python -m diffullama.train experiment=parent_minutes run_dir=runs/parent          minutes on a laptop: a parent,
    python -m diffullama.train experiment=adapt_minutes model.path=runs/parent run_dir=runs/child       its adaptation
    python -m diffullama.train experiment=gpt2_full_ddm dry_run=true              size, operations, memory per plan
    NPROC=8 bash scripts/diffullama/train_torchrun.sh experiment=gpt2_full_ddm parallel=ddp

The run folder holds config.json, metrics.jsonl, architecture/, tokenizer/, checkpoints/, samples/ and, once trained,
export/ (a Hugging Face folder) and, with LoRA, adapter/. Exit code 85 and a file REQUEUE in it: a signal stopped it.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common import cli
from common.config import TrainerConfig
from common.data.corpora import build_text_stream
from common.data.loader import build_train_loader, build_validation_loader
from common.dry_run import estimate, print_estimate
from common.trainer import FitResult, fit
from diffullama.building import Start, prepare
from diffullama.config import TrainConfig
from diffullama.data import build_dataset
from diffullama.loading import load_model
from diffullama.lora import save_adapter
from diffullama.model import DiffusionLM
from diffullama.saving import save_model, write_architecture
from diffullama.snapshots import Snapshots
from diffullama.task import AdaptationTask

CONFIG_DIR = "configs/diffullama"
DRY_RUN_PROCESSES = 8  # for which sharded plans are shown unless ngpus says how many


def main() -> int:
    """The command line."""
    return cli.run(train, "train", TrainConfig, CONFIG_DIR)


def train(config: TrainConfig) -> int:
    """Trains as configured, or prints what that would cost.

    Returns: 0, or ``cli.EXIT_REQUEUE`` if a signal stopped the run.
    """
    if config.dry_run:
        print_cost(config)
        return 0
    trainer = config.trainer_config(cli.world_size())  # its checks come before any data is read
    start = prepare(config)
    done = run(config, trainer, start)
    if done.stopped_early:
        return cli.EXIT_REQUEUE
    if cli.is_main_process():
        folder = export(done.run_dir, start)
        loss = done.metrics.get("validation/loss", done.metrics.get("train/loss"))
        print(f"step {done.step}{f', loss {loss:.4f}' if loss is not None else ''}; model in {folder}", file=sys.stderr)
    return 0


def build_task(config: TrainConfig, start: Start, *, writes: bool = True) -> AdaptationTask:
    """The task; the main process also writes what ``load_model`` needs beside the checkpoints."""

    def build() -> DiffusionLM:
        model = start.build()
        if writes and cli.is_main_process():
            write_architecture(config.run_dir, model, start.special, start.metadata)
            start.tokenizer.save(Path(config.run_dir) / "tokenizer")
        return model

    return AdaptationTask(
        build,
        config.objective,
        seed=config.seed,
        length=config.model.length,
        opened_attention=config.model.opened_attention,
    )


def run(config: TrainConfig, trainer: TrainerConfig, start: Start) -> FitResult:
    """Reads the data and trains to the end, or to a signal."""
    data, length = config.data, config.model.length
    share = {
        "micro_size": trainer.batch.micro_size,
        "seed": config.seed,
        "rank": cli.rank(),
        "world_size": cli.world_size(),
        "num_workers": data.num_workers,
    }
    rows = {
        "data": data,
        "objective": config.objective,
        "length": length,
        "tokenizer": start.tokenizer,
        "special": start.special,
        "vocab_size": start.vocab_size,
        "seed": config.seed,
        "digits": start.digits,
    }
    # several processes may ask at once: one of them tokenizes, the others wait for the cache
    if data.streaming:
        train_loader = build_text_stream(
            data.train, "train", length=length, tokenizer=start.tokenizer, cache_dir=data.cache_dir, **share
        )
    else:
        taken = config.training.n_iters * config.training.batch_size
        blocks = build_dataset(data.train, "train", num_samples=taken, **rows)
        train_loader = build_train_loader(blocks, global_size=trainer.batch.global_size, **share)
    validation_loader = None
    if config.training.eval_freq and data.valid is not None:
        held_out = build_dataset(data.valid, "validation", **rows)
        validation_loader = build_validation_loader(
            held_out, batch_size=config.eval.micro_batch_size, max_samples=config.eval.batch_size
        )
    return fit(
        build_task(config, start),
        trainer,
        train_loader=train_loader,
        validation_loader=validation_loader,
        hooks=[Snapshots(start)],
        run_config=asdict(config),
    )


def export(run_dir: Path, start: Start) -> Path:
    """Writes the trained model as a Hugging Face folder, and with LoRA the adapter by itself; what is there is kept."""
    folder, adapter = run_dir / "export", run_dir / "adapter"
    loaded = load_model(run_dir, dtype=start.config.model.dtype, causal_parent=start.config.objective.is_causal)
    metadata = {**start.metadata, "run_dir": str(run_dir)}
    if start.config.peft.kind != "none":
        save_adapter(adapter, loaded.model, base_model=start.config.model.path)
    return save_model(folder, loaded.model, start.tokenizer, start.special, metadata=metadata, overwrite=True)


def print_cost(config: TrainConfig) -> None:
    """Parameters, operations per step and memory per process for every plan; no weight is read or allocated."""
    expected = config.ngpus or (cli.world_size() if cli.world_size() > 1 else None)
    trainer = config.trainer_config(expected or 1)
    micro_sizes = {1: config.training.batch_size // config.training.accum}
    for processes in [expected] if expected else range(DRY_RUN_PROCESSES, 1, -1):
        if processes > 1 and config.training.batch_size % (config.training.accum * processes) == 0:
            micro_sizes[processes] = config.micro_size(processes)
            break

    def forward(model: nn.Module, rows: int) -> torch.Tensor:
        return model(torch.zeros(rows, config.model.length, dtype=torch.int64), causal=config.objective.is_causal)

    if cli.is_main_process():
        task = build_task(config, prepare(config), writes=False)
        print_estimate(estimate(task, trainer, micro_sizes=micro_sizes, forward=forward))


if __name__ == "__main__":
    sys.exit(main())
