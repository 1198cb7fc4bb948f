"""One look at every network of an evaluation: its answers on the test samples and its values, read once.

A network that cannot be tested does not end the evaluation: the reason becomes its error, and it is left out of the
summaries.

Dimensions: K networks of a group, N test samples, V compared values.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import ConfigError
from rpg.adapters import read_adapter_config
from rpg.baselines import State
from rpg.candidates import Groups, Network
from rpg.checkpoint_files import write_checkpoint
from rpg.predictions import Prediction, PredictionCache, predict
from rpg.similarity import ValueSample
from rpg.testing import Tester

logger = logging.getLogger(__name__)


@dataclass
class Examined:
    """A group of networks and what was found about each, in their order.

    Attributes:
        predictions: None for each network that was not or could not be tested, or only by a program.
        accuracy: None where unknown.
        loss: from test programs; None otherwise.
        error: why a test failed; None if it did not.
        finite: whether all values are finite numbers.
        values_KV: see ``ValueSample``.
    """

    networks: list[Network]
    values_KV: Tensor
    predictions: list[Prediction | None] = field(default_factory=list)
    accuracy: list[float | None] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    error: list[str | None] = field(default_factory=list)
    finite: list[bool] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [network.name for network in self.networks]

    def tested(self) -> list[int]:
        """Places of the networks whose accuracy is known."""
        return [place for place, accuracy in enumerate(self.accuracy) if accuracy is not None]


def examine(
    groups: Groups, tester: Tester, cache: PredictionCache, *, memory_bytes: int, seed: int, progress: bool = True
) -> tuple[dict[str, Examined], ValueSample]:
    """Reads or makes every network once.

    Raises: DataError if networks have different tensors, with the name of the first that differs.
    """
    count = sum(len(networks) for networks in groups.values())
    first = next(iter(groups.values()))[0].load()
    sample = ValueSample(first, count, memory_bytes=memory_bytes, seed=seed)
    template = next((network.path for networks in groups.values() for network in networks if network.path), None)
    found: dict[str, Examined] = {}
    with (
        tqdm(total=count, unit="network", disable=None if progress else True, leave=False) as bar,
        tempfile.TemporaryDirectory(prefix="rpg-evaluate-") as scratch,
    ):
        for name, networks in groups.items():
            bar.set_description(name)
            group = Examined(list(networks), torch.empty(len(networks), sample.num_sampled))
            for place, network in enumerate(networks):
                state = network.load()
                group.values_KV[place] = sample.values(state, f"{name}: {network.name}")
                group.finite.append(bool(group.values_KV[place].isfinite().all()))
                _test(group, network, state, tester, cache, Path(scratch), template)
                bar.update()
            found[name] = group
    _warn(found)
    return found, sample


def _test(
    group: Examined,
    network: Network,
    state: State,
    tester: Tester,
    cache: PredictionCache,
    scratch: Path,
    template: Path | None,
) -> None:
    """Appends one network's test to its group.

    Args:
        template: file or adapter folder of any network, after which those without one are written for test programs.
    """
    prediction = accuracy = loss = error = None
    if tester.has_predictions:
        try:
            prediction = predict(tester, cache, state, task=network.task)
            accuracy = prediction.accuracy
        except Exception as problem:  # whatever a user's tester raises is a result, and the next network is tested
            lines = str(problem).strip().splitlines() or ["no message"]
            error = f"{type(problem).__name__}: {lines[0]}"
    elif tester.kind != "none":
        result = tester.test(network.path or _write(state, scratch, network, template))
        accuracy, loss, error = result.accuracy, result.loss, result.error
    group.predictions.append(prediction)
    group.accuracy.append(accuracy)
    group.loss.append(loss)
    group.error.append(error)


def _write(state: Mapping[str, Tensor], scratch: Path, network: Network, template: Path | None) -> Path:
    """A file for a test program; its name tells the task, as those of generated networks do."""
    name = "network" if network.task is None else f"network_class{network.task:04d}"
    if template is not None and template.is_dir():
        return write_checkpoint(
            scratch / name, state, "peft", overwrite=True, adapter_config=read_adapter_config(template)
        )
    suffix = ".safetensors" if template is not None and template.suffix == ".safetensors" else ".pth"
    return write_checkpoint(scratch / f"{name}{suffix}", state, overwrite=True)


def _warn(groups: Mapping[str, Examined]) -> None:
    """One line about failed tests and one about values that are no numbers."""
    for name, group in groups.items():
        failed = [place for place, error in enumerate(group.error) if error is not None]
        if failed:
            logger.warning(
                "%s: %d of %d networks could not be tested; the first is %s: %s",
                name,
                len(failed),
                len(group.error),
                group.networks[failed[0]].name,
                group.error[failed[0]],
            )
        broken = group.finite.count(False)
        if broken:
            logger.warning("%s: %d of %d networks hold values that are not finite.", name, broken, len(group.finite))


def require_some_tested(groups: Mapping[str, Examined], tester: Tester) -> None:
    """Raises ConfigError if a tester was given and every test failed, with the first reason."""
    errors = [error for group in groups.values() for error in group.error]
    if tester.kind != "none" and errors and all(error is not None for error in errors):
        raise ConfigError(
            f"tester.kind={tester.kind}: none of the {len(errors)} networks could be tested ({errors[0]}); check "
            "tester.target, tester.options or tester.command."
        )


def places_with_predictions(group: Examined) -> Sequence[int]:
    """Places of the networks whose answers are known."""
    return [place for place, prediction in enumerate(group.predictions) if prediction is not None]
