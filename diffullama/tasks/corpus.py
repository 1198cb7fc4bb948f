"""Likelihood of running text: the bound per token and byte, the parent's perplexity, and losses of a hidden span.

The text is cut into blocks, each begun by a beginning-of-text token where the model needs one (a shifted model predicts
no first token), so that every token of the text is scored. Source: specification 6.4.

Dimensions: B blocks of a group, L positions.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.data.corpora import build_text_dataset
from common.errors import ConfigError
from common.evaluation.metric import Metric, mean_metric, perplexity_metric
from common.evaluation.perplexity import GROUP_SIZE, GroupEstimate, combine
from diffullama.nelbo import ESTIMATORS, SPAN_KINDS, Span, causal_nats, group_bound, span_nll
from diffullama.tasks.context import Context, Outcome, by_item


@dataclass(frozen=True, kw_only=True)
class BoundOptions:
    """Text and estimator of the tasks ``nelbo`` and ``infill_nll``.

    Attributes:
        text: a corpus's name, a path, or a data set on the hub, see ``common/data/corpora.py``.
        split: train, validation or test.
        length: tokens of a block, a beginning-of-text token included; null: 256, or the model's limit if that is less.
        estimator: ``count`` (less variance) or ``time``.
        draws: network rows per block.
        span: tokens of the hidden span of ``infill_nll``.
    """

    text: str = "embedded:topics"
    split: str = "test"
    length: int | None = None
    estimator: str = "count"
    draws: int = 32
    span: int = 8

    def __post_init__(self) -> None:
        require_choice("nelbo.estimator", self.estimator, ESTIMATORS)
        require_at_least("nelbo.draws", self.draws, 1)
        require_at_least("nelbo.span", self.span, 1)
        if self.length is not None:
            require_at_least("nelbo.length", self.length, 2)


@dataclass(frozen=True)
class Blocks:
    """Text as equally long blocks.

    Attributes:
        x_NL: ids; ``given`` of each block's first ones are no text.
        bytes_per_token: of the blocks' text, end-of-text tokens counted as tokens without bytes.
    """

    x_NL: Tensor
    given: int
    bytes_per_token: float

    @property
    def digest(self) -> str:
        """Changes with any id."""
        return hashlib.sha256(self.x_NL.numpy().tobytes()).hexdigest()[:16]


def text_blocks(context: Context, options: BoundOptions, limit: int | None) -> Blocks:
    """The first ``limit`` blocks of the text.

    Raises: ConfigError for a length beyond the model's; DataError for a text that is missing or shorter than one block.
    """
    length = options.length or min(256, context.max_length)
    if length > context.max_length:
        raise ConfigError(f"nelbo.length={length} exceeds max_length={context.max_length}; use fewer tokens.")
    needs_beginning = context.model.shift or context.causal or bool(context.leading)
    given = int(needs_beginning)
    dataset = build_text_dataset(
        options.text,
        options.split,
        length=length - given,
        tokenizer=context.tokenizer,
        cache_dir=context.cache_dir,
        progress=False,
    )
    count = len(dataset) if limit is None else min(limit, len(dataset))
    x_NL = dataset.fetch(list(range(count)))["tokens"]
    # the blocks are consecutive, so that at most one character is cut at the end
    text = context.decode(token for token in x_NL.flatten().tolist() if token != context.tokenizer.eos_id)
    bytes_per_token = len(text.encode("utf-8", errors="replace")) / x_NL.numel()
    if needs_beginning:
        x_NL = torch.nn.functional.pad(x_NL, (1, 0), value=context.beginning)
    return Blocks(x_NL, given, bytes_per_token)


class BoundEvaluation:
    """Bound (or in causal mode the exact likelihood) of a text; an ``Evaluation``."""

    def __init__(self, context: Context, options: BoundOptions, limit: int | None) -> None:
        self.context, self.options = context, options
        self.blocks = text_blocks(context, options, limit)
        self.settings: dict[str, Any] = {"blocks": self.blocks.digest}
        if not context.causal:
            self.settings |= {"estimator": options.estimator, "draws": options.draws}

    @property
    def num_groups(self) -> int:
        return math.ceil(len(self.blocks.x_NL) / GROUP_SIZE)

    def run(self, group: int) -> dict[str, Any]:
        context, options, first = self.context, self.options, group * GROUP_SIZE
        x_BL = self.blocks.x_NL[first : first + GROUP_SIZE]
        if context.causal:
            nats = causal_nats(context.model, x_BL, batch_size=context.batch_size)
            return asdict(GroupEstimate(nats, 0.0, len(x_BL)))
        estimate = group_bound(
            context.model,
            x_BL,
            first,
            estimator=options.estimator,
            draws=options.draws,
            seed=context.seed,
            batch_size=context.batch_size,
            given=self.blocks.given,
        )
        return asdict(estimate)

    def summary(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        scored = self.blocks.x_NL.shape[1] - self.blocks.given
        bound = combine([GroupEstimate(**record) for record in records], scored, is_exact=self.context.causal)
        nats = bound.nats_per_token
        per_byte = 1 / (math.log(2) * self.blocks.bytes_per_token)
        error = None if nats.standard_error is None else nats.standard_error * per_byte
        metrics = [
            nats,
            Metric("bits_per_byte", nats.value * per_byte, error),
            perplexity_metric("perplexity", nats),
            Metric("nats_per_token_over_blocks", nats.value, bound.sequence_error),
        ]
        values = [value / scored for record in records for value in record["nats"]]
        items = [{"item": number, "nats_per_token": value} for number, value in enumerate(values)]
        facts = {"blocks": bound.sequences, "tokens": bound.tokens, "network_rows": bound.rows}
        note = (
            "exact likelihood of the autoregressive parent"
            if self.context.causal
            else "upper bound; its standard error is that of the random masks, over_blocks that of the sample of text"
        )
        return Outcome(metrics, items, facts, [note])


class SpanEvaluation:
    """Losses of a hidden span in the middle of each block, with and without what follows it; an ``Evaluation``.

    Raises: ConfigError in causal mode, which never sees what follows.
    """

    def __init__(self, context: Context, options: BoundOptions, limit: int | None) -> None:
        if context.causal:
            raise ConfigError("tasks: infill_nll needs mode=diffusion; causal attention never sees what follows.")
        self.context = context
        self.blocks = text_blocks(context, options, limit)
        self.span = Span.middle(self.blocks.x_NL.shape[1], options.span)
        self.settings = {"blocks": self.blocks.digest, "span": asdict(self.span)}

    @property
    def num_groups(self) -> int:
        return math.ceil(len(self.blocks.x_NL) / GROUP_SIZE)

    def run(self, group: int) -> dict[str, Any]:
        first = group * GROUP_SIZE
        x_BL = self.blocks.x_NL[first : first + GROUP_SIZE]
        found = span_nll(self.context.model, x_BL, self.span, batch_size=self.context.batch_size)
        pairs = zip(found["with_suffix"], found["without_suffix"], strict=True)
        return {
            "items": [
                {"item": first + row, "with_suffix": with_it, "without_suffix": without}
                for row, (with_it, without) in enumerate(pairs)
            ]
        }

    def summary(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        items = by_item(records)
        metrics = [mean_metric(kind, [item[kind] for item in items]) for kind in SPAN_KINDS]
        gains = [item["without_suffix"] - item["with_suffix"] for item in items]
        metrics.append(mean_metric("gain_of_suffix", gains))
        return Outcome(metrics, items, {"blocks": len(items), "span": self.span.length}, ["nats per token of the span"])
