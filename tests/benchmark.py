"""Throughput against the bare U-Net and the stock pipeline: medians of pairs that are measured one after the other.

    python tests/benchmark.py                # the shipped LDM and agent on the synthetic scenes

The last line is JSON: env_over_unet (environment steps with a random policy over bare U-Net calls of the same batch),
update_over_rollout (PPO update over the rollout before it), images_over_pipeline (one image by the agent over the plain
loop of 100 steps with the same weights; tiny_over_pipeline: over LDMSuperResolutionPipeline on a tiny random LDM).
"""

import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import tiny_ldm  # noqa: E402

import eval_sr  # noqa: E402
import ppo_ldm_sr as orl  # noqa: E402
import sr_inputs  # noqa: E402
from sr_metrics import Metrics, load_lpips  # noqa: E402


@dataclass
class Args:
    pairs: int = 5
    """repeated pairs, of which the median is told"""
    steps: int = 20
    """steps of each slot in one measurement"""
    agent: str = "runs/orl_ldm"
    """run folder of the agent"""
    dataset: str = "runs/scenes"
    """images to train on"""
    device: str = "auto"
    """auto, cpu or cuda"""


def seconds(function) -> float:
    """Wall time of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def split(env, agent, act, steps: int) -> dict[str, float]:
    """Share of the environment's and the agent's time by part, in a pass of its own since it waits after each."""
    spent = Counter()

    def watch(owner, name: str, part: str):
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            result = []
            spent[part] += seconds(lambda: result.append(function(*args, **kwargs)))
            return result[0]

        setattr(owner, name, watched)
        return lambda: setattr(owner, name, function)

    ldm = env.mdp.ldm
    parts = ((ldm, "predict", "U-Net"), (agent, "action_and_value", "agent"), (ldm, "decode", "decode"),
             (ldm, "encode", "encode (critic)"), (Metrics, "__call__", "metrics"))  # fmt: skip
    undo = [watch(*part) for part in parts]
    total = seconds(lambda: [act() for _ in range(steps)])
    for restore in undo:
        restore()
    spent["rest"] = total - sum(spent.values())
    return {k: round(v / total, 3) for k, v in spent.most_common()}


@torch.no_grad()
def main(args: Args) -> None:
    device, run = sr_inputs.pick_device(args.device), sr_inputs.locate(args.agent)
    settings = orl.Args()
    _, state = sr_inputs.load_tensors(run / "agent.safetensors")
    ldm = orl.load_ldm(state["args"]["ldm"], device)
    agent = eval_sr.load_agent(run, ldm)
    mdp = orl.Denoising(ldm, settings.base_steps, settings.max_calls)
    scenes = sr_inputs.load_scenes(args.dataset, "train", (), settings.crop).to(device)
    env = orl.DenoisingEnv(mdp, scenes, orl.Reward(Metrics(load_lpips(), device)), settings.num_envs, settings.crop, 0)
    observation, _ = env.reset()
    s, n = env.state, settings.num_envs
    z, lr, t = s.z.clone(), s.lr.clone(), s.t.clone()
    draw = torch.Generator().manual_seed(0)

    def random_step():
        env.step(0.6 * torch.randn(n, 7 + 2 * ldm.latent_channels, generator=draw).to(device))

    def agent_step():
        action, *_ = agent.action_and_value(*env.observe(), generator=draw)
        env.step(action)

    for warm_up in (lambda: ldm.predict(z, t, lr), random_step, agent_step) * 3:
        warm_up()
    learner = orl.Agent(ldm.latent_channels).to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=settings.learning_rate, eps=1e-5)
    unet, environment, rollout, update = [], [], [], []
    for _ in range(args.pairs):
        unet.append(n * args.steps / seconds(lambda: [ldm.predict(z, t, lr) for _ in range(args.steps)]))
        environment.append(n * args.steps / seconds(lambda: [random_step() for _ in range(args.steps)]))
        kept = []
        observation = env.observe()
        rollout.append(seconds(lambda: kept.append(orl.rollout(env, learner, observation, settings.num_steps, draw))))
        batch, observation, next_value, _ = kept[0]
        batch["advantages"], batch["returns"] = orl.gae(batch["rewards"] * settings.reward_scale, batch["values"], batch["dones"], next_value, 0.99, 0.95)
        with torch.enable_grad():
            update.append(seconds(lambda: orl.update(learner, optimizer, batch, settings, draw)))
    per_iteration = n * settings.num_steps
    ppo = [per_iteration / (a + b) for a, b in zip(rollout, update)]
    ended = float(batch["dones"].sum())
    print(f"U-Net {median(unet):.1f} calls/s; environment {median(environment):.1f} steps/s; PPO {median(ppo):.1f} steps/s, "
          f"{median(p / u for p, u in zip(ppo, unet)):.2f} of the U-Net's; {per_iteration / ended:.1f} steps an episode")  # fmt: skip
    print("share of rollout time by part:", split(env, agent, agent_step, args.steps))
    print(f"share of the update in an iteration: {median(u / (u + r) for u, r in zip(update, rollout)):.2f}")

    hr = sr_inputs.load_scenes(args.dataset, "test", (), 128)
    pixels = (orl.downscale(hr.image(0, 16)) * 255).round().byte()[0]
    tiny, with_tiny = tempfile.TemporaryDirectory(), []
    pipeline = tiny_ldm(tiny.name).to(device)
    pipeline.set_progress_bar_config(disable=True)
    small = orl.load_ldm(tiny.name, device)
    small_agent, small_mdp = orl.Agent(small.latent_channels).to(device), orl.Denoising(small, 5, 10)
    lr = (2 * pixels / 255 - 1)[None].to(device)
    full, plain, ours = orl.Denoising(ldm, 100, 100), mdp.plain, []
    for _ in range(args.pairs):
        by_agent = seconds(lambda: eval_sr.super_resolve_image(mdp, agent.mean, pixels, 128, 16, 0))
        ours.append(seconds(lambda: eval_sr.super_resolve_image(full, plain, pixels, 128, 16, 0)) / by_agent)
        by_agent = seconds(lambda: eval_sr.super_resolve_image(small_mdp, small_agent.mean, pixels, 128, 16, 0))
        with_tiny.append(seconds(lambda: pipeline(lr, num_inference_steps=100, output_type="np")) / by_agent)
    print(f"one image of {pixels.shape[2]} x {pixels.shape[1]} LR px: the agent is {median(ours):.1f} times as fast as 100 plain steps")
    figures = {
        "env_over_unet": median(e / u for e, u in zip(environment, unet)),
        "update_over_rollout": median(u / r for u, r in zip(update, rollout)),
        "images_over_pipeline": median(ours),
        "tiny_over_pipeline": median(with_tiny),
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        print(f"peak CUDA memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(json.dumps({k: round(v, 3) for k, v in figures.items()} | {"device": name}))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
