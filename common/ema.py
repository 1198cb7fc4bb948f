"""Exponential moving average of parameters, on whole tensors or on the shard that each rank owns."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.errors import CheckpointError


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The part of each tensor that lives on this rank, as a view."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]


class EMA:
    """Shadow weights that follow the parameters: at update n (from 1) ``shadow -= (1 - d) * (shadow - parameter)``,
    with ``d = min(decay, (1 + n) / (10 + n))``, or ``d = decay`` without warm-up.

    Args:
        params_named: name -> parameter or shard; DTensors and flat shards are averaged in place, without communication.
        decay: long-run decay in [0, 1).
        warmup: False: the decay from the first update on; the average of a short run is then close to its init.

    Source: the moving average of SEDD and RADD's released trainers (golden case ``ema``).
    """

    def __init__(self, params_named: Mapping[str, Tensor], decay: float, *, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup
        self.num_updates = 0
        # the objects themselves, not detached views: DeepSpeed repoints the storage of its shards
        self.tracked = dict(params_named)
        self.shadow = {name: parameter.detach().clone() for name, parameter in self.tracked.items()}
        self._is_swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Moves the shadow towards the present parameters by one step."""
        assert not self._is_swapped, "the parameters hold the average at the moment"
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay
        torch._foreach_lerp_(_local(self.shadow), _local(self.tracked), 1 - decay)

    @torch.no_grad()
    def _exchange(self) -> None:
        for shadow, parameter in zip(_local(self.shadow), _local(self.tracked), strict=True):
            held = parameter.clone()  # one tensor at a time, so that the peak stays low
            parameter.copy_(shadow)
            shadow.copy_(held)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module | None = None) -> Iterator[None]:
        """Inside, the parameters hold the averaged values (and ``model``, if given, is in eval mode)."""
        assert not self._is_swapped, "already swapped"
        was_training = model.training if model is not None else False
        self._exchange()
        self._is_swapped = True
        if model is not None:
            model.eval()
        try:
            yield
        finally:
            self._exchange()
            self._is_swapped = False
            if model is not None:
                model.train(was_training)

    def state_dict(self) -> dict:
        """``{"num_updates": int, "shadow": {name: tensor}}``; the tensors are live, not copies."""
        assert not self._is_swapped, "the shadow holds the raw parameters at the moment"
        return {"num_updates": self.num_updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        """Copies a saved state in.

        Raises: CheckpointError if names or shapes differ from the tracked parameters.
        """
        missing = self.shadow.keys() ^ state["shadow"].keys()
        if missing:
            raise CheckpointError(
                f"moving average: parameters {sorted(missing)[:5]} are not in both model and checkpoint."
            )
        for name, shadow in self.shadow.items():
            saved = state["shadow"][name]
            if saved.shape != shadow.shape:
                raise CheckpointError(
                    f"moving average of {name}: shape {tuple(saved.shape)}, not {tuple(shadow.shape)}."
                )
            shadow.copy_(saved)
        self.num_updates = int(state["num_updates"])
