#!/usr/bin/env bash
# PyTorch 2.14.1: FlopCounterMode counts no operation of attention on the CPU.
#
# Expected: one call of scaled_dot_product_attention with 4 heads, 256 positions and 32 numbers a head is two matrix
# products, 33,554,432 operations, on every device.
# Seen: 0 on the CPU, with and without gradients. The kernel that is chosen there has no entry in the counter's table,
# and what is missing there counts as nothing, without a warning. Convolutions and linear layers are counted, so that
# the sum for a U-Net with attention looks plausible and is too small.
# Within sdpa_kernel(SDPBackend.MATH) the same call is made of products that are counted.
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

query, found = torch.randn(1, 4, 256, 32), {}
for name, kernel in {"default": nullcontext(), "MATH": sdpa_kernel(SDPBackend.MATH)}.items():
    with FlopCounterMode(display=False) as counter, kernel:
        scaled_dot_product_attention(query, query, query)
    found[name] = counter.get_total_flops()
print("torch", torch.__version__, "operations counted:", found, "expected:", 2 * 2 * 4 * 256 * 256 * 32)
sys.exit(found != {"default": 0, "MATH": 2 * 2 * 4 * 256 * 256 * 32})
PYTHON
