"""The hypernetwork from Python: load one, let it fill a network.

from logah.api import load, predict

hypernetwork = load("runs/digits")
report = predict(network, hypernetwork)      # any torchvision, timm or transformers network, in place
print(report.kept)                           # parameters that no node of its graph covers
"""

from pathlib import Path

import torch
from torch import nn

from logah.checkpoints import Loaded, load_hypernetwork
from logah.prediction import PredictionReport, fill, use_batch_statistics

__all__ = ["Loaded", "PredictionReport", "load", "predict", "use_batch_statistics"]


def load(path: Path | str, device: torch.device | str = "cpu", **options: object) -> Loaded:
    """The hypernetwork of a run, an exported folder or a released file; see ``checkpoints.load_hypernetwork``."""
    return load_hypernetwork(path, device, **options)


def predict(network: nn.Module, hypernetwork: Loaded | nn.Module | Path | str, **options: object) -> PredictionReport:
    """Fills ``network`` in place; tied parameters stay tied, what no node covers keeps its values.

    Args:
        hypernetwork: loaded, or where it is.
        options: of ``prediction.fill``: ``predict_class_layers=False`` keeps the class layer, ``strict=True`` refuses
            networks with parameters that are not covered, ``image_size`` is that of the input it is traced with.

    Raises: CheckpointError and ConfigError, before anything is written.
    """
    if isinstance(hypernetwork, str | Path):
        hypernetwork = load(hypernetwork)
    model = hypernetwork.model if isinstance(hypernetwork, Loaded) else hypernetwork
    return fill(model, network, **options)
