"""A causal language model of transformers, tiny and untrained. Needs torch: `pip install 'kvcluster[gpt2]'`.

Not covered: GPT-2's own weights, which no test downloads.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from worker.emulator.generators import GeneratorError
from worker.emulator.generators.base import AnswerRequest

pytestmark = pytest.mark.timeout(300)  # importing torch takes most of it on a loaded machine

VOCABULARY = 100


@pytest.fixture(scope="module", autouse=True)
def torch() -> Any:
    """Not imported above: it takes seconds, which everyone who collects the tests would pay."""
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=32, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    path = tmp_path_factory.mktemp("model")
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def load(folder: Path, vocabulary: int = VOCABULARY) -> Any:
    from worker.emulator.generators.torch_model import TorchModel

    return TorchModel(str(folder), vocabulary)


def at(temperature: float, rng: random.Random, **how: Any) -> tuple[AnswerRequest, random.Random]:
    return AnswerRequest([], 1, temperature=temperature, **how), rng


def greedy(**how: Any) -> tuple[AnswerRequest, random.Random]:
    return at(0.0, random.Random(0), **how)


def test_tokens_made_one_at_a_time_are_those_of_the_whole_text(folder) -> None:
    model = load(folder)
    text, unseen, past = [1, 2, 3], [1, 2, 3], None
    for _ in range(10):
        output = model.step(unseen, past, *greedy())
        assert output.token == model.step(text, None, *greedy()).token
        text.append(output.token)
        unseen, past = [output.token], output.past
    assert model.window == 64


def test_a_banned_token_is_never_chosen_nor_one_that_is_not_allowed(folder) -> None:
    model, rng = load(folder), random.Random(0)
    first = model.step([5, 6], None, *greedy()).token
    assert model.step([5, 6], None, *greedy(banned={first})).token != first
    assert all(model.step([5, 6], None, *at(1.0, rng, banned={7})).token != 7 for _ in range(300))
    assert {model.step([5, 6], None, *at(1.0, rng, allowed=[3, 4])).token for _ in range(50)} == {3, 4}


def test_the_seed_decides_within_the_likeliest(folder) -> None:
    model = load(folder)
    drawn = [model.step([5], None, *at(1.0, random.Random(seed))).token for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    likeliest = {model.step([5], None, *at(2.0, random.Random(seed), top_k=2)).token for seed in range(50)}
    assert len(likeliest) == 2


def test_probabilities_are_the_models(folder) -> None:
    output = load(folder).step([5, 6, 7], None, *greedy(logprobs=3, prompt_logprobs=0))
    assert [one.rank for one in output.logprobs] == [1, 2, 3]
    assert output.logprobs[0].token == output.token
    everything = load(folder).step([5, 6, 7], None, *greedy(logprobs=VOCABULARY)).logprobs
    assert sum(math.exp(one.logprob) for one in everything) == pytest.approx(1)
    assert [[one.token for one in entry] for entry in output.prompt_logprobs] == [[6], [7]]
    chosen = load(folder).step([5, 6, 7], None, *greedy(logprobs=0, logprob_token_ids=[9, 8])).logprobs
    assert [one.token for one in chosen] == [output.token, 9, 8]


def test_padding_of_the_models_vocabulary_is_never_chosen(folder) -> None:
    model, rng = load(folder, vocabulary=10), random.Random(0)
    assert all(model.step([5], None, *at(5.0, rng)).token < 10 for _ in range(100))


def test_a_model_that_is_not_the_tokenizers_is_refused(folder) -> None:
    with pytest.raises(GeneratorError, match="the model has 100 tokens, the tokenizer 50257"):
        load(folder, vocabulary=50257)


def test_a_missing_model_is_named(tmp_path) -> None:
    with pytest.raises(GeneratorError, match="cannot be loaded"):
        load(tmp_path)
