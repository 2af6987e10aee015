"""Compiler launcher: runs a compiler command and fails where ptxas reports that it serialized WGMMA instructions.

ptxas calls that an advisory ("info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized ..."), which
no option of its turns into an error; the kernel would be right and several times slower. The output of a failed compilation
is removed, so that no build tool takes it for good. Works in front of ccache, which repeats the messages of a cached
compilation.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

SERIALIZED = re.compile(rb"\(C75\d\d\)")


def main(command: list[str]) -> int:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    sys.stderr.buffer.write(result.stdout)
    sys.stderr.buffer.flush()
    if result.returncode != 0 or not SERIALIZED.search(result.stdout):
        return result.returncode
    if "-o" in command[:-1]:
        output = command[command.index("-o") + 1]
        if os.path.exists(output):
            os.unlink(output)
    print(
        "fpsattention: this ptxas serializes the WGMMA instructions of a kernel (the line with C75xx above): it would give right "
        "results at a fraction of the speed. Use another CUDA release (docs/architecture.md names those that are tested).",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
