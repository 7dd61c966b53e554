"""Settings of the controller process: environment variables `CONTROLLER_*`, overridden by kebab-case flags."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from controller.objects.names import ENVOY_IMAGE, Release
from runtime.settings import ProcessSettings, split_list


class Settings(ProcessSettings):
    """The controller."""

    model_config = SettingsConfigDict(env_prefix="CONTROLLER_", cli_prog_name="python -m controller.main")

    image: str = Field(min_length=1, description="default image of routers, emulated workers and cache agents")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="pull policy of that image; default: Kubernetes' own"
    )
    envoy_image: str = Field(
        ENVOY_IMAGE, min_length=1, description="default image of the Envoys that are routers' data plane"
    )
    envoy_image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="pull policy of that image; default: Kubernetes' own"
    )
    watch_namespaces: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="namespaces to watch, repeated or separated by commas; default: all of them"
    )
    image_pull_secrets: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Secrets in each KVCluster's namespace to pull its images with, separated by commas"
    )
    namespace: str | None = Field(
        None, description="namespace the controller runs in: NetworkPolicies let its pods connect to the routers"
    )
    kubeconfig: Path | None = Field(
        None, description="kubeconfig file; default: the pod's service account, else KUBECONFIG or ~/.kube/config"
    )
    host: str = Field("::", description="address of the health and metrics ports; ::, every one of IPv6 and IPv4")
    health_port: int = Field(8081, ge=0, le=65535, description="port of /healthz; 0 takes a free one")
    metrics_port: int = Field(8080, ge=0, le=65535, description="port of /metrics; 0 takes a free one")
    router_drain_delay: float = Field(
        5.0, ge=0, description="seconds for which a router accepts requests after it was told to stop"
    )
    drain_limit: float = Field(
        30.0,
        ge=0,
        description="seconds for which the last router or emulated worker accepts requests until another one serves",
    )
    api_recheck: float = Field(
        60.0, gt=0, description="seconds after which optional APIs (Gateway API, KEDA, ...) are looked for again"
    )
    management_secret: str | None = Field(
        None,
        description="Secret in each KVCluster's namespace with the tokens of the routers' management port; default: "
        "one for each KVCluster, which the controller makes",
    )
    management_token_file: Path | None = Field(
        None, description="file or folder with the same tokens, the first of which the controller shows to routers"
    )
    workers: int = Field(4, ge=1, le=64, description="KVClusters reconciled at the same time")

    @field_validator("watch_namespaces", "image_pull_secrets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_list(value)

    @property
    def release(self) -> Release:
        """What the installation decides for all KVClusters."""
        return Release(
            self.image,
            self.image_pull_policy,
            self.namespace,
            self.image_pull_secrets,
            ipv6=":" in os.environ.get("KUBERNETES_SERVICE_HOST", ""),
            drain_delay=self.router_drain_delay,
            drain_limit=self.drain_limit,
            management_secret=self.management_secret,
            envoy_image=self.envoy_image,
            envoy_image_pull_policy=self.envoy_image_pull_policy,
        )
