"""Which agent fits which sensor: every agent on the sensor of every agent, as a table and a heat map of the reward.

    python tools/sensors.py --agents runs/orl_ldm runs/orl_ldm_mtf29 --dataset data/paper8 --output docs/sensors.png
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_ldm_sr as orl  # noqa: E402


@dataclass
class Args:
    agents: tuple[str, ...] = ("runs/orl_ldm", "runs/orl_ldm_mtf29")  # run folders, whose sensors are the columns
    dataset: str = "data/paper8"  # image folder whose test split is used
    crop: int = 128  # side of the centre that is used, in px
    output: str = "docs/sensors.png"  # picture to write
    seed: int = 0  # seed of the noise


def main(args: Args) -> None:
    orl.check_bounds(args, crop=(orl.LEAST_CROP, math.inf))
    device = torch.device("cpu")
    lpips_fn, images = orl.load_lpips(device), orl.load_images(args.dataset, "test", (), args.crop, device)
    hr = torch.stack([images.centre(i, 16, args.crop) for i in range(len(images.files))])
    runs = {Path(folder).resolve().name: orl.load_run(orl.locate(folder)) for folder in args.agents}
    settings = [saved["args"] for saved in runs.values()]
    sensors = list(dict.fromkeys(orl.Sensor(own["mtf"], own["lr_noise"]) for own in settings))
    print(f"\n{len(hr)} images; a cell: reward, PSNR / SSIM / LPIPS\n\n| agent | {' | '.join(map(str, sensors))} |")
    print("|---" * (len(sensors) + 1) + "|")
    rewards = []
    for name, saved in [("unsteered LDM, 2 NFE, back-projection", None), *runs.items()]:
        settings = (saved or next(iter(runs.values())))["args"]
        ldm = orl.load_ldm(settings["ldm"], device)
        agent, steps = (orl.load_agent(saved, ldm), settings["base_steps"]) if saved else (None, 2)
        cells = []
        for sensor in sensors:
            env = orl.DenoisingEnv(ldm, steps, settings["max_nfe"], sensor)
            found = orl.evaluate(env, hr, lpips_fn, agent, args.seed)
            cells.append({k: v.mean().item() for k, v in found.items()})
        rewards.append((name, [cell["reward"] for cell in cells]))
        shown = [f"{c['reward']:.4f}, {c['psnr']:.2f} / {c['ssim']:.3f} / {c['lpips']:.3f}" for c in cells]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)
    figure, axes = plt.subplots(figsize=(2.2 * len(sensors) + 3, 0.6 * len(rewards) + 1.6), layout="constrained")
    picture = axes.imshow([row for _, row in rewards], cmap="viridis", aspect="auto")
    for i, (_, row) in enumerate(rewards):
        for j, reward in enumerate(row):
            dark = picture.norm(reward) < 0.5
            axes.text(j, i, f"{reward:.4f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(sensors)), [str(sensor).replace(", ", ",\n") for sensor in sensors])
    axes.set_yticks(range(len(rewards)), [name for name, _ in rewards])
    axes.set_xlabel("sensor that made the LR images")
    axes.set_ylabel("agent, or none")
    figure.colorbar(picture, label="reward")
    figure.savefig(args.output, dpi=110)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
