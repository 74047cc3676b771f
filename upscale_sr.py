"""Super-resolves your own images 4x with the LDM and an agent that `ppo_ldm_sr.py` trained: photographs, GeoTIFFs,
whole satellite scenes, folders.

    python upscale_sr.py photo.png scene.tif folder/ --output out         # NAME_sr.png, NAME_sr.tif, out/**/NAME_sr.*
    torchrun --nproc-per-node 4 upscale_sr.py scene.tif --output out      # four processes share it: out/scene_sr.vrt

A scene is read, computed and written by rows of tiles, so that memory does not grow with its height; only pictures
(PNG, JPEG, WebP, ...) are read at once, at 9 bytes a pixel, and a JPEG is written at once, at 4. Where tiles lie and
what noise a pixel begins with depend on the pixel's place alone, and the agent's noise and stride are taken once from
tiles all over the scene: neither --window nor the number of processes changes a value. What is finished is kept in
NAME_sr.tif.parts until all is; the same command goes on there.

What comes out is what went in: kind of file (what can be read but not written so becomes .tif), bands (one band as
grey), type, holes, coordinates of every kind, tags, scales and units of bands, colour profile; what cannot be kept is
named. 8 bits are shown as they are, 0 to 255; for anything else black and white are --scale, or the 2nd and 98th
percentile of the scene, for all bands alike.
"""

import base64
import json
import os
import re
import shutil
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.fill
import rasterio.shutil
import torch
import torch.nn.functional as F
import tyro
from affine import Affine, dumpsw
from PIL import ExifTags, Image, ImageOps
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window
from torch.distributions import Normal
from tqdm import tqdm

import ppo_ldm_sr as orl
from eval_sr import load_agent, load_run
from ppo_ldm_sr import stop, upscale

TILE = 144  # LR px of a tile
OVERLAP = 16  # LR px that neighbouring tiles share and fade across
EDGE = OVERLAP // 2
BLOCK = 256  # latent cells a side that one generator draws noise for
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}  # written as such; everything else as GeoTIFF
WRITTEN = 128  # SR rows turned into the scene's type, or a JPEG's, at once
# no mask in a file of its own, whatever the user has set; bytes of blocks that are not decoded again for each row
GDAL = {"GDAL_TIFF_INTERNAL_MASK": True, "GDAL_CACHEMAX": 256_000_000}
OF_THE_FILE = {"IMAGE_STRUCTURE", "SUBDATASETS", "DERIVED_SUBDATASETS", "COLOR_PROFILE", "RPC"}  # tags not to copy
COLOURS = {1: [ColorInterp.gray], 3: [ColorInterp.red, ColorInterp.green, ColorInterp.blue]}
warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
warnings.filterwarnings("ignore", category=rasterio.errors.NodataShadowWarning)


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[str, ...]]  # LR images, or folders of them, links followed
    output: str | None = None  # folder to write to, with the tree of the folders named (None: beside each image)
    agent: str = "runs/orl_ldm"  # run folder of the agent
    ldm: str | None = None  # LDM that the agent was trained with (None: as its run folder says)
    bands: tuple[int, int, int] | None = None  # bands to take as red, green and blue (None: 1 2 3, or the only one)
    scale: tuple[float, float] | None = None  # values that are black and white (None: 0 255 of 8 bits, else 2% and 98%)
    overwrite: bool = False  # do again what is finished
    batch_size: int | None = None  # tiles denoised at once (None: 1 on a CPU, whose caches hold no more, 16 on CUDA)
    window: int = 512  # LR rows that are computed again at most after a kill
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 0  # seed of the noise


# ------------------------------------------------------------------------------------------------ reading


def numbers(values: np.ndarray) -> np.ndarray:
    """Which of the values are numbers, not NaN, infinity or a float type's greatest or least, which some programs write
    into holes without saying so."""
    return np.abs(values) < 1e38


class Scene:
    """An LR image, read by rows: `height`, `width`, `count` (1 or 3), `dtype`, the values of black and white, `scale`.
    Raises ValueError or rasterio's and Pillow's errors where it cannot be read as what it is."""

    def __init__(self, file: Path, bands: tuple[int, int, int] | None, scale: tuple[float, float] | None):
        self.kind, self.icc, self.foreign, source = PICTURES.get(file.suffix.lower(), "GTiff"), None, "", None
        self.lock, pages, turned = threading.Lock(), 1, False  # a file is read by one thread at a time
        try:
            with Image.open(file) as image:
                self.foreign = image.mode if image.mode in ("CMYK", "LAB") else ""
                raster = image.format in ("TIFF", "JPEG2000") and not self.foreign  # which rasterio reads in windows
                if not raster and orl.bits_per_channel(file.read_bytes(), image) <= 8:
                    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                    source, pages = self.open_picture(image), getattr(image, "n_frames", 1)
                    profile = None if self.foreign else image.info.get("icc_profile")
                    self.icc = base64.b64encode(profile).decode() if profile else None  # as GDAL has it
        except (OSError, Image.DecompressionBombError):
            pass  # what Pillow does not know, rasterio may
        try:
            self.placed = rasterio.open(file)  # where coordinates are, a world file's too
        except rasterio.errors.RasterioIOError:
            if source is None:
                raise
            self.placed = source
        if source is None:
            source, pages = self.placed, len(self.placed.subdatasets)
            if not source.count:
                raise ValueError(f"it has no bands of its own, but {pages} datasets inside; take one out, as a .tif")
            self.icc = source.tags(ns="COLOR_PROFILE").get("SOURCE_ICC_PROFILE")
        self.source = source
        self.left_out = [f"{pages - 1} further page(s)"] if pages > 1 else []  # in words
        if turned and not self.placed.transform.is_identity:
            self.left_out.append("coordinates, since EXIF turns the picture")
            self.placed = source
        # GDAL's transform of a .ppm is all zeros: no place
        self.transform = Affine.identity() if self.placed.transform.is_degenerate else self.placed.transform
        self.height, self.width, self.dtype = source.height, source.width, source.dtypes[0]
        if self.dtype.startswith("complex") or len(set(source.dtypes)) > 1:
            raise ValueError(f"its bands are {', '.join(sorted(set(source.dtypes)))}")
        data = [i for i, kind in zip(source.indexes, source.colorinterp) if kind != ColorInterp.alpha]
        self.alpha = next((i for i, kind in zip(source.indexes, source.colorinterp) if kind == ColorInterp.alpha), None)
        self.palette = None
        if source.colorinterp[0] == ColorInterp.palette and source.count == 1:
            self.palette = np.zeros((np.iinfo(self.dtype).max + 1, 3), np.uint8)
            for index, colour in source.colormap(1).items():
                self.palette[index] = colour[:3]
            self.count, self.bands, self.dtype = 3, (1,), "uint8"
        else:
            self.bands = bands or (tuple(data[:3]) if len(data) >= 3 else (data[0],))
            if max(self.bands) > source.count or min(self.bands) < 1:
                raise ValueError(f"it has {source.count} band(s), not {max(self.bands)}")
            self.count = len(self.bands)
        if dropped := sorted(set(data) - set(self.bands)):
            self.left_out.append(f"bands {dropped}")
        self.nodata = source.nodata if self.palette is None else None  # the value of a hole; colours have none
        # whether a mask tells its holes, for want of a value, NaN or alpha that does
        flags = {MaskFlags.per_dataset} if self.palette is None else {MaskFlags.per_dataset, MaskFlags.nodata}
        self.masked = bool(flags & set(source.mask_flag_enums[0])) and not self.alpha
        self.masked = self.masked and np.issubdtype(self.dtype, np.integer)
        self.inverted = source.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"  # white is the smaller value
        if scale is None:
            bits = int(source.tags(self.bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8)) if self.palette is None else 8
            low, high = (0.0, 2.0**bits - 1) if self.dtype == "uint8" else self.percentiles()  # 15 is white of 4 bits
            scale = (high, low) if self.inverted else (low, high)
        self.scale = scale
        if self.kind == "JPEG" and 4 * max(self.height, self.width) > 65_500:
            raise ValueError("its result is larger than a JPEG can be; save it as .tif first")

    def open_picture(self, image: Image.Image):
        """An 8-bit picture, upright, as rasterio's dataset of 1 to 4 bands."""
        grey, transparent = image.mode in ("1", "L", "LA"), "transparency" in image.info
        ImageOps.exif_transpose(image, in_place=True)
        image = orl.to_srgb(image) if self.foreign else image
        alpha = transparent or "A" in image.getbands()
        mode = {(1, 1): "LA", (1, 0): "L", (0, 1): "RGBA", (0, 0): "RGB"}[grey, alpha]
        self.memory = rasterio.MemoryFile()
        profile = {"driver": "GTiff", "count": len(mode), "height": image.height, "width": image.width}
        with self.memory.open(**profile, dtype="uint8", photometric="minisblack" if grey else "rgb") as target:
            if alpha:
                target.colorinterp = [*COLOURS[len(mode) - 1], ColorInterp.alpha]
            for top in range(0, image.height, 1024):  # not at once: it may be large
                rows = image.crop((0, top, image.width, min(top + 1024, image.height))).convert(mode)
                pixels = np.atleast_3d(np.asarray(rows)).transpose(2, 0, 1)
                target.write(pixels, window=Window(0, top, image.width, rows.height))
        return self.memory.open()

    def percentiles(self) -> tuple[float, float]:
        """2nd and 98th percentile of the valid values, of a million pixels at most spread over the scene."""
        step = max(1, int((self.height * self.width / 1e6) ** 0.5))
        shape = (-(-self.height // step), -(-self.width // step))
        values = self.source.read(self.bands, out_shape=(len(self.bands), *shape)).astype(np.float64)
        valid = (self.source.read_masks(self.bands, out_shape=(len(self.bands), *shape)) > 0) & numbers(values)
        if not valid.any():
            raise ValueError("it has no valid pixel")
        low, high = (float(v) for v in np.percentile(values[valid], (2, 98)))
        return (low, high) if high > low else (low - 0.5, low + 0.5)  # a flat image

    def read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """LR rows first to last - 1 -> values (1 or 3, rows, width), which are valid, the alpha channel or None."""
        window = Window(0, first, self.width, last - first)
        with self.lock:
            values, mask = (read(self.bands, window=window) for read in (self.source.read, self.source.read_masks))
            alpha = self.source.read(self.alpha, window=window) if self.alpha else None
        values = self.palette[values[0]].transpose(2, 0, 1) if self.palette is not None else values
        values = values.astype(np.result_type(self.dtype, np.float32))  # 32 bits and more: in float64
        return values, (mask > 0) & numbers(values), alpha

    def rows(self, first: int, last: int) -> np.ndarray:
        """LR rows first to last - 1 as the networks see them: (3, rows, width), [0, 1] black to white, holes filled
        from their surroundings."""
        values, valid, _ = self.read(first, last)
        values = np.where(valid, values, self.scale[0])
        values = ((values - self.scale[0]) / (self.scale[1] - self.scale[0])).astype(np.float32)
        if not valid.all():
            known = valid.astype(np.uint8)
            values = np.stack([rasterio.fill.fillnodata(*pair) for pair in zip(values, known)])
        return values if len(values) == 3 else values.repeat(3, axis=0)


# ------------------------------------------------------------------------------------------------ computing


@lru_cache(maxsize=256)
def noise_block(seed: int, channels: int, i: int, j: int) -> torch.Tensor:
    """Noise (channels, BLOCK, BLOCK) of one block of the latent grid, the same whoever asks for it and when."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + i) * 1_000_003 % 2**62 + j)
    return torch.randn(channels, BLOCK, BLOCK, generator=generator)


def noise_at(seed: int, channels: int, top: int, left: int, side: int) -> torch.Tensor:
    """Noise (channels, side, side) of the latent cells from (top, left) on, side at most BLOCK."""
    i, j = top // BLOCK, left // BLOCK
    rows = [torch.cat([noise_block(seed, channels, i + a, j + b) for b in (0, 1)], 2) for a in (0, 1)]
    top, left = top - i * BLOCK, left - j * BLOCK
    return torch.cat(rows, 1)[:, top : top + side, left : left + side]


def fade(length: int, overlap: int, first: bool, last: bool) -> torch.Tensor:
    """Weights (length,) of a tile: up over the overlap with the tile before, down over that with the next."""
    ramp = ((torch.arange(length) + 0.5) / overlap).clamp(max=1)
    return (torch.ones(length) if first else ramp) * (torch.ones(length) if last else ramp.flip(0))


class Upscaler:
    """LDM and agent (None: the plain LDM) for one scene."""

    def __init__(self, mdp: orl.Denoising, agent: orl.Agent | None, scene: Scene, batch_size: int, seed: int):
        self.mdp, self.agent, self.scene, self.batch_size, self.seed = mdp, agent, scene, batch_size, seed
        stride = mdp.ldm.stride
        least = -(-(max(scene.height, scene.width) + OVERLAP) // stride) * stride
        self.tile = min(-(-TILE // stride) * stride, max(least, 2 * OVERLAP))
        self.step = self.tile - OVERLAP
        self.num_rows, self.num_columns = (-(-side // self.step) for side in (scene.height, scene.width))
        self.below = -1, None  # the last row of tiles that was computed, and what of it fades into the next
        self.actions = []  # noise and stride at each call, for the whole scene
        if agent and self.num_rows * self.num_columns > 1:
            self.decide()

    def tile_row(self, r: int) -> np.ndarray:
        """The LR values (3, tile, columns) that row r of tiles sees: reflected beyond the scene's border."""
        top, h, w = r * self.step - EDGE, self.scene.height, self.scene.width
        first, last = max(top, 0), min(top + self.tile, h)
        values = self.scene.rows(first, last)
        right = self.num_columns * self.step + EDGE - w
        around = ((0, 0), (first - top, top + self.tile - last), (EDGE, right))
        return np.pad(values, around, mode="symmetric")

    def inputs(self, tiles: list[tuple[int, int]], rows: dict[int, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tiles (row, column) of rows of LR values -> their LR (n, 3, tile, tile), not clipped, and noise."""
        ldm, step, side = self.mdp.ldm, self.step, self.tile
        lr = np.stack([rows[r][:, :, c * step : c * step + side] for r, c in tiles])
        corners = [(r * step - EDGE, c * step - EDGE) for r, c in tiles]
        z = torch.stack([noise_at(self.seed, ldm.latent_channels, *corner, side) for corner in corners])
        return torch.from_numpy(lr).to(ldm.device), z.to(ldm.device)

    @torch.no_grad()
    def decide(self) -> None:
        """Noise and stride at each call: the agent's means over up to four tiles spread over the scene."""
        places = [(r, c) for r in range(self.num_rows) for c in range(self.num_columns)]
        places = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, 6).round().astype(int)[1:-1])]
        lr, z = self.inputs(places, {r: self.tile_row(r) for r, _ in places})

        def mean_action(maps, numbers):
            self.actions.append(self.agent.policy(maps, numbers).mean.mean(0, keepdim=True))
            return self.actions[-1]

        self.mdp.denoise(lr.clamp(0, 1), z, self.agent_of(mean_action))

    def agent_of(self, action):
        """The agent, but noise and stride of all tiles are what `action` gives of maps and numbers, (1, 2)."""

        def policy(maps, numbers):
            return Normal(action(maps, numbers).expand(len(maps), -1), 1.0)

        return SimpleNamespace(policy=policy, edit_policy=self.agent.edit_policy)

    def steered(self):
        """The agent with the scene's own noise and stride; those of a single tile are the scene's."""
        actions = iter(self.actions)
        return self.agent_of(lambda maps, numbers: next(actions)) if self.actions else self.agent

    @torch.no_grad()
    def super_resolve(self, lr: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """What `inputs` gives (n, 3, h, w), (n, c, h, w) -> SR (n, 3, 4h, 4w), not clipped."""
        shown = lr.clamp(0, 1)
        sr = self.mdp.super_resolve(shown, z, self.steered())[0]
        if not self.agent:
            return sr
        # consistent once more than in the tables: judges outside the reward like it better
        sr = sr + upscale(shown - orl.downscale(sr))
        beyond, light = lr - shown, torch.zeros_like(sr)  # darker than black, brighter than white: by back-projection
        for _ in range(6 if beyond.any() else 0):
            light = light + upscale(beyond - F.interpolate(light, scale_factor=0.25, mode="bicubic", antialias=True))
        return sr + light

    def row(self, r: int, values: np.ndarray) -> torch.Tensor:
        """What `tile_row` gives of row r -> its SR, faded towards the rows above and below: (3, 4 tile, 4 width)."""
        side, width = 4 * self.tile, 4 * self.scene.width
        total = torch.zeros(3, side, 4 * (self.num_columns * self.step + OVERLAP))
        for first in range(0, self.num_columns, self.batch_size):
            columns = range(first, min(first + self.batch_size, self.num_columns))
            lr, z = self.inputs([(r, c) for c in columns], {r: values})
            for c, part in zip(columns, self.super_resolve(lr, z).cpu()):
                at = slice(4 * c * self.step, 4 * c * self.step + side)
                total[:, :, at] += part * fade(side, 4 * OVERLAP, c == 0, c == self.num_columns - 1)
        total *= fade(side, 4 * OVERLAP, r == 0, r == self.num_rows - 1).view(-1, 1)
        return total[:, :, 4 * EDGE : 4 * EDGE + width]

    def strips(self, first: int, last: int):
        """Rows first to last - 1 of tiles -> (top SR row, SR (3, rows, 4 width)) one after the other, without a gap.
        The next one is read while a row is computed."""
        side, fades = 4 * self.tile, 4 * OVERLAP
        if first > 0 and self.below[0] != first - 1:
            self.below = first - 1, self.row(first - 1, self.tile_row(first - 1))[:, side - fades :].clone()
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.tile_row, first)
            for r in range(first, last):
                values = ahead.result()
                if r + 1 < last:
                    ahead = reader.submit(self.tile_row, r + 1)
                strip = self.row(r, values)
                if r > 0:
                    strip[:, :fades] += self.below[1]
                self.below = r, strip[:, side - fades :].clone()
                top = 4 * (r * self.step - EDGE)
                bottom = 4 * self.scene.height if r == self.num_rows - 1 else top + side - fades
                skip = max(0, -top)
                yield top + skip, strip[:, skip : bottom - top]
                del strip  # the next one is computed while only the writer holds it


# ------------------------------------------------------------------------------------------------ writing


def profile_of(scene: Scene, height: int) -> dict:
    """rasterio's settings of a GeoTIFF of `height` SR rows."""
    count, rgb = scene.count + bool(scene.alpha), scene.count == 3 and scene.dtype == "uint8"
    photometric = "rgb" if rgb else "miniswhite" if scene.inverted and scene.count == 1 else "minisblack"
    return {"driver": "GTiff", "width": 4 * scene.width, "height": height, "count": count, "dtype": scene.dtype,
            "nodata": scene.nodata, "photometric": photometric,
            "compress": "deflate", "NUM_THREADS": "ALL_CPUS", "tiled": True, "BIGTIFF": "IF_SAFER"}  # fmt: skip


def encode(scene: Scene, top: int, sr: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """SR rows from `top` on, [0, 1] from black to white -> (bands, rows, 4 width) of its type, which are valid."""
    low, high = scene.scale
    values = (sr.mean(0, keepdim=True) if scene.count == 1 else sr).numpy()
    values = low + (high - low) * values.astype(np.result_type(scene.dtype, np.float32), copy=False)
    whole, nodata = np.issubdtype(scene.dtype, np.integer), scene.nodata
    if whole:
        values = values.round().clip(np.iinfo(scene.dtype).min, np.iinfo(scene.dtype).max)
    values = values.astype(scene.dtype)
    first, last = top // 4, -(-(top + sr.shape[1]) // 4)
    _, valid, alpha = scene.read(first, last)
    cut = slice(top - 4 * first, top - 4 * first + sr.shape[1])
    valid = valid.repeat(4, 1).repeat(4, 2)[:, cut]
    if nodata is not None and not np.isnan(nodata):
        step = -1 if whole and nodata == np.iinfo(scene.dtype).max else 1
        values[(values == nodata) & valid] += np.asarray(step).astype(scene.dtype)  # no value is read as a hole
    if scene.palette is None and (nodata is not None or not whole) and not scene.alpha:
        values[~valid] = np.nan if nodata is None else nodata
    if alpha is not None:
        values = np.concatenate([values, alpha.repeat(4, 0).repeat(4, 1)[None, cut].astype(scene.dtype)])
    return values, valid


def describe(scene: Scene, target) -> list[str]:
    """Gives a GeoTIFF the scene's coordinates, four times as fine, and its tags -> what was kept, in words."""
    placed, source, kept = scene.placed, scene.source, []
    if not scene.transform.is_identity:
        target.transform = scene.transform @ Affine.scale(0.25)
        kept.append("coordinates" if placed.crs else "coordinates of no named system")
    if placed.crs:
        target.crs = placed.crs
    points, system = placed.gcps
    if points:
        for point in points:
            point.row, point.col = 4 * point.row, 4 * point.col
        target.gcps = (points, system)
        kept.append("control points")
    if rpcs := placed.rpcs:
        for axis in ("line", "samp"):  # a pixel's centre x becomes 4 x + 1.5
            setattr(rpcs, f"{axis}_off", 4 * getattr(rpcs, f"{axis}_off") + 1.5)
            setattr(rpcs, f"{axis}_scale", 4 * getattr(rpcs, f"{axis}_scale"))
        target.rpcs = rpcs
        kept.append("RPCs")
    target.update_tags(**{k: v for k, v in placed.tags().items() if k != "AREA_OR_POINT"})
    copy_tags(scene, target)
    if scene.icc:
        target.update_tags(ns="COLOR_PROFILE", SOURCE_ICC_PROFILE=scene.icc)
        kept.append("colour profile")
    bands = scene.bands if scene.palette is None else ()
    for k, band in enumerate(bands, 1):
        target.set_band_description(k, source.descriptions[band - 1] or "")
        target.update_tags(k, **{k: v for k, v in source.tags(band).items() if not k.startswith("STATISTICS_")})
        target.set_band_unit(k, source.units[band - 1] or "")
    if bands and (set(source.scales), set(source.offsets)) != ({1.0}, {0.0}):
        rest = target.count - len(bands)  # alpha
        target.scales = [source.scales[band - 1] for band in bands] + [1.0] * rest
        target.offsets = [source.offsets[band - 1] for band in bands] + [0.0] * rest
        kept.append("scales and offsets")
    if scene.alpha:
        target.colorinterp = [*COLOURS[scene.count], ColorInterp.alpha]
    return kept


def copy_tags(scene: Scene, target) -> None:
    """Tags in namespaces of their own; GDAL's copies do not keep them."""
    for space in scene.placed.tag_namespaces():
        if space not in OF_THE_FILE and not space.startswith("xml:"):
            target.update_tags(ns=space, **scene.placed.tags(ns=space))


def world_file(scene: Scene, target: Path) -> None:
    """The six numbers of a picture's place beside it, for the centre of its upper left pixel."""
    text = dumpsw(scene.transform @ Affine.scale(0.25))
    target.with_suffix({".png": ".pgw"}.get(target.suffix.lower(), ".jgw")).write_text(text, encoding="utf-8")


def write_part(scene: Scene, upscaler: Upscaler, part: Path, first: int, last: int, bar) -> None:
    """Rows first to last - 1 of tiles as one GeoTIFF; nothing half-written has its name."""
    strips = upscaler.strips(first, last)
    top = max(0, 4 * (first * upscaler.step - EDGE))
    bottom = 4 * scene.height if last == upscaler.num_rows else 4 * (last * upscaler.step - EDGE)
    half = part.with_name(part.name + ".half")
    with rasterio.open(half, "w", **profile_of(scene, bottom - top)) as target, ThreadPoolExecutor(1) as writer:

        def write(start: int, strip: torch.Tensor) -> None:
            for k in range(0, strip.shape[1], WRITTEN):
                values, valid = encode(scene, start + k, strip[:, k : k + WRITTEN])
                window = Window(0, start + k - top, values.shape[2], values.shape[1])
                target.write(values, window=window)
                if scene.masked:  # every row: one that is not written is a hole
                    target.write_mask(valid[0], window=window)
            bar.update(1)

        written = None
        for start, strip in strips:  # one is written while the next is computed, no more: they are large
            if written:
                written.result()
            written = writer.submit(write, start, strip)
            del strip
        written.result()
    os.replace(half, part)


def join(scene: Scene, parts: list[Path], target: Path) -> list[str]:
    """All parts as one file -> what was kept of the scene, in words."""
    half, together = target.with_name(target.name + ".half"), target.with_suffix(".joining.vrt")
    kept = write_vrt(scene, parts, together)
    if scene.kind == "GTiff":
        profile = profile_of(scene, 4 * scene.height)
        options = {k: profile[k] for k in ("photometric", "compress", "NUM_THREADS", "tiled", "BIGTIFF")}
        rasterio.shutil.copy(together, half, driver="GTiff", **options)
        with rasterio.open(half, "r+") as file:
            copy_tags(scene, file)
    else:
        kept = ["colour profile"] if scene.icc else []
        if not scene.transform.is_identity:
            world_file(scene, target)
            kept.append("world file")
        if scene.placed.crs or scene.placed.gcps[0]:
            scene.left_out.append("coordinate system or control points, for which a .tif has a place")
        if scene.kind == "PNG":
            with rasterio.Env(GDAL_PAM_ENABLED=False):  # no .aux.xml
                rasterio.shutil.copy(together, half, driver="PNG")
        else:  # not GDAL's JPEG, which has colours at half the resolution
            image = Image.new("L" if scene.count == 1 else "RGB", (4 * scene.width, 4 * scene.height))
            with rasterio.open(together) as file:
                for top in range(0, file.height, WRITTEN):
                    rows = file.read(window=Window(0, top, file.width, min(WRITTEN, file.height - top)))
                    image.paste(Image.fromarray(rows[0] if scene.count == 1 else rows.transpose(1, 2, 0)), (0, top))
            profile = base64.b64decode(scene.icc) if scene.icc else None
            image.save(half, format="JPEG", quality=95, subsampling=0, icc_profile=profile)
    together.unlink()
    os.replace(half, target)
    return kept


def write_vrt(scene: Scene, parts: list[Path], target: Path) -> list[str]:
    """The parts as one image, a VRT, so that no two processes ever write one file -> what was kept, in words."""
    at, width = 0, 4 * scene.width
    bands = [str(band) for band in range(1, scene.count + bool(scene.alpha) + 1)] + ["mask,1"] * scene.masked
    sources = dict.fromkeys(bands, "")
    kind = "Byte" if scene.dtype == "uint8" else scene.dtype.capitalize().replace("Uint", "UInt")
    for part in parts:
        with rasterio.open(part) as source:
            height = source.height
        name = escape(f"{part.parent.name}/{part.name}")
        for band in bands:
            sources[band] += (
                f'<SimpleSource><SourceFilename relativeToVRT="1">{name}</SourceFilename>'
                f"<SourceBand>{band}</SourceBand>"
                f'<SrcRect xOff="0" yOff="0" xSize="{width}" ySize="{height}"/>'
                f'<DstRect xOff="0" yOff="{at}" xSize="{width}" ySize="{height}"/></SimpleSource>'
            )
        at += height
    hole = "" if scene.nodata is None else f"<NoDataValue>{scene.nodata}</NoDataValue>"
    text = f'<VRTDataset rasterXSize="{width}" rasterYSize="{at}">'
    for band, inside in sources.items():
        if band == "mask,1":
            text += f'<MaskBand><VRTRasterBand dataType="Byte">{inside}</VRTRasterBand></MaskBand>'
        else:
            text += f'<VRTRasterBand dataType="{kind}" band="{band}">{hole}{inside}</VRTRasterBand>'
    half = target.with_name(f"{target.stem}.{os.getpid()}.half.vrt")
    half.write_text(text + "</VRTDataset>", encoding="utf-8")
    with rasterio.open(half, "r+") as file:
        kept = describe(scene, file)
    os.replace(half, target)
    return kept


# ------------------------------------------------------------------------------------------------ main


def list_files(args: Args) -> list[tuple[Path, Path]]:
    """(image, its result without suffix) of all files and folders named; a folder's tree is mirrored, results of
    earlier calls are left out, and what would overwrite another result keeps its suffix in its name."""
    found = []
    for path in map(Path, args.paths):
        if path.is_dir():
            inside = [file for file in orl.image_files(path) if not file.stem.endswith("_sr")]
            inside = [file for file in inside if not re.search(r"_sr\.\w+\.parts$", file.parent.name)]
            if not inside:
                stop(f"{path}: no image in this folder")
            root = Path(args.output or path) / (path.name if args.output and len(args.paths) > 1 else "")
            found += [(file, root / file.relative_to(path).parent / f"{file.stem}_sr") for file in inside]
        elif path.is_file():
            found.append((path, Path(args.output or path.parent) / f"{path.stem}_sr"))
        else:
            stop(f"{path}: no such file or folder")
    found = list(dict.fromkeys(found))  # named twice
    names = [(target, PICTURES.get(file.suffix.lower())) for file, target in found]
    long = [target.with_name(f"{file.stem}_{file.suffix[1:]}_sr") for file, target in found]
    found = [(file, long[k] if names.count(names[k]) > 1 else target) for k, (file, target) in enumerate(found)]
    results = {}
    for file, target in found:
        other = results.setdefault((target, file.suffix), file)
        if other != file:
            stop(f"{other} and {file} would both become {target}{file.suffix}; super-resolve them into two --output")
    return found


def super_resolve_file(args: Args, file: Path, target: Path, mdp, agent, rank: int, world: int) -> str:
    """Writes one result, or this process's share of it -> the line that says so."""
    began, scene = time.perf_counter(), Scene(file, args.bands, args.scale)
    suffix = file.suffix if scene.kind in PICTURES.values() else ".tif"
    target = target.with_name(target.name + suffix)
    folder = target.with_name(target.name + ".parts")
    joined = target if world == 1 else target.with_suffix(".vrt")
    stale = not joined.is_file() or joined.stat().st_mtime < file.stat().st_mtime
    if not (stale or args.overwrite):
        return f"{joined}: finished before, kept; --overwrite does it again"
    batch_size = args.batch_size or (16 if mdp.ldm.device.type == "cuda" else 1)
    upscaler = Upscaler(mdp, agent, scene, batch_size, args.seed)
    each = max(1, args.window // upscaler.step)
    groups = [(first, min(first + each, upscaler.num_rows)) for first in range(0, upscaler.num_rows, each)]
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"file": [file.stat().st_size, file.stat().st_mtime], "ldm": mdp.ldm.fingerprint, "each": each,
                "seed": args.seed, "scale": scene.scale, "bands": scene.bands,
                "agent": orl.digest({}, *([agent] if agent else []))}  # fmt: skip
    share = np.array_split(np.arange(len(groups)), world)[rank].tolist()
    parts = [folder / f"{k:05d}.tif" for k in range(len(groups))]
    note = folder / f"settings_{rank}_of_{world}.json"
    if not note.is_file() or json.loads(note.read_text("utf-8")) != json.loads(json.dumps(settings)) or args.overwrite:
        for k in share:  # of another image, or other settings
            parts[k].unlink(missing_ok=True)
        note.write_text(json.dumps(settings), encoding="utf-8")
    mine = [k for k in share if not parts[k].is_file()]
    total = sum(groups[k][1] - groups[k][0] for k in mine)
    with tqdm(total=total, desc=file.name, unit="row of tiles", dynamic_ncols=True, leave=False, delay=3) as bar:
        for k in mine:
            write_part(scene, upscaler, parts[k], *groups[k], bar)
    size = f"{scene.width} x {scene.height} -> {4 * scene.width} x {4 * scene.height} px"
    seconds = time.perf_counter() - began
    if not all(part.is_file() for part in parts):
        return f"{folder}: {len(mine)} of {len(parts)} parts by this process in {seconds:.1f} s; others are at work"
    kept = join(scene, parts, target) if world == 1 else write_vrt(scene, parts, joined)
    if world == 1:
        shutil.rmtree(folder)
    notes = [f"{scene.dtype}, black {scene.scale[0]:g}, white {scene.scale[1]:g}"]
    notes += [f"kept: {', '.join(kept)}"] if kept else []
    notes += [f"left out: {', '.join(scene.left_out)}"] if scene.left_out else []
    notes += ["its colour table written as colours"] if scene.palette is not None else []
    notes += [f"{scene.foreign} is written as sRGB"] if scene.foreign else []
    tiff = file.suffix.lower() in (".tif", ".tiff")
    notes += [f"{file.suffix or 'it'} is written as .tif"] if suffix == ".tif" and not tiff else []
    return f"{joined}: {size} in {time.perf_counter() - began:.1f} s; {'; '.join(notes)}"


def main(args: Args) -> None:
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    if not args.paths or min(args.batch_size or 1, args.window) < 1:
        stop("name LR images or folders; --batch-size and --window are at least 1")
    if args.scale and not 0 < abs(args.scale[1] - args.scale[0]) < np.inf:
        stop("--scale takes two different numbers: the values of black and white")
    files = list_files(args)  # bad input speaks before anything is loaded
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", 1))  # srun's own, not the whole job's
    world = int(os.environ.get("WORLD_SIZE", tasks))
    if world > 1:
        print(f"process {rank + 1} of {world}, as its launcher says: each does its share, all of them must be started")
    device = orl.pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))
    saved = load_run(orl.locate(args.agent))
    ldm = orl.load_ldm(args.ldm or saved["args"]["ldm"], device)
    agent = load_agent(saved, ldm)
    mdp = orl.Denoising(ldm, saved["args"]["base_steps"], saved["args"]["max_calls"])
    failed = 0
    for k, (file, target) in enumerate(files):
        try:
            with rasterio.open(file) if file.suffix.lower() in (".tif", ".tiff", ".jp2") else Image.open(file) as image:
                small = image.height <= args.window
        except Exception:
            small = True
        if world > 1 and small and k % world != rank:
            continue  # a small image is one process's
        try:
            with rasterio.Env(**GDAL):
                share = (0, 1) if small else (rank, world)
                print(super_resolve_file(args, file, target, mdp, agent, *share))
        except Exception as error:  # whatever one file raises, the others go on
            failed += 1
            print(f"{file}: skipped ({type(error).__name__}: {' '.join(str(error).split())})")
    if failed:
        print(f"{failed} of {len(files)} file(s) could not be super-resolved")
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
