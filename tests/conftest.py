"""Tiny models, tiny images and small helpers that the tests share. Nothing here needs the network."""

import contextlib
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

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
sys.path[:0] = [str(ROOT), str(TOOLS)]  # the scripts themselves, and tools such as pretrain_ldm
SHARED = ROOT.parent / "shared"  # real images and LPIPS weights, where a developer has them
if "TORCH_HOME" not in os.environ and (SHARED / "torch_home").is_dir():
    os.environ["TORCH_HOME"] = str(SHARED / "torch_home")

import ppo_ldm_sr as orl  # noqa: E402

SMALL = ["--scenes", "desert", "river", "--num-envs", "8", "--max-nfe", "3", "--crop", "64"]
SMALL += ["--eval-images", "2", "--eval-every", "1"]


def unreachable(*_, **__):
    raise OSError("no network")


def interrupt(*_):
    raise KeyboardInterrupt


def nothing(*_):
    pass


def tiny_ldm(folder, prediction_type="epsilon", latent_channels=3, spacing="leading", clip_sample=False):
    """A random LDM of CompVis' classes (UNet2DModel, VQModel, DDIMScheduler), saved in diffusers' layout."""
    from diffusers import DDIMScheduler, VQModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import (
        LDMSuperResolutionPipeline,
    )

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=latent_channels + 3,
        out_channels=latent_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    vqvae = VQModel(
        block_out_channels=(8, 8, 8),
        latent_channels=latent_channels,
        norm_num_groups=4,
        num_vq_embeddings=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0155,
        beta_schedule="scaled_linear",
        clip_sample=clip_sample,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
    )
    pipeline = LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="session")
def ldm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    tiny_ldm(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Two scenes of four training and two test images of 64 px each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for scene in ("desert", "river"):
            (root / split / scene).mkdir(parents=True)
            for i in range(count):
                pixels = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
                pixels.resize((64, 64), Image.Resampling.BICUBIC).save(root / split / scene / f"{i}.png")
    return root


def run(*command, code=0, timeout=280, **environment):
    """Runs a script of the project in a process of its own and returns what it printed."""
    env = {"OMP_NUM_THREADS": "2", **os.environ, **environment}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


def refused(capsys, script, *flags):
    """Calls a script in this process with flags that must end it with one sentence and exit code 2 -> its output."""
    flags = [str(flag) for flag in flags]
    with pytest.raises(SystemExit) as error:
        script.main(flags if script is orl else tyro.cli(script.Args, args=flags))
    printed = capsys.readouterr().out
    assert error.value.code == 2 and printed.count("error: ") == 1, printed
    return printed


@contextlib.contextmanager
def stops_with(capsys, *words):
    """In here the program must end with exit code 2 and one sentence, which holds these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        yield
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert error.value.code == 2 and len(lines) == 1, lines
    assert all(str(word) in lines[0] for word in words), lines


@pytest.fixture(scope="session")
def trained(tmp_path_factory, ldm_folder):
    """A run of two iterations, of 16 to 24 steps each, on the default images -> its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    flags = ["--ldm", ldm_folder, "--run-dir", folder, "--total-timesteps", 30, *SMALL]
    return folder, run("ppo_ldm_sr.py", *flags)


@pytest.fixture
def train(monkeypatch, capsys):
    """A function that trains in this process, without the table at the end, and returns what was printed.

    Its `action` is called with the arguments of `rollout` just before iteration number `before` begins.
    """

    def training(action, *flags, before=2, code=0):
        rollout, count = orl.rollout, 0

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            if count == before:
                action(*args)
            return rollout(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(orl, "rollout", counted)
            patch.setattr(subprocess, "run", lambda *_, **__: sys.exit(0))  # the table, in a process of its own
            with pytest.raises(SystemExit) as error:
                orl.main([str(flag) for flag in flags])
        printed = capsys.readouterr().out
        assert (error.value.code or 0) == code, printed
        return printed

    return training
