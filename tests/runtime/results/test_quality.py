"""Signs that a result should be looked at: measures against the truth, each flag raised by what it is for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine, tiny_bundle, tiny_cascade, write_scan
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from nibabel.eulerangles import euler2mat
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from edgemuse.runtime.model.builtin import BUILT_IN, SAMPLE_SCAN, SAMPLE_TRUTH
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.regions.anatomy import anatomy_of, read_table
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.regions.muse import cortical_csf, muse_labels
from edgemuse.runtime.results.measures import (
    CEREBRUM_FORWARD,
    NOISE,
    apart,
    contrast_to_noise,
    faces_mm2,
    noise,
    pairs,
    tissue_ratio,
    turned_degrees,
)
from edgemuse.runtime.results.picture import to_bytes
from edgemuse.runtime.results.quality import CONTRAST_TO_NOISE, Subject, assess

SHARED = Path(__file__).parents[4] / "shared" / "data" / "t1"
RAS = np.diag([1.0, 1.0, 1.0, 1.0])
LABELS = (
    Label(0, 0, "background"),
    Label(1, 10, "Left-Thalamus"),
    Label(2, 49, "Right-Thalamus"),
    Label(3, 3, "cortex"),
)
SHAPE = (60, 50, 40)


def brain(noise_sd: float = 2.0) -> Subject:
    """A cortex around two thalami, nothing wrong with it."""
    grid = np.ogrid[tuple(slice(0, size) for size in SHAPE)]
    centre = (29.5, 24.5, 19.5)
    radius = np.sqrt(sum(((axis - at) / (0.4 * n)) ** 2 for axis, at, n in zip(grid, centre, SHAPE, strict=True)))
    classes = np.where(radius < 1, 3, 0).astype(np.uint8)
    classes[15:25, 20:30, 15:25], classes[35:45, 20:30, 15:25] = 1, 2
    grey = np.select([classes == 3, classes > 0], [np.where(radius < 0.75, 100, 200), 180], 10)
    shown = np.clip(grey + np.random.default_rng(0).normal(0, noise_sd, SHAPE), 0, 255).astype(np.uint8)
    return Subject(shown, classes, LABELS, RAS, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))


def changed(where: tuple[slice, ...], number: int) -> Subject:
    subject = brain()
    subject.classes[where] = number
    return subject


def names(subject: Subject) -> set[str]:
    return {flag.name for flag in assess(subject)}


def test_a_usual_result_is_not_flagged() -> None:
    assert assess(brain()) == ()


FLAGGED = {
    "field of view": changed(np.s_[:, :, :22], 3),
    "border": changed(np.s_[24:36, 12:38, :], 3),
    "missing": changed(np.s_[35:45, 20:30, 15:25], 3),
    "fragmented": changed(np.s_[28:32, :, :], 0),
    "asymmetry": changed(np.s_[35:41, 20:30, 15:25], 3),
    "asymmetric structures": changed(np.s_[35:42, 20:30, 15:25], 3),
    "noise": brain(noise_sd=40),
    "anisotropy": replace(brain(), zooms=(1.0, 1.0, 3.5)),
    "volume": replace(brain(), plausible_mm3=(1e6, 2e6)),
}


@pytest.mark.parametrize(("name", "subject"), FLAGGED.items(), ids=FLAGGED)
def test_flag(name: str, subject: Subject) -> None:
    found = {flag.name: flag for flag in assess(subject)}
    assert name in found
    flag = found[name]
    assert flag.measured != flag.limit
    assert flag.explanation.isprintable()
    consequences = {"asymmetry", "asymmetric structures"} if "asym" in name or name == "missing" else set()
    assert found.keys() - consequences == {name} - consequences


def test_network_trained_on_thick_slices() -> None:
    subject = replace(brain(), zooms=(1.0, 1.0, 3.5))
    assert names(replace(subject, spacing=(3.5, 1.0, 1.0))) == set()


def test_nothing_labelled() -> None:
    subject = brain()
    assert names(replace(subject, classes=np.zeros_like(subject.classes))) == {"missing"}


def test_mask_of_a_cascade_is_what_is_looked_at() -> None:
    inside = np.zeros(SHAPE, bool)
    inside[:, 10:30, 10:20] = True
    flags = {flag.name: flag for flag in assess(replace(brain(), inside=inside, plausible_mm3=(1.0, 1e6)))}
    assert set(flags) == {"border"}
    assert "the brain mask touches the left face of the volume (200 mm2)" in flags["border"].explanation


def test_regions_that_dlmuse_does_not_report_may_be_missing() -> None:
    labels = (*muse_labels(), cortical_csf(152))
    classes = np.arange(20**3).reshape(20, 20, 20) % 153
    shown = np.zeros(classes.shape, np.uint8)

    def flags(absent: int) -> set[str]:
        kept = np.where(classes == absent, 0, classes).astype(np.uint8)
        return {flag.explanation for flag in assess(Subject(shown, kept, labels, RAS, (1, 1, 1), (1, 1, 1)))}

    assert not any("not found" in text for text in flags(31))  # right vessel
    assert "Right hippocampus not found" in flags(17)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_faces_are_named_by_the_body(codes: str) -> None:
    """Whatever the orientation of the voxels: 5 x 2 voxels of 2 x 3 mm at the top."""
    inside = np.zeros((8, 9, 7), bool)
    inside[2:7, 3:5, 6] = True
    image = nib.Nifti1Image(inside.astype(np.uint8), np.diag([2.0, 3.0, 4.0, 1.0]))
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    turned = image.as_reoriented(ornt)
    areas = faces_mm2(np.asanyarray(turned.dataobj).astype(bool), turned.affine)
    assert areas == pytest.approx(dict.fromkeys(areas, 0.0) | {"superior": 60.0})


@given(
    arrays.arrays(np.uint8, (7, 12, 9), elements=st.integers(0, 4), fill=st.just(0)),
    st.permutations(range(3)),
    st.integers(1, 3),
)
def test_share_outside_the_largest_component(classes: np.ndarray, order: list[int], threads: int) -> None:
    """Counted again voxel by voxel: those in one block, or in blocks that touch, are connected."""
    labels = (*LABELS, Label(4, 3, "more cortex"))
    classes = classes.transpose(order)
    expected: dict[int, tuple[int, float]] = {}
    for label in labels[1:]:
        blocks = np.argwhere(classes == label.number) // 2
        if len(blocks):
            touching = (np.abs(blocks[:, None] - blocks[None]) <= 1).all(axis=-1)
            _, parts = connected_components(csr_array(touching))
            share = 1 - np.bincount(parts).max() / len(blocks)
            expected[label.index] = max(expected.get(label.index, (0, 0.0)), (len(blocks), share))
    found = apart(classes, labels, voxel_mm3=1e6, threads=threads)
    assert found == pytest.approx({index: share for index, (_, share) in expected.items()})


def test_small_structures_are_not_asked_whether_they_are_in_pieces() -> None:
    classes = np.zeros((20, 20, 20), np.uint8)
    classes[:10, :9, :11], classes[0, 0, -5:], classes[-5:, -5:, -5:] = 1, 2, 2
    assert set(apart(classes, LABELS, voxel_mm3=1.0)) == set()
    assert apart(classes, LABELS, voxel_mm3=1000 / 130) == {10: 0.0, 49: pytest.approx(5 / 130)}


@pytest.mark.parametrize(
    ("left", "right", "name"),
    [
        ("Left-Cerebral-White-Matter", "Right-Cerebral-White-Matter", "cerebral white matter"),
        ("left_caudate", "right_caudate", "caudate"),
        ("ctx-lh-cuneus", "ctx-rh-cuneus", "ctx cuneus"),
        ("Hippocampus_L", "Hippocampus_R", "hippocampus"),
        ("Frontal lobe left", "Frontal lobe right", "frontal lobe"),
    ],
)
def test_pairs_are_found_by_name(left: str, right: str, name: str) -> None:
    labels = [Label(0, 0, "left nothing"), Label(1, 5, left), Label(2, 6, right), Label(3, 7, "brain stem")]
    assert pairs({5: 1.0, 6: 2.0, 7: 3.0}, labels) == {name: (1.0, 2.0)}
    assert pairs({5: 1.0}, labels[:2]) == {}


@given(st.floats(1, 100), st.integers(0, 2**32 - 1))
def test_noise_of_a_flat_image_is_its_standard_deviation(sd: float, seed: int) -> None:
    image = np.random.default_rng(seed).normal(500, sd, (24, 24, 24)).astype(np.float32)
    assert NOISE * noise(image).std() == pytest.approx(sd, rel=0.05)


@given(st.tuples(*[st.floats(-20, 20)] * 4))
def test_a_slope_is_no_noise(slope: tuple[float, float, float, float]) -> None:
    i, j, k = np.indices((6, 7, 8))
    image = (slope[0] * i + slope[1] * j + slope[2] * k + slope[3]).astype(np.float32)
    np.testing.assert_allclose(noise(image), 0, atol=3e-3)


@given(st.integers(0, 2**32 - 1), st.permutations(range(3)))
def test_contrast_and_noise_are_those_of_every_voxel_inside(seed: int, order: list[int]) -> None:
    random = np.random.default_rng(seed)
    shown = random.integers(0, random.integers(2, 257), (15, 14, 13)).astype(np.uint8).transpose(order)
    inside = random.random(shown.shape) < 0.9
    inside[0] = inside[-1] = inside[:, 0] = inside[:, -1] = inside[..., 0] = inside[..., -1] = True
    core = (slice(1, -1),) * 3
    kernel = ndimage.generate_binary_structure(3, 1) / -6
    kernel[1, 1, 1] = 1
    residuals = np.sqrt(6 / 7) * ndimage.convolve(shown.astype(float), kernel)[core][inside[core]]
    sigma = 1.4826 * np.median(np.abs(residuals))
    spread = np.subtract(*np.percentile(shown[core][inside[core]], (90, 10)))
    assert contrast_to_noise(shown, inside) == pytest.approx(spread / max(sigma, 0.5))


@pytest.mark.parametrize("noise_sd", [4, 8, 16])
def test_contrast_to_noise(noise_sd: float) -> None:
    """Grey levels 60 and 160, half each: a contrast of 100."""
    grey = np.where(np.arange(40) < 20, 60.0, 160.0)[:, None, None] + np.zeros((40, 40, 40))
    shown = (grey + np.random.default_rng(0).normal(0, noise_sd, grey.shape)).round().astype(np.uint8)
    inside = np.ones(shown.shape, bool)
    spread = np.subtract(*np.percentile(shown, (90, 10)))
    assert contrast_to_noise(shown, inside) == pytest.approx(spread / noise_sd, rel=0.1)
    assert contrast_to_noise(shown, inside) == contrast_to_noise(shown[::-1], inside)


def test_contrast_to_noise_needs_voxels() -> None:
    assert contrast_to_noise(np.zeros((5, 5, 5), np.uint8), np.ones((5, 5, 5), bool)) is None
    assert contrast_to_noise(np.zeros((5, 5, 5), np.uint8), np.zeros((5, 5, 5), bool)) is None
    flat = contrast_to_noise(np.full((20, 20, 20), 7, np.uint8), np.ones((20, 20, 20), bool))
    assert flat == 0


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with a real scan is absent")
def test_noise_of_a_real_scan() -> None:
    image = nib.load(SHARED / "vxm_T1w.nii.gz").get_fdata().astype(np.float32)
    inside = np.asanyarray(nib.load(SHARED / "vxm_dseg.nii.gz").dataobj) > 0
    clean, level = contrast_to_noise(to_bytes(image), inside), np.ptp(np.percentile(image[inside], (1, 99)))
    noisy = image + np.random.default_rng(0).normal(0, 0.15 * level, image.shape).astype(np.float32)
    found = contrast_to_noise(to_bytes(noisy), inside)
    assert clean is not None
    assert found is not None
    assert clean > 2 * CONTRAST_TO_NOISE
    assert found < CONTRAST_TO_NOISE


WHITE = ("left_cerebral_white_matter", "right_cerebral_white_matter")
BRAIN = [row for row in read_table() if row.protocol == "FreeSurfer" and row.index]


@pytest.fixture(scope="module")
def sample() -> Subject:
    """The sample scan with its true labels, which nothing is wrong with."""
    image, truth = nib.load(SAMPLE_SCAN), np.asanyarray(nib.load(SAMPLE_TRUTH).dataobj)
    labels = open_bundle(BUILT_IN).labels
    numbers = np.zeros(max(label.index for label in labels) + 1, np.uint8)
    numbers[[label.index for label in labels]] = [label.number for label in labels]
    zooms = tuple(map(float, image.header.get_zooms()))
    return Subject(to_bytes(image.get_fdata(dtype=np.float32)), numbers[truth], labels, image.affine, zooms, zooms)


def with_affine(subject: Subject, change: np.ndarray) -> Subject:
    affine = change @ subject.affine
    return replace(subject, affine=affine, zooms=tuple(nib.affines.voxel_sizes(affine)))


def test_the_sample_is_not_flagged(sample: Subject) -> None:
    assert assess(sample) == ()


@pytest.mark.parametrize("signs", [(-1, -1, 1), (-1, 1, -1), (1, -1, -1), (1, -1, 1), (1, 1, -1), (-1, -1, -1)])
def test_a_head_that_lies_otherwise_than_its_header_says(sample: Subject, signs: tuple[int, int, int]) -> None:
    (flag,) = assess(with_affine(sample, np.diag([*signs, 1.0])))
    assert flag.name == "orientation"
    assert flag.measured > 50


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SLA", "RAI"])
@pytest.mark.parametrize("tilt", [0, 20])
def test_any_storage_order_of_a_head_that_is_right_is_fine(sample: Subject, codes: str, tilt: int) -> None:
    """And so is a head whose voxels are oblique to the scanner: in the voxels' own axes it lies straight."""
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(sample.affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    affine = sample.affine @ nib.orientations.inv_ornt_aff(turn, sample.classes.shape)
    moved = [nib.orientations.apply_orientation(volume, turn) for volume in (sample.shown, sample.classes)]
    turned = replace(
        with_affine(replace(sample, affine=affine), nib.affines.from_matvec(euler2mat(np.deg2rad(tilt)), [0, 0, 0])),
        shown=moved[0],
        classes=moved[1],
    )
    assert assess(turned) == ()


@given(st.floats(-180, 180), st.sampled_from(["across", "along"]))
def test_turned_degrees(degrees: float, plane: str) -> None:
    """Balls for left and right white matter, and a cerebellum that lies as in a head, turned about the middle."""
    angle, forward = np.deg2rad(degrees), np.deg2rad(CEREBRUM_FORWARD)
    places = np.array([[-30, 0, 0], [30, 0, 0], [0, -40 * np.sin(forward), -40 * np.cos(forward)]])
    turn = euler2mat(angle, 0, 0) if plane == "across" else euler2mat(0, 0, angle)
    labels = [Label(0, 0, "background"), *(Label(n, row.index, row.name) for n, row in enumerate(BRAIN, 1))]
    numbers = {label.name: label.number for label in labels}
    classes, grid = np.zeros((60, 60, 60), np.uint8), np.indices((60, 60, 60)) * 2 - 59
    for name, place in zip((*WHITE, "left_cerebellum_cortex"), places, strict=True):
        distance = np.linalg.norm(grid - (turn @ place)[:, None, None, None], axis=0)
        classes[distance < 12] = numbers[name]
    sideways, nodding = turned_degrees(classes, labels, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert (sideways if plane == "across" else nodding) == pytest.approx(abs(degrees), abs=4)
    assert plane == "across" or sideways < 4


@pytest.mark.parametrize("factor", [0.65, 0.8, 1.3, 1.5])
def test_a_wrong_voxel_size(sample: Subject, factor: float) -> None:
    flags = {flag.name: flag.explanation for flag in assess(with_affine(sample, np.diag([factor] * 3 + [1.0])))}
    assert flags.keys() - {"structures", "field of view", "border", "fragmented"} == {"volume"}
    assert f"voxel size of {' x '.join([f'{factor * sample.zooms[0]:.3g}'] * 3)} mm is wrong" in flags["volume"]


def test_another_contrast(sample: Subject) -> None:
    (flag,) = assess(replace(sample, shown=255 - sample.shown))
    assert flag.name == "contrast"
    assert flag.measured < 1


def test_a_structure_of_no_usual_size(sample: Subject) -> None:
    numbers = {label.name: label.number for label in sample.labels}
    classes = sample.classes.copy()
    classes[(classes == numbers["left_thalamus"]) & (np.arange(classes.shape[2]) % 4 > 0)] = numbers["left_putamen"]
    flags = {flag.name: flag.explanation for flag in assess(replace(sample, classes=classes))}
    assert "structures" in flags
    assert "left_thalamus" in flags["structures"]


def test_labels_of_no_known_protocol_have_no_anatomy() -> None:
    assert anatomy_of(LABELS).structures == {}
    assert turned_degrees(brain().classes, LABELS, RAS) is None
    assert tissue_ratio(brain().shown, brain().classes, LABELS) is None


def test_freesurfers_own_names_are_known() -> None:
    """Of FreeSurferColorLUT.txt, as far as they share a word with ours."""
    rows = [(2, "Left-Cerebral-White-Matter"), (41, "Right-Cerebral-White-Matter"), (3, "Left-Cerebral-Cortex")]
    rows += [(42, "Right-Cerebral-Cortex"), (8, "Left-Cerebellum-Cortex"), (47, "Right-Cerebellum-Cortex")]
    rows += [(10, "Left-Thalamus-Proper"), (11, "Left-Caudate"), (12, "Left-Putamen"), (16, "Brain-Stem")]
    labels = [Label(number, index, name) for number, (index, name) in enumerate([(0, "Unknown"), *rows])]
    assert sorted(anatomy_of(labels).structures) == sorted(index for index, _ in rows)
    swapped = [replace(label, name=label.name.replace("Left", "Right")) for label in labels]
    assert anatomy_of(swapped).structures == {}


def test_muse_is_known() -> None:
    anatomy = anatomy_of((*muse_labels(), cortical_csf(152)))
    assert {anatomy.structures[index].protocol for index in anatomy.structures} == {"MUSE"}
    assert len(anatomy.of("white", "left")) == len(anatomy.of("white", "right")) == 4
    assert anatomy.of("fluid") == [1, 46]


def test_the_table_is_of_ranges() -> None:
    for row in read_table():
        assert row.mm3 is None or 0 < row.mm3[0] < row.mm3[1]
        assert row.tissue in ("", "white", "grey", "cerebellum", "fluid")


@pytest.mark.parametrize("make", [tiny_bundle, tiny_cascade])
def test_flags_are_said_recorded_and_shown(make: object, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli, scan = CommandLine(capfd, tmp_path / "cache"), write_scan(tmp_path / "t1.nii.gz", spacing=(1, 1, 4))
    assert callable(make)
    ran = cli("segment", scan, "--model", make(tmp_path / "tiny.bundle"), "-o", tmp_path / "out")
    assert (ran.code, ran.err, len(ran.flags)) == (0, "", 1)
    assert "voxels of 1 x 1 x 4 mm are 4.0 times longer than wide" in ran.flags[0]
    flags = json.loads((tmp_path / "out" / "t1_provenance.json").read_text())["quality"]
    aniso = next(flag for flag in flags if flag["name"] == "anisotropy")
    assert (aniso["measured"], aniso["limit"]) == (4.0, 3.0)
    assert all(flag["explanation"] in ran.flags[0] for flag in flags)
