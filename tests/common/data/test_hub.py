"""Hugging Face datasets in local folders of the same format, and the messages without a hub."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.hub import HubDataset, is_saved_dataset, load_hub_dataset, load_saved_dataset
from common.errors import DataError

TEXTS = ["first text", "", "zweiter Text, mit Umlaut: ü", "line one\nline two"]


def test_a_folder_saved_by_datasets_is_read_by_split(tmp_path):
    one = datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3, 4]})
    datasets.DatasetDict({"train": one, "test": one.select([1, 0])}).save_to_disk(tmp_path / "both")
    one.save_to_disk(tmp_path / "one")
    assert is_saved_dataset(tmp_path / "both")
    assert is_saved_dataset(tmp_path / "one")
    source = HubDataset(load_saved_dataset(tmp_path / "both", "test"))
    assert list(source.documents()) == [TEXTS[1], TEXTS[0]]
    assert source.num_documents == 2
    assert list(HubDataset(load_saved_dataset(tmp_path / "one", "test")).documents()) == TEXTS
    again = HubDataset(load_saved_dataset(tmp_path / "both", "test"))
    assert again.fingerprint() == source.fingerprint()
    with pytest.raises(DataError, match="splits train, test but not 'validation'"):
        load_saved_dataset(tmp_path / "both", "validation")
    with pytest.raises(DataError, match="no column 'body'; its columns are text, id"):
        HubDataset(one, fields=("body",))
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="incomplete dataset folder"):
        load_saved_dataset(tmp_path / "one", "test")


def test_a_folder_in_the_hubs_layout_loads_through_the_hub_path(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"sentence": TEXTS}), tmp_path / "data" / "test-00000-of-00001.parquet")
    dataset = load_hub_dataset(str(tmp_path), None, "test", cache_dir=str(tmp_path / "cache"))
    assert list(HubDataset(dataset, fields=("text", "sentence")).documents()) == TEXTS
    stream = load_hub_dataset(str(tmp_path), None, "test", cache_dir=str(tmp_path / "cache"), streaming=True)
    assert [record["sentence"] for record in stream] == TEXTS
    with pytest.raises(DataError, match="split 'train', cannot be loaded"):
        load_hub_dataset(str(tmp_path), None, "train", cache_dir=str(tmp_path / "cache"))


def test_without_the_hub_the_message_says_how_to_use_local_files(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"(?s)Dataset nobody/nothing, .*name=path/\*\.txt.*parquet"):
        load_hub_dataset("nobody/nothing", None, "train", cache_dir=str(tmp_path))


def test_a_repository_with_a_script_is_read_from_its_parquet_conversion(monkeypatch, caplog):
    asked = []

    def load(repository, config, *, revision=None, **options):
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found ptb_text_only.py")
        return "the conversion"

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_hub_dataset("owner/ptb", None, "test", cache_dir=None) == "the conversion"
    assert asked == [None, "refs/convert/parquet"]
    assert "parquet conversion" in caplog.text
