"""Runs the exact text of Metal kernels on the host, and finds their faults.

Python
------
::

    from msl import library

    lib = library.compile("csrc/metal/x.metal", mode="typed", include_dirs=["csrc"])
    lib.run("q4_matvec_half", threadgroups=(608, 1), threads_per_threadgroup=(32, 2),
            buffers=[weight, scales, biases, x, y, args_bytes])   # by [[buffer(n)]], changed
    lib.run(..., threads=(4864, 2, 1))                      # or the grid in threads
    lib.run(..., constants={"has_bias": True, 3: 64})       # function constants
    lib.run(..., threadgroup_bytes=[1024], order="reverse") # [[threadgroup(0)]]

``compile`` takes paths of .metal files, or a text (several: a list, concatenated).
``mode="check"`` gives a library that also watches every access: ``run`` then raises
``MetalRunError`` for what it finds, and the ``Run`` it returns holds the byte ranges that each
buffer was ``read`` and ``written`` in. Wrap an output in ``library.Unwritten(array)`` and a read
before the first write is an error too; a numpy array with ``flags.writeable`` off must not be
written. A buffer whose content is reached through pointers in another buffer (gpuAddress) is
named in ``resident=[array, ...]``.

C
-
``Library.path`` (or ``python -m msl FILE --mode check -I csrc``, which prints it) is a shared
object with the C interface of ``runtime/msl.h``: ``dlopen`` it, ``dlsym`` ``msl_run`` and fill an
``msl_dispatch``. Buffers are pointers into the caller's memory with sizes. ``runtime/library.h``
wraps that for C++. Everything else in the object is hidden, so that any number of libraries can
be loaded side by side.

The parts
---------
- ``build``: preprocess, lint, rewrite, compile, link; kept by content hash in ``build/msl`` (or
  ``MSL_CACHE``).
- ``lint``: what C++ accepts and Metal doesn't.
- ``rewrite``, ``lexer``: Metal to C++ that keeps its lines.
- ``host/``: Metal's library for clang.
- ``runtime/``: the executor, whose threads are fibers, the checker and the C interface.

Builds
------
Both builds give device, constant and threadgroup pointers clang's own address spaces, so that
mixing them up is a compile error. **typed** runs at full speed. **check** instruments every load
and store and stops at: accesses outside of a buffer or threadgroup variable (byte-exact), races
in threadgroup and device memory, reads of memory never written, writes through const, misaligned
vectors, divergent barriers and simdgroup operations, too large shifts, indices outside of an
array, division by zero. Both start threadgroup memory as NaN, end it at 32 KiB and turn a crash
into an error. A simdgroup operation that not all of its lanes reach is an error, though Metal
defines some of them.

What this can't tell: whether Apple's compiler accepts the text, the order inside simd_sum and
simdgroup_multiply_accumulate, the precision of exp and rsqrt, and speed. Compare with tolerances.
"""
