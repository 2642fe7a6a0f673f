"""Keys: made, hashed, and kept in ciphertext. Nothing here logs, and no error contains a key."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from functools import lru_cache

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from orchestrator.errors import ConfigurationError

__all__ = ["KeyRing", "fingerprint", "new_engine_key", "new_platform_key", "sha256_hex"]


def new_engine_key() -> str:
    return "sk-sept-" + secrets.token_urlsafe(32)


def new_platform_key() -> str:
    return "pk-sept-" + secrets.token_urlsafe(32)


def sha256_hex(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def fingerprint(master_key: str, text: str) -> str:
    """A keyed digest: equal texts can be told without keeping them."""
    return hmac.new(master_key.encode(), text.encode(), hashlib.sha256).hexdigest()


class KeyRing:
    """Encrypts with the first master key; decrypts with whichever one a key was stored under."""

    def __init__(self, master_keys: list[str]) -> None:
        self._by_id = {_key_id(key): MultiFernet([Fernet(key)]) for key in master_keys}
        self.master_keys = master_keys
        self.current_id = _key_id(master_keys[0])
        # A key read on every admit is decrypted once; the cache is bounded and lives in this process only.
        self._decrypt = lru_cache(maxsize=10_000)(self._decrypt_uncached)

    def encrypt(self, key: str) -> tuple[str, str]:
        """`(ciphertext, id of the master key)`."""
        return self._by_id[self.current_id].encrypt(key.encode()).decode(), self.current_id

    def decrypt(self, ciphertext: str, master_key_id: str) -> str:
        """Raises `ConfigurationError` when the master key is not in `ORCH_MASTER_KEY`."""
        return self._decrypt(ciphertext, master_key_id)

    def _decrypt_uncached(self, ciphertext: str, master_key_id: str) -> str:
        try:
            return self._by_id[master_key_id].decrypt(ciphertext).decode()
        except (KeyError, InvalidToken):
            raise ConfigurationError(f"ORCH_MASTER_KEY lacks the key with id {master_key_id}.") from None

    def rewrap(self, ciphertext: str, master_key_id: str) -> str:
        """The same key under the current master key. Raises `ConfigurationError`."""
        return self.encrypt(self._decrypt_uncached(ciphertext, master_key_id))[0]

    def require(self, master_key_ids: set[str]) -> None:
        """Raises `ConfigurationError` when a stored key could not be read."""
        missing = sorted(master_key_ids - set(self._by_id))
        if missing:
            raise ConfigurationError(
                f"ORCH_MASTER_KEY: engine keys are stored under master key {', '.join(missing)}, which is not in the "
                "list; add it after the current one."
            )


def _key_id(master_key: str) -> str:
    return sha256_hex("orchestrator.master-key-id." + master_key)[:8]
