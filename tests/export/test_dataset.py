"""`dataset.json`: names of classes, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from edgemuse.engines.errors import ModelFolderError
from edgemuse.export.dataset import Dataset, class_labels, read_dataset, read_label_table

PLAIN = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "hippocampus": 2, "ignore": 3}}


def read(folder: Path, **changes: Any) -> Dataset:
    (folder / "dataset.json").write_text(json.dumps(PLAIN | {"file_ending": ".nii.gz"} | changes))
    return read_dataset(folder)


def test_labels_have_their_number_as_index_and_a_name_each(tmp_path: Path) -> None:
    labels = class_labels(read(tmp_path), 3)
    assert [(x.number, x.index, x.name) for x in labels] == [
        (0, 0, "background"),
        (1, 1, "class_1"),
        (2, 2, "hippocampus"),
    ]


def test_modality_is_the_old_name_of_channels(tmp_path: Path) -> None:
    assert read(tmp_path, modality={"0": "T1"}).names[2] == "hippocampus"
    with pytest.raises(ModelFolderError, match="2 input channels"):
        read(tmp_path, modality={"0": "T1", "1": "T2"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"channel_names": {"0": "T1", "1": "FLAIR"}}, "2 input channels"),
        ({"channel_names": ["T1"]}, "must map names to values"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": [2]}}, "overlapping regions"),
        ({"labels": {"background": 0, "whole": [1, 1]}}, "overlapping regions"),
        ({"labels": {"background": 0, "whole": [[1]]}}, "whole number"),
        ({"labels": {"background": 0, "whole": "one"}}, "whole number"),
        ({"labels": {"background": 0, "whole": "1" * 5000}}, "whole number"),
        ({"labels": {"background": 0, "whole": 1.5}}, "whole number"),
        ({"labels": {"background": 0, "whole": True}}, "whole number"),
        ({"labels": {"background": 0, "whole": 1e400}}, "whole number"),
        ({"labels": {"0": "background"}}, "whole number"),
        ({"labels": {"background": -1}}, "whole number"),
        ({"labels": {"a\nb": 0}}, "one line"),
        ({"labels": []}, "labels must map names to values"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelFolderError, match=reason):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"background": "0", "hippocampus": "2"}},
        {"labels": {"background": 0, "hippocampus": [2]}},
        {"labels": {"background": 0, "hippocampus": ["2"], "nothing": []}},
        {"labels": {"background": 0.0, "hippocampus": 2.0}},
        {"regions_class_order": [1, 2]},
        {"regions_class_order": []},
    ],
)
def test_plain_labels_in_other_words(changes: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, **changes).names == {0: "background", 2: "hippocampus"}


def test_label_manager_of_nnunet_says_the_same(tmp_path: Path) -> None:
    """What is plain labels to nnU-Net is so here, and what is regions to it is refused."""
    handling = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling", reason="nnU-Net decides")
    for value, order in itertools.product(("2", [2], [], [1, 2], 2.0, ["2"]), (None, [1], [])):
        labels = {"background": 0, "hippocampus": 1, "other": value}
        try:
            names = read(tmp_path, labels=labels, regions_class_order=order).names
        except ModelFolderError:
            assert isinstance(value, list)
            assert len(value) > 1
            continue
        manager = handling.LabelManager(labels, order)
        assert not manager.has_regions
        assert sorted(names) == manager.all_labels


def test_labels_beyond_the_network(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="names label 2, but the network has classes 0 to 1"):
        class_labels(read(tmp_path), 2)


def test_label_table(tmp_path: Path) -> None:
    table = tmp_path / "labels.tsv"
    table.write_text("class\tindex\tname\tcolor\n1\t17\tLeft-Hippocampus\t#dcd814\n0\t0\tBackground\t\n")
    labels = read_label_table(table, 2)
    assert [(x.number, x.index, x.name, x.color) for x in labels] == [
        (0, 0, "Background", None),
        (1, 17, "Left-Hippocampus", "#dcd814"),
    ]
    with pytest.raises(ModelFolderError, match="2 classes, the network 3"):
        read_label_table(table, 3)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"class,index,name\nx,1,a\n", b"\xff\xfe\x00"])
def test_tables_that_are_none(tmp_path: Path, content: bytes) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"labels\.csv"):
        read_label_table(table, 2)
    with pytest.raises(ModelFolderError, match="cannot be read"):
        read_label_table(tmp_path / "missing.csv", 2)
