"""Users' own images: what comes out is what went in, four times as large, whatever the windows, kills and processes."""

import base64
import contextlib
import functools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import filelock
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
import tyro
from conftest import ROOT, tiny_ldm
from PIL import ExifTags, Image, ImageCms
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine, GroundControlPoint, from_origin

import ppo_ldm_sr as orl
import upscale_sr as up

CPU = torch.device("cpu")
rng = np.random.default_rng(0)
UTM = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 2, 2)}
RGBA = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An environment of two NFE, an untrained agent, and a pool of two threads."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_ldm(folder)
    torch.manual_seed(0)
    ldm = orl.load_ldm(str(folder), CPU)
    ldm.autocast = torch.autocast("cpu", enabled=False)  # without bf16 and codebook a rounding error stays one
    ldm.vqvae.decode = functools.partial(ldm.vqvae.decode, force_not_quantize=True)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield orl.DenoisingEnv(ldm, 2, 2, orl.Sensor()), orl.Agent(torch.ones(3), 8), pool


def pixels(h, w, bands=3):
    """uint8 (h, w, bands): colours that change slowly."""
    small = rng.integers(20, 235, (max(2, h // 6), max(2, w // 6), bands), dtype=np.uint8)
    bicubic = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(small[..., k]).resize((w, h), bicubic)) for k in range(bands)], -1)


def raster(path, values, driver="GTiff", **profile):
    values = np.asarray(values)
    size = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", driver=driver, **size, **profile) as file:
        file.write(values)
    return path


def result(tiny, file, **settings):
    """The one line that is said of a file, and its result opened."""
    args = up.Args(paths=(str(file),), **settings)
    ((source, target),) = up.list_files(args)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        line = up.super_resolve_file(args, source, target, *tiny, time.time())
    return line, rasterio.open(line.split(": ")[0])


def half_again(sr):
    """(bands, 4h, 4w) -> (bands, h, w), as the LR image of the result would be."""
    sr = torch.from_numpy(sr.astype(np.float32))[None]
    return torch.nn.functional.interpolate(sr, scale_factor=0.25, mode="bicubic", antialias=True)[0].numpy()


def four_times(lr):
    return lr.repeat(4, -2).repeat(4, -1)


@pytest.fixture
def cli(tiny, monkeypatch, capsys):
    """Calls `main` with the tiny LDM and agent in place of those that ship -> what it prints, and its exit code."""
    saved = {"args": {"ldm": "x", "base_steps": 2, "max_nfe": 2, "mtf": None, "lr_noise": 0.0}}
    monkeypatch.setattr(orl, "load_run", lambda run: saved)
    monkeypatch.setattr(orl, "load_agent", lambda saved, ldm: tiny[1])
    monkeypatch.setattr(orl, "load_ldm", lambda name, device: tiny[0].ldm)

    def call(*paths, **settings):
        before, code = signal.getsignal(signal.SIGTERM), 0
        try:
            up.main(up.Args(paths=tuple(map(str, paths)), **settings))
        except SystemExit as error:
            code = error.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return capsys.readouterr().out, code

    return call


# ---------------------------------------------------------------- tiles and seams
@pytest.mark.parametrize("size", [(97, 61), (1, 1), (5, 300), (280, 150)])
def test_the_result_is_exactly_four_times_as_large_and_downscales_to_the_image(tiny, tmp_path, size):
    values = pixels(*size)
    Image.fromarray(values).save(tmp_path / "a.png")
    _, sr = result(tiny, tmp_path / "a.png")
    assert (sr.height, sr.width, sr.count) == (4 * size[0], 4 * size[1], 3)
    if min(size) > 20:
        assert np.abs(half_again(sr.read()) - values.transpose(2, 0, 1)).mean() < 3


def test_what_is_darker_than_black_and_brighter_than_white_comes_back(tiny, tmp_path):
    values = np.full((3, 48, 48), 50, np.float32)
    values[:, 10:20, 10:20], values[:, 30:40, 30:40] = -60, 160
    _, sr = result(tiny, raster(tmp_path / "a.tif", values), scale=(0.0, 100.0))
    error = np.abs(half_again(sr.read()) - values)
    assert error[:, 10:20, 10:20].mean() < 3 and error[:, 30:40, 30:40].mean() < 3


def test_windows_change_no_value(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(up, "TILE", 48)
    file, made = raster(tmp_path / "a.tif", pixels(180, 130).transpose(2, 0, 1).astype(np.uint16) * 200), []
    for window in (32, 64, 512):
        made.append(result(tiny, file, output=str(tmp_path / f"{window}"), window=window)[1].read())
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2]) and made[0].std() > 2000


def test_the_number_of_threads_changes_no_value(ldm_folder, tmp_path):
    raster(tmp_path / "a.tif", pixels(100, 150).transpose(2, 0, 1).astype(np.uint16) * 200)
    made = []
    for threads in ("1", "2"):
        words = (tmp_path / "a.tif", "--output", tmp_path / threads)
        assert ended(start(ldm_folder, 0, *words, threads=int(threads)))
        made.append(rasterio.open(tmp_path / threads / "a_sr.tif").read())
    assert np.array_equal(*made) and made[0].std() > 2000


def test_the_weights_of_tiles_sum_to_one_and_tiles_have_one_size():
    for length in (1, 100, 137, 512, 1536):
        count, step = up.grid(length, 8)
        total = torch.zeros(count * step + up.OVERLAP)
        for k in range(count):
            total[step * k :][: step + up.OVERLAP] += up.fade(step + up.OVERLAP, up.OVERLAP, k == 0, k == count - 1)
        torch.testing.assert_close(total, torch.ones_like(total))
        assert (step + up.OVERLAP) % 8 == 0 and 32 <= step + up.OVERLAP <= up.TILE and count * step >= length


def test_all_tiles_take_the_strides_that_the_agent_chose_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(up, "TILE", 48)
    seen, policy = [], orl.Agent.policy
    monkeypatch.setattr(orl.Agent, "policy", lambda self, *obs: seen.append(len(obs[0])) or policy(self, *obs))
    Image.fromarray(pixels(180, 130)).save(tmp_path / "a.png")
    result(tiny, tmp_path / "a.png")
    assert 0 < len(seen) <= 2 and set(seen) == {6}  # once a step, six tiles


def test_no_seam_shows_between_tiles(tiny, tmp_path, monkeypatch):
    """The mean jump between neighbouring pixels, across the middles of the overlaps and everywhere else."""
    monkeypatch.setattr(up, "TILE", 48)
    Image.fromarray(pixels(60, 200)).save(tmp_path / "a.png")
    jump = np.abs(np.diff(result(tiny, tmp_path / "a.png")[1].read().astype(float), axis=2)).mean(axis=(0, 1))
    _, step = up.grid(200, tiny[0].ldm.stride)
    near = np.concatenate([jump[4 * step * k - 3 : 4 * step * k + 2] for k in range(1, 200 // step)])
    assert near.mean() / jump.mean() < 1.25


def test_the_agents_own_sensor_is_used(tiny, tmp_path):
    values = pixels(48, 48)
    Image.fromarray(values).save(tmp_path / "a.png")
    sensor = orl.Sensor(mtf=0.29)
    _, sr = result((orl.DenoisingEnv(tiny[0].ldm, 2, 2, sensor), *tiny[1:]), tmp_path / "a.png")
    again = 255 * sensor.downscale(torch.from_numpy(sr.read() / np.float32(255))[None])[0].numpy()
    assert np.abs(again - values.transpose(2, 0, 1)).mean() < 3


# ---------------------------------------------------------------- what goes in comes out
@pytest.mark.parametrize("dtype, top, nodata", [("uint8", 255, 0), ("uint16", 4095, 0), ("int16", 4000, -9999),
                                                ("float32", 0.5, -1.0), ("float32", 0.5, None)])  # fmt: skip
def test_a_geotiff_keeps_coordinates_type_tags_holes_and_values(tiny, tmp_path, dtype, top, nodata):
    values = (top * (0.1 + 0.8 * pixels(40, 52, 4).transpose(2, 0, 1) / 255)).astype(dtype)
    values[:, 10:20, 10:20] = np.nan if nodata is None else nodata
    values[0, 30:, :8] = values[0, 10, 10]  # a hole in one band alone
    raster(tmp_path / "a.tif", values, nodata=nodata, photometric="minisblack", **UTM)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.update_tags(sensor="a test")
        file.update_tags(ns="SENSOR", gain="3")
        file.update_tags(2, wavelength="560 nm", STATISTICS_MEAN="1")
        file.set_band_description(2, "green")
        file.scales, file.offsets, file.units = (0.0001,) * 4, (-0.1, 0.0, 0.0, 0.0), ("reflectance",) * 4
    line, sr = result(tiny, tmp_path / "a.tif")
    assert sr.bounds == rasterio.open(tmp_path / "a.tif").bounds and sr.crs == "EPSG:32633" and sr.res == (0.5, 0.5)
    assert (sr.count, sr.width, sr.height, sr.dtypes[0], sr.nodata) == (3, 208, 160, dtype, nodata)
    assert sr.tags()["sensor"] == "a test" and sr.tags(ns="SENSOR") == {"gain": "3"} and sr.descriptions[1] == "green"
    assert sr.scales == (0.0001,) * 3 and sr.offsets == (-0.1, 0.0, 0.0) and sr.units == ("reflectance",) * 3
    assert sr.tags(2) == {"wavelength": "560 nm"}
    assert "left out: band(s) 4" in line
    found, hole = sr.read(), np.isnan(values[:3]) if nodata is None else values[:3] == nodata
    assert np.array_equal(np.isnan(found) if nodata is None else found == nodata, four_times(hole))
    error = np.abs(half_again(np.nan_to_num(found)) - np.nan_to_num(values[:3].astype(np.float32)))
    assert error[:, :, 26:].mean() < max(0.6, 0.01 * top)  # the filter reaches into holes


def test_black_and_white_are_taken_at_full_resolution_not_from_overviews(tiny, tmp_path):
    values = rng.integers(500, 2500, (3, 80, 80), dtype=np.uint16)
    raster(tmp_path / "a.tif", values)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.build_overviews([2, 4], Resampling.average)
    scene = up.Scene(tmp_path / "a.tif", up.Args(paths=()))
    assert scene.fetch(step=4)[0].std() > 400  # of averages 144
    scene.look()
    assert scene.scale == tuple(np.percentile(values, (2, 98)))


def test_more_than_8_bits_keep_their_range_and_a_scale_can_be_given(tiny, tmp_path):
    values = pixels(40, 52, 3).transpose(2, 0, 1).astype(np.uint16) * 16
    for name, driver in (("a.png", "PNG"), ("b.tif", "GTiff"), ("c.jp2", "JP2OpenJPEG")):
        raster(tmp_path / name, values, driver, **({"QUALITY": "100", "REVERSIBLE": "YES"} if name == "c.jp2" else {}))
        line, sr = result(tiny, tmp_path / name)
        assert sr.dtypes[0] == "uint16" and np.abs(half_again(sr.read()) - values).mean() < 0.01 * 4095, name
        low, high = np.percentile(values, (2, 98))
        assert f"black {low:g}, white {high:g}" in line and (sr.driver == "PNG") == (name == "a.png")
    line, _ = result(tiny, tmp_path / "b.tif", scale=(0.0, 4095.0))
    assert "black 0, white 4095" in line


def test_four_bits_are_no_darkness_and_wide_numbers_keep_their_last_digits(tiny, tmp_path):
    values = pixels(40, 52, 1).transpose(2, 0, 1)
    line, sr = result(tiny, raster(tmp_path / "a.tif", values // 16, NBITS=4))
    assert "black 0, white 15" in line and np.abs(half_again(sr.read()) - values // 16).mean() < 0.3
    for dtype, base, unit in (("float64", 1e9, 1e-3), ("int64", 10**12, 1)):
        _, sr = result(tiny, raster(tmp_path / f"{dtype}.tif", (base + unit * values.astype(dtype)).astype(dtype)))
        found = ((sr.read() - np.asarray(base, dtype)) / unit).astype(np.float32)
        assert np.abs(half_again(found) - values).mean() < 2, dtype  # as float32 it would be whole steps of 64 and more


@pytest.mark.parametrize("hole", [np.inf, np.finfo(np.float32).min])
def test_what_is_no_number_of_a_colour_stays_where_it_is(tiny, tmp_path, hole):
    values = pixels(40, 52).transpose(2, 0, 1).astype(np.float32)
    values[:, 10:20, 10:20] = hole
    with np.errstate(over="raise"):
        line, sr = result(tiny, raster(tmp_path / "a.tif", values))
    assert np.array_equal(sr.read(1) == np.float32(hole), four_times(values[0] == np.float32(hole)))
    low, high = np.percentile(values[:, values[0] != np.float32(hole)], (2, 98))
    assert f"black {low:g}, white {high:g}" in line


def test_zeros_that_nothing_declares_stay_zero_and_are_named(tiny, tmp_path):
    values = 1000 + 9 * pixels(40, 52).transpose(2, 0, 1).astype(np.uint16)
    values[:, :, :12] = 0
    file, hole = raster(tmp_path / "a.tif", values), four_times(values[0] == 0)
    line, sr = result(tiny, file)
    assert np.array_equal((sr.read() == 0).all(0), hole) and sr.nodata is None
    assert "23% of the pixels are 0 in all bands" in line and "--nodata 0" in line
    line, sr = result(tiny, file, nodata=0.0)
    assert np.array_equal((sr.read() == 0).all(0), hole) and sr.nodata == 0 and "of the pixels are 0" not in line
    line, _ = result(tiny, file, nodata=float("nan"))
    assert "black 0," in line and "of the pixels are 0" not in line
    Image.fromarray((values // 20).astype(np.uint8).transpose(1, 2, 0)).save(tmp_path / "night.png")
    assert "of the pixels are 0" not in result(tiny, tmp_path / "night.png")[0]


def test_an_alpha_band_of_a_raster_is_one_only_where_its_values_say_so(tiny, tmp_path):
    values = pixels(40, 52, 4).transpose(2, 0, 1).copy()
    values[3, 10:30, 10:40] = 0  # near infrared, of a lake
    raster(tmp_path / "naip.tif", values)
    assert rasterio.open(tmp_path / "naip.tif").colorinterp[3] == ColorInterp.alpha  # as GDAL says by itself
    line, sr = result(tiny, tmp_path / "naip.tif")
    assert sr.count == 3 and "left out: band 4, marked alpha" in line
    assert np.abs(half_again(sr.read()) - values[:3])[:, 12:28, 12:38].mean() < 3
    line, _ = result(tiny, tmp_path / "naip.tif", bands=(4, 2, 1), overwrite=True)
    assert "left out: band(s) 3" in line and "band 4" not in line
    values[:, :8, :8] = 255
    _, sr = result(tiny, raster(tmp_path / "declared.tif", values, nodata=255))
    assert (sr.read_masks(1)[:32, :32] == 0).all() and sr.read_masks(1).mean() > 200  # and its holes are holes
    values[3] = np.where(values[3] > 0, 255, 0)
    line, sr = result(tiny, raster(tmp_path / "alpha.tif", values))
    assert "band 4 is taken for alpha" in line and np.array_equal(sr.read(4), four_times(values[3]))
    line, sr = result(tiny, raster(tmp_path / "float.tif", values.astype(np.float32), photometric="rgb", alpha="yes"))
    assert "band 4 is taken for alpha" in line and np.array_equal(sr.read(4), four_times(values[3]))


def test_colours_under_transparency_and_its_alpha_stay(tiny, tmp_path):
    values = pixels(40, 52, 4)
    values[..., 3] = 255
    values[:, 30:, 3] = 0
    Image.fromarray(values).save(tmp_path / "a.png")
    _, sr = result(tiny, tmp_path / "a.png")
    assert sr.count == 4 and np.array_equal(sr.read(4), four_times(values[..., 3]))
    assert np.array_equal(sr.read()[:, :, 120:], four_times(values.transpose(2, 0, 1))[:, :, 120:])


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_mask_stays_a_mask_and_leaves_no_second_file(tiny, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(up, "TILE", 48)  # several rows of tiles, one of which has the hole
    mask = np.full((100, 52), 255, np.uint8)
    mask[5:15, 20:30] = 0
    raster(tmp_path / "a.tif", pixels(100, 52).transpose(2, 0, 1).astype(dtype), **UTM)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write_mask(mask)
    _, sr = result(tiny, tmp_path / "a.tif", output=str(tmp_path / "out"), window=32)
    assert np.array_equal(sr.dataset_mask() > 0, four_times(mask > 0))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a_sr.tif"]
    if dtype == "uint8":  # Pillow does not see the mask that GDAL writes behind a JPEG
        rasterio.shutil.copy(tmp_path / "a.tif", tmp_path / "photo.jpg", driver="JPEG")
        _, sr = result(tiny, tmp_path / "photo.jpg", output=str(tmp_path / "jpeg"))
        assert np.array_equal(sr.dataset_mask() > 0, four_times(mask > 0))


def test_a_colour_table_is_written_as_colours_and_its_holes_as_transparency(tiny, tmp_path):
    indices = pixels(40, 52, 1)[..., 0] // 32
    indices[:, :10] = 255
    picture = Image.fromarray(indices, "P")
    picture.putpalette([value for i in range(256) for value in (30 * i % 256, (250 - 30 * i) % 256, 10)])
    picture.save(tmp_path / "a.png", transparency=255)
    _, sr = result(tiny, tmp_path / "a.png")
    assert sr.count == 4 and np.array_equal(sr.read(4), 255 * four_times(indices != 255))
    assert np.abs(half_again(sr.read(1)[None])[0] - 30.0 * indices)[:, 14:].mean() < 4
    raster(tmp_path / "a.tif", indices[None], **UTM)  # of classes, as a rule
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write_colormap(1, {i: (30 * i, 250 - 30 * i, 10, 255) for i in range(8)})
    with pytest.raises(ValueError, match="not supported"):
        result(tiny, tmp_path / "a.tif")


def test_a_colour_profile_is_kept(tiny, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("rgb.png", "rgb.jpg", "rgb.tif", "rgb.webp", "deep.png"):
        if name == "deep.png":
            deep = pixels(40, 52).transpose(2, 0, 1).astype(np.uint16) * 200
            raster(tmp_path / name, deep, "PNG", SOURCE_ICC_PROFILE=base64.b64encode(profile).decode())
        else:
            Image.fromarray(pixels(40, 52)).save(tmp_path / name, icc_profile=profile)
        _, sr = result(tiny, tmp_path / name)
        assert Image.open(sr.name).info["icc_profile"] == profile, name


def test_bands_and_their_marks_are_kept(tiny, tmp_path):
    for name, bands in (("grey.png", 1), ("grey.tif", 1), ("colour.jpg", 3)):
        Image.fromarray(pixels(40, 52, bands).squeeze()).save(tmp_path / name)
        _, sr = result(tiny, tmp_path / name)
        assert sr.count == bands and sr.name.endswith(name.replace(".", "_sr."))
    raster(tmp_path / "deep.tif", pixels(20, 16).transpose(2, 0, 1).astype(np.uint16), photometric="rgb")
    assert list(result(tiny, tmp_path / "deep.tif")[1].colorinterp) == RGBA[:3]  # not grey and two more


def test_a_phones_photograph_comes_out_upright_and_what_is_lost_is_named(tiny, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by a quarter
    Image.fromarray(pixels(48, 64)).save(tmp_path / "a.jpg", exif=exif)
    _, sr = result(tiny, tmp_path / "a.jpg")
    assert (sr.height, sr.width) == (256, 192)
    (tmp_path / "a.jgw").write_text("2\n0\n0\n-2\n0\n0\n")  # of the picture as it lies
    _, sr = result(tiny, tmp_path / "a.jpg")
    assert (sr.height, sr.width, sr.transform.a) == (192, 256, 0.5)
    first, second = (Image.fromarray(pixels(20, 16)) for _ in range(2))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert "left out: 1 further page(s)" in result(tiny, tmp_path / "moving.gif")[0]
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match="several pages"):
        result(tiny, tmp_path / "pages.tif")


def test_coordinates_of_every_kind_are_four_times_as_fine(tiny, tmp_path):
    values = pixels(40, 52).transpose(2, 0, 1)
    place = Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)
    _, sr = result(tiny, raster(tmp_path / "bare.tif", values, transform=UTM["transform"]))
    assert sr.crs is None and sr.transform == place
    for name, world in (("a.png", "a.pgw"), ("b.jpg", "b.jgw")):
        Image.fromarray(values.transpose(1, 2, 0)).save(tmp_path / name)
        (tmp_path / world).write_text("2\n0\n0\n-2\n500001\n4999999\n")
        _, sr = result(tiny, tmp_path / name)  # only a GeoTIFF has a place for them
        assert sr.transform == place and sr.driver == "GTiff"
    corners = [GroundControlPoint(r, c, x=c, y=-r) for r, c in ((0, 0), (0, 52), (40, 0), (40, 52))]
    _, sr = result(tiny, raster(tmp_path / "points.tif", values, gcps=corners, crs="EPSG:4326"))
    found = {(p.row, p.col, p.x, p.y) for p in sr.gcps[0]}
    assert found == {(4 * p.row, 4 * p.col, p.x, p.y) for p in corners}
    assert sr.gcps[1] == "EPSG:4326"
    line_num, samp_num = [0.0, 0, 1] + [0.0] * 17, [0.0, 1] + [0.0] * 18
    one = [1.0] + [0.0] * 19
    rpcs = rasterio.rpc.RPC(0, 100, 9, 1, one, line_num, 19.5, 20, 48, 1, one, samp_num, 25.5, 26)
    _, sr = result(tiny, raster(tmp_path / "rpc.tif", values, rpcs=rpcs))
    found = sr.rpcs.line_off, sr.rpcs.line_scale, sr.rpcs.samp_off, sr.rpcs.samp_scale
    assert found == (79.5, 80, 103.5, 104)


def test_another_programs_proj_does_not_take_the_coordinate_system(tmp_path):
    raster(tmp_path / "a.tif", pixels(20, 16).transpose(2, 0, 1), **UTM)
    code = "import sys, rasterio, upscale_sr; print(rasterio.open(sys.argv[1]).crs)"
    env = {**os.environ, "PROJ_LIB": str(tmp_path), "PROJ_DATA": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.tif"], cwd=ROOT, env=env, capture_output=True)
    assert done.stdout.decode().strip() == "EPSG:32633", done.stderr


# ---------------------------------------------------------------- kinds of file, names, what is finished
def test_a_suffix_that_lies_is_decided_by_content(tiny, tmp_path):
    rgba = pixels(20, 16, 4)
    Image.fromarray(rgba).save(tmp_path / "a.jpg", format="PNG")
    raster(tmp_path / "b.png", rgba.transpose(2, 0, 1)[:3].astype(np.float32))
    Image.fromarray(rgba[..., :3]).save(tmp_path / "c.tif", format="JPEG")
    Image.fromarray(rgba[..., 0].astype(np.uint16) * 257).save(tmp_path / "d.jpg", format="PNG")
    for name, kind, bands, dtype in (("a.jpg", ".png", 4, "uint8"), ("b.png", ".tif", 3, "float32"),
                                     ("c.tif", ".jpg", 3, "uint8"), ("d.jpg", ".png", 1, "uint16")):  # fmt: skip
        _, sr = result(tiny, tmp_path / name)
        assert sr.name.endswith(f"{name[0]}_sr{kind}") and (sr.count, sr.dtypes[0]) == (bands, dtype)


def test_what_nobody_super_resolves_is_refused_in_a_sentence(tiny, tmp_path):
    Image.fromarray(pixels(20, 16)).convert("LAB").save(tmp_path / "lab.tif")
    raster(tmp_path / "complex.tif", pixels(20, 16, 1).transpose(2, 0, 1).astype(np.complex64))
    raster(tmp_path / "white.tif", pixels(20, 16, 1).transpose(2, 0, 1), photometric="miniswhite")
    raster(tmp_path / "deep.tif", pixels(20, 16, 4).transpose(2, 0, 1).astype(np.uint16), photometric="cmyk")
    for name in ("cmyk.tif", "cmyk.jpg"):
        Image.fromarray(pixels(20, 16)).convert("CMYK").save(tmp_path / name)
    for name in ("lab.tif", "complex.tif", "white.tif", "deep.tif", "cmyk.tif", "cmyk.jpg"):
        with pytest.raises(ValueError, match="not supported"):
            result(tiny, tmp_path / name)


def test_a_result_is_kept_only_where_the_same_things_made_it(tiny, tmp_path):
    values = pixels(40, 52).transpose(2, 0, 1).astype(np.uint16) * 16
    file = raster(tmp_path / "a.tif", values)
    assert "finished before" not in result(tiny, file)[0] and "finished before" in result(tiny, file)[0]
    for other in ({"bands": (3, 2, 1)}, {"scale": (0.0, 9999.0)}, {"seed": 1}, {"nodata": 0.0}, {"overwrite": True}):
        assert "finished before" not in result(tiny, file, **other)[0], other
    torch.manual_seed(1)
    assert "finished before" not in result((tiny[0], orl.Agent(torch.ones(3), 8), tiny[2]), file)[0]
    assert "finished before" not in result(tiny, file)[0]
    raster(file, values[::-1])
    os.utime(file, (1_700_000_000,) * 2)  # corrected, with an older date
    line, sr = result(tiny, file)
    assert "finished before" not in line and np.abs(half_again(sr.read()) - values[::-1]).mean() < 40


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_a_result_says_what_made_it(tiny, tmp_path, name):
    Image.fromarray(pixels(20, 16)).save(tmp_path / name)
    _, sr = result(tiny, tmp_path / name)
    settings = json.loads(up.maker_of(tmp_path / f"a_sr{tmp_path.joinpath(name).suffix}"))
    assert settings["bytes"] == (tmp_path / name).stat().st_size and len(settings["sha256"]) == 64
    assert settings["agent"] == orl.digest({}, tiny[1]) and settings["version"] == orl.VERSION
    assert settings["ldm"] == tiny[0].ldm.fingerprint


def test_a_file_that_this_program_did_not_make_is_not_replaced(tiny, tmp_path):
    Image.fromarray(pixels(20, 16)).save(tmp_path / "a.png")
    (tmp_path / "a_sr.png").write_bytes(b"another's")
    with pytest.raises(ValueError, match="did not make it"):
        result(tiny, tmp_path / "a.png")
    assert (tmp_path / "a_sr.png").read_bytes() == b"another's"
    assert "16 x 20 -> 64 x 80 px" in result(tiny, tmp_path / "a.png", overwrite=True)[0]


def test_surface_reflectance_is_no_result_of_ours_and_inputs_are_never_replaced(tiny, tmp_path, capsys):
    for name in ("LC08.tif", "LC08_sr.tif", "S2_sr.tif"):
        raster(tmp_path / name, pixels(20, 16).transpose(2, 0, 1))
    args = up.Args(paths=(str(tmp_path),))
    names = {file.name: target.name for file, target in up.list_files(args)}
    assert names == {"LC08.tif": "LC08_tif_sr", "LC08_sr.tif": "LC08_sr_sr", "S2_sr.tif": "S2_sr_sr"}
    for file, target in up.list_files(args):
        up.super_resolve_file(args, file, target, *tiny, time.time())
    assert {file.name for file, _ in up.list_files(args)} == set(names)  # without the three results
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(SystemExit):
        up.list_files(args)
    assert "results of this program" in capsys.readouterr().out


def test_thousands_of_files_are_listed_in_a_moment(tmp_path):
    Image.fromarray(pixels(20, 16)).save(tmp_path / "one.png")
    (tmp_path / "many").mkdir()
    seconds = []
    for count in (1000, 2000):
        for i in range(count):
            with contextlib.suppress(FileExistsError):
                os.link(tmp_path / "one.png", tmp_path / "many" / f"{i}.png")
        began = time.process_time()
        assert len(up.list_files(up.Args(paths=(str(tmp_path / "many"),)))) == count
        seconds.append(time.process_time() - began)
    assert seconds[1] < 0.5 and seconds[1] < 3.5 * seconds[0]


def test_a_folders_tree_is_mirrored_and_links_are_followed_without_loops(tmp_path, cli):
    for name in ("in/b/x.png", "in/b/x.bmp", "in/.hidden/y.png", "elsewhere/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(20, 16)).save(tmp_path / name)
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/single.png").symlink_to(tmp_path / "elsewhere/z.png")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    printed, code = cli(tmp_path / "in", output=str(tmp_path / "out"))
    made = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert code == 0 and made == ["b/x_bmp_sr.tif", "b/x_png_sr.png", "linked/z_sr.png", "single_sr.png"], printed
    printed, code = cli(tmp_path / "in", output=str(tmp_path / "out"))
    assert code == 0 and printed.count("finished before") == 4


def test_two_images_never_become_one_result(tmp_path, monkeypatch, capsys):
    for name in ("2019/x.tif", "2020/x.tif", "2020/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        up.list_files(up.Args(paths=("2019/x.tif", "2020/x.tif"), output="out"))
    printed = capsys.readouterr().out
    assert error.value.code == 2 and "2019/x.tif" in printed and "2020/x.tif" in printed
    assert len(up.list_files(up.Args(paths=("2019", "2020"), output="out"))) == 3


@pytest.mark.parametrize("paths, flags, words", [
    ((), {}, "name LR images"), (("missing.png",), {}, "no such file"), (("empty",), {}, "no image in this folder"),
    (("empty",), {"scale": (5.0, 5.0)}, "two different numbers"), (("empty",), {"window": 0}, "--window"),
    (("empty",), {"output": __file__}, "name a folder"), (("empty",), {"output": "result.png"}, "name a folder"),
])  # fmt: skip
def test_bad_input_is_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys, paths, flags, words):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(orl, "load_run", lambda run: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as error:
        up.main(up.Args(paths=tuple(str(tmp_path / path) for path in paths), **flags))
    assert error.value.code == 2 and words in capsys.readouterr().out


def test_one_bad_file_does_not_end_a_batch(tmp_path, monkeypatch, cli):
    for name in ("a_big", "b_small", "land & sea <1> 'é' [2] 50%"):
        Image.fromarray(pixels(20, 16 + 8 * (name == "a_big"))).save(tmp_path / f"{name}.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.tif").write_bytes(b"II*\0\x08\0\0\0")
    Image.fromarray(pixels(90, 90)).save(tmp_path / "cut.jpg")
    with open(tmp_path / "cut.jpg", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)
    solve = up.Upscaler.super_resolve

    def no_memory(self, tiles):
        if self.scene.width == 24:
            raise MemoryError("64 GB")
        return solve(self, tiles)

    monkeypatch.setattr(up.Upscaler, "super_resolve", no_memory)
    printed, code = cli(tmp_path, output=str(tmp_path / "out"))
    assert code == 1 and "4 of 6 file(s)" in printed and "64 GB" in printed
    assert all(f"{name}: skipped" in printed for name in ("a_big.png", "text.jpg", "cut.tif", "cut.jpg"))
    assert len(list((tmp_path / "out").glob("*_sr.png"))) == 2


@pytest.mark.parametrize("nodata", [-9999.0, float("nan")])
def test_any_number_may_be_a_hole(tmp_path, cli, nodata):
    raster(tmp_path / "a.tif", pixels(20, 16).transpose(2, 0, 1).astype(np.int16))
    printed, code = cli(tmp_path / "a.tif", nodata=nodata)
    assert code == 0 and "16 x 20 -> 64 x 80" in printed


def test_a_notebooks_stdout_is_enough(tmp_path, monkeypatch, cli):
    Image.fromarray(pixels(20, 16)).save(tmp_path / "a.png")
    threads, text = torch.get_num_threads(), []
    stream = types.SimpleNamespace(write=text.append, flush=lambda: None)  # ipykernel's has no reconfigure
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli(tmp_path / "a.png")[1] == 0 and "a_sr.png: 16 x 20" in "".join(text)
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------- kills, full disks and several processes
# Processes of their own are forked from one that has imported the libraries, which takes longer than what they do.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["diffusers", "datasets", "lpips", "torchmetrics", "rasterio"])


def call_main(ldm, pause, words, environment, printed, threads, limit):
    """`main` of upscale_sr.py with a tiny LDM, small tiles and a pause for each row of them; `printed`: its output."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ldm, agent, faded = orl.load_ldm(ldm, CPU), orl.Agent(torch.ones(3), 8), up.Upscaler.faded
    orl.load_ldm, orl.load_agent, up.TILE = lambda *_: ldm, lambda *_: agent, 48
    saved = {"args": {"ldm": "x", "base_steps": 2, "max_nfe": 2, "mtf": None, "lr_noise": 0.0}}
    orl.load_run = lambda _: saved
    up.Upscaler.faded = lambda self, *rest: (time.sleep(pause), faded(self, *rest))[1]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with open(printed, "w", encoding="utf-8") as sys.stdout:
        up.main(tyro.cli(up.Args, args=words))


def start(ldm, pause, *words, printed=os.devnull, threads=1, limit=0, **environment):
    environment = {k: str(v) for k, v in environment.items()}
    args = (str(ldm), pause, [str(word) for word in words], environment, printed, threads, limit)
    process = FRESH.Process(target=call_main, args=args)
    process.start()
    return process


def ended(process):
    """Waits for a process -> whether it ended well."""
    process.join()
    return process.exitcode == 0


def wait_for_parts(process, folder, count):
    while len(list(folder.glob("0*.tif"))) < count:
        assert process.is_alive()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory, ldm_folder):
    """A scene of five rows of tiles, and its result by one process that was not disturbed."""
    folder = tmp_path_factory.mktemp("scene")
    raster(folder / "scene.tif", (pixels(150, 60).astype(np.uint16) * 9).transpose(2, 0, 1), **UTM)
    words = (folder / "scene.tif", "--output", folder / "once", "--window", 32)
    assert ended(start(ldm_folder, 0, *words, printed=folder / "printed"))
    assert "left out" not in (folder / "printed").read_text("utf-8")
    with rasterio.open(folder / "once/scene_sr.tif") as file:
        return folder / "scene.tif", file.read(), file.transform


def same_as(scene_file, path):
    with rasterio.open(path) as file:
        return np.array_equal(file.read(), scene_file[1]) and file.transform == scene_file[2] and not file.nodata


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_scene_that_was_stopped_goes_on_where_it_was_and_is_the_same(scene_file, ldm_folder, tmp_path, sent):
    flags = (scene_file[0], "--output", tmp_path, "--window", 32)
    process = start(ldm_folder, 0.5, *flags, printed=tmp_path / "printed")
    parts = tmp_path / "scene_sr.tif.parts"
    wait_for_parts(process, parts, 2)
    began = time.perf_counter()
    os.kill(process.pid, sent)
    process.join()
    if sent != signal.SIGKILL:
        assert process.exitcode == 130 and time.perf_counter() - began < 10
        assert (tmp_path / "printed").read_text("utf-8").count("the same command goes on") == 1
    finished = {p.name: p.stat().st_mtime_ns for p in parts.glob("0*.tif")}
    assert 2 <= len(finished) < 5 and not (tmp_path / "scene_sr.tif").exists()
    again = start(ldm_folder, 0.1, *flags)
    while again.is_alive():
        for name, at in finished.items():
            with contextlib.suppress(FileNotFoundError):  # joined
                assert (parts / name).stat().st_mtime_ns == at  # kept, not made again
        time.sleep(0.01)
    assert ended(again) and not parts.exists() and same_as(scene_file, tmp_path / "scene_sr.tif")


def test_parts_of_another_version_are_not_joined(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(up, "TILE", 48)
    file = raster(tmp_path / "a.tif", pixels(100, 30).transpose(2, 0, 1).astype(np.uint16) * 99)
    expected, written = result(tiny, file, window=32)[1].read(), []
    (tmp_path / "a_sr.tif").unlink()
    write, join = up.write_tiff, up.join
    monkeypatch.setattr(up, "write_tiff", lambda path, *rest: written.append(path.name) or write(path, *rest))
    monkeypatch.setattr(up, "join", lambda *rest: (_ for _ in ()).throw(OSError("interrupted")))
    for version, count in ((orl.VERSION - 1, 3), (orl.VERSION, 6), (orl.VERSION, 6)):
        monkeypatch.setattr(orl, "VERSION", version)
        with pytest.raises(OSError):
            result(tiny, file, window=32)
        assert len(written) == count  # the third time all are there
    monkeypatch.setattr(up, "join", join)
    assert np.array_equal(result(tiny, file, window=32)[1].read(), expected)


def test_a_full_disk_is_named_and_with_room_the_same_command_goes_on(scene_file, ldm_folder, tmp_path):
    flags = (scene_file[0], "--output", tmp_path, "--window", 512)
    size = scene_file[1].nbytes // 3
    assert not ended(start(ldm_folder, 0, *flags, printed=tmp_path / "printed", limit=size // 2))
    printed = (tmp_path / "printed").read_text("utf-8")
    assert "the disk is full" in printed and "MB are needed" in printed and not list(tmp_path.rglob("*.tif"))
    assert ended(start(ldm_folder, 0, *flags)) and same_as(scene_file, tmp_path / "scene_sr.tif")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["printed", "scene_sr.tif"]


def test_several_processes_share_a_scene_and_one_may_be_killed(scene_file, ldm_folder, tmp_path):
    flags = (scene_file[0], "--output", tmp_path, "--window", 32)
    first = start(ldm_folder, 30, *flags, RANK=0, WORLD_SIZE=3)
    while not list(tmp_path.rglob("*.lock")):
        time.sleep(0.05)
    others = [start(ldm_folder, 0, *flags, RANK=rank, WORLD_SIZE=3, printed=tmp_path / f"{rank}") for rank in (1, 2)]
    assert all(map(ended, others))
    assert not (tmp_path / "scene_sr.tif").exists() and "at work" in (tmp_path / "1").read_text("utf-8")
    first.kill()
    first.join()
    assert ended(start(ldm_folder, 0, *flags)) and same_as(scene_file, tmp_path / "scene_sr.tif")


def test_a_slurm_job_without_srun_and_the_same_command_twice_do_everything(tmp_path, ldm_folder):
    (tmp_path / "in").mkdir()
    for i in range(6):
        Image.fromarray(pixels(20, 16)).save(tmp_path / "in" / f"{i}.png")
    flags, job = (tmp_path / "in", "--output", tmp_path / "out"), {"SLURM_NTASKS": 4, "SLURM_PROCID": 0}
    twice = [start(ldm_folder, 0.1, *flags, printed=tmp_path / f"{k}", **job) for k in range(2)]
    assert all(map(ended, twice))
    printed = "".join((tmp_path / f"{k}").read_text("utf-8") for k in range(2))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{i}_sr.png" for i in range(6)]
    assert "skipped" not in printed and printed.count("16 x 20 -> 64 x 80") == 6


def test_a_lock_that_a_killed_process_left_is_none(tiny, tmp_path, monkeypatch):
    Image.fromarray(pixels(20, 16)).save(tmp_path / "a.png")
    args, write, seen = up.Args(paths=(str(tmp_path / "a.png"),)), up.write_tiff, []

    def killed(part, *rest):
        seen.append(part)
        part.with_suffix(".half").write_bytes(b"half a part")
        raise OSError("killed")

    monkeypatch.setattr(up, "write_tiff", killed)
    with pytest.raises(OSError):
        result(tiny, tmp_path / "a.png")
    assert sorted(p.suffix for p in seen[0].parent.iterdir()) == [".half", ".lock"]
    monkeypatch.setattr(up, "write_tiff", write)
    with filelock.FileLock(seen[0].with_suffix(".lock")):  # one that is alive
        line = up.super_resolve_file(args, *up.list_files(args)[0], *tiny, time.time())
    assert "other processes are at work" in line and not (tmp_path / "a_sr.png").exists()
    assert "16 x 20 -> 64 x 80" in result(tiny, tmp_path / "a.png")[0]
    assert not (tmp_path / "a_sr.png.parts").exists()
