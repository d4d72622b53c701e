"""What `fuzz.py` tries: readers of files, public functions, commands and notebooks, with valid
input for each.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import io
import json
import shutil
import sys
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import torch
from conftest import write_blip, write_vl_model
from fuzz_damage import bad_value, bad_word, damage
from PIL import Image
from torch.nn import functional as F

from isa_lite import commands, distill, prompt, query_encoder
from isa_lite.benchmarks import common, run, tiny
from isa_lite.course import figures
from isa_lite.deploy import client, export, query_timing, step_cost
from isa_lite.experiments import cards, compare, failures, growth, sweep
from isa_lite.methods.baselines import UNTRAINED
from isa_lite.models import vl_model
from isa_lite.pretraining import folder as pretrain_folder
from isa_lite.pretraining import folder_batches, light_backbone
from isa_lite.pretraining import towers as pretrain
from isa_lite.retrieval import embed, gallery, metrics, own_data, results, scene_queries
from isa_lite.support import checkpoint, images, settings, training
from isa_lite.world import icons, scenes

ROOT = Path(__file__).resolve().parents[1]
WORK = Path()  # the workspace: valid files, written once; `prepare` sets it
HELD: dict = {}  # what is loaded of them, once: `vl` and `encoder`
TINY = dict(image_size=32, embed_dim=16, vision_width=4, text_width=32, text_layers=1)
TINY |= dict(steps=2, matching_steps=1, warmup=1, num_workers=0, dtype="float32")


@dataclass
class Case:
    """What was done, in words; the names of which a refusal must give one; what is to come of it;
    the child's work.
    """

    text: str
    names: Sequence[str]
    expect: str  # refuse, same or free
    run: Callable[[Path], object]
    key: str = ""  # which of the entry's valid results it is compared with


@dataclass
class Entry:
    """An entry point: its case number i; how many there are (0: any number); and what valid input
    gives, by key.
    """

    name: str
    case: Callable[[int, Random], Case]
    count: int = 0
    valid: Callable[[], dict[str, object]] | None = None


class Reached(Exception):
    """A command got to its long work: everything was accepted."""


def told(value: object) -> str:
    text = " ".join(repr(value).split()).replace(str(WORK), "WORK")
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"


# ---------------------------------------------------------------------------------------------
# valid input


def pictures(count: int = 6, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def distilled(
    cache: Path | str,
    state: Path | str | None = None,
    shown=None,
    checkpoint_minutes: float = 5.0,
    **settings,
) -> dict:
    """Weights and losses of a run of two steps, which begins with the state in the file `state`, if
    there is one.
    """
    small = dict(
        steps=2,
        batch_size=2,
        validation=2,
        validate_every=2,
        warmup=1,
        dtype="float32",
        negatives=4,
    )
    encoder, config = copy.deepcopy(HELD["encoder"]), distill.DistillConfig(**small | settings)
    shown = pictures() if shown is None else shown
    history = distill.distill(
        shown, HELD["vl"], encoder, config, cache, state, checkpoint_minutes, progress=False
    )
    return {"weights": encoder.state_dict(), "gcd": history.gcd, "recall": history.recall}


def towers(state: Path | None = None, checkpoint_minutes: float = 5.0, **settings) -> dict:
    config = pretrain.PretrainConfig(**TINY | dict(families=1, singles=1) | settings)
    more = dict(
        log=lambda line: None, texts=["a red circle"], checkpoint_minutes=checkpoint_minutes
    )
    return {"weights": pretrain.train_towers(config, state, **more)[0].state_dict()}


def learned(cache: Path, state: Path, **settings) -> dict:
    encoder, more = (
        copy.deepcopy(HELD["encoder"]),
        {k: settings.pop(k) for k in ("checkpoint_minutes",) if k in settings},
    )
    small = dict(
        backbone=encoder.config.backbone,
        stride=encoder.config.stride,
        num_images=6,
        steps=2,
        batch_size=2,
        warmup=1,
    )
    config = light_backbone.BackboneConfig(**small | settings)
    loss = light_backbone.learn_features(
        pictures(), HELD["vl"], encoder, config, cache, state, **more
    )[0]
    return {"weights": encoder.state_dict(), "loss": loss}


def halfway(work: Callable[[], object], state: Path) -> None:
    """`work`, until the first state that is not its start is on disk, and no further."""
    save = training.save_run

    def stop(path, modules, optimizer, info):
        save(path, modules, optimizer, info)
        if info["step"]:
            raise KeyboardInterrupt

    training.save_run = stop
    with contextlib.suppress(KeyboardInterrupt):
        work()
    training.save_run = save
    assert state.is_file(), f"there is no state {state}"


def write_valid() -> None:
    """The workspace: small valid files of every kind."""
    (WORK / "images" / "sub").mkdir(parents=True)
    for i, name in enumerate(
        ("a.png", "b.jpg", "sub/c.png", "d.webp", "e.gif", "f.bmp", "g.tif", "h.jpg")
    ):
        Image.fromarray(pictures(8, 40)[i]).save(WORK / "images" / name)
    names = [
        p.relative_to(WORK / "images").as_posix() for p in sorted((WORK / "images").rglob("*.*"))
    ]
    (WORK / "captions.csv").write_text(
        "image,caption\n" + "".join(f"{n},picture number {i}\n" for i, n in enumerate(names))
    )
    triplets = [{"reference": "a.png", "modifier": "with a hat", "targets": ["b.jpg", "sub/c.png"]}]
    triplets += [{"reference": "b.jpg", "modifier": "more blue", "targets": ["e.gif"]}]
    (WORK / "triplets.json").write_text(json.dumps(triplets, indent=1))
    icons.write_icons(WORK / "icons", 100, 4, size=32)

    write_vl_model(WORK / "vl")
    write_blip(WORK / "blip")
    vl = vl_model.load_vl_model(str(WORK / "vl"))
    torch.manual_seed(0)
    encoder = query_encoder.QueryEncoder.for_model(
        vl, num_tokens=4, width=32, depth=1, backbone="mobilenetv3_small_050"
    ).eval()
    encoder.save(
        WORK / "encoder",
        {"parameters": {"seed": 0, "num_images": 8000, "steps": 800, "batch_size": 128}},
    )
    hold()
    embeddings = embed.embed_files(
        [WORK / "images" / n for n in names], vl, WORK / "shards", progress=False
    )
    gallery.Gallery(embeddings, names, vl.fingerprint).save(WORK / "gallery.safetensors")
    export.export(encoder, vl, WORK / "client")

    distilled(WORK / "targets")
    state = WORK / "distill" / "state.safetensors"
    halfway(lambda: distilled(WORK / "targets", state, checkpoint_minutes=0), state)
    state = WORK / "pretrain" / "towers.safetensors"
    halfway(lambda: towers(state, checkpoint_minutes=0), state)
    state = WORK / "backbone" / "state.safetensors"
    halfway(lambda: learned(WORK / "targets", state, checkpoint_minutes=0), state)
    checkpoint.write_tensors(
        WORK / "start" / "backbone.safetensors", encoder.backbone.model.state_dict()
    )
    config = encoder.config
    record = {
        "backbone": config.backbone,
        "stride": config.stride,
        "image_size": 64,
        "vl_model": vl.fingerprint,
        "config": {},
    }
    record |= {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "loss": 0.5,
        "minutes": 1.0,
        "command": "",
        "machine": "",
    }
    (WORK / "start" / "backbone.json").write_text(json.dumps(record))

    for name, module in run.BENCHMARKS.items():
        tasks = module.load(tiny.write_tiny(name, WORK / name, 2, size=32), "val")
        points = [F.normalize(torch.randn(len(t.files), 16)) for t in tasks]
        ranked = [
            common.rank(t, torch.eye(len(t.queries), 16), p)
            for t, p in zip(tasks, points, strict=True)
        ]
        module.write_submissions(WORK / f"{name}-sent", tasks, ranked)
    shutil.copytree(
        ROOT / "data" / "results", WORK / "results", ignore=shutil.ignore_patterns("*.png")
    )
    for folder in (settings.SCENES_CLIP, settings.SCENES_BACKBONE, settings.SCENES_ENCODER):
        shutil.copytree(
            ROOT / "data" / folder,
            WORK / "cards" / folder,
            ignore=shutil.ignore_patterns("*clip_*", "match*", "query*.safetensors"),
        )
    record = json.loads((WORK / "results" / "sweep.json").read_text())
    record["defaults"], shipped = (
        sweep.complete(sweep.notebook_defaults()),
        vl_model.load_vl_model().fingerprint,
    )
    for entry in record["runs"]:  # as if this checkout had made it
        parameters = {
            **record["defaults"],
            "single_vector": False,
            **entry["changed"],
            "seed": entry["seed"],
        }
        entry["key"] = sweep.key(parameters, shipped)
    (WORK / "results" / "sweep.json").write_text(json.dumps(record))
    stored = json.loads((WORK / "results" / "02_distillation.json").read_text())
    found = {"machine": stored["machine"], "data": "scenes", "commit": "x", **stored["runs"][0]}
    found["intervals"] = {m: {k: [v, v] for k, v in r.items()} for m, r in found["methods"].items()}
    (WORK / "metrics.json").write_text(json.dumps(found))
    kept = {
        "seed": 0,
        "data": "rendered scenes",
        "params": asdict(compare.CompareConfig()),
        "weights": {},
    }
    kept |= {
        "training_seconds": {"a": 1.0},
        "methods": {m: {"R@1": 1.0, "R@5": 2.0, "R@10": 3.0} for m in UNTRAINED},
    }
    checkpoint.write_text(WORK / "compare" / f"{vl.fingerprint}-0.json", json.dumps(kept))


def hold() -> None:
    HELD["vl"] = vl_model.load_vl_model(str(WORK / "vl"))
    HELD["encoder"] = query_encoder.QueryEncoder.load(WORK / "encoder", HELD["vl"])


# -------------------------------------------------------------------------------------------------
# readers


def reader(
    name: str,
    files: Mapping[str, str],
    use: Callable[[Path, str], object],
    free=False,
    optional=False,
    absent=(),
    after=None,
) -> Entry:
    """An entry for one who reads `files` (below the workspace, with their kinds).

    use: the folder and the file that was damaged -> what comes out; after: what else is done to a
    damaged folder, half of the times; free, optional: see `damaged_json`; absent: names of files
    that need not be there. Now and then nothing is
    damaged, and the folder has an odd name.
    """
    parts, others = (
        sorted({f.split("/")[0] for f in files}),
        [WORK / f for f in ("captions.csv", "metrics.json", "gallery.safetensors")],
    )

    def case(number: int, rng: Random) -> Case:
        file = sorted(files)[number % len(files)]
        there = Path(file).name not in absent
        text, expect, deed = damage(WORK / file, files[file], others, rng, free, optional, there)
        odd, sealed = rng.random() < 0.03, after is not None and rng.random() < 0.5
        if odd:
            text, expect = "in a folder with an odd name", "same"

        def work(place: Path) -> object:
            root = place / ("odd {name} % é 'quoted'" if odd else "case")
            root.mkdir()
            for part in parts:
                (shutil.copytree if (WORK / part).is_dir() else shutil.copy2)(
                    WORK / part, root / part
                )
            if not odd:
                deed(root / file)
            if sealed and not odd:
                after(root, file)
            return use(root, file)

        # of CIRCO's images; the names of others without their ending
        number = Path(file).stem.lstrip("0")
        return Case(
            f"{file}: {text}", (Path(file).name, *[number] * (len(number) > 3)), expect, work, file
        )

    return Entry(name, case, 0, lambda: {file: use(WORK, file) for file in files})


def printed(root: Path, *line: object) -> str:
    """What a command prints, without the names of folders. Raises what it raises."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            commands.main([str(word) for word in line])
    finally:
        print(out.getvalue())  # where the parent looks for names
    return out.getvalue().replace(str(root), "")


def read_vl(root: Path, file: str) -> dict:
    vl = vl_model.load_vl_model(str(root / file.split("/")[0]))
    ids = vl.tokenize(["a cat"])
    words, patches = (
        vl.word_vectors(ids),
        vl.encode_pixels_and_patches(vl.pixels(pictures(1, 40)))[1],
    )
    read = words if vl.matcher_reads_words else vl.text_tokens(words, ids)
    match = vl.matcher(read, ids != vl.words.pad, patches) if vl.matcher else None
    return {
        "text": vl.encode_text(["a red circle", "a cat"]),
        "images": vl.encode_images(pictures(2, 40)),
        "match": match,
    }


def read_encoder(root: Path, file: str) -> dict:
    tokens = (
        query_encoder.QueryEncoder.load(root / "encoder", HELD["vl"])
        .sentences(pictures(2, 40))
        .tokens
    )
    return {"tokens": tokens, "queries": prompt.compose(HELD["vl"], tokens, ["", "more blue"])}


def read_gallery(root: Path, file: str) -> dict:
    found = gallery.Gallery.load(root / file)
    return {
        "scores": found.search(torch.eye(2, 16), 3)[0],
        "ids": list(found.ids),
        "model": found.vl_model,
    }


def sealed(root: Path, file: str) -> None:
    """The checksums in query.json fit what is there."""
    settings = json.loads((WORK / "client" / "query.json").read_text())
    if file != "client/query.json" and (root / file).is_file():
        settings["files"][Path(file).name] = client.checksum(root / file)
        (root / "client" / "query.json").write_text(json.dumps(settings))


def read_folder(root: Path, file: str) -> dict:
    folder = images.ImageFolder(root / "images")
    return {path.name: np.asarray(image) for path, image in zip(folder.files, folder, strict=True)}


def read_said(root: Path, file: str) -> object:
    folder = images.ImageFolder(WORK / "images")
    return (
        own_data.read_captions(root / file, folder)
        if file.endswith("csv")
        else vars(own_data.read_triplets(root / file, folder))
    )


def read_start(root: Path, file: str) -> torch.Tensor:
    torch.manual_seed(0)
    settings = dict(
        backbone=HELD["encoder"].config.backbone,
        backbone_weights=str(root / "start"),
        num_tokens=2,
        width=32,
        depth=1,
    )
    encoder = query_encoder.QueryEncoder.for_model(HELD["vl"], **settings).eval()
    return encoder.features(encoder.pixels(pictures(2, 40))).detach()


def read_stored(root: Path, file: str) -> str:
    """What the notebooks print of stored results: their own cells."""
    tables, said = [], io.StringIO()
    figures.display = lambda shown: None
    for path in sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb")):
        sources = code_of(path)
        if reads := [
            source for source in sources if '/ "results" /' in source and Path(file).name in source
        ]:
            space = {"display": tables.append, "claim": print, "ranks": {"isa": np.array([1])}}
            exec(sources[0], space)
            space |= {"DATA": root, "vl": HELD["vl"]}
            with contextlib.redirect_stdout(said):
                for source in [
                    s for s in sources if "_retrieval.json" in s and "ablations" in reads[0]
                ] + reads:
                    exec(source, space)
    return said.getvalue() + "".join(table.to_string() for table in tables)


def read_card(root: Path, file: str) -> str:
    """The card that is made of a training's record; measuring takes minutes, and is left out."""
    folder, encoder = (root / file).parent, HELD["encoder"]
    table = pd.DataFrame({"isa": ["50.0 [40.0, 60.0]"]}, index=["add (9)"])
    cards.measure, cards.matching_accuracy, cards.place_accuracy = (
        lambda *a: (table, table),
        lambda *a, **k: 1.0,
        lambda vl: 1.0,
    )
    makers = {
        settings.SCENES_CLIP: lambda: cards.vl_card(folder, HELD["vl"]),
        settings.SCENES_BACKBONE: lambda: cards.backbone_card(folder),
    }
    return makers.get(folder.name, lambda: cards.encoder_card(folder, HELD["vl"], encoder))()


def read_compare(root: Path, file: str) -> str:
    kept = json.loads(next((WORK / "compare").iterdir()).read_text())
    # a record of other settings is made again, which takes minutes
    compare.rivals = lambda *arguments: kept
    return results.runs_table(
        [compare.kept_rivals(HELD["vl"], 0, compare.CompareConfig(), root / "compare")], None
    ).to_string()


def read_sweep(root: Path, file: str) -> str:
    return printed(root, "sweep", "--add", "--dry-run", "--only", "tokens", "--out", root / file)


def read_client(root: Path, file: str) -> np.ndarray:
    return client.QueryClient(root / "client", 1).encode(list(pictures(2, 40)), ["", "more blue"])


def read_shards(root: Path, file: str) -> torch.Tensor:
    return embed.embed_files(
        sorted((WORK / "images").rglob("*.*")), HELD["vl"], root / "shards", progress=False
    )


def readers() -> list[Entry]:
    def below(folder: str, **kinds: str) -> dict[str, str]:
        found = sorted(
            p for p in (WORK / folder).rglob("*") if p.is_file() and p.suffix[1:] in kinds
        )
        return {p.relative_to(WORK).as_posix(): kinds[p.suffix[1:]] for p in found}

    shown = below("images", **dict.fromkeys(("png", "jpg", "webp", "gif", "bmp", "tif"), "image"))
    both, one = dict(json="json", safetensors="tensors"), dict(json="json")
    made = [
        reader(
            "images by path", shown, lambda root, file: np.asarray(images.read_image(root / file))
        ),
        reader("images in folders", shown, read_folder),
        reader("captions.csv", {"captions.csv": "csv"}, read_said, True),
        reader("triplets.json", {"triplets.json": "json"}, read_said, True),
        reader("gallery", {"gallery.safetensors": "tensors"}, read_gallery, True),
        reader(
            "gallery, client",
            {"gallery.safetensors": "tensors"},
            lambda root, file: client.read_gallery(root / file),
            True,
        ),
        reader("query encoder", below("encoder", **both), read_encoder),
        reader("model folder", below("vl", **both), read_vl, optional=True),
        reader(
            "BLIP folder",
            below("blip", **both),
            read_vl,
            optional=True,
            absent=("preprocessor_config.json",),
        ),
        reader(
            "state of distill",
            below("distill", **both),
            lambda root, file: distilled(WORK / "targets", root / file),
        ),
        reader(
            "state of pretrain", below("pretrain", **both), lambda root, file: towers(root / file)
        ),
        reader(
            "state of light_backbone",
            below("backbone", **both),
            lambda root, file: learned(WORK / "targets", root / file),
        ),
        reader("weights to start from", below("start", **both), read_start),
        reader(
            "target cache",
            below("targets", npy="npy", **both),
            lambda root, file: distilled(root / "targets"),
        ),
        reader("embed shards", below("shards", **both), read_shards),
        reader(
            "client's files", below("client", json="json", onnx="bytes"), read_client, after=sealed
        ),
        reader(
            "metrics.json",
            {"metrics.json": "json"},
            lambda root, file: printed(root, "evaluate", root / file),
        ),
        reader(
            "metrics.json, gathered",
            {"metrics.json": "json"},
            lambda root, file: printed(root, "evaluate", root / file, "--gather", root / "x.json"),
        ),
        reader("record of compare", below("compare", **one), read_compare),
        reader(
            "record of sweep", {"results/sweep.json": "json"}, read_sweep, absent=("sweep.json",)
        ),
        reader(
            "stored results",
            below("results", **one),
            read_stored,
            True,
            absent=("sweep.json", "03_growth.json"),
        ),
        reader("records of trainings", below("cards", **one), read_card, True),
    ]
    for name in run.BENCHMARKS:

        def score(root: Path, file: str, name: str = name) -> dict:
            result = run.run(
                name,
                root / name,
                HELD["vl"],
                ("image + text",),
                None,
                run.RunConfig(progress=False, num_workers=0),
            )
            return {"methods": result.methods, "queries": result.queries, "gallery": result.gallery}

        def sent(root: Path, file: str, name: str = name) -> str:
            return printed(root, "benchmarks", name, "--root", WORK / name, "--check", root / file)

        annotated = {
            f: kind for f, kind in below(name, **one).items() if "test" not in Path(f).name
        }
        made.append(reader(f"{name}'s annotations", annotated, score, True, True))
        made.append(reader(f"{name}'s images", below(name, png="image", jpg="image"), score))
        made.append(reader(f"{name}'s submissions", below(f"{name}-sent", **one), sent))
    return made


# -----------------------------------------------------------------------------------------------
# functions


def counted(name: str, cases: list[Case]) -> Entry:
    return Entry(name, lambda i, rng: cases[i], len(cases))


def names_of(parameter: str, value: object) -> tuple[str, ...]:
    """The names of which a refusal of the value must give one: its parameter's, or of a path its
    own.
    """
    path = isinstance(value, Path) or isinstance(value, str) and len(value) > 1 and value != "-1"
    own = Path(value).name[:60] if path else ""
    return (parameter, own) if own and "\0" not in own else (parameter,)


def function_entries() -> list[Entry]:
    """Public functions with each parameter set to bad values: those given here, or else those that
    its kind says.
    """
    vl, encoder, unit, some = (
        HELD["vl"],
        HELD["encoder"],
        torch.eye(4, 16),
        F.normalize(torch.ones(4, 16) + torch.eye(4, 16)),
    )
    g = gallery.Gallery.load(WORK / "gallery.safetensors")
    n, files, two, folder = (
        len(g),
        sorted((WORK / "images").rglob("*.*")),
        pictures(2, 40),
        images.ImageFolder(WORK / "images"),
    )
    made: list[Entry] = []

    def add(name: str, call: Callable, wrong: Mapping[str, list], /, **valid: object) -> None:
        cases = []
        for parameter, default in valid.items():
            if isinstance(default, bool):  # in a call, anything is true or false
                continue
            aliases = {
                "shown": ("images",),
                "state": ("checkpoint",),
                "modifiers": ("modifier",),
            }.get(parameter, ())
            for value, expect in wrong.get(parameter) or bad_value(parameter, default, WORK):
                work = lambda place, k=valid | {parameter: value}: call(**k)  # noqa: E731
                cases.append(
                    Case(
                        f"{name}({parameter}={told(value)})",
                        (*names_of(parameter, value), *aliases),
                        expect,
                        work,
                    )
                )
        made.append(counted(name, cases))

    def bad(*values: object, free: Sequence[object] = ()) -> list[tuple[object, str]]:
        return [(v, "refuse") for v in values] + [(v, "free") for v in free]

    def spoiled(row: float) -> torch.Tensor:
        return torch.cat([some[:1], torch.full((1, 16), row), some[2:]])

    def with_defaults(kind: type, **settings) -> dict:
        """The fields that have a default, or a setting here."""
        known = {f.name: settings.get(f.name, f.default) for f in fields(kind) if f.init}
        return {k: v for k, v in known.items() if isinstance(v, (int, float, str))}

    def saved(**k) -> object:
        gallery.Gallery(**k).save("g.safetensors")
        return gallery.Gallery.load("g.safetensors").search(some[:2], 2)

    def faiss(kind, lists, probes, **k) -> object:
        return gallery.FaissGallery(g.embeddings, g.ids, "", kind, lists, probes).search(**k)

    def on_folder(**k) -> dict:
        folder = images.ImageFolder(WORK / "icons" / "images")
        said = own_data.read_captions(WORK / "icons" / "captions.csv", folder)
        return pretrain_folder.pretrain_folder(
            folder, said, folder_batches.FolderConfig(**k), "model", log=lambda line: None
        ).state_dict()

    def on_benchmark(methods, out, cache, data, **k) -> dict:
        config = run.RunConfig(num_workers=0, progress=False, **k)
        return run.run(
            "cirr", WORK / "cirr", vl, methods, encoder, config, out, cache, data
        ).methods

    odd_pictures = bad(
        two[0],
        two[..., :1],
        [],
        None,
        3,
        "a.png",
        ["a.png"],
        [None],
        [[1, 2]],
        {},
        {"a": two[0]},
        two / 255.0,
    )
    odd_pictures += bad(
        two.astype(np.int64),
        np.full((2, 40, 40, 3), np.nan),
        Image.new("RGB", (9, 9)),
        two[:, :0],
        two[:0],
    )
    both_pictures = odd_pictures + bad(
        free=[[Image.new("L", (9, 9)), two[0]], two[:, ::-1], [Image.new("RGB", (1, 900))] * 2]
    )
    said = bad(
        "a red circle",
        [],
        None,
        [None] * 2,
        [1, 2],
        3,
        [["a"]] * 2,
        b"ab",
        [b"a"] * 2,
        {"a": 1, "b": 2},
        {"a", "b"},
    )
    said += bad(
        free=[["x" * 10**6, "a"], ["", " "], ("a", "b"), ["\ud800", "a\0"], np.array(["a", "b"])]
    )
    modifiers = said + bad(["a"], ["a", "b", "c"])
    rows = bad(
        *map(spoiled, (float("nan"), float("inf"), 0.0, 100.0)),
        some[0],
        some[:0],
        some[None],
        some.long(),
        some.bool(),
    )
    rows += bad(
        None, "x", free=[some.half(), some.double(), some.numpy(), some.t().contiguous().t()]
    )
    ids = bad(
        "abcd",
        ["a", "b"],
        None,
        ["a", "a", "b", "c"],
        4,
        [None] * 4,
        [["a"]] * 4,
        {"a": 1},
        set("abcd"),
        dict.fromkeys("abcd"),
        [1.5] * 4,
    )
    ids += bad(free=[np.array(list("abcd")), [Path(x) for x in "abcd"], range(4), tuple("abcd")])
    asked = bad(
        unit[0],
        torch.eye(4, 7),
        unit * float("nan"),
        None,
        "x",
        [[1.0]],
        unit.long(),
        unit[:0],
        unit[None],
    )
    asked += bad(free=[unit.half(), unit.numpy(), unit.double()])
    left = bad(
        torch.tensor([0]),
        torch.tensor([n, 0, 0, 0]),
        torch.tensor([-2] * 4),
        "x",
        3,
        torch.zeros(4),
    )
    words = bad(
        *(torch.zeros(shape) for shape in ((2, 4), (2, 4, 7), (2, 99, 32))),
        None,
        "x",
        [1],
        free=[torch.zeros(2, 0, 32)],
    )
    words += bad(torch.full((2, 4, 32), float("nan")), torch.zeros(2, 4, 32).long())
    where = bad(
        "nonsense",
        WORK / "metrics.json",
        WORK / "results",
        None,
        3,
        "",
        "\ud800",
        "a\0b",
        "x" * 5000,
    )
    places = bad(WORK / "metrics.json", WORK / "metrics.json" / "x", None, 3)
    listed = bad(
        [],
        None,
        3,
        {"a.png"},
        "nonsense",
        ["missing.png"],
        [None],
        [WORK / "images"],
        [WORK / "captions.csv"],
        [3],
    )
    ranks = bad(
        np.array([]), np.array([float("nan"), 1]), "x", None, np.array([0, 1]), np.array([-1])
    )
    search, k4 = (
        {"queries": unit, "k": 2, "exclude": torch.tensor([0, 1, 2, -1])},
        {"batch_size": 4},
    )
    built = {
        k: v
        for k, v in asdict(encoder.config).items()
        if k not in ("word_width", "word_norm", "vl_model")
    }
    three = bad((0.5, 0.5), "x", (float("nan"),) * 3, 0.5, (0.5, None, 0.5))
    # None is as good
    own = {name: built[name] for name in ("image_size", "stride", "width", "depth")}
    own = {
        name: [(v, e) for v, e in bad_value(name, value, WORK) if v is not None]
        for name, value in own.items()
    }
    hits = torch.ones(2, n, dtype=torch.bool)
    add("encode_text", vl.encode_text, {"texts": said}, texts=["a", "b"], **k4)
    add("encode_images", vl.encode_images, {"images": both_pictures}, images=two, **k4)
    add("QueryEncoder.sentences", encoder.sentences, {"images": both_pictures}, images=two, **k4)
    wrong = {"tokens": words, "modifiers": modifiers}
    prompts = {
        "tokens": torch.ones(2, 4, 32),
        "modifiers": ["a", "b"],
        "template": "{sentence}, {modifier}",
    }
    add("compose", partial(prompt.compose, vl), wrong, **prompts, **k4)
    wrong = {"embeddings": rows, "ids": ids, "vl_model": bad(3, None, ["x"])}
    add("Gallery", saved, wrong, embeddings=some, ids=list("abcd"), vl_model="")
    add("Gallery.search", g.search, {"queries": asked, "exclude": left}, **search, chunk=8)
    add(
        "FaissGallery",
        faiss,
        {"queries": asked, "exclude": left},
        **search,
        kind="ivf",
        lists=2,
        probes=1,
    )
    wrong = {"files": listed, "cache": places[:2], "num_workers": bad(-1, 1.5, "x", 10**9)}
    call = partial(embed.embed_files, vl=vl, progress=False)
    add(
        "embed_files",
        call,
        wrong,
        files=files,
        cache="cache",
        num_workers=0,
        dtype="float32",
        **k4,
    )
    add(
        "read_captions",
        partial(own_data.read_captions, images=folder),
        {"path": where},
        path=WORK / "captions.csv",
    )
    add(
        "read_triplets",
        partial(own_data.read_triplets, images=folder),
        {"path": where},
        path=WORK / "triplets.json",
    )
    add("ImageFolder", images.ImageFolder, {"folder": where}, folder=WORK / "images")
    add("read_image", images.read_image, {"path": where}, path=WORK / "images" / "a.png")
    wrong = {"name": where, "pretrained": bad("nonsense")}
    add(
        "load_vl_model",
        vl_model.load_vl_model,
        wrong,
        name=str(WORK / "vl"),
        pretrained=None,
        device="cpu",
    )
    add(
        "QueryEncoder.load",
        partial(query_encoder.QueryEncoder.load, vl=vl),
        {"folder": where},
        folder=WORK / "encoder",
    )
    add(
        "client.read_gallery",
        client.read_gallery,
        {"path": where},
        path=WORK / "gallery.safetensors",
    )
    add("Gallery.load", gallery.Gallery.load, {"path": where}, path=WORK / "gallery.safetensors")
    wrong = {"folder": where, "vl_model": bad("nonsense", 3)}
    exported = WORK / "client"
    add(
        "QueryClient",
        client.QueryClient,
        wrong,
        folder=exported,
        threads=1,
        vl_model=vl.fingerprint,
    )
    wrong, call = (
        {"images": both_pictures, "modifiers": modifiers},
        lambda **k: client.QueryClient(exported, 1).encode(**k),
    )
    add("QueryClient.encode", call, wrong, images=list(two), modifiers=["a", "b"], **k4)
    call = lambda **k: query_encoder.QueryEncoder.for_model(vl, **k).sentences(two).tokens  # noqa: E731
    add(
        "QueryEncoderConfig",
        call,
        {"mean": three, "std": three + bad((0, 0, 0), (-1, 1, 1))} | own,
        **built,
    )
    few = {"steps": 2, "batch_size": 2, "warmup": 1}
    small = with_defaults(distill.DistillConfig, **few, validation=2, dtype="float32")
    add("DistillConfig", partial(distilled, WORK / "targets"), {}, **small)
    wrong = {
        "cache": places[:2],
        "state": places[:2],
        "shown": [(v, e) for v, e in odd_pictures if v is not None],
    }
    add(
        "distill",
        distilled,
        wrong,
        cache="cache",
        state="state.safetensors",
        shown=pictures(),
        checkpoint_minutes=5.0,
    )
    add(
        "PretrainConfig",
        towers,
        {},
        **with_defaults(pretrain.PretrainConfig, **TINY, families=1, singles=1),
    )
    add(
        "FolderConfig",
        on_folder,
        {},
        **with_defaults(folder_batches.FolderConfig, **TINY, batch_size=8),
    )
    own = {"backbone": encoder.config.backbone, "stride": encoder.config.stride}
    small = with_defaults(light_backbone.BackboneConfig, **few, **own, num_images=6)
    add(
        "BackboneConfig", partial(learned, WORK / "targets", Path("state.safetensors")), {}, **small
    )
    wrong = {
        "methods": bad(["nonsense"], [], None, "isa", 3),
        "out": places[:2] + bad(3, ["x"]),
        "cache": places[:2] + bad(3),
    }
    told_so = {"data": "x", "split": "val", "dtype": "float32"}
    form = {"template": "{sentence} {modifier}"}
    add(
        "benchmarks.run",
        on_benchmark,
        wrong,
        methods=("isa",),
        out="out",
        cache="cache",
        **told_so,
        **form,
        **k4,
    )
    add("make_benchmark", scene_queries.make_benchmark, {}, queries=2, gallery=10, seed=0, size=32)
    add("sample_scenes", scenes.sample_scenes, {}, n=2, seed=0)
    add(
        "write_tiny",
        tiny.write_tiny,
        {"root": places},
        benchmark="cirr",
        root="tree",
        queries=2,
        seed=0,
        size=32,
    )
    add(
        "write_icons",
        icons.write_icons,
        {"folder": places},
        folder="icons",
        count=100,
        queries=2,
        seed=0,
        size=32,
    )
    add("export", partial(export.export, encoder, vl), {"folder": places}, folder="client", **form)
    add("recall", metrics.recall, {"rank": ranks}, rank=np.array([1, 2]), k=1)
    wrong = {
        "queries": asked,
        "reference": bad("x", None, [0.0, 1.0], np.array([0]), np.array([n, 0]), np.array([-5, 0])),
    }
    wrong |= {"hits": bad(hits[:, :3], ~hits, None)}
    call = partial(metrics.ranks, gallery=g.embeddings)
    add("ranks", call, wrong, queries=unit[:2], reference=np.array([0, 1]), hits=hits)
    return made


# ------------------------------------------------------------------------------------ commands and
# notebooks


def lines() -> dict[str, tuple[dict[str, object], object, str]]:
    """Of every command a line that works, and, where its work is long, the module and the function
    where that would begin.
    """
    w, small = WORK, {"--" + k.replace("_", "-"): v for k, v in TINY.items()}
    few = {
        "--steps": 2,
        "--batch-size": 2,
        "--validation": 2,
        "--warmup": 1,
        "--num-tokens": 2,
        "--width": 32,
        "--depth": 1,
    }
    bench = {
        "--vl-model": w / "vl",
        "--encoder": w / "encoder",
        "--methods": "image + text",
        "--cache": "cache",
    }
    own = {"--vl-model": w / "vl", "--encoder": w / "encoder"}
    ask = {
        "folder": w / "client",
        "--gallery": w / "gallery.safetensors",
        "--image": w / "images" / "a.png",
        "--modifier": "red",
    }
    return {
        "distill": (
            {"--images": w / "images", "--out": "out", "--vl-model": w / "vl", **few},
            None,
            "",
        ),
        "pretrain": (
            {"--out": "out", "--run": "run", "--families": 1, "--singles": 1, **small},
            pretrain,
            "train_towers",
        ),
        "pretrain_folder": (
            {
                "--images": w / "icons" / "images",
                "--captions": w / "icons" / "captions.csv",
                "--out": "out",
                "--batch-size": 8,
                **small,
            },
            None,
            "",
        ),
        "light_backbone": ({"--out": "out", "--run": "run", "--steps": 1}, scenes, "render_many"),
        **{
            f"benchmarks {name}": ({"--root": w / name, **bench}, None, "")
            for name in run.BENCHMARKS
        },
        "bench cost": (own, query_timing, "cost"),
        "bench step": ({"--rounds": 1}, step_cost, "step_cost"),
        "bench split": ({}, importlib.import_module("isa_lite.deploy.bench"), "random_model"),
        "bench embed": (
            {"--rounds": 1},
            importlib.import_module("isa_lite.deploy.bench"),
            "random_model",
        ),
        "bench backbones": ({"--vl-model": w / "vl", "--rounds": 1}, query_timing, "multiply_adds"),
        "cards": ({"--out": "out"}, cards, "write_cards"),
        "client": (ask, None, ""),
        "compare": (
            {"--rivals": 0, "--run": w / "compare", "--out": "out.json"},
            compare,
            "rivals",
        ),
        "evaluate": ({"metrics": w / "metrics.json"}, None, ""),
        "export": ({**own, "--out": "out"}, export, "export"),
        "failures": ({"--queries": 4, "--gallery": 20, "--out": "out.html"}, failures, "failures"),
        "growth": ({"--to": 20000, "--cache": "cache", "--out": "out.json"}, growth, "growth"),
        "sweep": ({"--dry-run": None, "--only": "tokens", "--runs": "runs"}, sweep, "execute_all"),
    }


def parser_for(command: str) -> ArgumentParser:
    """The parser of a command, with its kind where it has several."""
    name, *kinds = command.split()
    parser = commands.parser_of(name)
    for kind in kinds:
        parser = next(a for a in parser._actions if isinstance(a, _SubParsersAction)).choices[kind]
    return parser


def ran(words: Sequence[str], module: object, name: str) -> None:
    """A command in this process; it ends where its long work would begin."""

    def reached(*arguments, **more):
        raise Reached

    if module:
        work = getattr(module, name)
        for holder in [
            m
            for key, m in list(sys.modules.items())
            if key.startswith("isa_lite") and getattr(m, name, None) is work
        ]:
            setattr(holder, name, reached)
    with contextlib.suppress(Reached):
        commands.main(list(words))


def command_entries() -> list[Entry]:
    made = []
    for command, (line, module, function) in lines().items():

        def case(
            name: str,
            dest: str,
            value: str,
            expect: str,
            command=command,
            line=line,
            module=module,
            function=function,
        ) -> Case:
            rest = [str(v) for k, v in line.items() if not k.startswith("-") and k != name]
            rest += [
                k if v is None else f"{k}={v}"
                for k, v in line.items()
                if k.startswith("-") and k != name
            ]
            if dest in ("isa", "symmetric"):
                rest = [word for word in rest if not word.startswith("--rivals")]
                rest += [f"--isa={settings.DATA / settings.SCENES_ENCODER}"] * (dest == "symmetric")
            words = [
                *command.split(),
                *rest,
                *([f"{name}={value}"] if name.startswith("-") else [value] * bool(dest)),
            ]
            names = (
                name,
                dest or "required",
                dest.replace("_", "-") or "--nonsense",
                *names_of(name, value),
            )
            return Case(
                f"{command} {name}={told(value)}",
                names,
                expect,
                lambda place: ran(words, module, function),
            )

        options = [a for a in parser_for(command)._actions if a.dest != "help"]
        cases = [
            case((a.option_strings or [a.dest])[-1], a.dest, *word)
            for a in options
            for word in bad_word(a.dest, a, WORK)
        ]
        made.append(counted(f"command {command}", [*cases, case("--nonsense", "", "1", "refuse")]))
    return made


def notebook_entries() -> list[Entry]:
    """Bad parameters of every notebook: its code runs up to the cell that checks them."""
    made = []
    for path in sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb")):
        sources = code_of(path)
        at = 1  # the parameters cell comes behind the imports
        last = max(
            i
            for i, source in enumerate(sources)
            if "check(\n" in source or "check(globals" in source or 'naming("' in source
        )

        def work(place: Path, given: dict, sources=sources[: last + 1], at=at) -> None:
            space = {"__name__": "__main__"}
            for i, source in enumerate(sources):
                exec(compile(source, f"cell {i}", "exec"), space)
                if i == at:
                    space |= given

        body = ast.parse(sources[at]).body
        defaults = {
            s.target.id: ast.literal_eval(s.value) for s in body if isinstance(s, ast.AnnAssign)
        }
        given = [
            (name, value, expect)
            for name, default in defaults.items()
            for value, expect in bad_value(name, default, WORK)
        ]
        given += [(f"{name}x", 1, "refuse") for name in defaults]
        cases = [
            Case(
                f"{path.stem}: {name}={told(v)}",
                names_of(name, v),
                e,
                lambda place, work=work, g={name: v}: work(place, g),
            )
            for name, v, e in given
        ]
        made.append(counted(f"notebook {path.stem}", cases))
    return made


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def prepare(work: Path, build: Callable[[Callable[[], None]], None]) -> list[Entry]:
    """All entries, on the workspace `work`; `build` runs what writes it, where there is none."""
    global WORK
    WORK = work
    if not WORK.is_dir():
        WORK.mkdir(parents=True)
        build(write_valid)
    hold()
    for name in commands.COMMANDS:
        importlib.import_module(f"isa_lite.commands.{name}")
    return [*readers(), *function_entries(), *command_entries(), *notebook_entries()]
