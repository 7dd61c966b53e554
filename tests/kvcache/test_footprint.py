"""What a process pays for the shared vocabulary, which every worker and router loads.

Covers: the libraries that it must not import, and its memory on Linux. Not covered: the processes themselves
(tests/deploy/test_image.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["transformers", "torch", "numpy", "fastapi", "aiohttp", "httpx", "huggingface_hub"]

SCRIPT = """
import json, sys
import kvcache.errors, kvcache.feed, runtime.logs, kvcache.profiles, kvcache.prompts, kvcache.tokens.tokenizer
tokenizer = kvcache.tokens.tokenizer.load_tokenizer("gpt2")
assert tokenizer.encode("Hello world") == [15496, 995]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([sorted(sys.modules), int(status["VmHWM"].split()[0]) / 1024]))
"""


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
def test_the_default_tokenizer_loads_without_heavy_libraries_and_within_80_megabytes() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    modules, peak = json.loads(answer.stdout)
    assert not set(HEAVY) & set(modules)
    assert peak < 80
