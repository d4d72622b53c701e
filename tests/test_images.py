"""Odd image files: each is seen as it should be, or refused with its name. All files are made
here.
"""

import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.embed import embed_files
from isa_lite.support import images as images_module
from isa_lite.support.images import ImageFolder, decode, read_image


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and ends where its pixels should begin."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">II", zlib.crc32(body), 9)
        + b"IDAT"
    )


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def save(path, array: np.ndarray, **options):
    Image.fromarray(array).save(path, **options)
    return path


# -------------------------------------------------------------------------------------------
# duplicates


def test_copies_are_counted_and_left_out_or_kept(tmp_path, picture):
    save(tmp_path / "b.png", picture)
    save(tmp_path / "c.png", picture[::-1].copy())
    for name in ("a copy.png", "z copy.png"):
        (tmp_path / name).write_bytes((tmp_path / "b.png").read_bytes())
    with pytest.warns(UserWarning, match=r"2 of 4 files.*copies.*b\.png.*a copy\.png"):
        folder = ImageFolder(tmp_path)
    assert [p.name for p in folder.files] == ["a copy.png", "c.png"]
    assert {a.name: b.name for a, b in folder.duplicates.items()} == {
        "b.png": "a copy.png",
        "z copy.png": "a copy.png",
    }
    with pytest.warns(UserWarning, match="kept 2 of 4 files"):
        kept = ImageFolder(tmp_path, keep_duplicates=True)
    assert len(kept) == 4 and kept.duplicates == folder.duplicates and kept.key != folder.key
    assert np.array_equal(np.asarray(kept[0]), np.asarray(kept[3]))


def test_a_broken_file_and_its_copy_are_broken(tmp_path, picture):
    save(tmp_path / "good.png", picture)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"2 of 3 files.*a\.png.*UnidentifiedImageError"):
        folder = ImageFolder(tmp_path)
    assert sorted(p.name for p in folder.broken) == ["a.png", "b.png"] and folder.duplicates == {}


def test_a_gallery_keeps_every_copy_and_counts_them(tmp_path, picture, vl):
    files = [
        save(tmp_path / "a.png", picture),
        tmp_path / "b.png",
        save(tmp_path / "c.png", picture[::-1].copy()),
    ]
    files[1].write_bytes(files[0].read_bytes())
    for _ in range(2):  # computed, and from the cache
        with pytest.warns(UserWarning, match=r"1 of 3 files.*b\.png.*a\.png"):
            found = embed_files(files, vl, tmp_path / "cache", progress=False)
        assert (
            len(found) == 3
            and np.allclose(found[0], found[1], atol=1e-6)
            and not np.allclose(found[0], found[2], atol=1e-5)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_files(files[1:], vl, tmp_path / "cache", progress=False)


# ----------------------------------------------------------------------------------------------
# refused


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "UnidentifiedImageError"),
        (b"plain words", "UnidentifiedImageError"),
        (b"GIF89a", "UnidentifiedImageError"),
        (png_header(8, 8), "OSError.*truncated"),
        (png_header(100_000, 100_000), r"too large.*10000000000 pixels.*MAX_IMAGE_PIXELS"),
        (png_header(10_000, 10_000), r"too large \(10000 x 10000"),  # here Pillow would only warn
        (png_header(50_000, 49), "50000 x 49 pixels.*1000"),
        (png_header(49, 50_000), "49 x 50000 pixels.*1000"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_is_refused_by_name(tmp_path, picture, vl, data, reason):
    path, good = tmp_path / "odd one.png", save(tmp_path / "good.png", picture)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"odd one\.png.*({reason})"):
        read_image(path)
    with pytest.raises(ValueError, match=rf"odd one\.png.*({reason})"):
        embed_files([good, path], vl, progress=False)
    with pytest.warns(UserWarning, match=rf"1 of 2 files.*odd one\.png.*({reason})") as seen:
        folder = ImageFolder(tmp_path)
    assert [w.category for w in seen] == [UserWarning] and folder.files == [good]


def test_kinds_of_pictures_that_pillow_does_not_read_are_counted_and_not_passed_over(
    tmp_path, picture
):
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"phone\.HEIC"):
        ImageFolder(tmp_path)
    good = save(tmp_path / "good.png", picture)
    with pytest.warns(UserWarning, match=r"1 of 2 files.*phone\.HEIC"):
        folder = ImageFolder(tmp_path)
    assert folder.files == [good]


@pytest.mark.filterwarnings("ignore")
def test_every_cut_of_a_file_is_read_or_refused(tmp_path, picture):
    """Whatever a decoder throws, it comes out as the one error that names the file."""
    rng = random.Random(0)
    for options in (
        {"format": "PNG"},
        {"format": "JPEG"},
        {"format": "GIF"},
        {"format": "TIFF"},
        {"format": "BMP"},
    ):
        path = tmp_path / "cut"
        save(path, picture, **options)
        whole = path.read_bytes()
        for _ in range(25):
            data = bytearray(whole[: rng.randrange(len(whole))])
            for _ in range(rng.randrange(4)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                assert read_image(path).mode == "RGB"
            except ValueError as error:
                assert str(path) in str(error)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        read_image(tmp_path / "nowhere.png")


def test_the_limit_is_pillows_and_can_be_raised(tmp_path, picture, monkeypatch):
    path = save(tmp_path / "a.png", picture)  # 768 pixels
    with images_module.quiet():
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 767)
        with pytest.raises(ValueError, match=r"a\.png.*too large \(32 x 24\).*now 767"):
            read_image(path)
        for limit in (768, None):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            assert np.array_equal(np.asarray(read_image(path)), picture)


# ------------------------------------------------------------------------------------------ seen
# rightly


def test_tiny_and_long_pictures_are_embedded(tmp_path, vl):
    files = [
        save(tmp_path / f"{w}x{h}.png", np.full((h, w, 3), 77, np.uint8))
        for w, h in ((1, 1), (2, 1), (1, 1000), (300, 1))
    ]
    found = embed_files(files, vl, progress=False)
    # all are one grey
    assert found.isfinite().all() and np.allclose(found[0], found[1:], atol=1e-4)


@pytest.mark.parametrize(
    "mode, ending",
    [("P", "png"), ("P", "gif"), ("CMYK", "jpg"), ("CMYK", "tiff"), ("L", "jpg"), ("1", "bmp")],
)
def test_colours_of_other_modes(tmp_path, mode, ending):
    halves = np.zeros((40, 40, 3), np.uint8)
    halves[:, 20:] = 255  # black and white exist in every mode
    Image.fromarray(halves).convert(mode).save(tmp_path / f"a.{ending}")
    seen = np.asarray(read_image(tmp_path / f"a.{ending}"), int)
    assert (
        seen.shape == (40, 40, 3)
        and abs(seen[:, :12] - 0).max() < 40
        and abs(seen[:, 28:] - 255).max() < 40
    )


def test_sixteen_bits_are_scaled_however_dark(tmp_path):
    for top in (65535, 2000, 200):
        values = np.linspace(0, top, 48, dtype=np.uint16).reshape(6, 8)
        Image.fromarray(values).save(tmp_path / "a.png")
        seen = np.asarray(read_image(tmp_path / "a.png"), int)
        assert abs(seen - np.round(values / 257.0).astype(int)[..., None]).max() <= 1


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_pixels_without_data_are_black_and_leave_the_others_as_they_are(tmp_path, hole):
    values = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    values[2, 3] = hole
    Image.fromarray(values).save(tmp_path / "a.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = np.asarray(read_image(tmp_path / "a.tif"), int)
    expected = np.nan_to_num(values * 255, posinf=0, neginf=0)
    assert abs(seen - expected[..., None]).max() <= 1


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "lime", "blue")]
    for ending in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
        assert Image.open(tmp_path / f"a.{ending}").n_frames == 3
        red = np.asarray(read_image(tmp_path / f"a.{ending}"), int).mean((0, 1))
        assert red[0] > 230 and red[1] < 25 and red[2] < 25


def test_rotated_photographs_stand_upright(tmp_path, picture):
    """The eight orientations of EXIF, against NumPy's turns."""
    turned = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture),
    }
    for orientation, upright in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(tmp_path / "a.png", picture, exif=exif)
        assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), upright), orientation


def test_odd_metadata_is_no_reason_to_warn_or_refuse(tmp_path, picture):
    save(
        tmp_path / "a.jpg",
        picture,
        exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01" * 40,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ImageFolder(tmp_path)) == 1


def test_threads_leave_the_filters_of_warnings_alone(tmp_path, vl):
    rng = np.random.default_rng(0)
    files = [
        save(tmp_path / f"{i}.png", rng.integers(0, 256, (40, 40, 3), np.uint8)) for i in range(60)
    ]
    with warnings.catch_warnings():
        before = list(warnings.filters)
        embed_files(files, vl, batch_size=1, num_workers=4, progress=False)
        assert warnings.filters == before
        decode(files[0].read_bytes())
        assert warnings.filters == before


# ------------------------------------------------------------------------- one way in, whatever the
# source


def odd_files(folder) -> list:
    """A photograph on its side, transparency of three kinds, palettes, CMYK, 16 and 32 bits, an
    animation.
    """
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (40, 64, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.convert("L").save(folder / "grey.png")
    noise.convert("1").save(folder / "bits.png")
    noise.convert("P").save(folder / "palette.png", transparency=3)
    noise.save(folder / "key.png", transparency=(1, 2, 3))
    noise.save(folder / "moves.gif", save_all=True, append_images=[noise.rotate(90)])
    noise.convert("LAB").save(folder / "lab.tif")
    alpha = rng.integers(0, 256, (40, 64, 4), np.uint8)
    Image.fromarray(alpha).save(folder / "alpha.png")
    Image.fromarray(alpha).save(folder / "alpha.webp")
    Image.fromarray(alpha[..., :2], "LA").save(folder / "la.png")
    ramp = np.arange(40 * 64, dtype=np.uint16).reshape(40, 64) * 25
    for name, values in (
        ("16.png", ramp),
        ("32.tif", ramp.astype(np.int32)),
        ("float.tif", (ramp / 65535).astype(np.float32)),
    ):
        Image.fromarray(values).save(folder / name)
    return sorted(folder.iterdir())


def test_a_picture_gives_one_embedding_as_a_file_and_as_an_opened_image(tmp_path, vl):
    files = odd_files(tmp_path)
    by_path = embed_files(files, vl, progress=False)
    by_image = vl.encode_images([Image.open(f) for f in files])
    assert len(files) == 14 and np.allclose(by_path, by_image, atol=1e-5)
    moved = {
        f.name
        for f in files
        if (vl.preprocess(Image.open(f)) - vl.pixels([Image.open(f)])[0]).abs().mean() > 0.1
    }
    # the tower's own way would see something else
    assert {"turned.jpg", "alpha.png", "16.png"} <= moved
    assert images_module.images_key([Image.open(f) for f in files]) == images_module.images_key(
        [read_image(f) for f in files]
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.jpg"])
def test_no_other_program_is_started_whatever_a_file_is_called(
    tmp_path, picture, monkeypatch, name
):
    def started(*args, **kwargs):
        raise AssertionError("Pillow started another program")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
    (tmp_path / name).write_bytes(EPS)
    good = save(tmp_path / "good.png", picture)
    with pytest.raises(ValueError, match=name):
        read_image(tmp_path / name)
    with pytest.warns(UserWarning, match=name):
        assert ImageFolder(tmp_path).files == [good]
    with pytest.raises(ValueError, match="EPS"):
        decode(Image.open(tmp_path / name))  # opened elsewhere, not yet read


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(1, 60_000), (13_000, 13_000)])
def test_no_memory_is_spent_on_a_picture_that_is_too_large_or_too_long(tmp_path, size):
    (tmp_path / "large.png").write_bytes(png_header(*size))
    with pytest.raises(ValueError, match="large.png"):
        read_image(tmp_path / "large.png")


def test_a_file_that_no_picture_can_fill_is_not_read(tmp_path, picture):
    save(tmp_path / "good.png", picture)
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(2**40)  # sparse: it takes no room on the disk
    with pytest.raises(ValueError, match="huge.png"):
        read_image(tmp_path / "huge.png")
    with pytest.warns(UserWarning, match="huge.png"):
        assert len(ImageFolder(tmp_path)) == 1


def test_no_message_holds_an_address_in_memory(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png") as error:
        read_image(tmp_path / "a.png")
    assert "0x" not in str(error.value)


# ------------------------------------------------------------------------------------------- which
# files


def test_linked_folders_are_followed_without_loops_and_hidden_ones_left_out(tmp_path):
    rng = np.random.default_rng(0)
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for path in ("inside/a.png", "inside/sub/b.png", "outside/c.png", "outside/deep/d.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / path, rng.integers(0, 256, (9, 9, 3), np.uint8))
    for path in (
        "inside/.ipynb_checkpoints/a-checkpoint.png",
        "inside/.hidden/e.png",
        "inside/._a.png",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / path, rng.integers(0, 256, (9, 9, 3), np.uint8))
    try:
        (inside / "link").symlink_to(outside, target_is_directory=True)
        (inside / "sub" / "up").symlink_to(inside, target_is_directory=True)
        (outside / "deep" / "round").symlink_to(outside, target_is_directory=True)
    except OSError:
        pytest.skip("this system lets nobody make links")
    found = [p.relative_to(inside).as_posix() for p in ImageFolder(inside).files]
    assert found == ["a.png", "link/c.png", "link/deep/d.png", "sub/b.png"]
    (inside / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match="gone.png"):
        ImageFolder(inside)


# ---------------------------------------------------------------------------------------- what is
# no list


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, named",
    [
        ("a.png", "images"),
        (Image.new("RGB", (8, 8)), "images"),
        (None, "images"),
        ([], "images"),
        (np.zeros((0, 8, 8, 3), np.uint8), "images"),
        (np.zeros((8, 8, 3), np.uint8), r"images\[None\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), "N x H x W x 3"),
        (np.zeros((2, 3, 8, 8), np.uint8), "N x H x W x 3"),
        (np.zeros((2, 8, 8, 3)), "uint8"),
        (np.zeros((2, 8, 8, 3), np.float32), "uint8"),
        (np.zeros((2, 8, 8, 3), np.int64), "uint8"),
        ([np.zeros((8, 8, 3))], r"images\[0\].*uint8"),
        ([np.zeros((1, 8, 8, 3), np.uint8)], r"images\[0\]"),
        (["a.png"], r"images\[0\].*read_image"),
        ([Image.new("RGB", (8, 8)), None], r"images\[1\]"),
    ],
)
def test_what_is_no_list_of_pictures_is_refused(vl, wrong, named):
    encoder = QueryEncoder.for_model(vl, num_tokens=2, width=32, depth=1)
    for call in (
        vl.encode_images,
        vl.pixels,
        encoder.sentences,
        encoder.pixels,
        images_module.images_key,
    ):
        with pytest.raises(ValueError, match=named):
            call(wrong)


def test_a_folder_is_a_list_of_pictures(tmp_path, vl):
    for i in range(3):
        save(
            tmp_path / f"{i}.png", np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        )
    folder = ImageFolder(tmp_path)
    assert np.allclose(
        vl.encode_images(folder, batch_size=2),
        embed_files(folder.files, vl, progress=False),
        atol=1e-5,
    )
    assert [p.size for p in folder[1:]] == [(40, 30)] * 2 and folder[-1].size == (40, 30)
