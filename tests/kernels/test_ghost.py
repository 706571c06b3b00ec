"""ghost on every path: against OpenCV and float64 for the blur, counted by hand for the rest; what
is not ghosted keeps its bytes.
"""

import itertools

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import PATHS, noise, on, worst
from vise_kernels import cosines, ghost

IMAGES = [(41, 67), (67, 41), (48, 80), (5, 90), (1, 1)]
# x1, y1, x2, y2 on the first three: odd, one pixel wide, one high, one pixel, full image, larger
# than the image
BOXES = [
    (3, 2, 40, 37),
    (7, 0, 8, 41),
    (0, 5, 41, 6),
    (11, 12, 12, 13),
    (0, 0, 67, 41),
    (-4, -9, 33, 500),
]


def clip(box, image):
    x1, y1, x2, y2 = box
    return max(x1, 0), max(y1, 0), min(x2, image.shape[1]), min(y2, image.shape[0])


def cut(image, box):
    x1, y1, x2, y2 = clip(box, image)
    return image[y1:y2, x1:x2]


def hide(images, index, boxes, path, **options):
    outs = ghost(
        on(path, images), torch.tensor(index), torch.tensor(boxes).view(-1, 4), path=path, **options
    )
    return [out.cpu() for out in outs]


def blurred(crop, sigma, radius):
    """(h,w,3) uint8 -> the same taps by OpenCV in float64."""
    taps = cv2.getGaussianKernel(2 * radius + 1, sigma, cv2.CV_64F)
    border = cv2.BORDER_REFLECT_101 | cv2.BORDER_ISOLATED
    return cv2.sepFilter2D(
        crop.numpy().astype(np.float64), -1, taps, taps, borderType=border
    ).reshape(crop.shape)


# beyond rounding: float32 sums; the bound of the native fit; two passes of fp16 taps and one of
# fp16 values (Triton)
LOSS = {"plain": 0.001, "native": cosines.MOST_ERROR, "triton": 0.05}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "sigma, radius", [(25.0, None), (25.0, 25), (1.3, None), (4.0, 2), (3.0, 40)]
)
def test_blur_is_the_gaussian_of_the_box(path, sigma, radius):
    image = noise(*IMAGES[0])
    outs = hide([image], [0] * len(BOXES), BOXES, path, sigma=sigma, radius=radius)
    reach = int(np.ceil(3 * sigma)) if radius is None else radius
    for out, box in zip(outs, BOXES, strict=True):
        truth = blurred(cut(image, box), sigma, reach)
        assert worst(cut(out, box), truth) <= 0.5 + LOSS[path], box


@pytest.mark.parametrize("path", PATHS)
def test_blur_is_within_one_level_of_opencv_on_bytes(path):
    image = noise(60, 90, 1)
    box = (5, 4, 77, 55)
    (out,) = hide([image], [0], [box], path, sigma=5.0)
    border = cv2.BORDER_REFLECT_101 | cv2.BORDER_ISOLATED
    truth = cv2.GaussianBlur(cut(image, box).numpy(), (31, 31), 5.0, borderType=border)
    assert worst(cut(out, box), truth) <= 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["blur", "mean", "pixelate"])
def test_outside_the_box_every_byte_stays(path, method):
    images = [noise(*size, 2) for size in IMAGES]
    index, boxes = zip(*itertools.product(range(len(images)), BOXES), strict=True)
    before = [image.clone() for image in images]
    outs = hide(images, index, boxes, path, method=method, sigma=15.0)
    for out, i, box in zip(outs, index, boxes, strict=True):
        kept = torch.ones(images[i].shape[:2], dtype=torch.bool)
        cut(kept, box)[:] = False
        assert torch.equal(out[kept], images[i][kept])
    assert all(torch.equal(a, b) for a, b in zip(images, before, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["blur", "mean", "pixelate"])
def test_boxes_that_hold_nothing_leave_a_copy(path, method):
    image = noise(20, 30)
    # the last: one pixel
    boxes = [
        (5, 5, 5, 9),
        (9, 5, 3, 9),
        (40, 2, 50, 8),
        (-9, -9, 0, 4),
        (0, 0, 0, 0),
        (11, 12, 12, 13),
    ]
    outs = hide([image], [0] * len(boxes), boxes, path, method=method)
    assert all(torch.equal(out, image) for out in outs)
    assert all(out.data_ptr() != image.data_ptr() for out in outs)


@pytest.mark.parametrize("path", PATHS)
def test_images_of_many_sizes_in_one_call_are_each_as_if_alone(path):
    images = [noise(*size, 3) for size in IMAGES[:3]]
    index = [2, 0, 2, 1]
    boxes = [(0, 0, 80, 48), (3, 3, 30, 20), (9, 1, 20, 47), (0, 0, 41, 67)]
    sigma = [2.0, 9.0, 25.0, 4.5]
    radius = [6, 3, 75, 20]
    lengths = {"sigma": torch.tensor(sigma), "radius": torch.tensor(radius)}
    together = hide(images, index, boxes, path, **lengths)
    for n, (i, box) in enumerate(zip(index, boxes, strict=True)):
        (alone,) = hide([images[i]], [0], [box], path, sigma=sigma[n], radius=radius[n])
        assert torch.equal(together[n], alone)
        truth = blurred(cut(images[i], box), sigma[n], radius[n])
        assert worst(cut(alone, box), truth) <= 1


def rounded_mean(pixels):
    return np.floor(pixels.reshape(-1, 3).numpy().astype(np.float64).mean(0) + 0.5)


@pytest.mark.parametrize("path", PATHS)
def test_mean_is_one_colour(path):
    image = noise(40, 33)
    box = (4, 7, 31, 30)
    (out,) = hide([image], [0], [box], path, method="mean")
    assert (cut(out, box).numpy() == rounded_mean(cut(image, box))).all()


@pytest.mark.parametrize("path", PATHS)
def test_pixelate_averages_cells_of_sqrt_12_sigma(path):
    image = noise(40, 33)
    box = (4, 7, 31, 30)
    cell = 10  # sqrt(12) 3 = 10.4
    (out,) = hide([image], [0], [box], path, method="pixelate", sigma=3.0)
    old = cut(image, box)
    new = cut(out, box)
    for y, x in itertools.product(range(0, 23, cell), range(0, 27, cell)):
        at = (slice(y, y + cell), slice(x, x + cell))
        assert (new[at].numpy() == rounded_mean(old[at])).all()


@pytest.mark.parametrize("path", PATHS)
def test_outside_keeps_the_box_and_ghosts_the_rest(path):
    image = noise(40, 52)
    box = (9, 7, 31, 30)
    outs = {
        m: hide([image], [0], [box], path, method=m, sigma=4.0, region="outside")[0]
        for m in ("blur", "mean", "pixelate")
    }
    assert all(torch.equal(cut(out, box), cut(image, box)) for out in outs.values())
    rest = torch.ones(40, 52, dtype=torch.bool)
    cut(rest, box)[:] = False
    assert (outs["mean"][rest].numpy() == rounded_mean(image[rest])).all()
    assert worst(outs["blur"][rest], blurred(image, 4.0, 12)[rest.numpy()]) <= 0.5 + LOSS[path]
    assert (outs["pixelate"][:7, :14].numpy() == rounded_mean(image[:14, :14])).all()


@pytest.mark.parametrize("path", PATHS)
def test_outside_of_nothing_is_everything_and_of_everything_is_nothing(path):
    image = noise(22, 31)
    nothing, everything = hide(
        [image], [0, 0], [(5, 5, 5, 9), (0, 0, 31, 22)], path, method="mean", region="outside"
    )
    assert (nothing.numpy() == rounded_mean(image)).all()
    assert torch.equal(everything, image)


def softened(image, hard, box, feather, outside):
    """Pixel by pixel, from the definition."""
    out = image.double()
    x1, y1, x2, y2 = box
    height, width = image.shape[:2]
    for y, x in itertools.product(range(height), range(width)):
        edges = [
            (x + 0.5 - x1, x1 == 0),
            (x2 - x - 0.5, x2 == width),
            (y + 0.5 - y1, y1 == 0),
            (y2 - y - 0.5, y2 == height),
        ]
        depth = min(distance for distance, border in edges if outside or not border)
        alpha = min(max(-depth if outside else depth, 0) / feather, 1)
        out[y, x] += alpha * (hard[y, x].double() - out[y, x])
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("region", ["inside", "outside"])
@pytest.mark.parametrize("box", [(9, 7, 31, 28), (0, 5, 25, 30)])
def test_feather_blends_from_the_edge(path, region, box):
    image = noise(30, 40, 4)
    (hard,) = hide([image], [0], [box], path, sigma=5.0, region=region)
    (soft,) = hide([image], [0], [box], path, sigma=5.0, region=region, feather=4.5)
    assert worst(soft, softened(image, hard, box, 4.5, region == "outside")) <= 0.5 + 1e-4


def test_cosines_stay_within_their_bound():
    for sigma, radius in [
        (25.0, 75),
        (25.0, 25),
        (0.4, 2),
        (1.0, 40),
        (100.0, 300),
        (13.7, 9),
        (7.5, 0),
    ]:
        reach, frequency, amplitude = cosines.fit(sigma, radius)
        d = np.arange(-radius, radius + 1)
        fitted = np.where(abs(d) <= reach, np.cos(np.outer(d, frequency)) @ amplitude, 0)
        error = np.abs(fitted - cosines.taps(sigma, radius).numpy()).sum()
        assert 2 * 255 * error <= cosines.MOST_ERROR + 1e-4
        assert len(frequency) <= 9


# stripes along an axis at one frequency are the worst picture for a kernel made of cosines
@pytest.mark.parametrize("path", PATHS[1:2])
@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.3, 60),
    st.integers(0, 90),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.floats(0, 3.1416),
    st.floats(0, 6.3),
)
def test_native_blur_keeps_its_bound_on_stripes(path, sigma, radius, size, frequency, phase):
    height, width = size
    stripes = 255 * (np.cos(frequency * np.arange(width) + phase) > 0) * np.ones((height, 1))
    image = torch.from_numpy(np.repeat(stripes[:, :, None], 3, 2).astype(np.uint8))
    for picture in (image, image.transpose(0, 1).contiguous()):
        whole = (0, 0, *picture.shape[1::-1])
        (out,) = hide([picture], [0], [whole], path, sigma=sigma, radius=radius)
        assert worst(out, blurred(picture, sigma, radius)) <= 0.5 + cosines.MOST_ERROR + 0.01


@pytest.mark.parametrize("path", PATHS[:2])
@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(-20, 60)] * 4),
    st.sampled_from(["blur", "mean", "pixelate"]),
    st.sampled_from(["inside", "outside"]),
    st.sampled_from([0.0, 0.5, 7.0]),
    st.floats(0.3, 30),
)
def test_masks_for_any_box(path, box, method, region, feather, sigma):
    image = noise(29, 37, 5) // 4 + 96
    (out,) = hide(
        [image], [0], [box], path, method=method, region=region, feather=feather, sigma=sigma
    )
    inside = torch.zeros(29, 37, dtype=torch.bool)
    x1, y1, x2, y2 = clip(box, image)
    if x1 < x2 and y1 < y2:
        inside[y1:y2, x1:x2] = True
    kept = inside if region == "outside" else ~inside
    assert torch.equal(out[kept], image[kept])
    ghosted = out[~kept].float()
    source = (image if region == "outside" else image[inside]).float().reshape(-1, 3)
    if len(ghosted):  # averages stay between the extremes of what they average
        assert (ghosted >= source.amin(0) - 1).all() and (ghosted <= source.amax(0) + 1).all()


@pytest.mark.parametrize("path", PATHS[1:2])
def test_threads_change_nothing(path):
    images = [noise(*size, 6) for size in IMAGES]
    index = [0, 1, 2, 3, 4] * 3
    boxes = [(1, 0, 60, 60)] * 15
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = hide(images, index, boxes, path)
        torch.set_num_threads(4)
        together = hide(images, index, boxes, path)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_no_boxes_no_images():
    assert (
        ghost([noise(4, 4)], torch.zeros(0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long))
        == []
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"method": "smear"}, "method"),
        ({"region": "around"}, "region"),
        ({"feather": -1.0}, "feather"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": torch.ones(3)}, "sigma"),
        ({"radius": -1}, "radius"),
        ({"images": [noise(4, 4).float()]}, "uint8"),
        ({"images": [noise(4, 4)[:, :, :1]]}, "uint8"),
        ({"image_index": torch.tensor([1])}, "image_index"),
        ({"boxes_px": torch.zeros(1, 4)}, "boxes_px"),
        ({"boxes_px": torch.zeros(2, 4, dtype=torch.int64)}, "boxes_px"),
        ({"boxes_px": torch.zeros(1, 4, dtype=torch.int64, device="meta")}, "CPU"),
        ({"path": "quantum"}, "path"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    arguments = {
        "images": [noise(4, 4)],
        "image_index": torch.tensor([0]),
        "boxes_px": torch.tensor([[0, 0, 2, 2]]),
    } | changes
    with pytest.raises(ValueError, match=words):
        ghost(**arguments)
