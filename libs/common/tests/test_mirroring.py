"""The mirror's configuration: the fields that users know, and what is said of wrong ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.common.live_config import Document
from penstock.common.mirroring import BadMirrorConfig, MirrorConfig, of_document, parse_mirror

SEED = """
{
  "Enable": true,
  "Target": "http://mirror-target:8000",
  "Ratio": 10,
  "Timeout": 5000,
  "Authorization": "",
  "EnableLog": true
}
"""


def test_the_example_of_the_reference_is_a_configuration() -> None:
    config = parse_mirror(json.loads(SEED))
    assert (config.Enable, config.Target, config.Ratio) == (True, "http://mirror-target:8000", 10)
    assert (config.Timeout, config.Authorization, config.EnableLog) == (5000, "", True)
    assert config.active


@pytest.mark.parametrize(
    "fields",
    [{}, {"Enable": False}, {"Target": ""}, {"Ratio": 0}, {"Enable": False, "Target": "", "Ratio": 0}],
)
def test_nothing_is_copied_without_a_switch_a_target_and_a_ratio(fields: dict[str, Any]) -> None:
    assert parse_mirror(json.loads(SEED) | fields).active is (fields == {})
    assert not parse_mirror(fields).active


def test_names_are_taken_in_any_case_and_a_path_may_follow() -> None:
    config = parse_mirror({"enable": True, "TARGET": "https://[::1]:8443/deep/er/", "ratio": 0.5})
    assert (config.Enable, config.Target, config.Ratio) == (True, "https://[::1]:8443/deep/er", 0.5)


def test_no_document_copies_nothing() -> None:
    assert of_document(None) == MirrorConfig()
    assert of_document(Document({"Enable": True, "Target": "http://a", "Ratio": 1}, 1)).active


TARGET = "Target: must be http://HOST:PORT or https://HOST:PORT, a path may follow, got "


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        ([], ["must be a JSON object, is an array"]),
        (None, ["must be a JSON object, is null"]),
        ("x", ["must be a JSON object, is a string"]),
        ({"Ratio": 101}, ["Ratio: Input should be less than or equal to 100, got '101'"]),
        ({"Ratio": -0.1}, ["Ratio: Input should be greater than or equal to 0, got '-0.1'"]),
        ({"Ratio": "10"}, ["Ratio: Input should be a valid number, got '10'"]),
        ({"Ratio": float("nan")}, ["Ratio: Input should be a finite number, got 'nan'"]),
        ({"Ratio": True}, ["Ratio: Input should be a valid number, got 'True'"]),
        ({"Enable": "true"}, ["Enable: Input should be a valid boolean, got 'true'"]),
        ({"Enable": 1}, ["Enable: Input should be a valid boolean, got '1'"]),
        ({"Timeout": -1}, ["Timeout: Input should be greater than or equal to 0, got '-1'"]),
        (
            {"Timeout": 86_400_001},
            ["Timeout: Input should be less than or equal to 86400000, got '86400001'"],
        ),
        ({"Target": "mirror-target:8000"}, [f"{TARGET}'mirror-target:8000'"]),
        ({"Target": "ftp://a"}, [f"{TARGET}'ftp://a'"]),
        ({"Target": "http://"}, [f"{TARGET}'http://'"]),
        ({"Target": "http://a:99999"}, [f"{TARGET}'http://a:99999'"]),
        ({"Target": "http://a b"}, [f"{TARGET}'http://a b'"]),
        ({"Target": "http://a\r\nx: y"}, [f"{TARGET}'http://a\\r\\nx: y'"]),
        (
            {"Target": "http://u:p@a"},
            ["Target: must not hold a user; give Authorization, got 'http://u:p@a'"],
        ),
        ({"Target": "http://a/?q"}, ["Target: must end with its path: no ? and no #, got 'http://a/?q'"]),
        ({"Authorization": "Bearer a\r\nx: y"}, ["Authorization: must be what a header can hold"]),
        ({"Authorization": ["secret"]}, ["Authorization: Input should be a valid string"]),
        ({"Headers": {"a b": "c"}}, ["Headers: 'a b' is not the name of a header, got \"{'a b': 'c'}\""]),
        ({"Models": "m"}, ["Models: Input should be a valid list, got 'm'"]),
        ({"enable": True, "Enable": False}, ["Enable: given twice"]),
        (
            {"Ratoi": 5, "EnableLog": 2},
            [
                "EnableLog: Input should be a valid boolean, got '2'",
                "Ratoi: unknown field; there are Enable, Target, Ratio, Timeout, Authorization, EnableLog, "
                "Models, Headers, RewriteModel, Compare",
            ],
        ),
    ],
)
def test_everything_that_is_wrong_is_named(value: Any, faults: list[str]) -> None:
    with pytest.raises(BadMirrorConfig) as refused:
        parse_mirror(value)
    assert refused.value.faults == faults


def test_the_secret_is_shown_to_nobody() -> None:
    assert "secret" not in repr(parse_mirror({"Authorization": "secret"}))
    with pytest.raises(BadMirrorConfig) as refused:
        parse_mirror({"Authorization": "secret\n", "Ratio": 1000})
    assert "secret" not in str(refused.value)
