#!/usr/bin/env bash
# PyTorch 2.14.1 (CPU): torch.autocast casts the weights of a frozen layer again at every call.
#
# Expected: inside one autocast region a float32 weight is cast to bfloat16 once and then comes from autocast's
# cache, which is what the cache is for; freezing the layer cannot make it dearer.
# Seen: ten calls of a convolution cast weight and bias twice in all while the layer is trainable, and twenty times
# after requires_grad_(False). The cache keeps leaves that require gradients alone. torch.no_grad() changes nothing.
# It concerns whoever runs a frozen model, as in fine-tuning beside it or in inference: casting the weights once
# by .to(torch.bfloat16) is the remedy.
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Casts.count += func.overloadpacket.__name__ == "_to_copy"
        return func(*args, **(kwargs or {}))


layer, x = torch.nn.Conv2d(8, 8, 3), torch.randn(1, 8, 8, 8, dtype=torch.bfloat16)
found = {}
for trainable in (True, False):
    layer.requires_grad_(trainable)
    Casts.count = 0
    with torch.autocast("cpu", torch.bfloat16), Casts():
        for _ in range(10):
            layer(x)
    found["trainable" if trainable else "frozen"] = Casts.count
print("torch", torch.__version__, "casts in ten calls of one layer:", found)
sys.exit(found != {"trainable": 2, "frozen": 20})
PYTHON
