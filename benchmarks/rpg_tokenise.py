"""Tokens of a network of 198 million values (ConvNeXt-L at 16384 values per token) on the CPU: time, memory, exactness.

Statistics, tokens and the restored state dict are made as in a run: the checkpoint is a file, tokens are written to a
memory map, then read back. Peak memory is that of the whole process, imports included.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

NETWORK, DIM = "convnext_large", 16384
MEMORY_LIMIT_GB = 3.0
REPEATS = 3


def measure() -> dict[str, object]:
    """Runs the round trip in processes of their own; memory and times are medians."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoints" / "network.pth"
        path.parent.mkdir()
        _run("write", path)
        runs = [_run("round_trip", path) for _ in range(REPEATS)]
    facts = {name: median(run[name] for run in runs) for name in runs[0]}
    peak, error = facts["peak memory GB"], facts["largest error / largest value"]
    return {
        **facts,
        "checks": [
            {
                "claim": f"{NETWORK} is tokenised and restored in little memory",
                "measured": f"{peak:.2f} GB",
                "threshold": f"< {MEMORY_LIMIT_GB:g} GB",
                "passed": peak < MEMORY_LIMIT_GB,
            },
            {
                "claim": "the round trip is exact up to float32 rounding",
                "measured": f"{error:.1e}",
                "threshold": "<= 1e-6",
                "passed": error <= 1e-6,
            },
        ],
    }


def _run(step: str, path: Path) -> dict[str, float]:
    code = f"import sys; from benchmarks.rpg_tokenise import {step}; {step}(sys.argv[1])"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def write(path: str) -> None:
    """A checkpoint with random values."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model(NETWORK).state_dict(), path)


def round_trip(path: str) -> None:
    """Prints the times of each part, the peak memory and the largest error."""
    import torch

    from rpg.checkpoint_files import read_checkpoint
    from rpg.data import DataSection, build_data

    started = time.perf_counter()
    folder = Path(path).parent
    cache = folder.with_name(f"cache-{os.getpid()}")
    data = build_data(DataSection(checkpoints=str(folder), dim_per_token=DIM, cache_dir=str(cache)))
    built = time.perf_counter()
    data.codec.encode(read_checkpoint(path))
    encoded = time.perf_counter()
    restored = data.codec.decode(data.tokens.network(0))
    decoded = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    state = read_checkpoint(path)
    error = max(
        ((restored[name].float() - tensor.float()).abs().max() / tensor.float().abs().max().clamp(min=1e-30)).item()
        for name, tensor in state.items()
    )
    assert all(torch.isfinite(tensor).all() for tensor in restored.values())
    facts = {
        "tokens": data.codec.num_tokens,
        "values": data.codec.num_values,
        "statistics and token file, s": built - started,
        "encode, s": encoded - built,
        "decode, s": decoded - encoded,
        "peak memory GB": peak,
        "largest error / largest value": error,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
