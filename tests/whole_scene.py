"""A scene as large as a Sentinel-2 tile: started, killed in the middle of a window, resumed, and its first hundred
windows compared with untiled cuts of the same place.

    python tests/whole_scene.py --output scene --dataset data/paper8      # 6 minutes and 1 GB of disk

The scene is a mosaic of test images (three 12-bit bands in 16, with coordinates), read as an LR image. A window is a
tile of 128 x 128 LR px beside its overlap. An untiled cut has two by ten of them in one call of each network, whose
normalisation then sees other surroundings: the two agree in what they show, not in every value. The pieces of a mosaic
have nothing in common, real images have: each test image, tiled, is compared with itself in one piece too.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import rasterio
import torch
import tyro
from rasterio.transform import from_origin
from rasterio.windows import Window

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import peers  # noqa: E402

import eval_sr  # noqa: E402
import ppo_ldm_sr as orl  # noqa: E402
import upscale_sr as up  # noqa: E402

CUTS, ROWS, COLUMNS, BLACK, WHITE = 5, 2, 10, 0.0, 4095.0  # a hundred windows


@dataclass
class Args:
    output: str  # folder to write to
    dataset: str = "data/paper8"  # images of the mosaic
    agent: str = "runs/orl_ldm"  # run folder of the agent
    size: int = 10_980  # px of a side, at least 6,400: a Sentinel-2 tile's at 10 m
    seed: int = 0  # of the mosaic


def make_scene(args: Args, file: Path) -> None:
    """A mosaic of 128 px pieces of test images, turned and flipped, written row by row of pieces."""
    images = orl.load_images(args.dataset, "test", (), 128, torch.device("cpu"))
    rng, count = np.random.default_rng(args.seed), -(-args.size // 128)
    pieces = [images.centre(i, 1, 128).numpy() for i in range(len(images.files))]
    profile = {"driver": "GTiff", "width": args.size, "height": args.size, "count": 3, "dtype": "uint16", "tiled": True}
    place = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 10, 10)}
    with rasterio.open(file, "w", **profile, **place) as target:
        for top in range(0, args.size, 128):
            turned = [np.rot90(pieces[rng.integers(len(pieces))], rng.integers(4), (1, 2)) for _ in range(count)]
            strip = np.concatenate(turned, axis=2)[:, : args.size - top, : args.size]
            target.write((WHITE * strip).round().astype(np.uint16), window=Window(0, top, args.size, strip.shape[1]))


def start(args: Args, file: Path) -> subprocess.Popen:
    flags = ["--output", args.output, "--agent", args.agent, "--scale", BLACK, WHITE, "--window", up.TILE - up.OVERLAP]
    return subprocess.Popen([sys.executable, up.__file__, str(file), *map(str, flags)])


def wait_for(process: subprocess.Popen, file: Path) -> tuple[float, float]:
    """Until `file` is there -> seconds since the epoch, peak memory of the process in GB."""
    while not file.is_file():
        if process.poll() is not None:
            sys.exit(f"upscale_sr.py ended with code {process.returncode} before it wrote {file}")
        time.sleep(0.2)
    status = Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1]
    return time.time(), int(status.split()[0]) / 2**20


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def untiled(upscaler: up.Upscaler, first: int) -> torch.Tensor:
    """SR (3, H, W) of ROWS by COLUMNS tiles from column `first` on, with the overlap around them, in one piece."""
    step, side = upscaler.step, upscaler.tile
    rows = {r: upscaler.tile_row(r) for r in range(ROWS)}
    size = ROWS * step + up.OVERLAP, COLUMNS * step + up.OVERLAP
    lr, z = torch.zeros(1, 3, *size), torch.zeros(1, upscaler.mdp.ldm.latent_channels, *size)
    for r in range(ROWS):
        for c in range(COLUMNS):  # where tiles overlap, they have the same noise
            at = slice(r * step, r * step + side), slice(c * step, c * step + side)
            tile_lr, tile_z = upscaler.inputs([(r, first + c)], rows)
            lr[0, :, *at], z[0, :, *at] = tile_lr[0], tile_z[0]
    return upscaler.super_resolve(lr, z)[0]


def apart(found: np.ndarray) -> str:
    """Absolute differences in grey levels, in words."""
    return f"mean difference {found.mean():.2f} of 255 grey levels, 99% below {np.percentile(found, 99):.1f}"


def compare_real_images(args: Args, mdp: orl.Denoising, agent: orl.Agent, a_scene: int = 3) -> None:
    """The first images of each scene that noise can be drawn for at once, in 2 x 2 tiles, against the same in one piece."""
    rows = sorted(row for row in orl.find_images(args.dataset)[0] if row[0] == "test")
    scenes = [[row[3] for row in rows if row[1] == name][:a_scene] for name in sorted({row[1] for row in rows})]
    differences, spread = [], []
    for file in sum(scenes, []):
        scene, pictures = up.Scene(Path(file), None, None), []
        if max(scene.height, scene.width) > up.BLOCK - up.OVERLAP:
            continue
        for tile in (up.TILE, up.BLOCK):
            with mock.patch.object(up, "TILE", tile):
                upscaler = up.Upscaler(mdp, agent, scene, 1, 0)
            strips = [sr for _, sr in upscaler.strips(0, upscaler.num_rows)]
            pictures.append(255 * torch.cat(strips, dim=1).clamp(0, 1))
        assert upscaler.num_rows == upscaler.num_columns == 1
        differences.append((pictures[0] - pictures[1]).abs().flatten()), spread.append(pictures[1].std())
    print(f"{len(differences)} real images, tiled, against the same in one piece: {apart(torch.cat(differences).numpy())}; "
          f"an image's standard deviation {np.mean(spread):.0f}")  # fmt: skip


def main(args: Args) -> None:
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    file, parts = folder / "scene.tif", folder / "scene_sr.tif.parts"
    if parts.exists():
        sys.exit(f"{parts} exists; name another --output")
    make_scene(args, file)
    process = start(args, file)
    wait_for(process, parts / "00000.tif")
    wait_for(process, parts / "00001.tif.half")
    time.sleep(5)
    kill(process)
    before = (parts / "00000.tif").stat().st_mtime_ns
    print(f"\nkilled in the middle of the second window; there are {sorted(os.listdir(parts))}")
    process = start(args, file)
    began, _ = wait_for(process, parts / "00001.tif")
    ended, memory = wait_for(process, parts / "00002.tif")
    kill(process)
    kept = "kept as it was" if (parts / "00000.tif").stat().st_mtime_ns == before else "MADE AGAIN"
    row = args.size * (up.TILE - up.OVERLAP) / 1e6  # LR megapixels of a row of tiles
    print(f"\nresumed: the first window's file was {kept}; {row / (ended - began) * 60:.2f} LR megapixels a minute, "
          f"a row of {-(-args.size // 128)} tiles in {ended - began:.0f} s, peak memory {memory:.2f} GB")  # fmt: skip

    device, state = torch.device("cpu"), eval_sr.load_run(orl.locate(args.agent))
    ldm = orl.load_ldm(state["args"]["ldm"], device)
    mdp = orl.Denoising(ldm, state["args"]["base_steps"], state["args"]["max_calls"])
    scene = up.Scene(file, None, (BLACK, WHITE))
    upscaler = up.Upscaler(mdp, eval_sr.load_agent(state, ldm), scene, 1, 0)
    tiled = np.concatenate([rasterio.open(parts / f"{k:05d}.tif").read() for k in range(ROWS)], axis=1)
    differences, edge = [], 4 * up.EDGE
    for first in range(0, CUTS * COLUMNS, COLUMNS):
        cut = 255 * untiled(upscaler, first)[:, edge:-edge, 2 * edge : -2 * edge].numpy()  # of the scene, no fading
        left = 4 * first * upscaler.step + edge
        same = tiled[:, : cut.shape[1], left : left + cut.shape[2]] / WHITE * 255
        differences.append(np.abs(same - cut[:, : same.shape[1]].clip(0, 255)).ravel())
    print(f"{CUTS * ROWS * COLUMNS} windows, tiled and resumed, against untiled cuts: {apart(np.concatenate(differences))}; "
          f"standard deviation of the image {tiled.std() / WHITE * 255:.0f}")  # fmt: skip
    compare_real_images(args, mdp, upscaler.agent)
    try:
        real_esrgan = peers.real_esrgan()
    except ImportError as error:
        print(f"Real-ESRGAN: left out ({error})")
        return
    lr, began = torch.from_numpy(scene.rows(0, 256)[:, :, :256].copy())[None], time.perf_counter()
    real_esrgan(lr)
    print(f"Real-ESRGAN on a corner of 256 x 256 px: {60 * 0.256**2 / (time.perf_counter() - began):.2f} LR megapixels a minute")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
