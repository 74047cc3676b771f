"""The method: environment, reward, GAE, PPO. Each test's name is a claim."""

import math

import pytest
import torch
from conftest import SHARED, tiny_ldm
from diffusers import DDIMScheduler
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline

import ppo_ldm_sr as orl
import sr_inputs
import sr_metrics
from sr_metrics import Metrics

CPU = torch.device("cpu")


def pieces(pipeline):
    return orl.LDM(pipeline.unet, pipeline.vqvae, pipeline.scheduler, CPU, bf16=False)


PLAIN = orl.action_for(3)  # the plain LDM's action, of three latent channels
STEERING = {"blend": 0.12, "blend_slope": 0.1, "sharpen": 0.05, "noise": 0.99, "consistency": 0.6, "blend_channel": 0.1, "sharpen_channel": -0.1}


# ---------------------------------------------------------------- denoising


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps, clip_sample", [(1, False), (4, False), (10, True)])
def test_the_null_agent_is_the_stock_pipeline(tmp_path, prediction_type, spacing, steps, clip_sample):
    tiny_ldm(tmp_path, prediction_type, spacing=spacing, clip_sample=clip_sample)
    pipeline = LDMSuperResolutionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    lr = torch.rand(2, 3, 16, 24)
    ours = orl.load_ldm(str(tmp_path), CPU)
    ours.autocast = torch.autocast("cpu", enabled=False)
    expected = pipeline(2 * lr - 1, num_inference_steps=steps, eta=0.0, generator=torch.Generator().manual_seed(7), output_type="np")
    z = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(7))
    mdp = orl.Denoising(ours, base_steps=steps, max_calls=steps)
    sr, calls, _ = mdp.super_resolve(lr, z, mdp.plain)
    assert calls.tolist() == [steps, steps]
    images = torch.from_numpy(expected.images).permute(0, 3, 1, 2)
    assert images.std() > 0.01  # the comparison is not between two blanks
    torch.testing.assert_close(sr, images, atol=1e-4, rtol=0)


def test_an_untrained_agent_is_nearly_the_plain_ldm_and_its_zero_action_exactly(tmp_path):
    ldm = pieces(tiny_ldm(tmp_path))
    values = orl.action_values(PLAIN[None])
    assert {k: v.unique().tolist() for k, v in values.items()} == {k: [c[0]] for k, c in orl.COMPONENTS.items()}
    observation = torch.randn(5, 12, 16, 16), torch.rand(5, 4)
    assert orl.Agent(ldm.latent_channels).mean(*observation).abs().max() < 0.1
    start = orl.action_for(3, **STEERING)
    assert (orl.Agent(3, start).mean(*observation) - start).abs().max() < 0.1


def test_an_action_for_given_values_has_these_values():
    for values in (STEERING, {"stride": 2.5}, {}):
        found = orl.action_values(orl.action_for(4, **values)[None])
        for name, (neutral, *_) in orl.COMPONENTS.items():
            assert found[name].shape == (1, 4 if name.endswith("channel") else 1, 1, 1)
            torch.testing.assert_close(found[name], torch.full_like(found[name], values.get(name, neutral)))


def test_a_channel_is_blended_and_sharpened_by_its_own_number(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), 2, 2)
    s = mdp.begin(torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    action = orl.action_for(3, blend=0.5, sharpen=0.2)[None]
    action[:, 7:] = torch.tensor([1.0, -2.0, 0.0, 0.0, 1.0, -1.0])  # units of 0.3 and 0.15
    blend, sharpen = (m.mean(dim=(0, 2, 3)) for m in mdp.maps(s, action))  # at the first call the deviation is zero
    torch.testing.assert_close(blend, torch.tensor([0.8, 0.0, 0.5]))  # -0.6 is beyond the range: 0.5 - 0.5
    torch.testing.assert_close(sharpen, torch.tensor([0.2, 0.35, 0.05]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_our_ddim_step_is_diffusers_step_on_its_own_grid(tmp_path, prediction_type):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155, clip_sample=False,
                              prediction_type=prediction_type, timestep_spacing="trailing")  # fmt: skip
    pipeline = tiny_ldm(tmp_path)
    pipeline.scheduler = scheduler
    ldm = pieces(pipeline)
    scheduler.set_timesteps(10)
    z, lr = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    for t in scheduler.timesteps.tolist():
        at = torch.full((2,), t)
        output = ldm.unet(torch.cat([z, 2 * lr - 1], 1), at).sample
        expected = scheduler.step(output, t, z, eta=0.0).prev_sample
        x0, noise = ldm.predict(z, at, lr)
        after = ldm.alphas[t - 100 if t >= 100 else -1].view(1, 1, 1, 1)
        ours = orl.ddim_step(x0, noise, after)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        z = expected


def test_an_adaptive_stride_follows_the_formula_exactly(tmp_path):
    """999 -> 700 -> 100 -> clean, against float64; DDIMScheduler.step assumes a constant stride and cannot do this."""
    pipeline = tiny_ldm(tmp_path, spacing="trailing")
    ldm = pieces(pipeline)
    mdp = orl.Denoising(ldm, base_steps=10, max_calls=10)
    state = mdp.begin(torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8))
    alphas = torch.cat([pipeline.scheduler.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
    visited = [int(state.t)]
    for stride in (2.99, 5.0, 1.01):  # 999 - 299 = 700; 5 is the limit: 700 - 500 = 200; 200 - 101 = 99
        action = orl.action_for(3, stride=stride)[None]
        z, t, done = mdp.advance(state, action)
        a, b = alphas[visited[-1]], alphas[int(t)]
        x0, noise = state.x0.double(), state.noise.double()
        torch.testing.assert_close(z.double(), b.sqrt() * x0 + (1 - b).sqrt() * noise, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(state.z.double(), a.sqrt() * x0 + (1 - a).sqrt() * noise, atol=1e-5, rtol=1e-5)
        visited.append(int(t))
        x0, noise = ldm.predict(z, t, state.lr)
        state = orl.State(state.lr, z, t, state.calls + 1, x0, noise, state.mean)
    assert visited == [999, 700, 200, 99] and not done


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_every_number_of_steps_stays_on_the_table_and_costs_that_many_calls(tmp_path, steps):
    ldm = pieces(tiny_ldm(tmp_path, spacing="trailing"))
    assert ldm.first_timestep(steps) == 999
    mdp = orl.Denoising(ldm, steps, steps)
    _, calls, trace = mdp.super_resolve(torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4), mdp.plain)
    assert int(calls) == steps and all(0 <= int(t) <= 999 for _, t, _ in trace)


def test_the_budget_of_calls_ends_an_episode_with_the_clean_latent(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), base_steps=100, max_calls=6)
    _, calls, _ = mdp.super_resolve(torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), mdp.plain)
    assert calls.tolist() == [6, 6]


def test_consistency_brings_the_downscaled_result_to_the_lr_image(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), 2, 2)
    lr, z, on = torch.rand(2, 3, 16, 16) / 2 + 0.25, torch.randn(2, 3, 16, 16), orl.action_for(3, consistency=1.0)
    error = [(orl.downscale(mdp.finish(z, lr, a.expand(2, -1))) - lr).square().mean() for a in (PLAIN, on)]
    assert error[1] < 0.5 * error[0]


def test_slopes_act_where_x0_strays_from_the_posterior_mean_and_nowhere_at_the_first_call():
    mean, x0 = torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16)
    x0[..., :8] = 0.1 * torch.randn(8)
    x0[..., 8:] = torch.randn(8)
    far = orl.deviation(x0, mean)
    assert far[..., 9:].min() > far[..., :7].max()
    torch.testing.assert_close(far.mean(dim=(2, 3)), torch.zeros(1, 2), atol=1e-5, rtol=0)
    assert orl.deviation(x0, x0).abs().max() == 0


def test_an_image_that_ends_early_leaves_the_others_to_go_on(tmp_path):
    mdp = orl.Denoising(pieces(tiny_ldm(tmp_path)), 5, 10)
    lr, z = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    stride = list(orl.COMPONENTS).index("stride")

    def policy(maps, numbers):  # the first image of two takes long steps
        action = PLAIN.expand(len(maps), -1).clone()
        action[0, stride] = 2.0 if len(maps) == 2 else 0.0
        return action

    seen = list(mdp.steps(lr, z, policy))
    assert [slots.tolist() for slots, *_ in seen] == [[0, 1], [0, 1], [1], [1], [1]]
    assert [done.tolist() for *_, done in seen] == [[False, False], [True, False], [False], [False], [True]]
    sr, calls, trace = mdp.super_resolve(lr, z, policy)
    assert calls.tolist() == [2, 5] and [t.tolist() for _, t, _ in trace] == [s.t.tolist() for _, s, *_ in seen]
    for slot in (0, 1):  # as each would have been by itself
        *_, (_, s, action, z_last, _) = [step for step in seen if slot in step[0].tolist()]
        own = (seen[1] if slot == 0 else seen[-1])[0].tolist().index(slot)
        torch.testing.assert_close(sr[slot : slot + 1], mdp.finish(z_last[own : own + 1], lr[slot : slot + 1], action[own : own + 1]))
    blend, sharpen = mdp.maps(s, action)
    assert blend.shape == sharpen.shape == (1, 3, 16, 16) and blend.min() >= 0 and sharpen.min() >= -0.5


# ---------------------------------------------------------------- environment and reward


def test_the_search_for_the_best_constant_action_finds_a_known_one(ldm_folder, image_folder, monkeypatch):
    """On a reward whose maximum is known; the search itself sees only what `evaluate` says."""
    env = make_env(ldm_folder, image_folder)
    low, high = (orl.action_for(3, **{k: v[end] for k, v in orl.COMPONENTS.items()}) for end in (1, 2))
    target = (2 * torch.randn(13, generator=torch.Generator().manual_seed(0))).clamp(low, high)

    def known(mdp, scenes, reward, policy, indices, crop, seed):
        action = policy(torch.zeros(1, 1), None)[0]
        assert (action >= low - 1e-6).all() and (action <= high + 1e-6).all()
        return {"reward": -(action - target).square().sum()[None]}

    monkeypatch.setattr(orl, "evaluate", known)
    action, best = orl.search_constant(env.mdp, env.scenes, env.reward, 32, 0)
    assert (action - target).abs().max() < 1.1 and best == known(None, None, None, orl.constant_policy(action), None, 0, 0)["reward"] > -4
    monkeypatch.undo()
    (one, reward), (two, again) = (orl.search_constant(env.mdp, env.scenes, env.reward, 32, 0, images=4) for _ in range(2))
    assert torch.equal(one, two) and reward == again
    found = orl.evaluate(env.mdp, env.scenes, env.reward, env.mdp.plain, torch.randperm(len(env.scenes), generator=torch.Generator().manual_seed(0))[:4].tolist(), 32, 0)
    assert reward > found["reward"].mean()


def make_env(folder, images, num_envs=3, lpips=None, seed=0, **mdp):
    ldm = orl.load_ldm(str(folder), CPU)
    scenes = sr_inputs.load_scenes(str(images), "train")
    return orl.DenoisingEnv(orl.Denoising(ldm, **{"base_steps": 4, "max_calls": 4, **mdp}), scenes, orl.Reward(Metrics(lpips, CPU)), num_envs, 32, seed)


@torch.no_grad()
def test_a_slot_that_ends_gets_the_next_image_at_once_and_others_go_on(ldm_folder, image_folder):
    env = make_env(ldm_folder, image_folder)
    env.reset(seed=0)
    action = PLAIN.repeat(3, 1)
    action[0] = orl.action_for(3, stride=4.0)  # the first slot ends at once
    before = env.hr.clone()
    _, reward, terminated, truncated, info = env.step(action)
    assert terminated.tolist() == [True, False, False] and not truncated.any()
    assert reward[0] != 0 and reward[1:].abs().sum() == 0
    assert not torch.equal(env.hr[0], before[0]) and torch.equal(env.hr[1:], before[1:])
    assert env.state.calls.tolist() == [1, 2, 2] and int(env.state.t[0]) == env.mdp.t_first
    assert torch.equal(env.state.mean[0], env.state.x0[0]) and not torch.equal(env.state.mean[1], env.state.x0[1])
    assert torch.equal(env.state.lr[0], orl.downscale(env.hr[:1])[0]) and info["denoiser_calls"].tolist() == [1]


@torch.no_grad()
def test_the_same_seed_gives_the_same_episodes(ldm_folder, image_folder):
    runs = []
    for _ in range(2):
        env = make_env(ldm_folder, image_folder)
        env.reset(seed=3)
        runs.append(torch.stack([env.step(torch.full((3, 13), 0.3))[1] for _ in range(6)]))
    assert torch.equal(*runs) and runs[0].abs().sum() > 0


@torch.no_grad()
def test_an_episode_of_the_environment_is_super_resolve(ldm_folder, image_folder):
    env = make_env(ldm_folder, image_folder)
    env.reset(seed=1)
    hr, s, action = env.hr.clone(), env.state, orl.action_for(3, **STEERING).expand(3, -1)
    sr, calls, _ = env.mdp.super_resolve(s.lr.clone(), s.z.clone(), lambda maps, numbers: action[: len(maps)])
    metrics, bicubic = env.reward.metrics(sr, hr), env.reward.metrics(orl.upscale(s.lr), hr)
    expected = env.reward(metrics, calls) - env.reward(bicubic, 0.0)
    for _ in range(4):
        _, reward, done, _, _ = env.step(action)
    assert done.all()
    torch.testing.assert_close(reward, expected, atol=2e-3, rtol=0)  # bf16 where the processor has it


def test_psnr_is_per_image_then_mean_whatever_the_batch():
    hr = torch.full((2, 3, 16, 16), 0.0)
    sr = torch.stack([torch.full((3, 16, 16), math.sqrt(0.1)), torch.full((3, 16, 16), math.sqrt(0.5))])
    reward = orl.Reward(Metrics(None, CPU))
    psnr = reward.metrics(sr, hr)["psnr"]
    assert psnr.mean().item() == pytest.approx(6.505, abs=1e-3)  # the pooled error would give 5.229
    alone = [reward.metrics(sr[i : i + 1], hr[i : i + 1])["psnr"] for i in (0, 1)]
    torch.testing.assert_close(torch.cat(alone), psnr)


def test_metrics_clamp_the_output_and_ssim_never_passes_one():
    reward, hr = orl.Reward(Metrics(None, CPU)), torch.rand(1, 3, 32, 32).round()
    wild = hr * 3 - 1  # -1 and 2: after clamping it is the HR image
    found = reward.metrics(wild, hr)
    assert found["psnr"] == 100 and found["ssim"] == pytest.approx(1, abs=1e-5) and found["ssim"] <= 1 + 1e-5


def test_the_reward_is_table_1s_sum_of_terms_in_the_unit_interval():
    reward = orl.Reward(Metrics(torch.nn.Identity(), CPU))
    metrics = {"psnr": torch.tensor([25.0]), "ssim": torch.tensor([0.5]), "lpips": torch.tensor([0.3])}
    assert reward(metrics, torch.tensor([4])).item() == pytest.approx(0.4 * 0.5 + 0.3 * 0.5 + 0.2 * 0.7 + 0.1 * 0.96)
    without = orl.Reward(Metrics(None, CPU))(metrics | {"lpips": torch.tensor([math.nan])}, torch.tensor([4]))
    assert without.item() == pytest.approx((0.4 * 0.5 + 0.3 * 0.5 + 0.1 * 0.96) / 0.8)  # renormalised without LPIPS


def test_ssim_is_torchmetrics_ssim_for_any_size():
    from torchmetrics.functional.image import structural_similarity_index_measure as reference

    for size in ((128, 128), (97, 61), (16, 200)):
        hr = torch.nn.functional.avg_pool2d(torch.rand(3, 3, *size), 5, stride=1, padding=2)
        sr = (hr + torch.tensor([0.0, 0.02, 0.2]).view(3, 1, 1, 1) * torch.randn(3, 3, *size)).clamp(0, 1)
        ours = sr_metrics.structural_similarity(sr, hr)
        torch.testing.assert_close(ours, reference(sr, hr, data_range=1.0, reduction="none"), atol=1e-5, rtol=0)
        assert ours[0] > ours[1] > ours[2]


@pytest.mark.skipif(not (SHARED / "torch_home").is_dir(), reason="LPIPS's AlexNet is not on this machine")
def test_lpips_is_its_packages_and_torchmetrics_and_costs_hr_once():
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as reference

    package = sr_metrics.load_lpips(str(SHARED / "torch_home/hub/checkpoints" / sr_metrics.ALEXNET))
    ours = Metrics(package, CPU)
    hr, sr = torch.rand(2, 3, 64, 64), torch.rand(4, 3, 64, 64)  # two versions of two images
    got = ours.lpips(sr, hr)
    torch.testing.assert_close(got, package(sr, hr.repeat(2, 1, 1, 1), normalize=True).view(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[:2].mean(), reference(sr[:2], hr, net_type="alex", normalize=True), atol=1e-5, rtol=1e-4)
    assert ours.lpips(hr, hr).abs().max() < 1e-6
    seen = []
    package.net.register_forward_hook(lambda net, inputs, output: seen.append(len(inputs[0])))
    ours.lpips(sr, hr)
    assert seen == [4, 2]


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


def loss_of(ratio, advantage):
    """The policy loss for two samples of the given ratio whose normalised advantages are +-advantage."""
    logratio = torch.tensor(ratio).log().requires_grad_()
    zeros = torch.zeros(2)
    loss, _ = orl.ppo_loss(logratio, zeros, torch.tensor([advantage, -advantage]), zeros, zeros, zeros, zeros, orl.Args())
    loss.backward()
    return logratio.grad


def test_ppo_raises_the_probability_of_good_actions_and_is_flat_outside_the_clip():
    inside = loss_of([1.0, 1.0], 1.0)
    assert inside[0] < 0 < inside[1]  # gradient descent: up where the advantage is positive
    beyond = loss_of([1.3, 0.7], 1.0)  # already moved further than the clip in the right direction
    assert beyond.abs().max() == 0
    wrong_way = loss_of([0.7, 1.3], 1.0)  # moved in the wrong direction: the pull back stays
    assert wrong_way[0] < 0 < wrong_way[1]


def test_ppo_solves_a_bandit_whose_best_action_is_known():
    """One-step episodes, reward -(a - target)^2: the mean policy must reach the target, also at a small scale."""
    torch.manual_seed(0)
    args = orl.Args(learning_rate=3e-3, minibatch_size=64)
    agent, target = orl.Agent(1), torch.tensor([0.6, -0.4, 0.2, 0.8, -0.7, 0.1, 0.5, -0.3, 0.4])
    optimizer, generator = torch.optim.Adam(agent.parameters(), lr=args.learning_rate), torch.Generator().manual_seed(0)
    maps, numbers, error = torch.zeros(1, 256, 6, 8, 8).half(), torch.full((1, 256, 4), 0.5), torch.zeros(1, 256, 1, 8, 8).half()
    for _ in range(40):
        with torch.no_grad():
            action, logprob, _, value = agent.action_and_value(maps[0], numbers[0], error[0], generator=generator)
        reward = 0.01 * -(action - target).square().sum(1) * args.reward_scale
        batch = {"maps": maps, "numbers": numbers, "error": error, "actions": action[None], "logprobs": logprob[None], "values": value[None]}
        batch["advantages"], batch["returns"] = orl.gae(reward[None], value[None], torch.ones(1, 256, dtype=bool), torch.zeros(256), 0.99, 0.95)
        figures = orl.update(agent, optimizer, batch, args, generator)
    assert (agent.mean(maps[0, :1], numbers[0, :1])[0] - target).abs().max() < 0.15
    assert figures["approx_kl"] < 0.2
