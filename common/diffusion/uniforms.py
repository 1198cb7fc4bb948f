"""Where the random numbers of a sampler come from: recorded arrays, or one generator per row.

Both have the methods of ``absorbing.UniformSource``. Dimensions: S steps, B sequences, L positions, P positions of one
call, C columns of a race.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigError
from common.seeding import generator


class ArrayUniforms:
    """Recorded uniforms.

    Args:
        update_SBL: decides whether a position is unmasked; needed by two-stage steps only.
        token: ``(S, B, L)`` for inversion, ``(S, B, L, C)`` for a race, or ``(S, B, 1, C)`` when a step fills one
            position per row.
    """

    def __init__(self, token: Tensor, update_SBL: Tensor | None = None) -> None:
        self._token = torch.as_tensor(token)
        self._update_SBL = None if update_SBL is None else torch.as_tensor(update_SBL)

    def update(self, step_P: Tensor, row_P: Tensor, position_P: Tensor) -> Tensor:
        if self._update_SBL is None:
            raise ConfigError("these uniforms have no update array, which steps in two stages need; pass update_SBL.")
        return self._update_SBL[step_P, row_P, position_P]

    def token(self, step_P: Tensor, row_P: Tensor, position_P: Tensor, columns: int) -> Tensor:
        if self._token.shape[2] == 1:
            position_P = torch.zeros_like(position_P)
        uniform = self._token[step_P, row_P, position_P]
        return uniform[:, :columns] if uniform.dim() == 2 else uniform


class RowUniforms:
    """Uniforms of one generator per row, so that a row's numbers do not depend on the other rows.

    Args:
        seed: of the run.
        dtype: float32 draws on a grid of 2^-24, as the reference does.
        race: whether a token takes one uniform per column instead of one.
    """

    def __init__(self, seed: int, *, dtype: torch.dtype = torch.float64, race: bool = False) -> None:
        self._seed, self._dtype, self._race = seed, dtype, race
        self._generators: dict[int, torch.Generator] = {}

    def _draw(self, row_P: Tensor, shape: Sequence[int] = ()) -> Tensor:
        parts = []
        for row, count in zip(*torch.unique_consecutive(row_P, return_counts=True)):
            if int(row) not in self._generators:
                self._generators[int(row)] = generator(self._seed, "sample", int(row))
            stream = self._generators[int(row)]
            parts.append(torch.rand(int(count), *shape, dtype=self._dtype, generator=stream))
        return torch.cat(parts) if parts else torch.empty(0, *shape, dtype=self._dtype)

    def update(self, step_P: Tensor, row_P: Tensor, position_P: Tensor) -> Tensor:
        return self._draw(row_P)

    def token(self, step_P: Tensor, row_P: Tensor, position_P: Tensor, columns: int) -> Tensor:
        return self._draw(row_P, (columns,) if self._race else ())

    def forget(self, row: int) -> None:
        """Frees the generator of a finished row."""
        self._generators.pop(row, None)
