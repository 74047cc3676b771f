"""Advice that holds: a sentence that names what to do next is followed, in the state in which it was printed."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SMALL, interrupt, nothing, refused, unreachable
from PIL import Image

import eval_sr
import lpips_weights
import ppo_ldm_sr as orl
import pretrain_ldm
import upscale_sr

CPU = torch.device("cpu")


def test_stopped_go_on_with_the_command_that_is_printed_also_in_a_folder_with_a_space(tmp_path, ldm_folder, train):
    flags = ("--ldm", ldm_folder, "--dataset", "runs/scenes", "--total-timesteps", 30, *SMALL)
    said = train(interrupt, "--run-dir", tmp_path / "my run", *flags, code=130)
    python, script, *words = shlex.split(said.split("go on with ")[1].splitlines()[0])
    assert (python, script) == ("python", "ppo_ldm_sr.py")
    train(nothing, *words)
    assert orl.load_run(tmp_path / "my run/checkpoint.pt")["step"] >= 30


def test_the_folder_exists_go_on_with_resume_or_name_another(trained, tmp_path, capsys, train):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    step = orl.load_run(folder / "checkpoint.pt")["step"]
    assert "go on with --resume or name another" in refused(capsys, orl, "--run-dir", folder)
    said = train(nothing, "--resume", folder)
    assert f"step {step} to 30" in said and orl.load_run(folder / "checkpoint.pt")["step"] == step
    assert "give no flag but --total-timesteps and --device" in refused(capsys, orl, "--resume", folder, "--gamma", 0.5)
    train(nothing, "--resume", folder, "--total-timesteps", step + 1, "--device", "cpu")


def test_images_that_are_too_small_for_the_crop_are_taken_with_the_one_that_is_named(tmp_path, capsys):
    for name, side in (("train/sea/a", 64), ("train/sea/b", 40)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(tmp_path / f"{name}.png")
    with pytest.raises(SystemExit):
        orl.load_images(str(tmp_path), "train", (), 128, CPU)
    crop = int(re.search(r"--crop can be as small as (\d+)", capsys.readouterr().out)[1])
    assert orl.read_args(["--crop", str(crop)])[0].crop == crop
    assert orl.load_images(str(tmp_path), "train", (), crop, CPU).files == ["a.png"]


def test_a_wrong_file_of_weights_once_deleted_is_not_in_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr(lpips_weights, "fetch", unreachable)
    file = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a file of torch")
    with monkeypatch.context() as with_the_file:
        with_the_file.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: torch.load(file))
        with pytest.raises(SystemExit):
            orl.load_lpips(CPU)
    assert f"{file.parent} holds a wrong file" in capsys.readouterr().out
    file.unlink()
    assert orl.load_lpips(CPU) is None and "the reward goes without it" in capsys.readouterr().out


def test_an_agent_of_another_ldm_loads_with_the_ldm_that_the_sentence_names(trained, tmp_path, ldm_folder, capsys):
    flags = ("--agent", trained[0], "--dataset", "runs/scenes", "--scenes", "river", "--limit", 1, "--output", tmp_path / "out")
    said = refused(capsys, eval_sr, *flags, "--ldm", "runs/ldm_x4")
    named = re.search(r"another LDM \((.*), fingerprint \w+\); give that with --ldm", said)[1]
    assert named == str(ldm_folder)
    eval_sr.main(tyro.cli(eval_sr.Args, args=[*map(str, flags), "--ldm", named]))
    assert (tmp_path / "out/table.md").is_file()


def test_own_images_go_to_the_script_that_eval_sr_names(capsys):
    said = refused(capsys, eval_sr, "--images", "photo.png")
    python, script, *words = shlex.split(said.split("upscale_sr.py's: ")[1])
    assert (ROOT / script).is_file()
    args = tyro.cli(upscale_sr.Args, args=[str(ROOT / "runs/scenes/test/river") if w == "IMAGES_OR_FOLDERS" else w for w in words])
    assert len(upscale_sr.list_files(args)) > 1 and args.output == "FOLDER"


def test_a_picture_too_large_for_jpeg_is_taken_as_tif(tmp_path):
    image = Image.fromarray(np.full((4, 16_400, 3), 90, np.uint8))
    for name in ("a.jpg", "a.tif"):
        image.save(tmp_path / name)
    with pytest.raises(ValueError, match="save it as .tif first"):
        upscale_sr.Scene(tmp_path / "a.jpg", None, None)
    assert upscale_sr.Scene(tmp_path / "a.tif", None, None).width == 16_400


def test_without_vgg16_the_flag_that_is_named_is_left_out_and_the_run_goes(tmp_path, ldm_folder, monkeypatch, capsys, train):
    load = orl.load_lpips
    monkeypatch.setattr(orl, "load_lpips", lambda device, net="alex": None if net == "vgg" else load(device) or torch.nn.Identity())
    flags = ("--ldm", ldm_folder, "--dataset", "runs/scenes", "--run-dir", tmp_path / "run", "--total-timesteps", 10, *SMALL)
    assert "leave the flag out" in refused(capsys, orl, *flags, "--vgg-share", 0.5) and not (tmp_path / "run").exists()
    monkeypatch.setattr(orl, "load_lpips", lambda *_: None)
    train(nothing, *flags)


def test_a_pretraining_that_broke_goes_on_with_resume_and_a_lower_rate(small_unet, tmp_path, capsys):
    flags = ["--dataset", "runs/scenes", "--output", str(tmp_path / "ldm"), "--crop", "64", "--layers", "1", "--batch-unet", "4"]
    flags += ["--report-images", "1", "--minutes-decoder", "0", "--minutes-unet", "0.05", "--minutes-autoencoder"]
    assert "has no vqvae yet; give it some" in refused(capsys, pretrain_ldm, *flags, "0")
    said = refused(capsys, pretrain_ldm, *flags, "0.02", "--lr-unet", "1e30")
    assert "lower its learning rate, go on with --resume" in said
    pretrain_ldm.main(tyro.cli(pretrain_ldm.Args, args=[*flags, "0", "--resume", "--lr-unet", "1e-4"]))
    said = capsys.readouterr().out
    python, script, *words = shlex.split(said.split("next: ")[1])
    ldm = orl.load_ldm(orl.read_args(words)[0].ldm, CPU)
    assert (python, script) == ("python", "ppo_ldm_sr.py") and all(p.isfinite().all() for p in ldm.unet.parameters())
