"""The replay window of several processes: one table in shared memory.

A nonce is kept as its keyed 64-bit hash with the second at which it expires, in one of 64 places of
the bucket that the hash names. A bucket is looked at and changed under a lock that the kernel takes
back from a process that dies. A bucket without a free place admits nothing. There are twice as many
places as nonces to be remembered: with the table half full one nonce in ten million finds no place.

Layout: 16 bytes of key, then for each bucket 64 hashes of 8 bytes, then for each 64 times of 4.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os

from xkiproxy.keystores.replay import DEFAULT_CAPACITY, window_is_full

_PLACES = 64
_KEY_SIZE = 16
_HASH_SIZE = 8
_BUCKET_SIZE = _PLACES * _HASH_SIZE
_LOCKS = 1024


def make_replay_table(capacity: int = DEFAULT_CAPACITY) -> int:
    """An anonymous file with an empty table for so many nonces (24 bytes each).

    Returns its descriptor, for `SharedReplayWindow`. Raises OSError.
    """
    buckets = -(-2 * capacity // _PLACES)
    descriptor = os.memfd_create("xkiproxy-replay", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, _KEY_SIZE + buckets * _PLACES * (_HASH_SIZE + 4))
        os.pwrite(descriptor, os.urandom(_KEY_SIZE), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class SharedReplayWindow:
    """See `xkiproxy.keystores.replay.ReplayWindow`; all key stores of all processes share it."""

    def __init__(self, descriptor: int, keystore: str) -> None:
        """`descriptor` is that of a table; it stays open as long as the window is used."""
        size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, size)
        self._buckets = (size - _KEY_SIZE) // (_PLACES * (_HASH_SIZE + 4))
        self._key = self._map[:_KEY_SIZE]
        self._scope = keystore.encode()
        start = _KEY_SIZE + self._buckets * _BUCKET_SIZE
        self._times = memoryview(self._map)[start:].cast("I")

    def admit(self, access_key_id: str, nonce: str, expires: float, now: float) -> bool:
        """See `Replay.admit`."""
        text = b"%b\0%b\0%b" % (self._scope, access_key_id.encode(), nonce.encode())
        mark = hashlib.blake2b(text, digest_size=_HASH_SIZE, key=self._key).digest()
        bucket = int.from_bytes(mark, "little") % self._buckets
        lock = bucket % _LOCKS
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, lock)
        try:
            return self._admit(bucket, mark, int(expires) + 1, int(now))
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, lock)

    def _admit(self, bucket: int, mark: bytes, expires: int, now: int) -> bool:
        first = bucket * _PLACES
        times = self._times[first : first + _PLACES].tolist()
        start = _KEY_SIZE + bucket * _BUCKET_SIZE
        for place in self._places_of(mark, start):
            if times[place] >= now:
                return False
        oldest = min(times)
        if oldest >= now:
            raise window_is_full()
        place = times.index(oldest)
        # The time comes last: a process that dies in between leaves a place that is still free.
        self._map[start + place * _HASH_SIZE : start + (place + 1) * _HASH_SIZE] = mark
        self._times[first + place] = expires
        return True

    def _places_of(self, mark: bytes, start: int) -> list[int]:
        """Where a hash stands in a bucket; nearly always nowhere."""
        found = []
        at = self._map.find(mark, start, start + _BUCKET_SIZE)
        while at >= 0:
            if (at - start) % _HASH_SIZE == 0:
                found.append((at - start) // _HASH_SIZE)
            at = self._map.find(mark, at + 1, start + _BUCKET_SIZE)
        return found
