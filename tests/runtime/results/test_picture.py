"""The picture: sides as radiologists look at them, structures in their colours, on any grid."""

from __future__ import annotations

import io

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.results.picture import CAPTION, PANEL, picture, to_bytes

LABELS = [Label(0, 0, "background"), Label(1, 10, "left", "#ff0000"), Label(2, 49, "right", "#0000ff")]
RAS = np.diag([1.0, 1.0, 1.0, 1.0])


def halves() -> NDArray[np.uint8]:
    """(40, 50, 60) in RAS: class 1 on the patient's left, 2 on the right, with a margin."""
    classes = np.zeros((40, 50, 60), np.uint8)
    classes[4:20, 5:45, 6:54] = 1
    classes[20:36, 5:45, 6:54] = 2
    return classes


def drawn(grey: NDArray[np.uint8], classes: NDArray[np.uint8], affine: NDArray[np.float64]) -> NDArray[np.int64]:
    data = picture(grey, classes, affine, LABELS, "a caption")
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int64)


def panel(sheet: NDArray[np.int64], row: int, column: int) -> NDArray[np.int64]:
    top, left = CAPTION + row * PANEL, column * PANEL
    return sheet[top : top + PANEL, left : left + PANEL]


def test_left_is_on_the_right_of_the_picture() -> None:
    sheet = drawn(np.full((40, 50, 60), 100, np.uint8), halves(), RAS)
    assert sheet.shape == (CAPTION + 3 * PANEL, 3 * PANEL, 3)
    for row in (0, 1):  # axial, coronal
        red, _, blue = np.moveaxis(panel(sheet, row, 1), -1, 0)
        columns = np.arange(PANEL)
        assert (columns * (red > blue + 30).sum(0)).sum() / (red > blue + 30).sum() > PANEL / 2 + 20
        assert (columns * (blue > red + 30).sum(0)).sum() / (blue > red + 30).sum() < PANEL / 2 - 20


def test_up_is_superior_and_the_face_is_on_the_left() -> None:
    grey = np.zeros((40, 50, 60), np.uint8)
    grey[:, 40:, 50:] = 255  # anterior and superior
    sheet = drawn(grey, np.zeros_like(grey), RAS)
    sagittal = panel(sheet, 2, 1).sum(-1)
    sagittal[:, :20] = sagittal[:, -20:] = 0  # letters
    bright = np.argwhere(sagittal > 600).mean(0)
    assert bright[0] < PANEL / 2 - 50
    assert bright[1] < PANEL / 2 - 50


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SAL"])
def test_every_orientation_gives_the_same_picture(codes: str) -> None:
    rng = np.random.default_rng(0)
    grey, classes = rng.integers(0, 256, (40, 50, 60), np.uint8), halves()
    turn = nib.orientations.ornt_transform(nib.io_orientation(RAS), nib.orientations.axcodes2ornt(tuple(codes)))
    affine = RAS @ nib.orientations.inv_ornt_aff(turn, grey.shape)
    turned = (nib.apply_orientation(volume, turn) for volume in (grey, classes))
    assert np.array_equal(drawn(*turned, affine), drawn(grey, classes, RAS))


def test_thick_slices_keep_their_proportions() -> None:
    thick = np.diag([1.0, 1.0, 3.0, 1.0])
    sheet = drawn(np.full((40, 50, 20), 200, np.uint8), np.zeros((40, 50, 20), np.uint8), thick)
    body = panel(sheet, 1, 1)[:, 60:-60].sum(-1) > 300  # coronal, 40 mm wide and 60 mm high
    assert abs(int(body.any(1).sum()) - PANEL) <= 2


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 50, 3), (9, 1, 4)])
def test_small_volumes_and_no_labels(shape: tuple[int, int, int]) -> None:
    drawn(np.zeros(shape, np.uint8), np.zeros(shape, np.uint8), RAS)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_grey_values_do_not_depend_on_the_scale(scale: float) -> None:
    image = np.random.default_rng(1).gamma(2.0, 50.0, (30, 31, 32)).astype(np.float32)
    shown = to_bytes(image * np.float32(scale) + np.float32(5 * scale))
    assert np.abs(shown.astype(int) - to_bytes(image)).max() <= 1
    assert shown.min() == 0
    assert shown.max() == 255


def test_a_constant_image_is_no_error() -> None:
    assert to_bytes(np.full((3, 3, 3), 7, np.float32)).shape == (3, 3, 3)


def test_flags_get_a_line_of_their_own() -> None:
    grey, classes = np.full((40, 50, 60), 100, np.uint8), halves()
    data = picture(grey, classes, RAS, LABELS, "a caption", ["border", "noise"])
    sheet = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int64)
    plain = drawn(grey, classes, RAS)
    assert np.array_equal(sheet[:CAPTION], plain[:CAPTION])
    assert np.array_equal(sheet[2 * CAPTION :], plain[CAPTION:])
    assert sheet[CAPTION : 2 * CAPTION].any()
