"""Networks as ONNX files: traced from PyTorch, and again with 8 bits a weight. Ours.

`isa_lite.deploy.export` makes the query side of them, `isa_lite.deploy.client` runs that.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from isa_lite.deploy.client import IMAGE, SETTINGS, TEXT, TOKENIZER, QueryClient, checksum
from isa_lite.deploy.measure import no_fast_path
from isa_lite.support.checkpoint import write_bytes, write_text


@contextmanager
def _quiet():
    """Without the two notes of the exporter that ask for nothing.

    onnxscript leaves a node that it could have computed beforehand ("Skipping constant folding"),
    and torch says that an axis of two inputs keeps one name ("will not be used, since it shares").
    """
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            shared = ".*will not be used, since it shares the same shape constraints.*"
            warnings.filterwarnings("ignore", shared)
            yield
    finally:
        logger.setLevel(level)


def to_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping],
    path: str | Path,
) -> None:
    """Trace `module` on example `inputs`, by its arguments' names, and write it as one ONNX file.

    dynamic: of each input, its axes of free length, as `torch.export.Dim`s. Raises RuntimeError
    with what the exporter says.
    """
    path = Path(path)
    axes, names = {name: dict(a) for name, a in dynamic.items()}, {"input_names": list(inputs)}
    names |= {"output_names": list(outputs), "dynamic_shapes": axes}
    how = {"dynamo": True, "verbose": False}
    try:
        with _quiet(), no_fast_path(), torch.no_grad():
            program = torch.onnx.export(module.eval(), tuple(inputs.values()), **names, **how)
    except torch.onnx.errors.OnnxExporterError as error:
        raise RuntimeError(f"{path.name} cannot be exported: {error}") from error
    model = program.model_proto
    # where in whose Python code a node comes from is no business of a client
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    write_bytes(path, model.SerializeToString())


def quantize(folder: str | Path, out: str | Path) -> Path:
    """An exported query side again, into `out`, with 8 bits a weight and one scale a matrix.

    onnxruntime's dynamic quantisation: what a matrix is multiplied with is rounded to 8 bits too,
    by a scale of its own each time; convolutions stay as they are. What it costs is to be measured:
    `measured_recall` on rendered scenes, or your own queries. Returns `out`.
    """
    # Here, since they want onnx, which the client does not.
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder, out = Path(folder), Path(out)
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out} holds the files that are to be quantised; give another folder")
    settings = QueryClient(folder).settings  # whole, and not tampered with
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as part:
        how = {"op_types_to_quantize": ["MatMul", "Gemm", "Gather"]}
        for name in (IMAGE, TEXT):
            # attention cuts one of its matrices in three while it runs; here before
            whole = Path(part) / f"folded_{name}"
            quant_pre_process(folder / name, whole, skip_symbolic_shape=True)
            quantize_dynamic(whole, Path(part) / name, weight_type=QuantType.QInt8, **how)
        write_text(Path(part) / TOKENIZER, (folder / TOKENIZER).read_text(encoding="utf-8"))
        settings["files"] = {name: checksum(Path(part) / name) for name in settings["files"]}
        made = settings.get("made")
        settings["made"] = (made if isinstance(made, dict) else {}) | {"weights": "int8"}
        for name in settings["files"]:
            write_bytes(out / name, (Path(part) / name).read_bytes())
    write_text(out / SETTINGS, json.dumps(settings, indent=1) + "\n")
    return out
