"""What a run reads: packed text, LITPKDS files, weighted mixtures of these, or pairs of prompt and answer.

Dimensions: B rows fetched, L positions, n rows.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.data.corpora import build_text_dataset, build_text_stream
from common.data.loader import BatchedDataset, TrainLoader, build_train_loader, build_validation_loader
from common.data.streaming import StreamingTrainLoader
from common.data.tokenizer import Tokenizer
from common.errors import ConfigError, DataError
from common.seeding import generator
from common.validation import ValidationLoader
from diffullama.config import DataSection, TrainConfig
from diffullama.mixing import MixedDataset
from diffullama.packed import open_packed
from diffullama.pairs import PairDataset, load_pairs
from diffullama.special_tokens import SpecialTokens, isolate_digits

PACKED, MIXED = "packed:", "mixed:"
INSPECTED_ROWS = 256  # of the training data, for ids that should not be there

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataBuilder:
    """Makes the data sets and loaders of one run.

    Attributes:
        special: its begin-of-text id opens blocks if ``data.bos``.
        vocab_size: rows of the model's embedding, which ids of prepared files are checked against.
        digits: encode every digit of pairs as a token of its own.
    """

    config: TrainConfig
    tokenizer: Tokenizer
    special: SpecialTokens
    vocab_size: int
    digits: bool = False

    @property
    def data(self) -> DataSection:
        return self.config.data

    @property
    def text_length(self) -> int:
        """Tokens of a block that come from the text."""
        return self.config.model.length - self.has_bos

    @property
    def has_bos(self) -> bool:
        """Whether a begin-of-text token opens every block."""
        return self.data.bos and not self.config.objective.is_finetuning and self.special.bos_id is not None

    def datasets(self) -> tuple[BatchedDataset, BatchedDataset | None]:
        """Rows to train on, and held-out ones if there are any.

        Raises: ConfigError for names that cannot be read, DataError for data that cannot be used.
        """
        train = self._whole(self.data.train, "train")
        if self.data.valid is not None:
            return train, self._whole(self.data.valid, "validation")
        if not self.data.valid_size:
            return train, None
        return split_rows(train, self.data.valid_size, self.config.seed)

    def _whole(self, name: str, split: str) -> BatchedDataset:
        if self.config.objective.is_finetuning:
            dataset: BatchedDataset = self._pairs(name, split)
        else:
            dataset = self._text(name, split)
            if self.has_bos:
                dataset = WithBos(dataset, self.special.bos_id)
        if split == "train":
            self._look_for_masks(dataset)
        return dataset

    def _pairs(self, name: str, split: str) -> PairDataset:
        data, objective = self.data, self.config.objective
        pairs = load_pairs(
            name,
            split,
            prompt_column=data.prompt_column,
            answer_column=data.answer_column,
            seed=self.config.seed,
            cache_dir=data.cache_dir,
        )
        return PairDataset(
            pairs,
            functools.partial(isolate_digits, self.tokenizer) if self.digits else self.tokenizer.encode,
            self.special,
            length=self.config.model.length,
            parity=data.reference_layout,
            learn_padding=not objective.is_causal,
        )

    def _text(self, name: str, split: str) -> BatchedDataset:
        """Blocks without the begin-of-text token."""
        length, data = self.text_length, self.data
        if name.startswith(PACKED):
            return open_packed(name.removeprefix(PACKED), length, vocab_size=self.vocab_size, split=split)
        if not name.startswith(MIXED):
            return build_text_dataset(
                name,
                split,
                length=length,
                tokenizer=self.tokenizer,
                cache_dir=data.cache_dir,
                group_size=data.group_size,
            )
        weights = read_weights(name)
        sources = {place: self._text(place, split) for place in weights}
        training = self.config.training
        taken = training.n_iters * training.batch_size if split == "train" and training.epochs is None else None
        return MixedDataset(sources, weights, seed=self.config.seed, num_samples=taken)

    def _look_for_masks(self, dataset: BatchedDataset) -> None:
        """Warns if the mask's id occurs in the text, where it would look like a mask that has no loss."""
        mask = self.special.mask_id
        if mask is None or self.config.objective.is_causal:
            return
        rows = np.unique(np.linspace(0, len(dataset) - 1, min(INSPECTED_ROWS, len(dataset))).astype(np.int64))
        share = float((dataset.fetch(rows)["tokens"] == mask).double().mean())
        if share:
            logger.warning(
                "data.train=%s holds the mask's id %d (%.2g of its tokens), which the model cannot tell from a mask; "
                "model.add_mask_token=true gives the mask an id of its own.",
                self.data.train,
                mask,
                share,
            )

    def loaders(self, *, global_size: int, micro_size: int, rank: int, world_size: int) -> "Loaders":
        """What one process of ``world_size`` reads."""
        config, data = self.config, self.data
        share = {
            "micro_size": micro_size,
            "seed": config.seed,
            "rank": rank,
            "world_size": world_size,
            "num_workers": data.num_workers,
        }
        # several processes may ask at once: one of them tokenizes, the others wait for the cache
        if data.streaming:
            stream = build_text_stream(
                data.train,
                "train",
                length=self.text_length,
                tokenizer=self.tokenizer,
                cache_dir=data.cache_dir,
                **share,
            )
            train = WithBosStream(stream, self.special.bos_id if self.has_bos else None)
            rows, held_out = None, None if data.valid is None else self._whole(data.valid, "validation")
        else:
            dataset, held_out = self.datasets()
            rows = len(dataset)
            train = build_train_loader(dataset, global_size=global_size, shuffle=not is_mixed(dataset), **share)
        examples = None
        if config.objective.is_finetuning:
            source = dataset if held_out is None else held_out
            examples = source.fetch(range(min(config.sampling.texts, len(source))))
        validation = None
        if held_out is not None and config.training.eval_freq:
            validation = build_validation_loader(
                held_out, batch_size=config.eval.micro_batch_size, max_samples=config.eval.batch_size
            )
        return Loaders(train, validation, rows, examples)


@dataclass(frozen=True)
class Loaders:
    """What one process reads.

    Attributes:
        validation: the held-out batches, if they are evaluated.
        rows: of an epoch; None for a stream.
        examples: pairs whose answers a snapshot shows; None in the stages without pairs.
    """

    train: "TrainLoader | WithBosStream"
    validation: ValidationLoader | None
    rows: int | None
    examples: dict[str, Tensor] | None = None


def read_weights(name: str) -> dict[str, float]:
    """Sources and weights of ``mixed:NAME=WEIGHT+NAME=WEIGHT``.

    Raises: ConfigError for a part without a number.
    """
    weights = {}
    for part in name.removeprefix(MIXED).split("+"):
        place, _, weight = part.rpartition("=")
        try:
            weights[place] = float(weight)
        except ValueError:
            place = ""
        if not place:
            raise ConfigError(
                f"data {name}: {part!r} has no weight; write mixed:NAME=WEIGHT+NAME=WEIGHT, for example "
                "mixed:packed:slimpajama=0.7+packed:starcoder=0.3."
            )
    return weights


def is_mixed(dataset: BatchedDataset) -> bool:
    """Whether the rows are a mixture's, which are in random order already."""
    while hasattr(dataset, "inner"):
        dataset = dataset.inner
    return isinstance(dataset, MixedDataset)


def split_rows(dataset: BatchedDataset, size: float, seed: int) -> tuple["RowsOf", "RowsOf"]:
    """The data without ``size`` random rows (a share below 1, else their number), and these rows.

    Source: specification 4.3, ``val_size``. Raises: DataError if nothing would be left to train on, or to hold out.
    """
    held_out = int(len(dataset) * size) if size < 1 else int(size)
    if not 0 < held_out < len(dataset):
        raise DataError(
            f"data.valid_size={size:g} holds out {held_out} of {len(dataset)} rows of data.train; both parts need rows."
        )
    order = torch.randperm(len(dataset), generator=generator(seed, "validation split")).numpy()
    return RowsOf(dataset, np.sort(order[held_out:])), RowsOf(dataset, order[:held_out])


class RowsOf(torch.utils.data.Dataset):
    """Some rows of a data set, in the order given."""

    def __init__(self, inner: BatchedDataset, rows_n: NDArray[np.int64]) -> None:
        self.inner, self.rows_n = inner, rows_n

    def __len__(self) -> int:
        return len(self.rows_n)

    @property
    def rows_per_read(self) -> int:
        return getattr(self.inner, "rows_per_read", 1)

    def fetch(self, rows: NDArray | Sequence[int]) -> dict[str, Tensor]:
        """The batch of ``inner`` at these rows."""
        return self.inner.fetch(self.rows_n[np.asarray(rows, dtype=np.int64)])


class WithBos(torch.utils.data.Dataset):
    """Blocks of L - 1 tokens behind a begin-of-text token."""

    def __init__(self, inner: BatchedDataset, bos_id: int) -> None:
        self.inner, self.bos_id = inner, bos_id

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def rows_per_read(self) -> int:
        return getattr(self.inner, "rows_per_read", 1)

    def fetch(self, rows: NDArray | Sequence[int]) -> dict[str, Tensor]:
        """``{"tokens": (B, L)}``."""
        return with_bos(self.inner.fetch(rows), self.bos_id)


def with_bos(batch: dict[str, Tensor], bos_id: int | None) -> dict[str, Tensor]:
    """The batch with a begin-of-text token before every row of ``tokens``; None: as it is."""
    if bos_id is None:
        return batch
    return {**batch, "tokens": torch.nn.functional.pad(batch["tokens"], (1, 0), value=bos_id)}


class WithBosStream:
    """A streaming loader whose blocks begin with a begin-of-text token."""

    def __init__(self, inner: StreamingTrainLoader, bos_id: int | None) -> None:
        self.inner, self.bos_id = inner, bos_id

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (with_bos(batch, self.bos_id) for batch in self.inner)

    def state_dict(self) -> dict:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.inner.load_state_dict(state)

    def seek(self, step: int) -> None:
        self.inner.seek(step)
