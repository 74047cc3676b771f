#!/usr/bin/env bash
# diffusers 0.42.1: a decoder level of AutoencoderDC that has no residual blocks loses its upsampling too.
#
# Expected: decoder_layers_per_block=(1, 0, 2) is a decoder whose middle level has no residual blocks and doubles the
# sides as the others do, just as the finest level works with no blocks in the default layout (0, 1, 2).
# Seen: the model is built without a word, and decoding its own latent raises RuntimeError for unequal channels,
# since the whole level, upsampling included, is left out. Zero blocks at the finest or the coarsest level are fine.
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diffusers==0.42.1 torch==2.14.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from diffusers import AutoencoderDC

found = {}
for layers in ((0, 1, 2), (1, 0, 2), (1, 1, 0)):
    options = {"latent_channels": 8, "scaling_factor": 1.0}
    for part, blocks in (("encoder", (0, 1, 2)), ("decoder", layers)):
        options |= {f"{part}_block_types": "ResBlock", f"{part}_block_out_channels": (32, 64, 128)}
        options |= {f"{part}_layers_per_block": blocks, f"{part}_qkv_multiscales": ((), (), ())}
    model = AutoencoderDC(**options, downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle")
    latent = model.encode(torch.randn(1, 3, 32, 32)).latent
    try:
        found[layers] = tuple(model.decode(latent).sample.shape[2:])
    except RuntimeError:
        found[layers] = "RuntimeError"
print("decoder layers per block -> size of the decoded image of 32 px:", found)
sys.exit(found != {(0, 1, 2): (32, 32), (1, 0, 2): "RuntimeError", (1, 1, 0): (32, 32)})
PYTHON
