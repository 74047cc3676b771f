#!/usr/bin/env bash
# torchmetrics 1.9.0: SSIM is no longer the SSIM of MATLAB's script, scikit-image, or torchmetrics 1.4.1.
#
# Expected: the structural similarity of two images is one number in all packages that are given Gaussian windows of
# 11 px with a standard deviation of 1.5 px, and in all versions of one package.
# Seen: the reference code and scikit-image average over the windows that lie inside the image. torchmetrics did so
# up to 1.4.1. Since then it also counts windows that hang over the border, filled by reflection. A border of 5 px is
# 15% of an image of 128 px: here 0.3155, 0.3155 and 0.2963. Of bicubic enlargements of aerial images of 128 px
# the mean moves from 0.512 to 0.509, and a single image by up to 0.014.
# SSIM values are to be compared only with the package and version named, above all those of small images.
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchmetrics==1.9.0 scikit-image==0.26.0 torch==2.14.1 numpy
"$folder/venv/bin/pip" install -q --no-deps --target "$folder/old" torchmetrics==1.4.1
cat > "$folder/ssim.py" <<'PYTHON'
import numpy as np
import torch
import torchmetrics
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

rng = np.random.default_rng(0)
y, x = np.mgrid[:128, :128] / 128
hr = 0.5 + 0.3 * np.sin(20 * x + 9 * y) * np.cos(14 * y)
sr = np.clip(hr + 0.1 * rng.standard_normal(hr.shape) * (1 + 2 * (np.minimum(x, 1 - x) < 0.04)), 0, 1)
reference = structural_similarity(sr, hr, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
a, b = (torch.tensor(image)[None, None] for image in (sr, hr))
ours = structural_similarity_index_measure(a, b, data_range=1.0).item()
print(torchmetrics.__version__, f"torchmetrics {ours:.4f}, scikit-image {reference:.4f}, difference {ours - reference:.4f}")
raise SystemExit(0 if abs(ours - reference) < 1e-4 else 3)
PYTHON
set +e
PYTHONPATH="$folder/old" "$folder/venv/bin/python" "$folder/ssim.py"
old=$?
"$folder/venv/bin/python" "$folder/ssim.py"
new=$?
test "$old" = 0 && test "$new" = 3
