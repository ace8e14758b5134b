#!/bin/sh
# Install what the kit brings beside this machine's packages, and run: sh run.sh [--minutes 9 ...]
# PYTHON names the interpreter, SITE where to install. Nothing else on the machine changes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
site=${SITE:-$here/site}
if [ ! -e "$site/installed" ]; then
    "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps \
        --target "$site" "$here"/wheels/*.whl
    touch "$site/installed"
fi
cd "$here/repository"
PYTHONPATH="$here/repository:$site" exec "$python" -m benchmarks.device "$@"
