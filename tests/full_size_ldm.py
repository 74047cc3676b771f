"""Writes an LDM of the configuration of CompVis/ldm-super-resolution-4x-openimages with random weights, for machines
that cannot reach the Hub: what a run on the real one costs in seconds and memory, though not what it learns.

    python tests/full_size_ldm.py full_size
    python ppo_ldm_sr.py --ldm full_size --num-envs 8 --total-timesteps 75 --eval-images 1
"""

import sys

from diffusers import DDIMScheduler, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline


def full_size() -> LDMSuperResolutionPipeline:
    """Rombach et al. 2022 (arXiv 2112.10752): f = 4, 160 channels times 1, 2, 2, 4, attention at the last."""
    unet = UNet2DModel(
        sample_size=64, in_channels=6, out_channels=3, layers_per_block=2, block_out_channels=(160, 320, 320, 640),
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",), attention_head_dim=32,
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
    )  # fmt: skip
    vqvae = VQModel(
        block_out_channels=(128, 256, 512), layers_per_block=2, latent_channels=3, num_vq_embeddings=8192,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    kind = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon", "clip_sample": False}
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0155, **kind)
    return LDMSuperResolutionPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pipeline = full_size()
    pipeline.save_pretrained(sys.argv[1])
    sizes = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (pipeline.unet, pipeline.vqvae))
    print("U-Net {:.1f} M, autoencoder {:.1f} M parameters".format(*sizes))
