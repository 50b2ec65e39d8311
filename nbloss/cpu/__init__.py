"""The CPU backend, from the top down.

solve       a problem to kernel calls, and the plans that are kept of them: solve_pointwise, solve_rowwise, and what
            they share, auxiliary
launch      blocks, threads, the ordered sum
compile     kernels on demand, and their cache; ahead: what `warmup` compiles; parts: how Numba compiles a kernel's
            parts; lowering: and what it writes of them; assembly: and a kernel; operands: how arrays reach it
pointwise   the kernels of pointwise losses; pointwise_driver: their text; lines: their units of work
rowwise     the row-wise kernels, and how work is cut; rowwise_driver: the loops over units of it. A unit is one of
            rows (vectors along a row; unwritten: what they keep of it until it is written; results: what they write),
            groups (vectors along rows, as many rows at once as a vector has lanes; group_rows: what is done with one of
            them), tiles (vectors across rows), streams (likewise, of very many classes, or with few rows folded into a
            vector; columns: what both do with a vector of rows) or picks (the target's entry alone). per_row: what they
            have in common; given: what all of them are given; scanning: what must be known of labels first
targets     nbloss.formulas on vectors; vecmath: exp, log, log1p on vectors; labels: class indices of a vector of rows;
            sums: what keeps the digits that rounding takes
simd        all primitives under one name: arithmetic, bits, folds, lanes, memory, partial, strided, transpose, views
"""
