"""Label tables: read strictly, mapped exactly, counted by structure."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.runtime.regions.labels import (
    Label,
    by_index,
    count_voxels,
    dseg_tsv,
    label_color,
    parse_label_table,
    structure_voxels,
    table,
    to_indices,
)
from edgemuse.runtime.regions.volumes import dlmuse_csv, volumes_tsv

LABELS = (
    Label(0, 0, "background"),
    Label(1, 23, "Right Accumbens Area", "#102030"),
    Label(2, 4, 'Ventricle, "3rd"'),
    Label(3, 23, "Right Accumbens, other part"),
)


@pytest.mark.parametrize(
    "text",
    [
        "class\tindex\tname\n0\t0\tbackground\n1\t47\tHippocampus\n",
        "class,index,name\n0,0,background\n1,47,Hippocampus",
        "\ufeffclass,index,name\r\n0,0,background\r\n1,47,Hippocampus\r\n",
        "name,class,index,remark\nHippocampus,1,47,x\nbackground,0,0,\n",
        "class,index,name,color\n1,47,Hippocampus,\n0,0,background,\n",
    ],
    ids=["tabs", "commas", "windows", "other order", "empty colors"],
)
def test_table_is_read(text: str) -> None:
    assert parse_label_table(text) == (Label(0, 0, "background"), Label(1, 47, "Hippocampus"))


def test_quotes_and_colors() -> None:
    (label,) = parse_label_table('class,index,name,color\n0,3,"a, ""b""",#ff00aa\n')
    assert label == Label(0, 3, 'a, "b"', "#ff00aa")


def test_structures_in_one_piece() -> None:
    text = "class,index,name,single\n0,0,background,no\n1,47,Hippocampus,Yes\n2,24,CSF,\n"
    assert [label.single for label in parse_label_table(text)] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("class,index,name,single\n0,0,x,maybe", "line 2: single must be yes or no, found 'maybe'"),
        ("", "class, index, name; class, index, name missing"),
        ("class;index;name\n0;0;x", "first line must name the columns"),
        ("class,name\n0,x", "index missing"),
        ("class,index,name\n0,0,x\n1,one,y", "line 3: class and index must be whole numbers"),
        ("class,index,name\n0,0,x\n\n1.0,1,y", "line 4: class and index"),
        ("class,index,name\n0", "line 2: class and index"),
        ("class,index,name\n0,-1,x", "line 2: index must be 0 to 4294967295"),
        ("class,index,name\n0,4294967296,x", "line 2: index must be 0 to 4294967295"),
        ("class,index,name\n0,0,", "name not empty"),
        ("class,index,name\n0,0", "name not empty"),
        ("class,index,name\n0,0,x\n2,2,y", "classes must be 0 to 1, each once"),
        ("class,index,name\n0,0,x\n0,2,y", "classes must be 0 to 1, each once"),
        ("class,index,name\n1,1,x", "classes must be 0 to 0, each once"),
    ],
)
def test_table_that_is_off(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_label_table(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("highest", "dtype"),
    [(1, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32), (2**32 - 1, np.uint32)],
)
def test_indices_take_the_smallest_type(highest: int, dtype: type) -> None:
    labels = (Label(0, 0, "background"), Label(1, highest, "x"), Label(2, 1, "y"))
    classes = np.array([[[0, 1], [2, 1]]], np.uint8)
    indices = to_indices(classes, labels)
    assert indices.dtype == dtype
    np.testing.assert_array_equal(indices, [[[0, highest], [1, highest]]])


def test_classes_that_share_an_index_are_one_structure() -> None:
    assert by_index(LABELS) == [LABELS[0], LABELS[2], LABELS[1]]
    counts = np.array([100, 3, 5, 7])
    voxels = structure_voxels(counts, LABELS)
    assert voxels == {4: 5, 23: 10}
    assert volumes_tsv(voxels, LABELS, 0.5) == (
        'index\tname\tvoxels\tvolume_mm3\n4\t"Ventricle, ""3rd"""\t5\t2.500\n23\tRight Accumbens Area\t10\t5.000\n'
    )


def test_absent_structures_are_reported_as_zero() -> None:
    assert structure_voxels(np.zeros(4, np.int64), LABELS) == {4: 0, 23: 0}


def test_every_class_is_counted() -> None:
    classes = np.array([[[0, 3], [3, 1]]], np.uint8)
    counts = count_voxels(classes, LABELS)
    assert counts.tolist() == [1, 1, 0, 2]
    assert counts.dtype == np.int64


def test_legend() -> None:
    rows = list(csv.reader(io.StringIO(dseg_tsv(LABELS)), delimiter="\t"))
    assert rows[0] == ["index", "name", "color"]
    assert [row[:2] for row in rows[1:]] == [
        ["0", "background"],
        ["4", 'Ventricle, "3rd"'],
        ["23", "Right Accumbens Area"],
    ]
    assert rows[1][2] == "#000000"
    assert rows[3][2] == "#102030"


@given(st.integers(1, 2**32 - 1))
def test_made_up_colors_are_colors(index: int) -> None:
    color = label_color(Label(1, index, "x"))
    assert len(color) == 7
    assert int(color[1:], 16) > 0
    assert color != label_color(Label(1, index + 1, "x"))


@given(st.lists(st.integers(0, 300), min_size=2, max_size=12), st.integers(0, 2**32 - 1))
def test_volumes_add_up(indices: list[int], seed: int) -> None:
    """Whatever the table, each voxel that is not background is counted once."""
    labels = [Label(n, index, f"s{n}") for n, index in enumerate(indices)]
    classes = np.random.default_rng(seed).integers(0, len(labels), (3, 4, 5)).astype(np.uint8)
    mapped = to_indices(classes, labels)
    assert structure_voxels(count_voxels(classes, labels), labels) == {
        index: int((mapped == index).sum()) for index in sorted(set(indices) - {0})
    }


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ('=HYPERLINK("http://x","y")', """'=HYPERLINK("http://x","y")"""),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("＝1+1", "'＝1+1"),
        ("\t=1", r"\t=1"),
        ("\r=1", r"\r=1"),
        ("a\nb\tc", r"a\nb\tc"),
        ("-", "'-"),
        ("-inf", "'-inf"),
        ("-1.5", "-1.5"),
        ("+2e-3", "+2e-3"),
        (-1.5, "-1.5"),
        (-3, "-3"),
        ("a=b", "a=b"),
        ("a\udcff", r"a\udcff"),
        ("", ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_no_cell_is_run_by_a_spreadsheet(cell: object, written: str, delimiter: str) -> None:
    text = table(delimiter, ["x", cell], [["y", cell]])
    assert [*csv.reader(io.StringIO(text), delimiter=delimiter)] == [["x", written], ["y", written]]
    assert table(delimiter, ["x", written], [["y", written]]) == text  # a table of tables is the same
    text.encode()


def test_names_that_a_spreadsheet_would_run() -> None:
    labels = (Label(0, 0, "background"), Label(1, 7, "=1+1"), Label(2, 8, "-left"))
    assert dseg_tsv(labels).splitlines()[2].startswith("7\t'=1+1\t#")
    assert volumes_tsv({7: 1, 8: 2}, labels, 0.5).splitlines()[1:] == ["7\t'=1+1\t1\t0.500", "8\t'-left\t2\t1.000"]
    assert dlmuse_csv("=x\ny", {4: 1}, 1.0).splitlines()[1].startswith(r"'=x\ny,")
