from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemuse.training import synthesis
from edgemuse.training.labelmaps import PLEXUS, class_table, mirror_table
from edgemuse.training.synthesis import (
    Warp,
    brain_centre,
    brain_mask,
    draw_look,
    draw_patch,
    draw_scan,
    draw_view,
    draw_warp,
    generator,
    inside_view,
    mirror,
    paint,
    sample_labels,
    smooth_by,
    textured,
    usual_look,
)

SHAPE = (24, 32, 16)
seeds = st.integers(0, 2**31)
few = settings(max_examples=8, deadline=None)


def still(labels):
    """No deformation: point 0 is the array's first voxel."""
    return Warp(torch.eye(3), torch.zeros(3), torch.zeros(1, 3, 5, 5, 5))


def test_without_deformation_the_grid_reads_the_map(head):
    found = sample_labels(head, still(head), torch.tensor([10.0, 20.0, 5.0]), SHAPE, 1.0)
    assert np.array_equal(found.numpy(), head[10:34, 20:52, 5:21])


def test_outside_the_map_is_air(head):
    found = sample_labels(head + 1, still(head), torch.tensor([-4.0, 0.0, 0.0]), SHAPE, 1.0)
    assert not found[:4].any()
    assert found[4:].all()


def test_spacing_strides_through_the_map(head):
    found = sample_labels(head, still(head), torch.zeros(3), SHAPE, 2.0)
    assert np.array_equal(found.numpy(), head[:48:2, :64:2, :32:2])


def test_mirroring_swaps_sides(head):
    turned = mirror(head)
    assert np.array_equal(mirror(turned), head)
    assert np.array_equal(turned == 10, (head == 49)[:, :, ::-1])
    assert np.argwhere(turned == 10)[:, 2].mean() > 35  # left stays left


@few
@given(seed=seeds)
def test_a_patch_is_what_a_network_can_take(head, seed):
    image, target = draw_patch([head], SHAPE, 1.5, generator(0, seed))
    assert image.shape == (1, *SHAPE)
    assert image.dtype == torch.float32
    assert target.shape == SHAPE
    assert target.dtype == torch.uint8
    assert torch.isfinite(image).all()
    assert set(target.unique().tolist()) <= set(class_table()[np.append(np.unique(head), mirror_table()[head].ravel())])


def test_a_number_and_a_seed_give_the_same_patch_again(head):
    pairs = ((3, 8), (3, 8), (3, 9), (4, 8))
    first, again, *others = (draw_patch([head], SHAPE, 4.0, generator(*pair)) for pair in pairs)
    assert first[0].any()  # an empty patch is like another
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not any(torch.equal(first[0], other[0]) for other in others)


@few
@given(seed=seeds)
def test_scan_and_truth_share_a_grid(head, seed):
    """Without noise, texture and blur, every label has one intensity where its truth says it is."""
    g = generator(1, seed)
    warp, look = draw_warp(head, g), draw_look(g)
    look = replace(look, spreads=torch.zeros(1024), stripped=None, bias=torch.zeros(1, 1, 4, 4, 4))
    corner = torch.tensor([-12.0, -16.0, -8.0])
    tissue = sample_labels(head, warp, corner, SHAPE, 1.0)
    image = paint(tissue, look, corner, 1.0, g)
    assert torch.equal(image, look.means[tissue.long()])


@pytest.mark.parametrize("spacing", [1.0, 1.25, 1.3, 1.9])
@pytest.mark.parametrize("axis", range(3))
def test_image_and_truth_of_a_patch_do_not_drift_apart(spacing, axis):
    """A ramp of labels whose intensity is their number: what the image shows is where the truth has it, to the end."""
    ramp = np.moveaxis(np.broadcast_to(np.arange(80, dtype=np.int16) + 1, (80, 80, 80)), 2, axis).copy()
    look = replace(
        usual_look(generator(14, 0), stripped=False),
        means=torch.arange(1024.0),
        spreads=torch.zeros(1024),
        bias=torch.zeros(1, 1, 4, 4, 4),
        blur=(0.0, 0.0, 0.0),
        noise=0.0,
        floor=True,
    )
    start = torch.full((3,), 4.5)  # points of the image lie on voxels of the map
    image, truth = synthesis._scan(ramp, still(ramp), look, start, (24, 24, 24), spacing, generator(14, 1))
    off = (image - truth).movedim(axis, 0)[2:-2]
    assert off.abs().max() <= 0.51
    assert off[-10:].mean().abs() < 0.15


@few
@given(seed=seeds)
def test_textured_structures_are_not_uniform_and_alike_in_every_patch(head, seed):
    g = generator(12, seed)
    look = replace(draw_look(g), spreads=torch.zeros(1024), stripped=None, bias=torch.zeros(1, 1, 4, 4, 4))
    look = textured(replace(look, means=torch.ones(1024)), g)
    tissue = torch.from_numpy(head)
    image = paint(tissue, look, torch.zeros(3), 1.0, g)
    share = look.texture.shares[tissue.long()]
    field = ((image - 1) / share)[share.abs() > 0.001]
    assert field.std() > 0.1
    assert field.abs().max() <= look.texture.field.abs().max() * 1.01
    part = paint(tissue[4:, 8:, 2:], look, torch.tensor([4.0, 8.0, 2.0]), 1.0, g)
    assert torch.allclose(part, image[4:, 8:, 2:], atol=1e-5)


@few
@given(seed=seeds)
def test_left_and_right_look_alike(seed):
    means = draw_look(generator(2, seed)).means
    for left, right in ((2, 41), (3, 42), (10, 49), (17, 53)):
        assert means[left] == pytest.approx(float(means[right]), rel=0.12, abs=1e-3)


def test_most_contrasts_are_those_of_t1():
    looks = [draw_look(generator(4, n)).means for n in range(200)]
    usual = [means[24] < means[3] < means[2] for means in looks]
    assert 0.75 < np.mean(usual) < 0.97


@few
@given(seed=seeds, stripped=st.booleans())
def test_usual_scans_have_the_contrast_of_t1_at_1_mm(seed, stripped):
    look = usual_look(generator(8, seed), stripped)
    assert look.voxel == (1.0, 1.0, 1.0)
    assert (look.stripped is not None) == stripped
    assert 0.01 <= look.noise <= 0.04
    assert look.means[24] < look.means[3] < look.means[2]


@few
@given(seed=seeds)
def test_choroid_plexus_is_between_fluid_and_grey_matter_and_alike_on_both_sides(seed):
    means = usual_look(generator(13, seed), stripped=False).means
    low, high = float(means[4]) * 0.9, float(means[3]) * 1.25
    for left, right in PLEXUS.items():
        assert low < float(means[left]) < high
        assert means[left] == pytest.approx(float(means[right]), rel=0.12)


def test_a_share_of_the_patches_is_of_usual_scans(head, monkeypatch):
    drawn = []
    for name in ("usual_look", "draw_look"):
        draw = getattr(synthesis, name)
        monkeypatch.setattr(synthesis, name, lambda *a, name=name, draw=draw: drawn.append(name) or draw(*a))
    for n in range(24):
        draw_patch([head], (8, 8, 8), 2.0, generator(9, n))
    usual = drawn.count("usual_look")
    assert 4 <= usual <= 20
    assert drawn.count("draw_look") == 24  # a usual look is made from any


def test_a_grown_mask_holds_the_brain(head):
    labels = torch.from_numpy(head)
    brain = (labels > 0) & (labels < 500) & (labels != 24)
    masks = [brain_mask(labels, grown, False, 1.0) > 0 for grown in (0.0, 0.5, 1.0)]
    assert (masks[0] & brain).sum() > 0.97 * brain.sum()
    assert brain.sum() < masks[1].sum() < masks[2].sum()
    assert not (masks[0] & ~masks[1]).any()


@pytest.mark.parametrize("seed", range(4))
def test_stripped_scans_are_zero_around_the_brain(head, seed, monkeypatch):
    monkeypatch.setattr(synthesis, "draw_view", lambda _: ((-50.0, 50.0),) * 3)
    g = generator(5, seed)
    image, tissue = draw_scan(head, g, draw_look(g))
    assert image.shape == tissue.shape
    assert float(image.min()) >= 0
    if float((image == 0).float().mean()) > 0.05:
        far = smooth_by((tissue > 0).float(), (3.0, 3.0, 3.0)) < 1e-4
        assert not image[far].any()


def test_smoothing_keeps_constants_and_mass_in_the_middle():
    assert torch.allclose(smooth_by(torch.ones(9, 10, 11), (2.0, 0.1, 5.0)), torch.ones(9, 10, 11), atol=1e-5)
    impulse = torch.zeros(41, 41, 41)
    impulse[20, 20, 20] = 1
    smooth = smooth_by(impulse, (2.0, 2.0, 2.0))
    assert float(smooth.sum()) == pytest.approx(1, abs=1e-3)
    variance = float((smooth.sum((1, 2)) * (torch.arange(41) - 20.0) ** 2).sum())
    assert variance == pytest.approx(4, rel=0.02)


@few
@given(seed=seeds)
def test_views_hold_the_centre(seed):
    view = draw_view(generator(6, seed))
    assert inside_view(torch.zeros(3), (1, 1, 1), 1.0, view).all()
    assert not inside_view(torch.full((3,), 200.0), (1, 1, 1), 1.0, view).any()


def test_the_centre_is_the_brains(head):
    assert torch.allclose(brain_centre(head), torch.tensor([39.5, 44.5, 34.5]), atol=0.6)
