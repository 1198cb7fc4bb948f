"""A target network with the outputs that the data need: as many classes, or the tokens of their vocabulary."""

import logging
from dataclasses import replace
from typing import Any, Protocol

from common.errors import ConfigError, DataError
from logah.architectures import Architecture

logger = logging.getLogger(__name__)


class DataFacts(Protocol):
    """What is asked of ``logah.data.TrainingData``."""

    kind: str
    num_classes: int | None
    vocab_size: int | None
    block_size: int | None


def require_kind(architecture: Architecture, data: DataFacts) -> None:
    """Raises ConfigError if a language model meets images or an image classifier text."""
    if architecture.kind != data.kind:
        raise ConfigError(
            f"target={architecture} is a {'language model' if architecture.kind == 'lm' else 'classifier of images'}, "
            f"data.kind={data.kind}; choose data=... of the other kind."
        )


def match_data(architecture: Architecture, data: DataFacts, *, enabled: bool = True) -> Architecture:
    """``architecture`` with the data's number of classes, or with their vocabulary if its own is smaller.

    A larger vocabulary stays: GPT-2's is complete although a short text does not use it all. A text in another
    tokenizer of fewer tokens is told by ``match_data=false`` or by a target that names its ``vocab_size``.

    Args:
        enabled: False: nothing is changed, and what does not fit is refused.

    Raises: ConfigError or DataError.
    """
    require_kind(architecture, data)
    if data.kind == "vision":
        if architecture.num_classes in (None, data.num_classes):
            return architecture
        if not enabled:
            raise ConfigError(
                f"target={architecture} tells {architecture.num_classes} classes apart, the data have "
                f"{data.num_classes}; use match_data=true, or name the classes: NAME?num_classes:{data.num_classes}."
            )
        return _told(_with_classes(architecture, data.num_classes), f"{data.num_classes} classes")
    matched = architecture
    if matched.vocab_size is not None and matched.vocab_size < data.vocab_size:
        matched = _require_enabled(matched, "vocabulary", matched.vocab_size, data.vocab_size, enabled)
        matched = _told(_with_vocabulary(matched, data.vocab_size), f"a vocabulary of {data.vocab_size} tokens")
    if matched.block_size is not None and data.block_size is not None and matched.block_size < data.block_size:
        raise DataError(
            f"data.block_size={data.block_size} exceeds the context of {matched.block_size} tokens of "
            f"target={architecture}; use data.block_size={matched.block_size} or less."
        )
    return matched


def _require_enabled(architecture: Architecture, what: str, own: int, needed: int, enabled: bool) -> Architecture:
    if not enabled:
        raise ConfigError(
            f"target={architecture} has a {what} of {own}, the data need {needed}; use match_data=true, or name it in "
            "the target."
        )
    return architecture


def _told(architecture: Architecture, what: str) -> Architecture:
    logger.info("target=%s: %s, for the data", architecture, what)
    return architecture


def _with_classes(architecture: Architecture, count: int) -> Architecture:
    if architecture.family == "hf":
        return _with_config(architecture, {"num_labels": count}, drop=("id2label", "label2id"))
    if architecture.family == "module":
        arguments = {**architecture.options.get("arguments", {}), "num_classes": count}
        return _with_options(architecture, {"arguments": arguments})
    return _with_options(architecture, {"num_classes": count})


def _with_vocabulary(architecture: Architecture, count: int) -> Architecture:
    if architecture.family == "hf":
        return _with_config(architecture, {"vocab_size": count})
    return _with_options(architecture, {"vocab_size": count}, drop=("bos_token_id", "eos_token_id"))


def _with_options(architecture: Architecture, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> Architecture:
    kept = {name: value for name, value in architecture.options.items() if name not in drop}
    return replace(architecture, options=kept | changes)


def _with_config(architecture: Architecture, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> Architecture:
    config = {name: value for name, value in architecture.options["config"].items() if name not in drop}
    return _with_options(architecture, {"config": config | changes})
