"""A training step of the hypernetwork against the released scheme: its own share, and the whole step.

    python -m benchmarks.logah_training_step [--json FILE] [--repeats 5]

LoGAH-Tiny, one network of ViTs-1K (images of 32 x 32) and one of GPTs-1K (vocabulary 50257) per step. "Share" is all
but the network's own passes: drawing it, its graph, predicting its parameters, and the backward pass from given
gradients of these parameters to the hypernetwork. The released scheme builds every network with random values, traces
it again and decodes whole factors at rounded sizes; ours keeps graphs and networks without values and decodes what is
needed. "Step" adds the network's forward and backward passes, which are the same for both and dominate; batches are
small here (8 images, 2 blocks of 64 tokens), so that of larger ones the ratio is nearer to 1. Float32. The first steps,
which trace each architecture once, are not timed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.command import main
from benchmarks.processes import interleaved
from logah.architecture_config import NetsSection
from logah.architecture_sets import ArchitectureSource
from logah.meta_learner import MetaLearner
from logah.model_config import HyperNetworkConfig
from logah.prediction import predict
from logah.task import HyperNetworkTask

CASES = {
    "ViTs-1K": ("vision", NetsSection(law="vits1k", patch_sizes=(4,)), {"num_classes": 100, "image_size": 32}),
    "GPTs-1K": ("llm", NetsSection(law="gpts1k", dropout=0.0), {"vocab_size": 50257, "n_positions": 1024}),
}
STEPS = 2  # different networks per round
LESS_SHARE = 5.0


def build_task(variant: str, nets: NetsSection, options: dict, scheme: str) -> HyperNetworkTask:
    """The task of ``logah.train`` without its engine."""
    config = HyperNetworkConfig(variant=variant, hid=64, lora_r=32, layers=3, heads=8, num_classes=10)
    source = ArchitectureSource(nets, seed=1, data_options=options)
    return HyperNetworkTask(
        config, build=lambda: MetaLearner(config), source=source, seed=0, norm_penalty=3e-5, scheme=scheme
    )


def share(task: HyperNetworkTask, model: MetaLearner, gradients: list[dict[str, Tensor]]) -> None:
    """What the hypernetwork adds to the networks' own passes, over ``STEPS`` steps."""
    for step, wanted in enumerate(gradients):
        networks = task.networks(step, [0])
        scheme = "full" if task.scheme == "reference" else "exact"
        found = predict(model, [n.graph for n in networks], [n.plan for n in networks], scheme=scheme)
        values = {name: value for name, value in found.parameters[0].items() if name in wanted}
        loss = 3e-5 * found.norm_sum
        torch.autograd.backward([loss, *values.values()], [None, *(wanted[name] for name in values)])
        model.zero_grad(set_to_none=True)


def whole(task: HyperNetworkTask, model: MetaLearner, batch: dict[str, Tensor]) -> None:
    """Whole steps but for the optimizer's."""
    for step in range(STEPS):
        places = {"slot": torch.tensor([0]), "step": torch.tensor([step])}
        task.training_step(model, places | batch, {}).loss_sum.backward()
        model.zero_grad(set_to_none=True)


def gradients_of(task: HyperNetworkTask) -> list[dict[str, Tensor]]:
    """Made-up gradients of the parameters of each step's network."""
    found = []
    for step in range(STEPS):
        network = task.networks(step, [0])[0]
        shapes = {target.name: target.shape for target in network.plan.targets}
        found.append({name: torch.randn(shape) * 1e-3 for name, shape in shapes.items()})
    return found


def measure(repeats: int = 5) -> dict:
    """All figures."""
    ratios, seconds = [], {}
    for name, (variant, nets, options) in CASES.items():
        torch.manual_seed(0)
        tasks = {scheme: build_task(variant, nets, options, scheme) for scheme in ("reference", "fast")}
        model = tasks["fast"].build_model()
        gradients = gradients_of(tasks["fast"])
        if variant == "vision":
            batch = {"images": torch.randn(8, 3, 32, 32), "labels": torch.randint(100, (8,))}
        else:
            batch = {"tokens": torch.randint(50257, (2, 64))}
        runs: dict[str, Callable[[], None]] = {}
        for scheme, task in tasks.items():
            runs[f"share, {scheme}"] = lambda task=task, m=model, g=gradients: share(task, m, g)
            runs[f"step, {scheme}"] = lambda task=task, m=model, b=batch: whole(task, m, b)
        found = interleaved(runs, repeats)
        seconds[name] = {kind: round(value / STEPS, 4) for kind, value in found.items()}
        ratios.append({"name": f"{name}: the hypernetwork's share, released scheme over ours",
                       "ratio": found["share, reference"] / found["share, fast"], "target": LESS_SHARE})  # fmt: skip
        seconds[name]["whole step, ratio"] = round(found["step, reference"] / found["step, fast"], 2)
    return {"seconds per step": seconds, "ratios": ratios}


if __name__ == "__main__":
    main(measure, __doc__)
