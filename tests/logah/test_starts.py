"""Starts: how they are written, and that each gives the weights it promises."""

import pytest
import torch

from common.errors import CheckpointError, ConfigError
from logah.architectures import gpt2, vit
from logah.assignment import plan_targets
from logah.checkpoints import save_hypernetwork
from logah.prediction import predict
from logah.prediction_folder import write_module_folder
from logah.starts import Start, Starter, StartOptions, graph_for, parse_start, parse_starts, random_network
from tests.logah.tiny_hypernetwork import tiny_hypernetwork

VIT = vit(2, num_layers=1, num_heads=2, hidden_dim=12, image_size=8)
GPT2 = gpt2(16, 2, 2, vocab_size=40, n_positions=16, tie_word_embeddings=True)


def test_starts_are_read_as_they_are_written():
    assert parse_start("random") == Start("random", "random")
    assert parse_start("prediction:out/a@b") == Start("prediction", "prediction", "out/a@b")
    assert parse_start("logah@hypernetwork:/x/y.pt") == Start("logah", "hypernetwork", "/x/y.pt")
    two = parse_starts(["hypernetwork:runs/a", "hypernetwork:runs/b", "random"])
    assert [start.label for start in two] == ["hypernetwork-a", "hypernetwork-b", "random"]


@pytest.mark.parametrize(
    "texts, message",
    [
        (["rnd"], "'rnd', which is not known; choose one of random"),
        (["hypernetwork"], "lacks a path; write hypernetwork:PATH"),
        (["random:x"], "takes no path; write random"),
        (["random", "random"], "2 starts are called 'random'"),
        (["a/b@random"], "it must be a word"),
        ([], "inits is empty"),
    ],
)
def test_starts_that_make_no_sense_are_refused(texts: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_starts(texts)


def test_random_starts_are_decided_by_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (Starter(VIT).make(Start("random", "random"), seed).network for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.heads.head.weight, again.heads.head.weight) or first.heads.head.weight.abs().sum() == 0
    assert torch.equal(first.conv_proj.weight, again.conv_proj.weight)
    assert not torch.equal(first.conv_proj.weight, other.conv_proj.weight)


@pytest.fixture(scope="module")
def hypernetwork(tmp_path_factory):
    """A folder with an untrained hypernetwork of either kind."""
    folder = tmp_path_factory.mktemp("hypernetworks")
    for variant in ("vision", "llm"):
        save_hypernetwork(folder / variant, tiny_hypernetwork(variant=variant, seed=4), {})
    return folder


def test_a_predicted_start_holds_the_prediction_and_tied_weights_stay_tied(hypernetwork):
    source = str(hypernetwork / "llm")
    starter = Starter(GPT2)
    made = starter.make(Start("logah", "hypernetwork", source), 0)
    loaded = starter.loaded(source)
    graph = graph_for(loaded.config, GPT2)
    with torch.no_grad():
        expected = predict(loaded.model, [graph], [plan_targets(graph, made.network)]).parameters[0]
    state = made.network.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert made.network.lm_head.weight is made.network.transformer.wte.weight
    assert made.facts["predicted"] > 10 and made.facts["digest"]


def test_graphs_of_another_kind_than_the_hypernetworks_are_refused(hypernetwork):
    start = Start("logah", "hypernetwork", str(hypernetwork / "vision"))
    with pytest.raises(CheckpointError, match="attention=explicit and cannot be used with attention=as_is"):
        Starter(VIT, StartOptions(hypernetwork={"attention": "as_is"})).make(start, 0)
    with pytest.raises(ConfigError, match="start.hypernetwork='atention' is not known"):
        StartOptions(hypernetwork={"atention": "as_is"})


def test_the_class_head_can_be_left_random_for_other_classes(hypernetwork):
    source, start = str(hypernetwork / "vision"), Start("logah", "hypernetwork", str(hypernetwork / "vision"))
    other = vit(2, num_layers=1, num_heads=2, hidden_dim=12, image_size=8, num_classes=7)
    kept = Starter(other, StartOptions(predict_class_layers=False)).make(start, 3)
    assert torch.equal(kept.network.heads.head.weight, random_network(other, 3).heads.head.weight)
    assert "heads.head.weight" in kept.facts["uncovered"]
    predicted = Starter(other).make(Start("logah", "hypernetwork", source), 3)
    assert predicted.network.heads.head.weight.shape == (7, 12)
    assert predicted.network.heads.head.weight.abs().sum() > 0
    body = [name for name in kept.network.state_dict() if "heads" not in name]
    for name in body:
        assert torch.equal(kept.network.state_dict()[name], predicted.network.state_dict()[name]), name


def test_saved_weights_come_back_and_another_class_head_is_refused_or_kept(tmp_path):
    trained = random_network(VIT, 9)
    torch.nn.init.normal_(trained.heads.head.weight)
    write_module_folder(tmp_path / "w" / "export", VIT, trained)
    start = Start("prediction", "prediction", str(tmp_path / "w"))  # a run folder stands for its export/
    state = Starter(VIT).make(start, 0).network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())
    other = vit(2, num_layers=1, num_heads=2, hidden_dim=12, image_size=8, num_classes=7)
    with pytest.raises(CheckpointError, match=r"heads.head.bias has shape \(10,\), the target needs \(7,\)"):
        Starter(other).make(start, 0)
    made = Starter(other, StartOptions(predict_class_layers=False)).make(start, 0)
    assert set(made.facts["kept_random"]) == {"heads.head.weight", "heads.head.bias"}
    deeper = vit(2, num_layers=2, num_heads=2, hidden_dim=12, image_size=8)
    with pytest.raises(CheckpointError, match="lacks tensors: encoder.layers.encoder_layer_1"):
        Starter(deeper).make(start, 0)


def test_tied_weights_are_stored_once_and_read_for_both_places(tmp_path):
    trained = random_network(GPT2, 2)
    write_module_folder(tmp_path / "gpt2", GPT2, trained)
    made = Starter(GPT2).make(Start("prediction", "prediction", str(tmp_path / "gpt2")), 0).network
    assert torch.equal(made.transformer.wte.weight, trained.transformer.wte.weight)
    assert made.lm_head.weight is made.transformer.wte.weight


def test_residual_projections_are_drawn_anew_and_noise_is_seeded(hypernetwork):
    start = Start("logah", "hypernetwork", str(hypernetwork / "llm"))
    plain = Starter(GPT2).make(start, 0).network.state_dict()
    name = "transformer.h.0.mlp.c_proj.weight"
    drawn = Starter(GPT2, StartOptions(reinit_residual=True)).make(start, 0)
    assert drawn.facts["reinit_residual"] == 4
    differing = [key for key, value in drawn.network.state_dict().items() if not torch.equal(value, plain[key])]
    assert len(differing) == 4 and all(key.endswith("c_proj.weight") for key in differing)
    assert float(drawn.network.state_dict()[name].std()) == pytest.approx(0.02 / 2, rel=0.2)
    options = StartOptions(reinit_residual=True, noise=0.1)
    first, again, other = (Starter(GPT2, options).make(start, seed) for seed in (0, 0, 1))
    changed = first.network.state_dict()
    assert not torch.equal(changed["transformer.h.0.attn.c_attn.weight"], plain["transformer.h.0.attn.c_attn.weight"])
    assert all(torch.equal(value, again.network.state_dict()[key]) for key, value in changed.items())
    assert not torch.equal(changed[name], other.network.state_dict()[name])


def test_other_initialisations_start_from_the_same_random_network(tmp_path):
    larger = vit(2, num_layers=2, num_heads=2, hidden_dim=16, image_size=8)
    write_module_folder(tmp_path / "large", larger, random_network(larger, 1))
    random = Starter(VIT).make(Start("random", "random"), 0).network.state_dict()
    mimetic = Starter(VIT).make(Start("mimetic", "mimetic"), 0).network.state_dict()
    assert torch.equal(mimetic["conv_proj.weight"], random["conv_proj.weight"])
    attention = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    assert not torch.equal(mimetic[attention], random[attention])
    cut = Starter(VIT).make(Start("subclone", "subclone", str(tmp_path / "large")), 0).network.state_dict()
    assert not torch.equal(cut["conv_proj.weight"], random["conv_proj.weight"])
