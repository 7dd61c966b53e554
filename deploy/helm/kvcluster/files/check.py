"""What `helm test` runs: the API server serves KVClusters, and the controller is alive.

usage: check.py API CONTROLLER FOLDER     (base URLs; a folder with the files token and ca.crt)
"""

import json
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

TRIES = 5


def get(url: str, token: str = "", ca: Path | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    context = ssl.create_default_context(cafile=str(ca)) if ca is not None and ca.exists() else None
    request = urllib.request.Request(url, headers=headers)
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=5, context=context) as answer:
                return answer.read()
        except OSError as error:
            if attempt == TRIES - 1 or isinstance(error, urllib.error.HTTPError):
                sys.exit(f"{url}: {error}")
    raise AssertionError


def main(api: str, controller: str, folder: Path) -> None:
    token, ca = (folder / "token").read_text(), folder / "ca.crt"
    listed = json.loads(get(f"{api}/apis/kvcluster.dev/v1alpha1", token, ca))
    if "kvclusters" not in [resource["name"] for resource in listed["resources"]]:
        sys.exit("the API server has kvcluster.dev/v1alpha1, but no kvclusters in it: is the CRD of this release?")
    print("the API server serves kvclusters.kvcluster.dev/v1alpha1")
    get(f"{controller}/healthz")
    print("the controller is alive")


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
