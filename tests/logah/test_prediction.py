"""Predicted parameters: of a batch and alone, with gradients and in place; their ranges; what is refused."""

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from logah.architectures import vit
from logah.assignment import plan_targets
from logah.networks import Network
from logah.objective import meta_loss
from logah.prediction import fill, predict, use_batch_statistics
from tests.logah.tiny_hypernetwork import tiny_hypernetwork
from tests.logah.tiny_networks import GPT2, LLAMA, TIED_GPT2, VITS, convolutional, graph_of, network_of

KINDS = {
    "lowrank": {},
    "lowrank_1d": {"use_1d_decoder": True},
    "dense": {"decoder": "dense"},
    "tiled": {"max_shape": (12, 20, 16, 16)},
}


def planned(models: list[nn.Module], variant: str = "vision", image_size: int | None = 16):
    graphs = [graph_of(model, variant, image_size) for model in models]
    return graphs, [plan_targets(graph, model) for graph, model in zip(graphs, models, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_different_sizes_together_equal_each_alone(kind: str):
    hypernetwork = tiny_hypernetwork(**KINDS[kind])
    graphs, plans = planned([network_of(architecture) for architecture in VITS])
    assert len({len(graph) for graph in graphs}) > 1  # where the released code reads the wrong rows
    together = predict(hypernetwork, graphs, plans)
    for number, (graph, plan) in enumerate(zip(graphs, plans, strict=True)):
        alone = predict(hypernetwork, [graph], [plan]).parameters[0]
        assert alone.keys() == set(plan.covered)
        for name, value in alone.items():
            assert torch.allclose(together.parameters[number][name], value, atol=1e-6), name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_filling_a_module_equals_predicting_its_parameters(kind: str):
    hypernetwork, model = tiny_hypernetwork(**KINDS[kind]), network_of(VITS[1])
    before = {name: value.clone() for name, value in model.named_parameters()}
    graphs, plans = planned([model])
    expected = predict(hypernetwork, graphs, plans).parameters[0]
    report = fill(hypernetwork, model, image_size=16)
    assert report.kept == ("class_token",) and torch.equal(model.class_token, before["class_token"])
    assert set(report.predicted) == expected.keys()
    assert report.values == sum(value.numel() for value in expected.values())
    for name, value in expected.items():
        parameter = model.get_parameter(name)
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
        assert torch.allclose(parameter, value, atol=1e-6), name
        assert not torch.equal(parameter, before[name]), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lowrank", "tiled"])
def test_the_released_scheme_gives_the_same_numbers(kind: str):
    hypernetwork = tiny_hypernetwork(**KINDS[kind])
    graphs, plans = planned([network_of(architecture) for architecture in VITS[:2]])
    exact = predict(hypernetwork, graphs, plans).parameters
    full = predict(hypernetwork, graphs, plans, scheme="full").parameters
    for one, other in zip(exact, full, strict=True):
        assert all(torch.allclose(one[name], other[name], atol=2e-6) for name in one)


@torch.no_grad()
def test_predicting_twice_gives_identical_tensors():
    hypernetwork = tiny_hypernetwork(variant="llm")
    first, second = network_of(GPT2), network_of(GPT2)
    for model, noise in ((first, 1), (second, 2)):
        torch.manual_seed(noise)  # no draw of the prediction comes from the global generator
        fill(hypernetwork, model)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@torch.no_grad()
def test_the_class_tokens_row_is_zero_or_drawn_from_its_own_seed():
    rows = {}
    for noise, seed in ((0.0, 0), (0.02, 0), (0.02, 1), (0.02, 1)):
        hypernetwork, model = tiny_hypernetwork(class_token_noise=noise), network_of(VITS[0])
        fill(hypernetwork, model, image_size=16, class_token_seed=seed)
        row = model.encoder.pos_embedding[0, 0].clone()
        assert torch.equal(rows.setdefault((noise, seed), row), row)
    assert not rows[0.0, 0].any() and 0.005 < rows[0.02, 0].std() < 0.05
    assert not torch.equal(rows[0.02, 0], rows[0.02, 1])


@torch.no_grad()
def test_vectors_lie_in_their_ranges():
    for hypernetwork, model, size in (
        (tiny_hypernetwork(), network_of(VITS[0]), 16),
        (tiny_hypernetwork(decoder="dense"), convolutional(), 32),
        (tiny_hypernetwork(variant="llm"), network_of(GPT2), None),
    ):
        report = fill(hypernetwork, model, image_size=size)
        for name in report.predicted:
            value = model.get_parameter(name)
            if value.dim() == 1 and name.endswith("bias"):
                assert ((value > -1) & (value < 1)).all(), name
            elif value.dim() == 1:
                assert ((value > 0) & (value < 2)).all(), name


@torch.no_grad()
@pytest.mark.parametrize("architecture", [GPT2, LLAMA, TIED_GPT2], ids=["gpt2", "llama", "tied"])
def test_language_models_get_their_own_deviation_and_tables_as_decoded(architecture):
    hypernetwork, model = tiny_hypernetwork(variant="llm"), network_of(architecture)
    wanted = model.config.initializer_range
    report = fill(hypernetwork, model)
    matrices = {name: model.get_parameter(name) for name in report.predicted if model.get_parameter(name).dim() > 1}
    # a table tied to the head is the head's weight in the graph
    tables = {name for name in matrices if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)}
    assert len(tables) == {"gpt2": 1 if architecture is TIED_GPT2 else 2, "llama": 1}[architecture.family]
    for name, value in matrices.items():
        has_it = float(value.std()) == pytest.approx(wanted, abs=1e-4 * wanted)
        assert has_it == (name not in tables), name


@torch.no_grad()
def test_the_last_maps_of_residual_branches_can_be_scaled_down():
    plain, smaller = network_of(GPT2), network_of(GPT2)
    fill(tiny_hypernetwork(variant="llm"), plain)
    fill(tiny_hypernetwork(variant="llm", residual_scale=True), smaller)
    for name, value in plain.named_parameters():
        factor = 2.0 if name.endswith("c_proj.weight") else 1.0  # two layers: sqrt(2 * 2)
        assert torch.allclose(value, factor * smaller.get_parameter(name), atol=1e-6), name


@torch.no_grad()
def test_tied_tables_stay_tied():
    model = network_of(TIED_GPT2)
    fill(tiny_hypernetwork(variant="llm"), model)
    assert model.lm_head.weight is model.transformer.wte.weight


@torch.no_grad()
def test_wide_layers_repeat_what_is_decoded():
    hypernetwork = tiny_hypernetwork(variant="llm", max_shape=(16, 16, 16, 16))
    model = network_of(GPT2)
    fill(hypernetwork, model)
    table = model.transformer.wte.weight
    assert torch.equal(table[16:32], table[:16]) and torch.equal(table[80:90], table[:10])


@torch.no_grad()
def test_matrices_have_at_most_the_rank_of_the_decoder():
    model = network_of(VITS[0])
    fill(tiny_hypernetwork(), model, image_size=16)
    singular = torch.linalg.svdvals(model.get_parameter("encoder.layers.encoder_layer_0.mlp.0.weight").double())
    assert singular[3] > 1e-4 * singular[0] > 0 and (singular[4:] < 1e-5 * singular[0]).all()


@torch.no_grad()
def test_another_number_of_classes_leaves_the_class_layer_alone():
    model = network_of(vit(4, 1, 2, 16, num_classes=7, image_size=16))
    before = {name: value.clone() for name, value in model.heads.named_parameters()}
    report = fill(tiny_hypernetwork(), model, image_size=16, predict_class_layers=False)
    assert all(torch.equal(value, before[name]) for name, value in model.heads.named_parameters())
    assert {"heads.head.weight", "heads.head.bias"} <= set(report.kept)


@torch.no_grad()
def test_a_predicted_network_computes():
    model = network_of(VITS[0])
    fill(tiny_hypernetwork(), model, image_size=16)
    logits = model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(logits).all() and not torch.equal(logits[0], logits[1])


@torch.no_grad()
def test_batch_normalisations_use_each_batch():
    model = use_batch_statistics(convolutional())
    images = 5 + torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    normalised = model.bn1(model.conv1(images))
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-5 and not model.training


# ------------------------------------------------------------------------------------------------------- gradients

NEVER_USED = ("decoder.l1.", "decoder_1d.0.", "bias_class.1.")


@pytest.mark.parametrize("variant, architectures", [("vision", VITS[:2]), ("llm", [GPT2, TIED_GPT2])])
def test_gradients_reach_all_that_is_used(variant: str, architectures):
    hypernetwork = tiny_hypernetwork(variant=variant).requires_grad_()
    models = [network_of(architecture) for architecture in architectures]
    networks = [Network.of(model, graph_of(model, variant, 16 if variant == "vision" else None)) for model in models]
    rng = torch.Generator().manual_seed(0)
    batch = {"tokens": torch.randint(0, 90, (3, 12), generator=rng)}
    if variant == "vision":
        images = torch.randn(4, 3, 16, 16, generator=rng)
        batch = {"images": images, "labels": torch.randint(0, 10, (4,), generator=rng)}
    before = [{name: value.clone() for name, value in model.named_parameters()} for model in models]
    meta_loss(hypernetwork, networks, [batch] * len(models)).total.backward()
    without = {name for name, p in hypernetwork.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {name for name, _ in hypernetwork.named_parameters() if name.startswith(NEVER_USED)}
    for model, values in zip(models, before, strict=True):  # the networks themselves are left as they were
        assert all(torch.equal(value, values[name]) for name, value in model.named_parameters())


def test_training_a_tied_network_keeps_it_tied():
    hypernetwork = tiny_hypernetwork(variant="llm").requires_grad_()
    model = network_of(TIED_GPT2)
    graphs, plans = planned([model], "llm", None)
    found = predict(hypernetwork, graphs, plans).parameters[0]
    assert found["lm_head.weight"] is found["transformer.wte.weight"] and found["lm_head.weight"].requires_grad
    assert model.lm_head.weight is model.transformer.wte.weight


# ------------------------------------------------------------------------------------------------------- refusals


def test_factors_too_short_for_a_tensor_name_it_and_the_remedy():
    hypernetwork = tiny_hypernetwork(max_ck_lora=40, max_shape=(64, 64, 16, 16))
    with pytest.raises(ConfigError, match=r"max_ck_lora=40 is too small for .*of shape .*at least \d+"):
        fill(hypernetwork, network_of(VITS[0]), image_size=16)


def test_strict_refuses_parameters_that_no_node_covers():
    with pytest.raises(ConfigError, match="class_token"):
        fill(tiny_hypernetwork(), network_of(VITS[0]), image_size=16, strict=True)


def test_a_network_without_values_is_refused():
    with pytest.raises(ConfigError, match="meta device"):
        fill(tiny_hypernetwork(), VITS[0].build_meta(), image_size=16)


def test_a_graph_traced_otherwise_is_refused():
    model = network_of(VITS[0])
    graph = graph_of(model, "vision", 16)
    with pytest.raises(ConfigError, match="attention='explicit'.*attention='as_is'"):
        fill(tiny_hypernetwork(attention="as_is"), model, graph=graph)
    with pytest.raises(ConfigError, match="ve_cutoff=50.*ve_cutoff=9"):
        fill(tiny_hypernetwork(ve_cutoff=9), model, graph=graph)


def test_a_vision_hypernetwork_names_the_norm_that_it_does_not_know():
    model = network_of(LLAMA)
    with pytest.raises(ConfigError, match="is a rmsnorm.*variant=llm"):
        tiny_hypernetwork().embed_graphs([graph_of(model, "llm")])
