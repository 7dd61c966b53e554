"""TLS at the data port."""

from __future__ import annotations

from runtime.envoy.messages import Message, extension, typed
from runtime.envoy.settings import Tls

CERTIFICATE, AUTHORITIES = "certificate", "authorities"


def transport_socket(tls: Tls) -> Message:
    """TLS 1.2 or later, HTTP/2 or HTTP/1.1; with a certificate of the client if there are authorities for them."""
    context: Message = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_certificate_sds_secret_configs": [_named(CERTIFICATE, tls)],
    }
    if tls.client_ca is not None:
        context["validation_context_sds_secret_config"] = _named(AUTHORITIES, tls)
    return extension(
        "envoy.transport_sockets.tls",
        "transport_sockets.tls.v3.DownstreamTlsContext",
        common_tls_context=context,
        require_client_certificate=tls.client_ca is not None,
        # A session that is resumed is not verified again.
        **(
            {"disable_stateless_session_resumption": True, "disable_stateful_session_resumption": True}
            if tls.client_ca
            else {}
        ),
    )


def _named(name: str, tls: Tls) -> Message:
    source = {"path_config_source": {"path": tls.secrets}, "resource_api_version": "V3"}
    return {"name": name, "sds_config": source}


def secrets(tls: Tls) -> Message:
    """The content of `Tls.secrets`: which files to read, again whenever their folder changes."""
    watched = {"path": tls.folder}
    found: list[Message] = [
        {
            "name": CERTIFICATE,
            "tls_certificate": {
                "certificate_chain": {"filename": f"{tls.folder}/tls.crt"},
                "private_key": {"filename": f"{tls.folder}/tls.key"},
                "watched_directory": watched,
            },
        }
    ]
    if tls.client_ca is not None:
        folder = tls.client_ca.rpartition("/")[0]
        found.append(
            {
                "name": AUTHORITIES,
                "validation_context": {
                    "trusted_ca": {"filename": tls.client_ca},
                    "watched_directory": {"path": folder},
                },
            }
        )
    return {"resources": [typed("extensions.transport_sockets.tls.v3.Secret", **each) for each in found]}
