"""Evaluates an agent that `ppo_ldm_sr.py` trained: tables scene by scene, pictures, and every image as a PNG file.

    python eval_sr.py                                               # the agent that ships, on its own images
    python eval_sr.py --agent runs/NAME --dataset data/paper8 --crop 128
    python eval_sr.py --dataset FOLDER --split all                  # every image of a test folder of your own
    python eval_sr.py --mtf 0.15 --lr-noise 2                       # the same agent on another sensor
    python eval_sr.py --save-images images && python tools/compare_page.py images

Every method sees the same LR images and the same pure noise. `bicubic` is the floor, and `autoencoder`, which encodes
and decodes the HR image, is the ceiling. Two baselines have no agent: `ldm` is the unsteered LDM at 100 function
evaluations (NFE), as diffusers' pipeline runs it. `ldm_same_nfe_bp` spends as many NFE as the agent and has the same
back-projection; `ldm_same_nfe` goes without that. `agent` is the LDM steered by the agent. `reward_gradient` is the
same editor trained by the reward's own gradient (tools/reward_gradient.py), where the run folder holds one. `--pareto`
adds agents of other reward weights. A table of other images or settings goes to a folder of its own.
"""

import json
import math
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import lpips
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
import tyro
from torchmetrics.functional.image import dists, visual_information_fidelity
from tqdm import tqdm

import ppo_ldm_sr as orl
from ppo_ldm_sr import stop

sys.path.append(str(orl.PROJECT / "tools"))  # for lpips_weights and figures, which are imported where they are needed
METHODS = {
    "bicubic": "bicubic",
    "ldm": "unsteered LDM, 100 NFE",
    "ldm_same_nfe": "unsteered LDM, same NFE",
    "ldm_same_nfe_bp": "unsteered LDM, same NFE, back-projection",
    "agent": "LDM with RL",
    "reward_gradient": "LDM with the reward's gradient, no RL",
    "autoencoder": "autoencoder (ceiling)",
}
SWEEP = (1, 2, 4, 10, 30, 100)  # NFE of the unsteered LDM's line in plane.png, with back-projection
FIGURES = {  # column of table.csv: heading and digits in table.md
    "psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 4), "lpips": ("LPIPS", 4), "vif": ("VIF", 3), "dists": ("DISTS", 4),
    "lpips_vgg": ("LPIPS-VGG", 4), "grid": ("grid", 1), "lr_psnr": ("LR PSNR (dB)", 1), "nfe": ("NFE", 1),
    "seconds": ("s/image", 3), "periodicity": ("periodicity", 3), "reward": ("reward", 4),
}  # fmt: skip
COLUMNS = ["scene", "image", "method", *FIGURES]
BETTER = {"psnr": 1, "ssim": 1, "lpips": -1, "vif": 1, "reward": 1}  # the sign of an improvement


@dataclass
class Args:
    agent: str = "runs/orl_ldm"  # run folder of the agent
    ldm: str | None = None  # LDM that the agent was trained with (None: as its run folder says)
    pareto: tuple[str, ...] = ()  # run folders of agents for the same LDM under other reward weights
    output: str | None = None  # folder to write to (None: the run folder, or one named by the images and what differs)
    batch_size: int = 16  # images denoised at once
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 0  # seed of the noise
    # the images and their sensor
    dataset: str | None = None  # image folder or Hub name (None: the agent's own, or the scenes that ship)
    split: Literal["test", "train", "validation", "all"] = "test"  # all: all splits, as of a test folder of your own
    scenes: tuple[str, ...] = ()  # scenes to evaluate (none named: the paper's eight where they are, else all)
    crop: int = 0  # px of the centre that is evaluated; 0: the whole image
    limit: int = 0  # images a scene at most; 0: all
    mtf: float | Literal["bicubic"] | None = None  # modulation transfer at the LR Nyquist frequency (None: the agent's)
    lr_noise: float | None = None  # standard deviation of its noise in grey levels of 255 (None: the agent's)
    # what is measured and written
    held_out_metrics: bool = False  # LPIPS-VGG and DISTS too (64 MB from PyPI where VGG16 is not cached)
    save_images: str | None = None  # folder for METHOD/SCENE/NAME.png of every method, of lr and of hr


# ---------------------------------------------------------------------------------------------- metrics
def load_held_out_metrics(device: torch.device) -> dict:
    """LPIPS on VGG16 (Zhang et al. 2018) and DISTS (arXiv 2004.07728), which rests on VGG16 too: functions of SR, HR
    (n, 3, H, W) in [0, 1] -> (n,). VGG16 comes from torch hub's cache, else from the archive that
    tools/lpips_weights.py knows. Where neither is to be had, one line says so and there are no such metrics."""
    try:
        if (Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth").is_file():
            perceptual, texture = lpips.LPIPS(net="vgg", verbose=False), dists.DISTSNetwork()
        else:
            import lpips_weights

            perceptual, vgg16 = lpips_weights.load("vgg"), torchvision.models.vgg16(init_weights=False)
            vgg16.load_state_dict(lpips_weights.fetch("vgg"), strict=False)  # convolutions alone: nobody classifies
            with mock.patch.object(dists, "vgg16", lambda weights: vgg16):  # else it downloads 528 MB
                texture = dists.DISTSNetwork()
    except (ImportError, OSError) as error:
        print(f"LPIPS-VGG, DISTS: no weights ({error}): they are left out")
        return {}
    perceptual, texture = (net.to(device).eval().requires_grad_(False) for net in (perceptual, texture))
    return {"lpips_vgg": lambda sr, hr: perceptual(sr, hr, normalize=True).flatten(),
            "dists": lambda sr, hr: texture(sr, hr).view(len(sr))}  # fmt: skip


def bicubic(lr: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) -> (n, 3, 4h, 4w) in [0, 1] by the field's kernel (a = -0.5), as Pillow, MATLAB and GDAL enlarge."""
    return F.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)


def mean_cell(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, H, W) in [0, 1] -> mean (n, 16) of their cells of 4 x 4 px, and the cells (n, 16, cells), after a
    high-pass filter and each scaled to energy 1."""
    cells = F.pixel_unshuffle(orl.high_pass(image), 4).flatten(2)
    cells = cells / (cells.square().mean(1, keepdim=True).sqrt() + 0.002)
    return cells.mean(2), cells


def grid(image: torch.Tensor) -> torch.Tensor:
    """How much images (n, 3, H, W) in [0, 1] repeat one cell of 4 x 4 px, (n,): about 1 for texture, 10 for a grid."""
    mean, cells = mean_cell(image)
    return mean.var(1, correction=0) * cells.shape[2] / (cells.var(dim=(1, 2), correction=0) + 1e-9)


def periodicity(image: torch.Tensor) -> torch.Tensor:
    """Largest autocorrelation of the high-pass luminance of images (n, 3, H, W) in [0, 1] at shifts of 5 to 12 px,
    (n,) in [-1, 1]. It sees patterns that `grid` does not: their sign or phase may change from cell to cell."""
    high, found = orl.high_pass(image), []
    for k in range(5, 13):
        down = (high[..., k:, :] * high[..., :-k, :]).mean(dim=(1, 2, 3))
        right = (high[..., k:] * high[..., :-k]).mean(dim=(1, 2, 3))
        found.append((down + right) / 2)
    return torch.stack(found).amax(0) / (high.square().mean(dim=(1, 2, 3)) + 1e-9)


def score_all(lpips_fn, held_out: dict, sr, hr, nfe, weights=orl.Args.reward_weights) -> dict[str, torch.Tensor]:
    """What `score` says of SR (n, 3, H, W) in [0, 1], then VIF, grid, periodicity, LPIPS-VGG and DISTS, (n,) each; the
    last two are NaN where `held_out` lacks them, and VIF is NaN where the HR image is black all over."""
    found = orl.score(lpips_fn, sr, hr, nfe.float(), weights)
    found["vif"] = visual_information_fidelity(255 * sr, 255 * hr, reduction="none")
    found |= {"grid": grid(sr), "periodicity": periodicity(sr)}
    unknown = torch.full_like(found["psnr"], math.nan)
    return found | {name: held_out[name](sr, hr) if name in held_out else unknown for name in ("lpips_vgg", "dists")}


# ---------------------------------------------------------------------------------------------- measuring
def inputs(env: orl.DenoisingEnv, images: orl.Images, part: list[int], crop: int, seed: int):
    """HR (n, 3, H, W) and LR (n, 3, h, w) in [0, 1] of some images, and the pure noise z_T (n, c, h, w)."""
    hr = torch.stack([images.centre(i, 4 * env.ldm.stride, crop) for i in part])
    size = hr.shape[2] // 4, hr.shape[3] // 4
    lr = env.sensor.sense(hr, orl.noise_for(part, (3, *size), seed + 1_000_000, hr.device))
    return hr, lr, orl.noise_for(part, (env.ldm.latent_channels, *size), seed, hr.device)


def unsteered(env: orl.DenoisingEnv, lr, z_T, nfe: torch.Tensor) -> torch.Tensor:
    """SR (n, 3, 4h, 4w) by the unsteered LDM without back-projection, of so many NFE (n,) each."""
    sr = lr.new_empty(len(lr), 3, 4 * lr.shape[2], 4 * lr.shape[3])
    for k in map(int, nfe.unique()):
        group = nfe == k
        stock = orl.DenoisingEnv(env.ldm, k, k, env.sensor)
        sr[group] = stock.super_resolve(lr[group], z_T[group], back_projection=False)[0]
    return sr


def super_resolve_all(env: orl.DenoisingEnv, hr, lr, z_T, agent: orl.Agent, others: dict[str, orl.Agent]):
    """One batch by every method -> {method: (SR, NFE (n,), seconds an image)}, and the steps of the agent."""
    results, clock = {}, time.perf_counter()

    def lap(method: str, sr: torch.Tensor, nfe: torch.Tensor, more: float = 0.0) -> None:
        nonlocal clock
        if sr.is_cuda:
            torch.cuda.synchronize()
        results[method] = (sr, nfe, (time.perf_counter() - clock) / len(sr) + more)
        clock = time.perf_counter()

    lap("bicubic", bicubic(lr), torch.zeros(len(lr), dtype=torch.long, device=lr.device))
    sr, nfe, steps = env.super_resolve(lr, z_T, agent)
    lap("agent", sr, nfe)
    lap("ldm", unsteered(env, lr, z_T, 0 * nfe + 100), 0 * nfe + 100)
    lap("ldm_same_nfe", unsteered(env, lr, z_T, nfe), nfe)
    same, _, seconds = results["ldm_same_nfe"]
    lap("ldm_same_nfe_bp", orl.back_project(same, lr, env.sensor), nfe, seconds)
    for method, other in others.items():
        lap(method, *env.super_resolve(lr, z_T, other)[:2])
    lap("autoencoder", env.ldm.decode(env.ldm.encode(hr)), 0 * nfe)
    for k in SWEEP:
        sr = results["ldm"][0] if k == 100 else unsteered(env, lr, z_T, 0 * nfe + k)
        results[f"sweep_{k}"] = (orl.back_project(sr, lr, env.sensor), 0 * nfe + k, math.nan)
    return results, steps


def file_names(images: orl.Images) -> list[str]:
    """SCENE/NAME.png of each image: its stem, its name where two of a scene share the stem, or that with its number."""
    files = list(enumerate(zip(images.labels, images.files)))
    keys = [((k, Path(file).stem), (k, file), (k, f"{file}_{i}")) for i, (k, file) in files]
    count = Counter(key for three in keys for key in {*three})
    chosen = [next(key for key in three if count[key] == 1) for three in keys]
    return [f"{images.scenes[k]}/{name}.png" for k, name in chosen]


@torch.inference_mode()
def measure(args: Args, env, images, lpips_fn, held_out, agent, others, indices, weights=orl.Args.reward_weights):
    """Every method on every image -> a table with COLUMNS and the image's index, a row for each image and method; and
    the agent's decisions. The methods sweep_1, sweep_2 and so on are the line of plane.png, and of no table."""
    rows, decisions, by_size = [], [], {}
    for i in indices:
        by_size.setdefault(images.pixels[i].shape, []).append(i)
    parts = [g[k : k + args.batch_size] for g in by_size.values() for k in range(0, len(g), args.batch_size)]
    names = file_names(images) if args.save_images else []
    for part in tqdm(parts, unit="batch", dynamic_ncols=True, leave=False, disable=None):  # None: no bar in a log file
        hr, lr, z_T = inputs(env, images, part, args.crop, args.seed)
        results, steps = super_resolve_all(env, hr, lr, z_T, agent, others)
        for nfe, step in enumerate(steps, 1):
            stride = torch.where(step.action_mask, orl.stride_of(step.actions), math.nan)  # NaN where it is no choice
            edit = (step.edits / agent.latent_std).square().mean(dim=(1, 2, 3)).sqrt()
            did = {"t": step.t, "stride": stride, "edit": edit, "ends": results["agent"][1][step.env_ids] == nfe}
            decisions.append(pd.DataFrame({"nfe": nfe} | {k: v.tolist() for k, v in did.items()}))
        for method, (sr, nfe, seconds) in results.items():
            known = held_out if not method.startswith("sweep_") else {k: v for k, v in held_out.items() if k == "dists"}
            found = score_all(lpips_fn, known, sr, hr, nfe, weights)
            error = env.sensor.downscale(sr).clamp(0, 1) - lr  # consistency with the LR image that the models saw
            found["lr_psnr"] = (-10 * error.square().mean(dim=(1, 2, 3)).log10()).clamp(max=100)
            found = {k: v.tolist() for k, v in found.items()}
            for j, i in enumerate(part):
                row = {"scene": images.scenes[images.labels[i]], "image": images.files[i], "method": method, "index": i}
                row |= {k: v[j] for k, v in found.items()} | {"nfe": int(nfe[j]), "seconds": seconds}
                rows.append(row | ({"reward": math.nan} if method in ("bicubic", "autoencoder") else {}))
        shown = {m: sr for m, (sr, *_) in results.items() if not m.startswith("sweep_")} | {"lr": lr, "hr": hr}
        for method, batch in shown.items() if args.save_images else ():
            for i, image in zip(part, (255 * batch).round().byte().cpu()):
                file = Path(args.save_images, method, names[i])
                file.parent.mkdir(parents=True, exist_ok=True)
                torchvision.transforms.v2.functional.to_pil_image(image).save(file)
    return pd.DataFrame(rows), pd.concat(decisions)


# ---------------------------------------------------------------------------------------------- table
def column(rows: pd.DataFrame, method: str, key: str, scene: str | None = None) -> np.ndarray:
    """One figure of one method over the images, always in the same order of images."""
    chosen = rows[(rows["method"] == method) & ((rows["scene"] == scene) if scene else True)]
    return chosen.sort_values("index")[key].to_numpy()


def mean(values: np.ndarray, digits: int = 4) -> str:
    """The mean over the images for which the figure is defined, and of how many these are where it is not all."""
    known = values[np.isfinite(values)]
    some = f" (of {len(known)})" if len(known) < len(values) else ""
    return f"{known.mean():.{digits}f}{some}" if len(known) else "n/a"


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def gain_of(rows: pd.DataFrame, method: str, key: str) -> str:
    """Mean difference of the agent to a method, its 95% interval by bootstrap over images, share of images it helps."""
    gain = column(rows, "agent", key) - column(rows, method, key)
    gain = gain[np.isfinite(gain)]
    if not len(gain):
        return "n/a"
    means = np.random.default_rng(0).choice(gain, (2_000, len(gain))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}], {100 * (BETTER[key] * gain > 0).mean():.0f}%"


def table(rows: pd.DataFrame, decisions: pd.DataFrame, names: dict, scenes: list[str], notes: list[str]) -> str:
    """Markdown: notes, each scene with both baselines, every method, the agent's gains, and its decisions; names are
    {method: what the table calls it}."""
    scenes = [scene for scene in scenes if len(column(rows, "agent", "psnr", scene))]
    main_three, lines = ("ldm", "ldm_same_nfe_bp", "agent"), []
    for scene in [*scenes, None]:
        figures = {key: [mean(column(rows, m, key, scene), min(3, FIGURES[key][1])) for m in main_three]
                   for key in ("psnr", "ssim", "lpips", "lr_psnr", "nfe")}  # fmt: skip
        cells = [" / ".join(figures[key][k] for key in ("psnr", "ssim", "lpips")) for k in range(3)]
        cells += [" / ".join(figures[key]) for key in ("lr_psnr", "nfe")]
        lines.append([scene or "**all**", str(len(column(rows, "agent", "psnr", scene))), *cells])
    text = [*notes, "", "## Scene by scene", ""]
    text += ["PSNR (dB) / SSIM / LPIPS of both baselines and with RL; LR PSNR and NFE of the three in that order.", ""]
    header = ["scene", "images", "unsteered, 100 NFE", "unsteered, same NFE, back-projection", "with RL"]
    text += markdown([*header, "LR PSNR (dB)", "NFE"], lines)
    held_out = [key for key in ("dists", "lpips_vgg") if rows[key].notna().any()]
    for title, keys in (
        ("Every method, all images", ["psnr", "ssim", "lpips", "vif", "grid", "lr_psnr"]),
        ("Cost, reward and artefacts, all images", ["nfe", "seconds", "reward", "periodicity", *held_out]),
    ):
        lines = [[name, *(mean(column(rows, m, k), FIGURES[k][1]) for k in keys)] for m, name in names.items()]
        text += ["", f"## {title}", "", *markdown(["method", *(FIGURES[k][0] for k in keys)], lines)]
    rivals = [m for m in names if m not in ("agent", "autoencoder")]
    lines = [[names[m], *(gain_of(rows, m, key) for key in BETTER)] for m in rivals]
    text += ["", "## What the agent gains, all images", ""]
    text += ["Mean difference, its 95% interval by paired bootstrap over images, share of images that improve.", ""]
    text += markdown(["agent against", *(FIGURES[key][0] for key in BETTER)], lines)
    lines = []
    for nfe, at in decisions.groupby("nfe"):
        cells = [str(nfe), str(len(at)), str(at["ends"].sum()), f"{at['t'].mean():.0f}"]
        for values in (at["stride"].dropna(), at["edit"]):
            cells.append(f"{values.mean():.3f} ({values.std(ddof=0):.3f})" if len(values) else "no choice")
        lines.append(cells)
    text += ["", "## What the agent does at each function evaluation", ""]
    text += ["Mean (standard deviation over images). The stride is in base steps. The edit is a root mean square over "
             "the latent, in units of its standard deviation.", ""]  # fmt: skip
    text += markdown(["NFE", "images", "that end", "timestep", "stride", "edit"], lines)
    return "\n".join(text) + "\n"


# ---------------------------------------------------------------------------------------------- where it is written
def settings_in(folder: Path) -> dict | None:
    """The settings that the table in a folder was made with; an empty dict of a table that does not say them."""
    if not (folder / "table.md").is_file():
        return None
    found = re.search(r"^Settings: `(.*)`$", (folder / "table.md").read_text("utf-8", errors="replace"), re.MULTILINE)
    return json.loads(found[1]) if found else {}


def difference(settings: dict, before: dict) -> str:
    """What differs from other settings, as a part of a folder's name: _crop64_limit1."""
    changed = {k: "-".join(v)[:60] or "all" if isinstance(v, list) else v
               for k, v in settings.items() if v != before.get(k)}  # fmt: skip
    parts = [f"_{k}{v}" if k in ("crop", "limit", "seed") else f"_{v}" for k, v in changed.items()]
    return re.sub(r"[^\w.+-]+", "_", "".join(parts))


def output_folder(run: Path, settings: dict, own: dict) -> Path:
    """The run folder, or one beside it for other images or another sensor than the agent's own. Where that holds a
    table of other settings or images, what differs is added to the name; older tables do not say their content."""
    kinds = {k: settings[k] for k in ("images", "sensor")}
    named = run.with_name(f"{run.name}_on{difference({'images': settings['images']}, {})}")
    home = run
    if not kinds.items() <= own.items():
        home = named.with_name(named.name + difference({"sensor": settings["sensor"]}, own))
    before = settings_in(home)
    differs = "" if before is None else difference(settings, {"content": settings["content"]} | (before or own | kinds))
    beside = named if home == run else home
    return beside.with_name(beside.name + differs) if differs else home


def pictures(output: Path, run: Path, env, images, agent, rows, names, args: Args, title: str, step: int) -> list[str]:
    """The pictures of tools/figures.py, into `output` -> their file names; none, said so, without that folder."""
    try:
        import figures
    except ImportError as error:
        print(f"pictures: none are made, since they need the folder tools/ and matplotlib ({error})")
        return []
    load = lambda i: inputs(env, images, [i], args.crop, args.seed)  # noqa: E731
    return figures.draw(output, run, env, agent, rows, names, load, args.seed, title, step)


# ---------------------------------------------------------------------------------------------- main
def name_of(sensor: orl.Sensor) -> str:
    """A sensor as tables and folders name it."""
    blur = "bicubic" if sensor.mtf is None else f"MTF {sensor.mtf:g}"
    return blur + (f" noise {sensor.lr_noise:g}" if sensor.lr_noise else "")


def load_others(args: Args, run: Path, ldm: orl.LDM) -> tuple[dict[str, orl.Agent], dict[str, str]]:
    """Agents beside the one that is evaluated, and what the table calls them."""
    rival = run / "reward_gradient.pt"
    others = {"reward_gradient": orl.load_agent(orl.load_run(rival), ldm)} if rival.is_file() else {}
    names = {method: name for method, name in METHODS.items() if method != "reward_gradient" or others}
    for folder in args.pareto:
        saved, name = orl.load_run(orl.locate(folder)), Path(folder).resolve().name
        if name in names or name in ("lr", "hr"):
            stop(f"--pareto {folder}: another method is called {name}; rename the folder")
        others[name] = orl.load_agent(saved, ldm)
        names[name] = f"LDM with RL, {name} ({' '.join(f'{w:g}' for w in saved['args']['reward_weights'])})"
    return others, names


def main(args: Args) -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not so in a notebook
        sys.stdout.reconfigure(errors="replace")  # a console without a character shows another one
    orl.check_bounds(args, batch_size=(1, math.inf), crop=(orl.LEAST_CROP if args.crop else 0, math.inf))

    # Agent, frozen LDM and sensor
    device, run = orl.pick_device(args.device), orl.locate(args.agent)
    saved = orl.load_run(run)
    run = (run if run.is_dir() else run.parent).resolve() if run.name in ("", "..") or run.is_file() else run
    trained, own_sensor = saved["args"], orl.Sensor(saved["args"]["mtf"], saved["args"]["lr_noise"])
    mtf = own_sensor.mtf if args.mtf is None else None if args.mtf == "bicubic" else args.mtf
    sensor = orl.Sensor(mtf, own_sensor.lr_noise if args.lr_noise is None else args.lr_noise)
    orl.check_bounds(sensor, mtf=(0.01, 0.9), lr_noise=(0, 255))
    ldm_name = args.ldm or trained["ldm"]
    ldm = orl.load_ldm(ldm_name, device)
    agent = orl.load_agent(saved, ldm)
    env = orl.DenoisingEnv(ldm, trained["base_steps"], trained["max_nfe"], sensor)
    others, names = load_others(args, run, ldm)
    print(f"agent: {args.agent}, {saved['step']} environment steps on {saved['title']}; sensor: {name_of(sensor)}")

    # Images
    dataset = args.dataset or trained["dataset"]
    if args.dataset is None and saved["title"] != dataset and not orl.locate(dataset).is_dir():
        print(f"data: the agent's own images ({saved['title']}) are not at {dataset}: these are the scenes that ship")
        dataset = orl.Args.dataset
    least = -(-orl.LEAST_CROP // (4 * ldm.stride)) * 4 * ldm.stride  # images are cut to a multiple of 4 * ldm.stride
    images = orl.load_images(dataset, args.split, args.scenes, max(least, args.crop), device)
    of_scene = [[i for i, label in enumerate(images.labels) if label == k] for k in range(len(images.scenes))]
    indices = [i for group in of_scene for i in group[: args.limit or None]]

    # Where it is written
    content = orl.digest([images.files, [int(image.sum()) for image in images.pixels]])
    settings = {"images": images.title, "content": content, "sensor": name_of(sensor), "split": args.split}
    settings |= {"scenes": sorted(args.scenes), "crop": args.crop, "limit": args.limit, "seed": args.seed}
    own = {"images": saved["title"], "sensor": name_of(own_sensor), "split": "test", "scenes": [], "crop": 0}
    own |= {"limit": 0, "seed": 0}
    folders = {"--output": Path(args.output) if args.output else output_folder(run, settings, own)}
    folders |= {"--save-images": Path(args.save_images)} if args.save_images else {}
    for flag, folder in folders.items():  # before hours of measuring, not after them
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            stop(f"{folder} cannot be written ({error.strerror or error}); name another folder with {flag}")
        if (before := settings_in(folder)) is not None:
            old = difference(before, settings)[1:] or ("the same settings" if before else "unknown settings")
            print(f"{folder}: the table of {old} there will be replaced")
    output = folders["--output"]

    # Every method on every image
    lpips_fn, held_out = orl.load_lpips(device), load_held_out_metrics(device) if args.held_out_metrics else {}
    weights = trained["reward_weights"]
    try:
        rows, decisions = measure(args, env, images, lpips_fn, held_out, agent, others, indices, weights)
    except OSError as error:  # it writes nothing but images
        stop(f"{error.filename or args.save_images} cannot be written: {error.strerror or error}")
    size = f"centre {args.crop} px" if args.crop else "whole images"
    title = f"{images.title}, {args.split} split, {len(indices)} images ({size}), LDM {ldm_name}, agent {run}"
    notes = [f"# {title}", "", f"Settings: `{json.dumps(settings, ensure_ascii=False)}`", ""]
    notes += [f"The reward weighs PSNR, SSIM, LPIPS and efficiency by {', '.join(f'{w:g}' for w in weights)}. LR PSNR "
              "compares the downscaled SR with the LR image that the models saw."]  # fmt: skip
    notes += ["The reward's LPIPS rests on AlexNet. LPIPS-VGG and DISTS rest on VGG16."] if held_out else []
    listed = rows[rows["method"].isin(names)]
    text = table(listed, decisions, names, images.scenes, notes)
    print(text)
    try:
        for folder in folders.values():
            (folder / "table.md").write_text(text, encoding="utf-8", errors="replace")
            listed.round(6).to_csv(folder / "table.csv", columns=COLUMNS, index=False, errors="replace")
        made = pictures(output, run, env, images, agent, rows, names, args, title, saved["step"])
    except OSError as error:
        stop(f"{error.filename or output} cannot be written ({error.strerror or error}); name another --output")
    print(f"written to {output}: {', '.join(['table.md', 'table.csv', *made])}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("\nstopped before the table was written; the same command makes it")
        sys.exit(130)
