# SPDX-License-Identifier: MIT
"""Rank 0 while the group forms."""

from __future__ import annotations

import hmac
import secrets
import selectors
from typing import TYPE_CHECKING

from mscclpp_ep import _rendezvous_wire as wire
from mscclpp_ep._core import Error, Timeout
from mscclpp_ep._rendezvous_star import out_of_step, send_to, tell_status
from mscclpp_ep._rendezvous_wire import Connection, Deadline, Frame, name_ranks

if TYPE_CHECKING:
    import socket

    from mscclpp_ep._rendezvous import Place

_TICK_SECONDS = 0.25


class Lobby:
    """Takes the ranks in, and turns strangers away without waiting for any of them."""

    def __init__(self, place: Place, listener: socket.socket, deadline: Deadline) -> None:
        self._place = place
        self._listener = listener
        self._deadline = deadline
        self._guests: dict[Connection, tuple[bytes, Deadline]] = {}
        self._peers: dict[int, Connection] = {}
        self._turned_away = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> Lobby:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        for guest in list(self._guests):
            self._drop(guest)
        if kind is not None:
            for peer in self._peers.values():
                peer.close()
        self._selector.close()

    def gather_peers(self) -> dict[int, Connection]:
        """Return the connections of ranks 1 to size - 1, all of which know that all are there."""
        try:
            status = Deadline(self._deadline.seconds / 4)
            while missing := set(range(1, self._place.size)) - self._peers.keys():
                if self._deadline.expired():
                    raise self._timeout(missing)
                if status.expired():
                    status = Deadline(self._deadline.seconds / 4)
                    tell_status(self._peers.values(), 0, missing)
                self._serve_once()
            for rank, peer in self._peers.items():
                send_to(rank, peer, Frame(wire.WELCOME, 0, b""), self._deadline)
        except Error as error:
            for peer in self._peers.values():
                peer.report(error, 0)
            raise
        return self._peers

    def _timeout(self, missing: set[int]) -> Timeout:
        msg = (
            f"{name_ranks(missing)} of {self._place.size} did not come to rank 0 at "
            f"{self._place.host}:{self._listener.getsockname()[1]} within "
            f"{self._deadline.seconds:g} s"
        )
        if self._turned_away:
            msg += (
                f"; {self._turned_away} connections were turned away that spoke another language "
                "or held another token (MSCCLPP_EP_TOKEN, job id, WORLD_SIZE or port differ)"
            )
        return Timeout(msg)

    def _serve_once(self) -> None:
        ready = {key.fileobj for key, _ in self._selector.select(self._patience())}
        for rank, peer in list(self._peers.items()):
            if peer in ready:
                self._hear_peer(rank, peer)
        for guest, (nonce, patience) in list(self._guests.items()):
            if guest in ready:
                self._hear_guest(guest, nonce)
            elif patience.expired():
                self._turn_away(guest)
        if self._listener in ready:
            self._accept()

    def _patience(self) -> float:
        return min(self._deadline.left(), _TICK_SECONDS)

    def _accept(self) -> None:
        try:
            guest = Connection(self._listener.accept()[0])
        except OSError:
            return
        while len(self._guests) >= 4 * self._place.size + 64:
            self._turn_away(next(iter(self._guests)))
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        self._guests[guest] = nonce, Deadline(min(wire.HANDSHAKE_SECONDS, self._deadline.left()))
        self._selector.register(guest, selectors.EVENT_READ)
        try:
            guest.send(wire.CHALLENGE.pack(wire.MAGIC, nonce), Deadline(0.1))
        except OSError:
            self._turn_away(guest)

    def _turn_away(self, guest: Connection) -> None:
        self._turned_away += 1
        self._drop(guest)

    def _drop(self, guest: Connection) -> None:
        del self._guests[guest]
        self._selector.unregister(guest)
        guest.close()

    def _hear_peer(self, rank: int, peer: Connection) -> None:
        """A rank that waits says nothing, unless it gave up; one that left may come again."""
        try:
            frame = peer.read_frame()
        except OSError:
            del self._peers[rank]
            self._selector.unregister(peer)
            peer.close()
            return
        if frame is not None:
            raise frame.error() or out_of_step(rank, frame, 0)

    def _hear_guest(self, guest: Connection, nonce: bytes) -> None:
        try:
            hello = guest.read(wire.HELLO.size)
        except OSError:
            self._turn_away(guest)
            return
        if hello is None:
            return
        magic, client_nonce, rank, size, proof = wire.HELLO.unpack(hello)
        signed = (nonce, client_nonce, wire.numbers(rank, size))
        if magic != wire.MAGIC or not hmac.compare_digest(
            proof, wire.sign(self._place.key, b"client", *signed)
        ):
            self._turn_away(guest)
            return
        refusal = self._refusal(rank, size)
        self._answer(guest, rank, signed, refusal)

    def _refusal(self, rank: int, size: int) -> str:
        if size != self._place.size:
            return f"WORLD_SIZE is {size} here and {self._place.size} on rank 0; all must agree"
        if rank == 0 or rank in self._peers:
            return f"RANK is {rank}, and another process already is rank {rank}; give each its own"
        return "" if rank < size else f"RANK is {rank}; allowed are 0 to {size - 1}"

    def _answer(
        self, guest: Connection, rank: int, signed: tuple[bytes, ...], refusal: str
    ) -> None:
        text = refusal.encode()
        verdict = wire.REFUSED if refusal else wire.JOINED
        proof = wire.sign(self._place.key, b"server", *signed, bytes([verdict]), text)
        try:
            guest.send(wire.VERDICT.pack(verdict, len(text), proof) + text, Deadline(0.1))
        except OSError:
            self._turn_away(guest)
            return
        if refusal:
            self._turn_away(guest)
        else:
            del self._guests[guest]
            self._peers[rank] = guest
