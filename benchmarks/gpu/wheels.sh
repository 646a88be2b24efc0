#!/usr/bin/env bash
# bash benchmarks/gpu/wheels.sh FOLDER: wheels for Python 3.12 on Linux x86-64 that a machine with CUDA torch lacks.
set -eu
mkdir -p "$1"
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 28 27 17; printf -- '--platform manylinux%s_x86_64 ' 2014 1)
packages=$(grep -E '^(monai|pytorch-ignite|nibabel|blosc2|pytorch_optimizer)==' "$(dirname "$0")/../../requirements.txt")
# shellcheck disable=SC2086
pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms -d "$1" \
    $packages numexpr ndindex termcolor
pip wheel -q --no-deps -w "$1" "$(grep '^fire==' "$(dirname "$0")/../../requirements.txt")"
