"""Throughput against the bare U-Net and the plain loop: medians of pairs that are measured one after the other.

    python tests/benchmark.py                # the shipped LDM and agent on the synthetic scenes

The last line is JSON: rollout_over_unet (steps a second of a rollout over bare U-Net calls of the same batch),
update_over_rollout (PPO update over the rollout before it), images_over_plain (one image by the agent over the plain
loop of 100 steps with the same weights).
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_sr  # noqa: E402
import ppo_ldm_sr as orl  # noqa: E402


@dataclass
class Args:
    pairs: int = 5  # repeated pairs, of which the median is told
    agent: str = "runs/orl_ldm"  # run folder of the agent
    dataset: str = "runs/scenes"  # images to train on
    device: str = "auto"  # auto, cpu or cuda


def seconds(function) -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def main(args: Args) -> None:
    device, run, settings = orl.pick_device(args.device), orl.locate(args.agent), orl.Args()
    state = eval_sr.load_run(run)
    ldm = orl.load_ldm(state["args"]["ldm"], device)
    agent = eval_sr.load_agent(state, ldm)
    mdp = orl.Denoising(ldm, settings.base_steps, settings.max_calls)
    train = orl.load_images(args.dataset, "train", (), settings.crop, device)
    net = orl.load_lpips(device)
    n, side, calls = settings.num_envs, settings.crop // 4, 3
    s = mdp.start(torch.rand(n, 3, side, side, device=device), orl.noise_for(ldm, range(n), side, side, 0))

    @torch.no_grad()
    def bare_calls() -> None:
        for _ in range(calls):
            ldm.predict(s.z, s.t, s.lr)

    learner = orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels).to(device)
    optimizer = torch.optim.Adam([{"params": group} for group in learner.groups()], lr=settings.learning_rate, eps=1e-5)
    unet, rollout, update, ppo = [], [], [], []
    for seed in range(args.pairs + 1):  # the first one warms up
        kept = []
        bare = seconds(bare_calls)
        rolled = seconds(lambda seed=seed, kept=kept: kept.append(orl.rollout(mdp, learner, net, train, settings, seed)))
        batch, _ = kept.pop()
        updated = seconds(lambda batch=batch: orl.update(learner, optimizer, batch, settings))
        if seed:
            steps = len(batch["actions"])
            unet.append(n * calls / bare), rollout.append(steps / rolled)
            update.append(updated / rolled), ppo.append(steps / (rolled + updated))
    print(f"U-Net {median(unet):.1f} calls/s; rollout {median(rollout):.1f} steps/s; PPO {median(ppo):.1f} steps/s")

    lr = orl.downscale(orl.load_images(args.dataset, "test", (), 128, device).centre(0, 16)[None])
    z = orl.noise_for(ldm, [0], *lr.shape[-2:], 0)
    full, own, ours = orl.Denoising(ldm, 100, 100), orl.Denoising(ldm, state["args"]["base_steps"], state["args"]["max_calls"]), []
    for _ in range(args.pairs):
        by_agent = seconds(lambda: own.super_resolve(lr, z, agent))
        ours.append(seconds(lambda: full.super_resolve(lr, z, consistent=False)) / by_agent)
    print(f"one image of {lr.shape[3]} x {lr.shape[2]} LR px: the agent is {median(ours):.1f} times as fast as 100 plain steps")
    figures = {
        "rollout_over_unet": median(r / u for r, u in zip(rollout, unet)),
        "update_over_rollout": median(update),
        "images_over_plain": median(ours),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        print(f"peak CUDA memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(json.dumps({k: round(v, 3) for k, v in figures.items()} | {"device": name}))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
