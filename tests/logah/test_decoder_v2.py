"""The second low-rank decoder: exact sizes without tiling, parts, roles, and networks predicted with it."""

import pytest
import torch
from torchvision.models import VisionTransformer
from transformers import GPT2Config, GPT2LMHeadModel

from logah.assignment import Target, TargetPlan, plan_targets
from logah.decoder_v2 import LowRankV2Decoder, parts_of, role_of
from logah.decoding_v2 import alike, factored, usual_std
from logah.hypernetwork import HyperNetwork
from logah.model_config import HyperNetworkConfig
from logah.prediction import fill, predict
from logah.tracing import trace

CONFIG = HyperNetworkConfig(
    decoder="lowrank_v2", hid=16, heads=2, layers=1, lora_r=4, graph_version="v2", max_shape=64, max_ck_lora=1024
)
PLAN = TargetPlan((), ())
TARGETS = [
    Target(("a.weight",), 0, (12, 7), "matrix"),
    Target(("attn.in_proj_weight",), 0, (24, 8), "matrix"),
    Target(("attn.c_attn.weight",), 0, (8, 24), "matrix"),
    Target(("head.weight",), 0, (10, 8), "class_weight"),
    Target(("conv.weight",), 0, (6, 3, 2, 2), "kernel"),
    Target(("pos_embedding",), 0, (1, 17, 8), "position"),
    Target(("class_token",), 0, (1, 1, 8), "tensor3"),
    Target(("wte.weight",), 0, (300, 8), "matrix", 0, True),
    Target(("wte.weight", "lm_head.weight"), 0, (300, 8), "matrix", 0, True),
    Target(("ln.weight",), 0, (9,), "vector"),
    Target(("ln.bias",), 0, (9,), "vector", 1),
]


@pytest.fixture(scope="module")
def decoder() -> LowRankV2Decoder:
    torch.manual_seed(0)
    return LowRankV2Decoder(16, 4)


@pytest.fixture(scope="module")
def trunk_Rt(decoder) -> torch.Tensor:
    return decoder.trunk(torch.randn(3, 16, generator=torch.Generator().manual_seed(1))).detach()


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(16, 4, 1, 2, 16, 32, num_classes=3)


def hypernetwork(**options) -> HyperNetwork:
    torch.manual_seed(0)
    return HyperNetwork(HyperNetworkConfig(**{**vars(CONFIG), **options}))


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: "+".join(target.names))
def test_every_role_has_its_exact_size_and_nodes_decode_alone_as_together(decoder, trunk_Rt, target):
    together = alike(decoder, trunk_Rt, target, PLAN, CONFIG)
    assert together.shape == (3, *target.shape) and together.isfinite().all()
    alone = alike(decoder, trunk_Rt[1:2], target, PLAN, CONFIG)
    torch.testing.assert_close(alone[0], together[1], atol=1e-6, rtol=1e-5)
    matrix = factored(decoder, trunk_Rt[1:2], target, PLAN, CONFIG)
    if len(target.shape) == 2:
        torch.testing.assert_close(matrix.materialise(), together[1], atol=1e-6, rtol=1e-5)
    else:
        assert matrix is None


@torch.no_grad()
def test_a_wide_matrix_repeats_nowhere_and_begins_as_a_narrow_one(decoder, trunk_Rt):
    conditioned = decoder.conditioned(trunk_Rt, "matrix")
    a_Rnr, b_Rmr = decoder.factors(conditioned, 5000, 64)
    narrow_a, narrow_b = decoder.factors(conditioned, 20, 64)
    torch.testing.assert_close(a_Rnr[:, :20] @ b_Rmr.transpose(1, 2), narrow_a @ narrow_b.transpose(1, 2))
    rows = torch.nn.functional.normalize(a_Rnr[0], dim=1)
    assert (torch.cdist(rows[:500], rows[500:]) > 1e-3).all()


def test_a_narrow_matrix_depends_on_every_number_of_its_node(decoder, trunk_Rt):
    head = decoder.head
    a_Rnr, b_Rmr = decoder.factors(decoder.conditioned(trunk_Rt[:1], "matrix"), 4, 4)
    (gradient,) = torch.autograd.grad((a_Rnr @ b_Rmr.transpose(1, 2)).square().sum(), head.weight)
    assert (gradient.abs().sum(dim=1) > 0).all()


@torch.no_grad()
def test_query_key_and_value_are_three_products(decoder, trunk_Rt):
    for target in TARGETS[1:3]:
        assert max(parts_of(target)) == 3
        value = alike(decoder, trunk_Rt[:1], target, PLAN, CONFIG)[0]
        parts = value.chunk(3, dim=0 if target.shape[0] == 24 else 1)
        assert all(torch.linalg.matrix_rank(part) == decoder.rank for part in parts)
        assert torch.linalg.matrix_rank(value) == 8
        assert not any(torch.allclose(parts[0], part, atol=1e-3) for part in parts[1:])
    assert parts_of(Target(("mlp.0.weight",), 0, (24, 8), "matrix")) == (1, 1)
    assert [role_of(target) for target in TARGETS[7:10]] == ["embedding", "tied", "vector"]


def test_usual_sizes_follow_the_rule():
    unit = HyperNetworkConfig(**{**vars(CONFIG), "normalisation": "unit_std", "residual_scale": True})
    plan = TargetPlan((), (), initializer_range=0.05, num_blocks=2)
    assert usual_std(TARGETS[0], PLAN, CONFIG) == pytest.approx((2 / 7) ** 0.5)
    assert usual_std(TARGETS[0], plan, unit) == 0.05
    assert usual_std(Target(("h.0.mlp.c_proj.weight",), 0, (8, 8), "matrix"), plan, unit) == pytest.approx(0.025)
    assert usual_std(TARGETS[8], plan, unit) == 0.05 and usual_std(TARGETS[7], plan, unit) == 1


def test_all_of_a_vit_is_predicted_and_every_weight_of_the_hypernetwork_learns():
    model, network = vit(), hypernetwork(num_classes=3)
    graph = trace(model, version="v2")
    plan = plan_targets(graph, model)
    assert plan.uncovered == ()
    prediction = predict(network, [graph], [plan])
    logits = torch.func.functional_call(model, prediction.parameters[0], (torch.randn(4, 3, 16, 16),))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    never = {"role", "waves", "shape_enc", "embed", "gnn"}  # tables of which a network uses some rows
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None or name.startswith(tuple(never)), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    report = fill(network, model, graph=graph)
    assert report.kept == () and model.class_token.abs().sum() > 0
    for name, value in prediction.parameters[0].items():
        torch.testing.assert_close(model.get_parameter(name), value, atol=1e-6, rtol=1e-5)


def test_networks_of_different_sizes_are_predicted_together_as_alone():
    config = {"n_layer": 1, "n_head": 2, "vocab_size": 20, "n_positions": 8, "bos_token_id": None, "eos_token_id": None}
    with torch.device("meta"):
        models = [
            GPT2LMHeadModel(GPT2Config(n_embd=width, tie_word_embeddings=tied, **config))
            for width, tied in ((8, False), (16, False), (8, True))
        ]
    network = hypernetwork(variant="llm")
    graphs = [trace(model, version="v2") for model in models]
    plans = [plan_targets(graph, model) for graph, model in zip(graphs, models, strict=True)]
    together = predict(network, graphs, plans).parameters
    for graph, plan, parameters in zip(graphs, plans, together, strict=True):
        (alone,) = predict(network, [graph], [plan]).parameters
        assert alone.keys() == parameters.keys()
        for name, value in alone.items():
            torch.testing.assert_close(value, parameters[name], atol=2e-6, rtol=1e-4)
    assert together[2]["transformer.wte.weight"] is together[2]["lm_head.weight"]
