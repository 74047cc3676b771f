"""What the scripts write for the eye: the run folder's TensorBoard log, and the pictures of `eval_sr.py` in print size
(colours that the colour-blind and a grey printer tell apart). Nothing of the method is here.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from sr_inputs import reason, say, stop

# ------------------------------------------------------------------------------------------------ TensorBoard


def open_run(run: Path, args, first_step: int):
    """Makes the run folder, notes command and arguments in it, and returns its SummaryWriter.

    A resumed run (first_step > 0) goes on with the same curve: what a killed run logged after its checkpoint is dropped.
    """
    from torch.utils.tensorboard import SummaryWriter

    try:
        run.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(run, purge_step=first_step + 1 if first_step else None)
    except OSError as error:
        stop(f"--run-dir {run}: cannot be written ({reason(error)}); name another folder")
    say(f"run: {run}")
    rows = "\n".join(f"|--{k.replace('_', '-')}|{v}|" for k, v in vars(args).items())
    command = "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    writer.add_text("run", f"`{command}`\n\n|argument|value|\n|-|-|\n{rows}", first_step)
    return writer


def log_iteration(writer, step: int, batch: dict, values: dict, calls: torch.Tensor, infos: list[dict], figures: dict, histograms: bool) -> dict:
    """Scalars (and histograms) of one iteration: losses, episodes, the reward's terms, actions by denoiser call.

    values: {component: (T n,)}; calls (T n,): the denoiser call that each action follows. -> the scalars
    """
    log = dict(figures)
    if infos:
        ended = {k: torch.cat([info[k] for info in infos]).float().mean() for k in infos[0]}
        log |= {f"reward/{k[5:]}": v for k, v in ended.items() if k.startswith("term_")}
        log |= {f"charts/{k}": ended[k] for k in ("episodic_return", "denoiser_calls", "psnr_gain_over_bicubic")}
    advantages = batch["advantages"].flatten()
    log |= {"losses/advantage_std": advantages.std(), "losses/return_std": batch["returns"].flatten().std()}
    for component, value in values.items():
        for k in calls.unique().tolist():
            log[f"policy/{component}_call_{int(k):02d}"] = value[calls == k].mean()
        if histograms:
            writer.add_histogram(f"policy/{component}", value, step)
    for tag, value in log.items():
        writer.add_scalar(tag, float(value), step)
    return log


def log_map(writer, tag: str, maps: torch.Tensor, low: float, high: float, step: int) -> None:
    """A map (1, c, h, w), mean over channels, with the colours of a fixed scale (also in the tag) that reads in grey."""
    from matplotlib import colormaps

    scaled = ((maps[0].mean(0) - low) / (high - low)).clamp(0, 1).repeat_interleave(4, 0).repeat_interleave(4, 1)
    group, name = tag.split("/")
    tag = f"{group}_dark_{low:g}_to_light_{high:g}/{name}"
    writer.add_image(tag, colormaps["cividis"](scaled.cpu().numpy())[..., :3], step, dataformats="HWC")


# ------------------------------------------------------------------------------------------------ pictures

DPI = 200


def pyplot():
    """matplotlib's pyplot, on any machine without a screen; imported only where a picture is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def axes_grid(rows: int, columns: int, width: float, height: float):
    """A figure of bare picture panels."""
    plt = pyplot()

    fig, axes = plt.subplots(rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
    return plt, fig, axes


@torch.inference_mode()
def trajectory(mdp, lr: torch.Tensor, z: torch.Tensor, policy) -> list[tuple]:
    """Every (state, action) of one image, LR (1, 3, h, w) in [0, 1], from noise (1, c, h, w), under a policy."""
    steps, s, done = [], mdp.begin(lr, z), False
    while not done:
        steps.append((s, policy(*mdp.observe(s))))
        z, t, done = mdp.advance(*steps[-1])
        s = s if done else mdp.follow(s, z, t)
    return steps


def array(image: torch.Tensor) -> np.ndarray:
    """(1, c, h, w) -> (h, w, c) on the CPU."""
    return image[0].permute(1, 2, 0).float().cpu().numpy()


def comparison(path: Path, examples: list[dict], title: str) -> None:
    """Per example LR | without | with | HR, each with the quarter of the HR image that has most detail, magnified.

    examples: {"scene": name, "panels": {label: (image (1, 3, h, w) in [0, 1], caption)}}
    """
    plt, fig, axes = axes_grid(len(examples), 4, 9, 2.35)
    for row, (line, example) in enumerate(zip(axes, examples)):
        hr = example["panels"]["HR"][0]
        side = min(hr.shape[-2:]) // 4
        edges = torch.nn.functional.pad(hr.mean(1, keepdim=True).diff(dim=3).abs(), (0, 1))
        detail = torch.nn.functional.avg_pool2d(edges, side, stride=side // 2)[0, 0]
        top, left = (int(v) * (side // 2) for v in np.unravel_index(int(detail.argmax()), detail.shape))
        for ax, (label, (image, caption)) in zip(line, example["panels"].items()):
            ax.imshow(array(image), interpolation="nearest")
            inset = ax.inset_axes((0.56, 0.02, 0.42, 0.42))
            inset.imshow(array(image)[top : top + side, left : left + side], interpolation="nearest")
            inset.set_xticks([]), inset.set_yticks([])
            for spine in inset.spines.values():
                spine.set(color="white", linewidth=1.5)
            ax.add_patch(plt.Rectangle((left, top), side, side, fill=False, color="white", linewidth=1))
            ax.set_xlabel(caption, fontsize=7)
            if row == 0:
                ax.set_title(label, fontsize=10)
        line[0].set_ylabel(example["scene"].replace("_", " "), fontsize=9)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
    plt.close(fig)


def action_maps(path: Path, examples: list[dict], ranges: dict, title: str) -> None:
    """Per example the agent's image and its maps, one fixed colour scale a component.

    examples: {"scene": name, "image": (1, 3, H, W), "maps": {label: (1, 1, h, w)}}; ranges: {label: (low, high, unit)}
    """
    labels = list(examples[0]["maps"])
    plt, fig, axes = axes_grid(len(examples), 1 + len(labels), 2.3 * (1 + len(labels)), 2.2)
    for line, example in zip(axes, examples):
        line[0].imshow(array(example["image"]), interpolation="nearest")
        line[0].set_ylabel(example["scene"].replace("_", " "), fontsize=9)
        for ax, label in zip(line[1:], labels):
            low, high, _ = ranges[label]
            ax.imshow(array(example["maps"][label])[..., 0], cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    for column, label in zip(axes.T[1:], labels):
        fig.colorbar(column[-1].images[0], ax=column, location="bottom", shrink=0.8, aspect=15, pad=0.01, label=ranges[label][2])
    for ax, label in zip(axes[0], ["LDM with RL", *labels]):
        ax.set_title(label, fontsize=9)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
    plt.close(fig)


def schedule(path: Path, decisions: list[dict], base: list[int], title: str) -> None:
    """Timestep of each denoiser call, mean by scene over the images that get there, beside the plain schedule."""
    plt = pyplot()

    fig, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    ax.plot(range(1, len(base) + 1), base, color="0.6", linewidth=3, label=f"plain LDM, {len(base)} calls")
    scenes = sorted({d["scene"] for d in decisions})
    for k, (scene, marker) in enumerate(zip(scenes, "osD^vP*X" * len(scenes))):
        of_scene = [d for d in decisions if d["scene"] == scene]
        images = len({d["index"] for d in of_scene})
        at = {c: [d["t"] for d in of_scene if d["call"] == c] for c in sorted({d["call"] for d in of_scene})}
        at = {c: t for c, t in at.items() if 2 * len(t) >= images}  # a call that half of the images make
        label = f"{scene.replace('_', ' ')}, {len(of_scene) / images:.1f} calls"
        ax.plot(at.keys(), [np.mean(t) for t in at.values()], marker=marker, linewidth=1, color=plt.colormaps["cividis"](k / len(scenes)), label=label)
    ax.set(xlabel="denoiser call of an image", ylabel="timestep t (999: pure noise)", title=title)
    ax.title.set_fontsize(8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3), ax.legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=DPI)
    plt.close(fig)


def reward_curve(path: Path, run: Path) -> bool:
    """Fig. 3 of the paper: the training reward over environment steps, from the run's TensorBoard events."""
    plt = pyplot()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    if "charts/episodic_return" not in events.Tags()["scalars"]:
        return False
    points = events.Scalars("charts/episodic_return")
    steps, values = np.array([p.step for p in points]), np.array([p.value for p in points])
    window = max(1, len(values) // 30)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    ax.plot(steps, values, color="0.7", linewidth=0.8, label="one iteration")
    ax.plot(steps[window - 1 :], smooth, color="black", linewidth=1.6, label=f"mean of the last {window}")
    ax.set(xlabel="environment steps (denoiser calls)", ylabel="reward of an image minus bicubic's", title="Training reward (paper: Fig. 3)")
    ax.grid(alpha=0.3), ax.legend(frameon=False)
    fig.savefig(path, dpi=DPI)
    plt.close(fig)
    return True
