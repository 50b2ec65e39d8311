"""The CUDA backend, from the top down.

plans       calls on device arrays, and how one that is like an earlier call is done again
solve       a problem to kernel launches, by solve_pointwise or solve_rowwise, and what they share, auxiliary;
            choices: which shape of kernel takes rows of so many classes, and what other kernels take
device      a device and a stream, and how users' arrays arrive; arrays: device memory as views, and as results
driver      CUDA itself, through cuda.core and Numba; simulator: the same functions over memory of the host; compile:
            how Numba compiles kernels
pointwise   the kernel of pointwise losses
rowwise     what the kernels of rows have in common: rows (several threads a row; vectors: how they read and write it
            in registers; staged: in shared memory) and planes (a row a thread); and picks (the target's entry alone)
labels      class indices of any integer dtype
sums        sums over rows and blocks, labels read ahead, dtypes converted; groups: sums over threads
functions   nbloss.formulas on scalars
intrinsics  memory by address and single instructions; shared: a block's shared memory; words: elements as they lie in
            memory; threads: what threads, blocks and kernels tell each other
"""
