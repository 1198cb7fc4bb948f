"""Perplexity estimators: network rows needed for the same Monte-Carlo error, on a small network trained on real text.

    python -m benchmarks.radd_evaluation
    python -m benchmarks.radd_evaluation --steps 600 --sequences 128 --seeds 40

A byte network (width 64, 2 blocks, L = 64) is trained for some seconds on the text embedded in Python. Every estimator
then scores the same test sequences with several seeds. `cost` is the variance of a single row's estimate, nats per
token squared, so the ratio of two costs is the ratio of rows needed for the same error. `lambda_DCE independent` draws
every masking level by itself, `reference` stratifies levels over 16 sequences as the reference's batches do.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data.packing import pack
from common.data.text import embedded_documents
from common.data.tokenizer import ByteTokenizer
from common.diffusion.schedules import LogLinear
from common.evaluation.perplexity import GROUP_SIZE, GroupEstimate, MaskedRows, combine, estimate_group
from common.seeding import generator
from radd.losses import compute_loss, draw_loss_inputs
from radd.model import RADD, ModelConfig
from radd.perplexity import LossEstimator, loss_rows, token_nll

LENGTH, TOKENS = 64, 128
ROWS = 32  # per sequence and seed
BATCH_ROWS = 256


def blocks(split: str) -> Tensor:
    """Packed blocks of the language-reference topics, int64 ``(n, L)``."""
    tokenizer = ByteTokenizer()
    packed, _ = pack([tokenizer.encode(text) for text in embedded_documents(split, "topics")], LENGTH, tokenizer.eos_id)
    return torch.from_numpy(packed)


def train(steps: int) -> RADD:
    """A small network with k_DCE; 1000 steps take 40 s on one core and reach 2.5 nats per byte."""
    x_NL = blocks("train")
    torch.manual_seed(0)
    model = RADD(ModelConfig(hidden_size=64, n_blocks=2, n_heads=4, length=LENGTH, dropout=0.0), TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        rate = 4e-3 * min((step + 1) / 50, 1) * max(0.05, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x_BL = x_NL[torch.randint(len(x_NL), (32,), generator=generator(0, "benchmark data", step))]
        draws = draw_loss_inputs(
            "k_DCE",
            *x_BL.shape,
            generator_for=lambda purpose: generator(0, purpose, step),  # noqa: B023
            sampler="stratified",
        )
        loss = compute_loss("k_DCE", model, x_BL, draws, LogLinear()).mean() / LENGTH
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def independent_lambda(seed: int) -> Callable[[int, Tensor], Iterator[MaskedRows]]:
    """lambda_DCE without strata."""

    def replicates(first: int, x_BL: Tensor) -> Iterator[MaskedRows]:
        for draw in range(ROWS):
            inputs = draw_loss_inputs(
                "lambda_DCE",
                *x_BL.shape,
                generator_for=lambda purpose: generator(seed, f"independent {purpose}", first, draw),  # noqa: B023
                sampler="naive",
            )
            yield loss_rows("lambda_DCE", x_BL, inputs, LogLinear())

    return replicates


def estimators(seed: int) -> dict[str, Callable[[int, Tensor], Iterator[MaskedRows]]]:
    """What is compared, each with ``ROWS`` rows per sequence."""

    def loss(loss_type: str, estimator: str, draws: int = ROWS) -> Callable[[int, Tensor], Iterator[MaskedRows]]:
        return LossEstimator(
            loss_type=loss_type, estimator=estimator, draws=draws, schedule=LogLinear(), seed=seed
        ).replicates

    return {
        "lambda_DCE independent": independent_lambda(seed),
        "lambda_DCE reference": loss("lambda_DCE", "reference"),
        "t_DCE reference": loss("t_DCE", "reference"),
        "t_DSE reference": loss("t_DSE", "reference"),
        "k_DCE reference": loss("k_DCE", "reference"),
        "low_variance": loss("k_DCE", "low_variance"),
    }


def measure_estimators(model: RADD, x_NL: Tensor, seeds: int) -> dict[str, dict[str, float]]:
    """Mean and cost of every estimator, nats per token.

    Replicates are independent, so their spread gives the variance: M - 1 degrees of freedom per group for single draws,
    but one for two sweeps, which therefore get all ``seeds``; the others get a sixth.
    """
    found = {}
    for name in estimators(0):
        repeats = seeds if name == "low_variance" else max(2, seeds // 6)
        groups: list[GroupEstimate] = []
        began = time.perf_counter()
        for seed in range(repeats):
            replicates = estimators(seed)[name]
            for first in range(0, len(x_NL), GROUP_SIZE):
                x_BL = x_NL[first : first + GROUP_SIZE]
                drawn = estimate_group(
                    token_nll(model), x_BL, replicates(first, x_BL), mask_id=TOKENS, batch_size=BATCH_ROWS
                )
                groups.append(GroupEstimate.from_values(*drawn))
        seconds = time.perf_counter() - began
        bound = combine(groups, LENGTH)
        rows = bound.rows / bound.sequences
        cost = bound.nats_per_token.standard_error**2 * bound.rows
        found[name] = {
            "nats per token": bound.nats_per_token.value,
            "its error": bound.nats_per_token.standard_error,
            "rows per sequence": rows,
            "sd per sqrt(row)": math.sqrt(cost),
            "cost": cost,
            "us per row": seconds / bound.rows * 1e6,
        }
    return found


def measure(steps: int = 1000, sequences: int = 64, seeds: int = 24) -> dict:
    """The table, and how many times fewer rows the low-variance estimator needs."""
    model = train(steps)
    x_NL = blocks("test")[:256]
    table = measure_estimators(model, x_NL[:: max(1, len(x_NL) // sequences)][:sequences], seeds)
    low = table["low_variance"]["cost"]
    ratios = [
        {"name": f"rows for equal error, {name} over low_variance", "ratio": table[name]["cost"] / low, "target": 4.0}
        for name in ("lambda_DCE independent", "lambda_DCE reference")
    ]
    return {"benchmark": "radd_evaluation", "estimators": table, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the small network")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=24, help="repetitions that the variances are taken over")
    options = parser.parse_args()
    result = measure(options.steps, options.sequences, options.seeds)
    for name, values in result["estimators"].items():
        print(f"{name:26s} " + "  ".join(f"{key} {value:9.4f}" for key, value in values.items()))
    for ratio in result["ratios"]:
        verdict = "PASS" if ratio["ratio"] >= ratio["target"] else "FAIL"
        print(f"{ratio['name']}: {ratio['ratio']:.2f}x (target {ratio['target']}x) {verdict}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
