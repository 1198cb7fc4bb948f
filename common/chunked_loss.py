"""Linear head and cross-entropy in one step, without a tensor of positions x vocabulary.

The head's logits are made, used and dropped chunk by chunk, so peak memory is bounded by ``CHUNK_BYTES`` whatever the
batch, the length and the vocabulary. Two forms, both equal to the dense loss and its gradients:

* ``chunked_nll``: NLL per position, for any later reduction; backward makes each chunk's logits a second time.
* ``chunked_weighted_nll``: weighted sum of NLLs with weights known beforehand; the gradients of head and input are
  made in the forward pass from logits that are there anyway: three matrix products per chunk instead of four.

Matrix products run in the autocast dtype, softmax, NLLs and sums in float32 (in float64 for a float64 head).

Dimensions: P positions, D width, V columns of the head, N real classes (the first N columns), C positions of a chunk,
R positions of a block within it, S columns of a strip.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}  # logits of one chunk; larger is faster, up to a point
CPU_STRIP_COLUMNS = 512
CPU_HALF_STRIP_COLUMNS = 8192  # of the head's gradient in half precision, whose strips stay in the cache
CPU_BLOCK_BYTES = 12 * 2**20  # float32 logits whose softmax is made at once, within the last-level cache
CUDA_BLOCKS = 4  # parts in which a chunk in half precision is turned into float32


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of matrix products on the tensor's device: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def chunk_rows(
    positions: int, classes: int, device: torch.device, dtype: torch.dtype, budget: int | None = None
) -> int:
    """Positions per chunk: as many as the memory budget allows, in chunks of equal size.

    Args:
        budget: bytes for the logits of one chunk; None: ``CHUNK_BYTES`` of the device.
    """
    budget = budget or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    rows = max(1, budget // (dtype.itemsize * classes))
    chunks = max(1, math.ceil(positions / rows))
    return max(1, math.ceil(positions / chunks))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, stop)) for begin in range(start, stop, size))


class _Chunks:
    """The head in its compute dtype, the buffers that all chunks share, and the gradients that they add to.

    Products are made for a whole chunk, softmax and gradient of the logits in place for blocks of a few rows that stay
    in the CPU's cache. Buffers are made once per call: fresh memory costs a CPU as much time as the softmax.
    """

    def __init__(self, hidden_PD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, classes: int, dtype, rows: int):
        self.hidden_PD, self.classes, self.dtype, self.rows = hidden_PD.to(dtype), classes, dtype, rows
        self.weight_ND = weight_VD[:classes].to(dtype)
        self.bias_N = None if bias_V is None else bias_V[:classes].to(dtype)
        self.logits_CN = hidden_PD.new_empty(rows, classes, dtype=dtype)
        self.half = dtype.itemsize < 4
        self.block_rows = math.ceil(rows / CUDA_BLOCKS) if self.half else rows
        if hidden_PD.device.type == "cpu":
            self.block_rows = min(rows, max(1, CPU_BLOCK_BYTES // (4 * classes)))
        self.sum_dtype = torch.float32 if self.half else dtype
        self.block_RN = None
        if self.half:
            self.block_RN = hidden_PD.new_empty(self.block_rows, classes, dtype=torch.float32)
        self.grad_hidden_PD = self.grad_weight_VD = self.grad_bias_V = None

    def start_gradients(self, weight_VD: Tensor, bias_V: Tensor | None, wanted: tuple[bool, bool, bool]) -> None:
        hidden_wanted, weight_wanted, bias_wanted = wanted
        if hidden_wanted:
            self.grad_hidden_PD = torch.empty_like(self.hidden_PD, dtype=self.sum_dtype)
        if bias_wanted:
            self.grad_bias_V = torch.zeros_like(bias_V, dtype=self.sum_dtype)
        if weight_wanted:
            self.grad_weight_VD = torch.empty_like(weight_VD, dtype=self.sum_dtype)
            # Columns beyond the classes (a mask token) get no gradient, as if they were not there. The others are
            # overwritten by the first chunk, if there is one.
            self.grad_weight_VD[self.classes if len(self.hidden_PD) else 0 :].zero_()

    def run(self, target_P: Tensor, weight_P: Tensor | None = None) -> Tensor:
        """NLL of the targets, ``(P,)``; with weights also adds ``weight * d nll`` to the gradients started."""
        nll_P = self.hidden_PD.new_empty(self.hidden_PD.shape[0], dtype=self.sum_dtype)
        for chunk in _slices(0, len(nll_P), self.rows):
            logits_CN = self.logits_CN[: chunk.stop - chunk.start]
            self._logits(self.hidden_PD[chunk], logits_CN)
            for rows in _slices(chunk.start, chunk.stop, self.block_rows):
                logits_RN = logits_CN[rows.start - chunk.start : rows.stop - chunk.start]
                weight_R = None if weight_P is None else weight_P[rows]
                nll_P[rows] = self._block(logits_RN, target_P[rows], weight_R)
            if weight_P is not None:
                self._add_products(chunk, logits_CN, weight_P[chunk])
        return nll_P

    def _logits(self, hidden_CD: Tensor, logits_CN: Tensor) -> None:
        """Writes the head's product; float32 on a CPU in strips of columns, a third faster than in one piece."""
        strip = self.classes if self.half or logits_CN.device.type != "cpu" else CPU_STRIP_COLUMNS
        for columns in _slices(0, self.classes, strip):
            weight_DS = self.weight_ND[columns].T
            if self.bias_N is None:
                torch.mm(hidden_CD, weight_DS, out=logits_CN[:, columns])
            else:
                torch.addmm(self.bias_N[columns], hidden_CD, weight_DS, out=logits_CN[:, columns])

    def _block(self, logits_RN: Tensor, target_R: Tensor, weight_R: Tensor | None) -> Tensor:
        """NLLs of a few rows; with weights the logits are overwritten by ``softmax - onehot``, their gradient."""
        values_RN = logits_RN if self.block_RN is None else self.block_RN[: len(target_R)].copy_(logits_RN)
        target_R1 = target_R[:, None]
        target_logit_R = values_RN.gather(1, target_R1).squeeze(1)
        maximum_R1 = values_RN.amax(dim=1, keepdim=True)
        total_R1 = values_RN.sub_(maximum_R1).exp_().sum(dim=1, keepdim=True)
        nll_R = (total_R1.log() + maximum_R1).squeeze(1) - target_logit_R
        if weight_R is not None:
            values_RN.div_(total_R1).scatter_add_(1, target_R1, values_RN.new_full((len(target_R), 1), -1))
            if self.grad_bias_V is not None:
                self.grad_bias_V[: self.classes].addmv_(values_RN.T, weight_R)
            if self.block_RN is not None:
                logits_RN.copy_(values_RN)
        return nll_R

    def _add_products(self, chunk: slice, grad_CN: Tensor, weight_C: Tensor) -> None:
        """Adds the chunk to the gradients of input and head; the weights go to the narrow factors."""
        if self.grad_hidden_PD is not None:
            torch.mul(grad_CN @ self.weight_ND, weight_C[:, None], out=self.grad_hidden_PD[chunk])
        if self.grad_weight_VD is None:
            return
        total_ND, first = self.grad_weight_VD[: self.classes], chunk.start == 0
        if not self.half:
            weighted_CD = self.hidden_PD[chunk] * weight_C[:, None]
            if first:  # overwrite instead of adding to zeros
                torch.mm(grad_CN.T, weighted_CD, out=total_ND)
            else:
                total_ND.addmm_(grad_CN.T, weighted_CD)
            return
        # Weights relative to the largest, which is multiplied in float32: float16 would overflow at 65,504.
        scale = weight_C.abs().amax().clamp_min(1e-30)
        weighted_CD = self.hidden_PD[chunk] * (weight_C / scale)[:, None].to(self.dtype)
        strip = CPU_HALF_STRIP_COLUMNS if grad_CN.device.type == "cpu" else self.classes
        for columns in _slices(0, self.classes, strip):
            product_SD = grad_CN[:, columns].T @ weighted_CD
            if first:
                total_ND[columns].copy_(product_SD).mul_(scale)
            else:
                total_ND[columns].addcmul_(product_SD.float(), scale)

    def gradients(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        """Gradients in the dtypes of the inputs."""
        pairs = ((self.grad_hidden_PD, hidden), (self.grad_weight_VD, weight), (self.grad_bias_V, bias))
        return [None if grad is None else grad.to(like.dtype) for grad, like in pairs]


class _ChunkedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_PD, weight_VD, bias_V, target_P, classes, dtype, rows):
        chunks = _Chunks(hidden_PD, weight_VD, bias_V, classes, dtype, rows)
        nll_P = chunks.run(target_P)
        ctx.save_for_backward(hidden_PD, weight_VD, bias_V, target_P)
        ctx.classes, ctx.dtype, ctx.rows = classes, dtype, rows
        return nll_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_P):
        hidden_PD, weight_VD, bias_V, target_P = ctx.saved_tensors
        with torch.autocast(hidden_PD.device.type, enabled=False):
            chunks = _Chunks(hidden_PD, weight_VD, bias_V, ctx.classes, ctx.dtype, ctx.rows)
            chunks.start_gradients(weight_VD, bias_V, ctx.needs_input_grad[:3])
            chunks.run(target_P, grad_P)
            return *chunks.gradients(hidden_PD, weight_VD, bias_V), None, None, None, None


class _ChunkedWeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_PD, weight_VD, bias_V, target_P, weight_P, classes, dtype, rows):
        chunks = _Chunks(hidden_PD, weight_VD, bias_V, classes, dtype, rows)
        chunks.start_gradients(weight_VD, bias_V, ctx.needs_input_grad[:3])
        nll_P = chunks.run(target_P, weight_P)
        ctx.gradients = chunks.gradients(hidden_PD, weight_VD, bias_V)
        ctx.mark_non_differentiable(nll_P)
        return (nll_P * weight_P).sum(), nll_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, _grad_nll):
        if ctx.gradients is None:
            raise RuntimeError("chunked_weighted_nll keeps its gradients for one backward pass; call it once per loss.")
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a second copy of the head's gradient would be the largest tensor of the step.
        scaled = [None if gradient is None else gradient.mul_(grad_sum) for gradient in gradients]
        return *scaled, None, None, None, None, None


@torch.compiler.disable  # the chunk loop depends on the number of masked positions, which changes every step
def chunked_nll(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_P: Tensor,
    *,
    classes: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """NLL of the targets in nats under softmax over the first ``classes`` columns: float32 ``(P,)``.

    Args:
        hidden_PD: inputs of the head; weight_VD, bias_V: the head.
        target_P: int64 in 0..classes-1.
        classes: real classes N; None: all V columns.
        chunk_bytes: memory for the logits of one chunk; None: ``CHUNK_BYTES``.
    """
    classes = weight_VD.shape[0] if classes is None else classes
    dtype = compute_dtype(hidden_PD)
    rows = chunk_rows(hidden_PD.shape[0], classes, hidden_PD.device, dtype, chunk_bytes)
    with torch.autocast(hidden_PD.device.type, enabled=False):
        return _ChunkedNLL.apply(hidden_PD, weight_VD, bias_V, target_P, classes, dtype, rows)


@torch.compiler.disable
def chunked_weighted_nll(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_P: Tensor,
    weight_P: Tensor,
    *,
    classes: int | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of NLLs, and the NLLs: ``(scalar, (P,))``, both float32 and in nats; only the sum is differentiable.

    Arguments as in ``chunked_nll``; ``weight_P`` are constants. Without gradient it costs the forward product only.
    """
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden_PD, weight_VD, bias_V))):
        nll_P = chunked_nll(hidden_PD, weight_VD, bias_V, target_P, classes=classes, chunk_bytes=chunk_bytes)
        return (nll_P * weight_P).sum(), nll_P
    classes = weight_VD.shape[0] if classes is None else classes
    dtype = compute_dtype(hidden_PD)
    rows = chunk_rows(hidden_PD.shape[0], classes, hidden_PD.device, dtype, chunk_bytes)
    with torch.autocast(hidden_PD.device.type, enabled=False):
        return _ChunkedWeightedNLL.apply(
            hidden_PD,
            weight_VD,
            bias_V,
            target_P,
            weight_P.to(torch.promote_types(dtype, torch.float32)),
            classes,
            dtype,
            rows,
        )
