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
    source = {"path_config_source": {"path": f"{tls.secrets}/{name}.json"}, "resource_api_version": "V3"}
    return {"name": name, "sds_config": source}


def secrets(tls: Tls) -> dict[str, Message]:
    """The files in `Tls.secrets` by name: each says which files to read, again whenever their folder changes. Envoy
    rejects a file with more than the one secret that it was asked for."""
    found: dict[str, Message] = {
        CERTIFICATE: {
            "tls_certificate": {
                "certificate_chain": {"filename": f"{tls.folder}/tls.crt"},
                "private_key": {"filename": f"{tls.folder}/tls.key"},
                "watched_directory": {"path": tls.folder},
            },
        }
    }
    if tls.client_ca is not None:
        folder = tls.client_ca.rpartition("/")[0]
        found[AUTHORITIES] = {
            "validation_context": {
                "trusted_ca": {"filename": tls.client_ca},
                "watched_directory": {"path": folder},
            },
        }
    kind = "extensions.transport_sockets.tls.v3.Secret"
    return {f"{name}.json": {"resources": [typed(kind, name=name, **each)]} for name, each in found.items()}
