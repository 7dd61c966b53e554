#!/usr/bin/env bash
# A Kubernetes cluster in Docker, this repository's image and chart in it, and a KVCluster that answers a request.
# Run it again after a change: what is there is upgraded.
#
#   deploy/kind/up.sh            KIND_CLUSTER: name of the cluster (kvcluster); PORT: local port of the smoke test (8000)
set -euo pipefail
cd "$(dirname "$0")/../.."
cluster=${KIND_CLUSTER:-kvcluster}
port=${PORT:-8000}
namespace=kvcluster-system

say() { printf '\n== %s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

missing=()
for tool in docker kind kubectl helm curl; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
[ ${#missing[@]} -eq 0 ] || fail "not installed: ${missing[*]} (see docs/kind.md)"
docker info >/dev/null 2>&1 || fail "Docker does not answer: is its daemon running, and may you use it? (docker info)"

if kind get clusters 2>/dev/null | grep -qx "$cluster"; then
  say "cluster $cluster is there"
else
  say "creating cluster $cluster"
  kind create cluster --name "$cluster" --config deploy/kind/kind.yaml --wait 3m
fi
kubectl() { command kubectl --context "kind-$cluster" "$@"; }
helm() { command helm --kube-context "kind-$cluster" "$@"; }

say "building the image"
DOCKER_BUILDKIT=1 docker build --tag kvcluster:build .
# Tagged by its content: a changed image is a changed pod, so that pods roll; an unchanged one disturbs nothing.
id=$(docker image inspect --format '{{.Id}}' kvcluster:build)
id=${id#sha256:}
tag=kind-${id:0:12}
docker tag kvcluster:build "kvcluster:$tag"

say "loading kvcluster:$tag into the nodes"
kind load docker-image "kvcluster:$tag" --name "$cluster"

say "installing the chart"
helm upgrade --install kvcluster deploy/helm/kvcluster --namespace "$namespace" --create-namespace \
  --set "image.tag=$tag" --wait --timeout 3m
helm test kvcluster --namespace "$namespace" --logs

say "applying examples/minimal.yaml"
kubectl apply --filename examples/minimal.yaml
if ! kubectl wait --for=condition=Ready kvcluster/minimal --timeout=3m; then
  kubectl describe kvcluster minimal
  kubectl get pods --selector app.kubernetes.io/instance=minimal
  kubectl --namespace "$namespace" logs deployment/kvcluster --tail=50
  fail "minimal did not become ready: see above"
fi
kubectl get kvcluster

say "asking it"
kubectl port-forward service/minimal-router "$port:8000" >/dev/null &
forward=$!
trap 'kill "$forward" 2>/dev/null || true' EXIT
curl --silent --show-error --fail --retry 10 --retry-delay 1 --retry-connrefused "localhost:$port/v1/completions" \
  --header 'content-type: application/json' --data '{"prompt": "def hello():", "max_tokens": 8}'

say "done"
cat <<EOF
kubectl config use-context kind-$cluster
kubectl get kvcluster
kubectl port-forward service/minimal-router $port:8000    # then ask localhost:$port/v1/completions
make kind-delete                                          # removes the cluster
EOF
