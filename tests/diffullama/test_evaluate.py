"""The command: results and files, both modes, resuming, processes, judged samples, mistakes."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.conversion import from_config
from common.errors import ConfigError
from common.parallel import Parallel
from common.testing.distributed import run_torchrun
from common.testing.golden import fill
from diffullama.evaluate import main
from diffullama.evaluation import DATA_TASKS, TASKS, EvaluateConfig, PerTask, evaluate
from tests.diffullama.tasks.examples import ROWS, save_tiny_model, tiny_tokenizer, write_rows

ALONE = Parallel(0, 1, 0, torch.device("cpu"))
SIZES = {"nelbo": {"length": 24, "draws": 4}, "gen_ppl": {"count": 3, "length": 12, "steps": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, a judge, data and a cache."""
    root = tmp_path_factory.mktemp("evaluate")
    save_tiny_model(root / "model")
    write_rows(root / "data")
    judge = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    fill(judge, 9).save_pretrained(root / "judge")
    tiny_tokenizer().save(root / "judge")
    return root


def config(folder: Path, work_dir: Path, **changes) -> EvaluateConfig:
    settings = {
        "model_path": str(folder / "model"),
        "tasks": list(TASKS),
        "data": {name: str(folder / "data" / f"{name}.jsonl") for name in ROWS},
        "work_dir": str(work_dir),
        "cache_dir": str(folder / "cache"),
        "device": "cpu",
        "limit": 3,
        "group_size": 2,
        "progress": False,
        "scoring": {"levels": 4},
        "nelbo": SIZES["nelbo"],
        "gen_ppl": SIZES["gen_ppl"] | {"judge": str(folder / "judge")},
        "humaneval": {"seconds": 2.0},
    }
    return from_config(EvaluateConfig, settings | changes)


@pytest.mark.parametrize("mode", ["diffusion", "causal"])
def test_every_task_runs_and_leaves_numbers_items_and_their_origin(mode, folder, tmp_path, capsys):
    tasks = [name for name in TASKS if mode == "diffusion" or name != "infill_nll"]
    found = evaluate(config(folder, tmp_path, mode=mode, tasks=tasks), ALONE)
    stored = json.loads((tmp_path / f"results_{mode}.json").read_text())
    assert set(stored["tasks"]) == set(tasks) and stored["seed"] == 0 and "git_revision" in stored
    assert stored["config"]["model_path"] == str(folder / "model")
    for name in tasks:
        lines = (tmp_path / f"{name}_{mode}.jsonl").read_text().splitlines()
        assert len(lines) >= 1 and json.loads(lines[0])["item"] == 0
        for metric in found["tasks"][name]["metrics"].values():
            assert math.isfinite(metric["value"])
            assert metric["standard_error"] is None or metric["standard_error"] >= 0
    assert (tmp_path / f"humaneval_infill_{mode}_samples.jsonl").is_file()
    assert "knows" not in stored["tasks"]["piqa"]["notes"]
    assert any("reference answer's" in note for note in stored["tasks"]["lambada"]["notes"])
    shown = capsys.readouterr().out
    assert "piqa" in shown and "standard error" in shown


def test_an_interrupted_evaluation_continues_with_the_same_result(folder, tmp_path, monkeypatch):
    from diffullama.tasks.choice import ChoiceEvaluation

    tasks = ["hellaswag", "lambada"]
    whole = evaluate(config(folder, tmp_path / "whole", tasks=tasks, limit=None), ALONE)
    run, done = ChoiceEvaluation.run, []

    def interrupted(self, group):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(group)
        return run(self, group)

    monkeypatch.setattr(ChoiceEvaluation, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config(folder, tmp_path / "cut", tasks=tasks, limit=None), ALONE)
    monkeypatch.setattr(ChoiceEvaluation, "run", lambda self, group: (done.append(group), run(self, group))[1])
    resumed = evaluate(config(folder, tmp_path / "cut", tasks=tasks, limit=None), ALONE)
    assert sorted(done) == [0, 1, 2]
    for name in tasks:
        assert resumed["tasks"][name]["metrics"] == whole["tasks"][name]["metrics"]
        first, second = (Path(tmp_path, part, f"{name}_diffusion.jsonl").read_text() for part in ("whole", "cut"))
        assert first == second
    evaluate(config(folder, tmp_path / "cut", tasks=tasks, limit=None, seed=1), ALONE)
    assert sorted(done) == [0, 0, 1, 1, 2, 2]  # another seed is another evaluation


def test_two_processes_find_the_numbers_of_one_bit_for_bit(folder, tmp_path):
    tasks = ["hellaswag", "rocstories", "nelbo", "gen_ppl"]
    alone = evaluate(config(folder, tmp_path / "alone", tasks=tasks), ALONE)
    arguments = [f"model_path={folder / 'model'}", f"tasks=[{','.join(tasks)}]", f"work_dir={tmp_path / 'two'}"]
    arguments += [f"data.{name}={folder / 'data' / name}.jsonl" for name in ("hellaswag", "rocstories")]
    arguments += [f"cache_dir={folder / 'cache'}", "device=cpu", "limit=3", "group_size=2", "progress=false"]
    arguments += ["scoring.levels=4", "nelbo.length=24", "nelbo.draws=4"]
    arguments += ["gen_ppl.count=3", "gen_ppl.length=12", "gen_ppl.steps=4", f"gen_ppl.judge={folder / 'judge'}"]
    run_torchrun("diffullama.evaluate", 2, arguments)
    two = json.loads((tmp_path / "two" / "results_diffusion.json").read_text())
    assert two["processes"] == 2
    for name in tasks:
        assert two["tasks"][name]["metrics"] == json.loads(json.dumps(alone["tasks"][name]["metrics"]))
        first, second = (Path(tmp_path, part, f"{name}_diffusion.jsonl").read_text() for part in ("alone", "two"))
        assert first == second


def test_the_batch_size_does_not_change_results(folder, tmp_path):
    tasks = ["piqa", "squad", "nelbo"]
    results = [
        evaluate(config(folder, tmp_path / str(size), tasks=tasks, batch_size=size), ALONE)["tasks"]
        for size in (2, 256)
    ]
    for name in tasks:
        for metric, value in results[0][name]["metrics"].items():
            assert results[1][name]["metrics"][metric]["value"] == pytest.approx(value["value"], rel=1e-4)


def test_the_command_line_reports_mistakes_in_one_line(folder, tmp_path, monkeypatch, capsys):
    for arguments, message in [
        (["model_path=missing/of/them", "tasks=[nelbo]"], "model_path=missing/of/them does not exist"),
        (["model_path=x", "tasks=[helaswag]"], "Did you mean 'hellaswag'?"),
        (["tasks=[nelbo]"], "model_path has no value"),
        (["model_path=x", "tasks=[piqa]", f"data.piqa={tmp_path}/no.jsonl"], "does not exist"),
        (["model_path=x", "tasks=[piqa]"], "set data.piqa=folder"),
        (["model_path=x", "data.piqua=x"], "data.piqua is not an option; did you mean data.piqa?"),
        (["model_path=x", "mode=causal", "tasks=[infill_nll]"], "needs mode=diffusion"),
    ]:
        command = ["evaluate", f"work_dir={tmp_path}", f"cache_dir={tmp_path}", *arguments]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr().err
        assert ended.value.code == 2 and message in shown and "Traceback" not in shown, (arguments, shown[-2000:])


def test_the_yaml_file_holds_every_option_with_its_default(repo_root):
    from omegaconf import OmegaConf

    composed = OmegaConf.to_container(OmegaConf.load(repo_root / "configs/diffullama/evaluate.yaml"), resolve=False)
    options = {key: value for key, value in composed.items() if key not in ("defaults", "hydra", "model_path")}
    assert from_config(EvaluateConfig, options | {"model_path": "x"}) == EvaluateConfig(model_path="x")
    fields = {field.name for field in dataclasses.fields(EvaluateConfig)}
    assert fields == {*options, "model_path"}
    for option in ("scoring", "fill", "nelbo", "gen_ppl", "humaneval", "data", "split"):
        assert set(options[option]) == {
            f.name for f in dataclasses.fields(getattr(EvaluateConfig(model_path="x"), option))
        }
    assert {field.name for field in dataclasses.fields(PerTask)} == set(DATA_TASKS)


def test_options_are_checked():
    for options, message in [
        ({"tasks": []}, "tasks is empty"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"work_dir": ""}, "work_dir is empty"),
        ({"attn_implementation": "flash_attention_2"}, "takes half precision only; add precision=bf16"),
    ]:
        with pytest.raises(ConfigError, match=message):
            EvaluateConfig(model_path="x", **options)
