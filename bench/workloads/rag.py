"""`rag`: questions over real documents, some asked about far more often than others.

System prompt and document come first, the question last, as every retrieval pipeline does it, so requests about one
document share its blocks. Sized for the profile llama-2-13b-a100-40gb (924 blocks a worker): 90 documents of about 31
blocks are three times what one worker's cache holds, and fit into four workers' caches together.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from random import Random

from bench.workloads.base import TimedRequest, Workload, WorkloadSpec, chat, poisson_arrivals
from bench.workloads.documents import documents

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
    """The workload of these parameters. Raises `WorkloadError` where the standard library has no sources."""
    count, rate = spec.limit or REQUESTS, spec.rate or RATE
    shelf = documents(Random(f"rag documents {spec.seed}"), DOCUMENTS, DOCUMENT_CHARS)
    weights = list(accumulate((rank + 1) ** -ZIPF for rank in range(DOCUMENTS)))
    prefixes = [f"{SYSTEM}\n\n{document.text}" for document in shelf]

    def requests() -> Iterator[TimedRequest]:
        random = Random(f"rag {spec.seed}")
        for index, at in zip(range(count), poisson_arrivals(random, rate), strict=False):
            (which,) = random.choices(range(DOCUMENTS), cum_weights=weights)
            name, other = random.sample(shelf[which].names, 2)
            question = random.choice(QUESTIONS).format(name=name, other=other)
            messages = [{"role": "system", "content": prefixes[which]}, {"role": "user", "content": question}]
            yield chat(index, at, messages, MAX_TOKENS)

    config = {"rate": rate, "documents": DOCUMENTS, "document_chars": DOCUMENT_CHARS, "zipf": ZIPF}
    return Workload("rag", spec.seed, count, {**config, "max_tokens": MAX_TOKENS}, requests)
