"""The compiled encoder."""

import torch

from logah.compilation import compile_encoder
from tests.logah.tiny_hypernetwork import tiny_hypernetwork


@torch.no_grad()
def test_a_compiled_encoder_gives_the_same_features_under_the_same_names():
    model = tiny_hypernetwork(layers=1)
    names = list(model.state_dict())
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    distance = (torch.arange(6)[None] - torch.arange(6)[:, None]).clamp(min=0).expand(2, 6, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    expected = model.gnn(x, distance, mask)
    compile_encoder(model, backend="eager")
    assert list(model.state_dict()) == names
    assert torch.allclose(model.gnn(x, distance, mask), expected, atol=1e-6)
