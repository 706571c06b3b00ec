"""Files that would cost minutes or gigabytes: each is refused in a moment, before its pixels are
decoded; what photographs need is granted.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zoo
from PIL import Image

from vise_fast.images import cost
from vise_fast.images.picture_file import BadImage, decode, header

ROOT = Path(__file__).parents[2]
CAP = 50_000_000
MOMENT = 5.0  # seconds of CPU time


def reason(path: Path, data: bytes, cap: int = CAP) -> str:
    """Why a file is refused, and that this was known in a moment."""
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(BadImage) as caught:
        header(path, cap)
        decode(path, cap)
    assert time.process_time() - start < MOMENT
    return str(caught.value)


# ---- JPEG ----------------------------------------------------------------------------------------


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def scan_of_nothing(component: int = 1) -> bytes:
    """A refinement scan of one coefficient that changes nothing: 13 bytes, and a pass over all."""
    return segment(0xDA, bytes([1, component, 0, 1, 63, 0])) + b"\x7f\xff\x00"


def with_scans(count: int, size: int = 64, between: bytes = b"") -> bytes:
    picture = zoo.rgb("JPEG", size=(size, size), progressive=True)
    return picture[:-2] + (between + scan_of_nothing()) * count + picture[-2:]


def counted(data: bytes, tmp_path: Path) -> int:
    """The scans of a JPEG by cost.py's count."""
    path = tmp_path / "counted.jpg"
    path.write_bytes(data)
    with open(path, "rb", 0) as raw, cost.Reader(raw) as file, Image.open(file) as image:
        return cost._scans(image, file)


@pytest.mark.parametrize("between", ["", "comment", "restart", "reserved", "fill", "stuffed"])
def test_a_jpeg_of_many_scans_is_refused(tmp_path, between):
    """Whatever lies between them."""
    pieces = {
        "": b"",
        "comment": segment(0xFE, b"\xff\xd9 no end"),
        "restart": b"\xff\xd0\xff\xd7",
        "reserved": b"\xff\x02\x00\xff",  # its length would hide what follows
        "fill": b"\xff" * 5000,
        "stuffed": b"\xff\x00" * 3000,
    }
    data = with_scans(3000, between=pieces[between])
    assert "more than 100 scans" in reason(tmp_path / "a.jpg", data)


def test_a_large_jpeg_of_many_scans_costs_no_time(tmp_path):
    """49 Mpx: each scan would take some 36 ms."""
    data = zoo.encoded(Image.new("RGB", (7000, 7000)), "JPEG", progressive=True)
    data = data[:-2] + scan_of_nothing() * 20_000 + data[-2:]
    assert "more than 100 scans" in reason(tmp_path / "a.jpg", data)


def test_photographs_have_few_scans(tmp_path):
    assert counted(zoo.rgb("JPEG"), tmp_path) == 1
    assert 2 <= counted(zoo.rgb("JPEG", progressive=True), tmp_path) <= 15
    assert counted(with_scans(30), tmp_path) == 30 + counted(with_scans(0), tmp_path)
    (tmp_path / "a.jpg").write_bytes(with_scans(30))
    assert decode(tmp_path / "a.jpg", CAP).size == (64, 64)


def test_a_thumbnail_and_a_trailer_are_no_scans(tmp_path):
    """Markers inside a segment, and whatever follows the end, are not the picture's."""
    inside = segment(0xE1, b"Exif" + b"\xff\xda\x00\x03x" * 2000)
    picture = zoo.rgb("JPEG", progressive=True)
    film = np.random.default_rng(0).integers(0, 256, 10**6, np.uint8).tobytes()
    data = picture[:2] + inside + picture[2:] + film + b"\xff\xda" * 3000
    assert counted(data, tmp_path) == counted(picture, tmp_path)
    (tmp_path / "a.jpg").write_bytes(data)
    assert decode(tmp_path / "a.jpg", CAP).size == (zoo.WIDTH, zoo.HEIGHT)


def sequential_scans(count: int) -> bytes:
    """A baseline JPEG whose components come in scans of their own, again and again."""
    picture = zoo.rgb("JPEG", subsampling=0)
    start = picture.index(b"\xff\xda")
    scan = segment(0xDA, bytes([1, 1, 0, 0, 63, 0]))
    return picture[:start] + scan * count + b"\xff\xd9"


def test_scans_of_a_sequential_jpeg_are_counted(tmp_path):
    assert "more than 100 scans" in reason(tmp_path / "a.jpg", sequential_scans(5000))


def exif_of(size: int) -> bytes:
    """An orientation of as many fractions as fit: Pillow would make an object of each."""
    entry = struct.pack("<HHHII", 1, 0x112, 5, size // 8, 26)
    return (b"II*\0\x08\0\0\0" + entry).ljust(26, b"\0") + b"\1" * size


def test_a_huge_exif_of_a_jpeg(tmp_path):
    """Pillow joins the blocks of all segments."""
    block = exif_of(30 * 2**20)
    pieces = [block[at : at + 65_000] for at in range(0, len(block), 65_000)]
    joined = b"".join(segment(0xE1, b"Exif\0\0" + piece) for piece in pieces)
    picture = zoo.rgb("JPEG")
    assert "beside its pixels" in reason(tmp_path / "a.jpg", picture[:2] + joined + picture[2:])


def test_a_huge_exif_of_a_png_is_passed_over(tmp_path):
    """60 MB of it would take 22 seconds and 1.6 GB; the picture is sound."""
    path = tmp_path / "a.png"
    path.write_bytes(png_with(zoo.chunk(b"eXIf", exif_of(60 * 2**20))))
    start = time.process_time()
    assert header(path, CAP).height == decode(path, CAP).height == 9
    assert time.process_time() - start < MOMENT


@pytest.mark.parametrize("kind", ["cut", "random", "no end", "wrong length"])
def test_a_broken_jpeg_can_be_counted(tmp_path, kind):
    rng = np.random.default_rng(3)
    picture = zoo.rgb("JPEG", progressive=True)
    for place in range(700, len(picture), 97):
        data = {
            "cut": picture[:place],
            "random": picture[:place] + rng.integers(0, 256, 500, np.uint8).tobytes(),
            "no end": picture[:-2] + b"\xff" * 50,
            "wrong length": picture[:place] + b"\xff\xfe\x00\x00" + picture[place:],
        }[kind]
        assert counted(data, tmp_path) >= 1


# ---- PNG -----------------------------------------------------------------------------------------


def png_with(extra: bytes = b"", after: bytes = b"") -> bytes:
    data = zoo.png(9, 9, 8, 0, b"\0" * 90, extra)
    return data[:-12] + after + data[-12:]


@pytest.mark.parametrize("where", ["extra", "after"])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "prIv", "sBIT"])
def test_png_chunks_beside_the_pixels(tmp_path, where, kind):
    """80 MiB in chunks of one: refused, however well they would shrink."""
    packed = b"k\0\0" + zlib.compress(bytes(2**20 - 100), 0)
    bomb = zoo.chunk(kind.encode(), packed) * 80
    assert reason(tmp_path / "a.png", png_with(**{where: bomb}))


def test_a_small_png_does_not_unpack_to_much(tmp_path):
    """64 times 64 MiB of nothing in 4 MB of text: Pillow's own limit, held here."""
    bomb = zoo.chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26))) * 64
    assert reason(tmp_path / "a.png", png_with(bomb))


@pytest.mark.parametrize("kind", ["IDAT", "prIv"])
def test_a_png_of_too_many_chunks(tmp_path, kind):
    said = reason(tmp_path / "a.png", png_with(b"", zoo.chunk(kind.encode(), b"") * 300_000))
    assert "more than 200000 chunks" in said


def test_a_png_in_many_small_pieces_is_sound(tmp_path):
    """Some programs write 100 bytes a chunk."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 60, 3), np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    packed = zlib.compress(rows)
    pieces = [zoo.chunk(b"IDAT", packed[i : i + 100]) for i in range(0, len(packed), 100)]
    whole = zoo.png(60, 60, 8, 2, rows)
    place = whole.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(whole[:place] + b"".join(pieces) + whole[-12:])
    assert (np.asarray(decode(tmp_path / "a.png", CAP)) == pixels).all()


# ---- TIFF ----------------------------------------------------------------------------------------


def tiff_of(entries: list[tuple[int, int, int, int]], tail: bytes, large: bool = False) -> bytes:
    """A TIFF by hand: (tag, type, count, value) each; `tail` begins at byte 4096."""
    entries = sorted(entries)
    if large:
        head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16)
        body = struct.pack("<Q", len(entries))
        body += b"".join(struct.pack("<HHQQ", *entry) for entry in entries) + bytes(8)
    else:
        head = struct.pack("<2sHI", b"II", 42, 8)
        body = struct.pack("<H", len(entries))
        body += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return (head + body).ljust(4096, b"\0") + tail


def grey_tiff(size: int, *more: tuple[int, int, int, int], compression: int = 1):
    return [
        (256, 4, 1, size),
        (257, 4, 1, size),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        *more,
    ]


@pytest.mark.parametrize("large", [False, True])
def test_a_tiff_of_too_many_strips(tmp_path, large):
    """A million strips would become a million Python tuples when the header is read."""
    count = 10**6
    entries = grey_tiff(9, (273, 4, count, 4096), (278, 4, 1, 1), (279, 4, count, 4096))
    said = reason(tmp_path / "a.tif", tiff_of(entries, bytes(4 * count), large))
    assert "lists 1000000 pieces" in said


def test_texts_of_a_tiff_may_be_long(tmp_path):
    pixels = zoo.gradient()
    info = {34377: b"x" * 10**6, 700: b"<x/>" * 300_000, 270: "d" * 500_000}
    data = zoo.tiff(pixels, tiffinfo=info)
    (tmp_path / "a.tif").write_bytes(data)
    assert (np.asarray(decode(tmp_path / "a.tif", CAP)) == pixels).all()


def test_strips_that_lie_on_each_other(tmp_path):
    """Every row the same 200 kB of bits: libtiff would copy 400 MB."""
    size, packed = 2000, zlib.compress(os.urandom(200_000))
    offsets = struct.pack(f"<{size}I", *[4096 + 8 * size] * size)
    lengths = struct.pack(f"<{size}I", *[len(packed)] * size)
    places = [(273, 4, size, 4096), (278, 4, 1, 1), (279, 4, size, 4096 + 4 * size), (266, 3, 1, 2)]
    entries = grey_tiff(size, *places, compression=8)
    said = reason(tmp_path / "a.tif", tiff_of(entries, offsets + lengths + packed))
    assert "bytes of pixels in a file of" in said


def test_a_tile_far_larger_than_its_picture(tmp_path):
    packed = zlib.compress(bytes(10**6))
    tile = [(322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 4096), (325, 4, 1, len(packed))]
    entries = grey_tiff(64, *tile, compression=8)
    assert "tiles of 3600000000 pixels" in reason(tmp_path / "a.tif", tiff_of(entries, packed))


def test_many_tiles_on_one_place_end_in_time(tmp_path, monkeypatch):
    """Each covers nearly the whole picture; nothing in the header says that it is wrong."""
    monkeypatch.setattr(cost, "SECONDS", 0.5)
    count, size = 50_000, 1024
    tile = [(322, 4, 1, size), (323, 4, 1, size - 16), (324, 4, count, 4096)]
    offsets = struct.pack(f"<{count}I", *[4096 + 4 * count] * count)
    data = tiff_of(grey_tiff(size, *tile), offsets + bytes(size * size))
    assert reason(tmp_path / "a.tif", data)


def test_a_tiff_of_a_jpeg_of_many_scans(tmp_path):
    """libtiff has a limit of its own."""
    strip = with_scans(3000, size=512)
    place = [(273, 4, 1, 4096), (278, 4, 1, 512), (279, 4, 1, len(strip))]
    replaced = {258: (258, 3, 1, 8), 262: (262, 3, 1, 6), 277: (277, 3, 1, 3)}
    entries = [replaced.get(entry[0], entry) for entry in grey_tiff(512, *place, compression=7)]
    assert "cannot be decoded" in reason(tmp_path / "a.tif", tiff_of(entries, strip))


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"strip_size": 2**30}])
def test_usual_tiffs_are_granted(tmp_path, options):
    (tmp_path / "a.tif").write_bytes(zoo.tiff(zoo.gradient(700, 500), **options))
    assert decode(tmp_path / "a.tif", CAP).size == (500, 700)


# ---- animations and the rest ---------------------------------------------------------------------


def film(format: str, frames: int) -> bytes:
    pictures = [Image.new("RGB", (8, 8), (i % 256, i // 256, 9)) for i in range(frames)]
    return zoo.encoded(pictures[0], format, save_all=True, append_images=pictures[1:])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_frames_beyond_the_first_cost_nothing(tmp_path, format):
    (tmp_path / "a").write_bytes(film(format, 3000))
    start = time.process_time()
    assert decode(tmp_path / "a", CAP).size == (8, 8)
    assert time.process_time() - start < MOMENT


def gif_comments(blocks: int) -> bytes:
    plain = zoo.rgb("GIF")
    place = 13 + 3 * 2 ** ((plain[10] & 7) + 1)
    return plain[:place] + b"!\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0" + plain[place:]


def test_a_gif_of_comments(tmp_path):
    (tmp_path / "a.gif").write_bytes(gif_comments(4000))
    assert decode(tmp_path / "a.gif", CAP).size == (zoo.WIDTH, zoo.HEIGHT)
    assert "beside its pixels" in reason(tmp_path / "b.gif", gif_comments(300_000))


def bmp_rle(width: int, height: int, rows: bytes) -> bytes:
    """An RLE8 bitmap by hand."""
    palette = b"".join(struct.pack("<BBBB", i, i, i, 0) for i in range(256))
    place = 54 + len(palette)
    head = b"BM" + struct.pack("<IHHI", place + len(rows), 0, 0, place)
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return head + sizes + palette + rows


SLOW = {
    # formats that Pillow unpacks in Python: the time is bounded by a clock
    "bmp rle": bmp_rle(2000, 2000, b"\1\5" * 4_000_000),
    "bmp rle, ends of lines": bmp_rle(2000, 2000, b"\0\0" * 6_000_000),
    "ppm in words": b"P3 2000 2000 255\n" + b"9 " * 12_000_000,
    "ppm of ten bits": b"P6 2000 2000 1023\n" + b"\1\0" * 12_000_000,
    "ppm comments": b"P6 " + (b"#" + b" " * 2**20) * 8,
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_formats_end_in_time(tmp_path, name, monkeypatch):
    monkeypatch.setattr(cost, "SECONDS", 0.2)
    monkeypatch.setattr(cost, "OPENING", 0.2)
    assert "more than 0.2 seconds" in reason(tmp_path / "a", SLOW[name])


def test_the_clock_is_that_of_the_thread(tmp_path, monkeypatch):
    """A machine that is busy with something else refuses no photograph."""
    monkeypatch.setattr(cost, "OPENING", 0.05)
    (tmp_path / "a.png").write_bytes(zoo.rgb())
    with open(tmp_path / "a.png", "rb", 0) as raw, cost.Reader(raw) as file:
        time.sleep(0.2)
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
        while time.thread_time() < file._end:
            sum(range(1000))
        with pytest.raises(cost.Costly):
            file.read(1)


def test_large_files_are_not_read_whole(tmp_path):
    """A gigabyte that says it is a profile, an unknown chunk, a WebP."""
    size = 2**30
    heads = {
        "a.png": b"\x89PNG\r\n\x1a\n" + zoo.rgb()[8:33] + struct.pack(">I", size) + b"prIv",
        "a.webp": b"RIFF" + struct.pack("<I", size) + b"WEBPVP8L",
        "a.gif": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b"!\xff",
    }
    for name, head in heads.items():
        path = tmp_path / name
        path.write_bytes(head)
        os.truncate(path, size)  # sparse
        tracemalloc.start()
        with pytest.raises(BadImage):
            header(path, CAP)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200 * 2**20, name


def test_the_reader_reads_what_is_there(tmp_path):
    data = os.urandom(200_000)
    (tmp_path / "a").write_bytes(data)
    with open(tmp_path / "a", "rb", 0) as raw, cost.Reader(raw) as file:
        assert file.read(5) + file.read(100_000) + file.read() == data
        assert file.read() == b"" == file.read(9)
        assert file.seek(7) == 7 and file.read(None) == data[7:]


# ---- memory --------------------------------------------------------------------------------------

MEASURE = """
import re, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from vise_fast.images.picture_file import BadImage, decode, on_grid
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
cap = int(sys.argv[2])
on_grid(decode(Path(sys.argv[3]), cap), 32, 1024, 307_200)
before = peak()
try:
    on_grid(decode(Path(sys.argv[1]), cap), 32, 1024, 307_200)
    told = "decoded"
except BadImage as fault:
    told = str(fault)
print(peak() - before, told)
"""
# not getrusage: a process starts with the peak of the one that started it
SIDE = (3600, 3500)  # 12.6 Mpx: what 50 Mpx take, at a quarter of the size
LARGE = SIDE[0] * SIDE[1]
OVERHEAD = 12 * 2**20  # buffers whose size does not depend on the picture's


def one_strip(**options) -> dict:
    return {"compression": "tiff_deflate", "strip_size": 2**34, **options}


def turned(format: str) -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"format": format, "exif": exif}


def deep_tiff(channels: int) -> bytes:
    """16 bits a channel, all rows in one strip."""
    width, height = SIDE
    packed = zlib.compress(b"\0\x40" * channels * width * height, 1)
    bits = struct.pack(f"<{channels}H", *[16] * channels)
    entries = grey_tiff(width, (273, 4, 1, 4112), (278, 4, 1, height), (279, 4, 1, len(packed)))
    changed = {257: (4, 1, height), 258: (3, channels, 4096), 259: (3, 1, 8)}
    changed |= {262: (3, 1, 2), 277: (3, 1, channels)} | ({338: (3, 1, 2)} if channels > 3 else {})
    kept = [entry for entry in entries if entry[0] not in changed]
    kept += [(tag, *rest) for tag, rest in changed.items()]
    return tiff_of(kept, bits.ljust(16, b"\0") + packed)


def kinds() -> Iterator[tuple[str, bytes]]:
    """The costliest of each format, all small on disk."""
    flat = Image.new("RGB", SIDE, (10, 200, 90))
    clear = Image.new("RGBA", SIDE, (10, 200, 90, 128))
    palette = Image.new("P", SIDE, 1)
    floats = Image.fromarray(np.full(SIDE[::-1], 0.5, np.float32))
    whole = Image.fromarray(np.full(SIDE[::-1], 70_000, np.int32))
    deep = Image.fromarray(np.full(SIDE[::-1], 30_000, np.uint16))
    full = {"progressive": True, "subsampling": 0}
    yield "jpeg", zoo.encoded(flat, "JPEG")
    yield "jpeg, turned", zoo.encoded(flat, **turned("JPEG"))
    yield "jpeg, progressive", zoo.encoded(flat, "JPEG", **full)
    yield "jpeg, progressive, turned", zoo.encoded(flat, **turned("JPEG"), **full)
    yield "jpeg, progressive, cmyk", zoo.encoded(flat.convert("CMYK"), "JPEG", **full)
    yield "png, clear", zoo.encoded(clear, "PNG")
    yield "png, clear, turned", zoo.encoded(clear, **turned("PNG"))
    yield "png, clear palette", zoo.encoded(palette, "PNG", transparency=b"\0\x80")
    yield "png, clear grey", zoo.encoded(clear.convert("LA"), "PNG")
    yield "png, deep grey", zoo.encoded(deep, "PNG")
    yield "gif, clear", zoo.encoded(palette, "GIF", transparency=1)
    yield "webp", zoo.encoded(flat, "WEBP", method=0)
    yield "webp, clear", zoo.encoded(clear, "WEBP", method=0)
    yield "webp, lossless", zoo.encoded(clear, "WEBP", lossless=True, method=0)
    yield "tiff, floats", zoo.encoded(floats, "TIFF", **one_strip())
    yield "tiff, whole numbers", zoo.encoded(whole, "TIFF", **one_strip())
    yield "tiff, clear", zoo.encoded(clear, "TIFF", **one_strip())
    yield "tiff, deep colours", deep_tiff(3)
    yield "tiff, deep and clear", deep_tiff(4)
    yield "tiff, jpeg", zoo.encoded(flat, "TIFF", compression="jpeg")
    yield "bmp", zoo.encoded(flat, "BMP")
    rows = (b"\xf0\5" * (SIDE[0] // 240) + b"\0\0") * SIDE[1]
    yield "bmp, rle", bmp_rle(*SIDE, rows)
    yield "pfm", zoo.encoded(floats, "PPM")


REFUSED = {
    "webp",
    "webp, clear",
    "webp, lossless",
    "jpeg, progressive, cmyk",
    "tiff, deep and clear",
}
"""What takes 12 bytes a pixel, or 17 (WebP), and so is read up to a size below the cap."""


def test_memory_of_every_kind_stays_below_the_stated(tmp_path):
    """At the cap, where not refused there: 0.6 GB for 50 Mpx."""
    (tmp_path / "small.png").write_bytes(zoo.rgb())
    found = {}
    for name, data in kinds():
        for cap in (LARGE, LARGE * 18 // 12):
            (tmp_path / "a").write_bytes(data)
            words = [str(tmp_path / "a"), str(cap), str(tmp_path / "small.png")]
            taken, _, told = measured(words).partition(" ")
            refused = name in REFUSED and cap == LARGE
            assert (told == "decoded") == (not refused), f"{name}: {told}"
            found[name, cap] = int(taken) - (cost.BYTES_PER_PIXEL * cap + OVERHEAD)
            if name not in REFUSED:
                break
    worst = max(found, key=lambda key: found[key])
    assert found[worst] <= 0, f"{worst}: {found[worst] / 2**20:.0f} MiB more than stated"


def measured(words: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", MEASURE, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_bands_change_no_pixel(tmp_path, monkeypatch):
    """Deep greys and transparency are converted in bands of rows: the same as at once."""
    from vise_fast.images import picture_file

    rng = np.random.default_rng(0)
    deep = Image.fromarray(rng.integers(0, 65_536, (50, 37), np.uint16))
    floats = Image.fromarray(rng.normal(0, 9, (50, 37)).astype(np.float32))
    clear = Image.fromarray(rng.integers(0, 256, (50, 37, 4), np.uint8), "RGBA")
    for picture in (deep, floats, clear, clear.convert("LA"), clear.quantize(16)):
        once = np.asarray(picture_file.to_rgb(picture, "TIFF"))
        with monkeypatch.context() as patch:
            patch.setattr(picture_file, "BAND", 111)
            assert (np.asarray(picture_file.to_rgb(picture, "TIFF")) == once).all()
