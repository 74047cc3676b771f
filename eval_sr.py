"""Evaluates an agent that `ppo_ldm_sr.py` trained: the per-scene table with and without it, and the pictures.

    python eval_sr.py                                        # runs/orl_ldm on the images that it was trained for
    python eval_sr.py --agent runs/NAME --dataset data/paper8 --crop 128
    python eval_sr.py --images photo.png folder/             # super-resolves your own LR images, 4x, no metrics

Every method sees the same images and the same noise. `bicubic` is the floor, `autoencoder` (the HR image encoded and
decoded) the ceiling; `ldm` is the plain LDM at 100 steps, `ldm_same_calls` with as many calls as the agent spends on
the image, `constant` the best constant action, `agent` the LDM steered by the agent.
"""

import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import ppo_ldm_sr as orl
import sr_inputs
import sr_outputs
from ppo_ldm_sr import Denoising, constant_policy, downscale, noise_for, upscale
from sr_inputs import Scenes, list_images, say, stop
from sr_metrics import Metrics, load_lpips, peak_signal_to_noise_ratio

METHODS = {
    "bicubic": "bicubic",
    "ldm": "LDM without RL, 100 steps",
    "ldm_same_calls": "LDM without RL, the agent's calls",
    "constant": "LDM, best constant action",
    "agent": "LDM with RL",
    "autoencoder": "autoencoder (ceiling)",
}
COLUMNS = ("scene", "image", "method", "psnr", "ssim", "lpips", "calls", "seconds", "lr_psnr")
BETTER = {"psnr": 1, "ssim": 1, "lpips": -1, "reward": 1}  # the sign of an improvement


@dataclass
class RunArgs:
    """The agent, and what both uses share."""

    agent: str = "runs/orl_ldm"  # run folder of the agent
    ldm: str | None = None  # LDM that the agent was trained with (None: as its run folder says)
    output: str | None = None  # folder to write to (None: the run folder, or beside it NAME_on_IMAGES; beside each of --images)
    batch_size: int = 16  # images (or tiles) denoised at once
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 0  # seed of the noise


@dataclass
class TableArgs:
    """The table and the pictures, of images whose HR is known."""

    dataset: str | None = None  # image folder split/scene/*.jpg, Hub name or auto (None: the agent's own, or auto where that is missing)
    split: str = "test"  # split of the dataset
    scenes: tuple[str, ...] = ()  # scenes to evaluate (none named: as in training, where the dataset has the paper's eight, else all)
    crop: int = 0  # px of the centre that is evaluated; 0: the whole image
    limit: int = 0  # images a scene at most; 0: all
    lpips_weights: str | None = None  # file of torchvision's AlexNet where it is neither cached nor downloadable


@dataclass
class ImagesArgs:
    """Your own LR images: NAME_sr.png, 4x as large, and no table."""

    images: tuple[str, ...] = ()  # LR images or folders
    tile: int = 128  # LR px of a tile; larger images are tiled


@dataclass
class Args(ImagesArgs, TableArgs, RunArgs):
    """All settings, flat: args.seed."""


# ------------------------------------------------------------------------------------------------ table


def super_resolve_all(mdp: Denoising, lr, hr, z, agent, constant):
    """One batch by every method -> {method: (SR, calls (n,), seconds per image)}, the agent's decisions."""
    results, n, clock = {}, len(lr), time.perf_counter()

    def lap(method: str, sr: torch.Tensor, calls: torch.Tensor) -> None:
        nonlocal clock
        if sr.is_cuda:
            torch.cuda.synchronize()
        results[method] = (sr, calls, (time.perf_counter() - clock) / n)
        clock = time.perf_counter()

    def plain(steps: int, group=slice(None)):
        short = Denoising(mdp.ldm, steps, steps)
        return short.super_resolve(lr[group], z[group], short.plain)[:2]

    none = torch.zeros(n, dtype=torch.long, device=lr.device)
    lap("bicubic", upscale(lr).clamp(0, 1), none)
    sr, calls, trace = mdp.super_resolve(lr, z, agent.mean)
    lap("agent", sr, calls)
    lap("ldm", *plain(100))
    same = torch.empty_like(hr)
    for k in calls.unique().tolist():
        same[calls == k] = plain(k, calls == k)[0]
    lap("ldm_same_calls", same, calls)
    if constant is not None:
        lap("constant", *mdp.super_resolve(lr, z, constant_policy(constant))[:2])
    lap("autoencoder", mdp.ldm.decode(mdp.ldm.encode(hr)), none)
    return results, trace


@torch.inference_mode()
def measure(args: Args, mdp: Denoising, scenes: Scenes, reward: orl.Reward, agent, constant, indices):
    """Every method on every image -> rows (dicts with COLUMNS, reward and the image's index), the agent's decisions."""
    rows, decisions = [], []
    progress = tqdm(total=len(indices), unit="image", dynamic_ncols=True, leave=False)
    for part, hr in scenes.batches(indices, 4 * mdp.ldm.stride, args.crop, args.batch_size):
        lr = downscale(hr)
        z = noise_for(mdp.ldm, part, *lr.shape[-2:], args.seed)
        results, trace = super_resolve_all(mdp, lr, hr, z, agent, constant)
        for method, (sr, calls, seconds) in results.items():
            found = reward.metrics(sr, hr)
            found |= {"reward": reward(found, calls), "lr_psnr": peak_signal_to_noise_ratio(downscale(sr), lr)}
            for j, i in enumerate(part):
                row = {"scene": scenes.names[int(scenes.scene[i])], "image": scenes.files[i], "method": method, "index": i}
                rows.append(row | {k: float(v[j]) for k, v in found.items()} | {"calls": int(calls[j]), "seconds": seconds})
        for call, (slots, t, action) in enumerate(trace, 1):
            values = orl.action_values(action)
            for j, slot in enumerate(slots.tolist()):
                decision = {k: v[j].flatten().tolist() for k, v in values.items()} | {"call": call, "t": int(t[j])}
                decisions.append(decision | {"scene": scenes.names[int(scenes.scene[part[slot]])], "index": part[slot]})
        progress.update(len(part))
    progress.close()
    return rows, decisions


def column(rows, method: str, key: str, scene: str | None = None) -> np.ndarray:
    """One figure of one method over the images, always in the same order of images."""
    found = [r for r in rows if r["method"] == method and scene in (None, r["scene"])]
    return np.array([r[key] for r in sorted(found, key=lambda r: r["index"])])


def interval(difference: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% interval of the mean of paired differences, by bootstrap over images."""
    rng = np.random.default_rng(seed)
    means = rng.choice(difference, (draws, len(difference))).mean(axis=1)
    return tuple(np.percentile(means, (2.5, 97.5)))


def number(value: float, digits: int = 4) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def table(rows, scenes: list[str], title: str) -> str:
    """Markdown: the paper's Table 2, every method over all images, and what the agent gains over its rivals."""
    has_constant = any(r["method"] == "constant" for r in rows)
    text = [f"# {title}", "", "## With and without RL (the paper's Table 2)", ""]
    text += ["| scene | images | PSNR (dB) without → with | SSIM without → with | LPIPS without → with | calls without → with |", "|---|---|---|---|---|---|"]
    for scene in [*scenes, None]:
        cells = [scene or "**all**", str(len(column(rows, "agent", "psnr", scene)))]
        for key, digits in (("psnr", 3), ("ssim", 4), ("lpips", 4), ("calls", 1)):
            a, b = (column(rows, m, key, scene).mean() for m in ("ldm", "agent"))
            sign = "" if key == "calls" or math.isnan(a) else f" ({b - a:+.{digits}f})"
            cells.append(f"{number(a, digits)} → {number(b, digits)}{sign}")
        text.append("| " + " | ".join(cells) + " |")
    for scene in [None, *scenes]:
        text += ["", f"## Every method, {scene or 'all images'}", ""]
        text += ["| method | PSNR (dB) | SSIM | LPIPS | calls | s/image | LR PSNR (dB) | reward |", "|---|---|---|---|---|---|---|---|"]
        for method, label in METHODS.items():
            if method == "constant" and not has_constant:
                continue
            means = {k: column(rows, method, k, scene).mean() for k in ("psnr", "ssim", "lpips", "calls", "seconds", "lr_psnr", "reward")}
            digits = {"psnr": 3, "calls": 1, "seconds": 3, "lr_psnr": 1}
            shown = {k: "" if k == "reward" and method in ("bicubic", "autoencoder") else number(v, digits.get(k, 4)) for k, v in means.items()}
            text.append(f"| {label} | " + " | ".join(shown.values()) + " |")
    text += [
        "",
        "## What the agent gains, over all images",
        "",
        "Mean difference, its 95% interval by paired bootstrap over images, share of images that improve.",
        "",
    ]
    text += ["| agent against | PSNR (dB) | SSIM | LPIPS | reward |", "|---|---|---|---|---|"]
    for method in ("bicubic", "ldm", "ldm_same_calls", "constant")[: 3 + has_constant]:
        cells = []
        for key, sign in BETTER.items():
            difference = column(rows, "agent", key) - column(rows, method, key)
            if np.isnan(difference).any():
                cells.append("n/a")
                continue
            low, high = interval(difference)
            cells.append(f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}], {100 * (sign * difference > 0).mean():.0f}%")
        text.append(f"| {METHODS[method]} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def decision_table(decisions: list[dict]) -> str:
    """Markdown: what the agent does at each denoiser call and in each latent channel, mean over the images that get there."""
    single = [k for k in orl.COMPONENTS if not k.endswith("channel")]
    lines = ["", "What the agent does at each denoiser call, mean (spread over images):", ""]
    lines += ["| call | images | timestep | " + " | ".join(single) + " |", "|---" * (len(single) + 3) + "|"]
    for call in sorted({d["call"] for d in decisions}):
        at = [d for d in decisions if d["call"] == call]
        cells = [f"{np.mean([d[k] for d in at]):.2f} ({np.std([d[k] for d in at]):.2f})" for k in single]
        lines.append(f"| {call} | {len(at)} | {np.mean([d['t'] for d in at]):.0f} | " + " | ".join(cells) + " |")
    last = {d["index"]: d for d in decisions}.values()  # the last call of each image
    channels = range(len(decisions[0]["blend_channel"]))
    lines += ["", "And in each latent channel, at an image's last call:", ""]
    lines += ["| component | " + " | ".join(f"channel {c}" for c in channels) + " |", "|---" * (len(channels) + 1) + "|"]
    for k in (k for k in orl.COMPONENTS if k not in single):
        mean, spread = (f([d[k] for d in last], axis=0) for f in (np.mean, np.std))
        lines.append(f"| {k} | " + " | ".join(f"{mean[c]:+.2f} ({spread[c]:.2f})" for c in channels) + " |")
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: list[dict]) -> None:
    """One line per image and method."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({k: round(v, 6) if isinstance(v, float) else v for k, v in r.items()} for r in rows)


# ------------------------------------------------------------------------------------------------ pictures


@torch.inference_mode()
def pictures(folder: Path, mdp: Denoising, scenes: Scenes, agent, rows, decisions, args: Args, title: str) -> list[str]:
    """figure.png, actions.png (maps), steps.png and schedule.png; per scene the image of median gain in reward, not the best."""
    compared, steered = [], []
    for name in [name for name in scenes.names if len(column(rows, "agent", "psnr", name))]:
        gain = column(rows, "agent", "reward", name) - column(rows, "ldm", "reward", name)
        index = sorted(r["index"] for r in rows if r["method"] == "agent" and r["scene"] == name)
        i = index[int(np.argsort(gain)[len(gain) // 2])]
        hr = scenes.image(i, 4 * mdp.ldm.stride, args.crop)
        lr = downscale(hr)
        z = noise_for(mdp.ldm, [i], *lr.shape[-2:], args.seed)
        panels = {"LR": (F.interpolate(lr, scale_factor=4), "")}
        full = Denoising(mdp.ldm, 100, 100)
        trajectory = list(mdp.steps(lr, z, agent.mean))
        *_, (_, _, action, last, _) = trajectory
        sr = {"ldm": full.super_resolve(lr, z, full.plain)[0], "agent": mdp.finish(last, lr, action)}
        for label, method in (("without RL", "ldm"), ("with RL", "agent")):
            m = next(r for r in rows if r["method"] == method and r["index"] == i)
            caption = f"{m['psnr']:.2f} dB, SSIM {m['ssim']:.3f}, LPIPS {number(m['lpips'], 3)}, {m['calls']} calls"
            panels[label] = (sr[method], caption)
        compared.append({"scene": name, "panels": panels | {"HR": (hr, "")}})
        steps = []
        for _, s, action, _, _ in trajectory:
            maps = {"deviation": orl.deviation(s.x0, s.mean)} | dict(zip(("blend", "sharpen"), mdp.maps(s, action)))
            maps = {k: v.mean(1, keepdim=True) for k, v in maps.items()}
            values = {k: float(v.mean()) for k, v in orl.action_values(action).items()}
            steps.append({"t": int(s.t), "x0": mdp.ldm.decode(s.x0), "maps": maps, "values": values})
        steered.append({"scene": name, "image": panels["with RL"][0], "hr": hr, "steps": steps})
    scales = {"deviation": (-2.0, 2.0, "standard units")} | {k: (*orl.COMPONENTS[k][1:3], "mean over channels") for k in ("blend", "sharpen")}
    rule = "per scene the image of median gain in reward"
    sr_outputs.comparison(folder / "figure.png", compared, f"{title}\n{rule}")
    sr_outputs.action_maps(folder / "actions.png", steered, scales, f"{title}\n{rule}")
    sr_outputs.steps(folder / "steps.png", steered[0], scales, f"{title}\n{steered[0]['scene'].replace('_', ' ')}, the image of median gain in reward")
    base = [mdp.t_first - k * mdp.jump for k in range(mdp.base_steps)]
    sr_outputs.schedule(folder / "schedule.png", decisions, base, title)
    return ["figure.png", "actions.png", "steps.png", "schedule.png"]


# ------------------------------------------------------------------------------------------------ your own images


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `length` and share at least `overlap`."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def super_resolve_image(mdp: Denoising, policy, pixels: torch.Tensor, tile: int, batch_size: int, seed: int) -> torch.Tensor:
    """LR uint8 (3, h, w) of any size -> SR uint8 (3, 4h, 4w), tiled with overlap where it is larger than `tile`."""
    _, h, w = pixels.shape
    stride, overlap, least = mdp.ldm.stride, 16, 16
    tile = max(tile // stride * stride, 2 * overlap)
    pad_h, pad_w = (max(least, -(-side // stride) * stride) - side for side in (h, w))
    lr = pixels.float().unsqueeze(0) / 255
    lr = F.pad(lr, (0, pad_w, 0, pad_h), mode="reflect" if pad_w < w and pad_h < h else "replicate")
    height, width = lr.shape[-2:]
    noise = noise_for(mdp.ldm, [0], height, width, seed).cpu()  # one field for all tiles: overlaps agree
    out = torch.zeros(3, 4 * height, 4 * width, dtype=torch.uint8)
    th, tw = min(tile, height), min(tile, width)
    corners = [(y, x) for y in starts(height, th, overlap) for x in starts(width, tw, overlap)]
    for first in range(0, len(corners), batch_size):
        group = corners[first : first + batch_size]
        part = torch.cat([lr[..., y : y + th, x : x + tw] for y, x in group]).to(mdp.ldm.device)
        z = torch.cat([noise[..., y : y + th, x : x + tw] for y, x in group]).to(mdp.ldm.device)
        sr = (mdp.super_resolve(part, z, policy)[0] * 255).round().byte().cpu()
        for (y, x), image in zip(group, sr):
            # the margin next to a neighbour is context only
            a, b = (0 if y == 0 else overlap // 2), (0 if x == 0 else overlap // 2)
            out[:, 4 * (y + a) : 4 * (y + th), 4 * (x + b) : 4 * (x + tw)] = image[:, 4 * a :, 4 * b :]
    return out[:, : 4 * h, : 4 * w]


def super_resolve_files(args: Args, mdp: Denoising, agent) -> None:
    """Writes NAME_sr.png for every readable image; the others are named."""
    from PIL import Image

    written, failed = 0, 0
    for file in list_images(args.images):
        try:
            with Image.open(file) as image:
                has_alpha = "A" in image.getbands() or "transparency" in image.info
            pixels = sr_inputs.read_image(file)
        except Exception as error:
            failed += 1
            say(f"{file}: skipped, cannot be read ({type(error).__name__}: {error})")
            continue
        began = time.perf_counter()
        sr = super_resolve_image(mdp, agent.mean, pixels, args.tile, args.batch_size, args.seed)
        folder = Path(args.output) if args.output else file.parent
        target = folder / f"{file.stem}_sr.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(sr.permute(1, 2, 0).numpy())
            sr_inputs.write_file(target, lambda part: picture.save(part, format="PNG"))
        except OSError as error:
            stop(f"{target}: cannot be written ({error.strerror or error}); name another folder with --output")
        written += 1
        note = ", its alpha channel dropped" if has_alpha else ""
        say(f"{target}: {pixels.shape[2]} x {pixels.shape[1]} -> {sr.shape[2]} x {sr.shape[1]} px in {time.perf_counter() - began:.1f} s{note}")
    if not written:
        stop(f"--images: none of the {failed} file(s) could be read as an image")


# ------------------------------------------------------------------------------------------------ main


def load_agent(run: Path, ldm: orl.LDM) -> orl.Agent:
    """The agent of a run folder; one of another LDM or action space is refused."""
    tensors, state = sr_inputs.load_tensors(run / "agent.safetensors")
    if state["components"] != list(orl.COMPONENTS):
        stop(f"{run}: its agent's actions are {', '.join(state['components'])}, not {', '.join(orl.COMPONENTS)}; train it again")
    if state["ldm"] != ldm.fingerprint:
        stop(f"{run}: its agent was trained for another LDM ({state['args']['ldm']}, fingerprint {state['ldm']}); give that with --ldm")
    agent = orl.Agent(ldm.latent_channels)
    try:
        agent.load_state_dict(tensors)
    except RuntimeError:
        stop(f"{run}: its agent is of another version of this code (its network has other layers); train it again")
    return agent.to(ldm.device).eval()


def pick_dataset(args: Args, state: dict) -> str:
    """--dataset, or the images that the agent was trained on, or auto where those are not here."""
    own, is_folder = state["args"]["dataset"], state["title"] != state["args"]["dataset"]
    if args.dataset is None and own != "auto" and is_folder and not sr_inputs.locate(own).is_dir():
        say(f"data: the agent's own images ({state['title']}) are not at {own}; --dataset names others")
        own = "auto"
    return sr_inputs.resolve_dataset(args.dataset or own)


def best_constant(run: Path, state: dict, dataset: str, mdp: Denoising, reward: orl.Reward):
    """The best constant action: as the run folder keeps it, else searched on the agent's training images and kept."""
    if (kept := sr_inputs.read_constant(run)) is not None:
        return kept
    trained = state["args"]
    scenes = sr_inputs.load_scenes(dataset, "train", tuple(state["scenes"]), trained["crop"])
    if scenes.title != state["title"]:
        say(f"best constant action: needs the agent's training images ({state['title']}); its row is left out")
        return None
    found = orl.search_constant(mdp, scenes.to(mdp.ldm.device), reward, trained["crop"], trained["seed"])
    return sr_inputs.keep_constant(run, *found, orl.action_values)


def main(args: Args) -> None:
    files = list_images(args.images)  # bad input speaks before anything is loaded
    device, run = sr_inputs.pick_device(args.device), sr_inputs.locate(args.agent)
    _, state = sr_inputs.load_tensors(run / "agent.safetensors")
    ldm_name = args.ldm or state["args"]["ldm"]
    ldm = orl.load_ldm(ldm_name, device)
    agent = load_agent(run, ldm)
    mdp = Denoising(ldm, state["args"]["base_steps"], state["args"]["max_calls"])
    say(f"agent: {args.agent}, {state['step']} environment steps on {state['title']}; LDM: {ldm_name}")
    if files:
        return super_resolve_files(args, mdp, agent)

    dataset = pick_dataset(args, state)
    scenes = sr_inputs.load_scenes(dataset, args.split, args.scenes, max(32, 4 * ldm.stride)).to(device)
    of_scene = [(scenes.scene == k).nonzero().flatten().tolist() for k in range(len(scenes.names))]
    indices = [i for group in of_scene for i in group[: args.limit or None]]
    reward = orl.Reward(Metrics(load_lpips(args.lpips_weights), device))
    own = scenes.title == state["title"]
    output = Path(args.output or (run if own else f"{run}_on_{scenes.slug}"))
    try:
        output.mkdir(parents=True, exist_ok=True)
        constant = best_constant(run, state, dataset, mdp, reward)
        rows, decisions = measure(args, mdp, scenes, reward, agent, constant, indices)
        size = f"centre {args.crop} px" if args.crop else "whole images"
        title = f"{scenes.title}, {args.split} split, {len(indices)} images ({size}), LDM {ldm_name}, agent {args.agent}"
        text = table(rows, scenes.names, title) + decision_table(decisions)
        sr_inputs.write_file(output / "table.md", lambda part: part.write_text(text))
        sr_inputs.write_file(output / "table.csv", lambda part: write_csv(part, rows))
        made = ["table.md", "table.csv", *pictures(output, mdp, scenes, agent, rows, decisions, args, title)]
        made += ["reward.png"] * sr_outputs.reward_curve(output / "reward.png", run)
    except OSError as error:
        stop(f"{error.filename or output}: cannot be written or read ({error.strerror or error}); name another folder with --output")
    say(text[: text.index("## Every method, " + scenes.names[0])] + text[text.index("## What the agent gains") :])
    say(f"written to {output}: {', '.join(made)}")


if __name__ == "__main__":
    main(sr_inputs.parse_args(Args, __doc__))
