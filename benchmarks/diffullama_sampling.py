"""Sampling of an adapted model: calls only where positions commit, against a network call in every step.

    python -m benchmarks.diffullama_sampling [--json FILE] [--pairs 2]

Texts of n = 128 free positions behind a begin-of-text token, T = 1024 steps, a small GPT-2 with random weights (which
cost as much as trained ones). Every baseline gets the same noise and must write the same tokens:

* ``random``: the released random order. The baseline calls the network on all rows in each of the T steps, with the
  head at all masked positions, and draws tokens only where one commits, which flatters it (released code draws at all);
* ``confidence``: the released confidence order, with and without the calls that change nothing. It draws at all
  positions in every step, which is what it ranks.

Also reported, without a threshold: semi-autoregressive decoding with and without the prefix cache, whose texts differ
for a model with full attention. Times are medians of interleaved runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from common.diffusion.categorical import draw_tokens
from common.diffusion.nfe import loglinear_nfe, reveal_distribution, update_rate
from common.diffusion.reveal import reveal_steps, row_uniforms
from common.diffusion.schedules import LogLinear
from diffullama.model import DiffusionLM
from diffullama.reference_samplers import sample
from diffullama.sampler import fill

FREE, STEPS, BATCH = 128, 1024, 2
VOCAB, WIDTH, LAYERS, HEADS = 512, 96, 3, 3
BLOCKED_FREE, BLOCK, BLOCK_STEPS = 256, 32, 8
BOS, MASK = 0, VOCAB - 1
CALL_RATIO, TIME_RATIO = 6.0, 5.0


def build_model() -> DiffusionLM:
    """A small GPT-2 with random weights and a head that is not uniform."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=BLOCKED_FREE + 1,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=None,
        eos_token_id=None,
    )
    lm = GPT2LMHeadModel(config)
    torch.nn.init.normal_(lm.lm_head.weight, std=0.1)
    return DiffusionLM.from_causal_lm(lm, MASK).eval()


def canvas(free: int = FREE, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """(x_BL, given_BL): a begin-of-text token and free positions."""
    x_BL = torch.full((rows, free + 1), BOS)
    given_BL = torch.zeros_like(x_BL, dtype=torch.bool)
    given_BL[:, 0] = True
    return x_BL, given_BL


@torch.no_grad()
def every_step(model: DiffusionLM, seed: int) -> Tensor:
    """The random order with one call on all rows in each step, and the noise of ``fill``."""
    x_BL, given_BL = canvas()
    tokens_BL = torch.where(given_BL, x_BL, MASK)
    level_BL, uniform_BL = row_uniforms(seed, range(BATCH), tokens_BL.shape[1])
    step_BL = reveal_steps(level_BL, reveal_distribution(update_rate(LogLinear(), "tweedie", STEPS, 0.0)))
    for step in range(STEPS):
        masked_BL = tokens_BL == MASK
        where_BL = masked_BL if bool(masked_BL.any()) else ~given_BL
        log_probs_PV = model.denoise(tokens_BL, where_BL)
        commits_BL = masked_BL & (step_BL == step)
        if bool(commits_BL.any()):
            tokens_BL[commits_BL] = draw_tokens(log_probs_PV[commits_BL[where_BL]], uniform_BL[commits_BL])
    return tokens_BL


def interleaved(candidates: dict[str, Callable[[], object]], pairs: int) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds and the last result of each candidate, run in turns so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    results: dict[str, object] = {}
    for _ in range(pairs):
        for name, run in candidates.items():
            started = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def measure(pairs: int = 2) -> dict[str, object]:
    """All figures; ``checks`` holds the claims with their thresholds."""
    model = build_model()
    x_BL, given_BL = canvas()
    blocked = canvas(BLOCKED_FREE)
    released = {"steps": STEPS, "order": "confidence", "trace": False, "seed": 2}
    semi = {"order": "confidence", "steps": BLOCK_STEPS, "block_length": BLOCK, "seed": 3}
    fill(model, x_BL, given_BL, order="random", steps=STEPS)  # warm up
    seconds, results = interleaved(
        {
            "random, every step": lambda: every_step(model, 1),
            "random": lambda: fill(model, x_BL, given_BL, order="random", steps=STEPS, seed=1),
            "confidence, every step": lambda: sample(model, x_BL, given_BL, cache=False, **released),
            "confidence": lambda: sample(model, x_BL, given_BL, cache=True, **released),
            "blocks": lambda: fill(model, *blocked, **semi),
            "blocks, prefix cache": lambda: fill(model, *blocked, cache="prefix", **semi),
        },
        pairs,
    )
    random, confidence = results["random"], results["confidence"]
    same_random = torch.equal(random.tokens_BL, results["random, every step"])
    same_confidence = torch.equal(confidence.tokens, results["confidence, every step"].tokens)
    calls = {"random": random.nfe, "confidence": float(confidence.calls_B.double().mean())}
    ratios = {
        "calls, random": STEPS / calls["random"],
        "time, random": seconds["random, every step"] / seconds["random"],
        "calls, confidence": STEPS / calls["confidence"],
        "time, confidence": seconds["confidence, every step"] / seconds["confidence"],
        "time, no cache / prefix cache": seconds["blocks"] / seconds["blocks, prefix cache"],
    }

    def check(claim: str, measured: float, threshold: float) -> dict[str, object]:
        return {
            "claim": claim,
            "measured": round(measured, 3),
            "threshold": f">= {threshold:g}",
            "passed": bool(measured >= threshold),
        }

    return {
        "setting": f"n = {FREE}, T = {STEPS}, batch {BATCH}, GPT-2 {WIDTH} wide, {LAYERS} layers, {VOCAB} tokens, fp32",
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "network calls per text": {**calls, "E-NFE of the random order": loglinear_nfe(STEPS, FREE)[0]},
        "every step / skipping": {name: round(value, 2) for name, value in ratios.items()},
        "checks": [
            check("random order: fewer network calls than T", ratios["calls, random"], CALL_RATIO),
            check("random order: faster than calling the model T times", ratios["time, random"], TIME_RATIO),
            check("random order: identical tokens for identical noise", float(same_random), 1),
            check("confidence order: fewer network calls than T", ratios["calls, confidence"], CALL_RATIO),
            check("confidence order: identical tokens for identical noise", float(same_confidence), 1),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--pairs", type=int, default=2, help="interleaved runs of each candidate")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.pairs), indent=1)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
