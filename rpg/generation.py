"""Networks from a loaded generator: prototypes once per condition and state, tokens split over processes, state dicts.

A network is a function of the generator, the seed and its request: neither the number of networks, nor the rows of a
pass, nor the number of processes changes it (beyond rounding).

Dimensions: n networks drawn together, L tokens, D values, P width of a prototype.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from common.config import require_at_least
from common.errors import CheckpointError, ConfigError
from common.parallel import Parallel
from common.precision import autocast, resolve_precision
from common.seeding import derive_seed
from rpg.loading import LoadedGenerator
from rpg.requests import Request
from rpg.sampling import NOISE_BLOCK, SamplerConfig, sample_tokens, token_shares

__all__ = ["Request", "generate", "network_seed"]

TOKENS_IN_MEMORY = 1 << 29  # bytes of tokens, or of prototypes, that are drawn or kept together

State = dict[str, Tensor]
Key = tuple[int | None, tuple[float, ...] | None]


def network_seed(seed: int, request: Request) -> int:
    """The seed of one network's noise."""
    return derive_seed(seed, f"network {request.label}", request.index)


@torch.no_grad()
def generate(
    loaded: LoadedGenerator,
    requests: Sequence[Request],
    sampler: SamplerConfig | None = None,
    *,
    seed: int,
    rows_per_pass: int = 512,
    parallel: Parallel | None = None,
    precision: str = "fp32",
) -> Iterator[tuple[Request, State]]:
    """Each request with its network, in order; on the main process only, but every process must iterate to the end.

    Args:
        requests: the same on every process; (label, index) of each is unique.
        sampler: None: the one that was stored with the generator, or 50 ancestral steps.
        seed: of all of them, see ``network_seed``.
        rows_per_pass: tokens in the denoiser at a time: memory against speed.
        precision: of the network; the sampler's state is float32.

    Raises: ConfigError for a state or condition that the generator does not take, before the first network;
        CheckpointError if values are not finite.
    """
    sampler = sampler or loaded.sampler
    require_at_least("rows_per_pass", rows_per_pass, 1)
    check_requests(loaded, requests, sampler)
    parallel = parallel or Parallel(0, 1, 0, loaded.device)
    prototypes = _Prototypes(loaded, resolve_precision(precision, loaded.device))
    bytes_each = 4 * loaded.config.num_tokens * max(loaded.config.dim_per_token, loaded.config.width)
    together = max(1, TOKENS_IN_MEMORY // bytes_each)
    for first in range(0, len(requests), together):
        chunk = requests[first : first + together]
        tokens_nLD = _draw(loaded, prototypes, chunk, sampler, seed, rows_per_pass, parallel)
        if tokens_nLD is not None:
            for request, tokens_LD in zip(chunk, tokens_nLD, strict=True):
                yield request, loaded.codec.decode(tokens_LD)


def check_requests(loaded: LoadedGenerator, requests: Sequence[Request], sampler: SamplerConfig) -> None:
    """Raises ConfigError for requests that the generator cannot serve."""
    config = loaded.config
    size = config.condition_size if config.condition != "none" else 0
    if sampler.guidance != 1 and not size:
        raise ConfigError(f"sampling.guidance={sampler.guidance} needs a conditional generator; this one has none.")
    for request in requests:
        given = 0 if request.condition is None else len(request.condition)
        if given != size:
            takes = f"takes {size} numbers" if size else "takes none"
            raise ConfigError(f"request {request.index} has a condition of {given} numbers, but the generator {takes}.")
        if request.state is not None and not 0 <= request.state < config.num_states:
            raise ConfigError(
                f"request {request.index} asks for permutation state {request.state}, but the generator has "
                f"{config.num_states}."
            )
    if config.head == "diffusion":
        sampler.evaluations(config.diffusion_steps)  # its check of the steps


def _draw(
    loaded: LoadedGenerator,
    prototypes: "_Prototypes",
    chunk: Sequence[Request],
    sampler: SamplerConfig,
    seed: int,
    rows_per_pass: int,
    parallel: Parallel,
) -> Tensor | None:
    """tokens_nLD of the chunk on the main process, None on the others."""
    num_tokens = loaded.config.num_tokens
    blocks = -(-num_tokens // NOISE_BLOCK)
    by_tokens = len(chunk) < parallel.world_size or blocks >= 4 * parallel.world_size
    if by_tokens:
        mine, tokens = chunk, token_shares(num_tokens, parallel.world_size)[parallel.rank]
    else:
        mine, tokens = chunk[parallel.rank :: parallel.world_size], range(num_tokens)
    own = prototypes.of(mine)
    null = prototypes.of([Request(0, request.state) for request in mine], drop=True) if sampler.guidance != 1 else None
    try:
        with prototypes.autocast():
            tokens_ntD = sample_tokens(
                loaded.model,
                own,
                [network_seed(seed, request) for request in mine],
                sampler,
                tokens=tokens,
                rows_per_pass=rows_per_pass,
                null_prototypes_nLP=null,
                valid_L=loaded.codec.valid_L,
            )
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        raise CheckpointError(f"generator={loaded.source}: {error}") from None
    if parallel.world_size == 1:
        return tokens_ntD
    return (
        _gather_tokens(tokens_ntD, num_tokens, parallel)
        if by_tokens
        else _gather_networks(tokens_ntD, len(chunk), parallel)
    )


def _gather_tokens(tokens_ntD: Tensor, num_tokens: int, parallel: Parallel) -> Tensor | None:
    shares = token_shares(num_tokens, parallel.world_size)
    n, _, size = tokens_ntD.shape
    parts = _gather(tokens_ntD, (n, max(map(len, shares)), size), parallel)
    if parts is None:
        return None
    return torch.cat([part[:, : len(share)] for part, share in zip(parts, shares, strict=True)], dim=1)


def _gather_networks(tokens_nLD: Tensor, count: int, parallel: Parallel) -> Tensor | None:
    _, num_tokens, size = tokens_nLD.shape
    parts = _gather(tokens_nLD, (-(-count // parallel.world_size), num_tokens, size), parallel)
    if parts is None:
        return None
    whole_nLD = torch.empty(count, num_tokens, size)
    for rank, part in enumerate(parts):
        place = whole_nLD[rank :: parallel.world_size]
        place.copy_(part[: len(place)])
    return whole_nLD


def _gather(tensor: Tensor, shape: tuple[int, ...], parallel: Parallel) -> list[Tensor] | None:
    """All processes' tensors, each padded to ``shape``, on the main process."""
    padded = torch.zeros(shape, device=parallel.device)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor.to(parallel.device)
    parts = [torch.empty_like(padded) for _ in range(parallel.world_size)] if parallel.is_main else None
    dist.gather(padded, parts, dst=0)
    return None if parts is None else [part.cpu() for part in parts]


class _Prototypes:
    """Prototypes by (state, condition), each computed once and by itself, so that batches do not change its bits."""

    def __init__(self, loaded: LoadedGenerator, precision: str) -> None:
        self.loaded, self.precision = loaded, precision
        self.kept: dict[tuple[Key, bool], Tensor] = {}
        self.room = max(1, TOKENS_IN_MEMORY // (4 * loaded.config.num_tokens * loaded.config.width))

    def autocast(self):
        return autocast(self.precision, self.loaded.device)

    def of(self, requests: Sequence[Request], *, drop: bool = False) -> Tensor:
        """prototypes_nLP; one row if all requests share it.

        Args:
            drop: without the condition, for guidance.
        """
        keys = [(request.state, request.condition) for request in requests]
        rows = {key: self._compute(key, drop) for key in dict.fromkeys(keys)}
        if len(rows) == 1:
            return next(iter(rows.values()))
        if not rows:
            return torch.zeros(0, self.loaded.config.num_tokens, self.loaded.config.width, device=self.loaded.device)
        return torch.cat([rows[key] for key in keys])

    def _compute(self, key: Key, drop: bool) -> Tensor:
        if (key, drop) not in self.kept:
            state, condition = key
            device, size = self.loaded.device, self.loaded.config.condition_size
            if drop:
                condition = (0.0,) * size
            with self.autocast():
                prototypes_1LP = self.loaded.model.prototypes(
                    None if state is None else torch.tensor([state], device=device),
                    None if condition is None else torch.tensor([condition], device=device),
                    torch.zeros(1, device=device) if drop else None,
                )
            while len(self.kept) >= self.room:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key, drop] = prototypes_1LP.float()
        return self.kept[key, drop]
