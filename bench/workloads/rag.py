"""`rag`: questions about real documents, some asked about far more often than others.

System prompt and document come first, the question last, as in every retrieval pipeline, so requests about one document
share its blocks. Sized for the profile llama-2-13b-a100-40gb (924 blocks a worker): 90 documents of about 31 blocks are
three times what the cache of one worker holds, and fit into the caches of four workers together.

The documents are ones that every machine with Python has: the documentation inside the sources of the standard library.
Modules are parsed, never imported: an import could run code, and some modules of another platform cannot be imported.
The documents are the same for one version of Python.
"""

from __future__ import annotations

import ast
import pkgutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from inspect import cleandoc
from itertools import accumulate
from pathlib import Path
from random import Random

from bench.workloads.base import TimedRequest, Workload, WorkloadError, WorkloadSpec, chat

MIN_NAMES = 3
"""A document has to define a few names that questions can be about."""


@dataclass(frozen=True, slots=True)
class Document:
    """An excerpt of one module's documentation."""

    title: str
    text: str
    names: tuple[str, ...]
    """Functions and classes that the text describes."""


def standard_library() -> list[tuple[str, Path]]:
    """(name, file) of the public modules of the standard library that are Python sources, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for module in pkgutil.iter_modules([str(root)]):
        file = root / module.name / "__init__.py" if module.ispkg else root / f"{module.name}.py"
        if not module.name.startswith("_") and file.is_file():
            found.append((module.name, file))
    return sorted(found)


def _entries(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, str]]:
    """(name, entry) of each documented class and function, methods after their class."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        name = f"{owner}.{node.name}"
        if isinstance(node, ast.ClassDef):
            if text:
                yield name, f"class {name}\n{cleandoc(text)}\n"
            yield from _entries(node.body, name)
        elif text and not node.name.startswith("_"):
            yield name, f"def {name}({ast.unparse(node.args)})\n{cleandoc(text)}\n"


@lru_cache(maxsize=256)
def excerpts(module: str, source: str, length: int) -> tuple[Document, ...]:
    """The documentation of a module in excerpts of at most `length` characters, each cut at the end of a line.

    Excerpts that name fewer than `MIN_NAMES` functions and classes, or are shorter than two thirds of `length`, are
    left out.
    """
    tree = ast.parse(source)
    made: list[Document] = []
    names: list[str] = []
    text = f"# Module {module}\n\n{cleandoc(ast.get_docstring(tree) or '')[: length // 3]}\n"

    def close() -> None:
        if len(names) >= MIN_NAMES and len(text) > length * 2 // 3:
            made.append(Document(f"{module} ({len(made) + 1})", text, tuple(names)))

    for name, entry in _entries(tree.body, module):
        if len(text) + len(entry) < length:
            text += "\n" + entry
            names.append(name)
        else:
            text = f"{text}\n{entry}"[:length].rpartition("\n")[0]
            close()
            text, names = f"# Module {module}, continued\n", []
    close()
    return tuple(made)


def documents(random: Random, count: int, length: int, per_module: int = 2) -> list[Document]:
    """`count` documents of about `length` characters, at most `per_module` of one module. Raises `WorkloadError`."""
    modules = standard_library()
    random.shuffle(modules)
    found: list[Document] = []
    for module, file in modules:
        found += excerpts(module, file.read_text(encoding="utf-8", errors="replace"), length)[:per_module]
        if len(found) >= count:
            return found[:count]
    raise WorkloadError(
        f"the sources of this Python's standard library give only {len(found)} documents of {length} characters, "
        f"not {count}; use an installation that has its sources, or another workload"
    )


DOCUMENTS = 90
DOCUMENT_CHARS = 1_500
ZIPF = 0.7
"""Weight of the document of rank r is 1 / r**ZIPF: the first is asked about some 20 times as often as the last."""
MAX_TOKENS = 32
REQUESTS = 600
RATE = 16.0

SYSTEM = (
    "You answer questions about Python's standard library. Use only the excerpt of its documentation below. "
    "Answer in one short sentence, name the function or class you mean, and say so when the excerpt does not tell."
)
QUESTIONS = (
    "What does {name} do?",
    "When would I call {name} rather than {other}?",
    "Which arguments does {name} take, and what do they mean?",
    "What happens when {name} is given a wrong value?",
    "Is {name} safe to call twice in a row?",
    "How do {name} and {other} work together?",
    "Give an example that uses {name}.",
    "What does {name} return, and of which type?",
)


def rag(spec: WorkloadSpec) -> Workload:
    """The workload of these parameters. Raises `WorkloadError` if the standard library has no sources."""
    count, rate = spec.limit or REQUESTS, spec.rate or RATE
    shelf = documents(Random(f"rag documents {spec.seed}"), DOCUMENTS, DOCUMENT_CHARS)
    weights = list(accumulate((rank + 1) ** -ZIPF for rank in range(DOCUMENTS)))
    prefixes = [f"{SYSTEM}\n\n{document.text}" for document in shelf]

    def requests() -> Iterator[TimedRequest]:
        random = Random(f"rag {spec.seed}")
        for index, at in zip(range(count), spec.process.times(random, rate), strict=False):
            (which,) = random.choices(range(DOCUMENTS), cum_weights=weights)
            name, other = random.sample(shelf[which].names, 2)
            question = random.choice(QUESTIONS).format(name=name, other=other)
            messages = [{"role": "system", "content": prefixes[which]}, {"role": "user", "content": question}]
            yield chat(index, at, messages, MAX_TOKENS)

    config = {"rate": rate, "documents": DOCUMENTS, "document_chars": DOCUMENT_CHARS, "zipf": ZIPF}
    return Workload("rag", spec.seed, count, {**config, "max_tokens": MAX_TOKENS}, requests)
