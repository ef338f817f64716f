"""What the machine code of the kernels may cost, by target: the tests compile them and compare.

Instructions are those of one thread for each score of a tile, in the loops over whole tiles, for
bfloat16 and head dim 64, all passes included: for forward near, both bands too. They are counted,
not timed.
"""

INSTRUCTIONS = {
    "sm_80": {"forward near": 28, "forward far": 12, "backward near": 64, "backward far": 32},
    "sm_90": {"forward near": 24, "forward far": 10, "backward near": 56, "backward far": 32},
}

# Stores to local memory. Dropout's generator takes registers that are not left on some targets; so
# do IEEE products of wide heads, which no matrix instruction makes.
SPILLS = 0
SPILLS_FOLD = 4  # A kernel of no weight, on some targets.
SPILLS_OTHER = 8  # One position term, or heads narrower than 64, on some targets.
SPILLS_DROPOUT = 96
SPILLS_FLOAT32_WIDE = 600
