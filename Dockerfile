# One image for the controller, the routers, the emulated workers and the cache agent: a pod's command names the module.
#
#   docker build -t kvcluster:0.1.0 .
#   docker build -t kvcluster:0.1.0-gpt2 --build-arg EXTRAS=gpt2 .      # with torch, for `engine.generator: gpt2`
ARG BASE=python:3.12-slim

FROM ${BASE} AS builder
ARG EXTRAS=""
COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_ROOT_USER_ACTION=ignore /src/deploy/image/venv.sh python /opt/kvcluster "${EXTRAS}"

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="kvcluster" \
      org.opencontainers.image.description="Kubernetes-native, KV-cache-aware routing for LLM engines" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=builder /opt/kvcluster /opt/kvcluster
# Bytecode of everything, the standard library included, lies in one folder: deploy/image/bytecode.py.
# Pods run with a read-only root and an emptyDir on /tmp: what libraries want to write goes there. Modules are never
# looked for in the working directory.
ENV PATH=/opt/kvcluster/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPYCACHEPREFIX=/opt/kvcluster/pycache \
    PYTHONSAFEPATH=1 \
    HOME=/tmp \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib
USER 65532:65532
