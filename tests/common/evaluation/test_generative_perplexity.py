"""Generative perplexity under a small causal model in place of GPT-2 large, and the diversity of samples."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.errors import DataError
from common.evaluation.diversity import distinct_n, diversity, unigram_entropy
from common.evaluation.generative_perplexity import Scorer, generative_perplexity, load_scorer, score, snapshot_scorer
from common.evaluation.samples import read_samples
from common.testing.golden import fill, load_cases


def tiny_gpt2(seed: int = 21, **options) -> GPT2LMHeadModel:
    settings = {"vocab_size": 20, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2} | options
    model = GPT2LMHeadModel(GPT2Config(**settings, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    fill(model.transformer, seed)
    return model.eval()


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny_gpt2(), "tiny", 20, 64)


@pytest.fixture
def samples() -> list[list[int]]:
    return torch.randint(0, 20, (7, 12), generator=torch.Generator().manual_seed(0)).tolist()


def test_golden(golden_dir):
    case = load_cases("radd", golden_dir)["generative_perplexity"]
    model = tiny_gpt2(case.config["weights_seed"], **case.config["gpt2"])
    tokens_BL = case.arrays["in_x"].tolist()
    scores = generative_perplexity(
        Scorer(model, "tiny", model.config.vocab_size, 64), tokens_BL, batch_size=case.config["batch"]
    )
    case.check("out_seq_nll", [nll / count for nll, count in zip(scores.nll, scores.count)])
    metrics = {metric.name: metric.value for metric in scores.metrics()}
    case.check("out_ppl", metrics["perplexity"])
    case.check("out_ppl_pooled", metrics["perplexity_pooled"])
    case.check("out_entropy", [unigram_entropy(tokens_L) for tokens_L in tokens_BL])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_batch_size_and_a_partial_last_batch_change_nothing(scorer, samples, batch_size):
    whole = score(scorer, samples, batch_size=7)
    found = score(scorer, samples, batch_size=batch_size)
    assert found.keys() == whole.keys() == set(range(7))
    assert all(found[i] == pytest.approx(whole[i], rel=1e-5) for i in whole)


def test_padding_does_not_leak_into_shorter_sequences(scorer, samples):
    uneven = [tokens[: 2 + index] for index, tokens in enumerate(samples)]
    together = score(scorer, uneven, batch_size=7)
    for index, tokens in enumerate(uneven):
        assert together[index] == pytest.approx(score(scorer, [tokens])[0], rel=1e-5)
    assert score(scorer, uneven, chosen=[5, 2]).keys() == {2, 5}


def test_both_definitions_have_standard_errors(scorer, samples):
    mean, pooled = generative_perplexity(scorer, samples).metrics()
    values = torch.tensor(generative_perplexity(scorer, samples).sequence_perplexities, dtype=torch.float64)
    assert mean.value == pytest.approx(float(values.mean()))
    assert mean.standard_error == pytest.approx(float(values.std()) / math.sqrt(7))
    assert pooled.value < mean.value and 0 < pooled.standard_error < pooled.value
    single = list(generative_perplexity(scorer, samples[:1]).metrics())
    assert single[0].standard_error is None and single[0].value == pytest.approx(single[1].value)


@pytest.mark.parametrize(
    "tokens, message",
    [([3, 20], "holds id 20"), ([3, -1], "holds id -1"), ([3], "at least 2"), ([1] * 65, "reads at most 64")],
)
def test_bad_samples_are_named(scorer, tokens, message):
    with pytest.raises(DataError, match=f"sample 1.*{message}"):
        score(scorer, [[1, 2], tokens])


def test_scorer_loads_from_a_folder_and_says_how_without_the_hub(tmp_path, samples):
    tiny_gpt2().save_pretrained(tmp_path / "scorer")
    loaded = load_scorer(str(tmp_path / "scorer"))
    assert (loaded.vocab_size, loaded.max_length) == (20, 64)
    sum_and_count = snapshot_scorer(str(tmp_path / "scorer"), batch_size=3)(torch.device("cpu"))
    total, count = sum_and_count(torch.tensor(samples))
    assert count == 7 and total == pytest.approx(sum(generative_perplexity(loaded, samples).sequence_perplexities))
    with pytest.raises(DataError, match="give its path"):
        load_scorer("gpt2-of-nobody")
    with pytest.raises(DataError, match="does not exist"):
        load_scorer(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="needs config.json"):
        load_scorer(str(tmp_path / "empty"))


def test_diversity_of_known_sequences():
    assert unigram_entropy([1, 1, 1]) == 0
    assert unigram_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(2 / 4)
    assert math.isnan(distinct_n([[1]], 2))
    metrics = {metric.name: metric for metric in diversity([[1, 2], [1, 1]])}
    assert metrics["unigram_entropy"].value == pytest.approx(math.log(2) / 2)
    assert metrics["unigram_entropy"].standard_error == pytest.approx(math.log(2) / 2)
    with pytest.raises(DataError, match="no tokens"):
        unigram_entropy([])
    with pytest.raises(DataError, match="no sequences"):
        list(diversity([]))


def test_samples_are_read_and_bad_files_are_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"tokens": [1, 2], "text": "ab", "calls": 3}\n\n{"text": "c"}\n')
    first, second = read_samples(tmp_path)
    assert (first.tokens, first.text, second.tokens, second.text) == ([1, 2], "ab", [], "c")
    assert len(read_samples(path, limit=1)) == 1
    for content, message in [
        (b"", "is empty"),
        (b"{", "line 1: it is not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "list found"),
        (b'{"tokens": ["a"]}', "must be a list of integers"),
        (b'{"calls": 1}', "neither"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_samples(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_samples(tmp_path / "absent.jsonl")
