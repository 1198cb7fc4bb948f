"""Unconditional samples under a judge: generative perplexity beside entropy and distinct n-grams.

A low perplexity alone rewards repetition, so all are reported together. The judge reads the samples' text in its own
tokens. Source: specification 6.3.

Dimensions: B samples of a group, L positions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from common.config import require_at_least
from common.data.tokenizer import load_tokenizer
from common.diffusion.categorical import TokenDraw
from common.errors import DataError
from common.evaluation.diversity import diversity
from common.evaluation.generative_perplexity import (
    DEFAULT_SCORER,
    GenerativePerplexity,
    load_scorer,
    score,
)
from diffullama.sampler import SamplerOptions, fill
from diffullama.tasks.context import Context, Outcome, by_item


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Samples of ``gen_ppl``; the defaults are those of the released quick start.

    Attributes:
        count: samples.
        length: tokens of each, after the beginning-of-text token; null: 128, or the model's limit if that is less.
        order, steps: see ``sampler.SamplerOptions``.
        temperature, top_p: of the draws, also of the autoregressive parent's.
        judge: causal language model, local folder or hub name.
    """

    count: int = 64
    length: int | None = None
    order: str = "random"
    steps: int | None = 64
    temperature: float = 0.95
    top_p: float = 0.9
    judge: str = DEFAULT_SCORER

    def __post_init__(self) -> None:
        require_at_least("gen_ppl.count", self.count, 1)
        if self.length is not None:
            require_at_least("gen_ppl.length", self.length, 1)
        self.sampler()

    def draw(self) -> TokenDraw:
        """How tokens are drawn."""
        if self.top_p == 1 or self.temperature == 0:
            return TokenDraw(temperature=self.temperature)
        return TokenDraw(strategy="top_p", para=self.top_p, temperature=self.temperature)

    def sampler(self) -> SamplerOptions:
        """Options of ``fill``."""
        return SamplerOptions(order=self.order, steps=self.steps, draw=self.draw())


class SampleEvaluation:
    """Samples and their judge's losses; an ``Evaluation``."""

    def __init__(self, context: Context, options: SampleOptions, limit: int | None) -> None:
        self.context, self.options = context, options
        self.count = options.count if limit is None else min(limit, options.count)
        self.beginning = context.leading or [context.beginning]
        self.length = options.length or min(128, context.max_length - len(self.beginning))
        self.judge = load_scorer(options.judge, context.model.device)
        self.judge_tokenizer = load_tokenizer(options.judge)
        self.settings = {**asdict(options), "count": None, "length": self.length}

    @property
    def num_groups(self) -> int:
        return math.ceil(self.count / self.context.group_size)

    def run(self, group: int) -> dict[str, Any]:
        size = self.context.group_size
        numbers = list(range(group * size, min((group + 1) * size, self.count)))
        tokens, calls = self._sample(numbers)
        texts = [self.context.decode(ids) for ids in tokens]
        judged = [self.judge_tokenizer.encode(text)[: self.judge.max_length] for text in texts]
        scorable = [place for place, ids in enumerate(judged) if len(ids) > 1]  # the first token is not scored
        batch = self.context.batch_size
        nll = score(self.judge, [judged[place] for place in scorable], batch_size=batch)
        nats = {place: nll[index] for index, place in enumerate(scorable)}
        return {
            "items": [
                {
                    "item": number,
                    "text": text,
                    "tokens": ids,
                    "nats": nats.get(place),
                    "judge_tokens": max(0, len(judged[place]) - 1),
                    "calls": calls[place],
                }
                for place, (number, text, ids) in enumerate(zip(numbers, texts, tokens, strict=True))
            ]
        }

    def _sample(self, numbers: list[int]) -> tuple[list[list[int]], list[int]]:
        context, given = self.context, len(self.beginning)
        prefixes = [self.beginning] * len(numbers)
        if context.causal:
            drawn = {"draw": self.options.draw(), "seed": context.seed, "rows": numbers}
            return context.continue_causally(prefixes, self.length, **drawn), [self.length] * len(numbers)
        prefix_BL = torch.tensor(prefixes, device=context.model.device)
        x_BL = torch.nn.functional.pad(prefix_BL, (0, self.length), value=context.model.mask_id)
        given_BL = torch.zeros_like(x_BL, dtype=torch.bool)
        given_BL[:, :given] = True
        result = fill(
            context.model,
            x_BL,
            given_BL,
            seed=context.seed,
            rows=numbers,
            max_rows=context.batch_size,
            order=self.options.order,
            steps=self.options.steps,
            draw=self.options.draw(),
        )
        return result.tokens_BL[:, given:].tolist(), [int(count) for count in result.calls_B]

    def summary(self, records: Sequence[Mapping[str, Any]]) -> Outcome:
        items = by_item(records)
        scored = [item for item in items if item["nats"] is not None]
        if not scored:
            raise DataError(f"gen_ppl: the judge {self.judge.name} reads fewer than two tokens in every sample.")
        found = GenerativePerplexity([i["nats"] for i in scored], [i["judge_tokens"] for i in scored])
        metrics = [*found.metrics(), *diversity([item["tokens"] for item in items])]
        facts = {
            "samples": len(items),
            "unscored": len(items) - len(scored),
            "tokens": sum(len(item["tokens"]) for item in items),
            "network_rows": sum(item["calls"] for item in items),
        }
        shown = [{name: value for name, value in item.items() if name != "tokens"} for item in items]
        return Outcome(metrics, shown, facts, [f"judge: {self.judge.name}; read perplexity beside the entropy"])
