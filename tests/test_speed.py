"""What was made cheaper gives the same: attention, the text tower's short cuts, LAR on a share of a
batch; and dtypes.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import isa_lite
from isa_lite.deploy.step_cost import product_rate, step_cost
from isa_lite.distill import DistillConfig, History, distill
from isa_lite.models.attention import attend
from isa_lite.prompt import TEMPLATE, Prompt, read_sentences, sentence_embeddings
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support import precision
from isa_lite.support.checkpoint import write_tensors
from isa_lite.support.draws import local_count
from isa_lite.support.precision import training_dtype, with_dtype


def test_attention_is_that_of_pytorchs_module_with_and_without_a_mask():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(layer.in_proj_bias), nn.init.normal_(layer.out_proj.bias)
    x, memory = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])  # 3 x 7
    for y, m in ((memory, None), (memory, mask), (x, None), (x, mask[:, :5])):
        theirs, seen = layer(x, y, y, key_padding_mask=None if m is None else ~m)
        ours, weights = attend(layer, x, y, m, weights=True)
        assert torch.allclose(ours, theirs, atol=1e-5) and torch.allclose(weights, seen, atol=1e-6)
    assert attend(layer, x, memory)[1] is None


def test_embeddings_alone_and_with_what_lar_reads_are_the_same_with_their_gradients(vl):
    torch.manual_seed(0)
    tokens = vl.word_norm * torch.randn(5, 4, vl.word_width) / vl.word_width**0.5
    found, prompt = [], Prompt.of(vl, 4)
    for read in (
        lambda x: sentence_embeddings(vl, x, TEMPLATE)[0],
        lambda x: read_sentences(vl, x, prompt)[0],
        lambda x: read_sentences(vl, x, prompt, 2)[0],
        lambda x: read_sentences(vl, x, prompt, 5)[0],
    ):
        leaf = tokens.clone().requires_grad_()
        query = read(leaf)
        (query * torch.arange(query.numel()).view_as(query)).sum().backward()
        found.append((query.detach(), leaf.grad))
    for query, gradient in found[1:]:
        assert torch.allclose(query, found[0][0], atol=1e-5)
        assert torch.allclose(
            gradient, found[0][1], rtol=1e-3, atol=1e-3 * float(found[0][1].abs().max())
        )
    _, context, places = read_sentences(vl, tokens, prompt, 2)
    assert (
        torch.allclose(context, sentence_embeddings(vl, tokens, TEMPLATE)[1][:2], atol=1e-5)
        and len(places) == 2
    )
    assert read_sentences(vl, tokens, prompt, 0)[1:] == (None, None)


def test_lar_is_computed_on_its_share_of_a_step():
    assert local_count(128, DistillConfig(lar_share=0.25)) == 32
    assert local_count(128, DistillConfig(lar_share=1.0)) == 128
    assert local_count(128, DistillConfig(lar_weight=0.0)) == 0
    assert (
        local_count(4, DistillConfig(lar_share=0.01)) == 2 and local_count(1, DistillConfig()) == 1
    )
    for share in (0.0, 1.5, -0.1, float("nan"), "all"):
        with pytest.raises(ValueError, match="lar_share"):
            DistillConfig(lar_share=share)


def test_a_cpu_trains_in_float32_and_an_explicit_bfloat16_is_obeyed_with_the_measured_ratio(
    monkeypatch,
):
    assert training_dtype("auto", "cpu") == "float32"
    assert training_dtype("auto", "cpu", recorded="bfloat16") == "bfloat16"
    monkeypatch.setattr(precision, "bfloat16_cost", lambda: 41.5)
    with pytest.warns(UserWarning, match=r"bfloat16.*41\.5"):
        assert training_dtype("bfloat16", "cpu") == "bfloat16"
    # a processor that has the instructions
    monkeypatch.setattr(precision, "bfloat16_cost", lambda: 0.5)
    assert training_dtype("bfloat16", "cpu") == "bfloat16"
    for bad in ("float16", "", None):
        with pytest.raises(ValueError, match="dtype"):
            training_dtype(bad, "cpu")


@pytest.mark.parametrize("able, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_trains_in_bfloat16_where_it_can(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: able)
    assert training_dtype("auto", "cuda") == dtype


def test_a_run_records_its_dtype_and_a_resume_takes_the_recorded_one(vl, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_cost", lambda: 1.5)
    images = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    settings = dict(steps=2, batch_size=4, validation=4, negatives=0, lar_weight=0.0)

    def run(dtype: str) -> History:
        torch.manual_seed(0)
        encoder = QueryEncoder.for_model(vl, num_tokens=2)
        return distill(
            images,
            vl,
            encoder,
            DistillConfig(dtype=dtype, **settings),
            None,
            tmp_path / "state",
            progress=False,
        )

    with pytest.warns(UserWarning, match="bfloat16"):
        assert run("bfloat16").dtype == "bfloat16"
    assert with_dtype(DistillConfig(), tmp_path / "state").dtype == "bfloat16"
    assert run("auto").dtype == "bfloat16"  # the finished run
    with pytest.raises(ValueError, match="dtype"):
        run("float32")


@pytest.mark.parametrize(
    "info",
    [{}, {"identity": None}, {"config": []}, {"identity": {"config": {"dtype": ["float32"]}}}],
)
def test_a_damaged_state_says_nothing_of_a_dtype(tmp_path, info):
    write_tensors(tmp_path / "state", {"a": torch.zeros(1)}, info)
    assert with_dtype(DistillConfig(), tmp_path / "state").dtype == "float32"


def test_the_parts_of_a_step_add_up_and_bring_the_gradients_of_a_whole_one(vl):
    encoder = QueryEncoder.for_model(vl, num_tokens=2)
    table = step_cost(vl, encoder, DistillConfig(batch_size=6, negatives=8), rounds=1)
    parts = table.drop(index="whole step")
    assert {"backbone forward", "LAR backward", "text tower backward", "optimizer"} <= set(
        parts.index
    )
    assert np.allclose(parts.sum(), table.loc["whole step"]) and (parts["s"] > 0).all()
    assert np.allclose(table["s x rate"], table["s"] * table.attrs["rate"])
    assert (
        "LAR forward"
        not in step_cost(vl, encoder, DistillConfig(batch_size=6, lar_weight=0.0), rounds=1).index
    )
    assert product_rate(((64, 64, 64),), rounds=3) > 0


FAULTS = """
import resource, sys, torch
from isa_lite.support.training import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(15):
    if step == 5:  # the blocks of the first ones are new, and need not fit the next to the byte
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)  # 40 MB: more than malloc would ever keep by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_freed_memory_is_kept_for_the_next_step():
    environment = os.environ | {"PYTHONPATH": str(Path(isa_lite.__file__).parents[1])}

    def faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert faults("keep") < faults("leave") / 4
