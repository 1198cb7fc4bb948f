"""Computes the golden cases of LoGAH; dispatches on what a case holds, never on its name."""

from collections.abc import Mapping

import numpy as np
import torch

from tests.logah import golden_architectures, golden_graphs, golden_models, golden_weights


def run(name: str, case: Mapping, arrays: Mapping[str, np.ndarray]) -> dict[str, object]:
    """The ``out_*`` arrays of a case, from its description and its ``in_*`` arrays.

    Raises: KeyError for a case of no known kind.
    """
    inputs = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items() if key.startswith("in")}
    config = case.get("config") or {}
    for module in (golden_graphs, golden_models, golden_architectures, golden_weights):
        for holds, compute in module.KINDS:
            if holds(case, config, inputs):
                return compute(case, config, inputs)
    raise KeyError(f"{name}: no kind of case that is known")
