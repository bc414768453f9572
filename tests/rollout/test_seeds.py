"""Sampling keys are pure functions with no collisions in practice."""

from rollout.seeds import (
    FIRST_DEMONSTRATION_SEED,
    FIRST_PREFERENCE_SEED,
    SEEDS_PER_RUN,
    demonstration_seed,
    generator,
    mistakes_generator,
    preference_seed,
    session_key,
    splitmix64,
    token_key,
)


def test_splitmix64_matches_the_published_sequence() -> None:
    # First outputs of the reference generator seeded with 1234567: state advances by the golden gamma.
    gamma = 0x9E3779B97F4A7C15
    outputs = [splitmix64((1234567 + i * gamma) % 2**64) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_every_part_of_the_key_matters() -> None:
    base = token_key(session_key(1, "a/train/0", 0), 3, 20)
    assert base != token_key(session_key(2, "a/train/0", 0), 3, 20)
    assert base != token_key(session_key(1, "a/train/1", 0), 3, 20)
    assert base != token_key(session_key(1, "a/train/0", 1), 3, 20)
    assert base != token_key(session_key(1, "a/train/0", 0), 4, 20)
    assert base != token_key(session_key(1, "a/train/0", 0), 3, 21)
    assert base != token_key(session_key(1, "a/train/0", 0), 3, 20, stream=1)


def test_keys_are_signed_64_bit_and_distinct() -> None:
    key = session_key(0, "timespeak/train/0", 0)
    keys = {token_key(key, position // 5, position) for position in range(20_000)}
    assert len(keys) == 20_000
    assert all(-(2**63) <= k < 2**63 for k in keys)


def test_scenarios_of_one_use_are_not_those_of_another() -> None:
    runs, scenarios = range(0, 100, 9), (0, 1, SEEDS_PER_RUN - 1)
    demonstrations = {demonstration_seed(run, i) for run in runs for i in scenarios}
    preferences = {preference_seed(run, i) for run in runs for i in scenarios}
    assert len(demonstrations) == len(preferences) == len(runs) * len(scenarios)
    assert min(demonstrations) == FIRST_DEMONSTRATION_SEED and min(preferences) == FIRST_PREFERENCE_SEED
    assert not demonstrations & preferences and max(demonstrations) < FIRST_PREFERENCE_SEED
    assert demonstration_seed(0, SEEDS_PER_RUN) in {demonstration_seed(1, 0)}  # the control: one scenario too many


def test_generators_are_told_apart_by_their_names() -> None:
    first = generator("noise", "train", 1).integers(1 << 62)
    assert first == generator("noise", "train", 1).integers(1 << 62)
    assert first != generator("noise", "train", 2).integers(1 << 62)
    assert (
        mistakes_generator(0, 1).integers(1 << 62)
        == mistakes_generator(0, 1).integers(1 << 62)
        != mistakes_generator(1, 0).integers(1 << 62)
    )
