"""The sequence before sampling: which positions are given, with which ids, and which ones hold the mask.

Dimensions: B sequences, L positions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.errors import ConfigError

Fixed = Mapping[int, int] | tuple[Sequence[int], Sequence[int]]
"""Given positions: ``{position: id}`` or ``(ids, positions)``."""


def build_canvas(
    size: int,
    length: int,
    mask_id: int,
    *,
    num_tokens: int,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
    fixed: Fixed | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``size`` equal rows: the mask everywhere but at the given positions.

    Args:
        size: B.
        length: L.
        mask_id: id that marks a position to be filled.
        num_tokens: ids from 0 to ``num_tokens - 1``, except ``mask_id``, may be given.
        prefix: ids of positions 0, 1, ...
        suffix: ids of the last positions.
        fixed: any other given positions.

    Returns:
        tokens_BL, int64.

    Raises: ConfigError if prefix and suffix do not fit, a position is out of range or given twice with different ids,
        or an id is not in the vocabulary.
    """
    if size < 0 or length < 1:
        raise ConfigError(
            f"a canvas of {size} sequences of length={length} is not possible; length must be at least 1."
        )
    if len(prefix) + len(suffix) > length:
        raise ConfigError(
            f"prefix ({len(prefix)} tokens) and suffix ({len(suffix)} tokens) do not fit into length={length}; shorten "
            f"them or set length to at least {len(prefix) + len(suffix)}."
        )
    given: dict[int, int] = {}
    _give(given, enumerate(prefix), "prefix", length, mask_id, num_tokens)
    _give(given, enumerate(suffix, start=length - len(suffix)), "suffix", length, mask_id, num_tokens)
    if fixed is not None:
        if not isinstance(fixed, Mapping):
            ids, positions = fixed
            if len(ids) != len(positions):
                raise ConfigError(f"fixed has {len(ids)} ids for {len(positions)} positions; give one id per position.")
            fixed = dict(zip(positions, ids))
            if len(fixed) != len(positions):
                raise ConfigError("fixed names a position twice; give every position once.")
        _give(given, fixed.items(), "fixed", length, mask_id, num_tokens)
    row_L = torch.full((length,), mask_id, dtype=torch.int64)
    for position, token in given.items():
        row_L[position] = token
    return row_L.to(device).expand(size, length).clone()


def _give(given: dict[int, int], pairs, option: str, length: int, mask_id: int, num_tokens: int) -> None:
    """Adds checked (position, id) pairs to ``given``."""
    for position, token in pairs:
        position, token = int(position), int(token)
        if not 0 <= position < length:
            raise ConfigError(f"{option}: position {position} is outside 0..{length - 1} (length={length}).")
        if not 0 <= token < num_tokens or token == mask_id:
            raise ConfigError(
                f"{option}: id {token} at position {position} is not a token; ids run from 0 to {num_tokens - 1}"
                + (f" without the mask id {mask_id}." if mask_id < num_tokens else f" (id {mask_id} is the mask).")
            )
        if given.setdefault(position, token) != token:
            raise ConfigError(f"{option}: position {position} is already given as id {given[position]}, not {token}.")
