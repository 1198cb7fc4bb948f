"""Streams: packed like a tokenized corpus, disjoint over ranks, resumed exactly, with and without a reading worker."""

import itertools
import json

import pytest
import torch

from common.data.hub import stream_of_files
from common.data.local_files import LocalFiles, find_files
from common.data.packing import pack
from common.data.streaming import PackedStream, StreamingTrainLoader
from common.data.tokenizer import ByteTokenizer
from common.errors import CheckpointError, ConfigError, DataError

BYTES = ByteTokenizer()
TEXTS = [f"document {i}: {'x' * (i % 11)}" for i in range(60)]
LENGTH, MICRO = 8, 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Sixty documents in four jsonl files."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        records = [json.dumps({"text": text}) for text in TEXTS[shard * 15 : shard * 15 + 15]]
        (folder / f"{shard}.jsonl").write_text("\n".join(records) + "\n")
    return folder


def stream(folder):
    return stream_of_files(LocalFiles(tuple(find_files(str(folder)))))


def loader(folder, workers=0, **options):
    options = {"tokenizer": BYTES, "length": LENGTH, "micro_size": MICRO, "seed": 5, "window_blocks": 40} | options
    return StreamingTrainLoader(PackedStream(stream(folder), **options), num_workers=workers)


def take(source, count):
    return [batch["tokens"].tolist() for batch in itertools.islice(source, count)]


def test_each_window_is_a_permutation_of_consecutive_blocks(tmp_path):
    texts = [f"text {i:02d}" for i in range(60)]  # with end-of-text one block each, so that a window is one epoch
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    got = [tuple(row) for batch in take(loader(tmp_path), 30) for row in batch]
    blocks = [tuple(row) for row in pack(BYTES.encode_batch(texts), LENGTH, BYTES.eos_id)[0].tolist()]
    assert sorted(got[:60]) == sorted(got[60:]) == sorted(blocks)
    assert len({tuple(blocks), tuple(got[:60]), tuple(got[60:])}) == 3


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(shards):
    assert take(loader(shards), 30) == take(loader(shards), 30) != take(loader(shards, seed=6), 30)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("consumed", [1, 9, 25, 70, 200])
def test_a_saved_position_continues_exactly(shards, workers, consumed):
    whole = take(loader(shards), consumed + 40)
    first = loader(shards, workers)
    assert take(first, consumed) == whole[:consumed]
    state = json.loads(json.dumps(first.state_dict())) if workers == 0 else first.state_dict()
    second = loader(shards, workers)
    second.load_state_dict(state)
    assert take(second, 40) == whole[consumed:]


def test_a_reading_worker_changes_nothing_and_more_workers_are_one(shards):
    assert take(loader(shards, 1), 60) == take(loader(shards, 4), 60) == take(loader(shards), 60)


def test_ranks_read_different_documents_and_together_all(shards):
    def documents_of(rank, world):
        source = PackedStream(
            stream(shards), tokenizer=BYTES, length=1, micro_size=1, seed=0, rank=rank, world_size=world
        )
        return {record["text"] for record in source.stream}

    for world in (2, 3, 4):
        parts = [documents_of(rank, world) for rank in range(world)]
        assert set().union(*parts) == set(TEXTS)
        assert sum(map(len, parts)) == len(TEXTS)


def test_ranks_shuffle_differently(shards):
    pair = [take(loader(shards, rank=rank, world_size=2), 20) for rank in range(2)]
    assert pair[0] != pair[1]


def test_the_transform_is_applied_and_another_column_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": "abcdefg"}) + "\n" for _ in range(50)))
    batch = next(iter(loader(tmp_path, fields=("text", "content"), transform=str.upper)))
    assert batch["tokens"].tolist() == [[*b"ABCDEFG", 0]] * MICRO
    assert batch["tokens"].dtype == torch.int64


@pytest.mark.parametrize("unit", ["file", "paragraph", "line", "full_line"])
def test_streamed_text_files_have_the_documents_of_tokenized_ones(tmp_path, unit):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.txt").write_text("four\n")
    files = LocalFiles(tuple(find_files(str(tmp_path))), unit=unit)
    streamed = [record["text"].strip() for record in stream_of_files(files)]
    assert [text for text in streamed if text] == [text.strip() for text in files.documents() if text.strip()]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_column_is_one_clear_message_also_from_a_worker(shards, workers):
    with pytest.raises(DataError) as error:
        take(loader(shards, workers, fields=("body",)), 1)
    assert "has no field 'body'; its fields are text" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_damaged_file_is_a_data_error_with_the_place(tmp_path):
    good = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(good)
    (tmp_path / "b.jsonl").write_text('{"text": "unfin')
    with pytest.raises(DataError, match="cannot be read after record .* of epoch 0"):
        take(loader(tmp_path, window_blocks=1000), 300)


def test_a_rank_without_documents_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "only one"}\n')
    with pytest.raises(DataError, match="at least as many documents as there are processes"):
        take(loader(tmp_path, rank=1, world_size=2), 1)


def test_a_stream_refuses_to_jump_and_to_continue_with_other_settings(shards):
    source = loader(shards)
    source.seek(0)
    with pytest.raises(CheckpointError, match="cannot jump to step 3"):
        source.seek(3)
    take(source, 2)
    with pytest.raises(CheckpointError, match="saved with seed=5 and cannot continue with 6"):
        loader(shards, seed=6).load_state_dict(source.state_dict())
    with pytest.raises(CheckpointError, match="saved with num_workers=0 and cannot continue with 1"):
        loader(shards, 1).load_state_dict(source.state_dict())


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generator_is_left_alone(shards, workers):
    before = torch.random.get_rng_state()
    take(loader(shards, workers), 3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["length", "micro_size", "window_blocks"])
def test_sizes_below_one_are_refused(shards, name):
    with pytest.raises(ConfigError, match=f"{name}=0"):
        loader(shards, **{name: 0})
