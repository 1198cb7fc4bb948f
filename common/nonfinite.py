"""What happens when a loss or a gradient is NaN or infinite: the step is never applied, and the batch is kept."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from common.checkpoint import save_weights, write_json
from common.errors import QuintetError
from common.parallel import Parallel
from common.precision import LossScaler
from common.task import Batch

logger = logging.getLogger(__name__)

LONGEST_STREAK = 100  # skipped steps in a row after which skipping is pointless


class NonFiniteError(QuintetError):
    """Loss or gradient norm is NaN or infinite, and the run was told to stop then."""


class NonFiniteGuard:
    """Stops or skips, as configured, and writes the offending micro-batches to ``run_dir/nonfinite``.

    Attributes:
        skipped: steps skipped so far.
    """

    def __init__(self, policy: str, run_dir: Path, parallel: Parallel) -> None:
        self.policy, self.folder, self.parallel = policy, run_dir / "nonfinite", parallel
        self.skipped = self.streak = 0

    @staticmethod
    def poison(loss: Tensor) -> Tensor:
        """1 for a finite loss, NaN else, without waiting for the device."""
        return torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))

    def check(
        self,
        finite: bool,
        step: int,
        norm: float,
        losses: Sequence[Tensor],
        micro: Sequence[tuple[Batch, Batch]],
        *,
        scaler: LossScaler,
    ) -> None:
        """Reacts to the outcome of step ``step`` (from 0), which all ranks see alike.

        A float16 overflow with finite losses is the loss scale's fault while the scale can still shrink.

        Raises: NonFiniteError naming step and rows if the policy is ``"stop"`` or nothing but bad steps remain.
        """
        if finite:
            self.streak = 0
            return
        values = [loss.item() for loss in losses]
        bad = [i for i, loss in enumerate(losses) if not torch.isfinite(loss)]
        rows = [(int(micro[i][1]["rows"][0]), int(micro[i][1]["rows"][-1])) for i in bad]
        rows = [span for part in self.parallel.gather(rows) for span in part]
        if not rows and scaler.can_shrink:
            return
        # without a bad loss any micro-batch may have spoiled the gradient: keep them all
        self._keep(step, norm, values, [micro[i] for i in bad] if rows else micro)
        self.skipped += 1
        self.streak += 1
        cause = f"the loss of rows {_spans(rows)} of the global batch" if rows else f"the gradient norm ({norm})"
        text = f"step {step + 1}: {cause} is not finite; the update was not applied, the batch is in {self.folder}"
        if self.policy == "stop":
            raise NonFiniteError(
                f"{text}. Lower optim.lr, set optim.grad_clip, train in precision=fp32, or set nonfinite=skip."
            )
        if self.streak >= LONGEST_STREAK:
            raise NonFiniteError(f"{text}. {self.streak} steps in a row were skipped; the weights are beyond repair.")
        if self.parallel.is_main:
            logger.warning("%s; continuing (nonfinite=skip)", text)

    def _keep(self, step: int, norm: float, losses: list[float], micro: Sequence[tuple[Batch, Batch]]) -> None:
        name = f"step_{step + 1:08d}_rank_{self.parallel.rank:05d}"
        tensors = {
            f"{index}.{kind}.{key}": value.cpu()
            for index, pair in enumerate(micro)
            for kind, part in zip(("batch", "draws"), pair, strict=True)
            for key, value in part.items()
        }
        try:
            self.folder.mkdir(exist_ok=True)
            if tensors:
                save_weights(self.folder / f"{name}.safetensors", tensors)
            write_json(self.folder / f"{name}.json", {"step": step + 1, "gradient_norm": norm, "losses": losses})
        except (OSError, SafetensorError) as error:
            logger.warning("could not keep the batch of step %d: %s", step + 1, error)


def _spans(rows: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first}-{last}" for first, last in sorted(rows))
