"""Symbolic values of buffers: what was computed, not its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

Symbol = int  # index into `Symbols`; equal symbols are equal values


@dataclass(frozen=True)
class Symbols:
    """Terms such as ``pre_attention L0 mb1(embed mb1)``, each stored once, so that comparing them is cheap.

    Without sharing, the term of a token after n layers would have a size exponential in n.
    """

    _terms: list[tuple[str, tuple[Symbol, ...]]] = field(default_factory=list)
    _index: dict[tuple[str, tuple[Symbol, ...]], Symbol] = field(default_factory=dict)

    def term(self, head: str, *args: Symbol) -> Symbol:
        """The symbol of a function applied to symbols."""
        key = (head, args)
        if key not in self._index:
            self._index[key] = len(self._terms)
            self._terms.append(key)
        return self._index[key]

    def show(self, symbol: Symbol, depth: int = 1) -> str:
        """The term as text, what lies deeper than `depth` as ``..``."""
        head, args = self._terms[symbol]
        if not args:
            return head
        inner = ", ".join(self.show(arg, depth - 1) for arg in args) if depth > 0 else ".."
        return f"{head}({inner})"

    def first_difference(self, expected: Symbol, found: Symbol) -> tuple[Symbol, Symbol]:
        """The innermost subterms, leftmost first, where two terms stop being the same."""
        while True:
            (head, args), (other_head, other_args) = self._terms[expected], self._terms[found]
            if head != other_head or len(args) != len(other_args):
                return expected, found
            pairs = [(a, b) for a, b in zip(args, other_args, strict=True) if a != b]
            if not pairs:
                return expected, found
            expected, found = pairs[0]
