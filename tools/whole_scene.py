"""Super-resolves a scene as large as a Sentinel-2 tile, is killed on the way, goes on, and is compared with one piece.

    python tools/whole_scene.py --output scene --dataset data/paper8      # some 6 minutes and 1 GB of disk

The scene is a mosaic of test images, three 12-bit bands in 16 bits with coordinates, read as an LR image. It is begun,
killed in the middle of the second row of tiles, and begun again for two more rows. Then the first hundred tiles are
compared with cuts of 2 x 10 tiles that are one piece for the networks. Their normalisation then sees other
surroundings, so that the two agree in what they show, not in every value. Neighbouring pieces of a mosaic have nothing
in common, but parts of a real image have. So some test images are compared too, in 2 x 2 tiles and in one piece.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import rasterio
import torch
import tyro
from rasterio.transform import from_origin
from rasterio.windows import Window

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import peers  # noqa: E402

import ppo_ldm_sr as orl  # noqa: E402
import upscale_sr as up  # noqa: E402

CUTS, ROWS, COLUMNS = 5, 2, 10  # a hundred tiles
BLACK, WHITE = 0.0, 4095.0


@dataclass
class Args:
    output: str  # folder to write to
    dataset: str = "runs/scenes"  # images of the mosaic
    agent: str = "runs/orl_ldm"  # run folder of the agent
    size: int = 10_980  # px of a side: a Sentinel-2 tile's at 10 m
    seed: int = 0  # of the mosaic


def make_scene(args: Args, images: orl.Images, file: Path) -> None:
    """A mosaic of 128 px pieces of the images, turned and flipped, written row by row of pieces."""
    rng, count = np.random.default_rng(args.seed), -(-args.size // 128)
    pieces = [images.centre(i, 1, 128).numpy() for i in range(len(images.files))]
    profile = {"driver": "GTiff", "width": args.size, "height": args.size, "count": 3, "dtype": "uint16", "tiled": True}
    place = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 10, 10)}
    with rasterio.open(file, "w", **profile, **place) as target:
        for top in range(0, args.size, 128):
            turned = [np.rot90(pieces[rng.integers(len(pieces))], rng.integers(4), (1, 2)) for _ in range(count)]
            strip = np.concatenate(turned, axis=2)[:, : args.size - top, : args.size]
            window = Window(0, top, args.size, strip.shape[1])
            target.write((WHITE * strip).round().astype(np.uint16), window=window)


def start(args: Args, file: Path) -> subprocess.Popen:
    """The process that super-resolves the scene; every row of tiles is a part of its own."""
    flags = ["--output", args.output, "--agent", args.agent, "--scale", BLACK, WHITE, "--window", 1]
    return subprocess.Popen([sys.executable, up.__file__, str(file), *map(str, flags)])


def wait_for(process: subprocess.Popen, folder: Path, pattern: str, count: int) -> tuple[float, float]:
    """Until so many files are there -> seconds of a clock, and peak memory of the process in GB."""
    while len(list(folder.glob(pattern))) < count:
        if process.poll() is not None:
            sys.exit(f"upscale_sr.py ended with code {process.returncode} before it wrote {pattern}")
        time.sleep(0.2)
    status = Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1]
    return time.monotonic(), int(status.split()[0]) / 2**20


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def one_piece(upscaler: up.Upscaler, rows: range, columns: range) -> torch.Tensor:
    """SR (3, H, W) of some tiles, with the overlap around them, in one call of each network. The noise is theirs."""
    tiles = [upscaler.read(r, columns) for r in rows]  # a row each: (columns, 3 + c, h, w)
    channels, side, width = tiles[0].shape[1:]
    size = (len(rows) - 1) * upscaler.down + side, (len(columns) - 1) * upscaler.across + width
    whole = torch.zeros(1, channels, *size)
    for r, row in enumerate(tiles):
        for c, tile in enumerate(row):  # where tiles overlap, they agree
            top, left = r * upscaler.down, c * upscaler.across
            whole[0, :, top : top + side, left : left + width] = tile
    return upscaler.super_resolve(whole)[0]


def apart(found: np.ndarray) -> str:
    """Absolute differences in grey levels, in words."""
    return f"mean difference {found.mean():.2f} of 255 grey levels, 99% below {np.percentile(found, 99):.1f}"


def compare_scene(upscaler: up.Upscaler, tiled: np.ndarray) -> str:
    """The first tiles of the scene, `tiled` (3, H, W) in [0, 1] as it was written, against cuts in one piece."""
    differences, edge = [], 4 * up.EDGE
    for first in range(0, min(CUTS * COLUMNS, upscaler.num_columns), COLUMNS):
        columns = range(first, min(first + COLUMNS, upscaler.num_columns))
        cut = one_piece(upscaler, range(ROWS), columns).clamp(0, 1).numpy()
        cut = cut[:, edge : -2 * edge, 2 * edge : -2 * edge]  # what lies in the scene and is not faded at the cut's end
        left = 4 * first * upscaler.across + edge
        same = tiled[:, : cut.shape[1], left : left + cut.shape[2]]
        differences.append(255 * np.abs(same - cut[:, : same.shape[1], : same.shape[2]]).ravel())
    return f"{apart(np.concatenate(differences))}; standard deviation of the image {255 * tiled.std():.0f}"


def compare_real_images(env, agent, images: orl.Images, folder: Path, pool, a_scene: int = 3) -> str:
    """The first images of each scene, tiled, against the same in one piece."""
    differences, deviations = [], []
    for k in range(len(images.scenes)):
        for i in [i for i, label in enumerate(images.labels) if label == k][:a_scene]:
            file = folder / f"image_{i}.png"
            up.Image.fromarray(images.pixels[i].permute(1, 2, 0).numpy()).save(file)
            scene = up.Scene(file, up.Args(paths=()))
            scene.look()
            with mock.patch.object(up, "TILE", max(scene.height, scene.width) // 2 + 3 * up.OVERLAP):
                upscaler = up.Upscaler(env, agent, scene, 0, pool)
            assert upscaler.num_rows == upscaler.num_columns == 2
            tiled = np.concatenate(list(upscaler.strips(0, 2)), axis=1) / 255
            whole = one_piece(upscaler, range(2), range(2)).clamp(0, 1).numpy()[:, 4 * up.EDGE :, 4 * up.EDGE :]
            differences.append(255 * np.abs(tiled - whole[:, : tiled.shape[1], : tiled.shape[2]]).ravel())
            deviations.append(255 * tiled.std())
    return (f"{len(differences)} real images, 2 x 2 tiles against one piece: {apart(np.concatenate(differences))}; "
            f"an image's standard deviation {np.mean(deviations):.0f}")  # fmt: skip


@torch.no_grad()
def main(args: Args) -> None:
    folder, device = Path(args.output), torch.device("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    file, parts = folder / "scene.tif", folder / "scene_sr.tif.parts"
    if parts.exists():
        orl.stop(f"{parts} exists; name another --output")
    images = orl.load_images(args.dataset, "test", (), 128, device)
    make_scene(args, images, file)
    process = start(args, file)
    wait_for(process, parts, "*.tif", 1)
    wait_for(process, parts, "*.half", 1)
    time.sleep(2)
    kill(process)
    first = next(parts.glob("00000-*.tif"))
    before = first.stat().st_mtime_ns
    print(f"\nkilled in the middle of the second row of tiles; there are {sorted(os.listdir(parts))}")
    process = start(args, file)
    began, _ = wait_for(process, parts, "*.tif", 2)
    ended, memory = wait_for(process, parts, "*.tif", 3)
    kill(process)
    kept = "kept as it was" if first.stat().st_mtime_ns == before else "MADE AGAIN"

    saved = orl.load_run(orl.locate(args.agent))
    ldm = orl.load_ldm(saved["args"]["ldm"], device)
    agent = orl.load_agent(saved, ldm)
    sensor = orl.Sensor(saved["args"]["mtf"], saved["args"]["lr_noise"])
    env = orl.DenoisingEnv(ldm, saved["args"]["base_steps"], saved["args"]["max_nfe"], sensor)
    torch.set_num_threads(1)  # as upscale_sr.py computes a tile
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        scene = up.Scene(file, up.Args(paths=(), scale=(BLACK, WHITE)))
        scene.look()
        upscaler = up.Upscaler(env, agent, scene, 0, pool)
        megapixels = args.size * upscaler.down / 1e6  # LR, of a row of tiles
        seconds = ended - began
        print(f"\nresumed: the first row's file was {kept}; {60 * megapixels / seconds:.2f} LR megapixels a minute, a "
              f"row of {upscaler.num_columns} tiles in {seconds:.0f} s, peak memory {memory:.2f} GB")  # fmt: skip
        upscaler.choose_strides()
        tiled = np.concatenate(list(upscaler.strips(0, ROWS)), axis=1) / WHITE
        count = ROWS * min(CUTS * COLUMNS, upscaler.num_columns)
        print(f"{count} tiles against cuts in one piece: {compare_scene(upscaler, tiled)}")
        with rasterio.open(first) as part:
            same = np.array_equal(part.read(), (WHITE * tiled[:, : part.height]).round())
        print(f"the part that was written before the kill {'is' if same else 'IS NOT'} what is computed here again")
        print(compare_real_images(env, agent, images, folder, pool))
    try:
        real_esrgan = peers.real_esrgan()
    except ImportError as error:
        print(f"Real-ESRGAN: left out ({error})")
        return
    lr = torch.from_numpy(scene.rows(0, 256)[:, :, :256].copy())[None]
    began = time.perf_counter()
    real_esrgan(lr)
    speed = 60 * lr[0, 0].numel() / 1e6 / (time.perf_counter() - began)
    print(f"Real-ESRGAN on a corner of {lr.shape[3]} x {lr.shape[2]} px: {speed:.2f} LR megapixels a minute")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
