"""Pairs of prompt and answer as a dataset, from files, the hub, or arithmetic templates that need neither.

Dimensions: B rows fetched, L tokens of an example, n pairs.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, DataError
from common.seeding import generator
from diffullama.sft import sft_example
from diffullama.special_tokens import SpecialTokens
from diffullama.tasks.dataset import Source, load_rows

ARITHMETIC = "arithmetic"
ARITHMETIC_PAIRS = {"train": 4000, "validation": 200, "test": 200}
NAMES = ("Ann", "Ben", "Carla", "David", "Eva", "Finn", "Grace", "Henry")
THINGS = ("apples", "books", "cards", "marbles", "pens", "shells")

Encode = Callable[[str], list[int]]


def load_pairs(
    name: str, split: str, *, prompt_column: str, answer_column: str, seed: int = 0, cache_dir: str | None = None
) -> list[tuple[str, str]]:
    """(prompt, answer) texts.

    Args:
        name: ``arithmetic`` (or ``arithmetic:N``): made up here; a jsonl, json, csv or parquet file, a folder, or a hub
            dataset as ``owner/name`` or ``owner/name:config``.
        split: of a folder or a hub dataset; a single file has one split only.

    Raises: DataError for data that are missing, unreadable, or without the two columns.
    """
    kind, _, count = name.partition(":")
    if kind == ARITHMETIC:
        if count and not count.isdecimal():
            raise ConfigError(f"data {name}: after '{ARITHMETIC}:' comes a number of pairs.")
        return arithmetic_pairs(int(count or ARITHMETIC_PAIRS[split]), split, seed)
    columns = {"prompt": (prompt_column,), "answer": (answer_column,)}
    rows = load_rows("train", Source(hub=name, columns=columns, split=split), place=name, cache_dir=cache_dir)
    return [(str(row["prompt"]), str(row["answer"])) for row in rows]


def arithmetic_pairs(count: int, split: str, seed: int) -> list[tuple[str, str]]:
    """Questions of one or two steps with answers in the style of symbolic GSM8K: ``<<3+4=7>> #### 7``."""
    rng = np.random.default_rng(generator(seed, f"arithmetic {split}").initial_seed())
    pairs = []
    for _ in range(count):
        name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
        a, b, c = (int(value) for value in rng.integers(2, 30, size=3))
        first, steps = f"{name} has {a} {thing} and gets {b} more.", [f"<<{a}+{b}={a + b}>>"]
        total = a + b
        if rng.random() < 0.5:
            lost = c % total
            first, total = f"{first} Then {name} loses {lost}.", total - lost
            steps.append(f"<<{a + b}-{lost}={total}>>")
        pairs.append((f"{first} How many {thing} does {name} have?", f"{' '.join(steps)} #### {total}"))
    return pairs


class PairDataset(torch.utils.data.Dataset):
    """Examples of fixed length: ``dataset[i] -> {"tokens": (L,), "src_mask": (L,)}``, both int64.

    Args:
        encode: text to ids.
        length: L.
        parity: truncate as the released code does (``sft_example``).
        learn_padding: False gives padding as context, as the autoregressive baseline needs it.

    Raises: ConfigError if the model has no separator or padding token; DataError without pairs.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        encode: Encode,
        special: SpecialTokens,
        *,
        length: int,
        parity: bool = False,
        learn_padding: bool = True,
    ) -> None:
        if not pairs:
            raise DataError("there is no pair of prompt and answer to finetune on.")
        sep = special.sep_id if special.sep_id is not None else special.eos_id
        missing = [name for name in ("bos_id", "eos_id", "pad_id") if getattr(special, name) is None]
        if missing:
            raise ConfigError(f"the tokenizer has no {missing[0].removesuffix('_id')} token, which pairs need.")
        self.length = length
        examples = [
            _with_padding(
                sft_example(encode(prompt), encode(answer), special.bos_id, sep, special.eos_id, special.pad_id, length,
                            parity), special, learn_padding)
            for prompt, answer in pairs
        ]  # fmt: skip
        self.tokens_nL = np.array([ids for ids, _ in examples], dtype=np.int32)
        self.given_nL = np.array([given for _, given in examples], dtype=np.int8)

    def __len__(self) -> int:
        return len(self.tokens_nL)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.fetch([row]).items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[row] for row in range(len(self)))

    def fetch(self, rows: np.ndarray | Tensor | Sequence[int]) -> dict[str, Tensor]:
        """``{"tokens": (B, L), "src_mask": (B, L)}`` for B row numbers in any order."""
        rows = np.asarray(rows)
        return {
            "tokens": torch.from_numpy(self.tokens_nL[rows].astype(np.int64)),
            "src_mask": torch.from_numpy(self.given_nL[rows].astype(np.int64)),
        }


def _with_padding(
    example: tuple[list[int], list[int]], special: SpecialTokens, learn_padding: bool
) -> tuple[list[int], list[int]]:
    ids, given = example
    if learn_padding:
        return example
    end = len(ids)
    while end and ids[end - 1] == special.pad_id and not given[end - 1]:
        end -= 1
    end = min(end + (special.pad_id == special.eos_id), len(ids))  # the first of equal ids is the end token
    return ids, given[:end] + [1] * (len(ids) - end)
