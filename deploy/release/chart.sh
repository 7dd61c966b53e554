#!/usr/bin/env bash
# Packages the chart of a release. Its values name the release's image by digest, so that whoever installs it builds
# and sets nothing.
#
#   deploy/release/chart.sh IMAGE DIGEST VERSION OUT
#   e.g. deploy/release/chart.sh registry.example.com/llm/kvcluster sha256:4f5c... 0.2.0 dist
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

[ $# -eq 4 ] || fail "usage: chart.sh IMAGE DIGEST VERSION OUT"
image=$1 digest=$2 version=$3 out=$4
[[ $image =~ ^[a-z0-9][a-z0-9.:-]*(/[a-z0-9._-]+)+$ ]] || fail "not a registry and a name without a tag: $image"
[[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || fail "not a digest of an image (sha256: and 64 hexadecimal digits): $digest"

chart=$(cd "$(dirname "$0")/../helm/kvcluster" && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -R "$chart" "$copy"
values=$copy/kvcluster/values.yaml

# Comments stay, so the file is edited, not written anew. A key that is no longer where it was ends the release.
set_value() {
  local there="  $1: $2" wanted="  $1: \"$3\""
  [ "$(grep --count --line-regexp --fixed-strings -- "$there" "$values")" = 1 ] ||
    fail "values.yaml does not say '$there' exactly once: deploy/release/chart.sh must follow it"
  sed "s|^$there\$|$wanted|" "$values" >"$values.new"
  mv "$values.new" "$values"
}
set_value repository kvcluster "$image"
set_value tag '""' "$version"
set_value digest '""' "$digest"

helm package "$copy/kvcluster" --version "$version" --app-version "$version" --destination "$out"
