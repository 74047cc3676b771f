"""Trains the small latent diffusion model that `ppo_ldm_sr.py` steers: an autoencoder, then a U-Net that denoises
latents beside the LR image. Writes diffusers' folder layout (`unet/`, `vqvae/`, `scheduler/`) in fp16 safetensors.

    python pretrain_ldm.py --dataset data/wide256 data/paper8 runs/scenes --minutes-autoencoder 30 --minutes-unet 60

A second call with --resume goes on from the weights in --output for as many minutes more.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import ppo_ldm_sr as orl
from ppo_ldm_sr import downscale
from sr_inputs import Scenes, has_bf16, load_scenes, parse_args, pick_device, say, stop, write_file
from sr_metrics import Metrics, load_lpips


@dataclass
class RunArgs:
    """The run: images, folder, device."""

    dataset: tuple[str, ...] = ("runs/scenes",)  # image folders split/scene/*.jpg or Hub names; every scene of their train splits is used
    small_share: float = 0.05  # share of crops drawn from datasets after the first two (the synthetic scenes)
    output: str = "runs/ldm_x4"  # folder to write, in diffusers' layout
    resume: bool = False  # go on from the weights in --output
    lpips_weights: str | None = None  # file of torchvision's AlexNet where it is neither cached nor downloadable
    report_images: int = 48  # test images of each dataset for the figures at the end
    compile: bool = False  # torch.compile the training steps (on a CPU about 1.3 times as fast after a minute of compiling)
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 42  # seed of weights, crops and noise


@dataclass
class AutoencoderArgs:
    """The autoencoder, trained on 64 px crops."""

    minutes_autoencoder: float = 30.0  # minutes to train it (0: keep it as it is)
    batch_autoencoder: int = 16  # crops of a step
    lr_autoencoder: float = 2e-3  # learning rate of AdamW


@dataclass
class UNetArgs:
    """The U-Net, trained with the autoencoder frozen."""

    minutes_unet: float = 60.0  # minutes to train it (0: keep it as it is)
    batch_unet: int = 32  # crops of a step
    lr_unet: float = 6e-4  # learning rate of AdamW
    crop: int = 128  # px of a crop


@dataclass
class Args(UNetArgs, AutoencoderArgs, RunArgs):
    """All settings, flat: args.seed."""


LATENT_CHANNELS = 8


def make_autoencoder() -> nn.Module:
    """4x autoencoder of convolutional blocks with pixel-unshuffle shortcuts (arXiv 2410.10733), 1.7 M parameters."""
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(32, 64, 128),
        decoder_block_out_channels=(32, 64, 128),
        encoder_layers_per_block=(0, 1, 2),
        decoder_layers_per_block=(0, 1, 2),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=1.0,
    )


def make_unet() -> nn.Module:
    """U-Net on latents and LR image (concatenated, as in CompVis' model), 5 M parameters."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS + 3,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )


def make_scheduler():
    """Cosine schedule with velocity prediction: the first call, at pure noise, then is the posterior mean."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")


class Crops:
    """Random training crops of several datasets: the first two by their number of images, the rest a small share."""

    def __init__(self, args: Args, device: torch.device):
        self.sets: list[Scenes] = [load_scenes(name, "train", min_side=args.crop).to(device) for name in args.dataset]
        weight = [float(len(scenes)) for scenes in self.sets]
        small = sum(weight[2:])
        if small:
            weight = weight[:2] + [w / small * args.small_share / (1 - args.small_share) * sum(weight[:2]) for w in weight[2:]]
        self.weight = torch.tensor(weight)
        self.generator = torch.Generator().manual_seed(args.seed if not args.resume else int(time.time()))

    def __call__(self, n: int, size: int) -> torch.Tensor:
        """(n, 3, size, size) in [0, 1]."""
        which = torch.multinomial(self.weight, n, replacement=True, generator=self.generator)
        batch = []
        for i, scenes in enumerate(self.sets):
            count = int((which == i).sum())
            if count:
                index = torch.randint(len(scenes), (count,), generator=self.generator).to(scenes.pixels.device)
                batch.append(scenes.crops(index, size, self.generator))
        return torch.cat(batch).contiguous(memory_format=torch.channels_last)


class Average:
    """Exponential moving average of a model's weights, kept in float32."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)


def save_part(weights: dict[str, torch.Tensor], model: nn.Module, folder: Path) -> None:
    """Writes config.json and fp16 safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    half = {k: v.half().contiguous() for k, v in weights.items()}
    write_file(folder / "diffusion_pytorch_model.safetensors", lambda part: save_file(half, part, metadata={"format": "pt"}))


def train(name: str, model: nn.Module, loss_of, minutes: float, lr: float, batch: int, folder: Path, writer, start: int) -> int:
    """AdamW with warm-up, constant rate and a cosine end, for `minutes`; saves every five minutes.

    Args:
        loss_of: () -> (scalar loss, dict of figures for TensorBoard)
        start: training samples seen before this stretch
    Returns:
        samples seen after it; the model then holds the averaged weights
    """
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    average = Average(model)
    began = saved = time.time()
    seconds, seen, step, smooth = minutes * 60, start, 0, None
    bar = tqdm(total=round(seconds), desc=name, unit="s", mininterval=5, bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}")
    while time.time() - began < seconds:
        progress = (time.time() - began) / seconds
        rate = lr * min(1, (step + 1) / 200) * (1 if progress < 0.5 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.5) / 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, figures = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        step, seen = step + 1, seen + batch
        if step % 50 == 0:
            value = loss.item()
            if not math.isfinite(value):
                stop(f"the {name}'s loss is {value} after {seen} samples; lower its learning rate and go on with --resume")
            smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
            for key, figure in {"loss": smooth, "learning_rate": rate, **figures}.items():
                writer.add_scalar(f"{name}/{key}", float(figure), seen)
            now = time.time()
            bar.n = min(round(now - began), round(seconds))
            bar.set_postfix_str(f"loss {smooth:.4f}, {seen} samples, {(seen - start) / (now - began):.0f}/s")
        if time.time() - saved > 300:
            saved = time.time()
            save_part(average.weights, model, folder)
    bar.close()
    model.load_state_dict(average.weights)
    save_part(average.weights, model, folder)
    return seen


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
    ldm, reward = orl.load_ldm(args.output, device), orl.Reward(Metrics(load_lpips(args.lpips_weights), device))
    train = crops(512, args.crop)
    lines = ["| images | what | PSNR (dB) | SSIM | LPIPS |", "|---|---|---|---|---|"]

    def line(title: str, what: str, found: dict) -> None:
        lines.append(f"| {title} | {what} | {found['psnr'].mean():.2f} | {found['ssim'].mean():.3f} | {found['lpips'].mean():.3f} |")

    for name in args.dataset:
        test = load_scenes(name, "test", min_side=args.crop).to(device)
        indices = range(0, len(test), -(-len(test) // args.report_images))
        hr = torch.cat([test.image(i, crop=args.crop) for i in indices])
        title = f"{test.title}, {len(indices)} test images, centre {args.crop} px"
        for what, sr in {
            "bicubic": orl.upscale(downscale(hr)),
            f"PCA of 4 x 4 patches, {LATENT_CHANNELS} channels": pca_yardstick(train, hr),
            "autoencoder": torch.cat([ldm.decode(ldm.encode(part)) for part in hr.split(16)]),
        }.items():
            line(title, what, reward.metrics(sr, hr))
        for steps in (1, 2, 4, 10, 100):
            mdp = orl.Denoising(ldm, steps, steps)
            for what, values in {"": {}, " + consistency": {"consistency": 1.0}}.items():
                policy = orl.constant_policy(orl.action_for(LATENT_CHANNELS, **values))
                found = orl.evaluate(mdp, test, reward, policy, indices, args.crop)
                line(title, f"plain DDIM, {steps} step(s){what}", found)
    return "\n".join(lines)


def main(args: Args) -> None:
    from diffusers import AutoencoderDC, UNet2DModel
    from torch.utils.tensorboard import SummaryWriter

    device = pick_device(args.device)
    amp = has_bf16(device)
    output = Path(args.output)
    say(f"device: {device.type}, {'bf16 autocast' if amp else 'fp32'}")
    crops = Crops(args, device)
    log_file = output / "training.json"
    log = json.loads(log_file.read_text()) if args.resume and log_file.is_file() else {"stretches": [], "autoencoder": 0, "unet": 0}
    torch.manual_seed(args.seed + log["autoencoder"] + log["unet"])  # a later stretch draws other noise
    if args.resume and (output / "vqvae").is_dir():
        vae = AutoencoderDC.from_pretrained(output / "vqvae", torch_dtype=torch.float32)
    elif (output / "vqvae").is_dir():
        stop(f"{output} holds a model; go on with --resume or name another --output")
    else:
        vae = make_autoencoder()
    unet = UNet2DModel.from_pretrained(output / "unet", torch_dtype=torch.float32) if args.resume and (output / "unet").is_dir() else make_unet()
    vae, unet = (m.to(device, memory_format=torch.channels_last) for m in (vae, unet))
    scheduler = make_scheduler()
    output.mkdir(parents=True, exist_ok=True)
    scheduler.save_config(output / "scheduler")
    index = {
        "_class_name": "LDMSuperResolutionPipeline",
        "vqvae": ["diffusers", "AutoencoderDC"],
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    writer = SummaryWriter(f"{output}_log")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    compiled = torch.compile if args.compile else (lambda module: module)

    def stretch(part: str, model: nn.Module, folder: str, loss_of, minutes: float, lr: float, batch: int) -> None:
        log[part] = train(part, model, loss_of, minutes, lr, batch, output / folder, writer, log[part])
        log["stretches"].append({f"{part}_minutes": minutes, f"{part}_samples": log[part]})
        log_file.write_text(json.dumps(log, indent=2) + "\n")

    if args.minutes_autoencoder > 0:
        lpips = load_lpips(args.lpips_weights)
        autoencode = compiled(vae.decode)
        encode = compiled(vae.encode)
        lpips = lpips and lpips.to(device, memory_format=torch.channels_last)

        def loss_of_autoencoder():
            image = crops(args.batch_autoencoder, 64) * 2 - 1
            with autocast:
                latents = encode(image, return_dict=False)[0]
                noisy = latents + 0.02 * torch.randn_like(latents)
                output = autoencode(noisy, return_dict=False)[0].float()
                # a 64 px crop is small for AlexNet, but enough for texture
                perceptual = lpips(output, image).mean().float() if lpips else output.new_zeros(())
            latents, error = latents.float(), output - image
            spread = (latents.var(dim=(0, 2, 3)) - 1).square().mean() + latents.mean(dim=(0, 2, 3)).square().mean()
            loss = error.abs().mean() + 0.5 * error.square().mean() + 0.3 * perceptual + 0.01 * spread
            psnr = 10 * torch.log10(4 / error.detach().square().mean())
            return loss, {"psnr": psnr, "lpips": perceptual.detach(), "spread": spread.detach()}

        stretch("autoencoder", vae, "vqvae", loss_of_autoencoder, args.minutes_autoencoder, args.lr_autoencoder, args.batch_autoencoder)

    if args.minutes_unet > 0:
        vae.requires_grad_(False)
        denoise = compiled(unet)

        @torch.no_grad()
        def encode_crops(n: int):
            image = crops(n, args.crop)
            with autocast:
                latents = vae.encode(image * 2 - 1, return_dict=False)[0]
            return latents.half(), (downscale(image) * 2 - 1).half()

        # a pool of encoded crops, a quarter of a batch of which is renewed at every step: a crop is seen about
        # four times, each time with other noise, and the encoder costs a quarter of what it would
        pool = [torch.cat(parts) for parts in zip(*(encode_crops(64) for _ in range(64)))]

        def loss_of_unet():
            renew = args.batch_unet // 4
            slot = torch.randint(len(pool[0]), (renew,))
            for part, new in zip(pool, encode_crops(renew)):
                part[slot] = new
            pick = torch.randint(len(pool[0]), (args.batch_unet,))
            latents, lr = (part[pick].float() for part in pool)
            t = torch.randint(scheduler.config.num_train_timesteps, (args.batch_unet,), device=device)
            noise = torch.randn_like(latents)
            noisy = scheduler.add_noise(latents, noise, t)
            velocity = scheduler.get_velocity(latents, noise, t)  # v-prediction: arXiv 2202.00512, eq. 12
            with autocast:
                output = denoise(torch.cat([noisy, lr], 1).contiguous(memory_format=torch.channels_last), t, return_dict=False)[0]
            return F.mse_loss(output.float(), velocity), {}

        stretch("unet", unet, "unet", loss_of_unet, args.minutes_unet, args.lr_unet, args.batch_unet)
    writer.close()
    table = report(args, crops, device)
    (output / "figures.md").write_text(f"After {log['autoencoder']} crops (autoencoder) and {log['unet']} crops (U-Net):\n\n{table}\n")
    say(f"\n{table}\n\nwritten to {output}; next: python ppo_ldm_sr.py --ldm {output}")


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
