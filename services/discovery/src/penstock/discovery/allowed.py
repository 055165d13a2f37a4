"""Which addresses an instance may have: a record must not point the fleet at somebody else's service."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_NETWORKS = 256
# Metadata services of clouds live on link-local addresses; AWS has one more, on a unique local one.
_METADATA = ipaddress.ip_address("fd00:ec2::254")


@dataclass(frozen=True)
class AllowedHosts:
    """`networks` lists all that is allowed; empty, everything is but link-local and metadata addresses.
    Unspecified and multicast addresses never are."""

    networks: tuple[Network, ...] = ()

    def refusal(self, host: str) -> str:
        """Why an instance may not be at `host`, in words; empty if it may, or if `host` is a name, which is
        judged by the addresses it resolves to."""
        try:
            address = _unmapped(ipaddress.ip_address(host))
        except ValueError:
            return ""
        if address.is_unspecified or address.is_multicast:
            return f"{host} is not the address of one host"
        if self.networks:
            if any(address in network for network in self.networks):
                return ""
            return f"{host} is in no network of --discovery-allow-cidr"
        if address.is_link_local or address == _METADATA:
            return f"{host} is a link-local or metadata address; --discovery-allow-cidr may allow it"
        return ""


def is_address(host: str) -> bool:
    """Whether `host` is a literal address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _unmapped(address: Address) -> Address:
    """An IPv4 address in IPv6 clothes connects to the IPv4 one."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def parse_allowed(text: str) -> AllowedHosts:
    """Networks as `10.0.0.0/8,fd00::/8`, comma-separated; a plain address is a network of one.

    Raises:
        ValueError: naming every faulty entry.
    """
    networks, faults = [], []
    for entry in filter(None, map(str.strip, text.split(","))):
        try:
            networks.append(ipaddress.ip_network(entry))
        except ValueError as exc:
            faults.append(f"{entry!r} is not a network such as 10.0.0.0/8: {exc}")
    if len(networks) > MAX_NETWORKS:
        faults.append(f"{len(networks)} networks, over {MAX_NETWORKS}")
    if faults:
        raise ValueError("; ".join(faults))
    return AllowedHosts(tuple(networks))
