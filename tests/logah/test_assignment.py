"""Which node gives which parameter: every one exactly once, tied ones together, the rest named."""

from collections import Counter

import pytest
from torch import nn

from common.errors import ConfigError
from logah.assignment import plan_targets, rounded
from tests.logah.tiny_networks import GPT2, LLAMA, TIED_GPT2, VITS, convolutional, graph_of, network_of


def planned(model: nn.Module, variant: str = "vision", image_size: int | None = None, **options):
    return plan_targets(graph_of(model, variant, image_size), model, **options)


def cases() -> dict[str, tuple]:
    return {
        "vit": (network_of(VITS[0]), "vision", 16),
        "gpt2": (network_of(GPT2), "llm", None),
        "tied gpt2": (network_of(TIED_GPT2), "llm", None),
        "llama": (network_of(LLAMA), "llm", None),
        "convolutions": (convolutional(), "vision", 32),
    }


@pytest.mark.parametrize("name", cases())
def test_every_parameter_is_given_once_or_named_as_uncovered(name: str):
    model, variant, size = cases()[name]
    plan = planned(model, variant, size)
    counted = Counter(plan.covered + plan.uncovered)
    assert set(counted) == {key for key, _ in model.named_parameters(remove_duplicate=False)}
    assert set(counted.values()) == {1}
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters(remove_duplicate=False)}
    assert all(shapes[key] == target.shape for target in plan.targets for key in target.names)
    assert plan.uncovered == (("class_token",) if name == "vit" else ())


def test_tied_tables_are_one_target_with_both_names():
    tied = {target.names for target in planned(network_of(TIED_GPT2), "llm").targets if len(target.names) > 1}
    assert {frozenset(names) for names in tied} == {frozenset({"transformer.wte.weight", "lm_head.weight"})}
    assert not any(len(target.names) > 1 for target in planned(network_of(GPT2), "llm").targets)


def test_roles_follow_the_kind_of_parameter():
    by_name = {target.name: target for target in planned(network_of(VITS[0]), "vision", 16).targets}
    layer = "encoder.layers.encoder_layer_0."
    assert by_name["conv_proj.weight"].role == "kernel"
    assert by_name["encoder.pos_embedding"].role == "position"
    assert by_name[f"{layer}self_attention.in_proj_weight"].role == "matrix"
    assert (by_name["heads.head.weight"].role, by_name["heads.head.bias"].role) == ("class_weight", "class_bias")
    assert (by_name[f"{layer}ln_1.weight"].row, by_name[f"{layer}ln_1.bias"].row) == (0, 1)
    assert by_name[f"{layer}ln_1.weight"].node == by_name[f"{layer}ln_1.bias"].node  # one node gives both
    tables = {target.name for target in planned(network_of(GPT2), "llm").targets if target.embedding}
    assert tables == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_the_untied_language_head_is_a_matrix_like_any_other():
    # in the reference graph it is no end of the network, so no tensor takes the class head
    for architecture in (GPT2, LLAMA):
        targets = planned(network_of(architecture), "llm").targets
        assert {target.role for target in targets} <= {"matrix", "vector"}
        assert "lm_head.weight" in {target.name for target in targets}


def test_root_mean_square_norms_have_no_second_row():
    targets = planned(network_of(LLAMA), "llm").targets
    assert {target.row for target in targets if target.role == "vector"} == {0}


def test_the_class_layer_can_be_left_out():
    plan = planned(network_of(VITS[0]), "vision", 16, predict_class_layers=False)
    assert {"heads.head.weight", "heads.head.bias"} <= set(plan.uncovered)


@pytest.mark.parametrize(
    "size, most, expected",
    [(768, 2048, 2048), (768, 4096, 1024), (10, 64, 10), (12, 64, 16), (33, 64, 64), (5000, 2048, 2048), (3, 64, 4)],
)
def test_rounding_of_sizes(size: int, most: int, expected: int):
    assert rounded(size, most) == expected


def test_a_graph_of_another_network_is_an_error():
    graph = graph_of(network_of(VITS[2]), "vision", 16)
    with pytest.raises(ConfigError, match="encoder_layer_1.*no parameter of VisionTransformer"):
        plan_targets(graph, network_of(VITS[1]))
