"""Keys and values of the text before the current block, for semi-autoregressive decoding (``cache=prefix``).

Attention is block-causal: a block sees itself and the blocks before it, whose keys and values were computed once, when
they were complete. So a call processes the tokens of one block instead of the whole text. The result equals that of
calls on the whole text under ``block_causal_allowed``: exact for a model that was adapted with that mask. For a model
adapted to full attention it is an approximation: finished blocks no longer see what comes after them, and the current
one sees no masks to its right. With the shift the first token of a block is predicted by the last hidden state of the
block before, hence from the finished text only.

Dimensions: R sequences in flight, L positions, P positions with predictions, D width, V vocabulary, K positions of the
cached prefix.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from diffullama.model import DiffusionLM


def block_causal_allowed(length: int, block_length: int) -> Tensor:
    """Bool ``(L, L)``: query i sees key j where the block of j is not after that of i."""
    block_L = torch.arange(length) // block_length
    return block_L[None, :] <= block_L[:, None]


@dataclass
class _Prefix:
    """One row's finished blocks: their tokens, keys and values of each layer ``(H, K, D/H)``, last hidden state."""

    tokens_K: Tensor
    layers: list[tuple[Tensor, Tensor]]
    hidden_D: Tensor


class PrefixCachedDenoiser:
    """A ``common.diffusion.absorbing.RowDenoiser`` over blocks; positions asked for lie in one block of each row.

    Args:
        model: in eval mode.
        block_length: positions of a block, counted from position 0.
        context: entered around every network call, for autocast.

    Attributes:
        extensions: network launches, besides the calls, that added a finished block to a cache.
    """

    evaluations_per_call = 1

    def __init__(
        self,
        model: DiffusionLM,
        block_length: int,
        context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self._model, self._block_length, self._context = model, block_length, context
        self._prefixes: dict[int, _Prefix] = {}
        self._batch: tuple[tuple[int, ...], int, DynamicCache] | None = None  # of the last call
        self.extensions = 0

    @torch.no_grad()
    def at_rows(self, tokens_RL: Tensor, where_RL: Tensor, *, index_R: Tensor, given_RL: Tensor) -> Tensor:
        row_numbers = index_R.tolist()
        self._prefixes = {row: prefix for row, prefix in self._prefixes.items() if row in set(row_numbers)}
        block_R = where_RL.long().argmax(1) // self._block_length
        row_P, position_P = where_RL.nonzero(as_tuple=True)
        hidden_PD: Tensor | None = None
        for block in block_R.unique().tolist():
            rows_G = (block_R == block).nonzero().squeeze(1)
            hidden_GKD = self._block_hidden(tokens_RL[rows_G], [row_numbers[row] for row in rows_G.tolist()], block)
            place_R = torch.full_like(block_R, -1)
            place_R[rows_G] = torch.arange(len(rows_G), device=place_R.device)
            mine_P = place_R[row_P] >= 0
            offset_P = position_P[mine_P] - block * self._block_length
            if hidden_PD is None:
                hidden_PD = hidden_GKD.new_empty(len(row_P), hidden_GKD.shape[-1])
            hidden_PD[mine_P] = hidden_GKD[place_R[row_P[mine_P]], offset_P]
        with self._context():
            return self._model.log_probs(hidden_PD)

    def _block_hidden(self, tokens_GL: Tensor, row_numbers: list[int], block: int) -> Tensor:
        """Hidden states that predict the tokens of ``block``: ``(G, K, D)`` with the block's K positions."""
        start = block * self._block_length
        for row, tokens_L in zip(row_numbers, tokens_GL):
            prefix = self._prefixes.get(row)
            if prefix is not None and not torch.equal(prefix.tokens_K, tokens_L[: len(prefix.tokens_K)]):
                del self._prefixes[row]  # another text under the same number
                self._batch = None
        self._extend(tokens_GL, row_numbers, block)
        if self._batch is None or self._batch[:2] != (tuple(row_numbers), block):
            self._batch = (tuple(row_numbers), block, self._stack(row_numbers))
        cache = self._batch[2]
        hidden_GKD = self._run(tokens_GL[:, start : start + self._block_length], cache)
        if block:
            cache.crop(-hidden_GKD.shape[1])  # a negative number is how many of the last positions go
        else:
            self._batch = None
        if not self._model.shift:
            return hidden_GKD
        before_GD = (
            torch.stack([self._prefixes[row].hidden_D for row in row_numbers])
            if block
            else torch.zeros_like(hidden_GKD[:, 0])  # position 0 is given: nothing reads this
        )
        return torch.cat([before_GD[:, None], hidden_GKD[:, :-1]], dim=1)

    def _extend(self, tokens_GL: Tensor, row_numbers: list[int], block: int) -> None:
        """Adds finished blocks to the rows' caches, rows that lack equally many together."""
        done = [self._length(row) for row in row_numbers]
        while (shortest := min(done)) < block * self._block_length:
            behind = [place for place, length in enumerate(done) if length == shortest]
            rows = [row_numbers[place] for place in behind]
            cache = self._stack(rows)
            end = shortest + self._block_length
            tokens_GK = tokens_GL[behind, shortest:end]
            hidden_GKD = self._run(tokens_GK, cache)
            self.extensions += 1
            for place, row in enumerate(rows):
                layers = [(layer.keys[place], layer.values[place]) for layer in cache.layers]
                self._prefixes[row] = _Prefix(tokens_GL[behind[place], :end].clone(), layers, hidden_GKD[place, -1])
            for place in behind:
                done[place] = end

    def _length(self, row: int) -> int:
        return len(self._prefixes[row].tokens_K) if row in self._prefixes else 0

    def _stack(self, rows: list[int]) -> DynamicCache:
        """One cache for rows whose prefixes are equally long."""
        cache = DynamicCache()
        if self._length(rows[0]):
            per_row = [self._prefixes[row].layers for row in rows]
            for index, parts in enumerate(zip(*per_row)):
                keys, values = (torch.stack(tensors) for tensors in zip(*parts))
                cache.update(keys, values, index)
        return cache

    def _run(self, tokens_GK: Tensor, cache: DynamicCache) -> Tensor:
        with self._context():
            output = self._model.hf.base_model(
                input_ids=tokens_GK, past_key_values=cache, use_cache=True, attention_mask=None, is_causal=False
            )
        return output.last_hidden_state
