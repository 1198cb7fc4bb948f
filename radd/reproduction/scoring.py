"""Bounds of trained models by all four losses, with Monte-Carlo standard errors, and exact likelihoods of orders.

Everything is in nats per byte. Errors are those of the random masks for the fixed test sequences (how well the bound of
these sequences is known), not those of choosing the sequences.

Dimensions: B sequences, L positions, M draws per sequence, N real tokens.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import load_weights
from common.diffusion.schedules import build_schedule
from common.seeding import generator
from radd.bound import t_dce_excess, t_dse_expectation
from radd.losses import LOSS_TYPES, build_order, compute_loss, draw_loss_inputs
from radd.model import RADD
from radd.reproduction.settings import Settings
from radd.reproduction.training import blocks, model_config

TOKENS = 128  # byte values


def load_model(run_dir: Path | str, settings: Settings) -> RADD:
    """The trained network of one run, in eval mode."""
    model = RADD(model_config(settings), TOKENS)
    model.load_state_dict(load_weights(run_dir, ema=False)[0])
    return model.eval()


def mean_and_error(values_MB: np.ndarray) -> tuple[float, float, float]:
    """Mean over draws and sequences, its Monte-Carlo standard error, and the standard deviation of a single draw.

    The spread between sequences does not enter: every estimator scores the same ones.

    Args:
        values_MB: M >= 2 independent draws for each of B sequences.
    """
    draws, sequences = values_MB.shape
    variance = values_MB.var(axis=0, ddof=1).mean()
    return float(values_MB.mean()), math.sqrt(variance / (draws * sequences)), math.sqrt(variance)


@torch.no_grad()
def loss_draws(model: RADD, x_BL: Tensor, loss_type: str, *, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``draws`` independent values of one loss for every sequence, in nats per token, and how many tokens were masked.

    Returns: values_MB and masked_MB. Times are independent (no strata), so that the errors are simple to state.
    """
    values, masked = [], []
    schedule = build_schedule("loglinear")
    for number in range(draws):
        inputs = draw_loss_inputs(
            loss_type,
            *x_BL.shape,
            generator_for=lambda purpose: generator(seed, f"score {loss_type} {purpose}", number),  # noqa: B023
            sampler="naive",
        )
        values.append(compute_loss(loss_type, model, x_BL, inputs, schedule).double().numpy() / x_BL.shape[1])
        masked.append(inputs["k"].numpy() if "k" in inputs else np.zeros(len(x_BL), dtype=np.int64))
    return np.stack(values), np.stack(masked)


def nll_by_count(values_MB: np.ndarray, masked_MB: np.ndarray, length: int) -> np.ndarray:
    """Mean NLL of one masked token when k = 1..L tokens are masked, from draws of k_DCE (whose value it is).

    Counts that were never drawn are interpolated.
    """
    sums = np.bincount(masked_MB.ravel(), weights=values_MB.ravel(), minlength=length + 1)[1:]
    counts = np.bincount(masked_MB.ravel(), minlength=length + 1)[1:]
    seen = counts > 0
    k = np.arange(1, length + 1)
    return np.interp(k, k[seen], sums[seen] / counts[seen])


def range_terms(nll_k: np.ndarray) -> dict[str, float]:
    """Expectation of each loss minus the bound, nats per token: what the t losses miss outside [delta, 1].

    Source: specification section 3.4; zero for lambda_DCE and k_DCE.
    """
    length = len(nll_k)
    mean_nll_k = nll_k * np.arange(1, length + 1)
    short = t_dse_expectation(mean_nll_k) / length - float(nll_k.mean())
    return {"t_DSE": short, "t_DCE": short + t_dce_excess(), "lambda_DCE": 0.0, "k_DCE": 0.0}


@torch.no_grad()
def order_nll(model: RADD, x_BL: Tensor, order_BL: Tensor) -> np.ndarray:
    """NLL in nats of the token revealed in each step of an order: float64 ``(B, L)``, step 0 with everything masked."""
    rank_BL = order_BL.argsort(dim=1)
    steps = []
    for step in range(x_BL.shape[1]):
        steps.append(model(x_BL.masked_fill(rank_BL >= step, model.mask_id), x_BL, rank_BL == step))
    return torch.stack(steps, dim=1).double().numpy()


def score(run_dir: str, cache_dir: str, seed: int, settings: dict) -> dict:
    """All four estimates of one model, with the range term of each."""
    settings = Settings(**settings)
    model = load_model(run_dir, settings)
    x_BL = blocks(settings, "test", cache_dir, settings.test_sequences)
    cells: dict[str, dict[str, float]] = {}
    for loss_type in LOSS_TYPES:
        values_MB, masked_MB = loss_draws(model, x_BL, loss_type, draws=settings.draws, seed=seed)
        mean, error, deviation = mean_and_error(values_MB)
        cells[loss_type] = {"mean": mean, "error": error, "deviation": deviation}
        if loss_type == "k_DCE":
            nll_k = nll_by_count(values_MB, masked_MB, x_BL.shape[1])
    for loss_type, term in range_terms(nll_k).items():
        cells[loss_type]["range"] = term
    return {"cells": cells, "nll_all_masked": float(nll_k[-1]), "nll_one_masked": float(nll_k[0])}


def score_orders(run_dir: str, cache_dir: str, seed: int, settings: dict, orders: int) -> dict:
    """Likelihood of one model over random orders, whose mean is the bound as well, and over the two fixed ones.

    Args:
        orders: random orders per sequence, at least 2.
    """
    settings = Settings(**settings)
    model = load_model(run_dir, settings)
    x_BL = blocks(settings, "test", cache_dir, settings.test_sequences)
    sweep_OB = []
    for number in range(orders):
        order_BL = build_order("ar_random", *x_BL.shape, generator=generator(seed, "score order", number))
        sweep_OB.append(order_nll(model, x_BL, order_BL).mean(axis=1))
    mean, error, deviation = mean_and_error(np.stack(sweep_OB))
    result = {"random": {"mean": mean, "error": error, "deviation": deviation, "count": orders}}
    for name in ("ar_forward", "ar_backward"):
        result[name] = float(order_nll(model, x_BL, build_order(name, *x_BL.shape)).mean())
    return result


# ---------------------------------------------------------------- baselines without a network


def unigram_nll(train: np.ndarray, test: np.ndarray) -> float:
    """NLL of the test bytes under the training bytes' frequencies, with one added to every count."""
    counts = np.bincount(train.ravel(), minlength=TOKENS) + 1.0
    return float(-np.log(counts / counts.sum())[test.ravel()].mean())


def ngram_nll(train: np.ndarray, test: np.ndarray, order: int) -> float:
    """NLL of the test blocks under an interpolated n-gram model (Witten-Bell), left to right inside each block."""

    def interpolated(size: int) -> Callable[[tuple[int, ...], int], float]:
        if size == 0:
            return lambda context, token: 1.0 / TOKENS
        lower = interpolated(size - 1)
        pairs: dict[tuple[int, ...], Counter] = {}
        for row in train.tolist():
            for end in range(size - 1, len(row)):
                pairs.setdefault(tuple(row[end - size + 1 : end]), Counter())[row[end]] += 1
        totals = {context: (counter.total(), len(counter)) for context, counter in pairs.items()}

        def probability(context: tuple[int, ...], token: int) -> float:
            own = context[len(context) - size + 1 :] if size > 1 else ()
            if len(own) < size - 1 or own not in totals:
                return lower(context, token)
            total, kinds = totals[own]
            return (pairs[own][token] + kinds * lower(context, token)) / (total + kinds)

        return probability

    model = interpolated(order)
    nll = [
        -math.log(model(tuple(row[max(0, end - order + 1) : end]), row[end]))
        for row in test.tolist()
        for end in range(len(row))
    ]
    return float(np.mean(nll))


def baselines(settings: dict, cache_dir: str) -> dict:
    """NLL in nats per byte on the same test blocks: unigram, and in a full reproduction 3-gram and 5-gram."""
    settings = Settings(**settings)
    train = blocks(settings, "train", cache_dir).numpy()
    test = blocks(settings, "test", cache_dir, settings.test_sequences).numpy()
    found = {"unigram": unigram_nll(train, test)}
    if settings.ngrams:
        found |= {"3-gram": ngram_nll(train, test, 3), "5-gram": ngram_nll(train, test, 5)}
    return found
