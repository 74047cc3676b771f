"""Super-resolves your own images 4x with the LDM and an agent that `ppo_ldm_sr.py` trained.

    python upscale_sr.py photo.png scene.tif folder/ --output out         # NAME_sr.png, NAME_sr.tif, out/**/NAME_sr.*
    torchrun --nproc-per-node 4 upscale_sr.py scene.tif --output out      # four processes share the work

A scene is read, computed and written by rows of tiles, so that memory does not grow with its height. Processes with
the same command share the work, however they were started, and the same command goes on where a killed one was. No
value depends on --window or on the number of processes or threads. A result carries what made it: where input,
settings, agent, LDM and version are the same it is kept, else it is made again. 8 bits are shown as they are, 0 to 255;
for anything else black and white are --scale, or the 2nd and 98th percentile of the scene, for all bands alike.
docs/upscale.md says what is kept of each kind of file.
"""

import base64
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import rasterio
import rasterio.fill
import rasterio.shutil
import torch
import tyro
from affine import Affine, dumpsw
from PIL import ExifTags, Image, ImageCms, ImageOps
from rasterio._err import CPLE_BaseError  # GDAL's own errors, which rasterio.errors does not name
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window
from torch.distributions import Normal
from tqdm import tqdm

import ppo_ldm_sr as orl
from ppo_ldm_sr import stop, upscale

TILE = 144  # LR px of a tile's side at most
OVERLAP = 8  # LR px that neighbouring tiles share and fade across
EDGE = OVERLAP // 2
MADE_BY = '{"made_by": "upscale_sr.py of ORL-LDM", '  # begins what a result says of itself
WRITTEN = 128  # SR rows that are turned into the scene's type and written at once
SUFFIXES = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "GTiff": (".tif",)}  # of the results, by kind
OF_THE_FILE = {"IMAGE_STRUCTURE", "SUBDATASETS", "DERIVED_SUBDATASETS", "COLOR_PROFILE", "RPC"}  # tags not to copy
GREY, RGB, ALPHA = [ColorInterp.gray], [ColorInterp.red, ColorInterp.green, ColorInterp.blue], ColorInterp.alpha
# what bad files and full disks raise; SyntaxError: Pillow for a broken PNG; RuntimeError: PyTorch out of memory
ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError, ImageCms.PyCMSError,
          rasterio.errors.RasterioError, CPLE_BaseError)  # fmt: skip
Image.MAX_IMAGE_PIXELS = None  # a large picture is a user's own
warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
warnings.filterwarnings("ignore", category=rasterio.errors.NodataShadowWarning)
if (Path(rasterio.__file__).parent / "proj_data" / "proj.db").is_file():
    for name in ("PROJ_LIB", "PROJ_DATA"):  # rasterio has its own: another program's may be of another version
        os.environ.pop(name, None)


@dataclass
class Args:
    paths: tyro.conf.Positional[tuple[str, ...]]  # LR images, or folders of them, links followed
    output: str | None = None  # folder to write to, with the tree of the folders named (None: beside each image)
    agent: str = "runs/orl_ldm"  # run folder of the agent
    ldm: str | None = None  # LDM that the agent was trained with (None: as its run folder says)
    bands: tuple[int, int, int] | None = None  # bands to take as red, green and blue (None: 1 2 3, or the only one)
    scale: tuple[float, float] | None = None  # values that are black and white (None: 0 255 of 8 bits, else 2% and 98%)
    nodata: float | None = None  # the value of a hole (None: as the file says; nan: no value is one)
    overwrite: bool = False  # do again what is finished
    window: int = 512  # LR rows that are computed again at most after a kill
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 0  # seed of the noise


# ------------------------------------------------------------------------------------------------ reading
def kind_of(file: Path) -> str:
    """PNG or JPEG by the file's first bytes, whatever its name says; GTiff for all else."""
    with suppress(OSError), open(file, "rb") as opened:
        head = opened.read(4)
        return "PNG" if head == b"\x89PNG" else "JPEG" if head[:3] == b"\xff\xd8\xff" else "GTiff"
    return "GTiff"  # it is named when it is read


class Scene:
    """An LR image, read by rows, of 1 or 3 bands. Raises one of ERRORS where it cannot be read as what it is."""

    def __init__(self, file: Path, args: Args):
        self.args, self.kind, self.icc, self.scale, self.left_out, self.notes = args, kind_of(file), None, None, [], []
        self.placed, picture, mode, pages = None, None, "", 1
        try:
            self.placed = rasterio.open(file)  # where coordinates are, a world file's too
            pages = len(self.placed.subdatasets)
        except rasterio.errors.RasterioIOError as error:
            unread = error
        with suppress(OSError, SyntaxError), Image.open(file) as image:
            mode, raster = image.mode, image.format in ("TIFF", "JPEG2000")  # which rasterio reads by rows
            if mode in ("P", "CMYK") or not (raster or (self.placed and self.placed.dtypes[0] != "uint8")):
                pages, picture = getattr(image, "n_frames", 1), self.open_picture(image)
        self.source = source = picture or self.placed
        if source is None:
            raise unread
        if not source.count:
            raise ValueError(f"it has no bands of its own, but {pages} datasets inside: save one as a .tif")
        self.placed, self.is_picture = self.placed or source, picture is not None
        self.full = picture or rasterio.open(file, OVERVIEW_LEVEL="NONE")  # whose pixels no overview stands in for
        if icc := self.placed.tags(ns="COLOR_PROFILE").get("SOURCE_ICC_PROFILE"):
            self.icc = base64.b64decode(icc)
        self.height, self.width, self.dtype = source.height, source.width, source.dtypes[0]
        marks, flags = source.colorinterp, set(source.mask_flag_enums[0])
        if (mode == "LAB" or self.dtype.startswith("complex") or len(set(source.dtypes)) > 1
                or ColorInterp.palette in marks or "MINISWHITE" in self.placed.tags(ns="IMAGE_STRUCTURE")):  # fmt: skip
            raise ValueError("CIELAB, MINISWHITE, complex numbers, bands of several types and colour tables of more "
                             "than 8 bits are not supported: save it as grey or RGB")  # fmt: skip
        if self.kind == "JPEG" and (self.dtype != "uint8" or 4 * max(self.height, self.width) > 65_500):
            raise ValueError("its result is larger or deeper than a JPEG can be: save it as a .tif")
        # GDAL's transform of a .ppm is all zeros: no place
        self.transform = Affine.identity() if self.placed.transform.is_degenerate else self.placed.transform
        data = [i for i in source.indexes if marks[i - 1] != ALPHA]
        self.alpha = marks.index(ALPHA) + 1 if ALPHA in marks else None
        self.bands = args.bands or tuple(data[: 3 if len(data) >= 3 else 1])
        if not self.bands or not 1 <= min(self.bands) <= max(self.bands) <= source.count:
            raise ValueError(f"it has {source.count} band(s), of which --bands names others")
        self.count, dropped = len(self.bands), ", ".join(str(i) for i in data if i not in self.bands)
        self.left_out += [f"{pages - 1} further page(s)"] * (pages > 1) + [f"band(s) {dropped}"] * bool(dropped)
        rgb = self.count == 3 and (self.dtype == "uint8" or {marks[i - 1] for i in self.bands} == {*RGB})
        self.photometric, self.whole = "rgb" if rgb else "minisblack", np.issubdtype(self.dtype, np.integer)
        self.nodata = source.nodata if args.nodata is None else args.nodata  # what the result declares
        self.nodata = self.nodata if np.isfinite(self.nodata or 0) or not self.whole else None
        self.use_mask = MaskFlags.per_dataset in flags or (MaskFlags.nodata in flags and args.nodata is None)
        # whether a mask tells the result's holes, for want of a value, NaN or alpha that does
        self.masked = MaskFlags.per_dataset in flags and self.whole and not self.alpha
        self.zeros, self.kept = False, None  # whether 0 in all bands is a hole; what was kept, once it is written

    def open_picture(self, image: Image.Image):
        """An 8-bit picture, upright, as rasterio's dataset of 1 to 4 bands."""
        profile, turned = image.info.get("icc_profile"), image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if turned and self.placed and not self.placed.transform.is_identity:
            self.left_out.append("coordinates, since EXIF turns the picture")
        self.placed = None if turned else self.placed
        if image.mode == "CMYK":
            self.notes.append("CMYK is written as sRGB")
            if profile:
                srgb = ImageCms.createProfile("sRGB")
                image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
                profile = None
        elif image.mode == "P":
            self.notes.append("its colour table is written as colours")
            if self.placed and self.placed.nodata is not None:
                image.info["transparency"] = int(self.placed.nodata)
        self.icc = profile
        grey, alpha = image.mode in ("1", "L", "LA"), image.has_transparency_data
        image = ImageOps.exif_transpose(image).convert(("L" if grey else "RGB") + "A" * alpha)
        pixels = np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        self.memory = rasterio.MemoryFile()
        size = {"count": len(pixels), "height": image.height, "width": image.width, "dtype": "uint8"}
        with self.memory.open(driver="GTiff", **size, photometric="minisblack" if grey else "rgb") as target:
            if alpha:
                target.colorinterp = [*(GREY if grey else RGB), ALPHA]
            target.write(pixels)
        return self.memory.open()

    def fetch(self, window: Window | None = None, step: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Values (1 or 3, h, w) of a window, or of every step-th pixel; which are valid; the alpha band or None."""
        h, w = (window.height, window.width) if window else (-(-self.height // step), -(-self.width // step))
        source = self.source if step == 1 else self.full
        values = source.read(self.bands, window=window, out_shape=(self.count, h, w))
        valid = np.abs(values) < 1e38  # no NaN, no infinity, no end of a float type, which some programs write
        if self.use_mask:  # GDAL's, which an alpha band is too
            valid &= source.read_masks(self.bands, window=window, out_shape=values.shape) > 0
        if self.args.nodata is not None:
            valid &= values != self.args.nodata
        if self.zeros:
            valid &= values.any(0)
        return values, valid, source.read(self.alpha, window=window, out_shape=(h, w)) if self.alpha else None

    def look(self) -> None:
        """Looks at a million pixels spread over the scene, at full resolution: whether the alpha band is one, where
        holes are that nothing declares, and which values are black and white."""
        if self.scale:
            return
        values, valid, alpha = self.fetch(step=max(1, int((self.height * self.width / 1e6) ** 0.5)))
        if alpha is not None and not self.is_picture:
            if ((alpha > 0) & (alpha < np.iinfo(alpha.dtype).max)).mean() < 0.01:
                self.notes.append(f"band {self.alpha} is taken for alpha")
            else:  # near infrared, say: GDAL marks the fourth of four 8-bit bands so by itself
                self.left_out.append(f"band {self.alpha}, marked alpha, which has more values than 0 and the largest")
                self.alpha, self.use_mask, valid = None, False, np.ones_like(valid)
        empty = (~values.any(0)).mean()
        if empty > 0.01 and not self.use_mask and not self.is_picture and self.args.nodata is None:
            self.zeros, valid = True, valid & values.any(0)
            self.notes.append(f"{empty:.0%} of the pixels are 0 in all bands and stay so, as holes: --nodata 0 "
                              "declares them, --nodata nan takes them for values")  # fmt: skip
        if not valid.any():
            raise ValueError("it has no valid pixel")
        bits = self.source.tags(self.bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8)  # 15 is white of 4 bits
        low, high = np.percentile(values[valid].astype(np.float64), (2, 98)).tolist()
        low, high = (0.0, 2.0 ** int(bits) - 1) if self.dtype == "uint8" else (low, high)
        self.scale = self.args.scale or ((low, high) if high > low else (low - 0.5, low + 0.5))  # a flat image

    def rows(self, first: int, last: int) -> np.ndarray:
        """LR rows first to last - 1 as the networks see them: (3, rows, width), [0, 1] black to white, holes filled
        from their surroundings."""
        (low, high), (values, valid, _) = self.scale, self.fetch(Window(0, first, self.width, last - first))
        values = np.where(valid, values, 0).astype(np.result_type(self.dtype, np.float32))  # 32 bits: float64
        values = ((values - low) / (high - low)).astype(np.float32)
        if not valid.all():
            values = np.stack([rasterio.fill.fillnodata(*pair) for pair in zip(values, valid.astype(np.uint8))])
        return values if len(values) == 3 else values.repeat(3, axis=0)


# ------------------------------------------------------------------------------------------------ computing
class SharedLDM(orl.LDM):
    """An LDM that several threads call at once: the hidden maps that it keeps for a moment are each thread's own."""

    kept = threading.local()
    hidden = property(lambda self: self.kept.maps, lambda self, maps: setattr(self.kept, "maps", maps))


class SceneAgent:
    """An agent whose action at each step is the same for all tiles: its mean over those that it sees first."""

    def __init__(self, agent: orl.Agent):
        self.agent, self.edit_policy, self.actions = agent, agent.edit_policy, {}

    def policy(self, spatial_obs: torch.Tensor, scalar_obs: torch.Tensor) -> Normal:
        spent = scalar_obs[0, 1].item()  # NFE so far, which names the step
        if spent not in self.actions:
            self.actions[spent] = self.agent.policy(spatial_obs, scalar_obs).mean.mean(0, keepdim=True)
        return Normal(self.actions[spent].expand(len(spatial_obs)), 1.0)


def fade(length: int, overlap: int, first: bool, last: bool) -> torch.Tensor:
    """Weights (length,) of a tile: up over the overlap with the tile before, down over that with the next."""
    ramp = ((torch.arange(length) + 0.5) / overlap).clamp(max=1)
    return (torch.ones(length) if first else ramp) * (torch.ones(length) if last else ramp.flip(0))


def grid(length: int, stride: int) -> tuple[int, int]:
    """LR px of a scene's side -> tiles along it, of one size and as few as TILE allows, and px from one to the next."""
    side = max(32, -(-length // -(-length // (TILE - OVERLAP))) + OVERLAP)
    step = -(-side // stride) * stride - OVERLAP  # a tile's side is a multiple of the U-Net's stride
    return -(-length // step), step


class Upscaler:
    """LDM and agent for one scene. Each thread of `pool` computes tiles with one thread of PyTorch's own: on a CPU the
    order of sums, and with it the image, would otherwise depend on the number of threads."""

    def __init__(self, env: orl.DenoisingEnv, agent: orl.Agent, scene: Scene, seed: int, pool: ThreadPoolExecutor):
        self.env, self.agent, self.scene, self.seed, self.pool = env, SceneAgent(agent), scene, seed, pool
        self.num_rows, self.down = grid(scene.height, env.ldm.stride)
        self.num_columns, self.across = grid(scene.width, env.ldm.stride)
        tops = [max(0, 4 * (r * self.down - EDGE)) for r in range(self.num_rows)]
        self.tops = [*tops, 4 * scene.height]  # SR rows that rows of tiles begin with
        self.below = -1, None  # the last row of tiles that was computed, and what of it fades into the next

    def read(self, r: int, columns) -> torch.Tensor:
        """LR tiles of row r in some columns, reflected beyond the scene's border, and noise: (n, 3 + c, h, w)."""
        top, (h, w) = r * self.down - EDGE, (self.scene.height, self.scene.width)
        end, right = top + self.down + OVERLAP, self.num_columns * self.across + EDGE
        around = ((0, 0), (max(0, -top), max(0, end - h)), (EDGE, right - w))
        lr = np.pad(self.scene.rows(max(top, 0), min(end, h)), around, mode="symmetric")
        generators = [torch.Generator().manual_seed(self.seed * 10_000_019 + y + EDGE) for y in range(top, end)]
        noise = [torch.randn(self.env.ldm.latent_channels, right + EDGE, generator=g) for g in generators]  # a row each
        row = torch.cat([torch.from_numpy(lr), torch.stack(noise, dim=1)])
        return torch.stack([row[:, :, c * self.across : (c + 1) * self.across + OVERLAP] for c in columns])

    @torch.no_grad()
    def choose_strides(self) -> None:
        """Has the agent choose its strides by corners, 64 px, of up to six tiles spread over the scene."""
        count = self.num_rows * self.num_columns
        places = [divmod(i, self.num_columns) for i in sorted({k * count // 6 for k in range(6)})]
        tiles = torch.cat([self.read(r, [c]) for r, c in places])[..., :64, :64].to(self.env.ldm.device)
        self.env.denoise(tiles[:, :3].clamp(0, 1), tiles[:, 3:], self.agent)

    @torch.no_grad()
    def super_resolve(self, tiles: torch.Tensor) -> torch.Tensor:
        """What `read` gives -> SR (n, 3, 4h, 4w) on the CPU, not clipped."""
        lr, z_T = tiles.to(self.env.ldm.device).split([3, tiles.shape[1] - 3], dim=1)
        shown, downscale = lr.clamp(0, 1), self.env.sensor.downscale
        sr = self.env.super_resolve(shown, z_T.contiguous(), self.agent)[0]
        sr = sr + upscale(shown - downscale(sr))  # back-projected once more than in the tables
        beyond, light = lr - shown, torch.zeros_like(sr)  # darker than black, brighter than white: back-projected too
        for _ in range(6 if beyond.any() else 0):
            light = light + upscale(beyond - downscale(light))
        return (sr + light).cpu()

    def submit(self, r: int) -> list:
        """Has row r of tiles computed -> its future SR, batch by batch."""
        batches = self.read(r, range(self.num_columns)).split(16 if self.env.ldm.device.type == "cuda" else 1)
        return [self.pool.submit(self.super_resolve, batch) for batch in batches]

    def faded(self, r: int, tasks: list) -> torch.Tensor:
        """What `submit` gave of row r -> its SR, faded towards the rows above and below: (3, 4 tile, 4 width)."""
        h, w = 4 * (self.down + OVERLAP), 4 * (self.across + OVERLAP)
        total = torch.zeros(3, h, 4 * (self.num_columns * self.across + OVERLAP))
        for c, sr in enumerate(sr for _ in range(len(tasks)) for sr in tasks.pop(0).result()):  # no more are kept
            weights = fade(w, 4 * OVERLAP, c == 0, c == self.num_columns - 1)
            total[:, :, 4 * c * self.across :][:, :, :w] += sr * weights
        total *= fade(h, 4 * OVERLAP, r == 0, r == self.num_rows - 1).view(-1, 1)
        return total[:, :, 4 * EDGE : 4 * (EDGE + self.scene.width)]

    def strips(self, first: int, last: int):
        """Rows first to last - 1 of tiles -> what `encode` gives of their SR, piece by piece, without a gap. The next
        row is computed while one is written."""
        if not self.agent.actions and self.num_rows * self.num_columns > 1:
            self.pool.submit(self.choose_strides).result()
        start, tasks, coming = first - (first > 0 and self.below[0] != first - 1), [], []
        try:
            for r in range(start, last):
                tasks = coming or self.submit(r)
                coming = self.submit(r + 1) if r + 1 < last else []
                strip = self.faded(r, tasks)
                if r > 0 and self.below[0] == r - 1:
                    strip[:, : 4 * OVERLAP] += self.below[1]
                self.below = r, strip[:, -4 * OVERLAP :].clone()
                if r >= first:
                    strip = strip[:, max(0, 4 * (EDGE - r * self.down)) :]
                    for top in range(self.tops[r], self.tops[r + 1], WRITTEN):
                        piece = strip[:, top - self.tops[r] : min(top + WRITTEN, self.tops[r + 1]) - self.tops[r]]
                        yield encode(self.scene, top, piece)
                del strip  # it is large
        finally:
            for task in tasks + coming:
                task.cancel()


# ------------------------------------------------------------------------------------------------ writing
def encode(scene: Scene, top: int, sr: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """SR rows from `top` on (3, rows, width), [0, 1] from black to white -> (bands, rows, width) of the scene's type,
    with its alpha, and which are valid as 255. Where the scene has a hole, its own values stay."""
    (low, high), nodata, first = scene.scale, scene.nodata, top // 4
    values = (sr.mean(0, keepdim=True) if scene.count == 1 else sr).numpy()
    values = low + (high - low) * values.astype(np.result_type(scene.dtype, np.float32), copy=False)
    if scene.whole:
        values = values.round().clip(np.iinfo(scene.dtype).min, np.iinfo(scene.dtype).max)
    values = values.astype(scene.dtype)
    lr, valid, alpha = scene.fetch(Window(0, first, scene.width, -(-(top + sr.shape[1]) // 4) - first))
    cut = slice(top - 4 * first, top - 4 * first + sr.shape[1])
    lr, valid = (array.repeat(4, 1).repeat(4, 2)[:, cut] for array in (lr, valid))
    if nodata is not None and not np.isnan(nodata):  # no value is read as a hole
        step = -1 if scene.whole and nodata == np.iinfo(scene.dtype).max else 1
        values[values == nodata] += np.asarray(step).astype(scene.dtype)
    values = np.where(valid, values, lr)
    if alpha is not None:
        values = np.concatenate([values, alpha.repeat(4, 0).repeat(4, 1)[None, cut]])
    return values, valid[0] * np.uint8(255)


def describe(scene: Scene, target, made_by: str) -> list[str]:
    """Gives a GeoTIFF what made it, the scene's tags and its coordinates, four times as fine -> what is kept of the
    scene, in words."""
    placed, source, (points, system), rpcs = scene.placed, scene.source, scene.placed.gcps, scene.placed.rpcs
    place, kept = not scene.transform.is_identity, ["colour profile"] * bool(scene.icc)
    if scene.alpha:
        target.colorinterp = [*(GREY if scene.count == 1 else RGB), ALPHA]
    if scene.icc:
        target.update_tags(ns="COLOR_PROFILE", SOURCE_ICC_PROFILE=base64.b64encode(scene.icc).decode())
    if scene.kind == "GTiff":
        for space in (None, *placed.tag_namespaces()):
            if space not in OF_THE_FILE and not str(space).startswith("xml:"):
                tags = placed.tags(ns=space).items()
                target.update_tags(ns=space, **{k: v for k, v in tags if k != "AREA_OR_POINT"})
    elif placed.crs or points:
        scene.left_out.append("coordinate system or control points, for which a .tif has a place")
    target.update_tags(ns="ORL_LDM", MADE_BY=made_by)
    if scene.kind != "GTiff":
        target.update_tags(Comment=made_by)
        return kept + ["world file"] * place
    bands = [band - 1 for band in (*scene.bands, scene.alpha) if band]
    for k, band in enumerate(bands, 1):
        target.set_band_description(k, source.descriptions[band] or "")
        target.set_band_unit(k, source.units[band] or "")
        target.update_tags(k, **{k: v for k, v in source.tags(band + 1).items() if not k.startswith("STATISTICS_")})
    if (set(source.scales), set(source.offsets)) != ({1.0}, {0.0}):
        target.scales, target.offsets = ([values[band] for band in bands] for values in (source.scales, source.offsets))
        kept.append("scales and offsets")
    if place:
        target.transform = scene.transform @ Affine.scale(0.25)
        kept.append("coordinates" if placed.crs else "coordinates of no named system")
    if placed.crs:
        target.crs = placed.crs
    if points:
        for point in points:
            point.row, point.col = 4 * point.row, 4 * point.col
        target.gcps = (points, system)
        kept.append("control points")
    if rpcs:
        for axis in ("line", "samp"):  # a pixel's centre x becomes 4 x + 1.5
            setattr(rpcs, f"{axis}_off", 4 * getattr(rpcs, f"{axis}_off") + 1.5)
            setattr(rpcs, f"{axis}_scale", 4 * getattr(rpcs, f"{axis}_scale"))
        target.rpcs = rpcs
        kept.append("RPCs")
    return kept


def write_tiff(path: Path, scene: Scene, height: int, strips, made_by: str) -> None:
    """Writes strips of values and masks, one below the other, as a GeoTIFF, and reads them back, since GDAL may say
    nothing of a full disk. Nothing half-written has the name."""
    count, windows, sums, found, top, half = scene.count + bool(scene.alpha), [], [], [], 0, path.with_suffix(".half")
    profile = {"width": 4 * scene.width, "height": height, "count": count, "dtype": scene.dtype, "tiled": True,
               "photometric": scene.photometric, "nodata": scene.nodata, "compress": "deflate",
               "NUM_THREADS": "ALL_CPUS", "BIGTIFF": "IF_SAFER"}  # fmt: skip
    try:
        with rasterio.open(half, "w", driver="GTiff", **profile) as target:
            scene.kept = describe(scene, target, made_by)
            for values, mask in strips:
                windows.append(Window(0, top, *values.shape[:0:-1]))
                sums.append(hash((values.tobytes(), scene.masked and mask.tobytes())))
                top += values.shape[1]
                target.write(values, window=windows[-1])
                if scene.masked:  # every row: one that is not written is a hole
                    target.write_mask(mask, window=windows[-1])
    except rasterio.errors.RasterioError as error:
        if "Read" in str(error):  # of the scene
            raise
    with suppress(rasterio.errors.RasterioError), rasterio.open(half) as file:
        if scene.kind == "GTiff" and file.crs != scene.placed.crs:
            scene.left_out.append("coordinate system, which GDAL wrote as another one")
        for window in windows:
            mask = scene.masked and file.read_masks(1, window=window).tobytes()
            found.append(hash((file.read(window=window).tobytes(), mask)))
    if found != sums or top < height:
        half.unlink(missing_ok=True)
        need = count * height * 4 * scene.width * np.dtype(scene.dtype).itemsize / 1e6
        free = shutil.disk_usage(half.parent).free / 1e6
        raise OSError(f"{half.parent}: the disk is full, or no file may be as large: up to {need:.1f} MB are needed, "
                      f"{free:.1f} are free. With room, the same command goes on")  # fmt: skip
    os.replace(half, path)


def join(target: Path, scene: Scene, parts: list[Path], made_by: str) -> None:
    """Makes the result of its parts."""

    def strips():
        for part in parts:
            with rasterio.open(part) as file:
                for top in range(0, file.height, WRITTEN):
                    window = Window(0, top, file.width, min(WRITTEN, file.height - top))
                    yield file.read(window=window), file.read_masks(1, window=window)

    raw, half = parts[0], parts[0].with_name(f"half{target.suffix}")
    if len(parts) > 1 or scene.kept is None:  # made by another process, which knows what it kept
        raw = parts[0].with_name("whole.tif")
        write_tiff(raw, scene, 4 * scene.height, strips(), made_by)
    if scene.kind == "PNG":
        with rasterio.Env(GDAL_PAM_ENABLED=False):  # no .aux.xml
            rasterio.shutil.copy(raw, half, driver="PNG", WRITE_METADATA_AS_TEXT="YES")
    elif scene.kind == "JPEG":  # not GDAL's, which has colours at half the resolution
        with Image.open(raw) as image:
            image.save(half, format="JPEG", quality=95, subsampling=0, icc_profile=scene.icc, comment=made_by)
    if "world file" in scene.kept:  # of the centre of its upper left pixel
        place = target.with_suffix(".pgw" if scene.kind == "PNG" else ".jgw")
        place.write_text(dumpsw(scene.transform @ Affine.scale(0.25)), encoding="utf-8")
    os.replace(raw if scene.kind == "GTiff" else half, target)


# ------------------------------------------------------------------------------------------------ main
def image_files(root: Path) -> list[Path]:
    """The image files below a folder as the user sees them: links are followed, but for those that lead back up; what
    is hidden, or a part of an unfinished result, is left out."""
    known, files = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}, []
    for folder, names, inside in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        names[:] = [name for name in names if name[0] != "." and not name.endswith(".parts")
                    and Path(folder, name).resolve() not in (here, *here.parents)]  # fmt: skip
        files += [Path(folder, name) for name in inside if name[0] != "." and Path(name).suffix.lower() in known]
    return sorted(files)


def maker_of(path: Path) -> str:
    """The JSON of what made a result, or a part of one; empty where the file is neither."""
    text = ""
    with suppress(*ERRORS):
        if kind_of(path) == "GTiff":
            with rasterio.open(path) as file:
                text = file.tags(ns="ORL_LDM").get("MADE_BY", "")
        else:
            with Image.open(path) as image:
                text = image.info.get("Comment") or image.info.get("comment", b"").decode()
    return text if text.startswith(MADE_BY) else ""


def list_files(args: Args) -> list[tuple[Path, Path]]:
    """(image, its result without suffix) of all files and folders named; a folder's tree is mirrored, results of
    earlier calls are left out, and what would overwrite another file keeps its suffix in its name."""
    found, results = {}, {}
    for path in map(Path, args.paths):
        if path.is_file():
            found[path] = Path(args.output or path.parent) / f"{path.stem}_sr"
            continue
        inside = [file for file in image_files(path) if not (file.stem.endswith("_sr") and maker_of(file))]
        if not inside:
            own = " but results of this program" if image_files(path) else ""
            stop(f"{path}: {f'no image in this folder{own}' if path.is_dir() else 'no such file or folder'}")
        root = Path(args.output or path) / (path.name if args.output and len(args.paths) > 1 else "")
        found |= {file: root / file.relative_to(path).parent / f"{file.stem}_sr" for file in inside}
    kinds = {file: kind_of(file) for file in found}
    count = Counter((name, kinds[file]) for file in found for name in (found[file], file.with_suffix("")))
    for file, target in found.items():
        if count[target, kinds[file]] > 1:  # as another result, or an input
            found[file] = target = target.with_name(f"{file.stem}_{file.suffix[1:]}_sr")
        if (other := results.setdefault((target, kinds[file]), file)) != file:
            stop(f"{other} and {file} would both become {target}.*; super-resolve them into two --output")
    return list(found.items())


def super_resolve_file(args: Args, file: Path, target: Path, env, agent, pool, began: float) -> str:
    """Makes one result, or what other processes leave of it -> the line that says so."""
    start, scene = time.perf_counter(), Scene(file, args)
    upscaler = Upscaler(env, agent, scene, args.seed, pool)
    own = file.suffix.lower() in SUFFIXES[scene.kind]
    target = target.with_name(target.name + (file.suffix if own else SUFFIXES[scene.kind][0]))
    folder = target.with_name(target.name + ".parts")
    with open(file, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    settings = {"version": orl.VERSION, "bytes": file.stat().st_size, "sha256": sha256, "bands": scene.bands,
                "transform": scene.transform[:6], "scale": args.scale, "nodata": args.nodata, "seed": args.seed,
                "agent": orl.digest({}, agent), "ldm": env.ldm.fingerprint, "max_nfe": env.max_nfe,
                "timesteps": env.timesteps.tolist(), "sensor": str(env.sensor)}  # fmt: skip
    each, rows = max(1, args.window // upscaler.down), upscaler.num_rows
    groups = [(first, min(first + each, rows)) for first in range(0, rows, each)]
    parts = [folder / f"{k:05d}.tif" for k in range(len(groups))]
    made_by = {part: MADE_BY + json.dumps(settings | {"rows": group})[1:] for part, group in zip(parts, groups)}
    made_by[target] = MADE_BY + json.dumps(settings | {"rows": (0, rows)})[1:]

    def finished(path: Path) -> bool:
        known = path.is_file() and maker_of(path) == made_by[path]
        return known and not (args.overwrite and path.stat().st_mtime < began)

    if finished(target):
        return f"{target}: finished before, kept; --overwrite does it again"
    if target.exists() and not (args.overwrite or maker_of(target)):
        raise ValueError(f"{target} is there, but this program did not make it; --overwrite replaces it")
    left, k = [k for k, part in enumerate(parts) if not finished(part)], -1
    with tqdm(total=len(left), desc=file.name, unit="part", disable=None, leave=False, delay=3) as bar:
        while left:
            k = k + 1 if k + 1 in left else left[len(left) // 2]  # the middle is far from where other processes are
            left.remove(k)
            with suppress(filelock.Timeout), filelock.FileLock(folder / f"{k}.lock", blocking=False):
                if not finished(parts[k]) and not finished(target):
                    scene.look()
                    height = upscaler.tops[groups[k][1]] - upscaler.tops[groups[k][0]]
                    write_tiff(parts[k], scene, height, upscaler.strips(*groups[k]), made_by[parts[k]])
            bar.update()
    with suppress(filelock.Timeout), filelock.FileLock(folder / "join.lock", blocking=False):
        if mine := all(map(finished, parts)):
            scene.look()
            join(target, scene, parts, made_by[target])
        if done := finished(target):
            shutil.rmtree(folder, ignore_errors=True)
        if not mine:
            return f"{target}: {'made by another process' if done else 'other processes are at work on the rest of it'}"
        (low, high), notes = scene.scale, scene.notes
        notes = [f"{scene.dtype}, black {low:g}, white {high:g}, sensor: {env.sensor}", *notes]
        notes += [f"kept: {', '.join(scene.kept)}"] if scene.kept else []
        notes += [f"left out: {', '.join(dict.fromkeys(scene.left_out))}"] if scene.left_out else []
        notes += [] if own or file.suffix.lower() == ".tiff" else [f"{file.suffix} is written as {target.suffix}"]
        size = f"{scene.width} x {scene.height} -> {4 * scene.width} x {4 * scene.height} px"
        return f"{target}: {size} in {time.perf_counter() - start:.1f} s; {'; '.join(notes)}"
    return f"{target}: another process joins its parts"


def main(args: Args) -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    orl.check_bounds(args, window=(1, np.inf))
    if not args.paths or (args.scale and not 0 < abs(args.scale[1] - args.scale[0]) < np.inf):
        stop("name LR images or folders; --scale takes two different numbers, the values of black and white")
    files, began, failed = list_files(args), time.time(), 0  # bad input speaks before anything is loaded
    device, threads = orl.pick_device(args.device), torch.get_num_threads()
    if device.type == "cuda":
        rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        device = torch.device("cuda", rank % torch.cuda.device_count())
    saved = orl.load_run(orl.locate(args.agent))
    sensor = orl.sensor_of(saved["args"])
    print(f"agent: {args.agent}, for LR images by this sensor: {sensor}")
    ldm = orl.load_ldm(args.ldm or saved["args"]["ldm"], device)
    agent = orl.load_agent(saved, ldm)
    ldm = SharedLDM(ldm.unet, ldm.vqvae, ldm.scheduler, device)
    env = orl.DenoisingEnv(ldm, saved["args"]["base_steps"], saved["args"]["max_nfe"], sensor)

    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pool = ThreadPoolExecutor(1 if device.type == "cuda" else threads, initializer=torch.set_num_threads, initargs=(1,))
    # no mask in a file of its own, whatever the user has set; bytes of blocks that are not decoded for each row again
    gdal = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True, GDAL_CACHEMAX=256_000_000)
    try:
        torch.set_num_threads(1)
        with pool, gdal:
            for file, target in files:
                try:
                    print(super_resolve_file(args, file, target, env, agent, pool, began))
                except ERRORS as error:
                    failed += 1
                    print(f"{file}: skipped ({' '.join(str(error).split()) or type(error).__name__})")
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on where it was; what is finished is kept")
        sys.exit(130)
    finally:
        torch.set_num_threads(threads)
    if failed:
        print(f"{failed} of {len(files)} file(s) could not be super-resolved")
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
