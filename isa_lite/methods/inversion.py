"""Zero-shot composed retrieval with one pseudo-word: three well-known recipes in short.

All of them keep the large image tower on the query side: a mapping network turns its *embedding*
into one vector of the word-embedding space, and the prompt "a photo of <word>, <modifier>" goes
through the frozen text tower. They differ in what they learn from:

- `pic2word_like`, after Pic2Word (Saito et al., CVPR 2023). Images: a prompt's embedding must find
its own image in the batch.
- `searle_like`, after SEARLE (Baldrati et al., ICCV 2023). Images: a word is optimised for each,
then guessed by the mapping.
- `lincir_like`, after LinCIR (Gu et al., CVPR 2024). Texts: a caption's embedding must replace that
caption's own key words.

"Like" means: our own short version, with the differences named in the docstring; no figure of
theirs is to be expected of it.

With the defaults of `Training` each is the recipe alone, with norm-matched words. The other aids of
ISA's own encoder (`recipes`) it takes where it has a place for them: `start_words`, a text whose
first word the pseudo-word is before training (all three); `word_noise`, noise on words on their way
to the text tower (all three); `negatives`, images outside the batch (the two that contrast). The
backbone's learned start has no place here: the large tower is the backbone. All aids are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

from isa_lite.losses import gcd_loss
from isa_lite.models.start_words import start_from, start_vectors
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import TEMPLATE, Prompt, compose, read_sentences, splice
from isa_lite.retrieval.queries import Queries
from isa_lite.support.draws import blur, other_indices
from isa_lite.support.training import fit
from isa_lite.token_learner import ToWords

#: Words that LinCIR-like training leaves in place, because they name nothing that one can see.
FUNCTION_WORDS = frozenset(
    "a an the of on in at and with to is it its that this photo picture image drawing "
    "background".split()
)


class Inversion(nn.Module):
    """Network: embeddings B x E -> pseudo-words B x D, each about as long as a real word."""

    def __init__(self, embed_dim: int, word_width: int, word_norm: float, width: int = 512):
        super().__init__()
        first, second = nn.Linear(embed_dim, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU())
        self.to_word = ToWords(width, word_width, word_norm)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.to_word(self.mlp(embeddings))

    @torch.no_grad()
    def compose(
        self, vl: VLModel, images: Tensor, modifiers: Sequence[str], template: str = TEMPLATE
    ) -> Tensor:
        """Queries B x E: image embeddings B x E as words, with modifiers, by the text tower."""
        device = next(self.parameters()).device
        return compose(vl, self(images.to(device)).unsqueeze(1), modifiers, template)


@dataclass(frozen=True)
class OneWord:
    """A trained mapping as a method: one pseudo-word for the reference's embedding."""

    mapping: Inversion
    template: str = TEMPLATE

    def __call__(self, queries: Queries) -> Tensor:
        image = queries.each(queries.image_embeddings())
        return queries.joined(self.mapping.compose(queries.vl, image, queries.texts, self.template))


def _prompt(vl: VLModel, words: Tensor, template: str) -> Tensor:
    """Pseudo-words B x D alone in the prompt -> text embeddings B x E."""
    return read_sentences(vl, words.unsqueeze(1), Prompt.of(vl, 1, template))[0]


@dataclass(frozen=True)
class Training:
    """How the three recipes train. start_words, word_noise, negatives: aids of ISA's encoder."""

    steps: int = 600
    batch_size: int = 128
    lr: float = 1e-3
    start_words: str = ""
    word_noise: float = 0.0
    negatives: int = 0
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 2:
            fault = "steps must be at least 1 and batch_size at least 2"
            raise ValueError(f"{fault}, not {self.steps} and {self.batch_size}")

    def mapping(self, vl: VLModel, embeddings: Tensor) -> Inversion:
        """An untrained mapping for embeddings N x E. Raises ValueError for less than two."""
        if embeddings.ndim != 2 or len(embeddings) < 2:
            fault = "at least two embeddings, N x E, are needed to contrast with one another"
            raise ValueError(f"{fault}, not {tuple(embeddings.shape)}")
        torch.manual_seed(self.seed)
        mapping = Inversion(embeddings.shape[1], vl.word_width, vl.word_norm)
        if self.start_words:
            start_from(mapping.to_word, start_vectors(vl, self.start_words))
        return mapping.to(vl.device)

    def noisy(self, words: Tensor, step: int) -> Tensor:
        """Words on their way to the text tower."""
        return blur(words, self.word_noise, step, self.seed)

    def others(self, rows: Tensor, batch: Tensor, step: int) -> Tensor:
        """Rows outside a batch of B indices, at most `negatives`, drawn from seed and step."""
        found = other_indices(len(rows), batch.numpy(), self.negatives, step, self.seed)
        return rows[torch.from_numpy(found)]

    def fit(
        self, name: str, mapping: Inversion, loss_of: Callable[[Tensor, int], Tensor], count: int
    ) -> Inversion:
        """The mapping, trained on `loss_of` a batch (B indices of `count`, by epoch) and step."""
        optimizer = torch.optim.AdamW(mapping.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)

        def batches(start: int) -> Iterator[Tensor]:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.empty(0, dtype=torch.long)
            for _ in range(start, self.steps):
                if len(order) < min(self.batch_size, count):
                    order = torch.randperm(count, generator=generator)
                batch, order = order[: self.batch_size], order[self.batch_size :]
                yield batch

        how = {"after": lambda *_: schedule.step(), "progress": self.progress}
        fit(name, self.steps, loss_of, batches, {"mapping": mapping}, optimizer, **how)
        return mapping.eval()


def pic2word_like(
    vl: VLModel,
    images: Tensor,
    temperature: float = 0.05,
    template: str = TEMPLATE,
    **settings,
) -> Inversion:
    """Contrastive inversion from unlabeled images, given as embeddings N x E of the large tower.
    settings: fields of `Training`.

    The prompt with an image's word must be nearer to that image than to the batch's others, and the
    other way round. Differs from Pic2Word in: temperature (a constant, CLIP's learned one there),
    two hidden layers, norm-matched words, rendered scenes for three million web images.
    """
    training = Training(**settings)
    mapping = training.mapping(vl, images)

    def loss_of(batch: Tensor, step: int) -> Tensor:
        image = images[batch].to(vl.device)
        query = _prompt(vl, training.noisy(mapping(image), step), template)
        others = training.others(images, batch, step).to(vl.device)
        return gcd_loss(query, image, temperature, others)

    return training.fit("Pic2Word-like", mapping, loss_of, len(images))


def optimize_words(
    vl: VLModel,
    images: Tensor,
    steps: int = 60,
    lr: float = 0.05,
    gravity: float = 0.1,
    template: str = TEMPLATE,
    start_words: str = "",
    word_noise: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> Tensor:
    """Textual inversion: each image embedding's (N x E) best pseudo-word, N x D, by descent.

    The loss is one minus the cosine of prompt and image; a word has the length of real words.
    `gravity` weighs one minus the cosine of the word with the nearest real word, which keeps it
    among words that the text tower knows. Ours, for SEARLE's pull towards phrases that GPT wrote.
    Aids, neither of them SEARLE's: all words start from the first of start_words instead of from
    random directions, and each step reads them with word_noise (`draws.blur`), a draw a batch.
    """
    table = vl.word_vectors(torch.arange(vl.vocab_size, device=vl.device)).detach()
    known = F.normalize(table[table.norm(dim=1) > 0].float(), dim=-1)  # W x D
    torch.manual_seed(seed)
    start = F.normalize(torch.randn(len(images), vl.word_width), dim=-1)
    if start_words:
        start = F.normalize(start_vectors(vl, start_words)[:1], dim=-1).repeat(len(images), 1)
    found = []
    how = {"desc": "words for images", "disable": not progress, "mininterval": 5}
    for s in trange(0, len(images), batch_size, **how):
        target = images[s : s + batch_size].to(vl.device)
        free = start[s : s + batch_size].to(vl.device).requires_grad_(True)
        optimizer = torch.optim.Adam([free], lr=lr)
        for step in range(steps):
            words = F.normalize(free, dim=-1)  # B x D
            read = blur(words, word_noise, step * len(images) + s, seed) * vl.word_norm
            far = 1 - (_prompt(vl, read, template) * target).sum(-1)  # B
            unlike = 1 - (words @ known.T).amax(-1)  # B
            optimizer.zero_grad(set_to_none=True)
            # a sum: no image's word depends on what else is in its batch
            (far + gravity * unlike).sum().backward()
            optimizer.step()
        found.append(F.normalize(free.detach(), dim=-1).cpu() * vl.word_norm)
    return torch.cat(found)


def searle_like(
    vl: VLModel, images: Tensor, words: Tensor | None = None, temperature: float = 0.25, **settings
) -> Inversion:
    """A mapping that guesses, in one pass, the word that `optimize_words` finds for an image.

    images: N x E, words: N x D (made with `optimize_words` where not given). settings: fields of
    `Training`. The guess must be nearer, by cosine, to its own image's word than to the others of
    the batch, and the other way round. Differs from SEARLE in: the pull is towards words instead of
    GPT's phrases, in `optimize_words` alone; norm-matched words; no dropout. Of the aids,
    start_words concern the words and the mapping, word_noise the words, which alone are read by the
    text tower, and negatives are other images' words.
    """
    training = Training(**settings)
    mapping = training.mapping(vl, images)
    if words is None:
        aids = {n: getattr(training, n) for n in ("start_words", "word_noise", "seed", "progress")}
        words = optimize_words(vl, images, **aids)
    if len(words) != len(images):
        raise ValueError(f"{len(images)} images but {len(words)} words")

    def loss_of(batch: Tensor, step: int) -> Tensor:
        guess, others = mapping(images[batch].to(vl.device)), training.others(words, batch, step)
        parts = (F.normalize(x.to(vl.device), dim=-1) for x in (guess, words[batch], others))
        guess, word, others = parts
        return gcd_loss(guess, word, temperature, others)

    return training.fit("SEARLE-like", mapping, loss_of, len(images))


def keyword_prompt(
    vl: VLModel, caption: str, keep: frozenset[str] = FUNCTION_WORDS
) -> tuple[list[int], list[bool]]:
    """Token ids of a caption whose runs of key words are one placeholder each, and these' places.

    Without the special tokens. Key words are all that are neither in `keep` nor punctuation.
    "a photo of two red stars, on grass" -> "a photo of *, on *".
    """
    ids: list[int] = []
    marks: list[bool] = []
    for piece in vl.words.ids(caption):
        word = vl.words.word(piece)
        if word in keep or not any(c.isalnum() for c in word):
            ids.append(piece)
            marks.append(False)
        elif not (marks and marks[-1]):
            ids.append(piece)
            marks.append(True)
    return ids, marks


def lincir_like(vl: VLModel, captions: Sequence[str], noise: float = 0.5, **settings) -> Inversion:
    """Self-masking projection from texts alone: no image is seen in training. settings: fields of
    `Training`; nothing is contrasted, so negatives do nothing.

    A caption's embedding, plus noise, is mapped to a word; that word takes the place of the
    caption's key words, and the text tower must give the embedding of the whole caption. The noise
    (normal, its length up to `noise` times the embedding's, drawn evenly) bridges the gap between
    text and image embeddings. Differs from LinCIR in: key words are all but a list of function
    words, there nouns and adjectives; the loss is one minus the cosine, there the squared error.
    """
    training = Training(**settings)
    embedded = vl.encode_text(captions)
    mapping = training.mapping(vl, embedded)
    start, end = vl.tokenizer.sot_token_id, vl.tokenizer.eot_token_id
    prompts = [keyword_prompt(vl, caption) for caption in captions]
    for caption, (_, marks) in zip(captions, prompts, strict=True):
        if not any(marks):
            raise ValueError(f"the caption {caption!r} holds no key word to replace")
    ids = torch.zeros(len(captions), vl.context_length, dtype=torch.long)
    places = torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, marks) in enumerate(prompts):
        tokens, marks = tokens[: vl.context_length - 2], marks[: vl.context_length - 2]
        ids[row, : len(tokens) + 2] = torch.tensor([start, *tokens, end])
        places[row, 1 : len(tokens) + 1] = torch.tensor(marks)
    generator = torch.Generator().manual_seed(training.seed + 1)

    def loss_of(batch: Tensor, step: int) -> Tensor:
        latent = embedded[batch]
        size = noise * torch.rand(len(batch), 1, generator=generator)
        drawn = torch.randn(latent.shape, generator=generator)
        latent = latent + size * drawn / float(np.sqrt(latent.shape[1]))
        rows = vl.cut(ids[batch].to(vl.device))
        marks = places[batch, : rows.shape[1]].to(vl.device)
        words = training.noisy(mapping(latent.to(vl.device)), step)
        words = words.repeat_interleave(marks.sum(1), dim=0)  # one copy a placeholder
        vectors = splice(vl, words, rows, marks)
        cosine = (vl.encode_vectors(vectors, rows) * embedded[batch].to(vl.device)).sum(-1)
        return (1 - cosine).mean()

    return training.fit("LinCIR-like", mapping, loss_of, len(captions))
