"""Where training starts from: random weights, a prediction, or another initialisation, all for the same network.

A start is written ``KIND``, ``KIND:SOURCE`` or ``LABEL@KIND:SOURCE``:

    random                       the library's own initialisation
    hypernetwork:CHECKPOINT      predicted now (LoGAH or GHN-3: a folder, a training run, released weights)
    prediction:DIR               weights in a folder: of logah.predict, of an earlier training, of transformers
    mimetic                      attention weights made to look like those of trained transformers
    subclone:DIR                 cut out of the larger trained network in DIR

Sources: mimetic: Trockman and Kolter, 2023; weight subcloning: Samragh et al., 2023.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import sha256
from common.config import require_choice
from common.errors import CheckpointError, ConfigError
from common.seeding import derive_seed
from logah.architecture_graphs import trace_architecture
from logah.architectures import Architecture
from logah.checkpoints import Loaded, load_hypernetwork
from logah.model_config import HyperNetworkConfig
from logah.net_graph import NetGraph
from logah.postprocess import break_symmetry, count_layers, reinitialise_residual
from logah.prediction_folder import read_state

KINDS = {"random": False, "hypernetwork": True, "prediction": True, "mimetic": False, "subclone": True}
"""Kind -> whether it needs a source."""

EXPORT_FOLDER = "export"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth")
HYPERNETWORK_OPTIONS = (
    "attention", "graph_version", "ve_cutoff", "variant", "normalisation", "residual_scale", "initializer_range",
    "heads", "max_shape",
)  # fmt: skip
PREDICTED = ("hypernetwork", "prediction")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """One initialisation: the name it has in tables, what it is, and its file or folder."""

    label: str
    kind: str
    source: str | None = None


def parse_start(text: str) -> Start:
    """``LABEL@KIND:SOURCE``, the label and, for some kinds, the source left out.

    Raises: ConfigError for an unknown kind, a missing or a superfluous source.
    """
    label, at, described = text.rpartition("@") if text.split(":")[0].count("@") else ("", "", text)
    kind, _, source = described.partition(":")
    if kind not in KINDS:
        known = ", ".join(name + (":PATH" if needs else "") for name, needs in KINDS.items())
        raise ConfigError(
            f"inits: {text!r} starts from {kind!r}, which is not known; choose one of {known}, with LABEL@ before it "
            "if you like."
        )
    if KINDS[kind] != bool(source):
        remedy = f"{kind}:PATH" if KINDS[kind] else kind
        raise ConfigError(f"inits: {text!r} {'lacks a path' if KINDS[kind] else 'takes no path'}; write {remedy}.")
    if at and (not label or "/" in label):
        raise ConfigError(f"inits: {text!r} has a label {label!r}; it must be a word, it names a folder.")
    return Start(label or kind, kind, source or None)


def parse_starts(texts: Sequence[str]) -> tuple[Start, ...]:
    """All starts of a comparison; those of one kind without a label are told apart by their source's name.

    Raises: ConfigError for none, or two with one label.
    """
    starts = [parse_start(text) for text in texts]
    if not starts:
        raise ConfigError("inits is empty; give at least one, for example inits=[random,hypernetwork:runs/logah].")
    counts = Counter(start.label for start in starts)
    named = [
        Start(f"{start.kind}-{Path(start.source).name}", start.kind, start.source)
        if counts[start.label] > 1 and start.source and start.label == start.kind
        else start
        for start in starts
    ]
    (label, count), *_ = Counter(start.label for start in named).most_common(1)
    if count > 1:
        raise ConfigError(f"inits: {count} starts are called {label!r}; give each its own LABEL@.")
    return tuple(named)


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """Options ``start.*``: how predicted weights are used."""

    # false: the class head keeps its random values (data with other classes than the prediction's)
    predict_class_layers: bool = True
    reinit_residual: bool = (
        False  # GPT-2, Llama: output projections drawn anew from N(0, 0.02^2 / 2 layers), as released
    )
    noise: float = 0.0  # breaks symmetries between rows: share of their spread; 1e-5 is usual for GHN-3
    orthogonalise: bool = False  # matrices made orthogonal before the noise
    class_token_noise: float | None = None  # deviation of the class token's position; null: the checkpoint's
    # what files of reference implementations do not say of their hypernetwork, e.g. {attention: as_is, ve_cutoff: 50}
    hypernetwork: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.hypernetwork:
            require_choice("start.hypernetwork", name, HYPERNETWORK_OPTIONS)
        for name in ("noise", "class_token_noise"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"start.{name}={value} is a deviation and must be at least 0.")


@dataclass
class Started:
    """A network with its initial weights, and what is to be said about them (kept with the results)."""

    network: nn.Module
    facts: dict[str, Any] = field(default_factory=dict)


def random_network(architecture: Architecture, seed: int) -> nn.Module:
    """The network as its library initialises it; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "target init"))
        return architecture.build(attention="sdpa") if architecture.kind == "lm" else architecture.build()


class Starter:
    """Makes networks with the weights of a start; hypernetworks are read once.

    Args:
        architecture: of all of them.
        options: applied to predicted weights; random ones and other initialisations stay as they are.
        hypernetworks: where those that were read are kept, to share them with other networks.
    """

    def __init__(
        self,
        architecture: Architecture,
        options: StartOptions | None = None,
        *,
        hypernetworks: dict[str, Loaded] | None = None,
    ) -> None:
        self.architecture, self.options = architecture, options or StartOptions()
        self._hypernetworks = {} if hypernetworks is None else hypernetworks

    def make(self, start: Start, seed: int) -> Started:
        """A network on the CPU; whatever its start leaves open is random, decided by ``seed``.

        Raises: CheckpointError, ConfigError or DataError for a source that does not fit the network.
        """
        network = random_network(self.architecture, seed)
        facts = getattr(self, f"_{start.kind}")(network, start.source, seed)
        if start.kind in PREDICTED:
            facts |= self._finish(network, seed)
        return Started(network, facts)

    # ------------------------------------------------------------------------------------------------- the kinds

    def _random(self, network: nn.Module, source: str | None, seed: int) -> dict[str, Any]:
        return {}

    def _mimetic(self, network: nn.Module, source: str | None, seed: int) -> dict[str, Any]:
        from logah.initialisations import mimetic_init

        mimetic_init(network, seed=seed)
        return {}

    def _subclone(self, network: nn.Module, source: str, seed: int) -> dict[str, Any]:
        from logah.initialisations import subclone
        from logah.prediction_folder import load_prediction

        subclone(network, load_prediction(weights_folder(source)))
        return {"source": source}

    def _prediction(self, network: nn.Module, source: str, seed: int) -> dict[str, Any]:
        kept = load_weights_of(network, source, keep_class_layers=not self.options.predict_class_layers)
        return {"source": source, "kept_random": kept}

    def _hypernetwork(self, network: nn.Module, source: str, seed: int) -> dict[str, Any]:
        from logah.prediction import fill

        loaded = self.loaded(source)
        began = time.perf_counter()
        report = fill(
            loaded.model,
            network,
            graph=graph_for(loaded.config, self.architecture),
            predict_class_layers=self.options.predict_class_layers,
            class_token_seed=seed,
        )
        return {
            "source": source,
            "digest": loaded.digest,
            "predicted": len(report.predicted),
            "uncovered": list(report.kept),
            "prediction_seconds": round(time.perf_counter() - began, 3),
        }

    def loaded(self, source: str) -> Loaded:
        """The hypernetwork in ``source``."""
        if source not in self._hypernetworks:
            noise = self.options.class_token_noise
            options = {"class_token_noise": noise, **self.options.hypernetwork}
            self._hypernetworks[source] = load_hypernetwork(source, **options)
        return self._hypernetworks[source]

    def _finish(self, network: nn.Module, seed: int) -> dict[str, Any]:
        options, facts = self.options, {}
        if options.reinit_residual:
            layers = count_layers(name for name, _ in network.named_parameters())
            changed = reinitialise_residual(network, layers, seed=seed) if layers else []
            if not changed:
                raise ConfigError(f"start.reinit_residual: {self.architecture} has no output projections that we know.")
            logger.info("start.reinit_residual: %d output projections of %d layers drawn anew", len(changed), layers)
            facts["reinit_residual"] = len(changed)
        if options.noise or options.orthogonalise:
            changed = break_symmetry(network, options.noise, seed=seed, orthogonalise=options.orthogonalise)
            facts |= {"noise": options.noise, "orthogonalised": options.orthogonalise, "changed": len(changed)}
        return facts


def graph_for(config: HyperNetworkConfig, architecture: Architecture) -> NetGraph:
    """The graph of a network, traced as the hypernetwork was trained."""
    return trace_architecture(
        architecture,
        variant=config.variant,
        attention=config.attention,
        version=config.graph_version,
        ve_cutoff=config.ve_cutoff,
    )


# ------------------------------------------------------------------------------------------------- weights of files


def load_weights_of(network: nn.Module, folder: str, *, keep_class_layers: bool = False) -> list[str]:
    """Copies the weights in ``folder`` into ``network``.

    Args:
        keep_class_layers: leave tensors of the network alone whose first dimension (the classes) is another.

    Returns: names that kept their values.

    Raises: CheckpointError for missing, superfluous or wrongly shaped tensors, naming the first ones.
    """
    saved, own = read_state(weights_folder(folder)), network.state_dict()
    tied = tied_names(network)
    missing = [name for name in own if name not in saved and not tied.get(name, set()) & saved.keys()]
    # running statistics are no part of a prediction that was never run
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    unknown = [name for name in saved if name not in own]
    if missing or unknown:
        shown = ", ".join((missing or unknown)[:5])
        what = "lacks" if missing else "has unknown"
        raise CheckpointError(f"prediction:{folder} {what} tensors: {shown}; it is not of this target.")
    kept = []
    with torch.no_grad():
        for name, value in saved.items():
            if value.shape == own[name].shape:
                own[name].copy_(value)
            elif keep_class_layers and value.shape[1:] == own[name].shape[1:]:
                kept.append(name)
            else:
                raise CheckpointError(_wrong_shape(folder, name, value, own[name]))
    return kept


def weights_folder(folder: str) -> Path:
    """The folder itself, or the ``export`` of a training run."""
    path = Path(folder)
    return path / EXPORT_FOLDER if (path / EXPORT_FOLDER).is_dir() else path


def file_facts(source: str | None) -> list[str]:
    """What tells the weights in ``source`` from others: digests, or of files above 256 MB when they were written."""
    if source is None or not Path(source).exists():
        return []
    path = weights_folder(source)
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in WEIGHT_SUFFIXES)
    small = (file.stat().st_size < 2**28 for file in files)
    return [sha256(file) if is_small else str(file.stat().st_mtime_ns) for file, is_small in zip(files, small)]


def _wrong_shape(folder: str, name: str, value: Tensor, wanted: Tensor) -> str:
    hint = (
        "; start.predict_class_layers=false keeps the network's own class head"
        if value.shape[1:] == wanted.shape[1:]
        else ""
    )
    return f"prediction:{folder}: {name} has shape {tuple(value.shape)}, the target needs {tuple(wanted.shape)}{hint}."


def tied_names(network: nn.Module) -> dict[str, set[str]]:
    """Name of every parameter -> the other names of the same tensor."""
    groups: dict[int, set[str]] = {}
    for name, value in network.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), set()).add(name)
    return {name: group - {name} for group in groups.values() for name in group}
