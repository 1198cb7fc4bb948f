"""Random generators owned by purpose.

Every draw of a run comes from a generator made from (seed, purpose, indices), for example ``(seed, "time", step)``.
Draws are made for the whole global batch and sliced by sample, so neither the rank nor the accumulation index enters:
the same step sees the same random numbers on one process and on sixty-four.
"""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed that depends on every argument and on nothing else (stable over machines and versions).

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, e.g. ``"time"``, ``"mask"``, ``"sample"``.
        indices: step, sequence number, ... in an order that the purpose fixes.
    """
    text = "/".join([str(int(seed)), purpose, *(str(int(i)) for i in indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose; the stream depends on (seed, purpose, indices) only."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *indices))
