"""The names that a server answers to."""

from __future__ import annotations

import pytest
from live import serving

from moe_lightning.errors import ConfigError
from moe_lightning.server.app import Settings
from moe_lightning.server.hosts import allowed_names, is_allowed, is_loopback, parse_hosts

LOCAL = allowed_names("127.0.0.1", ())


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_server_on_loopback_has_this_machines_names_and_those_given(address):
    assert is_loopback(address)
    names = allowed_names(address, ("llm.example.com", "*.lan"))
    for host in (
        "localhost",
        "LOCALHOST:30000",
        "localhost.:1",
        "a.localhost",
        "llm.example.com:80",
        "b.lan",
    ):
        assert is_allowed(host, names), host
    for host in ("example.com", "evil.llm.example.com", "localhost.evil.com", "127.0.0.1.evil.com:30000", "lan",
                 "evillan", "x[::1]", "localhost@evil.com", " "):  # fmt: skip
        assert not is_allowed(host, names), host


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:30000", "[::1]", "[::1]:30000", "192.168.3.4:1", ""]
)
def test_addresses_in_numbers_lead_nowhere_else_and_pass(host):
    assert LOCAL is not None
    assert is_allowed(host, LOCAL)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.3.4"])
def test_other_servers_have_any_name_unless_some_are_given(address):
    assert not is_loopback(address)
    assert allowed_names(address, ()) is None
    names = allowed_names(address, ("llm.example.com",))
    assert is_allowed("llm.example.com", names)
    assert not is_allowed("other.example.com", names)


def test_any_name_can_be_asked_for():
    assert allowed_names("127.0.0.1", ("a", "*")) is None
    assert parse_hosts(" a.example.com, *.B.lan,*") == ("a.example.com", "*.b.lan", "*")


@pytest.mark.parametrize("text", ["http://a", "a:80", "a.*.b", "*a", "[::1]", "a b"])
def test_what_is_no_name_is_refused(text):
    with pytest.raises(ConfigError, match="no name of a host"):
        parse_hosts(text)


def test_a_page_whose_name_leads_here_gets_nothing(alone):
    with serving(alone, Settings(hosts=LOCAL)) as server:
        for path in ("/", "/health", "/v1/models", "/metrics", "/nothing"):
            status, _, body = server.send("GET", path, headers={"Host": "evil.example.com"})
            assert (status, b"--allowed-hosts" in body, b"evil.example.com" in body) == (421, True, True)
        status, _, _ = server.send("GET", "/v1/models", headers={"Host": f"localhost:{server.port}"})
        assert status == 200
        assert server.send("GET", "/v1/models")[0] == 200
