"""The method: environment, reward, credit, GAE, PPO. Each test's name is a claim."""

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED, tiny_ldm
from diffusers import DDIMScheduler
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline

import eval_sr
import ppo_ldm_sr as orl

CPU = torch.device("cpu")
FP32 = torch.autocast("cpu", enabled=False)


def pieces(pipeline):
    ldm = orl.LDM(pipeline.unet, pipeline.vqvae, pipeline.scheduler, CPU)
    ldm.autocast = FP32
    return ldm


def stride(value):
    """The Gaussian number that gives this stride."""
    return 2 * math.log2(value)


# ---------------------------------------------------------------- denoising


@pytest.mark.parametrize("supported", [True, False])
def test_an_older_pytorch_that_lists_no_capabilities_is_asked_for_bf16_as_well(monkeypatch, supported):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert orl.has_bf16.__wrapped__(CPU) == supported


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps, clip_sample", [(1, False), (3, False), (10, True)])
def test_the_null_agent_is_the_stock_pipeline(tmp_path, prediction_type, spacing, steps, clip_sample):
    tiny_ldm(tmp_path, prediction_type, spacing=spacing, clip_sample=clip_sample)
    pipeline = LDMSuperResolutionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    lr = torch.rand(2, 3, 16, 24)
    ours = orl.load_ldm(str(tmp_path), CPU)
    ours.autocast = FP32
    for vqvae in (pipeline.vqvae, ours.vqvae):  # a rounding error at the border of two codes is no difference of method
        vqvae.decode = functools.partial(vqvae.decode, force_not_quantize=True)
    generator = torch.Generator().manual_seed(7)
    expected = pipeline(2 * lr - 1, num_inference_steps=steps, eta=0.0, generator=generator, output_type="np")
    z = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(7))
    sr, calls, *_ = orl.Denoising(ours, steps, 2 * steps).super_resolve(lr, z, None, consistent=False)
    assert calls.tolist() == [steps, steps]
    images = torch.from_numpy(expected.images).permute(0, 3, 1, 2)
    assert images.std() > 0.01  # the comparison is not between two blanks
    torch.testing.assert_close(sr, images, atol=1e-4, rtol=0)


def test_an_untrained_agent_is_the_plain_ldm_with_consistency(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), 3, 5)
    lr, z, agent = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16), orl.Agent(torch.ones(3), 8)
    seen = mdp.observe(mdp.start(lr, z))
    assert agent.policy(*seen).mean.abs().max() < 0.1 and agent.edit_policy(*seen).mean.abs().max() == 0
    (ours, our_calls, *_), (plain, calls, *_) = mdp.super_resolve(lr, z, agent), mdp.super_resolve(lr, z)
    assert our_calls.tolist() == calls.tolist()
    assert 0 < (ours - plain).abs().max() < 0.02  # its noise and stride are near zero, not at it
    agent.actor[-1].weight.data.zero_()
    torch.testing.assert_close(mdp.super_resolve(lr, z, agent)[0], plain)


def test_zero_is_neutral_and_actions_stay_in_their_ranges():
    noise, jump = orl.action_values(torch.tensor([[0.0, 0.0], [100.0, 100.0], [-100.0, -100.0], [1.0, 2.0]]))
    torch.testing.assert_close(noise, torch.tensor([1.0, 1.1, 0.9, 1.02]))
    torch.testing.assert_close(jump, torch.tensor([1.0, 2.0, 0.5, 2.0]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_our_ddim_step_is_the_schedulers_on_its_own_schedule(tmp_path, prediction_type):
    pipeline = tiny_ldm(tmp_path, prediction_type)
    ldm, scheduler = pieces(pipeline), DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    z, lr = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    for t in scheduler.timesteps.tolist():
        at = torch.full((2,), t)
        with torch.no_grad():
            output = pipeline.unet(torch.cat([z, 2 * lr - 1], 1), at).sample
        expected = scheduler.step(output, t, z, eta=0.0).prev_sample
        x0, noise, hidden = ldm.predict(z, at, lr)
        torch.testing.assert_close(pipeline.unet.conv_out(hidden), output, atol=1e-5, rtol=1e-5)  # what the editor sees
        after = (ldm.alphas[t - 100] if t >= 100 else ldm.final_alpha).view(1, 1, 1, 1)
        torch.testing.assert_close(orl.ddim_step(x0, noise, after), expected, atol=1e-5, rtol=1e-5)
        z = expected


def test_an_adaptive_stride_follows_the_formula_exactly(tmp_path):
    """999 -> 849 -> 649 -> 549 -> 499, against float64; DDIMScheduler.step assumes a constant stride and cannot do this."""
    pipeline = tiny_ldm(tmp_path, spacing="trailing")
    ldm = pieces(pipeline)
    mdp = orl.Denoising(ldm, base_steps=10, max_calls=10)
    state = mdp.start(torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    alphas = torch.cat([pipeline.scheduler.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
    visited = [int(state.t)]
    for value in (1.5, 2.0, 1.0, 0.5):
        z, position, done = mdp.advance(state, torch.tensor([[0.0, stride(value)]]), torch.zeros_like(state.x0))
        t = mdp.at(mdp.timesteps, position)
        a, b = alphas[visited[-1]], alphas[int(t)]
        x0, noise = state.x0.double(), state.noise.double()
        torch.testing.assert_close(z.double(), b.sqrt() * x0 + (1 - b).sqrt() * noise, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(state.z.double(), a.sqrt() * x0 + (1 - a).sqrt() * noise, atol=1e-5, rtol=1e-5)
        visited.append(int(t))
        state = mdp.call(state.lr, z, position, state.calls + 1, state.first)
    assert visited == [999, 849, 649, 549, 499] and not done


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_zero_action_visits_the_schedulers_own_timesteps_for_every_number_of_steps(tmp_path, spacing, monkeypatch):
    ldm, visited = pieces(tiny_ldm(tmp_path, spacing=spacing)), []

    def predict(z, t, lr):  # what is asked here is when the U-Net is called, not what it says
        visited.append(int(t))
        return z, z, z

    monkeypatch.setattr(ldm, "predict", predict)
    for steps in range(1, 101):
        visited.clear()
        calls = orl.Denoising(ldm, steps, 2 * steps).super_resolve(torch.rand(1, 3, 1, 1), torch.randn(1, 3, 1, 1), None)[1]
        ldm.scheduler.set_timesteps(steps)
        own = [t for t in ldm.scheduler.timesteps.tolist() if t >= 0]  # "trailing" at 61 steps: 61, and then -1
        assert visited == own and int(calls) == steps


def test_noise_is_no_decision_where_the_clean_latent_keeps_none_nor_stride_at_the_last_call(tmp_path):
    mdp, agent = orl.Denoising(pieces(tiny_ldm(tmp_path)), 3, 2), orl.Agent(torch.ones(3), 8)
    *_, steps = mdp.denoise(torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), agent, sample=True)
    ended = [step.slots.tolist() for step in steps]
    assert ended == [[0, 1], [0, 1]]
    assert steps[0].matters.all() and not steps[1].matters.any() and steps[1].logprobs.abs().max() == 0
    torch.testing.assert_close(steps[0].logprobs, agent.policy(steps[0].maps, steps[0].numbers).log_prob(steps[0].actions).sum(1))


def test_the_budget_of_calls_ends_an_episode_with_the_clean_latent(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), base_steps=100, max_calls=6)
    assert mdp.super_resolve(torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8))[1].tolist() == [6, 6]


def test_consistency_brings_the_downscaled_result_to_the_lr_image(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), 2, 2)
    lr, z = torch.rand(2, 3, 16, 16) / 2 + 0.25, torch.randn(2, 3, 16, 16)
    error = [(orl.downscale(mdp.finish(z, lr, consistent)) - lr).square().mean() for consistent in (False, True)]
    assert error[1] < 0.5 * error[0]


def test_an_image_that_ends_early_leaves_the_others_to_go_on_and_each_gets_its_own_edit(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), 5, 10)
    lr, z = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)

    class Steering:  # the first image of two takes long steps; an edit tells its image by the LR's mean
        def policy(self, maps, numbers):
            mean = torch.zeros(len(maps), 2)
            mean[0, 1] = stride(2.0) if len(maps) == 2 else 0.0
            return orl.Normal(mean, 1.0)

        def edit_policy(self, maps, numbers):
            return orl.Normal(maps[:, 9:12].float().mean(dim=(1, 2, 3), keepdim=True).expand(-1, 3, 16, 16), 1.0)

    sr, calls, steps = mdp.super_resolve(lr, z, Steering())
    assert [step.slots.tolist() for step in steps] == [[0, 1], [0, 1], [0, 1], [1], [1]] and calls.tolist() == [3, 5]
    for slot, step in ((0, steps[2]), (1, steps[4])):  # as each would have been by itself
        own = step.slots.tolist().index(slot)
        z_last, own_lr = mdp.advance(step.state, step.actions, step.edits)[0][own : own + 1], lr[slot : slot + 1]
        torch.testing.assert_close(step.edits[own].mean(), (2 * lr[slot] - 1).mean(), atol=1e-3, rtol=0)
        torch.testing.assert_close(z_last, step.state.x0[own : own + 1] + step.edits[own : own + 1])  # it is the clean latent
        expected = mdp.finish(z_last, own_lr)
        torch.testing.assert_close(sr[slot : slot + 1], expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- environment, reward, judges


def episodes(folder, images, seed, agent=None, num_envs=6, base_steps=4, max_calls=4, **settings):
    """A rollout of these images without LPIPS, and what it was made with: environment, training images, settings."""
    ldm = orl.load_ldm(str(folder), CPU)
    ldm.autocast = FP32
    train, mdp = orl.load_images(str(images), "train", (), 32, CPU), orl.Denoising(ldm, base_steps, max_calls)
    agent = agent or orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels)
    args = orl.Args(num_envs=num_envs, crop=32, **settings)
    return orl.rollout(mdp, agent, None, train, args, seed), (mdp, train, args)


def test_a_rollout_denoises_every_image_to_its_end_and_pays_the_reward_there(ldm_folder, image_folder):
    torch.manual_seed(0)
    settings = {"gamma": 0.5, "gae_lambda": 1.0, "reward_scale": 1.0}
    (batch, infos), _ = episodes(ldm_folder, image_folder, seed=2, **settings)
    calls = infos["calls"]
    assert len(calls.unique()) > 1  # images of different lengths
    assert all(len(v) == calls.sum() for v in batch.values())
    start = 0
    for call in range(1, int(calls.max()) + 1):  # with lambda 1 a return is the reward of the end, discounted
        running = calls >= call
        got = batch["returns"][start : start + int(running.sum())]
        torch.testing.assert_close(got, (infos["reward"] * 0.5 ** (calls - call))[running])
        start += len(got)


def test_the_same_seed_gives_the_same_episodes(ldm_folder, image_folder):
    agent, runs = orl.Agent(torch.ones(3), 8), []
    for seed in (3, 3, 4):
        (batch, infos), _ = episodes(ldm_folder, image_folder, seed, agent)
        runs.append((infos["reward"], batch["edits"]))
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2])) and runs[0][0].abs().sum() > 0
    assert runs[0][1].shape != runs[2][1].shape or not torch.equal(runs[0][1], runs[2][1])


def test_a_rollout_without_exploration_is_super_resolve(ldm_folder, image_folder, monkeypatch):
    torch.manual_seed(0)
    agent, hr, score = orl.Agent(torch.ones(3), 8), [], orl.score
    agent.editor[-1].bias.data.fill_(0.2)
    agent.logstd.data.fill_(-30), agent.edit_std.fill_(1e-9)
    monkeypatch.setattr(orl, "score", lambda net, sr, target, *rest: hr.append(target) or score(net, sr, target, *rest))
    (_, infos), (mdp, train, _) = episodes(ldm_folder, image_folder, 1, agent)
    torch.manual_seed(1)  # the same draws: crops, then noise
    train.crops(6, 32)
    sr, calls, steps = mdp.super_resolve(orl.downscale(hr[0]), torch.randn(6, 3, 8, 8), agent)
    expected = score(None, sr, hr[0], calls)
    assert all(step.edits.abs().min() > 0.1 for step in steps) and infos["calls"].tolist() == calls.tolist()
    torch.testing.assert_close(infos["reward"], expected["reward"], atol=1e-5, rtol=0)


def test_psnr_is_per_image_then_mean_whatever_the_batch():
    hr = torch.full((2, 3, 16, 16), 0.0)
    sr = torch.stack([torch.full((3, 16, 16), math.sqrt(0.1)), torch.full((3, 16, 16), math.sqrt(0.5))])
    psnr = orl.score(None, sr, hr, torch.ones(2))["psnr"]
    assert psnr.mean().item() == pytest.approx(6.505, abs=1e-3)  # the pooled error would give 5.229
    alone = [orl.score(None, sr[i : i + 1], hr[i : i + 1], torch.ones(1))["psnr"] for i in (0, 1)]
    torch.testing.assert_close(torch.cat(alone), psnr)


def test_a_perfect_image_has_100_db_and_ssim_never_passes_one():
    hr = torch.rand(1, 3, 32, 32)
    found = orl.score(None, hr, hr, torch.tensor([1.0]))
    assert found["psnr"] == 100 and found["ssim"] == pytest.approx(1, abs=1e-5) and found["ssim"] <= 1 + 1e-5


def test_the_reward_is_table_1s_sum_of_terms_in_the_unit_interval():
    class Net(torch.nn.Module):
        def forward(self, a, b, normalize):
            return torch.full((len(a), 1, 1, 1), 0.3)

    hr = torch.rand(1, 3, 32, 32)
    sr, calls = (hr + 0.05 * torch.randn_like(hr)).clamp(0, 1), torch.tensor([4.0])
    found = orl.score(Net(), sr, hr, calls)
    quality = 0.4 * found["psnr"] / 50 + 0.3 * found["ssim"]
    torch.testing.assert_close(found["reward"], quality + 0.2 * 0.7 + 0.1 * 0.96)
    terms = torch.stack([found[f"reward/{k}"] / w for k, w in zip(("psnr", "ssim", "lpips", "efficiency"), orl.Args.reward_weights)])
    assert terms.min() >= 0 and terms.max() <= 1
    without = orl.score(None, sr, hr, calls)
    torch.testing.assert_close(without["reward"], (quality + 0.1 * 0.96) / 0.8)  # renormalised without LPIPS
    assert without["lpips"].isnan().all() and "reward/lpips" not in without


def test_a_shift_moves_the_corner_of_lpips_alone():
    class Net(torch.nn.Module):
        def forward(self, a, b, normalize):
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    (hr, sr), calls = torch.rand(2, 1, 3, 32, 32), torch.tensor([1.0])
    whole, moved = orl.score(Net(), sr, hr, calls), orl.score(Net(), sr, hr, calls, shift=(3, 7))
    torch.testing.assert_close(moved["lpips"], (sr - hr)[..., 3:, 7:].abs().mean().view(1))
    assert moved["lpips"] != whole["lpips"] and moved["psnr"] == whole["psnr"] and moved["ssim"] == whole["ssim"]


def test_the_rewards_weights_are_flags_and_zero_takes_a_term_out():
    hr = torch.rand(2, 3, 32, 32)
    sr, calls = (hr + 0.05 * torch.randn_like(hr)).clamp(0, 1), torch.tensor([4.0, 2.0])
    found = orl.score(None, sr, hr, calls, weights=(1.0, 0.0, 0.5, 0.0))
    torch.testing.assert_close(found["reward"], found["psnr"] / 50)  # the only term that is left, LPIPS being missing
    assert orl.tyro.cli(orl.Args, args=["--reward-weights", "0.3", "0.2", "0.4", "0.1"]).reward_weights == (0.3, 0.2, 0.4, 0.1)


def test_lpips_in_training_is_of_alexnet_on_the_whole_image_and_of_vgg_on_a_part():
    seen = []

    class Net(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, a, b, normalize):
            seen.append((a.shape[-2:], (a - b).abs().max().item()))
            return torch.full((len(a), 1, 1, 1), self.value)

    hr = torch.arange(96.0 * 80).view(1, 1, 96, 80).expand(2, 3, -1, -1) / 7680
    sr = (hr + 0.25).clone()
    mixed = orl.both_lpips(Net(0.2), Net(0.6), 0.25)(sr, hr, normalize=True)
    torch.testing.assert_close(mixed.flatten(), torch.full((2,), 0.75 * 0.2 + 0.25 * 0.6))
    sizes = sorted(tuple(shape) for shape, _ in seen)
    assert sizes == [(64, 64), (96, 80)] and all(error == pytest.approx(0.25, abs=1e-3) for _, error in seen)  # the same part of both


@pytest.mark.skipif(not (SHARED / "torch_home").is_dir(), reason="LPIPS's AlexNet is not on this machine")
def test_lpips_is_torchmetrics_lpips():
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference

    net = orl.load_lpips(CPU)
    hr, sr = torch.rand(2, 2, 3, 64, 64)
    got = orl.score(net, sr, hr, torch.ones(2))["lpips"]
    torch.testing.assert_close(got.mean(), reference(sr, hr, net_type="alex", normalize=True), atol=1e-5, rtol=1e-4)
    assert orl.score(net, hr, hr, torch.ones(2))["lpips"].abs().max() < 1e-6


def test_grid_is_about_one_for_noise_and_far_above_ten_for_a_faint_pattern():
    torch.manual_seed(0)
    noise = eval_sr.grid(torch.rand(8, 3, 128, 128))
    assert 0.5 < noise.mean() < 2
    ramp = torch.linspace(0, 1, 128)
    smooth = (0.3 + 0.2 * ramp.view(1, 1, -1, 1) + 0.1 * ramp).expand(2, 3, -1, -1)
    pattern = (torch.randint(0, 2, (4, 4)) / 255).repeat(32, 32)
    assert eval_sr.grid(smooth + pattern).min() > 100
    assert eval_sr.grid(smooth + pattern + 0.02 * torch.randn(2, 1, 128, 128)).min() > 1  # drowned in texture


def test_weave_sees_a_pattern_that_grid_does_not():
    torch.manual_seed(0)
    cell, noise = torch.randn(4, 4), torch.randn(2, 1, 128, 128)
    signs = 1 - 2 * ((torch.arange(32).view(-1, 1) + torch.arange(32)) % 2).float()
    pattern = torch.kron(signs, cell)
    assert eval_sr.weave(0.5 + 0.1 * noise.expand(-1, 3, -1, -1)).abs().max() < 0.03
    woven = (0.5 + 0.1 * (noise + 0.5 * pattern)).expand(-1, 3, -1, -1)
    assert eval_sr.weave(woven).min() > 0.1 and eval_sr.grid(woven).max() < 3
    wave = torch.sin(torch.arange(128) * 2 * math.pi / 6)  # a period of 6 px, which two cells of 4 px do not have
    assert eval_sr.weave((0.5 + 0.1 * (noise + wave)).expand(-1, 3, -1, -1)).min() > 0.1


def test_the_weave_penalty_sees_what_repeats_in_any_direction_whatever_its_phase_and_not_texture():
    torch.manual_seed(0)
    hr = 0.5 + 0.1 * torch.randn(2, 1, 128, 128).expand(-1, 3, -1, -1)
    texture = 0.5 + 0.1 * torch.randn(2, 1, 128, 128).expand(-1, 3, -1, -1)  # another one of the same kind
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    other = orl.weave_distance(texture, hr)
    assert orl.weave_distance(hr, hr).abs().max() == 0 and 0 < other.min() and other.max() < 5e-4
    for along, phase in ((x, 0), (y, 1), ((x + y) / math.sqrt(2), 2), ((2 * x - y) / math.sqrt(5), 3)):
        wave = 0.1 * torch.sin(2 * math.pi * along / 7 + phase)  # of the size of the texture, a period of 7 px
        assert orl.weave_distance(texture + wave, hr).min() > 10 * other.max()
        assert orl.weave_distance(texture + wave, hr + wave.flip(0, 1)).max() < 2 * other.max()  # HR repeats as well


def test_the_weave_penalty_is_one_more_term_of_the_reward_in_training(ldm_folder, image_folder):
    agent = orl.Agent(torch.ones(3), 8)
    (before, plain), _ = episodes(ldm_folder, image_folder, 3, agent)
    (after, infos), _ = episodes(ldm_folder, image_folder, 3, agent, weave_penalty=0.5)
    term = infos["reward/weave"]
    assert term.max() < 0 and "reward/weave" not in plain
    torch.testing.assert_close(infos["reward"], plain["reward"] + term)
    assert torch.equal(after["edits"], before["edits"]) and not torch.equal(after["credits"], before["credits"])


# ---------------------------------------------------------------- credit


@pytest.mark.parametrize("base_steps", [1, 3])
def test_the_credits_of_all_cells_and_calls_sum_to_the_rewards_change_to_first_order(image_folder, base_steps):
    """On the LDM that ships, whose latent is continuous (a VQModel's decoder quantises what it gets)."""
    torch.manual_seed(0)
    agent = orl.Agent(torch.ones(8), 64)
    agent.logstd.data.fill_(-30)
    rewards = []
    for std in (1e-9, 0.001):  # the same images, actions and noise: what changes is the edits
        agent.edit_std.fill_(std)
        episode = episodes(ROOT / "runs/ldm_x4", image_folder, 2, agent, 8, base_steps=base_steps)
        (batch, infos), _ = episode
        rewards.append(infos["reward"])
    change = rewards[1] - rewards[0]
    assert change.abs().max() > 1e-5 and batch["edits"].std() == pytest.approx(0.001, rel=0.1)
    credits = batch["credits"].sum(dim=(1, 2, 3)).view(base_steps, 8)  # the calls one after the other
    assert all(credits.abs().mean(1) > 1e-7)  # of every call
    assert (credits.sum(0) - change).norm() / change.norm() < 0.05


def test_an_edit_at_the_first_call_reaches_the_image_through_the_second_alone(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), 2, 2)
    lr, z, told = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16), []
    predict = mdp.ldm.predict

    class Editing:
        """Edits the first call alone."""

        def policy(self, maps, numbers):
            return orl.Normal(torch.zeros(len(maps), 2), 1.0)

        def edit_policy(self, maps, numbers):
            told.append(maps)
            return orl.Normal(torch.full((len(maps), 3, 16, 16), 0.5 * (len(told) % 2)), 1.0)

    plain, (edited, _, steps) = mdp.super_resolve(lr, z)[0], mdp.super_resolve(lr, z, Editing())
    assert not torch.equal(plain, edited)
    a, b = (alpha.sqrt() for alpha in (mdp.ldm.alphas[steps[1].state.t[0]], 1 - mdp.ldm.alphas[steps[1].state.t[0]]))
    torch.testing.assert_close(steps[1].state.z, a * (steps[0].state.x0 + 0.5) + b * steps[0].state.noise)
    # the second call's own clean latent, of that latent, is the image: what the first one edited is in nothing else
    x0, *_ = predict(steps[1].state.z, steps[1].state.t, lr)
    torch.testing.assert_close(edited, mdp.finish(x0, lr))


def test_every_call_is_credited_with_the_gradient_through_the_calls_after_it():
    """Against two-sided differences of the reward, with the later edits as they were drawn."""
    torch.manual_seed(0)
    mdp = orl.Denoising(orl.load_ldm(str(ROOT / "runs/ldm_x4"), CPU), 2, 2)
    mdp.ldm.autocast, hr = FP32, torch.rand(1, 3, 16, 16)
    hr = torch.nn.functional.interpolate(hr, scale_factor=3, mode="bicubic").clamp(0, 1)[..., :32, :32]
    lr, z = orl.downscale(hr), torch.randn(1, 8, 8, 8)

    def reward(edits):
        given = iter(edits)
        agent = SimpleNamespace(
            policy=lambda maps, numbers: orl.Normal(torch.zeros(1, 2), 1.0),
            edit_policy=lambda maps, numbers: orl.Normal(next(given), 1.0),
        )
        clean, calls, steps = mdp.denoise(lr, z, agent)
        return orl.score(None, mdp.finish(clean, lr), hr, calls)["reward"].sum(), [step.edits for step in steps]

    zeros = [torch.zeros(1, 8, 8, 8) for _ in range(2)]
    value, edits = reward(zeros)
    gradients = torch.autograd.grad(value, edits)
    for k, gradient in enumerate(gradients):
        way = 0.2 * gradient / gradient.norm()
        with torch.no_grad():
            below, above = (reward([sign * way if j == k else zeros[j] for j in range(2)])[0] for sign in (-1, 1))
        assert above - below > 1e-4
        assert float((gradient * way).sum()) == pytest.approx(float(above - below) / 2, rel=0.05)


def test_ppo_solves_a_bandit_of_maps_whose_best_map_is_known():
    """One-step episodes, R = -(edit - target)^2 a cell: the mean must become the target in every cell of every image."""
    torch.manual_seed(0)
    args, agent = orl.Args(learning_rate=3e-3), orl.Agent(torch.ones(1), 0)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    maps, numbers = torch.randn(32, 6, 8, 8).half(), torch.zeros(32, 4)
    target = 0.5 * maps[:, :1].float().tanh() + 0.2 * maps[:, 1:2].float().clamp(-1, 1)

    def error():
        with torch.no_grad():
            return (agent.edit_policy(maps, numbers).mean - target).square().mean() / target.square().mean()

    assert error() > 0.99
    steps = {"maps": maps, "numbers": numbers, "detail": torch.zeros(32, 3, 8, 8).half(), "actions": torch.zeros(32, 2)}
    steps |= {k: torch.zeros(32) for k in ("values", "advantages", "returns", "logprobs")} | {"matters": torch.ones(32, 2)}
    for left in torch.linspace(1, 0.025, 40).tolist():
        optimizer.param_groups[0]["lr"] = args.learning_rate * left  # rate and spread are annealed, as in a run
        agent.edit_std.fill_(0.3 * (0.25 + 0.75 * left))
        with torch.no_grad():
            policy = agent.edit_policy(maps, numbers)
            edit = policy.sample()
        credit = orl.cell_credit(-2 * (edit - target) / 1000, edit, policy.mean)  # at a small scale of the reward
        edits = {"edits": edit, "edit_logprobs": policy.log_prob(edit), "credits": credit}
        figures = orl.update(agent, optimizer, steps | edits, args)
    assert error() < 0.1
    assert figures["edit_approx_kl"] < 0.2


# ---------------------------------------------------------------- GAE and PPO


def test_gae_matches_a_hand_worked_example():
    rewards, values = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [1.0]])
    advantages, returns = orl.gae(rewards, values, torch.tensor([[False], [False]]), torch.tensor([2.0]), 0.5, 0.5)
    # delta_1 = 2 + 0.5 * 2 - 1 = 2; delta_0 = 1 + 0.5 * 1 - 0.5 = 1; A_0 = 1 + 0.25 * 2 = 1.5
    assert advantages.flatten().tolist() == [1.5, 2.0] and returns.flatten().tolist() == [2.0, 3.0]


def test_gae_is_the_brute_force_sum_and_never_crosses_an_end():
    torch.manual_seed(0)
    T, n, gamma, lam = 12, 5, 0.99, 0.95
    rewards, values, dones, last = torch.randn(T, n), torch.randn(T, n), torch.rand(T, n) < 0.3, torch.randn(n)
    got, _ = orl.gae(rewards, values, dones, last, gamma, lam)
    after = torch.cat([values[1:], last[None]])
    for i in range(n):
        for t in range(T):
            total, weight = 0.0, 1.0
            for k in range(t, T):
                total += weight * float(rewards[k, i] + gamma * after[k, i] * ~dones[k, i] - values[k, i])
                if dones[k, i]:
                    break
                weight *= gamma * lam
            assert float(got[t, i]) == pytest.approx(total, abs=1e-4)


def gradient_of(ratio, advantage):
    """Of the policy loss with respect to the log-probabilities of two samples, advantages +-advantage."""
    logratio = torch.tensor(ratio).log().requires_grad_()
    loss, *_ = orl.clipped_surrogate(logratio, torch.zeros(2), torch.tensor([advantage, -advantage]), 0.2)
    loss.backward()
    return logratio.grad


def test_ppo_raises_the_probability_of_good_actions_and_is_flat_outside_the_clip():
    inside = gradient_of([1.0, 1.0], 1.0)
    assert inside[0] < 0 < inside[1]  # gradient descent: up where the advantage is positive
    beyond = gradient_of([1.3, 0.7], 1.0)  # already moved further than the clip in the right direction
    assert beyond.abs().max() == 0
    wrong_way = gradient_of([0.7, 1.3], 1.0)  # moved in the wrong direction: the pull back stays
    assert wrong_way[0] < 0 < wrong_way[1]


def test_ppo_solves_a_bandit_whose_best_action_is_known():
    """One-step episodes, reward -(a - target)^2: the mean policy must reach the target, also at a small scale."""
    torch.manual_seed(0)
    args, agent, target = orl.Args(learning_rate=3e-3), orl.Agent(torch.ones(1), 0), torch.tensor([0.6, -0.4])
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate)
    maps, numbers, detail = torch.zeros(256, 6, 4, 4).half(), torch.full((256, 4), 0.5), torch.zeros(256, 3, 4, 4).half()
    edits = {k: torch.zeros(256, 1, 4, 4) for k in ("edits", "edit_logprobs", "credits")}
    for _ in range(25):
        with torch.no_grad():
            policy, value = agent.policy(maps, numbers), agent.value(maps, numbers, detail)
            action = policy.sample()
        reward = 0.01 * -(action - target).square().sum(1) * args.reward_scale
        ends = torch.ones(1, 256, dtype=bool)
        estimates = orl.gae(reward[None], value[None], ends, torch.zeros(256), 0.99, 0.95)
        batch = {"maps": maps, "numbers": numbers, "detail": detail, "actions": action, "values": value}
        batch["matters"] = torch.ones(256, 2)
        batch |= {"logprobs": policy.log_prob(action).sum(1), "advantages": estimates[0][0], "returns": estimates[1][0]}
        figures = orl.update(agent, optimizer, batch | edits, args)
    assert (agent.policy(maps[:1], numbers[:1]).mean[0] - target).abs().max() < 0.15
    assert figures["approx_kl"] < 0.2


def test_the_agent_learns_on_an_ldm_that_predicts_noise(ldm_folder, image_folder):
    """CompVis' kind: at pure noise its clean latent is noise divided by a small number, and nothing may rest on it."""
    torch.manual_seed(0)
    agent, rewards = orl.Agent(torch.ones(3), 8), []
    _, (mdp, train, args) = episodes(ldm_folder, image_folder, 0, agent, 32, base_steps=2, max_calls=2)
    assert mdp.ldm.scheduler.config.prediction_type == "epsilon"
    optimizer = torch.optim.Adam(agent.parameters(), lr=2e-3)
    agent.edit_std.fill_(0.3)
    for seed in range(24):
        batch, infos = orl.rollout(mdp, agent, None, train, args, seed)
        orl.update(agent, optimizer, batch, args)
        rewards.append(float(infos["reward"].mean()))
    assert all(math.isfinite(r) for r in rewards)
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.005


# ---------------------------------------------------------------- what else a reader would check


def small_batch(n=16, c=2):
    """Steps of a rollout that never was, of an untrained agent."""
    torch.manual_seed(0)
    agent, maps, numbers = orl.Agent(torch.ones(c), 4), torch.randn(n, 3 * c + 7, 8, 8).half(), torch.randn(n, 4)
    with torch.no_grad():
        policy, edits = agent.policy(maps, numbers), agent.edit_policy(maps, numbers)
        action, edit = policy.sample(), edits.sample()
    batch = {"maps": maps, "numbers": numbers, "detail": torch.rand(n, 3, 8, 8).half(), "actions": action}
    batch |= {"matters": torch.ones(n, 2), "logprobs": policy.log_prob(action).sum(1), "values": torch.zeros(n)}
    batch |= {"advantages": torch.randn(n), "returns": 100 * torch.randn(n)}
    batch |= {"edits": edit, "edit_logprobs": edits.log_prob(edit), "credits": torch.randn(n, c, 8, 8)}
    return agent, batch


def test_each_network_is_clipped_by_its_own_norm_and_the_actors_spread_with_it():
    agent, batch = small_batch()
    args = orl.Args(num_minibatches=1, update_epochs=1, max_grad_norm=0.01)
    named = dict(agent.named_parameters())
    assert {id(p) for group in agent.groups() for p in group} == {id(p) for p in named.values()}
    assert id(named["logstd"]) in {id(p) for p in agent.groups()[2]}
    orl.update(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, args)
    norms = [torch.stack([p.grad.norm() for p in group]).norm().item() for group in agent.groups()]
    assert norms == pytest.approx([0.01] * 3, rel=0.01)  # one norm for all would leave two of them far smaller


def test_what_does_not_matter_moves_nothing():
    agent, batch = small_batch()
    batch["matters"] = torch.zeros(16, 2)
    batch["logprobs"] = torch.zeros(16)
    orl.update(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, orl.Args(num_minibatches=1))
    assert all(p.grad.abs().max() == 0 for p in agent.actor.parameters())
    assert any(p.grad.abs().max() > 0 for p in agent.critic.parameters())


def test_the_detail_that_the_lr_image_lacks_is_the_critics_alone():
    agent, batch = small_batch()
    other = torch.rand(16, 3, 8, 8).half()
    maps, numbers = batch["maps"], batch["numbers"]
    assert not torch.equal(agent.value(maps, numbers, batch["detail"]), agent.value(maps, numbers, other))
    assert "detail" not in orl.Agent.policy.__code__.co_varnames + orl.Agent.edit_policy.__code__.co_varnames


@pytest.mark.parametrize("wrote, clips, final", [("PNDMScheduler", False, False), ("LMSDiscreteScheduler", False, True), ("DDIMScheduler", True, True)])
def test_what_a_schedulers_config_does_not_name_is_as_the_class_that_wrote_it_means_it(tmp_path, capsys, wrote, clips, final):
    tiny_ldm(tmp_path)
    file = tmp_path / "scheduler/scheduler_config.json"
    named = {"_class_name": wrote, "beta_start": 0.0015, "beta_end": 0.0155, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    file.write_text(json.dumps(named))
    ldm = orl.load_ldm(str(tmp_path), CPU)
    assert ldm.scheduler.config.clip_sample == clips and (ldm.final_alpha == 1) == final
    said = capsys.readouterr().out
    assert (f"as {wrote} means it" in said and "clip_sample" in said) == (wrote != "DDIMScheduler")
    marks = {ldm.fingerprint}
    file.write_text(json.dumps(named | {"clip_sample": not clips}))
    marks.add(orl.load_ldm(str(tmp_path), CPU).fingerprint)
    assert len(marks) == 2  # an agent belongs to the noise schedule too
    for change in ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": ""}, {"thresholding": True}, {"prediction_type": "flow"}):
        file.write_text(json.dumps(named | change))
        with pytest.raises(SystemExit):
            orl.load_ldm(str(tmp_path), CPU)
        assert "unreadable" in capsys.readouterr().out


def test_psnr_is_torchmetrics_psnr():
    from torchmetrics.functional.image import peak_signal_noise_ratio as reference

    hr, sr = torch.rand(2, 3, 3, 32, 32)
    expected = reference(sr, hr, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(orl.score(None, sr, hr, torch.ones(3))["psnr"], expected)
