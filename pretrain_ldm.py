"""Trains the small latent diffusion model that `ppo_ldm_sr.py` steers: an autoencoder, a U-Net that denoises latents
beside the LR image, and once more the decoder, on the U-Net's own latents, so that it prints no grid on them. Writes
diffusers' folder layout (`unet/`, `vqvae/`, `scheduler/`) in fp16 safetensors.

    python pretrain_ldm.py --dataset data/wide256 data/paper8 runs/scenes --minutes-autoencoder 30 --minutes-unet 60

--resume finishes a stretch that was stopped, optimiser, averages and all; where none was, it begins another from the
weights in --output. With a larger --layers the U-Net grows without forgetting: the new blocks begin as identities.
One training image in twelve is held back: v-loss per noise level and one call's PSNR on these are the curve.
"""

import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderDC, DDIMScheduler, UNet2DModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline
from safetensors.torch import save
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from tqdm import tqdm

import ppo_ldm_sr as orl
from eval_sr import judge, mean_cell
from ppo_ldm_sr import downscale, stop


@dataclass
class Args:
    # the run
    dataset: tuple[str, ...] = ("runs/scenes",)  # image folders or Hub names; every scene of their train splits is used
    small_share: float = 0.05  # share of crops drawn from datasets after the first two (the synthetic scenes)
    smooth_share: float = 0.08  # share of crops of smooth ground: a colour, a gradient, a slow wave
    output: str = "runs/ldm_x4"  # folder to write, in diffusers' layout
    resume: bool = False  # go on from the weights in --output
    held_out: int = 12  # one training image in so many is never trained on: the curve's
    eval_minutes: float = 15.0  # minutes between two points of the curve
    report_images: int = 48  # test images of each dataset for the figures at the end
    compile: bool = False  # torch.compile the training steps (on a CPU about 1.3 times as fast, after a minute)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 42  # seed of weights, crops and noise
    # the autoencoder, trained on 64 px crops
    minutes_autoencoder: float = 30.0  # minutes to train it (0: keep it as it is)
    batch_autoencoder: int = 16  # crops of a step
    lr_autoencoder: float = 2e-3  # learning rate of AdamW
    # the U-Net, trained with the autoencoder frozen
    minutes_unet: float = 60.0  # minutes to train it (0: keep it as it is)
    batch_unet: int = 32  # crops of a step
    lr_unet: float = 6e-4  # learning rate of AdamW
    layers: int = 3  # residual blocks a level (and one more on the way up); more than --output has: it grows
    crop: int = 96  # px of a crop
    zoom: float = 0.5  # half of the crops come from images scaled down by up to this factor, antialiased
    first_share: float = 0.25  # share of the batch at the first timestep, pure noise; the rest has any timestep
    # the decoder alone, on the U-Net's own clean latents beside the encoder's
    minutes_decoder: float = 20.0  # minutes to train it (0: keep it as it is)
    batch_decoder: int = 16  # 96 px crops of a step, half of them from the U-Net
    lr_decoder: float = 4e-4  # learning rate of AdamW
    grid_coef: float = 1.5  # weight of the penalty on the mean 4 x 4 px cell


LATENT_CHANNELS = 8
EVAL_CROP = 128  # px of the centre that the figures are measured on


def make_autoencoder() -> nn.Module:
    """4x autoencoder of convolutional blocks with pixel-unshuffle shortcuts (arXiv 2410.10733), 1.7 M parameters."""
    layers = {"block_types": "ResBlock", "block_out_channels": (32, 64, 128), "layers_per_block": (0, 1, 2)}
    layers["qkv_multiscales"] = ((), (), ())  # no attention
    both = {f"{part}_{k}": v for part in ("encoder", "decoder") for k, v in layers.items()}
    ends = {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle"}
    return AutoencoderDC(latent_channels=LATENT_CHANNELS, scaling_factor=1.0, **both, **ends)


def make_unet(layers: int) -> nn.Module:
    """U-Net on latents and LR image (concatenated, as by CompVis): 10.1 M parameters with three layers a block."""
    c, kinds = LATENT_CHANNELS, {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    sizes = {"sample_size": 32, "block_out_channels": (64, 128, 160), "layers_per_block": layers}
    return UNet2DModel(in_channels=c + 3, out_channels=c, **sizes, **kinds)


@torch.no_grad()
def grow(old: nn.Module, layers: int) -> nn.Module:
    """The same function with more residual blocks a level: `old` copied, the new blocks identities (Net2Net, arXiv
    1511.05641): their second convolution is zero, and on the way up, where a block takes a skip as well, its shortcut
    passes on what came from below."""
    new, extra = make_unet(layers), layers - old.config.layers_per_block
    source, state = old.state_dict(), new.state_dict()
    for name, value in source.items():
        parts = name.split(".")
        if parts[0] == "up_blocks" and parts[2] == "resnets" and int(parts[3]) > 0:
            parts[3] = str(int(parts[3]) + extra)  # up the skips come in reverse: the new ones after the first
        state[".".join(parts)] = value
    new.load_state_dict(state)
    for block in new.down_blocks:
        for resnet in block.resnets[-extra:]:
            nn.init.zeros_(resnet.conv2.weight), nn.init.zeros_(resnet.conv2.bias)
    for block in new.up_blocks:
        for resnet in block.resnets[1 : 1 + extra]:
            nn.init.zeros_(resnet.conv2.weight), nn.init.zeros_(resnet.conv2.bias)
            nn.init.dirac_(resnet.conv_shortcut.weight), nn.init.zeros_(resnet.conv_shortcut.bias)
    return new


def make_scheduler():
    """Cosine schedule with velocity prediction: the first call, at pure noise, then is the posterior mean."""
    kind = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
    return DDIMScheduler(**kind, timestep_spacing="trailing")


def smooth(n: int, size: int) -> torch.Tensor:
    """Calm water, snow, sand: a colour, a gradient and a slow wave, in 8-bit steps, (n, 3, size, size) in [0, 1]."""
    u = torch.rand(12, n, 1, 1, 1)
    ramp = torch.arange(size) - size / 2
    y, x = ramp.view(1, 1, size, 1), ramp.view(1, 1, 1, size)
    colour = 1.1 * u[0] - 0.05 + 0.3 * u[1] * (torch.rand(n, 3, 1, 1) - 0.5)
    tint = 0.5 + torch.rand(n, 3, 1, 1)
    angle, slope = 2 * math.pi * u[2], 0.003 * u[3] ** 3 * (u[4] < 0.7)
    gradient = slope * (x * angle.cos() + y * angle.sin())
    angle, length, height = 2 * math.pi * u[5], 40 * 16 ** u[6], 0.2 * u[7] ** 2 * (u[8] < 0.5)
    wave = height * (2 * math.pi * ((x * angle.cos() + y * angle.sin()) / length + u[9])).sin()
    return ((colour + tint * (gradient + wave)).clamp(0, 1) * 255).round() / 255


def zoomed(pixels: torch.Tensor, size: int, smallest: float) -> torch.Tensor:
    """uint8 (3, H, W) -> (3, size, size): a random crop, in half of the cases of the image scaled down by a random
    factor of at least `smallest`."""
    factor = max(smallest + (1 - smallest) * torch.rand(()).item(), size / min(pixels.shape[1:]))
    if factor < 1 and torch.rand(()) < 0.5:
        sides = [round(factor * side) for side in pixels.shape[1:]]
        pixels = v2.functional.resize(pixels, sides, v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.RandomCrop(size)(pixels)


class Crops:
    """Random training crops of several datasets: the first two by their number of images, the rest a small share."""

    def __init__(self, args: Args, device: torch.device):
        self.sets = [orl.load_images(name, "train", (), max(args.crop, 96), device) for name in args.dataset]
        self.held_out = []  # centres (n, 3, EVAL_CROP, EVAL_CROP) of images that are never trained on, a set each
        for images in self.sets:
            kept = range(0, len(images.files), args.held_out)
            self.held_out.append(torch.stack([images.centre(i, 1, EVAL_CROP) for i in kept]))
            images.pixels = [pixels for i, pixels in enumerate(images.pixels) if i not in kept]
        self.zoom = args.zoom
        weight = [float(len(images.pixels)) for images in self.sets]
        small = sum(weight[2:])
        if small:
            share = args.small_share / (1 - args.small_share) * sum(weight[:2])
            weight = weight[:2] + [w / small * share for w in weight[2:]]
        self.weight, self.smooth_share, self.device = torch.tensor(weight), args.smooth_share, device

    def __call__(self, n: int, size: int) -> torch.Tensor:
        """(n, 3, size, size) in [0, 1]."""
        calm = int((torch.rand(n) < self.smooth_share).sum())
        which = torch.multinomial(self.weight, max(1, n - calm), replacement=True)
        batch = list(smooth(calm, size).to(self.device))
        for i, images in enumerate(self.sets):
            if count := int((which == i).sum()):
                batch += [self.crop(images, size) for _ in range(count)]
        return torch.stack(batch[:n]).contiguous(memory_format=torch.channels_last)

    def crop(self, images: orl.Images, size: int) -> torch.Tensor:
        """One crop (3, size, size) in [0, 1] of a random image, flipped and turned."""
        which, turn = int(torch.randint(len(images.pixels), ())), int(torch.randint(8, ()))
        crop = zoomed(images.pixels[which], size, self.zoom).rot90(turn, (1, 2))
        return (crop.flip(2) if turn < 4 else crop).float() / 255


def save_part(model: nn.Module, folder: Path) -> None:
    """Writes config.json and fp16 safetensors; a kill leaves the old file."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    half = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    part = folder / "weights.part"
    part.write_bytes(save(half, {"format": "pt"}))
    part.replace(folder / "diffusion_pytorch_model.safetensors")


def train(name: str, model: nn.Module, loss_of, args: Args, folder: Path, seen: int, writer, curve=None) -> int:
    """AdamW with warm-up, constant rate and a cosine end, for `minutes_NAME` -> samples seen in all.

    loss_of: () -> (scalar loss, figures for the log); seen: samples seen before; curve: model -> figures of held-out
    images, every `eval_minutes`. Every five minutes the mean weights go into `folder`, and what a resume needs beside
    the log; a stretch that was stopped goes on there. The model ends with the mean weights.
    """
    seconds, lr, batch = (getattr(args, f"{k}_{name}") for k in ("minutes", "lr", "batch"))
    seconds *= 60
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    # exponential moving average of the weights, shorter at first
    average = AveragedModel(model, avg_fn=lambda mean, new, n: mean.lerp(new, 1 - min(0.999, n / (n + 10))))
    state = {"elapsed": 0.0, "step": 0, "seen": seen}
    file = Path(f"{args.output}_log") / f"{name}.pt"
    if args.resume and file.is_file():
        saved = torch.load(file, weights_only=True)
        if saved["state"]["elapsed"] < seconds and saved["state"]["seen"] >= seen:
            model.load_state_dict(saved["model"]), average.load_state_dict(saved["average"])
            optimizer.load_state_dict(saved["optimizer"])
            state = saved["state"]
            torch.manual_seed(args.seed + state["seen"])
            print(f"{name}: goes on after {state['elapsed'] / 60:.0f} of {seconds / 60:.0f} minutes")
    saved_at = last = time.time()
    evaluated, started, first, smoothed = -math.inf, time.time(), state["seen"], None
    shape = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}"
    bar = tqdm(total=round(seconds), desc=name, unit="s", mininterval=5, bar_format=shape)

    def save() -> None:
        if not orl.finite(trained):
            stop(f"the {name} is no longer finite; lower its learning rate, go on with --resume")
        save_part(average.module, folder)
        parts = {"model": model, "average": average, "optimizer": optimizer}
        orl.save_run(file, {k: v.state_dict() for k, v in parts.items()} | {"state": state})

    while state["elapsed"] < seconds:
        # what is longer than a step was compilation, or a machine that did something else: no training
        now, elapsed = time.time(), state["elapsed"]
        state["elapsed"], last = elapsed + min(now - last, 3.0), now
        if curve and elapsed - evaluated > 60 * args.eval_minutes:
            evaluated, figures = elapsed, curve(average.module)
            for key, figure in figures.items():
                writer.add_scalar(f"held_out/{key}", figure, state["seen"])
            tqdm.write(f"{name} {state['seen']}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
            sys.stdout.flush()
            last = time.time()  # measuring is not training
        progress = elapsed / seconds
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.5) / 0.5))
        rate = lr * min(1, (state["step"] + 1) / 200) * (1 if progress < 0.5 else cosine)
        optimizer.param_groups[0]["lr"] = rate
        loss, figures = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update_parameters(model)
        state |= {"step": state["step"] + 1, "seen": state["seen"] + batch}
        if state["step"] % 50 == 0:
            value = loss.item()
            if not math.isfinite(value):
                stop(f"the {name}'s loss is {value}; lower its learning rate, go on with --resume")
            smoothed = value if smoothed is None else 0.9 * smoothed + 0.1 * value
            for key, figure in {"loss": smoothed, "learning_rate": rate, **figures}.items():
                writer.add_scalar(f"{name}/{key}", float(figure), state["seen"])
            bar.n = min(round(elapsed), round(seconds))
            speed = (state["seen"] - first) / (time.time() - started)
            bar.set_postfix_str(f"loss {smoothed:.4f}, {state['seen']} samples, {speed:.0f}/s")
        if time.time() - saved_at > 300:
            saved_at = time.time()
            save()
    bar.close()
    model.load_state_dict(average.module.state_dict())
    state["elapsed"] = math.inf  # this stretch is over: a resume begins another
    save()
    return state["seen"]


def compiled(args: Args, module):
    """The module as --compile asks; not dynamic: on the decoder's two sizes of crops TorchInductor would stop."""
    return torch.compile(module, dynamic=False) if args.compile else module


def reconstruction_loss(ldm: orl.LDM, lpips, output: torch.Tensor, target: torch.Tensor, natural: int):
    """Images (n, 3, H, W) in [-1, 1] -> L1 + MSE / 2 + 0.3 LPIPS, and LPIPS, of the first `natural` of them."""
    error, dy, dx = output - target, *torch.randint(4, (2,)).tolist()
    # LPIPS is shifted by 0 to 3 px: AlexNet's stride is 4, as the cells' side
    parts = (x[:natural, :, dy : x.shape[2] - 4 + dy, dx : x.shape[3] - 4 + dx] for x in (output, target))
    with ldm.autocast:
        perceptual = lpips(*parts).mean().float() if lpips else output.new_zeros(())
    return error.abs().mean() + 0.5 * error.square().mean() + 0.3 * perceptual, perceptual.detach()


def autoencoder_training(args: Args, ldm: orl.LDM, crops: Crops, lpips):
    """Encoder and decoder -> `loss_of` for `train`."""
    ldm.vqvae.requires_grad_(True)
    encoder, decoder = compiled(args, ldm.vqvae.encode), compiled(args, ldm.vqvae.decode)

    def loss_of():
        image = crops(args.batch_autoencoder, 64) * 2 - 1
        with ldm.autocast:
            latents = encoder(image, return_dict=False)[0]
            output = decoder(latents + 0.02 * torch.randn_like(latents), return_dict=False)[0].float()
        # 60 px are few for AlexNet, but enough for texture
        loss, perceptual = reconstruction_loss(ldm, lpips, output, image, len(image))
        latents = latents.float()
        spread = (latents.var(dim=(0, 2, 3)) - 1).square().mean() + latents.mean(dim=(0, 2, 3)).square().mean()
        psnr = 10 * torch.log10(4 / F.mse_loss(output.detach(), image))
        return loss + 0.01 * spread, {"psnr": psnr, "lpips": perceptual, "spread": spread.detach()}

    return loss_of


def velocity_loss(ldm: orl.LDM, unet, latents: torch.Tensor, lr: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Mean square error (n,) of the v-prediction (arXiv 2202.00512, eq. 12) for latents (n, c, h, w), LR (n, 3, h, w)
    in [-1, 1], timesteps (n,)."""
    noise = torch.randn_like(latents)
    noisy, velocity = (f(latents, noise, t) for f in (ldm.scheduler.add_noise, ldm.scheduler.get_velocity))
    return (ldm.run(unet, torch.cat([noisy, lr], 1), t) - velocity).square().mean(dim=(1, 2, 3))


def unet_training(args: Args, ldm: orl.LDM, crops: Crops):
    """The U-Net, autoencoder frozen -> `loss_of` for `train`."""
    ldm.vqvae.requires_grad_(False), ldm.unet.requires_grad_(True)
    unet, device = compiled(args, ldm.unet), ldm.device

    def encode_crops(n: int):
        image = crops(n, args.crop)
        lr = downscale(image)
        rounded = torch.rand(n, 1, 1, 1, device=device) < 0.5  # as a user's 8-bit LR image is
        return ldm.encode(image).half(), (torch.where(rounded, (lr * 255).round() / 255, lr) * 2 - 1).half()

    # a pool of encoded crops, a quarter of a batch of which is renewed at every step: a crop is seen about
    # four times, each time with other noise, and the encoder costs a quarter of what it would
    pool = [torch.cat(parts) for parts in zip(*(encode_crops(2 * args.batch_unet) for _ in range(64)))]
    steps = ldm.scheduler.config.num_train_timesteps
    first = round(args.first_share * args.batch_unet)  # without noise's help, a regression: it needs its own share

    def loss_of():
        renew = max(1, args.batch_unet // 4)
        slot = torch.randint(len(pool[0]), (renew,))
        for part, new in zip(pool, encode_crops(renew)):
            part[slot] = new
        pick = torch.randint(len(pool[0]), (args.batch_unet,))
        latents, lr = (part[pick].float() for part in pool)
        t = torch.randint(steps, (args.batch_unet,), device=device)
        t[:first] = steps - 1
        return velocity_loss(ldm, unet, latents, lr, t).mean(), {}

    return loss_of


@torch.no_grad()
def held_out_figures(args: Args, ldm: orl.LDM, crops: Crops, unet: nn.Module) -> dict[str, float]:
    """v-loss of held-out images at several noise levels, and PSNR (dB) and SSIM of one call + consistency, for each of
    the first two datasets; the same noise every time."""
    found, last = {}, ldm.scheduler.config.num_train_timesteps - 1
    with torch.random.fork_rng(devices=[]):
        for name, hr in zip(args.dataset[:2], crops.held_out):
            torch.manual_seed(0)
            name, parts, rows = Path(name).name, [], []
            for part in hr.split(32):
                latents, lr = ldm.encode(part), downscale(part)
                levels = [torch.full((len(part),), t, device=ldm.device) for t in (100, 300, 500, 700, 900, last)]
                rows.append(torch.stack([velocity_loss(ldm, unet, latents, 2 * lr - 1, t) for t in levels]))
                z = torch.cat([torch.randn_like(latents), 2 * lr - 1], 1)
                sr = ldm.decode(-ldm.run(unet, z, levels[-1]))  # v at pure noise is minus the clean latent
                sr = orl.make_consistent(sr, lr)
                score = orl.score(None, sr, part, torch.zeros(len(part), device=ldm.device))
                parts.append(torch.stack([score["psnr"], score["ssim"]]))
            losses, (psnr, ssim) = torch.cat(rows, 1).mean(1), torch.cat(parts, 1).mean(1)
            found |= {f"{name}/{t[0]}": float(v) for t, v in zip(levels, losses)}
            found |= {f"{name}/mean": float(losses[:5].mean()), f"{name}/psnr": float(psnr)}
            found[f"{name}/ssim"] = float(ssim)
    return found


def decoder_training(args: Args, ldm: orl.LDM, crops: Crops, lpips):
    """The decoder alone, U-Net and encoder frozen -> `loss_of` for `train`."""
    ldm.vqvae.requires_grad_(False), ldm.unet.requires_grad_(False), ldm.vqvae.decoder.requires_grad_(True)
    decode, choices, share, turn = compiled(args, ldm.vqvae.decode), (1, 3, 10, 30), 6 * args.batch_decoder, 0

    @torch.no_grad()
    def sampled_crops(n: int, calls: int):
        """What the plain LDM gives after so many calls: clean latents (n, c, 24, 24), and the HR crops."""
        image = crops(n, 96)
        lr, z = downscale(image), torch.randn(n, LATENT_CHANNELS, 24, 24, device=ldm.device)
        return orl.Denoising(ldm, calls, calls).denoise(lr, z)[0], image

    # a pool again: `share` crops for each number of calls, two of which are renewed at every step
    drawn = [sampled_crops(share // 4, k) for k in choices for _ in range(4)]
    samples, sampled_hr = (torch.cat(parts) for parts in zip(*drawn))

    def loss_of():
        nonlocal turn
        kind, at = turn % len(choices), share * (turn % len(choices)) + 2 * (turn // len(choices)) % share
        samples[at : at + 2], sampled_hr[at : at + 2] = sampled_crops(2, choices[kind])
        turn, half = turn + 1, args.batch_decoder // 2
        pick, image = torch.randint(len(samples), (half,)), crops(half, 96)
        latents = ldm.encode(image)
        latents = torch.cat([latents + 0.02 * torch.randn_like(latents), samples[pick]])
        target = torch.cat([image, sampled_hr[pick]]) * 2 - 1
        output = ldm.run(decode, latents)
        loss, perceptual = reconstruction_loss(ldm, lpips, output, target, half)
        printed = mean_cell(output[half:] / 2 + 0.5)[0].var(1, correction=0).mean()  # 0: no cell repeats itself
        figures = {"l1": F.l1_loss(output.detach(), target), "lpips": perceptual, "printed": printed.detach()}
        return loss + args.grid_coef * printed, figures

    return loss_of


def pca_yardstick(train: torch.Tensor, test: torch.Tensor) -> torch.Tensor:
    """`test` (n, 3, H, W) through a linear autoencoder of as many channels: the PCA of 4 x 4 patches of `train`."""
    patches = F.pixel_unshuffle(train, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    mean = patches.mean(0)
    basis = torch.linalg.eigh((patches - mean).T @ (patches - mean)).eigenvectors[:, -LATENT_CHANNELS:]
    codes = (F.pixel_unshuffle(test, 4).permute(0, 2, 3, 1) - mean) @ basis
    return F.pixel_shuffle((codes @ basis.T + mean).permute(0, 3, 1, 2), 4).clamp(0, 1)


@torch.inference_mode()
def report(args: Args, crops: Crops, device: torch.device) -> str:
    """Test-set figures of the model in --output: reconstruction, and plain DDIM at several numbers of steps."""
    ldm, net = orl.load_ldm(args.output, device), orl.load_lpips(device)
    train = crops(512, EVAL_CROP)
    lines = ["| images | what | PSNR (dB) | SSIM | LPIPS | VIF | grid |", "|---|---|---|---|---|---|---|"]

    def line(title: str, what: str, sr: torch.Tensor, hr: torch.Tensor) -> None:
        parts = [judge(net, a, b, torch.zeros(len(a), device=device)) for a, b in zip(sr.split(16), hr.split(16))]
        found = {k: torch.cat([p[k] for p in parts]).mean() for k in ("psnr", "ssim", "lpips", "vif", "grid")}
        cells = [f"{v:.{digits}f}" for v, digits in zip(found.values(), (2, 3, 3, 3, 1))]
        lines.append(f"| {title} | {what} | " + " | ".join(cells) + " |")

    for name in args.dataset:
        test = orl.load_images(name, "test", (), EVAL_CROP, device)
        indices = range(0, len(test.files), -(-len(test.files) // args.report_images))
        hr = torch.stack([test.centre(i, 4 * ldm.stride, EVAL_CROP) for i in indices])
        lr = downscale(hr)
        z = orl.noise_for(ldm, indices, *lr.shape[-2:], 0)
        title = f"{test.title}, {len(indices)} test images, centre {EVAL_CROP} px"
        line(title, "HR itself", hr, hr)
        line(title, "bicubic", orl.upscale(lr).clamp(0, 1), hr)
        line(title, f"PCA of 4 x 4 patches, {LATENT_CHANNELS} channels", pca_yardstick(train, hr), hr)
        line(title, "autoencoder", torch.cat([ldm.decode(ldm.encode(part)) for part in hr.split(16)]), hr)
        for steps in (1, 2, 4, 10, 100):
            mdp = orl.Denoising(ldm, steps, steps)
            parts = zip(lr.split(16), z.split(16))
            sr = torch.cat([mdp.super_resolve(*part, consistent=False)[0] for part in parts])
            line(title, f"plain DDIM, {steps} step(s)", sr, hr)
            line(title, f"plain DDIM, {steps} step(s) + consistency", orl.make_consistent(sr, lr), hr)
    return "\n".join(lines)


def main(args: Args) -> None:
    sys.stdout.reconfigure(errors="replace")
    least = {"held_out": 2, "batch_autoencoder": 2, "batch_unet": 2, "batch_decoder": 2, "layers": 1, "zoom": 0.1}
    least |= {"small_share": 0, "smooth_share": 0, "first_share": 0}
    most = {"small_share": 0.99, "smooth_share": 0.99, "first_share": 0.99, "zoom": 1, "layers": 16}
    orl.check_bounds(args, least, most)
    if args.crop % 16 or args.crop < orl.LEAST_CROP:
        stop(f"--crop {args.crop} must be a multiple of 16, 4 x the U-Net's stride, from {orl.LEAST_CROP} on")
    device = orl.pick_device(args.device)
    output = Path(args.output)
    print(f"device: {device.type}, {'bf16 autocast' if orl.has_bf16(device) else 'fp32'}")
    log_file = output / "training.json"
    log = {"stretches": [], "autoencoder": 0, "unet": 0, "decoder": 0}
    log |= json.loads(log_file.read_text()) if args.resume and log_file.is_file() else {}
    if (output / "vqvae").is_dir() and not args.resume:
        stop(f"{output} holds a model; go on with --resume or name another --output")
    for part, folder in (("autoencoder", "vqvae"), ("unet", "unet")):
        if getattr(args, f"minutes_{part}") <= 0 and not (output / folder).is_dir():
            stop(f"--minutes-{part} 0: {output} has no {folder} yet; give it some")
    crops = Crops(args, device)
    torch.manual_seed(args.seed + log["autoencoder"] + log["unet"] + log["decoder"])  # a later stretch draws anew

    def model_of(folder: Path, kind, make) -> nn.Module:
        options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}  # said: else diffusers names accelerate
        return kind.from_pretrained(folder, **options) if folder.is_dir() else make()

    vae = model_of(output / "vqvae", AutoencoderDC, make_autoencoder)
    unet = model_of(output / "unet", UNet2DModel, lambda: make_unet(args.layers))
    if args.layers > unet.config.layers_per_block:
        unet = grow(unet, args.layers)
        print(f"U-Net: grown to {args.layers} blocks a level, {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M")
    scheduler = make_scheduler()
    ldm = orl.LDM(unet, vae, scheduler, device)  # frozen: every part below says what it trains
    output.mkdir(parents=True, exist_ok=True)
    scheduler.save_config(output / "scheduler")
    LDMSuperResolutionPipeline(vqvae=vae, unet=unet, scheduler=scheduler).save_config(output)  # model_index.json
    writer = SummaryWriter(f"{output}_log")
    lpips = orl.load_lpips(device) if args.minutes_autoencoder + args.minutes_decoder > 0 else None

    def stretch(part: str, model: nn.Module, folder: str, loss_of, curve=None) -> None:
        log[part] = train(part, model, loss_of, args, output / folder, log[part], writer, curve)
        log["stretches"].append({f"{part}_minutes": getattr(args, f"minutes_{part}"), f"{part}_samples": log[part]})
        log_file.write_text(json.dumps(log, indent=2) + "\n")

    if args.minutes_autoencoder > 0:
        stretch("autoencoder", vae, "vqvae", autoencoder_training(args, ldm, crops, lpips))
    if args.minutes_unet > 0:
        curve = partial(held_out_figures, args, ldm, crops)
        stretch("unet", unet, "unet", unet_training(args, ldm, crops), curve)
    if args.minutes_decoder > 0:
        stretch("decoder", vae, "vqvae", decoder_training(args, ldm, crops, lpips))
    writer.close()
    table = report(args, crops, device)
    seen = ", ".join(f"{log[part]} crops ({part})" for part in ("autoencoder", "unet", "decoder"))
    (output / "figures.md").write_text(f"After {seen}:\n\n{table}\n", encoding="utf-8")
    print(f"\n{table}\n\nwritten to {output}; next: python ppo_ldm_sr.py --ldm {shlex.quote(str(output))}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
