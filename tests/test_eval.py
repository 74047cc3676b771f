"""eval_sr.py and the pictures of tools/figures.py, on a tiny LDM and an agent that has not been trained."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import figures
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, refused
from PIL import Image

import eval_sr
import ppo_ldm_sr as orl

METHODS = {"bicubic", "ldm", "ldm_same_nfe", "ldm_same_nfe_bp", "agent", "autoencoder"}
CPU = torch.device("cpu")


def make_run(folder, ldm_folder, title, dataset="runs/scenes", **settings):
    """A run folder whose agent does something, though nothing that it has learned."""
    torch.manual_seed(0)
    ldm = orl.load_ldm(str(ldm_folder), CPU)
    agent = orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels)
    with torch.no_grad():
        agent.editor[-1].weight.normal_(std=0.05)
    folder.mkdir(parents=True)
    args = asdict(orl.Args(ldm=str(ldm_folder), dataset=str(dataset), **settings))
    saved = {"args": args, "agent": agent.state_dict(), "ldm": ldm.fingerprint, "title": title}
    orl.save_run(folder / "agent.pt", saved | {"step": 7, "iteration": 1})
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, ldm_folder, image_folder):
    return make_run(tmp_path_factory.mktemp("runs") / "run", ldm_folder, image_folder.name, image_folder)


@pytest.fixture(scope="session")
def noisy(tmp_path_factory, run_folder, image_folder):
    """All of it on a noisy sensor -> Args, folder of the table, folder of the images, rows of table.csv."""
    root = tmp_path_factory.mktemp("noisy")
    other = shutil.copytree(run_folder, root / "sharper")
    args = eval_sr.Args(str(run_folder), dataset=str(image_folder), mtf=0.29, lr_noise=8.0, batch_size=3)
    args = replace(args, pareto=(str(other),), output=str(root / "table"), save_images=str(root / "images"))
    eval_sr.main(args)
    return args, root / "table", root / "images", read(root / "table")


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(eval_sr, "SWEEP", (100,))  # which a picture needs
    monkeypatch.setattr(eval_sr, "pictures", lambda *_: [])


def read(folder):
    with open(folder / "table.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean(rows, method, key, scene=None):
    return np.mean([float(r[key]) for r in rows if r["method"] == method and scene in (None, r["scene"])])


def table_below(text, heading):
    """The table below a heading of table.md -> {first cell: {column: cell}}."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if "|" in line]
    header, _, *lines = [[cell.strip() for cell in line] for line in lines]
    assert len(header) <= 7
    return {line[0]: dict(zip(header, line)) for line in lines}


def pixels(file):
    return np.asarray(Image.open(file)).astype(float) / 255


# ---------------------------------------------------------------------------------------------- tables
def test_the_csv_has_its_columns_and_a_row_for_each_image_and_method(noisy):
    rows = noisy[3]
    columns = "scene image method psnr ssim lpips vif dists lpips_vgg grid lr_psnr nfe seconds".split()
    assert list(rows[0])[: len(columns)] == columns
    assert {r["method"] for r in rows} == METHODS | {"sharper"}
    assert len(rows) == 7 * 4 and len({(r["scene"], r["image"], r["method"]) for r in rows}) == 7 * 4
    assert all(r["nfe"] == "100" for r in rows if r["method"] == "ldm")
    spent = {(r["scene"], r["image"]): r["nfe"] for r in rows if r["method"] == "agent"}
    for r in rows:
        if r["method"].startswith("ldm_same_nfe"):
            assert r["nfe"] == spent[r["scene"], r["image"]]
    assert all(not r["dists"] and not r["lpips_vgg"] for r in rows)  # which are asked for by --held-out-metrics


def test_each_scene_and_each_table_has_both_baselines(noisy):
    _, folder, _, rows = noisy
    text = (folder / "table.md").read_text("utf-8")
    scenes = table_below(text, "Scene by scene")
    assert list(scenes) == ["desert", "river", "**all**"]
    for scene, line in scenes.items():
        own = None if scene == "**all**" else scene
        assert line["images"] == ("2" if own else "4")
        for method, name in {"ldm": "unsteered, 100 NFE", "ldm_same_nfe_bp": "unsteered, same NFE, back-projection",
                             "agent": "with RL"}.items():  # fmt: skip
            psnr, ssim, _ = line[name].split(" / ")
            assert float(psnr) == pytest.approx(mean(rows, method, "psnr", own), abs=0.006)
            assert float(ssim) == pytest.approx(mean(rows, method, "ssim", own), abs=0.0006)
        three = [mean(rows, method, "lr_psnr", own) for method in ("ldm", "ldm_same_nfe_bp", "agent")]
        assert [float(cell) for cell in line["LR PSNR (dB)"].split(" / ")] == pytest.approx(three, abs=0.06)
        assert line["NFE"].startswith("100.0 / ")
    for heading in ("Every method", "Cost, reward and artefacts", "What the agent gains"):
        heading += ", all images"
        assert {eval_sr.METHODS["ldm"], eval_sr.METHODS["ldm_same_nfe_bp"]} <= set(table_below(text, heading))
    assert "LDM with RL, sharper (0.4 0.3 0.2 0.1)" in table_below(text, "Every method, all images")
    gain = table_below(text, "What the agent gains, all images")[eval_sr.METHODS["ldm"]]["PSNR (dB)"]
    assert float(gain.split()[0]) == pytest.approx(mean(rows, "agent", "psnr") - mean(rows, "ldm", "psnr"), abs=1e-3)


def test_a_black_image_costs_its_own_figure_and_not_the_column(tmp_path, run_folder, image_folder, no_pictures):
    folder = shutil.copytree(image_folder, tmp_path / "data")
    Image.new("RGB", (64, 64)).save(folder / "test/river/zz_black.png")
    eval_sr.main(eval_sr.Args(str(run_folder), dataset=str(folder), output=str(tmp_path / "out")))
    empty = [r["image"] for r in read(tmp_path / "out") if not r["vif"]]
    assert len(empty) == 6 and set(empty) == {"zz_black.png"}
    text = (tmp_path / "out/table.md").read_text("utf-8")
    for line in table_below(text, "Every method, all images").values():
        assert re.fullmatch(r"-?\d+\.\d+ \(of 4\)", line["VIF"]) and "(of" not in line["PSNR (dB)"] + line["SSIM"]


def test_the_mean_names_the_number_of_images_only_where_some_are_left_out():
    assert eval_sr.mean(np.array([1.0, 2.0]), 1) == "1.5"
    assert eval_sr.mean(np.array([1.0, np.nan, np.inf]), 1) == "1.0 (of 1)"
    assert eval_sr.mean(np.array([np.nan]), 1) == "n/a"


# ---------------------------------------------------------------------------------------------- sensor
def test_lr_psnr_is_against_the_lr_image_that_the_models_saw_on_the_sensor_that_was_asked_for(noisy):
    args, folder, images, rows = noisy
    sensor = orl.Sensor(0.29, 8.0)
    noise, shown = [], []
    for r in rows:
        name = f"{r['scene']}/{Path(r['image']).stem}.png"
        if r["method"] == "agent":
            found = (torch.tensor(pixels(images / k / name)) for k in ("agent", "lr", "hr"))
            sr, lr, hr = (image.permute(2, 0, 1)[None].float() for image in found)
            error = (sensor.downscale(sr).clamp(0, 1) - lr).square().mean()
            shown.append((float(-10 * error.log10()), float(r["lr_psnr"])))
            noise.append(float((255 * (lr - sensor.downscale(hr).clamp(0, 1))).std()))
    assert len(shown) == 4 and all(a == pytest.approx(b, abs=0.3) for a, b in shown)
    assert np.mean(noise) == pytest.approx(8, rel=0.15)
    assert '"sensor": "MTF 0.29 noise 8"' in (folder / "table.md").read_text("utf-8")


def test_without_flags_the_sensor_is_the_agents_own_and_bicubic_and_zero_noise_can_be_asked_for(
    tmp_path, ldm_folder, image_folder, no_pictures
):
    run = make_run(tmp_path / "run", ldm_folder, image_folder.name, image_folder, mtf=0.2, lr_noise=3.0)
    args = eval_sr.Args(str(run), scenes=("river",), limit=1)
    eval_sr.main(args)
    assert '"sensor": "MTF 0.2 noise 3"' in (run / "table.md").read_text("utf-8")
    flags = ["--agent", str(run), "--scenes", "river", "--limit", "1", "--mtf", "bicubic", "--lr-noise", "0"]
    eval_sr.main(tyro.cli(eval_sr.Args, args=flags))
    other = tmp_path / f"run_on_{image_folder.name}_bicubic"
    assert '"sensor": "bicubic"' in (other / "table.md").read_text("utf-8")
    assert '"sensor": "MTF 0.2 noise 3"' in (run / "table.md").read_text("utf-8")  # which is still there
    assert mean(read(other), "bicubic", "psnr") != mean(read(run), "bicubic", "psnr")


def test_settings_that_cannot_be_are_refused_in_one_sentence(tmp_path, run_folder, capsys):
    never = tmp_path / "never"
    bad = {"--batch-size": 0, "--limit": -1, "--seed": -1, "--crop": 8, "--mtf": 0.95, "--lr-noise": -1}
    for flag, value in bad.items():
        assert flag in refused(capsys, eval_sr, "--agent", run_folder, "--output", never, flag, value)
    same = shutil.copytree(run_folder, tmp_path / "agent")
    assert "rename the folder" in refused(capsys, eval_sr, "--agent", run_folder, "--output", never, "--pareto", same)
    assert not never.exists()


# ---------------------------------------------------------------------------------------------- files
def test_every_method_and_lr_and_hr_are_saved_as_the_models_saw_and_made_them(noisy):
    args, _, images, rows = noisy
    folders = {path.name for path in images.iterdir() if path.is_dir()}
    assert folders == METHODS | {"sharper", "lr", "hr"}
    names = {f"{r['scene']}/{Path(r['image']).stem}.png" for r in rows}
    for method in folders:
        assert {str(path.relative_to(images / method)) for path in (images / method).rglob("*.png")} == names
    for r in rows:
        name = f"{r['scene']}/{Path(r['image']).stem}.png"
        sr, hr = pixels(images / r["method"] / name), pixels(images / "hr" / name)
        assert sr.shape == hr.shape == (64, 64, 3) and pixels(images / "lr" / name).shape == (16, 16, 3)
        assert -10 * np.log10(np.mean((sr - hr) ** 2)) == pytest.approx(float(r["psnr"]), abs=0.1)
    original = pixels(Path(args.dataset) / "test/river/0.png")
    assert np.array_equal(pixels(images / "hr/river/0.png"), original)
    assert read(images) == rows  # for tools/compare_page.py


def test_two_images_of_a_scene_never_share_a_file():
    files = ["a.jpg", "a.png", "b.jpg", "c.png", "c.png", "a.jpg"]
    images = orl.Images("t", ["river", "desert"], [0, 0, 0, 0, 0, 1], files, [])
    names = eval_sr.file_names(images)
    assert names[:3] == ["river/a.jpg.png", "river/a.png.png", "river/b.png"] and names[5] == "desert/a.png"
    assert len(set(names)) == 6


def test_a_second_table_under_other_settings_does_not_replace_the_first(
    tmp_path, run_folder, image_folder, no_pictures, capsys
):
    run = shutil.copytree(run_folder, tmp_path / "run")
    args = eval_sr.Args(str(run), dataset=str(image_folder), scenes=("river",))
    eval_sr.main(args)
    first = (run / "table.csv").read_bytes()
    eval_sr.main(replace(args, crop=48, limit=1))
    other = tmp_path / f"run_on_{image_folder.name}_crop48_limit1"
    assert (run / "table.csv").read_bytes() == first and len(read(other)) == 6
    eval_sr.main(replace(args, seed=1))
    assert (tmp_path / f"run_on_{image_folder.name}_seed1/table.csv").is_file()
    assert (run / "table.csv").read_bytes() == first
    shutil.copytree(image_folder / "train", tmp_path / image_folder.name / "test")  # others, in a folder of this name
    eval_sr.main(replace(args, dataset=str(tmp_path / image_folder.name)))
    assert (run / "table.csv").read_bytes() == first
    capsys.readouterr()
    eval_sr.main(replace(args, limit=1, output=str(run)))  # the user's own wish is fulfilled, and it is said
    assert "replaced" in capsys.readouterr().out and (run / "table.csv").read_bytes() != first


def test_a_folder_that_cannot_be_written_is_found_out_before_measuring(
    tmp_path, run_folder, image_folder, capsys, monkeypatch
):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(eval_sr, "measure", lambda *_: pytest.fail("it measures"))
    flags = ["--agent", run_folder, "--dataset", image_folder, "--output", tmp_path / "file/out"]
    printed = refused(capsys, eval_sr, *flags)
    assert "cannot be written" in printed and "--output" in printed
    flags = ["--agent", run_folder, "--dataset", image_folder, "--save-images", tmp_path / "file/out"]
    assert "with --save-images" in refused(capsys, eval_sr, *flags, "--output", tmp_path / "out")


def test_images_that_are_gone_are_replaced_by_those_that_ship_and_it_is_said(tmp_path, ldm_folder, no_pictures, capsys):
    run = make_run(tmp_path / "run", ldm_folder, "photos", dataset=tmp_path / "gone")
    eval_sr.main(eval_sr.Args(str(run), scenes=("river",), limit=1, crop=64))
    assert "photos" in (printed := capsys.readouterr().out) and "these are the scenes that ship" in printed
    assert not (run / "table.csv").exists() and list(tmp_path.glob("run_on_*/table.csv"))


# ---------------------------------------------------------------------------------------------- where it runs
def test_a_log_file_has_no_carriage_returns_and_the_file_alone_says_what_it_lacks(tmp_path, run_folder, image_folder):
    """Also: without tools/ beside it the table is made, and one line says why there are no pictures."""
    for name in ("eval_sr.py", "ppo_ldm_sr.py"):
        shutil.copy(ROOT / name, tmp_path)
    flags = ["--agent", run_folder, "--dataset", image_folder, "--limit", "1", "--output", tmp_path / "out"]
    with open(tmp_path / "log.txt", "wb") as log:
        command = [sys.executable, "eval_sr.py", *map(str, flags)]
        code = subprocess.run(command, cwd=tmp_path, stdout=log, stderr=log, timeout=280).returncode
    text = (tmp_path / "log.txt").read_bytes()
    assert code == 0, text.decode()
    assert b"\r" not in text and text.count(b"pictures: none are made") == 1 and b"LDM with RL" in text
    assert (tmp_path / "out/table.md").is_file()


class NotebookStream(io.TextIOBase):
    """What ipykernel puts in place of sys.stdout has no `reconfigure`."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_a_notebook_and_a_console_of_few_characters_get_the_table(
    tmp_path, run_folder, image_folder, no_pictures, monkeypatch
):
    args = eval_sr.Args(str(run_folder), dataset=str(image_folder), scenes=("river",), limit=1)
    args = replace(args, output=str(tmp_path / "\u6c34"))
    notebook, console = NotebookStream(), io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", notebook)
    eval_sr.main(args)
    assert "| river | 1 |" in notebook.text and "\u6c34" in notebook.text
    monkeypatch.setattr(sys, "stdout", console)
    eval_sr.main(args)
    console.flush()
    assert b"| river | 1 |" in console.buffer.getvalue()


# ---------------------------------------------------------------------------------------------- pictures
def test_all_pictures_are_made_and_tensorboards_tiles_are_large_enough(noisy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = noisy[1]
    sizes = {name: Image.open(folder / f"{name}.png").size for name in ("figure", "error", "edit", "trust")}
    assert all(width > 600 and 300 < height <= 1600 for width, height in sizes.values()), sizes
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    tiles = ("1_lr", "2_bicubic", "3_unsteered", "4_with_rl", "5_hr")
    names = {f"{scene}/{tile}" for scene in ("desert", "river") for tile in tiles}
    assert set(events.Tags()["images"]) == names
    for name in names:
        image = events.Images(name)[0]
        assert min(image.width, image.height) >= 256 and image.step == 7


def test_the_magnified_part_has_at_least_40_px_and_most_detail():
    hr = torch.zeros(1, 3, 160, 128)
    hr[..., 70:100, 80:120] = torch.rand(30, 40)
    top, left, side = figures.most_detail(hr)
    assert side == 42 and top <= 72 and top + side >= 98 and left <= 82 and left + side >= 118
    assert figures.most_detail(torch.rand(1, 3, 64, 64))[2] == 40
    assert figures.most_detail(torch.rand(1, 3, 32, 64))[2] == 32
    assert figures.most_detail(torch.rand(1, 3, 256, 256))[2] == 85  # a third, so that it is magnified three times


def test_the_scenes_that_are_shown_are_those_of_the_largest_the_median_and_the_smallest_gain():
    typical = {name: (gain, 0) for name, gain in zip("abcde", (0.1, 0.5, -0.2, 0.3, 0.2))}
    assert figures.shown_scenes(typical) == ["b", "e", "c"]
    assert figures.shown_scenes({"a": (0.0, 0), "b": (1.0, 0)}) == ["b", "a"]


def test_labels_cover_neither_one_another_nor_leave_the_axes():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    fig = Figure(figsize=(5, 4))
    FigureCanvasAgg(fig)
    axes = fig.add_subplot()
    points = [(0.5, 0.5, f"label {k}", "0.2") for k in range(6)] + [(0.999, 0.999, "corner", "0.2")]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figures.place_labels(fig, axes, points, [])
    for text in axes.texts:
        text.update_positions(fig.canvas.get_renderer())
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own includes its line
    frame = axes.get_window_extent()
    assert len(boxes) == 7 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)


def font_with(file, characters):
    """Writes a font that has a square for each character and nothing else."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"uni{ord(c):04X}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:])})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)


@pytest.mark.parametrize("installed", [True, False])
def test_scene_names_in_chinese_use_an_installed_font_or_one_sentence_says_that_there_is_none(
    tmp_path, installed, capsys, monkeypatch, recwarn
):
    import matplotlib

    font_with(tmp_path / "squares.ttf", "机场")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    files = [str(tmp_path / "broken.ttf"), str(tmp_path / "squares.ttf")][: 1 + installed]
    monkeypatch.setattr(figures.font_manager, "findSystemFonts", lambda: files)
    hr = torch.rand(1, 3, 64, 64)
    lines = [{"label": "机场", "hr": hr, "panels": {"HR": (hr, "机场 1")}}]
    with matplotlib.rc_context():
        figures.use_font_for(["机场", "river"])
        assert ("Squares" in matplotlib.rcParams["font.family"]) == installed
        figures.panels(tmp_path / "panels.png", lines, "机场")
    printed = capsys.readouterr().out
    assert printed.count("no installed font") == (not installed) and len(printed.splitlines()) <= 1
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    assert (tmp_path / "panels.png").is_file()


def test_the_reward_curve_keeps_training_and_held_out_images_apart_and_bands_the_seeds(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    assert not figures.reward_curve(tmp_path / "reward.png", tmp_path, {})  # no events, no picture
    for seed in (1, 2, 3):
        with SummaryWriter(tmp_path / f"seed_{seed}") as writer:
            for step in range(0, 400, 20):
                writer.add_scalar("charts/episodic_return", 0.5 + 0.1 * seed, step)
                writer.add_scalar("eval/reward_agent", 0.3 + 0.1 * seed, step)
                writer.add_scalar("eval/reward_unsteered", 0.2, step)
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda fig, *_, **__: drawn.append(fig))
    assert figures.reward_curve(tmp_path / "reward.png", tmp_path, eval_sr.METHODS)
    training, held_out = drawn[0].axes
    assert [line.get_ydata().mean() for line in training.lines] == pytest.approx([0.7])
    assert [line.get_ydata().mean() for line in held_out.lines] == pytest.approx([0.5, 0.2])
    low, high = training.collections[0].get_datalim(training.transData).intervaly
    assert (low, high) == pytest.approx((0.6, 0.8))


def test_the_settings_of_a_table_can_be_read_back(tmp_path):
    assert eval_sr.settings_in(tmp_path) is None
    (tmp_path / "table.md").write_text("# an old table\n")
    assert eval_sr.settings_in(tmp_path) == {}
    settings = {"images": "水 1", "crop": 64, "scenes": ["a", "b"]}
    (tmp_path / "table.md").write_text(f"# t\n\nSettings: `{json.dumps(settings)}`\n", encoding="utf-8")
    assert eval_sr.settings_in(tmp_path) == settings
    assert eval_sr.difference(settings, {"images": "水 1", "crop": 0, "scenes": []}) == "_crop64_a-b"
