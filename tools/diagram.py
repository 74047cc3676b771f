"""Draws docs/step.svg: one step of the environment, as plain SVG.

    python tools/diagram.py

Colours come from a style sheet inside the file, which follows the reader's light or dark setting.
"""

import html
from dataclasses import dataclass
from pathlib import Path

import tyro

WIDTH, HEIGHT = 900, 430
STYLE = """
  .ground { fill: #ffffff }
  text { font: 15px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
  .small { font-size: 13px; fill: #59636e }
  .title { font-weight: 600 }
  .box { stroke-width: 1.5; stroke: #8b949e; fill: #f6f8fa }
  .frozen { stroke: #3b7dbd; fill: #e3f0fb }
  .agent { stroke: #c2571a; fill: #fdeee3 }
  .arrow { stroke: #59636e; stroke-width: 1.8; fill: none }
  .head { fill: #59636e }
  .loop { stroke-dasharray: 6 4 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 }
    text { fill: #f0f6fc }
    .small { fill: #b1bac4 }
    .box { stroke: #8b949e; fill: #212830 }
    .frozen { stroke: #58a6ff; fill: #12304f }
    .agent { stroke: #ff9b5e; fill: #4a2512 }
    .arrow { stroke: #b1bac4 }
    .head { fill: #b1bac4 }
  }
"""


@dataclass
class Args:
    output: str = "docs/step.svg"  # file to write


def text(x: float, y: float, line: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{html.escape(line)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, title: str, *lines: str) -> str:
    """A rounded box with a title and smaller lines below it."""
    middle, first = x + width / 2, y + height / 2 + 5 - 9 * len(lines)
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="box {kind}"/>']
    parts.append(text(middle, first, title, "title"))
    parts += [text(middle, first + 19 * k, line, "small") for k, line in enumerate(lines, 1)]
    return "\n".join(parts)


def arrow(*points: tuple[float, float], kind: str = "") -> str:
    """A line through points with a head at its end."""
    path = " ".join(f"{'L' if k else 'M'} {x} {y}" for k, (x, y) in enumerate(points))
    return f'<path d="{path}" class="arrow {kind}" marker-end="url(#head)"/>'


def diagram() -> str:
    """The SVG's text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="name description">',
        '<title id="name">One step of the environment</title>',
        '<desc id="description">The frozen U-Net predicts a clean latent and noise from the latent and the LR image. '
        "The agent's editor edits the clean latent in every cell, its actor chooses the stride. A DDIM step gives the "
        "next latent. At the end the frozen decoder and back-projection give the SR image and the reward.</desc>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M 0 0 L 10 5 L 0 10 z" class="head"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" class="ground"/>',
        # the LDM's row
        box(20, 40, 130, 62, "", "latent z_t", "pure noise at first"),
        box(20, 128, 130, 62, "", "LR image", "from the sensor"),
        box(200, 72, 150, 84, "frozen", "U-Net", "frozen", "one evaluation (NFE)"),
        box(410, 40, 140, 62, "", "clean latent x0", "its estimate"),
        box(410, 128, 140, 62, "", "noise", "its estimate"),
        box(690, 72, 190, 84, "", "DDIM step", "to the next latent,", "one stride further"),
        arrow((150, 71), (175, 71), (175, 100), (198, 100)),
        arrow((150, 159), (175, 159), (175, 128), (198, 128)),
        arrow((350, 100), (380, 100), (380, 71), (408, 71)),
        arrow((350, 128), (380, 128), (380, 159), (408, 159)),
        '<circle cx="610" cy="71" r="13" class="box"/>',
        text(610, 77, "+", "title"),
        arrow((550, 71), (595, 71)),
        arrow((623, 71), (655, 71), (655, 100), (688, 100)),
        arrow((550, 159), (655, 159), (655, 128), (688, 128)),
        # the agent's row
        box(200, 250, 150, 62, "", "state", "all of these, t, NFE"),
        arrow((275, 156), (275, 248)),
        box(410, 222, 140, 52, "agent", "editor", "c numbers a cell"),
        box(410, 292, 140, 52, "agent", "actor", "one number"),
        arrow((350, 272), (380, 272), (380, 248), (408, 248)),
        arrow((350, 290), (380, 290), (380, 318), (408, 318)),
        arrow((550, 248), (610, 248), (610, 86)),
        text(618, 200, "edit", "title", "start"),
        arrow((550, 318), (785, 318), (785, 158)),
        text(777, 215, "stride", "title", "end"),
        # loop and end
        arrow((785, 72), (785, 18), (85, 18), (85, 38), kind="loop"),
        text(435, 13, "until the schedule's end, or until the NFE are spent", "small"),
        box(410, 366, 140, 50, "frozen", "decoder", "frozen"),
        box(600, 366, 120, 50, "", "SR image", "back-projected"),
        box(770, 366, 110, 50, "", "reward", "in training"),
        arrow((840, 156), (840, 350), (390, 350), (390, 391), (408, 391), kind="loop"),
        text(225, 388, "at the end: the edited clean latent", "small"),
        text(225, 407, "becomes the image", "small"),
        arrow((550, 391), (598, 391)),
        arrow((720, 391), (768, 391)),
        # legend
        '<rect x="20" y="250" width="16" height="16" rx="3" class="box frozen"/>',
        text(44, 263, "frozen LDM", "small", "start"),
        '<rect x="20" y="276" width="16" height="16" rx="3" class="box agent"/>',
        text(44, 289, "agent (trained)", "small", "start"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main(args: Args) -> None:
    Path(args.output).write_text(diagram(), encoding="utf-8")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
