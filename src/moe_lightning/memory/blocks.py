"""Which KV blocks belong to whom."""

from __future__ import annotations


class BlockAllocator:
    """Hands out KV blocks by number; a block has one owner until it is freed."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # low numbers first: they stay in touched memory
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks; the caller has checked that there are as many."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._is_free[block] = 0
        return taken

    def free(self, blocks: list[int]) -> None:
        """Give blocks back."""
        for block in reversed(blocks):
            assert not self._is_free[block], f"block {block} freed twice"
            self._is_free[block] = 1
            self._free.append(block)


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // block_size)
