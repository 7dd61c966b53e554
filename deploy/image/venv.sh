#!/bin/sh
# Makes the Python environment of the image: everything the processes need, and nothing else. The Dockerfile runs this;
# so can anyone who wants to see what is in the image, or how large it is, without a container engine.
#
#   deploy/image/venv.sh PYTHON VENV [EXTRAS]     e.g. deploy/image/venv.sh python3.12 /tmp/venv gpt2
set -eu
python=$1 venv=$2 extras=${3:-}
source=$(cd "$(dirname "$0")/../.." && pwd)

# Built from a copy: a build leaves files in its source folder, which the next one would take up.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
(cd "$source" && cp -R pyproject.toml README.md LICENSE kvcache runtime worker router controller bench kvcluster "$copy")

# pip stays outside: it is not needed once the packages are in.
"$python" -m venv --without-pip "$venv"
"$python" -m pip --disable-pip-version-check --python "$venv/bin/python" install --quiet --no-compile \
  "${copy}[otel,picker,tls${extras:+,$extras}]"

packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
find "$packages" -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
# Sources of compiled modules, and types for checkers: nothing reads them at run time.
find "$packages" -type f \( -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' -o -name '*.pyi' \) -delete
# Without torch transformers only makes tokenizers, and needs none of its models' code (33 MB).
if [ ! -d "$packages/torch" ]; then
  find "$packages/transformers/models" \( -name 'modeling_*.py' -o -name 'modular_*.py' \) -not -path '*/auto/*' -delete
fi

# The root file system is read-only, so bytecode is written now or never; the base image has none of the standard library
# either. All of it goes into one folder of the environment's (PYTHONPYCACHEPREFIX names it at run time), never checked
# against sources, whose times a copy may change. Of the largest packages only what is imported gets there.
cd /
env -u PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX="$("$venv/bin/python" -c 'import sys; print(sys.prefix)')/pycache" \
  PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 "$venv/bin/python" "$source/deploy/image/bytecode.py" "$packages"
