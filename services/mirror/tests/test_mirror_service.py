"""The mirror's settings, and when it says that it is ready."""

import pytest

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.settings import SettingsError, load
from penstock.mirror.service import Mirror
from penstock.mirror.settings import MirrorSettings


def test_the_mirror_has_its_own_admin_port_and_a_name() -> None:
    settings = load(MirrorSettings, ["--mirror-id", "m1"], prog="penstock mirror", environ={})
    assert (settings.admin_port, settings.mirror_id) == (8084, "m1")


def test_a_name_that_is_too_long_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="--mirror-id"):
        load(MirrorSettings, ["--mirror-id", "m" * 129], prog="penstock mirror", environ={})


def test_the_mirror_is_ready_while_the_bus_answers() -> None:
    broker = MemoryBroker()
    mirror = Mirror(MemoryBus(broker))
    assert mirror.missing() == ""
    broker.set_up(False)
    assert mirror.missing() == "no connection"
