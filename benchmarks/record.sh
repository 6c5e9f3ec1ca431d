#!/bin/sh
# Every row of results/sample.json, the most important first: sh benchmarks/record.sh [FILE], in the repository's root.
# What fails is in its row, and the rest goes on. "nova" is the command to run, or $NOVA.
rows=${1:-benchmarks/results/sample.json}
bench() { ${NOVA:-nova} bench sample --output "$rows" "$@" || failed=1; }

bench --config t2v-480-0.6b t2i-512-0.6b t2i-1024-0.6b t2i-1024-1.4b t2i-1024-0.3b
bench --config t2i-1024-0.6b --batch 8
for preset in balanced fast; do bench --config t2v-480-0.6b t2i-1024-0.6b --preset $preset; done
for frames in 9 17 65; do bench --config t2v-480-0.6b --frames $frames --repeats 3; done
for size in 256x256 384x384 768x768 1024x1024; do bench --config t2i-512-0.6b --size $size --repeats 3; done
bench --config t2i-512-0.6b t2i-1024-0.6b t2v-480-0.6b --no-compile --repeats 1
exit ${failed:-0}
