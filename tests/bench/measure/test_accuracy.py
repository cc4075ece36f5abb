"""Scores against independent libraries on random label maps, and on maps whose scores are known."""

import numpy as np
import pytest
from bundles import write_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install '.[dev]'")

from edgemuse.bench.measure.accuracy import (
    Structure,
    compare,
    compare_files,
    hausdorff,
    intraclass_correlation,
    read_mapping,
    same_protocol,
    volume_agreement,
)
from edgemuse.engines.errors import InputError
from edgemuse.runtime.regions.labels import Label

SPACINGS = st.tuples(*[st.sampled_from([0.7, 1.0, 1.3, 2.0])] * 3)
SHAPES = st.tuples(*[st.integers(2, 7)] * 3)


def affine(spacing):
    return np.diag([*spacing, 1.0])


@st.composite
def label_maps(draw):
    shape = draw(SHAPES)
    maps = arrays.arrays(np.int64, shape, elements=st.integers(0, 3))
    return draw(maps), draw(maps), draw(SPACINGS)


STRUCTURES = [Structure(f"s{n}", (n,), (n,)) for n in (1, 2, 3)]


@pytest.mark.filterwarnings("ignore")  # of MONAI about itself
@settings(max_examples=40)
@given(label_maps())
def test_dice_and_distances_equal_monais(drawn):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    metrics = pytest.importorskip("monai.metrics", reason="MONAI is not installed: pip install '.[dev]'")
    found, truth, spacing = drawn
    comparison = compare(found, truth, STRUCTURES, affine(spacing))
    present = [n for n in (1, 2, 3) if (found == n).any() or (truth == n).any()]
    assert [score.name for score in comparison.scores] == [f"s{n}" for n in present]
    assert comparison.absent == 3 - len(present)
    for number, score in zip(present, comparison.scores, strict=True):
        masks = [torch.from_numpy((volume == number)[None, None].astype(np.float32)) for volume in (found, truth)]
        dice = metrics.compute_dice(*masks, ignore_empty=False)
        assert score.dice == pytest.approx(float(dice), abs=1e-6)
        if score.hd95_mm is None:
            assert 0 in (score.found_mm3, score.truth_mm3)
            continue
        distance = metrics.compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing)
        assert score.hd95_mm == pytest.approx(float(distance), rel=1e-5, abs=1e-5)


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(3, 8), st.just(2)), elements=st.floats(1, 100, width=16)),
)
def test_icc_equals_that_of_the_analysis_of_variance(ratings):
    formula = pytest.importorskip("statsmodels.formula.api", reason="statsmodels is not installed")
    from statsmodels.stats.anova import anova_lm

    pandas = pytest.importorskip("pandas")
    if np.ptp(ratings.mean(1)) < 1 or np.ptp(ratings, axis=1).max() < 1:
        return
    subjects, raters = np.indices(ratings.shape)
    table = pandas.DataFrame({"y": ratings.ravel(), "s": subjects.ravel(), "r": raters.ravel()})
    squares = anova_lm(formula.ols("y ~ C(s) + C(r)", table).fit())["mean_sq"]
    n, k = ratings.shape
    s, r, e = squares["C(s)"], squares["C(r)"], squares["Residual"]
    assert intraclass_correlation(ratings) == pytest.approx((s - e) / (s + (k - 1) * e + k * (r - e) / n), abs=1e-6)


def test_distance_of_two_voxels_is_their_distance():
    first, second = np.zeros((2, 5, 6, 7), bool)
    first[0, 1, 1], second[3, 1, 5] = True, True
    assert hausdorff(first, second, (1.0, 1.0, 2.0)) == pytest.approx((3**2 + 8**2) ** 0.5)


def test_a_shift_by_a_voxel_is_a_displacement_of_one():
    truth = np.zeros((8, 8, 8), np.int64)
    truth[2:5, 2:5, 2:5] = 1
    score = compare(np.roll(truth, 1, 0), truth, STRUCTURES[:1], np.eye(4)).scores[0]
    assert score.shift_voxels == pytest.approx(1)
    assert score.dice == pytest.approx(2 / 3)


def test_structures_absent_in_one_map_score_zero_and_in_both_are_left_out():
    found, truth = np.zeros((2, 4, 4, 4), np.int64)
    found[0], truth[1] = 1, 7
    comparison = compare(found, truth, STRUCTURES, np.eye(4))
    assert [(score.name, score.dice, score.hd95_mm) for score in comparison.scores] == [("s1", 0, None)]
    assert comparison.absent == 2


def test_volumes_that_are_equal_agree_wholly():
    volumes = volume_agreement([1.0, 20.0, 300.0], [1.0, 20.0, 300.0])
    assert (volumes.pearson, volumes.icc, volumes.mean_absolute_mm3) == pytest.approx((1, 1, 0))
    shifted = volume_agreement([1.0, 2.0, 3.0], [11.0, 12.0, 13.0])
    assert shifted.pearson == pytest.approx(1)
    assert shifted.icc < 0.1  # absolute agreement, not correlation


def test_mapping_joins_labels(tmp_path):
    path = tmp_path / "mapping.tsv"
    path.write_text("name\tmodel\ttruth\nthalamus\t10,49\t9\n")
    labels = [Label(0, 0, "background"), Label(1, 10, "left"), Label(2, 49, "right")]
    structures = read_mapping(path, labels)
    found, truth = np.zeros((2, 4, 4, 4), np.int64)
    found[0], found[1], truth[:2] = 10, 49, 9
    comparison = compare(found, truth, structures, np.eye(4))
    assert [(score.name, score.dice) for score in comparison.scores] == [("thalamus", 1)]
    assert comparison.agreement == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [("name\tmodel\nx\t1\n", "truth"), ("name\tmodel\ttruth\nx\ta\t1\n", "not a mapping"), ("", "no structure"),
     ("name\tmodel\ttruth\nx\t77\t1\n", "no label 77"), ("name\tmodel\ttruth\nx\t10\n", "not a mapping")],
)  # fmt: skip
def test_a_bad_mapping_is_refused(text, reason, tmp_path):
    path = tmp_path / "mapping.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=reason):
        read_mapping(path, [Label(0, 0, "background"), Label(1, 10, "left")])


def test_another_grid_and_what_is_no_label_map_are_refused(tmp_path):
    structures = same_protocol([Label(0, 0, "background"), Label(1, 1, "one")])
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[3:6] = 1
    first = write_scan(tmp_path / "a_dseg.nii.gz", labels)
    other = write_scan(tmp_path / "b_dseg.nii.gz", labels, (2.0, 2.0, 2.0))
    fractions = write_scan(tmp_path / "c_dseg.nii.gz", labels.astype(np.float32) / 2)
    assert compare_files(first, first, structures).scores[0].dice == 1
    with pytest.raises(InputError, match="grid"):
        compare_files(first, other, structures)
    with pytest.raises(InputError, match="whole numbers"):
        compare_files(fractions, first, structures)
