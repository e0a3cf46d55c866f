"""The names that a server is called by: a page of another site may have its own name lead to this machine."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

from moe_lightning.errors import ConfigError

_LOCAL = ("localhost", "*.localhost")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    return address == "localhost" or (_is_address(address) and ip_address(address).is_loopback)


def allowed_names(address: str, given: Sequence[str]) -> tuple[str, ...] | None:
    """The names in a Host header that are answered; None for any.

    A server on loopback is asked by programs on its machine, among them browsers with pages from anywhere: it has
    the names of this machine and those that were given. Others have any name, unless some were given.
    """
    if "*" in given or (not given and not is_loopback(address)):
        return None
    return (*_LOCAL, *given)


def is_allowed(host: str, names: Sequence[str]) -> bool:
    """Whether a Host header has one of the names, or `*.name` for those under it; the port does not matter.

    Addresses in numbers always pass: nobody can make them lead elsewhere. So does none, which no browser sends.
    """
    name = _without_port(host).lower().removesuffix(".")
    return not name or _is_address(name) or any(_matches(name, pattern) for pattern in names)


def parse_hosts(text: str) -> tuple[str, ...]:
    """Names from a text with commas.

    Raises:
        ConfigError: one is none.
    """
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    for name in names:
        if name != "*" and ("*" in name.removeprefix("*.") or any(c in name for c in "/:[] ")):
            raise ConfigError(
                f"{name!r} is no name of a host; give such as llm.example.com, *.example.com or *"
            )
    return names


def _matches(name: str, pattern: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
