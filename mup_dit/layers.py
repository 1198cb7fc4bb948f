"""Pieces that DiT, PixArt-alpha and MMDiT share.

Dimensions: B batch, N image tokens, T text tokens, D width, H heads, E head size, C channels, S side of the latent.
"""

import math

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn import functional as F

from common.errors import ConfigError

MAX_PERIOD = 10_000.0
FREQUENCIES = 256  # size of the sinusoid of t
NORM_EPS = 1e-6
SHORT_SEQUENCE = 1024  # keys


def timestep_embedding(t_B: Tensor, size: int) -> Tensor:
    """float32 ``(B, size)``: ``[cos(t f) | sin(t f)]`` with f_j = 10000^(-j/half), cosine first; odd sizes end in 0.

    Always in float32: in bfloat16 times above 256 would be rounded to multiples of 2 or 4 (specification 8.23).
    """
    half = size // 2
    f_H = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angle_BH = t_B.float()[:, None] * f_H
    return F.pad(torch.cat([angle_BH.cos(), angle_BH.sin()], dim=1), (0, size % 2))


def position_table(
    size: int,
    grid: tuple[int, int],
    *,
    extra_tokens: int = 0,
    scale: float = 1.0,
    base_size: int | None = None,
    device: torch.device | str | None = "cpu",
) -> Tensor:
    """float32 ``(extra + N, size)``: sine and cosine of the column, then of the row, sine first; token order row-major.

    Args:
        grid: rows and columns.
        extra_tokens: rows of zeros in front.
        scale, base_size: coordinate i of an axis with g tokens becomes ``i / (g / base_size) / scale`` (PixArt-alpha);
            base_size None: i itself.

    Raises: ConfigError if ``size`` is not divisible by 4.
    """
    if size % 4:
        raise ConfigError(f"hidden_size={size} is not divisible by 4, which the two-dimensional position table needs.")
    rows, columns = grid
    # float64 on the way, as the reference's tables
    omega = 1.0 / MAX_PERIOD ** (torch.arange(size // 4, dtype=torch.float64, device=device) / (size / 4))

    def half(tokens: int) -> Tensor:
        place = torch.arange(tokens, dtype=torch.float32, device=device)
        if base_size is not None:
            place = place / (tokens / base_size) / scale  # in float32, as the reference
        angle = place.double()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column_ND = half(columns)[None].expand(rows, -1, -1)
    row_ND = half(rows)[:, None].expand(-1, columns, -1)
    table = torch.cat([column_ND, row_ND], dim=2).reshape(rows * columns, size)
    return F.pad(table, (0, 0, extra_tokens, 0)).float()


def unpatchify(tokens_BND: Tensor, patch_size: int, channels: int, grid: tuple[int, int] | None = None) -> Tensor:
    """``(B, N, p p C)`` -> ``(B, C, rows p, columns p)``; features ordered row in patch, column in patch, channel.

    Args:
        grid: rows and columns of tokens; None: a square.

    Raises: ValueError if N is not a perfect square and no grid is given.
    """
    batch, count, _ = tokens_BND.shape
    if grid is None:
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(f"{count} tokens are not a square image; give their grid.")
        grid = (side, side)
    rows, columns = grid
    patches = tokens_BND.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)


def attention_scale(rule: str, head_size: int, base_head_size: int) -> float:
    """Factor on q k^T: ``1/sqrt(E)``; under ``mup``, for head sizes that grow, ``sqrt(E_base)/E`` (equal at base)."""
    return math.sqrt(base_head_size) / head_size if rule == "mup" else 1.0 / math.sqrt(head_size)


def split_heads(x_BND: Tensor, heads: int) -> Tensor:
    """``(B, N, D)`` -> ``(B, H, N, E)``."""
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_BHNE: Tensor) -> Tensor:
    """``(B, H, N, E)`` -> ``(B, N, D)``."""
    return x_BHNE.transpose(1, 2).flatten(2)


def is_concrete(tensor: Tensor) -> bool:
    """Whether values can be looked at for free: on the CPU, neither compiled nor made up for an estimate."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return detect_fake_mode([tensor]) is None


class PatchEmbed(nn.Module):
    """Image -> tokens: a convolution whose kernel and stride are the patch."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        return self.proj(x_BCSS).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (may be fractional) -> ``(B, D)``: sinusoid, linear, SiLU, linear."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = FREQUENCIES) -> None:
        super().__init__()
        self.frequencies = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t_B, self.frequencies).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels -> ``(B, D)``; with dropping, row ``num_classes`` of the table is the null class."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.has_null = num_classes, dropout_prob > 0
        self.embedding_table = nn.Embedding(num_classes + self.has_null, hidden_size)

    def forward(self, labels_B: Tensor, drop_B: Tensor | None = None) -> Tensor:
        """Args: drop_B: where true (or 1) the label becomes the null class.

        Raises: ValueError for labels outside the table (checked on the CPU, where it costs no synchronisation).
        """
        if drop_B is not None:
            labels_B = torch.where(drop_B.bool(), self.num_classes, labels_B)
        rows = self.embedding_table.num_embeddings
        if labels_B.numel() and is_concrete(labels_B):
            least, largest = (int(value) for value in labels_B.aminmax())
            if least < 0 or largest >= rows:
                raise ValueError(
                    f"label {least if least < 0 else largest} is outside 0..{rows - 1} ({self.num_classes} classes"
                    f"{' and the null class' if self.has_null else ', no null class'})."
                )
        return self.embedding_table(labels_B)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def attend(q_BHNE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """``softmax(scale q k^T) v``; ``mask`` is true where a key counts.

    Short sequences in bfloat16 on a CPU are multiplied out where no gradient is wanted: 1.6 times as fast there as the
    fused kernel, whose blocks are made for long ones.
    """
    is_short = k_BHKE.shape[-2] <= SHORT_SEQUENCE
    if torch.is_grad_enabled() or not is_short or q_BHNE.device.type != "cpu" or q_BHNE.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHNE, k_BHKE, v_BHKE, attn_mask=mask, scale=scale)
    with torch.autocast("cpu", enabled=False):
        weights_BHNK = (q_BHNE * scale) @ k_BHKE.transpose(-2, -1)
        if mask is not None:
            weights_BHNK = weights_BHNK.masked_fill(~mask, -torch.inf)
        return weights_BHNK.softmax(dim=-1) @ v_BHKE


class HeadNorm(nn.RMSNorm):
    """RMS norm of each head's channels with a learnt gain, in the number format of its input."""

    def forward(self, x: Tensor) -> Tensor:
        # under autocast the gain is float32 and the input is not, for which there is no fused kernel
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Attention over image tokens; one linear map for q, k, v (rows: q, k, v, then head, then channel).

    Args:
        scale: factor on q k^T.
        qk_norm: RMS norm of q and k per head, with a learnt gain per channel.
    """

    def __init__(self, hidden_size: int, num_heads: int, scale: float, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        head_size = hidden_size // num_heads
        self.q_norm = HeadNorm(head_size, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(head_size, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x_BND).chunk(3, dim=-1))
        h_BHNE = attend(self.q_norm(q), self.k_norm(k), v, scale=self.scale)
        return self.proj(merge_heads(h_BHNE))


class CrossAttention(nn.Module):
    """Attention from image tokens to text tokens (PixArt-alpha): q of the image; k and v of the text, in this order."""

    def __init__(self, hidden_size: int, num_heads: int, scale: float) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor, y_BTD: Tensor, mask_B11T: Tensor | None) -> Tensor:
        """Args: mask_B11T: bool, the text tokens that count; None: all."""
        q_BHNE = split_heads(self.q_linear(x_BND), self.num_heads)
        k_BHTE, v_BHTE = (split_heads(part, self.num_heads) for part in self.kv_linear(y_BTD).chunk(2, dim=-1))
        h_BHNE = attend(q_BHNE, k_BHTE, v_BHTE, mask=mask_B11T, scale=self.scale)
        return self.proj(merge_heads(h_BHNE))


def xavier_std(shape: tuple[int, ...]) -> float:
    """Standard deviation of Xavier's law for a linear map, a convolution read as the map of a flattened patch."""
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    return math.sqrt(2.0 / (fan_in + fan_out))


def require_width(name: str, hidden_size: int, num_heads: int, also: int = 4) -> None:
    """Raises ConfigError unless the width is divisible by 4 (position table), by the heads and by ``also``."""
    for divisor, reason in ((4, "the position table"), (num_heads, "num_heads"), (also, name)):
        if hidden_size % divisor:
            raise ConfigError(f"hidden_size={hidden_size} is not divisible by {divisor}, which {reason} needs.")


def guided_pair(out_2B: Tensor, scale: float, channels: int) -> Tensor:
    """Classifier-free guidance of a batch whose halves are with and without the condition, on the first ``channels``.

    Both halves get ``u + scale (c - u)``; the other channels stay as they are in each half.
    """
    guided, rest = out_2B[:, :channels], out_2B[:, channels:]
    with_B, without_B = guided.chunk(2)
    both_B = without_B + scale * (with_B - without_B)
    return torch.cat([both_B.repeat(2, 1, 1, 1), rest], dim=1)
