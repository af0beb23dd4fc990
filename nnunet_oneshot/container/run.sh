#!/bin/sh
# Label every image of a folder: ./run.sh INPUT OUTPUT   (GPUS="--gpus all" ./run.sh ... to use the GPU)
set -eu
if [ "$$#" -ne 2 ] || [ ! -d "$$1" ]; then
    echo "expected an input folder and an output folder: ./run.sh INPUT OUTPUT" >&2
    exit 2
fi
mkdir -p "$$2"
# The input is read-only and there is no network, as challenges run it; --user keeps the output yours.
exec docker run --rm $${GPUS:-} --network none --user "$$(id -u):$$(id -g)" -e HOME=/tmp \
    -v "$$(cd "$$1" && pwd):/input:ro" -v "$$(cd "$$2" && pwd):/output" $image
