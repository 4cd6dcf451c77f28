# SPDX-License-Identifier: MIT
"""What the variables of the launcher mean."""

from __future__ import annotations

import pytest

from mscclpp_ep import Group, InvalidArgument
from mscclpp_ep import _rendezvous as rendezvous


@pytest.mark.parametrize(
    ("host", "several", "address"),
    [
        ("127.0.0.1", False, "127.0.0.1"),
        ("127.0.0.1", True, "127.0.0.1"),
        ("localhost", True, "127.0.0.1"),
        ("192.0.2.1", False, ""),
        ("::1", False, "::1"),
        ("2001:db8::1", False, "::"),
    ],
)
def test_listens_on_loopback_for_a_local_address(host: str, several: bool, address: str) -> None:
    place = rendezvous.Place(0, 2, host, [1], b"", several)
    assert rendezvous._bind_address(place)[1] == address


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": None}, "RANK is not set; give an integer of at least 0"),
        ({"RANK": "x"}, "RANK is 'x'; allowed is 0 to 1"),
        ({"RANK": "-1"}, "RANK is -1; allowed is 0 to 1"),
        ({"RANK": "2"}, "RANK is 2; allowed is 0 to 1"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0; allowed is an integer of at least 1"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set; give the host of rank 0"),
        ({"MASTER_ADDR": "no such host.invalid"}, "MASTER_ADDR is 'no such host.invalid'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536; allowed is 1 to 65535"),
        ({"MSCCLPP_EP_PORT": "0"}, "MSCCLPP_EP_PORT is 0; allowed is 1 to 65535"),
        ({"MSCCLPP_EP_TOKEN": " "}, "MSCCLPP_EP_TOKEN is empty; give a secret"),
    ],
)
def test_variables_are_checked(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], words: str
) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name in ("MSCCLPP_EP_PORT", "MSCCLPP_EP_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (given | change).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument) as caught:
        Group.from_env(timeout=1)
    assert words in str(caught.value)


def test_jobs_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*rendezvous._JOB_ID_VARIABLES, "MSCCLPP_EP_PORT", "MSCCLPP_EP_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    keys = []
    changes = [("MASTER_PORT", "29500"), ("MASTER_PORT", "29501"), ("SLURM_JOB_ID", "7")]
    for name, value in [*changes, ("TORCHELASTIC_RUN_ID", "run"), ("MSCCLPP_EP_TOKEN", "secret")]:
        monkeypatch.setenv(name, value)
        keys += [rendezvous.place_from_env(0, size).key for size in (2, 3)]
        assert rendezvous.place_from_env(1, 2).key == keys[-2]
    assert keys[-1] == keys[-2]
    assert len(set(keys)) == len(keys) - 1


@pytest.mark.parametrize(("port", "first", "last"), [(29500, 29501, 29508), (65530, 65529, 65522)])
def test_ports_are_near_the_launchers(
    monkeypatch: pytest.MonkeyPatch, port: int, first: int, last: int
) -> None:
    monkeypatch.delenv("MSCCLPP_EP_PORT", raising=False)
    monkeypatch.setenv("MASTER_PORT", str(port))
    ports = rendezvous._env_ports()
    assert (ports[0], ports[-1], len(ports)) == (first, last, 8)
