"""The rival that a reader will ask for: the same editor, trained by the reward's own gradient without RL.

    python tools/reward_gradient.py --agent runs/orl_ldm --dataset data/paper8 --minutes 10

It takes the unsteered LDM's steps and edits the clean latent at every one of them. It has no stride, since the number
of function evaluations (NFE) has no gradient. The gradient leads through the later evaluations, though not through what
they make the editor do. Reward weights, sensor and held-out images are those of the agent that it is compared with.

It writes reward_gradient.pt and the curve of its held-out reward (reward_gradient/events.*) into that agent's run
folder. eval_sr.py then shows it as a row and as a line.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_ldm_sr as orl  # noqa: E402


@dataclass
class Args:
    agent: str = "runs/orl_ldm"  # run folder of the agent
    dataset: str | None = None  # images to train on (None: the agent's own)
    minutes: float = 10.0  # of training, without the time that the curve takes
    batch: int = 16  # images of a gradient step
    learning_rate: float = 1e-3  # of Adam, annealed to a twentieth
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 42  # of weights, crops and noise


def reward_step(env, agent, lpips_fn, hr, weights, optimizer) -> tuple[torch.Tensor, torch.Tensor]:
    """One gradient step of the editor on HR crops (n, 3, H, W) in [0, 1] -> mean reward () and NFE (n,)."""
    n, side = len(hr), hr.shape[2] // 4
    z_T = torch.randn(n, env.ldm.latent_channels, side, side, device=hr.device)
    lr = env.sensor.sense(hr, torch.randn(n, 3, side, side, device=hr.device))
    clean, nfe, steps = env.denoise(lr, z_T, agent)
    shift = torch.randint(8, (2,)).tolist()  # as in the agent's training
    sr = orl.back_project(env.ldm.decode(clean), lr, env.sensor)
    reward = orl.score(lpips_fn, sr, hr, nfe, weights, shift)["reward"].mean()
    gradients = torch.autograd.grad(reward, [step.edits for step in steps])
    spatial_obs = torch.cat([step.spatial_obs for step in steps])
    scalar_obs = torch.cat([step.scalar_obs for step in steps])
    edit = agent.edit_policy(spatial_obs, scalar_obs).mean
    optimizer.zero_grad()
    (-edit).backward(torch.cat(gradients))
    optimizer.step()
    return reward.detach(), nfe


def main(args: Args) -> None:
    orl.check_bounds(args, minutes=(1e-3, math.inf), batch=(1, math.inf))
    device, run = orl.pick_device(args.device), orl.locate(args.agent)
    saved = orl.load_run(run)
    trained = saved["args"]
    weights, crop = trained["reward_weights"], trained["crop"]
    ldm = orl.load_ldm(trained["ldm"], device)
    sensor = orl.Sensor(trained["mtf"], trained["lr_noise"])
    env = orl.DenoisingEnv(ldm, trained["base_steps"], trained["max_nfe"], sensor)
    dataset, scenes = args.dataset or trained["dataset"], tuple(trained["scenes"])
    train, test = (orl.load_images(dataset, split, scenes, crop, device) for split in ("train", "test"))
    count = min(trained["eval_images"] or len(test.files), len(test.files))  # as for the agent's curve
    chosen = torch.linspace(0, len(test.files) - 1, count).round().long().tolist()
    held_out = torch.stack([test.centre(i, 1, crop) for i in chosen])  # (n, 3, crop, crop)
    lpips_fn = orl.load_lpips(device)
    torch.manual_seed(args.seed)
    with torch.no_grad():
        latent_std = ldm.encode(train.crops(32, crop)).std(dim=(0, 2, 3))  # (c,)
    agent = orl.Agent(latent_std, ldm.hidden_channels).to(device)
    agent.actor[-1].weight.data.zero_()  # a stride of one: the unsteered LDM's steps
    optimizer = torch.optim.Adam(agent.editor.parameters(), lr=args.learning_rate, eps=1e-5)

    def curve() -> float:
        return float(orl.evaluate(env, held_out, lpips_fn, agent, trained["seed"], weights)["reward"].mean())

    seconds, spent, step, total_nfe = 60 * args.minutes, 0.0, 0, 0
    writer = SummaryWriter(run / "reward_gradient")
    writer.add_scalar("eval/reward_agent", curve(), 0)
    bar = tqdm(total=round(seconds), dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar}| {postfix}")
    while spent < seconds:
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = args.learning_rate * max(0.05, 1 - spent / seconds)
        reward, nfe = reward_step(env, agent, lpips_fn, train.crops(args.batch, crop), weights, optimizer)
        step += 1
        total_nfe += int(nfe.sum())
        before, spent = spent, spent + time.perf_counter() - began
        if spent // 120 > before // 120 or spent >= seconds:  # the curve takes no training time
            held = curve()
            writer.add_scalar("eval/reward_agent", held, total_nfe)
        bar.n = min(round(spent), bar.total)
        bar.set_postfix_str(f"{step} steps, reward {float(reward):.4f}")
    bar.close()
    writer.close()
    orl.save_run(run / "reward_gradient.pt", saved | {"agent": agent.state_dict(), "step": total_nfe})
    named = " ".join(f"{weight:g}" for weight in weights)
    print(f"{step} gradient steps of {args.batch} images, {total_nfe} NFE, held-out reward {held:.4f} "
          f"with weights {named}; written to {run}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
