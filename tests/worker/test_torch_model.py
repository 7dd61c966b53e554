"""A causal language model of transformers, tiny and untrained. Needs torch: `pip install 'kvcluster[gpt2]'`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from worker.generators import GeneratorError

torch = pytest.importorskip("torch")

VOCABULARY = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=32, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    path = tmp_path_factory.mktemp("model")
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def load(folder: Path, vocabulary: int = VOCABULARY) -> Any:
    from worker.generators.torch_model import TorchModel

    return TorchModel(str(folder), vocabulary)


def test_tokens_made_one_at_a_time_are_those_of_the_whole_text(folder) -> None:
    model, chance = load(folder), random.Random(0)
    text, unseen, past = [1, 2, 3], [1, 2, 3], None
    for _ in range(10):
        token, past = model.step(unseen, past, 0.0, chance, None)
        assert token == model.step(text, None, 0.0, chance, None)[0]
        text.append(token)
        unseen = [token]
    assert model.window == 64


def test_a_banned_token_is_never_chosen(folder) -> None:
    model, chance = load(folder), random.Random(0)
    first, _ = model.step([5, 6], None, 0.0, chance, None)
    assert model.step([5, 6], None, 0.0, chance, first)[0] != first
    assert all(model.step([5, 6], None, 1.0, chance, 7)[0] != 7 for _ in range(300))


def test_the_chance_decides(folder) -> None:
    model = load(folder)
    drawn = [model.step([5], None, 1.0, random.Random(seed), None)[0] for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_padding_of_the_models_vocabulary_is_never_chosen(folder) -> None:
    model, chance = load(folder, vocabulary=10), random.Random(0)
    assert all(model.step([5], None, 5.0, chance, None)[0] < 10 for _ in range(100))


def test_a_model_that_is_not_the_tokenizers_is_refused(folder) -> None:
    with pytest.raises(GeneratorError, match="the model has 100 tokens, the tokenizer 50257"):
        load(folder, vocabulary=50257)


def test_a_model_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(GeneratorError, match="cannot be loaded"):
        load(tmp_path)
