import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[dev]'")
pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed: pip install '.[dev]'")

from edgemuse.bench.pages.builtin import DEVELOPMENT, ISLANDS, MAIN, MEANS, NOT_COMPARED, VXM, Found, report
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import open_bundle

BUNDLE = open_bundle(BUILT_IN)
STRUCTURES = [label.index for label in BUNDLE.manifest.labels if label.index]
GOOD = dict.fromkeys(STRUCTURES, 0.9)
HEADS = {"head": ({2: 1.0, 5: 1.2}, 1.3)}


def fallen_short(real=GOOD, each=(GOOD,), heads=HEADS):
    return [what for what, (_, holds) in Found({VXM: real}, each, heads, {}).checks.items() if not holds]


def test_a_model_that_is_good_everywhere_falls_short_of_nothing():
    assert not fallen_short()


@pytest.mark.parametrize("index", STRUCTURES)
def test_one_structure_counts_where_it_is_compared(index):
    poor = GOOD | {index: 0.69}
    assert fallen_short(real=poor) == (["vxm: no main structure below 0.7"] if index in MAIN else [])
    beyond = fallen_short(real=GOOD | {index: -2.0})
    assert ("vxm: mean Dice of the 29 at least 0.83" in beyond) == (index not in NOT_COMPARED)


def test_every_figure_can_fall_short():
    assert fallen_short(each=(GOOD, dict.fromkeys(STRUCTURES, 0.79))) == ["held-out synthetic scans: at least 0.85"]
    for ratio in (0.79, 1.26):
        assert fallen_short(heads=HEADS | {"other": ({2: ratio}, 1.3)}) == ["whole heads: left to right 0.8 to 1.25"]
    for litres in (0.8, 1.9):
        assert fallen_short(heads=HEADS | {"other": ({2: 1.0}, litres)}) == ["whole heads: brain of 0.9 to 1.8 l"]


def test_the_page_has_every_structure_and_every_mean():
    rng = np.random.default_rng(0)
    real = {column: dict(zip(STRUCTURES, rng.random(32), strict=True)) for column in (VXM, ISLANDS, DEVELOPMENT)}
    names = {label.index: label.name for label in BUNDLE.manifest.labels}
    page = report(names, Found(real, [GOOD], HEADS, {"scan": {"as scanned": 0.9}}))
    assert "| as scanned | 0.900 |" in page
    rows = {line.split(" | ")[0].strip("|* "): line for line in page.splitlines() if line.startswith("| ")}
    for column, scores in enumerate(real.values()):
        assert f"{scores[10]:.3f}" == rows["10 left_thalamus"].strip("| ").split(" | ")[2 + column]
        for name, left_out in MEANS.items():
            wanted = np.mean([score for index, score in scores.items() if index not in left_out])
            assert f"{wanted:.3f}" == rows[name].strip("| ").split(" | ")[2 + column]
