"""Perplexity of sampled sequences under a causal language model, by default GPT-2 large.

Token ids are scored as they are, without a beginning-of-text token, so the first token of a sequence is not scored and
the two models must share their vocabulary; ``retokenised`` goes through the text instead. Low values are no virtue by
themselves: repetitive text scores well, so read them beside the entropy (``common/evaluation/diversity.py``).

Dimensions: B sequences, L positions, V vocabulary of the scorer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import require_at_least
from common.errors import DataError
from common.evaluation.metric import Metric, mean_metric, perplexity_metric

DEFAULT_SCORER = "gpt2-large"
PADDING = -100  # targets that are not scored
_LOGITS_AT_ONCE = 1 << 26  # entries of float32 logits: 256 MB


@dataclass(frozen=True)
class Scorer:
    """A causal language model that scores.

    Attributes:
        model: maps ids to an output with ``logits``; in eval mode.
        name: for reports.
        vocab_size: ids from this on cannot be scored.
        max_length: longest sequence, in tokens.
    """

    model: nn.Module
    name: str
    vocab_size: int
    max_length: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_scorer(
    name: str = DEFAULT_SCORER, device: torch.device | str = "cpu", *, dtype: torch.dtype | str = torch.float32
) -> Scorer:
    """A causal language model of transformers from a local folder or the hub.

    Args:
        dtype: of its weights, as a torch dtype or its name.
    Raises: DataError if it cannot be loaded; the message says how to use a local folder.
    """
    from transformers import AutoModelForCausalLM  # takes seconds, and only this needs it

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    folder = Path(name).expanduser()
    is_local = folder.is_dir()
    if not is_local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"the scorer's folder {name!r} does not exist; give an existing folder or a hub name.")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder) if is_local else name, dtype=dtype, local_files_only=is_local
        )
    except Exception as error:  # offline, unknown name, damaged file: transformers raises many types
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:160]}"
        where = "this folder needs config.json and model.safetensors of a causal language model"
        if not is_local:
            where = (
                "without hub access, save it where there is (AutoModelForCausalLM.from_pretrained(name)"
                ".save_pretrained(folder)), copy the folder here and give its path"
            )
        raise DataError(f"the scorer {name!r} cannot be loaded ({reason}); {where}.") from None
    return Scorer(model.eval().to(device), name, *_limits(model.config))


def _limits(config: Any) -> tuple[int, int]:
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(config.vocab_size), int(length or 1 << 30)


@torch.no_grad()
def score(
    scorer: Scorer,
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    batch_size: int = 16,
    chosen: Iterable[int] | None = None,
) -> dict[int, float]:
    """Summed NLL in nats of tokens 1, 2, ... by sequence number; a last, smaller batch is scored too.

    Args:
        sequences: ids; lengths may differ.
        chosen: numbers of the sequences to score (this process's share); None: all. All are checked.
    Raises: DataError for a sequence that is too short or too long for the scorer or holds an id it does not know.
    """
    require_at_least("batch_size", batch_size, 1)
    rows = [torch.as_tensor(tokens, dtype=torch.int64).cpu() for tokens in sequences]
    for index, row_L in enumerate(rows):
        _check(row_L, index, scorer)
    numbers = range(len(rows)) if chosen is None else chosen
    by_length = sorted(numbers, key=lambda index: (len(rows[index]), index))  # equal lengths together: little padding
    total: dict[int, float] = {}
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        x_BL = nn.utils.rnn.pad_sequence([rows[index] for index in batch], batch_first=True)
        length_B = torch.tensor([len(rows[index]) for index in batch])
        is_token_BL = torch.arange(x_BL.shape[1]) < length_B[:, None]
        nll_B = _batch_nll(scorer, x_BL.to(scorer.device), is_token_BL.to(scorer.device))
        total.update(zip(batch, nll_B.tolist(), strict=True))
    return total


def _batch_nll(scorer: Scorer, x_BL: Tensor, is_token_BL: Tensor) -> Tensor:
    # Padding is on the right and attention causal, so no scored token sees any.
    logits_BLV = scorer.model(x_BL, attention_mask=is_token_BL.long(), use_cache=False).logits[:, :-1]
    target_BL = x_BL[:, 1:].masked_fill(~is_token_BL[:, 1:], PADDING)
    nll_B = torch.zeros(len(x_BL), dtype=torch.float64)
    rows = max(1, _LOGITS_AT_ONCE // logits_BLV[0].numel())
    for start in range(0, len(x_BL), rows):
        logits = logits_BLV[start : start + rows].float().flatten(0, 1)
        target_P = target_BL[start : start + rows].flatten()
        nll_P = F.cross_entropy(logits, target_P, ignore_index=PADDING, reduction="none")
        nll_B[start : start + rows] = nll_P.double().view(-1, target_BL.shape[1]).sum(dim=1).cpu()
    return nll_B


def _check(row_L: Tensor, index: int, scorer: Scorer) -> None:
    if row_L.dim() != 1 or len(row_L) < 2:
        raise DataError(
            f"sample {index} has {row_L.numel()} tokens; at least 2 are needed, because the first one is not scored."
        )
    if len(row_L) > scorer.max_length:
        raise DataError(
            f"sample {index} has {len(row_L)} tokens, but {scorer.name} reads at most {scorer.max_length}; cut the "
            "samples or choose another scorer."
        )
    outside = row_L[(row_L < 0) | (row_L >= scorer.vocab_size)]
    if len(outside):
        raise DataError(
            f"sample {index} holds id {int(outside[0])}, but {scorer.name} has a vocabulary of {scorer.vocab_size} "
            "(0 is the smallest id). A mask may be left in the sample, or the models' vocabularies differ; then use "
            "retokenise=true, which scores the text."
        )


@dataclass(frozen=True)
class GenerativePerplexity:
    """Scores of a set of samples.

    Attributes:
        nll: summed NLL of every sequence, nats; count: its scored tokens.
    """

    nll: list[float]
    count: list[int]

    @property
    def sequence_perplexities(self) -> list[float]:
        return [math.exp(min(nll / count, 700.0)) for nll, count in zip(self.nll, self.count, strict=True)]

    def metrics(self) -> Iterator[Metric]:
        """``perplexity`` is the mean of the sequences' perplexities (the reference), ``perplexity_pooled`` the
        exponential of the mean over all tokens (other papers); the standard errors are over sequences.

        Source: specification section 6.4.
        """
        yield mean_metric("perplexity", self.sequence_perplexities)
        yield perplexity_metric("perplexity_pooled", self._nats_per_token())

    def _nats_per_token(self) -> Metric:
        nll_B = torch.tensor(self.nll, dtype=torch.float64)
        count_B = torch.tensor(self.count, dtype=torch.float64)
        mean = float(nll_B.sum() / count_B.sum())
        sequences = len(nll_B)
        if sequences < 2:
            return Metric("nats_per_token", mean)
        # a ratio of sums: linearised, since lengths may differ
        residual_B = nll_B - mean * count_B
        error = math.sqrt(float(residual_B.square().sum()) * sequences / (sequences - 1)) / float(count_B.sum())
        return Metric("nats_per_token", mean, error)


def generative_perplexity(
    scorer: Scorer, sequences: Sequence[Sequence[int] | Tensor], *, batch_size: int = 16
) -> GenerativePerplexity:
    """Scores of all sequences, in one process.

    Raises: DataError for no sequences, and see ``score``.
    """
    if not len(sequences):
        raise DataError("there are no samples to score.")
    nll = score(scorer, sequences, batch_size=batch_size)
    return GenerativePerplexity([nll[i] for i in range(len(sequences))], [len(tokens) - 1 for tokens in sequences])


def snapshot_scorer(
    name: str = DEFAULT_SCORER, *, batch_size: int = 16
) -> Callable[[torch.device], Callable[[Tensor], tuple[float, int]]]:
    """For a trainer's hook: from a device to ``score(tokens_BL) -> (sum of the perplexities, their number)``.

    The model is loaded at the first call on a device and kept, not loaded again at every snapshot.
    """
    loaded: dict[torch.device, Scorer] = {}

    def build(device: torch.device) -> Callable[[Tensor], tuple[float, int]]:
        if device not in loaded:
            loaded[device] = load_scorer(name, device)

        def sum_and_count(tokens_BL: Tensor) -> tuple[float, int]:
            scores = generative_perplexity(loaded[device], list(tokens_BL), batch_size=batch_size)
            return sum(scores.sequence_perplexities), len(scores.nll)

        return sum_and_count

    return build
