"""The harness's adapter over adapted models: the harness on a local task, and numbers against our own scoring."""

import json

import pytest
import torch

from common.evaluation.masked_model import load_masked_model
from diffullama.scoring import choice_scores
from tests.diffullama.tasks.examples import save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("lm_eval") / "model")


def request(kind: str, *arguments) -> object:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def harness(folder):
    from common.evaluation.lm_eval import DiffusionLM

    return DiffusionLM(pretrained=folder, loader="diffullama", draws=64, device="cpu", max_gen_toks=8)


def test_likelihoods_are_the_bound_of_our_own_scoring(harness, folder):
    pairs = [("the door", " is"), ("", "the door is open"), ("a book that", " he")]
    found = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    masked = load_masked_model("diffullama", folder, "cpu")
    model = masked.denoise.__self__
    for (value, _), (context, continuation) in zip(found, pairs, strict=True):
        before = masked.tokenizer.encode(context) or [0]
        after = masked.tokenizer.encode(context + continuation)[len(before) if context else 0 :]
        if len(after) <= 6:  # both enumerate all masks
            exact = choice_scores(model, before, [after], 64, estimator="counts").item() * len(after)
            assert value == pytest.approx(-exact, rel=1e-5)
        assert value < 0


def test_rolling_likelihood_and_generation_work_with_shift(harness):
    texts = [request("loglikelihood_rolling", text) for text in ("the door is open", "", "long " * 120)]
    values = harness.loglikelihood_rolling(texts, disable_tqdm=True)
    assert values[0] < 0 and values[1] == 0 and values[2] < values[0]
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [request("generate_until", context, options) for context in ("the door", "", "word " * 200)]
    assert len(harness.generate_until(requests, disable_tqdm=True)) == 3


def test_a_text_that_holds_the_masks_token_has_a_finite_likelihood(folder):
    """The masks of the released models are ordinary tokens."""
    from common.evaluation.lm_eval import DiffusionLM

    (mask_id,) = tiny_tokenizer().encode("z")
    harness = DiffusionLM(pretrained=folder, loader="diffullama", mask_token_id=mask_id, draws=8, device="cpu")
    assert mask_id in harness.tok_encode("z z")
    ((value, is_greedy),) = harness.loglikelihood([request("loglikelihood", "a", "z z")], disable_tqdm=True)
    assert torch.isfinite(torch.tensor(value)) and not is_greedy


def test_the_harness_scores_a_saved_model_by_its_registered_name(folder, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import common.evaluation.lm_eval  # noqa: F401  registers the model

    rows = [{"question": "the door is", "choices": ["open", "a book"], "answer": n % 2} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "doors.yaml").write_text(
        f"""task: doors
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
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)  # thousands of files are not read
    arguments = f"loader=diffullama,pretrained={folder},draws=4,shift=true"
    found = simple_evaluate(
        "quintet_diffusion", arguments, tasks=["doors"], task_manager=tasks, batch_size=8, device="cpu"
    )
    assert 0 <= found["results"]["doors"]["acc,none"] <= 1
    assert found["config"]["model"] == "quintet_diffusion"
