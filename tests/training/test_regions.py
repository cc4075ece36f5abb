from pathlib import Path

import numpy as np
import pytest

from edgemuse.runtime.regions.labels import parse_label_table
from edgemuse.training.folder import label_table
from edgemuse.training.regions import INDICES, MEANS, class_labels, class_table, mirror_table, pairs, tissues
from edgemuse.training.synthesis import generator, t1_intensities

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_classes_are_the_regions_of_the_published_maps():
    table = SHARED / "musemodel" / "labels.tsv"
    if not table.exists():
        pytest.skip(f"{table} is absent")
    assert [label.index for label in parse_label_table(table.read_text())] == list(INDICES)


def test_the_label_table_is_read_again():
    assert parse_label_table(label_table(class_labels())) == class_labels()
    assert class_labels()[0].name == "background"
    assert len(class_labels()) == 149


def test_regions_of_two_sides_differ_in_their_side_only():
    names = {label.index: label.name for label in class_labels()}
    assert len(pairs()) == 69
    for left, right in pairs().items():
        assert names[left].replace("Left", "Right") == names[right]


def test_mirroring_twice_changes_nothing():
    table = mirror_table()
    assert np.array_equal(table[table], np.arange(len(table)))
    assert table[75] == 76  # the one pair whose left-hand number is the smaller


def test_every_region_has_a_usual_intensity():
    family, used = tissues().family, class_table()
    assert set(family[list(INDICES)].tolist()) == set(MEANS)
    assert used[list(INDICES)].tolist() == list(range(149))


@pytest.mark.parametrize("seed", range(3))
def test_no_border_between_gyri_is_painted(seed):
    means, spreads = t1_intensities(generator(3, seed), tissues())
    gyri = [index for index in INDICES if index >= 100]
    assert float(means[gyri].std() / means[gyri].mean()) < 0.03
    assert len(spreads[gyri].unique()) == 1
    assert means[1] < means[gyri].min()
    assert means[gyri].max() < means[[81, 82, 95]].min()
    assert means[0] == 0
