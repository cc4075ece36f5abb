from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemuse.runtime.model.manifest import Normalization
from edgemuse.runtime.network.preprocess import nonzero_box, normalize
from edgemuse.training import distil
from edgemuse.training.distil import (
    CLASSES,
    Choices,
    Samples,
    draw_sample,
    draw_tissue,
    draw_voxels,
    family_means,
    grid_shape,
    linear_at,
    mirrored,
    rarity_of,
    remapped,
    scored,
    vote_at,
)
from edgemuse.training.regions import class_table
from edgemuse.training.synthesis import generator, usual_look

SMALL = Choices(voxels=500, boxes=((60.0, 60.0, 60.0),) * 3)
seeds = st.integers(0, 2**31)
few = settings(max_examples=8, deadline=None)


def grid(shape, offset=0.0):
    return [
        (torch.arange(float(n)) + offset).reshape([-1 if k == axis else 1 for k in range(3)]).expand(shape)
        for axis, n in enumerate(shape)
    ]


@few
@given(seed=seeds)
def test_a_sample_is_what_a_network_can_take(pair, seed):
    image, target = draw_sample(pair, SMALL, generator(1, seed))
    assert image.shape == target.shape == (32, 32, 32)
    assert image.dtype == torch.float32
    assert target.dtype == torch.uint8
    assert torch.isfinite(image).all()
    known = class_table()[[0, 1, 59, 60, 81, 82, 100, 101]]
    assert set(target.unique().tolist()) <= set(known.tolist())


def test_a_number_and_a_seed_give_the_same_sample_again(pair):
    first, again = (Samples([pair], rarity_of([pair]), SMALL, 5, start, 9) for start in (0, 3))
    assert all(torch.equal(one, other) for one, other in zip(first[3], again[0], strict=True))
    assert not torch.equal(first[3][0], first[4][0])


def test_the_voxels_that_count_have_the_classes_of_the_target(pair):
    samples = Samples([pair], rarity_of([pair]), SMALL, 5, 0, 1)
    image, where, wanted = samples[0]
    assert image.shape == (1, 32, 32, 32)
    assert where.shape == wanted.shape == (500,)
    g = generator(5, 0)
    torch.rand((), generator=g)  # the choice of the pair
    _, target = draw_sample(pair, SMALL, g)
    assert torch.equal(target.reshape(-1)[where].long(), wanted)


@pytest.mark.parametrize(("spacing", "shape"), [(2.0, (80, 96, 80)), (1.5, (112, 128, 112)), (1.0, (160, 192, 160))])
def test_every_spacing_has_grids_that_the_network_can_halve(spacing, shape):
    assert grid_shape((160.0, 192.0, 160.0), spacing) == shape


def test_boxes_are_drawn_by_their_shares():
    g = generator(2, 0)
    drawn = [Choices().shape(g) for _ in range(400)]
    shares = [drawn.count(shape) / 400 for shape in ((80, 96, 80), (96, 112, 80), (112, 128, 96))]
    assert shares == pytest.approx(distil.BOX_SHARES, abs=0.08)


def test_voxels_on_both_sides_of_a_border_count_alike():
    target = torch.zeros(30, 20, 20, dtype=torch.uint8)
    target[15:] = 1
    where = draw_voxels(target, torch.zeros(2), 120_000, generator(0, 0))
    planes = torch.bincount(where // 400, minlength=30).float()
    assert planes[14] == pytest.approx(float(planes[15]), rel=0.02)
    assert planes[15] == pytest.approx(float(planes[29]), rel=0.02)
    assert planes[0] == pytest.approx(distil.FAR * float(planes[29]), rel=0.05)


def test_rare_regions_are_drawn_more_densely():
    target = torch.ones(20, 20, 20, dtype=torch.uint8)
    target[10, 10, 10] = 2
    where = draw_voxels(target, torch.tensor([0.0, 0.0, 7.0]), 8_000, generator(0, 0))
    assert (target.reshape(-1)[where] == 2).sum() >= 4
    planes = torch.bincount(where // 400, minlength=20).float()
    assert planes[9] == pytest.approx(float(planes[10]), rel=0.05)  # what is next to it as well


def test_rarity_is_of_small_classes(pair):
    rarity = rarity_of([pair])
    count = int((pair.numbers == 60).sum())
    assert rarity.shape == (CLASSES,)
    assert float(rarity[class_table()[60]]) == pytest.approx(max((400 / count) ** 0.5 - 1, 0), abs=1e-4)
    assert rarity[class_table()[82]] == 0


def test_mirroring_swaps_sides_and_twice_changes_nothing(pair):
    turned = mirrored(pair)
    assert np.array_equal(turned.image, pair.image[:, :, ::-1])
    assert np.array_equal(turned.numbers == 60, (pair.numbers == 59)[:, :, ::-1])
    assert np.array_equal(mirrored(turned).numbers, pair.numbers)


def test_at_the_voxels_themselves_nothing_is_interpolated(pair):
    classes = torch.from_numpy(class_table()[pair.numbers])
    points = grid(tuple(classes.shape))
    assert torch.equal(vote_at(classes, points), classes)
    assert torch.allclose(linear_at(classes.float(), points), classes.float(), atol=1e-3)


def test_votes_are_the_largest_interpolated_share(pair):
    classes = torch.from_numpy(class_table()[pair.numbers])
    points = [torch.rand(200, 1, 1, generator=generator(8, n)) * (size - 1) for n, size in enumerate(classes.shape)]
    found = vote_at(classes, points)
    shares = torch.stack([linear_at((classes == n).float(), points) for n in range(CLASSES)])
    most = shares.max(0).values
    assert torch.allclose(shares.gather(0, found[None].long())[0], most, atol=1e-4)


def test_outside_the_map_is_background():
    classes = torch.ones(4, 4, 4, dtype=torch.uint8)
    points = grid((6, 6, 6), -1.0)
    found = vote_at(classes, points)
    assert found.sum() == 64
    assert found[1:5, 1:5, 1:5].all()


@few
@given(seed=seeds)
def test_a_painted_scan_has_the_intensities_drawn(pair, seed):
    g = generator(6, seed)
    look = usual_look(g, False, distil.TISSUE)
    look = replace(look, spreads=torch.zeros(1024))
    image = draw_tissue(pair, look, 1.0, g)
    numbers = torch.from_numpy(pair.numbers)
    for number in (1, 60, 82, 101):
        assert float(image[numbers == number].mean()) == pytest.approx(float(look.means[number]), abs=0.05)
    assert not image[numbers == 0].any()


@few
@given(seed=seeds)
def test_a_real_scan_keeps_its_order_of_tissues_mostly(pair, seed):
    g = generator(7, seed)
    image = draw_tissue(pair, usual_look(g, False, distil.TISSUE), 0.0, g)
    numbers = torch.from_numpy(pair.numbers)
    fluid, grey, white = (float(image[numbers == number].mean()) for number in (1, 101, 82))
    assert fluid < grey
    assert fluid < white


def test_families_share_a_mean():
    numbers = torch.tensor([100, 101, 104, 82]).reshape(1, 2, 2)
    means = family_means(torch.tensor([1.0, 2, 3, 8]).reshape(1, 2, 2), numbers)
    assert means[[100, 101, 104, 207]].tolist() == [2, 2, 2, 2]
    assert means[81] == means[82] == 8


@few
@given(seed=seeds)
def test_a_remapped_scan_keeps_air(seed):
    image = remapped(torch.linspace(0, 2, 50).reshape(2, 5, 5), generator(9, seed))
    assert image.flatten()[0] == 0
    assert image.min() >= 0
    assert image.max() <= 1.8


def test_scores_are_those_of_the_runtime(pair):
    image = pair.image.astype(np.float32)
    box = nonzero_box(image)
    expected, cropped = np.zeros_like(image), image[box].copy()
    normalize(cropped, Normalization("zscore", use_mask=False))
    expected[box] = cropped
    assert np.allclose(scored(torch.from_numpy(image), 0.0).numpy(), expected, atol=1e-4)
    assert not scored(torch.zeros(3, 3, 3), 0.0).any()


def test_empty_air_that_is_not_seen_changes_the_scores(pair):
    image = torch.from_numpy(pair.image).float()
    more = torch.zeros(80, 45, 35)
    more[:40] = image
    more[79, 0, 0] = 1e-3  # the box reaches over all of it
    whole = more.clone()
    share = 1 - image[nonzero_box(image.numpy())].numel() / whole[nonzero_box(whole.numpy())].numel()
    assert torch.allclose(scored(image, share)[10:30, 10:30, 10:20], scored(whole, 0.0)[10:30, 10:30, 10:20], atol=1e-3)
