#!/usr/bin/env bash
# Writes all there is to know about the cluster that up.sh made into a folder: nodes' and pods' logs, objects, events.
# A part that cannot be had leaves the others: it runs where something has failed.
#
#   deploy/kind/logs.sh FOLDER      KIND_CLUSTER: name of the cluster (kvcluster)
set -uo pipefail
[ $# -eq 1 ] || {
  echo "usage: logs.sh FOLDER" >&2
  exit 1
}
folder=$1
cluster=${KIND_CLUSTER:-kvcluster}
mkdir -p "$folder"
kubectl() { command kubectl --context "kind-$cluster" "$@"; }

kind export logs "$folder/nodes" --name "$cluster"
kubectl get nodes,pods,services,endpointslices,kvclusters --all-namespaces --output wide >"$folder/objects.txt" 2>&1
kubectl describe pods,kvclusters --all-namespaces >"$folder/described.txt" 2>&1
kubectl get events --all-namespaces --sort-by .lastTimestamp >"$folder/events.txt" 2>&1
kubectl --namespace kvcluster-system logs deployment/kvcluster --all-containers >"$folder/controller.log" 2>&1
exit 0
