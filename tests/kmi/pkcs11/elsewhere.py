"""A stranger's program on the same token: python-pkcs11 called straight, nothing of the proxy.

It reads calls as JSON from its standard input and prints their results; bytes are hexadecimal. Run
as a program of its own: a process can load one module once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pkcs11
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, ObjectClass


class Stranger:
    def __init__(self, module: str, token: str, pin: str) -> None:
        library = pkcs11.lib(module)
        (found,) = (t for t in library.get_tokens() if t.label == token)
        self.session = found.open(user_pin=pin, rw=True)

    def find(self, label: str, key_id: str | None = None) -> Any:
        template: dict[Attribute, Any] = {Attribute.LABEL: label}
        if key_id is not None:
            template[Attribute.ID] = bytes.fromhex(key_id)
        (found,) = self.session.get_objects(template)
        return found

    def create(
        self, label: str, key_id: str, value: str, kind: str = "AES", **attributes: bool
    ) -> None:
        """Import a key: usable, sensitive, not extractable, but for what is said otherwise."""
        flags = {
            "SENSITIVE": True, "EXTRACTABLE": False, "ENCRYPT": True, "DECRYPT": True, **attributes,
        }  # fmt: skip
        self.session.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType[kind],
                Attribute.VALUE: bytes.fromhex(value),
                Attribute.LABEL: label,
                Attribute.ID: bytes.fromhex(key_id),
                Attribute.TOKEN: True,
                **{Attribute[name]: flag for name, flag in flags.items()},
            }
        )

    def destroy(self, label: str) -> None:
        for found in list(self.session.get_objects({Attribute.LABEL: label})):
            found.destroy()

    def attribute(self, label: str, name: str) -> Any:
        try:
            value = self.find(label)[Attribute[name]]
        except pkcs11.PKCS11Error as error:
            return type(error).__name__
        return value.hex() if isinstance(value, bytes) else value

    def encrypt(
        self, label: str, key_id: str | None, mechanism: str, data: str, **param: str
    ) -> str:
        key = self.find(label, key_id)
        done: bytes = key.encrypt(bytes.fromhex(data), **_mechanism(mechanism, **param))
        return done.hex()

    def decrypt(
        self, label: str, key_id: str | None, mechanism: str, data: str, **param: str
    ) -> str:
        key = self.find(label, key_id)
        done: bytes = key.decrypt(bytes.fromhex(data), **_mechanism(mechanism, **param))
        return done.hex()


def _mechanism(name: str, iv: str = "", aad: str = "") -> dict[str, Any]:
    param: Any = bytes.fromhex(iv) or None
    if name == "AES_GCM":
        param = GCMParams(bytes.fromhex(iv), bytes.fromhex(aad) or None, 128)
    return {"mechanism": Mechanism[name], "mechanism_param": param}


def main() -> None:
    asked = json.load(sys.stdin)
    stranger = Stranger(asked["module"], asked["token"], asked["pin"])
    results = [getattr(stranger, name)(**arguments) for name, arguments in asked["calls"]]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
