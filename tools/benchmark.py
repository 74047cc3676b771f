"""Measures speed, operations and the quality of one function evaluation.

    python tools/benchmark.py                          # the LDM, agent and synthetic scenes that ship
    python tools/benchmark.py --dataset data/paper8    # the last two figures on other images

Each speed is a ratio of two runs that follow one another; the median over several such pairs is printed. The last line
is JSON:

    rollout_over_unet     steps a second of a rollout, over those of the U-Net alone in batches of the same size
    update_over_rollout   seconds of a PPO update, over those of the rollout before it
    images_over_plain     how many times as fast the agent makes an image as 100 steps of the unsteered LDM
    gflop_per_image       10^9 operations (2 a multiply-add) of the agent's image of 32 x 32 LR px, decoder included
    one_call_psnr, _ssim  the unsteered LDM at one function evaluation (NFE) with back-projection: every fourth test
                          image, centre 128 px
"""

import json
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_ldm_sr as orl  # noqa: E402

SIZE = 128  # px of an HR image that is made; its LR image has 32 px
EVERY = 4  # one test image in so many is measured


@dataclass
class Args:
    pairs: int = 5  # repeated pairs of which the median is printed
    agent: str = "runs/orl_ldm"  # run folder of the agent
    dataset: str = "runs/scenes"  # image folder or Hub name
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one


def seconds(function) -> float:
    """Wall time of one call. On CUDA the device's queue is empty before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def training_speed(ldm: orl.LDM, images: orl.Images, lpips_fn, pairs: int) -> dict[str, float]:
    """Speeds of a training with the default settings, whose agent has not learned anything yet."""
    settings, nfe = orl.Args(), 3
    env = orl.DenoisingEnv(ldm, settings.base_steps, settings.max_nfe)
    learner = orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels).to(ldm.device)
    groups = [{"params": group} for group in learner.groups()]
    optimizer = torch.optim.Adam(groups, lr=settings.learning_rate, eps=1e-5)
    n, side = settings.num_envs, settings.crop // 4
    z = orl.noise_for(range(n), (ldm.latent_channels, side, side), 0, ldm.device)  # (n, c, h, w)
    t = torch.full((n,), len(ldm.alphas) - 1, device=ldm.device)  # (n,) the first timestep
    lr = torch.rand(n, 3, side, side, device=ldm.device)

    @torch.no_grad()
    def unet_alone() -> None:
        for _ in range(nfe):
            ldm.predict(z, t, lr)

    found = {"unet": [], "rollout": [], "update_over_rollout": [], "training": []}
    for seed in range(pairs + 1):
        bare = seconds(unet_alone)
        kept = []
        inputs = (env, learner, lpips_fn, images, settings, seed)
        rolled = seconds(lambda kept=kept, inputs=inputs: kept.append(orl.rollout(*inputs)))
        batch, _ = kept[0]
        updated = seconds(lambda batch=batch: orl.update(learner, optimizer, batch, settings))
        if seed == 0:
            continue  # the first pair warms up
        steps = len(batch["actions"])
        found["unet"].append(n * nfe / bare)
        found["rollout"].append(steps / rolled)
        found["update_over_rollout"].append(updated / rolled)
        found["training"].append(steps / (rolled + updated))
    found["rollout_over_unet"] = [r / u for r, u in zip(found["rollout"], found["unet"])]
    return {name: median(values) for name, values in found.items()}


@contextmanager
def operations():
    """A counter of operations. Attention is computed by plain products in it: others are not counted on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def image_speed(env: orl.DenoisingEnv, agent: orl.Agent, image: torch.Tensor, pairs: int) -> dict[str, float]:
    """Speed and operations of one image (3, SIZE, SIZE) by the agent."""
    lr = env.sensor.downscale(image[None]).clamp(0, 1)  # (1, 3, h, w)
    z = orl.noise_for([0], (env.ldm.latent_channels, *lr.shape[-2:]), 0, env.ldm.device)
    stock = orl.DenoisingEnv(env.ldm, 100, 100, env.sensor)
    with operations() as counter:
        _, nfe, _ = env.super_resolve(lr, z, agent)
    ratios = []
    for _ in range(pairs):
        steered = seconds(lambda: env.super_resolve(lr, z, agent))
        ratios.append(seconds(lambda: stock.super_resolve(lr, z, back_projection=False)) / steered)
    return {"images_over_plain": median(ratios), "gflop": counter.get_total_flops() / 1e9, "nfe": int(nfe)}


@torch.no_grad()
def one_call(ldm: orl.LDM, images: orl.Images) -> dict[str, float]:
    """Mean PSNR and SSIM of the unsteered LDM at one NFE with back-projection, over every fourth image."""
    env, parts = orl.DenoisingEnv(ldm, 1, 1), []
    for part in torch.arange(0, len(images.files), EVERY).split(16):
        hr = torch.stack([images.centre(i, 4 * ldm.stride, SIZE) for i in part.tolist()])
        lr = env.sensor.downscale(hr).clamp(0, 1)
        z = orl.noise_for(part.tolist(), (ldm.latent_channels, *lr.shape[-2:]), 0, ldm.device)
        sr, nfe, _ = env.super_resolve(lr, z)
        parts.append(orl.score(None, sr, hr, nfe))
    return {f"one_call_{key}": torch.cat([part[key] for part in parts]).mean().item() for key in ("psnr", "ssim")}


def main(args: Args) -> None:
    orl.check_bounds(args, pairs=(1, math.inf))
    device = orl.pick_device(args.device)
    saved = orl.load_run(orl.locate(args.agent))
    ldm = orl.load_ldm(saved["args"]["ldm"], device)
    agent = orl.load_agent(saved, ldm)
    own = saved["args"]
    env = orl.DenoisingEnv(ldm, own["base_steps"], own["max_nfe"], orl.Sensor(own["mtf"], own["lr_noise"]))
    train, test = (orl.load_images(args.dataset, split, (), SIZE, device) for split in ("train", "test"))

    speed = training_speed(ldm, train, orl.load_lpips(device), args.pairs)
    print(f"U-Net alone {speed['unet']:.1f}, rollout {speed['rollout']:.1f}, training {speed['training']:.1f} steps/s")
    image = image_speed(env, agent, test.centre(0, 4 * ldm.stride, SIZE), args.pairs)
    print(f"one image of {SIZE // 4} x {SIZE // 4} LR px: the agent takes {image['nfe']} NFE and {image['gflop']:.2f} "
          f"GFLOP, and is {image['images_over_plain']:.1f} times as fast as 100 unsteered steps")  # fmt: skip
    if device.type == "cuda":
        print(f"peak CUDA memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    figures = {name: speed[name] for name in ("rollout_over_unet", "update_over_rollout")}
    figures |= {"images_over_plain": image["images_over_plain"], "gflop_per_image": image["gflop"]}
    figures |= one_call(ldm, test)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(json.dumps({key: round(value, 4) for key, value in figures.items()} | {"device": name}))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
