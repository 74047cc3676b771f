"""ORL-LDM (arXiv 2505.10027): a PPO agent steers the denoising of a frozen latent diffusion model (LDM) for 4x
super-resolution of remote-sensing images.

    python ppo_ldm_sr.py --seed 42                          # small LDM and synthetic scenes that ship with the project
    python ppo_ldm_sr.py --dataset data/paper8              # your own images: split/scene/*.jpg
    tensorboard --logdir runs

One step of the environment, for every image of a batch (a slot):

    latent z_t, LR image --U-Net--> clean latent x0, noise                  one denoiser call
    state  = (z_t, x0, posterior mean, LR image, t, calls)
    action = (blend, sharpen, their slopes and channel numbers, noise, consistency, stride) ~ agent(state)   zero: plain LDM
    x0' = sharpen(x0), blended with the posterior mean at the last step, cell by cell
    z_t' = sqrt(alpha_t') x0' + sqrt(1 - alpha_t') noise_scale noise        DDIM step to t' = t - stride * T / base_steps
    t' < 0 or budget spent: SR = decode(z_t') + up(consistency (LR - down(SR)))
        reward = 0.4 PSNR/50 + 0.3 SSIM + 0.2 (1 - LPIPS) + 0.1 (1 - calls/100)  minus the same for bicubic
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import sr_inputs  # images, weights and checkpoints as files;
import sr_outputs  # TensorBoard and pictures: nothing of the method
from sr_inputs import Scenes, has_bf16, load_scenes
from sr_metrics import Metrics, load_lpips


@dataclass
class RunArgs:
    """The run: seed, device, folder."""

    seed: int = 42  # seed of weights, crops, noise and actions (Table 1: 42)
    device: str = "auto"  # auto (CUDA where there is one), cpu or cuda
    run_dir: str | None = None  # run folder (None: runs/{images}__orl_ldm__{seed}__{time})
    resume: str | None = None  # run folder to go on with; a larger --total-timesteps extends a finished run


@dataclass
class InputArgs:
    """Images and models."""

    dataset: str = "auto"  # image folder split/scene/*.jpg, Hub name, or auto: timm/resisc45, and without it the synthetic scenes
    scenes: tuple[str, ...] = ()  # scenes to train on (none named: the paper's eight)
    ldm: str = "runs/ldm_x4"  # LDM in diffusers' layout: a folder, or a Hub name such as CompVis/ldm-super-resolution-4x-openimages
    lpips_weights: str | None = None  # file of torchvision's AlexNet where it is neither cached nor downloadable
    crop: int = 128  # px of a training crop; a multiple of 4 x the U-Net's stride


@dataclass
class EnvironmentArgs:
    """The steered denoising of an image, and the evaluation on held-out ones."""

    base_steps: int = 5  # steps of the plain DDIM schedule that a zero action follows
    max_calls: int = 10  # denoiser calls an image may cost; the last one jumps to the clean latent
    eval_images: int = 32  # held-out images of the table and the curves; 0: all (eval_sr.py makes the full table)
    eval_every: int = 10  # iterations between two evaluations of the agent
    initial_policy: str = "constant"  # where the untrained mean policy is: constant (the best constant action, searched first) or plain (the plain LDM)


@dataclass
class PPOArgs:
    """PPO; where Table 1 of the paper gives a value, it is the default."""

    total_timesteps: int | None = None  # environment steps = denoiser calls (None: Table 1's 1,000,000 on CUDA, on a CPU 60,000, about 15 minutes)
    learning_rate: float = 3e-4  # learning rate of Adam (Table 1: 3e-4), annealed to zero
    num_envs: int = 20  # images denoised in lockstep, over all processes
    num_steps: int = 50  # steps of each slot per iteration; 20 x 50 = 1000 steps (Table 1: 1000 steps per epoch)
    gamma: float = 0.99  # discount (Table 1: 0.99)
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation (Table 1: 0.95)
    minibatch_size: int = 64  # transitions of one gradient step (Table 1: batch size 64), over all processes
    update_epochs: int = 4  # passes over an iteration's transitions (Table 1: policy update frequency 4)
    clip_coef: float = 0.2  # clip of the surrogate and of the value loss (Table 1: 0.2)
    ent_coef: float = 0.0  # entropy coefficient
    vf_coef: float = 0.5  # value coefficient (Table 1: 0.5)
    max_grad_norm: float = 0.5  # gradient clip
    reward_scale: float = 50.0  # factor on the reward, so that returns are of order 1 for the critic


@dataclass
class Args(PPOArgs, EnvironmentArgs, InputArgs, RunArgs):
    """All settings, flat: args.gamma."""


# ------------------------------------------------------------------------------------------------ frozen LDM


class LDM:
    """A frozen latent diffusion model for 4x super-resolution: `unet`, autoencoder `vqvae` and `scheduler`.

    Latent channels, prediction type and noise schedule are the model's own. Images are [0, 1]; the model sees [-1, 1].
    """

    def __init__(self, unet: nn.Module, vqvae: nn.Module, scheduler, device: torch.device, bf16: bool | None = None):
        self.memory_format = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        self.unet, self.vqvae = (m.to(device, memory_format=self.memory_format).eval().requires_grad_(False) for m in (unet, vqvae))
        self.scheduler, self.device = scheduler, device
        self.latent_channels = unet.config.out_channels
        self.stride = 2 ** (len(unet.config.block_out_channels) - 1)  # sides of the latent grid are multiples of it
        self.num_timesteps = scheduler.config.num_train_timesteps
        self.prediction_type = scheduler.config.prediction_type
        self.fingerprint = sr_inputs.fingerprint(unet, vqvae)
        self.limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else math.inf  # of clean latents
        # alpha_bar of the timesteps 0 .. T-1, and last (index -1) that of the clean latent
        self.alphas = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.view(1)]).to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device) if bf16 is None else bf16)

    def first_timestep(self, steps: int) -> int:
        """Where the scheduler's own grid of `steps` steps begins (999, or less with "leading" spacing)."""
        self.scheduler.set_timesteps(steps)
        return min(int(self.scheduler.timesteps[0]), self.num_timesteps - 1)

    def lay_out(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) in the models' memory layout; their outputs are made contiguous again, since sums round by layout."""
        return x.contiguous(memory_format=self.memory_format)

    def predict(self, z: torch.Tensor, t: torch.Tensor, lr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One denoiser call: latents z (n, c, h, w) at timesteps t (n,), LR (n, 3, h, w) -> clean latents, noise."""
        with self.autocast:
            output = self.unet(self.lay_out(torch.cat([z, 2 * lr - 1], dim=1)), t, return_dict=False)[0].float().contiguous()
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        a, b = alpha.sqrt(), (1 - alpha).sqrt()  # z = a x0 + b noise
        x0, noise = {
            "epsilon": lambda: ((z - b * output) / a, output),
            "v_prediction": lambda: (a * z - b * output, a * output + b * z),
            "sample": lambda: (output, (z - a * output) / b),
        }[self.prediction_type]()
        return x0.clamp(-self.limit, self.limit), noise

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (n, c, h, w) -> images (n, 3, 4h, 4w) in [0, 1]."""
        with self.autocast:
            image = self.vqvae.decode(self.lay_out(z), return_dict=False)[0].contiguous()
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, 4h, 4w) in [0, 1] -> latents (n, c, h, w), of the mean where the encoder gives a density."""
        with self.autocast:
            code = self.vqvae.encode(self.lay_out(2 * image - 1), return_dict=False)[0]
        return (code if isinstance(code, torch.Tensor) else code.mode()).float().contiguous()


def load_ldm(name: str, device: torch.device) -> LDM:
    """The LDM in a folder of diffusers' layout or on the Hub."""
    return LDM(*sr_inputs.load_parts(name), device)


# ------------------------------------------------------------------------------------------------ LR images and reward


def downscale(hr: torch.Tensor) -> torch.Tensor:
    """HR (n, 3, H, W) in [0, 1] -> LR (n, 3, H/4, W/4) in [0, 1]."""
    # choice: scale 4; the LR image is made by bicubic interpolation with antialiasing, clipped to [0, 1]
    return F.interpolate(hr, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)


def upscale(lr: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) -> (n, 3, 4h, 4w) by bicubic interpolation, not clipped: it also carries signed residuals."""
    return F.interpolate(lr, scale_factor=4, mode="bicubic")


@dataclass
class Reward:
    """The paper's reward (Table 1) of images whose quality `metrics` gives, an `sr_metrics.Metrics`."""

    metrics: Metrics
    WEIGHTS = {"psnr": 0.4, "ssim": 0.3, "lpips": 0.2, "efficiency": 0.1}  # paper: Table 1

    def terms(self, metrics: dict[str, torch.Tensor], calls: torch.Tensor) -> dict[str, torch.Tensor]:
        """The four terms, each in [0, 1] and already weighted, (n,); their sum is the reward."""
        # choice: every term of the reward lies in [0, 1], so that the weights of Table 1 mean what they say
        # choice: efficiency = 1 - calls / 100, where 100 is the stock pipeline's default
        scaled = {"psnr": (metrics["psnr"] / 50).clamp(0, 1), "ssim": metrics["ssim"], "lpips": 1 - metrics["lpips"], "efficiency": 1 - calls / 100}
        weights = self.WEIGHTS if self.metrics.net else {k: w / 0.8 for k, w in self.WEIGHTS.items() if k != "lpips"}  # no LPIPS: the others
        return {k: w * scaled[k] for k, w in weights.items()}

    def __call__(self, metrics: dict[str, torch.Tensor], calls: torch.Tensor | float) -> torch.Tensor:
        """0.4 PSNR/50 + 0.3 SSIM + 0.2 (1 - LPIPS) + 0.1 efficiency, (n,)."""
        return sum(self.terms(metrics, torch.as_tensor(calls, device=metrics["psnr"].device)).values())


# ------------------------------------------------------------------------------------------------ environment

# choice: the action is 7 bounded numbers per image and step, and 2 for each of the c latent channels
# A unit of the agent's Gaussian moves a component by `unit` from its neutral value, within [low, high]; zero is the
# plain LDM's step. Slopes make maps over latent cells: value + channel's number + slope * deviation(x0). Gaussians of
# single cells would need the credit of cells, which is biased; a map of few numbers has the image's reward as its own.
# name: (neutral, low, high, unit)
COMPONENTS = {
    "blend": (0.0, 0.0, 1.0, 0.3),  # last step: x0 <- (1 - b) x0 + b posterior mean       less distortion
    "blend_slope": (0.0, -0.5, 0.5, 0.3),  # more of it where x0 is far from the mean      fewer inventions
    "sharpen": (0.0, -0.5, 1.0, 0.15),  # x0 <- x0 + s (x0 - its 3 x 3 mean)                more contrast
    "sharpen_slope": (0.0, -0.5, 0.5, 0.15),  # negative: less of it where x0 is far from the mean
    "noise": (1.0, 0.5, 1.1, 0.02),  # scale of the noise kept for the next step           less of it: smoother
    "consistency": (0.0, 0.0, 1.0, 1.0),  # end: SR <- SR + up(g (LR - down(SR)))          truer to the LR image
    "stride": (1.0, 0.5, 5.0, 1.0),  # times the plain schedule's jump, a power of two     fewer calls
    "blend_channel": (0.0, -0.5, 0.5, 0.3),  # c numbers, added to blend                   channels differ in what
    "sharpen_channel": (0.0, -0.5, 0.5, 0.15),  # c numbers, added to sharpen              they hold
}


def action_values(action: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gaussian action (n, 7 + 2c), zero = plain LDM -> each component's values in its range, (n, 1 or c, 1, 1)."""
    c, values = (action.shape[1] - 7) // 2, {}
    for (name, (neutral, low, high, unit)), part in zip(COMPONENTS.items(), action[..., None, None].split([1] * 7 + [c, c], dim=1)):
        values[name] = (neutral * 2 ** (unit * part) if name == "stride" else neutral + unit * part).clamp(low, high)
    return values


def action_for(c: int, **values: float) -> torch.Tensor:
    """The Gaussian action (7 + 2c,) that gives these values; what is not named is neutral: with none, the plain LDM's."""
    parts = []
    for name, (neutral, _, _, unit) in COMPONENTS.items():
        value = values.get(name, neutral)
        part = [math.log2(value / neutral) / unit if name == "stride" else (value - neutral) / unit]
        parts += part * (c if name.endswith("channel") else 1)
    return torch.tensor(parts)


def constant_policy(action: torch.Tensor):
    """The policy that takes the same action (7 + 2c,) everywhere."""
    return lambda maps, numbers: action.to(maps.device).expand(len(maps), -1)


def local_mean(x: torch.Tensor) -> torch.Tensor:
    """The 3 x 3 mean around each cell, (n, c, h, w); at the border of the cells that are there."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def deviation(x0: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """How far x0 strays from the posterior mean around each cell, (n, c, h, w), in standard units of the channel.

    The logarithm of the 3 x 3 mean of (x0 - mean)^2, of mean 0 and spread 1 over each image's channel; zero at the
    first call, where x0 is the mean.
    """
    energy = (local_mean((x0 - mean).square()) + 1e-5).log()
    centred = energy - energy.mean(dim=(2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(2, 3), keepdim=True).sqrt() + 1e-3)


def ddim_step(x0: torch.Tensor, noise: torch.Tensor, alpha_next: torch.Tensor) -> torch.Tensor:
    """DDIM step, eta 0, to any timestep (Song et al. 2021, eq. 12): clean latent and noise (n, c, h, w), alpha_bar (n, 1, 1, 1)."""
    return alpha_next.sqrt() * x0 + (1 - alpha_next).sqrt() * noise


@dataclass
class State:
    """A batch of denoising trajectories, one image a slot."""

    lr: torch.Tensor  # (n, 3, h, w) in [0, 1]
    z: torch.Tensor  # (n, c, h, w) latent
    t: torch.Tensor  # (n,) timestep of z
    calls: torch.Tensor  # (n,) denoiser calls so far
    x0: torch.Tensor  # (n, c, h, w) clean latent that the last call predicts
    noise: torch.Tensor  # (n, c, h, w) noise that it predicts
    mean: torch.Tensor  # (n, c, h, w) estimate of the posterior mean: x0 of the first call, at pure noise

    def map(self, function) -> "State":
        return State(**{k: function(v) for k, v in vars(self).items()})


class Denoising:
    """The Markov decision process of steered denoising, for a batch: how it begins, what the agent sees, one step."""

    def __init__(self, ldm: LDM, base_steps: int, max_calls: int):
        self.ldm, self.base_steps, self.max_calls = ldm, base_steps, max_calls
        self.t_first = ldm.first_timestep(base_steps)
        self.jump = ldm.num_timesteps // base_steps
        self.plain = constant_policy(action_for(ldm.latent_channels))  # the plain LDM as a policy

    def begin(self, lr: torch.Tensor, z: torch.Tensor) -> State:
        """LR (n, 3, h, w) in [0, 1] and latents of pure noise (n, c, h, w) -> the state after the first call."""
        t = torch.full((len(lr),), self.t_first, device=lr.device)
        x0, noise = self.ldm.predict(z, t, lr)
        return State(lr, z, t, torch.ones_like(t), x0, noise, x0)

    def observe(self, s: State) -> tuple[torch.Tensor, torch.Tensor]:
        """State s_t: maps on the latent grid (n, 3c + 3, h, w) in float16, and (n, 4) numbers of time and calls in [-2, 2]."""
        # choice: the state is z_t, x0, x0 - posterior mean, the LR image, the time and the calls spent
        maps = torch.cat([s.z, s.x0, s.x0 - s.mean, 2 * s.lr - 1], dim=1)
        alpha = self.ldm.alphas[s.t]
        time_left, calls = s.t / self.ldm.num_timesteps, s.calls / self.max_calls
        return maps.half(), 4 * torch.stack([time_left, calls, alpha.sqrt(), (1 - alpha).sqrt()], dim=1).float() - 2

    def maps(self, s: State, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`blend` and `sharpen` of an action (n, 7 + 2c) as maps over latent cells and channels, (n, c, h, w) each."""
        v, far = action_values(action), deviation(s.x0, s.mean)
        return tuple((v[k] + v[k + "_channel"] + v[k + "_slope"] * far).clamp(*COMPONENTS[k][1:3]) for k in ("blend", "sharpen"))

    def advance(self, s: State, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Steered DDIM step: action (n, 7 + 2c) -> latents (n, c, h, w), their timesteps (n,), done (n,).

        Where done, the latents are the final ones and the timestep is -1.
        """
        v = action_values(action)
        t_next = s.t - (self.jump * v["stride"].flatten()).round().long()
        done = (t_next < 0) | (s.calls >= self.max_calls)
        t_next = torch.where(done, -1, t_next)
        blend, sharpen = self.maps(s, action)
        x0 = s.x0 + sharpen * (s.x0 - local_mean(s.x0))
        x0 = torch.where(done.view(-1, 1, 1, 1), torch.lerp(x0, s.mean, blend), x0)
        return ddim_step(x0, v["noise"] * s.noise, self.ldm.alphas[t_next].view(-1, 1, 1, 1)), t_next, done

    def follow(self, s: State, z: torch.Tensor, t: torch.Tensor) -> State:
        """The state after one more denoiser call, at latents z (n, c, h, w) and timesteps t (n,)."""
        x0, noise = self.ldm.predict(z, t, s.lr)
        return State(s.lr, z, t, s.calls + 1, x0, noise, s.mean)

    def finish(self, z: torch.Tensor, lr: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Final latents (n, c, h, w) -> SR (n, 3, 4h, 4w) in [0, 1], made consistent with the LR image."""
        sr = self.ldm.decode(z)
        return (sr + upscale(action_values(action)["consistency"] * (lr - downscale(sr)))).clamp(0, 1)

    def steps(self, lr: torch.Tensor, z: torch.Tensor, policy):
        """Every step of a batch under `policy`: (maps, numbers) -> action (n, 7 + 2c), until its last image ends.

        LR (n, 3, h, w) in [0, 1], latents of pure noise (n, c, h, w) -> yields, for the k slots that still run: their
        indices (k,), their State, action (k, 7 + 2c), the next latents (k, c, h, w), done (k,).
        """
        slots, s = torch.arange(len(lr), device=lr.device), self.begin(lr, z)
        while len(slots):
            action = policy(*self.observe(s))
            z, t, done = self.advance(s, action)
            yield slots, s, action, z, done
            go = ~done
            slots = slots[go]
            s = self.follow(s.map(lambda x: x[go]), z[go], t[go]) if len(slots) else s

    @torch.inference_mode()
    def super_resolve(self, lr: torch.Tensor, z: torch.Tensor, policy) -> tuple[torch.Tensor, torch.Tensor, list]:
        """The same to its end -> SR (n, 3, 4h, 4w) in [0, 1], calls (n,), (slots, timesteps, action) of every step."""
        n, _, h, w = lr.shape
        sr, calls, trace = lr.new_empty(n, 3, 4 * h, 4 * w), torch.zeros(n, dtype=torch.long, device=lr.device), []
        for slots, s, action, z_next, done in self.steps(lr, z, policy):
            trace.append((slots, s.t, action))
            if done.any():
                sr[slots[done]] = self.finish(z_next[done], s.lr[done], action[done])
                calls[slots[done]] = s.calls[done]
        return sr, calls, trace


class DenoisingEnv:
    """Vector environment on training crops, with gymnasium's conventions and automatic reset, all on the device.

    A slot that ends gets its next image at once, so that every U-Net call is full. `generator` (CPU) draws everything.
    An observation is what the actor sees (`Denoising.observe`) and, for the critic alone, `error`: how far the clean
    latent is from the HR image's own, (num_envs, c, h, w) in float16.
    """

    def __init__(self, mdp: Denoising, scenes: Scenes, reward: Reward, num_envs: int, crop: int, seed: int):
        self.mdp, self.scenes, self.reward, self.num_envs, self.crop = mdp, scenes, reward, num_envs, crop
        self.generator = torch.Generator().manual_seed(seed)
        self.device = mdp.ldm.device

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """HR crops (n, 3, crop, crop) in [0, 1] and latents of pure noise (n, c, crop / 4, crop / 4)."""
        index = torch.randint(len(self.scenes), (n,), generator=self.generator).to(self.device)
        hr = self.scenes.crops(index, self.crop, self.generator)
        shape = (n, self.mdp.ldm.latent_channels, self.crop // 4, self.crop // 4)
        return hr, torch.randn(shape, generator=self.generator).to(self.device)

    def reset(self, seed: int | None = None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self.hr, z = self.draw(self.num_envs)
        self.truth, self.state = self.mdp.ldm.encode(self.hr), self.mdp.begin(downscale(self.hr), z)
        return self.observe(), {}

    def observe(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # choice: in training the critic also sees the error of x0 (asymmetric actor-critic, arXiv 1710.06542)
        # Rewards differ far more between images than between actions: a critic that knows the image frees the advantage.
        return *self.mdp.observe(self.state), (self.truth - self.state.x0).half()

    def step(self, action: torch.Tensor):
        """action (num_envs, 7 + 2c) -> observation, reward (num_envs,), terminated, truncated, info of the ended episodes.

        The budget of calls is part of the state, so that running out of it terminates; nothing is truncated.
        """
        s = self.state
        z, t, done = self.mdp.advance(s, action)
        reward, info = torch.zeros(self.num_envs, device=self.device), {}
        ended = done.nonzero().flatten()
        if len(ended):
            hr, lr, calls = self.hr[ended], s.lr[ended], s.calls[ended]
            sr = self.mdp.finish(z[ended], lr, action[ended])
            both = self.reward.metrics(torch.cat([sr, upscale(lr)]), hr)
            info, bicubic = ({k: v.chunk(2)[i] for k, v in both.items()} for i in (0, 1))
            # choice: the reward is paid at the end, since only the final image has a quality
            # choice: minus bicubic's reward, so that easy and hard images give rewards of one scale
            reward[ended] = self.reward(info, calls) - self.reward(bicubic, 0.0)
            terms = {f"term_{k}": v for k, v in self.reward.terms(info, calls).items()}
            info = info | terms | {"episodic_return": reward[ended], "denoiser_calls": calls,
                                   "psnr_gain_over_bicubic": info["psnr"] - bicubic["psnr"]}  # fmt: skip
            hr, noise = self.draw(len(ended))
            self.hr[ended], s.lr[ended], z[ended], t[ended] = hr, downscale(hr), noise, self.mdp.t_first
            self.truth[ended] = self.mdp.ldm.encode(hr)
        self.state = s = self.mdp.follow(s, z, t)  # one full call for running and new slots alike
        s.calls, s.mean = torch.where(done, 1, s.calls), torch.where(done.view(-1, 1, 1, 1), s.x0, s.mean)
        return self.observe(), reward, done, torch.zeros_like(done), info


# ------------------------------------------------------------------------------------------------ agent


def layer_init(layer: nn.Module, std: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Net(nn.Module):
    """Maps (n, channels, h, w) and numbers (n, k) -> (n, outputs): convolutions, mean and spread, three layers."""

    def __init__(self, channels: int, numbers: int, outputs: int, std: float):
        super().__init__()
        self.conv = nn.Sequential(
            layer_init(nn.Conv2d(channels, 32, 3, stride=2, padding=1)), nn.SiLU(),
            layer_init(nn.Conv2d(32, 64, 3, stride=2, padding=1)), nn.SiLU(),
            layer_init(nn.Conv2d(64, 64, 3, padding=1)), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Sequential(
            layer_init(nn.Linear(128 + numbers, 128)), nn.SiLU(), layer_init(nn.Linear(128, 128)), nn.SiLU(),
            layer_init(nn.Linear(128, outputs), std),
        )  # fmt: skip

    def forward(self, maps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        features = self.conv(maps.float().contiguous(memory_format=torch.channels_last))  # (n, 64, h / 4, w / 4)
        pooled = [features.mean(dim=(2, 3)), (features.var(dim=(2, 3), correction=0) + 1e-6).sqrt()]
        return self.head(torch.cat([*pooled, numbers], dim=1))


class Agent(nn.Module):
    """Independent actor and critic (paper: section 2.1, Fig. 2). The untrained mean policy is `start` (7 + 2c,)."""

    def __init__(self, latent_channels: int, start: torch.Tensor | None = None):
        super().__init__()
        channels, start = 3 * latent_channels + 3, action_for(latent_channels) if start is None else start
        self.actor = Net(channels, 4, len(start), std=0.01)
        self.actor.head[-1].bias.data.copy_(start)
        self.critic = Net(channels + latent_channels, 4 + latent_channels, 1, std=1.0)
        self.logstd = nn.Parameter(torch.full((len(start),), -0.5))

    def mean(self, maps: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The policy without its spread, for evaluation: (n, 7 + 2c)."""
        return self.actor(maps, numbers)

    def value(self, maps: torch.Tensor, numbers: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        energy = (error.float().square().mean(dim=(2, 3)) + 1e-4).log()  # (n, c): PSNR is a logarithm of the error too
        return self.critic(torch.cat([maps, error], dim=1), torch.cat([numbers, energy], dim=1)).squeeze(1)

    def action_and_value(self, maps, numbers, error, action=None, generator=None):
        """-> action (n, 7 + 2c), its log-probability (n,), entropy (n,), value (n,); draws the action where none is given."""
        policy = torch.distributions.Normal(self.actor(maps, numbers), self.logstd.exp(), validate_args=False)
        if action is None:
            noise = torch.randn(policy.mean.shape, generator=generator).to(policy.mean.device)
            action = policy.mean + policy.stddev * noise
        return action, policy.log_prob(action).sum(1), policy.entropy().sum(1), self.value(maps, numbers, error)


# ------------------------------------------------------------------------------------------------ GAE and PPO


def gae(rewards, values, dones, next_value, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) -> advantages (T, n), returns (T, n).

    rewards, values, dones (T, n): dones[t] says that step t ended its episode; next_value (n,): after the last step.
    """
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        going = 1 - dones[t].float()
        delta = rewards[t] + gamma * next_value * going - values[t]
        advantages[t] = running = delta + gamma * lam * going * running
        next_value = values[t]
    return advantages, advantages + values


def ppo_loss(logprob, old_logprob, advantage, value, old_value, target, entropy, args: Args):
    """Clipped surrogate (Schulman et al. 2017, eq. 7), clipped value loss and entropy bonus; every argument (n,).

    -> loss, and figures for the log (tensors, so that nothing waits for the device).
    """
    logratio = logprob - old_logprob
    ratio = logratio.exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
    near = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
    value_loss = 0.5 * torch.max((value - target) ** 2, (near - target) ** 2).mean()
    loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss
    figures = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy.mean(), "old_approx_kl": -logratio.mean()}
    figures |= {"approx_kl": (ratio - 1 - logratio).mean(), "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean()}
    return loss, {k: v.detach() for k, v in figures.items()}


def rollout(env: DenoisingEnv, agent: Agent, observation, num_steps: int, generator: torch.Generator):
    """`num_steps` steps of every slot -> batch of (T, n, ...) tensors, next observation, its value (n,), infos of ended episodes."""
    steps, infos = [], []
    with torch.no_grad():
        for _ in range(num_steps):
            action, logprob, _, value = agent.action_and_value(*observation, generator=generator)
            following, reward, terminated, truncated, info = env.step(action)
            steps.append((*observation, action, logprob, value, reward, terminated | truncated))
            observation = following
            if info:
                infos.append(info)
        next_value = agent.value(*observation)
    names = ("maps", "numbers", "error", "actions", "logprobs", "values", "rewards", "dones")
    return {k: torch.stack(v) for k, v in zip(names, zip(*steps))}, observation, next_value, infos


def update(agent: Agent, optimizer, batch: dict, args: Args, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """`update_epochs` passes of minibatch PPO over a batch with advantages and returns -> figures for the log."""
    logs, flat = [], {k: v.flatten(0, 1) for k, v in batch.items()}  # (T n, ...)
    total, size = len(flat["values"]), args.minibatch_size // (dist.get_world_size() if dist.is_initialized() else 1)
    for _ in range(args.update_epochs):
        order = torch.randperm(total, generator=generator).to(flat["values"].device)
        for start in range(0, total - size + 1, size):
            mb = {k: v[order[start : start + size]] for k, v in flat.items()}
            _, logprob, entropy, value = agent.action_and_value(mb["maps"], mb["numbers"], mb["error"], mb["actions"])
            loss, figures = ppo_loss(logprob, mb["logprobs"], mb["advantages"], value, mb["values"], mb["returns"], entropy, args)
            optimizer.zero_grad()
            loss.backward()
            if dist.is_initialized():
                sr_inputs.average_gradients(agent)
            norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            logs.append({**figures, "grad_norm": norm.detach()})
    figures = {k: torch.stack([log[k] for log in logs]).mean() for k in logs[0]}
    return {**figures, "explained_variance": 1 - (flat["returns"] - flat["values"]).var() / flat["returns"].var()}


# ------------------------------------------------------------------------------------------------ evaluation


def noise_for(ldm: LDM, indices, h: int, w: int, seed: int) -> torch.Tensor:
    """Latents of pure noise (n, c, h, w); an image has the same noise under every method and batch size."""
    generators = [torch.Generator().manual_seed(seed * 100_003 + i) for i in indices]
    return torch.stack([torch.randn(ldm.latent_channels, h, w, generator=g) for g in generators]).to(ldm.device)


@torch.inference_mode()
def evaluate(mdp: Denoising, scenes: Scenes, reward: Reward, policy, indices, crop: int = 0, seed: int = 0):
    """Metrics of the images `indices` under a policy, in any order: {psnr, ssim, lpips, calls, reward: (N,)}."""
    parts = []
    for part, hr in scenes.batches(indices, 4 * mdp.ldm.stride, crop, 16):
        lr = downscale(hr)
        sr, calls, _ = mdp.super_resolve(lr, noise_for(mdp.ldm, part, *lr.shape[-2:], seed), policy)
        found = reward.metrics(sr, hr)
        parts.append({**found, "calls": calls.float(), "reward": reward(found, calls)})
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def search_constant(mdp: Denoising, scenes: Scenes, reward: Reward, crop: int, seed: int, images: int = 32) -> tuple[torch.Tensor, float]:
    """The best constant action on training images, number by number, in smaller and smaller steps: (7 + 2c,), its reward."""
    indices = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed))[:images].tolist()

    def score(action: torch.Tensor) -> float:
        return float(evaluate(mdp, scenes, reward, constant_policy(action), indices, crop, seed)["reward"].mean())

    low, high = (action_for(mdp.ldm.latent_channels, **{k: v[end] for k, v in COMPONENTS.items()}) for end in (1, 2))
    action, best = torch.zeros_like(low), score(torch.zeros_like(low))
    tries = [(units, i) for units in (2.0, 1.0, 0.5) for i in range(len(action))]
    for units, i in sr_outputs.progress(tries, "best constant action", lambda: f"reward {best:.4f}"):
        for step in (units, -units):
            trial = action.clone()
            trial[i] = (action + step).clamp(low, high)[i]
            if (value := score(trial)) > best:
                action, best = trial, value
                break
    return action, best


# ------------------------------------------------------------------------------------------------ main


def main(args: Args) -> None:
    args, tensors, state = sr_inputs.resume_args(args) if args.resume else (args, {}, {})
    rank, world, device = sr_inputs.set_up(args)
    torch.manual_seed(args.seed)  # paper: section 3, all seeds fixed; everything random comes from torch

    # ---- frozen LDM, images, reward
    ldm = load_ldm(args.ldm, device)
    sr_inputs.check_ldm(args, ldm, state)
    dataset = sr_inputs.resolve_dataset(args.dataset)
    train = load_scenes(dataset, "train", args.scenes, args.crop).to(device)
    test = load_scenes(dataset, "test", args.scenes, max(32, 4 * ldm.stride)).to(device)
    reward = Reward(Metrics(load_lpips(args.lpips_weights), device))

    # ---- environment, agent, run folder
    mdp, seed = Denoising(ldm, args.base_steps, args.max_calls), args.seed * 1000 + rank
    env = DenoisingEnv(mdp, train, reward, args.num_envs // world, args.crop, seed)  # each process has its own images
    run = Path(args.run_dir or f"runs/{train.slug}__orl_ldm__{args.seed}__{int(time.time())}")
    # choice: the untrained mean policy is the best constant action, so that PPO learns what differs between images and steps
    start = sr_inputs.read_constant(run)  # that of a resumed run
    if start is None and args.initial_policy == "constant":
        start = sr_inputs.keep_constant(run, *search_constant(mdp, train, reward, args.crop, args.seed), action_values)
    agent = Agent(ldm.latent_channels, start).to(device)  # and the same weights, which follow from the seed alone
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    generators = {"env": env.generator} | {k: torch.Generator().manual_seed(seed + n) for k, n in (("policy", 10_000), ("minibatch", 20_000))}
    sr_inputs.restore(tensors, agent, optimizer, env, State, generators, rank) if args.resume else env.reset()
    observation = env.observe()
    per_iteration = args.num_envs * args.num_steps
    iterations, first = args.total_timesteps // per_iteration, state.get("iteration", 0)
    state.update(args=vars(args), ldm=ldm.fingerprint, components=list(COMPONENTS), title=train.title, scenes=train.names)
    if rank == 0:
        log = sr_outputs.Log(run, args, first * per_iteration)
        shown = torch.linspace(0, len(test) - 1, min(args.eval_images or len(test), len(test))).round().long().tolist()
        rivals = {"plain": mdp.plain} | ({} if start is None else {"constant": constant_policy(start)})
        rivals = {k: evaluate(mdp, test, reward, policy, shown, args.crop, args.seed) for k, policy in rivals.items()}

    # ---- one iteration: rollout, GAE, PPO (paper: section 2.4, Table 1)
    with sr_inputs.resume_hint(run):
        for iteration in range(first, iterations):
            began = time.perf_counter()
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / iterations)
            batch, observation, next_value, infos = rollout(env, agent, observation, args.num_steps, generators["policy"])
            sr_inputs.check_finite(batch, iteration * per_iteration, run)
            rolled = time.perf_counter()
            batch["rewards"] = batch["rewards"] * args.reward_scale
            batch["advantages"], batch["returns"] = gae(batch["rewards"], batch["values"], batch["dones"], next_value, args.gamma, args.gae_lambda)
            losses = update(agent, optimizer, batch, args, generators["minibatch"])
            seconds = time.perf_counter() - began
            step, last = (iteration + 1) * per_iteration, iteration + 1 == iterations
            if rank == 0:
                charts = {"SPS": per_iteration / seconds, "update_share": 1 - (rolled - began) / seconds, "learning_rate": optimizer.param_groups[0]["lr"]}
                evaluating = last or (iteration + 1) % args.eval_every == 0
                calls = (batch["numbers"][..., 1] + 2) / 4 * args.max_calls  # as `observe` scales them
                log.iteration(step, batch, action_values(batch["actions"].flatten(0, 1)), calls, infos, losses, charts, evaluating)
                if evaluating:
                    log.evaluation(step, rivals | {"agent": evaluate(mdp, test, reward, agent.mean, shown, args.crop, args.seed)})
                if last or iteration + 1 == args.eval_every:  # the start and the end: events stay small
                    for (i,), hr in test.batches(shown[:: max(1, len(shown) // 4)][:4], 4 * ldm.stride, args.crop, 1):
                        lr, name = downscale(hr), f"{test.names[int(test.scene[i])]}_{i}"
                        log.images(step, name, hr, lr, noise_for(ldm, [i], *lr.shape[-2:], args.seed), mdp, agent.mean, COMPONENTS)
            state.update(iteration=iteration + 1, step=step)  # after the log: a kill in between repeats, never skips
            sr_inputs.save_run(run, agent, optimizer, env, generators, state, rank)
    if rank == 0:
        log.close()
    sys.exit(sr_inputs.final_table(run, args, len(test.names), device))


if __name__ == "__main__":
    main(sr_inputs.parse_args(Args, __doc__))
