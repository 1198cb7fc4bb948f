"""Our networks and those of diffusers: DiT, PixArt-alpha and SD3, in both directions, as modules or folders.

A multiplier of the readout goes into its weight on the way out, so that a muP model becomes an ordinary one (3.7 of the
specification); what comes in has the standard parametrisation. Names differ, and diffusers keeps q, k and v apart.

One difference remains that no weight can undo: diffusers' DiT (not its PixArt or SD3) spaces the frequencies of the
time embedding by ``half - 1`` instead of ``half``, for the weights of the original DiT too. Its outputs are ours only
after ``match_frequencies``, which sets the original's spacing in a module.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError, ConfigError
from mup_dit.building import ModelConfig, Network, build_skeleton
from mup_dit.dit import DiT, DiTConfig
from mup_dit.mmdit import MMDiT, MMDiTConfig
from mup_dit.pixart import PixArt, PixArtConfig

State = dict[str, Tensor]
CLASSES = {"DiTTransformer2DModel": "dit", "PixArtTransformer2DModel": "pixart", "SD3Transformer2DModel": "mmdit"}
EXACT_EPS = 1e-6  # of the layer norms; diffusers' default for DiT is 1e-5

_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "adaLN_modulation.1": "norm1.linear",
}
_FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
_DIT_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_DIT_EMBEDDERS = {  # diffusers repeats these in every block
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_PIXART_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_PIXART_TABLE = ("final_layer.scale_shift_table", "scale_shift_table")
_READOUT = {DiT: "final_layer.linear", PixArt: "final_layer.linear", MMDiT: "proj_out"}


# ---------------------------------------------------------------- ours to diffusers


def to_diffusers(model: Network) -> nn.Module:
    """The same function as a model of diffusers, with copies of the weights, in eval mode.

    Raises: ConfigError for options that diffusers' model does not have.
    """
    return {DiT: dit_to_diffusers, PixArt: pixart_to_diffusers, MMDiT: mmdit_to_diffusers}[type(model)](model)


def dit_to_diffusers(model: DiT) -> nn.Module:
    """``diffusers.DiTTransformer2DModel``; its time embedding needs ``match_frequencies`` to be exactly ours."""
    from diffusers import DiTTransformer2DModel

    config = model.config
    _require_plain(config)
    theirs = DiTTransformer2DModel(
        **_shared_options(config), num_embeds_ada_norm=config.num_classes, norm_eps=EXACT_EPS
    )  # fmt: skip
    state = _plain_state(model)
    state.pop("pos_embed")
    if config.class_dropout_prob == 0:  # diffusers always has a row for the null class; nothing will use it
        table = "y_embedder.embedding_table.weight"
        state[table] = torch.cat([state[table], torch.zeros_like(state[table][:1])])
    return _filled(theirs, dict(_dit_keys(state, config.depth)))


def pixart_to_diffusers(model: PixArt) -> nn.Module:
    """``diffusers.PixArtTransformer2DModel``. The null caption is no part of it: its pipeline encodes an empty text."""
    from diffusers import PixArtTransformer2DModel

    config = model.config
    _require_plain(config)
    theirs = PixArtTransformer2DModel(
        **_shared_options(config),
        caption_channels=config.caption_channels,
        cross_attention_dim=config.hidden_size,
        use_additional_conditions=config.micro_conditions,
        interpolation_scale=config.lewei_scale,
    )
    state = _plain_state(model)
    for name in ("pos_embed", "y_embedder.y_embedding"):
        state.pop(name)
    return _filled(theirs, dict(_pixart_keys(state)))


def mmdit_to_diffusers(model: MMDiT) -> nn.Module:
    """``diffusers.SD3Transformer2DModel``; it takes ``1000 t`` for t, and a mask is not known to it.

    The REPA head, which serves training only, is left out.
    """
    from diffusers import SD3Transformer2DModel

    config = model.config
    if not config.drop_last_text:
        raise ConfigError("model.drop_last_text=false has no counterpart in diffusers' SD3 transformer.")
    _require_ratio(config.mlp_ratio)
    theirs = SD3Transformer2DModel(
        sample_size=config.input_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_size,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.caption_channels,
        caption_projection_dim=config.hidden_size,
        pooled_projection_dim=config.pooled_channels,
        out_channels=config.out_channels,
        pos_embed_max_size=config.grid,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    state = {name: value for name, value in _plain_state(model).items() if not name.startswith("repa.")}
    return _filled(theirs, state)


def match_frequencies(theirs: nn.Module) -> nn.Module:
    """Gives diffusers' DiT the original's spacing of frequencies, in place."""
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs


def _shared_options(config: DiTConfig | PixArtConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
    }


def _require_plain(config: DiTConfig | PixArtConfig) -> None:
    if config.qk_norm:
        raise ConfigError("model.qk_norm=true has no counterpart in diffusers' DiT and PixArt transformers.")
    _require_ratio(config.mlp_ratio)


def _require_ratio(ratio: float) -> None:
    if ratio != 4.0:
        raise ConfigError(f"model.mlp_ratio={ratio} has no counterpart in diffusers, whose MLPs are 4 times as wide.")


def _plain_state(model: Network) -> State:
    """Copies of all tensors, with the readout's multiplier and the attention's scale folded in."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    readout = model.get_submodule(_READOUT[type(model)])
    state[f"{_READOUT[type(model)]}.weight"] *= readout.mult
    # every softmax there is scaled by 1/sqrt(head size)
    factor = model.config.scale * math.sqrt(model.config.head_size)
    if not math.isclose(factor, 1.0, rel_tol=1e-9):
        for name in state:
            _scale_queries(name, state[name], factor, model.config)
    return state


def _scale_queries(name: str, value: Tensor, factor: float, config: Any) -> None:
    path = name.rpartition(".")[0]
    if path.endswith("attn.qkv"):
        value[: config.hidden_size] *= factor
    elif path.endswith("cross_attn.q_linear") or (
        path.endswith(("norm_q", "norm_added_q")) if config.qk_norm else path.endswith(("attn.to_q", "attn.add_q_proj"))
    ):
        value *= factor


def _filled(theirs: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    own = theirs.state_dict()
    theirs.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()}, strict=True)
    return theirs.eval()


def _split_name(name: str) -> tuple[str, str, str]:
    """``blocks.3.attn.qkv.weight`` -> (``3``, ``attn.qkv``, ``weight``); the first is empty outside of blocks."""
    path, _, leaf = name.rpartition(".")
    if not name.startswith("blocks."):
        return "", path, leaf
    _, index, inner = (path.split(".", 2) + [""])[:3]
    return index, inner, leaf


def _block_keys(index: str, inner: str, leaf: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    prefix = f"transformer_blocks.{index}"
    if inner in _FUSED:
        parts = _FUSED[inner]
        for part, chunk in zip(parts, value.chunk(len(parts)), strict=True):
            yield f"{prefix}.{part}.{leaf}", chunk
    elif not inner:  # a table of the block itself
        yield f"{prefix}.{leaf}", value
    else:
        yield f"{prefix}.{_BLOCK[inner]}.{leaf}", value


def _dit_keys(state: State, depth: int) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        index, path, leaf = _split_name(name)
        if index:
            yield from _block_keys(index, path, leaf, value)
        elif path in _DIT_EMBEDDERS:
            for block in range(depth):
                yield f"transformer_blocks.{block}.{_DIT_EMBEDDERS[path]}.{leaf}", value
        else:
            yield f"{_DIT_OUTER[path]}.{leaf}", value


def _pixart_keys(state: State) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        index, path, leaf = _split_name(name)
        if index:
            yield from _block_keys(index, path, leaf, value)
        elif name == _PIXART_TABLE[0]:
            yield _PIXART_TABLE[1], value
        else:
            yield f"{_PIXART_OUTER[path]}.{leaf}", value


# ---------------------------------------------------------------- diffusers to ours


def from_diffusers(theirs: nn.Module, null_TY: Tensor | None = None) -> tuple[Network, ModelConfig]:
    """Our network with copies of the weights, and its configuration (standard parametrisation), in eval mode.

    Args:
        null_TY: PixArt's null caption, which diffusers' model has not; one row per token of a caption. None: zeros.

    Raises: CheckpointError for a model or a variant that we do not have.
    """
    family = CLASSES.get(type(theirs).__name__)
    if family is None:
        raise CheckpointError(f"{type(theirs).__name__} is none of {', '.join(CLASSES)}.")
    config = _CONFIGS[family](theirs)
    if family == "pixart" and null_TY is not None:
        config = replace(config, network=replace(config.network, model_max_length=len(null_TY)))
    state = {name: value.detach().clone() for name, value in theirs.state_dict().items()}
    model = build_skeleton(config).to_empty(device="cpu")
    model.reset_tables(torch.Generator().manual_seed(0))
    own = model.state_dict()
    found = {name: value.to(own[name].dtype) for name, value in _FROM[family](state, config, own)}
    if family == "pixart":
        null = "y_embedder.y_embedding"
        found[null] = torch.zeros_like(own[null]) if null_TY is None else null_TY.to(own[null].dtype)
    if family != "mmdit":
        found["pos_embed"] = own["pos_embed"]  # computed
    model.load_state_dict(found, strict=True)
    return model.eval(), config


def dit_from_diffusers(theirs: nn.Module) -> DiT:
    """Our DiT of a ``diffusers.DiTTransformer2DModel``."""
    return from_diffusers(theirs)[0]


def _unfused(state: State, own: State, keys: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Runs the map ours -> theirs over empty tensors of our shapes, and reads it backwards."""
    wanted: dict[str, list[str]] = {}
    marks = {id(value): name for name, value in own.items()}
    for theirs, value in keys:
        source = marks.get(id(value if value._base is None else value._base))
        wanted.setdefault(source, []).append(theirs)
    for name, sources in wanted.items():
        parts = [state[source] for source in sources]
        yield name, torch.cat(parts) if len(parts) > 1 and "emb." not in sources[0] else parts[0]


def _from_dit(state: State, config: ModelConfig, own: State) -> Iterator[tuple[str, Tensor]]:
    own = {name: torch.empty_like(value, device="meta") for name, value in own.items() if name != "pos_embed"}
    return _unfused(state, own, _dit_keys(own, config.network.depth))


def _from_pixart(state: State, config: ModelConfig, own: State) -> Iterator[tuple[str, Tensor]]:
    computed = ("pos_embed", "y_embedder.y_embedding")
    own = {name: torch.empty_like(value, device="meta") for name, value in own.items() if name not in computed}
    return _unfused(state, own, _pixart_keys(own))


def _from_mmdit(state: State, config: ModelConfig, own: State) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if name == "pos_embed.pos_embed":  # a table for the largest image, of which the middle is used
            side, grid = math.isqrt(value.shape[1]), config.network.grid
            first = (side - grid) // 2
            square = value.reshape(side, side, -1)[first : first + grid, first : first + grid]
            value = square.reshape(1, grid * grid, -1)
        yield name, value


_FROM = {"dit": _from_dit, "pixart": _from_pixart, "mmdit": _from_mmdit}


def _network_options(theirs: nn.Module) -> dict[str, Any]:
    config = theirs.config
    return {
        "depth": config.num_layers,
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "num_heads": config.num_attention_heads,
        "patch_size": config.patch_size,
        "input_size": config.sample_size,
        "in_channels": config.in_channels,
    }


def _learns_sigma(config: Any) -> bool:
    out = config.out_channels or config.in_channels
    if out not in (config.in_channels, 2 * config.in_channels):
        raise CheckpointError(f"out_channels={out} is neither once nor twice in_channels={config.in_channels}.")
    return out == 2 * config.in_channels


def _dit_config(theirs: nn.Module) -> ModelConfig:
    network = DiTConfig(
        **_network_options(theirs),
        num_classes=theirs.config.num_embeds_ada_norm,
        learn_sigma=_learns_sigma(theirs.config),
    )
    return ModelConfig(family="dit", parametrization="sp", network=network)


def _pixart_config(theirs: nn.Module) -> ModelConfig:
    config = theirs.config
    micro = config.use_additional_conditions
    if micro is None:  # the library's own default
        micro = config.sample_size == 128
    network = PixArtConfig(
        **_network_options(theirs),
        caption_channels=config.caption_channels,
        learn_sigma=_learns_sigma(config),
        micro_conditions=bool(micro),
        lewei_scale=float(config.interpolation_scale or max(config.sample_size // 64, 1)),
        model_max_length=300 if "sigma" in str(getattr(config, "_name_or_path", "")).lower() else 120,
    )
    return ModelConfig(family="pixart", parametrization="sp", network=network)


def _mmdit_config(theirs: nn.Module) -> ModelConfig:
    config = theirs.config
    if config.dual_attention_layers:
        raise CheckpointError("dual_attention_layers (SD3.5 medium) has no counterpart in our MMDiT.")
    network = MMDiTConfig(
        **_network_options(theirs),
        caption_channels=config.joint_attention_dim,
        pooled_channels=config.pooled_projection_dim,
        qk_norm=config.qk_norm is not None,
        drop_last_text=True,
    )
    return ModelConfig(family="mmdit", parametrization="sp", network=network)


_CONFIGS = {"dit": _dit_config, "pixart": _pixart_config, "mmdit": _mmdit_config}
