"""What a run reads: text with a beginning, packed files, mixtures, held-out rows, pairs."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data.tokenizer import ByteTokenizer
from common.errors import ConfigError, DataError
from diffullama.config import DataSection, EvalConfig, ModelSection, ObjectiveConfig, TrainConfig, TrainingConfig
from diffullama.data import DataBuilder, RowsOf, read_weights, split_rows
from diffullama.packed import PackedWriter
from diffullama.pairs import PairDataset, arithmetic_pairs, load_pairs
from diffullama.special_tokens import SpecialTokens, isolate_digits

SPECIAL = SpecialTokens(mask_id=127, bos_id=0, eos_id=0, pad_id=1, sep_id=10)
LENGTH = 16


def builder(tmp_path: Path, *, stage: str = "ddm", special: SpecialTokens = SPECIAL, training=None, **data):
    config = TrainConfig(
        model=ModelSection(path="tiny", length=LENGTH),
        objective=ObjectiveConfig(stage=stage),
        data=DataSection(**{"cache_dir": str(tmp_path / "cache"), "num_workers": 0, **data}),
        training=TrainingConfig(**{"batch_size": 4, "n_iters": 5, **(training or {})}),
        eval=EvalConfig(batch_size=4, micro_batch_size=2),
    )
    return DataBuilder(config=config, tokenizer=ByteTokenizer(), special=special, vocab_size=128)


def first(loader, count: int = 1) -> list[dict]:
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


ONE = {"global_size": 4, "micro_size": 4, "rank": 0, "world_size": 1}


# ---------------------------------------------------------------- text


def test_blocks_begin_with_the_begin_of_text_token_and_hold_the_text_behind_it(tmp_path):
    Path(tmp_path, "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    train, _ = builder(tmp_path, train=f"{tmp_path}/a.txt", valid=None).datasets()
    plain, _ = builder(tmp_path, train=f"{tmp_path}/a.txt", valid=None, bos=False).datasets()
    tokens_BL = train.fetch([0, 1])["tokens"]
    assert tokens_BL.shape == (2, LENGTH)
    assert tokens_BL[:, 0].tolist() == [0, 0]
    assert ByteTokenizer().decode(tokens_BL[:, 1:].flatten()).startswith("the quick brown fox jumps over")
    assert plain.fetch([0])["tokens"][0].tolist() == ByteTokenizer().encode("the quick brown ")
    assert train.rows_per_read > 1


def test_a_stream_begins_its_blocks_alike_and_continues_where_it_stopped(tmp_path):
    Path(tmp_path, "a.jsonl").write_text("\n".join(json.dumps({"text": f"text number {i} " * 9}) for i in range(40)))
    make = builder(tmp_path, train=f"{tmp_path}/a.jsonl", valid=None, streaming=True)
    loader = make.loaders(**ONE).train
    batches = first(loader, 3)
    assert all(batch["tokens"].shape == (4, LENGTH) and not batch["tokens"][:, 0].any() for batch in batches)
    again = make.loaders(**ONE).train
    first(again, 2)
    continued = make.loaders(**ONE).train
    continued.load_state_dict(again.state_dict())
    assert torch.equal(first(continued)[0]["tokens"], batches[2]["tokens"])


def test_held_out_rows_come_from_the_training_data_and_are_not_trained_on(tmp_path):
    Path(tmp_path, "a.txt").write_text("".join(chr(32 + i % 90) for i in range(15 * 40)))
    make = builder(tmp_path, train=f"{tmp_path}/a.txt", valid=None, valid_size=5)
    train, held_out = make.datasets()
    assert (len(train), len(held_out)) == (35, 5)
    assert sorted([*train.rows_n, *held_out.rows_n]) == list(range(40))
    assert list(held_out.rows_n) != list(range(35, 40))
    assert list(make.datasets()[1].rows_n) == list(held_out.rows_n)
    loaders = make.loaders(**ONE)
    assert loaders.rows == 35
    assert loaders.validation.num_samples == 4
    share, _ = split_rows(train, 0.2, seed=0)
    assert len(share) == 28
    with pytest.raises(DataError, match="holds out 35 of 35 rows"):
        split_rows(train, 35, seed=0)


def test_rows_of_a_data_set_can_be_read_in_any_order():
    class Counting:
        def fetch(self, rows):
            return {"tokens": torch.from_numpy(np.asarray(rows))[:, None]}

    assert RowsOf(Counting(), np.array([7, 3, 5])).fetch([2, 0])["tokens"].tolist() == [[5], [7]]


def test_the_masks_id_in_the_text_is_pointed_out(tmp_path, caplog):
    Path(tmp_path, "a.txt").write_text("a rare sign: ~ " * 50)
    caplog.set_level(logging.WARNING)
    special = SpecialTokens(mask_id=ord("~"), bos_id=0, eos_id=0, pad_id=1)
    builder(tmp_path, train=f"{tmp_path}/a.txt", valid=None, special=special).datasets()
    assert f"holds the mask's id {ord('~')}" in caplog.text
    caplog.clear()
    builder(tmp_path, train=f"{tmp_path}/a.txt", valid=None).datasets()
    assert not caplog.text


# ---------------------------------------------------------------- packed files and mixtures


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    for name, token in (("web", 5), ("code", 9)):
        with PackedWriter(tmp_path / name, "train", vocab_size=128, chunk_size=160, sep_token=0) as writer:
            writer.add([token] * 160 * 8)
    return tmp_path


def test_packed_files_are_read_at_the_models_length(packed):
    train, _ = builder(packed, train=f"packed:{packed}/web", valid=None, bos=False).datasets()
    assert train.fetch([0])["tokens"].tolist() == [[5] * LENGTH]
    train, _ = builder(packed, train=f"packed:{packed}/web", valid=None).datasets()
    assert train.fetch([0])["tokens"].tolist() == [[0] + [5] * (LENGTH - 1)]


def test_a_mixture_draws_its_sources_by_weight_for_as_long_as_the_run_takes(packed):
    name = f"mixed:packed:{packed}/web=0.75+packed:{packed}/code=0.25"
    loaders = builder(packed, train=name, valid=None, training={"n_iters": 100}).loaders(**ONE)
    assert loaders.rows == 400
    tokens = torch.cat([batch["tokens"] for batch in first(loaders.train, 100)])
    share = float((tokens[:, 1] == 5).double().mean())
    assert share == pytest.approx(0.75, abs=0.07)
    order = builder(packed, train=name, valid=None, training={"n_iters": 100}).datasets()[0]
    assert torch.equal(tokens, order.fetch(range(400))["tokens"])  # not shuffled a second time


@pytest.mark.parametrize("name", ["mixed:a.txt", "mixed:a.txt=0.5+b.txt", "mixed:a.txt=much", "mixed:=1"])
def test_a_mixture_without_weights_is_refused(name):
    with pytest.raises(ConfigError, match="has no weight; write mixed:NAME=WEIGHT"):
        read_weights(name)


# ---------------------------------------------------------------- pairs


def test_made_up_pairs_are_right_and_differ_between_splits():
    pairs = arithmetic_pairs(200, "train", seed=0)
    assert pairs == arithmetic_pairs(200, "train", seed=0) != arithmetic_pairs(200, "test", seed=0)
    for _, answer in pairs:
        steps, _, result = answer.partition(" #### ")
        for step in steps.split(" "):
            left, sign, right, found = re.fullmatch(r"<<(\d+)([+-])(\d+)=(\d+)>>", step).groups()
            assert int(left) + int(sign + right) == int(found)
        assert result == found


def test_pairs_come_from_a_file_by_the_names_of_its_columns(tmp_path):
    Path(tmp_path, "p.jsonl").write_text('{"question": "2+3?", "answer": "5"}\n{"question": "1+1?", "answer": "2"}\n')
    columns = {"prompt_column": "question", "answer_column": "answer"}
    assert load_pairs(f"{tmp_path}/p.jsonl", "train", **columns) == [("2+3?", "5"), ("1+1?", "2")]
    with pytest.raises(DataError, match=r"data.train=.*p.jsonl has no column instruction, only question, answer"):
        load_pairs(f"{tmp_path}/p.jsonl", "train", prompt_column="instruction", answer_column="answer")
    with pytest.raises(DataError, match="does not exist"):
        load_pairs(f"{tmp_path}/q.jsonl", "train", **columns)


def test_padding_is_learnt_by_diffusion_and_given_to_the_autoregressive_baseline():
    encode, pairs = ByteTokenizer().encode, [("2+3?", "5"), ("a" * 9, "b" * 9)]
    (diffusion, causal) = (
        PairDataset(pairs, encode, SPECIAL, length=LENGTH, learn_padding=learn).fetch([0, 1]) for learn in (True, False)
    )
    assert torch.equal(diffusion["tokens"], causal["tokens"])
    assert diffusion["tokens"][0].tolist() == [0, *encode("2+3?"), 10, *encode("5"), 0] + [1] * 8
    assert diffusion["src_mask"][0].tolist() == [1] * 6 + [0] * 10
    assert causal["src_mask"][0].tolist() == [1] * 6 + [0] * 2 + [1] * 8
    assert torch.equal(diffusion["src_mask"][1], causal["src_mask"][1])  # nothing is padded


def test_an_end_that_is_also_the_padding_is_learnt_once():
    special = SpecialTokens(mask_id=127, bos_id=0, eos_id=0, pad_id=0, sep_id=10)
    data = PairDataset([("2+3?", "5")], ByteTokenizer().encode, special, length=LENGTH, learn_padding=False)
    assert data.fetch([0])["src_mask"][0].tolist() == [1] * 6 + [0] * 2 + [1] * 8


def test_digits_become_tokens_of_their_own_where_the_family_wants_it(tmp_path):
    make = builder(tmp_path, stage="ddm-sft", train="arithmetic:3", valid=None)
    assert isolate_digits(make.tokenizer, "12 a") == make.tokenizer.encode("12 a")  # bytes are single already
    loaders = make.loaders(**ONE)
    assert loaders.rows == 3
    assert set(first(loaders.train)[0]) == {"tokens", "src_mask"}
    assert len(loaders.examples["tokens"]) == 3


@pytest.mark.parametrize("field", ["bos_id", "eos_id", "pad_id"])
def test_pairs_need_special_tokens(field):
    special = SpecialTokens(**{**SPECIAL.to_dict(), field: None})
    with pytest.raises(ConfigError, match=f"the tokenizer has no {field[:-3]} token"):
        PairDataset([("a", "b")], ByteTokenizer().encode, special, length=LENGTH)
