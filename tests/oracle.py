"""How much there is to win: bounds that see the HR image, beside the plain LDM, on held-out images.

    python tests/oracle.py --dataset data/paper8 --crop 128 --limit 5

mean of samples: the posterior mean, estimated by 16 samples of the plain LDM averaged as images: the least distortion;
best edit: the reward's own gradient, followed for 60 steps on the edit of each single image with the HR image in hand:
what the reward leaves to an agent that edits the last latent and knows the truth.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_ldm_sr as orl  # noqa: E402
from eval_sr import judge  # noqa: E402


@dataclass
class Args:
    dataset: str = "data/paper8"  # image folder or Hub name
    ldm: str = "runs/ldm_x4"  # LDM in diffusers' layout
    crop: int = 128  # px of the centre
    limit: int = 5  # images a scene; 0: all
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 0  # of the noise


def main(args: Args) -> None:
    device = orl.pick_device(args.device)
    ldm = orl.load_ldm(args.ldm, device)
    images = orl.load_images(args.dataset, "test", (), args.crop, device)
    of_scene = [[i for i, label in enumerate(images.labels) if label == k] for k in range(len(images.scenes))]
    indices = [i for group in of_scene for i in group[: args.limit or None]]
    net, rows = orl.load_lpips(device), {}

    def add(what: str, sr: torch.Tensor, hr: torch.Tensor, calls: int) -> None:
        with torch.no_grad():
            rows.setdefault(what, []).append(judge(net, sr, hr, torch.full((len(hr),), calls, device=device)))

    for start in range(0, len(indices), 8):
        part = indices[start : start + 8]
        hr = torch.stack([images.centre(i, 4 * ldm.stride, args.crop) for i in part])
        lr = orl.downscale(hr)
        z = orl.noise_for(ldm, part, *lr.shape[-2:], args.seed)
        full, short = orl.Denoising(ldm, 100, 100), orl.Denoising(ldm, 3, 3)
        add("plain LDM, 100 calls", full.super_resolve(lr, z, consistent=False)[0], hr, 100)
        add("plain LDM, 3 calls, consistency", short.super_resolve(lr, z)[0], hr, 3)
        ten, total = orl.Denoising(ldm, 10, 10), 0
        for k in range(16):
            total = total + ten.super_resolve(lr, orl.noise_for(ldm, part, *lr.shape[-2:], 1 + k), consistent=False)[0]
        add("oracle of distortion: mean of 16 samples", total / 16, hr, 100)
        with torch.no_grad():
            last, calls, _ = short.denoise(lr, z)
        edit = torch.zeros_like(last, requires_grad=True)
        optimizer = torch.optim.Adam([edit], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            (-orl.score(net, short.finish(last + edit, lr), hr, calls)["reward"].sum()).backward()
            optimizer.step()
        add("oracle of the reward: best edit of each image", short.finish(last + edit.detach(), lr), hr, 3)
    print(f"\n{images.title}, test split, {len(indices)} images\n\n| what | PSNR (dB) | SSIM | LPIPS | VIF | grid | reward |\n|---|---|---|---|---|---|---|")
    for what, parts in rows.items():
        m = {k: float(torch.cat([p[k] for p in parts]).mean()) for k in ("psnr", "ssim", "lpips", "vif", "grid", "reward")}
        print(f"| {what} | {m['psnr']:.3f} | {m['ssim']:.4f} | {m['lpips']:.4f} | {m['vif']:.3f} | {m['grid']:.1f} | {m['reward']:.4f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
