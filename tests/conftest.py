"""Tiny models and images that the tests share. Nothing here needs the network."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"  # real images and LPIPS weights, where a developer has them
if "TORCH_HOME" not in os.environ and (SHARED / "torch_home").is_dir():
    os.environ["TORCH_HOME"] = str(SHARED / "torch_home")


def unreachable(*_, **__):
    raise OSError("no network")


def tiny_ldm(folder, prediction_type="epsilon", latent_channels=3, spacing="leading", clip_sample=False):
    """A random LDM of CompVis' classes (UNet2DModel, VQModel, DDIMScheduler), saved in diffusers' layout."""
    from diffusers import DDIMScheduler, UNet2DModel, VQModel
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
