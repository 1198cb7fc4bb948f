"""Adapts a causal language model into a diffusion model, or finetunes it; the same command again continues the run.

    python -m diffullama.train experiment=parent_minutes run_dir=runs/parent          minutes on a laptop: a parent,
    python -m diffullama.train experiment=adapt_minutes model.path=runs/parent run_dir=runs/child       its adaptation
    python -m diffullama.train experiment=gpt2_full_ddm dry_run=true              size, operations, memory per plan
    NPROC=8 bash scripts/diffullama/train_torchrun.sh experiment=gpt2_full_ddm parallel=ddp

The run folder holds config.json, metrics.jsonl, architecture/, tokenizer/, checkpoints/, samples/ and, once trained,
export/ (a Hugging Face folder) and, with LoRA, adapter/. Exit code 85 and a file REQUEUE in it: a signal stopped it.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from common import cli
from common.config import TrainerConfig
from common.dry_run import estimate, print_estimate
from common.trainer import FitResult, fit
from diffullama.attention import attention_arguments
from diffullama.building import Start, prepare
from diffullama.config import TrainConfig
from diffullama.data import DataBuilder
from diffullama.loading import load_model
from diffullama.lora import save_adapter
from diffullama.model import DiffusionLM
from diffullama.saving import model_metadata, save_model, write_architecture, write_metadata
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


def build_task(config: TrainConfig, build: Callable[[], DiffusionLM]) -> AdaptationTask:
    """What is trained."""
    return AdaptationTask(
        build,
        config.objective,
        seed=config.seed,
        length=config.model.length,
        opened_attention=config.model.opened_attention,
    )


def run(config: TrainConfig, trainer: TrainerConfig, start: Start) -> FitResult:
    """Reads the data and trains to the end, or to a signal."""
    data = DataBuilder(
        config=config,
        tokenizer=start.tokenizer,
        special=start.special,
        vocab_size=start.vocab_size,
        digits=start.digits,
    )
    loaders = data.loaders(
        global_size=trainer.batch.global_size,
        micro_size=trainer.batch.micro_size,
        rank=cli.rank(),
        world_size=cli.world_size(),
    )
    if config.training.epochs is not None:
        steps = math.ceil(config.training.epochs * loaders.rows / trainer.batch.global_size)
        trainer = replace(trainer, total_steps=max(1, steps))

    def build() -> DiffusionLM:
        model = start.build()
        if cli.is_main_process():  # what load_model needs beside the checkpoints
            write_architecture(config.run_dir, model, start.special, start.metadata)
            start.tokenizer.save(Path(config.run_dir) / "tokenizer")
        return model

    return fit(
        build_task(config, build),
        trainer,
        train_loader=loaders.train,
        validation_loader=loaders.validation,
        hooks=[Snapshots(start, loaders.examples)],
        run_config=asdict(config),
    )


def export(run_dir: Path, start: Start) -> Path:
    """Writes the trained model as a Hugging Face folder, and with LoRA the adapter by itself; replaces older ones."""
    folder, adapter, config = run_dir / "export", run_dir / "adapter", start.config
    loaded = load_model(run_dir, dtype=config.model.dtype, causal_parent=config.objective.is_causal)
    model = DiffusionLM(loaded.model.lm, start.mask_id, loaded.model.shift)
    metadata = {**start.metadata, "run_dir": str(run_dir), "seed": config.seed}
    if config.peft.kind != "none" and start.has_stored_base:
        save_adapter(adapter, model, base_model=config.model.path)
        write_metadata(adapter, model_metadata(model, start.special, metadata))
    return save_model(folder, model, start.tokenizer, start.special, metadata=metadata, overwrite=True)


def print_cost(config: TrainConfig) -> None:
    """Parameters, operations per step and memory per process for every plan; no weight is read or allocated."""
    expected = config.ngpus or (cli.world_size() if cli.world_size() > 1 else None)
    trainer = config.trainer_config(expected or 1)
    micro_sizes = {1: config.training.batch_size // config.training.accum}
    for processes in [expected] if expected else range(DRY_RUN_PROCESSES, 1, -1):
        if processes > 1 and config.training.batch_size % (config.training.accum * processes) == 0:
            micro_sizes[processes] = config.micro_size(processes)
            break

    def forward(model: DiffusionLM, rows: int) -> Tensor:
        """Without the head, whose logits are made and dropped in chunks."""
        arguments = attention_arguments("sdpa", torch.float32, None, None, config.objective.is_causal)
        tokens_BL = torch.zeros(rows, config.model.length, dtype=torch.int64)
        return model.hf.base_model(input_ids=tokens_BL, use_cache=False, **arguments).last_hidden_state

    if cli.is_main_process():
        task = build_task(config, prepare(config).sketch)
        print_estimate(estimate(task, trainer, micro_sizes=micro_sizes, forward=forward))


if __name__ == "__main__":
    sys.exit(main())
