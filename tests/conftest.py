"""Tiny models and images that the tests share. Nothing here needs the network."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from diffusers import UNet2DModel
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"  # real images and LPIPS weights, where a developer has them
if "TORCH_HOME" not in os.environ and (SHARED / "torch_home").is_dir():
    os.environ["TORCH_HOME"] = str(SHARED / "torch_home")

import ppo_ldm_sr as orl  # noqa: E402
import pretrain_ldm  # noqa: E402

SMALL = ["--scenes", "desert", "river", "--num-envs", "8", "--max-calls", "3", "--crop", "64", "--eval-images", "2", "--eval-every", "1"]


def unreachable(*_, **__):
    raise OSError("no network")


def tiny_ldm(folder, prediction_type="epsilon", latent_channels=3, spacing="leading", clip_sample=False):
    """A random LDM of CompVis' classes (UNet2DModel, VQModel, DDIMScheduler), saved in diffusers' layout."""
    from diffusers import DDIMScheduler, VQModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import (
        LDMSuperResolutionPipeline,
    )

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=latent_channels + 3, out_channels=latent_channels, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vqvae = VQModel(
        block_out_channels=(8, 8, 8), latent_channels=latent_channels, norm_num_groups=4, num_vq_embeddings=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear", clip_sample=clip_sample,
        prediction_type=prediction_type, timestep_spacing=spacing,
    )  # fmt: skip
    pipeline = LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture
def small_unet(monkeypatch):
    """Pretraining makes a U-Net of fewer channels."""
    make, small = pretrain_ldm.make_unet, {"block_out_channels": (32, 32, 64)}
    monkeypatch.setattr(pretrain_ldm, "make_unet", lambda layers: UNet2DModel.from_config({**make(layers).config, **small}))


@pytest.fixture(scope="session")
def ldm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    tiny_ldm(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Two scenes of four 64 px training and two test images."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for scene in ("desert", "river"):
            (root / split / scene).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(root / split / scene / f"{i}.png")
    return root


def run(*command, code=0, timeout=280, **environment):
    """Runs a script of the project and returns what it said."""
    env = {"OMP_NUM_THREADS": "2", **os.environ, **environment}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


def refused(capsys, script, *flags):
    """What a script says, called in this process with flags that must end it with one sentence and exit code 2."""
    with pytest.raises(SystemExit) as error:
        flags = [str(flag) for flag in flags]
        script.main(flags if script is orl else tyro.cli(script.Args, args=flags))
    said = capsys.readouterr().out
    assert error.value.code == 2 and said.count("error: ") == 1, said
    return said


@pytest.fixture(scope="session")
def trained(tmp_path_factory, ldm_folder):
    """Two iterations, of 16 to 24 steps each, on the synthetic scenes that ship."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    said = run("ppo_ldm_sr.py", "--ldm", ldm_folder, "--dataset", "runs/scenes", "--run-dir", folder, "--total-timesteps", 30, *SMALL)
    return folder, said


@pytest.fixture
def train(monkeypatch, capsys):
    """Trains in this process, without the table, doing `action` before an iteration -> what was said."""

    def training(action, *flags, before=2, code=0):
        rollout, count = orl.rollout, 0

        def counted(*args):
            nonlocal count
            count += 1
            if count == before:
                action(*args)
            return rollout(*args)

        monkeypatch.setattr(orl, "rollout", counted)
        monkeypatch.setattr(orl.subprocess, "run", lambda *_, **__: sys.exit(0))
        with pytest.raises(SystemExit) as error:
            orl.main([str(flag) for flag in flags])
        monkeypatch.undo()
        said = capsys.readouterr().out
        assert (error.value.code or 0) == code, said
        return said

    return training


def interrupt(*_):
    raise KeyboardInterrupt


def nothing(*_):
    pass
