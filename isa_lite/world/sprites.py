"""The drawings of the world of things: from packages of open emoji to the sprite sheets in
`data/things`.

The nouns are those that all four styles draw recognizably, chosen by eye. No people, hands, flags,
letters, brands or weapons. `python -m isa_lite sprites` makes the sheets again.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

CELL, COLUMNS = 96, 14  # pixels of a sprite, sprites in a row of a sheet
#: Style: the npm package with its drawings, and the exact version.
PACKAGES = {
    "3D": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "cartoon": ("@iconify-json/noto", "1.2.9"),
    "sticker": ("@iconify-json/twemoji", "1.2.5"),
}
#: Code points and nouns. A star: the noun takes colors. Its main hue is then that of a large part
#: in every style, and the drawing looks good in any color.
NOUNS = """
1f415 dog, 1f408 cat, 1f401 mouse, 1f407 rabbit, 1f98a fox, 1f43b bear, 1f43c panda, 1f428 koala,
1f981 lion, 1f405 tiger, 1f404 cow, 1f416 pig, 1f411 sheep, 1f40e horse, 1f992 giraffe,
1f418 elephant, 1f998 kangaroo, 1f435 monkey, 1f994 hedgehog, 1f43f squirrel, 1f425 chick,
1f986 duck, 1f9a2 swan, 1f989 owl, 1f99c parrot, 1f99a peacock, 1f9a9 flamingo, 1f427 penguin,
1f438 frog, 1f40a crocodile, 1f422 turtle, 1f40d snake, 1f996 dinosaur*, 1f433 whale, 1f988 shark,
1f420 fish*, 1f419 octopus*, 1f980 crab, 1fabc jellyfish*, 1f41a seashell, 1f40c snail,
1f98b butterfly*, 1f41b caterpillar*, 1f41d bee, 1f41e ladybug, 1f984 unicorn, 1f409 dragon*,
1f333 tree, 1f332 pine tree, 1f334 palm tree, 1f335 cactus, 1f337 tulip*, 1f339 rose*,
1f33b sunflower, 1fab4 potted plant, 1f490 bouquet of flowers, 1f344 mushroom*,
1f34e apple, 1f34b lemon, 1f34c banana, 1f349 slice of watermelon, 1f347 bunch of grapes,
1f353 strawberry, 1f34d pineapple, 1f346 eggplant, 1f951 avocado, 1f955 carrot, 1f33d ear of corn,
1f336 chili pepper, 1f35e loaf of bread, 1f950 croissant, 1f968 pretzel, 1f9c0 piece of cheese,
1f354 hamburger, 1f35f box of fries, 1f37f box of popcorn, 1f355 slice of pizza, 1f32d hot dog,
1f32e taco, 1f95a egg, 1f366 ice cream cone, 1f369 doughnut, 1f36a cookie, 1f382 birthday cake,
1f9c1 cupcake, 1f36b bar of chocolate, 1f36d lollipop, 2615 cup of coffee, 1fad6 teapot*,
1f682 locomotive, 1f68c bus, 1f692 fire truck, 1f697 car*, 1f6fb pickup truck*, 1f69c tractor,
1f3cd motorcycle*, 1f6f5 scooter*, 1f6b2 bicycle, 1f6f9 skateboard, 1f6fc roller skate*,
26f5 sailboat, 2708 airplane, 1f681 helicopter*, 1f680 rocket, 1f6f8 flying saucer, 1f3e0 house,
1f3f0 castle, 26fa tent*, 2693 anchor, 26c4 snowman, 2602 umbrella*, 1f383 jack-o'-lantern,
1f388 balloon*, 1f381 present, 1f9f8 teddy bear, 1fa81 kite, 1f9e9 puzzle piece, 26bd soccer ball,
1f3c0 basketball, 1f94a boxing glove*, 1fa80 yo-yo*, 1f3ae game controller, 1f916 robot,
1f9f6 ball of yarn*, 1f3b8 guitar*, 1f3ba trumpet, 1f941 drum, 1fa97 accordion*, 1f514 bell,
1f4fb radio, 1f4fa television, 1f4f7 camera, 1f4bb laptop, 260e telephone*, 1f4a1 light bulb,
1f56f candle, 1f4d5 book*, 270f pencil, 2702 pair of scissors*, 1f4cc pushpin*, 1f511 key,
1f512 padlock, 1f528 hammer, 1f9f2 magnet, 1fa9c ladder, 1f9f0 toolbox*, 1f52c microscope,
231b hourglass, 23f0 alarm clock*, 1f9fa basket, 1faa3 bucket*, 1fa91 chair*, 1f6cf bed,
1f3a9 top hat, 1f451 crown, 1f9e2 cap*, 1f576 pair of sunglasses, 1f457 dress*, 1f9e3 scarf*,
1f45f sneaker, 1f392 backpack*, 1f9f3 suitcase*, 1f45c handbag*, 1f6d2 shopping cart,
1f48e diamond*, 1f3c6 trophy, 1fa90 planet
"""


def nouns() -> dict[str, tuple[str, bool]]:
    """Of each noun its code point, and whether it takes colors."""
    entries = (entry.split(maxsplit=1) for entry in NOUNS.replace("\n", " ").split(","))
    return {noun.strip(" *"): (code, noun.strip().endswith("*")) for code, noun in entries}


def find_packages(folder: Path) -> dict[str, Path]:
    """Where under `folder` each style's package is. Raises ValueError where one is missing."""
    found = {}
    for file in sorted(folder.rglob("package.json")):
        told = json.loads(file.read_text(encoding="utf-8"))
        found[told.get("name"), told.get("version")] = file.parent
    missing = [f"{name}@{version}" for name, version in PACKAGES.values()]
    missing = [m for m in missing if tuple(m.rsplit("@", 1)) not in found]
    if missing:
        raise ValueError(
            f"parameter 'packages': {folder} holds no {', '.join(missing)}; "
            f"npm install --prefix {folder} {' '.join(missing)}"
        )
    return {style: found[package] for style, package in PACKAGES.items()}


def _drawings(package: Path, codes: list[str]) -> list[Image.Image]:
    """The drawings of these code points, RGBA, twice as large as a sprite or larger."""
    if (package / "assets").is_dir():
        files = {f.stem.removesuffix("-fe0f"): f for f in (package / "assets").iterdir()}
        return [Image.open(files[code]).convert("RGBA") for code in codes]
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ImportError("sprites need resvg_py: pip install 'isa_lite[art]'") from None
    icons, names = (
        json.loads((package / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("icons", "chars")
    )
    names = {code.removesuffix("-fe0f"): name for code, name in names.items()}
    side, images = icons["width"], []
    for code in codes:
        body = icons["icons"][names[code]]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{body}</svg>'
        png = svg_to_bytes(svg_string=svg, width=4 * CELL, skip_system_fonts=True)
        images.append(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    return images


def _sprite(drawing: Image.Image, border: int) -> Image.Image:
    """A drawing as large as a cell allows, with a white border of so many pixels."""
    drawing = drawing.crop(drawing.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    room = CELL - 2 - 3 * border  # a border fades out a little beyond its width
    scale = room / max(drawing.size)
    size = tuple(max(1, round(side * scale)) for side in drawing.size)
    small = drawing.resize(size, Image.Resampling.LANCZOS)
    sprite = Image.new("RGBA", (CELL, CELL))
    sprite.paste(small, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    if border:
        wide = sprite.getchannel("A").filter(ImageFilter.MaxFilter(2 * border + 1))
        wide = wide.filter(ImageFilter.GaussianBlur(1))
        paper = Image.merge("RGBA", (*[Image.new("L", wide.size, 255)] * 3, wide))
        sprite = Image.alpha_composite(paper, sprite)
    sprite.putalpha(sprite.getchannel("A").point(lambda a: a if a >= 16 else 0))
    return sprite


def main_color(sprite: Image.Image, petals: bool = False) -> tuple[float, float, float, float]:
    """The canonical color of a drawing: the commonest hue among its strong colors, the median
    saturation and value there, and which part of the drawing has about that hue, all 0 to 1.

    petals: greens do not count, and pale colors do; a tulip is pink, however large its leaves.
    """
    alpha = np.asarray(sprite.getchannel("A")) > 128
    hue, saturation, value = np.moveaxis(np.asarray(sprite.convert("RGB").convert("HSV")), 2, 0)
    hue, saturation, value = hue / 255, saturation / 255, value / 255
    strong = alpha & (saturation > (0.2 if petals else 0.35)) & (value > 0.25)
    if petals:
        strong &= abs(hue - 0.3) > 0.12
    bins = (hue[strong] * 72).astype(int) % 72
    votes = np.bincount(bins, (saturation * value)[strong], 72)
    peak = (sum(np.roll(votes, shift) for shift in range(-3, 4)).argmax() + 0.5) / 72
    off = (hue - peak + 0.5) % 1 - 0.5
    near = strong & (abs(off) < 0.085)
    if not near.any():
        return 0.0, 0.0, 0.0, 0.0
    main = (peak + np.median(off[near])) % 1
    found = main, np.median(saturation[near]), np.median(value[near]), near.sum() / alpha.sum()
    return tuple(round(float(x), 3) for x in found)


def write_sprites(packages: Path, out: Path) -> None:
    """Write a sheet for each style, the textures, and index.json into `out`. Raises ValueError for
    packages that are missing, and for a noun that should take colors and has no main color.
    """
    try:
        from skimage import data
    except ImportError:
        raise ImportError("sprites need scikit-image: pip install 'isa_lite[art]'") from None
    table = nouns()
    index = {
        noun: {"code": code, "colors": colors, "main": {}} for noun, (code, colors) in table.items()
    }
    for style, package in find_packages(packages).items():
        sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(table) // COLUMNS) * CELL))
        drawings = _drawings(package, [code for code, _ in table.values()])
        for i, (noun, drawing) in enumerate(zip(table, drawings, strict=True)):
            sprite = _sprite(drawing, 4 if style == "sticker" else 0)
            sheet.paste(sprite, (i % COLUMNS * CELL, i // COLUMNS * CELL))
            color = main_color(sprite, petals=noun in ("tulip", "rose"))
            if index[noun]["colors"] and color[3] < 0.2:
                raise ValueError(f"{noun!r} in style {style!r} has no main color")
            index[noun]["main"][style] = color
        sheet.save(out / f"{style}.webp", quality=90)
    for name in ("brick", "grass", "gravel"):
        Image.fromarray(getattr(data, name)()).save(out / f"{name}.webp", quality=80)
    told = {"cell": CELL, "columns": COLUMNS, "packages": PACKAGES}
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(entry)}" for n, entry in index.items())
    text = json.dumps(told)[:-1] + f', "nouns": {{\n{rows}\n}}}}\n'
    (out / "index.json").write_text(text, encoding="utf-8")
