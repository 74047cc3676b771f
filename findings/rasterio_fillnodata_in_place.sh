#!/usr/bin/env bash
# rasterio 1.4.4: fillnodata returns the filled raster and has filled the caller's array too.
#
# Expected: `filled = rasterio.fill.fillnodata(image, mask)` leaves `image` as it is. The documentation speaks of a
# source image and of the array that is returned, and filling in place was taken out of the function in 2015.
# Seen: `filled` and `image` are the same memory. The holes of `image` are gone, whatever its type; of a masked array
# the values below the mask are changed. Comparing the filled image with the original one, to see how much was
# invented, gives no difference at all.
# The remedy is to pass a copy.
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import rasterio
from rasterio.fill import fillnodata

found = []
for dtype in ("uint8", "float32"):
    image, mask = np.arange(64, dtype=dtype).reshape(8, 8) + 10, np.ones((8, 8), bool)
    mask[3, 3], image[3, 3] = False, 0
    filled = fillnodata(image, mask)
    found.append((bool(np.shares_memory(image, filled)), bool(image[3, 3] > 30)))
    image[3, 3] = 0
    fillnodata(np.ma.array(image, mask=~mask, copy=False))
    found.append(bool(image[3, 3] > 30))
print("rasterio", rasterio.__version__, "the caller's array is filled:", found)
sys.exit(found != [(True, True), True] * 2)
PYTHON
