"""Version 2 graphs: true edges on real and meta tensors, for transformers, torchvision and odd modules."""

import networkx
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18, squeezenet1_1
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from common.errors import ConfigError
from logah.export_tracing import trace_exported
from logah.tracing import trace


def gpt2(**options) -> GPT2LMHeadModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16, "tie_word_embeddings": False}
    ids = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes | ids | options))


def llama() -> LlamaForCausalLM:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def names_before(graph, name):
    (index,) = [index for index, node in enumerate(graph.nodes) if node.name == name]
    return {graph.nodes[one].name for one in graph.predecessors(index)}


def test_output_embedding_follows_the_last_norm_and_every_parameter_has_its_node():
    with torch.device("meta"):
        model = gpt2()
    graph = trace_exported(model)
    assert graph.variant == "llm" and graph.version == "v2"
    assert names_before(graph, "lm_head.weight") == {"transformer.ln_f.weight"}
    assert graph.nodes[-1].name == "lm_head.weight"
    biased_norms = {f"{name}.bias" for name in ("transformer.ln_f",)} | {
        f"transformer.h.{layer}.ln_{number}.bias" for layer in (0, 1) for number in (1, 2)
    }
    listed = {node.name for node in graph.nodes if node.listed}
    assert listed | biased_norms == set(dict(model.named_parameters()))  # a norm's node stands for its bias too


def test_meta_and_real_parameters_give_the_same_graph_and_the_model_is_left_alone():
    torch.manual_seed(0)
    real = VisionTransformer(16, 4, 1, 2, 16, 32, num_classes=3).train()
    before = {name: value.clone() for name, value in real.state_dict().items()}
    with torch.device("meta"):
        meta = VisionTransformer(16, 4, 1, 2, 16, 32, num_classes=3)
    first, second = trace_exported(real), trace_exported(meta)
    assert first.nodes == second.nodes and (first.distance_NN == second.distance_NN).all()
    assert real.training and not any(module._forward_hooks for module in real.modules())
    assert all(torch.equal(before[name], value) for name, value in real.state_dict().items())


def test_class_token_is_a_listed_node_and_the_head_is_marked():
    with torch.device("meta"):
        graph = trace_exported(VisionTransformer(16, 4, 1, 2, 16, 32, num_classes=3))
    assert names_before(graph, "encoder/add") == {"cat", "encoder.pos_embedding"}
    assert names_before(graph, "cat") == {"class_token", "conv_proj.bias"}
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["class_token"].listed and nodes["encoder.pos_embedding"].shape == (1, 16, 4, 4)
    assert nodes["heads.head.weight"].is_last_weight and nodes["heads.head.bias"].is_last_bias


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_has_one_node_however_it_is_computed(implementation):
    with torch.device("meta"):
        model = gpt2(attn_implementation=implementation)
    graph = trace_exported(model)
    assert [node.type_name for node in graph.nodes].count("msa") == 2
    names = [node.type_name for node in trace_exported(model, attention="as_is").nodes]
    assert names.count("msa") == (2 if implementation == "eager" else 0)


def test_tied_embedding_is_predicted_once_and_the_graph_stays_acyclic():
    with torch.device("meta"):
        graph = trace_exported(gpt2(tie_word_embeddings=True, pad_token_id=0))
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["transformer.wte.weight"].listed and not nodes["lm_head.weight"].listed
    assert names_before(graph, "lm_head.weight") == {"transformer.ln_f.weight"}
    assert names_before(graph, "transformer.wte.weight") == {"input"}


def test_llama_has_rotations_gates_and_values_at_the_attention():
    with torch.device("meta"):
        graph = trace_exported(llama())
    layer = "model.layers.0"
    (attention,) = [index for index, node in enumerate(graph.nodes) if node.type_name == "msa"]
    before = [graph.nodes[one] for one in graph.predecessors(attention)]
    assert sorted(node.type_name for node in before) == ["conv", "rot_emb", "rot_emb"]
    assert f"{layer}.self_attn.v_proj.weight" in {node.name for node in before}
    assert names_before(graph, f"{layer}.mlp/mul") == {f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"}


def as_networkx(graph):
    """Nodes by type and, of parameters, name: names of operations differ between the versions."""
    edges = networkx.from_numpy_array(graph.distance_NN == 1, create_using=networkx.DiGraph)
    for index, node in enumerate(graph.nodes):
        edges.nodes[index]["kind"] = (node.type, node.shape, node.name if node.listed and "." in node.name else "")
    return edges


@pytest.mark.parametrize("name", ["llama", "resnet18"])
def test_where_the_reference_graph_is_true_both_versions_agree(name):
    with torch.device("meta"):
        model = llama() if name == "llama" else resnet18().eval()
    first, second = as_networkx(trace(model)), as_networkx(trace(model, version="v2"))
    for graph in (first, second):
        for node in graph.nodes:  # pools are listed, and named after their operation
            kind, shape, label = graph.nodes[node]["kind"]
            graph.nodes[node]["kind"] = (kind, shape, label if "weight" in label or "bias" in label else "")
    assert networkx.is_isomorphic(first, second, node_match=lambda one, other: one["kind"] == other["kind"])


def test_a_convolution_that_classifies_takes_the_class_head():
    with torch.device("meta"):
        graph = trace_exported(squeezenet1_1(), image_size=64)
    head = next(node for node in graph.nodes if node.is_last_weight)
    assert head.name == "classifier.1.weight" and head.shape == (1000, 512)


def test_a_norm_written_out_is_one_node():
    class PlainLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return (x - x.mean(-1, keepdim=True)) * self.weight + self.bias

    graph = trace_exported(nn.Sequential(nn.Linear(4, 4), PlainLayerNorm()), inputs=torch.zeros(2, 4))
    assert [node.type_name for node in graph.nodes] == ["input", "conv", "bias", "ln"]


def test_shared_layers_are_listed_once():
    shared = nn.Linear(4, 4)
    graph = trace_exported(nn.Sequential(shared, nn.ReLU(), shared), inputs=torch.zeros(2, 4))
    assert [node.listed for node in graph.nodes if node.name.endswith("weight")] == [True, False]


def test_a_model_that_cannot_be_exported_names_module_and_operation():
    class Chooser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(3, 3)

        def forward(self, x):
            return x if self.scale(x).sum().item() > 0 else -x

    with pytest.raises(ConfigError, match=r"module 1 \(Chooser\)"):
        trace_exported(nn.Sequential(nn.Linear(3, 3), Chooser()), inputs=torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="no parameters"):
        trace_exported(nn.ReLU())
