"""The pictures that eval_sr.py makes: figure.png, error.png, edit.png, trust.png, plane.png, reward.png, and the images
in TensorBoard. `panels` is also for scripts that compare other methods.

Three scenes are shown: those of the largest, the median and the smallest mean gain in reward over the unsteered LDM at
the same NFE with back-projection. Of each scene it is the image of median gain. Nothing here touches pyplot, so that a
notebook keeps its own backend.
"""

import re
import sys
import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_ldm_sr as orl  # noqa: E402
from eval_sr import METHODS, bicubic  # noqa: E402

DPI = 100
INSET = 40  # HR px of a magnified part at least
MAGNIFIED = 3  # times, where the image is large enough
SEEDS = 8  # of pure noise in trust.png
BASELINE = "ldm_same_nfe_bp"
MARKERS = {"bicubic": ("s", "C0"), "ldm": ("D", "C4"), BASELINE: ("P", "0.1"), "reward_gradient": ("^", "C1")}
RULE = (
    "Scenes: those of the largest, the median and the smallest mean gain in reward over the unsteered LDM at the same "
    "NFE with back-projection (all, if there are no more than three). Images: of each scene the one of median gain."
)


def array(image: torch.Tensor) -> np.ndarray:
    """(1, c, h, w) -> (h, w, c), or (h, w) where c is 1, on the CPU."""
    return image[0].permute(1, 2, 0).float().cpu().numpy().squeeze()


def use_font_for(texts) -> None:
    """Adds an installed font for characters that matplotlib's own font lacks. Where there is none, one sentence says so
    and matplotlib's warning of each glyph is silenced. Call it within `matplotlib.rc_context()`."""
    own = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    missing = {c for text in texts for c in text if not own.get_char_index(ord(c))}
    if not missing:
        return
    for file in sorted(font_manager.findSystemFonts()):
        try:
            font = font_manager.get_font(file)
            if all(font.get_char_index(ord(c)) for c in missing):
                font_manager.fontManager.addfont(file)
                matplotlib.rcParams["font.family"] = ["DejaVu Sans", font.family_name]
                return
        except (RuntimeError, OSError):  # a bitmap font, or a damaged file
            continue
    print(f"pictures: no installed font has {''.join(sorted(missing)[:8])}, so that labels show boxes; "
          "Debian's package fonts-noto-cjk has Chinese, Japanese and Korean")  # fmt: skip
    warnings.filterwarnings("ignore", message="Glyph .* missing from")


# ---------------------------------------------------------------------------------------------- rows of images
def most_detail(hr: torch.Tensor) -> tuple[int, int, int]:
    """Top, left and side in px of the square of an image (1, 3, H, W) whose gradients are largest; its side is a third
    of the image's width, so that it is magnified 3 times at that width, and at least INSET px where the image is."""
    height, width = hr.shape[2:]
    side = min(max(INSET, width // MAGNIFIED), height, width)
    grey = hr.mean(1, keepdim=True)
    edges = F.pad(grey.diff(dim=3).abs(), (0, 1)) + F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1))
    step = max(1, side // 8)
    detail = F.avg_pool2d(edges, side, stride=step)[0, 0].cpu()
    top, left = np.unravel_index(int(detail.argmax()), detail.shape)
    return int(top) * step, int(left) * step, side


def panels(path: Path, lines: list[dict], note: str, units: dict[str, str] | None = None, width=250.0, limit=1600.0):
    """Draws rows of panels with a note below. Without maps the part with the most detail is magnified below each image.
    The maps of all rows and columns of one unit share one colour scale and one bar.

    lines: {"label", "hr": (1, 3, H, W), "panels": {column: (image (1, 3, h, w) or map (1, 1, h, w), caption)}}
    units: {column of maps: unit}; width: px of a panel, less where the picture would be higher than `limit` px.
    """
    columns, units = list(lines[0]["panels"]), units or {}
    scales = {}  # {unit: value at the top of its bar}
    for unit in dict.fromkeys(units.values()):
        values = [array(line["panels"][k][0]).ravel() for line in lines for k in columns if units.get(k) == unit]
        scales[unit] = max(float(np.quantile(np.concatenate(values), 0.995)), 1e-6)
    insets = not units
    ratios = [line["hr"].shape[2] / line["hr"].shape[3] for line in lines]  # of height to width
    gap, left, right, head = 6, 30, 8 + 72 * len(scales), 42
    below = 8 + 12.5 * max(caption.count("\n") + 1 for line in lines for _, caption in line["panels"].values())
    note = "\n".join(textwrap.wrap(note, int((left + len(columns) * (width + gap)) / 6.2)))
    foot = 14 * (note.count("\n") + 1) + 10
    fixed = head + foot + len(lines) * (below + gap)
    width = min(width, max(120, (limit - fixed) / (sum(ratios) + insets * len(lines))))
    across = left + len(columns) * (width + gap) + right
    high = fixed + width * (sum(ratios) + insets * len(lines))
    fig = Figure(figsize=(across / DPI, high / DPI), dpi=DPI)

    def axes_at(x: float, y: float, w: float, h: float):
        """Axes without ticks at px from the left and from the top."""
        return fig.add_axes((x / across, 1 - (y + h) / high, w / across, h / high), xticks=[], yticks=[])

    y, shown = head, {}
    for row, (line, ratio) in enumerate(zip(lines, ratios)):
        top, at, side = most_detail(line["hr"])
        for k, name in enumerate(columns):
            image, caption = line["panels"][name]
            x = left + k * (width + gap)
            axes = under = axes_at(x, y, width, width * ratio)
            if unit := units.get(name):
                shown[unit] = axes.imshow(array(image), cmap="cividis", vmin=0, vmax=scales[unit], aspect="auto")
            else:
                axes.imshow(array(image), aspect="auto")
            if insets:
                axes.add_patch(Rectangle((at - 0.5, top - 0.5), side, side, fill=False, color="yellow", linewidth=1.2))
                under = axes_at(x, y + width * ratio + gap / 2, width, width)
                under.imshow(array(image)[top : top + side, at : at + side], interpolation="nearest", aspect="auto")
                under.spines[:].set(color="gold", linewidth=1.2)
            under.set_xlabel(caption, fontsize=7.5, labelpad=3)
            if row == 0:
                axes.set_title("\n".join(textwrap.wrap(name, 30, break_on_hyphens=False)), fontsize=9, pad=4)
            if k == 0:
                axes.set_ylabel(line["label"].replace("_", " "), fontsize=9)
        y += width * (ratio + insets) + gap + below
    for k, (unit, image) in enumerate(shown.items()):
        bar = axes_at(across - right + 6 + 72 * k, head, 13, high - head - foot - below - gap)
        fig.colorbar(image, cax=bar, extend="max").set_label(unit, fontsize=8)
        bar.tick_params(labelsize=7)
    fig.text(left / across, 6 / high, note, fontsize=7.5, va="bottom")
    fig.savefig(path, dpi=DPI, pil_kwargs={"optimize": True})


def caption_of(rows, method: str, index: int) -> str:
    """PSNR, SSIM, LPIPS and NFE of one image in the table."""
    row = rows[(rows["method"] == method) & (rows["index"] == index)].iloc[0]
    lpips = f", LPIPS {row['lpips']:.3f}" if np.isfinite(row["lpips"]) else ""
    return f"{row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}{lpips}\n{row['nfe']:.0f} NFE"


def typical_images(rows) -> dict[str, tuple[float, int]]:
    """{scene: (mean gain in reward over the baseline, index of the image of median gain)}."""
    reward = rows.pivot(index="index", columns="method", values="reward")
    gain = (reward["agent"] - reward[BASELINE]).rename("gain")
    scenes = rows.drop_duplicates("index").set_index("index")["scene"]
    found = {}
    for scene, group in gain.groupby(scenes):
        ranked = group.sort_values(kind="stable")
        found[scene] = (float(group.mean()), int(ranked.index[len(ranked) // 2]))
    return found


def shown_scenes(typical: dict[str, tuple[float, int]]) -> list[str]:
    """The scenes of the largest, the median and the smallest mean gain; all of them where there are at most three."""
    ranked = sorted(typical, key=lambda scene: -typical[scene][0])
    return ranked if len(ranked) <= 3 else [ranked[0], ranked[len(ranked) // 2], ranked[-1]]


@torch.inference_mode()
def super_resolve(env: orl.DenoisingEnv, agent: orl.Agent, load, index: int) -> dict:
    """One image: "lr" (1, 3, h, w), "hr", "bicubic", "unsteered" and "agent" (1, 3, 4h, 4w) in [0, 1], "z_T" and the
    agent's "steps". The unsteered LDM has as many NFE as the agent, and back-projection."""
    hr, lr, z_T = load(index)
    sr, nfe, steps = env.super_resolve(lr, z_T, agent)
    stock = orl.DenoisingEnv(env.ldm, int(nfe), int(nfe), env.sensor)
    found = {"hr": hr, "lr": lr, "z_T": z_T, "bicubic": bicubic(lr), "agent": sr, "steps": steps}
    return found | {"unsteered": stock.super_resolve(lr, z_T)[0]}


def comparison(path: Path, chosen: list[tuple[str, int, dict]], rows, title: str) -> None:
    """figure.png. chosen: scene, index and `super_resolve` of each image."""
    lines = []
    for scene, index, one in chosen:
        shown = {"LR": (F.interpolate(one["lr"], scale_factor=4), f"{one['lr'].shape[3]} x {one['lr'].shape[2]} px\n")}
        shown["bicubic"] = (one["bicubic"], caption_of(rows, "bicubic", index))
        shown["unsteered, same NFE, back-projection"] = (one["unsteered"], caption_of(rows, BASELINE, index))
        shown["with RL"] = (one["agent"], caption_of(rows, "agent", index))
        shown["HR"] = (one["hr"], f"{one['hr'].shape[3]} x {one['hr'].shape[2]} px\n")
        lines.append({"label": scene, "hr": one["hr"], "panels": shown})
    side, width = most_detail(lines[0]["hr"])[2], lines[0]["hr"].shape[3]
    panels(path, lines, f"{title}. {RULE} Boxes: the {side} px of the HR image with the largest gradients, magnified "
                        f"{width / side:.1f} times below it.")  # fmt: skip


def error_maps(path: Path, chosen, rows, title: str) -> None:
    """error.png: |SR - HR| of three methods beside the HR image."""
    lines, unit = [], "|SR - HR|, grey levels of 255"
    methods = {"bicubic": ("bicubic", "bicubic"), "unsteered, same NFE, back-projection": ("unsteered", BASELINE)}
    methods["with RL"] = ("agent", "agent")
    for scene, index, one in chosen:
        shown = {"HR": (one["hr"], "")}
        for name, (key, method) in methods.items():
            error = 255 * (one[key] - one["hr"]).abs().mean(1, keepdim=True)
            shown[f"|SR - HR|: {name}"] = (error, caption_of(rows, method, index))
        lines.append({"label": scene, "hr": one["hr"], "panels": shown})
    note = f"{title}. {RULE} Maps: the mean over red, green and blue of |SR - HR|."
    panels(path, lines, note, {f"|SR - HR|: {name}": unit for name in methods})


def edit_maps(path: Path, agent: orl.Agent, chosen, title: str) -> None:
    """edit.png: how much the agent changes each cell of the clean latent at its first and its last NFE."""
    lines, unit = [], "edit, standard deviations of the latent"
    for scene, _, one in chosen:
        shown = {"with RL": (one["agent"], ""), "HR": (one["hr"], "")}
        for which, step in (("first", one["steps"][0]), ("last", one["steps"][-1])):
            edit = (step.edits / agent.latent_std).square().mean(1, keepdim=True).sqrt()
            shown[f"edit at the {which} NFE"] = (edit, f"timestep {int(step.t)}, mean {float(edit.mean()):.2f}")
        lines.append({"label": scene, "hr": one["hr"], "panels": shown})
    # The frame follows the border where the editor's input is cut, and most of it goes with mirrored padding.
    note = (f"{title}. {RULE} An edit is what the agent adds to the clean latent that the U-Net predicts. Maps: root "
            "mean square over the latent's channels of each cell, which is 4 x 4 px of the image. A frame of two cells "
            "at the border comes from the zero padding of the editor's convolutions.")  # fmt: skip
    panels(path, lines, note, {"edit at the first NFE": unit, "edit at the last NFE": unit})


@torch.inference_mode()
def trust_maps(path: Path, env: orl.DenoisingEnv, agent: orl.Agent, chosen, seed: int, title: str) -> None:
    """trust.png: the standard deviation of SR over SEEDS draws of the pure noise beside the error, and their rank
    correlation over the pixels (Spearman): where other noise gives another picture, the picture is invented."""
    from torchmetrics.functional import spearman_corrcoef

    lines = []
    columns = {f"standard deviation over {SEEDS} seeds": "standard deviation, grey levels of 255"}
    columns["|SR - HR|"] = "|SR - HR|, grey levels of 255"
    for scene, index, one in chosen:
        draws = [one["agent"]]
        for k in range(1, SEEDS):
            z_T = orl.noise_for([index], one["z_T"].shape[1:], seed + k, one["lr"].device)
            draws.append(env.super_resolve(one["lr"], z_T, agent)[0])
        deviation = 255 * torch.cat(draws).std(0, correction=0).mean(0)[None, None]  # (1, 1, H, W)
        error = 255 * (one["agent"] - one["hr"]).abs().mean(1, keepdim=True)
        pairs = [(deviation, error), (F.avg_pool2d(deviation, 8), F.avg_pool2d(error, 8))]
        fine, coarse = (float(spearman_corrcoef(*(m.flatten().cpu() for m in pair))) for pair in pairs)
        captions = [f"mean {float(deviation.mean()):.1f}"]
        captions.append(f"rank correlation {fine:.2f}; of means of 8 px {coarse:.2f}")
        shown = {"with RL": (one["agent"], ""), "HR": (one["hr"], "")}
        shown |= dict(zip(columns, zip((deviation, error), captions)))
        lines.append({"label": scene, "hr": one["hr"], "panels": shown})
    note = (f"{title}. {RULE} Where the standard deviation over {SEEDS} draws of the pure noise is large, the picture "
            "is invented: do not trust it there. Where it is small, the picture may still be wrong, in the same way "
            "each time. The rank correlation is Spearman's, between the pixels of both maps.")  # fmt: skip
    panels(path, lines, note, columns)


# ---------------------------------------------------------------------------------------------- plots
def place_labels(fig: Figure, axes, labels: list[tuple], obstacles: list) -> None:
    """Writes a label beside each point (x, y, text, color) where it covers no other label and as little else as can be;
    a line leads to the point where the label has to stand away from it."""
    renderer = fig.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    taken = []
    for x, y, text, color in labels:
        places = []
        for distance in (8, 16, 26, 38, 55):
            for angle in range(0, 360, 30):
                dx, dy = distance * np.cos(np.radians(angle)), distance * np.sin(np.radians(angle))
                side = "left" if dx > 1 else "right" if dx < -1 else "center"
                style = {"textcoords": "offset points", "ha": side, "va": "center", "fontsize": 8, "color": color}
                note = axes.annotate(text, (x, y), (dx, dy), **style)
                box = note.get_window_extent(renderer).padded(2)
                note.remove()
                outside = not (frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1)
                covered = 100 * (outside + box.count_overlaps(taken)) + box.count_overlaps(obstacles)
                places.append((covered, distance, angle, (dx, dy), box, style))
        _, distance, _, at, box, style = min(places, key=lambda place: place[:3])
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if distance > 16 else None
        axes.annotate(text, (x, y), at, arrowprops=line, **style)
        taken.append(box)


def plane(path: Path, rows, names: dict[str, str], title: str) -> None:
    """plane.png: PSNR against LPIPS, and against DISTS where it was measured, of all images. Both lines have
    back-projection: the unsteered LDM by its NFE, and the agents by their reward weights."""
    keys = [key for key in ("lpips", "dists") if rows[key].notna().any()]
    tables = {key: rows.pivot(index="index", columns="method", values=key) for key in ("psnr", *keys)}
    sweep = sorted((m for m in tables["psnr"] if m.startswith("sweep_")), key=lambda m: int(m[6:]))
    agents = sorted(["agent", *(m for m in names if m not in METHODS)], key=lambda m: tables["psnr"][m].mean())
    fig = Figure(figsize=(7.5 * len(keys), 5.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(fig)

    def at(method: str, key: str) -> tuple[float, float]:
        """The mean, and half its 95% interval, paired with the agent."""
        apart = (tables[key][method] - tables[key]["agent"]).dropna()
        return tables[key][method].mean(), 1.96 * apart.std() / len(apart) ** 0.5 if len(apart) > 1 else 0.0

    todo = []
    for axes, key in zip(fig.subplots(1, len(keys), squeeze=False)[0], keys):
        labels, bars = [], []
        groups = [(sweep, "o", "0.45", 5, "-", "unsteered LDM with back-projection, by NFE")]
        groups += [(agents, "*", "C3", 12, "-", "LDM with RL" + ", by reward weights" * (len(agents) > 1))]
        groups += [([m], *MARKERS[m], 7, "none", names[m]) for m in MARKERS if m in names]
        for methods, marker, color, size, linestyle, label in groups:
            x, dx = np.array([at(m, "psnr") for m in methods]).T
            y, dy = np.array([at(m, key) for m in methods]).T
            style = {"marker": marker, "color": color, "markersize": size, "linestyle": linestyle, "linewidth": 1.2}
            axes.errorbar(x, y, yerr=dy, xerr=dx, elinewidth=0.7, capsize=2, label=label, **style)
            bars += [(a, b, e, f) for a, b, e, f in zip(x, y, dx, dy)]
            if linestyle == "-":
                texts = [f"{m[6:]} NFE" if m in sweep else "with RL" if m == "agent" else m for m in methods]
                labels += zip(x, y, texts, [color] * len(x))
        axes.invert_yaxis()
        axes.margins(0.12)
        axes.set_xlabel("PSNR (dB)")
        axes.set_ylabel(f"{key.upper()} (lower is better; the axis points down)")
        axes.grid(alpha=0.3)
        arrow = {"arrowstyle": "-|>", "linewidth": 2, "color": "C2"}
        better = axes.annotate("better", (0.99, 0.985), (0.9, 0.93), xycoords="axes fraction", fontsize=10, ha="right",
                               va="top", arrowprops=arrow, color="C2")  # fmt: skip
        todo.append((axes, labels, bars, better))
    fig.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2 * len(keys))
    note = (f"{title}. Means of all {len(tables['psnr'])} images. Bars: 95% intervals of the difference to the LDM "
            "with RL, paired by image, so that the spread between scenes is left out.")  # fmt: skip
    fig.supxlabel("\n".join(textwrap.wrap(note, 110 * len(keys))), fontsize=7.5)
    fig.draw_without_rendering()  # the layout is settled before labels are placed
    for axes, labels, bars, better in todo:
        boxes = [better.get_window_extent()]
        for x, y, dx, dy in bars:  # each bar as a thin box, each point as a square
            (x0, y0), (x1, y1), (px, py) = axes.transData.transform([(x - dx, y - dy), (x + dx, y + dy), (x, y)])
            boxes += [Bbox([(x0, py - 1), (x1, py + 1)]), Bbox([(px - 1, min(y0, y1)), (px + 1, max(y0, y1))])]
            boxes += [Bbox([(px - 6, py - 6), (px + 6, py + 6)])] * 3  # worse to cover than a bar
        place_labels(fig, axes, labels, boxes)
    fig.savefig(path, dpi=140)


def scalars(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{tag: (steps, values)} of the TensorBoard events in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {k: (np.array([p.step for p in v]), np.array([p.value for p in v])) for k, v in points.items()}


def smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a twentieth of the points."""
    width = len(values) // 20 + 1
    return steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), "valid")


def band(axes, curves: list[tuple[np.ndarray, np.ndarray]], label: str, **style) -> None:
    """One curve, or the mean and the range of several over the steps that they have in common."""
    if len(curves) == 1:
        axes.plot(*curves[0], label=label, **style)
        return
    low, high = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    at = np.linspace(low, high, 100)
    values = np.stack([np.interp(at, *curve) for curve in curves])
    axes.plot(at, values.mean(0), label=f"{label}: mean and range of {len(curves)} seeds", **style)
    axes.fill_between(at, values.min(0), values.max(0), alpha=0.25, linewidth=0, color=style["color"])


def reward_curve(path: Path, run: Path, names: dict[str, str]) -> bool:
    """reward.png (paper: Fig. 3): the training reward and, in a panel of its own, the held-out reward. Where the run
    has folders seed_*, the curves are theirs, as a band; a folder reward_gradient is one more held-out curve."""
    folders = sorted(folder for folder in run.glob("seed_*") if any(folder.glob("events.*"))) or [run]
    found = [scalars(folder) for folder in folders if any(folder.glob("events.*"))]
    found = [tags for tags in found if "charts/episodic_return" in tags]
    if not found:
        return False
    fig = Figure(figsize=(11, 4.2), dpi=DPI, layout="constrained")
    left, right = fig.subplots(1, 2)
    band(left, [smooth(*tags["charts/episodic_return"]) for tags in found], "sampled policy", color="C3")
    left.set_title("Training images, running mean", fontsize=10)
    labels = names | {"unsteered": "unsteered LDM with back-projection"}
    for tag in sorted({tag for tags in found for tag in tags if re.fullmatch(r"eval/reward_\w+", tag)}):
        method = tag.removeprefix("eval/reward_")
        curves = [tags[tag] for tags in found if tag in tags]
        style = {"color": "C3", "linestyle": "-"} if method == "agent" else {"color": "0.2", "linestyle": "--"}
        band(right, curves, labels.get(method, method.replace("_", " ")), **style)
    if any((run / "reward_gradient").glob("events.*")):
        rival = scalars(run / "reward_gradient").get("eval/reward_agent")
        if rival:
            right.plot(*rival, color="C1", label="the reward's own gradient, no RL")
    right.set_title("Held-out images, mean policy", fontsize=10)
    for axes in (left, right):
        axes.set(xlabel="environment steps (NFE of the training)", ylabel="reward of an image")
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=7)
    right.legend(frameon=False, fontsize=7, loc="center right")  # between the baseline and where a curve ends
    fig.savefig(path, dpi=DPI * 1.4)
    return True


# ---------------------------------------------------------------------------------------------- all of them
def tensorboard_images(folder: Path, scene: str, one: dict, writer, step: int) -> None:
    """Tiles of at least 256 px of one image, in TensorBoard's order of names."""
    tiles = {"1_lr": F.interpolate(one["lr"], scale_factor=4), "2_bicubic": one["bicubic"]}
    tiles |= {"3_unsteered": one["unsteered"], "4_with_rl": one["agent"], "5_hr": one["hr"]}
    factor = -(-256 // min(one["hr"].shape[2:]))
    for name, image in tiles.items():
        writer.add_image(f"{scene}/{name}", F.interpolate(image, scale_factor=factor)[0].clamp(0, 1), step)


def draw(folder: Path, run: Path, env, agent, rows, names: dict, load, seed: int, title: str, step: int) -> list[str]:
    """Makes all pictures -> their file names.

    rows: what `eval_sr.measure` gives; names: {method: label}; load: index -> HR, LR, z_T of the image, batches of one;
    seed: that of z_T; step: of the run, for TensorBoard.
    """
    from torch.utils.tensorboard import SummaryWriter

    typical = typical_images(rows)
    with matplotlib.rc_context(), warnings.catch_warnings():
        use_font_for([*typical, title, *names.values()])
        for old in folder.glob("events.*.pictures"):
            old.unlink()
        one = {scene: super_resolve(env, agent, load, index) for scene, (_, index) in typical.items()}
        with SummaryWriter(folder, filename_suffix=".pictures") as writer:
            for scene in typical:
                tensorboard_images(folder, scene, one[scene], writer, step)
            means = rows.groupby("method")[["psnr", "ssim", "lpips"]].mean()
            for method in ("agent", "ldm", "ldm_same_nfe_bp"):
                for figure, mean in means.loc[method].items():
                    writer.add_scalar(f"table/{figure}_{method}", mean, step)
        chosen = [(scene, typical[scene][1], one[scene]) for scene in shown_scenes(typical)]
        comparison(folder / "figure.png", chosen, rows, title)
        error_maps(folder / "error.png", chosen, rows, title)
        edit_maps(folder / "edit.png", agent, chosen, title)
        trust_maps(folder / "trust.png", env, agent, chosen, seed, title)
        made = ["figure.png", "error.png", "edit.png", "trust.png"]
        if rows["lpips"].notna().any() or rows["dists"].notna().any():
            plane(folder / "plane.png", rows, names, title)
            made.append("plane.png")
        made += ["reward.png"] * reward_curve(folder / "reward.png", run, names)
    return made
