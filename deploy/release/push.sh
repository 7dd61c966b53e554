#!/usr/bin/env bash
# Pushes a packaged chart to an OCI registry, and prints what to sign there: `name=` and `digest=`.
#
#   deploy/release/push.sh PACKAGE CHARTS [OPTION OF HELM...]
#   e.g. deploy/release/push.sh dist/kvcluster-0.2.0.tgz registry.example.com/llm/charts
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

[ $# -ge 2 ] || fail "usage: push.sh PACKAGE CHARTS [OPTION OF HELM...]"
package=$1 charts=$2
shift 2
name=$(helm show chart "$package" | sed -n 's/^name: //p')
# Helm 3 says the digest on stderr, helm 4 on stdout.
said=$(helm push "$package" "oci://$charts" "$@" 2>&1) || fail "helm push: $said"
digest=$(sed -n 's/^Digest: //p' <<<"$said")
[[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || fail "helm push did not say the digest of what it pushed: $said"
printf 'name=%s/%s\ndigest=%s\n' "$charts" "$name" "$digest"
