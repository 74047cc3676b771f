"""Throughput against the bare U-Net and the plain loop: medians of pairs that are measured one after the other.

    python tests/benchmark.py                # the shipped LDM and agent on the synthetic scenes

The last line is JSON: env_over_unet (environment steps with a random policy over bare U-Net calls of the same batch),
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
    steps: int = 20  # steps of each slot in one measurement
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
    _, state = orl.load_tensors(run / "agent.safetensors")
    ldm = orl.load_ldm(state["args"]["ldm"], device)
    agent = eval_sr.load_agent(run, ldm)
    mdp = orl.Denoising(ldm, settings.base_steps, settings.max_calls)
    train = orl.load_images(args.dataset, "train", (), settings.crop, device)
    reward = orl.Reward(orl.load_lpips(), device)
    env = orl.DenoisingEnv(mdp, train, reward, settings.num_envs, settings.crop)
    env.reset(0)
    s, n = env.state, settings.num_envs
    z, lr, t = s.z.clone(), s.lr.clone(), s.t.clone()

    @torch.no_grad()
    def random_steps(steps: int) -> None:
        for _ in range(steps):
            action = 0.6 * torch.randn(n, 2, device=device)
            env.step(action, 0.1 * torch.randn(len(env.ends(action)), *z.shape[1:], device=device))

    @torch.no_grad()
    def bare_calls(steps: int) -> None:
        for _ in range(steps):
            ldm.predict(z, t, lr)

    bare_calls(3), random_steps(3)
    learner = orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels).to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=settings.learning_rate, eps=1e-5)
    unet, environment, rollout, update, kept = [], [], [], [], []
    for seed in range(args.pairs):
        unet.append(n * args.steps / seconds(lambda: bare_calls(args.steps)))
        environment.append(n * args.steps / seconds(lambda: random_steps(args.steps)))
        rollout.append(seconds(lambda seed=seed: kept.append(orl.rollout(env, learner, settings.num_steps, seed))))
        batch, next_value, edits, infos = kept.pop()
        batch["advantages"], batch["returns"] = orl.gae(50 * batch["rewards"], batch["values"], batch["dones"], next_value, 0.99, 0.95)
        update.append(seconds(lambda batch=batch, edits=edits: orl.update(learner, optimizer, batch, edits, settings)))
    per_iteration = n * settings.num_steps
    ppo = [per_iteration / (a + b) for a, b in zip(rollout, update)]
    print(f"U-Net {median(unet):.1f} calls/s; environment {median(environment):.1f} steps/s; PPO {median(ppo):.1f} steps/s; "
          f"{per_iteration / len(edits['edits']):.1f} steps an episode")  # fmt: skip

    lr = orl.downscale(orl.load_images(args.dataset, "test", (), 128, device).centre(0, 16)[None])[0]
    full, own, ours = orl.Denoising(ldm, 100, 100), orl.Denoising(ldm, state["args"]["base_steps"], state["args"]["max_calls"]), []
    for _ in range(args.pairs):
        by_agent = seconds(lambda: eval_sr.super_resolve_image(own, agent, lr, 128, 16, 0))
        ours.append(seconds(lambda: eval_sr.super_resolve_image(full, None, lr, 128, 16, 0)) / by_agent)
    print(f"one image of {lr.shape[2]} x {lr.shape[1]} LR px: the agent is {median(ours):.1f} times as fast as 100 plain steps")
    figures = {
        "env_over_unet": median(e / u for e, u in zip(environment, unet)),
        "update_over_rollout": median(u / r for u, r in zip(update, rollout)),
        "images_over_plain": median(ours),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        print(f"peak CUDA memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(json.dumps({k: round(v, 3) for k, v in figures.items()} | {"device": name}))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
