"""How much there is to win: bounds that see the HR image, beside the plain LDM, on held-out images.

    python tests/oracle.py --dataset data/paper8 --crop 128 --limit 5

best constant per image: of a grid of constant actions the one with the highest reward on that very image;
best blend per cell: every latent cell and channel goes as far towards the posterior mean as brings it nearest to the HR
image's own latent, after 10 plain steps. Both know the truth, so no agent can be expected to reach them.
The frontier lists the constant actions of the grid that no other one beats in PSNR and LPIPS at once.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_ldm_sr as orl  # noqa: E402
import sr_inputs  # noqa: E402
from sr_metrics import Metrics, load_lpips  # noqa: E402


@dataclass
class Args:
    dataset: str = "data/paper8"
    """image folder split/scene/*.jpg or Hub name"""
    ldm: str = "runs/ldm_x4"
    """LDM in diffusers' layout"""
    crop: int = 128
    """px of the centre; 0: whole images"""
    limit: int = 5
    """images a scene; 0: all"""
    device: str = "auto"
    """auto, cpu or cuda"""
    seed: int = 0
    """seed of the noise"""


GRID = {  # 4 x 3 x 3 x 2 = 72 constant actions, on a schedule of 10 steps and the consistency step always made
    "stride": (1.0, 1.5, 2.5, 4.0),
    "blend": (0.0, 0.2, 0.4),
    "sharpen": (0.0, 0.15, 0.3),
    "noise": (1.0, 1.02),
}


@torch.inference_mode()
def best_blend(mdp: orl.Denoising, scenes, reward, indices, args: Args) -> dict[str, torch.Tensor]:
    """Metrics with the oracle's blend in every latent cell and channel."""
    parts = []
    for part, hr in scenes.batches(indices, 4 * mdp.ldm.stride, args.crop, 16):
        lr, truth = orl.downscale(hr), mdp.ldm.encode(hr)
        z = orl.noise_for(mdp.ldm, part, *lr.shape[-2:], args.seed)
        *_, (_, s, _, _, _) = mdp.steps(lr, z, mdp.plain)
        consistent = orl.action_for(mdp.ldm.latent_channels, consistency=1.0)
        towards = s.mean - s.x0
        blend = ((truth - s.x0) * towards / (towards.square() + 1e-8)).clamp(0, 1)
        sr = mdp.finish(s.x0 + blend * towards, lr, consistent.to(lr.device).expand(len(lr), -1))
        found = reward.metrics(sr, hr)
        parts.append(found | {"reward": reward(found, s.calls)})
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def main(args: Args) -> None:
    device = sr_inputs.pick_device(args.device)
    ldm = orl.load_ldm(args.ldm, device)
    scenes = sr_inputs.load_scenes(args.dataset, "test", (), 4 * ldm.stride).to(device)
    of_scene = [(scenes.scene == k).nonzero().flatten().tolist() for k in range(len(scenes.names))]
    indices = [i for group in of_scene for i in group[: args.limit or None]]
    reward = orl.Reward(Metrics(load_lpips(), device))

    def score(steps: int, **values: float) -> dict[str, torch.Tensor]:
        policy = orl.constant_policy(orl.action_for(ldm.latent_channels, **values))
        return orl.evaluate(orl.Denoising(ldm, steps, steps), scenes, reward, policy, indices, args.crop, args.seed)

    def line(what: str, found: dict) -> str:
        m = {k: float(v.mean()) for k, v in found.items()}
        return f"| {what} | {m['psnr']:.3f} | {m['ssim']:.4f} | {m['lpips']:.4f} | {m['reward']:.4f} |"

    plain = score(100)
    grid = [dict(zip(GRID, values)) for values in itertools.product(*GRID.values())]
    tried = [score(10, **values, consistency=1.0) for values in grid]
    rewards = torch.stack([found["reward"] for found in tried])  # (grid, images)
    best, own = int(rewards.mean(1).argmax()), rewards.argmax(0)
    per_image = {k: torch.stack([found[k] for found in tried]).gather(0, own[None])[0] for k in tried[0]}
    print(f"\n{scenes.title}, test split, {len(indices)} images\n\n| what | PSNR (dB) | SSIM | LPIPS | reward |\n|---|---|---|---|---|")
    print(line("plain LDM, 100 steps", plain))
    print(line("best constant of the grid (chosen on these images): " + ", ".join(f"{k} {v}" for k, v in grid[best].items()), tried[best]))
    print(line("oracle: the best constant of the grid for each image", per_image))
    print(line("oracle: the best blend for each latent cell and channel", best_blend(orl.Denoising(ldm, 10, 10), scenes, reward, indices, args)))
    print("\nFrontier of the grid, gain over the plain LDM at 100 steps:\n\n| constant action | PSNR (dB) | SSIM | LPIPS |\n|---|---|---|---|")
    gains = [[float((found[k] - plain[k]).mean()) for k in ("psnr", "ssim", "lpips")] for found in tried]
    for values, (psnr, ssim, lpips) in sorted(zip(grid, gains), key=lambda pair: pair[1][0]):
        if not any(p > psnr and q < lpips for p, _, q in gains):
            print(f"| {', '.join(f'{k} {v}' for k, v in values.items())} | {psnr:+.3f} | {ssim:+.4f} | {lpips:+.4f} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
