"""A low-rank decoder whose every output depends on all of a node's numbers, at any size; for new checkpoints only.

LoGAH's decoder reads a prefix: a narrow matrix sees few of the 2r rows of H, and beyond K rows (or ``max_shape``) a
wide one repeats. Here row p of a factor is row p mod r of H times a matrix that belongs to block p // r. These matrices
are sums of waves of the block's number, so there is one for every position, whatever the width, and no table of K rows.

    A[p] = H[p mod r] W(p // r),      W(j) = sum_f (cos(w_f j) C_f + sin(w_f j) S_f) / sqrt(F)

H is scaled to unit mean square, so a product A B^T / sqrt(r) has a deviation near 1; the tensor's size is a number of
its own that each node predicts, instead of being divided out. Roles (embedding, tied embedding, position, ...) and the
three parts of a fused query-key-value matrix shift and scale what the factors are made from.

Dimensions: R nodes, d width of the encoder, t width of the trunk, r rank, J blocks, F waves, n rows that are read.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logah.assignment import Target

ROLES = ("matrix", "class_weight", "kernel", "position", "embedding", "tied", "tensor3", "vector")
PARTS = 3  # query, key, value
FUSED_NAMES = ("in_proj_weight", "c_attn.weight", "qkv.weight")
NUM_WAVES = 64
GOLDEN = (math.sqrt(5) - 1) / 2
PART_SPREAD = 0.5  # of the scales of the three parts when training starts: equal ones would never part
NODE_SHARE = 0.3  # of H that differs between nodes when training starts, relative to what they have in common
FIRST_SIZE = 0.1  # of tensors when training starts, relative to the usual deviation


def role_of(target: Target) -> str:
    """What the factors of a target are conditioned on, beside its node. Parameters that differ in it are not alike."""
    if target.role in ("vector", "class_bias"):
        return "vector"
    if target.role == "matrix" and len(target.names) > 1:
        return "tied"
    if target.role == "matrix" and target.embedding:
        return "embedding"
    return target.role


def parts_of(target: Target) -> tuple[int, int]:
    """Parts that a matrix is decoded in, along rows and along columns: 3 where it holds query, key and value."""
    if target.role == "matrix" and target.name.endswith(FUSED_NAMES):
        rows, columns = target.shape
        if rows == PARTS * columns:
            return (PARTS, 1)
        if columns == PARTS * rows:  # Conv1D of transformers stores inputs first
            return (1, PARTS)
    return (1, 1)


class LowRankV2Decoder(nn.Module):
    """Factors and scales of parameters from the embeddings of their nodes."""

    def __init__(self, hid: int, rank: int, num_waves: int = NUM_WAVES) -> None:
        super().__init__()
        self.rank, width = rank, 8 * hid
        self.fc = nn.Sequential(nn.Linear(hid, 4 * hid), nn.ReLU(), nn.Linear(4 * hid, width), nn.ReLU())
        self.head = nn.Linear(width, 2 * rank**2)
        self.scale = nn.Linear(width, 1)  # logarithm of the tensor's size relative to the usual one
        self.role = nn.Parameter(torch.zeros(len(ROLES), 2, width))
        self.part = nn.Parameter(torch.randn(PARTS, 2, width) * PART_SPREAD)
        self.waves = nn.Parameter(torch.randn(2 * num_waves, rank, rank) / math.sqrt(rank))
        # multiples of the golden ratio cover (0, pi) evenly without a common period
        numbers = torch.arange(1, num_waves + 1, dtype=torch.float64)
        self.register_buffer("frequencies", (math.pi * (numbers * GOLDEN).frac()).float())
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """All nodes begin with nearly the same small factors, as those of the published decoder do.

        H drawn for every node anew and tensors of the usual size trained more slowly (one run each).
        """
        nn.init.normal_(self.head.weight, std=NODE_SHARE / math.sqrt(self.head.in_features))
        nn.init.normal_(self.head.bias)
        nn.init.normal_(self.scale.weight, std=0.01)
        nn.init.constant_(self.scale.bias, math.log(FIRST_SIZE))

    def trunk(self, x_Rd: Tensor) -> Tensor:
        """``(R, t)``: what every request starts from, of unit mean square."""
        return unit_mean_square(self.fc(x_Rd))

    def conditioned(self, trunk_Rt: Tensor, role: str, part: int | None = None) -> Tensor:
        """The trunk scaled and shifted for a role, and for one part of a fused matrix."""
        gain, shift = self.role[ROLES.index(role)]
        if part is not None:
            gain, shift = gain + self.part[part, 0], shift + self.part[part, 1]
        return trunk_Rt * (1 + gain) + shift

    def factors(self, conditioned_Rt: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """``a_Rnr, b_Rmr`` with ``a @ b.transpose(1, 2)`` of deviation about 1, then times the predicted scale."""
        rank = self.rank
        h_R2rr = unit_mean_square(self.head(conditioned_Rt).view(-1, 2, rank * rank)).view(-1, 2, rank, rank)
        blocks_Jrr = self.blocks(-(-max(rows, columns) // rank))
        size_R = torch.exp(self.scale(conditioned_Rt)) / math.sqrt(rank)
        a_Rnr = self._read(h_R2rr[:, 0], blocks_Jrr, rows) * size_R[:, :, None]
        return a_Rnr, self._read(h_R2rr[:, 1], blocks_Jrr, columns)

    def blocks(self, count: int) -> Tensor:
        """``(J, r, r)``: W of the first ``count`` blocks; the same for all nodes."""
        angles_JF = torch.arange(count, device=self.waves.device)[:, None] * self.frequencies
        waves_J2F = torch.cat([angles_JF.cos(), angles_JF.sin()], dim=1) / math.sqrt(len(self.frequencies))
        return (waves_J2F @ self.waves.flatten(1)).view(count, self.rank, self.rank)

    def _read(self, h_Rrr: Tensor, blocks_Jrr: Tensor, count: int) -> Tensor:
        """The first ``count`` rows of a factor: ``(R, n, r)``."""
        needed_Jrr = blocks_Jrr[: -(-count // self.rank)]
        return (h_Rrr[:, None] @ needed_Jrr).flatten(1, 2)[:, :count]

    def vector(self, conditioned_Rt: Tensor, length: int, row: int) -> Tensor:
        """``(R, n)``: A times row ``row`` of B; a norm's scale and shift are rows 0 and 1 of one node."""
        a_Rnr, b_Rmr = self.factors(conditioned_Rt, length, row + 1)
        return (a_Rnr @ b_Rmr[:, row, :, None])[..., 0]


def unit_mean_square(x: Tensor) -> Tensor:
    """``x`` divided by the root of its mean square over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6)
