"""nginx in front of the same engines: one worker, keep-alive both ways, streams unbuffered."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from penstock.cli.bench.clients import Address
from penstock.cli.bench.contestant import Contestant, Started
from penstock.cli.bench.way import GATEWAY, NGINX, REST, Way
from penstock.cli.processes import Command

MISSING = "nginx is not installed: apt-get install nginx-light; going on without it"
# Where Debian puts it, which is not on every user's PATH.
_ALSO_AT = "/usr/sbin"

_CONFIG = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 32768; }}
http {{
    access_log {access_log};
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 8m;
    # The largest body that is sent fits in: no body goes through a file.
    client_body_buffer_size 5m;
    keepalive_requests 1000000000;
    upstream engines {{
{servers}
        keepalive 4096;
        keepalive_requests 1000000000;
    }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    server {{
        listen {plain.host}:{plain.port} backlog=4096;
        location / {{ proxy_pass http://engines; }}
    }}
    server {{
        listen {streams.host}:{streams.port} backlog=4096;
        location / {{ proxy_pass http://engines; proxy_buffering off; }}
    }}
}}
"""


def find_nginx() -> str | None:
    """The program, if it is installed."""
    return shutil.which("nginx") or shutil.which("nginx", path=_ALSO_AT)


class Nginx(Contestant):
    """One way, with a listener of its own for streams."""

    def __init__(
        self,
        program: str,
        engines: Sequence[Address],
        ports: tuple[int, int],
        folder: Path,
        environ: Mapping[str, str],
        access_log: bool,
    ) -> None:
        self._plain, self._streams = (Address(engines[0].host, port) for port in ports)
        config = folder / "nginx.conf"
        servers = "\n".join(f"        server {engine.host}:{engine.port} max_fails=0;" for engine in engines)
        text = _CONFIG.format(
            folder=folder,
            access_log=folder / "access.log" if access_log else "off",
            servers=servers,
            plain=self._plain,
            streams=self._streams,
        )
        config.write_text(text, encoding="utf-8")
        argv = (program, "-p", str(folder), "-c", str(config))
        self.commands = [Command("nginx", argv, environ)]

    def ways(self, started: Started) -> list[Way]:
        """The master only waits; the worker is the gateway."""
        master = started.pid("nginx")
        parts = {GATEWAY: started.children("nginx"), REST: [master]}
        return [Way(NGINX, [self._plain], [self._streams], parts=parts)]
