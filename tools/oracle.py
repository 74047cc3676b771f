"""How much an agent could gain at most: estimates that know the HR image, or average samples, on test images.

    python tools/oracle.py --dataset data/paper8 --crop 128 --limit 5

"mean of 16 samples" averages images of the unsteered LDM. It estimates the posterior mean, which has the least
distortion. "best edit" follows the reward's own gradient for 60 steps on the edit of each single image, with the HR
image at hand. This is what the reward leaves to an agent that edits the last latent and knows the truth. The reward has
the default weights, and counts the function evaluations of the U-Net (NFE).
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_ldm_sr as orl  # noqa: E402
from eval_sr import score_all  # noqa: E402

SAMPLES, SAMPLE_NFE, SHORT_NFE = 16, 10, 3
EDIT_STEPS, EDIT_RATE = 60, 0.05  # of Adam
DIGITS = {"psnr": 3, "ssim": 4, "lpips": 4, "vif": 3, "grid": 1, "reward": 4}


@dataclass
class Args:
    dataset: str = "runs/scenes"  # image folder or Hub name
    ldm: str = "runs/ldm_x4"  # LDM in diffusers' layout
    crop: int = 128  # px of the centre
    limit: int = 5  # images a scene; 0: all
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 0  # of the noise


def best_edit(env: orl.DenoisingEnv, lpips_fn, lr, z_T, hr) -> torch.Tensor:
    """SR (n, 3, H, W) in [0, 1] after the edit of the clean latent that gains most reward for each image."""
    with torch.no_grad():
        clean, nfe, _ = env.denoise(lr, z_T)
    edit = torch.zeros_like(clean, requires_grad=True)
    optimizer = torch.optim.Adam([edit], lr=EDIT_RATE)
    for _ in range(EDIT_STEPS):
        optimizer.zero_grad()
        reward = orl.score(lpips_fn, orl.back_project(env.ldm.decode(clean + edit), lr, env.sensor), hr, nfe)["reward"]
        (-reward.sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return orl.back_project(env.ldm.decode(clean + edit), lr, env.sensor)


def main(args: Args) -> None:
    orl.check_bounds(args, crop=(orl.LEAST_CROP, math.inf))
    device = orl.pick_device(args.device)
    ldm, lpips_fn = orl.load_ldm(args.ldm, device), orl.load_lpips(device)
    images = orl.load_images(args.dataset, "test", (), args.crop, device)
    of_scene = [[i for i, label in enumerate(images.labels) if label == k] for k in range(len(images.scenes))]
    indices = [i for group in of_scene for i in group[: args.limit or None]]
    stock = orl.DenoisingEnv(ldm, 100, 100)
    sampler = orl.DenoisingEnv(ldm, SAMPLE_NFE, SAMPLE_NFE)
    short = orl.DenoisingEnv(ldm, SHORT_NFE, SHORT_NFE)
    rows = {}

    def add(method: str, sr: torch.Tensor, hr: torch.Tensor, nfe: int) -> None:
        with torch.no_grad():
            scores = score_all(lpips_fn, {}, sr, hr, torch.full((len(hr),), nfe, device=device))
        rows.setdefault(method, []).append(scores)

    for start in range(0, len(indices), 8):
        part = indices[start : start + 8]
        hr = torch.stack([images.centre(i, 4 * ldm.stride, args.crop) for i in part])
        lr = stock.sensor.downscale(hr).clamp(0, 1)
        shape = (ldm.latent_channels, *lr.shape[-2:])
        z_T = orl.noise_for(part, shape, args.seed, device)
        add("unsteered LDM, 100 NFE", stock.super_resolve(lr, z_T, back_projection=False)[0], hr, 100)
        add(f"unsteered LDM, {SHORT_NFE} NFE, back-projection", short.super_resolve(lr, z_T)[0], hr, SHORT_NFE)
        total = torch.zeros_like(hr)
        for k in range(SAMPLES):
            z = orl.noise_for(part, shape, args.seed + 1 + k, device)
            total += sampler.super_resolve(lr, z, back_projection=False)[0]
        add(f"mean of {SAMPLES} samples of {SAMPLE_NFE} NFE", total / SAMPLES, hr, SAMPLES * SAMPLE_NFE)
        add("best edit of each image", best_edit(short, lpips_fn, lr, z_T, hr), hr, SHORT_NFE)
    print(f"\n{images.title}, test split, {len(indices)} images, centre {args.crop} px\n")
    print("| method | PSNR (dB) | SSIM | LPIPS | VIF | grid | reward |\n|---|---|---|---|---|---|---|")
    for method, parts in rows.items():
        cells = [f"{torch.cat([part[key] for part in parts]).mean():.{digits}f}" for key, digits in DIGITS.items()]
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
