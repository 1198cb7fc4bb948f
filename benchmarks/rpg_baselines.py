"""RPG beside its baselines p-diff, p-diff with an autoencoder and the autoencoder alone, on checkpoints of a small CNN.

    python -m benchmarks.rpg_baselines

150 checkpoints of 3,730 values on the embedded digits; every method trains in a process of its own, in the same
engine, on the same files, with batch 8, and draws 20 networks by 50 evaluations. Steps are chosen for about equal time.
Accuracy is a mean over networks with its standard error; "spread" is the mean distance of two generated networks over
that of two originals: a method whose spread is near 0 draws one network again and again, whatever its accuracy. Memory
is the peak of training above the imports. The second table counts parameters for larger networks: weights of p-diff
grow with the square of the network's size, and those of its autoencoder with size times latent, while RPG's depend on
the token alone.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common.tracking import read_records as read_metrics
from rpg.checkpoint_files import find_checkpoints, read_checkpoint, write_checkpoint
from rpg.generated_files import read_records
from rpg.model import Generator
from rpg.model_config import GeneratorConfig
from rpg.pdiff import PdiffConfig, PdiffModel
from rpg.similarity import ValueSample, compute_spacing, pairwise_distances
from rpg.vae import VAEConfig
from rpg.zoo.digits import named_networks

NETWORKS, BATCH = 20, 8
RPG_STEPS, PDIFF_STEPS, VAE_STEPS, LATENT_STEPS = 1000, 400, 600, 1000
COMMON = (
    "precision=fp32", "parallel=none", "tracking.progress=false", f"training.batch_size={BATCH}",
    "training.log_freq=50", "data.tester.kind=python", "data.tester.target=rpg.zoo.digits:DigitTester",
)  # fmt: skip
PDIFF = (
    "model.channels=[1,16,32,16,1]", "model.vae.channels=[8,16,32,32]", "model.vae.d_latent=64",
    f"vae_training.n_iters={VAE_STEPS}", f"vae_training.batch_size={BATCH}", "sampling.num_generated=0",
)  # fmt: skip
METHODS = {
    "RPG": (
        "rpg.train",
        "rpg.generate",
        ("experiment=digits_minutes", f"training.n_iters={RPG_STEPS}", "training.sample_freq=0"),
    ),
    "p-diff": (
        "rpg.train_pdiff",
        "rpg.generate_pdiff",
        (*PDIFF, "model.kind=pdiff", f"training.n_iters={PDIFF_STEPS}"),
    ),
    "p-diff + VAE": (
        "rpg.train_pdiff",
        "rpg.generate_pdiff",
        (*PDIFF, "model.kind=pdiff_vae", f"training.n_iters={LATENT_STEPS}"),
    ),
    "VAE only": (
        "rpg.train_pdiff",
        "rpg.generate_pdiff",
        (*PDIFF, "model.kind=vae", "model.vae.use_variance=true", f"training.n_iters={VAE_STEPS}"),
    ),
}
SIZES = {"CNNSmall": 2_864, "CNNMedium": 10_853, "ResNet-18": 11_191_242}
REFERENCE_VAE = VAEConfig(d_latent=1024)
LARGEST_GB = 80.0  # memory of one large accelerator


def measure() -> dict[str, object]:
    """Trains all methods, one after the other."""
    imports_gb = _peak_gb_of_imports()
    rows: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        accuracies = []
        for checkpoint, state in named_networks(0):
            write_checkpoint(folder / "originals" / checkpoint.file_name(), state)
            accuracies.append(checkpoint.accuracy)
        for method, (train, generate, options) in METHODS.items():
            rows[method] = _run_method(folder, method.replace(" ", ""), train, generate, options, imports_gb)
    scaling = {network: _parameters(values) for network, values in SIZES.items()}
    mean = sum(accuracies) / len(accuracies)
    weights_gb = 4e-9 * float(scaling["ResNet-18"]["p-diff"])
    return {
        "originals: mean accuracy": round(mean, 4),
        "originals: lowest accuracy": round(min(accuracies), 4),
        "methods": rows,
        "parameters": scaling,
        "checks": [
            {
                "claim": "accuracy of RPG's networks is that of the originals",
                "measured": rows["RPG"]["accuracy"],
                "threshold": f">= {mean:.4f} - 0.01",
                "passed": rows["RPG"]["accuracy"] >= mean - 0.01,
            },
            {
                "claim": "p-diff and p-diff + VAE train in the same harness (loss of the last 50 steps over the first)",
                "measured": max(rows[method]["loss, last / first"] for method in ("p-diff", "p-diff + VAE")),
                "threshold": "< 0.7",
                "passed": all(rows[method]["loss, last / first"] < 0.7 for method in ("p-diff", "p-diff + VAE")),
            },
            {
                "claim": "RPG trains in less memory than p-diff",
                "measured": f"{rows['RPG']['memory above imports GB']} against "
                f"{rows['p-diff']['memory above imports GB']} GB",
                "threshold": "less",
                "passed": rows["RPG"]["memory above imports GB"] < rows["p-diff"]["memory above imports GB"],
            },
            {
                "claim": "weights of p-diff for a ResNet-18 fit no accelerator",
                "measured": f"{weights_gb:,.0f} GB",
                "threshold": f"> {LARGEST_GB:g} GB",
                "passed": weights_gb > LARGEST_GB,
            },
        ],
    }


def _run_method(
    folder: Path, name: str, train: str, generate: str, options: tuple[str, ...], imports_gb: float
) -> dict[str, object]:
    run_dir, networks = folder / name, folder / f"{name}_networks"
    began = time.perf_counter()
    _command(train, *options, *COMMON, f"data.checkpoints={folder / 'originals'}", f"run_dir={run_dir}")
    seconds = time.perf_counter() - began
    _command(generate, f"generator={run_dir}", f"output={networks}", f"num_generated={NETWORKS}", "test=true")
    metrics = read_metrics(run_dir)
    stages = [run for run in (run_dir, run_dir / "vae") if run.is_dir()]
    peak_gb = max(record["memory/peak_gb"] for run in stages for record in read_metrics(run))
    accuracy_K = torch.tensor([record["accuracy"] for record in read_records(networks)], dtype=torch.float64)
    assert len(accuracy_K) == NETWORKS
    return {
        "seconds of training": round(seconds, 1),
        "steps": int(metrics[-1]["step"]),
        "loss, last / first": round(metrics[-1]["train/loss"] / metrics[0]["train/loss"], 3),
        "memory above imports GB": round(peak_gb - imports_gb, 2),
        "accuracy": round(float(accuracy_K.mean()), 4),
        "standard error": round(float(accuracy_K.std() / NETWORKS**0.5), 4),
        "lowest": round(float(accuracy_K.min()), 4),
        **_distances(folder / "originals", networks),
    }


def _distances(originals: Path, generated: Path) -> dict[str, float]:
    """Distance to the nearest original, and the spread of the generated networks, in that of the originals."""
    groups = [[read_checkpoint(path) for path in find_checkpoints(folder)] for folder in (originals, generated)]
    sample = ValueSample(groups[0][0], sum(map(len, groups)))
    original_KV, generated_GV = (torch.stack([sample.values(state) for state in group]) for group in groups)
    nearest = float(pairwise_distances(generated_GV, original_KV).min(1).values.mean())
    among, own = compute_spacing(original_KV), compute_spacing(generated_GV)
    return {"distance to nearest original": round(nearest, 3), "spread": round(own.pair / among.pair, 3)}


def _command(module: str, *options: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} failed: {done.stderr[-2000:]}")


def _peak_gb_of_imports() -> float:
    code = (
        "import resource, rpg.training, rpg.pdiff_training; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout) * 1024 / 1e9


def _parameters(values: int) -> dict[str, int]:
    """Of the released configurations, for a network of so many values."""

    def count(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    dim = 256 if values < 1_000_000 else 8192
    tokens = -(-values // dim)
    with torch.device("meta"):
        generator = Generator(
            GeneratorConfig(num_tokens=tokens, dim_per_token=dim, d_model=dim, d_state=32 if dim == 256 else 128),
            torch.empty(tokens, dim),
        )
        length = REFERENCE_VAE.padded_length(values)
        return {
            "RPG": count(generator),
            "p-diff": count(PdiffModel(length, PdiffConfig(kind="pdiff"))),
            "p-diff + VAE": count(PdiffModel(length, PdiffConfig(kind="pdiff_vae", vae=REFERENCE_VAE))),
        }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
