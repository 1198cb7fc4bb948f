"""Networks without values: graph, targets and skeleton of an architecture, and what stays of its own values."""

import torch
from torch.func import functional_call

from logah.architectures import gpt2, vit
from logah.hypernetwork import HyperNetwork
from logah.model_config import HyperNetworkConfig
from logah.networks import Network, NetworkCache, build_afresh, build_network
from logah.prediction import predict

SMALL = {"hid": 16, "layers": 1, "heads": 2, "lora_r": 4, "max_ck_lora": 512, "max_shape": 64}
VIT = vit(4, 1, 2, 16, num_classes=10, image_size=16)
GPT = gpt2(16, 1, 2, vocab_size=50, n_positions=16, tie_word_embeddings=True)


def test_covered_parameters_hold_no_memory_and_the_others_have_values():
    network = build_network(VIT, HyperNetworkConfig(**SMALL))
    devices = {name: parameter.device.type for name, parameter in network.module.named_parameters()}
    assert {name for name, device in devices.items() if device == "cpu"} == {"class_token"}
    assert set(network.own) == {"class_token"}


def test_afresh_and_kept_networks_have_one_graph_and_targets():
    config = HyperNetworkConfig(**SMALL)
    kept, afresh = build_network(VIT, config), build_afresh(VIT, config)
    assert kept.graph.nodes == afresh.graph.nodes and kept.plan == afresh.plan
    assert (kept.graph.distance_NN == afresh.graph.distance_NN).all()


def test_a_tied_network_runs_with_one_predicted_tensor_in_both_places():
    config = HyperNetworkConfig(variant="llm", **SMALL)
    torch.manual_seed(0)
    hypernetwork = HyperNetwork(config)
    network = build_network(GPT, config)
    found = predict(hypernetwork, [network.graph], [network.plan])
    values = network.values(found.parameters[0], "cpu")
    assert values["lm_head.weight"] is values["transformer.wte.weight"]
    tokens = torch.arange(8)[None]
    logits = functional_call(network.module.eval(), values, (), {"input_ids": tokens, "use_cache": False}).logits
    logits.sum().backward()
    assert hypernetwork.decoder.l2.weight.grad.abs().sum() > 0
    whole = GPT.build()
    assert whole.lm_head.weight is whole.transformer.wte.weight
    whole.load_state_dict(
        {name: value.detach() for name, value in values.items() if name in whole.state_dict()}, strict=False
    )
    torch.testing.assert_close(whole.eval()(tokens).logits, logits.detach(), atol=1e-5, rtol=1e-4)


def test_a_network_of_a_module_leaves_the_module_alone():
    module = VIT.build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    config = HyperNetworkConfig(**SMALL)
    network = Network.of(module, build_network(VIT, config).graph)
    predict(HyperNetwork(config), [network.graph], [network.plan])
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_the_cache_keeps_the_latest_networks():
    cache = NetworkCache(HyperNetworkConfig(**SMALL), kept=1)
    first = cache(VIT)
    assert cache(VIT) is first
    cache(vit(4, 2, 2, 16, num_classes=10, image_size=16))
    assert cache(VIT) is not first
