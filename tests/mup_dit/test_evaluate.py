"""The command line: metrics of local files, processes, what is not overwritten, mistakes of the user."""

import csv
import json
import sys

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.parallel import Parallel
from common.testing.distributed import run_torchrun
from mup_dit.datasets import build_dataset
from mup_dit.evaluate import main
from mup_dit.evaluation import evaluate
from mup_dit.evaluation_config import ClipOptions, EvaluateConfig
from mup_dit.geneval.prompts import make_prompts
from mup_dit.image_files import to_image, to_uint8
from mup_dit.metrics.inception import Inception
from tests.mup_dit.tiny_hub_models import save_clip, save_mask2former

ALONE = Parallel(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """100 digits of the training split, a little noisy, as sampled images."""
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    image = build_dataset("digits", "train", size=8).fetch(np.arange(100))["image"]
    noise = 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    np.savez(path, arr_0=to_uint8(image + noise).numpy())
    return path


@pytest.fixture
def pictures(tmp_path):
    """Four colour images with captions in the manifest."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for index in range(4):
        to_image(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{index:06d}.png")
        records.append({"index": index, "file": f"{index:06d}.png", "prompt": f"a cat number {index}"})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def command(monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mup_dit.evaluate", "progress=false", "device=cpu", *options])
    return main()


def values(folder) -> dict[str, float]:
    found = json.loads((folder / "results.json").read_text())
    return {name: entry["value"] for name, entry in found["metrics"].items()}


def test_digits_are_scored_under_names_of_their_own(digits, tmp_path, monkeypatch, capsys):
    options = ["reference=digits", "split=train", "features=digits", "split_size=50"]
    assert command(monkeypatch, f"samples={digits}", *options, f"work_dir={tmp_path}/a") == 0
    found = values(tmp_path / "a")
    assert found.keys() == {
        "frechet_digits", "frechet_digits_spatial", "classifier_score_digits", "precision_digits", "recall_digits",
    }  # fmt: skip
    assert 1 < found["classifier_score_digits"] < 10 and found["frechet_digits"] > 1
    assert "frechet_digits" in capsys.readouterr().out
    # neither batches nor the way by stored statistics change a distance
    statistics = tmp_path / "digits.npz"
    assert command(monkeypatch, "samples=digits", "split=train", "features=digits", "metrics=[]",
                   f"save_statistics={statistics}", f"work_dir={tmp_path}/b") == 0  # fmt: skip
    assert command(monkeypatch, f"samples={digits}", f"reference={statistics}", "features=digits", "batch_size=7",
                   "metrics=[fid,sfid]", f"work_dir={tmp_path}/c") == 0  # fmt: skip
    for name in ("frechet_digits", "frechet_digits_spatial"):
        assert values(tmp_path / "c")[name] == pytest.approx(found[name], rel=1e-5)


def test_two_processes_find_what_one_finds(digits, tmp_path):
    options = [f"samples={digits}", "reference=digits", "features=digits", "split_size=50", "progress=false",
               "device=cpu", "batch_size=16"]  # fmt: skip
    run_torchrun("mup_dit.evaluate", 2, [*options, f"work_dir={tmp_path}/two"])
    evaluate(
        EvaluateConfig(samples=str(digits), reference="digits", features="digits", split_size=50, progress=False,
                       batch_size=16, work_dir=str(tmp_path / "one")),
        ALONE,
    )  # fmt: skip
    one, two = values(tmp_path / "one"), values(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-6)


def test_inception_metrics_of_a_folder(pictures, tmp_path, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(Inception().state_dict(), tmp_path / "weights.pth")
    for name in ("000002.png", "000003.png", "manifest.jsonl"):  # two images do
        (pictures / name).unlink()
    options = [f"samples={pictures}", f"reference={pictures}", f"inception={tmp_path}/weights.pth", "clean_size=32"]
    assert command(monkeypatch, *options, "metrics=[fid,is,clean_fid]", f"work_dir={tmp_path}/out") == 0
    found = values(tmp_path / "out")
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["clean_fid"] == pytest.approx(0, abs=1e-6)
    assert found["inception_score"] >= 1
    config = json.loads((tmp_path / "out" / "results.json").read_text())
    assert config["samples"] == 2 and config["git_revision"] and config["config"]["clean_size"] == 32


def test_clip_scores_of_captions_in_the_manifest(pictures, tmp_path, monkeypatch):
    clip = save_clip(tmp_path / "clip")
    options = [f"samples={pictures}", "metrics=[clip_score]", f"clip.model={clip}"]
    assert command(monkeypatch, *options, f"work_dir={tmp_path}/out") == 0
    with (tmp_path / "out" / "clip_scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["caption"] for row in rows] == [f"a cat number {index}" for index in range(4)]
    scores = np.array([float(row["clip_score"]) for row in rows])
    found = values(tmp_path / "out")
    assert found["clip_score"] == pytest.approx(scores.mean()) and found["clip_score_max"] == scores.max()
    assert command(monkeypatch, *options, "batch_size=1", f"work_dir={tmp_path}/single") == 0
    assert values(tmp_path / "single")["clip_score"] == pytest.approx(found["clip_score"], rel=1e-5)
    captions = tmp_path / "captions.txt"
    captions.write_text("one\ntwo\nthree\n")
    with pytest.raises(DataError, match="3 captions for 4 images"):
        evaluate(
            EvaluateConfig(samples=str(pictures), metrics=["clip_score"], work_dir=str(tmp_path / "other"),
                           clip=ClipOptions(captions=str(captions))),
            ALONE,
        )  # fmt: skip


def test_geneval_of_a_folder_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    chosen = {entry["tag"]: entry for entry in make_prompts()}
    for number, entry in enumerate(chosen.values()):
        folder = tmp_path / "samples" / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(entry))
        for index in range(2):
            pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            to_image(pixels).save(folder / "samples" / f"{index:05d}.png")
    detector = save_mask2former(tmp_path / "detector")
    options = [
        f"samples={tmp_path}/samples", "metrics=[geneval]", f"geneval.detector={detector}",
        f"geneval.colours={save_clip(tmp_path / 'clip')}", "geneval.rule.threshold=0.001", f"work_dir={tmp_path}/out",
    ]  # fmt: skip
    assert command(monkeypatch, *options, "geneval.rule.counting_threshold=0.001") == 0
    found = values(tmp_path / "out")
    assert 0 <= found["geneval"] <= 1 and {f"geneval_{tag}" for tag in chosen} < found.keys()
    assert "Overall score" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out" / "geneval.jsonl").read_text().splitlines()]
    assert len(records) == 12 and records[0]["filename"] == "00000/samples/00000.png"
    # all prompts are judged already, so the detector is not asked again
    monkeypatch.setattr("mup_dit.geneval.scoring.score_prompt", None)
    assert command(monkeypatch, *options, "geneval.rule.counting_threshold=0.001", "overwrite=true") == 0
    assert values(tmp_path / "out") == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["metrics=[fidd]", "reference=digits"], "metrics='fidd'"),
        (["metrics=[fid]"], "give reference="),
        (["metrics=[]"], "metrics is empty"),
        (["metrics=[clean_fid]", "reference=digits", "features=digits"], "features=inception"),
        (["metrics=[fid]", "reference=nowhere", "features=digits"], "reference=nowhere"),
        (["metrics=[fid]", "reference=digits", "inception=missing.pth"], "inception=missing.pth"),
        (["metrics=[is]", "features=digits", "num_samples=1000"], "num_samples=1000"),
        (["metrics=[is]", "batch_size=0"], "batch_size=0"),
        (["metrics=[clip_score]"], "manifest.jsonl"),
        (["metrics=[geneval]"], "layout=geneval"),
        (["metrics=[precision_recall]", "reference=STATISTICS", "features=digits"], "statistics only"),
    ],
)
def test_mistakes_are_answered_with_one_line(options, message, digits, tmp_path, monkeypatch, capsys):
    statistics = tmp_path / "statistics.npz"
    np.savez(statistics, mu=np.zeros(32), sigma=np.eye(32))
    options = [option.replace("STATISTICS", str(statistics)) for option in options]
    if "metrics=[precision_recall]" in options:
        options[0] = "metrics=[fid,precision_recall]"
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, f"samples={digits}", f"work_dir={tmp_path}/out", *options)
    assert stopped.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_results_are_not_overwritten_silently(digits, tmp_path, monkeypatch, capsys):
    options = [f"samples={digits}", "metrics=[is]", "features=digits", f"work_dir={tmp_path}"]
    assert command(monkeypatch, *options) == 0
    with pytest.raises(SystemExit):
        command(monkeypatch, *options)
    assert "overwrite=true" in capsys.readouterr().err
    assert command(monkeypatch, *options, "overwrite=true") == 0


def test_a_broken_file_is_left_out_and_listed_when_asked(pictures, tmp_path, monkeypatch):
    (pictures / "000002.png").write_bytes(b"nothing")
    clip = save_clip(tmp_path / "clip")
    options = [f"samples={pictures}", "metrics=[clip_score]", f"clip.model={clip}", f"work_dir={tmp_path}/out"]
    with pytest.raises(SystemExit):
        command(monkeypatch, *options)
    assert command(monkeypatch, *options, "on_error=skip", "overwrite=true") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["clip_images"] == 3 and found["skipped_files"] == ["000002.png"]
