"""The forward pass that is traced."""

import pytest
import torch
from torch import Tensor, nn

from common.errors import ConfigError
from logah.tracing_inputs import made_image_size, run_model, tensors_of


class Net(nn.Module):
    """A classifier that states what it wants as ``facts``."""

    def __init__(self, **facts) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.sizes = []
        for name, value in facts.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape))
        return self.body(x).mean((2, 3))


class Inception3(Net):
    pass


@pytest.mark.parametrize(
    "net, size",
    [
        (Net(), (224, 224)),
        (Net(image_size=32), (32, 32)),
        (Net(expected_input_sz=(40, 24)), (40, 24)),
        (Net(expected_input_sz=64, image_size=32), (64, 64)),
        (Net(pretrained_cfg={"input_size": (3, 96, 96)}), (96, 96)),
        (Inception3(), (299, 299)),
    ],
)
def test_a_network_is_fed_the_size_it_states(net, size):
    assert made_image_size(net) == size
    run_model(net)
    assert net.sizes == [(2, 3, *size)]


def test_a_network_for_grey_images_is_fed_grey_images():
    net = Net(image_size=8, body=nn.Conv2d(1, 2, 3))
    run_model(net)
    assert net.sizes == [(2, 1, 8, 8)]


def test_the_network_and_the_random_state_stay_as_they_were():
    net = Net(image_size=8)
    net.body[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    (output,) = run_model(net)
    assert output.grad_fn is not None
    assert net.training and not net.body[0].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_no_activation_is_kept():
    sizes = []
    hook = torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x)
    with hook:
        (output,) = run_model(Net(image_size=8))
    assert not sizes  # the hook of the trace is the inner one, and keeps nothing
    with pytest.raises(AssertionError, match="never run backwards"):
        output.sum().backward()


def test_all_tensors_of_nested_outputs_are_found_in_order():
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(x) for x in tensors_of({"a": one, "b": (None, [two, "text"]), "c": three})] == [1, 2, 3]


def test_a_failure_names_the_module_and_the_operation():
    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    net = Net(image_size=8)
    net.body.append(Peeks())
    with pytest.raises(ConfigError, match=r"Net cannot be traced: module body\.3 \(Peeks\), operation .*\.item\(\)"):
        run_model(net.to("meta"))


def test_a_network_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="Flatten has no parameters"):
        run_model(nn.Flatten())


def test_a_network_may_bring_its_own_output():
    net = Net(get_var=lambda: (torch.ones(2, requires_grad=True) * 2, None))
    assert len(run_model(net)) == 1
    assert not net.sizes
