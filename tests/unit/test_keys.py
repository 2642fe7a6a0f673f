"""Keys and the ring of master keys."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.fernet import Fernet

from orchestrator.errors import ConfigurationError
from orchestrator.keys import KeyRing, fingerprint, new_engine_key, new_platform_key, sha256_hex

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()


def test_keys_have_their_prefix_and_never_repeat() -> None:
    assert new_engine_key().startswith("sk-sept-")
    assert new_platform_key().startswith("pk-sept-")
    assert len(new_platform_key()) >= 42
    assert len({new_engine_key() for _ in range(100)}) == 100


def test_hash_is_sha256_hex() -> None:
    assert sha256_hex("a") == hashlib.sha256(b"a").hexdigest()


def test_the_first_master_key_encrypts_and_each_decrypts() -> None:
    before = KeyRing([OLD])
    stored, key_id = before.encrypt("sk-sept-x")
    rotated = KeyRing([NEW, OLD])
    assert rotated.decrypt(stored, key_id) == "sk-sept-x"
    _, new_id = rotated.encrypt("sk-sept-y")
    assert new_id != key_id
    rotated.require({key_id, new_id})


def test_a_lost_master_key_is_named_by_its_id_only() -> None:
    stored, key_id = KeyRing([OLD]).encrypt("sk-sept-x")
    ring = KeyRing([NEW])
    with pytest.raises(ConfigurationError, match=key_id):
        ring.require({key_id})
    with pytest.raises(ConfigurationError) as caught:
        ring.decrypt(stored, key_id)
    assert "sk-sept" not in str(caught.value)
    assert OLD not in str(caught.value)


def test_a_ciphertext_that_was_tampered_with_is_refused() -> None:
    ring = KeyRing([OLD])
    stored, key_id = ring.encrypt("sk-sept-x")
    with pytest.raises(ConfigurationError):
        ring.decrypt(stored[:-4] + "AAAA", key_id)


def test_fingerprints_are_keyed() -> None:
    assert fingerprint(OLD, "text") == fingerprint(OLD, "text")
    assert fingerprint(OLD, "text") != fingerprint(NEW, "text")
    assert fingerprint(OLD, "text") != fingerprint(OLD, "other")
