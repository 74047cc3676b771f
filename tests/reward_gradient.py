"""The rival that a reader will ask for: the same editor, trained by the reward's own gradient and no RL.

    python tests/reward_gradient.py --agent runs/orl_ldm --dataset data/paper8 --minutes 10

It follows the plain LDM's steps (no noise scale, no stride: the number of calls has no gradient) and edits the clean
latent of every call; the gradient leads through the later calls, though not through what they make the editor do.
Writes reward_gradient.pt and the curve of its held-out reward (reward_gradient/events.*, over denoiser calls) into the
run folder of the agent that it is compared with; eval_sr.py then shows a row and a line.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_ldm_sr as orl  # noqa: E402


@dataclass
class Args:
    agent: str = "runs/orl_ldm"  # run folder of the agent
    dataset: str = "data/paper8"  # images to train on
    minutes: float = 10.0  # of training
    batch: int = 16  # images of a gradient step
    learning_rate: float = 1e-3  # of Adam, annealed to a twentieth
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 42  # of weights, crops and noise


def main(args: Args) -> None:
    device, run = orl.pick_device(args.device), orl.locate(args.agent)
    state = orl.load_run(run / "agent.pt")
    trained = state["args"]
    ldm = orl.load_ldm(trained["ldm"], device)
    mdp, crop = orl.Denoising(ldm, trained["base_steps"], trained["max_calls"]), trained["crop"]
    scenes = tuple(trained["scenes"])
    train, test = (orl.load_images(args.dataset, split, scenes, crop, device) for split in ("train", "test"))
    held_out = test.centres(trained["eval_images"], crop)  # the images of the agent's curve
    net = orl.load_lpips(device)
    torch.manual_seed(args.seed)
    with torch.no_grad():
        agent = orl.Agent(ldm.encode(train.crops(32, crop)).std(dim=(0, 2, 3)), ldm.hidden_channels).to(device)
    agent.actor[-1].weight.data.zero_()  # the plain LDM's steps
    optimizer = torch.optim.Adam(agent.editor.parameters(), lr=args.learning_rate, eps=1e-5)
    seconds, spent, step, calls, writer = 60 * args.minutes, 0.0, 0, 0, SummaryWriter(run / "reward_gradient")
    with tqdm(total=round(seconds), unit="s", dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar}| {postfix}") as bar:
        while spent < seconds:
            began = time.perf_counter()
            optimizer.param_groups[0]["lr"] = args.learning_rate * max(0.05, 1 - spent / seconds)
            hr = train.crops(args.batch, crop)
            lr = orl.downscale(hr)
            z = torch.randn(len(lr), ldm.latent_channels, *lr.shape[-2:], device=device)
            z, spent_calls, steps = mdp.denoise(lr, z, agent)
            shift = torch.randint(8, (2,)).tolist()  # as the agent's environment does
            found = orl.score(net, mdp.finish(z, lr), hr, spent_calls, trained["reward_weights"], shift)["reward"].mean()
            gradients = torch.autograd.grad(found, [s.edits for s in steps])
            edit = agent.edit_policy(torch.cat([s.maps for s in steps]), torch.cat([s.numbers for s in steps])).mean
            optimizer.zero_grad()
            (-edit).backward(torch.cat(gradients))
            optimizer.step()
            before, spent = spent, spent + time.perf_counter() - began  # the curve below takes no training time
            step, calls, bar.n = step + 1, calls + int(spent_calls.sum()), round(spent)
            if spent // 120 > before // 120 or spent >= seconds:
                held = orl.evaluate(mdp, held_out, net, agent, trained["seed"])["reward"].mean()
                writer.add_scalar("eval/reward_agent", float(held), calls)
            bar.set_postfix_str(f"{step} steps, reward {float(found.detach()):.4f}")
    orl.save_run(run / "reward_gradient.pt", state | {"agent": agent.state_dict(), "step": step})
    writer.close()
    print(f"{step} steps of {args.batch} images, {calls} calls, held-out reward {float(held):.4f}; written to {run}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
