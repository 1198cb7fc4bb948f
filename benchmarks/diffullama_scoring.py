"""Multiple choice by diffusion: one list of rows per item group against one network call per (choice, level).

    python -m benchmarks.diffullama_scoring [--json FILE] [--pairs 3]

Two items of four continuations each, 32 noise levels, on a GPT-2 of width 256 with 4 layers, 8192 tokens and random
weights (which cost as much as trained ones). The baseline is what the released evaluation does: batch 1, logits at
every position, one call per continuation and level; `head at masked positions` is that without its waste in the head.
Both sides use the same masks and must find the same scores. Times are medians of interleaved runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from diffullama.model import DiffusionLM
from diffullama.scoring import ChoiceItem, ScoringRule, choice_scores, score_items

TOKENS, WIDTH, LAYERS, HEADS = 8192, 256, 4, 4
LEVELS, ITEMS, PREFIX, LENGTHS = 32, 2, 40, (12, 15, 9, 14)
BATCH = {"cpu": 32, "cuda": 512}


def build_model(device: torch.device) -> DiffusionLM:
    """A network with random weights in eval mode."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, bos_token_id=0, eos_token_id=0
    )
    return DiffusionLM(GPT2LMHeadModel(config), TOKENS - 1).eval().to(device)


def build_items() -> list[ChoiceItem]:
    """Prefixes and continuations of random ids."""
    rng = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(0, TOKENS - 1, (count,), generator=rng).tolist()

    return [ChoiceItem(ids(PREFIX), [ids(length) for length in LENGTHS]) for _ in range(ITEMS)]


@torch.no_grad()
def one_call_each(model: DiffusionLM, item: ChoiceItem, u: torch.Tensor, *, whole_head: bool) -> torch.Tensor:
    """The released evaluation's loop over continuations and levels."""
    scores = []
    for continuation in item.continuations:
        x_1L = torch.tensor([[*item.prefix, *continuation]], device=model.device)
        total = 0.0
        for row, level in enumerate(range(LEVELS, 0, -1)):
            where_1L = torch.zeros_like(x_1L, dtype=torch.bool)
            where_1L[0, len(item.prefix) :] = (u[row, -len(continuation) :] < level / LEVELS).to(model.device)
            z_1L = x_1L.masked_fill(where_1L, model.mask_id)
            if whole_head:
                logits_LV = model(z_1L)[0, :-1].float()
                nll_L = F.cross_entropy(logits_LV, x_1L[0, 1:], reduction="none")
                nll_P = nll_L[where_1L[0, 1:]]
            else:
                nll_P = model(z_1L, x_1L, where_1L)
            total += float(nll_P.mean()) if len(nll_P) else 0.0
        scores.append(total / LEVELS)
    return torch.tensor(scores, dtype=torch.float64)


def interleaved(candidates: dict[str, Callable[[], object]], pairs: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate, run in turns so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(pairs):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(pairs: int = 3) -> dict[str, object]:
    """Times and their ratio, and agreement of the scores."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, items = build_model(device), build_items()
    u = torch.rand(LEVELS, max(LENGTHS), generator=torch.Generator().manual_seed(1))
    rule = ScoringRule(estimator="reference", levels=LEVELS, by_id=False)
    batch = BATCH[device.type]

    def together() -> None:
        score_items(model, items, rule, keys=range(ITEMS), batch_size=batch)

    def released() -> None:
        for item in items:
            one_call_each(model, item, u, whole_head=True)

    def masked_head() -> None:
        for item in items:
            one_call_each(model, item, u, whole_head=False)

    together()  # warm up
    seconds = interleaved({"together": together, "released": released, "masked head": masked_head}, pairs, device)
    alone = one_call_each(model, items[0], u, whole_head=True)
    ours = choice_scores(model, items[0].prefix, items[0].continuations, LEVELS, u=u, by_id=False, batch_size=batch)
    difference = float((alone - ours).abs().max())
    target = 8.0 if device.type == "cuda" else 1.5
    calls = ITEMS * len(LENGTHS) * LEVELS
    return {
        "setting": f"{ITEMS} items of {len(LENGTHS)} choices, {LEVELS} levels, prefix {PREFIX}, width {WIDTH}, "
        f"{LAYERS} layers, {TOKENS} tokens, float32, batches of {batch} rows",
        "seconds, one list of rows": seconds["together"],
        "seconds, one call per (choice, level)": seconds["released"],
        "seconds, the same with the head at masked positions": seconds["masked head"],
        "network rows per second, one list of rows": calls / seconds["together"],
        "largest difference of the scores": difference,
        "ratios": [
            {
                "name": "throughput, one list of rows over one call per (choice, level)",
                "ratio": seconds["released"] / seconds["together"],
                "target": target,
            }
        ],
        "checks": [
            {
                "claim": "both find the same scores",
                "measured": f"{difference:.1e}",
                "threshold": "at most 1e-4",
                "passed": difference <= 1e-4,
            }
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--pairs", type=int, default=3, help="interleaved runs of each side")
    options = parser.parse_args()
    figures = measure(options.pairs)
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:<58} {value:>12.4f}")
    for ratio in figures["ratios"]:
        verdict = "pass" if ratio["ratio"] >= ratio["target"] else "MISS"
        print(f"{verdict}  {ratio['name']}: {ratio['ratio']:.2f}x (target {ratio['target']}x)")
    for check in figures["checks"]:
        verdict = "pass" if check["passed"] else "MISS"
        print(f"{verdict}  {check['claim']}: {check['measured']} ({check['threshold']})")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
