"""Sampling of RADD: the event-driven sampler against one network call per step on the whole batch.

    python -m benchmarks.radd_sampling [--json FILE] [--pairs 3]

Both samplers draw from the same law with n = 1024 steps, 8 texts of 256 tokens, and random weights (which cost as much
as trained ones). The baseline is a sampler without caching: the network on all rows in every step, its head at every
masked position. It draws tokens only where one is revealed, which flatters it: the reference's single draw over
all tokens of all masked positions costs several times the network at this size. Times are medians of interleaved
runs. Calls are compared with their expectation, E-NFE, in units of its standard error.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch

from common.diffusion.nfe import loglinear_nfe, update_rate
from common.diffusion.samplers import DiffusionSampler, FirstHittingSampler
from common.diffusion.schedules import LogLinear
from common.diffusion.stepwise import sample_stepwise
from radd.model import RADD, ModelConfig
from radd.sampler import denoiser, network

TOKENS, LENGTH, STEPS, BATCH = 128, 256, 1024, 8
SMALL_LENGTH = 64  # at small sizes the steps without a change weigh most
WIDTH, BLOCKS, HEADS = 64, 2, 2
CALL_ROWS = 256  # texts over which calls are compared with E-NFE; the plan alone tells them


def build_model() -> RADD:
    """A small network with random weights and a head that is not uniform."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=WIDTH, n_blocks=BLOCKS, n_heads=HEADS, length=LENGTH, dropout=0.0)
    model = RADD(config, TOKENS).eval()
    torch.nn.init.normal_(model.output_layer.linear.weight, std=0.1)
    return model


def interleaved(candidates: dict[str, Callable[[], float]], pairs: int) -> dict[str, float]:
    """Median seconds of each candidate, run in turns so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(pairs):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(model: RADD, length: int, pairs: int) -> dict[str, float]:
    """Times, calls and launches of the samplers for one text length."""
    sampler = DiffusionSampler(network(model), LogLinear(), steps=STEPS)
    hitting = FirstHittingSampler(network(model))
    tokens_BL = sampler.canvas(BATCH, length)
    rate_S = update_rate(LogLinear(), "tweedie", STEPS)
    results: dict[str, object] = {}

    def every_step() -> None:
        results["every step"] = sample_stepwise(
            denoiser(model), tokens_BL, rate_S, mask_id=TOKENS, stages=2, cached=False, skip_filled=False
        )

    def event_driven() -> None:
        results["event"] = sampler.sample(tokens_BL, seed=1)

    def first_hitting() -> None:
        results["hitting"] = hitting.sample(tokens_BL, seed=1)

    event_driven()  # warm up
    seconds = interleaved(
        {"every step": every_step, "event-driven": event_driven, "first-hitting": first_hitting}, pairs
    )
    event, hit = results["event"], results["hitting"]
    return {
        **{f"seconds, {name}": value for name, value in seconds.items()},
        "network calls per text, every step": results["every step"].nfe,
        "network calls per text, event-driven": event.nfe,
        "network calls per text, first-hitting (largest)": float(hit.calls_B.max()),
        "launches, event-driven": event.launches,
        "call ratio": STEPS / event.nfe,
        "time ratio": seconds["every step"] / seconds["event-driven"],
    }


def calls_against_expectation(model: RADD) -> dict[str, float]:
    """Mean calls of many texts and their distance from E-NFE in standard errors, from the plans alone."""
    sampler = DiffusionSampler(network(model), LogLinear(), steps=STEPS)
    levels_BL = torch.rand(CALL_ROWS, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free_BL = torch.ones(CALL_ROWS, LENGTH, dtype=torch.bool)
    calls_B = sampler.events(levels_BL, free_BL, torch.arange(CALL_ROWS), 0).amax(1) + 1
    expected = sampler.expected_calls(free_BL[0])
    return {
        "texts": CALL_ROWS,
        "mean calls": float(calls_B.double().mean()),
        "E-NFE": expected.mean,
        "E-NFE, closed form": loglinear_nfe(STEPS, LENGTH)[0],
        "standard errors off": (float(calls_B.double().mean()) - expected.mean)
        / math.sqrt(expected.variance / CALL_ROWS),
    }


def measure(pairs: int = 3) -> dict[str, object]:
    """All figures; ``checks`` holds the claims with their thresholds."""
    model = build_model()
    main, small = compare(model, LENGTH, pairs), compare(model, SMALL_LENGTH, pairs)
    calls = calls_against_expectation(model)
    expected, variance = loglinear_nfe(STEPS, LENGTH)
    sampled = (main["network calls per text, event-driven"] - expected) / math.sqrt(variance / BATCH)

    def check(claim: str, measured: float, threshold: str, passed: bool) -> dict[str, object]:
        return {"claim": claim, "measured": round(measured, 3), "threshold": threshold, "passed": passed}

    at_main, at_small = f"L = {LENGTH}", f"L = {SMALL_LENGTH}"
    time_main = main["time ratio"]
    hits = main["network calls per text, first-hitting (largest)"]
    return {
        "setting": f"n = {STEPS}, batch {BATCH}, width {WIDTH}, {BLOCKS} blocks, {TOKENS} tokens, float32",
        at_main: main,
        at_small: small,
        "calls": calls,
        "checks": [
            check(
                f"calls of the sampled batch, standard errors from E-NFE, {at_main}",
                sampled,
                "within 3",
                abs(sampled) < 3,
            ),
            check(
                f"calls of {CALL_ROWS} texts, standard errors from E-NFE, {at_main}",
                calls["standard errors off"],
                "within 3",
                abs(calls["standard errors off"]) < 3,
            ),
            check(f"time, every step / event-driven, {at_main}", time_main, "at least 3", time_main >= 3),
            check(
                f"network row calls, every step / event-driven, {at_small}",
                small["call ratio"],
                "at least 6",
                small["call ratio"] >= 6,
            ),
            check("first-hitting calls of any text", hits, f"at most {LENGTH}", hits <= LENGTH),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved runs of each sampler")
    options = parser.parse_args()
    figures = measure(options.pairs)
    for group, values in figures.items():
        if isinstance(values, dict):
            print(group)
            for name, value in values.items():
                print(f"  {name:<52} {value:>10.3f}")
    for row in figures["checks"]:
        print(f"{'pass' if row['passed'] else 'MISS'}  {row['claim']}: {row['measured']} ({row['threshold']})")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
