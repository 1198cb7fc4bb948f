"""State dict <-> tokens: every varying tensor is normalised, flattened and cut into tokens of D values.

With granularity 1 (the default) a token never spans two tensors; with 2 it also holds whole rows (output channels)
only, or parts of one row; with 0 all tensors are one vector, which is cut. What is left of a tensor's last token is
padding. In every case a tensor's values stay in row-major order, so tokens are described by a count and a width.

Unlike the released code, a tensor whose values are all equal has tokens of zeros (there: NaN, so that they look like
padding), dtypes and ties are kept, and integer tensors of any size survive.

Dimensions: L tokens of a network, D values of a token, V values of one tensor, n tokens of one tensor.

Source: weight tokenisation of RPG (Wang et al., arXiv 2501.11587).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.config import require_at_least, require_choice
from common.errors import DataError
from rpg.structure import CHUNK_VALUES, VARIANCE_OFFSET, Structure, TensorEntry, log_variance

GRANULARITIES = (0, 1, 2)
CODEC_FILE = "codec.json"
LEAST_VARIANCE = 0.001  # of a restored running variance, in units of its scale


@dataclass(frozen=True)
class Span:
    """Where one varying tensor lies: ``width`` values of each of the tokens ``first`` .. ``first + count - 1``.

    ``skip`` values of the first token belong to earlier tensors (granularity 0 only).
    """

    first: int
    count: int
    width: int
    skip: int = 0


def token_layout(shape: Sequence[int], dim_per_token: int, granularity: int) -> tuple[int, int]:
    """Tokens of one tensor and the values that each holds (the last one may hold fewer under granularity 1).

    Granularity 2 takes the fewest equal groups of whole rows that fit; rows that do not fit are cut by themselves.
    """
    num_values = math.prod(shape)
    if granularity != 2 or num_values <= dim_per_token:
        return -(-num_values // dim_per_token), min(dim_per_token, num_values)
    rows, row_values = shape[0], num_values // shape[0]
    if row_values > dim_per_token:
        count, width = token_layout(shape[1:], dim_per_token, granularity)
        return rows * count, width
    groups = num_values // dim_per_token
    while rows % groups or row_values * (rows // groups) > dim_per_token:
        groups += 1
    return groups, row_values * (rows // groups)


def layer_to_token(tensor: Tensor, dim_per_token: int, granularity: int = 1, fill_value: float = math.nan) -> Tensor:
    """One tensor as tokens (n, D), as it is, without normalisation."""
    count, width = token_layout(tensor.shape, dim_per_token, granularity)
    tokens_nD = torch.full((count, dim_per_token), fill_value, dtype=torch.float32)
    span = Span(0, count, width)
    for block, first, last in _blocks(tokens_nD, span, tensor.numel(), granularity):
        block.copy_(tensor.reshape(-1)[first:last].view(block.shape))
    return tokens_nD


def _blocks(tokens_LD: Tensor, span: Span, num_values: int, granularity: int) -> Iterator[tuple[Tensor, int, int]]:
    """Views of a tensor's values in the tokens, with the range of the flat tensor that each holds."""
    dim = tokens_LD.shape[1]
    if granularity == 2:
        rows = max(1, CHUNK_VALUES // span.width)
        for row in range(0, span.count, rows):
            last = min(row + rows, span.count)
            yield tokens_LD[span.first + row : span.first + last, : span.width], row * span.width, last * span.width
        return
    start = span.first * dim + span.skip
    flat = tokens_LD.view(-1)
    for first in range(0, num_values, CHUNK_VALUES):
        last = min(first + CHUNK_VALUES, num_values)
        yield flat[start + first : start + last], first, last


class TokenCodec:
    """Turns state dicts of one structure into tokens and back.

    Args:
        structure: keys, shapes and statistics (``rpg.structure``).
        dim_per_token: D.
        granularity: 0 one vector, 1 per tensor, 2 per rows of a tensor.
        fill_value: of the padding.

    Attributes:
        num_tokens, dim: L and D.
        tensor_names: keys of the varying tensors.
        token_tensor_L: which varying tensor a token belongs to (under granularity 0, that of its first value).
        token_index_L: which token of that tensor it is.
        valid_L: values, not padding, in each token.
        std_L: residual normalisation only: what each token is divided by; else None.

    Raises: ConfigError for a granularity or D that cannot work; DataError if nothing varies.
    """

    def __init__(
        self, structure: Structure, dim_per_token: int, granularity: int = 1, fill_value: float = math.nan
    ) -> None:
        require_choice("data.granularity", granularity, GRANULARITIES)
        require_at_least("data.dim_per_token", dim_per_token, 1)
        self.structure, self.dim, self.granularity, self.fill_value = structure, dim_per_token, granularity, fill_value
        self.varying = structure.varying
        self.tensor_names = tuple(entry.name for entry in self.varying)
        self.num_values = structure.num_values
        if not self.varying:
            raise DataError(
                "No tensor of the checkpoints varies (floating point, at least two elements), so there is nothing to "
                "generate."
            )
        self.spans = self._lay_out()
        self.num_tokens = self.spans[-1].first + self.spans[-1].count
        self.token_tensor_L, self.token_index_L, self.valid_L = self._describe_tokens()
        self.std_L = self._token_stds() if structure.normalisation == "residual" else None

    def _lay_out(self) -> tuple[Span, ...]:
        spans, first, offset = [], 0, 0
        for entry in self.varying:
            if self.granularity == 0:
                last = offset + entry.num_values
                start = offset // self.dim
                spans.append(Span(start, -(-last // self.dim) - start, self.dim, offset % self.dim))
                offset = last
            else:
                count, width = token_layout(entry.shape, self.dim, self.granularity)
                spans.append(Span(first, count, width))
                first += count
        return tuple(spans)

    def _describe_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        tensor_L = torch.zeros(self.num_tokens, dtype=torch.int64)
        index_L, valid_L = torch.zeros_like(tensor_L), torch.full_like(tensor_L, self.dim)
        for position, (entry, span) in enumerate(zip(self.varying, self.spans)):
            first = span.first + (span.skip > 0)  # a shared token belongs to the tensor that it starts with
            last = span.first + span.count
            tensor_L[first:last] = position
            index_L[first:last] = torch.arange(max(last - first, 0))
            if self.granularity:
                valid_L[first:last] = span.width
            if self.granularity == 1:
                valid_L[last - 1] = entry.num_values - (span.count - 1) * self.dim
        if self.granularity == 0:
            valid_L[-1] = self.num_values - (self.num_tokens - 1) * self.dim
        return tensor_L, index_L, valid_L

    def _token_stds(self) -> Tensor:
        """Root mean square, over a token's values, of their deviations between checkpoints."""
        variance_LD = torch.zeros(self.num_tokens, self.dim)
        for entry, span in zip(self.varying, self.spans):
            for block, first, last in _blocks(variance_LD, span, entry.num_values, self.granularity):
                block.copy_(entry.variance_V[first:last].view(block.shape))
        return (variance_LD.sum(1, dtype=torch.float64) / self.valid_L).sqrt().float()

    def __repr__(self) -> str:
        return (
            f"TokenCodec({self.num_tokens} tokens of {self.dim}, {len(self.varying)} tensors, {self.num_values} values,"
            f" granularity {self.granularity}, {self.structure.normalisation} normalisation)"
        )

    @property
    def fill(self) -> float:
        """Share of the tokens that is not padding."""
        return self.num_values / (self.num_tokens * self.dim)

    def tokens_of(self, name: str) -> slice:
        """The tokens of one varying tensor."""
        span = self.spans[self.tensor_names.index(name)]
        return slice(span.first, span.first + span.count)

    def mask(self) -> Tensor:
        """(L, D) bool: True where a value is, False at padding."""
        return torch.arange(self.dim) < self.valid_L[:, None]

    @torch.no_grad()
    def encode(self, state: Mapping[str, Tensor], *, out: Tensor | None = None) -> Tensor:
        """Tokens (L, D) of a state dict, float32, padding filled with ``fill_value``.

        Args:
            out: written to instead of a new tensor, for example a memory map's.

        Raises: DataError if keys, shapes or dtypes differ from the structure's.
        """
        self.structure.require_same_layout(state)
        tokens_LD = torch.empty(self.num_tokens, self.dim) if out is None else out
        self._fill_padding(tokens_LD)
        for entry, span in zip(self.varying, self.spans):
            values_V = state[entry.name].detach().reshape(-1)
            for block, first, last in _blocks(tokens_LD, span, entry.num_values, self.granularity):
                block.copy_(self._normalise(entry, values_V[first:last], first).view(block.shape))
            if self.std_L is not None and self.granularity:
                self._scale(tokens_LD, span)
        if self.std_L is not None and not self.granularity:
            self._scale(tokens_LD, Span(0, self.num_tokens, self.dim))
        return tokens_LD

    def _fill_padding(self, tokens_LD: Tensor) -> None:
        for token in torch.nonzero(self.valid_L < self.dim).flatten().tolist():
            tokens_LD[token, int(self.valid_L[token]) :] = self.fill_value

    def _scale(self, tokens_LD: Tensor, span: Span) -> None:
        """Divides tokens by their deviation; where nothing varies, they become zero."""
        std_n = self.std_L[span.first : span.first + span.count]
        factor_n = torch.where(std_n > 0, 1 / std_n, 0.0)
        tokens_LD[span.first : span.first + span.count] *= factor_n[:, None]

    def _normalise(self, entry: TensorEntry, values: Tensor, first: int) -> Tensor:
        # float64 inside, because two roundings of a token would already cost a relative 1e-7 each way
        values = values.to("cpu", torch.float64)
        if entry.scale is not None:
            values = log_variance(values, entry.scale)
        if self.std_L is not None:
            return values - entry.mean_V[first : first + len(values)]
        return (values - entry.mean) * (1 / entry.std if entry.std > 0 else 0.0)

    @torch.no_grad()
    def decode(self, tokens_LD: Tensor) -> dict[str, Tensor]:
        """The state dict of tokens (L, D) or (1, L, D): original keys, order, shapes, dtypes and ties.

        Padding is dropped, whatever it holds. Restored running variances are at least 0.001 of their scale.

        Raises: DataError for another shape.
        """
        tokens_LD = tokens_LD.detach().to("cpu", torch.float32)
        if tokens_LD.dim() == 3 and len(tokens_LD) == 1:
            tokens_LD = tokens_LD[0]
        if tokens_LD.shape != (self.num_tokens, self.dim):
            raise DataError(
                f"tokens have shape {tuple(tokens_LD.shape)}, this network's have ({self.num_tokens}, {self.dim}); one "
                "network is decoded at a time."
            )
        tokens_LD = tokens_LD.contiguous()
        spans = dict(zip(self.tensor_names, self.spans))
        state: dict[str, Tensor] = {}
        for entry in self.structure.entries:
            if entry.kind == "alias":
                state[entry.name] = state[entry.alias_of]
            elif entry.kind == "constant":
                state[entry.name] = entry.value.clone()
            else:
                state[entry.name] = self._restore(entry, spans[entry.name], tokens_LD)
        return state

    def _restore(self, entry: TensorEntry, span: Span, tokens_LD: Tensor) -> Tensor:
        values_V = torch.empty(entry.num_values, dtype=entry.dtype)
        if self.std_L is not None:  # one tensor's tokens at a time, so that memory stays small
            tokens_LD = tokens_LD[span.first : span.first + span.count].clone()
            tokens_LD *= self.std_L[span.first : span.first + span.count, None]
            span = Span(0, span.count, span.width, span.skip)
        for block, first, last in _blocks(tokens_LD, span, entry.num_values, self.granularity):
            values = block.reshape(-1).double()
            if self.std_L is not None:
                values += entry.mean_V[first:last]
            elif entry.std > 0:
                values = values.mul_(entry.std).add_(entry.mean)
            else:
                values.fill_(entry.mean)
            if entry.scale is not None:
                values = (values.exp_() - VARIANCE_OFFSET).clamp_(min=LEAST_VARIANCE) * entry.scale
            values_V[first:last] = values.to(entry.dtype)
        return values_V.view(entry.shape)

    def to_folder(self, folder: str | Path) -> None:
        """Writes ``codec.json`` beside the structure's files."""
        self.structure.to_folder(folder)
        facts = {"dim_per_token": self.dim, "granularity": self.granularity, "fill_value": str(self.fill_value)}
        (Path(folder) / CODEC_FILE).write_text(json.dumps(facts, indent=1))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "TokenCodec":
        """Reads what ``to_folder`` wrote.

        Raises: DataError if a file is missing or damaged.
        """
        path = Path(folder) / CODEC_FILE
        try:
            facts = json.loads(path.read_text())
            options = (facts["dim_per_token"], facts["granularity"], float(facts["fill_value"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({type(error).__name__}: {error}); export the generator again."
            ) from None
        return cls(Structure.from_folder(folder), *options)
