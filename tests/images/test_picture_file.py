"""One file at a time: each format and mode gives the pixels it should, each broken file its
reason.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import zoo
from PIL import Image

from vise_fast.images import picture_file as module
from vise_fast.images.picture_file import BadImage, decode, grid_size, header

CAP = 50_000_000
GRADIENT = zoo.gradient()
GREY = np.repeat(zoo.grey()[:, :, None], 3, 2)
HALF = zoo.WIDTH // 2
LUMA = np.repeat(np.asarray(Image.fromarray(GRADIENT).convert("L"))[:, :, None], 3, 2)


def pixels(tmp_path: Path, data: bytes, name: str = "a.img") -> np.ndarray:
    path = tmp_path / name
    path.write_bytes(data)
    picture = decode(path, CAP)
    promised = header(path, CAP)
    assert (promised.height, promised.width) == (picture.height, picture.width)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def reason(path: Path, cap: int = CAP) -> str:
    with pytest.raises(BadImage) as caught:
        header(path, cap)
        decode(path, cap)
    assert "\n" not in str(caught.value) and str(caught.value)
    return str(caught.value)


def half_white(left: np.ndarray) -> np.ndarray:
    wanted = left.copy()
    wanted[:, HALF:] = 255
    return wanted


def cmyk() -> np.ndarray:
    return np.asarray(Image.fromarray(GRADIENT).convert("CMYK").convert("RGB"))


FLOATS = zoo.grey().astype(np.float32)
SOUND = {
    # name: (bytes, wanted pixels, tolerance in grey levels)
    "jpeg": (zoo.rgb("JPEG", quality=95, subsampling=0), GRADIENT, 6),
    "jpeg progressive": (zoo.rgb("JPEG", quality=95, subsampling=0, progressive=True), GRADIENT, 6),
    "jpeg grey": (zoo.encoded(Image.fromarray(zoo.grey()), "JPEG", quality=95), GREY, 4),
    "jpeg cmyk": (
        zoo.encoded(Image.fromarray(GRADIENT).convert("CMYK"), "JPEG", quality=98),
        cmyk(),
        8,
    ),
    "jpeg with a damaged exif block": (zoo.with_damaged_exif(), GRADIENT, 6),
    "jpeg two pictures in one (MPO)": (
        zoo.encoded(
            Image.fromarray(GRADIENT),
            "MPO",
            save_all=True,
            append_images=[Image.new("RGB", (56, 40))],
            quality=95,
            subsampling=0,
        ),
        GRADIENT,
        6,
    ),
    "png rgb": (zoo.rgb(), GRADIENT, 0),
    "png interlaced free palette": (
        zoo.encoded(Image.fromarray(GREY).quantize(256), "PNG"),
        np.asarray(Image.fromarray(GREY).quantize(256).convert("RGB")),
        0,
    ),
    "png 1 bit": (
        zoo.encoded(Image.fromarray(zoo.grey() > 127), "PNG"),
        np.repeat(((zoo.grey() > 127) * 255).astype(np.uint8)[:, :, None], 3, 2),
        0,
    ),
    "png grey": (zoo.encoded(Image.fromarray(zoo.grey()), "PNG"), GREY, 0),
    "png grey 16 bit": (zoo.png16(1), GREY, 0),
    "png rgb 16 bit": (zoo.png16(3), GRADIENT, 0),
    "png grey + alpha": (zoo.transparent("LA"), half_white(LUMA), 1),
    "png rgba": (zoo.transparent("RGBA"), half_white(GRADIENT), 0),
    "png half transparent": (
        zoo.encoded(Image.new("RGBA", (56, 40), (0, 0, 0, 128)), "PNG"),
        np.full_like(GRADIENT, 127),
        1,
    ),
    "png rgb, one colour transparent": (
        zoo.encoded(Image.new("RGB", (56, 40), (9, 8, 7)), "PNG", transparency=(9, 8, 7)),
        np.full_like(GRADIENT, 255),
        0,
    ),
    "png grey, one level transparent": (
        zoo.encoded(Image.new("L", (56, 40), 9), "PNG", transparency=9),
        np.full_like(GRADIENT, 255),
        0,
    ),
    "png palette, transparent index": (
        zoo.palette_transparent(False),
        half_white(np.full_like(GRADIENT, 0))[:, ::-1] | [0, 0, 255],
        0,
    ),
    "png palette, alpha table": (
        zoo.palette_transparent(True),
        half_white(np.full_like(GRADIENT, 0))[:, ::-1] | [0, 0, 255],
        0,
    ),
    "png animated": (zoo.animated("PNG"), GRADIENT, 0),
    "png without its last byte": (zoo.rgb()[:-1], GRADIENT, 0),
    "webp lossless": (zoo.rgb("WEBP", lossless=True), GRADIENT, 0),
    "webp lossy": (zoo.rgb("WEBP", quality=98), GRADIENT, 16),
    "webp alpha": (
        zoo.transparent("RGBA", "WEBP", lossless=True, exact=True),
        half_white(GRADIENT),
        0,
    ),
    "webp animated": (zoo.animated("WEBP"), GRADIENT, 0),
    "bmp rgb": (zoo.rgb("BMP"), GRADIENT, 0),
    "bmp grey": (zoo.encoded(Image.fromarray(zoo.grey()), "BMP"), GREY, 0),
    "bmp 1 bit": (
        zoo.encoded(Image.fromarray(zoo.grey() > 127), "BMP"),
        np.repeat(((zoo.grey() > 127) * 255).astype(np.uint8)[:, :, None], 3, 2),
        0,
    ),
    "gif": (zoo.encoded(Image.fromarray(GREY).convert("L"), "GIF"), GREY, 0),
    "gif animated": (
        zoo.encoded(
            Image.fromarray(zoo.grey()),
            "GIF",
            save_all=True,
            append_images=[Image.new("L", (56, 40))],
        ),
        GREY,
        0,
    ),
    "gif transparent": (
        zoo.encoded(Image.new("P", (56, 40), 3), "GIF", transparency=3),
        np.full_like(GRADIENT, 255),
        0,
    ),
    "tiff rgb": (zoo.tiff(GRADIENT), GRADIENT, 0),
    "tiff deflate": (zoo.tiff(GRADIENT, compression="tiff_deflate"), GRADIENT, 0),
    "tiff lzw": (zoo.tiff(GRADIENT, compression="tiff_lzw"), GRADIENT, 0),
    "tiff grey": (zoo.tiff(zoo.grey()), GREY, 0),
    "tiff rgba": (zoo.transparent("RGBA", "TIFF"), half_white(GRADIENT), 0),
    "tiff cmyk": (zoo.encoded(Image.fromarray(GRADIENT).convert("CMYK"), "TIFF"), cmyk(), 0),
    "tiff 16 bit": (zoo.tiff(zoo.grey().astype(np.uint16) * 257), GREY, 0),
    "tiff 16 bit, big-endian": (
        zoo.encoded(
            Image.frombytes("I;16B", (56, 40), (zoo.grey().astype(">u2") * 257).tobytes()), "TIFF"
        ),
        GREY,
        0,
    ),
    "tiff 16 bit, dark": (
        zoo.tiff(zoo.grey().astype(np.uint16)),
        np.rint(GREY / 257).astype(np.uint8),
        0,
    ),
    "tiff 32 bit of 8-bit values": (zoo.tiff(zoo.grey().astype(np.int32)), GREY, 0),
    "tiff 32 bit of 16-bit values": (zoo.tiff(zoo.grey().astype(np.int32) * 257), GREY, 0),
    "tiff 32 bit, large": (zoo.tiff(zoo.grey().astype(np.int32) * 1_000_000), GREY, 0),
    "tiff 32 bit, negative": (zoo.tiff(zoo.grey().astype(np.int32) - 128), GREY, 0),
    "tiff 32 bit, all the same and large": (
        zoo.tiff(np.full((40, 56), 10**6, np.int32)),
        np.zeros_like(GRADIENT),
        0,
    ),
    "tiff float 0..1": (zoo.tiff(FLOATS / 255), GREY, 0),
    "tiff float 0..255": (zoo.tiff(FLOATS), GREY, 0),
    "tiff float, any range": (zoo.tiff(FLOATS * 50 - 1000), GREY, 1),
    "tiff float, all the same": (
        zoo.tiff(np.full((40, 56), -3.0, np.float32)),
        np.zeros_like(GRADIENT),
        0,
    ),
    "tiff lab": (
        zoo.encoded(Image.new("LAB", (56, 40), (255, 128, 128)), "TIFF"),
        np.full_like(GRADIENT, 255),
        1,
    ),
    "tiff two pages": (
        zoo.encoded(
            Image.fromarray(GRADIENT),
            "TIFF",
            save_all=True,
            append_images=[Image.new("RGB", (9, 9))],
        ),
        GRADIENT,
        0,
    ),
    "ppm": (zoo.rgb("PPM"), GRADIENT, 0),
    "pgm": (zoo.encoded(Image.fromarray(zoo.grey()), "PPM"), GREY, 0),
    "pgm 16 bit": (b"P5 56 40 65535\n" + (zoo.grey().astype(">u2") * 257).tobytes(), GREY, 0),
    "pgm 12 bit": (
        b"P5 56 40 4095\n" + np.rint(zoo.grey() / 255 * 4095).astype(">u2").tobytes(),
        GREY,
        1,
    ),
    "ppm plain text": (
        b"P3 2 2 255\n255 0 0  0 255 0  0 0 255  9 9 9\n",
        np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8),
        0,
    ),
    "pbm": (
        zoo.encoded(Image.fromarray(zoo.grey() > 127), "PPM"),
        np.repeat(((zoo.grey() > 127) * 255).astype(np.uint8)[:, :, None], 3, 2),
        0,
    ),
    "pfm": (b"Pf\n56 40\n-1.0\n" + (FLOATS / 255)[::-1].astype("<f4").tobytes(), GREY, 0),
    "one pixel": (zoo.rgb(size=(2, 2)), zoo.gradient(2, 2), 0),
    "bytes after the end": (zoo.rgb() + b"trailing" * 99, GRADIENT, 0),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_give_their_pixels(tmp_path, name):
    data, wanted, tolerance = SOUND[name]
    got = pixels(tmp_path, data)
    assert got.shape == wanted.shape
    assert np.abs(got.astype(int) - wanted.astype(int)).max() <= tolerance


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "png", "tiff", "txt", ""])
def test_the_content_decides_not_the_name(tmp_path, suffix):
    assert (pixels(tmp_path, zoo.rgb("PNG"), f"a.{suffix}".rstrip(".")) == GRADIENT).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_applied(tmp_path, format, value):
    turned = {
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2),
        6: np.rot90(GRADIENT, -1),
        7: np.rot90(GRADIENT, -1)[:, ::-1],
        8: np.rot90(GRADIENT),
    }
    turned[7] = GRADIENT[::-1, ::-1].transpose(1, 0, 2)
    got = pixels(tmp_path, zoo.with_orientation(format, value))
    assert np.abs(got.astype(int) - turned[value].astype(int)).max() <= (
        6 if format == "JPEG" else 0
    )


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_a_meaningless_orientation_is_ignored(tmp_path, value):
    assert (pixels(tmp_path, zoo.with_orientation("PNG", value)) == GRADIENT).all()


BROKEN = {
    "empty": (b"", "is empty"),
    "one byte": (b"\x89", "is none of"),
    "text": (b"I am no picture\n" * 50, "is none of"),
    "html": (b"<!DOCTYPE html><html>404</html>" * 9, "is none of"),
    "a program": (b"\x7fELF" + os.urandom(64) * 9, "is none of"),
    "zip": (b"PK\x03\x04" + bytes(300), "is none of"),
    "zeros": (bytes(4096), "is none of"),
    "pdf": (b"%PDF-1.4\n" + bytes(300), "is none of"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "is none of"),
    "ico": (zoo.rgb("ICO"), "is none of"),
    "tga": (zoo.rgb("TGA"), "is none of"),
    "jpeg 2000": (zoo.rgb("JPEG2000"), "is none of"),
    "pcx": (zoo.rgb("PCX"), "is none of"),
    "png header only": (zoo.rgb()[:33], ""),
    "png without its pixels": (zoo.rgb()[:60], "cannot be decoded"),
    "png signature only": (zoo.rgb()[:8], ""),
    "png without pixels": (
        b"\x89PNG\r\n\x1a\n"
        + zoo.chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0))
        + zoo.chunk(b"IEND", b""),
        "cannot be decoded",
    ),
    "png of no width": (zoo.png(0, 9, 8, 2, b""), ""),
    "png with a wrong checksum": (zoo.rgb()[:29] + b"\0\0\0\0" + zoo.rgb()[33:], ""),
    "png text bomb": (
        zoo.png(9, 9, 8, 0, b"\0" * 90, zoo.chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27)))),
        "cannot be decoded",
    ),
    "png bomb": (zoo.png_bomb(), "promises more than 50000000"),
    "png just over the cap": (zoo.png_bomb(7072, 7072), "promises 7072 x 7072"),
    "png of 2 G pixels a side": (zoo.png_bomb(2**31 - 1, 2**31 - 1), "promises more than 50000000"),
    "png within Pillow's cap, not ours": (zoo.png_bomb(9000, 9000), "promises 9000 x 9000"),
    "bmp bomb": (zoo.bmp_bomb(), "promises more than 50000000"),
    "gif bomb": (zoo.gif_bomb(), "promises more than 50000000"),
    "ppm bomb": (b"P6 100000 100000 255\n" + bytes(99), "promises more than 50000000"),
    "ppm of no size": (b"P6 0 0 255\n", ""),
    "ppm of negative size": (b"P6 -5 5 255\n" + bytes(99), ""),
    "ppm without a size": (b"P6\n", ""),
    "ppm with words for numbers": (b"P3 2 2 255\nred green blue\n", "cannot be decoded"),
    "pfm of nan": (b"Pf\n8 8\n-1.0\n" + np.full(64, np.nan, "<f4").tobytes(), "not finite"),
    "tiff with one inf": (
        zoo.tiff(np.where(zoo.grey() == 0, np.inf, 1).astype(np.float32)),
        "not finite",
    ),
    "tiff header only": (b"II*\0\x08\0\0\0", ""),
    "tiff pointing to itself": (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", 1)
        + struct.pack("<HHII", 256, 4, 1, 9)
        + struct.pack("<I", 8),
        "",
    ),
    "webp header only": (b"RIFF\x24\0\0\0WEBPVP8 \x18\0\0\0" + bytes(24), ""),
    "gif of no size": (b"GIF89a" + bytes(7), ""),
    "gif header only": (b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0), ""),
    "bmp header only": (zoo.rgb("BMP")[:20], ""),
    "bmp of an unknown kind": (
        b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<I", 7) + bytes(50),
        "",
    ),
    "too wide": (zoo.rgb("PNG", size=(2, 500)), "over 200 times"),
    "too tall": (zoo.rgb("PNG", size=(500, 2)), "over 200 times"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_have_a_reason(tmp_path, name):
    data, part = BROKEN[name]
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    assert part in reason(path)


WHOLE = {
    "jpeg": zoo.rgb("JPEG"),
    "jpeg progressive": zoo.rgb("JPEG", progressive=True),
    "png": zoo.rgb("PNG"),
    "webp": zoo.rgb("WEBP"),
    "webp lossless": zoo.rgb("WEBP", lossless=True),
    "bmp": zoo.rgb("BMP"),
    "gif": zoo.rgb("GIF"),
    "tiff": zoo.rgb("TIFF"),
    "tiff lzw": zoo.rgb("TIFF", compression="tiff_lzw"),
    "ppm": zoo.rgb("PPM"),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.8, 0.9])
def test_truncated_files_are_refused(tmp_path, kind, share):
    path = tmp_path / "a"
    path.write_bytes(WHOLE[kind][: max(1, int(len(WHOLE[kind]) * share))])
    reason(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WHOLE)
def test_damage_never_escapes_as_another_error(tmp_path, kind):
    """30 random damages each: either a picture of the promised size or a BadImage."""
    path = tmp_path / "a"
    for seed in range(30):
        path.write_bytes(zoo.flipped_bits(WHOLE[kind], seed))
        try:
            promised = header(path, CAP)
            picture = decode(path, CAP)
        except BadImage:
            continue
        assert (picture.height, picture.width) == (
            promised.height,
            promised.width,
        ) and picture.mode == "RGB"


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it to read would wait for a writer for ever
    assert reason(tmp_path / "pipe.jpg") == "is no regular file"
    assert reason(Path("/dev/null")) == "is no regular file"
    assert reason(Path("/dev/zero")) == "is no regular file"
    assert "directory" in reason(tmp_path) or "regular" in reason(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        assert "cannot be decoded" in reason(tmp_path / "s.jpg")


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert "No such file" in reason(tmp_path / "dangling.jpg")
    assert "symbolic links" in reason(tmp_path / "loop.jpg")


@pytest.mark.parametrize(
    "code", [errno.EACCES, errno.EIO, errno.ENOENT, errno.EMFILE, errno.ESTALE]
)
def test_a_refusing_disk_is_a_reason(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "open", refuse)
    assert os.strerror(code) in reason(tmp_path / "a.jpg")


def test_the_cap_is_read_before_anything_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(zoo.rgb())
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert "more than 2239" in reason(path, cap=56 * 40 - 1)
    assert header(path, 56 * 40).format == "PNG"


def test_a_bomb_is_a_reason_where_warnings_are_errors(tmp_path):
    (tmp_path / "a").write_bytes(
        zoo.png_bomb(10_000, 10_000)
    )  # Pillow warns from 89 M pixels on and raises from 179 M on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(tmp_path / "a") == "promises more than 50000000 pixels"


def test_a_late_orientation_is_applied_to_the_pixels(tmp_path):
    """A PNG may carry its EXIF block after the pixels: the header cannot know, the picture must be
    upright.
    """
    data = zoo.with_orientation("PNG", 6)
    place = data.index(b"eXIf") - 4
    block = data[place : place + 12 + struct.unpack(">I", data[place : place + 4])[0]]
    (tmp_path / "a").write_bytes(data.replace(block, b"")[:-12] + block + data[-12:])
    assert (np.asarray(decode(tmp_path / "a", CAP)) == np.rot90(GRADIENT, -1)).all()


# -- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, wanted",
    [
        (480, 640, (480, 640)),
        (481, 641, (480, 640)),
        (3000, 4000, (480, 640)),
        (4000, 3000, (640, 480)),
        (2160, 3840, (384, 736)),
        (100, 100, (96, 96)),
        (33, 33, (32, 32)),
        (1, 1, (32, 32)),
        (10, 2000, (32, 1984)),
        (50, 10_000, (32, 7808)),
        (17, 47, (32, 32)),
        (512, 512, (512, 512)),
    ],
)
def test_sizes_on_the_grid(height, width, wanted):
    assert grid_size(height, width, 32, 1024, 307_200) == wanted


def test_any_size_lands_on_the_grid_within_the_budget():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        height, width = (int(2 ** rng.uniform(0, 14)) for _ in range(2))
        multiple = int(rng.choice([16, 28, 32]))
        top = int(multiple**2 * 2 ** rng.uniform(0, 10))
        bottom = int(rng.integers(1, top + 1))
        got = grid_size(height, width, multiple, bottom, top)
        assert all(side > 0 and side % multiple == 0 for side in got)
        assert got[0] * got[1] <= top
        if (
            got[0] * got[1] < bottom
        ):  # only where the next size up would break the budget or the aspect ratio
            assert (got[0] + multiple) * (got[1] + multiple) > bottom


def test_the_shape_is_kept_as_well_as_the_grid_allows():
    for height, width in [(1080, 1920), (1333, 2000), (4000, 3000), (900, 900)]:
        rows, columns = grid_size(height, width, 32, 1024, 307_200)
        assert abs((rows / columns) / (height / width) - 1) < 0.09
        assert rows * columns > 0.85 * 307_200


def test_a_budget_below_one_cell_is_refused():
    with pytest.raises(ValueError, match="holds no cell"):
        grid_size(100, 100, 32, 1, 1023)
