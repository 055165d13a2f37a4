"""What a choice comes to in one pass of machine code, and by numpy: the same, to the last bit.

As Python there is one way only; `make compiled` runs these on both."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.common.messages import Placement, ScheduleRequest
from penstock.scheduler.bench import fleet, table_of
from penstock.scheduler.candidates import Candidates
from penstock.scheduler.columns import NATIVE, Column
from penstock.scheduler.decisions import Case
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.pickers import Best
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.scheduler import choose
from penstock.scheduler.view import ClusterView

# Few, so that ties and near ties are many; the speeds' own range is far wider.
speeds = st.sampled_from([0.01, 0.125, 0.125 * (1 + 1e-12), 0.125 * (1 + 1e-8), 0.13, 7.0])
waits = st.sampled_from([0.0, 0.0, 1e-9, 5.0, 5.0 * (1 + 1e-10), 1e4]) | st.floats(0, 1e5)


@settings(deadline=None)
@given(st.data())
def test_a_sweep_comes_to_what_numpy_does(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 2, 3, 8, 9, 33, 70, 200]))
    view, index = ClusterView(), PrefixIndex(10_000)
    view.refresh(table_of(fleet(count)), index.forget)
    pool = view.pool("m")
    assert pool is not None
    some = data.draw(st.lists(st.tuples(speeds, waits), min_size=1, max_size=9))
    for slot in range(count):
        ms_per_token, wait_ms = some[slot * 7 % len(some)]
        view.loads.ranked_ms_per_token[slot], view.loads.wait_ms[slot] = ms_per_token, wait_ms
        view.loads.queued[slot] = wait_ms
    hashes = [(1 << 59) + number for number in range(data.draw(st.sampled_from([0, 1, 9, 40])))]
    for slot, length in data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, 40)))):
        index.insert(hashes[:length], slot)
    request = ScheduleRequest(
        "d",
        "r",
        "m",
        prompt_tokens=data.draw(st.sampled_from([0, 1, 1000, 4097, 10**9])),
        run_blocks=data.draw(st.sampled_from([0, 4])),
    )
    seed = data.draw(st.sampled_from([0, 1, 1 << 63, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1))
    case = Case(request, hashes, seed, 0, data.draw(st.sampled_from([1, 3])))
    catalog = Catalog(Thresholds(wait_weight=data.draw(st.sampled_from([1.0, 0.3]))))
    profile = catalog.find(
        data.draw(st.sampled_from(["cache-aware", "cache-aware", "least-request", "prefix-cache"]))
    )
    assert profile.swept
    band = data.draw(st.sampled_from([0.0, 0.02, 0.9]))
    profile = replace(profile, picker=Best(band, by_block=data.draw(st.booleans())))
    kept = profile.candidates(case, pool, view.loads).kept
    swept = choose(case, Candidates(kept, view.loads), index, profile)
    plain = msgspec.structs.replace(kept, sweep=None)
    by_numpy = choose(case, Candidates(plain, view.loads), index, profile)
    assert isinstance(swept.outcome, Placement)
    assert (swept.outcome, swept.terms) == (by_numpy.outcome, by_numpy.terms)


@pytest.mark.parametrize("count", [1, 64, 1000])
def test_numpy_and_cells_see_what_the_other_wrote(count: int) -> None:
    column = Column([1.5] * count)
    column.array[0] = 2.5
    column.cells[count - 1] = column.cells[0] + 1.0
    assert column.array[count - 1] == 3.5
    assert column.array.dtype == np.float64
    column.array += 1.0
    assert column.cells[count - 1] == 4.5


def test_machine_code_sweeps() -> None:
    view = ClusterView()
    view.refresh(table_of(fleet(3)), lambda slots: None)
    pool, profile = view.pool("m"), Catalog(Thresholds()).find("cache-aware")
    assert pool is not None
    kept = profile.candidates(Case(ScheduleRequest("d", "r", "m"), (), 1), pool, view.loads).kept
    assert (kept.sweep is not None) == NATIVE
    assert view.loads.cells.stand_for(view.loads)
