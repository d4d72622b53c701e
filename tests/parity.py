"""Does every text tower give from word vectors what open_clip gives from ids? `python
tests/parity.py` prints the answer.

Every model that open_clip knows by name is built with random weights and compared twice with
open_clip's own
`encode_text`: a prompt's own words (once the whole row, once cut), and a prompt with pseudo-words,
which a forward hook puts into open_clip's route and `compose` into ours.

What is smaller than in the real models, and takes no part in the comparison: the image tower is a
stub, text towers have at most `LAYERS` layers, tables of words for tokenizers of `transformers` at
most `VOCABULARY` rows. Width, heads, context, mask, pooling, normalisation and projection are the
model's own. Tokenizers of `transformers` live on the network, so here a word-level one takes their
place, which frames and pads a text as they do. Ours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import open_clip
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from isa_lite.models.text_tower import text_config
from isa_lite.models.tokenization import load_tokenizer
from isa_lite.models.vl_model import VLModel, machine
from isa_lite.prompt import compose, prompt_ids
from isa_lite.support.checkpoint import write_text

LAYERS, VOCABULARY, TOLERANCE = 2, 60_000, 1e-5
MODIFIERS = ["make it blue", "with a large star at the top left, and without the circle", "zebra"]
#: Families by their names in open_clip, the first that fits; the others are CLIP proper.
NAMES = (
    "SigLIP2",
    "SigLIP",
    "MobileCLIP2",
    "MobileCLIP",
    "CLIPA",
    "worldwide",
    "EVA0",
    "ViTamin",
    "PE-Core",
)
_WORDS = "a photo of with large star at the top left and without circle make it blue zebra red cat , picture image in".split()
#: How a tokenizer of transformers frames a text: ids before it, ids behind it, padding. From the
#: tokenizers' own settings.
FRAMES = {
    "SigLIP2": ([], [1], 0),  # Gemma's
    "SigLIP": ([], [1], 1),
    "roberta": ([0], [2], 1),
    "xlm": ([0], [2], 1),
    "bert": ([101], [102], 0),
    "mt5": ([], [1], 0),
    "nllb": ([VOCABULARY - 1], [2], 1),  # a language before the text
}
#: Settings of the text models of transformers, as published, where they differ from the defaults of
#: their class.
TEXT_MODELS = {
    "roberta-base": (
        "roberta",
        {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "xlm-roberta-base": (
        "xlm-roberta",
        {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "xlm-roberta-large": (
        "xlm-roberta",
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "max_position_embeddings": 514,
        }
        | {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "google/mt5-base": ("mt5", {"d_model": 768, "d_ff": 2048, "num_heads": 12}),
    "google/mt5-xl": ("mt5", {"d_model": 2048, "d_ff": 5120, "num_heads": 32}),
    "facebook/nllb-200-distilled-600M": (
        "m2m_100",
        {"d_model": 1024, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096},
    ),
    "facebook/nllb-200-distilled-1.3B": (
        "m2m_100",
        {"d_model": 1024, "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192},
    ),
}


def stand_in_tokenizer(
    folder: Path, prefix: list[int], suffix: list[int], pad: int, words: list[str] = _WORDS
) -> None:
    """Writes a word-level tokenizer of transformers into `folder`, with the given ids around a text
    and behind it.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {i: f"<{i}>" for i in [*prefix, *suffix, pad]}
    unknown = next(i for i in range(3, 9) if i not in special)
    vocab = (
        {tag: i for i, tag in special.items()}
        | {"<unk>": unknown}
        | {word: 1000 + i for i, word in enumerate(words)}
    )
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = (
        normalizers.Lowercase(),
        pre_tokenizers.Whitespace(),
    )
    frame = " ".join([*(special[i] for i in prefix), "$A", *(special[i] for i in suffix)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(t, i) for i, t in special.items()]
    )
    around = {"eos_token": special[suffix[-1]], "sep_token": special[suffix[-1]]}
    around |= {"bos_token": special[prefix[0]]} if prefix else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token=special[pad],
        padding_side="right",
        **around,
    ).save_pretrained(folder)


def family(name: str, config: dict) -> str:
    """The family of a model's text tower, for the table."""
    text = config["text_cfg"]
    coca = "CoCa" if "multimodal_cfg" in config else ""
    if text.get("hf_model_name"):
        return f"{coca} transformers: {TEXT_MODELS[text['hf_model_name']][0]}".strip()
    both = ", both ways" if text.get("no_causal_mask") else ""
    return coca or next((n.rstrip("0") for n in NAMES if n in name), "CLIP") + both


def small(name: str, folder: Path) -> VLModel:
    """The model with a stub of an image tower and random weights, see the head of this module;
    folder: for its files.
    """
    config = open_clip.get_model_config(name)
    text = config["text_cfg"]
    if text.get("hf_model_name"):
        kind, settings = TEXT_MODELS[text["hf_model_name"]]
        depth = {"m2m_100": ("encoder_layers", "decoder_layers")}.get(
            kind, ("num_layers", "num_decoder_layers", "num_hidden_layers")
        )
        pad = {"mt5": 0}.get(kind, 1)
        record = (
            {"model_type": kind, "vocab_size": VOCABULARY, "pad_token_id": pad}
            | settings
            | dict.fromkeys(depth, LAYERS)
        )
        write_text(folder / "config.json", json.dumps(record))
        text["hf_model_name"] = str(folder)
    if text.get("hf_tokenizer_name"):
        frame = next(f for key, f in FRAMES.items() if key in text["hf_tokenizer_name"])
        stand_in_tokenizer(folder, *frame)
    text = text_config(config, name)
    text["layers"] = min(LAYERS, text.get("layers", LAYERS))
    if text.get("hf_tokenizer_name"):
        text["vocab_size"] = min(VOCABULARY, text.get("vocab_size", VOCABULARY))
    kind = (
        open_clip.CustomTextCLIP
        if config.get("custom_text") or text.get("hf_model_name")
        else open_clip.CLIP
    )
    more = {key: config[key] for key in ("quick_gelu", "nonscalar_logit_scale") if key in config}
    if "multimodal_cfg" in config and kind is not open_clip.CLIP:
        kind, more = (
            open_clip.CoCa,
            more | {"multimodal_cfg": config["multimodal_cfg"] | {"layers": 1}},
        )
    stub = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    torch.manual_seed(0)
    clip = kind(embed_dim=config["embed_dim"], vision_cfg=stub, text_cfg=text, **more)
    vl = VLModel(clip, None, load_tokenizer(text, name, folder), name=name)
    nn.init.normal_(vl.tower.table.weight)  # large enough for texts to differ
    for key, parameter in vl.named_parameters():
        if key.endswith(("positional_embedding", "cls_emb")):
            nn.init.normal_(parameter)
        elif (
            config["text_cfg"].get("hf_model_name")
            and parameter.ndim == 2
            and parameter is not vl.tower.table.weight
        ):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return vl


@torch.no_grad()
def differences(vl: VLModel, num_tokens: int = 5) -> dict[str, float]:
    """The largest difference of the embeddings: of words ("words"), of the same cut ("cut"), of
    pseudo-words against a hook ("pseudo-words"); and how far the pseudo-words moved the embedding
    ("moved"), without which equality shows nothing.
    """
    texts = [f"a photo of a red cat , {modifier}" for modifier in MODIFIERS]
    ids = vl.tokenize(texts)
    theirs, short = vl.clip.encode_text(ids, normalize=True), vl.cut(ids)
    words, cut = vl.pool(vl.text_tokens(vl.word_vectors(ids), ids), ids), vl.encode_ids(short)
    rows, places = prompt_ids(vl, num_tokens, MODIFIERS, truncate=True)
    missing = vl.context_length - rows.shape[1]
    rows, places = (
        nn.functional.pad(rows, (0, missing), value=vl.words.pad),
        nn.functional.pad(places, (0, missing)),
    )
    tokens = torch.randn(
        len(MODIFIERS), num_tokens, vl.word_width, generator=torch.Generator().manual_seed(1)
    )
    tokens *= vl.word_norm / vl.word_width**0.5  # as long as words

    def put_in(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output.masked_scatter(places.unsqueeze(-1), tokens)

    before = vl.clip.encode_text(rows, normalize=True)
    hook = vl.tower.table.register_forward_hook(put_in)
    hooked = vl.clip.encode_text(rows, normalize=True)
    hook.remove()
    off = {
        "words": words - theirs,
        "cut": cut - theirs,
        "pseudo-words": compose(vl, tokens, MODIFIERS, truncate=True) - hooked,
    }
    return {key: float(d.abs().max()) for key, d in off.items()} | {
        "moved": float((hooked - before).abs().amax(1).min())
    }


def parity(names: list[str], progress: bool = True) -> pd.DataFrame:
    """One row a model: its family, `differences`, whether all are within TOLERANCE (`equal`), and
    if not, the reason.
    """
    found = {}
    for name in tqdm(names, desc="models", disable=not progress):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = {"family": family(name, open_clip.get_model_config(name))}
            try:
                row |= differences(small(name, Path(folder)))
                off = max(row[key] for key in ("words", "cut", "pseudo-words"))
                told = "" if row["moved"] > 10 * TOLERANCE else "insensitive"
                row["reason"] = told if off <= TOLERANCE else f"off by {off:.1g}"
            # a table of many: one model's failure is its row, not the end
            except Exception as error:
                row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            found[name] = row | {"equal": not row["reason"]}
    return pd.DataFrame.from_dict(found, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare text towers, entered with word vectors, with open_clip's own result."
    )
    parser.add_argument(
        "models", nargs="*", help="names of open_clip models (default: all of them)"
    )
    names = parser.parse_args().models or open_clip.list_models()
    if unknown := sorted(set(names) - set(open_clip.list_models())):
        parser.error(f"open_clip has no model {', '.join(unknown)}")
    table = parity(names)
    print(f"{machine()}; open_clip {open_clip.__version__}, torch {torch.__version__}")
    print("largest differences of normalised embeddings\n")
    columns = {c: (c, "max") for c in ("words", "cut", "pseudo-words")} | {
        "moved, least": ("moved", "min")
    }
    by_family = table.groupby("family").agg(
        models=("equal", "size"), equal=("equal", "sum"), **columns
    )
    print(by_family.to_string(float_format="{:.1e}".format))
    print(
        f"\n{table['equal'].sum()} of {len(table)} models equal to {TOLERANCE:g} (at most {LAYERS} layers, random weights)"
    )
    for name, reason in table.loc[~table["equal"], "reason"].items():
        print(f"  {name}: {reason}")


if __name__ == "__main__":
    main()
