"""isa_lite: composed image retrieval and asymmetric distillation, to be read and rerun."""

__version__ = "0.1.0"
