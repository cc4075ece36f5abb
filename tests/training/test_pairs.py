import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from edgemuse.engines.errors import InputError
from edgemuse.training.pairs import HELD_OUT, find_subjects, read_pair, with_tissues

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
RAS = np.diag([2.0, 2, 2, 1])


def write(folder, name, image, regions, affine=RAS, other=None):
    for kind, array, grid in (("t1", image, affine), ("dlmuse", regions, affine if other is None else other)):
        (folder / kind).mkdir(exist_ok=True)
        suffix = "T1w" if kind == "t1" else "dseg"
        nib.save(nib.Nifti1Image(array.astype(np.uint8), grid), folder / kind / f"{name}_{suffix}.nii.gz")


@pytest.fixture
def stored(pair):
    """(i, j, k) in RAS: scan and regions."""
    regions = np.where(pair.numbers < 500, pair.numbers, 0)
    return [array.transpose(2, 1, 0)[::-1, ::-1] for array in (pair.image, regions)]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_reading_brings_every_orientation_to_the_same_arrays(codes, pair, stored, tmp_path):
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    images = [nib.Nifti1Image(array.astype(np.uint8), RAS).as_reoriented(turn) for array in stored]
    write(tmp_path, "sub", *(np.asanyarray(image.dataobj) for image in images), affine=images[0].affine)
    read = read_pair(tmp_path, "sub")
    assert np.array_equal(read.image, pair.image)
    assert np.array_equal(read.numbers, pair.numbers)
    assert read.white == pytest.approx(100)
    assert read.spacing == pytest.approx(2)


def test_what_does_not_belong_together_is_refused(stored, tmp_path):
    image, regions = stored
    write(tmp_path, "moved", image, regions, other=np.diag([2.0, 2, 2.2, 1]))
    write(tmp_path, "flat", image, regions, affine=np.diag([2.0, 2, 3, 1]))
    write(tmp_path, "strange", image, np.where(regions == 60, 42, regions))
    for name, message in (("moved", "different grids"), ("flat", "cubic"), ("strange", r"\[42\]")):
        with pytest.raises(InputError, match=message):
            read_pair(tmp_path, name)


def test_held_out_subjects_are_never_trained_on(tmp_path):
    (tmp_path / "dlmuse").mkdir()
    for name in (*HELD_OUT, "IXI900-HH-0001", "IXI901-HH-0002"):
        (tmp_path / "dlmuse" / f"{name}_dseg.nii.gz").touch()
    assert find_subjects(tmp_path, held_out=False) == ["IXI900-HH-0001", "IXI901-HH-0002"]
    assert find_subjects(tmp_path, held_out=True) == sorted(HELD_OUT)
    with pytest.raises(InputError, match="no label maps"):
        find_subjects(tmp_path / "dlmuse", held_out=False)


def test_held_out_subjects_are_every_sixteenth_by_age():
    table = SHARED / "ixi" / "participants.csv"
    if not table.exists():
        pytest.skip(f"{table} is absent")
    with table.open(encoding="utf-8") as file:
        by_age = sorted((float(row["Age"]), row["MRID"]) for row in csv.DictReader(file))
    assert [name for _, name in by_age[8::16]] == list(HELD_OUT)


def test_tissues_outside_the_brain_are_parted_by_intensity():
    rng = np.random.default_rng(0)
    levels = np.array([0, 40, 90, 160])
    kind = rng.integers(0, 4, (20, 20, 20))
    image = (levels[kind] + rng.integers(0, 5, kind.shape)).astype(np.uint8)
    numbers = np.zeros(kind.shape, np.int16)
    numbers[:5] = 82
    found = with_tissues(image, numbers)
    assert (found[:5] == 82).all()
    assert set(np.unique(found[5:][kind[5:] == 0])) == {0}
    outside = found[5:]
    assert all(outside[kind[5:] == n].max() < outside[kind[5:] == n + 1].min() for n in range(3))
    assert outside.max() < 520
