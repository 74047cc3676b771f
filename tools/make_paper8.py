"""Builds the image folder that this project calls `paper8` from the public archives of AID and UC Merced.

    python tools/make_paper8.py AID_FOLDER UCMERCED_FOLDER data/paper8

This is the same recipe as that of the images behind the figures of docs/results.md, not the same list of files: which
files those were is not known, since they were renamed. Expect figures that differ by some hundredths of a dB. The rule:

- The eight classes are those of the paper's Table 2. Seven come from AID, runway from UC Merced (AID has none):
  Commercial, DenseResidential, Desert, Forest, Industrial, RailwayStation, River; runway.
- The files of a class are sorted by their number. The first 120 are for training, the next 20 for testing. Of runway
  the first 60 are for training, the next 16 for testing.
- AID's images of 600 px are scaled to 150 px by Pillow's antialiased bicubic kernel (`Image.Resampling.BICUBIC`).
  UC Merced's images keep their 256 px.
- All are written as JPEG, OUT/{train,test}/scene/scene_000.jpg and so on: those of AID with quality 95 and colours at
  half the resolution, runway with quality 97 and all colours. OUT/FILES.txt says which file each was made of.

AID (Xia et al. 2017, arXiv 1608.05167) and UC Merced (Yang and Newsam 2010) are published for research, and neither
states a licence. The folders may hold the classes directly or below further folders, such as UC Merced's `Images`.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ppo_ldm_sr import stop  # noqa: E402

AID = {
    "commercial_area": "Commercial",
    "dense_residential": "DenseResidential",
    "desert": "Desert",
    "forest": "Forest",
    "industrial_area": "Industrial",
    "railway_station": "RailwayStation",
    "river": "River",
}
AID_SIDE, SIDE = 600, 150  # px before and after
COUNTS = {"train": 120, "test": 20}
RUNWAY_COUNTS = {"train": 60, "test": 16}
JPEG_OF_AID = {"quality": 95, "subsampling": "4:2:0"}
JPEG_OF_RUNWAY = {"quality": 97, "subsampling": "4:4:4"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}


@dataclass
class Args:
    aid: Annotated[str, tyro.conf.Positional]  # unpacked archive of AID
    ucmerced: Annotated[str, tyro.conf.Positional]  # unpacked archive of UC Merced
    output: Annotated[str, tyro.conf.Positional]  # folder to write, which must not exist


def class_folder(root: str, name: str) -> Path:
    """The folder of a class below `root`, whatever its case."""
    found = sorted(path for path in Path(root).rglob("*") if path.is_dir() and path.name.lower() == name.lower())
    if not found:
        stop(f"{root} has no folder {name}; unpack the whole archive and name its folder")
    return found[0]


def by_number(path: Path) -> tuple[int, str]:
    """Sorting key of forest_2.jpg before forest_10.jpg."""
    numbers = re.findall(r"\d+", path.stem)
    return (int(numbers[-1]) if numbers else -1, path.name)


def files_of(folder: Path, counts: dict[str, int]) -> dict[str, list[Path]]:
    """{split: the files of a class that go there}."""
    files = sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES), key=by_number)
    needed = sum(counts.values())
    if len(files) < needed:
        stop(f"{folder} has {len(files)} images, {needed} are needed; unpack the whole archive")
    return {"train": files[: counts["train"]], "test": files[counts["train"] : needed]}


def prepare(file: Path, source_side: int | None) -> Image.Image:
    """The image as it is, or, where `source_side` px are expected, scaled to SIDE px."""
    image = Image.open(file).convert("RGB")
    if source_side is None:
        return image
    if image.size != (source_side, source_side):
        stop(f"{file} has {image.size[0]} x {image.size[1]} px, AID's images have {source_side} x {source_side}")
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def main(args: Args) -> None:
    output = Path(args.output)
    if output.exists():
        stop(f"{output} exists; name another folder")
    plan = [(scene, class_folder(args.aid, name), COUNTS, AID_SIDE) for scene, name in AID.items()]
    plan.append(("runway", class_folder(args.ucmerced, "runway"), RUNWAY_COUNTS, None))
    # every class is looked for before anything is written
    plan = [(scene, files_of(folder, counts), side) for scene, folder, counts, side in plan]
    listed = []
    for scene, files, side in plan:
        jpeg, number = JPEG_OF_AID if side else JPEG_OF_RUNWAY, 0
        for split, group in files.items():
            folder = output / split / scene
            folder.mkdir(parents=True)
            for file in group:
                target = folder / f"{scene}_{number:03d}.jpg"
                prepare(file, side).save(target, **jpeg)
                listed.append(f"{target.relative_to(output).as_posix()} {file.parent.name}/{file.name}")
                number += 1
    (output / "FILES.txt").write_text("\n".join(listed) + "\n", encoding="utf-8")
    print(f"{len(listed)} images written to {output}, their sources to {output / 'FILES.txt'}")
    print("This is the recipe of the images behind docs/results.md, not the same list of files, which is not known.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
