"""Random numbers that depend on who draws, never on when or beside whom."""

from __future__ import annotations

from hashlib import blake2b


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) with which one sequence draws the token at one position.

    A hash of the three counters instead of a generator with state: a sequence that is preempted, resumed or
    moved to another micro-batch draws what it would have drawn anyway, on every platform.

    Args:
        seed: the request's seed, from -2**127 to 2**127 - 1.
        index: which of the request's n sequences.
        position: number of tokens the sequence has generated before.
    """
    key = (
        seed.to_bytes(16, "little", signed=True)
        + index.to_bytes(8, "little")
        + position.to_bytes(8, "little")
    )
    bits = int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53  # 53 bits are what a double holds: every result is exact and below 1


def stable_seed(seed: int, request_id: str) -> int:
    """A request's seed when it names none: the same in every process that runs it under the engine's seed."""
    digest = blake2b(f"{seed}/{request_id}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
