"""Networks whose predicted parameters hold nothing and whose other tensors hold what they would hold."""

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from logah.assignment import plan_targets
from logah.skeleton import build_skeleton, own_values
from tests.logah.tiny_networks import GPT2, TIED_GPT2, VITS, graph_of, network_of


def test_covered_parameters_are_on_meta_and_all_else_is_real():
    covered = plan_targets(graph_of(network_of(VITS[0]), "vision", 16), network_of(VITS[0])).covered
    skeleton = build_skeleton(VITS[0].build, covered, seed=3)
    for name, parameter in skeleton.named_parameters():
        assert parameter.is_meta == (name in covered), name
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    assert set(own_values(skeleton)) == {"class_token"} | {name for name, _ in skeleton.named_buffers()}


class Uncovered(nn.Module):
    """Draws numbers for a parameter that no prediction supplies, after one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.randn(6))
        self.register_buffer("table", torch.arange(3.0))


def test_what_stays_is_a_function_of_the_seed_and_of_nothing_else():
    covered = ["layer.weight", "layer.bias"]
    torch.manual_seed(1)
    first = build_skeleton(Uncovered, covered, seed=7)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second, other = build_skeleton(Uncovered, covered, seed=7), build_skeleton(Uncovered, covered, seed=8)
    assert torch.equal(first.scale, second.scale) and not torch.equal(first.scale, other.scale)
    assert torch.equal(first.table, torch.arange(3.0))
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's numbers are left alone


@pytest.mark.parametrize("architecture", [GPT2, TIED_GPT2], ids=["untied", "tied"])
def test_tied_parameters_stay_tied(architecture):
    model = network_of(architecture)
    covered = plan_targets(graph_of(model, "llm"), model).covered
    skeleton = build_skeleton(architecture.build, covered)
    tied = skeleton.lm_head.weight is skeleton.transformer.wte.weight
    assert tied == (architecture is TIED_GPT2)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert skeleton.state_dict().keys() == model.state_dict().keys()


def test_no_random_numbers_are_spent_on_covered_parameters():
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))

    covered = build_skeleton(Uncovered, ["layer.weight", "layer.bias"], seed=7)
    assert torch.equal(covered.scale, build_skeleton(Alone, [], seed=7).scale)
    assert not torch.equal(covered.scale, build_skeleton(Uncovered, [], seed=7).scale)


def test_names_that_are_none_of_the_networks_are_refused():
    with pytest.raises(ConfigError, match="'absent' is no parameter"):
        build_skeleton(Uncovered, ["absent"])
