"""Zero-shot perplexity by RADD's losses: which masked copies each loss needs, over a whole test set.

Dimensions: B sequences of a group, L positions, M replicates.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from scipy.special import betainc
from torch import Tensor
from tqdm import tqdm

from common.config import require_at_least, require_choice
from common.data.dataset import TokenDataset
from common.diffusion.schedules import Schedule
from common.errors import ConfigError, DataError
from common.evaluation.partial_results import PartialResults, weights_digest
from common.evaluation.perplexity import (
    GROUP_SIZE,
    BoundEstimate,
    GroupEstimate,
    MaskedRows,
    TokenNLL,
    combine,
    estimate_group,
    order_rows,
    sweep_replicates,
)
from common.parallel import Parallel
from common.seeding import generator
from radd.losses import LOSS_TYPES, ORDERED, TIME_LOSSES, build_order, corrupt, draw_loss_inputs
from radd.model import RADD

ESTIMATORS = ("reference", "low_variance")
REFERENCE_DRAWS = 1024  # monte_carlo_timesteps of the reference's script


@dataclass(frozen=True, kw_only=True)
class LossEstimator:
    """Which network rows estimate a loss, and with which weights.

    Attributes:
        loss_type: one of ``LOSS_TYPES`` or ``ORDERED``.
        estimator: ``reference`` draws masking level and mask anew each time (levels stratified over ``GROUP_SIZE``
            sequences, as the reference's batches of 16 are, but dealt to sequences at random: the reference gives
            sequence i of a batch stratum i in every lambda_DCE draw, so more draws never remove that error).
            ``low_variance`` sweeps over the number of masked tokens (``common/evaluation/perplexity.py``) and has the
            same expectation with a fraction of the forwards.
        draws: evaluations per sequence; for orders, how many (1 unless they are random).
        sampling_eps, exact_range: of the t losses, see ``radd/losses.py``.
    """

    loss_type: str
    estimator: str
    draws: int
    schedule: Schedule
    sampling_eps: float = 1e-3
    exact_range: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("loss_type", self.loss_type, (*LOSS_TYPES, *ORDERED))
        require_choice("estimator", self.estimator, ESTIMATORS)
        require_at_least("monte_carlo_timesteps", self.draws, 1)
        require_at_least("seed", self.seed, 0)
        if not 0 < self.sampling_eps < 1:
            raise ConfigError(f"sampling_eps={self.sampling_eps} must lie in (0, 1); the reference has 1e-3.")
        if self.loss_type in ("ar_forward", "ar_backward") and self.draws != 1:
            raise ConfigError(
                f"monte_carlo_timesteps={self.draws} makes no sense for loss_type={self.loss_type}, which is exact; "
                "leave it out or set it to 1."
            )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is random."""
        return self.loss_type in ("ar_forward", "ar_backward")

    def replicates(self, first: int, x_BL: Tensor) -> Iterator[MaskedRows]:
        """Independent unbiased estimates for sequences ``first ...`` of the test set (``x_BL`` on the CPU)."""
        if self.loss_type in ORDERED:
            return self._ordered(first, x_BL)
        if self.estimator == "low_variance":
            return self._sweeps(first, x_BL)
        return self._independent(first, x_BL)

    def _ordered(self, first: int, x_BL: Tensor) -> Iterator[MaskedRows]:
        streams = [generator(self.seed, "perplexity order", first + index) for index in range(len(x_BL))]
        for _ in range(self.draws):
            orders = [build_order(self.loss_type, 1, x_BL.shape[1], generator=rng) for rng in streams]
            yield order_rows(torch.cat(orders))

    def _sweeps(self, first: int, x_BL: Tensor) -> Iterator[MaskedRows]:
        batch, length = x_BL.shape
        weights = excess = None
        if self.loss_type in TIME_LOSSES and not self.exact_range:
            low, high = self.levels()
            weights = count_weights(length, low, high) / (1 - self.sampling_eps)
            if self.loss_type == "t_DCE":
                excess = length * (binary_entropy(low) - binary_entropy(high)) / (1 - self.sampling_eps)
        replicates = sweep_replicates(first, batch, length, draws=self.draws, seed=self.seed, count_weight_L=weights)
        for rows in replicates:
            if excess is not None:
                rows.offset_R = torch.full((len(rows),), excess * batch / len(rows), dtype=torch.float64)
            yield rows

    def _independent(self, first: int, x_BL: Tensor) -> Iterator[MaskedRows]:
        for draw in range(self.draws):
            inputs = draw_loss_inputs(
                self.loss_type,
                *x_BL.shape,
                generator_for=lambda purpose: generator(self.seed, f"perplexity {purpose}", first, draw),  # noqa: B023
            )
            yield loss_rows(
                self.loss_type,
                x_BL,
                inputs,
                self.schedule,
                sampling_eps=self.sampling_eps,
                exact_range=self.exact_range,
            )

    def levels(self) -> tuple[float, float]:
        """The masking levels that the t losses cover."""
        ends = torch.tensor([self.sampling_eps, 1.0], dtype=torch.float64)
        low, high = self.schedule.mask_probability(ends).tolist()
        return low, high

    def range_note(self) -> str | None:
        """What a reader must know to compare a t loss with the others; None for the others."""
        if self.loss_type not in TIME_LOSSES:
            return None
        if self.exact_range:
            return "exact_range: the draws cover all masking levels, so the expectation is the bound itself"
        low, high = self.levels()
        return (
            f"time drawn in [{self.sampling_eps:g}, 1]: only masking levels in [{low:.3g}, {high:.6g}] are scored, "
            "which makes the perplexity a little too small (0.5 % for large models); exact_range=true covers all"
        )


def loss_rows(
    loss_type: str,
    x_BL: Tensor,
    inputs: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    sampling_eps: float = 1e-3,
    exact_range: bool = False,
) -> MaskedRows:
    """One draw of a training loss as network rows: one masked copy per sequence.

    Args:
        inputs: its random numbers, see ``losses.draw_loss_inputs``.
    """
    state = corrupt(loss_type, x_BL, inputs, schedule, mask_id=-1, sampling_eps=sampling_eps, exact_range=exact_range)
    weight_BL = state.where_BL * state.weight_B[:, None]
    return MaskedRows(torch.arange(len(x_BL)), state.where_BL, weight_BL, state.offset_B)


def count_weights(length: int, low: float, high: float) -> Tensor:
    """Probability that the masking level lies in [low, high] given k = 1..L masked tokens, float64 ``(L,)``.

    ``integral of S/lambda over [low, high] = sum_k S_k/k (I_high(k, L-k+1) - I_low(k, L-k+1))`` with I the regularised
    incomplete beta function; over [0, 1] all are 1. Holds for every schedule, since sigma/e dt = d lambda / lambda.

    Source: specification section 3.4.
    """
    k = torch.arange(1, length + 1, dtype=torch.float64).numpy()
    return torch.from_numpy(betainc(k, length - k + 1, high) - betainc(k, length - k + 1, low))


def binary_entropy(p: float) -> float:
    """Entropy of a coin in nats."""
    return 0.0 if p <= 0 or p >= 1 else -p * math.log(p) - (1 - p) * math.log1p(-p)


def token_nll(model: RADD) -> TokenNLL:
    """The network's chunked loss, which never holds the log-probabilities of all positions."""
    return lambda z_RL, x_RL, where_RL: model(z_RL, x_RL, where_RL)


# ---------------------------------------------------------------- a whole test set


@dataclass(frozen=True)
class PerplexityResult:
    """What one evaluation found.

    Attributes:
        bound: mean, errors, and counts.
        dropped_tokens: of the corpus, those that filled no block.
        draws: evaluations per sequence.
        seconds: of this invocation; groups found from an earlier one cost nothing.
        note: on comparability, or None.
    """

    bound: BoundEstimate
    loss_type: str
    estimator: str
    draws: int
    dropped_tokens: int
    seconds: float
    note: str | None

    def as_dict(self) -> dict:
        bound = self.bound
        return {
            "perplexity": bound.perplexity.value,
            "perplexity_error_draws": bound.perplexity.standard_error,
            "perplexity_error_sequences": _perplexity_error(bound),
            "nats_per_token": bound.nats_per_token.value,
            "nats_error_draws": bound.nats_per_token.standard_error,
            "nats_error_sequences": bound.sequence_error,
            "loss_type": self.loss_type,
            "estimator": self.estimator,
            "draws": self.draws,
            "blocks": bound.sequences,
            "tokens": bound.tokens,
            "dropped_tokens": self.dropped_tokens,
            "network_rows": bound.rows,
            "seconds": round(self.seconds, 3),
            "note": self.note,
        }

    def lines(self) -> list[str]:
        """For the log; the line with the perplexity itself is the caller's."""
        bound, nats = self.bound, self.bound.nats_per_token
        found = [
            f"Standard error of the PPL: {_number(bound.perplexity.standard_error)} over random masks, "
            f"{_number(_perplexity_error(bound))} over sequences",
            f"Nats per token: {nats.value:.6f} +- {_number(nats.standard_error)} over random masks, "
            f"+- {_number(bound.sequence_error)} over sequences",
            f"Loss type: {self.loss_type}; estimator: {self.estimator}; draws: {self.draws}",
            f"Blocks: {bound.sequences}; tokens: {bound.tokens}; dropped tokens: {self.dropped_tokens}; "
            f"network rows: {bound.rows}",
        ]
        return [*found, f"Note: {self.note}"] if self.note else found


def _perplexity_error(bound: BoundEstimate) -> float | None:
    return None if bound.sequence_error is None else bound.perplexity.value * bound.sequence_error


def _number(value: float | None) -> str:
    return "unknown (a single draw)" if value is None else f"{value:.3g}"


def evaluate_perplexity(
    model: RADD,
    dataset: TokenDataset,
    estimator: LossEstimator,
    *,
    batch_size: int,
    parallel: Parallel,
    work_dir: str,
    name: str,
    max_samples: int | None = None,
    source: str = "",
    progress: bool = True,
) -> PerplexityResult:
    """Perplexity of the dataset's blocks; groups of blocks are shared out over processes. Collective.

    A group's numbers are drawn from (seed, purpose, its first block), so neither ``batch_size`` nor the number of
    processes matters. Finished groups are kept in ``work_dir`` (``partial_results.py``) and found again by the same
    evaluation of the same weights.

    Args:
        model: in eval mode, on ``parallel.device``.
        batch_size: rows per forward pass.
        name: of the evaluation, for files.
        max_samples: score the first so many blocks only.
        source: further things that decide the values, such as the precision.

    Raises: DataError for tokens outside the model's vocabulary or an NLL that is not a number.
    """
    blocks = len(dataset) if max_samples is None else min(max_samples, len(dataset))
    settings = {
        "estimator": {key: str(value) for key, value in asdict(estimator).items() if key != "schedule"},
        "schedule": str(estimator.schedule),
        "weights": weights_digest(model),
        "data": [dataset.info.name, dataset.info.split, dataset.info.length, _data_digest(dataset), blocks],
        "group_size": GROUP_SIZE,
        "source": source,
    }
    partial = PartialResults(work_dir, name, settings, parallel)
    groups = math.ceil(blocks / GROUP_SIZE)
    todo = partial.pending(groups)
    started = time.perf_counter()
    bar = tqdm(todo, desc=name, unit="group", disable=None if progress and parallel.is_main else True, leave=False)
    for group in bar:
        first = group * GROUP_SIZE
        x_BL = dataset.fetch(list(range(first, min(first + GROUP_SIZE, blocks))))["tokens"]
        check_tokens(x_BL, model.tokens, dataset.info.name)
        value_MB, rows = estimate_group(
            token_nll(model),
            x_BL.to(parallel.device),
            estimator.replicates(first, x_BL),
            mask_id=model.mask_id,
            batch_size=batch_size,
        )
        if not bool(torch.isfinite(value_MB).all()):
            raise DataError(
                f"blocks {first} to {first + len(x_BL) - 1} have an NLL that is not finite; use precision=fp32, or "
                "check the model's weights."
            )
        partial.append(group, asdict(GroupEstimate.from_values(value_MB, rows)))
    records = partial.collect()
    bound = combine(
        [GroupEstimate(**records[group]) for group in range(groups)],
        dataset.info.length,
        is_exact=estimator.is_exact,
    )
    return PerplexityResult(
        bound,
        estimator.loss_type,
        estimator.loss_type if estimator.loss_type in ORDERED else estimator.estimator,
        estimator.draws,
        dataset.info.dropped_tokens,
        time.perf_counter() - started,
        estimator.range_note(),
    )


def check_tokens(x_BL: Tensor, tokens: int, name: str) -> None:
    """Raises DataError for an id that the model has no column for."""
    wrong = x_BL[(x_BL < 0) | (x_BL >= tokens)]
    if len(wrong):
        raise DataError(
            f"{name} holds token id {int(wrong[0])}, but the model has {tokens} tokens; use the tokenizer that the "
            "model was trained with."
        )


def _data_digest(dataset: TokenDataset) -> str:
    """The cache's key, which is a digest of everything the tokens depend on, or a digest of the tokens."""
    if dataset.info.cache:
        return dataset.info.cache.rpartition("-")[2]
    return hashlib.sha256(dataset.stream.tokens.tobytes()).hexdigest()[:16]
