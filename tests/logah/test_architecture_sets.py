"""Files of architectures, the networks of each training step, and the command that writes and describes sets."""

import json
import pickle
import sys
from collections import Counter

import pytest

from common.errors import ConfigError, DataError
from logah import generate_architectures
from logah.architecture_config import NetsSection
from logah.architecture_generation import GenerateArchitecturesConfig, draw_set
from logah.architecture_sets import ArchitectureSource, read_architectures, write_architectures
from logah.architecture_stats import count_parameters
from logah.architectures import gpt2, resolve_target, vit

SMALL = [vit(2, 1 + depth, 2, 8 * width, image_size=8) for depth in range(3) for width in (1, 2)]


@pytest.fixture
def small_set(tmp_path):
    path = tmp_path / "set.jsonl"
    write_architectures(path, SMALL)
    return path


def test_a_set_is_read_as_it_was_written(small_set):
    assert read_architectures(small_set) == SMALL
    assert read_architectures(small_set, limit=2) == SMALL[:2]
    assert len(small_set.read_text().splitlines()) == len(SMALL)


def test_a_set_is_not_overwritten_silently(small_set):
    with pytest.raises(DataError, match="overwrite=true"):
        write_architectures(small_set, SMALL[:1])
    write_architectures(small_set, SMALL[:1], overwrite=True)
    assert read_architectures(small_set) == SMALL[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 3: no JSON"),
        ('{"family": "vit"}', "line 3 is no architecture"),
        ('{"family": "vit", "options": {"patch_size": 2}}', "line 3: .*hidden_dim"),
        ('{"family": "module", "options": {"path": "os:system"}}', "line 3 names code"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "set.jsonl"
    good = json.dumps(SMALL[0].to_json())
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(DataError, match=message):
        read_architectures(path)


def test_an_empty_or_missing_set_is_named(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no architecture"):
        ArchitectureSource(NetsSection(set=str(empty)), seed=0)
    with pytest.raises(DataError, match="cannot be read"):
        read_architectures(tmp_path / "nowhere.jsonl")


# ---------------------------------------------------------------------------------------------------------- sources


def test_every_network_of_a_file_comes_once_per_epoch(small_set):
    source = ArchitectureSource(NetsSection(set=str(small_set), meta_batch=2, node_budget=0), seed=3)
    epochs = [[source.draw(step) for step in range(3 * epoch, 3 * epoch + 3)] for epoch in range(3)]
    flat = [[each for pair in epoch for each in pair] for epoch in epochs]
    assert all(Counter(epoch) == Counter(SMALL) for epoch in flat)
    assert flat[0] != flat[1] or flat[1] != flat[2]


@pytest.mark.parametrize("law", ["vits1k", "gpts1k", "llama1k", "llama_trainer", "grid"])
def test_a_draw_depends_on_seed_step_and_place_alone(law):
    section = NetsSection(law=law, meta_batch=4, node_budget=0)
    source = ArchitectureSource(section, seed=5)
    whole = source.draw(7)
    assert ArchitectureSource(section, seed=5).draw(7, [2, 0]) == [whole[2], whole[0]]
    assert pickle.loads(pickle.dumps(source)).draw(7) == whole
    assert source.draw(8) != whole or source.draw(9) != whole
    assert ArchitectureSource(section, seed=6).draw(7) != whole


def test_the_data_decide_classes_pixels_and_vocabulary(small_set):
    facts = {"num_classes": 7, "image_size": 16, "vocab_size": 90, "n_positions": 24}
    for section in (NetsSection(set=str(small_set)), NetsSection(law="grid"), NetsSection(law="vits1k")):
        (drawn,) = ArchitectureSource(section, seed=0, data_options=facts).draw(0)
        assert (drawn.num_classes, drawn.image_size) == (7, 16)
    (drawn,) = ArchitectureSource(NetsSection(law="gpts1k", dropout=0.0), seed=0, data_options=facts).draw(0)
    assert (drawn.vocab_size, drawn.block_size, drawn.options["attn_pdrop"]) == (90, 24, 0.0)


def test_a_file_s_networks_get_the_patch_size_and_dropout_asked_for(small_set):
    section = NetsSection(set=str(small_set), patch_sizes=(4,), dropout=0.2)
    (drawn,) = ArchitectureSource(section, seed=0).draw(0)
    assert (drawn.options["patch_size"], drawn.options["dropout"]) == (4, 0.2)


def test_a_meta_batch_over_the_budget_is_drawn_again(small_set):
    nodes = {each: 10 * each.options["num_layers"] for each in SMALL}
    section = NetsSection(set=str(small_set), meta_batch=3, node_budget=50)
    source = ArchitectureSource(section, seed=1, nodes_of=nodes.get)
    drawn = [source.draw(step) for step in range(20)]
    assert all(sum(nodes[each] for each in batch) <= 50 for batch in drawn)
    assert drawn == [ArchitectureSource(section, seed=1, nodes_of=nodes.get).draw(step, range(3)) for step in range(20)]
    free = ArchitectureSource(NetsSection(set=str(small_set), meta_batch=3, node_budget=0), seed=1)
    assert any(free.draw(step) != drawn[step] for step in range(20))


def test_a_budget_that_nothing_fits_is_named(small_set):
    section = NetsSection(set=str(small_set), meta_batch=2, node_budget=15)
    with pytest.raises(ConfigError, match=r"nets\.node_budget=15 is too small .* has 20 nodes"):
        ArchitectureSource(section, seed=1, nodes_of=lambda each: 10 * each.options["num_layers"]).draw(0)


def test_the_default_budget_is_the_published_one():
    assert NetsSection().effective_node_budget is None
    assert NetsSection(meta_batch=2).effective_node_budget == 2200
    assert NetsSection(meta_batch=16).effective_node_budget == 4400


# ---------------------------------------------------------------------------------------------------------- command


def test_the_first_thousand_have_the_published_sizes():
    for name, least, mean, deviation, most in (
        ("vits1k", 1.21, 4.75, 2.22, 9.60), ("gpts1k", 7.69, 16.3, 4.76, 28.36), ("llama1k", 16.6, 28.5, 7.8, 48.8),
    ):  # fmt: skip
        counts = [count_parameters(each) / 1e6 for each in draw_set(GenerateArchitecturesConfig(set=name, out="x"))]
        average = sum(counts) / 1000
        spread = (sum((count - average) ** 2 for count in counts) / 999) ** 0.5
        found = (min(counts), average, spread, max(counts))
        assert found == pytest.approx((least, mean, deviation, most), rel=4e-3)


def test_networks_with_unusual_options_are_built_to_be_counted():
    unusual = gpt2(16, 1, 2, vocab_size=20, n_positions=8, add_cross_attention=True)
    assert count_parameters(unusual) > count_parameters(gpt2(16, 1, 2, vocab_size=20, n_positions=8))
    assert count_parameters(resolve_target("squeezenet1_1")) == 1_235_496


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate_architectures", *arguments])
    try:
        return generate_architectures.main()
    except SystemExit as left:
        return left.code


def test_the_command_writes_and_describes_a_set(tmp_path, monkeypatch, capsys):
    out, figure = tmp_path / "vits.jsonl", tmp_path / "vits.png"
    assert run(monkeypatch, "set=vits1k", "count=12", f"out={out}", f"figure={figure}") == 0
    assert "12 networks" in capsys.readouterr().out
    assert len(read_architectures(out)) == 12 and figure.read_bytes().startswith(b"\x89PNG")
    assert run(monkeypatch, f"describe={out}") == 0
    assert "parameters (M)" in capsys.readouterr().out


def test_the_command_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    out = tmp_path / "vits.jsonl"
    out.write_text("mine")
    for arguments, message in (
        (["count=3"], "out=FILE.jsonl"),
        (["set=vits2k", f"out={out}"], "Did you mean 'vits1k'"),
        (["count=3", f"out={out}"], "overwrite=true"),
        (["count=0", f"out={tmp_path}/x.jsonl"], "count=0"),
        (["patch_sizes=[3]", f"out={tmp_path}/x.jsonl"], "image_size=32"),
    ):
        assert run(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
    assert out.read_text() == "mine"
