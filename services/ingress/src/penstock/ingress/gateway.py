"""What all exchanges of one ingress process share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from penstock.common.block_hash import root_seed
from penstock.common.cells import Cell, HistogramCell
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import InstanceTable
from penstock.common.messages import ScheduleRequest
from penstock.common.model import Instance, InstanceId
from penstock.common.telemetry import Metrics
from penstock.common.user_hashes import UserHashes
from penstock.ingress.access_log import AccessLog
from penstock.ingress.api_keys import ApiKeys, Caller
from penstock.ingress.block_hash import RUN_BLOCKS, chain, condense, of_tenant
from penstock.ingress.failures import GatewayError
from penstock.ingress.http_wire import RequestHead
from penstock.ingress.ids import Ids
from penstock.ingress.in_flight import InFlightAccount
from penstock.ingress.large_bodies import (
    LARGE_BODY_BYTES,
    TOKENIZED_BODY_BYTES,
    Facts,
    Refusal,
    Setup,
    Task,
    Tokenizer,
    read,
)
from penstock.ingress.openai import parse
from penstock.ingress.owners import Owners
from penstock.ingress.ports import Externals, LargeBodies, Upstreams
from penstock.ingress.request_body import BYTES_PER_TOKEN, InferenceRequest
from penstock.ingress.route_settings import proxy_from_environment
from penstock.ingress.settings import IngressSettings
from penstock.ingress.speeds import Speeds
from penstock.ingress.splitting import Splitting, is_external
from penstock.ingress.wishes import Wishes, read_wishes

if TYPE_CHECKING:
    from penstock.ingress.capture import Capture
    from penstock.ingress.dividing import Dividing
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.limiter import Limiter
    from penstock.ingress.outcomes import Outcome
    from penstock.ingress.placing import Placer
    from penstock.ingress.waiting_room import WaitingRoom

_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
MAX_EXCLUDED: Final = 64
_SEED_CACHE: Final = 1024
_HEADER_CACHE: Final = 8192
GAPS_OF_ONE_IN: Final = 8
_UNPRINTABLE: Final = re.compile(r"[^\x21-\x7e]")


class Gateway:
    """Settings, account, log and table of one process, and the exchanges that run on them."""

    placer: Placer
    upstreams: Upstreams
    externals: Externals
    large_bodies: LargeBodies
    dividing: Dividing
    # Where requests need one.
    api_keys: ApiKeys | None = None
    # While requests are to be copied for the mirror.
    capture: Capture | None = None
    waiting: WaitingRoom
    # What gives some exchanges a trace, while there are any.
    sample: Callable[[Exchange], None] | None = None
    # While anybody, or any model, is limited.
    limits: Limiter | None = None

    def __init__(
        self,
        settings: IngressSettings,
        identity: Identity,
        table: InstanceTable,
        account: InFlightAccount,
        events: EventWriter,
        access_log: AccessLog,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.settings, self.identity, self.table, self.account = settings, identity, table, account
        self.events, self.access_log, self.clock = events, access_log, clock
        self.exchanges: set[Exchange] = set()
        self.splitting = Splitting(settings, identity, events, metrics, clock, proxy_from_environment)
        self.breakers = self.splitting.breakers
        # Empty for as long as nothing fails: all that a request looks at then.
        self.failing, self.tripped = self.breakers.targets, self.breakers.tripped
        self.owners = Owners(table)
        self.speeds = Speeds()
        self.draining = False
        # What stands for users in the log, if they are to.
        salt = settings.audit_user_salt.get_secret_value()
        self.user_hashes = UserHashes(salt) if salt else None
        # Whether requests are divided that do not ask for it: all that the others look at.
        self.divides = bool(settings.pd_disagg_protocol)
        # What reads a body on the event loop, and up to what size; with a tokenizer another one, and less.
        self.parse: Callable[[bytes, str, bytes | bytearray], InferenceRequest | Facts] = parse
        self.most_body_bytes = LARGE_BODY_BYTES
        # Of settings each read costs 30 ns: what every request needs stands here once more.
        self.request_timeout = settings.request_timeout
        self.stream_idle_timeout = settings.stream_idle_timeout
        self.expose_routing_headers = settings.expose_routing_headers
        self._block_bytes, self._tenant = settings.block_bytes, settings.block_hash_tenant
        self._secret = settings.block_hash_secret.get_secret_value()
        key = settings.engine_api_key.get_secret_value()
        self._engine_key = f"authorization: Bearer {key}\r\n".encode() if key else b""
        self._seeds: dict[str, int] = {}
        self._routing_headers: dict[tuple[str, str, InstanceId], tuple[Instance, bytes]] = {}
        self._hosts: dict[InstanceId, tuple[Instance, bytes]] = {}
        self._request_ids = Ids(f"{identity.id}-{identity.incarnation}-")
        self._decision_ids = Ids(f"{identity.incarnation}.")
        self._outcomes: dict[tuple[Outcome, int], Cell] = {}
        self._requests = metrics.counter(
            "penstock_ingress_requests_total", "Requests by how they ended", "outcome", "status"
        )
        self._ttft = metrics.histogram(
            "penstock_ingress_ttft_seconds", "Request received to first byte of the response's body"
        ).labels()
        self._e2e = metrics.histogram("penstock_ingress_e2e_seconds", "Request received to its end").labels()
        # Measured on some streams only: on all of them it would cost each piece 0.2 us.
        self.gaps = metrics.histogram(
            "penstock_ingress_itl_seconds",
            f"Time between two pieces of a stream, of one stream in {GAPS_OF_ONE_IN}",
        ).labels()
        self._streams = 0
        tokens = metrics.counter(
            "penstock_ingress_tokens_total",
            "Tokens of answered requests as engines report them: of prompts, and completion",
            "kind",
        )
        self._prompt_tokens, self._completion_tokens = tokens.labels("prompt"), tokens.labels("completion")
        prefix = metrics.counter(
            "penstock_ingress_prefix_tokens_total",
            "Prompt tokens of answered requests: matched when they were placed, and reported by engines as "
            "found in their KV cache",
            "result",
        )
        self._matched_tokens, self._cached_tokens = prefix.labels("matched"), prefix.labels("reported")
        self._moves = metrics.counter(
            "penstock_ingress_moves_total",
            "Requests moved to another instance before a byte was sent",
            "kind",
        )
        metrics.gauge("penstock_ingress_exchanges", "Requests in hand", lambda: len(self.exchanges))
        metrics.gauge("penstock_ingress_in_flight", "Requests placed and not finished", lambda: len(account))

    def use(self, tokenizer: Tokenizer, setup: Setup) -> None:
        """Hash prompts by their tokens from here on."""

        def parse_tokens(path: bytes, content_type: str, body: bytes | bytearray) -> Facts:
            answer = read(Task(path, content_type, len(body)), body, setup, tokenizer)
            if isinstance(answer, Refusal):
                raise answer.error()
            return answer

        self.parse, self.most_body_bytes = parse_tokens, TOKENIZED_BODY_BYTES

    def request_id(self, given: bytes | None) -> str:
        """The client's id if it is sane, else one of ours."""
        if given and _SANE_ID.fullmatch(given):
            return given.decode()
        return self._request_ids.next()

    def admit(self) -> None:
        """Raises GatewayError while no request can be taken."""
        if not self.table.synced:
            raise GatewayError(
                "no_available_instance", "the gateway does not know any instance yet", retry_after_s=1.0
            )

    def require_model(self, model: str) -> None:
        """Raises GatewayError for a model that nobody serves."""
        if not self.table.serving(model):
            raise self.owners.unknown_model(model)

    def schedule_request(
        self, head: RequestHead, inference: InferenceRequest | Facts, request_id: str
    ) -> ScheduleRequest:
        """What a scheduler has to know. Raises GatewayError for headers that are too long or no priority."""
        wishes = head.wishes
        if wishes is None:
            wishes = self.wishes_of(head)
        owner, strategy, profile, session, user, priority = wishes
        owner = inference.owner or owner
        if owner:
            owner = self.owners.resolve(inference.model, owner)
        # In this order: to ask of an object of another class costs 0.1 us.
        if isinstance(inference, InferenceRequest):
            hashes = chain(condense(inference.prompt), self._seed(inference), self._block_bytes)
            # As its property says, which runs as Python.
            tokens = len(inference.prompt) // BYTES_PER_TOKEN
        else:
            hashes, tokens = inference.block_hashes, inference.prompt_tokens
        if self._tenant != "none":
            # Hashes that match no other tenant's.
            hashes = of_tenant(hashes, self._secret, self._tenant, user, owner)
        # In the order of its fields: by name they cost 0.5 us more.
        return ScheduleRequest(
            self._decision_ids.next(),
            request_id,
            inference.model,
            owner,
            strategy,
            profile,
            tokens,
            min(inference.max_tokens, 2**40),
            hashes,
            session,
            user,
            priority,
            run_blocks=RUN_BLOCKS,
        )

    def unplaced_request(self, inference: InferenceRequest | Facts, request_id: str) -> ScheduleRequest:
        """What is logged of a request that no scheduler is asked about."""
        return ScheduleRequest("", request_id, inference.model, prompt_tokens=inference.prompt_tokens)

    def ejected(self, model: str) -> tuple[str, ...]:
        """Instances of a model that failed too often lately."""
        pool = (instance.id for instance in self.table.serving(model) if instance.takes_work)
        return self.breakers.ejected(pool, self.clock())[:MAX_EXCLUDED]

    def forget_gone(self) -> None:
        """Instances left: nothing has to be remembered of them."""
        if self.failing:
            self.breakers.forget(lambda target: not is_external(target) and self.table.get(target) is None)

    @property
    def seen(self) -> int:
        """Requests so far."""
        return sum(self._e2e.counts) + len(self.exchanges)

    def admit_user(self, exchange: Exchange, inference: InferenceRequest | Facts) -> bool:
        """Whether a request may go on at once, as far as limits go (`Limiter.admit`). Raises GatewayError for
        one over a limit, and for a header that is too long."""
        wishes = exchange.head.wishes or self.wishes_of(exchange.head)
        return self.limits is None or self.limits.admit(exchange, wishes.user, wishes.profile, inference)

    def wishes_of(self, head: RequestHead) -> Wishes:
        """What the client asks of this gateway; the user is who asks: whose limits and turns count, whose
        prompts are kept apart. Raises GatewayError as `read_wishes`."""
        wishes = read_wishes(head.read)
        if head.caller is not None and self.settings.limits_user == "key":
            wishes = wishes._replace(user=head.caller.owner)
        head.wishes = wishes
        return wishes

    def another_attempt(self, request: ScheduleRequest, excluded: tuple[str, ...]) -> ScheduleRequest:
        """The request again, under a fresh decision id and without the instances `excluded`."""
        return msgspec.structs.replace(
            request, decision_id=self._decision_ids.next(), excluded=excluded[-MAX_EXCLUDED:]
        )

    def upstream_head(self, head: RequestHead, instance: Instance, request_id: str, length: int) -> bytes:
        """The request's head as the instance gets it: the client's, less what ends at this hop."""
        host = self._hosts.get(instance.id)
        if host is None or host[0] is not instance:
            host = self._host(instance)
        return b"%b%b\r\n%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            head.first_line,
            host[1],
            # In the place of the client's key; without API keys what the client sent passes as it came.
            head.block if head.caller is None else head.block + self._engine_key,
            request_id.encode(),
            length,
        )

    def routing_headers(self, policy: str, profile: str, instance: Instance) -> bytes:
        """The lines that tell a client who chose what."""
        key = policy, profile, instance.id
        of, lines = self._routing_headers.get(key, (None, b""))
        if of is not instance:
            if len(self._routing_headers) >= _HEADER_CACHE:
                self._routing_headers.clear()
            # All come from the bus: nothing of them may end a header line.
            headers = {
                "routing-strategy": policy,
                "target-pod": instance.id,
                "target-pod-ip": str(instance.endpoint),
            }
            if profile:
                headers["config-profile"] = profile
            shown = {name: _UNPRINTABLE.sub("?", value) for name, value in headers.items()}
            text = "".join(f"{name}: {value}\r\n" for name, value in shown.items())
            lines = text.encode()
            self._routing_headers[key] = instance, lines
        return lines

    def prefill_headers(self, instance_id: InstanceId) -> bytes:
        """The lines that tell a client where the prompt was computed; none if `instance_id` is empty or has
        left."""
        instance = self.table.get(instance_id)
        if instance is None:
            return b""
        shown = [_UNPRINTABLE.sub("?", text) for text in (instance.id, str(instance.endpoint))]
        return "prefill-target-pod: {}\r\nprefill-target-pod-ip: {}\r\n".format(*shown).encode()

    def count(
        self, outcome: Outcome, status: int, received_at: float, first_byte_at: float, now: float
    ) -> None:
        """One exchange ended."""
        ended = self._outcomes.get((outcome, status))
        if ended is None:
            ended = self._outcomes[outcome, status] = self._requests.labels(outcome.value, str(status))
        ended.value += 1
        if first_byte_at:
            self._ttft.observe(first_byte_at - received_at)
        self._e2e.observe(now - received_at)

    def count_tokens(self, prompt: int, completion: int, matched: int, cached: int) -> None:
        """What an answer's usage says; `matched` is what its placement expected to be cached."""
        self._prompt_tokens.value += prompt
        self._completion_tokens.value += completion
        self._matched_tokens.value += matched
        self._cached_tokens.value += cached

    def gaps_of_next_stream(self) -> HistogramCell | None:
        """Where the gaps of the stream that begins are counted, if they are."""
        self._streams += 1
        return self.gaps if self._streams % GAPS_OF_ONE_IN == 1 else None

    def count_move(self, free: bool) -> None:
        """One exchange goes to another instance."""
        self._moves.inc("connection" if free else "retry")

    def degraded(self, what: str, active: bool, cause: str) -> None:
        """Say in the routing log that something is, or is no longer, worked around."""
        self.events.degraded(what, active, cause)

    def live_models(self, caller: Caller | None = None) -> Iterable[tuple[str, str, str]]:
        """(model, owner, parent) of what some instance takes requests for and `caller` may ask for, sorted; a
        LoRA adapter's parent is the model that it is loaded on, a model's own is empty."""
        return sorted(
            {
                (model, instance.owned_by(model), instance.parent_of(model))
                for model in self.table.models()
                if caller is None or caller.may(model)
                for instance in self.table.serving(model)
                if instance.takes_work
            }
        )

    def _host(self, instance: Instance) -> tuple[Instance, bytes]:
        if len(self._hosts) >= _HEADER_CACHE:
            self._hosts.clear()
        known = self._hosts[instance.id] = instance, str(instance.endpoint).encode()
        return known

    def _seed(self, inference: InferenceRequest) -> int:
        model, salt = inference.model, inference.cache_salt
        if salt:
            # Not kept: a client may send any number of salts, each as long as a body.
            return root_seed(self._secret, model, salt)
        seed = self._seeds.get(model)
        if seed is None:
            if len(self._seeds) >= _SEED_CACHE:
                self._seeds.clear()
            seed = self._seeds[model] = root_seed(self._secret, model)
        return seed
