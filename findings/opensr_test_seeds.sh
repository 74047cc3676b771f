#!/usr/bin/env bash
# opensr-test 1.3.3: computing a metric restarts the random numbers of the whole program.
#
# Expected: `Metrics.compute` measures three images and leaves the caller's random state alone.
# Seen: it sets the seeds of Python, numpy and torch to 42 at every call. Three numbers that a caller draws before
# each of three measurements are therefore different at first and the same from the second on, so that a training
# loop which measures now and then repeats its "random" crops and noise after each measurement.
# The remedy is to save torch.get_rng_state(), random.getstate() and numpy.random.get_state() around the call.
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q opensr-test==1.3.3 torch==2.14.1 torchvision==0.29.1
"$folder/venv/bin/python" - <<'PYTHON'
import random
import sys

import numpy as np
import opensr_test
import torch

metrics = opensr_test.Metrics()
lr, drawn = torch.rand(4, 32, 32), []
hr = torch.nn.functional.interpolate(lr[None], scale_factor=4, mode="bicubic")[0].clamp(0, 1)
for _ in range(3):
    metrics.compute(lr=lr, sr=hr, hr=hr)
    drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
print("drawn after each of three measurements:", drawn)
sys.exit(not drawn[0] == drawn[1] == drawn[2])
PYTHON
