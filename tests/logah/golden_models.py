"""Golden cases of the hypernetwork: its parts, predictions, training steps and learning rates."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.config import OptimConfig
from common.optim import learning_rate
from common.testing.golden import fill
from logah.assignment import plan_targets
from logah.decoder_dense import DenseDecoder
from logah.decoder_lowrank import LowRankDecoder
from logah.encoder import Encoder
from logah.hypernetwork import HyperNetwork
from logah.model_config import HyperNetworkConfig
from logah.networks import Network
from logah.normalisation import normalise
from logah.objective import meta_loss
from logah.prediction import fill as fill_network
from logah.prediction import predict
from logah.shape_encoder import ShapeEncoder
from logah.tiling import tile
from logah.tracing import trace
from tests.logah.golden_graphs import build_network

Arrays = Mapping[str, Tensor]
Outputs = dict[str, object]
CLASS_CALLS, VECTOR_CALLS = "class head", "1-D"


def _filled(module: nn.Module, case: Mapping) -> nn.Module:
    """Filled with the case's seed, after its keys and shapes are found to be those of the case."""
    listed = {key: tuple(shape) for key, shape in case["state_dict"]}
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == listed
    return fill(module, case["config"]["fill_seed"]).eval()


# ------------------------------------------------------------------------------------------- parts


def _calls(case: Mapping) -> dict[str, tuple[tuple[int, ...], str]]:
    """Request and kind of each call; texts are ``[sizes] as kind``."""
    found = {}
    for name, wanted in case["config"]["calls"].items():
        if isinstance(wanted, str):
            sizes = tuple(int(size) for size in wanted[1 : wanted.index("]")].split(","))
            found[name] = (sizes, "class" if CLASS_CALLS in wanted else "1d" if VECTOR_CALLS in wanted else "4d")
        else:
            found[name] = (tuple(wanted), "4d")
    return found


def _low_rank(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    decoder = _filled(LowRankDecoder(config["hid"], config["r"], config["ck"]), case)
    outputs = {}
    for name, (request, kind) in _calls(case).items():
        outputs[f"out_{name}"] = sliced = decoder(x["in_x"], request, kind)
        assert torch.allclose(sliced, decoder.full(x["in_x"], request, kind), atol=1e-6)
    return outputs


def _dense(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    decoder = _filled(DenseDecoder(config["hid"], tuple(config["out_shape"]), config["num_classes"]), case)
    outputs = {}
    for name, (request, kind) in _calls(case).items():
        rows = case["arrays"][f"out_{name}"][0]
        outputs[f"out_{name}"] = decoder(x["in_x"][:rows], request, kind)
    return outputs


def _encoder(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    encoder = _filled(Encoder(config["hid"], config["heads"], config["layers"]), case)
    distance, sizes = x["in_adj"].long(), config["n"]
    largest = x["in_x_batch"].shape[1]
    batch = torch.zeros(len(sizes), largest, largest, dtype=torch.long)
    mask = torch.zeros(len(sizes), largest, dtype=torch.bool)
    for row, size in enumerate(sizes):
        batch[row, :size, :size] = distance[:size, :size]
        mask[row, :size] = True
    y = encoder(x["in_x_batch"], batch, mask)
    return {
        "out_y": encoder(x["in_x"], distance[None], torch.ones(1, len(distance), dtype=torch.bool)),
        "out_y_batch_0": y[0, : sizes[0]],
        "out_y_batch_1_valid": y[1, : sizes[1]],
    }


def _shapes(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    variant = "llm" if "128256" in case["what"] else "vision"
    encoder = _filled(ShapeEncoder(config["hid"], config["num_classes"], config["max_shape"][3], variant), case)
    shapes = [tuple(shape) for shape in config["shapes"]]
    after = x["in_x"].shape[0] - len(shapes) - 1
    return {
        "out_y": encoder(x["in_x"][None], [[None, *shapes, *[None] * after]])[0],
        "out_channels": encoder.channels,
        "out_spatial": encoder.spatials,
    }


def _tiles(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    return {f"out_t{i}": tile(x[f"in_w{i}"], tuple(target)) for i, (_, target) in enumerate(config["pairs"])}


def _scales(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    outputs = {}
    for i, (_, is_weight) in enumerate(next(iter(config.values()))):
        for name, rule in (("fanin", "fan_in"), ("std", "unit_std")):
            outputs[f"out_{name}{i}"] = normalise(x[f"in_p{i}"], rule, is_weight=is_weight)
    return outputs


def _rates(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    """One optimizer step per epoch, so that the rate of step e + 1 is that of epoch e."""
    optim = OptimConfig(
        lr=config["lr"],
        schedule="cosine_epochs",
        warmup=config["warmup"],
        warmup_factor=config["init_lr"] / config["lr"],
        epoch_steps=1,
    )
    epochs = config["epochs"]
    return {"out_mult": torch.tensor([learning_rate(e + 1, optim, epochs) / config["lr"] for e in range(epochs)])}


# ------------------------------------------------------------------------------------------- predictions


def _hypernetwork(case: Mapping, rule: str = "fan_in") -> HyperNetwork:
    """With the options of the case, in its names."""
    options, keys = case["config"]["ghn"], {key: tuple(shape) for key, shape in case["state_dict"]}
    config = HyperNetworkConfig(
        variant="llm" if keys["embed.weight"][0] == 18 else "vision",
        decoder="lowrank" if options["lora"] else "dense",
        hid=options["hid"],
        layers=options["layers"],
        heads=options["heads"],
        layernorm=options["layernorm"],
        virtual_edges=options["ve"],
        lora_r=options.get("lora_r", 32),
        max_ck_lora=options.get("max_ck_lora", 32768),
        max_shape=tuple(options["max_shape"]),
        num_classes=options["num_classes"],
        use_1d_decoder=options["use_1d_decoder"],
        normalisation=rule if options["weight_norm"] else "none",
        attention="as_is",
    )
    return _filled(HyperNetwork(config), case)


def _rule(case: Mapping) -> str:
    """LoGAH's language models divide by the deviation, unless the case says otherwise."""
    if "fan-in" in case["what"]:
        return "fan_in"
    return "unit_std" if {"n_embd", "hidden_size"} & _networks(case)[0].keys() else "fan_in"


def _networks(case: Mapping) -> list[Mapping]:
    """Descriptions; language models are untied and show their softmax unless they say otherwise."""
    found = case["config"].get("nets", case["config"].get("net"))
    untold = {"tie_word_embeddings": False, "attn_implementation": "eager"}
    return [
        untold | network if {"n_embd", "hidden_size"} & network.keys() else network
        for network in (found if isinstance(found, list) else [found])
    ]


def _traced(hypernetwork: HyperNetwork, models: list[nn.Module], networks: list[Mapping]) -> list:
    config = hypernetwork.config
    return [
        trace(
            model,
            variant=config.variant,
            attention=config.attention,
            ve_cutoff=config.ve_cutoff,
            image_size=network.get("image_size", network.get("input", (3, 32, 32))[-1]),
        )
        for model, network in zip(models, networks, strict=True)
    ]


def _predictions(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    hypernetwork, networks = _hypernetwork(case, _rule(case)), _networks(case)
    models = [build_network(network) for network in networks]
    graphs = _traced(hypernetwork, models, networks)
    plans = [plan_targets(graph, model) for graph, model in zip(graphs, models, strict=True)]
    together = predict(hypernetwork, graphs, plans)
    if hypernetwork.config.decoder == "lowrank" and not hypernetwork.config.use_1d_decoder:
        full = predict(hypernetwork, graphs, plans, scheme="full")
        for ours, theirs in zip(together.parameters, full.parameters, strict=True):
            assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    _check_groups(case, hypernetwork, plans, graphs)
    outputs: Outputs = {"out_embeddings": torch.cat([y[: len(g)] for y, g in zip(together.x_BNd, graphs, strict=True)])}
    for b, (model, graph) in enumerate(zip(models, graphs, strict=True)):
        fill_network(hypernetwork, model, graph=graph)
        for name, value in model.named_parameters():
            outputs[f"out_p{b}:{name}"] = value
            decoded = together.parameters[b].get(name)
            assert decoded is None or torch.allclose(decoded, value, atol=1e-5), f"{name}: together and alone differ"
    return outputs


def _check_groups(case: Mapping, hypernetwork: HyperNetwork, plans: list, graphs: list) -> None:
    """The keys by which the reference groups parameters, and the nodes (counted over the batch) of each."""
    found: dict[tuple, list[int]] = {}
    first = 0
    for plan, graph in zip(plans, graphs, strict=True):
        for key, nodes in plan.groups(hypernetwork.config.max_shape).items():
            found.setdefault(key, []).extend(first + node for node in nodes)
        first += len(graph)
    assert found == {tuple(key): nodes for key, nodes in case["facts"]["groups"]}


# ------------------------------------------------------------------------------------------- training steps


def _training_step(case: Mapping, config: Mapping, x: Arrays) -> Outputs:
    hypernetwork, networks = _hypernetwork(case, _rule(case)), _networks(case)
    models = [build_network(network).eval() for network in networks]  # no dropout
    graphs = _traced(hypernetwork, models, networks)
    images = "in_x" in x
    batch = {"images": x["in_x"], "labels": x["in_y"]} if images else {"tokens": x["in_input_ids"]}
    assert images or torch.equal(x["in_labels"], x["in_input_ids"])
    ready = [Network.of(model, graph) for model, graph in zip(models, graphs, strict=True)]
    loss = meta_loss(hypernetwork, ready, [batch] * len(models), norm_penalty=config["predparam_wd"], keep_logits=True)
    (loss.total / len(models)).backward()
    total_norm = nn.utils.clip_grad_norm_(hypernetwork.parameters(), 5.0)
    gradients = dict(hypernetwork.named_parameters())
    assert {name for name, p in gradients.items() if p.grad is not None} == set(config["grad_norm_order"])
    outputs = {
        "out_loss": loss.total / len(models),
        "out_task_loss": loss.task_sum / len(models),
        "out_weight_norm_sum": loss.norm_sum,
        "out_grad_total_norm": total_norm,
        "out_grad_norms": torch.stack([gradients[name].grad.norm() for name in config["grad_norm_order"]]),
    }
    return outputs | {f"out_logits{b}": logits for b, logits in enumerate(loss.logits)}


KINDS = [
    (lambda case, config, x: "grad_norm_order" in config, _training_step),
    (lambda case, config, x: "ghn" in config, _predictions),
    (lambda case, config, x: "ck" in config, _low_rank),
    (lambda case, config, x: "out_shape" in config, _dense),
    (lambda case, config, x: "in_adj" in x, _encoder),
    (lambda case, config, x: "shapes" in config, _shapes),
    (lambda case, config, x: "pairs" in config, _tiles),
    (lambda case, config, x: "in_p0" in x, _scales),
    (lambda case, config, x: "init_lr" in config, _rates),
]
