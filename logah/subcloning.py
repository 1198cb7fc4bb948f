"""A small network cut out of a larger trained one of the same family.

Widths shrink by keeping the units that carry the most weight: channels of the residual stream (the same ones in every
layer), units of each MLP, heads and the channels inside them. Depth shrinks by leaving out layers in the middle.

Source: Samragh et al., Weight subcloning (2023). Units are ranked there by activations on data; here by the weights
that read and write them, so that no data are needed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.errors import ConfigError

LAYER = re.compile(r"(?<=\.)(?:encoder_layer_)?(\d+)(?=\.)")
ROLES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "vit": (
        (r"class_token|encoder\.pos_embedding", ("", "", "residual")),
        (r"conv_proj\.weight", ("residual", "", "", "")),
        (r"self_attention\.in_proj_weight", ("qkv", "residual")),
        (r"self_attention\.in_proj_bias", ("qkv",)),
        (r"self_attention\.out_proj\.weight", ("residual", "value")),
        (r"mlp\.0\.weight", ("mlp", "residual")),
        (r"mlp\.0\.bias", ("mlp",)),
        (r"mlp\.3\.weight", ("residual", "mlp")),
        (r"heads\.head\.weight", ("", "residual")),
        (r"heads\.head\.bias", ("",)),
        (r".*(conv_proj|out_proj|mlp\.3|ln_1|ln_2|ln)\.(weight|bias)", ("residual",)),
    ),
    "gpt2": (
        (r"transformer\.wte\.weight|transformer\.wpe\.weight|lm_head\.weight", ("", "residual")),
        (r"attn\.c_attn\.weight", ("residual", "qkv")),
        (r"attn\.c_attn\.bias", ("qkv",)),
        (r"attn\.c_proj\.weight", ("value", "residual")),
        (r"mlp\.c_fc\.weight", ("residual", "mlp")),
        (r"mlp\.c_fc\.bias", ("mlp",)),
        (r"mlp\.c_proj\.weight", ("mlp", "residual")),
        (r".*(c_proj|ln_1|ln_2|ln_f)\.(weight|bias)", ("residual",)),
    ),
    "llama": (
        (r"model\.embed_tokens\.weight|lm_head\.weight", ("", "residual")),
        (r"self_attn\.q_proj\.weight", ("query", "residual")),
        (r"self_attn\.k_proj\.weight", ("key", "residual")),
        (r"self_attn\.v_proj\.weight", ("shared_value", "residual")),
        (r"self_attn\.o_proj\.weight", ("residual", "value")),
        (r"mlp\.(gate|up)_proj\.weight", ("mlp", "residual")),
        (r"mlp\.down_proj\.weight", ("residual", "mlp")),
        (r".*norm\.weight", ("residual",)),
    ),
}
"""What the dimensions of a family's parameters mean, by the end of a name; the first that fits counts."""

INPUTS = {"vit": 1, "gpt2": 0, "llama": 1}  # dimension of a matrix that holds its inputs


@dataclass(frozen=True)
class Sizes:
    """Of one network; heads of keys and values may be fewer."""

    residual: int
    mlp: int
    heads: int
    shared_heads: int
    head_width: int
    layers: int


@dataclass
class Kept:
    """Indices of the larger network that survive, by role; those of layers by (role, layer)."""

    residual: Tensor
    of_layer: dict[tuple[str, int], Tensor] = field(default_factory=dict)


@torch.no_grad()
def subclone(model: nn.Module, source: nn.Module, *, rescale: bool = True) -> dict[str, object]:
    """Fills ``model`` with a part of ``source``, in place.

    Args:
        model, source: ViTs of torchvision, GPT-2s or Llamas; ``source`` at least as large in every width.
        rescale: matrices grow by sqrt(old / new inputs), which keeps the size of what they compute.

    Returns: the layers taken, and names of parameters that keep their values (a head for other classes, a table for
    another number of positions).

    Raises: ConfigError for another family, or a source that is too small.
    """
    family = _family(model)
    if _family(source) != family:
        raise ConfigError(
            f"inits: subclone needs networks of one family; the target is a {type(model).__name__}, the source a "
            f"{type(source).__name__}."
        )
    small, large = _sizes(model, family), _sizes(source, family)
    for name in ("residual", "mlp", "heads", "shared_heads", "head_width"):
        if getattr(small, name) > getattr(large, name):
            raise ConfigError(
                f"inits: subclone takes a part of its source, whose {name.replace('_', ' ')} is {getattr(large, name)}"
                f"; the target's is {getattr(small, name)}. Use a source that is at least as large."
            )
    if small.heads // small.shared_heads > large.heads // large.shared_heads:
        raise ConfigError(
            f"inits: subclone cannot give {small.heads // small.shared_heads} heads to each pair of keys and values "
            f"from a source with {large.heads // large.shared_heads}; use a target with as many or fewer."
        )
    weights = {name: parameter.detach().float() for name, parameter in source.named_parameters()}
    layers = layers_to_take(small.layers, large.layers)
    kept = Kept(_ranked(_importance(weights, family, "residual", None), small.residual))
    for layer in set(layers):
        _choose(kept, weights, family, layer, small, large)
    left = []
    for name, parameter in model.named_parameters():
        number = _layer(name)
        origin = name if number is None else _renumbered(name, layers[number])
        value = weights.get(origin)
        roles = _roles(family, name)
        cut = None if value is None else _cut(value, roles, kept, _layer(origin))
        if cut is None or cut.shape != parameter.shape:
            left.append(name)
            continue
        inputs = INPUTS[family]
        if rescale and cut.dim() == 2 and roles[inputs]:
            cut = cut * (value.shape[inputs] / cut.shape[inputs]) ** 0.5
        parameter.copy_(cut)
    return {"layers": layers, "kept_random": left}


def layers_to_take(wanted: int, available: int) -> list[int]:
    """The first and the last layers, which change the residual stream most; middle ones twice if there are too few."""
    if wanted <= available:
        front = (wanted + 1) // 2
        return list(range(front)) + list(range(available - (wanted - front), available))
    middle = available // 2
    return list(range(middle)) + [middle] * (wanted - available) + list(range(middle, available))


def _family(model: nn.Module) -> str:
    names = {name for name, _ in model.named_parameters()}
    for family, mark in (
        ("vit", "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),
        ("llama", "model.layers.0.self_attn.q_proj.weight"),
    ):
        if mark in names:
            return family
    raise ConfigError(f"inits: subclone knows ViTs of torchvision, GPT-2 and Llama, not {type(model).__name__}.")


def _sizes(model: nn.Module, family: str) -> Sizes:
    layers = 1 + max(number for name, _ in model.named_parameters() if (number := _layer(name)) is not None)
    if family == "vit":
        block = model.encoder.layers[0]
        heads, d = block.self_attention.num_heads, model.hidden_dim
        return Sizes(d, block.mlp[0].out_features, heads, heads, d // heads, layers)
    config = model.config
    if family == "gpt2":
        heads, d = config.n_head, config.n_embd
        return Sizes(d, model.transformer.h[0].mlp.c_fc.weight.shape[1], heads, heads, d // heads, layers)
    attention = model.model.layers[0].self_attn
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    return Sizes(config.hidden_size, config.intermediate_size, heads, shared, attention.head_dim, layers)


def _layer(name: str) -> int | None:
    # layers have a number between two dots; the numbers of an MLP's maps come after theirs
    found = LAYER.search(name)
    return None if found is None else int(found[1])


def _renumbered(name: str, layer: int) -> str:
    return LAYER.sub(lambda found: found[0].replace(found[1], str(layer)), name, count=1)


def _roles(family: str, name: str) -> tuple[str, ...]:
    for pattern, roles in ROLES[family]:
        if re.search(rf"(?:^|\.)(?:{pattern})$", name):
            return roles
    return ()


def _importance(weights: Mapping[str, Tensor], family: str, role: str, layer: int | None) -> Tensor:
    """Sum over matrices of the mean absolute weight at every unit of a role, of one layer or of all."""
    total = torch.zeros(())
    for name, value in weights.items():
        if layer is not None and _layer(name) != layer:
            continue
        for dimension, one in enumerate(_roles(family, name)):
            if one == role and value.dim() > 1:
                others = [axis for axis in range(value.dim()) if axis != dimension]
                total = total + value.abs().mean(dim=others)
    return total


def _ranked(importance_n: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` most important units, in their own order."""
    return importance_n.argsort(descending=True, stable=True)[:count].sort().values


def _choose(kept: Kept, weights: Mapping[str, Tensor], family: str, layer: int, small: Sizes, large: Sizes) -> None:
    """Units of one layer that survive: of its MLP, its heads, and the channels of heads."""
    kept.of_layer["mlp", layer] = _ranked(_importance(weights, family, "mlp", layer), small.mlp)
    width, shared = large.head_width, large.heads // large.shared_heads
    value_GSk = _importance(weights, family, "value", layer).view(large.shared_heads, shared, width)
    groups = _ranked(value_GSk.mean(dim=(1, 2)), small.shared_heads)
    numbers = torch.arange(small.heads // small.shared_heads)
    heads = (groups[:, None] * shared + numbers).flatten()
    inside = _ranked(value_GSk.sum(dim=(0, 1)), small.head_width)
    paired = inside
    if family == "llama":  # rotations pair channel i with i + k/2
        half = torch.linspace(0, width // 2 - 1, small.head_width // 2).round().long()
        paired = torch.cat([half, half + width // 2])
    for role, chosen, channels in (
        ("query", heads, paired), ("key", groups, paired), ("value", heads, inside), ("shared_value", groups, inside),
    ):  # fmt: skip
        kept.of_layer[role, layer] = (chosen[:, None] * width + channels).flatten()
    total = large.heads * width
    kept.of_layer["qkv", layer] = torch.cat(
        [kept.of_layer[role, layer] + part * total for part, role in enumerate(("query", "key", "value"))]
    )


def _cut(value: Tensor, roles: tuple[str, ...], kept: Kept, layer: int | None) -> Tensor | None:
    if len(roles) != value.dim():
        return None
    for dimension, role in enumerate(roles):
        if role:
            index = kept.residual if role == "residual" else kept.of_layer[role, layer]
            value = value.index_select(dimension, index.to(value.device))
    return value
