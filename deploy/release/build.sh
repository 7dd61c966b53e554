#!/usr/bin/env bash
# Builds every file of a release but the image: the wheel, the source distribution, the SBOM of what the wheel
# installs, the chart that names the image, and the checksums of all of them.
#
#   deploy/release/build.sh PYTHON IMAGE DIGEST VERSION OUT      PYTHON: an interpreter with requirements.txt installed
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

[ $# -eq 5 ] || fail "usage: build.sh PYTHON IMAGE DIGEST VERSION OUT"
python=$1 image=$2 digest=$3 version=$4 out=$5
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
[ -z "$(ls -A "$out")" ] || fail "$out is not empty: what lies there would be released too"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$root/deploy/release/chart.sh" "$image" "$digest" "$version" "$out"

# Built from a copy: a build leaves files in its source folder, which the next one would take up.
mkdir "$work/source"
tar --create --directory "$root" --exclude='./.*' --exclude=./tests --exclude=./build --exclude=./dist \
  --exclude=__pycache__ --exclude='*.egg-info' . | tar --extract --directory "$work/source"
# The wheel is built from the source distribution, so that one without the other cannot be released.
"$python" -m build --no-isolation --outdir "$out" "$work/source" >"$work/build.log" 2>&1 ||
  fail "the wheel could not be built:
$(tail -n 30 "$work/build.log")"

"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --disable-pip-version-check --python "$work/venv/bin/python" install --quiet "$out"/*.whl
"$python" -m cyclonedx_py environment --pyproject "$root/pyproject.toml" --mc-type application --output-reproducible \
  --output-format JSON --output-file "$out/kvcluster-$version.cdx.json" "$work/venv/bin/python"

(cd "$out" && sha256sum -- * >"$work/SHA256SUMS")
mv "$work/SHA256SUMS" "$out"
