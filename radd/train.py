"""Trains RADD; the same command again continues the run.

    python -m radd.train experiment=text_minutes run_dir=runs/first       minutes on a laptop, no download
    python -m radd.train experiment=small_lambda_dce_400k dry_run=true    size, operations, memory per plan
    NPROC=8 bash scripts/radd/train_torchrun.sh experiment=small_t_dce_400k parallel=ddp

The run folder holds config.json, metrics.jsonl, checkpoints/, snapshots/, samples/ and, once trained,
export/. Exit code 85 and a file REQUEUE in it: a signal stopped the run after a checkpoint.
"""

import sys
from dataclasses import asdict, replace

import torch
from torch import nn

from common import cli
from common.checkpoint import load_weights
from common.config import TrainerConfig
from common.data.corpora import build_text_dataset, build_text_stream, load_data_tokenizer
from common.data.loader import build_train_loader, build_validation_loader
from common.data.tokenizer import Tokenizer
from common.dry_run import estimate, print_estimate
from common.errors import ConfigError
from common.evaluation.generative_perplexity import snapshot_scorer
from common.trainer import FitResult, fit
from radd.config import TrainConfig
from radd.snapshots import Snapshots, export
from radd.task import RADDTask

DRY_RUN_PROCESSES = 8  # for which sharded plans are shown unless ngpus says how many


def main() -> int:
    """The command line."""
    return cli.run(train, "train", TrainConfig)


def train(config: TrainConfig) -> int:
    """Trains as configured, or prints what that would cost.

    Returns: 0, or ``cli.EXIT_REQUEUE`` if a signal stopped the run.
    """
    if config.dry_run:
        print_cost(config)
        return 0
    trainer = config.trainer_config(cli.world_size())  # its checks come before any data is read
    tokenizer = load_tokenizer(config)
    done = run(config, trainer, tokenizer)
    if done.stopped_early:
        return cli.EXIT_REQUEUE
    if cli.is_main_process():
        weights, _ = load_weights(done.run_dir)
        folder = export(done.run_dir / "export", weights, config, tokenizer)
        loss = done.metrics.get("validation/loss", done.metrics.get("train/loss"))
        print(f"step {done.step}{f', loss {loss:.4f}' if loss is not None else ''}; model in {folder}", file=sys.stderr)
    return 0


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The configured tokenizer; ``bpe:N`` is learnt from the training text and kept in the cache.

    Raises: ConfigError if the model has another number of tokens.
    """
    data = config.data
    tokenizer = load_data_tokenizer(
        data.tokenizer, data.train, cache_dir=data.cache_dir, detokenizer=data.detokenizer, text_unit=data.text_unit
    )
    if tokenizer.vocab_size != config.tokens:
        raise ConfigError(
            f"tokens={config.tokens}, but the tokenizer {data.tokenizer} has {tokenizer.vocab_size}; set "
            f"tokens={tokenizer.vocab_size} or choose another data.tokenizer."
        )
    return tokenizer


def run(config: TrainConfig, trainer: TrainerConfig, tokenizer: Tokenizer) -> FitResult:
    """Reads the data and trains to the end, or to a signal."""
    data, length = config.data, config.model.length
    corpus = {
        "length": length,
        "tokenizer": tokenizer,
        "cache_dir": data.cache_dir,
        "detokenizer": data.detokenizer,
        "text_unit": data.text_unit,
    }
    share = {
        "micro_size": trainer.batch.micro_size,
        "seed": config.seed,
        "rank": cli.rank(),
        "world_size": cli.world_size(),
        "num_workers": data.num_workers,
    }
    # several processes may ask at once: one of them tokenizes, the others wait for the cache
    if data.streaming:
        train_loader = build_text_stream(data.train, "train", **corpus, **share)
    else:
        blocks = build_text_dataset(data.train, "train", group_size=data.group_size, **corpus)
        train_loader = build_train_loader(blocks, global_size=trainer.batch.global_size, **share)
    validation_loader = None
    if config.training.eval_freq:
        held_out = build_text_dataset(data.valid, "validation", group_size=data.group_size, **corpus)
        validation_loader = build_validation_loader(
            held_out, batch_size=config.eval.micro_batch_size, max_samples=config.eval.batch_size
        )
    scorer = snapshot_scorer(config.gpt_dir, batch_size=config.eval.perplexity_batch_size)
    hooks = [Snapshots(config, tokenizer, scorer)] if config.training.snapshot_freq else []
    return fit(
        RADDTask(config),
        trainer,
        train_loader=train_loader,
        validation_loader=validation_loader,
        hooks=hooks,
        run_config=asdict(config),
    )


def print_cost(config: TrainConfig) -> None:
    """Parameters, operations per step and memory per process for every plan; no weight is allocated."""
    expected = config.ngpus or (cli.world_size() if cli.world_size() > 1 else None)
    trainer = config.trainer_config(expected or 1)
    micro_sizes = {1: config.training.batch_size // config.training.accum}
    for processes in [expected] if expected else range(DRY_RUN_PROCESSES, 1, -1):
        if processes > 1 and config.training.batch_size % (config.training.accum * processes) == 0:
            micro_sizes[processes] = config.micro_size(processes)
            break

    def forward(model: nn.Module, rows: int) -> torch.Tensor:
        return model.logits(torch.zeros(rows, config.model.length, dtype=torch.int64))

    # the network's own autocast is for real devices; the estimate applies the run's precision itself
    task = RADDTask(replace(config, model=replace(config.model, dtype=None)))
    if cli.is_main_process():
        print_estimate(estimate(task, trainer, micro_sizes=micro_sizes, forward=forward))


if __name__ == "__main__":
    sys.exit(main())
