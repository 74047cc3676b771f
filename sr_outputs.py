"""What the scripts write for the eye: the run folder's TensorBoard log, and the pictures of `eval_sr.py` in print size
(colours that the colour-blind and a grey printer tell apart). Nothing of the method is here.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sr_inputs import reason, say, stop

# ------------------------------------------------------------------------------------------------ TensorBoard


def progress(items, title: str, note):
    """The items, with a progress bar for the first of several processes; note() -> what it says beside it."""
    bar = tqdm(items, title, dynamic_ncols=True, leave=False, disable=os.environ.get("RANK", "0") != "0")
    for item in bar:
        yield item
        bar.set_postfix_str(note())


class Log:
    """The TensorBoard events and the progress bar of a training run, in a folder that it makes."""

    def __init__(self, run: Path, args, first_step: int):
        """A resumed run (first_step > 0) goes on with the same curve: what a killed run logged after its checkpoint is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            run.mkdir(parents=True, exist_ok=True)
            self.writer = SummaryWriter(run, purge_step=first_step + 1 if first_step else None)
        except OSError as error:
            stop(f"--run-dir {run}: cannot be written ({reason(error)}); name another folder")
        say(f"run: {run}")
        rows = "\n".join(f"|--{k.replace('_', '-')}|{v}|" for k, v in vars(args).items())
        command = "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.writer.add_text("run", f"`{command}`\n\n|argument|value|\n|-|-|\n{rows}", first_step)
        say("progress: PSNR gain over the plain LDM on held-out images, steps, time left, mean return and calls of an image")
        shape = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}{postfix}]"  # fits 80 columns
        self.bar = tqdm(total=args.total_timesteps, initial=first_step, unit="step", unit_scale=True, dynamic_ncols=True, bar_format=shape)

    def scalars(self, step: int, values: dict) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, float(value), step)
        self.writer.flush()

    def iteration(self, step: int, batch: dict, values: dict, calls: torch.Tensor, infos: list[dict], losses: dict, charts: dict, histograms: bool) -> None:
        """Losses, episodes, the reward's terms, actions by denoiser call, and histograms of these where asked for.

        values: {component: (T n, 1 or c, 1, 1)}; calls (T, n): the denoiser call that each action follows.
        """
        log = {f"charts/{k}": v for k, v in charts.items()} | {f"losses/{k}": v for k, v in losses.items()}
        if infos:
            ended = {k: torch.cat([info[k] for info in infos]).float().mean() for k in infos[0]}
            log |= {f"reward/{k[5:]}": v for k, v in ended.items() if k.startswith("term_")}
            log |= {f"charts/{k}": ended[k] for k in ("episodic_return", "denoiser_calls", "psnr_gain_over_bicubic")}
            self.bar.set_postfix_str(f"return {ended['episodic_return']:+.3f}, {ended['denoiser_calls']:.1f} calls")
        log |= {"losses/advantage_std": batch["advantages"].std(), "losses/return_std": batch["returns"].std()}
        calls = calls.round().flatten()
        for component, value in values.items():
            if value.shape[1] == 1:
                log |= {f"policy/{component}_call_{int(k):02d}": value.flatten()[calls == k].mean() for k in calls.unique()}
            else:
                log |= {f"policy/{component}_{i}": value[:, i].mean() for i in range(value.shape[1])}
            if histograms:
                self.writer.add_histogram(f"policy/{component}", value, step, bins=50)  # of equal width: TensorBoard's own are coarse near 1
        self.scalars(step, log)
        self.bar.update(step - self.bar.n)

    def evaluation(self, step: int, found: dict[str, dict]) -> None:
        """Metrics (n,) of the held-out images by the agent, the plain LDM and the best constant action."""
        for who, metrics in found.items():
            self.scalars(step, {f"eval/{k}_{who}": v.mean() for k, v in metrics.items()})
        self.bar.set_description_str(f"PSNR {float((found['agent']['psnr'] - found['plain']['psnr']).mean()):+.2f} dB")

    @torch.inference_mode()
    def images(self, step: int, name: str, hr: torch.Tensor, lr: torch.Tensor, z: torch.Tensor, mdp, policy, components: dict) -> None:
        """One image: LR | plain LDM | agent | HR, and the agent's maps at its last call, mean over channels, in a fixed colour
        scale that reads in grey and stands in the tag."""
        from matplotlib import colormaps

        plain = mdp.super_resolve(lr, z, mdp.plain)[0]
        *_, (_, s, action, last, _) = mdp.steps(lr, z, policy)
        row = torch.cat([torch.nn.functional.interpolate(lr, scale_factor=4), plain, mdp.finish(last, lr, action), hr], dim=3)
        self.writer.add_image(f"LR_plain_agent_HR/{name}", row[0], step)
        for component, m in zip(("blend", "sharpen"), mdp.maps(s, action)):
            low, high = components[component][1:3]
            scaled = ((m[0].mean(0) - low) / (high - low)).clamp(0, 1).repeat_interleave(4, 0).repeat_interleave(4, 1)
            tag = f"{component}_map_dark_{low:g}_to_light_{high:g}/{name}"
            self.writer.add_image(tag, colormaps["cividis"](scaled.cpu().numpy())[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        self.bar.close(), self.writer.close()


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


def show_map(ax, maps: torch.Tensor, scale: tuple) -> None:
    """A map (1, 1, h, w) in the colours of a fixed scale (low, high, unit)."""
    ax.imshow(array(maps)[..., 0], cmap="cividis", vmin=scale[0], vmax=scale[1], interpolation="nearest")


def action_maps(path: Path, examples: list[dict], scales: dict, title: str) -> None:
    """Per example the agent's image and its maps at the last call, one fixed colour scale a map.

    examples: {"scene": name, "image": (1, 3, H, W), "steps": [{"maps": {name: (1, 1, h, w)}}]}; scales: {name: (low, high, unit)}
    """
    plt, fig, axes = axes_grid(len(examples), 1 + len(scales), 2.3 * (1 + len(scales)), 2.2)
    for line, example in zip(axes, examples):
        line[0].imshow(array(example["image"]), interpolation="nearest")
        line[0].set_ylabel(example["scene"].replace("_", " "), fontsize=9)
        for ax, name in zip(line[1:], scales):
            show_map(ax, example["steps"][-1]["maps"][name], scales[name])
    for column, (name, scale) in zip(axes.T[1:], scales.items()):
        fig.colorbar(column[-1].images[0], ax=column, location="bottom", shrink=0.8, aspect=15, pad=0.01, label=f"{name} ({scale[2]})")
    for ax, label in zip(axes[0], ["LDM with RL", *(f"{name}, last call" for name in scales)]):
        ax.set_title(label, fontsize=9)
    fig.suptitle(title, fontsize=9)
    fig.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})
    plt.close(fig)


def steps(path: Path, example: dict, scales: dict, title: str) -> None:
    """One image from call to call: the clean latent that the LDM predicts, where it strays, what the agent does; at the end
    SR, HR and the blend of the last step.

    example: {"image": SR and "hr": HR, (1, 3, H, W), "steps": [{"t", "x0": (1, 3, H, W), "maps", "values"}]}; scales: see action_maps
    """
    calls = example["steps"]
    plt, fig, axes = axes_grid(3, len(calls) + 1, 1.9 * (len(calls) + 1), 2.1)
    for k, (column, call) in enumerate(zip(axes.T, calls), 1):
        column[0].imshow(array(call["x0"]), interpolation="nearest")
        column[0].set_title(f"call {k}, t = {call['t']}", fontsize=9)
        show_map(column[1], call["maps"]["deviation"], scales["deviation"])
        show_map(column[2], call["maps"]["sharpen"], scales["sharpen"])
        chosen = call["values"]
        ends = [f"consistency {chosen['consistency']:.2f}"] if k == len(calls) else [f"noise x {chosen['noise']:.2f}, stride x {chosen['stride']:.1f}"]
        column[2].set_xlabel("\n".join([f"sharpen {chosen['sharpen']:+.2f} {chosen['sharpen_slope']:+.2f} dev.", *ends]), fontsize=7)
    for ax, label in zip(axes[:, 0], ("clean latent x0,\ndecoded", "deviation of x0 from\nthe posterior mean", "sharpening map")):
        ax.set_ylabel(label, fontsize=8)
    last = axes[:, -1]
    last[0].imshow(array(example["image"]), interpolation="nearest"), last[0].set_title("SR", fontsize=9)
    last[1].imshow(array(example["hr"]), interpolation="nearest"), last[1].set_title("HR", fontsize=9)
    show_map(last[2], calls[-1]["maps"]["blend"], scales["blend"])
    last[2].set_title("blend map, last call", fontsize=9)
    last[2].set_xlabel(f"blend {calls[-1]['values']['blend']:.2f} {calls[-1]['values']['blend_slope']:+.2f} dev.", fontsize=7)
    for ax in (axes[1, -2], axes[2, -2], last[2]):
        fig.colorbar(ax.images[0], ax=ax, location="right", shrink=0.8, aspect=12, pad=0.02).ax.tick_params(labelsize=6)
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
