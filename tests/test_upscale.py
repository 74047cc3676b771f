"""Users' own images: what comes out is what went in, four times as large, whatever the windows, kills and processes."""

import base64
import contextlib
import functools
import multiprocessing
import os
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
import tyro
from conftest import ROOT, tiny_ldm
from PIL import ExifTags, Image, ImageCms
from rasterio.transform import Affine, GroundControlPoint, from_origin
from scipy.io import netcdf_file

import eval_sr
import ppo_ldm_sr as orl
import upscale_sr as up

CPU = torch.device("cpu")
rng = np.random.default_rng(0)
UTM = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 2, 2)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An environment of two calls and an untrained agent."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_ldm(folder)
    torch.manual_seed(0)
    ldm = orl.load_ldm(str(folder), CPU)
    ldm.autocast = torch.autocast("cpu", enabled=False)  # nor is a rounding error at the border of two codes a difference
    ldm.vqvae.decode = functools.partial(ldm.vqvae.decode, force_not_quantize=True)
    return orl.Denoising(ldm, 2, 2), orl.Agent(torch.ones(3), 8)


@pytest.fixture(scope="module")
def shipped():
    """The LDM and the agent that ship."""
    saved = eval_sr.load_run(ROOT / "runs/orl_ldm")
    ldm = orl.load_ldm(saved["args"]["ldm"], CPU)
    return orl.Denoising(ldm, saved["args"]["base_steps"], saved["args"]["max_calls"]), eval_sr.load_agent(saved, ldm)


def pixels(h, w, bands=3):
    """uint8 (h, w, bands): colours that change slowly."""
    small = rng.integers(20, 235, (max(2, h // 6), max(2, w // 6), bands), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(small[..., k]).resize((w, h), Image.Resampling.BICUBIC)) for k in range(bands)], -1)


def raster(path, values, driver="GTiff", **profile):
    values = np.asarray(values)
    size = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", driver=driver, **size, **profile) as file:
        file.write(values)
    return path


def result(tiny, file, share=(0, 1), **settings):
    """The one line of a file, and its result opened."""
    args = up.Args(paths=(str(file),), **settings)
    ((source, target),) = up.list_files(args)
    said = up.super_resolve_file(args, source, target, *tiny, *share)
    return said, rasterio.open(said.split(": ")[0])


def half_again(sr):
    """(bands, 4h, 4w) -> (bands, h, w), as the LR image of the result would be."""
    return torch.nn.functional.interpolate(torch.from_numpy(sr.astype(np.float32))[None], scale_factor=0.25, mode="bicubic", antialias=True)[0].numpy()


# ---------------------------------------------------------------- windows, tiles, seams


@pytest.mark.parametrize("size", [(97, 61), (1, 1), (5, 300), (280, 150)])
def test_the_result_is_exactly_four_times_as_large_and_downscales_to_the_image(tiny, tmp_path, size):
    values = pixels(*size)
    Image.fromarray(values).save(tmp_path / "a.png")
    _, sr = result(tiny, tmp_path / "a.png")
    assert (sr.height, sr.width, sr.count) == (4 * size[0], 4 * size[1], 3)
    if min(size) > 20:
        assert np.abs(half_again(sr.read()) - values.transpose(2, 0, 1)).mean() < 3


def test_a_picture_is_what_the_tables_have_consistent_once_more(tiny, tmp_path):
    mdp, agent = tiny
    values = pixels(48, 48)
    Image.fromarray(values).save(tmp_path / "a.png")
    _, sr = result(tiny, tmp_path / "a.png")
    lr = torch.from_numpy(np.pad(values, ((8, 8), (8, 8), (0, 0)), mode="symmetric").transpose(2, 0, 1)[None] / np.float32(255))
    z = up.noise_at(0, 3, -8, -8, 64)[None]
    expected = orl.make_consistent(mdp.super_resolve(lr, z, agent)[0], lr)[0, :, 32:-32, 32:-32]
    assert np.abs(sr.read() - 255 * expected.numpy()).max() <= 0.51


def test_what_is_darker_than_black_and_brighter_than_white_comes_back(tiny, tmp_path):
    values = np.full((3, 48, 48), 50, np.float32)
    values[:, 10:20, 10:20], values[:, 30:40, 30:40] = -60, 160
    _, sr = result(tiny, raster(tmp_path / "a.tif", values), scale=(0.0, 100.0))
    found = half_again(sr.read())
    assert np.abs(found - values)[:, 10:20, 10:20].mean() < 3 and np.abs(found - values)[:, 30:40, 30:40].mean() < 3


def test_neither_windows_nor_batches_nor_what_is_read_at_once_change_a_pixel(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(up, "TILE", 48)  # small ones, for the test's seconds
    Image.fromarray(pixels(180, 130)).save(tmp_path / "a.png")
    made = []
    for window, batch in ((32, 1), (64, 8), (512, 3)):
        _, sr = result(tiny, tmp_path / "a.png", output=str(tmp_path / f"{window}"), window=window, batch_size=batch)
        made.append(sr.read().astype(int))
    assert np.abs(made[0] - made[1]).max() <= 1 and np.abs(made[0] - made[2]).max() <= 1
    assert made[0].std() > 10


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "deep.png"])
def test_a_picture_is_joined_without_its_pixels_in_memory_at_once(tmp_path, name):
    values = pixels(250, 500).transpose(2, 0, 1)
    if name == "deep.png":
        raster(tmp_path / name, values.astype(np.uint16) * 200, "PNG")
    else:
        Image.fromarray(values.transpose(1, 2, 0)).save(tmp_path / name)
    scene, whole = up.Scene(tmp_path / name, None, None), []
    (tmp_path / "parts").mkdir()
    for k in range(5):
        part = pixels(200, 2000).transpose(2, 0, 1).astype(scene.dtype)
        whole.append(raster(tmp_path / "parts" / f"{k}.tif", part, **{k: v for k, v in up.profile_of(scene, 200).items() if k in ("photometric", "tiled")}))
    tracemalloc.start()
    up.join(scene, whole, tmp_path / f"out_{name}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    joined, expected = rasterio.open(tmp_path / f"out_{name}").read(), np.concatenate([rasterio.open(part).read() for part in whole], 1)
    assert peak < 0.6 * expected.nbytes  # a part, twice
    assert joined.shape == expected.shape and np.abs(joined.astype(int) - expected).mean() < (2 if name == "a.jpg" else 1e-9)
    assert sorted(path.name for path in tmp_path.glob("*out_*")) == [f"out_{name}"]


def test_a_compressed_block_is_not_decoded_again_for_each_of_its_rows(tiny, tmp_path, monkeypatch, capsys):
    lossless = {"QUALITY": 100, "REVERSIBLE": "YES", "BLOCKXSIZE": 1024, "BLOCKYSIZE": 1024}
    raster(tmp_path / "a.jp2", rng.integers(0, 4096, (3, 1024, 1024), dtype=np.uint16), "JP2OpenJPEG", **lossless)
    seconds = []

    def read(args, file, *_):
        scene = up.Scene(file, None, (0, 4096))
        for first in range(0, 320, 32):
            began = time.perf_counter()
            scene.read(first, first + 32)
            seconds.append(time.perf_counter() - began)

    monkeypatch.setattr(up, "super_resolve_file", read)
    cli(tmp_path, tiny, monkeypatch, capsys, tmp_path / "a.jp2")
    assert len(seconds) == 10 and sum(seconds[1:]) < seconds[0]


def test_a_place_has_the_same_noise_whoever_asks(tiny):
    whole = up.noise_at(7, 3, -8, -8, 250)
    part = up.noise_at(7, 3, 100, 37, 60)
    assert torch.equal(whole[:, 108:168, 45:105], part) and not torch.equal(whole[:, :60, :60], part)
    assert not torch.equal(up.noise_at(8, 3, 100, 37, 60), part)
    assert abs(float(whole.std()) - 1) < 0.02


def test_the_weights_of_tiles_sum_to_one():
    for tiles in (1, 2, 5):
        total = torch.zeros(tiles * 128 + 16)
        for k in range(tiles):
            total[128 * k : 128 * k + 144] += up.fade(144, 16, k == 0, k == tiles - 1)
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("kind", ["gradient", "photograph"])
def test_no_seam_shows_between_tiles_and_smooth_ground_stays_smooth(shipped, tmp_path, kind):
    """The mean jump between neighbouring pixels, across the middles of the overlaps and everywhere else."""
    if kind == "gradient":
        y, x = np.mgrid[:120, :300] / 300
        values = np.stack([60 + 100 * x, 90 + 60 * y, 120 + 0 * x], -1).round().astype(np.uint8)
    else:
        values = np.asarray(Image.open(next((ROOT / "runs/scenes/test/commercial_area").glob("*.jpg"))).convert("RGB"))[:120]
    Image.fromarray(values).save(tmp_path / "a.png")
    sr = result(shipped, tmp_path / "a.png")[1].read().astype(float)
    jump = np.abs(np.diff(sr, axis=2)).mean(axis=(0, 1))
    borders = [4 * 128 * k - 1 for k in range(1, -(-values.shape[1] // 128))]
    near = np.concatenate([jump[at - 2 : at + 3] for at in borders])
    assert near.mean() / jump.mean() < 1.1
    if kind == "gradient":
        assert (sr - orl.upscale(torch.from_numpy(values / 255).permute(2, 0, 1)[None])[0].numpy() * 255).std() < 2


# ---------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("dtype, top, nodata", [("uint8", 255, 0), ("uint16", 4095, 0), ("int16", 4000, -9999), ("float32", 0.5, -1.0), ("float32", 0.5, None)])
def test_a_geotiff_keeps_coordinates_type_tags_holes_and_values(tiny, tmp_path, dtype, top, nodata):
    values = (top * (0.1 + 0.8 * pixels(40, 52, 4).transpose(2, 0, 1) / 255)).astype(dtype)
    hole = np.nan if nodata is None else nodata
    values[:, 10:20, 10:20] = hole
    raster(tmp_path / "a.tif", values, nodata=nodata, photometric="minisblack", **UTM)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.update_tags(sensor="a test")
        file.set_band_description(2, "green")
    said, sr = result(tiny, tmp_path / "a.tif")
    assert sr.bounds == rasterio.open(tmp_path / "a.tif").bounds and sr.crs == "EPSG:32633" and sr.res == (0.5, 0.5)
    assert (sr.count, sr.width, sr.height, sr.dtypes[0], sr.nodata) == (3, 208, 160, dtype, nodata)
    assert sr.tags()["sensor"] == "a test" and sr.descriptions[1] == "green" and "left out: bands [4]" in said
    found, inside = sr.read(), np.zeros((160, 208), bool)
    inside[40:80, 40:80] = True
    same = np.isnan(found) if nodata is None else found == nodata
    assert same[:, inside].all() and not same[:, ~inside].any()
    away = np.ones((40, 52), bool)
    away[6:24, 6:24] = False  # the filter reaches into the hole
    error = np.abs(half_again(np.nan_to_num(found)) - np.nan_to_num(values[:3].astype(np.float32)))[:, away]
    assert error.mean() < max(0.6, 0.01 * top)


def test_a_geotiffs_scales_units_and_tags_of_bands_and_of_sensors_are_kept(tiny, tmp_path):
    raster(tmp_path / "a.tif", pixels(40, 52).transpose(2, 0, 1).astype(np.uint16) * 20, photometric="minisblack", **UTM)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.scales, file.offsets, file.units = (0.0001,) * 3, (-0.1, 0.0, 0.0), ("reflectance",) * 3
        file.update_tags(2, wavelength="560 nm", STATISTICS_MEAN="1"), file.update_tags(ns="SENSOR", gain="3")
    said, sr = result(tiny, tmp_path / "a.tif")
    assert sr.scales == (0.0001,) * 3 and sr.offsets == (-0.1, 0.0, 0.0) and sr.units == ("reflectance",) * 3
    assert sr.tags(2) == {"wavelength": "560 nm"} and sr.tags(ns="SENSOR") == {"gain": "3"} and "scales and offsets" in said


@pytest.mark.parametrize("dtype, total, white", [("uint8", 255, "white 0"), ("uint16", 2255, "white 1")])
def test_where_white_is_the_smaller_value_it_stays_so_and_the_picture_is_the_same(tiny, tmp_path, dtype, total, white):
    values = pixels(40, 52, 1).transpose(2, 0, 1) + np.asarray((total - 255) // 2, dtype)
    raster(tmp_path / "up.tif", values, photometric="minisblack")
    raster(tmp_path / "down.tif", (total - values.astype(int)).astype(dtype), photometric="miniswhite")
    _, up = result(tiny, tmp_path / "up.tif")
    said, down = result(tiny, tmp_path / "down.tif")
    assert down.tags(ns="IMAGE_STRUCTURE")["MINISWHITE"] == "YES" and white in said
    assert np.abs(up.read().astype(int) - (total - down.read().astype(int))).max() <= 1


def test_further_pages_and_coordinates_that_cannot_be_kept_are_named(tiny, tmp_path, monkeypatch, capsys):
    first, second = (Image.fromarray(pixels(20, 16)) for _ in range(2))
    for name in ("pages.tif", "moving.gif", "moving.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        said, sr = result(tiny, tmp_path / name)
        assert "left out: 1 further page(s)" in said and (sr.width, sr.height) == (64, 80)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    first.save(tmp_path / "turned.jpg", exif=turned), (tmp_path / "turned.jgw").write_text("2\n0\n0\n-2\n0\n0\n")
    said, sr = result(tiny, tmp_path / "turned.jpg")
    assert "left out: coordinates" in said and (sr.width, sr.height) == (80, 64) and not (tmp_path / "turned_sr.jgw").exists()
    raster(tmp_path / "placed.png", pixels(20, 16).transpose(2, 0, 1), "PNG", **UTM)  # and its .aux.xml
    said, sr = result(tiny, tmp_path / "placed.png")
    assert "kept: world file" in said and "left out: coordinate system or control points" in said
    with netcdf_file(tmp_path / "two.nc", "w") as file:
        file.createDimension("y", 20), file.createDimension("x", 16)
        for name in ("red", "nir"):
            file.createVariable(name, "i2", ("y", "x"))[:] = pixels(20, 16, 1)[..., 0]
    said, code = cli(tmp_path, tiny, monkeypatch, capsys, tmp_path / "two.nc")
    assert code == 1 and "no bands of its own, but 2 datasets" in said


def test_twelve_bits_in_sixteen_keep_their_range_and_a_scale_can_be_given(tiny, tmp_path):
    values = (pixels(40, 52, 3).transpose(2, 0, 1).astype(np.uint16) * 16).astype(np.uint16)
    for name, driver in (("a.png", "PNG"), ("b.tif", "GTiff"), ("c.jp2", "JP2OpenJPEG")):
        raster(tmp_path / name, values, driver, **({"QUALITY": "100", "REVERSIBLE": "YES"} if driver[0] == "J" else {}))
        said, sr = result(tiny, tmp_path / name)
        assert sr.dtypes[0] == "uint16" and np.abs(half_again(sr.read()) - values).mean() < 0.01 * 4095, name
        low, high = np.percentile(values, (2, 98))
        assert f"black {low:g}" in said and f"white {high:g}" in said
        assert ("is written as .tif" in said) == (name == "c.jp2")
    said, _ = result(tiny, tmp_path / "b.tif", scale=(0.0, 4095.0), overwrite=True)
    assert "black 0, white 4095" in said


def test_four_bits_in_eight_are_not_taken_for_darkness(tiny, tmp_path):
    values = pixels(40, 52, 1).transpose(2, 0, 1) // 16
    said, sr = result(tiny, raster(tmp_path / "a.tif", values, NBITS=4))
    assert "black 0, white 15" in said and np.abs(half_again(sr.read()) - values).mean() < 0.3


def test_wide_numbers_keep_their_last_digits(tiny, tmp_path):
    values = pixels(40, 52, 1).transpose(2, 0, 1)
    for dtype, base, unit in (("float64", 1e9, 1e-3), ("int64", 10**12, 1)):
        exact = (base + unit * values.astype(dtype)).astype(dtype)
        _, sr = result(tiny, raster(tmp_path / f"{dtype}.tif", exact))
        found = ((sr.read() - np.asarray(base, dtype)) / unit).astype(np.float32)
        assert np.abs(half_again(found) - values).mean() < 2, dtype  # as float32 it would be whole steps of 64 and more


@pytest.mark.parametrize("hole", [np.inf, np.finfo(np.float32).min])
def test_a_hole_that_no_nodata_names_is_no_colour(tiny, tmp_path, hole):
    values = pixels(40, 52).transpose(2, 0, 1).astype(np.float32)
    values[:, 10:20, 10:20] = hole
    with np.errstate(over="raise"):
        said, sr = result(tiny, raster(tmp_path / "a.tif", values))
    assert np.array_equal(np.isnan(sr.read(1)), (values[0] == hole).repeat(4, 0).repeat(4, 1))
    low, high = np.percentile(values[:, values[0] != hole], (2, 98))
    assert f"black {low:g}, white {high:g}" in said


def test_a_hole_in_one_band_is_one_in_that_band(tiny, tmp_path):
    values = 1000 + 9 * pixels(40, 52).transpose(2, 0, 1).astype(np.uint16)
    values[0, :12] = 0
    said, sr = result(tiny, raster(tmp_path / "a.tif", values, nodata=0))
    assert np.array_equal(sr.read() == 0, (values == 0).repeat(4, 1).repeat(4, 2))
    low, _ = np.percentile(values[values > 0], (2, 98))
    assert f"black {low:g}," in said


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_hole_under_a_colour_table_stays_one(tiny, tmp_path, dtype):
    unit = 1 if dtype == "uint8" else 200
    values = (pixels(40, 52, 1).transpose(2, 0, 1) // 32).astype(dtype) * unit
    values[:, :10] = 255
    raster(tmp_path / "a.tif", values, nodata=255)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write_colormap(1, {unit * i: (30 * i, 250 - 30 * i, 10, 255) for i in range(8)})
    _, sr = result(tiny, tmp_path / "a.tif")
    assert sr.dtypes[0] == "uint8" and sr.nodata is None
    assert np.array_equal(sr.dataset_mask() > 0, (values[0] != 255).repeat(4, 0).repeat(4, 1))
    at = (values[0] != 255) & (values[0] == values[0, 30, 30])
    assert np.abs(half_again(sr.read())[0][at].mean() - 30 * values[0, 30, 30] / unit) < 20


def test_a_format_without_places_gives_none(tiny, tmp_path):
    Image.fromarray(pixels(20, 16, 1)[..., 0].astype(np.uint16) * 200).save(tmp_path / "a.pgm")
    said, sr = result(tiny, tmp_path / "a.pgm")
    assert "coordinates" not in said and sr.transform.is_identity


@pytest.mark.parametrize("name, grey", [("grey.png", True), ("grey.tif", True), ("colour.jpg", False)])
def test_one_band_goes_in_and_one_comes_out(tiny, tmp_path, name, grey):
    Image.fromarray(pixels(40, 52, 3)[..., 0] if grey else pixels(40, 52)).save(tmp_path / name)
    said, sr = result(tiny, tmp_path / name)
    assert sr.count == (1 if grey else 3) and said.split(": ")[0].endswith(name.replace(".", "_sr."))


def test_an_alpha_channel_a_colour_table_and_a_profile_are_kept(tiny, tmp_path):
    alpha = np.full((40, 52), 255, np.uint8)
    alpha[:, 30:] = 0
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(np.concatenate([pixels(40, 52), alpha[..., None]], -1)).save(tmp_path / "rgba.png", icc_profile=profile)
    said, sr = result(tiny, tmp_path / "rgba.png")
    assert sr.count == 4 and (sr.read(4) == alpha.repeat(4, 0).repeat(4, 1)).all() and "colour profile" in said
    assert Image.open(said.split(": ")[0]).info["icc_profile"] == profile
    for name in ("rgb.tif", "rgb.webp"):
        Image.fromarray(pixels(40, 52)).save(tmp_path / name, icc_profile=profile)
        said, _ = result(tiny, tmp_path / name)
        assert Image.open(said.split(": ")[0]).info["icc_profile"] == profile and "colour profile" in said
    deep = {"driver": "PNG", "SOURCE_ICC_PROFILE": base64.b64encode(profile).decode()}
    raster(tmp_path / "deep.png", pixels(40, 52).transpose(2, 0, 1).astype(np.uint16) * 200, **deep)
    said, sr = result(tiny, tmp_path / "deep.png")
    assert sr.dtypes[0] == "uint16" and Image.open(said.split(": ")[0]).info["icc_profile"] == profile and "colour profile" in said
    indices = pixels(40, 52, 1)[..., 0]
    colours = {i: (255 - i, i // 2, i, 255) for i in range(256)}
    with rasterio.open(tmp_path / "table.tif", "w", driver="GTiff", width=52, height=40, count=1, dtype="uint8", photometric="palette", **UTM) as file:
        file.write_colormap(1, colours)
        file.write(indices, 1)
    said, sr = result(tiny, tmp_path / "table.tif")
    expected = np.array([[colours[int(i)][:3] for i in row] for row in indices]).transpose(2, 0, 1)
    assert sr.count == 3 and np.abs(half_again(sr.read()) - expected).mean() < 4 and "colour table" in said


@pytest.mark.parametrize("name, mode", [("a.jpg", "CMYK"), ("a.tif", "CMYK"), ("b.tif", "LAB")])
def test_cmyk_and_lab_are_written_as_the_colours_that_they_mean(tiny, tmp_path, name, mode):
    Image.fromarray(pixels(40, 52)).convert(mode).save(tmp_path / name)
    said, sr = result(tiny, tmp_path / name)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB")).transpose(2, 0, 1)
    assert sr.count == 3 and np.abs(half_again(sr.read()) - expected).mean() < 4 and f"{mode} is written as sRGB" in said


def test_places_without_a_named_system_world_files_control_points_and_rpcs_are_kept_four_times_as_fine(tiny, tmp_path):
    values = pixels(40, 52).transpose(2, 0, 1)
    raster(tmp_path / "bare.tif", values, transform=UTM["transform"])
    said, sr = result(tiny, tmp_path / "bare.tif")
    assert sr.crs is None and sr.transform == Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000) and "no named system" in said
    for name, world in (("a.png", "a.pgw"), ("b.jpg", "b.jgw")):
        Image.fromarray(pixels(40, 52)).save(tmp_path / name)
        (tmp_path / world).write_text("2\n0\n0\n-2\n500001\n4999999\n")
        said, sr = result(tiny, tmp_path / name)
        assert sr.transform == Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000) and "world file" in said
    corners = [GroundControlPoint(r, c, x=c, y=-r) for r, c in ((0, 0), (0, 52), (40, 0), (40, 52))]
    raster(tmp_path / "points.tif", values, gcps=corners, crs="EPSG:4326")
    said, sr = result(tiny, tmp_path / "points.tif")
    assert {(p.row, p.col, p.x, p.y) for p in sr.gcps[0]} == {(4 * p.row, 4 * p.col, p.x, p.y) for p in corners} and "control points" in said
    rpcs = rasterio.rpc.RPC(0, 100, 9, 1, [1.0] + [0.0] * 19, [0.0, 0, 1] + [0.0] * 17, 19.5, 20, 48, 1, [1.0] + [0.0] * 19, [0.0, 1] + [0.0] * 18, 25.5, 26)
    raster(tmp_path / "rpc.tif", values, rpcs=rpcs)
    said, sr = result(tiny, tmp_path / "rpc.tif")
    assert (sr.rpcs.line_off, sr.rpcs.line_scale, sr.rpcs.samp_off, sr.rpcs.samp_scale) == (79.5, 80, 103.5, 104) and "RPCs" in said


def test_a_mask_stays_a_mask_and_leaves_no_second_file(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("GDAL_TIFF_INTERNAL_MASK", "NO")
    monkeypatch.setattr(up, "TILE", 48)  # several rows of tiles, one of which has the hole
    mask = np.full((100, 52), 255, np.uint8)
    mask[5:15, 20:30] = 0
    raster(tmp_path / "a.tif", pixels(100, 52).transpose(2, 0, 1), **UTM)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write_mask(mask)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        _, sr = result(tiny, tmp_path / "a.tif", output=str(tmp_path / "out"), window=32)
        args = up.Args(paths=(), output=str(tmp_path / "parts"), window=32)
        up.super_resolve_file(args, tmp_path / "a.tif", tmp_path / "parts/a_sr", *tiny, 0, 2)
        _, joined = result(tiny, tmp_path / "a.tif", share=(1, 2), output=str(tmp_path / "parts"), window=32)
    assert joined.name.endswith(".vrt") and (joined.read() == sr.read()).all()
    for file in (sr, joined):
        assert ((file.dataset_mask() > 0) == (mask > 0).repeat(4, 0).repeat(4, 1)).all()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a_sr.tif"]


def test_an_8_bit_jpeg_2000_scene_is_read_in_windows_with_its_alpha_and_its_place(tiny, tmp_path):
    values = np.concatenate([pixels(40, 52), np.full((40, 52, 1), 255, np.uint8)], -1).transpose(2, 0, 1).copy()
    values[3, :, 30:] = 0
    lossless, colours = {"QUALITY": 100, "REVERSIBLE": "YES"}, rasterio.enums.ColorInterp
    with rasterio.open(tmp_path / "rgba.tif", "w", driver="GTiff", count=4, height=40, width=52, dtype="uint8", **UTM) as file:
        file.write(values)
        file.colorinterp = [colours.red, colours.green, colours.blue, colours.alpha]
    rasterio.shutil.copy(tmp_path / "rgba.tif", tmp_path / "a.jp2", driver="JP2OpenJPEG", **lossless)
    assert up.Scene(tmp_path / "a.jp2", None, None).source.driver == "JP2OpenJPEG"
    said, sr = result(tiny, tmp_path / "a.jp2")
    assert sr.count == 4 and sr.dtypes[0] == "uint8" and "black 0, white 255" in said and sr.crs == UTM["crs"]
    assert (sr.read(4) == values[3].repeat(4, 0).repeat(4, 1)).all()
    assert np.abs(half_again(sr.read()[:3]) - values[:3])[:, :, :28].mean() < 3


def test_a_phones_photograph_comes_out_upright(tiny, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels(48, 64)).save(tmp_path / "a.jpg", exif=exif)
    _, sr = result(tiny, tmp_path / "a.jpg")
    assert (sr.height, sr.width) == (256, 192)


# ---------------------------------------------------------------- folders, bad files, what is finished


def cli(tmp_path, tiny, monkeypatch, capsys, *paths, **settings):
    """What `main` says and its exit code, with the tiny LDM and agent in place of those that ship."""
    saved = {"args": {"ldm": "x", "base_steps": 2, "max_calls": 2}}
    monkeypatch.setattr(up, "load_run", lambda run: saved)
    monkeypatch.setattr(up, "load_agent", lambda saved, ldm: tiny[1])
    monkeypatch.setattr(orl, "load_ldm", lambda name, device: tiny[0].ldm)
    try:
        up.main(up.Args(paths=tuple(map(str, paths)), **settings))
        code = 0
    except SystemExit as error:
        code = error.code
    return capsys.readouterr().out, code


def test_one_bad_file_does_not_end_a_batch(tiny, tmp_path, monkeypatch, capsys):
    for name in ("a_big", "b_small", "ü"):
        Image.fromarray(pixels(20, 16)).save(tmp_path / f"{name}.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.tif").write_bytes(b"II*\0\x08\0\0\0")
    row = up.Upscaler.row

    def no_memory(self, *rest):
        if "a_big" in str(current[-1]):
            raise MemoryError("64 GB")
        return row(self, *rest)

    current, scene = [], up.Scene
    monkeypatch.setattr(up, "Scene", lambda file, *rest: current.append(file) or scene(file, *rest))
    monkeypatch.setattr(up.Upscaler, "row", no_memory)
    said, code = cli(tmp_path, tiny, monkeypatch, capsys, tmp_path, output=str(tmp_path / "out"))
    assert code == 1 and "3 of 5 file(s)" in said
    assert all(f"{name}: skipped" in said for name in ("a_big.png", "text.jpg", "cut.tif")) and "64 GB" in said
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"b_small_sr.png", "ü_sr.png"}


def test_a_row_is_written_while_the_next_is_computed_and_what_fails_there_is_said(tiny, tmp_path, monkeypatch, capsys):
    raster(tmp_path / "scene.tif", pixels(300, 40).transpose(2, 0, 1))
    row, encode, second, overlap = up.Upscaler.row, up.encode, threading.Event(), []

    def compute(self, r, values):
        if r == 1:
            second.set()
        return row(self, r, values)

    def write(scene, top, sr):
        if top == 0:
            overlap.append(second.wait(timeout=20))
        return encode(scene, top, sr)

    monkeypatch.setattr(up.Upscaler, "row", compute), monkeypatch.setattr(up, "encode", write)
    monkeypatch.setattr(up, "TILE", 48)
    _, code = cli(tmp_path, tiny, monkeypatch, capsys, tmp_path / "scene.tif", output=str(tmp_path / "a"))
    assert code == 0 and overlap == [True]
    monkeypatch.setattr(up, "encode", lambda scene, top, sr: (_ for _ in ()).throw(OSError("No space left on device")))
    said, code = cli(tmp_path, tiny, monkeypatch, capsys, tmp_path / "scene.tif", output=str(tmp_path / "b"))
    assert code == 1 and "No space left on device" in said and not list((tmp_path / "b").rglob("*.tif"))


def test_a_folders_tree_is_mirrored_as_the_user_named_it_and_links_are_followed(tiny, tmp_path, monkeypatch, capsys):
    for name in ("in/b/x.png", "in/b/x.bmp", "in/.hidden/y.png", "elsewhere/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(20, 16)).save(tmp_path / name)
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/single.png").symlink_to(tmp_path / "elsewhere/z.png")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    said, code = cli(tmp_path, tiny, monkeypatch, capsys, tmp_path / "in", output=str(tmp_path / "out"))
    made = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert code == 0 and made == ["b/x_sr.png", "b/x_sr.tif", "linked/z_sr.png", "single_sr.png"]
    said, code = cli(tmp_path, tiny, monkeypatch, capsys, tmp_path / "in", output=str(tmp_path / "out"))
    assert code == 0 and said.count("finished before") == 4
    os.utime(tmp_path / "in/b/x.png", (time.time() + 10,) * 2)
    said, _ = cli(tmp_path, tiny, monkeypatch, capsys, tmp_path / "in", output=str(tmp_path / "out"))
    assert said.count("finished before") == 3
    said, _ = cli(tmp_path, tiny, monkeypatch, capsys, tmp_path / "in", output=str(tmp_path / "out"), overwrite=True)
    assert "finished before" not in said


def test_a_name_of_any_characters_is_written(tiny, tmp_path):
    file = raster(tmp_path / "land & sea <1> 'é' [2] 50%.tif", pixels(20, 16).transpose(2, 0, 1))
    assert result(tiny, file)[1].width == 64


def test_two_images_never_become_one_result(tmp_path, monkeypatch, capsys):
    for name in ("2019/x.tif", "2020/x.tif", "2020/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        up.list_files(up.Args(paths=("2019/x.tif", "2020/x.tif"), output="out"))
    said = capsys.readouterr().out
    assert error.value.code == 2 and "2019/x.tif" in said and "2020/x.tif" in said
    assert len(up.list_files(up.Args(paths=("2020/x.tif", "2020/x.png", "./2020/x.tif"), output="out"))) == 2
    assert len(up.list_files(up.Args(paths=("2019", "2020"), output="out"))) == 3


@pytest.mark.parametrize("paths, words", [((), "name LR images"), (("missing.png",), "no such file"), (("empty",), "no image in this folder")])
def test_what_is_not_there_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys, paths, words):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(up, "load_run", lambda run: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as error:
        up.main(up.Args(paths=tuple(str(tmp_path / path) for path in paths)))
    assert error.value.code == 2 and words in capsys.readouterr().out


@pytest.mark.parametrize("scale", [(5.0, 5.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_scale_without_room_between_black_and_white_is_refused(monkeypatch, capsys, scale):
    monkeypatch.setattr(up, "load_run", lambda run: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as error:
        up.main(up.Args(paths=(str(ROOT / "runs/scenes/TITLE"),), scale=scale))
    assert error.value.code == 2 and "two different numbers" in capsys.readouterr().out


# ---------------------------------------------------------------- kills and several processes

# processes of their own, forked from one that has imported the libraries: that takes longer than what they do
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["torch.utils.tensorboard", "diffusers", "datasets", "lpips", "torchmetrics", "matplotlib.pyplot", "rasterio"])


def call_main(ldm, pause, words, environment, said):
    """`main` of upscale_sr.py with a tiny LDM, small tiles and a pause for each row of them; `said`: what it prints."""
    os.environ.update(environment)
    torch.set_num_threads(1), torch.manual_seed(0)
    ldm, agent, row = orl.load_ldm(ldm, CPU), orl.Agent(torch.ones(3), 8), up.Upscaler.row
    orl.load_ldm, up.load_agent, up.TILE = lambda *_: ldm, lambda *_: agent, 48
    up.load_run = lambda _: {"args": {"ldm": "x", "base_steps": 2, "max_calls": 2}}
    up.Upscaler.row = lambda self, *rest: (time.sleep(pause), row(self, *rest))[1]
    with open(said, "w", encoding="utf-8") as sys.stdout:
        up.main(tyro.cli(up.Args, args=words))


def start(ldm, pause, *words, said=os.devnull, **environment):
    environment = {k: str(v) for k, v in environment.items()}
    process = FRESH.Process(target=call_main, args=(str(ldm), pause, [str(word) for word in words], environment, said))
    process.start()
    return process


def ended(process):
    """Waits for a process: whether it ended well."""
    process.join()
    return process.exitcode == 0


@pytest.fixture(scope="module")
def scene_file(tmp_path_factory, ldm_folder):
    """A scene of five rows of tiles, and its result by one process that was not disturbed."""
    folder = tmp_path_factory.mktemp("scene")
    raster(folder / "scene.tif", (pixels(150, 60).astype(np.uint16) * 9).transpose(2, 0, 1), **UTM)
    words = (folder / "scene.tif", "--output", folder / "once", "--window", 32)
    assert ended(start(ldm_folder, 0, *words, said=folder / "said"))
    assert "kept: coordinates" in (folder / "said").read_text("utf-8")
    with rasterio.open(folder / "once/scene_sr.tif") as file:
        return folder / "scene.tif", file.read(), file.transform


def test_a_scene_that_was_killed_goes_on_where_it_was_and_is_the_same(scene_file, ldm_folder, tmp_path):
    process = start(ldm_folder, 0.5, scene_file[0], "--output", tmp_path, "--window", 32)
    parts = tmp_path / "scene_sr.tif.parts"
    while len(list(parts.glob("*.tif"))) < 2:
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    finished = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.tif")}
    assert 2 <= len(finished) < 5 and not (tmp_path / "scene_sr.tif").exists()
    again = start(ldm_folder, 0.1, scene_file[0], "--output", tmp_path, "--window", 32)
    seen = set()
    while again.is_alive():
        for name, at in finished.items():
            with contextlib.suppress(FileNotFoundError):  # joined
                seen.add((name, (parts / name).stat().st_mtime_ns == at))
        time.sleep(0.02)
    assert seen == {(name, True) for name in finished}
    assert ended(again) and not parts.exists()
    with rasterio.open(tmp_path / "scene_sr.tif") as file:
        assert np.array_equal(file.read(), scene_file[1]) and file.transform == scene_file[2]


def test_parts_of_another_image_or_of_other_settings_are_not_taken(tiny, tmp_path):
    Image.fromarray(pixels(40, 52)).save(tmp_path / "a.png")
    folder = tmp_path / "a_sr.png.parts"
    folder.mkdir()
    (folder / "00000.tif").write_bytes(b"of another image")
    _, sr = result(tiny, tmp_path / "a.png")
    assert sr.read().std() > 10 and not folder.exists()


def test_parts_of_an_agent_that_was_trained_anew_are_not_taken(tiny, tmp_path, monkeypatch):
    Image.fromarray(pixels(40, 52)).save(tmp_path / "a.png")
    write, written = up.write_part, []
    monkeypatch.setattr(up, "write_part", lambda *rest: written.append(1) or write(*rest))
    with monkeypatch.context() as full:
        full.setattr(up, "join", lambda *rest: (_ for _ in ()).throw(OSError("No space left on device")))
        for _ in range(2):
            with pytest.raises(OSError):
                result(tiny, tmp_path / "a.png")
    assert len(written) == 1  # the second time it was there
    torch.manual_seed(1)
    result((tiny[0], orl.Agent(torch.ones(3), 8)), tmp_path / "a.png")
    assert len(written) == 2


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_several_processes_make_the_single_runs_image_also_after_one_was_killed(scene_file, ldm_folder, tmp_path, names):
    world = 2 if names[0] == "RANK" else 3
    flags = (scene_file[0], "--output", tmp_path, "--window", 32)
    job = {"SLURM_NTASKS": 7}  # of the whole job, not of what srun has started
    first = start(ldm_folder, 30, *flags, **job, **dict(zip(names, (0, world))))
    others = [start(ldm_folder, 0, *flags, **job, **dict(zip(names, (rank, world)))) for rank in range(1, world)]
    assert all(ended(other) for other in others)
    first.kill()
    first.join()
    assert not (tmp_path / "scene_sr.vrt").exists()
    assert ended(start(ldm_folder, 0, *flags, **job, **dict(zip(names, (0, world))), said=tmp_path / "said"))
    assert f"process 1 of {world}" in (tmp_path / "said").read_text("utf-8")
    with rasterio.open(tmp_path / "scene_sr.vrt") as file:
        assert np.array_equal(file.read(), scene_file[1])
        assert file.transform == scene_file[2] and file.crs == "EPSG:32633" and file.dtypes[0] == "uint16"
