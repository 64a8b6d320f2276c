"""Adds to fine_tuning.py: several ranks share the work. Start it with a launcher.

On one CPU machine:  torchrun --standalone --nproc_per_node 2 examples/two_ranks.py
On GPUs:             accelerate launch --multi_gpu --num_processes 4 examples/two_ranks.py
On two machines, on each with its own --node_rank:
    torchrun --nnodes 2 --node_rank 0 --nproc_per_node 4 \
        --rdzv_backend c10d --rdzv_endpoint HOST:29500 examples/two_ranks.py

Features are computed in shards by all ranks and gathered without padding duplicates; only the main
process saves. Output folder and feature cache must be seen by all machines.
"""

import torch
from fine_tuning import main

if __name__ == "__main__":
    torch.set_num_threads(1)  # the ranks of one machine share its processors
    main()
