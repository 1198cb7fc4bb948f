"""The harness's three request types over a table-like denoiser, and its command line over a saved model."""

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from common.errors import ConfigError
from common.evaluation.masked_model import MaskedLanguageModel, find_loader, load_masked_model

MASK = 128


class Bigrams:
    """Predicts each masked byte from its nearest visible left neighbour; a fixed alphabet cycle is the likeliest."""

    def __init__(self) -> None:
        self.largest = 0
        table = torch.randn(129, 128, generator=torch.Generator().manual_seed(0))
        for byte in range(97, 122):
            table[byte, byte + 1] = 8.0  # a -> b -> c ...
        self.table = torch.cat([table, torch.full((129, 1), -torch.inf)], dim=1).log_softmax(-1)

    def __call__(self, tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
        self.largest = max(self.largest, len(tokens_RL))
        row_P, position_P = where_RL.nonzero(as_tuple=True)
        left_P = torch.where(position_P > 0, tokens_RL[row_P, (position_P - 1).clamp(min=0)], MASK)
        return self.table[left_P]


@pytest.fixture
def masked() -> MaskedLanguageModel:
    return MaskedLanguageModel(Bigrams(), MASK, 24, ByteTokenizer(), torch.device("cpu"), "bigrams")


@pytest.fixture
def build(masked) -> Callable:
    from common.evaluation.lm_eval import DiffusionLM

    return lambda **options: DiffusionLM(pretrained=masked, **options)


def request(kind: str, *arguments) -> object:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def exact(denoise: Bigrams, context: str, continuation: str) -> float:
    """The bound by all orders of revealing the continuation."""
    x_L = torch.tensor(ByteTokenizer().encode(context + continuation))
    positions = list(range(len(context), len(context) + len(continuation)))
    total, orders = 0.0, list(itertools.permutations(positions))
    for order in orders:
        z_L = x_L.clone()
        z_L[positions] = MASK
        for position in order:
            where_L = torch.zeros(len(x_L), dtype=torch.bool)
            where_L[position] = True
            total += float(denoise(z_L[None], where_L[None])[0, x_L[position]])
            z_L[position] = x_L[position]
    return total / len(orders)


def test_likelihood_is_exact_for_short_continuations_and_close_for_longer_ones(build, masked):
    pairs = [("xa", "b"), ("xa", "bc"), ("qq", "zab"), ("a", "bcde")]
    found = build(draws=16).loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (value, _), pair in zip(found, pairs):
        assert value == pytest.approx(exact(masked.denoise, *pair), rel=1e-5)
    pair = ("a", "bcqz")
    values = [
        build(draws=8, seed=seed).loglikelihood([request("loglikelihood", *pair)], disable_tqdm=True)[0][0]
        for seed in range(100)
    ]
    spread = torch.tensor(values, dtype=torch.float64)
    assert abs(float(spread.mean()) - exact(masked.denoise, *pair)) < 4 * float(spread.std()) / 10
    assert float(spread.std()) > 0


def test_greedy_flag_follows_confident_decoding_and_can_be_switched_off(build):
    requests = [request("loglikelihood", "xa", "bcd"), request("loglikelihood", "xa", "bcx")]
    assert [flag for _, flag in build().loglikelihood(requests, disable_tqdm=True)] == [True, False]
    assert not any(flag for _, flag in build(is_greedy="none").loglikelihood(requests, disable_tqdm=True))


def test_answers_do_not_depend_on_the_batch_or_on_the_other_requests(build):
    requests = [request("loglikelihood", "abc"[: 1 + i % 3], "hello world"[: 5 + i % 4]) for i in range(9)]
    whole = build(draws=10, batch_size=64).loglikelihood(requests, disable_tqdm=True)
    small = build(draws=10, batch_size=3)
    found = small.loglikelihood(requests[::-1], disable_tqdm=True)[::-1]
    alone = [build(draws=10).loglikelihood([one], disable_tqdm=True)[0] for one in requests]
    for other in (found, alone):
        assert [flag for _, flag in other] == [flag for _, flag in whole]
        assert [value for value, _ in other] == pytest.approx([value for value, _ in whole], rel=1e-5)
    assert found[0] == found[0] and small.masked.denoise.largest <= 64


def test_long_requests_fit_the_window_and_empty_contexts_work(build):
    model = build(draws=4, batch_size=32)
    for context, continuation in [("a" * 50, "bcd"), ("", "abc"), ("ab", "c" * 60)]:
        ((value, _),) = model.loglikelihood([request("loglikelihood", context, continuation)], disable_tqdm=True)
        assert -math.inf < value < 0
    windows = list(model._windows(list(range(5)), list(range(60))))
    assert all(len(window.tokens) <= 24 for window in windows)
    assert [token for window in windows for token in window.tokens[window.visible :]] == list(range(60))


def test_rolling_likelihood_scores_every_token_once(build, masked):
    text = "abcdefghijklmnopqrstuvwxyz abc" * 2
    (value,) = build(draws=64).loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    # this denoiser's bound per token, by windows of 23 tokens after one of context
    assert -math.log(129) * len(text) * 3 < value < 0
    short = build(draws=64).loglikelihood_rolling([request("loglikelihood_rolling", "abc")], disable_tqdm=True)
    assert short[0] == pytest.approx(exact(masked.denoise, "\0", "abc"), rel=1e-5)
    assert build().loglikelihood_rolling([request("loglikelihood_rolling", "")], disable_tqdm=True) == [0.0]


def test_generation_fills_greedily_and_stops_at_the_stop_string(build):
    options = {"until": ["h"], "max_gen_toks": 10, "do_sample": False}
    texts = build(batch_size=2).generate_until(
        [request("generate_until", context, options) for context in ("xa", "xxc", "a" * 40)], disable_tqdm=True
    )
    assert texts == ["bcdefg", "defg", "bcdefg"]


def test_sampled_generation_is_repeatable_and_differs_between_repeats(build):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_k": 50}
    requests = [request("generate_until", context, options) for context in ("xa", "xa", "xb")]
    first = build(batch_size=8).generate_until(requests, disable_tqdm=True)
    again = build(batch_size=1).generate_until([requests[2], *requests[:2]], disable_tqdm=True)
    assert again == [first[2], *first[:2]]
    assert first[0] != first[1]
    assert first != build(seed=1).generate_until(requests, disable_tqdm=True)
    blocks = build(gen_block=4, gen_steps=2).generate_until(requests[:1], disable_tqdm=True)
    assert len(blocks[0]) > 0


# ---------------------------------------------------------------- tokenizers of the hub


def hub_tokenizer(*, adds_bos: bool, merges: bool = False) -> HuggingFaceTokenizer:
    """Characters as tokens; LLaMA's kind puts a beginning-of-text token before every text, Qwen's has none. With
    ``merges``, "a" and a following "b" become one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = ["</s>", *(["<s>"] if adds_bos else []), *"abcdefghijklmnopqrstuvwxyz ."]
    vocabulary = {character: index for index, character in enumerate(characters)}
    if merges:
        vocabulary["ab"] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")] if merges else []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("\n", "isolated"), decoders.Fuse()
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return HuggingFaceTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>" if adds_bos else None)
    )


def spelled(tokenizer: HuggingFaceTokenizer, **options) -> object:
    """The adapter over a denoiser that gives every token the same probability; 40 ids, the last one the mask."""
    from common.evaluation.lm_eval import DiffusionLM

    def denoise(tokens_RL: Tensor, where_RL: Tensor) -> Tensor:
        assert not where_RL[:, 0].any(), "the first position has no prediction in a shifted model"
        log_probs_PV = torch.full((int(where_RL.sum()), 40), -math.log(39))
        log_probs_PV[:, 39] = -torch.inf
        return log_probs_PV

    model = MaskedLanguageModel(denoise, 39, 24, tokenizer, torch.device("cpu"))
    return DiffusionLM(pretrained=model, draws=4, is_greedy="none", **options)


def test_texts_begin_as_their_tokenizer_begins_them():
    llama, qwen = spelled(hub_tokenizer(adds_bos=True)), spelled(hub_tokenizer(adds_bos=False))
    assert llama.prefix_token_id == 1 and qwen.prefix_token_id == qwen.eot_token_id == 0
    assert llama.tok_encode("ab")[0] == 1 and llama.tok_encode("ab", add_special_tokens=False)[0] != 1
    assert llama.tok_encode("<s>ab").count(1) == 1  # not twice
    assert qwen.tok_encode("ab") == qwen.tok_encode("ab", add_special_tokens=False)
    context, continuation = llama._encode_pair("ab ", "cd")
    assert context == llama.tok_encode("ab")
    assert continuation == llama.tok_encode(" cd", add_special_tokens=False)  # the space goes to the continuation


@pytest.mark.parametrize("adds_bos", [True, False])
def test_there_is_always_a_token_of_context(adds_bos):
    """Empty contexts, contexts of spaces, contexts and continuations longer than the window."""
    model = spelled(hub_tokenizer(adds_bos=adds_bos))
    pairs = [("", "abc"), (" ", "abc"), ("a" * 60, "b"), ("ab", "c" * 60), ("", "c" * 60)]
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    lengths = [3, 4, 1, 60, 60]
    assert [value for value, _ in found] == pytest.approx([-count * math.log(39) for count in lengths], rel=1e-5)
    texts = [request("loglikelihood_rolling", text) for text in ("abc", "d" * 70)]
    rolling = model.loglikelihood_rolling(texts, disable_tqdm=True)
    assert rolling == pytest.approx([-3 * math.log(39), -70 * math.log(39)], rel=1e-5)
    options = {"until": ["."], "max_gen_toks": 30}
    assert len(model.generate_until([request("generate_until", "", options)], disable_tqdm=True)) == 1


def test_long_contexts_and_long_answers_share_the_window(build, caplog):
    model = build()
    for context, wanted, kept, free in [
        ("abc", 10, 3, 10),
        ("abc", 40, 3, 21),
        ("a" * 40, 10, 14, 10),
        ("a" * 40, 40, 12, 12),
    ]:
        tokens_L, masks = model._canvas(context, wanted)
        assert (len(tokens_L) - masks, masks) == (kept, free)
    assert caplog.text.count("max_gen_toks=40 does not fit") == 1


def test_a_continuation_that_merges_into_its_context_is_still_scored():
    model = spelled(hub_tokenizer(adds_bos=True, merges=True))
    assert model.masked.tokenizer.encode("ab") == [30]
    ((value, _),) = model.loglikelihood([request("loglikelihood", "a", "b")], disable_tqdm=True)
    assert value == pytest.approx(-math.log(39))


def test_chat_templates_are_the_tokenizers(build):
    tokenizer = hub_tokenizer(adds_bos=True)
    tokenizer.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}.{% endfor %}"
    assert spelled(tokenizer).apply_chat_template([{"role": "user", "content": "hi"}]) == "hi."
    with pytest.raises(ConfigError, match="needs a Hugging Face tokenizer"):
        build().apply_chat_template([])


def test_continuations_of_one_context_share_their_masks(build):
    """Equal continuations tie, and two that differ in one token differ by less than under independent masks."""
    model = build(draws=8)
    windows = [next(model._windows([97, 98], [*range(100, 112), last])) for last in (65, 65, 66)]
    assert len({window.key for window in windows}) == 1
    rows = [list(model._replicates(window))[0].masked_RL for window in windows]
    assert torch.equal(rows[0], rows[2])
    assert next(model._windows([97, 99], [1])).key != next(model._windows([97, 98], [1])).key
    # a lone beginning-of-text token is shared by unrelated texts: those are kept apart
    assert next(model._windows([0], [1, 2])).key != next(model._windows([0], [3, 4])).key


def test_a_mask_that_is_an_ordinary_token_may_occur_in_a_text(masked):
    from common.evaluation.lm_eval import DiffusionLM

    def nll(z_RL: Tensor, x_RL: Tensor, where_RL: Tensor) -> Tensor:
        return torch.full((int(where_RL.sum()),), 2.0)

    own = MaskedLanguageModel(masked.denoise, 98, 24, masked.tokenizer, masked.device, nll=nll)  # "b" is the mask
    model = DiffusionLM(pretrained=own, is_greedy="none")
    ((value, _),) = model.loglikelihood([request("loglikelihood", "xa", "bcb")], disable_tqdm=True)
    assert value == pytest.approx(-6.0)


def test_unusable_options_are_named(build, masked):
    from common.evaluation.lm_eval import DiffusionLM

    for options, message in [
        ({}, "loader=radd,pretrained="),
        ({"pretrained": "x"}, "loader=radd,pretrained="),
        ({"pretrained": masked, "draws": 0}, "draws=0"),
        ({"pretrained": masked, "batch_size": "auto"}, "batch_size=auto"),
        ({"pretrained": masked, "is_greedy": "yes"}, "is_greedy='yes'"),
        ({"pretrained": "x", "loader": "nowhere"}, "loader=nowhere cannot be used"),
        ({"pretrained": "x", "loader": "radd", "dtype": "half"}, "dtype=half is no option of loader=radd"),
    ]:
        with pytest.raises(ConfigError, match=message):
            DiffusionLM(**options)


def test_loaders_are_found_by_package_or_function():
    assert find_loader("radd") is find_loader("radd.loading:load_denoiser")
    with pytest.raises(ConfigError, match="is no option"):
        load_masked_model("radd", "path", "cpu", nonsense=1)


def test_command_line_scores_a_local_task_with_a_saved_model(tmp_path, monkeypatch, capsys):
    """The harness's own CLI end to end, on a task from local files: no network, no plug-in discovery needed."""
    from common.evaluation.lm_eval import main
    from common.testing.golden import fill
    from radd.loading import save_reference_folder
    from radd.model import RADD, ModelConfig

    sizes = {"hidden_size": 16, "n_blocks": 1, "n_heads": 2, "length": 48}
    model = fill(RADD(ModelConfig(**sizes), 128), 1, skip=("rotary_emb.inv_freq",))
    save_reference_folder(tmp_path / "model", model, {"tokens": 128, "model": sizes}, tokenizer=ByteTokenizer())
    rows = [{"question": f"{n} plus one is", "choices": [str(n + 1), str(n)], "answer": 0} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["lm-eval", "run", "--model", "quintet_diffusion", "--tasks", "sums", "--include_path", str(tmp_path)]
    command += ["--model_args", f"loader=radd,pretrained={tmp_path / 'model'},draws=4", "--batch_size", "8"]
    monkeypatch.setattr("sys.argv", [*command, "--output_path", str(tmp_path / "out")])
    assert main() == 0
    assert "sums" in capsys.readouterr().out
    (stored,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(stored.read_text())["results"]["sums"]["acc,none"] <= 1


def test_an_error_that_the_user_can_repair_is_one_line_and_exit_code_2(monkeypatch, capsys):
    from common.evaluation import lm_eval

    def refuse() -> None:
        raise ConfigError("draws=0 is too small")

    monkeypatch.setattr(lm_eval, "cli_evaluate", refuse)
    assert lm_eval.main() == 2
    assert capsys.readouterr().err == "error: draws=0 is too small\n"
