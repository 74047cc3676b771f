#!/usr/bin/env bash
# rasterio 1.4.4: a file opened with OVERVIEW_LEVEL="NONE" has lost the descriptions of its bands.
#
# Expected: the open option keeps overviews from being used for decimated reads and changes nothing else.
# Seen: pixels, coordinates and tags are there, but `descriptions` is (None,) with no warning. Code that looks for a
# band by its name does not find it, and code that copies the names into a result writes a result without them.
# The remedy is to open the file twice: plainly for its names, with the option for decimated reads.
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import numpy as np
import rasterio

warnings.simplefilter("ignore")
kind = {"driver": "GTiff", "width": 64, "height": 64, "count": 1, "dtype": "uint16"}
with rasterio.open("scene.tif", "w", **kind) as file:
    file.write(np.arange(4096, dtype=np.uint16).reshape(1, 64, 64))
    file.update_tags(ns="SENSOR", gain="0.5")
    file.set_band_description(1, "near infrared")
found = {}
for name, options in (("plain", {}), ("OVERVIEW_LEVEL=NONE", {"OVERVIEW_LEVEL": "NONE"})):
    with rasterio.open("scene.tif", **options) as file:
        found[name] = (file.tags(ns="SENSOR"), file.descriptions)
print("rasterio", rasterio.__version__, found)
expected = {"plain": ({"gain": "0.5"}, ("near infrared",)), "OVERVIEW_LEVEL=NONE": ({"gain": "0.5"}, (None,))}
sys.exit(found != expected)
PYTHON
