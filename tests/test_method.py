"""The method: environment, action mask, cell-wise advantage, GAE, PPO. Each test's name is a claim."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_ldm
from diffusers import DDIMScheduler
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline
from torch.distributions import Normal

import ppo_ldm_sr as orl

CPU = torch.device("cpu")
BICUBIC, SHARP, BLURRED = orl.Sensor(), orl.Sensor(0.29), orl.Sensor(0.15, lr_noise=2)


def in_float32(ldm):
    ldm.autocast = torch.autocast("cpu", enabled=False)
    return ldm


def ldm_of(pipeline):
    return in_float32(orl.LDM(pipeline.unet, pipeline.vqvae, pipeline.scheduler, CPU))


@pytest.fixture
def ldm(tmp_path):
    return ldm_of(tiny_ldm(tmp_path))


class Scripted:
    """An agent whose strides and edits are given, one of each for every NFE, then strides of 1 and edits of 0."""

    def __init__(self, strides=(), edits=(), channels=3):
        self.strides, self.edits, self.channels = iter(strides), iter(edits), channels

    def policy(self, spatial_obs, scalar_obs):
        stride = torch.as_tensor(next(self.strides, 1.0), dtype=torch.float32)
        return Normal((2 * stride.log2()).expand(len(spatial_obs)), 1.0)

    def edit_policy(self, spatial_obs, scalar_obs):
        n, _, h, w = spatial_obs.shape
        edit = torch.as_tensor(next(self.edits, 0.0), dtype=torch.float32)
        return Normal(edit.expand(n, self.channels, h, w), 1.0)


def record(env):
    """-> a list that gets z, t, x0 and eps of every NFE of this environment."""
    calls, predict = [], env.ldm.predict

    def recording(z, t, lr):
        x0, eps, hidden = predict(z, t, lr)
        calls.append(SimpleNamespace(z=z, t=t, x0=x0, eps=eps, hidden=hidden))
        return x0, eps, hidden

    env.ldm.predict = recording
    return calls


# ---------------------------------------------------------------- frozen LDM and denoising


CASES = [("epsilon", "leading", 1, False), ("epsilon", "leading", 10, True), ("v_prediction", "trailing", 3, False)]
CASES += [("v_prediction", "linspace", 10, True), ("epsilon", "trailing", 3, False), ("sample", "linspace", 3, False)]


@pytest.mark.parametrize("prediction_type, spacing, steps, clip_sample", CASES)
def test_the_null_agent_is_the_stock_pipeline(tmp_path, prediction_type, spacing, steps, clip_sample):
    tiny_ldm(tmp_path, prediction_type, spacing=spacing, clip_sample=clip_sample)
    pipeline = LDMSuperResolutionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    ldm, lr = in_float32(orl.load_ldm(str(tmp_path), CPU)), torch.rand(2, 3, 16, 24)
    for vqvae in (pipeline.vqvae, ldm.vqvae):  # a rounding error between two codes is no difference of method
        vqvae.decode = functools.partial(vqvae.decode, force_not_quantize=True)
    generator = torch.Generator().manual_seed(7)
    expected = pipeline(2 * lr - 1, num_inference_steps=steps, eta=0.0, generator=generator, output_type="np")
    z = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(7))
    sr, nfe, _ = orl.DenoisingEnv(ldm, steps, 2 * steps).super_resolve(lr, z, back_projection=False)
    images = torch.from_numpy(expected.images).permute(0, 3, 1, 2)
    assert nfe.tolist() == [steps, steps] and images.std() > 0.01  # it is no comparison of two blanks
    torch.testing.assert_close(sr, images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_ddim_step_is_the_schedulers_on_its_own_schedule(tmp_path, prediction_type):
    pipeline = tiny_ldm(tmp_path, prediction_type)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    env, z, lr = orl.DenoisingEnv(ldm_of(pipeline), 10, 10), torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    calls = record(env)
    with torch.no_grad():
        clean, *_ = env.denoise(lr, z)
        for call, t in zip(calls, scheduler.timesteps.tolist(), strict=True):
            torch.testing.assert_close(call.z, z, atol=1e-5, rtol=1e-5)
            output = pipeline.unet(torch.cat([z, 2 * lr - 1], 1), t).sample
            torch.testing.assert_close(pipeline.unet.conv_out(call.hidden), output, atol=1e-5, rtol=1e-5)
            z = scheduler.step(output, t, z, eta=0.0).prev_sample
    torch.testing.assert_close(clean, z, atol=1e-5, rtol=1e-5)


def test_an_adaptive_stride_and_its_edits_follow_the_formula_exactly(tmp_path):
    """Against float64; DDIMScheduler.step assumes a constant stride and cannot do this."""
    pipeline = tiny_ldm(tmp_path, spacing="trailing")
    env, edits = orl.DenoisingEnv(ldm_of(pipeline), 10, 5), torch.randn(5, 1, 3, 8, 8)
    calls = record(env)
    clean, *_ = env.denoise(torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8), Scripted([1.5, 2.0, 1.0, 0.5], edits))
    assert [int(call.t) for call in calls] == [999, 849, 649, 549, 499]
    for k, call in enumerate(calls):
        a, x0, eps = pipeline.scheduler.alphas_cumprod.double()[call.t], call.x0.double(), call.eps.double()
        torch.testing.assert_close(call.z.double(), a.sqrt() * x0 + (1 - a).sqrt() * eps, atol=1e-5, rtol=1e-5)
        if k < 4:
            b = pipeline.scheduler.alphas_cumprod.double()[calls[k + 1].t]
            expected = b.sqrt() * (x0 + edits[k]) + (1 - b).sqrt() * eps
            torch.testing.assert_close(calls[k + 1].z.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(clean, calls[-1].x0 + edits[-1])  # the NFE are spent: it is the clean latent


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_zero_action_visits_the_schedulers_own_timesteps_for_every_number_of_steps(tmp_path, spacing):
    ldm, visited = ldm_of(tiny_ldm(tmp_path, spacing=spacing)), []
    ldm.predict = lambda z, t, lr: visited.append(int(t)) or (z, z, z)  # only when it is called counts here
    lr, z = torch.rand(1, 3, 1, 1), torch.randn(1, 3, 1, 1)
    for steps in range(1, 101):
        visited.clear()
        _, nfe, _ = orl.DenoisingEnv(ldm, steps, 2 * steps).denoise(lr, z, None)
        ldm.scheduler.set_timesteps(steps)
        own = [t for t in ldm.scheduler.timesteps.tolist() if t >= 0]  # "trailing" at 61 steps: 61, and then -1
        assert visited == own and int(nfe) == steps


def test_a_zero_action_is_one_base_step_and_strides_stay_in_their_range():
    strides = orl.stride_of(torch.tensor([0.0, 100.0, -100.0, 1.0]))
    torch.testing.assert_close(strides, torch.tensor([1.0, 2.0, 0.5, math.sqrt(2)]))


def test_an_untrained_agent_is_the_unsteered_ldm(ldm):
    env, agent = orl.DenoisingEnv(ldm, 3, 5), orl.Agent(torch.ones(3), 8)
    lr, z = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    (unsteered, nfe, _), (sr, its_nfe, steps) = env.super_resolve(lr, z), env.super_resolve(lr, z, agent)
    assert its_nfe.tolist() == nfe.tolist() and (sr - unsteered).abs().max() < 0.02  # its stride is near 1
    assert all(step.edits.abs().max() == 0 and step.actions.abs().max() < 0.1 for step in steps)
    agent.actor[-1].weight.data.zero_()
    torch.testing.assert_close(env.super_resolve(lr, z, agent)[0], unsteered)


def test_an_image_that_ends_early_leaves_the_others_to_go_on_and_keeps_its_own_edits(ldm):
    env = orl.DenoisingEnv(ldm, 5, 10)
    lr, z = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    edits = [torch.randn(2, 3, 16, 16) for _ in range(3)] + [torch.randn(1, 3, 16, 16) for _ in range(2)]
    sr, nfe, steps = env.super_resolve(lr, z, Scripted([torch.tensor([2.0, 1.0])] * 3, edits))
    assert [step.env_ids.tolist() for step in steps] == [[0, 1]] * 3 + [[1]] * 2 and nfe.tolist() == [3, 5]
    for i, strides in ((0, [2.0] * 3), (1, [1.0] * 5)):
        own = [edit[i : i + 1] if len(edit) == 2 else edit for edit in edits]
        alone, *_ = env.super_resolve(lr[i : i + 1], z[i : i + 1], Scripted(strides, own))
        torch.testing.assert_close(sr[i : i + 1], alone, atol=1e-4, rtol=1e-4)
    assert not torch.equal(env.super_resolve(lr, z, Scripted([torch.tensor([2.0, 1.0])] * 3))[0], sr)


# ---------------------------------------------------------------- the action mask


@pytest.mark.parametrize("base_steps, max_nfe", [(3, 5), (3, 3), (2, 2), (1, 4)])
def test_a_stride_is_masked_exactly_where_it_cannot_change_the_outcome(ldm, base_steps, max_nfe):
    """After every beginning, the least and the greatest stride, then strides of 1: NFE and clean latent."""
    env, lr, z = orl.DenoisingEnv(ldm, base_steps, max_nfe), torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    masks, strides = {}, (0.5, 1.0, 2.0)
    for before in itertools.chain.from_iterable(itertools.product(strides, repeat=k) for k in range(3)):
        outcomes = [env.denoise(lr, z, Scripted([*before, stride])) for stride in (0.5, 2.0)]
        (a, a_nfe, a_steps), (b, b_nfe, b_steps) = outcomes
        if len(a_steps) > len(before):  # else the image had ended already
            masks[before] = bool(a_steps[len(before)].action_mask)
            assert masks[before] == bool(b_steps[len(before)].action_mask)
            assert masks[before] == (int(a_nfe) != int(b_nfe) or not torch.equal(a, b)), before
    if base_steps == 3:
        assert masks[()] and masks[(1.0,)] and not masks[(2.0,)]  # whatever comes after a stride of 2 ends it


def test_a_masked_stride_has_no_logprob_and_the_last_nfe_has_no_stride(ldm):
    env, agent = orl.DenoisingEnv(ldm, 3, 2), orl.Agent(torch.ones(3), 8)
    *_, (first, last) = env.denoise(torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), agent, sample=True)
    assert first.action_mask.all() and not last.action_mask.any() and (last.logprobs == 0).all()
    expected = agent.policy(first.spatial_obs, first.scalar_obs).log_prob(first.actions)
    torch.testing.assert_close(first.logprobs, expected)


def small_batch(n=16, c=2, side=8):
    """Steps of a rollout that never was, of an untrained agent."""
    torch.manual_seed(0)
    agent = orl.Agent(torch.ones(c), 4)
    batch = {"spatial_obs": torch.randn(n, 3 * c + 7, side, side).half(), "scalar_obs": torch.randn(n, 4)}
    with torch.no_grad():
        policy, edit_policy = agent.policy(**batch), agent.edit_policy(**batch)
        action, edit = policy.sample(), edit_policy.sample()
    batch |= {"actions": action, "action_mask": torch.ones(n, dtype=torch.bool), "logprobs": policy.log_prob(action)}
    batch |= {"hr_residual": torch.rand(n, 3, side, side).half(), "values": torch.zeros(n)}
    batch |= {"advantages": torch.randn(n), "returns": 100 * torch.randn(n)}
    batch |= {"edits": edit, "edit_logprobs": edit_policy.log_prob(edit)}
    batch["cell_advantages"] = torch.randn(n, c, side, side)
    return agent, batch


def gradients_of(agent, batch, **settings):
    """One pass of `update` at a learning rate of zero -> gradients of editor, critic and actor, one vector each."""
    args = orl.Args(num_minibatches=1, update_epochs=1, **settings)
    figures = orl.update(agent, torch.optim.SGD(agent.parameters(), lr=0.0), batch, args)
    return [torch.cat([p.grad.flatten() for p in group]) for group in agent.groups()], figures


def test_a_masked_stride_moves_no_ratio_and_no_weight_of_the_actor():
    agent, batch = small_batch()
    batch["action_mask"][:8] = False
    batch["logprobs"] = batch["logprobs"] * batch["action_mask"]
    (*_, before), _ = gradients_of(agent, batch)
    actions = torch.where(batch["action_mask"], batch["actions"], batch["actions"] + 3)
    (*_, after), figures = gradients_of(agent, batch | {"actions": actions})
    torch.testing.assert_close(after, before)
    assert before.abs().max() > 0 and figures["approx_kl"].abs() < 1e-6 and figures["clipfrac"] == 0
    nothing = {"action_mask": torch.zeros(16, dtype=torch.bool), "logprobs": torch.zeros(16)}
    (editor, critic, actor), _ = gradients_of(agent, batch | nothing)
    assert actor.abs().max() == 0 and critic.abs().max() > 0 and editor.abs().max() > 0


# ---------------------------------------------------------------- rollout


def episodes(folder, images, seed, agent=None, base_steps=4, max_nfe=4, sensor=BICUBIC, **settings):
    """A rollout of these images, and what it was made with: environment, training images, settings."""
    ldm = in_float32(orl.load_ldm(str(folder), CPU))
    train, env = orl.load_images(str(images), "train", (), 32, CPU), orl.DenoisingEnv(ldm, base_steps, max_nfe, sensor)
    agent = agent or orl.Agent(torch.ones(ldm.latent_channels), ldm.hidden_channels)
    args = orl.Args(**{"num_envs": 6, "crop": 32} | settings)
    return orl.rollout(env, agent, None, train, args, seed), (env, train, args)


def test_a_rollout_denoises_every_image_to_its_end_and_pays_the_reward_there(ldm_folder, image_folder):
    agent, settings = orl.Agent(torch.ones(3), 8), {"gamma": 0.5, "gae_lambda": 1.0, "reward_scale": 1.0}
    agent.logstd.data.fill_(0.5)  # strides of all lengths
    (batch, infos), _ = episodes(ldm_folder, image_folder, 2, agent, max_nfe=6, **settings)
    nfe, start = infos["nfe"], 0
    assert len(nfe.unique()) > 1 and all(len(v) == nfe.sum() for v in batch.values())
    for k in range(1, int(nfe.max()) + 1):  # with lambda 1 a return is the reward of the end, discounted
        running = nfe >= k
        got = batch["returns"][start : start + int(running.sum())]
        torch.testing.assert_close(got, (infos["reward"] * 0.5 ** (nfe - k))[running])
        start += len(got)


def test_the_same_seed_gives_the_same_episodes_and_another_seed_others(ldm_folder, image_folder):
    agent, runs = orl.Agent(torch.ones(3), 8), []
    for seed in (3, 3, 4):
        (_, infos), _ = episodes(ldm_folder, image_folder, seed, agent, sensor=BLURRED)
        runs.append(infos["reward"])
    assert torch.equal(runs[0], runs[1]) and not torch.isclose(runs[0], runs[2], atol=1e-6).any()


@pytest.mark.parametrize("sensor", [BICUBIC, BLURRED])
def test_a_rollout_without_exploration_is_super_resolve_of_what_the_sensor_sees(ldm, image_folder, sensor):
    torch.manual_seed(0)
    agent, env, seen = orl.Agent(torch.ones(3), 8), orl.DenoisingEnv(ldm, 4, 4, sensor), {}
    agent.editor[-1].bias.data.fill_(0.2)
    agent.logstd.data.fill_(-30)
    agent.edit_std.fill_(1e-9)
    hr = torch.stack([orl.load_images(str(image_folder), "train", (), 32, CPU).centre(i, 1, 32) for i in range(6)])
    denoise = env.denoise
    env.denoise = lambda lr, z, *rest, **how: seen.update(lr=lr, z=z) or denoise(lr, z, *rest, **how)
    images, args = SimpleNamespace(crops=lambda n, size: hr), orl.Args(num_envs=6, crop=32)
    _, infos = orl.rollout(env, agent, None, images, args, 1)
    noise = 255 * (seen["lr"] - sensor.downscale(hr).clamp(0, 1))
    assert noise.std().item() == pytest.approx(sensor.lr_noise, abs=0.2)  # it is in what the models see
    sr, nfe, steps = env.super_resolve(seen["lr"], seen["z"], agent)
    assert all(step.edits.abs().min() > 0.1 for step in steps) and infos["nfe"].tolist() == nfe.tolist()
    torch.testing.assert_close(infos["reward"], orl.score(None, sr, hr, nfe)["reward"], atol=1e-5, rtol=0)


def test_the_periodicity_penalty_is_one_more_term_of_the_reward_in_training(ldm_folder, image_folder):
    agent = orl.Agent(torch.ones(3), 8)
    (before, without), _ = episodes(ldm_folder, image_folder, 3, agent)
    (after, infos), _ = episodes(ldm_folder, image_folder, 3, agent, periodicity_penalty=0.5)
    (added,) = (value for name, value in infos.items() if name.startswith("reward/") and name not in without)
    torch.testing.assert_close(infos["reward"], without["reward"] + added)
    assert added.max() < 0 and torch.equal(after["edits"], before["edits"])
    assert not torch.equal(after["cell_advantages"], before["cell_advantages"])


# ---------------------------------------------------------------- cell-wise advantage


@pytest.mark.parametrize("base_steps", [1, 3])
def test_the_cell_wise_advantages_sum_to_the_rewards_change_to_first_order(image_folder, base_steps):
    """On the LDM that ships, whose latent is continuous (a VQModel's decoder quantises what it gets)."""
    torch.manual_seed(0)
    agent, rewards = orl.Agent(torch.ones(8), 64), []
    agent.logstd.data.fill_(-30)
    for std in (1e-9, 0.001):  # the same images, strides and noise: what changes is the edits
        agent.edit_std.fill_(std)
        steps = {"base_steps": base_steps, "max_nfe": base_steps}
        (batch, infos), _ = episodes(ROOT / "runs/ldm_x4", image_folder, 2, agent, **steps, num_envs=8)
        rewards.append(infos["reward"])
    change = rewards[1] - rewards[0]
    assert change.abs().max() > 1e-5 and batch["edits"].std() == pytest.approx(0.001, rel=0.1)
    shares = batch["cell_advantages"].sum(dim=(1, 2, 3)).view(base_steps, 8)  # one NFE after the other
    assert (shares.abs().mean(1) > 1e-7).all()  # every NFE has its share
    assert (shares.sum(0) - change).norm() / change.norm() < 0.05


@pytest.mark.parametrize("sensor", [BICUBIC, SHARP])
def test_every_edit_has_the_rewards_gradient_through_all_nfe_that_follow(sensor):
    """Against two-sided differences of the reward, with the later edits as they were drawn."""
    torch.manual_seed(0)
    env = orl.DenoisingEnv(in_float32(orl.load_ldm(str(ROOT / "runs/ldm_x4"), CPU)), 2, 2, sensor)
    hr = F.interpolate(torch.rand(1, 3, 16, 16), scale_factor=3, mode="bicubic").clamp(0, 1)[..., :32, :32]
    lr, z = sensor.downscale(hr), torch.randn(1, 8, 8, 8)

    def reward(edits):
        clean, nfe, steps = env.denoise(lr, z, Scripted(edits=edits, channels=8))
        return orl.score(None, orl.back_project(env.ldm.decode(clean), lr, env.sensor), hr, nfe)["reward"].sum(), [step.edits for step in steps]

    zeros = [torch.zeros(1, 8, 8, 8) for _ in range(2)]
    value, edits = reward(zeros)
    for k, gradient in enumerate(torch.autograd.grad(value, edits)):
        way = 0.2 * gradient / gradient.norm()
        with torch.no_grad():
            below, above = (reward([sign * way if j == k else zeros[j] for j in range(2)])[0] for sign in (-1, 1))
        assert above - below > 1e-4
        assert float((gradient * way).sum()) == pytest.approx(float(above - below) / 2, rel=0.05)


def test_the_policy_gradient_of_the_cell_wise_advantage_is_the_pathwise_gradient():
    """R = -|W edit - y|^2, whose numbers hang together: E[A dlogpi/dmean] is E[dR/dmean]."""
    torch.manual_seed(0)
    n, W, y, std = 200_000, torch.randn(5, 4), torch.randn(5), torch.tensor([0.1, 0.2, 0.3, 0.4])
    mean = torch.randn(4).requires_grad_()
    policy = Normal(mean.expand(n, 4), std)
    edit = policy.sample().requires_grad_()
    (gradient,) = torch.autograd.grad(-(edit @ W.T - y).square().sum(), edit)
    advantage = orl.cell_advantages(gradient, edit.detach(), policy.mean.detach())
    (by_policy,) = torch.autograd.grad((advantage * policy.log_prob(edit.detach())).sum() / n, mean)
    (pathwise,) = torch.autograd.grad(-(mean @ W.T - y).square().sum(), mean)
    assert pathwise.norm() > 1 and (by_policy - pathwise).norm() < 0.02 * pathwise.norm()


def test_ppo_solves_a_bandit_of_maps_whose_best_map_is_known():
    """One-step episodes, R = -(edit - target)^2 a cell: the mean must become the target in every cell."""
    torch.manual_seed(0)
    args, (agent, batch) = orl.Args(), small_batch(32, 1)
    batch["advantages"], batch["returns"] = torch.zeros(32), torch.zeros(32)
    optimizer = torch.optim.Adam(agent.parameters())
    seen = {k: batch[k] for k in ("spatial_obs", "scalar_obs")}
    target = 0.5 * seen["spatial_obs"][:, :1].float().tanh() + 0.2 * seen["spatial_obs"][:, 1:2].float().clamp(-1, 1)

    def error():
        with torch.no_grad():
            return (agent.edit_policy(**seen).mean - target).square().mean() / target.square().mean()

    assert error() > 0.99
    for left in torch.linspace(1, 0.025, 40).tolist():
        optimizer.param_groups[0]["lr"] = 3e-3 * left  # rate and standard deviation are annealed, as in a run
        agent.edit_std.fill_(0.3 * (0.25 + 0.75 * left))
        with torch.no_grad():
            policy = agent.edit_policy(**seen)
            edit = policy.sample()
        advantages = orl.cell_advantages(-2 * (edit - target) / 1000, edit, policy.mean)  # a reward of small scale
        drawn = {"edits": edit, "edit_logprobs": policy.log_prob(edit), "cell_advantages": advantages}
        figures = orl.update(agent, optimizer, batch | drawn, args)
    assert error() < 0.1 and figures["edit_approx_kl"] < 0.2


# ---------------------------------------------------------------- GAE and PPO


def test_gae_matches_a_hand_worked_example():
    rewards, values, dones = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [1.0]]), torch.tensor([[0], [1]]) == 1
    advantages, returns = orl.gae(rewards, values, dones, 0.5, 0.5)
    # delta_1 = 2 - 1 = 1; delta_0 = 1 + 0.5 * 1 - 0.5 = 1; A_0 = 1 + 0.25 * 1 = 1.25
    assert advantages.flatten().tolist() == [1.25, 1.0] and returns.flatten().tolist() == [1.75, 2.0]


def test_gae_is_the_brute_force_sum_and_never_crosses_an_end():
    torch.manual_seed(0)
    T, n, gamma, gae_lambda = 12, 5, 0.99, 0.95
    rewards, values, dones = torch.randn(T, n), torch.randn(T, n), torch.rand(T, n) < 0.3
    dones[-1] = True
    got, _ = orl.gae(rewards, values, dones, gamma, gae_lambda)
    after = torch.cat([values[1:], torch.zeros(1, n)])
    for t, i in itertools.product(range(T), range(n)):
        total, weight = 0.0, 1.0
        for k in range(t, T):
            total += weight * float(rewards[k, i] + gamma * after[k, i] * ~dones[k, i] - values[k, i])
            if dones[k, i]:
                break
            weight *= gamma * gae_lambda
        assert float(got[t, i]) == pytest.approx(total, abs=1e-4)


def test_ppo_raises_the_probability_of_good_actions_and_is_flat_outside_the_clip():
    def gradient(*ratios):  # of the loss with respect to the log-probabilities; the advantages are 1 and -1
        logprob = torch.tensor(ratios).log().requires_grad_()
        loss, *_ = orl.clipped_surrogate(logprob, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2)
        return torch.autograd.grad(loss, logprob)[0]

    inside, beyond, wrong_way = gradient(1.0, 1.0), gradient(1.3, 0.7), gradient(0.7, 1.3)
    assert inside[0] < 0 < inside[1]  # gradient descent: up where the advantage is positive
    assert beyond.abs().max() == 0  # both have moved further than the clip in the right direction
    assert wrong_way[0] < 0 < wrong_way[1]  # both have moved in the wrong one: the pull back stays


def test_ppo_solves_a_bandit_whose_best_stride_is_known():
    """One-step episodes, reward -(a - target)^2 at a small scale: the mean policy must reach the target."""
    torch.manual_seed(0)
    args, (agent, batch), target = orl.Args(), small_batch(128, 1, 4), 0.6
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    seen = {"spatial_obs": torch.zeros(128, 10, 4, 4).half(), "scalar_obs": torch.full((128, 4), 0.5)}
    batch |= seen | {"cell_advantages": torch.zeros(128, 1, 4, 4)}
    assert (agent.policy(**seen).mean - target).abs().min() > 0.5
    for _ in range(25):
        with torch.no_grad():
            policy, value = agent.policy(**seen), agent.value(**seen, hr_residual=batch["hr_residual"])
            action, edit_policy = policy.sample(), agent.edit_policy(**seen)
        reward = 0.01 * -(action - target).square() * args.reward_scale
        ends = torch.ones(1, 128, dtype=torch.bool)
        (advantages,), (returns,) = orl.gae(reward[None], value[None], ends, 0.99, 0.95)
        batch |= {"actions": action, "logprobs": policy.log_prob(action), "values": value}
        batch |= {"advantages": advantages, "returns": returns, "edit_logprobs": edit_policy.log_prob(batch["edits"])}
        figures = orl.update(agent, optimizer, batch, args)
    assert (agent.policy(**seen).mean - target).abs().max() < 0.15 and figures["approx_kl"] < 0.2


def test_the_agent_learns_on_an_ldm_that_predicts_noise(ldm_folder, image_folder):
    """CompVis' kind: at pure noise its clean latent is noise divided by a small number; nothing may rest on it."""
    torch.manual_seed(0)
    agent, rewards = orl.Agent(torch.ones(3), 8), []
    _, (env, train, args) = episodes(ldm_folder, image_folder, 0, agent, 2, 2, num_envs=32)
    assert env.ldm.scheduler.config.prediction_type == "epsilon"
    optimizer = torch.optim.Adam(agent.parameters(), lr=2e-3)
    agent.edit_std.fill_(0.3)
    for seed in range(16):
        batch, infos = orl.rollout(env, agent, None, train, args, seed)
        orl.update(agent, optimizer, batch, args)
        rewards.append(float(infos["reward"].mean()))
    assert all(math.isfinite(reward) for reward in rewards)
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.005


def test_each_network_is_clipped_by_its_own_norm():
    agent, batch = small_batch()
    gradients, _ = gradients_of(agent, batch, max_grad_norm=0.01)
    norms = [gradient.norm().item() for gradient in gradients]
    assert norms == pytest.approx([0.01] * 3, rel=0.01)  # one norm for all would leave two of them far smaller
    assert sum(len(gradient) for gradient in gradients) == sum(p.numel() for p in agent.parameters())


def test_what_the_lr_image_lacks_is_seen_by_the_critic_alone():
    agent, batch = small_batch()
    (editor, critic, actor), _ = gradients_of(agent, batch)
    other = batch | {"hr_residual": torch.rand(16, 3, 8, 8).half()}
    (editor_of_other, critic_of_other, actor_of_other), _ = gradients_of(agent, other)
    torch.testing.assert_close(editor_of_other, editor)
    torch.testing.assert_close(actor_of_other, actor)
    assert (critic_of_other - critic).abs().max() > 1e-4
