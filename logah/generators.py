"""Laws of random architectures: the small networks that a hypernetwork is trained on.

A network of few layers is drawn wide and one of many layers narrow, so that all are small. The laws of the published
sets draw from numpy's legacy generator in a fixed order, so that a seed gives the published networks.

Source: LoGAH (arXiv 2405.16287), ViTs-1K and GPTs-1K; the Llama sets follow its released code.
"""

from collections.abc import Callable, Sequence
from typing import Any

from numpy.random import RandomState

from common.errors import ConfigError
from logah.architecture_options import GPT2_VOCABULARY, LLAMA_VOCABULARY
from logah.architectures import Architecture, gpt2, llama, vit

FEWEST_LAYERS, MOST_LAYERS = 3, 9
MOST_PARAMETERS = 50_000_000  # of a network of the Llama set; wider ones are drawn again
MOST_ATTEMPTS = 10_000
PATCH_SIZES = {32: (2, 4), 224: (16, 32)}
"""Of the ViTs for small images and for ImageNet's."""


def draw_vit(
    rng: RandomState,
    *,
    image_size: int = 32,
    num_classes: int = 10,
    patch_sizes: Sequence[int] | None = None,
    **more: Any,
) -> Architecture:
    """A network of ViTs-1K: 3 to 9 layers, widths 128 to 512, patches of 2 or 4 pixels (16 or 32 on 224 x 224).

    Args:
        patch_sizes: None: those of the published law for ``image_size``.
        more: further options of ``architectures.vit``.
    """
    num_layers = _depth(rng)
    low, high = _by_depth(num_layers, deep=(128, 256), middle=(256, 384), shallow=(384, 512))
    width = int(rng.choice(range(low, high + 1, 32)))
    heads = int(rng.choice((3, 6, 12) if width % 12 == 0 else (4, 8)))
    patch_size = int(rng.choice(patch_sizes or PATCH_SIZES.get(image_size, PATCH_SIZES[32])))
    return vit(patch_size, num_layers, heads, width, num_classes=num_classes, image_size=image_size, **more)


def draw_gpt2(
    rng: RandomState, *, vocab_size: int = GPT2_VOCABULARY, n_positions: int = 1024, **more: Any
) -> Architecture:
    """A network of GPTs-1K: 3 to 9 layers, widths 72 to 256, 8 heads, a head of its own."""
    num_layers = _depth(rng)
    low, high = _by_depth(num_layers, deep=(72, 176), middle=(128, 176), shallow=(176, 256))
    width = int(rng.choice(range(low, high + 1, 8)))
    return gpt2(width, num_layers, 8, vocab_size=vocab_size, n_positions=n_positions, **more)


def draw_llama(rng: RandomState, *, vocab_size: int = LLAMA_VOCABULARY, **more: Any) -> Architecture:
    """A network of the Llama set: 3 to 9 layers, widths 64 to 186, at most 50 M parameters with Llama 3's vocabulary.

    The limit always counts the published vocabulary, so that a smaller one does not change which networks are drawn.
    """
    for _ in range(MOST_ATTEMPTS):
        num_layers = _depth(rng)
        low, high, heads = _by_depth(num_layers, deep=(16, 32, 4), middle=(16, 32, 6), shallow=(8, 16, 8))
        width = int(rng.choice(range(low, high + 1, 2))) * heads
        if _llama_parameters(width, num_layers) <= MOST_PARAMETERS:
            return llama(width, num_layers, heads, vocab_size=vocab_size, **more)
    raise AssertionError("no Llama network below the limit was drawn")


def draw_trainer_llama(rng: RandomState, *, vocab_size: int = LLAMA_VOCABULARY, **more: Any) -> Architecture:
    """What the released trainer of Llama networks draws at every step: wider, with shared keys and values.

    Ours leaves out counts of key heads that do not divide the heads, with which a network cannot be built.
    """
    num_layers = _depth(rng)
    if num_layers > 7:
        heads, sizes = (4, 8, 10), range(8, 33, 8)
    elif num_layers > 5:
        heads, sizes = (6, 8), range(16, 65, 8)
    else:
        heads, sizes = (4, 8, 10), range(16, 65, 8)
    num_heads, head_size = int(rng.choice(heads)), int(rng.choice(sizes))
    ratio = float(rng.choice((3.5, 4.0)))
    shared = [count for count in (1, 2, num_heads // 2, num_heads) if num_heads % count == 0]
    width = num_heads * head_size
    return llama(
        width, num_layers, num_heads, int(rng.choice(shared)), int(ratio * width), vocab_size=vocab_size, **more
    )


def draw_from_grid(
    rng: RandomState,
    family: str,
    *,
    depths: Sequence[int],
    widths: Sequence[int],
    heads: Sequence[int],
    mlp_ratios: Sequence[float] = (4.0,),
    patch_sizes: Sequence[int] = (2,),
    **more: Any,
) -> Architecture:
    """Depth, width, heads, ratio and patch size drawn uniformly and independently, heads from those that divide.

    Args:
        family: ``vit``, ``gpt2`` or ``llama``.
        more: what all networks share: classes and pixels, or vocabulary and positions.

    Raises: ConfigError for an empty list, or a width that no number of heads divides.
    """
    lists = {"depths": depths, "widths": widths, "heads": heads, "mlp_ratios": mlp_ratios, "patch_sizes": patch_sizes}
    for name, values in lists.items():
        if not values:
            raise ConfigError(f"nets.{name} is empty; list at least one value to draw from.")
    depth, width = int(rng.choice(depths)), int(rng.choice(widths))
    fitting = [count for count in heads if width % count == 0]
    if not fitting:
        raise ConfigError(f"nets.heads={list(heads)}: none divides the width {width} of nets.widths={list(widths)}.")
    num_heads, ratio = int(rng.choice(fitting)), float(rng.choice(mlp_ratios))
    if family == "vit":
        return vit(int(rng.choice(patch_sizes)), depth, num_heads, width, int(ratio * width), **more)
    if family == "gpt2":
        return gpt2(width, depth, num_heads, **({} if ratio == 4 else {"n_inner": int(ratio * width)}), **more)
    if family == "llama":
        return llama(width, depth, num_heads, intermediate_size=int(ratio * width), **more)
    raise ConfigError(f"nets.family={family!r} is not known; choose one of vit, gpt2, llama.")


Law = Callable[..., Architecture]
LAWS: dict[str, Law] = {
    "vits1k": draw_vit,
    "gpts1k": draw_gpt2,
    "llama1k": draw_llama,
    "llama_trainer": draw_trainer_llama,
}
"""The published laws by the name of their set."""

FAMILY_OF_LAW = {"vits1k": "vit", "gpts1k": "gpt2", "llama1k": "llama", "llama_trainer": "llama"}


def _depth(rng: RandomState) -> int:
    return int(rng.randint(FEWEST_LAYERS, MOST_LAYERS + 1))


def _by_depth(num_layers: int, *, deep: tuple, middle: tuple, shallow: tuple) -> tuple:
    if num_layers > 5:
        return deep
    return middle if num_layers > 3 else shallow


def _llama_parameters(width: int, num_layers: int) -> int:
    """Parameters of an untied Llama with the published vocabulary, a four times wider MLP and a key per head."""
    return 2 * LLAMA_VOCABULARY * width + num_layers * (16 * width**2 + 2 * width) + width
