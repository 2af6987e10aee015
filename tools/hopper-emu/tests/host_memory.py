"""A library that launches kernels, called through ctypes on host memory: host_memory.py LIBRARY, under the emulator."""

import ctypes
import sys

library = ctypes.CDLL(sys.argv[1])
library.launch_axpy.argtypes = [ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
n = 1000
x = (ctypes.c_float * n)(*range(n))
y = (ctypes.c_float * n)(*([1.0] * n))
status = library.launch_axpy(2.0, ctypes.addressof(x), ctypes.addressof(y), n)
assert status == 0, status
assert all(y[i] == 1.0 + 2.0 * i for i in range(n))
