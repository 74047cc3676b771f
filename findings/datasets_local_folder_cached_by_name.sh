#!/usr/bin/env bash
# datasets 5.2.0: load_dataset of a local folder returns the rows of another folder that has the same last name.
#
# Expected: load_dataset("/b/scenes") reads the parquet file in /b/scenes, whatever was read before, and a file that
# was replaced is read anew, as its cache is keyed by the files.
# Seen: where the folder's README.md describes its files, as that of every dataset copied from the Hub does, the
# cache is keyed by the folder's last name alone. A second folder of that name, and the first one after its file was
# replaced, both give the rows of the first reading, without a word. Without the README all three are right.
# So two versions of a dataset, or two users' folders called "data", become one.
# The remedy is download_mode="force_redownload", or datasets.load_dataset("parquet", data_files=...).
#
# Exit code 0: the behaviour is still so. Exit code 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 FOLDER="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import os
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

datasets.disable_progress_bars()
README = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"


def read(where: str, value: int, readme: bool) -> int:
    """Writes one row into a folder called scenes, or scenes_plain, and reads it back."""
    root = Path(os.environ["FOLDER"], where, "scenes" if readme else "scenes_plain")
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"value": [value]}), root / "train.parquet")
    if readme:
        (root / "README.md").write_text(README)
    return datasets.load_dataset(str(root))["train"][0]["value"]


found = {}
for readme in (True, False):
    found["README" if readme else "plain"] = [read("a", 1, readme), read("b", 2, readme), read("a", 3, readme)]
print("datasets", datasets.__version__, "written 1, 2, 3; read", found)
sys.exit(found != {"README": [1, 1, 1], "plain": [1, 2, 3]})
PYTHON
