"""What a scheduler is asked for a pair: in one call, or one after the other."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.common.messages import Mode, ScheduleRequest, Stage
from penstock.common.model import Instance
from penstock.ingress.disaggregation.protocols import Method

# Of a request for prefill, or for both at once.
_NO_PREFILL: dict[str, Any] = {"prefill_instance": "", "prefill_group": "", "lease_ms": 0}


def first_stage(request: ScheduleRequest, method: Method) -> ScheduleRequest:
    """The request for a fresh pair, whatever was asked before."""
    mode, stage = method.first_call
    return msgspec.structs.replace(request, mode=mode, stage=stage, **_NO_PREFILL)


def decode_stage(request: ScheduleRequest, prefill: Instance, left_s: float) -> ScheduleRequest:
    """The request for an instance that decodes what `prefill` keeps for `left_s` more; all that a scheduler
    has to know which never saw the first stage."""
    return msgspec.structs.replace(
        request,
        mode=Mode.PD_STAGED,
        stage=Stage.DECODE,
        prefill_instance=prefill.id,
        prefill_group=prefill.group,
        lease_ms=int(max(0.0, left_s) * 1000),
    )
