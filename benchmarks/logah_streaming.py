"""Streaming predictions of GPT-2-large (838 M parameters): time and memory, without and with a disk.

    python -m benchmarks.logah_streaming [--json FILE] [--repeats 3]

Hypernetworks of the published sizes with random weights are stored once; every measurement is a fresh process that
imports everything, then loads one, plans, decodes and hands over the tensors. Memory is its peak above what it held
after the imports, the hypernetwork's weights included as far as they are read: the file is mapped, and a target needs a
part of the last maps only. "Compute" is all but the writing: build and trace on meta, plan, decode in float32, cast.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.diffullama_training_step import resident_bytes
from benchmarks.processes import ROOT

TARGET = "gpt2-large"
SIZES = {
    "Tiny": {"hid": 64, "lora_r": 32, "layers": 3, "heads": 8},
    "Large": {"hid": 256, "lora_r": 256, "layers": 12, "heads": 16},
}
LIMITS = {"Tiny": (5.0, 0.5), "Large": (12.0, 1.8)}
"""Seconds of compute and gigabytes beyond the imports allowed."""


def store(folder: Path, size: str) -> None:
    """A hypernetwork with random weights; in a process of its own, whose memory goes with it."""
    from logah.checkpoints import save_hypernetwork
    from logah.hypernetwork import HyperNetwork
    from logah.model_config import HyperNetworkConfig

    torch.manual_seed(0)
    save_hypernetwork(folder, HyperNetwork(HyperNetworkConfig(variant="llm", **SIZES[size])))


def predict(checkpoint: str, target: str, dtype: str, out: str | None) -> dict[str, Any]:
    """One prediction in this process, to ``out`` or to nowhere."""
    from logah.architectures import resolve_target
    from logah.checkpoints import load_hypernetwork
    from logah.predict_config import DTYPES
    from logah.shard_writer import NullSink
    from logah.streaming import StreamOptions, plan_prediction, predict_to_folder, stream_prediction

    options = StreamOptions(dtype=DTYPES[dtype])
    # the libraries that a network of this family needs are imports, not memory of the prediction
    small = {"gpt2": "gpt2?n_layer:1?n_embd:8?n_head:1?vocab_size:8", "llama": "llama-small?num_hidden_layers:1"}
    plan_prediction(_config(), resolve_target(small[target.split("-")[0]]), options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_bytes("VmRSS")
    began = time.perf_counter()
    model = load_hypernetwork(checkpoint).model
    load_seconds = time.perf_counter() - began
    architecture = resolve_target(target)
    if out is None:
        plan = plan_prediction(model.config, architecture, options)
        report = stream_prediction(model, plan, NullSink(), options)
    else:
        report = predict_to_folder(model, architecture, out, options)
    peak = resident_bytes("VmHWM")
    return {
        "load, s": load_seconds,
        "plan, s": report.seconds["plan"],
        "decode, s": report.seconds["decode"],
        "write, s": report.seconds["write"] + report.seconds.get("wait for the disk", 0.0),
        "GB beyond imports": (peak - before) / 1e9,
        "GB in all": peak / 1e9,
        "GB written": report.num_bytes / 1e9,
    }


def _config() -> Any:
    from logah.model_config import HyperNetworkConfig

    return HyperNetworkConfig(variant="llm")


def fresh(*arguments: str) -> dict[str, Any]:
    """``predict`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.logah_streaming", "--child", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def measure(repeats: int = 3) -> dict:
    """All figures."""
    rows, checks = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            checkpoint = str(Path(folder) / size)
            fresh("store", checkpoint, size)
            found = median(
                [fresh("predict", checkpoint, TARGET, "fp32") for _ in range(repeats if size == "Tiny" else 1)]
            )
            rows[f"{size}, to nowhere"] = found
            compute, memory = found["plan, s"] + found["decode, s"], found["GB beyond imports"]
            for what, value, most, unit in (
                ("compute", compute, LIMITS[size][0], "s"),
                ("memory beyond imports", memory, LIMITS[size][1], "GB"),
            ):
                checks.append(_check(f"{size} predicts {TARGET}: {what}", value, most, unit))
        tiny = str(Path(folder) / "Tiny")
        for dtype in ("fp32", "bf16"):
            out = str(Path(folder) / f"out-{dtype}")
            rows[f"Tiny, {dtype} to disk"] = median([fresh("predict", tiny, TARGET, dtype, out)])
    on_disk = rows["Tiny, fp32 to disk"]
    checks.append(_check("Tiny to disk: memory in all", on_disk["GB in all"], 1.2, "GB"))
    half = rows["Tiny, bf16 to disk"]["GB written"] / on_disk["GB written"]
    checks.append(_check("bytes in bf16 over those in fp32", half, 0.501, ""))
    return {"predictions": rows, "checks": checks}


def _check(claim: str, value: float, most: float, unit: str) -> dict[str, Any]:
    return {
        "claim": claim,
        "measured": f"{value:.2f} {unit}".strip(),
        "threshold": f"< {most:g} {unit}".strip(),
        "passed": value < most,
    }


def main() -> None:
    """The command line, and the body of the fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of the small one")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, *arguments = options.child
        if task == "store":
            store(Path(arguments[0]), arguments[1])
            print("{}")
        else:
            print(json.dumps(predict(*arguments, *[None] * (4 - len(arguments)))))
        return
    text = json.dumps(measure(options.repeats), indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
