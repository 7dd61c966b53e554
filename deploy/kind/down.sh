#!/usr/bin/env bash
# Removes the cluster that up.sh made.
set -euo pipefail
command -v kind >/dev/null || {
  echo "error: not installed: kind (see docs/kind.md)" >&2
  exit 1
}
kind delete cluster --name "${KIND_CLUSTER:-kvcluster}"
