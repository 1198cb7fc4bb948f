"""python -m rpg.prompt: a sentence becomes a vector, a network, a test; a session goes on after a bad prompt."""

import io
from pathlib import Path

import pytest
import torch

from common.cli import run
from common.errors import ConfigError
from rpg.generation_config import SamplingOverrides
from rpg.prompt import main, with_prompt_option
from rpg.prompt_config import PromptConfig
from rpg.prompt_session import PromptSession, run_session
from rpg.saving import save_generator
from rpg.testing import PythonTester, TesterSection
from tests.rpg.tiny_generator import tiny_facts, tiny_generator

LIVING = (0, 0, 1, 1, 1, 1, 1, 1, 0, 0)


class BitsTester(PythonTester):
    """Accuracy: the share of positive classes in the task."""

    needs_task = True

    def logits(self, state, *, task=None):
        return torch.tensor([[0.0, 1.0]]).repeat(10, 1), torch.tensor([int(bit) for bit in f"{task:010b}"])


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, codec = tiny_generator(condition="full", condition_size=10, d_condition=16)
    folder = tmp_path_factory.mktemp("generator") / "tasks"
    return str(save_generator(folder, model, codec, tiny_facts(condition_kind="class")))


def config_of(generator: str | None = None, output: Path | str = "prompted", **options) -> PromptConfig:
    return PromptConfig(generator=generator, output=str(output), sampling=SamplingOverrides(steps=3), **options)


def test_words_that_are_no_options_are_the_prompt():
    assert with_prompt_option(["select", "all cats", "seed=3", "--cfg", "job"]) == [
        "prompt='select all cats'", "seed=3", "--cfg", "job",
    ]  # fmt: skip
    assert with_prompt_option(["don't find cats"]) == ["prompt='don\\'t find cats'"]
    assert with_prompt_option(["generator=a", "+x=1"]) == ["generator=a", "+x=1"]


def test_without_a_generator_the_vector_is_shown(capsys):
    assert run_session(config_of(prompt="select all living things")) == 0
    assert "bird, cat, deer, dog, frog, horse: [0, 0, 1, 1, 1, 1, 1, 1, 0, 0] (class0252)" in capsys.readouterr().out


def test_a_prompt_becomes_a_network_that_is_tested(generator, tmp_path, capsys):
    tester = TesterSection(kind="python", target=f"{__name__}:BitsTester")
    session = PromptSession(config_of(generator, tmp_path, test=True, tester=tester))
    vector, generation = session.run("select all living things")
    assert vector == LIVING
    assert [record["file"] for record in generation.records] == ["generated_tiny_class0252_001.pth"]
    assert generation.records[0]["accuracy"] == pytest.approx(0.6)
    _, again = session.run("find animals")
    assert [record["file"] for record in again.records] == ["generated_tiny_class0252_002.pth"]
    assert "1 network in" in capsys.readouterr().out


def test_networks_are_judged_by_what_was_meant(generator, tmp_path, capsys):
    tester = TesterSection(kind="python", target=f"{__name__}:BitsTester")
    meant = [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    session = PromptSession(config_of(generator, tmp_path, test=True, tester=tester, expected=meant))
    vector, generation = session.run("select all living things")
    assert vector == LIVING
    assert generation.records[0]["condition"] == list(LIVING)
    assert generation.records[0]["accuracy"] == pytest.approx(0.5)
    assert "differs in horse" in capsys.readouterr().out


def test_a_session_goes_on_after_a_prompt_it_does_not_understand(generator, tmp_path, capsys):
    stream = io.StringIO("select gizmos\n\nselect everything\nfind cats\nexit\nfind dogs\n")
    assert run_session(config_of(generator, tmp_path), stream) == 2
    shown = capsys.readouterr()
    assert "gizmos" in shown.err
    assert "that is no task" in shown.err
    assert (tmp_path / "generated_tiny_class0064_001.pth").is_file()
    assert len(list(tmp_path.glob("*.pth"))) == 1


def test_a_generator_of_other_conditions_is_refused(generator, tmp_path):
    with pytest.raises(ConfigError, match="takes a condition of 10 numbers, but classes"):
        PromptSession(config_of(generator, tmp_path, classes=["a", "b"]))
    model, codec = tiny_generator()
    plain = save_generator(tmp_path / "plain", model, codec, tiny_facts())
    with pytest.raises(ConfigError, match="unconditional"):
        PromptSession(config_of(str(plain), tmp_path))
    with pytest.raises(ConfigError, match="expected has 2 entries"):
        PromptSession(config_of(expected=[0, 1]))
    with pytest.raises(ConfigError, match="generator=RUN"):
        config_of(test=True)


def test_the_command_line(generator, tmp_path, monkeypatch, capsys):
    arguments = ["find all", "vehicles", f"generator={generator}", f"output={tmp_path}", "sampling.steps=3"]
    monkeypatch.setattr("sys.argv", ["prompt", *with_prompt_option(arguments)])
    assert run(main, "prompt", PromptConfig, "configs/rpg", print_config=False) == 0
    assert "(class0771)" in capsys.readouterr().out
    assert (tmp_path / "generated_tiny_class0771_001.pth").is_file()
    monkeypatch.setattr("sys.argv", ["prompt", *with_prompt_option(["gizmos"])])
    with pytest.raises(SystemExit) as stopped:
        run(main, "prompt", PromptConfig, "configs/rpg", print_config=False)
    assert stopped.value.code == 2
    assert "chat_model=" in capsys.readouterr().err
