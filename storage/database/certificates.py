"""Why a server's certificate was refused, of which libpq says only that it was: asked for once more, and nothing told.

No password goes over that connection, which ends with the handshake.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sqlalchemy import URL

_SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)
_TIMEOUT_S: Final = 5.0
# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
_BY_CLOCK: Final = {9: "is not valid yet", 10: "has expired"}


def refused_by_clock(url: URL) -> str | None:
    """Return what the clock of this machine has to do with it that the certificate was refused; None for nothing."""
    host = url.host or url.query.get("host")
    port = url.port or url.query.get("port") or os.environ.get("PGPORT") or 5432
    authority = url.query.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    if not isinstance(host, str) or isinstance(authority, tuple) or host.startswith("/"):
        return None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        if authority == "system":
            context.load_default_certs()
        else:
            context.load_verify_locations(authority or Path.home() / ".postgresql" / "root.crt")
        with socket.create_connection((host, int(str(port))), _TIMEOUT_S) as plain:
            plain.sendall(_SSL_REQUEST)
            if plain.recv(1) == b"S":
                context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _BY_CLOCK:
            now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            return f"its certificate {_BY_CLOCK[error.verify_code]} by this machine's clock, which says {now}"
    except (OSError, ValueError, RuntimeError):  # several hosts, say, or no home directory: then it is not known
        pass
    return None
