"""Draws of one token per position from log-probabilities, without the bias of low-precision Gumbel races.

Two ways to draw. *Inversion* takes one uniform per position and looks it up in the cumulative distribution: exact, and
the default. The *race* takes one uniform per position and token and returns the largest ``p / E``: what the reference
does, kept so that its draws can be reproduced from its uniforms. ``TokenDraw`` holds the options of both.

Dimensions: P positions, V vocabulary columns (the mask column carries -inf), K columns kept by top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import require_choice
from common.errors import ConfigError

STRATEGIES = ("direct", "top_p", "top_k", "min_p", "greedy")
PRECISIONS = ("float64", "float32", "float16-compat")
DEFAULT_TOP_P = 0.8  # of the reference's scripts
_CHUNK_ENTRIES = 1 << 24  # float64 copies of the log-probabilities hold at most this many entries (128 MB)


@dataclass(frozen=True, kw_only=True)
class TokenDraw:
    """How one token is drawn from the distribution at one position.

    The order of operations is: temperature, then the filter of ``strategy``, then renormalisation, then the draw.

    Attributes:
        strategy: ``direct`` (no filter), ``top_p`` (smallest set of likeliest tokens whose mass exceeds p),
            ``top_k`` (the k likeliest), ``min_p`` (tokens with at least p times the largest probability), ``greedy``.
        para: p of top_p (default 0.8) and min_p, or k of top_k (a float is cut to an integer, as in the reference).
        temperature: log-probabilities are divided by it; 0 means greedy.
        precision: ``float64`` is unbiased. ``float32`` is unbiased up to 6e-8 for draws of a token alone, and shows the
            reference's bias where one draw also decides whether to unmask (``common/diffusion/stepwise.py``).
            ``float16-compat`` repeats the reference's half-precision cache, for one-stage draws only.

    Raises: ConfigError for an unknown strategy or precision and for a parameter outside its range.
    """

    strategy: str = "direct"
    para: float | None = None
    temperature: float = 1.0
    precision: str = "float64"

    def __post_init__(self) -> None:
        require_choice("strategy", self.strategy, STRATEGIES)
        require_choice("precision", self.precision, PRECISIONS)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be finite and at least 0 (0 draws greedily).")
        if self.strategy == "top_p" and self.para is None:
            object.__setattr__(self, "para", DEFAULT_TOP_P)
        if self.strategy in ("top_p", "min_p") and not (self.para is not None and 0 < self.para <= 1):
            raise ConfigError(
                f"strategy_para={self.para} cannot be the p of strategy={self.strategy}; give a number in (0, 1]."
            )
        if self.strategy == "top_k" and not (self.para is not None and self.para >= 1):
            raise ConfigError(
                f"strategy_para={self.para} cannot be the k of strategy=top_k; give an integer from 1 to the number "
                "of tokens."
            )

    @property
    def top_k(self) -> int:
        """k of top_k, an integer."""
        return int(self.para or 0)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which probabilities are accumulated and compared."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def is_greedy(self) -> bool:
        return self.strategy == "greedy" or self.temperature == 0

    def check_vocabulary(self, num_tokens: int) -> None:
        """Raises ConfigError if top_k asks for more than the ``num_tokens`` tokens that can be drawn."""
        if self.strategy == "top_k" and self.top_k > num_tokens:
            raise ConfigError(
                f"strategy_para={self.para} exceeds the {num_tokens} tokens of the vocabulary; strategy=top_k takes an "
                f"integer from 1 to {num_tokens}."
            )


def probabilities(log_probs_PV: Tensor, draw: TokenDraw) -> Tensor:
    """Probabilities after temperature and filter, summing to one; dropped tokens and the mask column hold exactly 0.

    Source: spec of the reference's top_p and top_k: a token stays while the mass of strictly likelier ones is at most
    p (so at least one stays). The reference filters with the mask column included; here it is gone before any filter.
    """
    scaled_PV = log_probs_PV.to(draw.dtype)
    if draw.temperature not in (0.0, 1.0):
        scaled_PV = scaled_PV / draw.temperature
    p_PV = torch.softmax(scaled_PV, dim=-1)
    if draw.is_greedy:
        return torch.zeros_like(p_PV).scatter_(-1, p_PV.argmax(-1, keepdim=True), 1.0)
    if draw.strategy == "direct" or (draw.strategy == "top_p" and draw.para == 1):
        return p_PV  # at p = 1 a cumulative sum that rounds above one would drop the rarest tokens
    if draw.strategy == "top_k":
        values_PK, ids_PK = _top_k(scaled_PV, draw)
        return torch.zeros_like(p_PV).scatter_(-1, ids_PK, torch.softmax(values_PK, dim=-1))
    if draw.strategy == "min_p":
        kept_PV = p_PV.where(p_PV >= draw.para * p_PV.amax(-1, keepdim=True), 0.0)
    else:
        sorted_PV, ids_PV = p_PV.sort(dim=-1, descending=True, stable=True)
        before_PV = sorted_PV.cumsum(-1) - sorted_PV
        kept_PV = torch.zeros_like(p_PV).scatter_(-1, ids_PV, sorted_PV.where(before_PV <= draw.para, 0.0))
    return kept_PV / kept_PV.sum(-1, keepdim=True)


def _top_k(scaled_PV: Tensor, draw: TokenDraw) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities, descending, and their columns; ties go to the smaller column."""
    draw.check_vocabulary(int(torch.isfinite(scaled_PV[:1]).sum()) if len(scaled_PV) else scaled_PV.shape[-1])
    values_PV, ids_PV = scaled_PV.sort(dim=-1, descending=True, stable=True)
    return values_PV[:, : draw.top_k], ids_PV[:, : draw.top_k]


def draw_tokens(log_probs_PV: Tensor, uniform: Tensor, draw: TokenDraw | None = None) -> Tensor:
    """One token id per position.

    Args:
        log_probs_PV: log-probabilities (or logits) with -inf in columns that must not be drawn.
        uniform: ``(P,)`` in [0, 1) draws by inversion; ``(P, C)`` draws by race, in which column j belongs to token j
            (top_k: to the j-th likeliest token, C >= k). Missing trailing columns are those of -inf tokens.
        draw: options; by default direct float64.

    Returns:
        ids_P, int64; the same for equal rows whatever the other positions are.
    """
    draw = draw or TokenDraw()
    if draw.precision == "float16-compat":
        raise ConfigError(
            "precision=float16-compat repeats the reference's one-stage draw; it needs sampler=stepwise with "
            "strategy=direct. Use precision=float64 or float32 here."
        )
    if draw.is_greedy:
        return log_probs_PV.argmax(-1)
    by_inversion = uniform.dim() == 1
    rows = max(1, _CHUNK_ENTRIES // max(1, log_probs_PV.shape[-1]))
    parts = []
    for start in range(0, len(log_probs_PV), rows):
        chunk_PV, u = log_probs_PV[start : start + rows], uniform[start : start + rows]
        if by_inversion:
            parts.append(_invert(probabilities(chunk_PV, draw), u))
        elif draw.strategy == "top_k":
            scaled_PV = chunk_PV.to(draw.dtype) / draw.temperature
            values_PK, ids_PK = _top_k(scaled_PV, draw)
            winner_P1 = race(torch.softmax(values_PK, dim=-1), u[:, : draw.top_k]).unsqueeze(-1)
            parts.append(ids_PK.gather(-1, winner_P1).squeeze(-1))
        else:
            parts.append(race(probabilities(chunk_PV, draw), u))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=log_probs_PV.device)


def _invert(p_PV: Tensor, uniform_P: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds ``u``; never one of probability zero."""
    cdf_PV = p_PV.cumsum(-1)
    total_P1 = cdf_PV[:, -1:].contiguous()
    target_P1 = uniform_P.to(cdf_PV).unsqueeze(-1) * total_P1
    # u * total may round up to total, for which no column is larger: fall back to the last token with any mass.
    last_P1 = torch.searchsorted(cdf_PV, total_P1, right=False)
    return torch.minimum(torch.searchsorted(cdf_PV, target_P1, right=True), last_P1).squeeze(-1)


def race(weights_PV: Tensor, uniform_PC: Tensor) -> Tensor:
    """The column maximising ``w / E``, E exponential: a draw with probability proportional to ``w``.

    In float32 this is the reference's arithmetic: ``E = 1e-10 - log(u + 1e-10)`` cannot fall below about 6e-8, so a
    weight under 6e-8 times that of a competitor never wins. In float64 the offset is dropped.

    Args:
        weights_PV: any weights; negative ones never win against a positive one.
        uniform_PC: uniforms in [0, 1); C <= V columns, the missing trailing ones must have weight zero.
    """
    uniform_PC = uniform_PC.to(weights_PV)
    missing = weights_PV.shape[-1] - uniform_PC.shape[-1]
    if missing > 0:
        uniform_PC = torch.nn.functional.pad(uniform_PC, (0, missing), value=0.5)
    if weights_PV.dtype == torch.float64:
        exponential_PV = -torch.log(uniform_PC.clamp(torch.finfo(torch.float64).tiny, 1.0 - 2.0**-53))
    else:
        exponential_PV = 1e-10 - torch.log(uniform_PC + 1e-10)
    return (weights_PV / exponential_PV).argmax(-1)
