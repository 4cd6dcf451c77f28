# SPDX-License-Identifier: MIT
"""Names of devices, and streams of any framework, without a GPU."""

from __future__ import annotations

import pytest

import mscclpp_ep as ep
from mscclpp_ep import _core
from mscclpp_ep._devices import CommStream, device_name, gpu_of, stream_handle


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.delenv("MSCCLPP_EP_DEVICE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(_core, "cuda_device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.delenv("MSCCLPP_EP_DEVICE", raising=False)
    monkeypatch.setattr(_core, "cuda_device_count", lambda: 0)


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:11"])
def test_a_whole_name_stays(device):
    assert device_name(device) == device


def test_the_default_is_the_gpu_of_the_local_rank(two_gpus, monkeypatch):
    assert device_name(None) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_name(None) == device_name("cuda") == "cuda:1"


def test_the_default_without_a_gpu_is_the_cpu(no_gpu):
    assert device_name(None) == "cpu"


def test_the_environment_chooses(two_gpus, monkeypatch):
    monkeypatch.setenv("MSCCLPP_EP_DEVICE", "cpu")
    assert device_name(None) == "cpu"
    assert device_name("cuda:1") == "cuda:1"
    monkeypatch.setenv("MSCCLPP_EP_DEVICE", "gpu")
    with pytest.raises(ep.InvalidArgument, match="MSCCLPP_EP_DEVICE is 'gpu'"):
        device_name(None)


@pytest.mark.parametrize("device", ["cuda:", "cuda:-1", "cuda:x", "gpu", "", 3])
def test_a_name_of_nothing_is_refused(device):
    with pytest.raises(ep.InvalidArgument, match="it must be"):
        device_name(device)


def test_the_number_of_a_gpu():
    assert (gpu_of("cpu"), gpu_of("cuda:7")) == (0, 7)


class OfTorch:
    cuda_stream = 17


class OfCupy:
    ptr = 18


class OfOldProtocol:
    __cuda_stream__ = (0, 19)


@pytest.mark.parametrize(
    ("stream", "handle"),
    [(0, 0), (5, 5), (OfTorch(), 17), (OfCupy(), 18), (OfOldProtocol(), 19), (CommStream(20), 20)],
)
def test_streams_of_any_framework(stream, handle):
    assert stream_handle(stream) == handle


@pytest.mark.parametrize("stream", [True, -1, 1 << 64, 1.5, "0", object()])
def test_what_is_no_stream_is_refused(stream):
    with pytest.raises(ep.InvalidArgument, match="stream is"):
        stream_handle(stream)


def test_a_gpu_that_is_not_there_is_refused():
    (group,) = ep.Group.local(1)
    with pytest.raises((ep.NotBuilt, ep.InvalidArgument), match=r"GPU|CUDA"):
        ep.Buffer(group, device="cuda:9999")
