"""The four training losses of RADD and the exact likelihood of a given order.

All four are ``weight * S + offset`` for one sequence, with S the summed NLL of its masked tokens: only the way of
drawing the mask, the weight and the offset (which no parameter enters) differ. ``corrupt`` makes those from given
random numbers, ``draw_loss_inputs`` makes the random numbers of a global batch, ``compute_loss`` puts them together.
Everything is in nats.

Dimensions: B batch, L sequence, N real tokens, V = N + 1 columns, P masked positions in row-major order, R rows of
one network call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from common.config import require_choice
from common.diffusion.corruption import mask_bernoulli, mask_count, random_permutations
from common.diffusion.schedules import Schedule, log_odds
from common.diffusion.time_sampling import SAMPLERS, draw_times
from common.errors import ConfigError

LOSS_TYPES = ("t_DSE", "t_DCE", "lambda_DCE", "k_DCE")
TIME_LOSSES = ("t_DSE", "t_DCE")
ORDERED = ("ar_forward", "ar_backward", "ar_random")
LOSS_NORMS = ("tokens", "sequences")
SMALLEST_MASK_PROBABILITY = 2**-24  # a float32 uniform can be 0, and S / 0 is not a number
REFERENCE_SAMPLER = {"t_DSE": "vdm", "t_DCE": "vdm", "lambda_DCE": "decoupled", "k_DCE": "naive"}

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How sequences are masked and weighted; the fields of the ``training`` section that concern the loss."""

    loss_type: Literal["t_DSE", "t_DCE", "lambda_DCE", "k_DCE"] = "t_DCE"
    loss_norm: Literal["tokens", "sequences"] = "tokens"  # divide the batch's loss by its tokens or by its rows
    sampling_eps: float = 1e-3  # t losses: smallest time drawn
    time_sampler: str | None = None  # naive|vdm|decoupled|stratified; None: the reference's rule, rows shuffled
    antithetic: bool = False  # rows in pairs v, 1 - v of the masking level
    exact_range: bool = False  # t losses: also cover the masking levels the reference leaves out

    def __post_init__(self) -> None:
        require_choice("training.loss_type", self.loss_type, LOSS_TYPES)
        require_choice("training.loss_norm", self.loss_norm, LOSS_NORMS)
        if self.time_sampler is not None:
            require_choice("training.time_sampler", self.time_sampler, SAMPLERS)
        if not 0 < self.sampling_eps < 1:
            raise ConfigError(f"training.sampling_eps={self.sampling_eps} must lie in (0, 1); the reference has 1e-3.")

    @classmethod
    def from_section(cls, section: Any) -> "LossConfig":
        """The loss's share of a ``training`` section: attributes of other names are left alone, absent ones default."""
        return cls(**{f.name: getattr(section, f.name) for f in fields(cls) if hasattr(section, f.name)})


# ---------------------------------------------------------------- random numbers


def draw_loss_inputs(
    loss_type: str,
    size: int,
    length: int,
    *,
    generator_for: Callable[[str], torch.Generator],
    sampler: str | None = None,
    antithetic: bool = False,
) -> dict[str, Tensor]:
    """Random numbers of a global batch, every tensor with ``size`` rows.

    ====================  ==================================  ==============================================
    loss                  level of masking                    positions
    ====================  ==================================  ==============================================
    t_DSE, t_DCE          ``time`` float32 in [0, 1)          ``u_mask`` float32 ``(size, length)``
    lambda_DCE            ``lambda`` float32 in [2^-24, 1)    the same
    k_DCE                 ``k`` int64 in 1..length            ``perm`` int64 ``(size, length)``, permutations
    ====================  ==================================  ==============================================

    Args:
        generator_for: from a purpose (``"time"``, ``"mask"``) to a fresh generator.
        sampler: rule for the level. None is the reference's (vdm, decoupled, independent), except that strata cover the
            global batch and are assigned to rows at random, so that no rank gets all the heavily masked rows.
        antithetic: rows 2j and 2j + 1 get levels v and 1 - v.

    Raises: ConfigError for an unknown loss type or sampler.
    """
    require_choice("training.loss_type", loss_type, LOSS_TYPES)
    rule = REFERENCE_SAMPLER[loss_type] if sampler is None else sampler
    time_B = draw_times(
        rule, size, generator=generator_for("time"), shuffle=sampler is None and rule != "naive", antithetic=antithetic
    )
    mask_generator = generator_for("mask")
    if loss_type == "k_DCE":
        k_B = (time_B.double() * length).long().clamp(max=length - 1) + 1
        return {"k": k_B, "perm": random_permutations(size, length, generator=mask_generator)}
    uniform_BL = torch.rand(size, length, generator=mask_generator)
    if loss_type == "lambda_DCE":
        return {"lambda": time_B.clamp(min=SMALLEST_MASK_PROBABILITY), "u_mask": uniform_BL}
    return {"time": time_B, "u_mask": uniform_BL}


# ---------------------------------------------------------------- corruption and weights


@dataclass(frozen=True)
class Corruption:
    """A partly masked batch and what its loss per sequence is made of: ``weight_B * S + offset_B``.

    Attributes:
        z_BL: tokens with masks.
        where_BL: bool, the masked positions.
        weight_B: float32, finite and not negative.
        offset_B: float32, zero except for t_DCE; no parameter enters.
    """

    z_BL: Tensor
    where_BL: Tensor
    weight_B: Tensor
    offset_B: Tensor


def corrupt(
    loss_type: str,
    x_BL: Tensor,
    draws: Mapping[str, Tensor],
    schedule: Schedule,
    *,
    mask_id: int,
    sampling_eps: float = 1e-3,
    exact_range: bool = False,
) -> Corruption:
    """Masks ``x_BL`` by the rule of ``loss_type`` with the given random numbers (``draw_loss_inputs``).

    With e = exp(sigma_bar) - 1, k masked tokens and S their summed NLL, a sequence's loss is::

        t_DSE       sigma/e * S                    t_DCE       sigma/e * (S + k ln e)
        lambda_DCE  S / lambda                     k_DCE       S * L / k

    The reference's t_DSE adds ``sum_v c_v / e + (1/e)(ln(1/e) - 1)`` and ``ln e / e`` per masked token; since the
    network's probabilities c_v sum to one these cancel for every draw, so they are not computed.

    Args:
        draws: ``time`` and ``u_mask``, ``lambda`` and ``u_mask``, or ``k`` and ``perm``.
        sampling_eps: delta of the t losses: t = (1 - delta) * time + delta.
        exact_range: t losses only: spread the draws over all masking levels (see ``full_range``), which makes their
            expectation the exact bound; ``sampling_eps`` is then not used.

    Source: specification section 3.2, equations of arXiv 2406.03736 section 3; analytic forms of section 3.3.
    Raises: ConfigError for an unknown loss type.
    """
    require_choice("training.loss_type", loss_type, LOSS_TYPES)
    length = x_BL.shape[1]
    if loss_type == "k_DCE":
        k_B = draws["k"]
        z_BL = mask_count(x_BL, k_B, draws["perm"], mask_id)
        weight_B = length / k_B.float()
        return Corruption(z_BL, draws["perm"] < k_B[:, None], weight_B, torch.zeros_like(weight_B))
    offset_per_token_B: Tensor | None = None
    if loss_type == "lambda_DCE":
        probability_B = draws["lambda"].clamp(min=SMALLEST_MASK_PROBABILITY)
        weight_B = probability_B.double().reciprocal()
    else:
        if exact_range:
            probability_B, weight_B, log_e_B = full_range(draws["time"], schedule)
        else:
            t_B = (1 - sampling_eps) * draws["time"] + sampling_eps
            probability_B, weight_B, log_e_B = time_level(t_B, schedule)
        if loss_type == "t_DCE":
            offset_per_token_B = weight_B * log_e_B
    where_BL = draws["u_mask"] < probability_B.float()[:, None]
    z_BL = mask_bernoulli(x_BL, probability_B.float(), draws["u_mask"], mask_id)
    offset_B = torch.zeros_like(weight_B) if offset_per_token_B is None else offset_per_token_B * where_BL.sum(dim=1)
    return Corruption(z_BL, where_BL, weight_B.float(), offset_B.float())


def time_level(t_B: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Masking probability, sigma/e and ln e at time t, float64. Log-linear: (1 - eps) t, exactly 1/t, its log-odds.

    float64 because e = expm1(sigma_bar) overflows float32 from sigma_bar = 89 on; there sigma/e is a clean 0.
    """
    t_B = t_B.double()
    sigma_B = schedule.sigma(t_B)
    return schedule.mask_probability(t_B), schedule.dsigma(t_B) / torch.expm1(sigma_B), log_odds(sigma_B)


def full_range(time_B: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """As ``time_level``, for numbers in [0, 1) that are spread over every masking level in (0, 1].

    The t losses cover the levels [lambda(delta), lambda(1)] only. Here a share lambda(0) and a share 1 - lambda(1) of
    the draws goes to the two missing ends, where the level itself is uniform with weight 1/lambda; the rest is mapped
    to t in [0, 1] with weight sigma/e over its share. The expectation is the integral of S/lambda over (0, 1].

    Source: specification section 3.4 (``exact_range``).
    """
    ends = schedule.mask_probability(torch.tensor([0.0, 1.0], dtype=torch.float64, device=time_B.device))
    low, high = ends[0], ends[1]
    u_B = time_B.double().clamp(min=SMALLEST_MASK_PROBABILITY)
    inside_B = (u_B >= low) & (u_B <= high)
    t_B = ((u_B - low) / (high - low)).clamp(SMALLEST_MASK_PROBABILITY, 1)
    probability_B, weight_B, log_e_B = time_level(t_B, schedule)
    return (
        torch.where(inside_B, probability_B, u_B),
        torch.where(inside_B, weight_B / (high - low), u_B.reciprocal()),
        torch.where(inside_B, log_e_B, torch.logit(u_B)),
    )


# ---------------------------------------------------------------- losses


def sequence_losses(corruption: Corruption, nll_P: Tensor) -> Tensor:
    """Loss of every sequence in nats, float32 ``(B,)``, from the NLLs at the masked positions; 0 where none is."""
    nll_BL = nll_P.new_zeros(corruption.where_BL.shape, dtype=torch.float32)
    nll_BL[corruption.where_BL] = nll_P.float()
    return corruption.weight_B * nll_BL.sum(dim=1) + corruption.offset_B


def compute_loss(
    loss_type: str,
    model: Callable[..., Tensor],
    x_BL: Tensor,
    draws: Mapping[str, Tensor],
    schedule: Schedule,
    sampling_eps: float = 1e-3,
    *,
    mask_id: int | None = None,
    exact_range: bool = False,
) -> Tensor:
    """Loss of every sequence in nats (sum over positions), float32 ``(B,)``, differentiable.

    Args:
        model: called once as ``model(z_BL, x_BL, where_BL) -> nll_P``.
        draws: random numbers on the device of ``x_BL``; other arguments as in ``corrupt``.
        mask_id: None: the attribute of ``model``.
    """
    mask_id = model.mask_id if mask_id is None else mask_id
    corruption = corrupt(
        loss_type, x_BL, draws, schedule, mask_id=mask_id, sampling_eps=sampling_eps, exact_range=exact_range
    )
    return sequence_losses(corruption, model(corruption.z_BL, x_BL, corruption.where_BL))


# ---------------------------------------------------------------- exact likelihood of an order


def check_order(order: Tensor, length: int, name: str = "order") -> Tensor:
    """``order`` as int64 with one or B rows.

    Raises: ConfigError unless every row is a permutation of 0..length-1.
    """
    rows = order.reshape(1, -1) if order.dim() == 1 else order
    if order.dim() not in (1, 2) or rows.shape[1] != length or order.is_floating_point():
        raise ConfigError(
            f"{name} has shape {tuple(order.shape)} and dtype {order.dtype}; it must hold integers, {length} per row "
            "(one position of the sequence each)."
        )
    expected = torch.arange(length, device=rows.device)
    wrong = (rows.sort(dim=1).values != expected).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        raise ConfigError(
            f"{name} (row {wrong[0]}) is {rows[wrong[0]].tolist()[:16]}, not a permutation of 0..{length - 1}; every "
            "position must appear once."
        )
    return rows.long()


def build_order(loss_type: str, size: int, length: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Orders ``(size, length)`` of the names in ``ORDERED``; ``ar_random`` draws one per row from ``generator``.

    Raises: ConfigError for an unknown name, or ``ar_random`` without a generator.
    """
    require_choice("loss_type", loss_type, ORDERED)
    if loss_type == "ar_random":
        if generator is None:
            raise ConfigError("loss_type='ar_random' needs a generator; pass common.seeding.generator(seed, 'order').")
        return random_permutations(size, length, generator=generator)
    forward_L = torch.arange(length)
    return (forward_L if loss_type == "ar_forward" else forward_L.flip(0)).expand(size, length)


@torch.no_grad()
def ordered_nll(
    denoise: Denoiser, x_BL: Tensor, order: Tensor, *, mask_id: int, rows_per_call: int | None = None
) -> Tensor:
    """Exact NLL in nats of every sequence when its tokens are revealed one by one in ``order``; float32 ``(B,)``.

    Costs L network rows per sequence. Steps are independent given the sequence, so several are evaluated in one call.

    Args:
        denoise: ``denoise(tokens_RL, where_RL) -> log_probs_PV``.
        order: permutation of positions, ``(L,)`` for all rows or ``(B, L)``.
        rows_per_call: network rows in one call; None: B, that is one step at a time.

    Source: the any-order autoregressive factorisation, specification 2 row 4.
    Raises: ConfigError if an order is not a permutation.
    """
    batch, length = x_BL.shape
    order_BL = check_order(order, length).to(x_BL.device).expand(batch, length)
    rank_BL = order_BL.argsort(dim=1)  # step in which each position is revealed
    step_R = torch.arange(length, device=x_BL.device).repeat_interleave(batch)
    row_R = torch.arange(batch, device=x_BL.device).repeat(length)
    nll_R = torch.empty(batch * length, dtype=torch.float32, device=x_BL.device)
    size = rows_per_call or batch
    for start in range(0, batch * length, size):
        rows, steps = row_R[start : start + size], step_R[start : start + size]
        tokens_RL, rank_RL = x_BL[rows], rank_BL[rows]
        where_RL = rank_RL == steps[:, None]
        log_probs_RV = denoise(tokens_RL.masked_fill(rank_RL >= steps[:, None], mask_id), where_RL)
        nll_R[start : start + size] = -log_probs_RV.gather(1, tokens_RL[where_RL][:, None]).squeeze(1)
    return nll_R.view(length, batch).sum(dim=0)
