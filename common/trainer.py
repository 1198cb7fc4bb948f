"""The only training loop. A paper supplies a ``Task`` (what), a ``TrainerConfig`` says when, ``fit`` runs it.

The same code runs on one CPU process, two gloo processes and many GPUs. Running the same command again resumes; a
signal (SIGTERM, SIGUSR1) makes the run save at the next step boundary, write ``run_dir/REQUEUE`` and return.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.checkpoint import find_checkpoint, prune, remove_leftovers, step_of, write_checkpoint, write_json
from common.config import TrainerConfig
from common.ema import EMA
from common.errors import ConfigError, QuintetError
from common.hooks import Hook, TrainState
from common.meters import Throughput, WeightedMeans, peak_memory_gb
from common.nonfinite import NonFiniteGuard
from common.optim import learning_rate
from common.parallel import Parallel, start
from common.plans import build_plan
from common.precision import LossScaler, resolve_precision
from common.preemption import StopRequest
from common.resume import check_same_config, read_state, state_stages
from common.seeding import derive_seed
from common.task import Batch, Task
from common.tracking import METRICS_FILE, Tracker, read_records
from common.validation import ValidationLoader, validate

logger = logging.getLogger(__name__)

REQUEUE_FILE = "REQUEUE"


class TrainLoader(Protocol):
    """Endless micro-batches of this rank, in order. Implemented by ``common/data/loader.py``.

    Micro-batch ``a`` of rank ``r`` holds rows ``[(a * W + r) * m, (a * W + r + 1) * m)`` of the global batch, for ``W``
    ranks and micro-batches of ``m`` samples.
    """

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def state_dict(self) -> dict:
        """Position after the last micro-batch that was taken."""

    def load_state_dict(self, state: dict) -> None: ...

    def seek(self, step: int) -> None:
        """Goes to the start of optimizer step ``step``; for a run that continues on another number of processes."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended: the step reached, the last logged values, and whether a signal stopped it early."""

    step: int
    metrics: dict[str, float]
    run_dir: Path
    stopped_early: bool = False


def fit(
    task: Task,
    config: TrainerConfig,
    *,
    train_loader: TrainLoader,
    validation_loader: ValidationLoader | None = None,
    hooks: Sequence[Hook] = (),
    run_config: Mapping | None = None,
) -> FitResult:
    """Trains ``task`` for ``config.total_steps`` optimizer steps, or continues where the run folder's checkpoint ends.

    Args:
        run_config: the resolved configuration of the run, stored beside the weights and compared on resume.

    Raises:
        ConfigError: options that cannot work together.
        CheckpointError: the saved run does not fit this one, or a checkpoint could not be written.
        NonFiniteError: loss or gradient became NaN or infinite and ``config.nonfinite`` is ``"stop"``.
    """
    stop = StopRequest()
    with stop.listening(), start(config.parallel.plan) as parallel, _determinism(config.deterministic):
        resolved = json.loads(json.dumps(run_config or dataclasses.asdict(config), default=str))
        run_dir = Path(config.run_dir)
        config.batch.accumulation_steps(parallel.world_size)  # fails before anything is written
        opened = _open_run_dir(run_dir, resolved, config.allow_config_change) if parallel.is_main else None
        checkpoint = parallel.from_main(opened)
        if isinstance(checkpoint, QuintetError):
            raise checkpoint
        if checkpoint is not None and step_of(checkpoint) >= config.total_steps:
            return _already_finished(checkpoint, run_dir, parallel)
        run = Run(task, config, parallel, stop, train_loader, validation_loader, hooks, resolved)
        with run:
            run.restore(checkpoint)
            return run.train()


def _open_run_dir(run_dir: Path, resolved: Mapping, allow_config_change: bool) -> Path | None | QuintetError:
    """Prepares the folder on the main process; returns the checkpoint to continue from.

    An error is returned rather than raised, so that the other ranks learn of it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir)
        (run_dir / REQUEUE_FILE).unlink(missing_ok=True)
        checkpoint = find_checkpoint(run_dir)
        if checkpoint is not None:
            check_same_config(checkpoint, resolved, allow_config_change)
        write_json(run_dir / "config.json", resolved)
        return checkpoint
    except OSError as error:
        return ConfigError(
            f"run_dir={run_dir} cannot be used: {error.strerror}; choose a folder that can be written to."
        )
    except QuintetError as error:
        return error


def _already_finished(checkpoint: Path, run_dir: Path, parallel: Parallel) -> FitResult:
    step = step_of(checkpoint)
    if parallel.is_main:
        logger.warning("%s is finished: %s holds step %d, nothing left to train.", run_dir, checkpoint, step)
    latest: dict[str, float] = {}
    if (run_dir / METRICS_FILE).is_file():
        for record in read_records(run_dir):
            latest |= record
    return FitResult(step, {name: value for name, value in latest.items() if name not in ("step", "time")}, run_dir)


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses to be deterministic
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Run(contextlib.ExitStack):
    """The parts of one run and the order in which they act."""

    def __init__(
        self,
        task: Task,
        config: TrainerConfig,
        parallel: Parallel,
        stop: StopRequest,
        train_loader: TrainLoader,
        validation_loader: ValidationLoader | None,
        hooks: Sequence[Hook],
        resolved: Mapping,
    ) -> None:
        super().__init__()
        self.task, self.config, self.parallel, self.stop = task, config, parallel, stop
        self.train_loader, self.validation_loader, self.hooks = train_loader, validation_loader, hooks
        self.resolved, self.run_dir = resolved, Path(config.run_dir)
        self.step = 0
        self.accumulation = config.batch.accumulation_steps(parallel.world_size)
        self.precision = resolve_precision(config.precision, parallel.device, config.parallel.plan)

        torch.manual_seed(derive_seed(config.seed, "init"))
        model = task.build_model()
        flops = task.flops_per_sample(model)
        self.plan = build_plan(task, model, config, parallel, self.precision)
        tracked = self.plan.tracked()
        self.ema = None
        if config.ema_decay is not None:
            self.ema = EMA(tracked, config.ema_decay, warmup=config.ema_warmup)
        torch.manual_seed(derive_seed(config.seed, "dropout", parallel.rank))
        self.scaler = LossScaler(self.precision == "fp16")
        self.means = WeightedMeans()
        self.guard = NonFiniteGuard(config.nonfinite, self.run_dir, parallel)
        self.throughput = Throughput(parallel, self.precision, task.samples_to_tokens(), flops)
        self.tracker = Tracker(self.run_dir, config.tracking, parallel.is_main)
        self.callback(self.tracker.close)

    def restore(self, checkpoint: Path | None) -> None:
        """Continues from ``checkpoint``; metrics beyond it are dropped, because their steps are run again."""
        if checkpoint is not None:
            saved = read_state(
                checkpoint, self.plan, self.ema, self.train_loader, self.means, self.parallel,
                micro_size=self.config.batch.micro_size, seed=self.config.seed,
            )  # fmt: skip
            self.scaler.load_state_dict(saved["scaler"])
            self.guard.skipped = saved["skipped_steps"]
            self.step = step_of(checkpoint)
            if self.parallel.is_main:
                logger.info("continuing from %s", checkpoint)
        self.tracker.resume_at(self.step)

    def train(self) -> FitResult:
        """Runs to the last step or to a signal."""
        total, latest, batches = self.config.total_steps, {}, iter(self.train_loader)
        shown = self.config.tracking.progress and self.parallel.is_main
        with tqdm(total=total, initial=self.step, disable=None if shown else True, unit="step") as bar:
            stopping = False
            while self.step < total and not stopping:
                values, stopping = self._optimizer_step(batches)
                values |= self._validate_if_due() | self._call_hooks()
                if values:
                    self.tracker.log(self.step, values)
                    latest |= values
                bar.update()
                if "train/loss" in values:
                    bar.set_postfix(loss=f"{values['train/loss']:.4g}")
                if stopping or self.step == total or self.step % self.config.checkpoint.interval_steps == 0:
                    self._save()
        stopped_early = stopping and self.step < total
        if stopped_early and self.parallel.is_main:
            logger.warning("stopped by a signal at step %d of %d; run the same command to continue", self.step, total)
            write_json(self.run_dir / REQUEUE_FILE, {"step": self.step, "signal": self.stop.signal_name})
        return FitResult(self.step, latest, self.run_dir, stopped_early)

    def _optimizer_step(self, batches: Iterator[Batch]) -> tuple[dict[str, float], bool]:
        """One update on one global batch; returns the values to log and whether any rank was told to stop."""
        self.throughput.start()
        config, parallel = self.config, self.parallel
        micro = list(self._micro_batches(batches))
        counts = [self.task.count(batch, draws) for batch, draws in micro]
        # one reduction for both: the loss is divided by the count over all micro-batches and ranks, and a signal that
        # only one rank has seen stops all of them at the same step
        total_count, stopping = parallel.sum([sum(counts), float(self.stop.requested)])
        scale = parallel.world_size / (total_count or 1.0) * self.scaler.scale  # gradients are averaged over ranks
        losses, metrics = [], []
        for index, (batch, draws) in enumerate(micro):
            with self.plan.accumulate(last=index == len(micro) - 1):
                output = self.task.training_step(self.plan.model, batch, draws)
                # a loss that is not finite must spoil the gradient norm, on which all ranks decide together
                self.plan.backward(output.loss_sum * (scale * self.guard.poison(output.loss_sum)))
            losses.append(output.loss_sum.detach())
            metrics += output.metrics.items()
        rate = learning_rate(self.step + 1, config.optim, config.total_steps)
        norm = self.plan.step(rate, self.scaler.scale)
        finite = norm < float("inf")
        if finite:
            for loss, count in zip(losses, counts, strict=True):
                self.means.add("train/loss", loss, count)
            for name, (value, weight) in metrics:
                self.means.add(name if "/" in name else f"train/{name}", value, weight)
            if self.ema is not None:
                self.ema.update()
        self.guard.check(finite, self.step, norm, losses, micro, scaler=self.scaler)
        self.scaler.update(finite)
        self.step += 1
        self.throughput.stop(config.batch.global_size)
        if self.step % config.log_interval_steps and self.step != config.total_steps:
            return {}, stopping > 0
        values = self.means.means(parallel)
        values |= {"train/lr": rate, "train/grad_norm": norm, **self.throughput.rates()}
        values["memory/peak_gb"] = parallel.max([peak_memory_gb(parallel.device)])[0]
        if self.scaler.enabled:
            values["train/loss_scale"] = self.scaler.scale
        if self.guard.skipped:
            values["train/skipped_steps"] = float(self.guard.skipped)
        return values, stopping > 0

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Batch]]:
        """This rank's micro-batches of the step, each with its rows of the global draws, on the device."""
        size, ranks = self.config.batch.micro_size, self.parallel.world_size
        draws = self.task.draw(self.step, self.config.batch.global_size)
        for index in range(self.accumulation):
            first = (index * ranks + self.parallel.rank) * size
            mine = {name: value[first : first + size] for name, value in draws.items()}
            mine["rows"] = torch.arange(first, first + size)
            yield self._to_device(next(batches)), self._to_device(mine)

    def _to_device(self, tensors: Batch) -> Batch:
        device = self.parallel.device
        if device.type == "cpu":
            return tensors
        return {name: value.to(device, non_blocking=True) for name, value in tensors.items()}

    def _validate_if_due(self) -> dict[str, float]:
        interval = self.config.validate_interval_steps
        if self.validation_loader is None or not interval:
            return {}
        if self.step % interval and self.step != self.config.total_steps:
            return {}
        with self._random_state_kept(), self.evaluating() as module:
            return validate(
                self.task, module, self.validation_loader, self.parallel,
                to_device=self._to_device, in_step=self.plan.forward_is_collective,
            )  # fmt: skip

    def averaged(self) -> contextlib.AbstractContextManager:
        """The moving average in place of the parameters, if the run keeps one."""
        return self.ema.swapped() if self.ema is not None else contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model with averaged weights, in eval mode, without gradients."""
        module = self.plan.module
        with self.averaged(), torch.no_grad():
            self.plan.forget_gathered()
            module.eval()
            try:
                yield module
            finally:
                module.train()
                self.plan.forget_gathered()

    def _call_hooks(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for hook in self.hooks:
            at_end = getattr(hook, "at_end", False) and self.step == self.config.total_steps
            if at_end or (hook.every_steps > 0 and self.step % hook.every_steps == 0):
                with self._random_state_kept():
                    values |= hook(TrainState(self)) or {}
        return values

    def _random_state_kept(self) -> contextlib.AbstractContextManager:
        """Validation and hooks must not shift the dropout of the steps that follow."""
        device = self.parallel.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def _save(self) -> None:
        trainer = {
            "plan": self.config.parallel.plan,
            "world_size": self.parallel.world_size,
            "micro_size": self.config.batch.micro_size,
            "has_ema": self.ema is not None,
            "ema_updates": self.ema.num_updates if self.ema is not None else 0,
            "scaler": self.scaler.state_dict(),
            "skipped_steps": self.guard.skipped,
        }
        stages = state_stages(self.plan, self.ema, self.train_loader, self.means, self.parallel)
        write_checkpoint(
            self.run_dir, self.step, stages, config=self.resolved, parallel=self.parallel, extra={"trainer": trainer}
        )
        if self.parallel.is_main:
            prune(self.run_dir, self.config.checkpoint)
