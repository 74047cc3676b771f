#!/usr/bin/env bash
# rasterio 1.4.4: creation options given to rasterio.shutil.copy arrive in upper case.
#
# Expected: rasterio.shutil.copy(source, "out.jpg", driver="JPEG", COMMENT="made by a test") writes this comment, as
# GDAL's own translation does.
# Seen: the comment in the file is "MADE BY A TEST". Options whose value is free text (comments, file names, titles)
# are changed without a word; options of fixed words do not show it, since GDAL ignores their case.
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rasterio==1.4.4 pillow==13.0.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import numpy as np
import rasterio
import rasterio.shutil
from PIL import Image

warnings.simplefilter("ignore")
kind = {"driver": "GTiff", "width": 16, "height": 16, "count": 3, "dtype": "uint8"}
with rasterio.open("in.tif", "w", **kind) as file:
    file.write(np.zeros((3, 16, 16), np.uint8))
rasterio.shutil.copy("in.tif", "out.jpg", driver="JPEG", COMMENT="made by a test")
found = Image.open("out.jpg").info["comment"]
print("rasterio", rasterio.__version__, "asked for b'made by a test', found", found)
sys.exit(found != b"MADE BY A TEST")
PYTHON
