"""What administrators ordered of the fleet: drains, and mappings of (model, owner) to a service. Both stand
in the live configuration; discovery carries them out in the records of instances."""

from __future__ import annotations

from typing import Annotated

import msgspec

from penstock.common.live_config import DRAIN, MAPPING, Document, LiveConfig
from penstock.common.model import Instance, InstanceId, InstanceState, Name, ShortName

# Begins the reason of an instance that an administrator drains.
DRAINED_BY = "drained by "
# The Service of an instance that was found by its EndpointSlice.
SERVICE_LABEL = "kubernetes.io/service-name"
MAX_REASON = 400


class Drain(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value of a `drain` document; its name is the instance's id."""

    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)] = ""


class Mapping(msgspec.Struct, frozen=True):
    """The value of a `mapping` document: requests for `model` of `owned_by` go to the instances that
    `service_name` names, whatever owner these say they have."""

    model: Name
    owned_by: ShortName
    service_name: Name


def mapping_name(model: str, owned_by: str) -> str:
    """Name of a mapping's document; an owner has no slash."""
    return f"{owned_by}/{model}"


def named_by(instance: Instance, service_name: str) -> bool:
    """Whether a service's name means this instance: its id, its group, its endpoint or its host, or the
    Kubernetes object that it was found by, with its namespace or without."""
    endpoint = instance.endpoint
    if service_name in (instance.id, instance.group, endpoint.host, str(endpoint)):
        return bool(service_name)
    if instance.source == "kubernetes":
        # Its ids are name.namespace, and what tells several of one object apart after an underscore.
        stem = instance.id.partition("_")[0]
        if service_name in (stem, stem.partition(".")[0]):
            return True
    return instance.labels.get(SERVICE_LABEL) == service_name


def mapping_of(document: Document) -> Mapping | None:
    """What the document says; None if it is no mapping."""
    try:
        return msgspec.convert(document.value, Mapping)
    except msgspec.ValidationError:
        return None


class Orders:
    """Drains and mappings, ready to be carried out."""

    def __init__(self) -> None:
        self._drains: dict[InstanceId, str] = {}
        self._mappings: dict[str, list[Mapping]] = {}

    def take(self, config: LiveConfig) -> None:
        """These are the orders from here on."""
        self._drains = {name: _reason(document) for name, document in config.documents(DRAIN).items()}
        self._mappings = {}
        for _, document in sorted(config.documents(MAPPING).items()):
            mapping = mapping_of(document)
            if mapping is not None:
                self._mappings.setdefault(mapping.model, []).append(mapping)

    def amend(self, record: Instance) -> Instance:
        """The record as ordered."""
        owners = self._owners(record) if self._mappings else {}
        if owners != record.owners:
            record = msgspec.structs.replace(record, owners=owners)
        reason = self._drains.get(record.id)
        if reason is not None:
            record = msgspec.structs.replace(record, state=InstanceState.DRAINING, reason=reason)
        return record

    def _owners(self, record: Instance) -> dict[str, str]:
        owners: dict[str, str] = {}
        for model in (*record.models, *record.lora_adapters):
            for mapping in self._mappings.get(model, ()):
                if named_by(record, mapping.service_name):
                    owners[model] = mapping.owned_by
                elif mapping.owned_by.lower() == record.owner.lower():
                    # The mapping wins over what was found: its owner's requests go to its service only.
                    owners.setdefault(model, "")
        return owners


def _reason(document: Document) -> str:
    try:
        said = msgspec.convert(document.value, Drain).reason
    except msgspec.ValidationError:
        said = ""
    return f"{DRAINED_BY}{document.by}{f': {said}' if said else ''}"[:512]
