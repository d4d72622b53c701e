"""The spaces drawn and probed: modality gap, maps in two dimensions, facts in tokens. Ours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeClassifierCV
from sklearn.manifold import TSNE
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from isa_lite.world.scenes import Scene


def modality_gap(a: Tensor, b: Tensor) -> float:
    """Distance of the centres of L2-normalised embeddings, N x E and M x E; between 0 and 2.

    As Liang et al. define it ("Mind the gap", NeurIPS 2022).
    """
    return float((a.float().mean(0) - b.float().mean(0)).norm())


def project(
    groups: Mapping[str, Tensor], method: str = "pca", seed: int = 0
) -> dict[str, np.ndarray]:
    """Named sets of embeddings n x E -> the same names with points n x 2, all in one map.

    method: "pca" (linear: distances mean something) or "tsne" (neighbourhoods mean something,
    distances do not). Raises ValueError for another method, or fewer than three embeddings.
    """
    if method not in ("pca", "tsne"):
        raise ValueError(f"method must be 'pca' or 'tsne', not {method!r}")
    everything = np.concatenate([np.asarray(v, dtype=np.float32) for v in groups.values()])  # N x E
    if len(everything) < 3:
        raise ValueError(f"{len(everything)} embeddings are too few for a map")
    if method == "pca":
        points = PCA(2, random_state=seed).fit_transform(everything)
    else:
        perplexity = min(30, (len(everything) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        points = points.fit_transform(everything)
    edges = np.cumsum([len(v) for v in groups.values()])[:-1]
    return dict(zip(groups, np.split(points, edges), strict=True))


#: What a probe asks of a scene with one object.
FACTS = {
    "background": lambda scene: scene.background,
    "style": lambda scene: scene.style,
    "color": lambda scene: scene.objects[0].color,
    "shape": lambda scene: scene.objects[0].shape,
    "size": lambda scene: scene.objects[0].size,
    "place": lambda scene: scene.objects[0].cell,
}


def probes(
    tokens: Tensor,
    scenes: Sequence[Scene],
    folds: int = 3,
    facts: Sequence[str] = tuple(FACTS),
    together: bool = True,
) -> pd.DataFrame:
    """How well a linear probe reads each fact off each token: accuracy in percent, cross-validated.

    tokens: B x L x D sentences of scenes with one object each (with several, "the colour" is not
    defined: ValueError). A row a token, a column a fact; the last two rows are all tokens together
    (unless told otherwise), and always guessing the commonest answer.
    """
    if any(len(scene.objects) != 1 for scene in scenes):
        fault = "probes need scenes with exactly one object, so that its colour"
        raise ValueError(f"{fault}, shape, size and place are defined")
    if len(tokens) != len(scenes):
        raise ValueError(f"{len(tokens)} sentences but {len(scenes)} scenes")
    inputs = {f"token {i + 1}": tokens[:, i].numpy() for i in range(tokens.shape[1])}
    if together:
        inputs["all"] = tokens.flatten(1).numpy()
    answers = {name: np.array([str(FACTS[name](scene)) for scene in scenes]) for name in facts}

    def accuracy(x: np.ndarray, y: np.ndarray) -> float:
        # Ridge, its strength chosen within the training folds: D may be larger than the sample.
        probe = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 4, 6)))
        # an answer with fewer scenes than folds, as among few scenes, is only read seldom
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class")
            return 100 * cross_val_score(probe, x, y, cv=folds).mean()

    rows = {n: {fact: accuracy(x, y) for fact, y in answers.items()} for n, x in inputs.items()}
    commonest = {fact: np.unique(y, return_counts=True)[1].max() for fact, y in answers.items()}
    rows["guessing"] = {fact: 100 * n / len(scenes) for fact, n in commonest.items()}
    return pd.DataFrame.from_dict(rows, "index")
