"""From options to a folder of predicted weights: the hypernetwork, the target, the stream."""

import torch

from common.errors import ConfigError
from logah.architectures import resolve_target
from logah.checkpoints import load_hypernetwork
from logah.predict_config import PredictConfig
from logah.streaming import StreamReport, predict_to_folder


def run_prediction(config: PredictConfig) -> StreamReport:
    """Predicts what ``config`` asks for, into ``config.out``.

    Raises: ConfigError, CheckpointError or DataError for anything the user can repair; nothing is left behind then.
    """
    architecture = resolve_target(config.target)
    device = _device(config.device)
    loaded = load_hypernetwork(config.checkpoint, device, ema=config.ema, **config.overrides())
    metadata = {
        "target": config.target,
        "hypernetwork": {
            "digest": loaded.digest,
            "source": loaded.source,
            "model": vars(loaded.config),
            **{name: loaded.metadata[name] for name in ("name", "step", "seed") if name in loaded.metadata},
        },
    }
    return predict_to_folder(
        loaded.model,
        architecture,
        config.out,
        config.stream_options(),
        metadata=metadata,
        overwrite=config.overwrite,
        progress=config.progress,
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)  # a device that this machine lacks shows only when it is used
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name} cannot be used here ({error}); choose cpu or cuda.") from None
