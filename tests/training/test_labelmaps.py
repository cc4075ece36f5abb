from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from edgemuse.engines.errors import InputError
from edgemuse.training.labelmaps import (
    HELD_OUT,
    INDICES,
    INNER_PAIRS,
    MARGIN,
    class_names,
    class_table,
    find_label_maps,
    mirror_table,
    read_label_map,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_classes_are_those_of_the_development_model():
    table = SHARED / "devmodel" / "labels.tsv"
    if not table.exists():
        pytest.skip(f"{table} is absent")
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    assert [int(row[1]) for row in rows] == list(INDICES)
    assert [row[2] for row in rows] == class_names()


def test_mirroring_twice_changes_nothing():
    table = mirror_table()
    assert np.array_equal(table[table], np.arange(len(table)))


def test_mirrored_classes_differ_in_their_side_only():
    names, classes, table = class_names(), class_table(), mirror_table()
    for index in INDICES[1:]:
        name, other = names[classes[index]], names[classes[table[index]]]
        if name.startswith("left_"):
            assert other == "right_" + name.removeprefix("left_")
        elif not name.startswith("right_"):
            assert other == name


def test_inner_labels_lie_on_the_side_that_they_are_mirrored_as():
    """The maps' labels that are no class: seen from a thalamus, a left-hand one is nearer to the left-hand one."""
    if not (SHARED / "labelmaps").exists():
        pytest.skip(f"{SHARED / 'labelmaps'} is absent")
    labels = read_label_map(find_label_maps(SHARED / "labelmaps", held_out=True)[0])
    across = {
        index: float(np.nonzero(labels == index)[2].mean()) for index in (10, 49, *INNER_PAIRS, *INNER_PAIRS.values())
    }
    middle = (across[10] + across[49]) / 2
    assert all(across[left] > middle > across[right] for left, right in INNER_PAIRS.items())


def test_lesions_are_white_matter_and_what_lies_outside_is_background():
    classes = class_table()
    assert classes[25] == classes[2]
    assert classes[57] == classes[41]
    assert not classes[[30, 85, 136, 507, 530]].any()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LIA", "SPL"])
def test_reading_brings_every_orientation_to_the_same_array(codes, head, tmp_path):
    image = nib.Nifti1Image(head.transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]))  # (k, j, i) of LPS is (d, h, w)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(turn), tmp_path / "map.nii.gz")
    read = read_label_map(tmp_path / "map.nii.gz")
    used = np.argwhere(head)
    box = tuple(
        slice(max(low - MARGIN, 0), high + MARGIN + 1) for low, high in zip(used.min(0), used.max(0), strict=True)
    )
    assert np.array_equal(read, head[box])


def test_other_spacings_are_refused(head, tmp_path):
    nib.save(nib.Nifti1Image(head, np.diag([2.0, 2, 2, 1])), tmp_path / "map.nii.gz")
    with pytest.raises(InputError, match="1 mm"):
        read_label_map(tmp_path / "map.nii.gz")


def test_held_out_maps_are_never_trained_on(tmp_path):
    for number in range(1, 21):
        (tmp_path / f"training_seg_{number:02}.nii.gz").touch()
    trained = {path.name for path in find_label_maps(tmp_path, held_out=False)}
    unseen = {path.name for path in find_label_maps(tmp_path, held_out=True)}
    assert len(trained) == 16
    assert unseen == {f"training_seg_{number}.nii.gz" for number in HELD_OUT}
    assert not trained & unseen


def test_no_maps(tmp_path):
    with pytest.raises(InputError, match="no label maps"):
        find_label_maps(tmp_path, held_out=False)
