"""One 64-byte vector type for Numba, and the loads, stores and arithmetic that the kernels are written in.

Numba has no SIMD type, and its loops vectorise only when LLVM agrees; what it then chooses (width, order of a
sum, fused operations) changes with the machine and the call site. Here a ``Vec`` is 64 bytes of float32 or
float64 whatever the machine, a pair of them 128: LLVM splits it where registers are shorter. The order of every sum
is therefore written in the kernel, and results have the same bits serial, parallel, aligned or not.

Each primitive of the modules that are gathered here is a plain Python function that says, on NumPy arrays, what it
does (this is what runs with the JIT off), followed by the LLVM that compiled kernels get for it, or is made of others.

Arguments that recur: `like`, a float32 or float64 scalar, is there for its type, which is that of the vectors; `i` or
`j` is an index in elements; `count`, how many lanes are there; `step`, the lanes of a vector.

Storage types: float32 and float64 as they are; uint16 holds float16 and int16 holds bfloat16 (Numba's CPU
target has neither), both decoded to float32 by ``load`` and rounded to nearest even by ``store``; what would be a
subnormal bfloat16 is 0 where the processor has an instruction for the rounding (AVX512-BF16).
"""

from nbloss.cpu.arithmetic import *  # noqa: F403
from nbloss.cpu.bits import *  # noqa: F403
from nbloss.cpu.folds import *  # noqa: F403
from nbloss.cpu.lanes import *  # noqa: F403
from nbloss.cpu.memory import *  # noqa: F403
from nbloss.cpu.partial import *  # noqa: F403
from nbloss.cpu.parts import inline as inline
from nbloss.cpu.strided import *  # noqa: F403
from nbloss.cpu.transpose import *  # noqa: F403
from nbloss.cpu.views import *  # noqa: F403
