"""The reference's structure.cache: read without running code, converted, refused where it asks for more."""

import collections
import os
import pickle

import pytest
import torch

from common.errors import CheckpointError
from rpg.codec import TokenCodec
from rpg.data import DataSection, build_data
from rpg.structure import compute_structure
from rpg.structure_cache import read_structure_cache


def state_dict(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "weight": torch.randn(4, 5) + seed,
        "bn.running_var": torch.rand(6) + 0.5,
        "bn.num_batches_tracked": torch.tensor(9),
        "gamma": torch.randn(1),
    }


def write_cache(path, checkpoints, extra=None, structure=dict):
    """A cache as the reference pickles it."""
    facts = []
    for entry in compute_structure(checkpoints).entries:
        size = torch.Size(entry.shape)
        if entry.kind == "constant":
            facts.append((entry.name, (size, entry.value, None)))
        else:
            numbers = ([] if entry.scale is None else [entry.scale]) + [entry.mean, entry.std]
            facts.append((entry.name, (size, *(torch.tensor(number) for number in numbers))))
    content = {"structure": structure(facts), "checkpoint_list": ["/home/author/data/0001.pth", "C:\\x\\0002.pth"]}
    path.write_bytes(pickle.dumps(content | (extra or {})))
    return path


@pytest.mark.parametrize("structure", [dict, collections.OrderedDict])
def test_a_cache_gives_the_same_tokens_as_the_checkpoints(tmp_path, structure):
    checkpoints = [state_dict(0), state_dict(1)]
    found = read_structure_cache(write_cache(tmp_path / "structure.cache", checkpoints, structure=structure))
    assert found.checkpoint_names == ("0001.pth", "0002.pth")
    ours = TokenCodec(compute_structure(checkpoints), 8)
    theirs = TokenCodec(found.structure, 8)
    tokens_LD = ours.encode(checkpoints[1])
    assert torch.allclose(theirs.encode(checkpoints[1]), tokens_LD, rtol=1e-5, equal_nan=True)
    restored = theirs.decode(tokens_LD)
    assert list(restored) == list(checkpoints[0])
    assert restored["bn.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(restored["gamma"], checkpoints[0]["gamma"])
    assert torch.allclose(restored["weight"], checkpoints[1]["weight"], rtol=1e-5)


class Harmful:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class HarmfulTensor:
    """Hides in the bytes of a storage."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import io

        inner = io.BytesIO()
        torch.save(Harmful(self.path), inner)
        return torch.storage._load_from_bytes, (inner.getvalue(),)


@pytest.mark.parametrize("harmful", [Harmful, HarmfulTensor])
def test_a_cache_that_asks_for_more_is_refused_and_nothing_runs(tmp_path, harmful):
    marker = tmp_path / "was_run"
    path = write_cache(tmp_path / "structure.cache", [state_dict(0)], {"x": harmful(marker)})
    with pytest.raises(CheckpointError, match="is refused|cannot be read"):
        read_structure_cache(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"noise", pickle.dumps([1]), pickle.dumps({"structure": {"w": (torch.Size([2]), 3, None)}})]
)
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "structure.cache"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"structure\.cache"):
        read_structure_cache(path)


def test_an_empty_folder_beside_a_cache_is_enough_for_generating(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    write_cache(tmp_path / "structure.cache", [state_dict(0)])
    data = build_data(DataSection(checkpoints=str(tmp_path / "checkpoint"), dim_per_token=8))
    assert data.generation_only and data.codec.tensor_names == ("weight", "bn.running_var")
