"""Images and datasets as users bring them: each trap is a test that asserts what comes of it."""

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib

import datasets
import hub
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, stops_with, tiny_ldm, unreachable
from PIL import Image

import ppo_ldm_sr as orl

CPU = torch.device("cpu")
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(dataset, split, scenes=(), min_side=16):
    return orl.load_images(str(dataset), split, scenes, min_side, CPU)


def picture(mode="RGB", size=(64, 48)):
    pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def tree(root, *files):
    """Pictures at these paths below root, no two alike."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        picture().save(root / file)
    return root


# ---------------------------------------------------------------- images of all kinds


def png_of_16_bit_rgb(pixels):
    """A PNG file's bytes, which Pillow cannot write, but reads as if it had 8 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def saved(image, form, **options):
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


GREY = np.linspace(0, 4095, 64 * 48).reshape(48, 64)  # 12 bits in 16
UNUSABLE = {
    "grey16.png": saved(Image.fromarray(GREY.astype(np.uint16)), "PNG"),
    "rgb16.png": png_of_16_bit_rgb(np.stack([GREY] * 3, axis=-1)),
    "grey16.tif": saved(Image.fromarray(GREY.astype(np.uint16)), "TIFF"),
    "float.tif": saved(Image.fromarray((GREY / 4095).astype(np.float32)), "TIFF"),
    "text.jpg": b"no image",
    "cut.jpg": saved(picture(size=(640, 480)), "JPEG")[:4000],
    "low.png": saved(picture(size=(64, 15)), "PNG"),
    "narrow.tif": saved(picture(size=(15, 64)), "TIFF"),
    "empty.png": b"",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_no_8_bit_image_of_the_size_is_counted_and_named_and_never_converted(tmp_path, capsys, name):
    tree(tmp_path, "train/river/a.png", "train/river/b.png", "test/river/c.png")
    (tmp_path / "train/river" / name).write_bytes(UNUSABLE[name])
    assert load(tmp_path, "train").files == ["a.png", "b.png"]
    said = capsys.readouterr().out
    assert said.count(name) == 1 and re.search(r"\b1 unusable", said)
    assert not re.search("unusable|skipped", load(tmp_path, "test") and capsys.readouterr().out)


def test_several_unusable_files_are_counted_in_one_line(tmp_path, capsys, caplog):
    tree(tmp_path, "train/river/a.png", "test/river/b.png")
    for name, content in UNUSABLE.items():
        (tmp_path / "train/river" / name).write_bytes(content)
    assert load(tmp_path, "train").files == ["a.png"]
    assert sum(f" {len(UNUSABLE)} " in line for line in capsys.readouterr().out.splitlines()) == 1
    assert not caplog.records  # Pillow's own words, one for each file


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1"])
def test_an_8_bit_image_of_any_mode_is_rgb(tmp_path, mode):
    tree(tmp_path, "train/river/a.png", "test/river/b.png")
    image, name = picture(mode), "x.tif" if mode == "CMYK" else "x.png"
    image.save(tmp_path / "train/river" / name)
    pixels = dict(zip((images := load(tmp_path, "train")).files, images.pixels))[name]
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected) and pixels.float().std() > 10


def test_a_decompression_bomb_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    tree(tmp_path, "train/river/a.png", "train/river/b.png", "test/river/c.png")
    picture(size=(200, 200)).save(tmp_path / "train/river/bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert load(tmp_path, "train").files == ["a.png", "b.png"] and "bomb.png" in capsys.readouterr().out


def test_crops_are_pieces_of_their_image_in_all_eight_symmetries_or_smooth():
    torch.manual_seed(0)
    values = (torch.arange(3 * 20 * 30, dtype=torch.int64) % 251).to(torch.uint8).view(3, 20, 30)
    images = orl.Images("a", ["a"], [0], ["a"], [values])
    image = images.centre(0, 1)
    pieces = {tuple(image[:, y : y + 8, x : x + 8].flatten().tolist()) for y in range(13) for x in range(23)}
    seen, smooth = set(), 0
    for crop in images.crops(200, 8):
        forms = [torch.rot90(f, k, (1, 2)) for f in (crop, crop.flip(2)) for k in range(4)]
        match = [i for i, form in enumerate(forms) if tuple(form.flatten().tolist()) in pieces]
        seen |= set(match[:1])
        smooth += not match
    assert len(seen) == 8 and 2 < smooth < 30  # one in sixteen of 200


def test_the_centre_of_an_image_is_cut_to_a_multiple():
    image = torch.arange(3 * 21 * 30).remainder(251).to(torch.uint8).view(3, 21, 30)
    images = orl.Images("a", ["a"], [0], ["a"], [image])
    assert images.centre(0, 8).shape == (3, 16, 24)
    torch.testing.assert_close(images.centre(0, 4, crop=10), image[:, 6:14, 11:19] / 255)


# ---------------------------------------------------------------- layouts of a dataset


def hub_dataset(splits, scenes=("desert", "river")):
    """A dataset as the Hub gives it: encoded images and class labels, n of each in a split."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(scenes))})
    of = {}
    for split, n in splits.items():
        files = [{"bytes": saved(picture(), "PNG"), "path": None} for _ in range(2 * n)]
        of[split] = datasets.Dataset.from_dict({"image": files, "label": [0, 1] * n}, features)
    return datasets.DatasetDict(of)


def as_parquet(data, folder):
    """Writes a dataset in the Hub's layout."""
    (folder / "data").mkdir(parents=True)
    for split, rows in data.items():
        rows.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    files = "".join(f"  - split: {k}\n    path: data/{k}-*\n" for k in data)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")


SPLIT_SCENE = [f"{s}/{k}/{s}{i}.png" for s in ("train", "test") for k in ("river", "train_station") for i in range(5)]
LAYOUTS = {
    "split/scene": SPLIT_SCENE,
    "Train/scene and TESTING/scene": [f.replace("train/", "Train/").replace("test/", "TESTING/") for f in SPLIT_SCENE],
    "training and val": [f.replace("train/", "training/").replace("test/", "val/") for f in SPLIT_SCENE],
    "scene/split": [f"{k}/{s}/{s}{i}.png" for s in ("train", "test") for k in ("river", "test_site") for i in range(5)],
    "one folder more": ["archive/" + f for f in SPLIT_SCENE],
    "deeper": [f.replace("river/", "river/2019/") for f in SPLIT_SCENE],
    "one scene": [f for f in SPLIT_SCENE if "/river/" in f],
    "scenes alone": [f"{k}/test_{i}.png" for k in ("river", "train_station", "sea") for i in range(10)],
    "flat": [f"train_{i}.png" for i in range(10)],
    "the same names in both": [f"{s}/river/{i}.png" for s in ("train", "test") for i in range(5)],
}


@pytest.mark.parametrize("layout", [*LAYOUTS, "save_to_disk", "one table", "parquet", "parquet of one split"])
def test_a_test_image_never_reaches_the_training_split(tmp_path, layout):
    if layout in LAYOUTS:
        files = LAYOUTS[layout]
        total = len(list(tree(tmp_path, *files).rglob("*.png")))
    else:
        data = hub_dataset({"train": 10} if "one" in layout else {"train": 10, "test": 5})
        total = sum(len(table) for table in data.values())
        if "parquet" in layout:
            as_parquet(data, tmp_path)
        else:
            (data if layout == "save_to_disk" else data["train"]).save_to_disk(tmp_path)
    train, test = ([p.numpy().tobytes() for p in load(tmp_path, split).pixels] for split in ("train", "test"))
    assert train and test and not set(train) & set(test)
    assert len({*train, *test}) == len(train) + len(test) == total  # each image once, and none is missing
    in_train = [file for file in LAYOUTS.get(layout, []) if {"train", "training"} & {*file.lower().split("/")}]
    if in_train:
        expected = (np.array(Image.open(tmp_path / file)) for file in in_train)
        assert sorted(train) == sorted(image.transpose(2, 0, 1).tobytes() for image in expected)


def test_a_link_to_a_test_image_is_no_training_image(tmp_path):
    tree(tmp_path, *(f"{split}/river/{split}{i}.png" for split in ("train", "test") for i in range(3)))
    (tmp_path / "train/river/linked.png").symlink_to(tmp_path / "test/river/test0.png")
    train, test = (load(tmp_path, split) for split in ("train", "test"))
    assert len(train.files) == 3 and len(test.files) == 3
    assert not {p.numpy().tobytes() for p in train.pixels} & {p.numpy().tobytes() for p in test.pixels}


@pytest.mark.parametrize("stray", ["index.parquet", "metadata.csv", "metadata.jsonl", "train/river/metadata.csv"])
def test_a_stray_table_beside_images_is_no_dataset(tmp_path, stray):
    tree(tmp_path, *(f"{s}/{k}/{i}.png" for s in ("train", "test") for k in ("river", "sea") for i in (0, 1)))
    if stray.endswith("parquet"):
        datasets.Dataset.from_dict({"file_name": ["0.png"], "area": [3.5]}).to_parquet(tmp_path / stray)
    else:
        json_line = '{"file_name": "0.png", "text": "a river"}\n'
        (tmp_path / stray).write_text("file_name,text\n0.png,a river\n" if stray.endswith("csv") else json_line)
    for split in ("train", "test"):
        images = load(tmp_path, split)
        assert images.scenes == ["river", "sea"] and images.labels == [0, 0, 1, 1]


def test_scenes_whose_names_are_or_hold_words_of_splits_numbers_or_chinese_are_scenes(tmp_path):
    names = ["007", "1", "42", "test_site", "train_station", "validation_area", "农田", "机场"]
    tree(tmp_path, *(f"{s}/{k}/{s}_{i}.png" for s in ("train", "test") for k in names for i in (0, 1)))
    for split in ("train", "test"):
        images = load(tmp_path, split)
        assert images.scenes == names and images.labels == [k for k in range(8) for _ in (0, 1)]
        assert all(file.startswith(split) for file in images.files)
    assert load(tmp_path, "train", ("机场", "42")).scenes == ["42", "机场"]


def test_hidden_folders_empty_classes_and_what_lies_beside_the_splits_are_left_out(tmp_path, capsys):
    root = tree(tmp_path / "bäd names, with spaces [x]", "train/river/a.png", "train/river/b.png", "test/river/c.png")
    tree(root, "train/.ipynb_checkpoints/a.png", ".cache/train/river/d.png", "masks/river/a.png", "train/river/.e.png")
    (root / "train/volcano").mkdir()
    (root / "train/river/notes.txt").write_text("nothing to see")
    images = load(root, "train")
    assert images.scenes == ["river"] and images.files == ["a.png", "b.png"] and load(root, "test").files == ["c.png"]
    assert "unusable" not in capsys.readouterr().out


def test_folders_that_archives_add_and_pictures_beside_the_scenes_make_no_scene(tmp_path):
    files = [f"{split}/{{}}{scene}/{i}.png" for split in ("train", "test") for scene in ("river", "sea") for i in (0, 1)]
    for name, added in {"within": "images/", "without": ""}.items():
        tree(tmp_path / name, *(file.format(added) for file in files))
        assert load(tmp_path / name, "train").scenes == ["river", "sea"]
    tree(tmp_path / "stray", "preview.png", *(f"UCMerced/Images/{k}/{i}.png" for k in ("river", "sea") for i in range(5)))
    images = load(tmp_path / "stray", "all")
    assert {"river", "sea"} < {*images.scenes} and len(images.scenes) == 3 and len(images.files) == 11
    tree(tmp_path / "flat", *(f"{i}.png" for i in range(10)), "thumbnails/a.png")
    assert len(load(tmp_path / "flat", "all").files) == 11  # nothing is lost


@pytest.mark.parametrize("train, test", [("train_images", "test_images"), ("TrainSet", "Test-Set"), ("training", "testdata")])
def test_folders_that_are_called_train_images_and_testset_are_splits(tmp_path, train, test):
    tree(tmp_path, *(f"{split}/{k}/{i}.png" for split in (train, test) for k in ("river", "sea") for i in (0, 1)))
    for split, name in (("train", train), ("test", test)):
        files = sorted((tmp_path / name).rglob("*.png"))
        expected = [np.array(Image.open(file)).transpose(2, 0, 1).tobytes() for file in files]
        assert [p.numpy().tobytes() for p in load(tmp_path, split).pixels] == expected


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    """In a process of its own, so that a walk without end is a failure and not a standstill."""
    tree(tmp_path, "real/a/river/0.png", "real/b/river/1.png")
    (tmp_path / "set/test").mkdir(parents=True)
    (tmp_path / "set/train").symlink_to(tmp_path / "real/a")  # a split
    (tmp_path / "set/test/river").symlink_to(tmp_path / "real/b/river")  # a scene
    for name in ("up", "up_too"):  # each leads to itself and to the other
        (tmp_path / "real/b/river" / name).symlink_to(tmp_path / "real/b")
    code = """if True:
        import sys, torch, ppo_ldm_sr as orl
        for split in ("train", "test"):
            images = orl.load_images(sys.argv[1], split, (), 16, torch.device("cpu"))
            print(images.scenes, images.files)"""
    command = [sys.executable, "-c", code, tmp_path / "set"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=40)
    found = [line for line in done.stdout.splitlines() if line[0] == "["]
    assert found == ["['river'] ['0.png']", "['river'] ['1.png']"], done


def test_a_split_that_is_missing_is_replaced_by_what_is_said(tmp_path, capsys):
    tree(tmp_path / "alone", *(f"{scene}/{i}.png" for scene in ("river", "sea") for i in range(10)))
    train, test = (load(tmp_path / "alone", split) for split in ("train", "test"))
    assert train.files == [f"{i}.png" for i in range(8)] * 2 and test.files == ["8.png", "9.png"] * 2
    assert "20%" in capsys.readouterr().out
    tree(tmp_path / "val", "train/river/a.png", "Val/river/b.png")
    assert load(tmp_path / "val", "test").files == ["b.png"] and "validation" in capsys.readouterr().out
    tree(tmp_path / "lone", *(f"Testing/river/{i}.png" for i in range(10)))
    assert len(load(tmp_path / "lone", "test").files) == 10  # it is the test split, whole
    with stops_with(capsys, tmp_path / "lone", "train"):
        load(tmp_path / "lone", "train")
    every = {"alone": 20, "val": 2, "lone": 10}
    assert {name: len(load(tmp_path / name, "all").files) for name in every} == every


def test_a_folder_of_images_without_scenes_is_one_scene_named_after_it(tmp_path):
    images = load(tree(tmp_path / "photos", *(f"{i}.png" for i in range(5))), "train")
    assert images.scenes == ["photos"] and len(images.files) == 4


def test_a_scene_of_the_training_split_alone_is_missing_in_the_test_split_only(tmp_path):
    tree(tmp_path, "train/desert/a.png", "train/river/b.png", "test/desert/c.png")
    assert load(tmp_path, "train").scenes == ["desert", "river"] and load(tmp_path, "test").scenes == ["desert"]


SPELLINGS = {
    "joined": "Commercial DenseResidential Desert Forest Industrial RailwayStation River Runway".split(),
    "spaces": [name.replace("_", " ").title() for name in orl.PAPER_SCENES],
    "hyphens": [name.replace("_", "-").upper() for name in orl.PAPER_SCENES],
}
SPELLINGS["joined"] = [name + "Area" * (name in ("Commercial", "Industrial")) for name in SPELLINGS["joined"]]


@pytest.mark.parametrize("kind", SPELLINGS)
def test_the_papers_eight_scenes_are_known_by_other_spellings_and_taken_alone(tmp_path, kind):
    names = [*SPELLINGS[kind], "Airport"]
    tree(tmp_path, *(f"{split}/{name}/{i}.png" for split in ("train", "test") for name in names for i in (0, 1)))
    images = load(tmp_path, "train")
    assert images.scenes == list(orl.PAPER_SCENES) and len(images.files) == 16
    assert load(tmp_path, "test", ("airport", "river")).scenes == ["airport", "river"]


# ---------------------------------------------------------------- tables and the Hub


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_a_local_copy_of_a_hub_dataset_loads(tmp_path, form):
    data = hub_dataset({"train": 5, "test": 2}, scenes=("Sea Ice", "机场"))
    data.save_to_disk(tmp_path) if form == "save_to_disk" else as_parquet(data, tmp_path)
    if form == "parquet":
        tree(tmp_path, "thumbnail.png", "assets/samples.png")  # of its README
    train, test = load(tmp_path, "train"), load(tmp_path, "test")
    assert (len(train.files), len(test.files)) == (10, 4) and train.scenes == test.scenes == ["sea_ice", "机场"]
    expected = [row["image"] for k in (0, 1) for row in data["train"] if row["label"] == k]
    assert train.labels == [0] * 5 + [1] * 5
    assert all(np.array_equal(p.permute(1, 2, 0), image) for p, image in zip(train.pixels, expected, strict=True))


def test_columns_of_other_names_are_named(tmp_path, capsys):
    hub_dataset({"train": 2}).rename_column("label", "scene").save_to_disk(tmp_path)
    with stops_with(capsys, "scene", "label"):
        load(tmp_path, "train")


def test_a_folder_of_parquet_files_has_its_own_images_whatever_was_read_before(tmp_path):
    """`datasets` 5.2.0 keeps such a folder under its name alone, where a README.md names its files."""
    found = []
    for parent in ("monday", "tuesday"):
        data = hub_dataset({"train": 2, "test": 1})
        as_parquet(data, tmp_path / parent / "images")
        expected = [np.array(row["image"]) for k in (0, 1) for row in data["train"] if row["label"] == k]
        pixels = load(tmp_path / parent / "images", "train").pixels
        found.append(all(np.array_equal(p.permute(1, 2, 0), image) for p, image in zip(pixels, expected, strict=True)))
    assert found == [True, True]


def table_of(folder, labels, kind):
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": [picture() for _ in labels], "label": labels}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(folder)


def test_hidden_labels_are_no_class_and_strings_are_scenes(tmp_path):
    table_of(tmp_path / "hidden", [0, 1, -1, -1, 0, 1], datasets.ClassLabel(names=["river", "sea"]))
    assert sum(len(load(tmp_path / "hidden", split).files) for split in ("train", "test")) == 4
    table_of(tmp_path / "words", ["Sea", "River", "Sea", "River"], datasets.Value("string"))
    assert load(tmp_path / "words", "train").scenes == ["river", "sea"]


def test_a_dataset_and_an_ldm_of_bin_weights_come_from_the_hub_and_no_library_complains(tmp_path):
    """A stand-in of the Hub over HTTP, in a process of its own, since the client reads HF_ENDPOINT once."""
    as_parquet(hub_dataset({"train": 5, "validation": 1, "test": 2}), tmp_path / "hub/datasets/timm/resisc45")
    files = [f"{split}/{scene}/a.png" for split in ("train", "test") for scene in ("lake", "road")]
    tree(tmp_path / "hub/datasets/someone/photos", *files)
    for folder in ("bin", "hub/models/someone/tiny"):
        tiny_ldm(tmp_path / "ldm").save_pretrained(tmp_path / folder, safe_serialization=False)
    assert not list((tmp_path / "bin").rglob("*.safetensors"))
    code = """if True:
        import sys, torch, ppo_ldm_sr as orl
        cpu = torch.device("cpu")
        ldms = [orl.load_ldm(name, cpu) for name in ("someone/tiny", sys.argv[1])]
        files = orl.load_images("someone/photos", "test", (), 32, cpu)
        print(files.scenes, len(files.files))
        train, test = (orl.load_images("timm/resisc45", split, (), 32, cpu) for split in ("train", "test"))
        print(len(train.files), len(test.files), train.scenes, train.title, *(ldm.fingerprint for ldm in ldms))"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    with hub.Hub(tmp_path / "hub") as endpoint:
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", code, tmp_path / "bin"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    fingerprint = orl.load_ldm(str(tmp_path / "ldm"), CPU).fingerprint
    last = f"10 4 ['desert', 'river'] timm/resisc45 {fingerprint} {fingerprint}"
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == last, done.stdout + done.stderr
    assert "['lake', 'road'] 2" in done.stdout.splitlines(), done.stdout
    assert not re.search(r"error|warn|unauthenticated", done.stderr, re.IGNORECASE), done.stderr


@pytest.mark.parametrize("name", ["nowhere", "nowhere/at/all", "/nowhere/at/all", "./no_folder", "my images/set"])
def test_a_missing_folder_that_is_no_name_of_the_hub_is_never_asked_of_it(name, monkeypatch, capsys):
    asked = []

    def ask(*_, **__):
        asked.append(name)
        raise OSError("no such dataset")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    monkeypatch.setattr(datasets, "load_dataset", ask)
    with stops_with(capsys, name, "folder"):
        load(name, "train")
    assert not asked


def test_a_hub_that_cannot_be_reached_is_one_sentence_within_seconds(monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for info in ("dataset_info", "model_info"):
        monkeypatch.setattr(huggingface_hub.HfApi, info, unreachable)
    began = time.perf_counter()
    with stops_with(capsys, "nobody/has-this-dataset", "folder"):
        load("nobody/has-this-dataset", "train")
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    with stops_with(capsys, "nobody/has-this-ldm", "folder"):
        orl.load_ldm("nobody/has-this-ldm", torch.device("cpu"))
    assert time.perf_counter() - began < 10 and huggingface_hub.constants.HF_HUB_OFFLINE  # no retry was made


def test_a_dataset_that_cannot_be_used_ends_in_one_sentence(image_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with stops_with(capsys, tmp_path / "empty"):
        load(tmp_path / "empty", "train")
    with stops_with(capsys, "volcano", "desert", "river"):
        load(image_folder, "train", ("volcano",))
    assert len(load(tree(tmp_path / "one", "river/a.png"), "train").files) == 1
    with stops_with(capsys, "test", "river"):
        load(tmp_path / "one", "test")
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet/train.parquet").write_bytes(b"no table")
    with stops_with(capsys, tmp_path / "parquet"):
        load(tmp_path / "parquet", "train")
    table = datasets.Dataset.from_dict({"image": [picture()], "caption": ["a river"]})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "captions")
    with stops_with(capsys, "image", "caption", "label"):
        load(tmp_path / "captions", "train")


def test_a_scene_asked_for_with_no_usable_image_is_named_and_else_left_out(image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "data")
    for file in (tmp_path / "data/train/river").iterdir():
        file.write_text("no image")
    with stops_with(capsys, "river"):
        load(tmp_path / "data", "train", ("desert", "river"))
    assert len(load(tmp_path / "data", "train").files) == 4
