"""C_Encrypt and C_Decrypt, called straight.

python-pkcs11 asks every encryption and decryption for the size of its result first, by a call of
its own, and believes the answer. That is a second round trip to some HSMs, and wrong with others
(NSS forgets the tag of GCM). The size is known here, so these four functions are called through
ctypes, with buffers that are used again; all the rest is python-pkcs11's. Names and numbers are
those of PKCS#11 v2.40.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char, c_ulong, c_void_p
from typing import Any

CKM_AES_ECB = 0x1081
CKM_AES_CBC = 0x1082
CKM_AES_GCM = 0x1087

CKR_BUFFER_TOO_SMALL = 0x150

_TAG_BITS = 128
_MAX_IV = 16
_SLACK = 64
"""Bytes of room beyond the input: a tag, an IV that an HSM adds, a block."""

# Where the functions stand in CK_FUNCTION_LIST, after its version.
_ENCRYPT_INIT, _ENCRYPT, _DECRYPT_INIT, _DECRYPT = 29, 30, 33, 34

_Init = ctypes.CFUNCTYPE(c_ulong, c_ulong, c_void_p, c_ulong)
_Run = ctypes.CFUNCTYPE(
    c_ulong, c_ulong, ctypes.c_char_p, c_ulong, c_void_p, POINTER(c_ulong)
)  # fmt: skip


class ModuleError(Exception):
    """A function of the module returned something else than CKR_OK."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        return f"CKR 0x{self.code:X}"


class _Mechanism(ctypes.Structure):
    _fields_ = (
        ("mechanism", c_ulong),
        ("pParameter", c_void_p),
        ("ulParameterLen", c_ulong),
    )


class _GcmParams(ctypes.Structure):
    _fields_ = (
        ("pIv", c_void_p),
        ("ulIvLen", c_ulong),
        ("ulIvBits", c_ulong),
        ("pAAD", ctypes.c_char_p),
        ("ulAADLen", c_ulong),
        ("ulTagBits", c_ulong),
    )


class Cryptoki:
    """The four functions of a loaded module, for one session."""

    def __init__(self, module: str, session: int) -> None:
        """`module` is loaded and initialized already; `session` is a handle. Raises OSError."""
        functions = _function_list(module)
        self._encrypt = _Init(functions[_ENCRYPT_INIT]), _Run(functions[_ENCRYPT])
        self._decrypt = _Init(functions[_DECRYPT_INIT]), _Run(functions[_DECRYPT])
        self._session = session
        self._mechanism = _Mechanism()
        self._gcm = _GcmParams()
        self._iv = (c_char * _MAX_IV)()
        self._length = c_ulong()
        self._room = 0
        self._grow(8192)

    def encrypt(
        self, key: int, mechanism: int, iv: bytes, data: bytes, aad: bytes | None
    ) -> tuple[bytes, bytes]:
        """(ciphertext, IV); with an `aad`, even an empty one, the mechanism is a GCM mode.

        The IV is what the module left of the one that it was given: some HSMs write their own.
        Raises ModuleError.
        """
        self._set(mechanism, iv, aad)
        return self._run(self._encrypt, key, data), self._iv.raw[: len(iv)]

    def decrypt(self, key: int, mechanism: int, iv: bytes, data: bytes, aad: bytes | None) -> bytes:
        """The plaintext; `data` ends with its tag under a GCM mode. Raises ModuleError."""
        self._set(mechanism, iv, aad)
        return self._run(self._decrypt, key, data)

    def _set(self, mechanism: int, iv: bytes, aad: bytes | None) -> None:
        self._iv.raw = iv.ljust(_MAX_IV, b"\0")
        self._mechanism.mechanism = mechanism
        if aad is None:
            self._mechanism.pParameter = ctypes.addressof(self._iv) if iv else None
            self._mechanism.ulParameterLen = len(iv)
            return
        gcm = self._gcm
        gcm.pIv = ctypes.addressof(self._iv)
        gcm.ulIvLen = len(iv)
        gcm.ulIvBits = len(iv) * 8
        gcm.pAAD = aad or None
        gcm.ulAADLen = len(aad)
        gcm.ulTagBits = _TAG_BITS
        self._mechanism.pParameter = ctypes.addressof(gcm)
        self._mechanism.ulParameterLen = ctypes.sizeof(gcm)

    def _run(self, functions: tuple[Any, Any], key: int, data: bytes) -> bytes:
        init, run = functions
        code = init(self._session, byref(self._mechanism), key)
        if code:
            raise ModuleError(code)
        if len(data) + _SLACK > self._room:
            self._grow(len(data) + _SLACK)
        length = self._length
        length.value = self._room
        code = run(self._session, data, len(data), self._out, byref(length))
        if code == CKR_BUFFER_TOO_SMALL:
            # The operation is still active; it has said how much it wants.
            self._grow(max(length.value, 2 * self._room))
            length.value = self._room
            code = run(self._session, data, len(data), self._out, byref(length))
        if code:
            raise ModuleError(code)
        return ctypes.string_at(self._out, length.value)

    def _grow(self, size: int) -> None:
        self._room = size
        self._out = (c_char * size)()


def _function_list(module: str) -> list[int]:
    """The addresses of the functions, in the order of CK_FUNCTION_LIST."""
    library = ctypes.CDLL(module)
    pointer = c_void_p()
    code = library.C_GetFunctionList(byref(pointer))
    if code or not pointer.value:
        raise OSError(f"C_GetFunctionList failed (0x{code:X})")
    # CK_VERSION is two bytes, padded to the alignment of a pointer.
    start = pointer.value + ctypes.sizeof(c_void_p)
    return list((ctypes.c_size_t * (_DECRYPT + 1)).from_address(start))
