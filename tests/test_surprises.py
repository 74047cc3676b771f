"""What outside libraries do against expectation, and how this project computes there (docs/surprises.md)."""

import numpy as np
import torch
import torch.nn.functional as F
from conftest import SHARED  # noqa: F401  (sets the path of the scripts)
from PIL import Image

import eval_sr
import ppo_ldm_sr as orl


def photo(side):
    """A smooth random picture, uint8 (side, side, 3)."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    return np.array(small.resize((side, side), Image.Resampling.BICUBIC))


def as_tensor(image):
    return torch.tensor(image).permute(2, 0, 1)[None].float() / 255


def test_the_bicubic_baseline_is_pillows_and_not_pytorchs_default():
    lr = photo(48)
    pillow = as_tensor(np.array(Image.fromarray(lr).resize((192, 192), Image.Resampling.BICUBIC)))
    ours, default = eval_sr.bicubic(as_tensor(lr)), orl.upscale(as_tensor(lr)).clamp(0, 1)
    assert (255 * (ours - pillow)).abs().mean() < 0.4  # Pillow rounds after each of its two passes
    assert (255 * (default - pillow)).abs().mean() > 0.5


def test_an_image_of_150_px_is_cut_so_that_a_quarter_by_scale_is_a_quarter_by_size():
    images = orl.Images("photo", ["all"], [0], ["a.png"], [torch.tensor(photo(152))[:150, :150].permute(2, 0, 1)])
    hr = images.centre(0, 4)[None]
    assert hr.shape == (1, 3, 148, 148)
    by_size = F.interpolate(hr, size=(37, 37), mode="bicubic", antialias=True)
    torch.testing.assert_close(orl.Sensor().downscale(hr), by_size)


def test_ssim_of_a_large_image_is_not_that_of_a_smaller_one():
    """The definition, at the image's own size: Gaussian windows of 11 px and 1.5 px of standard deviation, which
    torchmetrics also places over the border, where it reflects the image."""
    hr = as_tensor(photo(400))
    sr = (hr + 0.1 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    taps = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = torch.outer(taps, taps).expand(3, 1, 11, 11) / taps.sum() ** 2

    def mean(x):
        return F.conv2d(F.pad(x, [5] * 4, mode="reflect"), window, groups=3)

    a, b = mean(sr), mean(hr)
    covariance, variances = mean(sr * hr) - a * b, mean(sr * sr) - a * a + mean(hr * hr) - b * b
    ssim = (2 * a * b + 1e-4) * (2 * covariance + 9e-4) / ((a * a + b * b + 1e-4) * (variances + 9e-4))
    assert abs(orl.score(None, sr, hr, torch.ones(1))["ssim"].item() - ssim.mean().item()) < 1e-4


def test_vif_of_a_spoiled_image_is_far_below_one():
    hr = as_tensor(photo(128))
    sr = (hr + 0.2 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    vif = eval_sr.score_all(None, {}, torch.cat([sr, hr]), torch.cat([hr, hr]), torch.ones(2))["vif"]
    assert vif[0] < 0.5 and vif[1] > 0.99
