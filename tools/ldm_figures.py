"""Measures an LDM on its own: its autoencoder, and what it draws unsteered, at several numbers of evaluations (NFE).

    python tools/ldm_figures.py --ldm runs/ldm_x4 --dataset data/wide256 data/paper8

Test images of each dataset are spread evenly over its scenes, with the same noise for every row. The yardstick of the
autoencoder is a linear one with as many channels: the principal components (PCA) of 4 x 4 px training patches.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_ldm_sr as orl  # noqa: E402
from eval_sr import bicubic, score_all  # noqa: E402


@dataclass
class Args:
    ldm: str = "runs/ldm_x4"  # LDM in diffusers' layout: a folder or a Hub name
    dataset: tuple[str, ...] = ("runs/scenes",)  # image folders or Hub names with a test split
    images: int = 48  # test images of each dataset at most
    crop: int = 128  # px of their centre
    nfe: tuple[int, ...] = (1, 2, 4, 10, 100)  # numbers of evaluations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 0  # seed of the noise


def pca(train: torch.Tensor, test: torch.Tensor, channels: int) -> torch.Tensor:
    """Images `test` (n, 3, H, W) in [0, 1], encoded and decoded by the PCA of 4 x 4 px patches of `train`."""
    patches = F.pixel_unshuffle(train, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    mean = patches.mean(0)
    basis = torch.linalg.eigh((patches - mean).T @ (patches - mean)).eigenvectors[:, -channels:]
    codes = (F.pixel_unshuffle(test, 4).permute(0, 2, 3, 1) - mean) @ basis
    return F.pixel_shuffle((codes @ basis.T + mean).permute(0, 3, 1, 2), 4).clamp(0, 1)


@torch.inference_mode()
def rows_of(args: Args, ldm: orl.LDM, lpips_fn, dataset: str) -> list[str]:
    """Lines of a Markdown table for the test images of one dataset."""
    sensor, device = orl.Sensor(), ldm.device
    train, test = (orl.load_images(dataset, split, (), args.crop, device) for split in ("train", "test"))
    indices = range(0, len(test.files), -(-len(test.files) // args.images))
    hr = torch.stack([test.centre(i, 4 * ldm.stride, args.crop) for i in indices])
    lr = sensor.sense(hr, None)
    z = orl.noise_for(indices, (ldm.latent_channels, *lr.shape[-2:]), args.seed, device)
    linear = pca(train.crops(512, args.crop), hr, ldm.latent_channels)
    methods = {"HR itself": hr, "bicubic": bicubic(lr)}
    methods[f"PCA of 4 x 4 px patches, {ldm.latent_channels} channels"] = linear
    methods["autoencoder"] = torch.cat([ldm.decode(ldm.encode(part)) for part in hr.split(16)])
    for nfe in args.nfe:
        env = orl.DenoisingEnv(ldm, nfe, nfe)
        parts = zip(lr.split(16), z.split(16))
        sr = torch.cat([env.super_resolve(*part, back_projection=False)[0] for part in parts])
        methods[f"unsteered LDM, {nfe} NFE"] = sr
        methods[f"unsteered LDM, {nfe} NFE, back-projection"] = orl.back_project(sr, lr, sensor)
    lines = []
    for name, sr in methods.items():
        nfe = torch.zeros(len(hr), device=device)  # of the reward alone, which is not shown
        found = [score_all(lpips_fn, {}, *part) for part in zip(sr.split(16), hr.split(16), nfe.split(16))]
        digits = {"psnr": 2, "ssim": 3, "lpips": 3, "vif": 3, "grid": 1}
        cells = [f"{torch.cat([part[key] for part in found]).mean():.{k}f}" for key, k in digits.items()]
        lines.append(f"| {test.title}, {len(indices)} images | {name} | {' | '.join(cells)} |")
    return lines


def main(args: Args) -> None:
    orl.check_bounds(args, images=(1, math.inf), crop=(orl.LEAST_CROP, math.inf))
    device = orl.pick_device(args.device)
    ldm, lpips_fn = orl.load_ldm(args.ldm, device), orl.load_lpips(device)
    lines = ["| test images | what | PSNR (dB) | SSIM | LPIPS | VIF | grid |", "|---|---|---|---|---|---|---|"]
    for dataset in args.dataset:
        if not {row[0] for row in orl.find_images(dataset)[0]} & {"test", "validation"}:
            orl.stop(f"--dataset {dataset}: it has no test split, so that the LDM may have been trained on its images")
        torch.manual_seed(args.seed)  # of the crops that the PCA is made of
        lines += rows_of(args, ldm, lpips_fn, dataset)
    print(f"\nLDM {args.ldm}, centre {args.crop} px\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
