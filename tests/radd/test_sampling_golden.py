"""The reference's draws, rates, call counts and sampling trajectories, from its own random numbers."""

from pathlib import Path

import pytest
import torch

from common.testing.golden import Case, load_cases
from tests.radd.golden_sampling import HANDLERS, sample

NAMES = [name for name in load_cases("radd") if any(name.startswith(kind) for kind in HANDLERS)]


def outputs(case: Case, **options: bool) -> dict:
    inputs = {key: torch.from_numpy(value) for key, value in case.inputs.items()}
    kind = max((kind for kind in HANDLERS if case.name.startswith(kind)), key=len)
    return HANDLERS[kind](case.name, {**case.raw, "output_names": sorted(case.outputs)}, inputs, **options)


def test_every_kind_of_sampling_case_is_present():
    assert len([name for name in NAMES if name.startswith("sample_")]) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_the_reference(name: str, golden_dir: Path):
    case = load_cases("radd", golden_dir)[name]
    got = outputs(case)
    for key in case.outputs:
        case.check(key, got[key])


@pytest.mark.parametrize("name", ["sample_tweedie_direct", "sample_prefix_suffix", "sample_top_p"])
def test_calling_the_network_in_every_step_gives_the_cached_trajectory(name: str):
    case = load_cases("radd")[name]
    inputs = {key: torch.from_numpy(value) for key, value in case.inputs.items()}
    cached, uncached = (sample(name, case.raw, inputs, cached=cached) for cached in (True, False))
    assert torch.equal(cached["out_x"], uncached["out_x"])
    changed = (cached["out_x"][1:] != cached["out_x"][:-1]).any(-1)
    first = torch.ones(1, changed.shape[1], dtype=torch.bool)
    assert torch.equal(cached["out_rows_evaluated"].bool(), torch.cat([first, changed[:-1]]))
    assert uncached["out_rows_evaluated"].all()
