"""The Mamba-2 block of RPG against the PyTorch path of transformers' Mamba-2: time, memory, growth with the length.

    python -m benchmarks.rpg_mamba2 [--json FILE] [--repeats 5]

Forward and backward of one block, M 512, L 1024, N 128, batch 1, with the weights of the other implementation, whose
outputs must be equal. Times are medians of interleaved runs; memory is what a fresh process needs above the block and
its gradients. transformers' chunk is 256, its default and that of published models; its time at ours stands beside.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.command import main
from benchmarks.processes import interleaved, peak_growth
from rpg.mamba2 import Mamba2Mixer

WIDTH, LENGTH, STATE = 512, 1024, 128
LENGTHS = (512, 1024, 2048, 4096, 8192)
SPEED, MEMORY, GROWTH = 1.7, 0.75, 1.35
ALIKE = {"rtol": 1e-3, "atol": 1e-4}


def build_ours() -> Mamba2Mixer:
    """Our block with fixed weights."""
    torch.manual_seed(0)
    return Mamba2Mixer(WIDTH, d_state=STATE)


def build_theirs(chunk_size: int = 256) -> nn.Module:
    """transformers' block with the weights of ours."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

    config = Mamba2Config(
        hidden_size=WIDTH, state_size=STATE, num_heads=2 * WIDTH // 64, head_dim=64, n_groups=1, expand=2,
        conv_kernel=4, use_bias=False, use_conv_bias=True, chunk_size=chunk_size, num_hidden_layers=1,
        time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    theirs = TheirMixer(config, layer_idx=0)
    theirs.load_state_dict(build_ours().state_dict(), strict=True)
    return theirs


def step(block: nn.Module, u_BLM: Tensor, *, bf16: bool = False) -> Tensor:
    """One forward and backward pass; returns the output."""
    block.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        y_BLM = block(u_BLM)
    y_BLM.float().square().mean().backward()
    return y_BLM.detach()


def make_input(length: int = LENGTH) -> Tensor:
    """Random inputs, small as those of a trained network."""
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def work(which: str) -> Callable[[], object]:
    """What a fresh process does to have its memory measured, after it has built the block and one gradient."""
    block = build_ours() if which == "ours" else build_theirs()
    u_BLM = make_input()
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(block, make_input(8))
    return lambda: step(block, u_BLM)


def measure(repeats: int = 5) -> dict:
    """All figures."""
    ours, theirs, same_chunk = build_ours(), build_theirs(), build_theirs(ours_chunk())
    u_BLM = make_input()
    difference = float((step(ours, u_BLM) - step(theirs, u_BLM)).abs().max())
    equal = torch.allclose(step(ours, u_BLM), step(theirs, u_BLM), **ALIKE)
    seconds = interleaved(
        {
            "ours": lambda: step(ours, u_BLM),
            "transformers": lambda: step(theirs, u_BLM),
            "transformers, our chunk": lambda: step(same_chunk, u_BLM),
            "ours, bf16": lambda: step(ours, u_BLM, bf16=True),
            "transformers, bf16": lambda: step(theirs, u_BLM, bf16=True),
        },
        repeats,
    )
    by_length = interleaved({str(n): lambda n=n: step(ours, make_input(n)) for n in LENGTHS}, max(2, repeats // 2))
    memory = {which: peak_growth("benchmarks.rpg_mamba2:work", which) for which in ("ours", "transformers")}
    per_position = {n: by_length[str(n)] / n for n in LENGTHS}
    growth = per_position[LENGTHS[-1]] / per_position[LENGTHS[0]]
    return {
        "block": f"M {WIDTH}, L {LENGTH}, N {STATE}, batch 1, forward and backward",
        "milliseconds": {name: round(1e3 * value, 1) for name, value in seconds.items()},
        "milliseconds by length": {name: round(1e3 * value, 1) for name, value in by_length.items()},
        "peak MiB above the block": {name: round(value / 2**20, 1) for name, value in memory.items()},
        "largest difference of the outputs": difference,
        "ratios": [
            {"name": "speed over transformers, fp32", "ratio": seconds["transformers"] / seconds["ours"],
             "target": SPEED},
            {"name": "speed over transformers, bf16", "ratio": seconds["transformers, bf16"] / seconds["ours, bf16"],
             "target": SPEED},
        ],
        "checks": [
            {"claim": "outputs equal those of transformers", "measured": difference, "threshold": "rtol 1e-3",
             "passed": equal},
            {"claim": "memory over transformers' at most", "measured": memory["ours"] / memory["transformers"],
             "threshold": MEMORY, "passed": memory["ours"] <= MEMORY * memory["transformers"]},
            {"claim": "time per position at L 8192 over L 512 at most", "measured": growth, "threshold": GROWTH,
             "passed": growth <= GROWTH},
        ],
    }  # fmt: skip


def ours_chunk() -> int:
    """Positions per chunk of our block."""
    return build_ours().chunk_size


if __name__ == "__main__":
    main(measure, __doc__)
