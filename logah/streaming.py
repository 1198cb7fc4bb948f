"""Predictions of networks larger than memory: planned without numbers, decoded tensor by tensor, written as they come.

The network is built on ``meta`` and traced; every parameter that the graph covers is decoded at its exact size, a block
of rows at a time where it is a matrix given by factors, brought to its type and handed to a sink. What no node covers
and every buffer is built on the CPU from a seeded generator. ``logah.prediction`` fills modules in place with the same
bits (at one number of threads: a product's last bit may depend on how many share it).

Source: LoGAH (arXiv 2405.16287) for the prediction; the statistics of a tensor come from its factors in closed form.
"""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import ConfigError
from common.folders import write_folder
from common.seeding import generator
from logah.architecture_graphs import trace_architecture
from logah.architectures import Architecture
from logah.assignment import TargetPlan, plan_targets
from logah.decoding import prepare
from logah.hypernetwork import HyperNetwork
from logah.model_config import HyperNetworkConfig
from logah.net_graph import NetGraph
from logah.postprocess import (
    changed_weights,
    count_layers,
    fresh_residual,
    is_residual_weight,
    noisy,
    orthogonal,
    standard_noise,
)
from logah.prediction_folder import SHARD_BYTES, check_out, describe_folder, stored_tensors
from logah.row_chunks import FactoredMatrix
from logah.sequential_decoding import decode_each
from logah.shard_writer import PlannedTensor, ShardWriter, Sink, plan_shards
from logah.skeleton import build_skeleton

MOST_NAMES = 5  # in messages

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a prediction is made and stored."""

    dtype: torch.dtype = torch.float32  # of the floating-point numbers in the files; they are decoded in float32
    max_shard_bytes: int = SHARD_BYTES
    seed: int = 0  # of what is not predicted, and of whatever is drawn afterwards
    strict: bool = False  # refuse a network of which something is not predicted
    predict_class_layers: bool = True
    reinit_residual: bool = False  # c_proj, o_proj: N(0, 0.02^2 / 2 blocks) instead of the prediction
    orthogonalise: bool = False
    noise: float = 0.0  # share of the spread between rows


@dataclass(frozen=True)
class PredictionPlan:
    """Everything about a prediction except its numbers.

    Attributes:
        skeleton: the network; predicted parameters on ``meta``, all others real.
        tensors: what is stored, in the order of the network's state.
        tied: further names of stored tensors.
        seconds: it took to build and trace.
    """

    architecture: Architecture
    graph: NetGraph
    targets: TargetPlan
    skeleton: nn.Module
    tensors: tuple[PlannedTensor, ...]
    tied: Mapping[str, str]
    seconds: float

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass
class StreamReport:
    """What came of it.

    Attributes:
        predicted: stored name -> role in the decoder.
        kept: parameters that no node covers: initial values of the network's library.
        buffers: stored buffers, likewise.
        drawn: parameters replaced by ``reinit_residual``.
        seconds: ``plan``, ``decode`` and ``write`` (without the wait for the disk).
    """

    architecture: Architecture
    predicted: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    num_parameters: int = 0
    num_bytes: int = 0
    num_nodes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how much, how long, what is not predicted."""
        total = len(self.predicted) + len(self.kept) + len(self.drawn)
        text = (
            f"{self.num_parameters:,} parameters in {total} tensors, {len(self.predicted)} of them predicted from "
            f"{self.num_nodes} nodes, {self.num_bytes / 1e9:.2f} GB; "
            + ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        )
        return text + (f"; not predicted: {shorten(self.kept)}" if self.kept else "")

    def to_json(self) -> dict[str, Any]:
        """Contents for ``prediction.json``."""
        facts = {name: value for name, value in vars(self).items() if name != "architecture"}
        return facts | {"seconds": {name: round(value, 3) for name, value in self.seconds.items()}}


def plan_prediction(
    config: HyperNetworkConfig, architecture: Architecture, options: StreamOptions | None = None
) -> PredictionPlan:
    """Builds the network without numbers, traces it as the hypernetwork wants, and decides what is decoded and stored.

    Raises: ConfigError for a network that cannot be built or traced, or of which something is not predicted although
        ``strict`` asks for all of it.
    """
    options = options or StreamOptions()
    began = time.perf_counter()
    bare = architecture.build_meta()
    graph = trace_architecture(
        architecture,
        bare,
        variant=config.variant,
        version=config.graph_version,
        attention=config.attention,
        ve_cutoff=config.ve_cutoff,
    )
    targets = plan_targets(graph, bare, predict_class_layers=options.predict_class_layers)
    if options.strict and targets.uncovered:
        raise ConfigError(
            f"strict=true, but no node of {architecture}'s graph gives {shorten(targets.uncovered)}; with strict=false "
            "they keep their initial values."
        )
    skeleton = build_skeleton(architecture.build, targets.covered, seed=options.seed)
    tensors, tied = stored_tensors(skeleton, options.dtype)
    return PredictionPlan(architecture, graph, targets, skeleton, tuple(tensors), tied, time.perf_counter() - began)


@torch.no_grad()
def stream_prediction(
    hypernetwork: HyperNetwork,
    plan: PredictionPlan,
    sink: Sink,
    options: StreamOptions | None = None,
    *,
    progress: bool = False,
) -> StreamReport:
    """Decodes what ``plan`` lists into ``sink``; the factors of a few tensors and a block of rows are all that is held.

    Raises: ConfigError before the first tensor if the hypernetwork cannot decode one of them.
    """
    options = options or StreamOptions()
    began = time.perf_counter()
    timed = _TimedSink(sink)
    stored = {tensor.name: tensor for tensor in plan.tensors}
    by_name = {name: target for target in plan.targets.targets for name in target.names}
    start = prepare(hypernetwork, hypernetwork.embed_graphs([plan.graph])[0])
    finish = _Finish(plan, options)
    report = StreamReport(plan.architecture, num_bytes=plan.num_bytes, num_nodes=len(plan.graph))
    report.num_parameters = sum(parameter.numel() for parameter in plan.skeleton.parameters())
    decoded = decode_each(hypernetwork, start, plan.targets, generator=generator(options.seed, "class token"))
    total = len(plan.targets.targets)
    hidden = None if progress else True  # None: shown on a terminal only
    for target, value in tqdm(decoded, total=total, unit="tensor", disable=hidden, leave=False):
        tensor = next(stored[name] for name in target.names if name in stored)
        if finish.replaces(tensor.name):
            timed.write(tensor.name, finish.replacement(tensor).to(tensor.dtype))
        else:
            _write(timed, tensor, value, finish)
    _write_kept(timed, plan, stored.keys() - by_name.keys(), report)
    for tensor in plan.tensors:
        if tensor.name in by_name and finish.replaces(tensor.name):
            report.drawn += (tensor.name,)
        elif tensor.name in by_name:
            report.predicted[tensor.name] = by_name[tensor.name].role
    seconds = time.perf_counter() - began
    report.seconds = {"plan": plan.seconds, "decode": seconds - timed.seconds, "write": timed.seconds}
    return report


def predict_to_folder(
    hypernetwork: HyperNetwork,
    architecture: Architecture,
    out: Path | str,
    options: StreamOptions | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> StreamReport:
    """Streams the weights of ``architecture`` into the folder ``out``, which appears whole or not at all.

    Args:
        metadata: what else ``prediction.json`` should say.

    Raises: CheckpointError if something is there already or the disk is full; ConfigError as the functions above.
    """
    options, out = options or StreamOptions(), Path(out)
    check_out(out, overwrite)
    plan = plan_prediction(hypernetwork.config, architecture, options)
    if plan.targets.uncovered:
        logger.warning("not predicted, initial values kept: %s", shorten(plan.targets.uncovered))
    found: list[StreamReport] = []

    def write(target: Path) -> None:
        with ShardWriter(target, plan_shards(plan.tensors, options.max_shard_bytes), plan.tied) as writer:
            report = stream_prediction(hypernetwork, plan, writer, options, progress=progress)
            began = time.perf_counter()
            writer.finish()
        report.seconds["wait for the disk"] = time.perf_counter() - began
        about = {"seed": options.seed, "options": _plain(options), **(metadata or {}), **report.to_json()}
        describe_folder(target, architecture, plan.skeleton, options.dtype, about)
        found.append(report)

    write_folder(out, write)
    return found[0]


def shorten(names: "tuple[str, ...] | list[str]") -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _write(sink: Sink, tensor: PlannedTensor, value: FactoredMatrix | Tensor, finish: "_Finish") -> None:
    """Writes one predicted tensor, in blocks of rows where it has factors and nothing needs the whole."""
    if isinstance(value, FactoredMatrix):
        if not finish.needs_whole(tensor.name):
            for places, block in value.blocks(tensor.dtype):
                for row in places:
                    sink.write(tensor.name, block[: tensor.shape[0] - row], row)
            return
        value = value.materialise()
    sink.write(tensor.name, finish.changed(tensor.name, value).to(tensor.dtype))


def _write_kept(sink: Sink, plan: PredictionPlan, names: Collection[str], report: StreamReport) -> None:
    """Writes what is not predicted, and lists it."""
    state = plan.skeleton.state_dict()
    parameters = {name for name, _ in plan.skeleton.named_parameters(remove_duplicate=False)}
    for tensor in plan.tensors:
        if tensor.name in names:
            sink.write(tensor.name, state[tensor.name].to(tensor.dtype))
            if tensor.name in parameters:
                report.kept += (tensor.name,)
            else:
                report.buffers += (tensor.name,)


class _Finish:
    """What is done to tensors after decoding, one by one; the generators are named after the tensors."""

    def __init__(self, plan: PredictionPlan, options: StreamOptions) -> None:
        self.options = options
        names = [name for name, _ in plan.skeleton.named_parameters()]
        self._num_layers = count_layers(names)
        self._replaced = {name for name in names if options.reinit_residual and is_residual_weight(name)}
        change = options.noise > 0 or options.orthogonalise
        self._changed = changed_weights(plan.skeleton).keys() if change else set()
        if options.reinit_residual and not self._replaced:
            raise ConfigError(
                f"reinit_residual=true, but {plan.architecture} has no weight that ends a residual branch by its name; "
                "leave the option out."
            )

    def replaces(self, name: str) -> bool:
        """Whether fresh numbers stand in for the prediction."""
        return name in self._replaced

    def replacement(self, tensor: PlannedTensor) -> Tensor:
        """Numbers of GPT-2's initialisation."""
        like = torch.empty(tensor.shape)
        return self.changed(tensor.name, fresh_residual(tensor.name, like, self._num_layers, seed=self.options.seed))

    def needs_whole(self, name: str) -> bool:
        """Whether the tensor must be there as a whole before it is written."""
        return name in self._changed

    def changed(self, name: str, value: Tensor) -> Tensor:
        """``value`` with noise, then made orthogonal, where that is asked for."""
        if name in self._changed and self.options.noise:
            value = noisy(value, standard_noise(name, value, seed=self.options.seed), self.options.noise)
        if name in self._changed and self.options.orthogonalise:
            value = orthogonal(value)
        return value


class _TimedSink:
    """A sink that knows how long writing took."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.seconds = sink, 0.0

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        began = time.perf_counter()
        self.sink.write(name, value, start)
        self.seconds += time.perf_counter() - began


def _plain(options: StreamOptions) -> dict[str, Any]:
    return asdict(options) | {"dtype": str(options.dtype).removeprefix("torch.")}
