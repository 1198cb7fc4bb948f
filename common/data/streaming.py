"""Packed blocks straight from a ``datasets.IterableDataset``: corpora too large to tokenize beforehand or to download.

Every rank reads its own share of the documents, packs them into blocks and shuffles the blocks within windows. The
position (document, unfinished block, window, micro-batch) is saved and restored exactly; a window is read again after
a restart, so that the state stays small.

Unlike a map-style dataset, a stream cannot jump to a step, and what a rank sees depends on the number of ranks.

Legend: ``m`` micro-batch, ``L`` block length, ``n`` blocks of a window.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from common.data.packing import BlockPacker
from common.data.sources import first_line, text_of
from common.data.tokenizer import Tokenizer
from common.errors import CheckpointError, ConfigError, DataError
from common.seeding import generator

READ_DOCUMENTS = 64  # tokenized at once

Batch = dict[str, Tensor]


class _Documents:
    """Endless texts of a stream, epoch after epoch, with a position that can be saved between two reads."""

    def __init__(self, stream, fields: Sequence[str], label: str, state: dict | None) -> None:
        self.stream, self.fields, self.label = copy.copy(stream), fields, label
        self.epoch = state["epoch"] if state else 0
        self.stream.set_epoch(self.epoch)
        if state and state["stream"] is not None:
            self.stream.load_state_dict(copy.deepcopy(state["stream"]))
            self.read_in_epoch = state["read_in_epoch"]
        else:
            self.read_in_epoch = 0
        self._records = iter(self.stream)

    def state_dict(self) -> dict:
        stream = copy.deepcopy(self.stream.state_dict()) if self.read_in_epoch else None
        return {"epoch": self.epoch, "stream": stream, "read_in_epoch": self.read_in_epoch}

    def take(self, count: int) -> list[str]:
        """The next texts: at least one, fewer than ``count`` at the end of an epoch."""
        while True:
            texts = []
            try:
                for record in islice(self._records, count):
                    place = f"{self.label}, epoch {self.epoch}, record {self.read_in_epoch + len(texts)}"
                    texts.append(text_of(record, self.fields, place))
            except DataError:
                raise
            except Exception as error:  # connection, decompression, JSON, arrow: all mean that the input is unusable
                raise DataError(
                    f"{self.label}: cannot be read after record {self.read_in_epoch + len(texts)} of epoch "
                    f"{self.epoch} ({first_line(error)}); check the connection or the files. The run's "
                    "last checkpoint continues from its own position."
                ) from error
            self.read_in_epoch += len(texts)
            if texts:
                return texts
            if not self.read_in_epoch:
                raise DataError(
                    f"{self.label} yields no document for this process; it needs at least as many documents as there "
                    "are processes."
                )
            self.epoch, self.read_in_epoch = self.epoch + 1, 0
            self.stream.set_epoch(self.epoch)
            self._records = iter(self.stream)


class PackedStream(IterableDataset):
    """Endless micro-batches ``{"tokens": (m, L) int64}`` of one rank.

    Args:
        stream: a ``datasets.IterableDataset``, not yet divided among ranks.
        fields: names of the text column, by preference.
        transform: applied to every text before encoding.
        window_blocks: blocks shuffled together; larger mixes better and makes a restart read more again.

    Raises:
        ConfigError: a size below 1.
        DataError: while iterating: unreadable input, wrong column, no document.
    """

    def __init__(
        self,
        stream,
        *,
        tokenizer: Tokenizer,
        length: int,
        micro_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fields: Sequence[str] = ("text",),
        transform: Callable[[str], str] | None = None,
        window_blocks: int = 1024,
        label: str = "stream",
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        for name, value in (("length", length), ("micro_size", micro_size), ("window_blocks", window_blocks)):
            if value < 1:
                raise ConfigError(f"{name}={value} of a streamed dataset must be at least 1.")
        if world_size > 1:
            stream = split_dataset_by_node(stream, rank=rank, world_size=world_size)
        self.stream, self.tokenizer, self.length, self.micro_size = stream, tokenizer, length, micro_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.fields, self.transform, self.label = tuple(fields), transform, label
        self.window_blocks = max(window_blocks, micro_size)
        self._state: dict | None = None

    def state_dict(self) -> dict:
        """Position after the last micro-batch yielded."""
        return {"position": copy.deepcopy(self._state)}

    def load_state_dict(self, state: dict) -> None:
        self._state = copy.deepcopy(state["position"])

    def identity(self) -> dict:
        """What a position is relative to."""
        return {
            "length": self.length,
            "micro_size": self.micro_size,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "window_blocks": self.window_blocks,
            "tokenizer": self.tokenizer.fingerprint(),
        }

    def __iter__(self) -> Iterator[Batch]:
        state = self._state or {"documents": None, "packer": None, "left_over": None, "window": 0, "taken": 0}
        documents = _Documents(self.stream, self.fields, self.label, state["documents"])
        packer = BlockPacker(self.length, self.tokenizer.eos_id, dtype=np.int32)
        if state["packer"]:
            packer.load_state_dict(state["packer"])
        left_over_nL = np.array(state["left_over"] or [], dtype=np.int32).reshape(-1, self.length)
        window, taken = state["window"], state["taken"]
        while True:
            start = {
                "documents": documents.state_dict(),
                "packer": packer.state_dict(),
                "left_over": left_over_nL.tolist(),
                "window": window,
            }
            blocks_nL = self._read_window(documents, packer, left_over_nL)
            usable = len(blocks_nL) // self.micro_size * self.micro_size
            rng = generator(self.seed, "stream", self.rank, window)
            order = torch.randperm(usable, generator=rng).numpy()
            for begin in range(taken * self.micro_size, usable, self.micro_size):
                tokens_mL = blocks_nL[order[begin : begin + self.micro_size]]
                self._state = start | {"taken": begin // self.micro_size + 1}
                yield {"tokens": torch.from_numpy(tokens_mL.astype(np.int64))}
            left_over_nL = blocks_nL[usable:].copy()
            window, taken = window + 1, 0

    def _read_window(self, documents: _Documents, packer: BlockPacker, left_over_nL: np.ndarray) -> np.ndarray:
        parts, count = [left_over_nL], len(left_over_nL)
        while count < self.window_blocks:
            texts = documents.take(READ_DOCUMENTS)
            if self.transform is not None:
                texts = [self.transform(text) for text in texts]
            parts.append(packer.add(self.tokenizer.encode_batch(texts)))
            count += len(parts[-1])
        return np.concatenate(parts)


class StreamingTrainLoader:
    """The engine's loader over a ``PackedStream``; at most one worker process reads ahead.

    One, because the order of documents must not depend on the number of workers; the tokenizer uses all cores anyway.
    """

    def __init__(self, dataset: PackedStream, *, num_workers: int = 0, pin_memory: bool | None = None) -> None:
        self.dataset, self.num_workers = dataset, min(num_workers, 1)
        self._moved = False
        self._loader = StatefulDataLoader(
            dataset,
            batch_size=None,  # the stream yields whole micro-batches
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            generator=generator(dataset.seed, "workers", dataset.rank),  # not torch's global one
        )

    def __iter__(self) -> Iterator[Batch]:
        self._moved = True
        try:
            yield from self._loader
        except DataError as error:
            # A worker's error arrives with its traceback in the text: keep the message.
            raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from error

    def state_dict(self) -> dict:
        return {"num_workers": self.num_workers, **self.dataset.identity(), "loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continues after the saved position.

        Raises:
            CheckpointError: saved with other sizes, seed, tokenizer or number of processes, or with a reading worker
                and now without, or the reverse.
        """
        for name, ours in {"num_workers": self.num_workers, **self.dataset.identity()}.items():
            if state[name] != ours:
                raise CheckpointError(
                    f"The streamed data was saved with {name}={state[name]} and cannot continue with {ours}; use the "
                    "saved value, or start a new run in another run_dir."
                )
        self._loader.load_state_dict(state["loader"])
        self._moved = True

    def seek(self, step: int) -> None:
        """Only to the start, before anything was read.

        Raises:
            CheckpointError: a stream cannot jump.
        """
        if step or self._moved:
            raise CheckpointError(
                f"A streamed dataset cannot jump to step {step}; resume on the number of processes that the run was "
                "saved with, or use a tokenized (not streamed) dataset."
            )
