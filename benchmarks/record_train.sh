#!/bin/sh
# Every row of results/train.json, the most important first: sh benchmarks/record_train.sh [FILE], in the repository's
# root. What fails is in its row, and the rest goes on. "nova" is the command to run, or $NOVA. With two GPUs or more,
# two of them train together as well.
rows=${1:-benchmarks/results/train.json}
bench() { ${NOVA:-nova} bench train --output "$rows" "$@" || failed=1; }
together() { torchrun --nproc-per-node 2 -m nova_video bench train --output "$rows" "$@" || failed=1; }

bench --config t2i-512-0.6b --batch 16
bench --config t2i-1024-0.6b --batch 8
bench --config t2v-480-0.6b --batch 3
for config in t2i-512-0.6b t2i-1024-0.6b t2v-480-0.6b; do bench --config $config --checkpointing; done
bench --config t2i-1024-0.3b t2i-1024-1.4b --batch 8
bench --config t2i-512-0.6b t2v-480-0.6b --precision fp8
bench --config t2i-512-0.6b --mask-ratio sample
bench --config t2i-512-0.6b --no-compile
if [ "$(nvidia-smi --list-gpus 2> /dev/null | wc -l)" -ge 2 ]; then
    for strategy in ddp fsdp; do together --config t2i-512-0.6b t2i-1024-0.6b t2v-480-0.6b --strategy $strategy; done
fi
exit ${failed:-0}
