"""Train a small GPT-2 on English that ships with Python, so that a trained decoder can be pruned without a download.

    python examples/tiny_gpt2/train.py --out DIR [--steps N]     about a quarter of an hour on two CPU threads
    python examples/tiny_gpt2/train.py --evaluate DIR            the figures of a finished folder, as JSON

The text is `pydoc_data.topics` and the docstrings of the standard library (read with `ast`, nothing is imported).
Writes the checkpoint, its tokenizer, `held_out.txt` (a fixed excerpt that is not trained on) and a README.md with the
figures to DIR.
The result depends only on the seed, the number of steps and threads, and the versions named in that README.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import platform
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

SEED = 20
STEPS = 1500
BATCH = 16  # windows of CONTEXT tokens per step
LEARNING_RATE = 3e-3
WARMUP = 100  # steps
DROPOUT = 0.2  # of embeddings and residuals, because training makes about eleven passes over the text
CONTEXT = 256  # tokens
VOCABULARY = 2000  # tokens; a larger one would spend most of the 6 MB on embeddings instead of heads
LAYERS, HEADS, WIDTH, FEED_FORWARD = 4, 8, 160, 480
END = "<|endoftext|>"
HELD_OUT_SHARE = 0.08  # of the documents
EXCERPT = (12, 2500)  # documents, characters of each
NOT_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "pydoc_data"}
WRAPPED = 50  # a line of at least this many characters may be a wrapped line of prose
REPEATED = 40  # a paragraph of at least this many characters is used once in the whole corpus


@dataclass(frozen=True)
class Document:
    """One help topic, or the docstrings of one module."""

    name: str
    text: str

    @property
    def digest(self) -> int:
        """A hash of the name, so that the order and the split do not depend on the other documents or the machine."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")

    @property
    def held_out(self) -> bool:
        return self.digest < HELD_OUT_SHARE * 2**64


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a text: of every token except the first, given those before it in its window."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def byte_perplexity(self) -> float:
        return math.exp(self.nats / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)


@dataclass(frozen=True)
class Split:
    """Token ids of one side of the split; each document begins with END."""

    documents: int
    bytes: int
    ids: torch.Tensor  # int64, one dimension


def corpus() -> list[Document]:
    """All documents, topics first, then modules by path, without interpreter sessions.

    A long paragraph is kept in the first document only, so that no held-out text is a copy of training text.
    """
    seen: set[str] = set()
    kept = []
    for document in [*_topic_documents(), *_docstring_documents(Path(sysconfig.get_path("stdlib")))]:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split())
            if ">>>" in paragraph or (len(key) >= REPEATED and key in seen):
                continue
            seen.add(key)
            paragraphs.append(unwrap(paragraph))
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= 200:
            kept.append(Document(document.name, text))
    return kept


def unwrap(paragraph: str) -> str:
    """The paragraph with its prose on one line, so that the model does not learn where lines are wrapped.

    A line continues in the next if it is long, and the next has the same indentation and no columns or markers.
    """
    lines: list[str] = []
    last, last_indent = "", -1
    for line in paragraph.rstrip().split("\n"):
        text = _TWO_SPACES.sub(" ", line.strip())
        indent = len(line) - len(line.lstrip())
        if indent == last_indent and len(last) >= WRAPPED and "  " not in text and _PROSE.match(text):
            lines[-1] += f" {text}"
        else:
            lines.append(" " * indent + text)
        last, last_indent = line, indent
    return "\n".join(lines)


def _topic_documents() -> Iterator[Document]:
    for name in sorted(topics):
        yield Document(f"topic:{name}", inspect.cleandoc(topics[name]))


def _docstring_documents(stdlib: Path) -> Iterator[Document]:
    for path in sorted(stdlib.rglob("*.py"), key=lambda found: found.relative_to(stdlib).as_posix()):
        relative = path.relative_to(stdlib)
        if NOT_TEXT.intersection(relative.parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and intentionally invalid files
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
        docstrings = [text for node in nodes if (text := ast.get_docstring(node)) and len(text.split()) >= 4]
        if docstrings:
            yield Document(f"module:{relative.as_posix()}", "\n\n".join(docstrings))


_TWO_SPACES = re.compile(r"(?<=[.?!:;)])  ")  # between sentences, not between columns
_PROSE = re.compile(r"""[\w"'`(<]""")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def excerpt(held_out: Sequence[Document]) -> str:
    """The beginnings of a few held-out documents, in the order of their hashes."""
    documents, characters = EXCERPT
    long = [each for each in sorted(held_out, key=lambda each: each.digest) if len(each.text) >= 500]
    return "\n\n".join(each.text[:characters].rstrip() for each in long[:documents]) + "\n"


def train_tokenizer(texts: Sequence[str]) -> GPT2TokenizerFast:
    """A byte-level BPE like that of GPT-2, so that every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer, unk_token=END, bos_token=END, eos_token=END, model_max_length=CONTEXT
    )


def encode(tokenizer: GPT2TokenizerFast, texts: Sequence[str]) -> Split:
    """Texts as one stream of tokens."""
    rows = tokenizer._tokenizer.encode_batch([END + text for text in texts])
    ids = torch.tensor([token for row in rows for token in row.ids], dtype=torch.int64)
    return Split(len(texts), sum(len(text.encode()) for text in texts), ids)


def new_model() -> GPT2LMHeadModel:
    """The untrained model."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_layer=LAYERS,
            n_head=HEADS,
            n_embd=WIDTH,
            n_inner=FEED_FORWARD,
            resid_pdrop=DROPOUT,
            embd_pdrop=DROPOUT,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,
        )
    )


def train(model: GPT2LMHeadModel, ids: torch.Tensor, steps: int) -> None:
    """Trains in place: AdamW on random windows, a short warm-up, then a cosine to 5% of the learning rate."""
    generator = torch.Generator().manual_seed(SEED)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    warmup = min(WARMUP, steps)

    def schedule(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    offsets = torch.arange(CONTEXT + 1)
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - CONTEXT, (BATCH, 1), generator=generator)
        window = ids[starts + offsets]
        logits = model(input_ids=window[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps} loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


@torch.inference_mode()
def likelihood(model: GPT2LMHeadModel, split: Split) -> Likelihood:
    """Of the stream, split into windows of CONTEXT tokens; each prediction sees the tokens before it in its window."""
    nats = 0.0
    for start in range(0, len(split.ids) - 1, CONTEXT):
        window = split.ids[start : start + CONTEXT + 1]
        logits = model(input_ids=window[None, :-1]).logits[0].float()
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return Likelihood(nats, len(split.ids) - 1, split.bytes)


class Bigram:
    """The baseline: bigrams, interpolated with add-one unigrams by Witten-Bell smoothing."""

    def __init__(self, ids: torch.Tensor) -> None:
        stream = ids.tolist()
        self.unigrams, self.total = Counter(stream), len(stream)
        self.followers: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for before, after in pairwise(stream):
            self.followers[before][after] += 1

    def unigram(self, token: int) -> float:
        return (self.unigrams[token] + 1) / (self.total + VOCABULARY)

    def probability(self, before: int, after: int) -> float:
        """Of the next token `after`, given `before`; normalized over all tokens."""
        followers = self.followers.get(before, Counter())
        kinds = max(1, len(followers))
        return (followers[after] + kinds * self.unigram(after)) / (followers.total() + kinds)

    def likelihoods(self, split: Split) -> tuple[Likelihood, Likelihood]:
        """Of unigrams and of bigrams, on the tokens that the model is scored on."""
        stream = split.ids.tolist()
        single = -sum(math.log(self.unigram(after)) for after in stream[1:])
        double = -sum(math.log(self.probability(*pair)) for pair in pairwise(stream))
        return Likelihood(single, len(stream) - 1, split.bytes), Likelihood(double, len(stream) - 1, split.bytes)


def evaluate(folder: Path, documents: Sequence[Document]) -> dict[str, dict[str, Likelihood]]:
    """Figures by text (`held_out`: all of it in this version of Python; `excerpt`: the fixed file) and by predictor."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    bigram = Bigram(encode(tokenizer, [document.text for document in documents if not document.held_out]).ids)
    texts = {
        "held_out": [document.text for document in documents if document.held_out],
        "excerpt": [(folder / "held_out.txt").read_text(encoding="utf-8")],
    }
    figures = {}
    for name, wanted in texts.items():
        split = encode(tokenizer, wanted)
        unigrams, bigrams = bigram.likelihoods(split)
        figures[name] = {"unigrams": unigrams, "bigrams": bigrams, "model": likelihood(model, split)}
    return figures


def as_json(figures: dict[str, dict[str, Likelihood]]) -> str:
    """The figures as printed by `--evaluate`."""

    def row(each: Likelihood) -> dict[str, float]:
        rounded = {"perplexity": round(each.perplexity, 4), "bits_per_byte": round(each.bits_per_byte, 5)}
        return {**rounded, "tokens": each.tokens, "bytes": each.bytes}

    table = {text: {who: row(each) for who, each in by_predictor.items()} for text, by_predictor in figures.items()}
    return json.dumps(table, indent=1)


def card(figures: dict[str, dict[str, Likelihood]], trained: Split, held_out: Split, args: argparse.Namespace) -> str:
    """The folder's README.md."""
    rows = [
        f"| {text.replace('_', '-')} | {who} | "
        f"{each.perplexity:.3f} | {each.byte_perplexity:.3f} | {each.bits_per_byte:.3f} |"
        for text, by_predictor in figures.items()
        for who, each in by_predictor.items()
    ]
    whole, part = figures["held_out"]["model"], figures["excerpt"]["model"]
    template = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    return template.format(
        layers=LAYERS, heads=HEADS, width=WIDTH, context=CONTEXT, vocabulary=VOCABULARY, batch=BATCH, seed=SEED,
        parameters=sum(weight.numel() for weight in new_model().parameters()),
        rows="\n".join(rows), rate=LEARNING_RATE, steps=args.steps, threads=args.threads, share=HELD_OUT_SHARE,
        held_out_tokens=whole.tokens, held_out_bytes=whole.bytes, excerpt_tokens=part.tokens, excerpt_bytes=part.bytes,
        train_documents=trained.documents, train_bytes=trained.bytes, train_tokens=len(trained.ids),
        held_out_documents=held_out.documents, passes=args.steps * BATCH * CONTEXT / len(trained.ids),
        python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
    )  # fmt: skip


def build(args: argparse.Namespace) -> None:
    """Trains, and writes the folder."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    documents = corpus()
    seen = [document.text for document in documents if not document.held_out]
    unseen = [document for document in documents if document.held_out]
    tokenizer = train_tokenizer(seen)
    trained, held_out = encode(tokenizer, seen), encode(tokenizer, [document.text for document in unseen])
    print(f"{trained.documents} documents, {len(trained.ids)} tokens to train on", file=sys.stderr, flush=True)
    model = new_model()
    train(model, trained.ids, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out, safe_serialization=True)
    tokenizer.save_pretrained(args.out)
    (args.out / "held_out.txt").write_text(excerpt(unseen), encoding="utf-8", newline="\n")
    figures = evaluate(args.out, documents)
    (args.out / "README.md").write_text(card(figures, trained, held_out, args), encoding="utf-8", newline="\n")
    print(as_json(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the checkpoint")
    what.add_argument("--evaluate", type=Path, help="folder of a finished checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        print(as_json(evaluate(args.evaluate, corpus())))
    else:
        build(args)


if __name__ == "__main__":
    main()
