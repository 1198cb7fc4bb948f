"""python -m diffullama.generate: records, prompts, resuming, shares of processes, the released behaviour, errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.data.tokenizer import ByteTokenizer, train_bpe
from common.errors import ConfigError, DataError
from common.generation.sample_file import read_records, texts
from diffullama.generate import main, translate_flags
from diffullama.generate_config import GenerateConfig
from diffullama.generation import build_requests, generate, load, run_events_of
from diffullama.model import DiffusionLM
from diffullama.predictions import PredictionRecord
from diffullama.reference_samplers import sample
from diffullama.requests import Prompt, build_request
from diffullama.sampler import build_sampler
from diffullama.saving import save_model
from diffullama.special_tokens import SpecialTokens, isolate_digits
from tests.diffullama.tiny_models import tiny_lm

MASK, ROWS = 128, 131  # two embedding rows behind the mask that no token has
SPECIAL = SpecialTokens(mask_id=MASK, bos_id=0, eos_id=0, pad_id=1, sep_id=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights and the byte tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_lm(vocab=ROWS, mask_id=MASK, positions=24)
    return save_model(path, model, ByteTokenizer(), SPECIAL, metadata={"max_length": 24})


@pytest.fixture
def config(folder: Path) -> GenerateConfig:
    return GenerateConfig(
        model_path=str(folder),
        num_samples=3,
        batch_size=2,
        diffusion_steps=8,
        model_precision="fp32",
        progress=False,
    )


def tokens_of(config: GenerateConfig) -> list[list[int]]:
    return [record.tokens for record in generate(config).records]


def test_records_hold_tokens_text_and_costs(config: GenerateConfig, tmp_path: Path):
    output = tmp_path / "new" / "texts.jsonl"
    generation = generate(replace(config, output=str(output), prompt="The ", suffix="."))
    records = read_records(output, PredictionRecord)
    assert records == generation.records
    assert [record.index for record in records] == [0, 1, 2]
    for record in records:
        assert len(record.tokens) == 24
        assert record.tokens[0] == SPECIAL.bos_id
        assert max(record.tokens) < MASK
        assert record.text.startswith("The ")
        assert record.text.endswith(".")
        assert record.free == 24 - 6
        assert record.text == ByteTokenizer().decode(record.tokens[1:])
        assert 1 <= record.calls <= 8
        assert record.predict in record.text
        assert record.revealed[:5] == [-1] * 5
        assert max(record.revealed) == record.calls - 1
    assert "network calls per text, expected" in generation.summary()
    assert texts(records).count("=" * 92) == 3
    assert not list(output.parent.glob("*.part*"))


@pytest.mark.parametrize(
    "options",
    [
        {"order": "first_hitting", "topp_temp": None, "top_k": 5},
        {"order": "confidence", "draw": "greedy", "guidance": 1.0, "prompt": "ab"},
        {"order": "entropy", "threshold": 0.1},
        {"order": "margin", "per_call": 4, "logits_temp": 0.0},
        {"order": "left_to_right", "block_length": 6, "diffusion_steps": 2, "cache": "prefix"},
        {"order": "random", "commit": "fixed", "stop": True},
        {"fixed": {"3": "abc", 10: [65]}, "bos": True},
        {"max_new_tokens": 0, "prompt": "abc"},
        {"template": "sft", "prompt": "Q", "max_new_tokens": 5},
        {"engine": "reference"},
        {"engine": "reference", "order": "confidence", "draw": "greedy", "prompt": "ab"},
    ],
)
def test_texts_do_not_depend_on_the_batch(config: GenerateConfig, options: dict):
    config = replace(config, **options)
    one = tokens_of(replace(config, batch_size=1))
    assert one == tokens_of(replace(config, batch_size=8))
    assert one == tokens_of(config)


def test_bf16_runs_every_path(config: GenerateConfig):
    for options in ({}, {"cache": "prefix", "block_length": 6, "order": "confidence", "diffusion_steps": 2}):
        assert generate(replace(config, model_precision="bf16", **options)).rows == 3


def test_each_process_takes_its_share(config: GenerateConfig):
    prompts = replace(config, num_samples=2).read_prompts()
    loaded = load(config, torch.device("cpu"))
    requests = build_requests(config, loaded, prompts)
    sampler = build_sampler(loaded.model, config.sampler_options())
    whole = {row.index: row.tokens_L.tolist() for row in run_events_of(sampler, config, requests, range(6), None)}
    shares: dict[int, list[int]] = {}
    for rank in range(3):
        mine = range(6)[rank::3]
        shares |= {r.index: r.tokens_L.tolist() for r in run_events_of(sampler, config, requests, mine, None)}
    assert shares == whole


def test_prompts_of_a_file_may_differ_in_length(config: GenerateConfig, tmp_path: Path):
    path = tmp_path / "in.jsonl"
    lines = [{"prompt": "ab", "label": "x"}, {"instruction": [70, 71, 72], "suffix": "!", "output": "y"}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    generation = generate(replace(config, prompts=str(path), max_new_tokens=4, num_samples=2))
    assert [record.prompt for record in generation.records] == [0, 1, 0, 1]
    assert [record.label for record in generation.records] == ["x", "y", "x", "y"]
    assert [len(record.tokens) for record in generation.records] == [7, 9, 7, 9]
    assert generation.records[1].text.startswith("FGH")
    more = generate(replace(config, prompts=str(path), max_new_tokens=4, num_samples=3))
    assert [r.tokens for r in more.records[:4]] == [r.tokens for r in generation.records]
    plain = tmp_path / "in.txt"
    plain.write_text("ab\ncd\n")
    assert len(generate(replace(config, prompts=str(plain))).records) == 6


def test_a_run_is_continued_never_overwritten(config: GenerateConfig, tmp_path: Path):
    config = replace(config, output=str(tmp_path / "texts.jsonl"))
    whole = generate(config).records
    lines = Path(config.output).read_text().splitlines(keepends=True)
    Path(config.output).write_text("".join(lines[:2]))
    with pytest.raises(ConfigError, match="resume=true"):
        generate(config)
    resumed = generate(replace(config, resume=True))
    assert resumed.rows == 1
    assert [r.tokens for r in resumed.records] == [r.tokens for r in whole]
    with pytest.raises(ConfigError, match="other options"):
        generate(replace(config, resume=True, logits_temp=0.5))
    assert len(generate(replace(config, overwrite=True, num_samples=1)).records) == 1


def test_the_reference_engine_is_the_released_sampler(config: GenerateConfig):
    config = replace(config, engine="reference", num_samples=2, seed=4)
    model = load(config, torch.device("cpu")).model
    x = torch.zeros(2, 24, dtype=torch.int64)
    expected = sample(model, x, torch.zeros_like(x), 8, "random", temp=0.95, top_p=0.9, seed=4)
    records = generate(config).records
    assert [record.tokens for record in records] == expected.tokens.tolist()
    assert len(records[0].tokens) == 23  # the column of the junk token is dropped


def test_a_parent_that_was_never_adapted_is_pointed_out(config: GenerateConfig, tmp_path: Path, caplog):
    generate(config)
    assert "never adapted" not in caplog.text
    lm = tiny_lm(vocab=ROWS, mask_id=MASK, positions=24).lm
    parent = save_model(tmp_path / "parent", DiffusionLM(lm, None).eval(), ByteTokenizer(), SPECIAL)
    generate(replace(config, model_path=str(parent), length=8))
    assert "never adapted" in caplog.text and "mode=causal" in caplog.text


def test_prompts_of_the_finetuning_layout_isolate_digits_where_the_family_does():
    tokenizer = train_bpe(["2024 2024 2024 and 1024 1024"] * 8, 270)
    shape = {"vocab_size": 300, "length": 20, "template": "sft"}
    special = SpecialTokens(mask_id=299, bos_id=0, eos_id=0, pad_id=0, sep_id=5)
    for digits in (True, False):
        request = build_request(Prompt("2024 and 7"), special, tokenizer, digits=digits, **shape)
        prompt = isolate_digits(tokenizer, "2024 and 7") if digits else tokenizer.encode("2024 and 7")
        assert request.tokens_L[~request.free_L].tolist() == [0, *prompt, 5]


def test_texts_end_where_they_are_cut(config: GenerateConfig):
    stops = list(range(3, 100))
    records = generate(replace(config, order="left_to_right", stop=stops, num_samples=4)).records
    assert any(-2 in record.revealed for record in records)
    for record in records:
        skipped = [token for token, call in zip(record.tokens, record.revealed) if call == -2]
        assert set(skipped) <= {SPECIAL.pad_id}
        written = [token for token, call in zip(record.tokens, record.revealed) if call >= 0]
        end = next((place for place, token in enumerate(written) if token in stops), len(written))
        assert record.predict == ByteTokenizer().decode(written[:end])


def test_ids_without_a_text_are_never_written(config: GenerateConfig):
    records = generate(replace(config, num_samples=40, logits_temp=50.0, topp_temp=None)).records
    written = {token for record in records for token in record.tokens}
    assert max(written) < MASK
    assert len(written) > 100


def test_the_animation_holds_every_text(config: GenerateConfig, tmp_path: Path):
    path = tmp_path / "pages" / "page.html"
    generate(replace(config, animation=str(path), animation_rows=2, prompt="Hi"))
    page = path.read_text()
    assert page.count("<section>") == 2
    assert "http:" not in page
    assert "https:" not in page


def test_flags_of_the_released_scripts_are_understood():
    flags = [
        "--model_name",
        "m",
        "--diffusion_steps=32",
        "--logits_temp",
        "0.9",
        "--shift",
        "True",
        "a=8",
        "--help",
    ]
    assert translate_flags(flags) == [
        "model_path=m",
        "diffusion_steps=32",
        "logits_temp=0.9",
        "shift=True",
        "a=8",
        "--help",
    ]
    assert translate_flags(["--topp_temp", "--shift"]) == ["--topp_temp", "--shift"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_path": ""}, "model_path is empty"),
        ({"order": "upwards"}, "choose one of random, first_hitting"),
        ({"engine": "fast"}, "choose one of event, reference"),
        ({"engine": "reference", "order": "entropy"}, "no released sampler"),
        ({"engine": "reference", "guidance": 1.0}, "needs engine=event"),
        ({"engine": "reference", "diffusion_steps": None}, "needs engine=event"),
        ({"diffusion_steps": 0}, "diffusion_steps=0 is too small; it must be at least 1"),
        ({"logits_temp": -0.5}, "logits_temp=-0.5 is too small; it must be at least 0"),
        ({"attn_implementation": "flash_attention_2", "model_precision": "fp32"}, "set model_precision=bf16"),
        ({"topp_temp": 0.0}, r"topp_temp=0.0 must lie in \(0, 1\]"),
        ({"top_k": 3}, "topp_temp=null"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"length": 8, "max_new_tokens": 2}, "exclude each other"),
        ({"prompts": "x.txt", "prompt": "a"}, "excludes prompt"),
        ({"overwrite": True, "resume": True}, "contradict"),
        ({"cache": "prefix"}, "block_length"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        GenerateConfig(**{"model_path": "nowhere", **change})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"length": 25}, ConfigError, "exceeds the model's 24"),
        ({"prompt": "x" * 30}, ConfigError, "do not fit into length=24"),
        ({"prompt": [ROWS]}, ConfigError, f"ids run from 0 to {ROWS - 1}"),
        ({"bos": False}, ConfigError, "position 0 is not given"),
        ({"prompts": "missing.jsonl"}, DataError, "cannot be read"),
        ({"suffix": "end", "cache": "prefix", "block_length": 4}, ConfigError, "cache=none to infill"),
        ({"stop": [ROWS]}, ConfigError, "outside the vocabulary"),
        ({"mask_token_id": 0}, ConfigError, "mask"),
    ],
)
def test_what_does_not_fit_the_model_is_named(config: GenerateConfig, change: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        generate(replace(config, **change))


@pytest.mark.parametrize(
    "content, message",
    [("", "holds no prompt"), ('{"text": "a"}', "none of the fields"), ("not json", "line 1 is not JSON")],
)
def test_a_damaged_prompt_file_is_named(config: GenerateConfig, tmp_path: Path, content: str, message: str):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        generate(replace(config, prompts=str(path)))


def test_the_command_prints_texts_and_costs(folder: Path, monkeypatch, capsys):
    arguments = [f"model_path={folder}", "--diffusion_steps", "4", "length=12", "num_samples=2", "progress=false"]
    monkeypatch.setattr("sys.argv", ["generate", *arguments])
    assert main() == 0
    shown = capsys.readouterr()
    assert shown.out.count("=" * 92 + "\n") == 2
    assert "2 texts in" in shown.err
    assert "network calls per text, expected" in shown.err


def test_errors_of_the_command_are_one_line_and_exit_code_two(folder: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate", f"model_path={folder}", "ordr=random"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "did you mean order?" in capsys.readouterr().err
