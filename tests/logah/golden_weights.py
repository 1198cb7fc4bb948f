"""Golden cases of weights: the number of parameters of every published size."""

from collections.abc import Mapping

from logah.checkpoints import build_empty
from logah.model_config import HyperNetworkConfig

GHN3_SIZES = {"T": (64, 3, 8), "S": (128, 5, 16), "L": (256, 12, 16), "XL": (384, 24, 16)}
"""Width, layers and heads of GHN-3 by the letter in the published names."""


def count_parameters(config: HyperNetworkConfig) -> int:
    return sum(parameter.numel() for parameter in build_empty(config).parameters())


def _config(key: str, sizes: Mapping[str, list[int]]) -> HyperNetworkConfig:
    """Of a key such as ``llm/base/ck32768`` or ``ghn3/XL/classes1000/s16``."""
    kind, size, *rest = key.split("/")
    numbers = {part.rstrip("0123456789"): int(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in rest}
    if kind == "ghn3":
        hid, layers, heads = GHN3_SIZES[size]
        spatial = numbers["s"]
        return HyperNetworkConfig(
            decoder="dense", hid=hid, layers=layers, heads=heads, max_shape=(hid, hid, spatial, spatial),
            num_classes=numbers["classes"],
        )  # fmt: skip
    hid, rank, layers, heads = sizes[size]
    return HyperNetworkConfig(
        variant=kind, hid=hid, lora_r=rank, layers=layers, heads=heads, max_ck_lora=numbers["ck"],
        max_shape=(numbers["ck"] // 16, numbers["ck"] // 16, 16, 16),
    )  # fmt: skip


def _counts(case: Mapping, config: Mapping, x: Mapping) -> dict[str, object]:
    return {"facts": {key: count_parameters(_config(key, config["sizes"])) for key in case["facts"]}}


KINDS = [(lambda case, config, x: "sizes" in config and not case.get("arrays"), _counts)]
