"""What is done so that an engine has the wanted adapters: the reconciler, the file, and the keeper that drives both.

Not covered: the engines' own checks (tests/worker/test_adapters.py) and how the agent asks vLLM (tests/worker/agent).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.backoff import Backoff
from worker.lora.keeper import AdapterKeeper, AdapterRefusedError
from worker.lora.reconciler import AdapterReconciler, Load, Unload
from worker.lora.wanted import WantedAdaptersError, read_wanted


class Engine:
    """An engine that lists what it has loaded, and refuses the adapters from `broken` sources."""

    def __init__(self, loaded: Mapping[str, str] | None = None) -> None:
        self.loaded = dict(loaded or {})
        self.broken: set[str] = set()
        self.asked: list[str] = []

    async def load_adapter(self, name: str, source: str, *, replace: bool) -> None:
        self.asked.append(f"{'replace' if replace else 'load'} {name} {source}")
        if source in self.broken:
            raise AdapterRefusedError(f"No adapter found for {source}")
        if name in self.loaded and not replace:
            raise AdapterRefusedError("already loaded")
        self.loaded[name] = source

    async def unload_adapter(self, name: str) -> None:
        self.asked.append(f"unload {name}")
        if name in self.broken:
            raise AdapterRefusedError("cannot be unloaded")
        del self.loaded[name]


class World:
    """A keeper, its engine, its file and its clock."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.engine = engine
        self.file = folder / "adapters.json"
        self.now = 0.0
        self.told: list[tuple[tuple[str, ...], dict[str, str]]] = []
        self.keeper = AdapterKeeper(
            self.file, engine, lambda names, missing: self.told.append((names, dict(missing))), lambda: self.now
        )

    def want(self, **sources: str) -> None:
        self.file.write_text(json.dumps([{"name": name, "source": source} for name, source in sources.items()]))

    async def look(self, seconds: float = 1.0) -> list[str]:
        """One look at the engine and what follows from it; what the engine was asked."""
        self.now += seconds
        self.engine.asked.clear()
        self.keeper.observe(dict(self.engine.loaded))
        await self.keeper.act()
        self.keeper.observe(dict(self.engine.loaded))
        return list(self.engine.asked)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, Engine())


async def test_what_is_wanted_is_loaded_once_and_reported(world: World) -> None:
    world.want(sql="acme/sql", law="acme/law")
    assert await world.look() == ["load sql acme/sql", "load law acme/law"]
    assert await world.look() == []
    assert world.told[-1] == (("sql", "law"), {})


async def test_a_changed_list_changes_the_engine_without_a_gap(world: World) -> None:
    world.want(sql="acme/sql", law="acme/law")
    await world.look()
    world.want(sql="acme/sql-2", poems="acme/poems")
    assert await world.look() == ["unload law", "replace sql acme/sql-2", "load poems acme/poems"]
    assert world.engine.loaded == {"sql": "acme/sql-2", "poems": "acme/poems"}


async def test_an_engine_that_restarted_gets_its_adapters_again(world: World) -> None:
    world.want(sql="acme/sql")
    await world.look()
    world.engine.loaded.clear()
    assert await world.look() == ["load sql acme/sql"]
    assert [names for names, _ in world.told] == [(), ("sql",), (), ("sql",)]
    assert world.told[2][1] == {"sql": ""}


async def test_a_refused_adapter_is_tried_again_less_and_less_often_and_the_reason_is_told(world: World) -> None:
    world.engine.broken = {"acme/none"}
    world.want(none="acme/none", sql="acme/sql")
    tries = [index for index in range(32) if "load none acme/none" in await world.look()]
    assert tries == [0, 2, 6, 14, 30]
    assert world.told[-1] == (("sql",), {"none": "No adapter found for acme/none"})
    assert world.keeper.failures == len(tries)
    world.engine.broken.clear()
    await world.look(60)
    assert world.told[-1] == (("sql", "none"), {})


async def test_an_adapter_that_cannot_be_unloaded_is_left_for_a_minute(world: World) -> None:
    world.engine.loaded, world.engine.broken = {"old": "acme/old"}, {"old"}
    world.want()
    assert [await world.look() for _ in range(3)] == [["unload old"], [], []]
    assert await world.look(60) == ["unload old"]


async def test_a_file_that_cannot_be_read_leaves_the_last_list_wanted(world: World) -> None:
    world.want(sql="acme/sql")
    await world.look()
    world.file.write_text("[")
    world.engine.loaded.clear()
    assert await world.look() == ["load sql acme/sql"]


async def test_without_a_file_nothing_is_changed(tmp_path: Path) -> None:
    engine, told = Engine({"sql": "acme/sql"}), []
    keeper = AdapterKeeper(None, engine, lambda names, missing: told.append(names), lambda: 0.0)
    keeper.observe(engine.loaded)
    await keeper.act()
    assert (told, engine.asked) == ([("sql",)], [])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param(None, "cannot be read: No such file", id="missing"),
        pytest.param("{", "is not JSON", id="no JSON"),
        pytest.param("{}", "must hold a JSON array", id="an object"),
        pytest.param('[{"name": "a"}]', "an adapter is an object with name and source", id="no source"),
        pytest.param('[{"name": "", "source": "x"}]', "an adapter is an object", id="an empty name"),
        pytest.param('["a"]', "an adapter is an object", id="a string"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path: Path, text: str | None, complaint: str) -> None:
    file = tmp_path / "adapters.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(WantedAdaptersError, match=complaint):
        read_wanted(file)


names, sources = st.sampled_from("abc"), st.sampled_from("xy")
lists = st.dictionaries(names, sources, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(lists, st.none() | lists), max_size=6))
def test_whatever_happened_the_engine_ends_with_what_is_wanted(steps: list[tuple[dict[str, str], dict | None]]) -> None:
    """Each step is a list, and what someone else made of the engine."""
    reconciler, loaded, wanted = AdapterReconciler(Backoff(1.0, 1.0)), {}, {}
    for now, (wanted, meddled) in enumerate(steps):
        loaded = dict(meddled) if meddled is not None else loaded
        reconciler.want(wanted)
        reconciler.observe(dict(loaded), float(now))
        for action in tuple(reconciler.actions()):
            match action:
                case Load(name, source, replace):
                    assert replace == (name in loaded)
                    loaded[name] = source
                case Unload(name):
                    del loaded[name]
    assert loaded == wanted
    reconciler.observe(loaded, float(len(steps)))
    assert (tuple(reconciler.actions()), reconciler.missing()) == ((), {})
