"""The public benchmarks of composed image retrieval, from the files on disk to the numbers and the
submission files.

FashionIQ, CIRR and CIRCO each have their layout, gallery, protocol and metrics; `fashioniq`, `cirr`
and `circo` hold what differs, `common` what they share, `run` puts them together, `tiny` writes
small trees of the same layouts to try it all on.

    python -m isa_lite benchmarks circo --root FOLDER --split val --encoder FOLDER --out FOLDER
"""
