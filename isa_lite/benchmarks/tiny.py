"""Small trees in the official layouts, of rendered scenes, to try everything without photographs.

`write_tiny("cirr", "runs/tiny/cirr")` writes annotations and images as the benchmark's own archive
holds them, with its peculiarities. No number on it says anything about photographs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from isa_lite.benchmarks.common import one_of
from isa_lite.benchmarks.fashioniq import CATEGORIES
from isa_lite.support.checkpoint import write_text
from isa_lite.support.parameters import checked, path_name, whole
from isa_lite.world import scenes
from isa_lite.world.scenes import Modification, Scene

#: What every figure and table of such a tree has to say.
LABEL = "tiny tree of rendered scenes, not the benchmark"
#: CIRCO's names for what a query asks for, by our kinds of change.
_ASPECTS = {
    "add": "addition",
    "remove": "negation",
    "move": "spatial_relations_background",
    "background": "spatial_relations_background",
    "size": "comparative_statement",
    "color": "compare_change",
    "style": "compare_change",
}


@checked(root=path_name(), queries=whole(2, 10**5), seed=whole(0), size=whole(8, 4096))
def write_tiny(
    benchmark: str,
    root: str | Path,
    queries: int = 40,
    seed: int = 0,
    size: int = scenes.IMAGE_SIZE,
) -> Path:
    """A tree of a benchmark's validation and test split (FashionIQ: of each category) below `root`,
    from a seed; returns `root`.

    Files of an earlier call are written over. Raises ValueError for fewer than 2 queries.
    """
    one_of("benchmark", benchmark, tuple(_WRITERS))
    root = Path(root)
    said = f"{LABEL} ({benchmark}, {queries} queries a split, seed {seed})\n"
    write_text(root / "README.txt", said)
    _WRITERS[benchmark](root, queries, seed, size)
    return root


def _json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _picture(path: Path, scene: Scene, rng: np.random.Generator, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes.render(scene, int(rng.integers(2**31)), size).save(path, quality=95)


def _changed(
    base: Scene, rng: np.random.Generator, count: int, kinds: tuple[str, ...] | None = None
) -> list[tuple[Scene, Modification]]:
    """`count` different scenes, one change away from `base` each; the first one by `kinds`."""
    found: list[tuple[Scene, Modification]] = []
    while len(found) < count:
        scene, change = scenes.modify(base, rng, None if found else kinds)
        if scene not in (other for other, _ in found):
            found.append((scene, change))
    return found


def _fashioniq(root: Path, queries: int, seed: int, size: int) -> None:
    """Two captions a query, a change each; split files list more images; some names are shared."""
    for s, split in enumerate(("val", "test")):
        names: list[str] = []
        for c, category in enumerate(CATEGORIES):
            shared = names[:5] if category == "toptee" else []  # a few of the shirts
            rng = np.random.default_rng((seed, s, c, 21))
            names = _category(root, category, split, queries, rng, size)
            _json(root / f"image_splits/split.{category}.{split}.json", names + shared)


def _category(
    root: Path, category: str, split: str, queries: int, rng: np.random.Generator, size: int
) -> list[str]:
    names: list[str] = []

    def picture(scene: Scene) -> str:
        names.append(f"{split}-{category}-{len(names):04d}")
        ending = "jpg" if len(names) % 2 else "png"
        _picture(root / "images" / f"{names[-1]}.{ending}", scene, rng, size)
        return names[-1]

    entries = []
    for i in range(queries):
        empty = split == "val" and i == 0 and category != "dress"
        kinds = ("color",)
        if not empty:
            kinds = ("background", str(rng.choice(["color", "size", "move", "style"])))
        base = scenes.sample_scene(rng)
        (target, change), *others = _changed(base, rng, 3, kinds)
        candidate, wanted = picture(base), picture(target)
        captions = change.text.split(" and ") + [""] * empty
        answer = {"target": wanted} if split == "val" else {}
        entries.append({"candidate": candidate, "captions": captions} | answer)
        for scene, _ in others:  # in the split file, in no triplet
            picture(scene)
    _json(root / f"captions/cap.{category}.{split}.json", entries)
    return names


def _cirr(root: Path, queries: int, seed: int, size: int) -> None:
    """Sets of six below img_raw/: the reference, and five scenes one change away from it."""
    for s, split in enumerate(("val", "test1")):
        rng = np.random.default_rng((seed, s, 22))
        folder, paths, entries = "dev" if split == "val" else split, {}, []
        for i in range(queries):
            base = scenes.sample_scene(rng)
            others = _changed(base, rng, 5)
            members = [f"{folder}-{i}-0-img{m}" for m in range(6)]
            for name, scene in zip(members, [base, *(scene for scene, _ in others)], strict=True):
                paths[name] = f"./{folder}/{name}.png"
                _picture(root / "img_raw" / folder / f"{name}.png", scene, rng, size)
            chosen = int(rng.integers(5))
            reference, target = members[0], members[1 + chosen]
            entry = {"pairid": 10 * i + s, "reference": reference}
            entry |= {"caption": others[chosen][1].text}
            if split == "val":
                entry |= {"target_hard": target, "target_soft": {target: 1.0}}
            order = [members[j] for j in rng.permutation(6)]
            group = {"id": i, "members": order, "reference_rank": order.index(reference)}
            entries.append(entry | {"img_set": group})
        _json(root / f"cirr/captions/cap.rc2.{split}.json", entries)
        _json(root / f"cirr/image_splits/split.rc2.{split}.json", paths)


def _circo(root: Path, queries: int, seed: int, size: int) -> None:
    """One to four right answers (renderings of one scene), semantic aspects, one gallery for both.

    A picture of another query that happens to show the scene is a right answer, too.
    """
    rng = np.random.default_rng((seed, 23))
    pictures: list[dict] = []
    shown: dict[Scene, list[int]] = {}

    def picture(scene: Scene) -> int:
        number = 7 * len(pictures) + 1000
        shown.setdefault(scene, []).append(number)
        pictures.append({"id": number, "file_name": f"{number:012d}.jpg"})
        folder = root / "COCO2017_unlabeled/unlabeled2017"
        _picture(folder / pictures[-1]["file_name"], scene, rng, size)
        return number

    answers: dict[str, list[tuple[dict, Scene]]] = {}
    for split in ("val", "test"):
        answers[split] = []
        for i in range(queries):
            base = scenes.sample_scene(rng)
            (target, change), *others = _changed(base, rng, 3)
            both = set(base.objects) & set(target.objects)
            kept = sorted({f"a {o.color} {o.shape}" for o in both})
            entry = {
                "id": i,
                "reference_img_id": picture(base),
                "relative_caption": change.text,
                "shared_concept": kept[0] if kept else "colored shapes",
            }
            truths = [picture(target) for _ in range(1 + i % 4)]
            for scene, _ in others:
                picture(scene)
            if split == "val":
                aspects = {_ASPECTS[kind] for kind in change.kinds}
                aspects |= {"statement_with_conjunction"} if len(change.kinds) > 1 else set()
                entry |= {"target_img_id": truths[0], "semantic_aspects": sorted(aspects)}
            answers[split].append((entry, target))
    for split, entries in answers.items():  # not before all pictures are there
        for entry, target in entries:
            # the target first, then its other renderings, wherever they come from
            if split == "val":
                first = entry["target_img_id"]
                entry["gt_img_ids"] = [first, *(i for i in shown[target] if i != first)]
        _json(root / f"annotations/{split}.json", [entry for entry, _ in entries])
    info = root / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
    _json(info, {"images": pictures})


_WRITERS = {"fashioniq": _fashioniq, "cirr": _cirr, "circo": _circo}
