from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import StaleGeneration
from engine.keys import KeyRecord, Keyring, RetiredKey, effective, rotated
from tests.unit.engine.engine_fakes import Clock, sha256

A, B, C, D = (sha256(name) for name in "abcd")
NOW = 1_000_000.0


def keyring(record: KeyRecord, wall: Clock | None = None, monotonic: Clock | None = None) -> Keyring:
    return Keyring(record, wall=wall or Clock(NOW), monotonic=monotonic or Clock(50.0))


def accepted(ring: Keyring) -> str:
    return "".join(name for name in "abcd" if ring.accepts(name.encode()))


class TestEffective:
    """Which of the environment and the stored record holds after a start."""

    OLDER = RetiredKey(A, 1, NOW + 100, 300)
    STORED = KeyRecord(B, 2, (OLDER,))

    def test_no_record(self) -> None:
        assert effective(A, 1, None) == KeyRecord(A, 1)

    def test_higher_generation_in_the_record_wins(self) -> None:
        assert effective(A, 1, self.STORED) == self.STORED

    def test_tie_goes_to_the_environment_and_overlaps_are_kept(self) -> None:
        assert effective(C, 2, self.STORED) == KeyRecord(C, 2, (self.OLDER,))

    def test_higher_generation_in_the_environment_drops_the_records_key_but_no_promised_overlap(self) -> None:
        assert accepted(keyring(effective(C, 3, self.STORED))) == "ac"

    def test_environment_key_is_not_also_a_retired_one(self) -> None:
        assert effective(A, 3, self.STORED) == KeyRecord(A, 3)


class TestRotated:
    def test_lower_generation_is_stale_and_says_which_is_in_force(self) -> None:
        with pytest.raises(StaleGeneration) as caught:
            rotated(KeyRecord(B, 5), A, 4, 0, NOW)
        assert caught.value.details == {"generation": 5}

    def test_same_generation_same_key_changes_nothing(self) -> None:
        record = KeyRecord(B, 5, (RetiredKey(A, 4, NOW + 1, 10),))
        assert rotated(record, B, 5, 999, NOW) is record

    def test_same_generation_other_key_is_refused(self) -> None:
        with pytest.raises(StaleGeneration) as caught:
            rotated(KeyRecord(B, 5), C, 5, 0, NOW)
        assert caught.value.details == {"generation": 5}

    def test_overlap_keeps_the_old_key_until_its_end(self) -> None:
        assert rotated(KeyRecord(A, 1), B, 2, 300, NOW) == KeyRecord(B, 2, (RetiredKey(A, 1, NOW + 300, 300),))

    def test_no_overlap_forgets_the_old_key(self) -> None:
        assert rotated(KeyRecord(A, 1), B, 2, 0, NOW) == KeyRecord(B, 2)

    def test_no_overlap_drops_the_old_key_but_not_overlaps_promised_before(self) -> None:
        first = rotated(KeyRecord(A, 1), B, 2, 300, NOW)
        assert accepted(keyring(rotated(first, C, 3, 0, NOW + 1), Clock(NOW + 1))) == "ac"

    def test_ended_overlaps_are_forgotten(self) -> None:
        first = rotated(KeyRecord(A, 1), B, 2, 10, NOW)
        assert [key.key_hash for key in rotated(first, C, 3, 10, NOW + 10).retired] == [B]

    def test_going_back_to_an_older_key_makes_it_the_key_in_force(self) -> None:
        first = rotated(KeyRecord(A, 1), B, 2, 300, NOW)
        again = rotated(first, A, 3, 300, NOW)
        assert (again.key_hash, [key.key_hash for key in again.retired]) == (A, [B])


class TestKeyring:
    def test_only_the_right_key_is_accepted(self) -> None:
        ring = keyring(KeyRecord(A, 1))
        assert accepted(ring) == "a"
        assert not ring.accepts(b"")
        assert not ring.accepts(A.encode())
        assert not ring.accepts(b"a ")

    def test_every_key_within_its_overlap_is_accepted_and_refused_at_its_end(self) -> None:
        wall, monotonic = Clock(NOW), Clock(50.0)
        ring = keyring(KeyRecord(A, 1), wall, monotonic)
        ring.adopt(ring.rotated(B, 2, 100))
        ring.adopt(ring.rotated(C, 3, 200))
        ring.adopt(ring.rotated(D, 4, 300))
        assert accepted(ring) == "abcd"
        seen = []
        for second in (99, 100, 199, 200, 299, 300):
            wall.now, monotonic.now = NOW + second, 50.0 + second
            seen.append(accepted(ring))
        assert seen == ["abcd", "bcd", "bcd", "cd", "cd", "d"]

    def test_rotation_changes_nothing_until_it_is_adopted(self) -> None:
        ring = keyring(KeyRecord(A, 1))
        ring.rotated(B, 2, 0)
        assert accepted(ring) == "a"

    def test_wall_clock_set_back_neither_prolongs_nor_revives(self) -> None:
        wall, monotonic = Clock(NOW), Clock(50.0)
        ring = keyring(KeyRecord(A, 1), wall, monotonic)
        ring.adopt(ring.rotated(B, 2, 100))
        wall.now, monotonic.now = NOW - 86_400, 150.0
        assert accepted(ring) == "b"
        ring.adopt(ring.rotated(C, 3, 100))
        assert accepted(ring) == "bc"

    def test_after_a_restart_with_the_clock_set_back_an_overlap_lasts_its_own_length_at_most(self) -> None:
        record = rotated(KeyRecord(A, 1), B, 2, 100, NOW)
        monotonic = Clock(0.0)
        ring = keyring(record, Clock(NOW - 86_400), monotonic)
        monotonic.now = 99.0
        assert accepted(ring) == "ab"
        monotonic.now = 100.0
        assert accepted(ring) == "b"

    def test_overlap_goes_on_over_a_restart(self) -> None:
        record = rotated(KeyRecord(A, 1), B, 2, 100, NOW)
        assert accepted(keyring(record, Clock(NOW + 99))) == "ab"
        assert accepted(keyring(record, Clock(NOW + 100))) == "b"

    def test_reprs_hold_no_hash(self) -> None:
        record = rotated(KeyRecord(A, 1), B, 2, 100, NOW)
        assert A not in repr(record)
        assert B not in repr(record)


@given(
    steps=st.lists(st.tuples(st.integers(0, 8), st.sampled_from([A, B, C, D]), st.integers(0, 50)), max_size=12),
    pause=st.integers(0, 30),
)
def test_generation_never_falls_and_the_newest_key_is_always_valid(
    steps: list[tuple[int, str, int]], pause: int
) -> None:
    wall, monotonic = Clock(NOW), Clock(0.0)
    ring = keyring(KeyRecord(A, 1), wall, monotonic)
    for generation, key_hash, overlap in steps:
        before = ring.record
        try:
            ring.adopt(ring.rotated(key_hash, generation, overlap))
        except StaleGeneration:
            assert ring.record is before
        assert ring.record.generation >= before.generation
        assert ring.record.key_hash not in {key.key_hash for key in ring.record.retired}
        names = {sha256(name): name for name in "abcd"}
        assert names[ring.record.key_hash] in accepted(ring)
        wall.now += pause
        monotonic.now += pause
