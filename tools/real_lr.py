"""Super-resolves real images at their own resolution, of which no HR image exists, with agents for several sensors.

    python tools/real_lr.py --dataset data/resisc45 --output docs/real.png

Each image is taken as an LR image: its centre of 128 px becomes 512 px. The table has the consistency with it (LR PSNR,
by the agent's own sensor) and the periodicity of the result. The picture shows the centre of some images for the eye.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_sr
import ppo_ldm_sr as orl

SIDE, SHOWN, GAP, TEXT = 128, 256, 6, 20  # LR px of an image that are used; SR px that are shown; px of the picture


@dataclass
class Args:
    dataset: str = "data/resisc45"  # image folder whose test split is taken as LR images
    agents: tuple[str, ...] = ("runs/orl_ldm", "runs/orl_ldm_mtf29")  # run folders, a sensor each
    shown: tuple[int, ...] = (3, 25, 47, 70)  # numbers of the images in the picture
    output: str = "docs/real.png"  # picture to write
    seed: int = 0  # seed of the noise


def methods_of(args: Args, device: torch.device) -> dict:
    """{name: (environment, agent or None)}: the unsteered LDM of each sensor at 2 NFE, then its agent."""
    methods = {}
    for folder in args.agents:
        saved = orl.load_run(orl.locate(folder))
        own = saved["args"]
        ldm, sensor = orl.load_ldm(own["ldm"], device), orl.Sensor(own["mtf"], own["lr_noise"])
        env = orl.DenoisingEnv(ldm, own["base_steps"], own["max_nfe"], sensor)
        methods[f"without RL, {sensor}"] = orl.DenoisingEnv(ldm, 2, 2, sensor), None
        methods[f"with RL, {sensor}"] = env, orl.load_agent(saved, ldm)
    return methods


def main(args: Args) -> None:
    orl.check_bounds(args)
    device = torch.device("cpu")
    methods = methods_of(args, device)
    images = orl.load_images(args.dataset, "test", (), SIDE, device)
    if not all(0 <= i < len(images.files) for i in args.shown):
        orl.stop(f"--shown: there are {len(images.files)} images, counted from 0")
    figures, rows = {"bicubic": [], **{name: [] for name in methods}}, []
    for i in tqdm(range(len(images.files)), disable=None):
        lr = images.centre(i, 16, SIDE)[None]
        results = {"bicubic": eval_sr.bicubic(lr)}
        figures["bicubic"].append((float("nan"), eval_sr.periodicity(results["bicubic"]).item()))
        for name, (env, agent) in methods.items():
            z_T = orl.noise_for([i], (env.ldm.latent_channels, *lr.shape[2:]), args.seed, device)
            results[name] = env.super_resolve(lr, z_T, agent)[0]
            error = (env.sensor.downscale(results[name]).clamp(0, 1) - lr).square().mean()
            figures[name].append((-10 * error.log10().item(), eval_sr.periodicity(results[name]).item()))
        if i in args.shown:
            rows.append((f"bicubic: {images.files[i]}", results))
    print("| taken as LR | LR PSNR (dB) | periodicity |\n|---|---|---|")
    for name, found in figures.items():
        print(f"| {name} | {np.mean([f[0] for f in found]):.2f} | {np.mean([f[1] for f in found]):.4f} |")
    font, shown = ImageFont.load_default(size=12), ["bicubic", *(name for name in methods if name.startswith("with "))]
    sheet = Image.new("RGB", (len(shown) * (SHOWN + GAP) + GAP, len(rows) * (SHOWN + TEXT + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (title, results) in enumerate(rows):
        for j, name in enumerate(shown):
            left, top = GAP + j * (SHOWN + GAP), GAP + k * (SHOWN + TEXT + GAP)
            draw.text((left, top), name if j else title, "black", font)
            part = orl.v2.functional.center_crop(results[name][0], [SHOWN, SHOWN])
            pixels = (255 * part.permute(1, 2, 0)).round().byte().numpy()
            sheet.paste(Image.fromarray(pixels), (left, top + TEXT))
    sheet.save(args.output, optimize=True)
    print(f"written to {args.output}: {sheet.width} x {sheet.height} px")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
