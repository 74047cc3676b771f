"""Makes one page to look at: what `eval_sr.py --save-images FOLDER` wrote -> FOLDER/compare.html, a single file that
needs no network. It shows two methods with a slider between them, at 1x to 4x without smoothing, and their figures.

    python tools/compare_page.py FOLDER
"""

import base64
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

PAGE = r"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Compare methods</title><style>
body { margin: 1rem; background: #fff; color: #111; font: 16px/1.4 sans-serif }
label { display: inline-block; margin: 0 1rem .5rem 0 }
select, input, button { font: inherit; color: inherit }
:focus-visible { outline: 3px solid #0050b3; outline-offset: 2px }
#view { position: relative; overflow: hidden; border: 1px solid #111; touch-action: none; cursor: ew-resize }
#view img { position: absolute; left: 0; top: 0; width: 100%; height: 100%; image-rendering: pixelated }
#line { position: absolute; top: 0; bottom: 0; width: 4px; margin-left: -2px; background: #fff; outline: 1px solid }
#split { display: block; margin: .5rem 0 } table { border-collapse: collapse }
td, th { border: 1px solid #555; padding: .2rem .6rem; text-align: right } th:first-child { text-align: left }
</style></head><body><h1>Compare methods</h1><form id="form" onsubmit="return false">
<label>Scene <select id="scene"></select></label><label>Image <select id="image"></select></label>
<label>Left <select id="left"></select></label><label>Right <select id="right"></select></label>
<label>Zoom <select id="zoom"><option>1</option><option selected>2</option><option>3</option><option>4</option></select>
</label></form><div style="overflow:auto"><div id="view"><img id="under" alt="" draggable="false">
<img id="over" alt="" draggable="false"><div id="line"></div></div></div>
<input id="split" type="range" min="0" max="100" step="any" value="50" aria-label="Share of the left method in percent">
<table><thead><tr><th scope="col">method</th><th scope="col">PSNR (dB)</th><th scope="col">SSIM</th>
<th scope="col">LPIPS</th></tr></thead><tbody id="figures"></tbody></table>
<p>Drag on the image, or move the slider with the arrow keys. n and p show the next and the previous image, 1 to 4 set
the zoom, x swaps the two methods.</p><noscript>This page needs JavaScript.</noscript>
<script id="data" type="application/json">DATA</script><script>
const data = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
const fill = (id, names) => {  // keeps the choice where the new list has it, too
  const old = $(id).value;
  $(id).replaceChildren(...names.map(name => new Option(name, name)));
  if (names.includes(old)) $(id).value = old;
};
function show() {
  const images = data.images[$("scene").value];
  fill("image", Object.keys(images));
  const one = images[$("image").value], methods = Object.keys(one.pixels), zoom = +$("zoom").value;
  fill("left", methods);
  fill("right", methods);
  $("over").src = one.pixels[$("left").value];
  $("under").src = one.pixels[$("right").value];
  $("over").alt = $("left").value;
  $("under").alt = $("right").value;
  $("view").style.width = zoom * one.size[0] + "px";  // CSS px are shared out over the screen's own
  $("view").style.height = zoom * one.size[1] + "px";
  $("split").style.width = zoom * one.size[0] + "px";
  $("figures").replaceChildren(...["left", "right"].map(side => {
    const row = document.createElement("tr"), name = $(side).value, cells = one.figures[name] || ["", "", ""];
    row.append(Object.assign(document.createElement("th"), {scope: "row", textContent: side + ": " + name}));
    for (const cell of cells) row.append(Object.assign(document.createElement("td"), {textContent: cell}));
    return row;
  }));
  split();
}
function split() {
  $("over").style.clipPath = `inset(0 ${100 - $("split").value}% 0 0)`;
  $("line").style.left = $("split").value + "%";
}
function drag(event) {
  if (!event.buttons) return;
  const box = $("under").getBoundingClientRect();
  $("split").value = Math.min(100, Math.max(0, 100 * (event.clientX - box.left) / box.width));
  split();
}
function step(by) {
  $("image").selectedIndex = Math.min($("image").length - 1, Math.max(0, $("image").selectedIndex + by));
  show();
}
$("view").onpointerdown = event => { $("view").setPointerCapture(event.pointerId); drag(event); };
$("view").onpointermove = drag;
$("split").oninput = split;
$("form").onchange = show;
onkeydown = event => {
  if (event.target.tagName == "SELECT" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key == "n") step(1);
  if (event.key == "p") step(-1);
  if ("1234".includes(event.key)) $("zoom").value = event.key;
  if (event.key == "x") [$("left").value, $("right").value] = [$("right").value, $("left").value];
  show();
};
fill("scene", Object.keys(data.images));
show();
for (const [id, name] of [["left", data.left], ["right", data.right]])
  if ([...$(id).options].some(option => option.value == name)) $(id).value = name;
show();
</script></body></html>
"""
FIRST = ("ldm_same_nfe_bp", "agent")  # the methods that are shown first, left and right
ORDER = ("lr", "bicubic", "ldm", "ldm_same_nfe", "ldm_same_nfe_bp", "agent", "reward_gradient", "autoencoder", "hr")


@dataclass
class Args:
    folder: tyro.conf.Positional[str]  # what eval_sr.py --save-images wrote: METHOD/SCENE/NAME.png


def figures_of(folder: Path) -> dict[tuple[str, str, str], list[str]]:
    """{(method, scene, image): PSNR, SSIM, LPIPS} out of FOLDER/table.csv; empty where there is none."""
    found = {}
    if (folder / "table.csv").is_file():
        with open(folder / "table.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                cells = [f"{float(row[k]):.{digits}f}" if row[k] else "n/a"
                         for k, digits in (("psnr", 2), ("ssim", 3), ("lpips", 3))]  # fmt: skip
                for name in {row["image"], Path(row["image"]).stem}:
                    found[row["method"], row["scene"], name] = cells
    return found


def main(args: Args) -> None:
    folder = Path(args.folder)
    methods = sorted(path.name for path in folder.glob("*") if any(path.glob("*/*.png")))
    methods.sort(key=lambda name: ORDER.index(name) if name in ORDER else ORDER.index("autoencoder") - 0.5)
    if not methods:
        print(f"error: {folder} holds no METHOD/SCENE/NAME.png; eval_sr.py --save-images {folder} writes them")
        sys.exit(2)
    figures, images, count = figures_of(folder), {}, 0
    listed = {key[1:] for key in figures}
    for method in methods:
        for file in sorted(folder.glob(f"{method}/*/*.png")):
            scene, content = file.parent.name, file.read_bytes()
            if listed and (scene, file.stem) not in listed:
                continue  # it is of an earlier table
            one = images.setdefault(scene, {}).setdefault(file.stem, {"size": [0, 0], "pixels": {}, "figures": {}})
            size = [int.from_bytes(content[at : at + 4], "big") for at in (16, 20)]  # width and height, PNG's IHDR
            one["size"] = max(one["size"], size)  # LR is shown at the size of the others
            one["pixels"][method] = "data:image/png;base64," + base64.b64encode(content).decode()
            one["figures"] |= {method: figures[key]} if (key := (method, scene, file.stem)) in figures else {}
            count += 1
    data = json.dumps({"images": dict(sorted(images.items())), "left": FIRST[0], "right": FIRST[1]})
    page = PAGE.replace("DATA", data.replace("<", "\\u003c"))
    (folder / "compare.html").write_text(page, encoding="utf-8")
    print(f"{folder / 'compare.html'}: {count} images of {len(methods)} methods, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
