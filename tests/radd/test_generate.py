"""python -m radd.generate: records, given text, resuming, processes, errors."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.checkpoint import export_weights
from common.data.tokenizer import ByteTokenizer
from common.errors import ConfigError, DataError
from common.generation.given import read_fixed
from common.generation.sample_file import SampleFile, read_records, texts
from common.testing.golden import fill
from radd.generation import GenerateConfig, generate
from radd.model import RADD, ModelConfig

TOKENS, LENGTH = 128, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with random weights and the byte tokenizer."""
    proportions = {"hidden_size": 16, "n_blocks": 1, "n_heads": 2, "length": LENGTH, "dropout": 0.0}
    model = fill(RADD(ModelConfig(**proportions), TOKENS), 1, skip=("rotary_emb.inv_freq",))
    path = tmp_path_factory.mktemp("export")
    config = {"tokens": TOKENS, "model": {"name": "tiny", **proportions}, "noise": {"type": "loglinear"}}
    ByteTokenizer().save(path)
    export_weights(path, model.state_dict(), config, "# tiny")
    return path


@pytest.fixture
def config(folder: Path) -> GenerateConfig:
    return GenerateConfig(model_path=str(folder), batch_size=3, num_samples=5, steps=8, progress=False)


def tokens_of(config: GenerateConfig) -> list[list[int]]:
    return [record.tokens for record in generate(config).records]


def test_records_hold_tokens_text_and_costs(config: GenerateConfig, tmp_path: Path):
    output = tmp_path / "new" / "texts.jsonl"
    generation = generate(replace(config, output=str(output), prefix="The ", suffix="."))
    records = read_records(output)
    assert records == generation.records
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    for record in records:
        assert len(record.tokens) == LENGTH
        assert record.text.startswith("The ")
        assert record.text.endswith(".")
        assert record.text == ByteTokenizer().decode(record.tokens)
        assert record.free == LENGTH - 5
        assert 1 <= record.calls <= 8
        assert record.steps == 8
        assert record.seconds >= 0
    assert set(json.loads(output.read_text().splitlines()[0])) >= {"tokens", "text", "steps", "calls", "seed"}
    assert "expected" in generation.summary()
    assert texts(records).count("=" * 92) == 5
    assert not list(output.parent.glob("*.part*"))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "euler"},
        {"sampler": "stepwise", "precision": "float16-compat"},
        {"method": "first_hitting", "strategy": "top_p", "strategy_para": 0.9},
        {"method": "ordered", "order": "backward", "strategy": "top_k", "strategy_para": 5},
        {"method": "ordered", "order": json.dumps(list(range(LENGTH)))},
        {"method": "parallel", "threshold": 0.2},
        {"method": "parallel", "selection": "entropy", "per_call": 5, "block_length": 10},
        {"block_length": 8, "steps": 2, "temperature": 0.5},
        {"length": 40, "fixed": {"30": "abc", 3: [65, 66], 0: 67}},
        {"model_precision": "bf16"},
    ],
)
def test_every_method_fills_the_text_whatever_the_batch(config: GenerateConfig, options: dict):
    config = replace(config, **options)
    tokens = tokens_of(config)
    assert all(0 <= token < TOKENS for row in tokens for token in row)
    assert all(len(row) == (config.length or LENGTH) for row in tokens)
    if config.model_precision == "fp32":
        assert tokens == tokens_of(replace(config, batch_size=1))
    if config.fixed:
        assert all(row[:1] + row[3:5] + row[30:33] == [67, 65, 66, 97, 98, 99] for row in tokens)


def test_a_tokenizer_can_be_named(config: GenerateConfig):
    assert generate(replace(config, tokenizer="byte")).records[0].text is not None
    with pytest.raises(DataError, match="no-such-folder"):
        generate(replace(config, tokenizer="./no-such-folder"))


def test_more_texts_or_another_seed(config: GenerateConfig):
    assert tokens_of(replace(config, num_samples=2)) == tokens_of(config)[:2]
    assert tokens_of(replace(config, seed=1)) != tokens_of(config)


def test_an_existing_output_is_kept_continued_or_replaced(config: GenerateConfig, tmp_path: Path):
    output = tmp_path / "texts[1].jsonl"
    config = replace(config, output=str(output))
    whole = generate(config).records
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="resume=true to continue it, overwrite=true to replace it"):
        generate(config)
    assert output.read_bytes() == before
    # an interrupted run: two complete lines in the output, one complete and one cut line in a part file
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:2]))
    part = Path(f"{output}.part3")
    part.write_text(lines[3] + lines[4][:40])
    resumed = generate(replace(config, resume=True))
    assert resumed.rows == 2
    assert [r.tokens for r in resumed.records] == [r.tokens for r in whole]
    assert resumed.records[0] == whole[0]
    assert not part.exists()
    assert generate(replace(config, resume=True)).rows == 0
    assert len(generate(replace(config, resume=True, num_samples=7)).records) == 7
    with pytest.raises(ConfigError, match="other options"):
        generate(replace(config, resume=True, seed=9))
    assert len(generate(replace(config, overwrite=True, num_samples=1)).records) == 1


def test_rows_of_an_interrupted_run_are_not_lost(config: GenerateConfig, tmp_path: Path, monkeypatch):
    config = replace(config, output=str(tmp_path / "texts.jsonl"), batch_size=1)
    append = SampleFile.append

    def fail_at_three(self: SampleFile, record) -> None:
        if record.index == 3:
            raise KeyboardInterrupt
        append(self, record)

    monkeypatch.setattr(SampleFile, "append", fail_at_three)
    with pytest.raises(KeyboardInterrupt):
        generate(config)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"exists in part \(texts.jsonl.part0\)"):
        generate(config)
    assert generate(replace(config, resume=True)).rows == 2


def test_a_damaged_output_is_named(config: GenerateConfig, tmp_path: Path):
    output = tmp_path / "texts.jsonl"
    output.write_text('{"index": 1}\nnot json\n')
    with pytest.raises(DataError, match="line 1 is no sampled text"):
        generate(replace(config, output=str(output), resume=True))
    with pytest.raises(ConfigError, match="is a folder"):
        generate(replace(config, output=str(tmp_path)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "analytic"}, "choose one of tweedie, euler, ordered, first_hitting"),
        ({"strategy": "top-p"}, "Did you mean 'top_p'"),
        ({"strategy": "top_p", "strategy_para": 2}, r"\(0, 1\]"),
        ({"strategy": "top_k", "strategy_para": 0}, "from 1"),
        ({"strategy": "top_k", "strategy_para": 129}, "from 1 to 128"),
        ({"steps": 0}, "at least 1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"length": 0}, "length=0"),
        ({"prefix": "x" * 20, "suffix": "y" * 5}, "do not fit into length=24"),
        ({"prefix": [128]}, "ids run from 0 to 127"),
        ({"suffix": ["a"]}, "list of ids"),
        ({"fixed": "{3: 1}"}, "is not JSON"),
        ({"fixed": {"x": 1}}, "not a position"),
        ({"fixed": {24: 1}}, r"outside 0\.\.23"),
        ({"fixed": {1: [5, 6], 2: 7}}, "given twice"),
        ({"fixed": [1, 2]}, "must map positions"),
        ({"method": "ordered", "order": "upwards"}, "choose one of random"),
        ({"method": "ordered", "order": [0, 1, 2]}, "3 positions, but length=24"),
        ({"method": "ordered", "order": [0] * 24}, "not a permutation"),
        ({"method": "ordered", "order": [list(range(24))]}, "1 rows for num_samples=5"),
        ({"method": "parallel", "per_call": 2, "threshold": 0.5}, "exactly one"),
        ({"precision": "float16-compat"}, "sampler=stepwise"),
        ({"overwrite": True, "resume": True}, "contradict"),
        ({"temperature": -1}, "at least 0"),
        ({"model_path": ""}, "model_path is empty"),
    ],
)
def test_bad_input_is_named_with_what_would_work(config: GenerateConfig, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        generate(replace(config, **options))


def test_orders_and_fixed_tokens_can_come_from_files(tmp_path: Path, config: GenerateConfig):
    path = tmp_path / "given.json"
    path.write_text('{"2": "ab"}')
    assert read_fixed(str(path), ByteTokenizer()) == {2: 97, 3: 98}
    order = tmp_path / "order.json"
    order.write_text(json.dumps(list(range(LENGTH))[::-1]))
    assert tokens_of(replace(config, method="ordered", order=str(order))) == tokens_of(
        replace(config, method="ordered", order="backward")
    )
    with pytest.raises(DataError, match="cannot be read"):
        read_fixed(str(tmp_path / "none.json"), ByteTokenizer())
    with pytest.raises(ConfigError, match="no tokenizer"):
        read_fixed({1: "a"}, None)


def run_command(arguments: list[str], processes: int = 1) -> subprocess.CompletedProcess:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, "-m", "radd.generate", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_write_what_one_writes(folder: Path, tmp_path: Path):
    shared = [f"model_path={folder}", "num_samples=5", "steps=6", "batch_size=2", "progress=false"]
    one = run_command([*shared, f"output={tmp_path / 'one.jsonl'}", "prefix=Hello"])
    two = run_command([*shared, f"output={tmp_path / 'two.jsonl'}", "prefix=Hello"], processes=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert one.stdout == two.stdout
    assert one.stdout.count("=" * 92 + "\n") == 5
    assert "network calls per text, expected" in one.stderr
    records = [read_records(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
    assert [r.tokens for r in records[0]] == [r.tokens for r in records[1]]


def test_errors_are_one_line_and_exit_code_two(folder: Path):
    done = run_command([f"model_path={folder}", "steps=0"])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "steps=0 must be an integer of at least 1" in done.stderr
    assert done.stdout == ""
