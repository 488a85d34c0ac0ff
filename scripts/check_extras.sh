#!/usr/bin/env bash
# Resolves every extra of setup.cfg against the package index, as published, for Linux x86-64 and each Python given
# (default 3.11 and 3.12), and prints the versions chosen of the packages that decide. Installs nothing. Needs uv.
# Usage: scripts/check_extras.sh [PYTHON_VERSION ...]
set -euo pipefail
cd "$(dirname "$0")/.."

uv=${UV:-uv}
extras=(image_cpu image_cuda12 image_cuda13 dali,image_cpu demo,image_cpu test,image_cpu docs dali,demo,docs,image_cpu,test)
shown='^(torch|torchvision|timm|open-clip-torch|dask|distributed|pandas|pyarrow|numpy|pillow|scikit-learn|scikit-image|cudf-cu1[23]|dask-cudf-cu1[23]|cuml-cu1[23]|dask-cuda|nvidia-dali-cuda1[23]0|nvidia-nvjitlink(-cu12)?)=='
[ $# -gt 0 ] || set -- 3.11 3.12

failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for python_version; do
    for extra in "${extras[@]}"; do
        options=()
        for name in ${extra//,/ }; do options+=(--extra "$name"); done
        echo "== [$extra], Python $python_version"
        if resolved=$("$uv" pip compile setup.cfg "${options[@]}" --python-version "$python_version" \
            --python-platform x86_64-manylinux_2_28 --no-python-downloads --no-header --no-annotate 2>"$log"); then
            echo "   $(grep -c == <<<"$resolved") packages; $(grep -E "$shown" <<<"$resolved" | tr '\n' ' ')"
        else
            failed=1
            echo "   DOES NOT RESOLVE:"
            sed 's/^/   /' "$log"
        fi
    done
done
exit "$failed"
