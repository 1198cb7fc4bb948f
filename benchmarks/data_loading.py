"""Data loading: tokens per second from a token cache on one core, and what tokenizing a corpus once costs.

    python benchmarks/data_loading.py
    python benchmarks/data_loading.py --tokens 4000000 --repeats 3

A cache of random ids in the format of a real corpus (uint16 memory map) is read in shuffled order, as training does.
``rows one by one`` is what a dataset without ``fetch`` costs: indexing and collating each row. Variants run
interleaved; medians are reported. Tokenizing speeds are of the embedded text.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data.cache import TokenRecipe, load_or_build_tokens
from common.data.dataset import TokenDataset, TokenStream
from common.data.loader import build_train_loader
from common.data.sources import DocumentList
from common.data.text import embedded_documents
from common.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe

TARGET_TOKENS_PER_SECOND = 2e6
VOCAB_SIZE = 50_257
SIZES = {"L 1024, batch 16": (1024, 16), "L 256, batch 8": (256, 8), "L 64, batch 32": (64, 32)}


class RowByRow:
    """The same blocks without ``fetch``."""

    def __init__(self, dataset: TokenDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.dataset[row]


def write_stream(path: Path, tokens: int) -> TokenStream:
    """A memory map of random ids."""
    rng = np.random.default_rng(0)
    with path.open("wb") as stream:
        for start in range(0, tokens, 1 << 22):
            count = min(1 << 22, tokens - start)
            stream.write(rng.integers(0, VOCAB_SIZE, count, dtype=np.uint16).tobytes())
    return TokenStream(np.memmap(path, dtype=np.uint16, mode="r"), documents=1, total_tokens=tokens, path=path)


def loader_for(stream: TokenStream, length: int, batch: int, variant: str):
    dataset = TokenDataset(stream, length, vocab_size=VOCAB_SIZE)
    return build_train_loader(
        RowByRow(dataset) if variant == "rows one by one" else dataset,
        global_size=batch,
        micro_size=batch,
        seed=0,
        num_workers=1 if variant == "one worker" else 0,
        pin_memory=False,
    )


def tokens_per_second(batches: Iterator[Mapping[str, torch.Tensor]], count: int) -> float:
    tokens, start = 0, time.perf_counter()
    for batch in islice(batches, count):
        tokens += batch["tokens"].numel()
    return tokens / (time.perf_counter() - start)


def interleaved(variants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of each variant over rounds in which all take turns."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            results[name].append(run())
    return {name: statistics.median(values) for name, values in results.items()}


def measure_reading(stream: TokenStream, repeats: int) -> dict[str, dict[str, float]]:
    """Million tokens per second by batch size and variant."""
    table = {}
    for size, (length, batch) in SIZES.items():
        count = max(20, 2_000_000 // (length * batch))
        sources = {}
        for variant in ("in this process", "one worker", "rows one by one"):
            batches = iter(loader_for(stream, length, batch, variant))
            next(batches)  # permutation, worker start, first page faults
            sources[variant] = lambda batches=batches, count=count: tokens_per_second(batches, count)
        medians = interleaved(sources, repeats)
        table[size] = {f"{name}, Mtoken/s": round(value / 1e6, 2) for name, value in medians.items()}
    return table


def measure_tokenizing(folder: Path, repeats: int) -> dict[str, float]:
    """Million tokens (and characters) per second of building a cache."""
    texts = embedded_documents("train", "all")
    characters = sum(map(len, texts))
    counts: dict[str, int] = {}

    def build(name: str, tokenizer: Tokenizer) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as cache_dir:
            start = time.perf_counter()
            recipe = TokenRecipe(source=DocumentList(texts), tokenizer=tokenizer)
            counts[name] = load_or_build_tokens(recipe, cache_dir, progress=False).total_tokens
            return time.perf_counter() - start

    tokenizers = {"byte": ByteTokenizer(), "bpe 4096": train_bpe(texts, 4096)}
    seconds = interleaved(
        {name: lambda name=name, tokenizer=tokenizer: build(name, tokenizer) for name, tokenizer in tokenizers.items()},
        repeats,
    )
    return {
        name: {
            "Mtoken/s": round(counts[name] / seconds[name] / 1e6, 2),
            "Mcharacter/s": round(characters / seconds[name] / 1e6, 2),
        }
        for name in tokenizers
    }


def measure(*, tokens: int = 32_000_000, repeats: int = 5) -> dict:
    """Figures of this machine, with the check against the target.

    Args:
        tokens: in the cache that is read.
        repeats: rounds over which medians are taken.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reading = measure_reading(write_stream(folder / "tokens.bin", tokens), repeats)
        tokenizing = measure_tokenizing(folder, max(1, repeats // 2))
    slowest = min(row["in this process, Mtoken/s"] for row in reading.values()) * 1e6
    return {
        "tokens in the cache": tokens,
        "reading": reading,
        "tokenizing once": tokenizing,
        "checks": [
            {
                "claim": "reading from the cache on one core, slowest batch size, tokens per second",
                "measured": slowest,
                "threshold": TARGET_TOKENS_PER_SECOND,
                "passed": slowest >= TARGET_TOKENS_PER_SECOND,
            }
        ],
    }


def print_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(" " * 20 + "".join(f"{column:>28}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<20}" + "".join(f"{row[column]:>28}" for column in columns))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    result = measure(tokens=options.tokens, repeats=options.repeats)
    print_table(result["reading"])
    print_table(result["tokenizing once"])
    print(json.dumps(result))
    return 0 if all(check["passed"] for check in result["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
