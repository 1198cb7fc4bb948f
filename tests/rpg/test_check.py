"""``python -m rpg.check DIR``: the report, all problems at once, and the exit code."""

import json
import math
import sys

import pytest
import torch

from rpg import check as command
from rpg.checking import check_folder, count_parameters, suggested_dim
from rpg.codec import TokenCodec
from rpg.data import DataSection
from rpg.structure import structure_of_shapes


def network(seed: int, centre: int = 0) -> dict[str, torch.Tensor]:
    draw, noise = torch.Generator().manual_seed(centre), torch.Generator().manual_seed(100 + seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) + 0.02 * torch.randn(shape, generator=noise)

    return {"a.weight": tensor(40, 30), "bn.running_var": tensor(20).abs(), "b": torch.zeros(5), "n": torch.tensor(3)}


def fill(folder, count=12, trainings=1):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        torch.save(network(index, index % trainings), folder / f"{index:04d}.pth")
    return folder


def section(folder, **options):
    return DataSection(checkpoints=str(folder), dim_per_token=64, **options)


def test_a_sound_folder_has_no_problem(tmp_path):
    report = check_folder(section(fill(tmp_path / "nets")))
    assert not report.problems
    tables = report.to_json()
    assert tables["network"][0] == {"network": "values to generate", "count": 1225}
    sizes = {row["dim_per_token"]: row["tokens"] for row in tables["tokens"]}
    assert sizes[64] == 21
    distances = {row["Euclidean distance"]: row["mean"] for row in tables["similarity"]}
    assert math.isclose(distances["pairs of one group"], 0.02 * math.sqrt(2 * 1220), rel_tol=0.1)
    assert [note for note in report.notes if "one value everywhere, for example b" in note]
    assert not list(tmp_path.glob("*.rpg"))


def test_every_problem_is_reported_not_only_the_first(tmp_path):
    folder = fill(tmp_path / "nets")
    broken = network(3)
    broken["a.weight"][0, 0] = math.nan
    torch.save(broken, folder / "0003.pth")
    torch.save({**network(0), "a.weight": torch.ones(3, 4)}, folder / "0000.pth")
    torch.save({"other": torch.ones(3)}, folder / "0007.pth")
    (folder / "0009.pth").write_bytes(b"noise")
    report = check_folder(section(folder))
    found = "\n".join(report.problems)
    assert len(report.problems) == 4
    assert "0000.pth: key 'a.weight' has shape (3, 4), but (40, 30) in 0001.pth" in found
    assert "0003.pth: key 'a.weight' holds 1 NaN or infinite values" in found
    assert "0007.pth has no key 'a.weight'" in found and "0009.pth" in found


def test_independent_trainings_in_one_group_and_copies_are_noted(tmp_path):
    notes = "\n".join(check_folder(section(fill(tmp_path / "nets", trainings=4))).notes)
    assert "data.groups=folder" in notes
    folder = fill(tmp_path / "same", count=3)
    torch.save(network(0), folder / "0001.pth")
    notes = "\n".join(check_folder(section(folder)).notes)
    assert "0000.pth, 0001.pth hold the same values" in notes and "few checkpoints (3)" in notes


def test_wrong_groups_and_conditions_are_problems(tmp_path):
    report = check_folder(section(fill(tmp_path / "nets"), groups="seed", condition="class"))
    assert len(report.problems) == 2
    assert "data.groups=seed" in report.problems[0] and "data.condition=class" in report.problems[1]


@pytest.mark.parametrize(
    "values, dim", [(3_730, 128), (10_853, 256), (4_239_242, 4096), (5_717_416, 8192), (197_767_336, 16384)]
)
def test_suggested_token_sizes_are_those_of_published_generators(values, dim):
    assert suggested_dim(values) == dim


def test_published_generator_size():
    codec = TokenCodec(structure_of_shapes({"w": torch.empty(100, 8192, device="meta")}), 8192)
    # 50 permutation states of the published count are not among ours
    assert round((count_parameters(codec) + 50 * 8192) / 1e6, 1) == pytest.approx(950.8, abs=0.1)


def test_the_command_prints_and_says_whether_the_folder_can_be_used(tmp_path, monkeypatch, capsys):
    folder = fill(tmp_path / "nets = odd, name")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
        return command.main()

    assert call(f"data.checkpoints='{folder}'", f"output={tmp_path}/report.json", "data.dim_per_token=64") == 0
    assert "no problem" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["problems"] == []
    with pytest.raises(SystemExit) as stop:
        call(tmp_path / "absent")
    assert stop.value.code == 2
    assert "holds no checkpoint" in capsys.readouterr().out
