"""Adapters of a local language model on a local task of the harness; no network."""

import json
import sys

import lm_eval.tasks
import pytest
import torch

from rpg.adapters import read_adapter, read_adapter_config, to_fork_config, to_fork_names
from rpg.baselines import perturb
from rpg.checkpoint_files import write_checkpoint
from rpg.commonsense import main

TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {root}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A language model, three DoRA adapters, two "generated" ones (one in the old fork's names), a task."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("commonsense")
    folder = root / "model"
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, **{a: n + 1 for n, a in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    fast.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(root / "originals" / "0001")
    first = root / "originals" / "0001"
    state, config = read_adapter(first), read_adapter_config(first)
    for place, where in ((2, "originals/0002"), (3, "originals/0003"), (4, "generated/generated_001")):
        noisy = perturb(state, 3.0, torch.Generator().manual_seed(place))
        write_checkpoint(root / where, noisy, "peft", adapter_config=config)
    old = root / "generated" / "generated_002"
    old.mkdir()
    torch.save(to_fork_names(noisy), old / "adapter_model.bin")
    (old / "adapter_config.json").write_text(json.dumps(to_fork_config(config)))
    rows = [{"question": f"{n} plus one is", "choices": [f" {n + 1}", f" {n}"], "answer": n % 2} for n in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "sums.yaml").write_text(TASK.format(root=root))
    return root


def command(monkeypatch, root, *options: str) -> int:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "rpg.commonsense",
            f"language_model={root}/model",
            f"include_path={root}",
            "tasks=[sums]",
            "precision=fp32",
            *options,
        ],
    )
    return main()


def test_adapters_are_scored_beside_the_bare_model_and_their_mean(places, tmp_path, monkeypatch, capsys):
    options = [f"originals={places}/originals", f"generated={places}/generated", f"work_dir={tmp_path}/a", "device=cpu"]
    assert command(monkeypatch, places, *options) == 0
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [(group, values["mean"]["adapters"]) for group, values in found["groups"].items()] == [
        ("no adapter", 1),
        ("originals", 3),
        ("generated", 2),
        ("mean of originals", 1),
    ]
    assert all(0 <= values["sums"]["value"] <= 1 for values in found["groups"].values())
    assert found["groups"]["originals"]["sums"]["standard_error"] is not None
    by_name = {record["adapter"]: record["scores"]["sums"]["value"] for record in found["adapters"]}
    assert by_name["generated_001"] == by_name["generated_002"]  # the same adapter in two namings
    assert "mean of originals" in capsys.readouterr().out
    # an interrupted evaluation goes on: nothing is scored a second time
    (tmp_path / "a" / "results.json").unlink()
    monkeypatch.setattr("rpg.adapter_evaluation.Harness.score", lambda self, adapter: pytest.fail("scored again"))
    assert command(monkeypatch, places, *options) == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text())["groups"] == found["groups"]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "no adapters to score"),
        (["generated={root}/generated", "tasks=[nonsense]"], "no task of the harness"),
        (["generated={root}/generated", "language_model=nowhere"], "language_model=nowhere cannot be loaded"),
        (["generated={root}/files"], "is no adapter's folder"),
        (["generated={root}/generated", "work_dir={root}/done"], "holds results.json already"),
    ],
)
def test_mistakes_are_named(places, monkeypatch, capsys, options, message):
    # the harness's own tasks take seconds to list
    own = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, include_defaults: own(include_path=include_path, include_defaults=False),
    )
    write_checkpoint(places / "files" / "x.pth", {"w": torch.zeros(2)}, overwrite=True)
    (places / "done").mkdir(exist_ok=True)
    (places / "done" / "results.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, places, f"work_dir={places}/out", *(option.format(root=places) for option in options))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
