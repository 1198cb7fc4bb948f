"""The networks of DeepNets-1M: stacks of cells, each a small graph of operations described by a genotype.

A cell reads the outputs of the two cells before it. Its steps add two operations each, on any earlier states; the cell
gives some of the states, concatenated. A third and two thirds of the way through, cells halve the image. Parameters
carry the names of the public loader, so that stored graphs and published hypernetworks fit.

Source: cells of DARTS (Liu et al., 2018) as extended in Knyazev et al. (2021), appendix on DeepNets-1M.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import DataError

HEADS = 8
PATCH = {32: (3, 11), 224: (16, 14)}  # of transformer stems: image size -> (patch, side of the grid of positions)


class DeepNetwork(nn.Module):
    """One architecture.

    Args:
        genotype: ``{"normal", "normal_concat", "reduce", "reduce_concat"}``; operations are (name, index of their
            input).
        C: channels of the first cells; reductions multiply them by ``C_mult``.
        ks: kernel size of the stem.
        norm: ``bn``, ``bn-track`` (with running statistics) or empty.
        preproc: whether 1x1 convolutions bring both inputs of a cell to its width.
        stem_type: 0: one convolution; 1: three, which shrink the image earlier.
        fc_layers, fc_dim: of the classifier.
        image_size: 32 or 224.

    Raises: DataError for an operation or an option that does not exist.
    """

    def __init__(
        self,
        genotype: Mapping[str, Any],
        *,
        C: int,
        n_cells: int,
        num_classes: int = 10,
        image_size: int = 32,
        ks: int = 3,
        norm: str | None = "bn-track",
        preproc: bool = True,
        stem_pool: bool = False,
        stem_type: int = 0,
        C_mult: int = 2,
        fc_layers: int = 0,
        fc_dim: int = 0,
        glob_avg: bool = True,
    ) -> None:
        super().__init__()
        if image_size not in PATCH or stem_type not in (0, 1):
            raise DataError(f"DeepNets-1M has networks for images of 32 or 224 pixels, not {image_size}.")
        is_large = image_size == 224
        self.image_size = self.expected_input_sz = image_size
        names = [name for name, _ in [*genotype["normal"], *genotype["reduce"]]]
        self.is_transformer = "msa" in names
        self._build_stem(C, ks, norm, stem_type, stem_pool, preproc, is_large)
        before = last = C * 3 if self._stem_is_wide(preproc, stem_type, is_large) else C
        self.cells = nn.ModuleList()
        halved_before = stem_type == 1
        for number in range(n_cells):
            halves = number > 0 and number in (n_cells // 3, 2 * n_cells // 3)
            C *= C_mult if halves else 1
            cell = Cell(
                genotype,
                (before, last),
                C if preproc else last,
                C,
                halves=halves,
                halved_before=halved_before,
                norm=norm,
                preproc=preproc,
                is_transformer=self.is_transformer,
            )
            self.cells.append(cell)
            halved_before, before, last = halves, last, len(cell.concat) * C
        shrunk = stem_type == 1 or stem_pool
        side = (7 if shrunk else 14) if is_large else (4 if shrunk else 8)
        self.global_pooling = nn.AdaptiveAvgPool2d(1) if glob_avg else None
        self.classifier = classifier(last * (1 if glob_avg else side**2), fc_layers, fc_dim, num_classes)

    def _stem_is_wide(self, preproc: bool, stem_type: int, is_large: bool) -> bool:
        return not self.is_transformer and stem_type == 0 and preproc and not is_large

    def _build_stem(
        self, C: int, ks: int, norm: str | None, stem_type: int, pool: bool, preproc: bool, is_large: bool
    ) -> None:
        self.stem_type = stem_type
        if self.is_transformer:
            patch, side = PATCH[self.image_size]
            self.stem0 = nn.Conv2d(3, C, patch, stride=patch, bias=False, padding=int(patch < 4))
            self.pos_enc = PosEnc(C, side)
        elif stem_type == 0:
            width = C * 3 if self._stem_is_wide(preproc, stem_type, is_large) else C
            convolution = nn.Conv2d(3, width, ks, stride=4 if is_large else 1, padding=ks // 2, bias=False)
            shrink = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
            self.stem = nn.Sequential(convolution, build_norm(norm, width), shrink)
        else:
            stride = 2 if is_large else 1
            self.stem0 = nn.Sequential(
                nn.Conv2d(3, C // 2, ks, stride=stride, padding=ks // 2, bias=False),
                build_norm(norm, C // 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(C // 2, C, 3, stride=stride, padding=1, bias=False),
                build_norm(norm, C),
            )
            second = nn.Conv2d(C, C, 3, stride=2, padding=1, bias=False)
            # in place as released: the first cell reads the activated output of stem0
            self.stem1 = nn.Sequential(nn.ReLU(inplace=True), second, build_norm(norm, C))

    def forward(self, images: Tensor) -> Tensor:
        if self.is_transformer:
            before = last = self.pos_enc(self.stem0(images))
        elif self.stem_type == 1:
            before = self.stem0(images)
            last = self.stem1(before)
        else:
            before = last = self.stem(images)
        for cell in self.cells:
            before, last = last, cell(before, last)
        if last is None:
            raise DataError("A network of DeepNets-1M has no operation on the way to its output; leave it out.")
        pooled = last if self.global_pooling is None else self.global_pooling(last)
        return self.classifier(pooled.flatten(1))


class Cell(nn.Module):
    """A small graph of operations.

    Args:
        widths: of the outputs of the last but one and of the last cell.
        outer, inner: channels of the cell's two inputs after preprocessing, and of its states.
    """

    def __init__(
        self,
        genotype: Mapping[str, Any],
        widths: tuple[int, int],
        outer: int,
        inner: int,
        *,
        halves: bool,
        halved_before: bool,
        norm: str | None,
        preproc: bool,
        is_transformer: bool,
    ) -> None:
        super().__init__()
        shrinks = halved_before and not is_transformer
        if preproc:
            first = HalvingConvolution if shrinks else ActivatedConvolution
            self.preprocess0 = first(widths[0], inner, norm=norm)
            self.preprocess1 = ActivatedConvolution(widths[1], inner, norm=norm)
        else:
            self.preprocess0 = Subsample(2) if shrinks else nn.Identity()
            self.preprocess1 = nn.Identity()
        kind = "reduce" if halves else "normal"
        self.concat: list[int] = list(genotype[f"{kind}_concat"])
        self.inputs = [index for _, index in genotype[kind]]
        self._ops = nn.ModuleList()
        for name, index in genotype[kind]:
            stride = 2 if halves and index < 2 and not is_transformer else 1
            self._ops.append(build_operation(name, outer if index <= 1 else inner, inner, stride, norm))
        self.skipped: set[int] = set()  # operations that no node of the graph stands for

    def forward(self, before: Tensor | None, last: Tensor | None) -> Tensor | None:
        """None if nothing reaches the output."""
        states = [
            None if one is None else prepare(one)
            for one, prepare in ((before, self.preprocess0), (last, self.preprocess1))
        ]
        for step in range(0, len(self._ops), 2):
            terms = []
            for number in (step, step + 1):
                operand = states[self.inputs[number]]
                if operand is not None and number not in self.skipped and self._ops[number] is not None:
                    terms.append(self._ops[number](operand))
            states.append(sum(terms[1:], terms[0]) if terms else None)
        chosen = [states[index] for index in self.concat]
        present = next((one for one in chosen if one is not None), None)
        if present is None:
            return None
        return torch.cat([torch.zeros_like(present) if one is None else one for one in chosen], dim=1)


def skip_unlisted(network: DeepNetwork, names: Iterable[str]) -> None:
    """Leaves out the operations with parameters of which none is among ``names``, as the public loader does.

    Stored graphs hold only what reaches the output; everything else must not run on initial values.
    """
    names = set(names)
    for number, cell in enumerate(network.cells):
        for index, operation in enumerate(cell._ops):
            prefix = f"cells.{number}._ops.{index}."
            has_parameters = operation is not None and any(True for _ in operation.parameters())
            if has_parameters and not any(name.startswith(prefix) for name in names):
                cell.skipped.add(index)


# ------------------------------------------------------------------------------------------------------- operations


def build_operation(name: str, width: int, out: int, stride: int, norm: str | None) -> nn.Module | None:
    """The operation that a genotype calls ``name``; None for ``none``.

    Raises: DataError for an unknown name.
    """
    kind, kernel, factored = parse_operation(name)
    if kind == "none":
        return None
    if kind == "skip_connect":
        return nn.Identity() if stride == 1 else HalvingConvolution(width, out, norm=norm)
    if kind == "avg_pool":
        return nn.AvgPool2d(kernel, stride=stride, padding=kernel // 2, count_include_pad=False)
    if kind == "max_pool":
        return nn.MaxPool2d(kernel, stride=stride, padding=kernel // 2)
    if kind == "conv":
        return ActivatedConvolution(width, out, kernel, stride, norm=norm, factored=factored)
    if kind in ("sep_conv", "dil_conv"):
        return DepthwiseConvolution(width, out, kernel, stride, norm=norm, dilated=kind == "dil_conv")
    if kind == "msa":
        return TransformerBlock(width, out, stride)
    if kind == "cse":
        return ChannelGate(width, stride)
    raise DataError(f"DeepNets-1M: a genotype names the operation {name!r}, which does not exist.")


def parse_operation(name: str) -> tuple[str, int, bool]:
    """``conv_7x1_1x7`` -> (``conv``, 7, True): kind, kernel size, whether it is made of a row and a column."""
    sizes = re.findall(r"_(\d+)x(\d+)", name)
    kernel = max((int(size) for pair in sizes for size in pair), default=0)
    return re.sub(r"_\d+x\d+", "", name), kernel, len(sizes) > 1


def build_norm(norm: str | None, width: int) -> nn.Module:
    """``bn``, ``bn-track`` or nothing."""
    if norm in (None, "", "none"):
        return nn.Identity()
    if not norm.startswith("bn"):
        raise DataError(f"DeepNets-1M: norm={norm!r} does not exist; it has bn, bn-track and none.")
    return nn.BatchNorm2d(width, track_running_stats="track" in norm)


def classifier(width: int, layers: int, units: int, num_classes: int) -> nn.Sequential:
    """``layers`` linear maps (at least one) with ReLU and dropout between them."""
    sizes = [width, *[units] * max(layers - 1, 0), num_classes]
    parts: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for inputs, outputs in zip(sizes[1:-1], sizes[2:], strict=True):
        parts += [nn.ReLU(), nn.Dropout(0.5), nn.Linear(inputs, outputs)]
    return nn.Sequential(*parts)


class ActivatedConvolution(nn.Module):
    """ReLU, convolution (or a row and a column), norm."""

    def __init__(
        self, width: int, out: int, kernel: int = 1, stride: int = 1, *, norm: str | None, factored: bool = False
    ) -> None:
        super().__init__()
        pad = kernel // 2
        if factored:
            row = nn.Conv2d(width, width, (1, kernel), stride=(1, stride), padding=(0, pad), bias=False)
            column = nn.Conv2d(width, out, (kernel, 1), stride=(stride, 1), padding=(pad, 0), bias=False)
            convolutions: Sequence[nn.Module] = (row, column)
        else:
            convolutions = (nn.Conv2d(width, out, kernel, stride=stride, padding=pad, bias=False),)
        self.op = nn.Sequential(nn.ReLU(), *convolutions, build_norm(norm, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class DepthwiseConvolution(nn.Module):
    """A dilated depthwise convolution and a 1x1 one, or twice an undilated pair."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, *, norm: str | None, dilated: bool) -> None:
        super().__init__()

        def pair(stride: int, out: int) -> list[nn.Module]:
            pad, dilation = (kernel - kernel % 2, 2) if dilated else (kernel // 2, 1)
            depthwise = nn.Conv2d(
                width, width, kernel, stride=stride, padding=pad, dilation=dilation, groups=width, bias=False
            )
            return [nn.ReLU(), depthwise, nn.Conv2d(width, out, 1, bias=False), build_norm(norm, out)]

        self.op = nn.Sequential(*(pair(stride, out) if dilated else pair(stride, width) + pair(1, out)))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class HalvingConvolution(nn.Module):
    """ReLU, then two 1x1 convolutions of stride 2, on the image and on the image moved by a pixel; norm."""

    def __init__(self, width: int, out: int, *, norm: str | None) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(width, out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(width, out // 2, 1, stride=2, bias=False)
        self.bn = build_norm(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


class Subsample(nn.Module):
    """Every ``stride``-th pixel."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


class ChannelGate(nn.Module):
    """Squeeze and excitation with half the channels inside and a hard swish."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width // 2), nn.Linear(width // 2, width)
        self.thin = Subsample(stride)

    def forward(self, x: Tensor) -> Tensor:
        gates = F.hardswish(self.fc2(F.relu(self.fc1(x.flatten(2).mean(dim=2)))))
        return self.thin(x * gates[:, :, None, None])


class PosEnc(nn.Module):
    """A learned image that is added to the first features."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width, side, side))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class MLP(nn.Module):
    """Two linear maps with a GELU between; the positions of ``net`` follow the published names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Attention over pixels and an MLP, both residual; the softmax is spelt out, so that the graph shows it."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        inner = width // HEADS * HEADS
        self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, out))
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(out)
        self.ff = MLP(width, out)
        self.thin = Subsample(stride)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        pixels = x.flatten(2).transpose(1, 2)
        split = (batch, height * breadth, 3, HEADS, -1)
        q, k, v = self.to_qkv(self.ln1(pixels)).view(split).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        pixels = pixels + self.to_out((weights @ v).transpose(1, 2).flatten(2))
        pixels = pixels + self.ff(self.ln2(pixels))
        return self.thin(pixels.transpose(1, 2).reshape(batch, width, height, breadth))
