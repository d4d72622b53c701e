"""What lives on the network: the cache first, fetching only what was named, and at once an error
where nothing answers.
"""

import http.server
import json
import re
import threading
import time

import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from open_clip.transformer import QuickGELU
from safetensors.torch import save

from isa_lite.commands import main
from isa_lite.models.backbones import build_backbone
from isa_lite.models.vl_model import load_vl_model
from isa_lite.support import hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache, and a server's address behind which nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "hub"


def fill(cache, repo: str, files: dict[str, bytes]) -> None:
    """Files of a repository as the hub's client keeps them."""
    root = cache / f"models--{repo.replace('/', '--')}"
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        (folder / name).write_bytes(content)


NAMED = [
    ("ViT-B-32", "laion2b_s34b_b79k", "laion2b_s34b_b79k of ViT-B-32.*pretrained"),
    ("hf-hub:nobody/nothing", None, "nobody/nothing.*local folder"),
    ("blip:Salesforce/blip-itm-base-coco", None, "Salesforce/blip-itm-base-coco.*local folder"),
    ("ViT-B-16-SigLIP", "webli", "tokenizer of ViT-B-16-SigLIP.*local folder"),
    ("roberta-ViT-B-32", "laion2b_s12b_b32k", "roberta-ViT-B-32.*roberta-base.*local folder"),
]


@pytest.mark.parametrize("how", ["offline", "refused", "silent"])
@pytest.mark.parametrize("name, tag, message", NAMED)
def test_without_a_network_what_was_named_is_refused_at_once(
    name, tag, message, how, monkeypatch, own_cache
):
    if "SigLIP" in name or "roberta" in name or "blip" in name:
        pytest.importorskip("transformers", reason="needs the extra: pip install 'isa_lite[blip]'")
    monkeypatch.setattr(
        open_clip,
        "create_model_from_pretrained",
        lambda *a, **k: pytest.fail("built before it was refused"),
    )
    reason = {
        "offline": "HF_HUB_OFFLINE is set",
        "refused": "refused",
        "silent": "no answer within 0.2 seconds|timed out",
    }[how]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    if how == "silent":  # a server that never answers, as a non-routed address
        monkeypatch.setattr(hub, "PATIENCE", 0.2)
        monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: time.sleep(30))
    began = time.perf_counter()
    with pytest.raises(ConnectionError, match=f"(?s){message}") as caught:
        load_vl_model(name, tag)
    assert time.perf_counter() - began < 5  # seconds, where the libraries underneath take minutes
    assert re.search(reason, str(caught.value)) and str(own_cache) in str(caught.value)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv4_conv_small_050.e3000_r224_in1k"])
def test_weights_of_a_backbone_out_of_reach_are_refused_at_once(backbone, monkeypatch, own_cache):
    monkeypatch.setattr(
        "timm.create_model",
        lambda *a, create=timm.create_model, pretrained=False, **k: create(*a, **k),
    )
    began = time.perf_counter()
    with pytest.raises(ConnectionError, match=f"backbone {backbone}.*pretrained"):
        build_backbone(backbone, 64, pretrained=True)
    assert time.perf_counter() - began < 5  # seconds, where timm takes most of a minute
    build_backbone(backbone, 64)
    repo = timm.get_pretrained_cfg(backbone).hf_hub_id
    fill(own_cache, repo, {"model.safetensors": b""})
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    build_backbone(backbone, 64, pretrained=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["benchmarks", "cirr", "--root", "nowhere"],
        ["export", "--out", "nowhere"],
        ["bench", "cost"],
        ["bench", "backbones"],
    ],
    ids=["benchmarks", "export", "bench cost", "bench backbones"],
)
def test_a_command_says_so_in_a_line(arguments, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--vl-model", "ViT-B-32", "--pretrained", "openai"])
    assert "error: the weights openai of ViT-B-32" in capsys.readouterr().err


def test_cached_weights_need_no_network_and_keep_their_preprocessing(own_cache, monkeypatch):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 20, "width": 32, "heads": 2, "layers": 1}
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS,
        "tiny",
        {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
    )
    look = {
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    tags = {"ours": {"hf_hub": "me/tiny/", "url": "", **look}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny")
    fill(own_cache, "me/tiny", {"open_clip_model.safetensors": save(clip.state_dict())})
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    vl = load_vl_model("tiny", "ours")
    assert torch.equal(vl.clip.text_projection, clip.text_projection)
    assert vl.clip.visual.image_mean == look["mean"] and vl.clip.visual.image_std == look["std"]
    assert "bilinear" in repr(vl.preprocess) and "CenterCrop" not in repr(vl.preprocess)
    assert not any(type(m) is QuickGELU for m in vl.modules())


def test_a_tag_of_weights_that_were_trained_with_quick_gelu_gets_it(own_cache, monkeypatch):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 20, "width": 32, "heads": 2, "layers": 1}
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS,
        "tiny",
        {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
    )
    tag = {
        "hf_hub": "me/tiny/",
        "url": "",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "quick_gelu": True,
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"ours": tag})
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny", force_quick_gelu=True)
    for weight in clip.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    fill(own_cache, "me/tiny", {"open_clip_model.safetensors": save(clip.state_dict())})
    vl, ids = load_vl_model("tiny", "ours"), open_clip.get_tokenizer("tiny")(["make it red"])
    with torch.no_grad():
        torch.testing.assert_close(
            vl.encode_text(["make it red"]), clip.encode_text(ids, normalize=True)
        )
        pixels = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(
            vl.encode_pixels(pixels), clip.encode_image(pixels, normalize=True)
        )


def test_whoever_fetches_a_file_of_weights_by_hand_hears_of_quick_gelu():
    for model, tag in open_clip.list_pretrained():
        if open_clip.get_pretrained_cfg(model, tag).get(
            "quick_gelu"
        ) and not open_clip.get_model_config(model).get("quick_gelu"):
            assert open_clip.get_model_config(f"{model}-quickgelu")["quick_gelu"]
    with pytest.raises(ConnectionError, match="pretrained=.*ViT-L-14-quickgelu"):
        load_vl_model("ViT-L-14", "openai")
    with pytest.raises(ConnectionError, match="pass pretrained='FILE'$"):
        load_vl_model("ViT-L-14", "laion2b_s32b_b82k")


@pytest.fixture
def server(vl_folder, monkeypatch):
    """A hub of one repository, me/model, with a few more files than are needed; what was fetched
    from it is in its `asked`.
    """
    files = {
        p.name: p.read_bytes() for p in vl_folder.iterdir() if p.name.startswith("open_clip")
    } | {"README.md": b"x"}
    files["open_clip_pytorch_model.bin"] = b"not this one"
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0].strip("/")
            body = files.get(path.rpartition("/")[2])
            if path in ("api/models/me/model", "api/models/me/model/revision/main"):
                body = json.dumps(
                    {
                        "id": "me/model",
                        "sha": "0" * 40,
                        "siblings": [{"rfilename": n} for n in files],
                    }
                ).encode()
            elif path.startswith("api/models/me/model/tree"):
                entries = [
                    {"type": "file", "path": n, "size": len(b), "oid": "0"}
                    for n, b in files.items()
                ]
                body = json.dumps(entries).encode()
            elif body is not None and self.command == "GET":
                asked.append(path.rpartition("/")[2])
            self.send_response(404 if body is None else 200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{sum(path.encode())}"')  # one a file: the cache goes by it
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        def log_message(self, *a):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    # the client reads its address once, at import
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield address, asked
    running.shutdown()


def test_something_that_answers_is_reachable(server):
    assert hub.no_answer(server[0]) == "" and hub.no_answer(server[0] + "/nothing/here") == ""
    assert "refused" in hub.no_answer("http://127.0.0.1:9")


def test_a_hub_repository_in_the_cache_loads_without_a_network(own_cache, vl_folder, monkeypatch):
    fill(
        own_cache,
        "me/model",
        {p.name: p.read_bytes() for p in vl_folder.iterdir() if p.name.startswith("open_clip")},
    )
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    texts = ["a red circle", "zebra"]
    assert torch.equal(
        load_vl_model("hf-hub:me/model").encode_text(texts),
        load_vl_model(str(vl_folder)).encode_text(texts),
    )


def test_a_hub_repository_is_fetched_once_and_only_what_is_needed(server, vl_folder, own_cache):
    address, asked = server
    texts = ["a red circle", "zebra"]
    first = load_vl_model("hf-hub:me/model").encode_text(texts)
    # and not the pickled weights
    assert sorted(asked) == ["open_clip_config.json", "open_clip_model.safetensors"]
    asked.clear()
    assert torch.equal(load_vl_model("hf-hub:me/model").encode_text(texts), first) and asked == []
    assert torch.equal(first, load_vl_model(str(vl_folder)).encode_text(texts))


def test_a_repository_that_is_no_model_of_open_clip_says_what_it_lacks(server):
    with pytest.raises(ValueError, match="me/model.*config.json.*BLIP"):
        hub.repository("me/model", "a BLIP", "config.json", hub.HF_WEIGHTS)
    with pytest.raises(ValueError, match=r"no weights.*x.safetensors.*thing"):
        hub.repository("me/model", "a thing", "open_clip_config.json", ["x.safetensors"])
    with pytest.raises(ValueError, match="nobody/nothing.*name right"):
        hub.repository("nobody/nothing", "a model", "open_clip_config.json")
