"""LoGAH's decoder: only the rows of the factors that reach the target, against whole factors at the rounded size.

    python -m benchmarks.logah_decoder [--json FILE] [--repeats 5]

A 768 x 768 matrix (rounded to 2048 x 2048 by the released code) from one node, for the four published sizes. Outputs
must be equal. "Saved" is what autograd keeps for the backward pass beside the weights, per node. A 3072 x 768 matrix
and a vector of 768 are timed beside it. Weights are random.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.command import main
from benchmarks.processes import interleaved
from logah.decoder_lowrank import A, B, LowRankDecoder, Read

SIZES = {"Tiny": (64, 32), "Small": (128, 90), "Base": (256, 128), "Large": (256, 256)}
MAX_CK = 32768
FASTER, LIGHTER, CLOSE = 5.0, 10.0, 1e-6
WIDTH, ROUNDED = 768, 2048
CALLS = {"Tiny": 50, "Small": 20, "Base": 10, "Large": 4}  # in a row, so that a round takes a third of a second


def exact(decoder: LowRankDecoder, x_Rd: Tensor, rows: int, columns: int) -> Tensor:
    """The target and nothing else."""
    trunk = decoder.trunk(x_Rd)
    a_Rnr, b_Rmr = decoder.read_many([trunk, trunk], [Read(A, 0, rows), Read(B, 0, columns)])
    return a_Rnr @ b_Rmr.transpose(1, 2)


def whole(decoder: LowRankDecoder, x_Rd: Tensor, rows: int, columns: int) -> Tensor:
    """As released: all of both factors, the product at the rounded size, then the cut."""
    sizes = [ROUNDED if size >= WIDTH else size for size in (rows, columns)]
    return decoder.full(x_Rd, (*sizes, 1, 1))[:, :rows, :columns, 0, 0]


def several(decode: Callable[[], Tensor], calls: int) -> None:
    """Tensors one after the other, as in a network."""
    for _ in range(calls):
        decode()


def saved_bytes(decoder: LowRankDecoder, decode: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = decode()
    del result
    return sum(kept.values())


def measure(repeats: int = 5) -> dict:
    """All figures."""
    ratios, checks, milliseconds, megabytes = [], [], {}, {}
    for name, (hid, rank) in SIZES.items():
        torch.manual_seed(0)
        decoder = LowRankDecoder(hid, rank, MAX_CK)
        x_Rd = torch.randn(1, hid)
        with torch.no_grad():
            shapes = {"768 x 768": (WIDTH, WIDTH), "3072 x 768": (4 * WIDTH, WIDTH), "768": (WIDTH, 1)}
            found = {}
            for label, shape in shapes.items():
                cut = {"768": (2 * WIDTH, 1)}.get(label, shape)  # a vector is two rows: weight and bias
                found[label] = interleaved(
                    {
                        "whole": lambda d=decoder, x=x_Rd, s=cut, n=CALLS[name]: several(lambda: whole(d, x, *s), n),
                        "exact": lambda d=decoder, x=x_Rd, s=shape, n=CALLS[name]: several(lambda: exact(d, x, *s), n),
                    },
                    repeats,
                )
            difference = (exact(decoder, x_Rd, WIDTH, WIDTH) - whole(decoder, x_Rd, WIDTH, WIDTH)).abs().max()
        for label, times in found.items():
            milliseconds[f"{name}, {label}"] = {
                kind: round(1000 * value / CALLS[name], 2) for kind, value in times.items()
            }
        kept = {
            "whole": saved_bytes(decoder, lambda d=decoder, x=x_Rd: whole(d, x, WIDTH, WIDTH)),
            "exact": saved_bytes(decoder, lambda d=decoder, x=x_Rd: exact(d, x, WIDTH, WIDTH)),
        }
        megabytes[name] = {kind: round(value / 1e6, 3) for kind, value in kept.items()}
        times = found["768 x 768"]
        ratios.append({"name": f"{name}: whole over exact, seconds", "ratio": times["whole"] / times["exact"],
                       "target": FASTER})  # fmt: skip
        ratios.append({"name": f"{name}: whole over exact, saved bytes", "ratio": kept["whole"] / kept["exact"],
                       "target": LIGHTER})  # fmt: skip
        checks.append({"claim": f"{name}: equal", "measured": float(difference), "threshold": CLOSE,
                       "passed": float(difference) <= CLOSE})  # fmt: skip
        del decoder
    return {"milliseconds": milliseconds, "saved megabytes": megabytes, "ratios": ratios, "checks": checks}


if __name__ == "__main__":
    main(measure, __doc__)
