"""Draws the synthetic scenes that ship with the project (`runs/scenes`): eight classes named as in the paper's Table 2.

    python tools/make_scenes.py --output runs/scenes

A scene is drawn at twice its size on a canvas of 736 px, turned by a random angle, cut and scaled to 256 px.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CANVAS, SIZE = 736, 256


def fractal(rng, beta=2.0, size=CANVAS):
    """Noise (size, size) of mean 0 and deviation 1 whose power falls as 1 / frequency^beta."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    amplitude = np.maximum(np.hypot(fy, fx), 1 / size) ** (-beta / 2)
    noise = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), s=(size, size))
    return (noise - noise.mean()) / noise.std()


def ground(rng, dark, light, beta=2.2):
    """Picture of bare ground or grass: two colours mixed by fractal noise."""
    mix = np.clip(0.5 + 0.28 * fractal(rng, beta), 0, 1)[..., None]
    return Image.fromarray(np.uint8((1 - mix) * np.array(dark) + mix * np.array(light)))


def tint(rng, colour, spread=12):
    return tuple(
        int(v) for v in np.clip(np.array(colour) + rng.normal(0, spread) + rng.normal(0, spread / 3, 3), 0, 255)
    )


def shade(colour, factor):
    return tuple(int(min(255, v * factor)) for v in colour)


def crowns(rng, image, count, radius, mask=None, colours=((38, 58, 30), (58, 82, 40), (80, 98, 54))):
    """Dead leaves: tree crowns with a shadow on one side and a lit spot on the other."""
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        x, y = rng.integers(0, CANVAS, 2)
        if mask is not None and not mask[y, x]:
            continue
        r = rng.uniform(*radius)
        colour = tint(rng, colours[rng.integers(len(colours))], 9)
        draw.ellipse((x - r + r * 0.5, y - r + r * 0.5, x + r * 1.4, y + r * 1.4), fill=(22, 28, 20))
        for _ in range(9):  # clumps of leaves, so that a crown is no disc
            a, d = rng.uniform(0, 6.28), r * rng.uniform(0.2, 0.65)
            cx, cy, q = x + d * np.cos(a), y + d * np.sin(a), r * rng.uniform(0.3, 0.55)
            draw.ellipse(
                (cx - q, cy - q, cx + q, cy + q),
                fill=shade(colour, 1.0 + 0.28 * (-(np.cos(a) + np.sin(a))) * 0.6 + rng.uniform(-0.12, 0.12)),
            )


def gable(draw, x, y, w, h, colour):
    """A pitched roof: a lit and a dark half, and its shadow."""
    draw.rectangle((x + 5, y + 5, x + w + 6, y + h + 6), fill=(40, 40, 42))
    if w > h:
        draw.rectangle((x, y, x + w, y + h // 2), fill=shade(colour, 1.12))
        draw.rectangle((x, y + h // 2, x + w, y + h), fill=shade(colour, 0.78))
    else:
        draw.rectangle((x, y, x + w // 2, y + h), fill=shade(colour, 1.12))
        draw.rectangle((x + w // 2, y, x + w, y + h), fill=shade(colour, 0.78))


def flat_roof(rng, draw, x, y, w, h, colour):
    """A flat roof with a parapet, plant on top and a long shadow."""
    draw.rectangle((x + 9, y + 9, x + w + 10, y + h + 10), fill=(44, 45, 48))
    draw.rectangle((x, y, x + w, y + h), fill=shade(colour, 1.15))
    draw.rectangle((x + 3, y + 3, x + w - 3, y + h - 3), fill=colour)
    for _ in range(int(w * h / 1500)):
        a, b = x + rng.integers(4, max(5, w - 14)), y + rng.integers(4, max(5, h - 14))
        s = rng.integers(4, 10)
        draw.rectangle((a + 2, b + 2, a + s + 2, b + s + 2), fill=shade(colour, 0.6))
        draw.rectangle((a, b, a + s, b + s), fill=shade(colour, rng.uniform(0.8, 1.3)))


def ribbed_roof(draw, x, y, w, h, colour, pitch):
    """A long shed: its roof is ribbed, with a ridge in the middle."""
    draw.rectangle((x + 7, y + 7, x + w + 8, y + h + 8), fill=(48, 48, 50))
    draw.rectangle((x, y, x + w, y + h), fill=colour)
    for a in range(x, x + w, pitch):
        draw.line((a, y, a, y + h), fill=shade(colour, 0.86), width=2)
    draw.rectangle((x, y + h // 2, x + w, y + h), outline=shade(colour, 0.7))
    draw.line((x, y + h // 2, x + w, y + h // 2), fill=shade(colour, 1.2), width=3)


def cars(rng, draw, x0, y0, x1, y1, share=0.7):
    """A parking lot: marked bays, most of them with a car."""
    draw.rectangle((x0, y0, x1, y1), fill=tint(rng, (105, 105, 105), 6))
    for y in range(y0 + 4, y1 - 22, 34):
        for x in range(x0 + 4, x1 - 10, 12):
            draw.line((x, y, x, y + 20), fill=(170, 170, 168))
            if rng.random() < share:
                colour = tint(
                    rng,
                    ((215, 215, 215), (60, 62, 66), (130, 40, 38), (60, 80, 120), (150, 152, 155))[rng.integers(5)],
                    10,
                )
                draw.rectangle((x + 2, y + 2, x + 9, y + 18), fill=colour)
                draw.rectangle((x + 3, y + 6, x + 8, y + 9), fill=shade(colour, 0.45))


def road(rng, draw, points, width, colour=(112, 112, 112), dashes=True):
    draw.line(points, fill=shade(colour, 1.3), width=width + 6, joint="curve")
    draw.line(points, fill=tint(rng, colour, 6), width=width, joint="curve")
    if dashes:
        (xa, ya), (xb, yb) = points[0], points[-1]
        steps = int(np.hypot(xb - xa, yb - ya) / 26)
        for k in range(steps):
            p, q = k / steps, (k + 0.5) / steps
            draw.line(
                (xa + p * (xb - xa), ya + p * (yb - ya), xa + q * (xb - xa), ya + q * (yb - ya)),
                fill=(205, 205, 195),
                width=2,
            )


def blocks(rng, cell_w, cell_h, gap):
    """Cells of a street grid, with jitter: (x, y, w, h)."""
    x = -int(rng.integers(0, cell_w))
    while x < CANVAS:
        w = int(cell_w * rng.uniform(0.8, 1.25))
        y = -int(rng.integers(0, cell_h))
        while y < CANVAS:
            h = int(cell_h * rng.uniform(0.8, 1.25))
            yield x, y, w - gap, h - gap
            y += h
        x += w


def dense_residential(rng):
    image = ground(rng, (78, 92, 58), (140, 138, 104))
    draw = ImageDraw.Draw(image)
    roofs = ((150, 92, 72), (120, 112, 108), (172, 160, 146), (98, 84, 78), (140, 118, 96))
    for x, y, w, h in blocks(rng, 330, 150, 26):
        draw.rectangle((x - 26, y - 26, x + w + 26, y + h + 26), fill=tint(rng, (118, 118, 118), 5))
        image.paste(ground(rng, (84, 98, 62), (146, 142, 108)).crop((0, 0, max(w, 1), max(h, 1))), (x, y))
        side = int(rng.integers(38, 50))
        for a in range(x + 4, x + w - side, side + int(rng.integers(6, 12))):
            for b in (y + 6, y + h // 2 + 6):
                s, t = side - int(rng.integers(4, 14)), h // 2 - int(rng.integers(14, 24))
                if rng.random() < 0.93:
                    gable(draw, a, b, s, max(t, 18), tint(rng, roofs[rng.integers(5)], 14))
    crowns(rng, image, int(rng.integers(90, 260)), (5, 12))
    return image


def commercial_area(rng):
    image = ground(rng, (120, 120, 116), (150, 148, 142))
    draw = ImageDraw.Draw(image)
    for x, y, w, h in blocks(rng, 250, 210, 34):
        draw.rectangle((x - 34, y - 34, x + w + 34, y + h + 34), fill=tint(rng, (104, 104, 106), 5))
        draw.rectangle((x, y, x + w, y + h), fill=tint(rng, (158, 154, 148), 8))
        if rng.random() < 0.3:
            cars(rng, draw, x + 6, y + 6, x + w - 6, y + h - 6)
            continue
        for a, b, s, t in (
            (x + 6, y + 6, w // 2 - 14, h - 20),
            (x + w // 2 + 6, y + 6, w // 2 - 18, h // 2 - 12),
            (x + w // 2 + 6, y + h // 2 + 8, w // 2 - 18, h // 2 - 22),
        ):
            flat_roof(
                rng,
                draw,
                a,
                b,
                int(s * rng.uniform(0.8, 1)),
                int(t * rng.uniform(0.8, 1)),
                tint(
                    rng,
                    ((190, 188, 184), (150, 146, 142), (120, 96, 84), (98, 104, 114), (212, 208, 198))[rng.integers(5)],
                    10,
                ),
            )
    crowns(rng, image, 70, (4, 9))
    return image


def industrial_area(rng):
    image = ground(rng, (126, 120, 108), (160, 152, 138))
    draw = ImageDraw.Draw(image)
    for x, y, w, h in blocks(rng, 300, 190, 30):
        draw.rectangle((x - 30, y - 30, x + w + 30, y + h + 30), fill=tint(rng, (110, 109, 106), 5))
        draw.rectangle((x, y, x + w, y + h), fill=tint(rng, (150, 144, 132), 8))
        kind = rng.random()
        if kind < 0.6:
            colour = tint(
                rng,
                ((92, 118, 150), (196, 198, 198), (150, 86, 70), (170, 172, 166), (86, 120, 108))[rng.integers(5)],
                10,
            )
            for b in range(y + 6, y + h - 40, 74):
                ribbed_roof(draw, x + 8, b, w - 20, 62, colour, int(rng.integers(7, 14)))
        elif kind < 0.8:
            r = int(rng.integers(18, 34))
            for a in range(x + r + 6, x + w - r, 2 * r + 12):
                for b in range(y + r + 6, y + h - r, 2 * r + 12):
                    draw.ellipse((a - r + 9, b - r + 9, a + r + 9, b + r + 9), fill=(70, 68, 64))
                    draw.ellipse(
                        (a - r, b - r, a + r, b + r), fill=tint(rng, (206, 206, 202), 6), outline=(150, 150, 148)
                    )
                    draw.line((a, b, a + r * 0.7, b - r * 0.7), fill=(150, 150, 148), width=2)
        else:
            cars(rng, draw, x + 6, y + 6, x + w - 6, y + h - 6, 0.5)
    return image


def railway_station(rng):
    image = ground(rng, (98, 90, 80), (138, 128, 114))
    draw = ImageDraw.Draw(image)
    y, shed = int(rng.integers(60, 140)), int(rng.integers(150, 330))
    for k in range(int(rng.integers(9, 15))):
        for a in range(0, CANVAS, 9):
            draw.line((a, y - 8, a, y + 8), fill=tint(rng, (84, 76, 70), 5), width=3)
        for b in (y - 5, y + 5):
            draw.line((0, b, CANVAS, b), fill=(176, 172, 168), width=2)
        if rng.random() < 0.3:
            x, colour = (
                int(rng.integers(-100, 400)),
                tint(rng, ((200, 204, 208), (60, 90, 140), (150, 60, 50), (110, 112, 110))[rng.integers(4)], 8),
            )
            for c in range(int(rng.integers(3, 8))):
                draw.rectangle((x + c * 92 + 3, y - 6, x + c * 92 + 88, y + 12), fill=(56, 54, 52))
                draw.rectangle((x + c * 92, y - 9, x + c * 92 + 86, y + 9), fill=shade(colour, rng.uniform(0.9, 1.1)))
                draw.line((x + c * 92 + 4, y, x + c * 92 + 82, y), fill=shade(colour, 0.8), width=3)
        y += 24
        if k % 3 == 2:
            ribbed_roof(draw, shed, y, 330, 28, tint(rng, (186, 186, 182), 10), 16)
            draw.rectangle((0, y + 30, CANVAS, y + 40), fill=tint(rng, (168, 164, 158), 5))
            y += 52
    road(rng, draw, [(0, y + 30), (CANVAS, y + 30)], 30)
    for a in range(0, CANVAS, 120):
        flat_roof(
            rng, draw, a, y + 60, int(rng.integers(60, 100)), int(rng.integers(40, 90)), tint(rng, (160, 150, 142), 18)
        )
    crowns(rng, image, 60, (5, 11), mask=np.arange(CANVAS)[:, None] > y + 50 + np.zeros((1, CANVAS)))
    return image


def runway(rng):
    image = ground(rng, (92, 104, 64), (142, 142, 98), 2.6)
    draw = ImageDraw.Draw(image)
    x, w = int(rng.integers(300, 400)), int(rng.integers(90, 140))
    colour = tint(rng, (118, 118, 120), 14)
    draw.rectangle((x - 12, 0, x + w + 12, CANVAS), fill=shade(colour, 1.12))
    draw.rectangle((x, 0, x + w, CANVAS), fill=colour)
    for _ in range(40):  # rubber
        a = x + w / 2 + rng.normal(0, w / 7)
        b = rng.integers(0, CANVAS)
        draw.line(
            (a, b, a + rng.normal(0, 3), b + rng.integers(40, 160)),
            fill=shade(colour, rng.uniform(0.75, 0.95)),
            width=int(rng.integers(1, 4)),
        )
    white = (222, 222, 216)
    for b in range(int(rng.integers(-40, 0)), CANVAS, 78):
        draw.rectangle((x + w // 2 - 2, b, x + w // 2 + 2, b + 44), fill=white)
    for a in (x + 4, x + w - 6):
        draw.line((a, 0, a, CANVAS), fill=white, width=3)
    b = int(rng.integers(150, 560))
    if rng.random() < 0.6:
        for k in range(8):
            a = x + 10 + k * (w - 20) // 8
            draw.rectangle((a, b, a + 5, b + 66), fill=white)
    taxi = int(rng.integers(150, 600))
    draw.polygon(
        [(x + w, taxi), (CANVAS, taxi - 160), (CANVAS, taxi - 100), (x + w, taxi + 70)], fill=shade(colour, 1.06)
    )
    draw.line((x + w, taxi + 34, CANVAS, taxi - 130), fill=(206, 180, 70), width=3)
    for side in (x - 26, x + w + 24):
        for b in range(0, CANVAS, 60):
            draw.ellipse((side, b, side + 3, b + 3), fill=(240, 240, 230))
    return image


def river(rng):
    image = ground(rng, (84, 100, 58), (150, 146, 102))
    draw = ImageDraw.Draw(image)
    for x, y, w, h in blocks(rng, 190, 150, 5):
        dark = tint(rng, ((96, 118, 62), (160, 146, 96), (120, 132, 78), (138, 112, 82))[rng.integers(4)], 10)
        image.paste(ground(rng, dark, shade(dark, 1.16)).crop((0, 0, max(w, 1), max(h, 1))), (x, y))
        if rng.random() < 0.6:
            for a in range(x, x + w, 7):
                draw.line((a, y, a, y + h), fill=shade(dark, 0.93))
    t = np.linspace(-60, CANVAS + 60, 90)
    centre = (
        CANVAS / 2 + rng.uniform(40, 130) * np.sin(t / rng.uniform(80, 150) + rng.uniform(0, 6)) + rng.uniform(-60, 60)
    )
    width = rng.uniform(70, 190)
    path = list(zip(t.tolist(), centre.tolist()))
    bank = Image.new("L", image.size)
    ImageDraw.Draw(bank).line(path, fill=255, width=int(width + 70), joint="curve")
    wet = Image.new("L", image.size)
    ImageDraw.Draw(wet).line(path, fill=255, width=int(width), joint="curve")
    ragged = np.array(wet.filter(ImageFilter.GaussianBlur(9))) + 42 * fractal(rng, 2.4) > 128
    image.paste(ground(rng, (150, 138, 108), (186, 174, 144)), mask=bank.filter(ImageFilter.GaussianBlur(8)))
    crowns(rng, image, 1500, (5, 12), mask=(np.array(bank.filter(ImageFilter.GaussianBlur(14))) > 30) & ~ragged)
    water = tint(rng, ((62, 82, 78), (98, 104, 78), (44, 62, 84))[rng.integers(3)], 8)
    image.paste(ground(rng, water, shade(water, 1.14), 2.8), mask=Image.fromarray(np.uint8(255 * ragged)))
    if rng.random() < 0.4:
        x = int(rng.integers(200, 540))
        draw.rectangle((x + 7, 0, x + 33, CANVAS), fill=(50, 56, 54))
        road(rng, draw, [(x, 0), (x, CANVAS)], 20, (140, 140, 138))
    return image


def forest(rng):
    image = ground(rng, (30, 40, 24), (56, 66, 36))
    light = fractal(rng, 3.0)
    base = np.array(((34, 54, 28), (50, 74, 38), (70, 90, 48), (90, 100, 60)))
    crowns(rng, image, 4200, (6, 17), mask=light > rng.uniform(-2.5, -1.0), colours=base + rng.normal(0, 7, 3))
    return image


def desert(rng):
    y, x = np.mgrid[:CANVAS, :CANVAS] / CANVAS
    warp = fractal(rng, 3.8)
    phase = 2 * np.pi * (rng.uniform(5, 12) * x + 0.55 * warp + rng.uniform(1, 3) * y)
    ridge = ((phase / (2 * np.pi)) % 1.0) ** rng.uniform(1.4, 2.6)  # a dune rises slowly and falls at once
    slope = np.gradient(ridge + 0.04 * fractal(rng, 2.8), axis=1)
    ripples = 0.05 * np.sin(phase * rng.uniform(7, 11) + 2 * fractal(rng, 2.8))
    light = np.clip(
        1 + 0.3 * (ridge - 0.5) - 6 * np.clip(slope, -0.04, 0.04) + ripples + 0.03 * fractal(rng, 1.2), 0.45, 1.35
    )
    colour = np.array(((206, 172, 124), (190, 152, 110), (214, 190, 150))[rng.integers(3)])
    return Image.fromarray(np.uint8(np.clip(light[..., None] * colour, 0, 255)))


def draw_scene(name, seed):
    """One 256 px RGB picture of the class `name`; the same seed gives the same picture."""
    rng = np.random.default_rng([sum(map(ord, name)), seed])
    image = globals()[name](rng).rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
    edge = (CANVAS - 2 * SIZE) // 2  # 512 px around the centre: its corners stay inside the canvas when turned
    image = image.crop((edge, edge, edge + 2 * SIZE, edge + 2 * SIZE)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32)
    pixels = pixels + 5 * fractal(rng, 1.3, SIZE)[..., None] + rng.normal(0, 1.5, pixels.shape)  # soil and sensor
    contrast, haze = rng.uniform(0.85, 1.1), rng.uniform(-12, 12)
    return Image.fromarray(np.uint8(np.clip((pixels - 128) * contrast + 128 + haze, 0, 255)))


SCENES = "commercial_area dense_residential desert forest industrial_area railway_station river runway".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/scenes")
    parser.add_argument("--train", type=int, default=16, help="pictures a class")
    parser.add_argument("--test", type=int, default=5, help="pictures a class, of other seeds")
    args = parser.parse_args()
    for name in SCENES:
        for split, first, count in (("train", 0, args.train), ("test", 10_000, args.test)):
            folder = Path(args.output, split, name)
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                draw_scene(name, first + i).save(folder / f"{name}_{i:03d}.jpg", quality=75)
    Path(args.output, "TITLE").write_text("synthetic scenes\n")


if __name__ == "__main__":
    main()
