"""What a run reads: packed text, LITPKDS files, weighted mixtures of these, or pairs of prompt and answer."""

import functools

from common.data.corpora import build_text_dataset
from common.data.loader import BatchedDataset
from common.data.tokenizer import Tokenizer
from common.errors import ConfigError
from diffullama.config import DataSection, ObjectiveConfig
from diffullama.mixing import MixedDataset
from diffullama.packed import open_packed
from diffullama.pairs import PairDataset, load_pairs
from diffullama.special_tokens import SpecialTokens, isolate_digits

PACKED, MIXED = "packed:", "mixed:"


def build_dataset(
    name: str,
    split: str,
    *,
    data: DataSection,
    objective: ObjectiveConfig,
    length: int,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    vocab_size: int,
    seed: int,
    num_samples: int | None = None,
    digits: bool = False,
) -> BatchedDataset:
    """Rows of one split in the form that the stage needs.

    Args:
        name: ``data.train`` or ``data.valid``.
        vocab_size: rows of the model's embedding, which ids of prepared files are checked against.
        num_samples: of a mixture: how many the run takes.
        digits: encode every digit of pairs as a token of its own.

    Raises: ConfigError, DataError.
    """
    if objective.is_finetuning:
        pairs = load_pairs(
            name,
            split,
            prompt_column=data.prompt_column,
            answer_column=data.answer_column,
            seed=seed,
            cache_dir=data.cache_dir,
        )
        return PairDataset(
            pairs,
            functools.partial(isolate_digits, tokenizer) if digits else tokenizer.encode,
            special,
            length=length,
            parity=data.reference_layout,
            learn_padding=not objective.is_causal,
        )
    if name.startswith(PACKED):
        return open_packed(name.removeprefix(PACKED), length, vocab_size=vocab_size, split=split)
    if name.startswith(MIXED):
        weights, sources = {}, {}
        for part in name.removeprefix(MIXED).split("+"):
            place, _, weight = part.rpartition("=")
            try:
                weights[place] = float(weight)
            except ValueError:
                raise ConfigError(
                    f"data {name}: {part!r} has no weight; write mixed:NAME=WEIGHT+NAME=WEIGHT, for example "
                    "mixed:packed:slimpajama=0.7+packed:starcoder=0.3."
                ) from None
            sources[place] = build_dataset(
                place,
                split,
                data=data,
                objective=objective,
                length=length,
                tokenizer=tokenizer,
                special=special,
                vocab_size=vocab_size,
                seed=seed,
            )
        return MixedDataset(sources, weights, seed=seed, num_samples=num_samples)
    return build_text_dataset(
        name, split, length=length, tokenizer=tokenizer, cache_dir=data.cache_dir, group_size=data.group_size
    )
