"""`uniform`, `hot` and `answers`: the extremes. Prompts are token ids: their lengths are exact with every tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from bench.workloads.base import TimedRequest, Workload, WorkloadSpec, completion, token_ids

REQUESTS = 400
RATE = 12.0
MAX_TOKENS = 32
UNIFORM_TOKENS = (256, 768)
HOT_PREFIX_TOKENS = 1_024
HOT_TAIL_TOKENS = (64, 192)
ANSWERS_REQUESTS = 200
ANSWERS_RATE = 2.5
ANSWERS_TAIL_TOKENS = (16, 64)
ANSWERS_MAX_TOKENS = (256, 768)


def uniform(spec: WorkloadSpec) -> Workload:
    """Prompts that share nothing: they show what a strategy costs when caches cannot help."""
    count, rate = spec.limit or REQUESTS, spec.rate or RATE

    def requests() -> Iterator[TimedRequest]:
        random = Random(f"uniform {spec.seed}")
        for index, at in zip(range(count), spec.process.times(random, rate), strict=False):
            prompt = token_ids(f"uniform {spec.seed} {index}", random.randint(*UNIFORM_TOKENS))
            yield completion(index, at, prompt, MAX_TOKENS)

    config = {"rate": rate, "prompt_tokens": list(UNIFORM_TOKENS), "max_tokens": MAX_TOKENS}
    return Workload("uniform", spec.seed, count, config, requests)


def hot(spec: WorkloadSpec) -> Workload:
    """One large prefix that every prompt shares, and tails that none shares: pure longest-prefix matching sends all
    requests to one worker."""
    count, rate = spec.limit or REQUESTS, spec.rate or RATE

    def requests() -> Iterator[TimedRequest]:
        random = Random(f"hot {spec.seed}")
        prefix = token_ids(f"hot {spec.seed} prefix", HOT_PREFIX_TOKENS)
        for index, at in zip(range(count), spec.process.times(random, rate), strict=False):
            tail = token_ids(f"hot {spec.seed} {index}", random.randint(*HOT_TAIL_TOKENS))
            yield completion(index, at, prefix + tail, MAX_TOKENS)

    config = {
        "rate": rate,
        "prefix_tokens": HOT_PREFIX_TOKENS,
        "tail_tokens": list(HOT_TAIL_TOKENS),
        "max_tokens": MAX_TOKENS,
    }
    return Workload("hot", spec.seed, count, config, requests)


def answers(spec: WorkloadSpec) -> Workload:
    """Short questions behind the prefix that every prompt shares, with long answers: the time is spent on decoding, and
    an engine that decodes many at a time makes each of them slower."""
    count, rate = spec.limit or ANSWERS_REQUESTS, spec.rate or ANSWERS_RATE

    def requests() -> Iterator[TimedRequest]:
        random = Random(f"answers {spec.seed}")
        prefix = token_ids(f"answers {spec.seed} prefix", HOT_PREFIX_TOKENS)
        for index, at in zip(range(count), spec.process.times(random, rate), strict=False):
            tail = token_ids(f"answers {spec.seed} {index}", random.randint(*ANSWERS_TAIL_TOKENS))
            yield completion(index, at, prefix + tail, random.randint(*ANSWERS_MAX_TOKENS))

    config = {
        "rate": rate,
        "prefix_tokens": HOT_PREFIX_TOKENS,
        "tail_tokens": list(ANSWERS_TAIL_TOKENS),
        "max_tokens": list(ANSWERS_MAX_TOKENS),
    }
    return Workload("answers", spec.seed, count, config, requests)
