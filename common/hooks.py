"""What runs beside training: sampling, evaluation, anything that looks at the model every so many steps."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from common.plans import SHARDED_PARAMETERS
from common.precision import autocast_forward

if TYPE_CHECKING:
    from common.trainer import Run


class Hook(Protocol):
    """Called after every ``every_steps`` steps (and after the last one if it has a true ``at_end``), on every rank.

    Returned scalars are logged. Random numbers that it draws from torch's global generators do not disturb training.
    """

    every_steps: int

    def __call__(self, state: "TrainState") -> Mapping[str, float] | None: ...


class TrainState:
    """What a hook may see of a run."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self.step: int = run.step
        self.config, self.run_dir = run.config, run.run_dir
        self.parallel, self.device, self.is_main = run.parallel, run.parallel.device, run.parallel.is_main

    @contextlib.contextmanager
    def eval_model(self) -> Iterator[nn.Module]:
        """A whole model with averaged weights in eval mode, which each rank may call as often as it likes.

        All ranks must enter together. Under fsdp2 and zero3 it is a gathered copy, else the model itself.
        """
        run = self._run
        if run.config.parallel.plan not in SHARDED_PARAMETERS:
            with run.evaluating() as module:
                yield module
            return
        copy = run.task.build_model()
        with run.averaged():
            copy.load_state_dict(run.plan.full_state(everywhere=True))
        copy.to(self.device)
        autocast_forward(copy, run.precision, self.device)
        with torch.no_grad():
            yield copy.eval()
