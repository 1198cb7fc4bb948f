"""A run of four steps on the embedded digits or text, small enough for every test."""

from pathlib import Path

from common.config import OptimConfig, ParallelConfig, TrackingConfig
from logah.architecture_config import NetsSection
from logah.config import TrainConfig, TrainingConfig
from logah.data_config import DataSection

MODEL = {"hid": 16, "layers": 1, "heads": 2, "lora_r": 4, "max_ck_lora": 512, "max_shape": 64}
NETS = {
    "vision": {"law": "grid", "patch_sizes": (2,), "depths": (1, 2), "widths": (8, 12), "heads": (2,), "meta_batch": 2},
    "lm": {"law": "grid", "family": "gpt2", "depths": (1, 2), "widths": (8, 16), "heads": (2,), "dropout": 0.0,
           "meta_batch": 2},
}  # fmt: skip
DATA = {
    "vision": {"name": "digits", "batch_size": 16, "limit_train": 64, "limit_test": 32},
    "lm": {"kind": "lm", "name": "embedded:topics", "tokenizer": "bpe:300", "block_size": 16, "batch_size": 4,
           "limit_train": 16, "limit_test": 8, "cache_dir": None},
}  # fmt: skip
TRAINING = {"steps": 4, "log_freq": 1, "save_freq": 2, "interm_epoch": 0, "valid_epoch": 0, "valid_nets": 2}


def run_config(
    run_dir: Path,
    *,
    kind: str = "vision",
    plan: str = "none",
    model: dict | None = None,
    data: dict | None = None,
    nets: dict | None = None,
    training: dict | None = None,
    optim: dict | None = None,
) -> TrainConfig:
    """Options of a run; the dictionaries change single ones."""
    return TrainConfig(
        run_dir=str(run_dir),
        precision="fp32",
        nonfinite="stop",
        parallel=ParallelConfig(plan=plan),
        tracking=TrackingConfig(progress=False),
        optim=OptimConfig(**{"lr": 1e-3, "warmup": 0, "grad_clip": 5.0} | (optim or {})),
        model=MODEL | (model or {}),
        data=DataSection(**DATA[kind] | (data or {})),
        nets=NetsSection(**NETS[kind] | (nets or {})),
        training=TrainingConfig(**TRAINING | (training or {})),
    )
