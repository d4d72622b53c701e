"""The public benchmarks of composed image retrieval: from files to numbers and submissions.

FashionIQ, CIRR and CIRCO each have their layout, gallery, protocol and metrics; `fashioniq`, `cirr`
and `circo` hold what differs, `common` what they share, `run` puts them together, `tiny` writes
small trees of the same layouts to try it all on.

    python -m isa_lite benchmarks circo --root FOLDER --split val --encoder FOLDER --out FOLDER

In Python, with `circo` or `fashioniq` as with `cirr`, and any method:

    >>> from isa_lite.benchmarks import cirr, tiny
    >>> from isa_lite.benchmarks.common import rank
    >>> from isa_lite.methods.baselines import image_plus_text
    >>> from isa_lite.models.vl_model import load_vl_model
    >>> from isa_lite.retrieval.embed import embed_files
    >>> root = tiny.write_tiny("cirr", "runs/tiny/cirr", queries=3)  # or the folder of your copy
    >>> vl, rankings = load_vl_model(), []
    >>> for task in (tasks := cirr.load(root, "val")):
    ...     gallery = embed_files(list(task.files.values()), vl, progress=False)
    ...     found = image_plus_text(task.embedded(vl, gallery))
    ...     rankings.append(rank(task, found, gallery))
    >>> list(cirr.score(tasks, rankings))
    ['R@1', 'R@5', 'R@10', 'R@50', 'Recall_subset@1', 'Recall_subset@2', 'Recall_subset@3']
"""
