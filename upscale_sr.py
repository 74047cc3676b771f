"""Super-resolves your own images 4x with the LDM and an agent that `ppo_ldm_sr.py` trained.

    python upscale_sr.py photo.png scene.tif folder/ --output out         # NAME_sr.png, NAME_sr.tif, out/**/NAME_sr.*
    torchrun --nproc-per-node 4 upscale_sr.py scene.tif --output out      # four processes share the work

A scene is computed by rows of tiles, so that memory does not grow with its height. Processes with the same command
share the work, and the same command goes on where a killed one was. No value depends on --window, processes or threads.
A result carries what made it, and is made again where input, settings, agent, LDM or version are others. 8 bits are
shown as they are; of all else, black and white are --scale or the scene's 2nd and 98th percentile, for all bands alike.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import rasterio
import rasterio.fill
import rasterio.shutil
import torch
import tyro
from affine import Affine
from PIL import Image, ImageOps
from rasterio._err import CPLE_BaseError  # GDAL's own errors, which rasterio.errors does not name
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window
from torch.distributions import Normal
from tqdm import tqdm

import ppo_ldm_sr as orl

TILE = 144  # LR px of a tile's side at most
OVERLAP = 8  # LR px that neighbouring tiles share and fade across
EDGE = OVERLAP // 2
WRITTEN = 128  # SR rows that are turned into the scene's type and written at once
DEPTHS = {"PNG": ("uint8", "uint16"), "JPEG": ("uint8",)}  # types of what is written as PNG or JPEG again
SUFFIX = {"PNG": ".png", "JPEG": ".jpg", "GTiff": ".tif"}  # of the results
OF_THE_FILE = {"IMAGE_STRUCTURE", "SUBDATASETS", "DERIVED_SUBDATASETS", "COLOR_PROFILE", "RPC"}  # tags not to copy
RGB, ALPHA = {ColorInterp.red, ColorInterp.green, ColorInterp.blue}, ColorInterp.alpha
# what bad files and full disks raise; SyntaxError: Pillow for a broken PNG; RuntimeError: PyTorch out of memory
ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, RuntimeError, rasterio.errors.RasterioError,
          CPLE_BaseError)  # fmt: skip
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
class Scene:
    """An LR image, read by rows, of 1 or 3 bands. Raises one of ERRORS where it cannot be read as what it is."""

    def __init__(self, file: Path, args: Args):
        self.args, self.scale, self.zeros, self.notes = args, None, False, []
        self.placed = placed = rasterio.open(file)  # with coordinates and tags
        self.transform = Affine.identity() if placed.transform.is_degenerate else placed.transform  # a .ppm's is zeros
        place = bool(placed.crs or placed.gcps[0] or placed.rpcs or not self.transform.is_identity)
        self.picture = self.open_picture(file, place)
        self.source = source = self.picture or placed
        self.pixels = self.picture or rasterio.open(file, OVERVIEW_LEVEL="NONE")  # no overview stands in for them
        marks, structure = source.colorinterp, placed.tags(ns="IMAGE_STRUCTURE")
        if (source.subdatasets or len(set(source.dtypes)) != 1 or source.dtypes[0].startswith("complex")
                or "MINISWHITE" in structure or structure.get("SOURCE_COLOR_SPACE") in ("CIELAB", "CMYK")
                or {ColorInterp.palette, ColorInterp.cyan} & set(marks)):  # fmt: skip
            raise ValueError("several pages, CMYK, CIELAB, MINISWHITE, complex numbers, bands of several types and "
                             "colour tables of a .tif are not supported: save it as grey or RGB")  # fmt: skip
        self.height, self.width, self.dtype = source.height, source.width, source.dtypes[0]
        data = [i for i in source.indexes if marks[i - 1] != ALPHA]
        self.alpha = marks.index(ALPHA) + 1 if ALPHA in marks else None
        self.bands = args.bands or tuple(data[: 3 if len(data) >= 3 else 1])
        if not self.bands or not set(self.bands) <= set(source.indexes):
            raise ValueError(f"it has {source.count} band(s), of which --bands names others")
        self.count, dropped = len(self.bands), [str(i) for i in data if i not in self.bands]
        self.notes += [f"left out: band(s) {', '.join(dropped)}"] if dropped else []
        rgb = self.count == 3 and (self.dtype == "uint8" or {marks[i - 1] for i in self.bands} == RGB)
        self.photometric, self.whole = "rgb" if rgb else "minisblack", np.issubdtype(self.dtype, np.integer)
        self.nodata = source.nodata if args.nodata is None else args.nodata  # what the result declares
        self.nodata = self.nodata if np.isfinite(self.nodata or 0) or not self.whole else None
        flags = source.mask_flag_enums[0]
        self.use_mask = MaskFlags.per_dataset in flags or (MaskFlags.nodata in flags and args.nodata is None)
        self.masked = MaskFlags.per_dataset in flags and not self.alpha
        small = 4 * max(self.height, self.width) <= 65_500  # as a JPEG can be
        same = small and not (place or self.masked) and self.dtype in DEPTHS.get(placed.driver, ())
        self.kind = placed.driver if same else "GTiff"  # the only one that has room for coordinates and masks

    def open_picture(self, file: Path, place: bool):
        """A picture of 8 bits as rasterio's dataset of 1 to 4 bands; None where rasterio reads the file by rows."""
        if self.placed.driver not in ("PNG", "JPEG", "GIF", "WEBP", "BMP") or self.placed.dtypes[0] != "uint8":
            return None
        if self.placed.driver == "JPEG" and self.placed.mask_flag_enums[0] != [MaskFlags.all_valid]:
            return None  # Pillow sees neither its mask nor the nodata of its .aux.xml
        image = Image.open(file)
        grey, profile = image.mode in ("1", "L", "LA"), image.info.get("icc_profile")
        if (frames := getattr(image, "n_frames", 1)) > 1:
            self.notes.append(f"left out: {frames - 1} further page(s)")
        if not place:  # else its coordinates are those of the picture as it lies
            image = ImageOps.exif_transpose(image)
        self.memory = rasterio.MemoryFile()
        mode = ("L" if grey else "RGB") + "A" * image.has_transparency_data
        image.convert(mode).save(self.memory, "TIFF", icc_profile=profile)
        return self.memory.open()

    def fetch(self, window: Window | None = None, step: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Values (1 or 3, h, w) of a window, or of every step-th pixel; which are valid; the alpha band or None."""
        h, w = (window.height, window.width) if window else (-(-self.height // step), -(-self.width // step))
        values = self.pixels.read(self.bands, window=window, out_shape=(self.count, h, w))
        valid = np.abs(values) < 1e38  # no NaN, no infinity, no end of a float type, which some programs write
        if self.use_mask:  # GDAL's, which an alpha band is too
            valid &= self.pixels.read_masks(self.bands, window=window, out_shape=values.shape) > 0
        if self.args.nodata is not None:
            valid &= values != self.args.nodata
        if self.zeros:
            valid &= values.any(0)
        return values, valid, self.pixels.read(self.alpha, window=window, out_shape=(h, w)) if self.alpha else None

    def look(self) -> None:
        """Looks at a million pixels spread over the scene, at full resolution: whether the alpha band is one, where
        holes are that nothing declares, and which values are black and white."""
        values, valid, alpha = self.fetch(step=max(1, int((self.height * self.width / 1e6) ** 0.5)))
        if alpha is not None and self.placed.driver != "PNG":
            if ((alpha > 0) & (alpha < alpha.max())).mean() < 0.01:
                self.notes.append(f"band {self.alpha} is taken for alpha")
            else:  # near infrared, say: GDAL marks the fourth of four 8-bit bands so by itself
                if self.alpha not in self.bands:
                    self.notes.append(f"left out: band {self.alpha}, marked alpha, but of more than two values")
                self.alpha, flags = None, self.source.mask_flag_enums[0]
                if MaskFlags.alpha in flags:
                    self.use_mask, valid = False, np.ones_like(valid)
                self.masked = self.use_mask and MaskFlags.per_dataset in flags
        empty = (~values.any(0)).mean()
        if empty > 0.01 and not self.use_mask and not self.picture and self.args.nodata is None:
            self.zeros, valid = True, valid & values.any(0)
            self.notes.append(f"{empty:.0%} of the pixels are 0 in all bands and stay so, as holes: --nodata 0 "
                              "declares them, --nodata nan takes them for values")  # fmt: skip
        if not valid.any():
            raise ValueError("it has no valid pixel")
        bits = self.source.tags(self.bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8)  # 15 is white of 4 bits
        low, high = np.percentile(values[valid].astype(np.float64), (2, 98)).tolist()
        low, high = (0.0, 2.0 ** int(bits) - 1) if self.dtype == "uint8" else (low, high)
        self.scale = self.args.scale or ((low, high) if high > low else (low - 0.5, low + 0.5))  # a flat image
        self.notes.insert(0, "{}, black {:g}, white {:g}".format(self.dtype, *self.scale))

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
    """LDM and agent for one scene, and the agent that the environment asks: strides are the same for all tiles. Each
    thread of `pool` computes tiles with one thread of PyTorch's own, on whose number the order of sums depends."""

    def __init__(self, env: orl.DenoisingEnv, agent: orl.Agent, scene: Scene, seed: int, pool: ThreadPoolExecutor):
        self.env, self.agent, self.scene, self.seed, self.pool = env, agent, scene, seed, pool
        self.edit_policy, self.actions = agent.edit_policy, {}  # the stride's action at each step
        self.num_rows, self.down = grid(scene.height, env.ldm.stride)
        self.num_columns, self.across = grid(scene.width, env.ldm.stride)
        tops = [max(0, 4 * (r * self.down - EDGE)) for r in range(self.num_rows)]
        self.tops = [*tops, 4 * scene.height]  # SR rows that rows of tiles begin with
        self.below = -1, None  # the last row of tiles that was computed, and what of it fades into the next

    def policy(self, spatial_obs: torch.Tensor, scalar_obs: torch.Tensor) -> Normal:
        """The agent's mean over the tiles that it sees first, for them and all others: (n,)."""
        spent = scalar_obs[0, 1].item()  # NFE so far, which names the step
        if spent not in self.actions:
            self.actions[spent] = self.agent.policy(spatial_obs, scalar_obs).mean.mean(0, keepdim=True)
        return Normal(self.actions[spent].expand(len(spatial_obs)), 1.0)

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
        self.env.denoise(tiles[:, :3].clamp(0, 1), tiles[:, 3:], self)

    @torch.no_grad()
    def super_resolve(self, tiles: torch.Tensor) -> torch.Tensor:
        """What `read` gives -> SR (n, 3, 4h, 4w) on the CPU, not clipped."""
        lr, z_T = tiles.to(self.env.ldm.device).split([3, tiles.shape[1] - 3], dim=1)
        shown, downscale = lr.clamp(0, 1), self.env.sensor.downscale
        sr = self.env.super_resolve(shown, z_T.contiguous(), self)[0]
        sr = sr + orl.upscale(shown - downscale(sr))  # back-projected once more than in the tables
        beyond, light = lr - shown, torch.zeros_like(sr)  # darker than black, brighter than white: back-projected too
        for _ in range(6 if beyond.any() else 0):
            light = light + orl.upscale(beyond - downscale(light))
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
        if not self.actions and self.num_rows * self.num_columns > 1:
            self.pool.submit(self.choose_strides).result()
        start, coming = first - (first > 0 and self.below[0] != first - 1), []
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

# ------------------------------------------------------------------------------------------------ writing
def encode(scene: Scene, top: int, sr: torch.Tensor) -> np.ndarray:
    """SR rows from `top` on (3, rows, width), [0, 1] from black to white -> (bands, rows, width) of the scene's type,
    with its alpha, or its mask as 0 and 1. Where the scene has a hole, its own values stay."""
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
    if scene.alpha:
        return np.concatenate([values, alpha.repeat(4, 0).repeat(4, 1)[None, cut]])
    return np.concatenate([values, valid[:1].astype(scene.dtype)]) if scene.masked else values

def place_of(scene: Scene) -> dict:
    """The scene's coordinates, control points and RPCs, four times as fine, as rasterio.open takes them."""
    (points, system), rpcs, moved = scene.placed.gcps, scene.placed.rpcs, not scene.transform.is_identity
    for point in points:
        point.row, point.col = 4 * point.row, 4 * point.col
    for axis in ("line", "samp") if rpcs else ():  # a pixel's centre x becomes 4 x + 1.5
        setattr(rpcs, f"{axis}_off", 4 * getattr(rpcs, f"{axis}_off") + 1.5)
        setattr(rpcs, f"{axis}_scale", 4 * getattr(rpcs, f"{axis}_scale"))
    transform = scene.transform @ Affine.scale(0.25) if moved else None
    return {"crs": scene.placed.crs or system, "transform": transform, "gcps": points, "rpcs": rpcs}

def copy_tags(scene: Scene, target) -> None:
    """Gives a result the colour profile of the scene and, if it is a GeoTIFF, the tags of the scene and its bands."""
    target.update_tags(ns="COLOR_PROFILE", **scene.source.tags(ns="COLOR_PROFILE"))
    if scene.kind != "GTiff":
        return
    source, bands = scene.source, [band for band in (*scene.bands, scene.alpha) if band]
    for space in {None, *scene.placed.tag_namespaces()} - OF_THE_FILE:
        if not str(space).startswith("xml:"):
            tags = scene.placed.tags(ns=space).items()
            target.update_tags(ns=space, **{k: v for k, v in tags if k != "AREA_OR_POINT"})
    for name in ("descriptions", "units", "scales", "offsets"):
        setattr(target, name, [getattr(source, name)[band - 1] for band in bands])
    for k, band in enumerate(bands, 1):
        target.update_tags(k, **{k: v for k, v in source.tags(band).items() if not k.startswith("STATISTICS_")})

def disk_full(scene: Scene, folder: Path) -> OSError:
    """What is said where a file could not be written whole."""
    need = 2 * 16 * scene.width * scene.height * scene.count * np.dtype(scene.dtype).itemsize / 1e6  # with the parts
    return OSError(f"{folder}: the disk is full, or no file may be as large: up to {need:.1f} MB are needed. "
                   "With room, the same command goes on")  # fmt: skip

def strips_of(scene: Scene, path: Path):
    """What `encode` gave of a part or a result, from top to bottom."""
    with rasterio.open(path) as file:
        for top in range(0, file.height, WRITTEN):
            window = Window(0, top, file.width, min(WRITTEN, file.height - top))
            mask = file.read_masks([1], window=window) > 0
            yield np.concatenate([file.read(window=window), mask[: scene.masked]])

def write_tiff(path: Path, scene: Scene, height: int, strips, made_by: str = "") -> None:
    """Writes strips of `encode` as a part, or with `made_by` as a result, and reads them back, since GDAL may say
    nothing of a full disk. Nothing half-written has the name."""
    half, top, written, found = path.with_suffix(".half"), 0, 0, 0
    profile = {"width": 4 * scene.width, "height": height, "count": scene.count + bool(scene.alpha), "tiled": True,
               "dtype": scene.dtype, "photometric": scene.photometric, "ALPHA": "YES" if scene.alpha else "NO",
               "nodata": scene.nodata, "compress": "deflate", "NUM_THREADS": "ALL_CPUS",
               "BIGTIFF": "IF_SAFER"} | (place_of(scene) if made_by else {})  # fmt: skip
    with rasterio.open(half, "w", driver="GTiff", **profile) as target:
        if made_by:
            copy_tags(scene, target)
            target.update_tags(ORL_LDM=made_by)
        for values in strips:
            window = Window(0, top, target.width, values.shape[1])
            top += values.shape[1]
            written = zlib.crc32(values.swapaxes(0, 1).tobytes(), written)
            try:
                target.write(values[: target.count], window=window)
                if scene.masked:  # every row: one that is not written is a hole
                    target.write_mask(values[-1] > 0, window=window)
            except rasterio.errors.RasterioError:
                break  # it is missing below
    with suppress(rasterio.errors.RasterioError):
        for values in strips_of(scene, half):
            found = zlib.crc32(values.swapaxes(0, 1).tobytes(), found)
    if found != written:
        half.unlink()
        raise disk_full(scene, path.parent)
    os.replace(half, path)

def join(path: Path, scene: Scene, parts: list[Path], made_by: str) -> None:
    """Makes the result of its parts."""
    raw, half, whole = parts[0].with_name("whole.tif"), parts[0].with_name(f"half{path.suffix}"), True
    strips = (values for part in parts for values in strips_of(scene, part))
    write_tiff(raw, scene, 4 * scene.height, strips, made_by)
    with rasterio.open(raw) as file:
        if file.crs != scene.placed.crs:
            scene.notes.append("left out: coordinate system, which GDAL wrote as another one")
    try:
        if scene.kind == "PNG":
            rasterio.shutil.copy(raw, half, driver="PNG", WRITE_METADATA_AS_TEXT="YES")
            whole = all(np.array_equal(*pair) for pair in zip(strips_of(scene, raw), strips_of(scene, half)))
        elif scene.kind == "JPEG":  # not GDAL's, which has colours at half the resolution
            with Image.open(raw) as image:
                icc = image.info.get("icc_profile")
                image.save(half, format="JPEG", quality=95, subsampling=0, icc_profile=icc, comment=made_by)
    except (OSError, rasterio.errors.RasterioError, CPLE_BaseError):
        whole = False
    if not whole:
        raise disk_full(scene, path.parent)
    os.replace(raw if scene.kind == "GTiff" else half, path)

# ------------------------------------------------------------------------------------------------ main
def image_files(root: Path) -> list[Path]:
    """The image files below a folder, but for hidden ones and parts of results; links are followed, but none back."""
    known, files = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}, []
    for folder, names, inside in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        names[:] = [name for name in names if name[0] != "." and not name.endswith(".parts")
                    and Path(folder, name).resolve() not in (here, *here.parents)]  # fmt: skip
        files += [Path(folder, name) for name in inside if name[0] != "." and Path(name).suffix.lower() in known]
    return sorted(files)

def maker_of(path: Path) -> str:
    """The JSON of what made a result; empty where this program did not make the file."""
    with suppress(rasterio.errors.RasterioError), rasterio.open(path) as file:
        text = file.tags().get("ORL_LDM") or file.tags().get("COMMENT", "")  # the latter of a JPEG
        return text if '"made_by": "upscale_sr.py' in text else ""
    return ""

def list_files(args: Args) -> list[tuple[Path, Path]]:
    """(image, its result without suffix) of all files and folders named; a folder's tree is mirrored, results of
    earlier calls are left out, and what has another file's name keeps its suffix in its own."""
    found = {}
    for path in map(Path, args.paths):
        if path.is_file():
            found[path] = Path(args.output or path.parent) / f"{path.stem}_sr"
            continue
        inside = [file for file in image_files(path) if not (file.stem.endswith("_sr") and maker_of(file))]
        if not inside:
            empty = "no image in this folder, beside results of this program"
            orl.stop(f"{path}: {empty if path.is_dir() else 'no such file or folder'}")
        root = Path(args.output or path) / (path.name if args.output and len(args.paths) > 1 else "")
        found |= {file: root / file.relative_to(path).parent / f"{file.stem}_sr" for file in inside}
    names = Counter([*found.values(), *(file.with_suffix("") for file in found)])  # of results and inputs
    results = {}
    for file, target in found.items():
        if names[target] > 1:
            target = target.with_name(f"{file.stem}_{file.suffix[1:]}_sr")
        if target in results:
            orl.stop(f"{results[target]} and {file} would both become {target}.*; super-resolve them into two --output")
        results[target] = file
    return [(file, target) for target, file in results.items()]

def super_resolve_file(args: Args, file: Path, target: Path, env, agent, pool, began: float) -> str:
    """Makes one result, or what other processes leave of it -> the line that says so."""
    start, scene = time.perf_counter(), Scene(file, args)
    target = target.with_name(target.name + SUFFIX[scene.kind])
    with open(file, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    made_by = json.dumps({
        "made_by": "upscale_sr.py of ORL-LDM", "version": orl.VERSION, "bytes": file.stat().st_size, "sha256": sha256,
        "bands": scene.bands, "transform": scene.transform[:6], "scale": args.scale, "nodata": args.nodata,
        "seed": args.seed, "agent": orl.digest({}, agent), "ldm": env.ldm.fingerprint, "max_nfe": env.max_nfe,
        "timesteps": env.timesteps.tolist(), "sensor": str(env.sensor),
    })  # fmt: skip

    def finished() -> bool:
        known = target.is_file() and maker_of(target) == made_by
        return known and not (args.overwrite and target.stat().st_mtime < began)

    if finished():
        return f"{target}: finished before, kept; --overwrite does it again"
    if target.exists() and not (args.overwrite or maker_of(target)):
        raise ValueError(f"{target} is there, but this program did not make it; --overwrite replaces it")
    scene.look()
    upscaler = Upscaler(env, agent, scene, args.seed, pool)
    folder, name = target.with_name(target.name + ".parts"), hashlib.sha256(made_by.encode()).hexdigest()[:12]
    each, rows = max(1, args.window // upscaler.down), upscaler.num_rows
    groups = [(first, min(first + each, rows)) for first in range(0, rows, each)]
    parts = [folder / f"{first:05d}-{last:05d}_{name}.tif" for first, last in groups]  # of these settings alone
    left, k = [k for k, part in enumerate(parts) if not part.exists()], -1
    with tqdm(total=len(left), desc=file.name, unit="part", disable=None, leave=False, delay=3) as bar:
        while left:
            k = k + 1 if k + 1 in left else left[len(left) // 2]  # the middle is far from where other processes are
            left.remove(k)
            with suppress(filelock.Timeout), filelock.FileLock(parts[k].with_suffix(".lock"), blocking=False):
                if not parts[k].exists() and not finished():
                    first, last = groups[k]
                    height = upscaler.tops[last] - upscaler.tops[first]
                    write_tiff(parts[k], scene, height, upscaler.strips(first, last))
            bar.update()
    made = f"{target}: other processes are at work on the rest of it"
    with suppress(filelock.Timeout), filelock.FileLock(folder / "join.lock", blocking=False):
        if finished():
            made = f"{target}: made by another process"
        elif all(part.exists() for part in parts):
            join(target, scene, parts, made_by)
            size = f"{scene.width} x {scene.height} -> {4 * scene.width} x {4 * scene.height} px"
            made = f"{target}: {size} in {time.perf_counter() - start:.1f} s; {'; '.join(scene.notes)}"
        if finished():
            shutil.rmtree(folder, ignore_errors=True)
    return made

def main(args: Args) -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    orl.check_bounds(replace(args, nodata=None), window=(1, np.inf))  # any number may be a hole
    if not args.paths:
        orl.stop("name LR images or folders")
    if args.output and (Path(args.output).is_file() or Path(args.output).suffix in SUFFIX.values()):
        orl.stop(f"--output {args.output} is a file's name; name a folder, in which the results are NAME_sr.*")
    if args.scale and not 0 < abs(args.scale[1] - args.scale[0]) < np.inf:
        orl.stop("--scale takes two different numbers, the values of black and white")
    files, began, failed = list_files(args), time.time(), 0  # bad input speaks before anything is loaded
    device, threads = orl.pick_device(args.device), torch.get_num_threads()
    if device.type == "cuda":
        rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        device = torch.device("cuda", rank % torch.cuda.device_count())
    saved = orl.load_run(orl.locate(args.agent))
    sensor = orl.Sensor(saved["args"]["mtf"], saved["args"]["lr_noise"])
    print(f"agent: {args.agent}, for LR images by this sensor: {sensor}")
    ldm = orl.load_ldm(args.ldm or saved["args"]["ldm"], device)
    agent = orl.load_agent(saved, ldm)
    env = orl.DenoisingEnv(ldm, saved["args"]["base_steps"], saved["args"]["max_nfe"], sensor)
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pool = ThreadPoolExecutor(1 if device.type == "cuda" else threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        torch.set_num_threads(1)
        # no mask in a file of its own; bytes of blocks that are not decoded again for each row
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True, GDAL_CACHEMAX=256_000_000):
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
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    if failed:
        print(f"{failed} of {len(files)} file(s) could not be super-resolved")
        sys.exit(1)

if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
