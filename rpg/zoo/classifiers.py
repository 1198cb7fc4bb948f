"""Training of one image classifier along a recipe, from any point at which it was left.

Dimensions: B images of a batch, N test images, C classes.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.images import Images
from common.errors import CheckpointError
from common.precision import autocast, has_native_bf16
from rpg.tasks import focal_loss, task_targets
from rpg.zoo.image_data import epoch_batches, ordered_batches, steps_per_epoch
from rpg.zoo.networks import State, head_name, matching
from rpg.zoo.recipes import Recipe, TrainingSection

CACHED_VALUES = 64 << 20  # test images of at most so many numbers are kept in memory as tensors


class Training:
    """Epochs of a network: first of its head alone, then along the cosine, then at the final rate without end.

    Args:
        section: how it is trained.
        seed: of the order of images and of their augmentation.
        task: whose yes or no is learnt instead of the images' classes; None: the classes.
        frozen_norms: batch normalisation keeps its running statistics, for trainings of a few tensors only.
    """

    def __init__(
        self,
        network: nn.Module,
        section: TrainingSection,
        images: Images,
        *,
        seed: int,
        task: int | None = None,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        frozen_norms: bool = False,
    ) -> None:
        self.network, self.section, self.images = network.to(device), section, images
        self.seed, self.task, self.num_workers, self.device = seed, task, num_workers, torch.device(device)
        self.frozen_norms = frozen_norms
        self.steps_per_epoch = steps_per_epoch(images, section.batch_size)
        self.epoch, self.step = 0, 0  # of the next batch
        self._trained = [name for name, value in network.named_parameters() if value.requires_grad]
        use_bf16 = section.precision == "bf16" and has_native_bf16(self.device)
        self._precision = "bf16" if use_bf16 else "fp32"
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def epochs(self) -> int:
        """Epochs before checkpoints are saved."""
        return self.section.head_epochs + self.section.epochs

    def run(self) -> Iterator[float]:
        """Trains from where it stands to the end of the epoch; yields the loss after each step.

        Whoever stops in between finds ``epoch`` and ``step`` at the batch that comes next.
        """
        self._enter_epoch()
        batches = epoch_batches(
            self.images,
            self.section.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            first=self.step,
            num_workers=self.num_workers,
        )
        epoch = self.epoch
        for images_B, label_B in batches:
            loss = self._train_on(images_B, label_B)
            self.step += 1
            if self.step == self.steps_per_epoch:
                self.epoch, self.step = epoch + 1, 0
            yield loss

    def _enter_epoch(self) -> None:
        section, in_head = self.section, self.epoch < self.section.head_epochs
        if self._optimizer is None or (self.step == 0 and self.epoch == section.head_epochs):
            self._optimizer = self._build_optimizer(in_head)
        self.set_modes()
        if not in_head:
            for group in self._optimizer.param_groups:
                group["lr"] = section.lr_at(self.epoch - section.head_epochs)

    def set_modes(self) -> None:
        """Training mode, except for batch normalisation whose statistics are frozen."""
        self.network.train()
        if self.frozen_norms:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _build_optimizer(self, in_head: bool) -> torch.optim.Optimizer:
        head = head_name(self.network) if in_head else None
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in self._trained and (head is None or name.startswith(f"{head}.")))
        parameters = [value for value in self.network.parameters() if value.requires_grad]
        section = self.section
        if in_head:
            return torch.optim.AdamW(parameters, lr=section.head_lr, weight_decay=section.head_weight_decay)
        if section.optimizer == "SGD":
            return torch.optim.SGD(
                parameters, lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay
            )
        return torch.optim.AdamW(parameters, lr=section.lr, weight_decay=section.weight_decay)

    def _train_on(self, images_B: Tensor, label_B: Tensor) -> float:
        images_B, label_B = images_B.to(self.device, non_blocking=True), label_B.to(self.device)
        target_B = label_B if self.task is None else task_targets(label_B, self.task)
        with autocast(self._precision, self.device):
            logits_BC = self.network(images_B)
        if self.section.loss == "focal":
            loss = focal_loss(logits_BC.float(), target_B, self.section.gamma)
        else:
            loss = F.cross_entropy(logits_BC.float(), target_B)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, object]:
        """Everything that a later process needs to go on."""
        return {
            "network": self.network.state_dict(),
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
        }

    def load_state(self, state: Mapping[str, object]) -> None:
        """Continues where ``state`` was taken."""
        self.network.load_state_dict(state["network"], strict=True)
        self.epoch, self.step = state["epoch"], state["step"]
        if state["optimizer"] is None:
            return
        # the optimizer in use is that of the last step made
        position = self.epoch * self.steps_per_epoch + self.step - 1
        self._optimizer = self._build_optimizer(position < self.section.head_epochs * self.steps_per_epoch)
        self._optimizer.load_state_dict(state["optimizer"])


class StateFile:
    """Where a training stands, on disk; written at most every ``interval_seconds``.

    The file is read without running code from it, and replaced as a whole.
    """

    def __init__(self, path: Path, interval_seconds: float = 60.0) -> None:
        self.path, self.interval_seconds, self._written = path, interval_seconds, time.monotonic()

    def read(self) -> dict | None:
        """What was written last; None if nothing was.

        Raises: CheckpointError if it is damaged.
        """
        if not self.path.is_file():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{self.path} is damaged ({first}); delete it to start this training anew.") from None

    def write(self, state: Callable[[], Mapping[str, object]], *, now: bool = False) -> None:
        """Writes ``state()`` if the interval is over, or ``now``."""
        if not now and time.monotonic() - self._written < self.interval_seconds:
            return
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        torch.save(state(), temporary)
        os.replace(temporary, self.path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Deletes it: the training is finished."""
        self.path.unlink(missing_ok=True)


def train_and_save(
    training: Training,
    recipe: Recipe,
    save: Callable[[int, State], None],
    *,
    state_file: StateFile,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Trains along ``recipe`` and hands ``save`` each checkpoint with its number from 1, float32 on the CPU.

    A state file makes it go on after the last checkpoint or epoch that it knows of, with the same bits on the same
    device.
    """
    saved = 0
    if found := state_file.read():
        training.load_state(found["training"])
        saved = found["saved"]
        progress(f"continues in epoch {training.epoch} after {saved} checkpoints")

    def state() -> dict[str, object]:
        return {"training": training.state(), "saved": saved}

    while training.epoch < training.epochs:
        total, count = 0.0, 0
        for loss in training.run():
            total, count = total + loss, count + 1
        progress(f"epoch {training.epoch} of {training.epochs}: loss {total / count:.4f}")
        state_file.write(state)
    interval = recipe.saving.interval(training.steps_per_epoch)
    while saved < recipe.saving.count:
        for _ in training.run():
            made = (training.epoch - training.epochs) * training.steps_per_epoch + training.step
            if made % interval == 0:
                saved += 1
                save(saved, collected_state(training.network, recipe.saving.collected))
                state_file.write(state)
                if saved == recipe.saving.count:
                    break
                training.set_modes()  # testing has put the network into evaluation mode


def collected_state(network: nn.Module, patterns: list[str]) -> State:
    """Copies of the tensors that a recipe keeps, in the order of the state dict, float32 (integers as they are)."""
    state = network.state_dict()
    names = matching(list(state), patterns, "recipe.saving.collected") if patterns else list(state)
    return {
        name: state[name].detach().to("cpu", torch.float32 if state[name].is_floating_point() else None, copy=True)
        for name in names
    }


class TestImages:
    """Test images as batches, kept in memory where they are small."""

    __test__ = False

    def __init__(self, images: Images, *, batch_size: int = 256, num_workers: int = 0) -> None:
        self.images, self.batch_size, self.num_workers = images, batch_size, num_workers
        self._batches: list[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        if self._batches is not None:
            yield from self._batches
            return
        fits = len(self.images) * self.images.image(0).numel() <= CACHED_VALUES
        kept = []
        for images_B, _ in ordered_batches(self.images, self.batch_size, num_workers=self.num_workers):
            if fits:
                kept.append(images_B)
            yield images_B
        if fits:
            self._batches = kept


@torch.no_grad()
def compute_logits(network: nn.Module, test: TestImages, device: torch.device | str = "cpu") -> Tensor:
    """Logits (N, C) of all test images, float32 on the CPU; the network is in evaluation mode afterwards."""
    network = network.to(device).eval()
    return torch.cat([network(images_B.to(device)).float().cpu() for images_B in test])
