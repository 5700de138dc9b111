"""Pixels as they are meant: every mode that Pillow has, every EXIF orientation, every depth."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from karat.data.images import TURNS, Fit, middle, read_file, read_image, to_uint8
from support.data import BACK

ramp = np.zeros((40, 24, 3), np.uint8)
ramp[..., 0] = np.linspace(0, 255, 40)[:, None]
ramp[:10, :, 1] = 200
ramp[..., 2] = np.linspace(255, 0, 24)
COLOUR = Image.fromarray(ramp)
GREY = COLOUR.convert("L")


def stored(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    picture = COLOUR.transpose(BACK[orientation]) if orientation in BACK else COLOUR
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    buffer = io.BytesIO()
    picture.save(buffer, form, exif=exif, **lossless)
    return buffer.getvalue()


def near(found: Image.Image, wanted: Image.Image, tolerance: float = 3.0) -> None:
    assert found.size == wanted.size
    assert found.mode == wanted.mode
    assert np.abs(np.asarray(found, float) - np.asarray(wanted, float)).mean() < tolerance


def lab() -> Image.Image:
    made = ImageCms.profileToProfile(
        COLOUR, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert made is not None
    return made


def deep(mode: str) -> Image.Image:
    values = (np.asarray(GREY).astype(np.uint32) * 257).astype("<u2" if mode != "I;16B" else ">u2")
    return Image.frombytes(mode, GREY.size, values.tobytes())


OTHER = {  # modes that `convert` doesn't make
    "LAB": lab,
    "PA": lambda: COLOUR.convert("P", palette=Image.Palette.ADAPTIVE).convert("PA"),
    "La": lambda: GREY.convert("LA").convert("La"),
    **{mode: (lambda mode=mode: deep(mode)) for mode in ("I;16", "I;16L", "I;16B", "I;16N")},
}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", Image.MODES)
def test_each_mode_of_pillow_comes_out_as_it_is_seen_or_is_refused(mode: str, in_chans: int) -> None:
    picture = OTHER[mode]() if mode in OTHER else COLOUR.convert(mode)
    if mode in ("I", "F"):
        with pytest.raises(ValueError, match="don't say what is white"):
            read_image(picture, in_chans)
        return
    bare = mode in ("1", "L", "LA", "La") or mode.startswith("I;16")
    wanted = (COLOUR.convert("1") if mode == "1" else GREY if bare else COLOUR).convert("RGB" if in_chans == 3 else "L")
    near(read_image(picture, in_chans), wanted, 12.0 if mode in ("P", "PA") else 4.0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_upright(orientation: int, form: str) -> None:
    encoded = stored(orientation, form)
    near(read_image(encoded), COLOUR)
    with Image.open(io.BytesIO(encoded)) as opened:  # a picture that somebody opened
        near(read_image(opened), COLOUR)
    fitted = Fit(40, 1.0, "nearest").decoded(encoded, 3)
    assert torch.equal(fitted, Fit(40, 1.0, "nearest")(read_image(encoded)))
    assert set(TURNS) == set(BACK)


@pytest.mark.parametrize("orientation", BACK)
def test_a_jpeg_of_the_right_size_is_turned_too(orientation: int) -> None:
    exif, square = Image.Exif(), COLOUR.resize((24, 24))
    exif[0x112] = orientation
    buffer = io.BytesIO()
    square.transpose(BACK[orientation]).save(buffer, "JPEG", exif=exif, quality=100, subsampling=0)
    fitted = Fit(24, 1.0, "bicubic").decoded(buffer.getvalue(), 3)
    near(Image.fromarray(fitted.permute(1, 2, 0).numpy()), square)


def test_a_broken_exif_block_turns_nothing() -> None:
    buffer = io.BytesIO()
    COLOUR.save(buffer, "PNG", exif=b"Exif\0\0nonsense")
    near(read_image(buffer.getvalue()), COLOUR)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_transparent_parts_lie_on_white_whatever_hides_there(in_chans: int) -> None:
    alpha = np.full(ramp.shape[:2], 255, np.uint8)
    alpha[:10] = 0
    wanted = COLOUR.copy()
    wanted.paste("white", (0, 0, 24, 10))
    grey = GREY.copy()
    grey.paste("white", (0, 0, 24, 10))
    made = {"RGBA": (COLOUR.convert("RGBA"), wanted), "LA": (GREY.convert("LA"), grey)}
    for mode, (picture, shown) in made.items():
        picture.putalpha(Image.fromarray(alpha))
        for same in (picture, picture.convert({"RGBA": "RGBa", "LA": "La"}[mode])):
            near(read_image(same, in_chans), shown.convert("RGB" if in_chans == 3 else "L"))
    palette = Image.fromarray((alpha == 0).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    for transparency in (1, bytes([255, 0])):
        buffer = io.BytesIO()
        palette.save(buffer, "PNG", transparency=transparency)
        found = np.asarray(read_image(buffer.getvalue()))
        assert found[0, 0].tolist() == [255, 255, 255]
        assert found[-1, -1].tolist() == [255, 0, 0]
    buffer = io.BytesIO()
    GREY.save(buffer, "PNG", transparency=int(np.asarray(GREY)[-1, -1]))
    assert np.asarray(read_image(buffer.getvalue()))[-1, -1].tolist() == [255, 255, 255]
    mask = Image.new("LA", (2, 2), (255, 0))
    assert np.asarray(read_image(mask, 1, ground="black")).max() == 0


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.jp2", "deep.pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    deep("I;16").save(tmp_path / name)
    near(read_file(tmp_path / name), GREY.convert("RGB"), 1.0)


def tiff(values: np.ndarray, bits: int, photometric: int, sample: int = 1) -> bytes:
    """A little-endian TIFF of one strip."""
    height, width = values.shape
    data = values.tobytes()
    if bits == 12:  # two numbers in three bytes
        numbers = values.ravel().tolist()
        data = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    entries = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    entries += [(273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(data)), (339, 3, sample)]
    table = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, kind, value in entries
    )
    end = 8 + len(data)
    return b"II*\0" + end.to_bytes(4, "little") + data + len(entries).to_bytes(2, "little") + table + bytes(4)


@pytest.mark.parametrize(("bits", "photometric"), [(16, 1), (16, 0), (12, 1)])
def test_tiff_says_how_many_bits_and_which_end_is_white(bits: int, photometric: int) -> None:
    white = 2**bits - 1
    values = np.rint(np.asarray(GREY) * (white / 255)).astype("<u2")
    encoded = tiff(values if photometric else (white - values).astype("<u2"), bits, photometric)
    near(read_image(encoded, 1), GREY, 1.0)


def test_numbers_without_a_white_are_refused_by_name(tmp_path: Path) -> None:
    for name, mode in (("real.tif", "F"), ("whole.tif", "I")):
        COLOUR.convert(mode).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} can't be read as an image: .*8 or 16 bits"):
            read_file(tmp_path / name)
    with pytest.raises(ValueError, match="real numbers"):
        read_image(np.zeros((4, 4), np.float32))
    for bits, kind in ((8, "i1"), (16, "<i2")):
        with pytest.raises(ValueError, match="don't say what is white"):
            read_image(tiff(np.full((4, 4), -100, kind), bits, 1, sample=2))


def test_of_several_frames_the_first_is_seen() -> None:
    others = [Image.new("RGB", COLOUR.size, colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "TIFF", "PNG"):
        buffer = io.BytesIO()
        COLOUR.save(buffer, form, save_all=True, append_images=others)
        near(read_image(buffer.getvalue()), COLOUR, 12.0)


def test_a_cmyk_jpeg_is_the_picture() -> None:
    buffer = io.BytesIO()
    COLOUR.convert("CMYK").save(buffer, "JPEG", quality=100, subsampling=0)
    near(read_image(buffer.getvalue()), COLOUR, 6.0)
    near(read_image(buffer.getvalue(), 1), GREY, 6.0)


@pytest.mark.parametrize("size", [(4001, 40), (40, 4001), (20_001, 1), (1, 20_001)])
def test_of_a_very_long_image_the_middle_is_seen_without_scaling_all_of_it(size: tuple[int, int]) -> None:
    pixels = np.full((*size[::-1], 3), 200, np.uint8)
    half = tuple(slice(side // 2 - min(size) // 2, side // 2 + min(size) // 2 + 1) for side in size[::-1])
    pixels[half] = (255, 0, 0)
    image = Image.fromarray(pixels)
    assert max(middle(image).size) <= 16 * min(size) + 1
    seen = Fit(32, 1.0, "bicubic")(image)
    assert seen.shape == (3, 32, 32)
    assert seen[0].float().mean() > 240
    if max(size) < 5000:
        assert (seen.float() - to_uint8(Fit(32, 1.0, "bicubic").view(image)).float()).abs().mean() < 2


def test_no_bytes_are_no_image() -> None:
    with pytest.raises(ValueError, match="no image, or an empty one"):
        read_image(b"")
