"""The smallest number that will do, where "will do" is known only by trying, and need not be monotone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

NEIGHBOURS = 2
"""So many numbers above the one that is found must do, too."""


def smallest(try_out: Callable[[Sequence[int]], Sequence[bool]], most: int, at_a_time: int = 1) -> int | None:
    """The smallest number of 1..`most` that will do; None: none that was tried will. `try_out` is asked about each
    number once at most, about up to `at_a_time` numbers together (and some more when neighbours are tried).

    A number counts only if its next `NEIGHBOURS` numbers (as far as `most`) will do as well: with one more worker,
    caches are divided in another way, and a workload that is just met by 5 may be missed by 6. The search doubles until
    a number will do, bisects between that and the last one that will not, and moves on upwards as long as a
    neighbour fails. So every number that is smaller by up to `NEIGHBOURS` was tried, and does not count; an island of
    numbers that will do, between two powers of two that will not, may be missed.
    """
    known: dict[int, bool] = {}

    def ask(numbers: Iterable[int]) -> None:
        new = [number for number in dict.fromkeys(numbers) if 1 <= number <= most and number not in known]
        if new:
            known.update(zip(new, try_out(new), strict=True))

    powers = []
    number = 1
    while number < most:
        powers.append(number)
        number *= 2
    powers.append(most)
    for first in range(0, len(powers), at_a_time):
        ask(powers[first : first + at_a_time])
        if any(known[power] for power in powers[: first + at_a_time]):
            break
    met = [power for power in powers if known.get(power)]
    if not met:
        return None
    high = met[0]
    low = max((power for power in powers if power < high), default=0)
    while high - low > 1:
        parts = min(at_a_time, high - low - 1)
        ask(low + (high - low) * part // (parts + 1) for part in range(1, parts + 1))
        tried = sorted(number for number in known if low < number < high)
        high = next((number for number in tried if known[number]), high)
        low = max((number for number in known if low <= number < high and not known[number]), default=low)
    while high <= most:
        ask(range(high - NEIGHBOURS, high + NEIGHBOURS + 1))
        failing = [number for number in range(high, min(high + NEIGHBOURS, most) + 1) if not known[number]]
        if not failing:
            return high
        high = failing[-1] + 1
    return None
