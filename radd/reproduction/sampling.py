"""Measured network calls against their expectation, and what the precision of categorical draws does to rare tokens.

Dimensions: B sequences, L positions, P masked positions, V vocabulary with the mask as last column.
"""

import math

import torch
from torch import Tensor

from common.data.tokenizer import ByteTokenizer
from common.diffusion.absorbing import sample_event_driven
from common.diffusion.categorical import TokenDraw
from common.diffusion.nfe import update_rate
from common.diffusion.samplers import DiffusionSampler
from common.diffusion.schedules import build_schedule
from common.diffusion.stepwise import sample_stepwise
from radd.reproduction.scoring import load_model
from radd.reproduction.settings import Settings
from radd.sampler import network

ONE_STAGE = ("float64", "float32", "float16-compat")
BIASED = ("float32", "float16-compat")  # one-stage draws in these precisions lose rare tokens
TAIL_RANK = 1000  # tokens of at least this rank (from 0) are the tail


def measure_calls(run_dir: str, seed: int, settings: dict, rows: int, noise: str = "loglinear") -> dict:
    """Calls per row and launches of the event-driven sampler, for every number of steps."""
    settings = Settings(**settings)
    model = load_model(run_dir, settings)
    schedule = build_schedule(noise)
    points = []
    for steps in settings.nfe_steps:
        sampler = DiffusionSampler(network(model), schedule, method="tweedie", steps=steps)
        canvas_BL = sampler.canvas(rows, settings.length)
        expected = sampler.expected_calls(canvas_BL[0] == model.mask_id)
        sampled = sampler.sample(canvas_BL, seed=seed * 1000 + steps)
        calls_B = sampled.calls_B.double()
        points.append(
            {
                "steps": steps,
                "expected": expected.mean,
                "deviation": math.sqrt(expected.variance / rows),
                "measured": float(calls_B.mean()),
                "launches": sampled.launches,
                "least": int(calls_B.min()),
                "most": int(calls_B.max()),
            }
        )
    text = ByteTokenizer().decode(sampled.tokens_BL[0])
    return {"points": points, "sample": text, "rows": rows, "noise": noise}


def zipf(tokens: int) -> Tensor:
    """Probabilities proportional to 1 / rank, float64."""
    p_N = 1.0 / torch.arange(1, tokens + 1, dtype=torch.float64)
    return p_N / p_N.sum()


def tail_share(mode: str, seed: int, settings: dict) -> dict:
    """Share of rare tokens among draws from a fixed Zipf distribution, and their mean surprise in nats.

    Args:
        mode: ``two-stage`` (first whether, then which: the default sampler, in float32), or the precision of one-stage
            draws, in which "stay masked" competes with all tokens.

    Source: specification sections 5.5 and 7.
    """
    settings = Settings(**settings)
    p_N = zipf(settings.zipf_tokens)
    log_V = torch.cat([p_N.log().float(), torch.tensor([-math.inf])])
    schedule = build_schedule("loglinear")

    def denoise(tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
        return log_V.repeat(int(where_RL.sum()), 1)

    two_stage = mode == "two-stage"
    rows = settings.zipf_rows * (40 if two_stage else 1)
    empty_BL = torch.full((rows, settings.zipf_length), settings.zipf_tokens)
    if two_stage:
        sampled = sample_event_driven(
            denoise,
            empty_BL,
            mask_id=settings.zipf_tokens,
            schedule=schedule,
            steps=settings.zipf_steps,
            draw=TokenDraw(precision="float32"),
            seed=seed,
        )
    else:
        rate_S = update_rate(schedule, "tweedie", settings.zipf_steps)
        sampled = sample_stepwise(
            denoise, empty_BL, rate_S, mask_id=settings.zipf_tokens, draw=TokenDraw(precision=mode), seed=seed
        )
    tokens = sampled.tokens_BL.flatten()
    first_tail = min(TAIL_RANK, settings.zipf_tokens // 2)
    share = float(p_N[first_tail:].sum())
    return {
        "mode": mode,
        "tokens": len(tokens),
        "share": float((tokens >= first_tail).double().mean()),
        "true_share": share,
        "error": math.sqrt(share * (1 - share) / len(tokens)),
        "surprise": float(-p_N[tokens].log().mean()),
        "entropy": float(-(p_N * p_N.log()).sum()),
    }
