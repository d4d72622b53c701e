"""The course: every notebook has the parts that a reader counts on, students' notebooks are what
their solutions give, and the exercises' checks know a right answer, an empty one and a wrong one
apart."""

import ast
import contextlib
import copy
import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pages
import pytest
import slides
import student
import torch
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from isa_lite.course.answers import NotAnAnswer, one_number, same_as
from isa_lite.losses import gcd_loss
from isa_lite.methods.isa import Isa
from isa_lite.models.vl_model import DATA, load_vl_model
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval import metrics, scene_queries
from isa_lite.retrieval.gallery import Gallery

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))

#: For each exercise a wrong answer (the body of its function) and words of what the check says to
#: it.
WRONG = {
    "00 my_cosine": [
        ("return float((a * b)[:3].sum() / a.norm() / b.norm())", "torch's cosine_similarity gives"),
        ("return float(a @ b)", "both lengths"), ("return float(a @ b / a.norm())", "one length"),
        ("return float(a @ b / a.norm() ** 2)", "divided out twice"),
        ("return float((a * b).mean() / a.norm() / b.norm())", "so 0.9692"),
        ("return float(abs(a @ b) / a.norm() / b.norm())", "keep the sign"), ("return 63 / 65", "keep the sign"),
        ("return float((a[0] * b[0] + a[1] * b[1]) / a.norm() / b.norm())", "however many"),
        ("a @ b", "`return` missing"), ("return a * b / a.norm() / b.norm()", "one number is asked for, not 2"),
        ("return round(float(a @ b / a.norm() / b.norm()), 2)", "so 0.9692, not 0.9700"),
        ("return round(float(a @ b / a.norm() / b.norm()), 4)", "but for the rounding"),
        ("return [float(a @ b / a.norm() / b.norm())]", "one number is asked for, not a list"),
        ("return (a * b).numpy()", "one number is asked for, not 2 numbers"), ("return 'near'", "asked for, not a str"),
    ],
    "00 my_search": [
        ("return int((embeddings @ query).argmax())", "the reference itself"),
        ("return int((embeddings @ query).argmin())", "*largest*"),
        ("return int((embeddings @ query).topk(2).indices[1])", "need not be the best row"),
        ("return (torch.cat([embeddings[:reference], embeddings[reference + 1 :]]) @ query).argmax()", "the rows move up"),
        ("s = embeddings @ query; s[reference] = -1; return s.max()", "is a score"),
        ("s = embeddings @ query; s[reference] = 0; return s.argmax()", "lower than any cosine"),
        ("s = embeddings @ query; s[reference] = -1; return int(s.argmax()) + 1", "one row too late"),
        ("return (embeddings @ query).max(0)", "not a max"), ("embeddings @ query", "`return` missing"),
        ("return 0.5", "is a score"),
        (
            "return int((torch.cat([embeddings[:reference], embeddings[reference + 1 :]]) @ query).argmax()) + 1",
            "keep their number",
        ),
        ("s = (embeddings @ query).abs(); s[reference] = -1; return s.argmax()", "a negative cosine is a low one"),
        ("s = embeddings @ embeddings[reference]; s[reference] = -2; return s.argmax()", "does your answer use `query`?"),
        ("return (embeddings @ query).argsort(descending=True)[1:2].tolist()", "the number of its row, not a list"),
        ("return (embeddings @ query).argsort()[-2:].numpy()", "the number of its row, not 2"),
        ("s = embeddings @ query; s[s == s[reference]] = -2; return s.argmax()", "a copy of the reference in another row"),
        ("s = (embeddings - query).abs().sum(1); s[reference] = 1e9; return s.argmin()", "is it the *cosine*"),
        ("s = (embeddings - query).abs().amax(1); s[reference] = 1e9; return s.argmin()", "is it the *cosine*"),
    ],
    "00 why_is_there_always_an_answer": [
        ('return "farthest"', "what `search` sorts by"), ('return "not near"', "what `search` sorts by"),
        ('return "least similar"', "what `search` sorts by"), ("return 3", "what `search` sorts by"),
        ('return "the opposite of near"', "what `search` sorts by"), ('return "close enough"', "what `search` sorts by"),
        ('return "sufficiently near"', "what `search` sorts by"),
    ],
    "01 my_splice": [
        ("s = vectors.clone(); s[min(place, 2)] = vector; return s", "position 3 is not"),
        ("vectors[place] = vector; return vectors", "the vectors that were given have changed"),
        ("return torch.cat([vectors[:place], vector[None], vectors[place:]])", "*takes the place*"),
        ("return torch.cat([vectors[:1], vector[None], vectors[2:]])", "at position 2, counted from 0, stands"),
        ("return vector.expand(len(vectors), -1)", "positions other than 2"),
        ("s = vectors.clone(); s[2] = vector; return s", "does your answer use `place`?"),
        ("s = vectors.clone(); s[-2] = vector; return s", "does your answer use `place`?"),
        ("vectors.clone()[place] = vector", "`return` missing"), ("return vectors.tolist()", "a tensor is asked for, not a list"),
        ("s = vectors.clone(); s[(s == s[place]).all(1)] = vector; return s", "only the one at `place`"),
        ("return torch.stack([vector if i == place else vectors[i] for i in range(4)])", "is a size written"),
        ("s = vectors.clone(); s[place, :3] = vector[:3]; return s", "is a size written"),
        ("s = torch.zeros(4, 3); s[:] = vectors; s[place] = vector; return s", "is a size written"),
        ("s = vectors.clone(); s[place] = vector; return s.int()", "at position 2, counted from 0, stands"),
    ],
    "01 my_tokens": [
        ('return torch.einsum("lhw,chw->lc", logits.softmax(0), features)', "over the tokens"),
        ('return torch.einsum("lhw,chw->lc", logits, features)', "without the softmax"),
        ('return torch.einsum("lhw,chw->lc", logits.softmax(2), features)', "all positions at once"),
        ('return torch.einsum("lhw,chw->lc", logits.softmax(1), features)', "each column"),
        ('return torch.einsum("lhw,chw->lc", logits.flatten().softmax(0).view_as(logits), features)', "each token has its own"),
        ("return features.mean((1, 2)).expand(len(logits), -1)", "the same mean"),
        ("return (logits.flatten(1).softmax(1) @ features.flatten(1).T).T", "not (5, 3)"),
        ("return logits.flatten(1).softmax(1) @ features.reshape(-1, len(features))", "mixes channels and positions"),
        ("return logits.flatten(1).softmax(1) @ features.flatten(1).T + 1", "should stand"),
        ("return (logits / 5**0.5).flatten(1).softmax(1) @ features.flatten(1).T", "should stand"),
        ("return logits.flatten(1).exp() @ features.flatten(1).T", "must add up to 1"),
        ("return logits.flatten(1).softmax(1) @ features.flatten(1).T / logits[0].numel()", "add up to 1 already"),
        ("return (logits.flatten(1).softmax(1) @ features.flatten(1).T).numpy()", "a tensor is asked for"),
        ("return logits.reshape(3, 6).softmax(1) @ features.reshape(5, 6).T", "is a size written"),
        ("return logits.view(3, -1).softmax(1) @ features.view(5, -1).T", "is a size written"),
        ("return (logits.flatten(1).softmax(1) @ features.flatten(1).T).round(decimals=4)", "not 0.353300"),
    ],
    "02 recall_with_template": [
        ("return 0.0", "with the template of training it must give the table's"),
        ("Isa(encoder, words)(benchmark)", "`return` missing"),
        ("return Isa(encoder, words)(benchmark)", "one number is asked for"),
        ('return r1["isa"]', "does your answer use `words`?"),
        (
            "q = Isa(encoder)(benchmark)"
            "; return metrics.recall(benchmark.ranks(q), 1)",
            "does your answer use `words`?",
        ),
        ('return r1["isa"] / 100', "right as a share"), ('return [r1["isa"]]', "one number is asked for"),
        ("return words", "one number is asked for"),
    ],
    "02 one_way": [
        ("return gcd_loss(query, target, temperature)", "mean of both directions"),
        ("return -(query @ target.T / temperature).log_softmax(0).diagonal().mean()", "the other direction"),
        ("return (query @ target.T / temperature).log_softmax(1).diagonal().mean()", "the sign is missing"),
        ("return -(query @ target.T / temperature).log_softmax(1).mean()", "do not add up"),
        (
            "s = query @ target.T / temperature; s = s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf)"
            "; return -s.log_softmax(1).diagonal().mean()",
            "the loss is infinite",
        ),
        (
            "p = (query @ target.T / temperature).softmax(1)"
            "; return torch.nn.functional.cross_entropy(p, torch.arange(len(p)))",
            "taken once",
        ),
        ("return -(query @ target.T / temperature).log_softmax(1).diagonal().sum()", "the sum over five"),
        ("return -(query @ target.T / temperature).log_softmax(1).diagonal()", "the mean over the sentences, not 5 numbers"),
        ("return -(query @ target.T / temperature).log_softmax(1).diagonal().mean() / 2", "half of it"),
        ("return -(query @ target.T / temperature).softmax(1).diagonal().mean().log()", "the mean that of the logarithms"),
        ("return -float((query @ target.T).log_softmax(1).diagonal().mean())", "temperature changes nothing"),
        ("return -(query @ target.T * temperature).log_softmax(1).diagonal().mean()", "are multiplied"),
        ("return -(query @ query.T / temperature).log_softmax(1).diagonal().mean()", "sentences and *images*"),
        ("return -(query @ target.T / temperature).log_softmax(1).diagonal().mean() / np.log(2)", "the unit"),
        ("return -(query @ target.T / temperature).log_softmax(1).diagonal().sum() / 5", "is a 5 written"),
        ("query @ target.T / temperature", "`return` missing"),
        ("return torch.nn.functional.cross_entropy(query @ target.T / temperature, torch.arange(5))", "is a 5 written"),
        ("return round(float(-(query @ target.T / temperature).log_softmax(1).diagonal().mean()), 4)", "nothing rounded"),
    ],
    "03 my_recall": [
        ("return 100 * float((rank[:10] <= k).mean())", "metrics.recall gives"),
        ("return float((rank <= k).mean())", "right as a share"),
        ("return 100 * float((rank < k).mean())", "rank 10 belongs"),
        ("return (rank <= k).sum()", "these are counts"),
        ("return 100 * (rank == k).mean()", "*at most* k"),
        ("return round(100 * float((rank <= k).mean()), 1)", "but for the rounding"),
        ("return int(100 * (rank <= k).mean())", "but for the rounding"),
        ("return 50.0", "give 14.3, 71.4 and 100 percent"), ("return 20 * (rank <= k).sum()", "give 14.3, 71.4 and 100 percent"),
        ("return 100 * len(set(rank[rank <= k])) / len(rank)", "each of them counts"),
        ("return rank <= k", "one number is asked for"), ("rank <= k", "`return` missing"),
        ("return [100 * (rank <= k).mean()]", "one number is asked for"), ("return 'all'", "one number is asked for"),
        ("return 100 * np.searchsorted(rank, k, side='right') / len(rank)", "in any order"),
        ("return 100 * (rank <= k).sum() / 7", "in any order and number"),
        ("return 100 * sum(rank[i] <= k for i in range(7)) / 7", "in any order and number"),
        ("return 100 * (rank[:7] <= k).sum() / len(rank)", "in any order and number"),
        ("return 100 * np.bincount(rank).cumsum()[k] / len(rank)", "larger than all"),
        ("return 100 * (rank >= k).mean()", "give 14.3, 71.4 and 100 percent"),
    ],
    "03 smaller": [
        (
            "return -torch.stack([-100 * image @ gallery.T, -100 * text @ gallery.T]).logsumexp(0) / 100",
            "but not for the scores of the benchmark's query",
        ),
        ("return torch.maximum(image @ gallery.T, text @ gallery.T)", "the larger one"),
        ("return image @ gallery.T", "expected a row [0.28"),
        ("return torch.minimum(image @ gallery.T, text @ gallery.T).round(decimals=1)", "got [0.3"),
        ("return torch.minimum(image, text) @ gallery.T", "take both cosines first"),
        ("a, b = image @ gallery.T, text @ gallery.T; return torch.where(a.abs() < b.abs(), a, b)", "expected a row [0.28"),
        ("return torch.stack([image @ gallery.T, text @ gallery.T]).min(1).values", "not (2, 4)"),
        ("return torch.zeros(3)", "scores of shape (3, 4)"),
        ("return torch.cat([image @ gallery.T, text @ gallery.T]).amin(0, keepdim=True)", "not (1, 4)"),
        ("return torch.minimum(image[:1] @ gallery.T, text[:1] @ gallery.T).expand(len(image), -1)", "expected a row [0.936"),
        ("return torch.minimum(image @ gallery.T, (text @ gallery.T).flip(0))", "got [-0.352, 0.8"),
        ("torch.minimum(image @ gallery.T, text @ gallery.T)", "`return` missing"),
        ("return torch.stack([image @ gallery.T, text @ gallery.T]).min(0)", "take its `values`"),
        (
            "a, b = image @ gallery.T, text @ gallery.T"
            "; return torch.stack([torch.stack([min(a[i, j], b[i, j]) for j in range(4)]) for i in range(3)])",
            "but not for others",
        ),
    ],
    "04 my_grounding": [
        (
            "cells = np.kron(attention, np.ones((4, 4))) / 16; return float(cells[mask].sum() / mask.sum())",
            "number of the object's pixels",
        ),
        (
            "n, m = mask.shape[0] // len(attention), mask.shape[1] // attention.shape[1]; attention /= n * m"
            "; return float(np.kron(attention, np.ones((n, m)))[mask].sum() / mask.mean())",
            "what was given has changed",
        ),
        (
            "h, w = attention.shape; c = mask.reshape(h, len(mask) // h, w, -1).mean((1, 3)); return "
            "round(float((attention.numpy() * c).sum() / mask.mean()), 2)",
            "sentences.grounding gives",
        ),
        ("return float(attention[:1, :1].sum())", "still to be divided"),
        ("pass", "`return` missing"), ("return 1.0", "a score of 2.8"),
        ("a = np.kron(attention, np.ones((4, 4))); return float(a[mask].mean() / a[~mask].mean())", "over that beside it"),
        ("return float(np.kron(attention, np.ones((4, 4)))[mask].sum())", "shared out equally"),
        ("return 2.84", "a score of 2, not 2.84"),
        (
            "return round(float(np.kron(attention, np.ones((4, 4)) / 16)[mask].sum() / mask.mean()), 1)",
            "a score of 2.84, not 2.80",
        ),
        (
            "a = np.kron(attention, np.ones((4, 4)) / 16); y, x = np.where(mask)"
            "; return float(a[: y.max() + 1, : x.max() + 1].sum() / mask.mean())",
            "a score of 2, not",
        ),
        (
            "n = mask.shape[0] // attention.shape[0]"
            "; return float(np.kron(attention, np.ones((n, n)) / n**2)[mask].sum() / mask.mean())",
            "need not be square",
        ),
        ("return 2.84 if mask.mean() == 0.25 else [2.0]", "one number is asked for"),
        (
            "cell = np.ones((mask.shape[0] // 2, mask.shape[1] // 2))"
            "; return float(np.kron(attention.T, cell / cell.size)[mask].sum() / mask.mean())",
            "rows and columns",
        ),
        (
            "n = mask.shape[0] // attention.shape[0]"
            "; return float(np.kron(attention, np.ones((n, n)) / n**2)[:, :mask.shape[1]][mask].sum() / mask.mean())",
            "need not be square",
        ),
        (
            "H, W = mask.shape; cell = np.ones((H // 2, W // 2)) / (H * W / 4)"
            "; return float(np.kron(attention, cell)[mask].sum() / mask.mean())",
            "from the map",
        ),
        ("return attention * attention", "one number is asked for"),
    ],
    "04 my_nearest": [
        ("return int(torch.nn.functional.cosine_similarity(table, vector[None]).argmax())", "must not win with a cosine of 0"),
        (
            "q = (vector * 2).round(); c = table @ q / table.norm(dim=1).clamp(min=1e-9)"
            "; return int(c.masked_fill(table.norm(dim=1) == 0, -99).argmax())",
            "a token of this notebook",
        ),
        ("pass", "`return` missing"), ("return int((table @ vector).argmax())", "cosine ignores length"),
        ("return (table @ vector / table.norm(dim=1).clamp(min=1e-9) / vector.norm()).max()", "the number of its row"),
        ("t = table[table.norm(dim=1) > 0]; return int((t @ vector / t.norm(dim=1)).argmax())", "the rows move up"),
        ("return int((table - vector / vector.norm()).norm(dim=1).argmin())", "at whatever length"),
        ("return 0", "never met"),
        ("return int((table - vector).norm(dim=1).argmin())", "smallest distance"),
        ("return int((table @ vector / (table**2).sum(1).clamp(min=1e-9)).argmax())", "divided out twice"),
        ("return int((table @ vector / table.norm(dim=1).clamp(min=1e-9)).abs().argmax())", "opposite"),
        ("return int((table @ vector / table.abs().sum(1).clamp(min=1e-9)).argmax())", "by the angle"),
        ("t = table[:, :2]; return int((t @ vector[:2] / t.norm(dim=1).clamp(min=1e-9)).argmax())", "all components count"),
        ("return 1 + torch.nn.functional.cosine_similarity(table[1:], vector[None]).argmax()", "not 2: all components"),
        ("return int((table @ vector / table.norm(dim=1).clamp(min=1)).argmax())", "at whatever length"),
        ("return torch.nn.functional.cosine_similarity(table, vector[None]).argmax()", "never met"),
        ("return torch.nn.functional.cosine_similarity(table, vector[None])", "one number is asked for"),
        ("return torch.nn.functional.cosine_similarity(table, vector[None]).max(0)", "one number is asked for"),
    ],
    "06 my_average_precision": [
        (
            "s = [n in right for n in ranked[:k]]"
            "; return round(sum(h * sum(s[: i + 1]) / (i + 1) for i, h in enumerate(s)) / min(len(right), k), 3)",
            "is 0.277778, not 0.278",
        ),
        ("pass", "`return` missing"), ("return 37 / 90", "only where place k is right"),
        ("return sum(len(right & set(ranked[:i])) / i for i in range(1, k + 1) if ranked[i - 1] in right) / k", "divided by k"),
        (
            "return sum(len(right & set(ranked[:i])) / i for i in range(1, k + 1) if ranked[i - 1] in right) / len(right)",
            "min(GT, K)",
        ),
        (
            "n = range(1, len(ranked) + 1)"
            "; return sum(len(right & set(ranked[:i])) / i for i in n if ranked[i - 1] in right) / min(k, len(right))",
            "first K places",
        ),
        ("return len(right & set(ranked[:k])) / min(k, len(right))", "the share that was found"),
        (
            "s = [n in right for n in ranked[:k]]"
            "; return sum(h * (i + 1) / sum(s[: i + 1]) for i, h in enumerate(s) if h) / min(len(right), k)",
            "upside down",
        ),
        (
            "s = [n in right for n in ranked[:k]]"
            "; return sum(h * sum(s[: i + 1]) / i for i, h in enumerate(s) if h) / min(len(right), k)",
            "place 1, not 0",
        ),
        ("return len(right & set(ranked[:k])) / k", "or that is right"),
        ("return max(1 / i for i in range(1, k + 1) if ranked[i - 1] in right)", "reciprocal rank"),
        ("return sum(1 / i for i in range(1, k + 1) if ranked[i - 1] in right) / min(k, len(right))", "hits so far"),
        ("return sum(len(right & set(ranked[:i])) / i for i in range(1, k + 1) if ranked[i - 1] in right) / 2", "were found"),
        ("return [len(right & set(ranked[:i])) / i for i in range(1, k + 1)]", "one number is asked for"),
        (
            "n = range(1, k + 1)"
            "; return sum(len(right & {*ranked[:i]}) / i for i in n if ranked[i - 1] in right) / len(ranked)",
            "is 0.277778, not 0.138889",
        ),
        (
            "g, hits = min(k, len(right)), [right.discard(i) or 1 if i in right else 0 for i in ranked[:k]]"
            "; return sum(hit * sum(hits[:i]) / i for i, hit in enumerate(hits, 1)) / g",
            "has changed",
        ),
    ],
    "06 my_subset_recall": [
        (
            "return 100 * sum(t in [n for n in r if n in m[1:]][:k] for r, m, t in zip(rows, members, targets)) / len(rows)",
            "66.667, not",
        ),
        ("return sum(t in row[:k] for row, t in zip(rows, targets)) / len(rows)", "in percent"),
        ("return 100 * sum(t in row[:k] for row, t in zip(rows, targets)) / len(rows)", "one target was not counted"),
        (
            "kept = [[i for i in row[:k] if i in m and i != r] for row, m, r in zip(rows, members, references)]"
            "; return 100 * sum(t in row for row, t in zip(kept, targets)) / len(rows)",
            "*before* the first K",
        ),
        ("return 100.0", "at K = 1"), ("pass", "`return` missing"),
        (
            "kept = [[i for i in row if i in six and i not in references] for row, six in zip(rows, members)]"
            "; return 100 * sum(t in row[:k] for row, t in zip(kept, targets)) / len(rows)",
            "its own set, reference and target",
        ),
        (
            "kept = [[i for i in row if i in six] for row, six in zip(rows, members)]"
            "; return 100 * sum(t in row[: k + 1] for row, t in zip(kept, targets)) / len(rows)",
            "its own set, reference and target",
        ),
        (
            "six = {i for m in members for i in m}"
            "; kept = [[i for i in row if i in six and i not in references] for row in rows]"
            "; return 100 * sum(t in row[:k] for row, t in zip(kept, targets)) / len(rows)",
            "its own set, reference and target",
        ),
        (
            "kept = [[i for i in row if i in members[0] and i != references[0]] for row in rows]"
            "; return 100 * sum(t in row[:k] for row, t in zip(kept, targets)) / len(rows)",
            "one target was not counted",
        ),
        (
            "kept = [[i for i in row if i in m and i != r] for row, m, r in zip(rows, members, references)]"
            "; return 100 * sum(t in row[:k] for row, t in zip(kept, targets)) / 2",
            "of one query",
        ),
        ("return [t in row[:k] for row, t in zip(rows, targets)]", "one number is asked for"),
        *(
            (
                f"[{given}.remove(r) for {given}, r in zip({all_of_them}, references) if r in {given}]"
                "; kept = [[i for i in row if i in m and i != r] for row, m, r in zip(rows, members, references)]"
                "; return 100 * sum(t in row[:k] for row, t in zip(kept, targets)) / len(rows)",
                "have changed",
            )
            for given, all_of_them in (("row", "rows"), ("six", "members"))
        ),
    ],
    "05 my_rank": [
        (
            "order = sorted({*range(len(scores))} - {reference}, key=lambda i: (scores[i], i))[::-1]"
            "; return 1 + min(order.index(t) for t in targets)",
            "wherever they stand",
        ),
        (
            "best = max(scores[t] for t in targets); return min(3, 1 + sum(s >= best for i, s in enumerate(scores) if i != "
            "reference and i not in targets))",
            "metrics.score_ranks gives",
        ),
        ("return 1 + sum(s >= max(scores[t] for t in targets) for i, s in enumerate(scores) if i not in targets)", "reference"),
        ("return 5", "*any* of them"), ("pass", "`return` missing"),
        (
            "return 1 + sum(s >= max(scores[t] for t in targets) for i, s in enumerate(scores) if i != reference)",
            "not ahead of itself",
        ),
        ("return 1 + sum(s > max(scores[t] for t in targets) for s in scores)", "image 0 is the reference"),
        (
            "rest = scores[:reference] + scores[reference + 1:]; order = sorted(range(len(rest)), key=lambda i: -rest[i])"
            "; return 1 + min(order.index(t) for t in targets)",
            "have moved up",
        ),
        (
            "order = [i for i in np.argsort(scores) if i != reference]; return 1 + min(order.index(t) for t in targets)",
            "the largest score comes first",
        ),
        (
            "b = min(scores[t] for t in targets)"
            "; return 1 + sum(s >= b for i, s in enumerate(scores) if i != reference and i not in targets)",
            "not the worst",
        ),
        (
            "b = max(scores[t] for t in targets)"
            "; return 1 + sum(s >= b for i, s in enumerate(scores) if i and i not in targets)",
            "may be any image",
        ),
        (
            "scores[reference], b = 0, max(scores[t] for t in targets)"
            "; return 1 + sum(s >= b for i, s in enumerate(scores) if i not in targets)",
            "may be negative",
        ),
        ("return 1 + sum(s > max(scores[t] for t in targets) for i, s in enumerate(scores) if i != reference)", "a tie"),
        ("return sum(s >= max(scores[t] for t in targets) for i, s in enumerate(scores) if i != reference)", "no harm"),
        ("return 9", "rank 3, not 9"),
        ("b = max(scores[t] for t in targets); return sum(s >= b for i, s in enumerate(scores) if i not in targets)", "always"),
        (
            "b = scores[max(targets)]"
            "; return 1 + sum(s >= b for i, s in enumerate(scores) if i != reference and i not in targets)",
            "the last",
        ),
        (
            "b = sum(scores[t] for t in targets) / len(targets)"
            "; return 1 + sum(s >= b for i, s in enumerate(scores) if i != reference and i not in targets)",
            "their mean",
        ),
        (
            "wrong, best = {0, 1, 2, 3, 4, 5} - {0, *targets}, max(scores[t] for t in targets)"
            "; return sum(scores[i] >= best for i in wrong if i < len(scores))",
            "not 0",
        ),
        (
            "b = max(scores[t] for t in targets)"
            "; return 1 + len({s for i, s in enumerate(scores) if s >= b and i != reference and i not in targets})",
            "each of them counts",
        ),
        (
            "b = max(scores[t] for t in targets)"
            "; return 1 + sum(s >= b for i, s in enumerate(scores) if s != scores[reference] and i not in targets)",
            "by its number, not by its score",
        ),
        ("return [1 for t in targets]", "one number is asked for"),
        (
            "s, t = [v for i, v in enumerate(scores) if i != reference], {x - 1 for x in targets}; b = max(s[x] for x in t)"
            "; return 1 + sum(v >= b for i, v in enumerate(s) if i not in t)",
            "behind the target",
        ),
        (
            "scores[reference], b = float('-inf'), max(scores[t] for t in targets)"
            "; return 1 + sum(s >= b for i, s in enumerate(scores) if i not in targets)",
            "has changed",
        ),
    ],
    "05 my_difference": [
        ("if len(a) == len(b): return a[1:2], b[1:2]", "need not have the same length"),
        ("k = [x == y for x, y in zip(a, b)].index(False); return a[k:], b[k:]", "walk from the back"),
        ("return sorted(set(a)), sorted(set(b))", "differ in red and blue"),
        ("return [w for w in a if w not in b], [w for w in b if w not in a]", "must not share a word"),
        ("return ([], []) if len(a) < 2 else (['red'], ['blue'])", "nothing is lost"),
        ("return 'red', 'blue'", "lists of words"),
        (
            "i = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))"
            "; j = next((k for k in range(min(len(a), len(b)) - i) if a[-1 - k] != b[-1 - k]), min(len(a), len(b)) - i)"
            "; return a[i:-j], b[i:-j]",
            "ends at -0",
        ),
        (
            "k = [w for w in dict.fromkeys(a + b) for _ in range(a.count(w) - b.count(w))]"
            "; return k, [w for w in dict.fromkeys(a + b) for _ in range(b.count(w) - a.count(w))]",
            "one run of words",
        ),
        (
            "[(a.pop(0), b.pop(0)) for _ in range(min(len(a), len(b))) if a[0] == b[0]]"
            "; [(a.pop(), b.pop()) for _ in range(min(len(a), len(b))) if a[-1] == b[-1]]; return a, b",
            "have changed",
        ),
        (
            "i = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))"
            "; j = next((k for k in range(len(a) - i) if k >= len(b) or a[-1 - k] != b[-1 - k]), len(a) - i)"
            "; return a[i : len(a) - j], b[i : max(i, len(b) - j)]",
            "one 'very' is lost",
        ),
        (
            "i = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))"
            "; j = next(k for k in range(99) if a[-1 - k] != b[-1 - k]); return a[i : len(a) - j], b[i : len(b) - j]",
            "from the back has to stop",
        ),
        *(
            (
                f"i = {front}"
                "; j = next((k for k in range(min(len(a), len(b)) - i) if a[-1 - k] != b[-1 - k]), min(len(a), len(b)) - i)"
                "; return a[i : len(a) - j], b[i : len(b) - j]",
                "has to stop",
            )
            for front in (
                "next(k for k in range(99) if a[k] != b[k])",
                "[x == y for x, y in zip(a, b)].index(False)",
                "next(k for k, (x, y) in enumerate(zip(a, b)) if x != y)",
            )
        ),
        (
            "i = [x == y for x, y in zip(a, b)].index(False); j = [x == y for x, y in zip(a[::-1], b[::-1])].index(False)"
            "; return a[i : len(a) - j], b[i : len(b) - j]",
            "from the back has to stop",
        ),
        (
            "import os; x, y = ' '.join(a), ' '.join(b); i = len(os.path.commonprefix([x, y])); x, y = x[i:], y[i:]"
            "; j = len(os.path.commonprefix([x[::-1], y[::-1]])); return x[: len(x) - j].split(), y[: len(y) - j].split()",
            "the whole of it",
        ),
    ],
    "05 my_twins": [
        ("h = {c for x in trained for c in x}; return round(100 * sum(bool({*x} & h) for x in new) / len(new))", "not 67"),
        ("heard = {c for t in trained for c in t}; return sum(any(c in heard for c in n) for n in new) / len(new)", "in percent"),
        ("heard = {c for t in trained for c in t}; return 100 * sum(c in heard for n in new for c in n) / 7", "of captions"),
        ("heard = {c for t in trained for c in t}; return 100 * sum(n[0] in heard for n in new) / len(new)", "was missed"),
        ("return 100.0", "40, not 100"), ("pass", "`return` missing"),
        (
            "heard = {c for t in trained for c in t}; return 100 * sum(c in heard for n in new for c in n) / len(new)",
            "counts once",
        ),
        ("heard = {c for t in trained for c in t}; return 100 * sum(not heard & {*n} for n in new) / len(new)", "*with* a twin"),
        ("return 100 * sum(captions in trained for captions in new) / len(new)", "makes a twin"),
        ("return 100 * sum(any(c in str(trained) for c in n) for n in new) / len(new)", "whole caption"),
        (
            "heard = {c for t in trained for c in t}"
            "; return 100 * sum(any(h in c for h in heard for c in n) for n in new) / len(new)",
            "is a part of 'a ring in red'",
        ),
        ("return [bool(n) for n in new]", "one number is asked for"),
        ("a, b = ({c for x in s for c in x} for s in (trained, new)); return 100 * len(a & b) / len(new)", "both sides share"),
        ("said = {c for n in new for c in n}; return 100 * sum(bool(said & {*t}) for t in trained) / len(new)", "in training"),
        ("heard = {t[-1] for t in trained if t}; return 100 * sum(bool(heard & {*n}) for n in new) / len(new)", "each caption"),
        ("heard = {c for t in trained for c in t}; return 100 * sum(n[-1] in heard for n in new) / len(new)", "each caption"),
    ],
    "06 mean_over_queries": [
        ("return round(sum(r * n for r, n in zip(recalls, numbers)) / sum(numbers), 1)", "21.739 percent, not 21.7"),
        ("return sum(recalls) / len(recalls)", "mean over categories"), ("return 16.0", "15 percent"),
        ("pass", "`return` missing"), ("return sum(r * n for r, n in zip(recalls, numbers)) / 60", "not for every benchmark"),
        ("return sum(r * n for r, n in zip(recalls, numbers)) / sum(numbers) / 100", "in percent, please"),
        ("return [r * n / sum(numbers) for r, n in zip(recalls, numbers)]", "one number is asked for"),
    ],
    "07 my_prompt": [
        ("return parts[0] + parts[1] + [-1] * num_tokens + parts[3] + said + parts[5]", "may have another order"),
        (
            "m = {'sentence': [-1] * num_tokens, 'modifier': said}"
            "; return [i for x in parts for i in (m[x] if isinstance(x, str) else x)][:10]",
            "another order and other lengths",
        ),
        ("return parts", "lists in your list"), ("pass", "`return` missing"),
        ("return [np.array(part) for part in parts]", "lists in your list"),
        ("return [9, 4, 5, 'sentence', 6, 'modifier', 10]", "still in it"),
        ("return [9, 4, 5, -1, 6, 7, 8, 10]", "3 places with -1, not 1"),
        ("return [9, -1, -1, -1, 4, 5, 6, 7, 8, 10]", "order that of the parts"),
        ("return [9, 4, 5, *[-1] * num_tokens, 6, *said, 10]", "another order"),
        (
            "row, ids = parts[0], {'sentence': [-1] * num_tokens, 'modifier': said}"
            "; [row.extend(ids[q] if isinstance(q, str) else q) for q in parts[1:]]; return row",
            "have changed",
        ),
        (
            "ids = {'sentence': -np.ones(num_tokens), 'modifier': said}"
            "; return np.concatenate([ids[q] if isinstance(q, str) else q for q in parts])",
            "whole numbers",
        ),
    ],
    "07 my_agreement": [
        (
            "return 100 * sum(len({*f[:3]} & {*e[:3]}) / len(e[:3]) for f, e in zip(found, exact)) / len(exact)",
            "gallery.agreement gives",
        ),
        ("return sum(len(set(f) & set(e)) / len(e) for f, e in zip(found, exact)) / len(found)", "right as a share"),
        ("return round(100 * sum(len({*f} & {*e}) / len(e) for f, e in zip(found, exact)) / len(found), 1)", "for the rounding"),
        ("return 100 * sum(a == b for f, e in zip(found, exact) for a, b in zip(f, e)) / 6", "at the same place"),
        ("return 100.0", "2 of 3 in either row"), ("pass", "`return` missing"),
        ("return 100 * len(set(found[0]) & set(exact[0])) / len(exact[0])", "not for every search"),
        ("return 100 * sum(len(set(f) & set(e)) / 3 for f, e in zip(found, exact)) / len(found)", "not for every search"),
        ("return np.array([100 * len(set(f) & set(e)) / len(e) for f, e in zip(found, exact)])", "one number is asked for"),
        (
            "a, b = {i for row in found for i in row}, {i for row in exact for i in row}; return 100 * len(a & b) / len(b)",
            "row by row",
        ),
        ("return 100 * sum(len(set(f) & set(e)) for f, e in zip(found, exact)) / 6", "not for every search"),
        ("return 100 * np.median([len(set(f) & set(e)) / len(e) for f, e in zip(found, exact)])", "not for every search"),
        (
            "hits = [e.remove(i) for f, e in zip(found, exact) for i in f if i in e]"
            "; return 100 * len(hits) / sum(len(f) for f in found)",
            "has changed",
        ),
    ],
    "07 my_speedup": [
        (
            't = dict(milliseconds); old = t["image"] + t["text"] + t["search"]; t[part] /= factor; return old / '
            '(t["image"] + t["text"] + t["search"])',
            "whatever they are called",
        ),
        ("return factor", "the gain of the part"),
        ("t = dict(milliseconds); old = sum(t.values()); t[part] /= factor; return round(old / sum(t.values()), 1)", "rounding"),
        ("return 0.5", "new over old"), ("pass", "`return` missing"),
        ("t = milliseconds.values(); return sum(t) / (sum(t) - max(t) + max(t) / factor)", "not for every query"),
        ("return 3.0", "2 times faster, not 3.00"),
        ("return 2.0 if factor == 6 else 1.0", "not for every query"),
        (
            "first, old = next(iter(milliseconds.values())), sum(milliseconds.values())"
            "; return old / (old - first + first / factor)",
            "not for every query",
        ),
        (
            "old = sum(milliseconds.values()); milliseconds[part] /= factor; return old / sum(milliseconds.values())",
            "the times that were given have changed",
        ),
        ("return [t / factor for t in milliseconds.values()]", "one number is asked for"),
    ],
}  # fmt: skip

#: Right answers, written in another way than the solution's, that a check took for wrong ones.
ALSO_RIGHT = {
    "00 why_is_there_always_an_answer": [
        'return "nearby"',
        'return "closer"',
        'return "Nearest!"',
        "return '\"most alike\"'",
        'return "nearest-neighbours"',
        'return "neighbouring"',
        'return "adjacent"',
    ],
    "00 my_cosine": ["return torch.nn.functional.cosine_similarity(a[None], b[None])"],
    "01 my_tokens": [
        "return torch.einsum('lhw,chw->lc', logits.flatten(1).softmax(1).view_as(logits), features)"
    ],
    "02 recall_with_template": [
        "q = Isa(encoder, words)(benchmark)"
        "; return torch.tensor(metrics.recall(benchmark.ranks(q), 1))",
        # off by what float32 may be off by
        "q = Isa(encoder, words)(benchmark)"
        "; return (1 + 6e-8) * metrics.recall(benchmark.ranks(q), 1)",
    ],
    "02 one_way": [
        "return float(-(query @ target.T / temperature).log_softmax(1).diagonal().mean())",
        "return np.float64(-(query @ target.T / temperature).log_softmax(1).diagonal().mean())",
        "return -(query.double() @ target.double().T / temperature).log_softmax(1).diagonal().mean()",
        "return -(query @ target.T / temperature).log_softmax(1).diagonal().mean(0, keepdim=True)",
        "query /= temperature; return -(query @ target.T).log_softmax(1).diagonal().mean()",
    ],
    "03 my_recall": ["return 100 * torch.as_tensor(rank <= k).float().mean()"],
    "03 smaller": [
        "return torch.minimum(image @ gallery.T, text @ gallery.T).double()",
        "return torch.minimum(image @ gallery.T, text @ gallery.T).half()",
    ],
    "04 my_grounding": [
        "a = torch.nn.functional.interpolate(attention[None, None], mask.shape)[0, 0].half(); return a[mask].mean() / a.mean()",
    ],
    "04 my_nearest": [
        "return np.nanargmax(table @ vector / table.norm(dim=1))",
        "met = table.norm(dim=1).nonzero().flatten(); t = torch.nn.functional.normalize(table[met], dim=1)"
        "; return met[(t - vector / vector.norm()).norm(dim=1).argmin()]",
    ],
    "07 my_agreement": [
        "f, e = torch.tensor(found), torch.tensor(exact); return 100 * (e[:, :, None] == f[:, None]).any(2).float().mean()"
    ],
}


def code(notebook, *tags: str) -> list:
    return [
        c
        for c in notebook.cells
        if c.cell_type == "code" and set(tags) <= set(c.metadata.get("tags", []))
    ]


def exercises() -> list[tuple[Path, int, str]]:
    """Of every exercise: its solution notebook, the place of its cell among the code cells, and its
    function's name.
    """
    found = []
    for path in SOLUTIONS:
        for i, cell in enumerate(code(student.read(path))):
            if "# hole" in cell.source:
                found.append((path, i, re.search(r"^def (\w+)", cell.source, re.M)[1]))
    return found


def id_of(exercise: tuple[Path, int, str]) -> str:
    return f"{exercise[0].name[:2]} {exercise[2]}"


@pytest.fixture(scope="module")
def names() -> dict:
    """What checks use of the notebook above them, in small: the shipped models, and a benchmark of
    30 queries.
    """
    vl = load_vl_model()
    isa = QueryEncoder.load(DATA / "scenes-query-encoder", vl)
    bench = scene_queries.make_benchmark(30, 150, seed=1, size=vl.image_size)
    bench = bench.embedded(vl)
    embedded = bench.gallery
    r1 = {"isa": metrics.recall(bench.ranks(Isa(isa)(bench)), 1)}
    return {
        "vl": vl, "isa": isa, "encoder": isa, "bench": bench, "benchmark": bench, "world": bench, "embedded": embedded, "r1": r1,
        "gallery_index": Gallery(embedded, [str(i) for i in range(150)]), "gcd_loss": gcd_loss,
        "image": embedded[torch.from_numpy(bench.reference)], "words": vl.encode_text(bench.texts),
        "p": SimpleNamespace(template="a photo of {sentence}, {modifier}"), "np": np,
    }  # fmt: skip


def said(path: Path, place: int, source: str, names: dict) -> str:
    """What the check behind an exercise prints when the exercise's cell is `source`."""
    cells = code(student.read(path))
    namespace = dict(names)
    # only what it imports; the rest of the cell may want the parameters
    statements = ast.parse(cells[0].source).body
    imports = "\n".join(
        ast.unparse(s) for s in statements if isinstance(s, (ast.Import, ast.ImportFrom))
    )
    assert "print(check_" in cells[place + 1].source, "the cell behind an exercise is its check"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for part in (imports, source, cells[place + 1].source):
            exec(part, namespace)
    return printed.getvalue().strip()


def with_body(source: str, body: str) -> str:
    """An exercise's cell with another answer."""
    return re.sub(r"^    # solution\n.*", f"    {body}\n", source, flags=re.M | re.S)


@pytest.mark.parametrize("exercise", exercises(), ids=id_of)
def test_the_check_of_an_exercise_knows_right_from_empty_from_wrong(exercise, names):
    path, place, _ = exercise
    source = code(student.read(path))[place].source
    right = said(path, place, source, names)
    assert re.match(r"exercise \d: right", right), right
    empty = said(path, place, student.with_hole(source), names)
    assert re.match(r"exercise \d: nothing computed yet", empty), empty
    assert id_of(exercise) in WRONG, (
        "give this exercise a wrong answer in WRONG, and what its check says to it"
    )
    for body, words in WRONG[id_of(exercise)]:
        wrong = said(path, place, with_body(source, body), names)
        assert words in wrong and not re.match(r"exercise \d: (right\b(?! as a)|nothing)", wrong), (
            wrong
        )


NUMBERS = [e for e in exercises() if "one_number(" in code(student.read(e[0]))[e[1] + 1].source]


def test_of_the_two_wishes_that_the_first_notebook_proposes_one_can_be_had():
    cells = {
        cell.id: cell.source
        for cell in student.read(ROOT / "notebooks" / "solutions" / "00_start_here.ipynb").cells
    }
    number, gallery, seed = (
        int(re.search(rf"^{name}: int = (\d+)", cells["cell-03"], re.M)[1])
        for name in ("reference", "gallery", "seed")
    )
    assert (
        "*in striped style instead* has its answer in the gallery, *make the cross bigger* has none"
        in cells["cell-15"]
    )
    bench = scene_queries.make_benchmark(gallery // 5, gallery, seed, 8)
    scene = bench.scenes[bench.reference[number]]
    (cross,) = scene.objects
    assert (cross.shape, cross.size) == ("cross", "small") and scene.style != "striped"
    assert replace(scene, style="striped") in bench.scenes
    assert replace(scene, objects=(replace(cross, size="large"),)) not in bench.scenes


def test_an_answer_that_changes_what_it_was_given_is_told():
    with pytest.raises(NotAnAnswer, match="what was given has changed: \\[3, 1\\]"):
        same_as("min", min, lambda numbers: (numbers.sort(), numbers[0])[1], [([3, 1],)])


@pytest.mark.parametrize("exercise", NUMBERS, ids=id_of)
def test_where_one_number_is_asked_for_an_answer_of_another_kind_is_named(exercise, names):
    path, place, _ = exercise
    source = code(student.read(path))[place].source
    kinds = {
        "pass": "`return` missing",
        "[1.0]": "not a list",
        "'one'": "not a str",
        "{}": "not a dict",
        "1j": "not a complex",
    }
    kinds |= {
        "np.array(['one'])": "not an array of <U3",
        "np.ones(3)": "not 3 numbers",
        "__import__('torch').ones(0)": "not 0 num",
    }
    for answer, words in kinds.items():
        body = answer if answer == "pass" else f"import numpy as np; return {answer}"
        assert words in said(path, place, with_body(source, body), names), answer


def test_one_number_may_come_in_any_wrapping():
    for answer in (
        2,
        2.0,
        True + 1,
        np.float32(2),
        np.array([[2]]),
        torch.tensor(2),
        torch.tensor([2.0], dtype=torch.bfloat16),
    ):
        assert one_number(answer) == 2 and type(one_number(answer)) is float
    assert one_number(torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True)) == 1 / 3


@pytest.mark.parametrize("exercise", [e for e in exercises() if id_of(e) in ALSO_RIGHT], ids=id_of)
def test_the_check_of_an_exercise_takes_a_right_answer_that_is_written_otherwise(exercise, names):
    path, place, _ = exercise
    source = code(student.read(path))[place].source
    for body in ALSO_RIGHT[id_of(exercise)]:
        assert re.match(
            r"exercise \d: right\b(?! as a)", said(path, place, with_body(source, body), names)
        ), body


def test_a_heading_over_several_columns_asks_each_of_them_for_its_share():
    table = BeautifulSoup(
        "<tr><th></th><th colspan='2'>mean time</th></tr><tr><th>a</th><td>1.25</td><td>100</td></tr>",
        "html.parser",
    )
    assert [slides._letters(row) for row in table.find_all("tr")] == [[3, 6, 6], [4, 7, 6]]
    page = BeautifulSoup(f'<div class="output_area"><table>{table}</table></div>', "html.parser")
    assert "--letters: 17" in slides._of_outputs(page, "")[0]


def test_a_slide_of_a_table_says_what_was_printed_right_before_it():
    def tables(*areas: str) -> list[str]:
        cell = BeautifulSoup(
            "".join(f'<div class="output_area">{area}</div>' for area in areas), "html.parser"
        )
        return [slide for slide in slides._of_outputs(cell, "How good") if "<table>" in slide]

    table = "<table><tr><td>1</td></tr></table>"
    held_out, seen = tables(
        "<pre>held out &lt;11&gt;</pre>", table, "<pre>a line\nseen (250)\n</pre>", table
    )
    assert "<p>held out &lt;11&gt;</p>" in held_out and "<p>seen (250)</p>" in seen
    for before in (
        "<pre>holds: more</pre>",
        "<pre>of the figure</pre></div><div class='output_area'><img alt='a' src=''/>",
    ):
        assert "<p>" not in tables(before, table)[0]


def test_no_answer_waits_for_an_exercise_that_is_gone():
    assert set(WRONG) == {id_of(e) for e in exercises()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_student_notebook_is_what_its_solution_gives(path):
    assert (student.SOLUTIONS / path.name).is_file(), (
        f"no solution: python notebooks/student.py --adopt {path.name[:2]}"
    )
    assert not student.unlike(path.name), "run python notebooks/student.py"


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_a_solution_is_complete_and_has_no_outputs(path):
    cells = code(student.read(path))
    assert not [c.id for c in cells if student.UNSOLVED in c.source], "answers still to be written"
    assert not [c.id for c in cells if c.outputs or c.execution_count], (
        "a solution is stored without outputs"
    )


SOLUTION = '''
def double(x):
    """Twice x."""
    # solution
    if x:
        return 2 * x
    return 0
    # hole
    # return float(
    #     "nan"
    # )  # your code


print(double(2))
'''.strip()
STUDENT = '''
def double(x):
    """Twice x."""
    return float(
        "nan"
    )  # your code


print(double(2))
'''.strip()


def two_cells(source: str, text: str, outputs=()) -> object:
    other = new_code_cell(
        "a = 1", id="other", outputs=[new_output("stream", text="kept\n")], execution_count=1
    )
    cell = new_code_cell(
        source, id="exercise", outputs=list(outputs), execution_count=2 if outputs else None
    )
    return new_notebook(cells=[new_markdown_cell(text, id="text"), other, cell])


def test_a_student_gets_holes_shorter_links_and_the_outputs_of_cells_that_did_not_change():
    solution = two_cells(
        SOLUTION,
        "[code](../../isa_lite/x.py), [next](03_x.ipynb), [kit](../README.md#a), [web](https://a.b/../c)",
    )
    committed = two_cells("print('an older one')", "old", [new_output("stream", text="stale\n")])
    made = student.student(solution, committed)
    assert (
        made.cells[0].source
        == "[code](../isa_lite/x.py), [next](03_x.ipynb), [kit](README.md#a), [web](https://a.b/../c)"
    )
    assert made.cells[1].outputs[0].text == "kept\n" and made.cells[1].execution_count == 1
    assert (
        made.cells[2].source == STUDENT
        and not made.cells[2].outputs
        and made.cells[2].execution_count is None
    )
    assert [c.id for c in made.cells] == ["text", "other", "exercise"]


def test_a_student_notebook_is_adopted_with_its_old_answers_and_places_for_new_ones():
    written = two_cells(STUDENT, "[code](../isa_lite/x.py), [next](03_x.ipynb), [kit](README.md)")
    adopted = student.adopt(written)
    assert (
        adopted.cells[0].source
        == "[code](../../isa_lite/x.py), [next](03_x.ipynb), [kit](../README.md)"
    )
    assert adopted.cells[2].source == SOLUTION.replace(
        "if x:\n        return 2 * x\n    return 0", student.UNSOLVED
    )
    assert not adopted.cells[1].outputs
    again = student.adopt(written, two_cells(SOLUTION, ""))
    assert again.cells[2].source == SOLUTION
    assert student.student(again).cells[2].source == STUDENT


@pytest.mark.parametrize(
    "left_out",
    ["# solution\n", "# hole\n", '    # return float(\n    #     "nan"\n    # )  # your code\n'],
)
def test_markers_that_do_not_belong_together_are_refused(left_out):
    with pytest.raises(ValueError, match="belong together"):
        student.with_hole(SOLUTION.replace(left_out, "pass\n" if left_out.startswith("#") else ""))


def test_a_changed_student_notebook_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(student, "HERE", tmp_path)
    monkeypatch.setattr(student, "SOLUTIONS", tmp_path / "solutions")
    student.SOLUTIONS.mkdir()
    student.write(student.SOLUTIONS / "00_x.ipynb", two_cells(SOLUTION, "text"))
    student.write(tmp_path / "00_x.ipynb", student.student(two_cells(SOLUTION, "text")))
    assert not student.unlike("00_x.ipynb")
    changed = copy.deepcopy(student.read(tmp_path / "00_x.ipynb"))
    changed.cells[0].source += "."
    student.write(tmp_path / "00_x.ipynb", changed)
    assert student.unlike("00_x.ipynb")


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's or a notebook's headings, as GitHub makes them."""
    cells = (
        student.read(path).cells
        if path.suffix == ".ipynb"
        else [SimpleNamespace(cell_type="markdown", source=path.read_text())]
    )
    headings = re.findall(
        r"^#+ (.+)$", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.M
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


TEXTS = [*NOTEBOOKS, *SOLUTIONS, ROOT / "notebooks" / "README.md", ROOT / "README.md"]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_to_a_file_or_a_heading_leads_somewhere(path):
    text = (
        path.read_text()
        if path.suffix == ".md"
        else "\n".join(c.source for c in student.read(path).cells if c.cell_type == "markdown")
    )
    for link in re.findall(r"\]\(([^)\s]+)", text):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_the_parts_that_a_reader_counts_on(path):
    notebook = student.read(path)
    first = notebook.cells[0].source
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert first.startswith(f"# {path.name[:2]} · ")
    for part in ("**You will learn**", "**Prerequisites", "**Run time**", "rendered scenes"):
        assert part in first, f"the first cell has no {part}"
    assert len(code(notebook, "parameters")) == 1
    assert re.search(r"^\| (symbol|term|symbol or term) \|.*\n\|[-|]+\|$", text, re.M), (
        "no table of symbols or terms"
    )
    assert "redict, then run:" in text, "nothing to predict"
    assert [int(n) for n in re.findall(r"^\*\*(\d)\. ", text, re.M)][:3] == [1, 2, 3], (
        "at least three exercises, numbered"
    )
    assert "\n## Quiz\n" in text, "no heading 'Quiz'"
    quiz = text[text.index("## Quiz") :]
    questions, answers = quiz.split("<details><summary>Answers</summary>\n\n")
    assert (
        len(re.findall(r"^\d\. ", questions, re.M))
        == len(re.findall(r"^\d\. ", answers.split("</details>")[0], re.M))
        >= 3
    )
    after = re.search(r"^## .*[Ww]here next$.*", text, re.M | re.S)
    assert after and "Literature" in after[0] and re.search(r"(19|20)\d\d", after[0]), (
        "no heading 'Where next' with literature"
    )
    figures = [o for c in code(notebook) for o in c.outputs if "image/png" in o.get("data", {})]
    assert figures and all(len(o.metadata["image/png"]["alt"]) > 20 for o in figures), (
        "a figure without alternative text"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_ids_of_cells_are_unique_and_survive_in_the_solution(path):
    ids = [c.id for c in student.read(path).cells]
    assert len(set(ids)) == len(ids)
    assert ids == [c.id for c in student.read(student.SOLUTIONS / path.name).cells]


# ------------------------------------------------------------------------------------------ pages
# and slides


def test_a_page_holds_what_the_notebook_shows_and_needs_no_network(tmp_path):
    path = ROOT / "notebooks" / "01_token_learner.ipynb"
    assert pages.make([path], tmp_path, with_slides=True) == []
    assert {p.name for p in tmp_path.iterdir()} == {
        "index.html",
        "01_token_learner.html",
        "slides.html",
    }
    page = BeautifulSoup((tmp_path / "01_token_learner.html").read_text(), "html.parser")
    notebook = student.read(path)
    shown = [o for c in code(notebook) for o in c.outputs if "image/png" in o.get("data", {})]
    drawn = page.select("img:not(.formula)")
    assert [i["alt"] for i in drawn] == [o.metadata["image/png"]["alt"] for o in shown]
    assert all(i["src"].startswith("data:") for i in page.select("img"))
    assert (
        any(r"\frac" in i["alt"] for i in page.select("img.formula"))
        and "$" not in page.select_one("h1 ~ table, .scroll table").text
    )
    links = [a["href"] for a in page.select("main a[href]")]
    assert all((tmp_path / link).exists() for link in links if "://" not in link)
    deck = BeautifulSoup((tmp_path / "slides.html").read_text(), "html.parser")
    assert [i["alt"] for i in deck.select("figure img")] == [i["alt"] for i in drawn]
    questions = sum(c.source.count("**Predict, then run:**") for c in notebook.cells)
    assert len(deck.select("p.question")) == questions > 0
    claims = re.findall(
        r"^holds: .*$", "".join(o.get("text", "") for c in code(notebook) for o in c.outputs), re.M
    )
    assert [li.text for li in deck.select("section li") if li.text.startswith("holds")] == claims
    assert not deck.select("script[src], link") and len(deck.select("section.on")) == 1


@pytest.mark.slow
def test_the_whole_course_fits_its_pages_and_slides(tmp_path):
    assert (
        pages.make(sorted((ROOT / "notebooks").glob("*.ipynb")), tmp_path, with_slides=True) == []
    )
    try:
        assert pages.overflowing(sorted(tmp_path.glob("*.html"))) == []
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no browser: {error}")


def test_claims_go_on_over_several_slides_and_a_long_table_is_left_out():
    lines = "\n".join(f"holds: {i}" for i in range(slides.MOST_CLAIMS + 2))
    rows = "<tr><td>1</td></tr>" * (slides.MOST_ROWS + 1)
    areas = (
        f'<div class="output_area">{inside}</div>'
        for inside in (f"<pre>{lines}</pre>", f"<table>{rows}</table>")
    )
    made = [
        BeautifulSoup(slide, "html.parser")
        for slide in slides._of_outputs(BeautifulSoup("".join(areas), "html.parser"), "")
    ]
    assert [len(slide.select("li")) for slide in made] == [slides.MOST_CLAIMS, 2]
    assert not any(slide.select("table") for slide in made)


@pytest.mark.parametrize(
    "link, repository, leads",
    [
        ("../isa_lite/world/scenes.py", "", "../../isa_lite/world/scenes.py"),
        ("../isa_lite/world/scenes.py", "https://a.b/c/", "https://a.b/c/isa_lite/world/scenes.py"),
        ("02_distillation.ipynb#train", "https://a.b/c", "02_distillation.html#train"),
        ("03_retrieval.ipynb", "", "../../notebooks/03_retrieval.ipynb"),
        ("README.md#marking", "", "index.html#marking"),
        ("#quiz", "https://a.b/c", "#quiz"),
        ("https://arxiv.org", "https://a.b/c", "https://arxiv.org"),
    ],
)
def test_a_link_leads_from_a_page_to_a_page_or_to_the_repository(link, repository, leads):
    assert pages.link_to(link, ROOT / "runs" / "pages", {"02_distillation"}, repository) == leads


def test_what_is_wrong_with_a_page_is_said(tmp_path):
    bad = new_notebook(
        cells=[
            new_markdown_cell(
                "# A\n\n$\\nonsense{x}$ ![](https://a.b/c.png) [x](nowhere.py) [y](#not-there)",
                id="a",
            )
        ]
    )
    picture = nbformat.from_dict(
        {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}, "metadata": {}}
    )
    bad.cells.append(new_code_cell("", id="b", outputs=[picture]))
    body, wrong = pages.body_of(bad, tmp_path, set())
    assert [re.match(r"a formula|a picture|loaded", w)[0] for w in wrong] == [
        "a formula",
        "a picture",
        "a picture",
        "loaded",
    ]
    (tmp_path / "a.html").write_text(pages.framed(str(body), "A", []))
    nowhere, no_heading = pages.broken_links(tmp_path / "a.html")
    assert (
        nowhere.startswith("a link to nowhere: ")
        and no_heading == "a link to a heading that is not there: #not-there"
    )


def test_what_sticks_out_of_a_window_is_found_in_a_browser(tmp_path):
    wide = BeautifulSoup('<p style="width: 600px">wide</p>', "html.parser")
    (tmp_path / "wide.html").write_text(pages.framed(str(wide), "wide", []))
    (tmp_path / "slides.html").write_text(slides.deck(["<p>fits</p>", "<p>too many</p>" * 60], ""))
    try:
        wrong = pages.overflowing([tmp_path / "wide.html", tmp_path / "slides.html"])
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no browser: {error}")
    assert wrong == [
        "slides.html: slide 2 is larger than 1280 x 720 pixels",
        "wide.html: wider than a window of 390 pixels",
    ]


def test_a_page_shows_what_could_run_and_does_not_run_it(tmp_path):
    """Text of a notebook's outputs and cells is not trusted: nothing of it may run where the page
    is read.
    """
    bad = "<script>1</script><img src='x' alt='a' onerror='2'>\n\n[a](javascript:3)\n\n<iframe srcdoc='b'></iframe>"
    body, wrong = pages.body_of(new_notebook(cells=[new_markdown_cell(bad)]), tmp_path, set())
    assert not body.select("script, iframe, [onerror], [href^=javascript]")
    assert {"script", "onerror", "iframe"} <= {
        word for fault in wrong for word in re.findall(r"script|onerror|iframe", fault)
    }


def test_claims_and_captions_are_text_on_a_slide():
    areas = "<div class=output_area><pre>holds: 1 &lt; 2 &lt;b&gt;x&lt;/b&gt;</pre></div><div class=output_area><img src=x></div>"
    areas += "<div><p><em>a &lt;script&gt; in a caption</em></p></div>"
    made = "".join(slides._of_outputs(BeautifulSoup(areas, "html.parser"), ""))
    assert "<li>holds: 1 &lt; 2 &lt;b&gt;" in made and "a &lt;script&gt; in a caption" in made


def test_a_notebook_without_a_heading_is_named_and_the_others_have_their_slides(tmp_path):
    for name, cells in (
        ("empty", []),
        ("plain", [new_code_cell("1")]),
        ("good", [new_markdown_cell("# Title\n\nText.")]),
    ):
        nbformat.write(new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    wrong = pages.make(sorted(tmp_path.glob("*.ipynb")), tmp_path / "out", with_slides=True)
    assert [fault for fault in wrong if "slides" in fault and "empty" in fault] and [
        fault for fault in wrong if "plain" in fault
    ]
    assert "Title" in (tmp_path / "out" / "slides.html").read_text(encoding="utf-8")


def test_slides_are_printed_one_to_a_page():
    """A fixed element is drawn on every page: no element of a slide may be one, and a page is as
    large as a slide.
    """
    made = slides.deck(["<p>a</p>"], "")
    rules = dict(
        re.findall(r"([^{}]+)\{([^{}]*)\}", made.partition("<style>")[2].partition("</style>")[0])
    )
    fixed = [name.strip() for name, rule in rules.items() if "position: fixed" in rule]
    assert fixed == ["footer"] and "size: 1280px 720px" in made  # the footer is not printed
