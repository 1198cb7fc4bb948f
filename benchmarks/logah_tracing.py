"""Graphs of large networks on the meta device: GPT-2-large, ViT-L/16 and Llama-8B, built and traced.

    python -m benchmarks.logah_tracing
    python -m benchmarks.logah_tracing --classifiers     every torchvision classifier, real against meta (minutes)

Seconds are medians of interleaved runs in this process, the first of each not counted; memory is the peak of a fresh
process above what it held after its imports.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torchvision

from benchmarks.processes import interleaved, peak_growth
from logah.architectures import resolve_target
from logah.meta_building import build_on_meta
from logah.net_graph import NetGraph
from logah.tracing import trace

REPEATS = 5
LIMITS = {"gpt2-large": (0.6, 50), "vit_l_16": (0.4, 50), "llama-8b": (1.5, 50)}
"""Seconds and MiB allowed."""


def build_and_trace(target: str) -> Callable[[], NetGraph]:
    """A call that builds ``target`` on meta and traces it, with nothing cached."""
    architecture = resolve_target(target)
    if architecture.kind == "lm":
        import transformers.models.gpt2.modeling_gpt2
        import transformers.models.llama.modeling_llama  # noqa: F401
    attention = {"attention": "eager"} if architecture.kind == "lm" else {}
    return lambda: trace(architecture.build_meta(**attention), ve_cutoff=250)


def measure() -> dict:
    """Seconds and peak memory by network, and their limits."""
    runs = {target: build_and_trace(target) for target in LIMITS}
    seconds = interleaved(runs, REPEATS)
    rows, checks = {}, []
    for target, (most_seconds, most_mib) in LIMITS.items():
        graph = runs[target]()
        grown = peak_growth("benchmarks.logah_tracing:build_and_trace", target) / 2**20
        rows[target] = {
            "nodes": len(graph),
            "longest path": int(graph.distance_NN.max()),
            "seconds": seconds[target],
            "MiB above imports": grown,
        }
        for what, value, most, unit in (
            ("time", seconds[target], most_seconds, "s"),
            ("memory", grown, most_mib, "MiB"),
        ):
            checks.append(
                {
                    "claim": f"{target}: built and traced, {what}",
                    "measured": f"{value:.2f} {unit}",
                    "threshold": f"< {most:g} {unit}",
                    "passed": value < most,
                }
            )
    return {"networks": rows, "checks": checks}


def compare_classifiers() -> dict:
    """Every classifier of torchvision: whether types, names and distances on meta are those on real tensors."""
    different, slowest = [], ("", 0.0)
    names = torchvision.models.list_models(module=torchvision.models)
    for name in names:
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        models = [build_on_meta(lambda n=name, o=options: torchvision.models.get_model(n, **o)) for _ in range(2)]
        models[1].to_empty(device="cpu")
        for buffer in models[1].buffers():
            buffer.zero_()  # indices of relative positions have to be valid
        began = time.perf_counter()
        graphs = [trace(model, attention="as_is") for model in models]
        slowest = max(slowest, (name, time.perf_counter() - began), key=lambda pair: pair[1])
        same = graphs[0].nodes == graphs[1].nodes and np.array_equal(graphs[0].distance_NN, graphs[1].distance_NN)
        print(f"{name:24s} {len(graphs[0]):4d} nodes {'equal' if same else 'DIFFERENT'}", flush=True)
        if not same:
            different.append(name)
    return {"classifiers": len(names), "different on meta": different, "slowest": slowest}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifiers", action="store_true", help="compare real and meta graphs instead of timing")
    print(json.dumps(compare_classifiers() if parser.parse_args().classifiers else measure(), indent=1))
