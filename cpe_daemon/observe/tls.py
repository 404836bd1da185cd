"""The certificate of a listener, read again when its files change: certificates are renewed, daemons run for months."""

from __future__ import annotations

import os
import ssl

import structlog

from cpe_daemon.errors import ConfigError

log = structlog.get_logger(__name__)

_Stamp = tuple[tuple[int, int], tuple[int, int]]


class Certificate:
    """A certificate and its key, both in PEM files.

    Args:
        certificate: path of the certificate with its chain.
        key: path of its private key, which has no password.

    Raises:
        ConfigError: they cannot be used.
    """

    def __init__(self, certificate: str, key: str) -> None:
        self._files = (certificate, key)
        try:
            self._seen = self._stamp()
            self._context = self._load()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no https with certificate {certificate} and key {key} (http.tls_certificate, http.tls_key): {error}"
            ) from None

    def context(self) -> ssl.SSLContext:
        """What a handshake needs. Blocking, for a few reads; files that are no good leave the last ones in use."""
        try:
            now = self._stamp()
            if now != self._seen:
                self._seen = now
                self._context = self._load()
                log.info("http.certificate_renewed", certificate=self._files[0])
        except (OSError, ValueError) as error:
            log.warning("http.certificate_unusable", certificate=self._files[0], error=str(error))
        return self._context

    def _stamp(self) -> _Stamp:
        certificate, key = (os.stat(file) for file in self._files)
        return (certificate.st_mtime_ns, certificate.st_ino), (key.st_mtime_ns, key.st_ino)

    def _load(self) -> ssl.SSLContext:
        """A context of its own: one in which only the new certificate was loaded, and not its key, is no good."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*self._files, password="")  # "": or else somebody is asked for one, at the terminal
        return context
