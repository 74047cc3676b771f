"""What goes into `ppo_ldm_sr.py` and comes out as files: images, the LDM's weights, checkpoints, and the one sentence that
is said when one of them cannot be had. Nothing of the method is here.
"""

import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

HERE = Path(__file__).resolve().parent
PAPER_SCENES = (  # paper: Table 2
    "commercial_area", "dense_residential", "desert", "forest",
    "industrial_area", "railway_station", "river", "runway",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ messages


def say(message: str) -> None:
    """Prints one line for the user (only the first of several processes speaks)."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def stop(message: str) -> None:
    """Ends the program with one sentence and exit code 2 (of several processes, each that stops says so)."""
    print(f"error: {message}", flush=True)
    sys.exit(2)


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def read_image(source) -> torch.Tensor:
    """Path or file object of an image of any mode -> uint8 RGB (3, H, W): upright, 16 bits scaled to 8, no alpha.

    Raises whatever PIL raises for a broken file, and for one that claims to be absurdly large before decoding it.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # 16-bit grey, which convert("RGB") would clip at 255
                grey = (np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8)
                return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
            image = image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def list_images(paths: tuple[str, ...]) -> list[Path]:
    """Files named, and those of PIL's formats in folders named."""
    from PIL import Image

    known = set(Image.registered_extensions())
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in known and not p.stem.endswith("_sr"))
            if not inside:
                stop(f"--images {path}: no image in this folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            stop(f"--images {path}: no such file or folder")
    return files


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

    @property
    def slug(self) -> str:
        """The title as part of a folder's name."""
        return self.title.replace(" ", "_").replace("/", "_")

    def to(self, device: torch.device) -> "Scenes":
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

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
        u = torch.rand(3, n, 1, 1, generator=generator, dtype=torch.float64).to(device)
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

    def batches(self, indices, multiple: int, crop: int, batch_size: int):
        """Images `indices`, one size at a time: (their indices, HR (n, 3, H, W)), cut as `image` does."""
        by_size: dict[tuple, list] = {}
        for i in indices:
            by_size.setdefault((int(self.height[i]), int(self.width[i])), []).append(i)
        for group in by_size.values():
            for start in range(0, len(group), batch_size):
                part = group[start : start + batch_size]
                yield part, torch.cat([self.image(i, multiple, crop) for i in part])


def resolve_dataset(dataset: str) -> str:
    """auto -> RESISC45 where the Hub or its cache has it, else the synthetic scenes that ship, said in one line."""
    if dataset != "auto":
        return dataset
    import huggingface_hub
    from datasets import config

    try:
        huggingface_hub.HfApi().dataset_info("timm/resisc45", timeout=5)
        return "timm/resisc45"
    except Exception:  # whatever keeps it from being reached
        if (Path(config.HF_DATASETS_CACHE) / "timm___resisc45").is_dir():
            return "timm/resisc45"
    say("data: RESISC45 cannot be reached: these are the synthetic scenes that ship, and every figure is theirs")
    return "runs/scenes"


def dataset_rows(dataset: str, split: str) -> tuple[list[dict], list[str], str]:
    """Rows {image: {path, bytes}, label} of one split, the scene names and the title of a folder or Hub dataset."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    root = locate(dataset)
    if not root.is_dir():
        if dataset.count("/") != 1 or dataset.startswith((".", "/")):
            stop(f"--dataset {dataset}: no such folder; give a folder split/scene/*.jpg or a Hub name")
        try:
            huggingface_hub.HfApi().dataset_info(dataset, timeout=5)
        except Exception:  # no network or no such dataset: the cache is all there is, and no retries are made
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        try:
            rows = datasets.load_dataset(dataset, split=split).cast_column("image", datasets.Image(decode=False))
        except Exception as error:
            stop(f"--dataset {dataset}: neither the Hub nor its cache gives its split {split} ({reason(error)}); connect "
                 "to the network, give a folder split/scene/*.jpg, or leave --dataset out for what ships")  # fmt: skip
        return rows, rows.features["label"].names, dataset
    splits = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name in ("train", "test", "validation"))
    if splits and split not in splits:
        stop(f"{dataset} has no split {split}; it has: {', '.join(splits)}")
    folder = root / split if splits else root
    files = {"images": f"{glob.escape(str(folder.resolve()))}/*/*"}
    try:
        data = datasets.load_dataset("imagefolder", data_files=files, drop_labels=False, split="images")
        names = data.features["label"].names
    except Exception as error:
        stop(f"no image in {folder}: expected {folder}/<scene>/*.jpg ({reason(error)})")
    rows = sorted(data.cast_column("image", datasets.Image(decode=False)), key=lambda row: row["image"]["path"])
    if not splits:
        # choice: a folder without splits is cut 80/20 by file name within each scene
        half = "first 80%" if split == "train" else "last 20%"
        say(f"data: {dataset} has no train and test folders: its {split} part is the {half} of each scene by file name")
        groups = [[row for row in rows if row["label"] == label] for label in range(len(names))]
        cuts = [max(1, len(group) * 4 // 5) for group in groups]
        rows = sum((g[:cut] if split == "train" else g[cut:] for g, cut in zip(groups, cuts)), [])
    title = root / "TITLE"
    return rows, names, title.read_text().strip() if title.is_file() else root.resolve().name


def load_scenes(dataset: str, split: str, scenes: tuple[str, ...] = (), min_side: int = 16) -> Scenes:
    """Loads one split of an image folder (`split/scene/*.jpg` or `scene/*.jpg`) or of a Hub dataset.

    `scenes` picks classes; default: the paper's eight where the dataset has them all, else all of its own. Images that
    cannot be read, or have a side below `min_side` px, are named and skipped. Ends the program with one sentence when
    there is no such dataset, split, scene or usable image.
    """
    rows, names, title = dataset_rows(dataset, split)
    unknown = [name for name in scenes if name not in names]
    if unknown:
        stop(f"--scenes: {dataset} has no {', '.join(unknown)}; it has: {', '.join(names)}")
    # choice: the paper's eight scenes where the dataset has them all, else every scene of its own
    wanted = scenes or (PAPER_SCENES if set(PAPER_SCENES) <= set(names) else names)
    kept = [name for name in names if name in wanted]
    images, labels, files, skipped = [], [], [], []
    for row in rows:
        name, source = names[row["label"]], row["image"]
        if name not in kept:
            continue
        file = Path(source["path"]).name if source["path"] else f"{name}_{len(files):05d}"
        try:
            pixels = read_image(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"])
            if min(pixels.shape[1:]) < min_side:
                raise ValueError(f"a side below {min_side} px")
        except Exception as error:  # whatever a broken file raises, it is one image less
            skipped.append(f"{name}/{file} ({reason(error)})")
            continue
        images.append(pixels), labels.append(kept.index(name)), files.append(file)
    if skipped:
        say(f"data: skipped {len(skipped)} unusable image(s) of {split}: {', '.join(skipped[:5])}{' ...' * (len(skipped) > 5)}")
    empty = [name for i, name in enumerate(kept) if i not in labels]
    if not files or (scenes and empty):
        stop(f"{dataset}, split {split}: no usable image of {', '.join(empty)} (expected {split}/<scene>/*.jpg)")
    height, width = (torch.tensor([image.shape[k] for image in images]) for k in (1, 2))
    offset = (3 * height * width).cumsum(0) - 3 * height * width
    pixels = torch.cat([image.flatten() for image in images])
    counts = [f"{name} {labels.count(k)}" for k, name in enumerate(kept)]
    say(f"data: {title}, {split}: {len(files)} images ({', '.join(counts)})")
    return Scenes(pixels, offset, height, width, torch.tensor(labels), kept, files, title)


# ------------------------------------------------------------------------------------------------ the LDM's parts


def load_parts(name: str) -> tuple[nn.Module, nn.Module, object]:
    """U-Net, autoencoder and scheduler of an LDM in diffusers' layout, from a folder or the Hub; never a pickle."""
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
            stop(f"--ldm {name}: neither the Hub nor its cache has it ({reason(error)}); connect to the network or give a folder")
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
        stop(f"--ldm {name}: its weights cannot be read ({reason(error)}); fetch or train it again")
    if unet.config.in_channels != unet.config.out_channels + 3:
        stop(f"--ldm {name}: its U-Net takes {unet.config.in_channels} channels, not its latent's plus the LR image's 3")
    return unet, vqvae, scheduler


def fingerprint(*modules: nn.Module) -> str:
    """Twelve hex digits of the weights' SHA-256: an agent belongs to the LDM that it was trained with."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ files


def write_file(path: Path, write) -> None:
    """Calls write(temporary path) and renames it, so that a kill or a full disk leaves the old file."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    """One safetensors file with `state` as JSON in its header: weights and counters cannot part."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
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
        stop(f"{path} is damaged ({type(error).__name__}: {reason(error)}); restore it or train again")


def keep_constant(run: Path, action: torch.Tensor, reward: float, action_values) -> torch.Tensor:
    """Writes the best constant action (7 + 2c,) to constant.json in the run folder -> the first process's, for all of them."""
    if dist.is_initialized():
        shared = [action]
        dist.broadcast_object_list(shared)
        action = shared[0]
    values = {k: [round(x, 3) for x in v.flatten().tolist()] for k, v in action_values(action[None]).items()}
    values = {k: v[0] if len(v) == 1 else v for k, v in values.items()}
    say(f"best constant action: reward {reward:.4f} on training images, kept in {run}/constant.json")
    if os.environ.get("RANK", "0") == "0":
        text = json.dumps({"action": action.tolist(), "values": values, "reward_on_training_images": round(reward, 5)}, indent=2)
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_file(run / "constant.json", lambda part: part.write_text(text + "\n"))
        except OSError as error:
            stop(f"{run}: cannot be written ({reason(error)}); name another folder")
    return action


def read_constant(run: Path) -> torch.Tensor | None:
    """The best constant action (7 + 2c,) that a run folder keeps, or None."""
    file = run / "constant.json"
    return torch.tensor(json.loads(file.read_text())["action"]) if file.is_file() else None


def average_gradients(agent: nn.Module) -> None:
    """The mean of the gradients of all processes, in one message (torchrun)."""
    gradients = [p.grad for p in agent.parameters()]
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / dist.get_world_size(), gradients)


def training_tensors(agent: nn.Module, optimizer, env, generators: dict) -> dict[str, torch.Tensor]:
    """All that a bit-for-bit resume needs; what differs between processes is stacked along a first dimension."""
    own = {f"env.{k}": v for k, v in vars(env.state).items()} | {"env.hr": env.hr, "env.truth": env.truth}
    own |= {f"generator.{k}": g.get_state().to(env.device) for k, g in generators.items()}
    for name, value in own.items():
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())] if dist.is_initialized() else [value]
        if dist.is_initialized():
            dist.all_gather(parts, value.contiguous())
        own[name] = torch.stack(parts)
    adam = {f"adam.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return own | adam | {f"agent.{k}": v for k, v in agent.state_dict().items()}


def restore(tensors: dict, agent: nn.Module, optimizer, env, state_type, generators: dict, rank: int) -> None:
    """Puts the tensors of `training_tensors` back."""
    agent.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("agent.")})
    saved = optimizer.state_dict()
    for name in (k for k in tensors if k.startswith("adam.")):
        _, i, key = name.split(".")
        saved["state"].setdefault(int(i), {})[key] = tensors[name]
    optimizer.load_state_dict(saved)
    for name, generator in generators.items():
        generator.set_state(tensors[f"generator.{name}"][rank])
    fields = {k[4:]: v[rank].to(env.device) for k, v in tensors.items() if k.startswith("env.")}
    env.hr, env.truth, env.state = fields.pop("hr"), fields.pop("truth"), state_type(**fields)


def save_run(run: Path, agent: nn.Module, optimizer, env, generators: dict, state: dict, rank: int) -> None:
    """Writes the checkpoint and the agent; every process brings its part, the first one writes.

    A full disk ends the program with one sentence and leaves the last good checkpoint.
    """
    kept = training_tensors(agent, optimizer, env, generators)
    if rank:
        return
    try:
        save_tensors(run / "checkpoint.safetensors", kept, state)
        save_tensors(run / "agent.safetensors", agent.state_dict(), state)
        write_file(run / "state.json", lambda part: part.write_text(json.dumps(state, indent=2) + "\n"))
    except (OSError, SafetensorError) as error:
        stop(f"{run}: the checkpoint of step {state['step']} cannot be written ({reason(error)}); make room, then --resume {run}")


# ------------------------------------------------------------------------------------------------ settings

FREE_ON_RESUME = ("total_timesteps", "resume", "run_dir", "device", "lpips_weights", "eval_images", "eval_every")


def parse_args(args_type, description: str):
    """The command line as `args_type`, a dataclass of dataclasses as bases, each a group of --help."""
    import tyro

    fields = [(b.__name__.removesuffix("Args"), b, dataclasses.field(default_factory=b)) for b in reversed(args_type.__bases__)]
    groups = tyro.cli(tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass("Groups", fields)], description=description)
    return args_type(**{k: v for group in vars(groups).values() for k, v in vars(group).items()})


def resume_args(args) -> tuple[object, dict, dict]:
    """Arguments, tensors and state of the run to go on with; flags that would change the method are refused."""
    tensors, state = load_tensors(Path(args.resume) / "checkpoint.safetensors")
    if state["args"].keys() != vars(args).keys():
        stop(f"--resume {args.resume}: that run was written by another version of this code; start a new run")
    old = type(args)(**{**state["args"], "scenes": tuple(state["args"]["scenes"])})
    changed = [k for k, v in vars(args).items() if k not in FREE_ON_RESUME and v not in (getattr(type(args), k), getattr(old, k))]
    if changed:
        flags = ", ".join("--" + k.replace("_", "-") for k in changed)
        stop(f"--resume {args.resume}: {flags} would change the method of that run; leave out or start a new run")
    free = {k: getattr(args, k) for k in FREE_ON_RESUME if getattr(args, k) is not None}
    args = dataclasses.replace(old, **{**free, "run_dir": args.resume})
    more = ", more than it was begun for" if (args.total_timesteps or 0) > state["args"]["total_timesteps"] else ""
    say(f"resume: step {state['step']} of {args.total_timesteps}{more}")
    return args, tensors, state


def set_up(args) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of a training run; refuses settings that cannot work, before any long work."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, per_iteration = pick_device(args.device), args.num_envs * args.num_steps
    if args.total_timesteps is None:
        args.total_timesteps = 1_000_000 if device.type == "cuda" else 60_000
        if device.type == "cpu":
            say("training: 60,000 steps, about 15 minutes on 2 cores; the paper's 1,000,000 with --total-timesteps 1000000")
    if args.run_dir and not args.resume and rank == 0 and Path(args.run_dir).exists() and any(Path(args.run_dir).iterdir()):
        stop(f"--run-dir {args.run_dir}: the folder exists; go on with --resume {args.run_dir} or name another")
    if args.total_timesteps < per_iteration:
        stop(f"--total-timesteps {args.total_timesteps}: one iteration takes {per_iteration} (--num-envs x --num-steps)")
    if args.num_envs % world or args.minibatch_size % world or not world <= args.minibatch_size <= per_iteration:
        stop(f"--num-envs {args.num_envs} and --minibatch-size {args.minibatch_size} must be multiples of the {world} "
             f"process(es), a minibatch no larger than an iteration's {per_iteration} steps")  # fmt: skip
    if min(args.base_steps, args.max_calls) < 1:
        stop("--base-steps and --max-calls must be at least 1")
    if args.initial_policy not in ("constant", "plain"):
        stop(f"--initial-policy {args.initial_policy}: takes constant or plain")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    say(f"device: {name}, LDM in {'bf16 autocast' if has_bf16(device) else 'fp32'}, {world} process(es)")
    return rank, world, device


def check_ldm(args, ldm, state: dict) -> None:
    """Says which LDM it is; refuses another one than a resumed run began with, and a crop that does not fit it."""
    millions = sum(p.numel() for p in ldm.unet.parameters()) / 1e6
    say(f"LDM: {args.ldm}, U-Net of {millions:.1f} M parameters, {ldm.latent_channels} latent channels, {ldm.prediction_type}, fingerprint {ldm.fingerprint}")
    if state and state["ldm"] != ldm.fingerprint:
        stop(f"--resume {args.resume}: {args.ldm} is no longer the LDM that the run began with (fingerprint {state['ldm']})")
    if args.crop % (4 * ldm.stride):
        stop(f"--crop {args.crop}: must be a multiple of {4 * ldm.stride}, 4 x the U-Net's stride")


def check_finite(batch: dict[str, torch.Tensor], first_step: int, run: Path) -> None:
    """Ends a run whose rollout, (T, n, ...) tensors, holds NaN or infinity, before it reaches the weights."""
    bad = ~(batch["maps"].isfinite().flatten(2).all(2) & batch["rewards"].isfinite())  # (T, n)
    if bad.any():
        step = first_step + int(bad.any(1).nonzero()[0]) * bad.shape[1]
        stop(f"the LDM gave NaN or infinity at step {step}; {run} keeps the checkpoint before it, if there was one")


@contextlib.contextmanager
def resume_hint(run: Path):
    """After Ctrl-C, says how to go on and ends with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nstopped: go on with python ppo_ldm_sr.py --resume {run}")
        sys.exit(130)


def final_table(run: Path, args, scenes: int, device: torch.device) -> int:
    """Says how to see more and runs eval_sr.py, in the first process, on about `eval_images` of the held-out images -> exit code."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if os.environ.get("RANK", "0") != "0":
        return 0
    command = ["eval_sr.py", "--agent", str(run), "--crop", str(args.crop)]
    say(f"curves: tensorboard --logdir {run.parent}\nall held-out images: python {' '.join(command)}")
    command[0] = str(HERE / command[0])
    limit = ["--limit", str(-(-args.eval_images // scenes))] if args.eval_images else []
    return subprocess.run([sys.executable, *command, *limit, "--device", device.type]).returncode
