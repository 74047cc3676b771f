"""Writes an LDM of the size of CompVis/ldm-super-resolution-4x-openimages with random weights.

    python tools/full_size_ldm.py full_size
    python ppo_ldm_sr.py --ldm full_size --num-envs 8 --total-timesteps 75 --eval-images 1

It is for machines that cannot reach the Hub. It shows what a run on the real LDM costs in seconds and memory. It does
not show what that run learns.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline


@dataclass
class Args:
    output: Annotated[str, tyro.conf.Positional]  # folder to write, in diffusers' layout


def full_size() -> LDMSuperResolutionPipeline:
    """The configuration of Rombach et al. 2022 (arXiv 2112.10752): factor 4, 160 channels times 1, 2, 2 and 4, and
    attention at the last level alone."""
    unet = UNet2DModel(
        sample_size=64,
        in_channels=6,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(160, 320, 320, 640),
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
        attention_head_dim=32,
    )
    vqvae = VQModel(
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=8192,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0155,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
    )
    return LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler)


def main(args: Args) -> None:
    pipeline = full_size()
    pipeline.save_pretrained(args.output)
    unet, vqvae = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (pipeline.unet, pipeline.vqvae))
    print(f"U-Net {unet:.1f} M, autoencoder {vqvae:.1f} M parameters, written to {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
