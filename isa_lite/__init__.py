"""isa_lite: composed image retrieval and asymmetric distillation, to be read and rerun.

    from isa_lite import Gallery, QueryEncoder, compose, load_vl_model

Each public name is imported when it is first asked for, so that `import isa_lite` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

#: The public names, and the modules that hold them. None of them is also the name of a module or
#: folder here.
_HOME = {
    "load_vl_model": "models.vl_model",
    "VLModel": "models.vl_model",
    "ImageFolder": "support.images",
    "QueryEncoder": "query_encoder",
    "compose": "prompt",
    "Gallery": "retrieval.gallery",
    "Queries": "retrieval.queries",
    "embed_files": "retrieval.embed",
    "DistillConfig": "support.settings",
    "QueryEncoderConfig": "support.settings",
    "recipe": "support.recipes",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'isa_lite' has no attribute {name!r}")
    return getattr(import_module(f"isa_lite.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
