"""The lane of the software KMI: keys in memory, operations in microseconds.

GCM is NIST SP 800-38D (AES) and RFC 8998 (SM4), CBC and ECB are NIST SP 800-38A, PKCS #7 padding is
RFC 5652 section 6.3. Whatever is wrong with a ciphertext gives the same failure. CBC and ECB do not
authenticate: there an altered ciphertext may decrypt to something else, and whether its padding was
right cannot be hidden. GCM is the default for that reason.
"""

from __future__ import annotations

from os import urandom

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES, SM4
from cryptography.hazmat.primitives.padding import PKCS7

from xkiproxy.crypto.algorithms import (
    ALGORITHMS,
    BLOCK_SIZE,
    IV_SIZES,
    TAG_SIZE,
    Algorithm,
    KeySpec,
    Padding,
)
from xkiproxy.crypto.envelope import authenticated_data, version_unknown
from xkiproxy.crypto.operations import (
    CiphertextFormat,
    Decrypt,
    Decrypted,
    Describe,
    Encrypt,
    Encrypted,
    Fault,
    KeyDescription,
    Operation,
    OperationError,
    Random,
    RandomBytes,
    Result,
    invalid_ciphertext,
)
from xkiproxy.kmi.base import KeyInfo, KeyManagerError
from xkiproxy.kmi.software.keyring import Keyring, MasterKeyChanged, UnwrappedKey

_ENVELOPE = CiphertextFormat.ENVELOPE
_GCM_IV_SIZE = IV_SIZES[Algorithm.AES_GCM]
_PKCS7 = PKCS7(BLOCK_SIZE * 8)


class _Sm4Gcm:
    """SM4-GCM in the shape of cryptography's AESGCM, which has no SM4."""

    __slots__ = ("_key",)

    def __init__(self, material: bytes) -> None:
        self._key = SM4(material)

    def encrypt(self, nonce: bytes, data: bytes, aad: bytes) -> bytes:
        encryptor = Cipher(self._key, modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(aad)
        return encryptor.update(data) + encryptor.finalize() + encryptor.tag

    def decrypt(self, nonce: bytes, data: bytes, aad: bytes) -> bytes:
        decryptor = Cipher(self._key, modes.GCM(nonce, data[-TAG_SIZE:])).decryptor()
        decryptor.authenticate_additional_data(aad)
        # The plaintext leaves only after finalize has verified the tag.
        return decryptor.update(data[:-TAG_SIZE]) + decryptor.finalize()


class _Version:
    """One version of a key, ready to use. No repr, so that none can show the material."""

    __slots__ = ("block", "gcm")

    def __init__(self, spec: KeySpec, material: bytes) -> None:
        self.gcm: AESGCM | _Sm4Gcm
        if spec is KeySpec.SM4:
            self.gcm = _Sm4Gcm(material)
            self.block: AES | SM4 = SM4(material)
        else:
            self.gcm = AESGCM(material)
            self.block = AES(material)


class _Key:
    """A key, ready to use."""

    __slots__ = ("algorithms", "default", "info", "newest", "newest_gcm", "spec", "versions")

    def __init__(self, key: UnwrappedKey) -> None:
        self.info: KeyInfo = key.info
        self.spec = key.spec
        self.algorithms = ALGORITHMS[key.spec]
        self.default = self.algorithms[0]
        self.versions = {n: _Version(key.spec, m) for n, m in key.materials.items()}
        self.newest = key.info.version
        self.newest_gcm = self.versions[self.newest].gcm


class SoftwareLane:
    """Executes operations with the keys of a keyring; see `xkiproxy.kmi.base.InlineLane`."""

    def __init__(self, keyring: Keyring) -> None:
        """Load every key. The lane owns the keyring from here on, and closes it.

        Raises:
            OperationError: `UNAVAILABLE`, if the keyring cannot be read.
        """
        self._keyring = keyring
        self._keys: dict[str, _Key] = {}
        self._unusable: frozenset[str] = frozenset()
        self._generation: tuple[int, int] | None = None
        self.warning = ""
        self.refresh()

    def execute(self, operation: Operation) -> Result:
        """Execute one operation, whose parameters `check_parameters` has accepted.

        Raises:
            OperationError: `INVALID_CIPHERTEXT`, `UNSUPPORTED`, `KEY_NOT_FOUND`, `KEY_UNUSABLE`, or
                `UNAVAILABLE` if a key had to be looked for in a file that cannot be read.
        """
        kind = type(operation)
        if kind is Encrypt:
            return self._encrypt(operation)  # type: ignore[arg-type]
        if kind is Decrypt:
            return self._decrypt(operation)  # type: ignore[arg-type]
        if kind is Random:
            return RandomBytes(urandom(operation.length))  # type: ignore[union-attr]
        return self._describe(operation)  # type: ignore[arg-type]

    def probe(self) -> None:
        """Read the file and try the ciphers; raises OperationError (`UNAVAILABLE`)."""
        try:
            self._keyring.check_master_key()
        except MasterKeyChanged as error:
            self._go_on(error)
        except KeyManagerError as error:
            raise OperationError(Fault.UNAVAILABLE, str(error)) from None
        cipher, nonce, text = AESGCM(urandom(32)), urandom(_GCM_IV_SIZE), urandom(BLOCK_SIZE)
        if cipher.decrypt(nonce, cipher.encrypt(nonce, text, None), None) != text:
            raise OperationError(Fault.UNAVAILABLE, "AES-GCM does not decrypt what it encrypted.")

    def refresh(self) -> None:
        """Take over what other processes changed; raises OperationError (`UNAVAILABLE`).

        From a keyring that has come under another master key nothing can be taken over any more:
        then the keys stay as they were, and `warning` says so.
        """
        try:
            generation = self._keyring.generation()
            if generation == self._generation:
                return
            keys = self._keyring.unwrap_all()
        except MasterKeyChanged as error:
            self._go_on(error)
            self._generation = generation
            return
        except KeyManagerError as error:
            raise OperationError(Fault.UNAVAILABLE, str(error)) from None
        self.warning = ""
        self._keys = {key.info.key_id: _Key(key) for key in keys if not key.info.problem}
        self._unusable = frozenset(key.info.key_id for key in keys if key.info.problem)
        self._generation = generation

    def close(self) -> None:
        """Forget the keys and close the keyring."""
        self._keys = {}
        self._keyring.close()

    def _encrypt(self, operation: Encrypt) -> Encrypted:
        key = self._keys.get(operation.key_id) or self._find(operation.key_id)
        algorithm = operation.algorithm or key.default
        version = key.newest
        if algorithm is not key.default:
            return _encrypt_blocks(operation, key, algorithm)
        if operation.format is _ENVELOPE:
            aad = authenticated_data(operation.aad, version)
        else:
            _check_single_version(key)
            aad = operation.aad
        iv = operation.iv
        if iv is None:
            iv = urandom(_GCM_IV_SIZE)
        ciphertext = key.newest_gcm.encrypt(iv, operation.plaintext, aad)
        return Encrypted(ciphertext, iv, version, algorithm, None)

    def _decrypt(self, operation: Decrypt) -> Decrypted:
        key = self._keys.get(operation.key_id) or self._find(operation.key_id)
        algorithm = operation.algorithm or key.default
        if algorithm not in key.algorithms:
            raise _unsupported(key, algorithm)
        version, number = self._version(key, operation)
        try:
            if algorithm is not key.default:
                return _decrypt_blocks(operation, version, number, algorithm)
            if operation.format is _ENVELOPE:
                aad = authenticated_data(operation.aad, number)
            else:
                aad = operation.aad
            plaintext = version.gcm.decrypt(operation.iv, operation.ciphertext, aad)
        except (InvalidTag, ValueError):
            # ValueError is wrong padding, or a size that check_parameters would have refused.
            raise invalid_ciphertext() from None
        return Decrypted(plaintext, number, algorithm, None)

    def _describe(self, operation: Describe) -> KeyDescription:
        key = self._keys.get(operation.key_id) or self._find(operation.key_id)
        info = key.info
        return KeyDescription(info.key_id, key.spec, info.usage, info.version, info.created)

    def _go_on(self, error: MasterKeyChanged) -> None:
        self.warning = f"serves its keys as they were before a rewrap, restart the server: {error}"

    def _refuse_unseen(self) -> None:
        """What is not in memory may be in the keyring: without its master key nobody can say no."""
        if self.warning:
            raise OperationError(Fault.UNAVAILABLE, self.warning)

    def _find(self, key_id: str) -> _Key:
        """A key that is not in memory as it should be: another process may have changed it."""
        self.refresh()
        key = self._keys.get(key_id)
        if key is not None:
            return key
        if key_id in self._unusable:
            raise OperationError(Fault.KEY_UNUSABLE, "The key's material cannot be used.")
        self._refuse_unseen()
        raise OperationError(Fault.KEY_NOT_FOUND, "There is no such key.")

    def _version(self, key: _Key, operation: Decrypt) -> tuple[_Version, int]:
        number = operation.version
        if number is None or operation.format is CiphertextFormat.RAW:
            _check_single_version(key)
        if number is None:
            return key.versions[key.newest], key.newest
        version = key.versions.get(number)
        if version is None:
            # Another process may just have rotated the key.
            version = self._find(operation.key_id).versions.get(number)
            if version is None:
                self._refuse_unseen()
                raise invalid_ciphertext()
        return version, number


def _encrypt_blocks(operation: Encrypt, key: _Key, algorithm: Algorithm) -> Encrypted:
    """Encrypt under CBC or ECB."""
    if algorithm not in key.algorithms:
        raise _unsupported(key, algorithm)
    if operation.format is CiphertextFormat.RAW:
        _check_single_version(key)
    padding = operation.padding or Padding.PKCS7
    iv = urandom(IV_SIZES[algorithm]) if operation.iv is None else operation.iv
    data = operation.plaintext
    if padding is Padding.PKCS7:
        padder = _PKCS7.padder()
        data = padder.update(data) + padder.finalize()
    encryptor = Cipher(key.versions[key.newest].block, _block_mode(algorithm, iv)).encryptor()
    ciphertext = encryptor.update(data) + encryptor.finalize()
    return Encrypted(ciphertext, iv, key.newest, algorithm, padding)


def _decrypt_blocks(
    operation: Decrypt, version: _Version, number: int, algorithm: Algorithm
) -> Decrypted:
    """Decrypt under CBC or ECB; raises ValueError for wrong padding."""
    padding = operation.padding or Padding.PKCS7
    decryptor = Cipher(version.block, _block_mode(algorithm, operation.iv)).decryptor()
    data = decryptor.update(operation.ciphertext) + decryptor.finalize()
    if padding is Padding.PKCS7:
        unpadder = _PKCS7.unpadder()
        data = unpadder.update(data) + unpadder.finalize()
    return Decrypted(data, number, algorithm, padding)


def _block_mode(algorithm: Algorithm, iv: bytes) -> modes.CBC | modes.ECB:
    # ECB hides no pattern; it is here because the cloud's API has it, and never by default.
    return modes.CBC(iv) if algorithm is Algorithm.AES_CBC else modes.ECB()  # noqa: S305


def _check_single_version(key: _Key) -> None:
    if len(key.versions) != 1:
        raise version_unknown()


def _unsupported(key: _Key, algorithm: Algorithm) -> OperationError:
    known = ", ".join(key.algorithms)
    return OperationError(
        Fault.UNSUPPORTED, f"A key of spec {key.spec} does {known}, not {algorithm}."
    )
