"""The sensor, the reward and the metrics of periodic artefacts. Each test's name is a claim."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, tiny_ldm

import ppo_ldm_sr as orl

CPU = torch.device("cpu")
BICUBIC, SHARP, BLURRED = orl.Sensor(), orl.Sensor(0.29), orl.Sensor(0.15, lr_noise=2)
has_lpips = pytest.mark.skipif(not (SHARED / "torch_home").is_dir(), reason="LPIPS's weights are not on this machine")


@pytest.fixture
def ldm(tmp_path):
    pipeline = tiny_ldm(tmp_path)
    ldm = orl.LDM(pipeline.unet, pipeline.vqvae, pipeline.scheduler, CPU)
    ldm.autocast = torch.autocast("cpu", enabled=False)
    return ldm


# ---------------------------------------------------------------- sensor


@pytest.mark.parametrize("sensor", [BICUBIC, SHARP, BLURRED, orl.Sensor(0.01), orl.Sensor(0.9)])
def test_a_constant_image_stays_constant_up_to_its_borders(sensor):
    for height, width in ((64, 64), (8, 20)):
        hr = torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1).expand(2, 3, height, width)
        torch.testing.assert_close(sensor.downscale(hr), hr[..., ::4, ::4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("mtf", [0.05, 0.15, 0.29, 0.5, 0.8])
def test_the_transfer_at_the_lr_nyquist_frequency_is_the_one_asked_for(mtf):
    wave = 0.5 + 0.4 * torch.cos(2 * math.pi * (torch.arange(160) - 1.5) / 8)  # its crests are at LR pixels' centres
    for hr in (wave.expand(1, 3, 160, -1), wave.view(-1, 1).expand(1, 3, -1, 160)):
        lr = orl.Sensor(mtf).downscale(hr)[..., 10:-10, 10:-10]
        assert float(lr.max() - lr.min()) / 0.8 == pytest.approx(mtf, rel=0.02)


@pytest.mark.parametrize("sensor", [BICUBIC, SHARP, BLURRED])
def test_a_point_comes_out_where_it_belongs(sensor):
    hr = torch.zeros(1, 3, 84, 84)
    hr[..., 41:43, 41:43] = 1.0  # its centre is HR index 4 * 10 + 1.5
    lr = sensor.downscale(hr)
    assert lr[0, 0].argmax() == 10 * 21 + 10
    for other in (lr.flip(2), lr.flip(3), lr.mT):
        torch.testing.assert_close(other, lr, atol=1e-6, rtol=0)
    ramp = (torch.arange(160.0) / 160).expand(1, 3, 160, -1)
    centres = (4 * torch.arange(40.0) + 1.5) / 160
    torch.testing.assert_close(sensor.downscale(ramp)[0, 0, 0, 8:-8], centres[8:-8], atol=1e-5, rtol=0)


def test_without_mtf_the_lr_image_is_antialiased_bicubic_to_the_bit():
    hr, noise = torch.rand(2, 3, 64, 48), torch.randn(2, 3, 16, 12)
    expected = F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True)
    assert torch.equal(orl.Sensor().downscale(hr), expected)
    assert torch.equal(orl.Sensor().sense(hr, noise), expected.clamp(0, 1))


@pytest.mark.parametrize("mtf", [None, 0.29])
def test_the_sensors_noise_is_so_many_grey_levels_and_an_lr_image_stays_in_range(mtf):
    sensor, noise = orl.Sensor(mtf, lr_noise=3), torch.randn(2, 3, 64, 64)
    grey = torch.full((2, 3, 256, 256), 0.5)
    added = 255 * (sensor.sense(grey, noise) - 0.5)
    assert added.std().item() == pytest.approx(3, rel=0.02) and abs(added.mean().item()) < 0.1
    white = sensor.sense(torch.ones(2, 3, 256, 256), noise)
    assert white.max() == 1 and white.min() < 0.99


def test_an_images_noise_is_its_own_whatever_the_batch(ldm):
    together = orl.noise_for([3, 5, 7], (3, 8, 8), 42, CPU)
    for i, index in enumerate((3, 5, 7)):
        assert torch.equal(orl.noise_for([index], (3, 8, 8), 42, CPU)[0], together[i])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, orl.noise_for([3, 5, 7], (3, 8, 8), 43, CPU))
    env, hr, seen = orl.DenoisingEnv(ldm, 2, 2, BLURRED), torch.rand(1, 3, 32, 32).expand(18, -1, -1, -1), []
    super_resolve = env.super_resolve
    env.super_resolve = lambda lr, z, agent: seen.append((lr, z)) or super_resolve(lr, z, agent)
    whole, part = (orl.evaluate(env, images, None, None, seed=42)["psnr"] for images in (hr, hr[:3]))
    torch.testing.assert_close(whole[:3], part, atol=1e-3, rtol=0)
    for of_batches in zip(*seen[:-1]):  # LR images, then pure noise: of one picture 18 times
        assert len(torch.cat(of_batches).unique(dim=0)) == 18


@pytest.mark.parametrize("sensor", [BICUBIC, SHARP, BLURRED])
def test_back_projection_brings_the_downscaled_result_to_the_lr_image(ldm, sensor):
    lr, z = torch.rand(2, 3, 16, 16) / 2 + 0.25, torch.randn(2, 3, 16, 16)
    decoded = ldm.decode(z)
    results = decoded, orl.back_project(decoded, lr, sensor)
    error = [(sensor.downscale(sr) - lr).square().mean() for sr in results]
    assert error[1] < 0.5 * error[0]


def test_a_photographs_result_downscaled_by_its_sensor_is_its_lr_image():
    """Eight images, real ones where this machine has them, steered by the agent that ships."""
    real = SHARED / "data/paper8"
    images = orl.load_images(str(real if real.is_dir() else ROOT / "runs/scenes"), "test", (), 128, CPU)
    hr = torch.stack([images.centre(images.labels.index(k), 1, 128) for k in range(8)])
    ldm = orl.load_ldm(str(ROOT / "runs/ldm_x4"), CPU)
    env, agent = orl.DenoisingEnv(ldm, 3, 2, SHARP), orl.load_agent(orl.load_run(ROOT / "runs/orl_ldm"), ldm)
    lr = SHARP.sense(hr, torch.zeros(8, 3, 32, 32))
    sr, *_ = env.super_resolve(lr, orl.noise_for(range(8), (ldm.latent_channels, 32, 32), 42, CPU), agent)
    lr_psnr = -10 * (SHARP.downscale(sr) - lr).square().mean(dim=(1, 2, 3)).log10()
    assert lr_psnr.mean() > 44, lr_psnr


# ---------------------------------------------------------------- reward


def test_psnr_is_of_each_image_by_itself_whatever_the_batch():
    from torchmetrics.functional.image import peak_signal_noise_ratio as reference

    hr = torch.rand(3, 3, 32, 32)
    sr = (hr + torch.tensor([0.01, 0.1, 0.5]).view(3, 1, 1, 1) * torch.randn(3, 3, 32, 32)).clamp(0, 1)
    psnr = orl.score(None, sr, hr, torch.ones(3))["psnr"]
    torch.testing.assert_close(psnr, reference(sr, hr, data_range=1.0, reduction="none", dim=(1, 2, 3)))
    assert psnr.mean() > reference(sr, hr, data_range=1.0) + 1  # whose error is pooled over the batch
    alone = [orl.score(None, sr[i : i + 1], hr[i : i + 1], torch.ones(1))["psnr"] for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), psnr)


def test_a_perfect_image_has_100_db_and_an_ssim_of_one():
    hr = torch.rand(4, 3, 32, 32)
    found = orl.score(None, hr, hr, torch.ones(4))
    assert (found["psnr"] == 100).all() and (found["ssim"] - 1).abs().max() < 1e-5
    assert found["reward"].max() <= 1 + 1e-5


@pytest.mark.parametrize("weights", [(0.4, 0.3, 0.2, 0.1), (4, 3, 2, 1), (1, 0, 0.5, 0), (0.1, 0.2, 0.7, 0.4)])
def test_the_weights_of_the_reward_are_normalised_with_and_without_lpips_alike(weights):
    hr = torch.rand(2, 3, 32, 32)
    sr, nfe = (hr + 0.05 * torch.randn_like(hr)).clamp(0, 1), torch.tensor([4.0, 2.0])
    found = orl.score(lambda a, b, normalize: torch.full((len(a), 1, 1, 1), 0.3), sr, hr, nfe, weights)
    without = orl.score(None, sr, hr, nfe, weights)
    terms = {"psnr": found["psnr"] / 50, "ssim": found["ssim"], "lpips": torch.tensor([0.7] * 2)}
    terms["efficiency"] = 1 - nfe / 100
    assert all(0 <= term.min() and term.max() <= 1 for term in terms.values())
    parts = {k: w * term for w, (k, term) in zip(weights, terms.items())}
    torch.testing.assert_close(found["reward"], sum(parts.values()) / sum(weights))
    others = sum(part for k, part in parts.items() if k != "lpips")
    torch.testing.assert_close(without["reward"], others / (sum(weights) - weights[2]))
    assert without["lpips"].isnan().all() and "reward/lpips" not in without
    for k, part in parts.items():
        torch.testing.assert_close(found[f"reward/{k}"], part / sum(weights))


def test_a_shift_moves_the_corner_of_lpips_alone():
    def distance(a, b, normalize):
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    (hr, sr), nfe = torch.rand(2, 1, 3, 32, 32), torch.ones(1)
    whole, moved = orl.score(distance, sr, hr, nfe), orl.score(distance, sr, hr, nfe, shift=(3, 7))
    torch.testing.assert_close(moved["lpips"], (sr - hr)[..., 3:, 7:].abs().mean().view(1))
    assert moved["lpips"] != whole["lpips"] and moved["psnr"] == whole["psnr"] and moved["ssim"] == whole["ssim"]


@has_lpips
def test_lpips_is_torchmetrics_lpips():
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference

    lpips_fn, (hr, sr) = orl.load_lpips(CPU), torch.rand(2, 2, 3, 64, 64)
    got = orl.score(lpips_fn, sr, hr, torch.ones(2))["lpips"]
    torch.testing.assert_close(got.mean(), reference(sr, hr, net_type="alex", normalize=True), atol=1e-5, rtol=1e-4)
    assert orl.score(lpips_fn, hr, hr, torch.ones(2))["lpips"].abs().max() < 1e-6


# ---------------------------------------------------------------- periodic artefacts


def test_periodicity_distance_sees_a_lattice_in_any_direction_whatever_its_phase_and_not_texture():
    torch.manual_seed(0)
    hr, texture = (0.5 + 0.1 * torch.randn(2, 1, 128, 128).expand(-1, 3, -1, -1) for _ in range(2))
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    other = orl.periodicity_distance(texture, hr)
    assert orl.periodicity_distance(hr, hr).abs().max() == 0 and 0 < other.min() and other.max() < 5e-4
    for along, phase in ((x, 0), (y, 1), ((x + y) / math.sqrt(2), 2), ((2 * x - y) / math.sqrt(5), 3)):
        wave = 0.1 * torch.sin(2 * math.pi * along / 7 + phase)  # of the size of the texture, a period of 7 px
        assert orl.periodicity_distance(texture + wave, hr).min() > 10 * other.max()
        assert orl.periodicity_distance(texture + wave, hr + wave.flip(0, 1)).max() < 2 * other.max()


def test_grid_is_about_one_for_noise_and_far_above_ten_for_a_faint_pattern():
    import eval_sr

    torch.manual_seed(0)
    assert 0.5 < eval_sr.grid(torch.rand(8, 3, 128, 128)).mean() < 2
    ramp = torch.linspace(0, 1, 128)
    smooth = (0.3 + 0.2 * ramp.view(1, 1, -1, 1) + 0.1 * ramp).expand(2, 3, -1, -1)
    pattern = (torch.randint(0, 2, (4, 4)) / 255).repeat(32, 32)
    assert eval_sr.grid(smooth + pattern).min() > 100


def test_periodicity_sees_a_pattern_that_grid_does_not():
    import eval_sr

    torch.manual_seed(0)
    noise, signs = torch.randn(2, 1, 128, 128), 1 - 2 * ((torch.arange(32).view(-1, 1) + torch.arange(32)) % 2).float()
    assert eval_sr.periodicity(0.5 + 0.1 * noise.expand(-1, 3, -1, -1)).abs().max() < 0.03
    changing = 0.5 + 0.1 * (noise + 0.5 * torch.kron(signs, torch.randn(4, 4))).expand(-1, 3, -1, -1)
    assert eval_sr.periodicity(changing).min() > 0.1 and eval_sr.grid(changing).max() < 3
    wave = torch.sin(torch.arange(128) * 2 * math.pi / 6)  # a period of 6 px, which two cells of 4 px do not have
    assert eval_sr.periodicity((0.5 + 0.1 * (noise + wave)).expand(-1, 3, -1, -1)).min() > 0.1
