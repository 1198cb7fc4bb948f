"""Drawing networks: projections of prototypes and times computed once against in every evaluation, and few steps.

    python -m benchmarks.rpg_generation [--json FILE] [--repeats 5]

Tokens of 8192 values and the paper's denoiser. "Hoisted" projects the prototypes once per token and the time once per
step; the released code does both for every token in every evaluation. The outputs must be equal. Evaluations of the
default sampler against the 1000 of DDPM are a property of the configuration; that the networks are as accurate is what
``python -m rpg.reproduce`` shows.
"""

import torch

from benchmarks.command import main
from benchmarks.processes import interleaved
from rpg.model import Generator
from rpg.model_config import GeneratorConfig
from rpg.sampling import SamplerConfig, sample_tokens

WIDTH, TOKENS, STEPS = 8192, 32, 2
HOIST, FEWER = 1.08, 15.0


def build_model(width: int) -> Generator:
    """A generator with random weights whose stack is small: only the denoiser is timed."""
    torch.manual_seed(0)
    config = GeneratorConfig(
        num_tokens=TOKENS, dim_per_token=width, d_model=64, post_d_model=width, d_state=16, expand=1, positions="1d"
    )
    return Generator(config, torch.zeros(TOKENS, 64)).eval()


def measure(repeats: int = 5) -> dict:
    """All figures."""
    ratios, seconds = {}, {}
    largest = 0.0
    for width in (2048, WIDTH):
        model = build_model(width)
        prototypes_1LP = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(1))
        sampler = SamplerConfig(steps=STEPS)

        def draw(hoist: bool, model=model, prototypes_1LP=prototypes_1LP, sampler=sampler) -> torch.Tensor:
            return sample_tokens(model, prototypes_1LP, [0], sampler, hoist=hoist)

        largest = max(largest, float((draw(True) - draw(False)).abs().max() / draw(True).abs().max()))
        found = interleaved({"every evaluation": lambda: draw(False), "hoisted": lambda: draw(True)}, repeats)
        seconds |= {f"D {width}, {name}": round(value, 3) for name, value in found.items()}
        ratios[width] = found["every evaluation"] / found["hoisted"]
        del model
    evaluations = SamplerConfig().evaluations(1000)
    return {
        "draw": f"{TOKENS} tokens, {STEPS} evaluations, channels 32-64-128-64-32, float32",
        "seconds": seconds,
        "hoisting at D 2048": ratios[2048],
        "largest relative difference of the outputs": largest,
        "ratios": [
            {"name": "hoisted over every evaluation, D 8192", "ratio": ratios[WIDTH], "target": HOIST},
            {"name": "evaluations of DDPM over those of the default sampler", "ratio": 1000 / evaluations,
             "target": FEWER},
        ],
        "checks": [
            {"claim": "outputs are equal", "measured": largest, "threshold": 1e-4, "passed": largest <= 1e-4},
        ],
    }  # fmt: skip


if __name__ == "__main__":
    main(measure, __doc__)
