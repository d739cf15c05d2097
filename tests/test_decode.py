"""Every kind of image file is read right within 1 % of its value range, or refused by name."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiepoints.decode import image_size, no_pixel_limit, page_count, split_page
from tiepoints.errors import DataError
from tiepoints.extract import build
from tiepoints.image import ReadOptions, load_image, read_image, to_rgb

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

CASES = Path(__file__).parents[2] / "shared" / "cases"
RNG = np.random.default_rng(0)
H, W = 30, 44
UNIT = np.asarray(
    Image.fromarray(RNG.random((8, 11), dtype=np.float32)).resize(
        (W, H), Image.Resampling.BILINEAR
    ),
    np.float64,
)
COLOR = np.stack([UNIT, UNIT[::-1], UNIT[:, ::-1]], axis=-1)
GRAY = COLOR @ [0.299, 0.587, 0.114]
ALPHA = np.ones((H, W))


def stored(unit: np.ndarray, dtype: str) -> np.ndarray:
    """Values in [0,1] as a type that fills its range."""
    if np.dtype(dtype).kind == "f":
        return unit.astype(dtype)
    limits = np.iinfo(dtype)
    return (
        np.round(unit * (float(limits.max) - limits.min) + limits.min)
        .clip(limits.min, float(limits.max) if np.dtype(dtype).itemsize < 8 else 2**62)
        .astype(dtype)
    )


def assert_reads(path: Path, wanted: np.ndarray, **options) -> None:
    pixels = read_image(path, ReadOptions(**options)).pixels[0, 0].numpy()
    assert pixels.shape == wanted.shape
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, wanted, atol=0.01)
    assert image_size(path) == wanted.shape[::-1]


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"],
)
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("kind", ["gray", "white", "color", "planar", "alpha", "rgba"])
def test_types_of_tiff(tmp_path, dtype, byteorder, kind):
    path = tmp_path / "a.tif"
    more: dict = {"byteorder": byteorder}
    if kind in ("gray", "white"):
        unit = UNIT
        more["photometric"] = "miniswhite" if kind == "white" else "minisblack"
        wanted = 1 - UNIT if kind == "white" else UNIT
    elif kind == "alpha":
        unit, wanted = np.dstack([UNIT, ALPHA]), UNIT
        more |= {"photometric": "minisblack", "planarconfig": "contig"}
        more["extrasamples"] = ["unassalpha"]
    else:
        unit, wanted = COLOR, GRAY
        more["photometric"] = "rgb"
        if kind == "rgba":
            unit, more["extrasamples"] = np.dstack([COLOR, ALPHA]), ["unassalpha"]
        if kind == "planar":
            unit, more["planarconfig"] = np.moveaxis(COLOR, -1, 0), "separate"
    tifffile.imwrite(path, stored(unit, dtype), **more)
    assert_reads(path, wanted)


@pytest.mark.parametrize(
    "compression", ["lzw", "deflate", "packbits", "zstd", "lzma", "webp", "lerc", "jpegxl"]
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_compressed_tiff(tmp_path, compression, dtype):
    if compression in ("webp", "jpegxl") and dtype != "uint8":
        pytest.skip("8 bits only")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored(COLOR, dtype), photometric="rgb", compression=compression)
    assert_reads(path, GRAY)


@pytest.mark.parametrize(
    "more",
    [
        {"bigtiff": True},
        {"tile": (16, 16)},
        {"bigtiff": True, "tile": (16, 16), "compression": "deflate", "predictor": True},
        {"rowsperstrip": 7, "compression": "lzw", "predictor": True},
        {"bigtiff": True, "byteorder": ">"},
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_layouts_of_tiff(tmp_path, more, dtype):
    tifffile.imwrite(tmp_path / "a.tif", stored(UNIT, dtype), photometric="minisblack", **more)
    assert_reads(tmp_path / "a.tif", UNIT)


def test_jpeg_in_tiff_cmyk_1_bit_and_palettes(tmp_path):
    path = tmp_path / "a.tif"
    photo = Image.fromarray(stored(COLOR, "uint8"))
    photo.save(path, compression="jpeg", quality=95)
    assert_reads(path, np.asarray(Image.open(path).convert("L")) / 255)
    photo.convert("CMYK").save(path)
    assert_reads(path, GRAY)
    tifffile.imwrite(path, stored(1 - np.dstack([COLOR, ALPHA]), "uint16"), photometric="separated")
    assert_reads(path, GRAY)
    for compression in (None, "group4"):
        Image.fromarray(UNIT > 0.5).save(path, compression=compression)
        assert_reads(path, (UNIT > 0.5).astype(float))
    index = stored(UNIT, "uint8")
    ramp = np.linspace(1, 0, 256)
    for top, bits in ((65535, "8"), (255, "8"), (65535, "16")):
        colors = np.tile(np.round(ramp * top).astype(np.uint16), (3, 1))
        if bits == "16":
            colors = np.repeat(colors, 256, axis=1)
        values = index if bits == "8" else index.astype(np.uint16) * 256
        tifffile.imwrite(path, values, photometric="palette", colormap=colors)
        assert_reads(path, ramp[index])


def test_12_bits_in_tiff(tmp_path):
    values = np.round(UNIT * 4095).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, bitspersample=12, photometric="minisblack")
    assert_reads(tmp_path / "a.tif", UNIT)
    assert_reads(tmp_path / "a.tif", (2 * UNIT).clip(0, 1), value_range="0,2047.5")


@pytest.mark.parametrize("count", [2, 5, 10])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_bands_are_refused_or_selected(tmp_path, count, dtype, planar):
    bands = np.stack([np.roll(UNIT, i, axis=1) for i in range(count)], axis=-1)
    values = stored(bands if planar == "contig" else np.moveaxis(bands, -1, 0), dtype)
    path = tmp_path / "bands.tif"
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig=planar)
    with pytest.raises(DataError, match=rf"bands\.tif.*{count} x {dtype}.*--bands"):
        load_image(path)
    assert_reads(path, bands[..., 1], bands="2")
    if count > 3:
        wanted = bands[..., [3, 2, 0]] @ [0.299, 0.587, 0.114]
        assert_reads(path, wanted, bands="4,3,1")
    with pytest.raises(DataError, match="no band 11"):
        read_image(path, ReadOptions(bands="11"))


def test_more_bands_than_rgb_are_ignored(tmp_path):
    for dtype in ("uint8", "uint16"):
        values = stored(np.dstack([COLOR, UNIT, UNIT]), dtype)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
        assert_reads(tmp_path / "a.tif", GRAY)


@pytest.mark.parametrize(
    ("photometric", "named"), [(8, r"L\*a\*b\*"), (32803, "color filter"), (6, "YCbCr")]
)
def test_other_colors_are_refused_by_name(tmp_path, photometric, named):
    path = tmp_path / "a.tif"
    values = stored(UNIT if photometric == 32803 else COLOR, "uint16")
    tifffile.imwrite(path, values, photometric="rgb" if values.ndim == 3 else "minisblack")
    patch_tag(path, 262, photometric)
    with pytest.raises(DataError, match=rf"a\.tif.*{named}"):
        load_image(path)


def test_complex_numbers_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", UNIT.astype(np.complex64))
    with pytest.raises(DataError, match="complex"):
        load_image(tmp_path / "a.tif")


def test_associated_alpha_is_divided(tmp_path):
    alpha = 0.5 + 0.5 * UNIT
    for dtype in ("uint8", "uint16", "float32"):
        values = stored(np.dstack([COLOR * alpha[..., None], alpha]), dtype)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["assocalpha"])
        assert_reads(tmp_path / "a.tif", GRAY)


def test_without_tifffile_the_kind_and_the_extra_are_named(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", stored(UNIT, "int16"))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"a\.tif.*int16.*tiepoints\[tiff\]"):
        load_image(tmp_path / "a.tif")


def test_16_bit_color_is_not_cut(tmp_path):
    cv2 = pytest.importorskip("cv2")
    unit = 0.5 + (COLOR - 0.5) / 300  # within one step of 8 bits
    for suffix in ("png", "ppm", "tif"):
        path = tmp_path / f"a.{suffix}"
        cv2.imwrite(str(path), stored(unit, "uint16")[..., ::-1])
        again = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1] / 65535
        pixels = load_image(path)[0, 0].numpy()
        np.testing.assert_allclose(pixels, again @ [0.299, 0.587, 0.114], atol=2e-5)
        assert len(np.unique(pixels)) > 50
        assert_reads(path, wanted_auto(GRAY), value_range="auto")
    for extra in (ALPHA, ALPHA * (UNIT > 0.3)):
        cv2.imwrite(str(tmp_path / "b.png"), stored(np.dstack([unit, extra]), "uint16"))
        reading = read_image(tmp_path / "b.png", ReadOptions(mask_alpha=False))
        np.testing.assert_allclose(reading.pixels[0, 0], unit @ [0.114, 0.587, 0.299], atol=2e-5)


def wanted_auto(unit: np.ndarray) -> np.ndarray:
    low, high = np.percentile(unit, (0.5, 99.5))
    return ((unit - low) / (high - low)).clip(0, 1)


def test_16_bit_png_with_gray_and_alpha(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    values = stored(np.dstack([UNIT, UNIT > 0.5]), "uint16")
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values))
    reading = read_image(tmp_path / "a.png", ReadOptions(mask_alpha=False))
    np.testing.assert_allclose(reading.pixels[0, 0], values[..., 0] / 65535, atol=1e-6)
    assert read_image(tmp_path / "a.png").mask is not None


def test_pgm_of_other_ranges(tmp_path):
    for top in (100, 1023, 65535):
        values = np.round(UNIT * top).astype(">u2" if top > 255 else "u1")
        content = f"P5\n# comment\n{W} {H}\n{top}\n".encode() + values.tobytes()
        (tmp_path / "a.pgm").write_bytes(content)
        assert_reads(tmp_path / "a.pgm", UNIT)
        assert_reads(tmp_path / "a.pgm", (UNIT * 2).clip(0, 1), value_range=f"0,{top / 2}")
    (tmp_path / "a.pgm").write_bytes(content[:-50])
    with pytest.raises(DataError, match=r"a\.pgm"):
        load_image(tmp_path / "a.pgm")


@pytest.mark.parametrize("name", ["int16", "int8", "uint32", "miniswhite16"])
def test_shared_cases(name):
    path = CASES / "tiff" / f"{name}.tif"
    if not path.exists():
        pytest.skip("needs ../shared")
    values = tifffile.imread(path)
    limits = np.iinfo(values.dtype)
    wanted = (values.astype(np.float64) - limits.min) / (float(limits.max) - limits.min)
    assert_reads(path, 1 - wanted if name == "miniswhite16" else wanted)


# ---- value ranges


def test_value_ranges(tmp_path):
    counts = np.round(29500 + 1500 * UNIT)
    for dtype in ("uint16", "int32", "float32", "float64"):
        path = tmp_path / f"{dtype}.tif"
        tifffile.imwrite(path, counts.astype(dtype))
        assert_reads(path, wanted_auto(counts), value_range="auto")
        assert_reads(path, UNIT, value_range="29500,31000")
        assert_reads(path, (2 * UNIT).clip(0, 1), value_range="29500,30250")
    assert read_image(tmp_path / "uint16.tif").narrow
    assert not read_image(tmp_path / "uint16.tif", ReadOptions("auto")).narrow
    with pytest.raises(DataError, match=r"float32\.tif.*29.*--value-range auto"):
        load_image(tmp_path / "float32.tif")
    array = counts.astype(np.int64)
    reading = read_image(array, ReadOptions("auto"))
    np.testing.assert_allclose(reading.pixels[0, 0], wanted_auto(counts), atol=0.01)
    flat = np.full((9, 9), 77, np.uint16)
    assert read_image(flat, ReadOptions("auto")).pixels.unique().tolist() == [0]


@pytest.mark.parametrize("text", ["", "1", "2,1", "a,b", "1,2,3", "nan,1", "0,inf", "5,5"])
def test_invalid_value_ranges(text):
    with pytest.raises(ValueError, match="value_range"):
        ReadOptions(value_range=text)


@pytest.mark.parametrize("text", ["", "0", "1,2", "a", "-1", "1,2,3,4"])
def test_invalid_bands(text):
    with pytest.raises(ValueError, match="bands"):
        ReadOptions(bands=text)


# ---- pixels without content


def test_nan_and_nodata_are_masked_and_filled(tmp_path):
    hole = np.zeros((H, W), bool)
    hole[:, :12] = True
    for dtype, value in (("float32", np.nan), ("float32", -9999), ("int16", -32768), ("uint8", 0)):
        values = stored(0.2 + 0.6 * UNIT, dtype)
        values[hole] = value
        tags = [] if np.isnan(value) else [(42113, "s", 0, str(value), True)]
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, values, photometric="minisblack", extratags=tags)
        reading = read_image(path)
        assert reading.mask is not None
        assert not reading.mask[:, : 12 + 8].any()
        assert reading.mask[:, 12 + 9 :].all()
        pixels = reading.pixels[0, 0].numpy()
        np.testing.assert_allclose(pixels[:, 14:], 0.2 + 0.6 * UNIT[:, 14:], atol=0.01)
        assert pixels.min() > 0.1
        assert pixels.max() < 0.9


def test_an_image_without_any_data_has_no_keypoints(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((H, W), np.nan, np.float32))
    reading = read_image(tmp_path / "a.tif")
    assert reading.mask is not None
    assert not reading.mask.any()
    assert reading.pixels.unique().tolist() == [0]


# ---- pages


def test_pages_of_tiff_gif_and_previews(tmp_path):
    frames = [stored(np.roll(UNIT, 5 * i, axis=1), "uint8") for i in range(3)]
    tifffile.imwrite(tmp_path / "a.tif", np.stack(frames), photometric="minisblack")
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    for name in ("a.tif", "a.gif"):
        assert page_count(tmp_path / name) == 3
        assert read_image(tmp_path / name).pages == 3
        for page in (2, 3):
            assert_reads(tmp_path / f"{name}#{page}", frames[page - 1] / 255)
        with pytest.raises(DataError, match="no page 4"):
            load_image(tmp_path / f"{name}#4")
    with tifffile.TiffWriter(tmp_path / "overview.tif") as file:
        file.write(frames[0], photometric="minisblack")
        file.write(frames[0][::2, ::2], photometric="minisblack", subfiletype=1)
    assert read_image(tmp_path / "overview.tif").pages == 1
    (tmp_path / "b#2.png").write_bytes(b"")
    assert split_page(tmp_path / "b#2.png")[1] == 1
    assert split_page("scan.tif#12") == (Path("scan.tif"), 12)


# ---- EXIF orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "b.tif"])
def test_exif_orientation(tmp_path, name, orientation):
    from PIL import ImageOps

    path = tmp_path / name
    values = stored(UNIT, "uint8")
    if name == "b.tif":  # read by tifffile
        tag = (274, "H", 1, orientation, True)
        tifffile.imwrite(path, stored(UNIT, "int16"), photometric="minisblack", extratags=[tag])
    else:
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(values).save(path, exif=exif, quality=98)
    assert_reads(path, UNIT) if name != "a.jpg" else None
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(buffer))) / 255
    reading = read_image(path, ReadOptions(exif_orientation="apply"))
    assert reading.orientation == 1
    np.testing.assert_allclose(reading.pixels[0, 0], upright, atol=0.03)
    assert read_image(path).orientation == orientation
    picture = to_rgb(path, ReadOptions(exif_orientation="apply"))
    assert picture.size == upright.shape[::-1]


# ---- damaged and huge files


def patch_tag(path: Path, tag: int, value: int) -> None:
    """Replace the value of a short tag of a little-endian TIFF."""
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    for i in range(count):
        entry = start + 2 + 12 * i
        if struct.unpack_from("<H", content, entry)[0] == tag:
            struct.pack_into("<H", content, entry + 8, value)
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "gif", "webp", "bmp", "ppm", "jp2"])
def test_damaged_files_raise_data_errors(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(stored(COLOR, "uint8")).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for i in range(60):
        content = bytearray(whole[: rng.integers(8, len(whole))] if i % 3 == 0 else whole)
        for position in rng.integers(0, min(len(content), 200 if i % 2 else 10**9), 4):
            content[position] = rng.integers(0, 256)
        path.write_bytes(content)
        for read in (read_image, image_size, page_count):
            with contextlib.suppress(DataError):
                read(path)


@pytest.mark.parametrize(
    "error", [TypeError("x"), struct.error("x"), zlib.error("x"), MemoryError(), KeyError(3)]
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    path = tmp_path / "a.png"
    Image.fromarray(stored(UNIT, "uint8")).save(path)

    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=r"a\.png"):
        load_image(path)


def test_a_header_that_claims_more_pixels_than_allowed(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stored(UNIT, "int16"))
    patch_tag(tmp_path / "a.tif", 256, 60000)
    patch_tag(tmp_path / "a.tif", 257, 60000)
    with pytest.raises(DataError, match="60000 x 60000"):
        load_image(tmp_path / "a.tif")


def test_the_pixel_limit_of_pillow_is_restored():
    before = Image.MAX_IMAGE_PIXELS
    inside = threading.Event()
    leave = threading.Event()

    def hold() -> None:
        with no_pixel_limit():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(5)
    with no_pixel_limit():
        assert Image.MAX_IMAGE_PIXELS is None
    assert Image.MAX_IMAGE_PIXELS is None  # the thread is still inside
    leave.set()
    thread.join()
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_large_images_need_little_memory_and_no_warning(tmp_path):
    path = tmp_path / "large.png"
    Image.new("RGB", (10_000, 2_000), (10, 200, 30)).save(path, compress_level=1)
    code = """if True:
        import re, sys
        from pathlib import Path
        from tiepoints.image import load_image
        load_image(sys.argv[2])
        status = Path("/proc/self/status")
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024
        before = peak()
        pixels = load_image(sys.argv[1])
        print((peak() - before) / pixels.numel())
    """
    small = tmp_path / "small.png"
    Image.new("RGB", (100, 100)).save(small)
    done = subprocess.run(
        [sys.executable, "-c", code, path, small], capture_output=True, text=True, check=True
    )
    # 4 bytes of Pillow, 4 of the result, and strips
    assert 4 < float(done.stdout) < 12
    with warnings.catch_warnings(), no_pixel_limit():
        warnings.simplefilter("error")
        assert image_size(path) == (10_000, 2_000)


def test_previews_of_an_mpo_file_are_no_pages(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    photo.save(tmp_path / "p.jpg", "MPO", save_all=True, append_images=[photo])
    with Image.open(tmp_path / "p.jpg") as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
    assert page_count(tmp_path / "p.jpg") == 1
    assert read_image(tmp_path / "p.jpg").pages == 1


@pytest.mark.parametrize("nodata", [0, 255])
def test_nodata_of_an_inverted_tiff_is_a_stored_value(tmp_path, nodata):
    tifffile = pytest.importorskip("tifffile")
    stored = np.random.default_rng(0).integers(50, 200, (60, 80), np.uint8)
    stored[:, :30] = nodata
    path = tmp_path / "m.tif"
    tags = [(42113, "s", 0, str(nodata), True)]
    tifffile.imwrite(path, stored, photometric="miniswhite", extratags=tags)
    reading = read_image(path)
    assert reading.mask is not None
    assert not bool(reading.mask[:, :30].any())
    assert bool(reading.mask[:, 45:].all())
    found = reading.pixels[0, 0, :, 45:].numpy()
    np.testing.assert_allclose(found, 1 - stored[:, 45:] / 255, atol=1e-6)


def test_associated_alpha_after_another_band(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = np.zeros((40, 50, 5), np.uint8)
    values[..., :3], values[..., 3], values[..., 4] = 64, 200, 128  # half transparent white
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, photometric="rgb", extrasamples=(0, 1), planarconfig="contig")
    assert float(read_image(path).pixels[0, 0, 20, 25]) == pytest.approx(64 / 128, abs=0.01)


@pytest.mark.parametrize("kind", ["float64", "uint32"])
def test_official_extraction_reads_what_others_read(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    unit = np.kron(rng.random((12, 14)), np.ones((12, 12)))
    high = 1.0 if kind == "float64" else 2.0**32 - 1
    tifffile.imwrite(tmp_path / "a.tif", (unit * high).astype(kind))
    found = build("keynet", None, official=True, num_keypoints=30).extract(tmp_path / "a.tif")
    assert len(found) > 5


def test_whole_levels_keep_filled_pixels(tmp_path):
    rng = np.random.default_rng(0)
    rgba = np.dstack([rng.integers(100, 200, (60, 80, 3)), np.full((60, 80), 255)]).astype(np.uint8)
    rgba[:, :30] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    plain = read_image(tmp_path / "a.png").pixels
    whole = read_image(tmp_path / "a.png", whole_levels=True).pixels
    assert float(whole[..., :30].min()) > 0.3
    assert float((plain - whole).abs().max()) < 1 / 255
