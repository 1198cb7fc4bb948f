"""python -m rpg.generate: numbered files with their records, never overwritten unasked, tested, in three formats."""

import json
from pathlib import Path

import pytest
import torch

from common.cli import run
from common.errors import CheckpointError, ConfigError
from rpg.checkpoint_files import read_checkpoint, read_metadata
from rpg.data import DataSection, build_data
from rpg.generate import main
from rpg.generated_files import GeneratedFolder, read_records
from rpg.generation_config import GenerateConfig, SamplingOverrides
from rpg.generation_run import generate_networks
from rpg.requests import Request
from rpg.saving import save_generator
from rpg.testing import PythonTester, TesterSection
from tests.rpg.tiny_generator import TinyNet, tiny_facts, tiny_generator

FEW = SamplingOverrides(steps=3)


class TaskTester(PythonTester):
    """Accuracy: the share of positive classes in the task, so that a test can tell which task was asked for."""

    needs_task = True

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def logits(self, state, *, task=None):
        if self.fails:
            raise RuntimeError("out of paper")
        TinyNet().load_state_dict(state, strict=True)
        bits = torch.tensor([int(bit) for bit in f"{task:010b}"])
        return torch.tensor([[0.0, 1.0]]).repeat(10, 1), bits


TESTER = TesterSection(kind="python", target=f"{__name__}:TaskTester")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved generators: with states, with a class condition, of adapters."""
    root = tmp_path_factory.mktemp("generators")
    model, codec = tiny_generator(num_states=2)
    plain = save_generator(root / "plain", model, codec, tiny_facts(groups=("a", "b")))
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["head"]}
    adapters = save_generator(root / "peft", model, codec, tiny_facts(groups=("a", "b"), adapter_config=adapter))
    model, codec = tiny_generator(condition="full", condition_size=10, d_condition=16)
    facts = tiny_facts(condition_kind="class", tasks=(5, 6), tester=vars(TESTER))
    tasks = save_generator(root / "tasks", model, codec, facts, {"sampling": {"steps": 3}})
    return {"plain": str(plain), "peft": str(adapters), "tasks": str(tasks)}


def config_of(generator: str, output: Path, **options) -> GenerateConfig:
    options = {"sampling": FEW, "num_generated": 2, "progress": False, **options}
    return GenerateConfig(generator=generator, output=str(output), **options)


@pytest.mark.parametrize("kind, suffix", [("pth", ".pth"), ("safetensors", ".safetensors")])
def test_files_are_numbered_load_strictly_and_say_where_they_come_from(folders, tmp_path, kind, suffix):
    generation = generate_networks(config_of(folders["plain"], tmp_path, format=kind, seed=4))
    names = [f"generated_tiny_{number:03d}{suffix}" for number in (1, 2)]
    assert [record["file"] for record in generation.records] == names
    assert [record["file"] for record in read_records(tmp_path)] == names
    for name in names:
        TinyNet().load_state_dict(read_checkpoint(tmp_path / name), strict=True)
        facts = read_metadata(tmp_path / name)
        assert facts["seed"] == 4
        assert facts["group"] in ("a", "b")
        assert len(facts["config_sha256"]) == len(facts["generator_sha256"]) == 64
        assert facts["sampling"]["steps"] == 3
    description = json.loads((tmp_path / "generation.json").read_text())
    assert description["networks"] == 2
    assert description["options"]["seed"] == 4


def test_generated_files_are_checkpoints_to_train_on(folders, tmp_path):
    generate_networks(config_of(folders["plain"], tmp_path / "made"))
    data = build_data(DataSection(checkpoints=str(tmp_path / "made"), dim_per_token=32))
    assert len(data.names) == 2


def test_existing_networks_stay_unless_overwriting_is_asked_for(folders, tmp_path):
    config = config_of(folders["plain"], tmp_path)
    first = generate_networks(config).records
    before = read_checkpoint(tmp_path / first[0]["file"])
    with pytest.raises(CheckpointError, match=r"generated_tiny_001\.pth exists \(and 1 more\).*append=true"):
        generate_networks(config)
    more = generate_networks(config_of(folders["plain"], tmp_path, append=True)).records
    assert [record["file"] for record in more] == ["generated_tiny_003.pth", "generated_tiny_004.pth"]
    assert [record["index"] for record in more] == [2, 3]
    assert torch.equal(read_checkpoint(tmp_path / first[0]["file"])["head.bias"], before["head.bias"])
    generate_networks(config_of(folders["plain"], tmp_path, overwrite=True, seed=9))
    assert not torch.equal(read_checkpoint(tmp_path / first[0]["file"])["head.bias"], before["head.bias"])
    assert len(read_records(tmp_path)) == 4


def test_appended_networks_are_those_of_one_long_run(folders, tmp_path):
    generate_networks(config_of(folders["plain"], tmp_path / "parts"))
    generate_networks(config_of(folders["plain"], tmp_path / "parts", append=True))
    generate_networks(config_of(folders["plain"], tmp_path / "whole", num_generated=4))
    for number in range(1, 5):
        left, right = (
            read_checkpoint(tmp_path / part / f"generated_tiny_{number:03d}.pth") for part in ("parts", "whole")
        )
        assert torch.allclose(left["head.bias"], right["head.bias"], rtol=1e-4, atol=1e-5)


def test_tasks_are_named_and_tested_on_their_own_task(folders, tmp_path, capsys):
    generation = generate_networks(
        config_of(folders["tasks"], tmp_path, tasks=[1, 1022], test=True, sampling=SamplingOverrides())
    )
    found = {record["file"]: record["accuracy"] for record in read_records(tmp_path)}
    assert found == {
        "generated_tiny_class0001_001.pth": pytest.approx(0.1), "generated_tiny_class0001_002.pth": pytest.approx(0.1),
        "generated_tiny_class1022_001.pth": pytest.approx(0.9), "generated_tiny_class1022_002.pth": pytest.approx(0.9),
    }  # fmt: skip
    assert "accuracy 0.5000 ± 0.2309 (min 0.1000, max 0.9000)" in generation.summary()
    assert "3 evaluations" in generation.summary()
    assert capsys.readouterr().out.count("Acc: 0.9000") == 2


def test_a_failing_test_is_a_line_and_not_the_end(folders, tmp_path):
    failing = TesterSection(kind="python", target=f"{__name__}:TaskTester", options={"fails": True})
    generation = generate_networks(
        config_of(folders["tasks"], tmp_path, tasks=7, num_generated=1, test=True, tester=failing)
    )
    assert "out of paper" in generation.records[0]["error"]
    assert "1 test failed" in generation.summary()


def test_the_run_has_no_tester(folders, tmp_path):
    with pytest.raises(ConfigError, match="test=true.*tester.kind"):
        generate_networks(config_of(folders["plain"], tmp_path, test=True))
    assert not list(tmp_path.iterdir())


def test_conditions_must_fit_the_generator(folders, tmp_path):
    with pytest.raises(ConfigError, match="conditional .10 numbers.; give tasks"):
        generate_networks(config_of(folders["tasks"], tmp_path))
    with pytest.raises(ConfigError, match="unconditional"):
        generate_networks(config_of(folders["plain"], tmp_path, tasks="unseen"))
    with pytest.raises(ConfigError, match="has 3 entries"):
        generate_networks(config_of(folders["tasks"], tmp_path, vectors=[0, 1, 1]))
    with pytest.raises(ConfigError, match="tasks and vectors"):
        config_of(folders["tasks"], tmp_path, tasks=5, vectors=[0, 1, 1])
    with pytest.raises(ConfigError, match="encoder=NAME"):
        config_of(folders["tasks"], tmp_path, images="folder")
    assert not list(tmp_path.iterdir())


def test_adapters_need_a_generator_of_adapters(folders, tmp_path):
    with pytest.raises(CheckpointError, match="trained on adapter folders"):
        generate_networks(config_of(folders["plain"], tmp_path, format="peft"))
    generate_networks(config_of(folders["peft"], tmp_path, format="peft"))
    folder = tmp_path / "generated_tiny_002"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    assert len(read_checkpoint(folder)) == len(TinyNet().state_dict())
    assert read_metadata(folder)["index"] == 1


def test_names_are_checked_before_anything_is_written(tmp_path):
    folder = GeneratedFolder(tmp_path, "tag", "pth")
    with pytest.raises(CheckpointError, match="two requests"):
        folder.check([Request(0, label="a"), Request(0, label="a")])
    for name in ("generated_tag_a_007.pth", "generated_tag_a_009.safetensors", "generated_tag_012", "other.pth"):
        (tmp_path / name).touch()
    assert folder.next_indices(["", "a", "b"]) == {"": 12, "a": 9, "b": 0}


def test_the_command_line(folders, tmp_path, monkeypatch, capsys):
    arguments = [f"generator={folders['tasks']}", f"output={tmp_path}", "tasks=unseen", "num_tasks=2"]
    monkeypatch.setattr("sys.argv", ["generate", *arguments])
    assert run(main, "generate", GenerateConfig, "configs/rpg") == 0
    assert "2 networks" in capsys.readouterr().out
    assert (tmp_path / "generated_tiny_class0101_001.pth").is_file()
    with pytest.raises(SystemExit) as stopped:
        run(main, "generate", GenerateConfig, "configs/rpg")
    assert stopped.value.code == 2
    assert "overwrite=true" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["generate", *arguments, "sampling.kind=traling"])
    with pytest.raises(SystemExit) as stopped:
        run(main, "generate", GenerateConfig, "configs/rpg")
    assert stopped.value.code == 2
    assert "'trailing'" in capsys.readouterr().err
