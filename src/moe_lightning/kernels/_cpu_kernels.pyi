from collections.abc import Sequence

def available_isas() -> list[str]: ...

class Cpu:
    def __init__(self, num_threads: int, cpus: Sequence[int], isa: str, /) -> None: ...
    def run(
        self,
        dtype: int,
        out: tuple[int, int],
        q: tuple[int, int],
        k: tuple[int, int],
        v: tuple[int, int],
        cache: tuple[int, int, int],
        tables: tuple[int, int, int],
        lengths: tuple[int, int, int],
        geometry: tuple[int, int, int, int, int],
        options: tuple[float, float, int, int],
        /,
    ) -> None: ...
    def experts(
        self,
        dtype: int,
        out: tuple[int, int],
        x: tuple[int, int],
        routes: tuple[int, int, int, int],
        pages: tuple[list[int], int],
        sizes: tuple[int, int],
        /,
    ) -> None: ...
    def read(self, address: int, num_bytes: int, /) -> int: ...
    @property
    def experts_bytes(self) -> int: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
