"""Trains the small latent diffusion model (LDM) that `ppo_ldm_sr.py` steers.

    python tools/pretrain_ldm.py --dataset data/wide256 data/paper8 --extra runs/scenes --output ldm

It trains an autoencoder, then a U-Net that denoises latents beside the LR image, then the decoder once more, on the
U-Net's own latents, so that it prints no 4 px grid on them. It writes diffusers' folder layout (`unet/`, `vqvae/`,
`scheduler/`) in fp16 safetensors, and a TensorBoard log into OUTPUT_log.

--resume finishes a stretch that was stopped, or else begins another one from the weights in --output. With a larger
--layers the U-Net grows without forgetting. One training image in twelve is held back for the curves.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_ldm_sr as orl  # noqa: E402
from eval_sr import mean_cell  # noqa: E402


@dataclass
class Args:
    # the run
    dataset: tuple[str, ...] = ("runs/scenes",)  # image folders or Hub names; every scene of their train splits is used
    extra: tuple[str, ...] = ()  # more of them, which have --extra-share of the crops together (the synthetic scenes)
    extra_share: float = 0.05  # share of the crops that come from --extra
    leave_out: str | None = None  # text file of images that are never read, a line each: train/scene/name.jpg
    smooth_share: float = 0.08  # share of crops of smooth ground: a colour, a gradient, a slow wave
    output: str = "runs/ldm_x4"  # folder to write, in diffusers' layout
    resume: bool = False  # continue from the weights in --output
    held_out: int = 12  # one training image in so many, by name, is never trained on: the curve is measured on these
    eval_minutes: float = 15.0  # minutes between two points of the curve
    cpu_time: bool = False  # count minutes of this process' CPU time over its threads, so that other work counts not
    compile: bool = False  # torch.compile the training steps (on a CPU about 1.3 times as fast, after a minute)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 42  # seed of weights, crops and noise
    # the autoencoder, trained on 64 px crops
    minutes_autoencoder: float = 30.0  # minutes to train it (0: keep it as it is)
    batch_autoencoder: int = 16  # crops of a step
    lr_autoencoder: float = 2e-3  # learning rate of AdamW
    decoder_layers: tuple[int, int, int] | None = None  # residual blocks of the decoder a level (None: as is, or 0 1 2)
    # the U-Net, trained with the autoencoder frozen
    minutes_unet: float = 60.0  # minutes to train it (0: keep it as it is)
    batch_unet: int = 32  # crops of a step
    lr_unet: float = 6e-4  # learning rate of AdamW
    layers: int = 3  # residual blocks a level, and one more on the way up; where --output has fewer, the U-Net grows
    crop: int = 96  # px of a crop
    mtf: float | None = None  # the sensor's modulation transfer at the LR Nyquist frequency (None: bicubic)
    zoom: float = 0.5  # half of the crops come from images scaled down by up to this factor, antialiased
    first_share: float = 0.25  # share of the batch at the first timestep, pure noise; the rest has any timestep
    # the decoder alone, on the U-Net's own clean latents beside the encoder's
    minutes_decoder: float = 20.0  # minutes to train it (0: keep it as it is)
    batch_decoder: int = 16  # 96 px crops of a step, half of them from the U-Net
    lr_decoder: float = 4e-4  # learning rate of AdamW
    grid_coef: float = 1.5  # weight of the penalty on the mean 4 x 4 px cell


PARTS, LATENT_CHANNELS = ("autoencoder", "unet", "decoder"), 8
EVAL_CROP = 128  # px of the centre that the figures are measured on
MOST_PIXELS = 256 * 256  # of an image that count when it is chosen


# ---------------------------------------------------------------------------------------------- models
def make_autoencoder(decoder_layers: tuple[int, int, int] | None = None) -> nn.Module:
    """4x autoencoder of convolutional blocks with pixel-unshuffle shortcuts (arXiv 2410.10733), 1.7 M parameters."""
    layers = {"encoder": (0, 1, 2), "decoder": decoder_layers or (0, 1, 2)}
    settings = {f"{part}_layers_per_block": blocks for part, blocks in layers.items()}
    for part in layers:
        settings |= {f"{part}_block_types": "ResBlock", f"{part}_block_out_channels": (32, 64, 128)}
        settings[f"{part}_qkv_multiscales"] = ((), (), ())  # no attention
    ends = {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle"}
    return AutoencoderDC(latent_channels=LATENT_CHANNELS, scaling_factor=1.0, **settings, **ends)


def make_unet(layers: int) -> nn.Module:
    """U-Net on latents and LR image, concatenated as by CompVis. With three layers it has 10.1 M parameters."""
    kinds = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    sizes = {"sample_size": 32, "block_out_channels": (64, 128, 160), "layers_per_block": layers}
    return UNet2DModel(in_channels=LATENT_CHANNELS + 3, out_channels=LATENT_CHANNELS, **sizes, **kinds)


@torch.no_grad()
def grow(old: nn.Module, layers: int) -> nn.Module:
    """A U-Net with more residual blocks a level that computes the same function (Net2Net, arXiv 1511.05641).
    The old blocks are copied. A new one is an identity: its second convolution is zero. On the way up, where a block
    takes a skip as well, its shortcut passes on what came from below."""
    new = make_unet(layers)
    extra = layers - old.config.layers_per_block
    state = new.state_dict()
    for name, value in old.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up_blocks" and parts[2] == "resnets" and int(parts[3]) > 0:
            parts[3] = str(int(parts[3]) + extra)  # on the way up skips come in reverse: new ones follow the first
        state[".".join(parts)] = value
    new.load_state_dict(state)
    down = [resnet for block in new.down_blocks for resnet in block.resnets[-extra:]]
    up = [resnet for block in new.up_blocks for resnet in block.resnets[1 : 1 + extra]]
    for layer in [resnet.conv2 for resnet in down + up] + [resnet.conv_shortcut for resnet in up]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for resnet in up:
        nn.init.dirac_(resnet.conv_shortcut.weight)
    return new


def make_scheduler() -> DDIMScheduler:
    """Cosine schedule with velocity prediction: the first NFE, at pure noise, then estimates the posterior mean."""
    kind = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
    return DDIMScheduler(**kind, timestep_spacing="trailing")


# ---------------------------------------------------------------------------------------------- training images
def smooth(n: int, size: int) -> torch.Tensor:
    """Calm water, snow, sand: a colour, a gradient and a slow wave, in 8-bit steps: (n, 3, size, size) in [0, 1]."""
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


def read_training_images(dataset: str, left_out: set[str], every: int, least: int):
    """All images of a dataset's train split, uint8 (3, H, W) -> those to train on; one in `every`, by name, held back;
    names in `left_out` that were met. A side below `least` px is too small. `orl.load_images` would read 80% where
    there is no test split, and the paper's eight scenes alone where all of them are there."""
    rows = sorted((row for row in orl.find_images(dataset)[0] if row[0] == "train"), key=lambda row: row[1:3])
    met = left_out.intersection("/".join(row[:3]) for row in rows)
    training, held_out, skipped = [], [], 0
    for k, (*_, read) in enumerate(row for row in rows if "/".join(row[:3]) not in met):
        try:
            pixels = orl.read_image(read())
        except (OSError, ValueError, SyntaxError):  # what Pillow raises for a broken file
            pixels = torch.empty(3, 0, 0)
        if min(pixels.shape[1:]) < least:
            skipped += 1
        else:
            (training if k % every else held_out).append(pixels)
    if not training or not held_out:
        orl.stop(f"--dataset {dataset}: its train split has too few images of {least} px or more; name another")
    print(f"data: {dataset}: {len(training)} images to train on, {len(held_out)} held back, {len(met)} left out, "
          f"{skipped} broken or below {least} px")  # fmt: skip
    return training, held_out, met


class Crops:
    """Random training crops. An image is chosen by its pixels, of which at most MOST_PIXELS count."""

    def __init__(self, args: Args, device: torch.device):
        self.sensor, names = orl.Sensor(args.mtf), (*args.dataset, *args.extra)
        left_out = set(Path(args.leave_out).read_text("utf-8").split("\n")) - {""} if args.leave_out else set()
        # {name: centres (n, 3, EVAL_CROP, EVAL_CROP) in [0, 1] of images that are never trained on}
        self.pixels, self.held_out, shares, all_met = [], {}, {}, set()
        for name in names:
            training, held, met = read_training_images(name, left_out, args.held_out, max(args.crop, EVAL_CROP))
            self.held_out[name] = torch.stack([v2.functional.center_crop(p, EVAL_CROP) for p in held]).to(device) / 255
            self.pixels += [pixels.to(device) for pixels in training]
            shares[name] = torch.tensor([float(min(pixels[0].numel(), MOST_PIXELS)) for pixels in training])
            all_met |= met
        if unknown := sorted(left_out - all_met):
            orl.stop(f"--leave-out {args.leave_out}: no dataset has {len(unknown)} of its images, such as {unknown[0]}")
        main, extra = (sum(shares[name].sum() for name in group) for group in (args.dataset, args.extra))
        for name in args.extra:
            shares[name] *= args.extra_share / (1 - args.extra_share) * main / extra
        self.weights = torch.cat(list(shares.values()))
        print("data: crops:", {name: f"{share.sum() / self.weights.sum():.1%}" for name, share in shares.items()})
        self.zoom, self.smooth_share, self.device = args.zoom, args.smooth_share, device

    def __call__(self, n: int, size: int) -> torch.Tensor:
        """(n, 3, size, size) in [0, 1]."""
        calm = int((torch.rand(n) < self.smooth_share).sum())
        chosen = torch.multinomial(self.weights, max(1, n - calm), replacement=True).tolist()
        batch = [*smooth(calm, size).to(self.device), *(self.crop(i, size) for i in chosen)]
        return torch.stack(batch[:n]).contiguous(memory_format=torch.channels_last)

    def crop(self, i: int, size: int) -> torch.Tensor:
        """One crop (3, size, size) in [0, 1] of image i, flipped and turned."""
        turn = int(torch.randint(8, ()))
        crop = zoomed(self.pixels[i], size, self.zoom).rot90(turn, (1, 2))
        return (crop.flip(2) if turn < 4 else crop).float() / 255


# ---------------------------------------------------------------------------------------------- training
def save_part(model: nn.Module, folder: Path) -> None:
    """Writes config.json and fp16 safetensors; a kill leaves the old file."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    half = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    part = folder / "weights.part"
    part.write_bytes(save(half, {"format": "pt"}))
    part.replace(folder / "diffusion_pytorch_model.safetensors")


def train(name: str, model: nn.Module, loss_of, args: Args, folder: Path, seen: int, writer, curve=None) -> int:
    """AdamW with warm-up, a constant rate and a cosine end, for `minutes_NAME` -> samples seen in all.
    loss_of: () -> (scalar loss, figures for the log); seen: samples seen before; curve: model -> figures of held-out
    images, every `eval_minutes`. Every five minutes the averaged weights go into `folder`, and what a resume needs goes
    beside the log. The model ends with the averaged weights."""
    minutes, lr, batch = (getattr(args, f"{key}_{name}") for key in ("minutes", "lr", "batch"))
    seconds = 60 * minutes
    clock = (lambda: time.process_time() / torch.get_num_threads()) if args.cpu_time else time.monotonic
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    # exponential moving average of the weights, shorter at first
    average = AveragedModel(model, avg_fn=lambda mean, new, n: mean.lerp(new, 1 - min(0.999, n / (n + 10))))
    parts = {"model": model, "average": average, "optimizer": optimizer}
    state = {"elapsed": 0.0, "step": 0, "seen": seen}
    file = Path(f"{args.output}_log", f"{name}.pt")
    if args.resume and file.is_file():
        saved = torch.load(file, weights_only=True)
        if saved["state"]["elapsed"] < seconds and saved["state"]["seen"] >= seen:
            for key, part in parts.items():
                part.load_state_dict(saved[key])
            state = saved["state"]
            torch.manual_seed(args.seed + state["seen"])
            print(f"{name}: goes on after {state['elapsed'] / 60:.0f} of {minutes:.0f} minutes")
    started = saved_at = time.monotonic()
    last, evaluated, first, smoothed = clock(), -math.inf, state["seen"], None
    bar = tqdm(total=round(seconds), desc=name, mininterval=5, bar_format="{desc} {percentage:3.0f}% |{bar}| {postfix}")

    def save_all() -> None:
        if not all(parameter.isfinite().all() for parameter in trained):
            orl.stop(f"the {name} is no longer finite; lower its learning rate, go on with --resume")
        save_part(average.module, folder)
        orl.save_run(file, {key: part.state_dict() for key, part in parts.items()} | {"state": state})

    while state["elapsed"] < seconds:
        # a step that takes longer than three seconds was compilation, or a machine that did something else
        now, elapsed = clock(), state["elapsed"]
        state["elapsed"] = elapsed + min(now - last, 3.0)
        last = now
        if curve and elapsed - evaluated > 60 * args.eval_minutes:
            evaluated, figures = elapsed, curve(average.module)
            for key, figure in figures.items():
                writer.add_scalar(f"held_out/{key}", figure, state["seen"])
            print(f"\n{name} {state['seen']}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
            last = clock()  # measuring is not training
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
            smoothed = loss.item() if smoothed is None else 0.9 * smoothed + 0.1 * loss.item()
            if not math.isfinite(smoothed):
                orl.stop(f"the {name}'s loss is not finite; lower its learning rate, go on with --resume")
            for key, figure in {"loss": smoothed, "learning_rate": rate, **figures}.items():
                writer.add_scalar(f"{name}/{key}", float(figure), state["seen"])
            bar.n = min(round(elapsed), round(seconds))
            speed = (state["seen"] - first) / (time.monotonic() - started)
            bar.set_postfix_str(f"loss {smoothed:.4f}, {state['seen']} samples, {speed:.0f}/s")
        if time.monotonic() - saved_at > 300:
            saved_at = time.monotonic()
            save_all()
    bar.close()
    model.load_state_dict(average.module.state_dict())
    state["elapsed"] = math.inf  # this stretch is over: a resume begins another
    save_all()
    return state["seen"]


def compiled(args: Args, module):
    """The module as --compile asks; not dynamic, since TorchInductor stops at the decoder's two sizes of crops."""
    return torch.compile(module, dynamic=False) if args.compile else module


def reconstruction_loss(ldm: orl.LDM, lpips_fn, output: torch.Tensor, target: torch.Tensor, natural: int):
    """Images (n, 3, H, W) in [-1, 1] -> L1 + MSE / 2 + 0.3 LPIPS, and LPIPS, of the first `natural` of them."""
    error = output - target
    # LPIPS is shifted by 0 to 3 px: AlexNet's stride is 4, as the side of the cells
    dy, dx = torch.randint(4, (2,)).tolist()
    parts = (x[:natural, :, dy : x.shape[2] - 4 + dy, dx : x.shape[3] - 4 + dx] for x in (output, target))
    with ldm.autocast:
        perceptual = lpips_fn(*parts).mean().float() if lpips_fn else output.new_zeros(())
    return error.abs().mean() + 0.5 * error.square().mean() + 0.3 * perceptual, perceptual.detach()


def autoencoder_training(args: Args, ldm: orl.LDM, crops: Crops, lpips_fn):
    """Encoder and decoder -> `loss_of` for `train`."""
    ldm.vqvae.requires_grad_(True)
    encoder, decoder = compiled(args, ldm.vqvae.encode), compiled(args, ldm.vqvae.decode)

    def loss_of():
        image = crops(args.batch_autoencoder, 64) * 2 - 1
        with ldm.autocast:
            latents = encoder(image, return_dict=False)[0]
            output = decoder(latents + 0.02 * torch.randn_like(latents), return_dict=False)[0].float()
        # 60 px are few for AlexNet, but enough for texture
        loss, perceptual = reconstruction_loss(ldm, lpips_fn, output, image, len(image))
        latents = latents.float()
        spread = (latents.var(dim=(0, 2, 3)) - 1).square().mean() + latents.mean(dim=(0, 2, 3)).square().mean()
        return loss + 0.01 * spread, {"lpips": perceptual, "spread": spread.detach()}

    return loss_of


def velocity_loss(ldm: orl.LDM, unet, latents: torch.Tensor, lr: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Mean squared error (n,) of the v-prediction (arXiv 2202.00512, eq. 12) for latents (n, c, h, w), LR (n, 3, h, w)
    in [-1, 1] and timesteps (n,)."""
    noise = torch.randn_like(latents)
    z_t = ldm.scheduler.add_noise(latents, noise, t)
    velocity = ldm.scheduler.get_velocity(latents, noise, t)
    return (ldm.run(unet, torch.cat([z_t, lr], 1), t) - velocity).square().mean(dim=(1, 2, 3))


def unet_training(args: Args, ldm: orl.LDM, crops: Crops):
    """The U-Net, autoencoder frozen -> `loss_of` for `train`."""
    ldm.vqvae.requires_grad_(False)
    ldm.unet.requires_grad_(True)
    unet, device = compiled(args, ldm.unet), ldm.device

    def encode_crops(n: int):
        image = crops(n, args.crop)
        lr = crops.sensor.sense(image, None)
        rounded = torch.rand(n, 1, 1, 1, device=device) < 0.5  # as a user's 8-bit LR image is
        return ldm.encode(image).half(), (torch.where(rounded, (lr * 255).round() / 255, lr) * 2 - 1).half()

    # A pool of encoded crops, a quarter of a batch of which is renewed at every step. So a crop is seen about four
    # times, each time with other noise, and the encoder costs a quarter of what it would.
    pool = [torch.cat(parts) for parts in zip(*(encode_crops(2 * args.batch_unet) for _ in range(64)))]
    steps = ldm.scheduler.config.num_train_timesteps
    first = round(args.first_share * args.batch_unet)  # without noise's help, a regression: it needs its own share

    def loss_of():
        slot = torch.randint(len(pool[0]), (max(1, args.batch_unet // 4),))
        for part, new in zip(pool, encode_crops(len(slot))):
            part[slot] = new
        pick = torch.randint(len(pool[0]), (args.batch_unet,))
        latents, lr = (part[pick].float() for part in pool)
        t = torch.randint(steps, (args.batch_unet,), device=device)
        t[:first] = steps - 1
        return velocity_loss(ldm, unet, latents, lr, t).mean(), {}

    return loss_of


@torch.no_grad()
def held_out_figures(ldm: orl.LDM, crops: Crops, unet: nn.Module) -> dict[str, float]:
    """Of each dataset's held-out images: v-loss at several noise levels, and PSNR (dB) and SSIM of one NFE with
    back-projection. The noise is the same every time."""
    found, last = {}, ldm.scheduler.config.num_train_timesteps - 1
    with torch.random.fork_rng(devices=[]):
        for name, hr in crops.held_out.items():
            torch.manual_seed(0)
            parts, rows = [], []
            for part in hr.split(32):
                latents, lr = ldm.encode(part), crops.sensor.sense(part, None)
                levels = [torch.full((len(part),), t, device=ldm.device) for t in (100, 300, 500, 700, 900, last)]
                rows.append(torch.stack([velocity_loss(ldm, unet, latents, 2 * lr - 1, t) for t in levels]))
                z = torch.cat([torch.randn_like(latents), 2 * lr - 1], 1)
                x0 = -ldm.run(unet, z, levels[-1])  # v at pure noise is minus the clean latent
                sr = orl.back_project(ldm.decode(x0), lr, crops.sensor)
                score = orl.score(None, sr, part, torch.ones(len(part), device=ldm.device))
                parts.append(torch.stack([score["psnr"], score["ssim"]]))
            losses, (psnr, ssim) = torch.cat(rows, 1).mean(1), torch.cat(parts, 1).mean(1)
            found |= {f"{name}/{t[0]}": float(v) for t, v in zip(levels, losses)}
            means = {"mean": losses[:5].mean(), "psnr": psnr, "ssim": ssim}
            found |= {f"{name}/{key}": float(value) for key, value in means.items()}
    return found


def decoder_training(args: Args, ldm: orl.LDM, crops: Crops, lpips_fn):
    """The decoder alone, U-Net and encoder frozen -> `loss_of` for `train`."""
    ldm.unet.requires_grad_(False)
    ldm.vqvae.requires_grad_(False)
    ldm.vqvae.decoder.requires_grad_(True)
    decode, choices, share, turn = compiled(args, ldm.vqvae.decode), (1, 3, 10, 30), 6 * args.batch_decoder, 0

    @torch.no_grad()
    def sampled_crops(n: int, nfe: int):
        """What the unsteered LDM gives after `nfe` evaluations: clean latents (n, c, 24, 24), and the HR crops."""
        image = crops(n, 96)
        lr, z = crops.sensor.sense(image, None), torch.randn(n, LATENT_CHANNELS, 24, 24, device=ldm.device)
        return orl.DenoisingEnv(ldm, nfe, nfe).denoise(lr, z)[0], image

    # a pool again: `share` crops for each NFE, two of which are renewed at every step
    drawn = [sampled_crops(share // 4, nfe) for nfe in choices for _ in range(4)]
    samples, sampled_hr = (torch.cat(parts) for parts in zip(*drawn))

    def loss_of():
        nonlocal turn
        kind, at = turn % len(choices), share * (turn % len(choices)) + 2 * (turn // len(choices)) % share
        samples[at : at + 2], sampled_hr[at : at + 2] = sampled_crops(2, choices[kind])
        turn, half = turn + 1, args.batch_decoder // 2
        pick, image = torch.randint(len(samples), (half,)), crops(half, 96)
        encoded = ldm.encode(image)
        latents = torch.cat([encoded + 0.02 * torch.randn_like(encoded), samples[pick]])
        target = torch.cat([image, sampled_hr[pick]]) * 2 - 1
        output = ldm.run(decode, latents)
        loss, perceptual = reconstruction_loss(ldm, lpips_fn, output, target, half)
        printed = mean_cell(output[half:] / 2 + 0.5)[0].var(1, correction=0).mean()  # 0: no cell repeats itself
        figures = {"l1": F.l1_loss(output.detach(), target), "lpips": perceptual, "printed": printed.detach()}
        return loss + args.grid_coef * printed, figures

    return loss_of


def main(args: Args) -> None:
    sys.stdout.reconfigure(errors="replace")
    shares = ("extra_share", "smooth_share", "first_share")
    bounds = dict.fromkeys(("held_out", *(f"batch_{part}" for part in PARTS)), (2, math.inf))
    orl.check_bounds(args, **bounds, **dict.fromkeys(shares, (0, 0.99)), layers=(1, 16), zoom=(0.1, 1), mtf=(0.01, 0.9))
    if args.crop % 16 or args.crop < orl.LEAST_CROP:
        orl.stop(f"--crop {args.crop} must be a multiple of 16, 4 x the U-Net's stride, from {orl.LEAST_CROP} on")
    if args.leave_out and not Path(args.leave_out).is_file():
        orl.stop(f"--leave-out {args.leave_out}: no such file; give one with a line train/scene/name.jpg an image")
    device = orl.pick_device(args.device)
    if args.decoder_layers and args.decoder_layers[1] < 1:
        orl.stop("--decoder-layers: the second level needs a block, or AutoencoderDC drops its upsampling")
    if args.cpu_time and device.type == "cuda":
        orl.stop("--cpu-time: on CUDA the CPU's time says nothing of the training; leave the flag out")
    print(f"device: {device.type}, {'bf16 autocast' if orl.has_bf16(device) else 'fp32'}")
    output = Path(args.output)
    log_file, log = output / "training.json", {"stretches": [], **dict.fromkeys(PARTS, 0)}
    if args.resume and log_file.is_file():
        log |= json.loads(log_file.read_text())
    if (output / "vqvae").is_dir() and not args.resume:
        orl.stop(f"{output} holds a model; go on with --resume or name another --output")
    for part, folder in (("autoencoder", "vqvae"), ("unet", "unet")):
        if getattr(args, f"minutes_{part}") <= 0 and not (output / folder).is_dir():
            orl.stop(f"--minutes-{part} 0: {output} has no {folder} yet; give it some")
    crops = Crops(args, device)
    torch.manual_seed(args.seed + sum(log[part] for part in PARTS))  # a later stretch draws anew
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}  # given, or diffusers asks for accelerate
    vae, unet = make_autoencoder(args.decoder_layers), make_unet(args.layers)
    if (output / "vqvae").is_dir():
        vae = AutoencoderDC.from_pretrained(output / "vqvae", **options)
    if (output / "unet").is_dir():
        unet = UNet2DModel.from_pretrained(output / "unet", **options)
    if args.decoder_layers and tuple(vae.config.decoder_layers_per_block) != args.decoder_layers:
        old, vae = vae, make_autoencoder(args.decoder_layers)
        vae.load_state_dict(old.state_dict(), strict=False)  # the encoder, and the decoder's blocks that both have
    if args.layers > unet.config.layers_per_block:
        unet = grow(unet, args.layers)
        print(f"U-Net: grown to {args.layers} blocks a level, {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M")
    scheduler = make_scheduler()
    ldm = orl.LDM(unet, vae, scheduler, device)  # frozen: every part below says what it trains
    output.mkdir(parents=True, exist_ok=True)
    scheduler.save_config(output / "scheduler")
    LDMSuperResolutionPipeline(vqvae=vae, unet=unet, scheduler=scheduler).save_config(output)  # model_index.json
    writer = SummaryWriter(f"{output}_log")
    lpips_fn = orl.load_lpips(device) if args.minutes_autoencoder + args.minutes_decoder > 0 else None

    def stretch(part: str, model: nn.Module, folder: str, loss_of, curve=None) -> None:
        log[part] = train(part, model, loss_of, args, output / folder, log[part], writer, curve)
        log["stretches"].append({f"{part}_minutes": getattr(args, f"minutes_{part}"), f"{part}_samples": log[part]})
        log_file.write_text(json.dumps(log, indent=2) + "\n")

    if args.minutes_autoencoder > 0:
        stretch("autoencoder", vae, "vqvae", autoencoder_training(args, ldm, crops, lpips_fn))
    if args.minutes_unet > 0:
        stretch("unet", unet, "unet", unet_training(args, ldm, crops), partial(held_out_figures, ldm, crops))
    if args.minutes_decoder > 0:
        stretch("decoder", vae, "vqvae", decoder_training(args, ldm, crops, lpips_fn))
    writer.close()
    flag = f"--ldm {shlex.quote(str(output))}"
    print(f"written to {output}; its figures: python tools/ldm_figures.py {flag}; next: python ppo_ldm_sr.py {flag}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
