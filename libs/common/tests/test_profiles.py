"""Documents of config profiles: what they hold, which of several counts, what is refused."""

from __future__ import annotations

import pytest

from penstock.common.followed_file import MAX_FILE_BYTES
from penstock.common.profiles import (
    ModelProfiles,
    ProfileError,
    merged,
    read_document,
    read_file,
)


def document(**fields: object) -> ModelProfiles:
    return read_document(fields)


def test_each_profile_comes_whole_from_the_first_that_has_it() -> None:
    first = document(profiles={"a": {"routing_strategy": "random"}})
    second = document(
        default="a",
        locked_routing_strategy="throughput",
        profiles={"a": {"routing_strategy": "throughput", "locked": True}, "b": {"locked": True}},
    )
    both = merged([first, second])
    assert both.default == "a"
    assert both.locked_routing_strategy == "throughput"
    assert both.profiles == {"a": first.profiles["a"], "b": second.profiles["b"]}


def test_an_empty_lock_unlocks_what_another_source_locked() -> None:
    locked = document(locked_routing_strategy="random")
    assert merged([document(locked_routing_strategy=""), locked]).locked_routing_strategy == ""


@pytest.mark.parametrize(
    ("profiles", "default", "asked", "name"),
    [
        (("default", "x"), None, "", "default"),
        (("x",), "x", "", "x"),
        (("x",), "x", "default", "x"),
        (("default", "x"), "x", "default", "default"),
        (("x",), None, "", "default"),
        (("x",), None, "y", "y"),
    ],
)
def test_the_name_behind_what_is_asked_for(
    profiles: tuple[str, ...], default: str | None, asked: str, name: str
) -> None:
    assert document(profiles={one: {} for one in profiles}, default=default).named(asked) == name


def test_a_file_names_models() -> None:
    read = read_file(b'"*": {default: a}\nm/7b: {profiles: {a: {imbalance_ratio: 0.5}}}\n')
    assert read["*"].default == "a"
    assert read["m/7b"].profiles["a"].imbalance_ratio == 0.5
    assert read_file(b"# nothing yet\n") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[a]", "a mapping of models, holds a list"),
        (b"m: [", "no YAML"),
        (b"\xff", "no YAML"),
        (b"[" * 20_000, "no YAML"),
        (b"#" * (MAX_FILE_BYTES + 1), "over 1048576 bytes"),
        (b"1: {}", "'1': a model's name"),
        (b"m: 3", "m: document"),
        (b"m: {profile: {}}", "m: profile: Extra inputs are not permitted"),
        (
            b"m: {profiles: {a: {imbalance_ratio: 101}}}",
            r"imbalance_ratio: .* less than or equal to 100, got 101",
        ),
        (b"m: {profiles: {a: {imbalance_ratio: .nan}}}", "imbalance_ratio: .* finite"),
        (
            b"m: {profiles: {a: {requests_per_second: -1}}}",
            "requests_per_second: .* greater than or equal to 0",
        ),
        (b"m: {profiles: {auto: {}}}", "give the profile another name"),
        (b"m: {profiles: {'a b': {}}}", "a b.*: String should match"),
        (
            b"m: {profiles: {a: {prompt_buckets: [{min_tokens: 9, max_tokens: 5}]}}}",
            "9 is above max_tokens 5",
        ),
    ],
)
def test_what_cannot_be_used_is_said_with_field_value_and_range(text: bytes, says: str) -> None:
    with pytest.raises(ProfileError, match=says):
        read_file(text)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(ProfileError) as raised:
        read_file(b"m: {default: 3}\nn: {profiles: 4}\n")
    assert len(str(raised.value).splitlines()) == 2
