"""Image files as rows: their pixels are scaled as the objective's data is, or they are refused."""

import numpy as np
import pytest
from manifests import an_input
from PIL import Image

from tuner.errors import TunerError
from tuner.model.images import read_image

GREY = np.array([[0, 51], [204, 255]], dtype=np.uint8)


def _saved(path, pixels, mode=None):
    Image.fromarray(np.asarray(pixels), mode).save(path)
    return path


@pytest.fixture
def grey(tmp_path):
    return _saved(tmp_path / "grey.png", GREY)


@pytest.mark.parametrize(
    ("its", "wanted"),
    [
        (an_input(2, 2, dtype="uint8"), GREY),
        (an_input(1, 2, 2, seen=(0, 255)), GREY[None]),
        (an_input(1, 2, 2, seen=(0, 1)), GREY[None] / 255),
        (an_input(4, seen=(0, 16)), GREY.reshape(4) / 255 * 16),
        (an_input(3, 2, 2, seen=(0, 1)), np.stack([GREY / 255] * 3)),
    ],
)
def test_white_becomes_what_it_is_in_the_objective_s_data(grey, its, wanted):
    found = read_image(grey, its, resize=False)
    assert found.shape == its.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("seen", [None, (-2.1, 2.6), (0, 4.2), (0, 60000)])
def test_a_range_that_is_none_of_pixels_is_refused(grey, seen):
    with pytest.raises(TunerError, match=r"pixels from 0 to 1, 16 or 255, .*give arrays as the objective's data"):
        read_image(grey, an_input(2, 2, seen=seen), resize=False)


def test_an_image_of_another_size_is_refused_unless_it_may_be_resized(tmp_path, grey):
    its = an_input(1, 4, 3, dtype="uint8")
    with pytest.raises(TunerError, match="needs 3 x 4 pixels, got 2 x 2: --resize fits it"):
        read_image(grey, its, resize=False)
    assert read_image(grey, its, resize=True).shape == (1, 4, 3)
    with pytest.raises(TunerError, match=r"needs 9 pixels in all, got 2 x 2: --resize"):
        read_image(grey, an_input(9, dtype="uint8"), resize=False)
    assert read_image(grey, an_input(9, dtype="uint8"), resize=True).shape == (9,)
    with pytest.raises(TunerError, match=r"needs 8 pixels in all, got 2 x 2$"):
        read_image(grey, an_input(8, dtype="uint8"), resize=True)
    with pytest.raises(TunerError, match="the model's is"):
        read_image(grey, an_input(2, 2, 2, dtype="uint8"), resize=True)


def test_colours_become_grey_and_what_would_be_lost_is_refused(tmp_path):
    colour = np.zeros((2, 2, 3), dtype=np.uint8)
    colour[..., 0] = 255
    red = _saved(tmp_path / "red.png", colour)
    assert read_image(red, an_input(3, 2, 2, dtype="uint8"), resize=False)[:, 0, 0].tolist() == [255, 0, 0]
    assert read_image(red, an_input(2, 2, dtype="uint8"), resize=False).tolist() == [[76, 76], [76, 76]]
    opaque = np.dstack([colour, np.full((2, 2), 255, dtype=np.uint8)])
    its = an_input(3, 2, 2, dtype="uint8")
    assert read_image(_saved(tmp_path / "opaque.png", opaque), its, resize=False)[0, 0, 0] == 255
    opaque[0, 0, 3] = 0
    with pytest.raises(TunerError, match="no transparent part"):
        read_image(_saved(tmp_path / "clear.png", opaque), its, resize=False)
    with pytest.raises(TunerError, match="8 bits for each"):
        read_image(_saved(tmp_path / "deep.png", GREY.astype(np.uint16) * 200), its, resize=False)


def test_what_is_no_image_is_told(tmp_path, grey):
    its = an_input(2, 2, dtype="uint8")
    broken = tmp_path / "broken.png"
    noise = np.random.default_rng(0).integers(0, 255, (2, 900), dtype=np.uint8)
    broken.write_bytes(_saved(tmp_path / "whole.png", noise).read_bytes()[:600])
    with pytest.raises(TunerError, match=r"cannot read .*broken.png"):
        read_image(broken, its, resize=True)
    other = tmp_path / "other.png"
    Image.fromarray(GREY).save(other, format="GIF")
    with pytest.raises(TunerError, match="needs to be a PNG or JPEG image, got something else"):
        read_image(other, its, resize=False)
