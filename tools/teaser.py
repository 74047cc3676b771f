"""Makes the README's picture: two test images of 256 px, each as LR, bicubic, unsteered LDM, with RL and HR; the second
is seen by a sensor that the LDM has never seen.

    python tools/teaser.py --dataset data/resisc45 --output docs/teaser.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_sr
import ppo_ldm_sr as orl


@dataclass
class Args:
    dataset: str = "data/resisc45"  # image folder whose test split is used
    images: tuple[str, str] = ("airport", "commercial_area")  # scene of each row
    numbers: tuple[int, int] = (3, 2)  # number of the image within its scene
    agents: tuple[str, str] = ("runs/orl_ldm", "runs/orl_ldm_mtf29")  # agent, and with it the sensor, of each row
    output: str = "docs/teaser.png"  # picture to write
    seed: int = 0  # seed of the noise


COLUMNS = ("LR image, 64 px", "bicubic", "LDM without RL, 100 NFE", "LDM with RL, {nfe} NFE", "HR image, 256 px")


def row_of(args: Args, k: int, lpips_fn, device: torch.device) -> tuple[list[tuple[str, torch.Tensor]], str]:
    """Row k: (caption, image (1, 3, 256, 256) in [0, 1]) of each column, and the name of its sensor."""
    saved = orl.load_run(orl.locate(args.agents[k]))
    ldm = orl.load_ldm(saved["args"]["ldm"], device)
    sensor, agent = orl.Sensor(saved["args"]["mtf"], saved["args"]["lr_noise"]), orl.load_agent(saved, ldm)
    env = orl.DenoisingEnv(ldm, saved["args"]["base_steps"], saved["args"]["max_nfe"], sensor)
    images = orl.load_images(args.dataset, "test", (args.images[k],), 256, device)
    hr = images.centre(args.numbers[k], 16, 256)[None]
    lr = sensor.sense(hr, orl.noise_for([0], (3, 64, 64), args.seed + 1_000_000, device))
    z_T = orl.noise_for([0], (ldm.latent_channels, 64, 64), args.seed, device)
    unsteered = orl.DenoisingEnv(ldm, 100, 100, sensor).super_resolve(lr, z_T, back_projection=False)[0]
    steered, nfe, _ = env.super_resolve(lr, z_T, agent)
    panels = [F.interpolate(lr, scale_factor=4), eval_sr.bicubic(lr), unsteered, steered, hr]
    row = []
    for name, panel in zip(COLUMNS, panels):
        found = orl.score(lpips_fn, panel, hr, nfe.float())
        figures = f"{float(found['psnr']):.2f} dB, SSIM {float(found['ssim']):.3f}, LPIPS {float(found['lpips']):.3f}"
        shown = name.format(nfe=int(nfe))
        row.append((shown if panel is hr or name == COLUMNS[0] else f"{shown}\n{figures}", panel))
    return row, str(sensor)


def main(args: Args) -> None:
    device = torch.device("cpu")
    lpips_fn, font = orl.load_lpips(device), ImageFont.load_default(size=13)
    gap, text, side = 6, 40, 256
    sheet = Image.new("RGB", (5 * (side + gap) + gap, 2 * (side + text + 24) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k in range(2):
        row, sensor = row_of(args, k, lpips_fn, device)
        top = k * (side + text + 24) + gap
        scene = args.images[k].replace("_", " ")
        draw.text((gap, top), f"{scene}; sensor: {sensor}", "black", font)
        for column, (caption, panel) in enumerate(row):
            left = gap + column * (side + gap)
            pixels = (panel[0].permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
            sheet.paste(Image.fromarray(pixels), (left, top + 20))
            draw.multiline_text((left, top + 22 + side), caption, "black", font)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output, optimize=True)
    print(f"written to {args.output}: {sheet.width} x {sheet.height} px")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
